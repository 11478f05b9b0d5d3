//! What hyperctl waits for, in one queue: signals, and whatever its threads have seen.

use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};

use hyperinit_client::{Client, Pending};
use hyperinit_protocol::command::Command;
use hyperinit_protocol::fault::{Fault, OrFault};
use hyperinit_protocol::ids::Signal;
use hyperinit_sys::signal::{Set, is_ignored};
use nix::libc;

/// Something happened.
pub enum Event {
    /// hyperctl got a signal.
    Signal(Signal),
    /// The guest is gone: QEMU's or hyperinit's own status.
    GuestEnded(ExitStatus),
    /// The guest is connected, and the process is to be started by this command; then signals and sizes can
    /// be sent to it.
    Start {
        /// The connection.
        client: Arc<Client>,
        /// NEWCONTAINER or EXECCMD.
        command: Command,
        /// Who waits for the reply.
        sent: SyncSender<Pending>,
    },
    /// Nobody reads what the container writes any more.
    Unread,
    /// `run`'s container has exited with this status and the pod is gone, or could not be run.
    Done(Result<u8, Failure>),
}

/// Why a container could not be run to its end.
pub struct Failure {
    /// For a person.
    pub fault: Fault,
    /// The connection broke: the guest's own end, if it comes, says more.
    pub lost: bool,
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Failure {
        Failure { fault, lost: false }
    }
}

/// Whose the signals are that hyperctl gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signals {
    /// hyperctl's: each that would end it ends it in order.
    Own,
    /// A program's, as far as it can have them.
    Program {
        /// It has a terminal. What its keys do to jobs of the caller's shell is then hyperctl's.
        tty: bool,
        /// Standard input is a terminal that hyperctl reads: it is to stop where it reads that in the
        /// background.
        reads_terminal: bool,
    },
}

/// Nobody can have these: the kernel's own two, and those that hyperctl's own children, streams and libraries
/// cause.
const NOBODYS: [i32; 5] = [libc::SIGKILL, libc::SIGSTOP, libc::SIGCHLD, libc::SIGPIPE, libc::SIGURG];
/// They stop a job, or tell one to go on.
const JOBS: [i32; 3] = [libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
/// They end no process, or tell of a fault of its own.
const HARMLESS: [i32; 2] = [libc::SIGCONT, libc::SIGWINCH];
const FAULTS: [i32; 7] =
    [libc::SIGABRT, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGSEGV, libc::SIGSYS, libc::SIGTRAP];

impl Signals {
    /// Whether hyperctl is to be told of one. Otherwise the kernel does with it what it does by default.
    fn has(self, number: i32) -> bool {
        let is_for_a_program = !NOBODYS.contains(&number);
        match self {
            Signals::Own => {
                let spared = [&JOBS[..], &HARMLESS, &FAULTS];
                is_for_a_program && !spared.into_iter().any(|some| some.contains(&number))
            }
            Signals::Program { tty: true, .. } => is_for_a_program && !JOBS.contains(&number),
            Signals::Program { tty: false, reads_terminal } => {
                is_for_a_program && !(reads_terminal && number == libc::SIGTTIN)
            }
        }
    }
}

/// Turns signals into events. What hyperctl was started to ignore is still ignored. Call it before any other
/// thread is started: threads inherit the mask.
pub fn queue(signals: Signals) -> Result<(Sender<Event>, Receiver<Event>), Fault> {
    let all = (1..=64).filter_map(|number| Signal::try_from(number).ok());
    let taken = Set::of(all.filter(|&signal| signals.has(signal.get()) && !is_ignored(signal)));
    taken.block_only().fault("blocking", "signals")?;
    let (events, queue) = channel();
    let signalled = events.clone();
    std::thread::spawn(move || {
        while let Ok(signal) = taken.wait() {
            if signalled.send(Event::Signal(signal)).is_err() {
                break;
            }
        }
    });
    Ok((events, queue))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn has(signals: Signals) -> Vec<i32> {
        (1..=64).filter(|&number| signals.has(number)).collect()
    }

    #[test]
    fn a_program_has_every_signal_that_it_can_have() {
        let all = |without: &[i32]| (1..=64).filter(|number| !without.contains(number)).collect::<Vec<_>>();
        let program = |tty, reads_terminal| has(Signals::Program { tty, reads_terminal });
        // KILL, PIPE, CHLD, STOP, URG.
        assert_eq!(program(false, false), all(&[9, 13, 17, 19, 23]));
        assert_eq!(program(false, true), all(&[9, 13, 17, 19, 21, 23]));
        assert_eq!(program(true, true), all(&[9, 13, 17, 19, 20, 21, 22, 23]));
    }

    #[test]
    fn hyperctl_ends_in_order_by_whatever_would_end_it() {
        let own = has(Signals::Own);
        assert_eq!(own[..9], [1, 2, 3, 10, 12, 14, 15, 16, 24]);
        assert!(own.contains(&34) && own.contains(&64));
        for number in [5, 6, 9, 11, 17, 18, 19, 20, 21, 22, 28] {
            assert!(!own.contains(&number), "{number}");
        }
    }
}

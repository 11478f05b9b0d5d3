//! What hyperctl waits for, in one queue: signals, and whatever its threads have seen.

use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};

use hyperinit::client::{Client, Pending};
use hyperinit::command::Command;
use hyperinit::fault::{Fault, OrFault};
use nix::sys::signal::{SigSet, Signal};

/// Something happened.
pub enum Event {
    /// hyperctl got a signal.
    Signal(Signal),
    /// The guest is gone: QEMU's or hyperinit's own status.
    GuestEnded(ExitStatus),
    /// The guest is connected, and the process is to be started by this command; then signals and sizes can be sent to it.
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

/// Turns `signals` into events. Call it before any other thread is started: threads inherit the mask.
pub fn queue(signals: &[Signal]) -> Result<(Sender<Event>, Receiver<Event>), Fault> {
    let set: SigSet = signals.iter().copied().collect();
    set.thread_block().fault("blocking", "signals")?;
    let (events, queue) = channel();
    let signalled = events.clone();
    std::thread::spawn(move || {
        while let Ok(signal) = set.wait() {
            if signalled.send(Event::Signal(signal)).is_err() {
                break;
            }
        }
    });
    Ok((events, queue))
}

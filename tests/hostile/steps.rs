//! Death at every step: a helper is followed call by call, and killed at each in turn.

use hyperinit::client::CallError;
use nix::sys::ptrace::{self, Options};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::json;

use super::answers;
use super::guest::processes::{kill_hard, process};
use super::guest::{Guest, Kind};
use super::place::until;
use super::witness::Witness;

/// How many stops (two for each call) lie between one death and the next, where a helper comes up and in a start. Odd, so that
/// it dies before and after calls.
const STRIDE: usize = 17;
const STARTS_STRIDE: usize = 5;

/// A helper that stops at each call, before and after it.
struct Followed(Pid);

impl Followed {
    /// The next helper of the warden's, before its first instruction.
    fn birth(name: &str, guest: &Guest) -> Followed {
        let warden = Pid::from_raw(process(guest, "warden", None));
        ptrace::seize(warden, Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_TRACESYSGOOD).unwrap();
        kill_hard(process(guest, name, None));
        match waitpid(warden, Some(WaitPidFlag::__WALL)).unwrap() {
            WaitStatus::PtraceEvent(..) => {}
            other => panic!("{other:?}"),
        }
        let child = Pid::from_raw(i32::try_from(ptrace::getevent(warden).unwrap()).unwrap());
        waitpid(child, Some(WaitPidFlag::__WALL)).unwrap();
        ptrace::detach(warden, None).unwrap();
        Followed(child)
    }

    /// One that runs.
    fn running(name: &str, guest: &Guest) -> Followed {
        let pid = Pid::from_raw(process(guest, name, None));
        ptrace::seize(pid, Options::PTRACE_O_TRACESYSGOOD).unwrap();
        ptrace::interrupt(pid).unwrap();
        waitpid(pid, Some(WaitPidFlag::__WALL)).unwrap();
        Followed(pid)
    }

    /// Lets it go on for so many stops, or until `over`. How many there were.
    fn follow(&self, stops: usize, over: impl Fn() -> bool) -> usize {
        let mut signal = None;
        for stop in 0..stops {
            ptrace::syscall(self.0, signal.take()).unwrap();
            let status = loop {
                match waitpid(self.0, Some(WaitPidFlag::__WALL | WaitPidFlag::WNOHANG)).unwrap() {
                    WaitStatus::StillAlive if over() => return stop,
                    WaitStatus::StillAlive => std::thread::yield_now(),
                    status => break status,
                }
            };
            match status {
                WaitStatus::Stopped(_, other) => signal = Some(other),
                WaitStatus::PtraceSyscall(_) | WaitStatus::PtraceEvent(..) => {}
                other => panic!("it ended by itself: {other:?}"),
            }
        }
        stops
    }

    /// SIGKILL; only then PID 1 can reap it.
    fn kill(self) {
        kill_hard(self.0.as_raw());
        while !matches!(
            waitpid(self.0, Some(WaitPidFlag::__WALL)),
            Ok(WaitStatus::Signaled(..) | WaitStatus::Exited(..)) | Err(_)
        ) {}
    }

    /// Leaves it to itself, wherever it is.
    fn leave(self) {
        let _ = ptrace::interrupt(self.0);
        let _ = waitpid(self.0, Some(WaitPidFlag::__WALL));
        ptrace::detach(self.0, None).unwrap();
    }
}

#[test]
fn a_helper_that_dies_at_any_step_of_coming_up_has_a_successor() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    for name in ["netd", "mountd", "execd", "streamd"] {
        let mut deaths = 0;
        for stops in (0..).step_by(STRIDE) {
            let from = guest.log().len();
            let followed = Followed::birth(name, &guest);
            let up = format!("{name} is up as");
            let reached = followed.follow(stops, || guest.log()[from..].contains(&up));
            let born = followed.0.as_raw();
            followed.kill();
            process(&guest, name, Some(born));
            answers(&guest, name);
            witness.checks(&format!("{name} died after {reached} stops"), name != "streamd");
            if reached < stops {
                break;
            }
            deaths += 1;
        }
        assert!(deaths > 5, "{name} died {deaths} times");
    }
}

/// Runs a container to its end while a helper is followed and dies after so many stops. Whether it died over it.
fn dies_over(guest: &Guest, name: &str, stops: usize) -> bool {
    let followed = Followed::running(name, guest);
    let old = followed.0.as_raw();
    let died = std::thread::scope(|scope| {
        let container = scope.spawn(|| {
            let started = guest.try_container("short", &["sh", "-c", "echo said; exit 3"], json!({}));
            match started {
                Ok(running) => {
                    let outcome = running.end();
                    assert_eq!((outcome.stdout.as_str(), outcome.status), ("said\n", 3), "{name}, {stops}");
                    guest.remove("short");
                }
                Err(CallError::Refused(text)) if name != "streamd" => {
                    assert!(text.contains(&format!("{name}: it died before it answered")), "{text}");
                }
                Err(error) => panic!("{name}, {stops}: {error}"),
            }
        });
        let reached = followed.follow(stops, || container.is_finished());
        if reached == stops {
            followed.kill();
        } else {
            followed.leave();
        }
        if let Err(panic) = container.join() {
            std::panic::resume_unwind(panic);
        }
        reached == stops
    });
    if died {
        process(guest, name, Some(old));
    }
    died
}

#[test]
fn a_helper_that_dies_at_any_step_of_a_start_costs_that_start_at_most() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let processes = || guest.says("main", "ls -d /proc/[0-9]* | wc -l");
    let before = processes();
    let mut witness = Witness::new(&guest);
    for name in ["mountd", "execd", "streamd"] {
        let mut deaths = 0;
        for stops in (1..).step_by(STARTS_STRIDE) {
            if !dies_over(&guest, name, stops) {
                break;
            }
            answers(&guest, name);
            witness.checks(&format!("{name} died after {stops} stops"), name != "streamd");
            deaths += 1;
        }
        assert!(deaths > 10, "{name} died {deaths} times");
    }
    // What execd had made and not told of leaves by itself, and the witness's process with its stdin.
    until(&guest, "somebody is left", || (processes() == before).then_some(()));
}

#[test]
fn a_helper_that_does_not_come_up_is_killed() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let from = guest.log().len();
    let followed = Followed::birth("netd", &guest);
    let born = followed.0.as_raw();
    // Its last sign of life is that it executes; then it stands still.
    followed.follow(40, || false);
    guest.wait_for_log(from, "netd is killed: it does not come up");
    followed.kill();
    process(&guest, "netd", Some(born));
    answers(&guest, "netd");
    witness.checks("a helper that did not come up", true);
}

//! What hyperctl waits for, in one queue: signals, and whatever its threads have seen.

use std::process::ExitStatus;
use std::sync::mpsc::{Receiver, Sender, channel};

use hyperinit::fault::{Fault, OrFault};
use nix::sys::signal::{SigSet, Signal};

/// Something happened.
#[derive(Debug)]
pub enum Event {
    /// hyperctl got a signal.
    Signal(Signal),
    /// The guest is gone: QEMU's or hyperinit's own status.
    GuestEnded(ExitStatus),
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

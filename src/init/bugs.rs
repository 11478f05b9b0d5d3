//! A panic is a bug. The panic hook logs it, and PID 1 goes on with the next event. If every turn panics, PID
//! 1 pauses between turns.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use nix::poll::{PollTimeout, poll};

/// Up to this many panics in a row cost only the events that are dropped.
const EVENTS: u32 = 3;
/// The first pause. Each further pause is twice as long.
const PAUSE: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// The number of panics since the last turn that completed.
#[derive(Debug, Default)]
pub struct Bugs(u32);

impl Bugs {
    /// Runs one turn of the event loop. Returns how long to wait before the next turn, if there were too many
    /// panics.
    pub fn take(&mut self, turn: impl FnOnce()) -> Option<Duration> {
        if catch_unwind(AssertUnwindSafe(turn)).is_ok() {
            self.0 = 0;
            return None;
        }
        self.0 = self.0.saturating_add(1);
        match self.0.checked_sub(EVENTS + 1) {
            None => log::error!("a bug: the event was dropped"),
            Some(0) => log::error!("a bug at every turn: init waits between them, up to a second"),
            Some(_) => {}
        }
        let more = self.0.checked_sub(EVENTS + 1)?;
        Some(PAUSE_MAX.min(PAUSE * 2u32.saturating_pow(more.min(16))))
    }
}

/// Waits, and does nothing else meanwhile, because any work may panic again.
pub fn pause(time: Duration) {
    // Only the kernel can make the wait fail, and PID 1 goes on.
    let _ = poll(&mut [], PollTimeout::try_from(time).unwrap_or(PollTimeout::MAX));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bug_at_every_turn_is_not_run_into_without_end() {
        let mut bugs = Bugs::default();
        let mut fails = || bugs.take(|| panic!("injected"));
        assert_eq!([fails(), fails(), fails()], [None; 3], "the next event may be another");
        let pauses: Vec<u64> = (0..10).map(|_| fails().unwrap().as_millis() as u64).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000, 1000]);
        assert_eq!((0..100).filter_map(|_| fails()).max(), Some(PAUSE_MAX));
        assert_eq!(bugs.take(|| {}), None);
        assert_eq!(bugs.take(|| panic!("injected")), None, "they were in a row, and are not any more");
    }

    #[test]
    fn a_pause_is_one() {
        let began = std::time::Instant::now();
        pause(Duration::from_millis(20));
        assert!(began.elapsed() >= Duration::from_millis(20));
    }
}

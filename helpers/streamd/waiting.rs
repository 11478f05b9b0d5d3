//! The requests whose answer waits until the output that belongs to them has been sent by the port, and for
//! runV a little longer.

use std::collections::VecDeque;
use std::time::Duration;

/// The minimum pause for runV's client after a process that has written anything: its readers may be about to
/// start reading.
const PAUSE: Duration = Duration::from_millis(10);
/// The least number of bytes that the readers of runV's client take in a millisecond.
const BYTES_A_MILLISECOND: usize = 10_000;
/// The most bytes of a process that runV's client may still hold: those that it keeps for its readers (1 MB,
/// runV's lib/utils/bytespipe.go), and those waiting in its socket.
const UNREAD_MAX: usize = 1_200_000;

/// How long an answer waits after the last byte of a process that has written `written` bytes.
///
/// runV's client keeps a process's output for readers in other processes, which take 32 kB at a time. On the
/// event of the process's end it discards the output that they have not taken.
pub fn pause(written: usize) -> Duration {
    match written.min(UNREAD_MAX) {
        0 => Duration::ZERO,
        unread => PAUSE + Duration::from_millis((unread / BYTES_A_MILLISECOND) as u64),
    }
}

/// Requests that have no answer yet.
#[derive(Debug, Default)]
pub struct Waiting {
    requests: VecDeque<Request>,
}

#[derive(Debug)]
struct Request {
    id: u64,
    /// The place in the buffer up to which output must be sent first.
    end: u64,
    /// How long the answer waits after that.
    pause: Duration,
    /// When the answer is due; set once the output has been sent.
    due: Option<Duration>,
}

impl Waiting {
    /// Adds a request: `id` is to be answered `pause` after everything before the place `end` has been sent.
    pub fn add(&mut self, id: u64, end: u64, pause: Duration) {
        self.requests.push_back(Request { id, end, pause, due: None });
    }

    /// Takes the requests that can be answered now.
    pub fn due(&mut self, now: Duration, has_left: impl Fn(u64) -> bool) -> Vec<u64> {
        let mut due = Vec::new();
        self.requests.retain_mut(|request| {
            if request.due.is_none() && has_left(request.end) {
                request.due = Some(now + request.pause);
            }
            let is_due = request.due.is_some_and(|at| at <= now);
            if is_due {
                due.push(request.id);
            }
            !is_due
        });
        due
    }

    /// When the next answer that waits only for its pause is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.requests.iter().filter_map(|request| request.due).min()
    }

    /// Whether no request waits.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// The numbers of the waiting requests, in order.
    #[cfg(test)]
    pub fn owed(&self) -> Vec<u64> {
        self.requests.iter().map(|request| request.id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    #[test]
    fn a_request_without_a_pause_is_answered_when_its_bytes_have_left() {
        let mut waiting = Waiting::default();
        waiting.add(7, 10, Duration::ZERO);
        waiting.add(8, 20, Duration::ZERO);
        assert!(waiting.due(NOW, |_| false).is_empty());
        assert_eq!(waiting.deadline(), None);
        assert_eq!(waiting.due(NOW, |end| end <= 10), [7]);
        assert_eq!(waiting.due(NOW, |_| true), [8]);
        assert!(waiting.is_empty());
    }

    #[test]
    fn a_pause_begins_when_the_bytes_have_left() {
        let mut waiting = Waiting::default();
        let pause = Duration::from_millis(5);
        waiting.add(7, 10, pause);
        waiting.add(8, 20, Duration::ZERO);
        assert!(waiting.due(NOW - pause, |_| false).is_empty());
        assert_eq!(waiting.due(NOW, |_| true), [8], "nobody waits for another's readers");
        assert_eq!(waiting.deadline(), Some(NOW + pause));
        assert!(waiting.due(NOW + pause / 2, |_| true).is_empty());
        assert_eq!(waiting.due(NOW + pause, |_| true), [7]);
    }

    #[test]
    fn a_pause_is_as_long_as_the_readers_may_take() {
        assert_eq!(pause(0), Duration::ZERO);
        assert_eq!(pause(1), PAUSE);
        assert_eq!(pause(200_000), PAUSE + Duration::from_millis(20));
        assert_eq!(pause(usize::MAX), pause(UNREAD_MAX));
    }
}

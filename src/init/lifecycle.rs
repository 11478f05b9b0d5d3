//! The life of each helper: starting, coming up, up, down, and closed after too many deaths in a row.

use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::ids::Pid;
use crate::wire::Instance;
use crate::wire::channel::Outbox;

/// After this many deaths in a row, without an answered request between them, a role is closed: requests to
/// it are refused at once, and another helper is tried from time to time. The cause of the deaths may pass,
/// such as a want of memory.
pub const DEATHS_MAX: u32 = 8;
/// How long a role stays closed before another helper is tried.
const CLOSED: Duration = Duration::from_secs(30);
/// A helper that has lived this long has not died in a row with its predecessors. Without this rule a role
/// that gets no requests would be closed after eight deaths in a year.
const FORGIVEN: Duration = Duration::from_secs(60);
/// The longest pause before a restart. The first restart is immediate; the pauses then double from 50 ms.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
const BACKOFF: Duration = Duration::from_millis(50);
/// How long PID 1 waits before it tries a helper again that it had no room for.
const WANT_PAUSE: Duration = Duration::from_millis(500);
/// How long the warden may take to start a helper, and how long the helper may take to come up.
const START_TIMEOUT: Duration = Duration::from_secs(20);

/// One helper.
pub struct Helper {
    /// The helper's role and number.
    pub instance: Instance,
    /// init's end of the socket on which the helper speaks. None once init no longer listens.
    pub voice: Option<OwnedFd>,
    /// The process has been reaped. Its pid may belong to another process now, so it must not be killed.
    pub is_reaped: bool,
    state: State,
    /// How many answers the warden owes. A lost answer stays owed, which only makes init believe the warden
    /// for longer.
    owed: u32,
    deaths: u32,
    /// No process can start another helper.
    is_last: bool,
    /// The helper is to be started as soon as it may. This holds for the first of a role always, and for
    /// others when the supervisor asks for them.
    is_wanted: bool,
    /// The helper was ended because it is not needed: its death does not count.
    is_dismissed: bool,
}

enum State {
    /// The warden was asked for it.
    Starting { until: Duration },
    /// It was executed, and has not yet said that it is up.
    Coming { pid: Pid, outbox: Outbox, until: Duration },
    /// It answers requests.
    Up { pid: Pid, outbox: Outbox, since: Duration },
    /// It waits for its restart, or until it is wanted.
    Down { until: Duration },
    /// It died too often. It is tried again at this time, if the warden is still there.
    Closed { until: Option<Duration> },
}

/// What a change of state means for the rest of init.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// Ask the warden to start it.
    Start,
    /// It does not come up: kill it.
    Kill,
    /// It is dead, and will be started again.
    Gone,
    /// It is dead, and requests to it fail.
    Closed,
}

impl Helper {
    /// A helper that waits for its start. The first of a role starts at once, another when it is wanted.
    pub fn new(instance: Instance) -> Helper {
        Helper {
            instance,
            voice: None,
            is_reaped: false,
            state: State::Down { until: Duration::ZERO },
            owed: 0,
            deaths: 0,
            is_last: false,
            is_wanted: !instance.is_extra(),
            is_dismissed: false,
        }
    }

    /// The supervisor needs it.
    pub fn want(&mut self) {
        self.is_wanted = true;
    }

    /// The supervisor does not need it any more, and it is killed.
    pub fn dismiss(&mut self) {
        self.is_dismissed = true;
    }

    /// Whether it was ended because it is not needed.
    pub fn is_dismissed(&self) -> bool {
        self.is_dismissed
    }

    /// The process, if it may still be killed because it has not been reaped.
    pub fn killable(&self) -> Option<Pid> {
        match &self.state {
            State::Coming { pid, .. } | State::Up { pid, .. } if !self.is_reaped => Some(*pid),
            State::Coming { .. } | State::Up { .. } => None,
            State::Starting { .. } | State::Down { .. } | State::Closed { .. } => None,
        }
    }

    /// Where its requests go, while it is up.
    pub fn outbox(&self) -> Option<&Outbox> {
        match &self.state {
            State::Up { outbox, .. } => Some(outbox),
            State::Starting { .. } | State::Coming { .. } | State::Down { .. } | State::Closed { .. } => None,
        }
    }

    /// init asks the warden to start it.
    pub fn starting(&mut self, now: Duration) {
        self.state = State::Starting { until: now + START_TIMEOUT };
    }

    /// The request has been sent, so the warden owes an answer.
    pub fn asked(&mut self) {
        self.owed = self.owed.saturating_add(1);
    }

    /// Whether the warden owes an answer.
    pub fn is_owed(&self) -> bool {
        self.owed > 0
    }

    /// The warden answered, in time or late.
    pub fn told(&mut self) {
        self.owed = self.owed.saturating_sub(1);
    }

    /// Whether the warden was asked for it and has not answered.
    pub fn is_starting(&self) -> bool {
        matches!(self.state, State::Starting { .. })
    }

    /// The warden executed it.
    pub fn coming(&mut self, now: Duration, pid: Pid, outbox: Outbox) {
        (self.is_reaped, self.is_dismissed) = (false, false);
        self.state = State::Coming { pid, outbox, until: now + START_TIMEOUT };
    }

    /// It says that it is up. Returns its process, or none if this is not the time to say so.
    pub fn up(&mut self, now: Duration) -> Option<Pid> {
        match std::mem::replace(&mut self.state, State::Closed { until: None }) {
            State::Coming { pid, outbox, .. } => {
                self.state = State::Up { pid, outbox, since: now };
                Some(pid)
            }
            other => {
                self.state = other;
                None
            }
        }
    }

    /// It answered a request, so its deaths so far were not in a row.
    pub fn answered(&mut self) {
        self.deaths = 0;
    }

    /// It could not be started.
    pub fn failed(&mut self, now: Duration) -> Change {
        match self.state {
            State::Starting { .. } => self.die(now),
            State::Coming { .. } | State::Up { .. } | State::Down { .. } | State::Closed { .. } => {
                Change::None
            }
        }
    }

    /// PID 1 had no memory or no place to watch it. The helper itself is sound, so this is no death, and
    /// another is tried until there is room.
    pub fn put_off(&mut self, now: Duration) -> Change {
        match self.state {
            State::Starting { .. } if self.is_last => self.close(),
            State::Starting { .. } => {
                self.is_wanted = !self.instance.is_extra();
                self.state = State::Down { until: now + WANT_PAUSE };
                Change::Gone
            }
            State::Coming { .. } | State::Up { .. } | State::Down { .. } | State::Closed { .. } => {
                Change::None
            }
        }
    }

    /// It was reaped, and everything it had said has been read.
    pub fn reaped(&mut self, now: Duration) -> Change {
        match self.state {
            State::Coming { .. } | State::Up { .. } => self.die(now),
            State::Starting { .. } | State::Down { .. } | State::Closed { .. } => Change::None,
        }
    }

    /// The warden is gone, so no process can start it any more.
    pub fn close(&mut self) -> Change {
        self.is_last = true;
        match self.state {
            // A living helper works on; its next death is its last.
            State::Coming { .. } | State::Up { .. } => Change::None,
            State::Closed { .. } => {
                self.state = State::Closed { until: None };
                Change::None
            }
            State::Starting { .. } | State::Down { .. } => {
                self.state = State::Closed { until: None };
                Change::Closed
            }
        }
    }

    /// When [`Helper::tick`] has something to do.
    pub fn deadline(&self) -> Option<Duration> {
        match &self.state {
            State::Starting { until } | State::Coming { until, .. } => Some(*until),
            State::Down { until } => self.is_wanted.then_some(*until),
            State::Closed { until } => *until,
            State::Up { .. } => None,
        }
    }

    /// Acts on the time.
    pub fn tick(&mut self, now: Duration) -> Change {
        if self.deadline().is_none_or(|until| now < until) {
            return Change::None;
        }
        match &mut self.state {
            // The supervisor will say again whether it needs the helper.
            State::Closed { .. } if self.instance.is_extra() => {
                self.state = State::Down { until: now };
                Change::Gone
            }
            State::Down { .. } | State::Closed { .. } => Change::Start,
            State::Starting { .. } => self.die(now),
            State::Coming { until, .. } => {
                *until = now + START_TIMEOUT;
                Change::Kill
            }
            State::Up { .. } => Change::None,
        }
    }

    fn die(&mut self, now: Duration) -> Change {
        match self.state {
            State::Up { since, .. } if now >= since + FORGIVEN => self.deaths = 0,
            State::Starting { .. }
            | State::Coming { .. }
            | State::Up { .. }
            | State::Down { .. }
            | State::Closed { .. } => {}
        }
        self.is_wanted = !self.instance.is_extra();
        if std::mem::take(&mut self.is_dismissed) && !self.is_last {
            self.state = State::Down { until: now };
            return Change::Gone;
        }
        let pause = match self.deaths {
            0 => Duration::ZERO,
            deaths => BACKOFF_MAX.min(BACKOFF * 2u32.saturating_pow(deaths - 1)),
        };
        self.deaths = self.deaths.saturating_add(1);
        if self.is_last || self.deaths >= DEATHS_MAX {
            self.state = State::Closed { until: (!self.is_last).then_some(now + CLOSED) };
            return Change::Closed;
        }
        self.state = State::Down { until: now + pause };
        Change::Gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::Role;
    use crate::wire::bootstrap::socket_pair;
    use crate::wire::channel::Post;

    const NOW: Duration = Duration::from_secs(100);

    fn outbox() -> Outbox {
        let (end, _helpers) = socket_pair().unwrap();
        Post::new().unwrap().outbox(Instance::first(Role::Netd), end).unwrap()
    }

    fn coming() -> Helper {
        let mut helper = Helper::new(Instance::first(Role::Netd));
        assert_eq!(helper.tick(NOW), Change::Start);
        helper.starting(NOW);
        helper.coming(NOW, Pid(7), outbox());
        helper
    }

    fn up() -> Helper {
        let mut helper = coming();
        assert_eq!(helper.up(NOW), Some(Pid(7)));
        helper
    }

    #[test]
    fn a_death_is_when_it_was_reaped() {
        for mut helper in [coming(), up()] {
            assert_eq!(helper.killable(), Some(Pid(7)));
            helper.is_reaped = true;
            assert_eq!(helper.killable(), None);
            assert_eq!(helper.reaped(NOW), Change::Gone);
            assert_eq!(helper.tick(NOW), Change::Start, "the first restart is immediate");
        }
    }

    #[test]
    fn nothing_is_asked_of_it_before_it_is_up_and_it_says_so_once() {
        let mut helper = coming();
        assert!(helper.outbox().is_none());
        assert_eq!(helper.up(NOW), Some(Pid(7)));
        assert!(helper.outbox().is_some());
        assert_eq!(helper.up(NOW), None);
        assert!(helper.outbox().is_some());
    }

    #[test]
    fn one_that_does_not_come_up_is_killed() {
        let mut helper = coming();
        assert_eq!(helper.tick(NOW), Change::None);
        assert_eq!(helper.tick(NOW + START_TIMEOUT), Change::Kill);
        assert_eq!(helper.tick(NOW + START_TIMEOUT), Change::None, "it dies in its own time");
        assert_eq!(helper.reaped(NOW + START_TIMEOUT), Change::Gone);
        assert_eq!(up().tick(NOW + START_TIMEOUT), Change::None);
    }

    #[test]
    fn too_many_deaths_in_a_row_close_it() {
        let mut helper = up();
        let mut now = NOW;
        for death in 1..DEATHS_MAX {
            assert_eq!(helper.reaped(now), Change::Gone, "death {death}");
            now = helper.deadline().unwrap();
            assert_eq!(helper.tick(now), Change::Start);
            helper.starting(now);
            helper.coming(now, Pid(7), outbox());
            assert_eq!(helper.up(now), Some(Pid(7)));
        }
        assert_eq!(helper.reaped(now), Change::Closed);
        assert_eq!(helper.tick(now), Change::None);
    }

    #[test]
    fn one_that_is_closed_is_tried_once_in_a_while_and_is_itself_again_when_it_answers() {
        let mut helper = up();
        let mut now = NOW;
        let mut tried = |helper: &mut Helper| {
            now = helper.deadline().unwrap();
            assert_eq!(helper.tick(now), Change::Start);
            helper.starting(now);
            helper.coming(now, Pid(7), outbox());
            assert_eq!(helper.up(now), Some(Pid(7)));
            now
        };
        while helper.reaped(NOW) != Change::Closed {
            tried(&mut helper);
        }
        for round in 1..=3 {
            let now = tried(&mut helper);
            assert_eq!(helper.reaped(now), Change::Closed, "one death more");
            assert_eq!(helper.deadline(), Some(now + CLOSED), "round {round}");
        }
        // A helper that could not even be started.
        let now = helper.deadline().unwrap();
        helper.starting(now);
        assert_eq!(helper.failed(now), Change::Closed);
        let now = tried(&mut helper);
        helper.answered();
        assert_eq!(helper.reaped(now), Change::Gone);
        assert_eq!(helper.tick(now), Change::Start, "at once");
        // Without a warden there is nothing to wait for.
        assert_eq!(helper.close(), Change::Closed);
        assert_eq!(helper.close(), Change::None);
        assert_eq!(helper.deadline(), None);
    }

    #[test]
    fn one_that_init_has_no_room_for_is_tried_until_there_is() {
        let mut helper = Helper::new(Instance::first(Role::Streamd));
        let mut now = NOW;
        for _ in 0..3 * DEATHS_MAX {
            assert_eq!(helper.tick(now), Change::Start);
            helper.starting(now);
            assert_eq!(helper.put_off(now), Change::Gone);
            assert_eq!(helper.tick(now), Change::None, "not at once");
            now += WANT_PAUSE;
        }
        assert_eq!(helper.tick(now), Change::Start);
        helper.starting(now);
        helper.coming(now, Pid(7), outbox());
        assert_eq!((helper.put_off(now), helper.up(now)), (Change::None, Some(Pid(7))));
        // The warden is gone.
        let mut last = Helper::new(Instance::first(Role::Netd));
        last.starting(now);
        last.is_last = true;
        assert_eq!(last.put_off(now), Change::Closed);
        // A helper that runs only while it is needed has to be asked for again.
        let mut extra = Helper::new(Instance::mountd(1).unwrap());
        extra.want();
        extra.starting(now);
        assert_eq!(extra.put_off(now), Change::Gone);
        assert_eq!(extra.deadline(), None);
    }

    #[test]
    fn an_answer_between_deaths_starts_the_count_again() {
        let mut helper = up();
        for _ in 0..3 * DEATHS_MAX {
            helper.answered();
            assert_eq!(helper.reaped(NOW), Change::Gone);
            helper.starting(NOW);
            helper.coming(NOW, Pid(7), outbox());
            assert_eq!(helper.up(NOW), Some(Pid(7)));
        }
    }

    #[test]
    fn a_long_life_between_deaths_starts_the_count_again() {
        let mut helper = up();
        let mut now = NOW;
        for _ in 0..3 * DEATHS_MAX {
            now += FORGIVEN;
            assert_eq!(helper.reaped(now), Change::Gone);
            assert_eq!(helper.tick(now), Change::Start, "at once");
            helper.starting(now);
            helper.coming(now, Pid(7), outbox());
            assert_eq!(helper.up(now), Some(Pid(7)));
        }
        helper.close();
        now += FORGIVEN;
        assert_eq!(helper.reaped(now), Change::Closed, "nobody is there to start another");
    }

    fn extra() -> Helper {
        let mut helper = Helper::new(Instance::mountd(1).unwrap());
        assert_eq!((helper.deadline(), helper.tick(NOW)), (None, Change::None), "nobody needs it");
        helper.want();
        assert_eq!(helper.tick(NOW), Change::Start);
        helper.starting(NOW);
        helper.coming(NOW, Pid(7), outbox());
        assert_eq!(helper.up(NOW), Some(Pid(7)));
        helper
    }

    #[test]
    fn one_that_runs_while_it_is_needed_is_not_started_by_itself() {
        let mut helper = extra();
        assert_eq!(helper.reaped(NOW), Change::Gone);
        assert_eq!((helper.deadline(), helper.tick(NOW)), (None, Change::None));
        helper.want();
        assert_eq!(helper.tick(NOW), Change::Start, "the first restart is immediate");
    }

    #[test]
    fn the_end_of_one_that_is_not_needed_is_no_death() {
        let mut helper = extra();
        for _ in 0..2 * DEATHS_MAX {
            helper.dismiss();
            assert!(helper.is_dismissed());
            assert_eq!(helper.reaped(NOW), Change::Gone);
            helper.want();
            assert_eq!(helper.tick(NOW), Change::Start);
            helper.starting(NOW);
            helper.coming(NOW, Pid(7), outbox());
            assert!(!helper.is_dismissed());
            assert_eq!(helper.up(NOW), Some(Pid(7)));
        }
    }

    #[test]
    fn one_that_dies_again_and_again_is_not_started_for_a_while_even_if_it_is_wanted() {
        let mut helper = extra();
        let mut now = NOW;
        while helper.reaped(now) != Change::Closed {
            helper.want();
            now = helper.deadline().unwrap();
            assert_eq!(helper.tick(now), Change::Start);
            helper.starting(now);
            helper.coming(now, Pid(7), outbox());
            assert_eq!(helper.up(now), Some(Pid(7)));
        }
        assert_eq!(helper.deadline(), Some(now + CLOSED));
        assert_eq!(helper.tick(now + CLOSED), Change::Gone, "from now on it may be asked for again");
        assert_eq!(helper.deadline(), None);
        helper.want();
        assert_eq!(helper.tick(now + CLOSED), Change::Start);
        assert_eq!(helper.close(), Change::Closed, "without a warden nobody starts it");
        assert_eq!(helper.deadline(), None);
    }

    #[test]
    fn without_a_warden_the_next_death_is_the_last() {
        for mut helper in [coming(), up()] {
            assert_eq!(helper.close(), Change::None);
            assert_eq!(helper.reaped(NOW), Change::Closed);
        }
        let mut down = Helper::new(Instance::first(Role::Execd));
        assert_eq!(down.close(), Change::Closed);
    }
}

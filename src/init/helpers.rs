//! The lives of the helpers: starting, up, down, and after too many deaths in a row closed.

use std::time::Duration;

use ipc_channel::ipc::{IpcSender, OpaqueIpcSender};

use crate::fault::Fault;
use crate::ids::Pid;
use crate::supervisor::HelperRequest;
use crate::wire::{self, Role};

/// Deaths in a row, without one answered request between them, after which a role is closed.
pub const DEATHS_MAX: u32 = 8;
/// A helper that has lived for so long has not died in a row with its predecessors: one that nobody asks anything must not
/// be closed for eight deaths in a year.
const FORGIVEN: Duration = Duration::from_secs(60);
/// The longest pause before a restart; the first is immediate, the others double from 50 ms.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
const BACKOFF: Duration = Duration::from_millis(50);
/// How long the warden may take to start a helper.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a reaped helper's last words may take: its reader may sleep for good (sys::alloc).
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Requests to one helper, by its edge.
pub enum Sender {
    Netd(IpcSender<wire::Request<wire::netd::Request>>),
    Mountd(IpcSender<wire::Request<wire::mountd::Request>>),
    Execd(IpcSender<wire::Request<wire::execd::Request>>),
    Streamd(IpcSender<wire::Request<wire::streamd::Request>>),
}

impl Sender {
    /// The sender of a role's edge; the type is a promise of this binary's own helper, not checked by the kernel.
    pub fn new(role: Role, requests: OpaqueIpcSender) -> Sender {
        match role {
            Role::Netd => Sender::Netd(requests.to()),
            Role::Mountd => Sender::Mountd(requests.to()),
            Role::Execd => Sender::Execd(requests.to()),
            Role::Streamd => Sender::Streamd(requests.to()),
        }
    }

    /// Sends one request. Requests are small and few at a time (channel.rs), so this does not wait.
    pub fn send(&self, id: u64, request: HelperRequest) -> Result<(), Fault> {
        let sent = match (self, request) {
            (Sender::Netd(sender), HelperRequest::Netd(body)) => sender.send(wire::Request { id, body }),
            (Sender::Mountd(sender), HelperRequest::Mountd(body)) => sender.send(wire::Request { id, body }),
            (Sender::Execd(sender), HelperRequest::Execd(body)) => sender.send(wire::Request { id, body }),
            (Sender::Streamd(sender), HelperRequest::Streamd(body)) => {
                sender.send(wire::Request { id, body })
            }
            (
                Sender::Netd(_) | Sender::Mountd(_) | Sender::Execd(_) | Sender::Streamd(_),
                HelperRequest::Netd(_)
                | HelperRequest::Mountd(_)
                | HelperRequest::Execd(_)
                | HelperRequest::Streamd(_),
            ) => return Err(Fault::new("asking", "a helper", "the request is another helper's")),
        };
        sent.map_err(|error| Fault::new("asking", "a helper", error.to_string()))
    }
}

/// One helper.
pub struct Helper {
    /// Which.
    pub role: Role,
    /// How many times it was started: what a reader says of an earlier life is old news.
    pub life: u64,
    state: State,
    deaths: u32,
}

enum State {
    /// The warden was asked.
    Starting { until: Duration },
    /// It answers requests.
    Up { pid: Pid, sender: Sender, since: Duration, end: End },
    /// It waits for its restart.
    Down { until: Duration },
    /// It died too often.
    Closed,
}

/// The two signs of a death, in either order: its channel ended, and it was reaped.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    None,
    Silent,
    Reaped { until: Duration },
}

/// What a change of state means for the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// Ask the warden to start it.
    Start,
    /// It is dead, and will be started again.
    Gone,
    /// It is dead for good.
    Closed,
}

impl Helper {
    /// A helper that is to be started now.
    pub fn new(role: Role) -> Helper {
        Helper { role, life: 0, state: State::Down { until: Duration::ZERO }, deaths: 0 }
    }

    /// The process that may still be killed: up and not yet reaped.
    pub fn killable(&self) -> Option<Pid> {
        match &self.state {
            State::Up { pid, end: End::None | End::Silent, .. } => Some(*pid),
            State::Up { .. } | State::Starting { .. } | State::Down { .. } | State::Closed => None,
        }
    }

    /// Where its requests go, while it is up.
    pub fn sender(&self) -> Option<&Sender> {
        match &self.state {
            State::Up { sender, .. } => Some(sender),
            State::Starting { .. } | State::Down { .. } | State::Closed => None,
        }
    }

    /// The warden was asked to start it.
    pub fn starting(&mut self, now: Duration) {
        self.state = State::Starting { until: now + START_TIMEOUT };
    }

    /// The warden started it. False: nobody asked.
    pub fn up(&mut self, pid: Pid, sender: Sender, now: Duration) -> bool {
        if !matches!(self.state, State::Starting { .. }) {
            return false;
        }
        self.life += 1;
        self.state = State::Up { pid, sender, since: now, end: End::None };
        true
    }

    /// It answered a request: its deaths so far were not in a row.
    pub fn answered(&mut self) {
        self.deaths = 0;
    }

    /// It could not be started.
    pub fn failed(&mut self, now: Duration) -> Change {
        match self.state {
            State::Starting { .. } => self.die(now),
            State::Up { .. } | State::Down { .. } | State::Closed => Change::None,
        }
    }

    /// Its channel ended.
    pub fn silent(&mut self, now: Duration) -> Change {
        match &mut self.state {
            State::Up { end: End::Reaped { .. }, .. } => self.die(now),
            State::Up { end, .. } => {
                *end = End::Silent;
                Change::None
            }
            State::Starting { .. } | State::Down { .. } | State::Closed => Change::None,
        }
    }

    /// It was reaped.
    pub fn reaped(&mut self, now: Duration) -> Change {
        match &mut self.state {
            State::Up { end: End::Silent, .. } => self.die(now),
            State::Up { end, .. } => {
                *end = End::Reaped { until: now + LAST_WORDS };
                Change::None
            }
            State::Starting { .. } | State::Down { .. } | State::Closed => Change::None,
        }
    }

    /// Nobody can start it any more.
    pub fn close(&mut self) -> Change {
        match self.state {
            State::Closed => Change::None,
            State::Up { .. } => {
                // It works on; its next death is its last.
                self.deaths = DEATHS_MAX;
                Change::None
            }
            State::Starting { .. } | State::Down { .. } => {
                self.state = State::Closed;
                Change::Closed
            }
        }
    }

    /// When [`Helper::tick`] has something to do.
    pub fn deadline(&self) -> Option<Duration> {
        match &self.state {
            State::Starting { until } | State::Down { until } => Some(*until),
            State::Up { end: End::Reaped { until }, .. } => Some(*until),
            State::Up { .. } | State::Closed => None,
        }
    }

    /// Time passes.
    pub fn tick(&mut self, now: Duration) -> Change {
        match (self.deadline(), &self.state) {
            (Some(until), _) if now < until => Change::None,
            (Some(_), State::Down { .. }) => Change::Start,
            (Some(_), State::Starting { .. } | State::Up { .. }) => self.die(now),
            (Some(_), State::Closed) | (None, _) => Change::None,
        }
    }

    fn die(&mut self, now: Duration) -> Change {
        match self.state {
            State::Up { since, .. } if now >= since + FORGIVEN && self.deaths < DEATHS_MAX => self.deaths = 0,
            State::Up { .. } | State::Starting { .. } | State::Down { .. } | State::Closed => {}
        }
        let pause = match self.deaths {
            0 => Duration::ZERO,
            deaths => BACKOFF_MAX.min(BACKOFF * 2u32.saturating_pow(deaths - 1)),
        };
        self.deaths += 1;
        if self.deaths >= DEATHS_MAX {
            self.state = State::Closed;
            return Change::Closed;
        }
        self.state = State::Down { until: now + pause };
        Change::Gone
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ipc_channel::ipc;

    const NOW: Duration = Duration::from_secs(100);

    fn sender() -> Sender {
        Sender::new(Role::Netd, ipc::channel::<u8>().unwrap().0.to_opaque())
    }

    fn up() -> Helper {
        let mut helper = Helper::new(Role::Netd);
        assert_eq!(helper.tick(NOW), Change::Start);
        helper.starting(NOW);
        assert!(helper.up(Pid(7), sender(), NOW));
        helper
    }

    #[test]
    fn a_death_has_two_signs_in_either_order() {
        let mut helper = up();
        assert_eq!(helper.silent(NOW), Change::None);
        assert_eq!(helper.killable(), Some(Pid(7)));
        assert_eq!(helper.reaped(NOW), Change::Gone);
        let mut helper = up();
        assert_eq!(helper.reaped(NOW), Change::None);
        assert_eq!(helper.killable(), None, "a reaped pid may be somebody else's");
        assert_eq!(helper.silent(NOW), Change::Gone);
        assert_eq!(helper.tick(NOW), Change::Start, "the first restart is immediate");
    }

    #[test]
    fn a_sleeping_reader_does_not_hold_up_the_restart() {
        let mut helper = up();
        helper.reaped(NOW);
        assert_eq!(helper.tick(NOW), Change::None);
        assert_eq!(helper.tick(NOW + LAST_WORDS), Change::Gone);
    }

    #[test]
    fn too_many_deaths_in_a_row_close_it() {
        let mut helper = up();
        let mut now = NOW;
        for death in 1..DEATHS_MAX {
            helper.silent(now);
            assert_eq!(helper.reaped(now), Change::Gone, "death {death}");
            now = helper.deadline().unwrap();
            assert_eq!(helper.tick(now), Change::Start);
            helper.starting(now);
            assert!(helper.up(Pid(7), sender(), NOW));
        }
        helper.silent(now);
        assert_eq!(helper.reaped(now), Change::Closed);
        assert_eq!(helper.deadline(), None);
    }

    #[test]
    fn an_answer_between_deaths_starts_the_count_again() {
        let mut helper = up();
        for _ in 0..3 * DEATHS_MAX {
            helper.answered();
            helper.silent(NOW);
            assert_eq!(helper.reaped(NOW), Change::Gone);
            helper.starting(NOW);
            assert!(helper.up(Pid(7), sender(), NOW));
        }
    }

    #[test]
    fn a_long_life_between_deaths_starts_the_count_again() {
        let mut helper = up();
        let mut now = NOW;
        for _ in 0..3 * DEATHS_MAX {
            now += FORGIVEN;
            helper.silent(now);
            assert_eq!(helper.reaped(now), Change::Gone);
            assert_eq!(helper.tick(now), Change::Start, "at once");
            helper.starting(now);
            assert!(helper.up(Pid(7), sender(), now));
        }
        helper.close();
        now += FORGIVEN;
        helper.silent(now);
        assert_eq!(helper.reaped(now), Change::Closed, "nobody is there to start another");
    }

    #[test]
    fn without_a_warden_the_next_death_is_the_last() {
        let mut helper = up();
        assert_eq!(helper.close(), Change::None);
        helper.silent(NOW);
        assert_eq!(helper.reaped(NOW), Change::Closed);
        let mut down = Helper::new(Role::Execd);
        assert_eq!(down.close(), Change::Closed);
    }
}

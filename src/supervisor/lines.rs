//! The requests to the helpers: queued, sent a few at a time, timed, and asked again of a successor where that is safe.

use std::collections::{BTreeMap, VecDeque};
use std::mem::discriminant;
use std::time::Duration;

use super::ask::{Answer, Ask, HelperReply, WORK};
use super::state::Purpose;
use crate::fault::Fault;
use crate::ids::Pid;
use crate::wire::Role;

/// How many requests one helper may have in its socket. They fit it (channel.rs), so that init never waits to
/// send.
const WINDOW: usize = 16;
/// After how long without an answer execd is asked how much it has taken from its socket, when that may be
/// full of starts that all take their time. Others' starts wait for so long.
const PROD: Duration = Duration::from_millis(20);

/// A request that has no answer yet.
#[derive(Debug)]
pub(super) struct Pending {
    id: u64,
    ask: Ask,
    purpose: Purpose,
    tries: u32,
    /// When it was sent the last time.
    sent: Duration,
    /// A start that execd has taken from its socket: it has answered what was sent behind it.
    begun: bool,
}

/// What came of a request, and what it was for.
#[derive(Debug)]
pub(super) struct Outcome {
    /// What it was for.
    pub(super) purpose: Purpose,
    /// What came of it.
    pub(super) result: Result<Answer, Fault>,
    /// The one helper that was asked has said so itself, or was not even asked: what it could not do is undone.
    pub(super) answered: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Down,
    Up(Pid),
    Closed,
}

/// The way to one helper.
#[derive(Debug, Default)]
struct Line {
    state: State,
    /// Only what was put first may be sent: the helper is not what it has to be yet.
    barred: bool,
    queued: VecDeque<Pending>,
    sent: VecDeque<Pending>,
    /// Since when it works on the oldest of `sent`.
    since: Duration,
    /// When it answered the last time, or got something to do.
    heard: Duration,
    /// It is being killed; of a liar nothing is believed any more.
    killed: bool,
    lied: bool,
}

impl Line {
    /// The next request that can be sent.
    fn send(&mut self, now: Duration) -> Option<(u64, Ask)> {
        let first = self.queued.front().is_some_and(|pending| pending.purpose.comes_first());
        // What comes first is little, and does not wait for a host that lets the others wait.
        let room = first || (!self.barred && self.has_room());
        if !matches!(self.state, State::Up(_)) || self.killed || !room {
            return None;
        }
        let mut pending = self.queued.pop_front()?;
        pending.tries += 1;
        (pending.sent, pending.begun) = (now, false);
        if self.sent.is_empty() {
            (self.since, self.heard) = (now, now);
        }
        let ask = pending.ask.clone();
        let sendable = (pending.id, if pending.tries > 1 { ask.again() } else { ask });
        self.sent.push_back(pending);
        Some(sendable)
    }

    /// Whether another request fits the helper's socket.
    fn has_room(&self) -> bool {
        self.sent.iter().filter(|pending| !pending.begun).count() < WINDOW
    }

    /// When the oldest request that is not the host's to delay has taken too long. streamd answers what it
    /// can, and execd what is ready; the others work on one request after the other.
    fn deadline(&self, role: Role) -> Option<Duration> {
        if self.killed {
            return None;
        }
        if matches!(role, Role::Streamd | Role::Execd) {
            let due = |pending: &Pending| Some(pending.sent + pending.ask.limit()?);
            return self.sent.iter().filter_map(due).min();
        }
        let limit = self.sent.front().and_then(|pending| pending.ask.limit())?;
        Some(self.since + limit)
    }

    /// When it is to be asked for a sign of life: it owes answers that may take any time, and has been
    /// silent; or its socket may be full of starts.
    fn ping_at(&self) -> Option<Duration> {
        if !matches!(self.state, State::Up(_)) || self.killed || self.sent.is_empty() {
            return None;
        }
        let full = !self.barred && !self.queued.is_empty() && !self.has_room();
        let all = |what: fn(&Ask) -> bool| self.sent.iter().all(|pending| what(&pending.ask));
        if all(|ask| ask.limit().is_none()) {
            Some(self.heard + WORK)
        } else {
            // Everything else is answered at once, also an earlier ping.
            (full && all(Ask::starts)).then_some(self.heard + PROD)
        }
    }
}

/// The way to each helper.
#[derive(Debug)]
pub(super) struct Lines {
    lines: BTreeMap<Role, Line>,
    last: u64,
}

impl Lines {
    pub(super) fn new() -> Lines {
        Lines { lines: Role::ALL.into_iter().map(|role| (role, Line::default())).collect(), last: 0 }
    }

    fn line(&mut self, role: Role) -> &mut Line {
        self.lines.entry(role).or_default()
    }

    /// Puts a request at the end of its helper's queue.
    pub(super) fn ask(&mut self, ask: Ask, purpose: Purpose) {
        let pending = self.pending(ask, purpose);
        self.line(pending.ask.role()).queued.push_back(pending);
    }

    /// Puts a request that nobody waits for at the end of its helper's queue. One like it that has not been sent yet is
    /// dropped: the later says all that it said. So a host that asks without end fills no queue.
    pub(super) fn ask_instead(&mut self, ask: Ask) {
        let pending = self.pending(ask, Purpose::Nothing);
        let queued = &mut self.line(pending.ask.role()).queued;
        let kind = discriminant(&pending.ask);
        queued.retain(|old| old.purpose != Purpose::Nothing || discriminant(&old.ask) != kind);
        queued.push_back(pending);
    }

    /// Puts a request before all others; a barred helper takes it too.
    pub(super) fn ask_first(&mut self, ask: Ask, purpose: Purpose) {
        let pending = self.pending(ask, purpose);
        self.line(pending.ask.role()).queued.push_front(pending);
    }

    fn pending(&mut self, ask: Ask, purpose: Purpose) -> Pending {
        self.last += 1;
        Pending { id: self.last, ask, purpose, tries: 0, sent: Duration::ZERO, begun: false }
    }

    /// What can be sent now, in order: (id, request).
    pub(super) fn sendable(&mut self, now: Duration) -> Vec<(u64, Ask)> {
        let mut sendable = Vec::new();
        for line in self.lines.values_mut() {
            while let Some((id, ask)) = line.send(now) {
                sendable.push((id, ask));
            }
        }
        sendable
    }

    /// What a closed helper leaves undone.
    pub(super) fn hopeless(&mut self) -> Vec<Outcome> {
        let mut hopeless = Vec::new();
        for (&role, line) in self.lines.iter_mut().filter(|(_, line)| line.state == State::Closed) {
            let undone = line.sent.drain(..).chain(line.queued.drain(..));
            let fault = || Fault::new("asking", role, "it died too often: it is closed");
            hopeless.extend(undone.map(|pending| pending.fails(fault())));
        }
        hopeless
    }

    /// Whether what is asked of the helper is refused at once.
    pub(super) fn is_closed(&self, role: Role) -> bool {
        self.lines.get(&role).is_some_and(|line| line.state == State::Closed)
    }

    /// The helper runs. `barred`: until [`Lines::unbar`] it only gets what comes first.
    pub(super) fn up(&mut self, role: Role, pid: Pid, barred: bool) {
        let line = self.line(role);
        (line.state, line.barred, line.killed, line.lied) = (State::Up(pid), barred, false, false);
    }

    /// How many requests wait to be sent.
    #[cfg(test)]
    pub(super) fn waiting(&self, role: Role) -> usize {
        self.lines.get(&role).map_or(0, |line| line.queued.len())
    }

    /// The helper may have everything.
    pub(super) fn unbar(&mut self, role: Role) {
        self.line(role).barred = false;
    }

    /// The helper is dead. Requests that may be repeated wait for its successor; the others fail.
    pub(super) fn gone(&mut self, role: Role) -> Vec<Outcome> {
        let line = self.line(role);
        line.state = State::Down;
        let died = || Fault::new("asking", role, "it died before it answered");
        let mut failed = Vec::new();
        // What a liar had come to nobody knows: what must not be done twice is not asked again.
        let in_order = role != Role::Streamd && !line.lied;
        for (at, mut pending) in std::mem::take(&mut line.sent).into_iter().enumerate().rev() {
            if at > 0 && in_order {
                // It had not come to this one: it works on one after the other. Of execd's starts the oldest
                // may be what it died of; another one that it had begun runs nothing, for nobody knows of the
                // process.
                pending.tries -= 1;
            }
            if pending.tries < pending.ask.tries() {
                line.queued.push_front(pending);
            } else {
                failed.push(pending.fails(died()));
            }
        }
        failed.reverse();
        // That is asked again by whoever sees the successor come up.
        line.queued.retain(|pending| !pending.purpose.comes_first());
        failed
    }

    /// The helper will not come back, or not for a while.
    pub(super) fn closed(&mut self, role: Role) {
        self.line(role).state = State::Closed;
    }

    /// The outcome of the request of that number. The fault says why the helper is to be killed: its answer fits no
    /// request. None: nothing of this helper is believed any more.
    pub(super) fn answered(
        &mut self,
        now: Duration,
        role: Role,
        id: u64,
        result: Result<HelperReply, Fault>,
    ) -> Result<Option<Outcome>, String> {
        let line = self.line(role);
        if line.lied {
            return Ok(None);
        }
        let at = line.sent.iter().position(|pending| pending.id == id);
        // streamd answers when the output has left, execd a start when it is ready; otherwise they answer in
        // order. A fault may also be our own: a request that could not be sent.
        let waits = |pending: &Pending| role == Role::Streamd || pending.ask.starts();
        let in_turn = |&at: &usize| result.is_err() || line.sent.iter().take(at).all(waits);
        let Some(at) = at.filter(in_turn) else {
            return Err(format!("it answered {id}, which is no request under way"));
        };
        if result.is_ok() {
            line.sent.iter_mut().take(at).for_each(|pending| pending.begun = pending.ask.starts());
        }
        let Some(pending) = line.sent.remove(at) else { return Ok(None) };
        line.heard = now;
        if at == 0 {
            line.since = now;
        }
        let result = match result {
            Err(fault) => Err(fault.clipped()),
            Ok(reply) => match pending.ask.answer(reply) {
                Some(answer) => Ok(answer),
                None => {
                    line.sent.push_front(pending);
                    return Err(format!("its answer to {id} is one to another request"));
                }
            },
        };
        Ok(Some(Outcome { purpose: pending.purpose, result, answered: pending.tries <= 1 }))
    }

    /// Whether that request, which is under way, is one that must not be given up.
    pub(super) fn is_kept(&self, role: Role, id: u64) -> bool {
        let sent = self.lines.get(&role).into_iter().flat_map(|line| &line.sent);
        sent.filter(|pending| pending.id == id).any(|pending| !pending.ask.may_fail())
    }

    /// The helper is being killed; true if it was not yet.
    pub(super) fn kill(&mut self, role: Role, lied: bool) -> bool {
        let line = self.line(role);
        line.lied |= lied;
        matches!(line.state, State::Up(_)) && !std::mem::replace(&mut line.killed, true)
    }

    /// When the oldest request of a helper has taken too long, by role.
    fn deadlines(&self) -> impl Iterator<Item = (Role, Duration)> + '_ {
        self.lines.iter().filter_map(|(&role, line)| Some((role, line.deadline(role)?)))
    }

    /// The deadline that comes first.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        let pings = self.lines.values().filter_map(Line::ping_at);
        self.deadlines().map(|(_, deadline)| deadline).chain(pings).min()
    }

    /// The helpers that hang.
    pub(super) fn late(&self, now: Duration) -> Vec<Role> {
        self.deadlines().filter(|&(_, deadline)| deadline <= now).map(|(role, _)| role).collect()
    }

    /// Asks for a sign of life where it is time to.
    pub(super) fn ping(&mut self, now: Duration) {
        for role in [Role::Execd, Role::Streamd] {
            let silent = |line: &Line| line.ping_at().is_some_and(|at| at <= now);
            if self.lines.get(&role).is_some_and(silent) {
                self.ask_first(Ask::Ping(role), Purpose::Ping);
            }
        }
    }

    /// Whether that process is a helper.
    pub(super) fn has(&self, pid: Pid) -> bool {
        self.lines.values().any(|line| line.state == State::Up(pid))
    }

    /// Whether that process is that helper.
    pub(super) fn is_up(&self, role: Role, pid: Pid) -> bool {
        self.lines.get(&role).is_some_and(|line| line.state == State::Up(pid))
    }

    /// Whether execd may be starting something that is not known yet.
    pub(super) fn starts_under_way(&self) -> bool {
        self.lines.get(&Role::Execd).is_some_and(|line| line.sent.iter().any(|pending| pending.ask.starts()))
    }
}

impl Pending {
    fn fails(self, fault: Fault) -> Outcome {
        Outcome { purpose: self.purpose, result: Err(fault), answered: false }
    }
}

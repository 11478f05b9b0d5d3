//! The requests to the helpers: queued, sent a few at a time, timed, and asked again of a successor where that is safe.

use std::collections::{BTreeMap, VecDeque};
use std::mem::discriminant;
use std::time::Duration;

use super::ask::{Answer, Ask, HelperReply, Lane, WORK};
use super::pool::Pool;
use super::state::Purpose;
use crate::fault::Fault;
use crate::ids::Pid;
use crate::wire::{Instance, Role};

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
    pub(super) ask: Ask,
    /// `ask.lane()`.
    pub(super) lane: Option<Lane>,
    purpose: Purpose,
    tries: u32,
    /// When it was sent the last time.
    sent: Duration,
    /// Since when it has waited for any mountd.
    pub(super) waits: Option<Duration>,
    /// It has had its turn, in vain: others come first.
    pub(super) is_later: bool,
    /// A start that execd has taken from its socket: it has answered what was sent behind it.
    begun: bool,
}

/// What came of a request, and what it was for.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Who was asked the last time, or would have been.
    pub(super) helper: Instance,
    /// What it was for.
    pub(super) purpose: Purpose,
    /// What came of it.
    pub(super) result: Result<Answer, Fault>,
    /// The one helper that was asked has said so itself, or was not even asked: what it could not do is undone.
    pub(super) answered: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum State {
    #[default]
    Down,
    /// One that runs only while it is needed is being started.
    Starting,
    Up(Pid),
    Closed,
}

/// The way to one helper.
#[derive(Debug, Default)]
pub(super) struct Line {
    pub(super) state: State,
    /// Only what was put first may be sent: the helper is not what it has to be yet.
    barred: bool,
    /// Of a mountd: what is in a lane of which it has something to do. All else that is asked of mountd is in the pool.
    pub(super) queued: VecDeque<Pending>,
    pub(super) sent: VecDeque<Pending>,
    /// Since when it works on the oldest of `sent`.
    since: Duration,
    /// When it came up, answered the last time, or got something to do.
    pub(super) heard: Duration,
    /// It has not answered anything yet.
    pub(super) is_new: bool,
    /// It is being killed; of a liar nothing is believed any more.
    pub(super) killed: bool,
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
    pub(super) lines: BTreeMap<Instance, Line>,
    pub(super) pool: Pool,
    last: u64,
}

impl Lines {
    pub(super) fn new() -> Lines {
        let lines = Instance::all().map(|helper| (helper, Line::default())).collect();
        Lines { lines, pool: Pool::default(), last: 0 }
    }

    pub(super) fn line(&mut self, helper: Instance) -> &mut Line {
        self.lines.entry(helper).or_default()
    }

    fn first(&self, role: Role) -> Option<&Line> {
        self.lines.get(&Instance::first(role))
    }

    /// Where a request waits.
    fn queue(&mut self, pending: &Pending) -> &mut VecDeque<Pending> {
        match (&pending.lane, pending.ask.role()) {
            (Some(lane), _) => match self.holder(lane) {
                Some(mountd) => &mut self.line(mountd).queued,
                None => &mut self.pool.queued,
            },
            (None, role) => &mut self.line(Instance::first(role)).queued,
        }
    }

    /// Puts a request at the end of its helper's queue.
    pub(super) fn ask(&mut self, ask: Ask, purpose: Purpose) {
        let pending = self.pending(ask, purpose);
        self.queue(&pending).push_back(pending);
    }

    /// Puts a request that has been done in vain behind those that others may have.
    pub(super) fn ask_later(&mut self, ask: Ask, purpose: Purpose) {
        let pending = Pending { is_later: true, ..self.pending(ask, purpose) };
        self.queue(&pending).push_back(pending);
    }

    /// Puts a request that nobody waits for at the end of its helper's queue. One like it that has not been sent yet is
    /// dropped: the later says all that it said. So a host that asks without end fills no queue.
    pub(super) fn ask_instead(&mut self, ask: Ask) {
        let pending = self.pending(ask, Purpose::Nothing);
        let kind = discriminant(&pending.ask);
        let queued = self.queue(&pending);
        queued.retain(|old| old.purpose != Purpose::Nothing || discriminant(&old.ask) != kind);
        queued.push_back(pending);
    }

    /// Puts a request before all others; a barred helper takes it too.
    pub(super) fn ask_first(&mut self, ask: Ask, purpose: Purpose) {
        let pending = self.pending(ask, purpose);
        self.queue(&pending).push_front(pending);
    }

    fn pending(&mut self, ask: Ask, purpose: Purpose) -> Pending {
        self.last += 1;
        let lane = ask.lane();
        let (tries, sent, waits, is_later, begun) = (0, Duration::ZERO, None, false, false);
        Pending { id: self.last, ask, lane, purpose, tries, sent, waits, is_later, begun }
    }

    /// What can be sent now, in order: (id, to whom, request).
    pub(super) fn sendable(&mut self, now: Duration) -> Vec<(u64, Instance, Ask)> {
        self.deal(now);
        let mut sendable = Vec::new();
        for (&helper, line) in &mut self.lines {
            while let Some((id, ask)) = line.send(now) {
                sendable.push((id, helper, ask));
            }
        }
        sendable
    }

    /// What a closed helper leaves undone. With the first mountd all are closed, but for what the others have to do.
    pub(super) fn hopeless(&mut self) -> Vec<Outcome> {
        let mut hopeless = Vec::new();
        for (&helper, line) in self.lines.iter_mut().filter(|(_, line)| line.state == State::Closed) {
            let of_all = match helper == Instance::first(Role::Mountd) {
                true => std::mem::take(&mut self.pool.queued),
                false => VecDeque::new(),
            };
            let undone = line.sent.drain(..).chain(line.queued.drain(..)).chain(of_all);
            let fault = || Fault::new("asking", helper.role(), "it died too often: it is closed");
            hopeless.extend(undone.map(|pending| pending.fails(helper, fault())));
        }
        hopeless
    }

    /// Whether what is asked of the helper is refused at once.
    pub(super) fn is_closed(&self, role: Role) -> bool {
        self.first(role).is_some_and(|line| line.state == State::Closed)
    }

    /// The helper runs. `barred`: until [`Lines::unbar`] it only gets what comes first.
    pub(super) fn up(&mut self, now: Duration, helper: Instance, pid: Pid, barred: bool) {
        let line = self.line(helper);
        (line.state, line.barred, line.killed, line.lied) = (State::Up(pid), barred, false, false);
        (line.heard, line.is_new) = (now, true);
    }

    /// How many requests wait to be sent.
    #[cfg(test)]
    pub(super) fn waiting(&self, role: Role) -> usize {
        let pool = if role == Role::Mountd { self.pool.queued.len() } else { 0 };
        let lines = self.lines.iter().filter(|(helper, _)| helper.role() == role);
        pool + lines.map(|(_, line)| line.queued.len()).sum::<usize>()
    }

    /// The helper may have everything.
    pub(super) fn unbar(&mut self, role: Role) {
        self.line(Instance::first(role)).barred = false;
    }

    /// The helper is dead. Requests that may be repeated wait for its successor, or another mountd; the others fail.
    pub(super) fn gone(&mut self, helper: Instance) -> Vec<Outcome> {
        let failed = self.give_up(helper, "it died before it answered");
        self.line(helper).state = State::Down;
        failed
    }

    /// The helper is dead, or will be as soon as the kernel lets it. Who else can do what it had to do does it.
    pub(super) fn give_up(&mut self, helper: Instance, why: &'static str) -> Vec<Outcome> {
        let line = self.line(helper);
        let died = || Fault::new("asking", helper.role(), why);
        let mut failed = Vec::new();
        // What a liar had come to nobody knows: what must not be done twice is not asked again.
        let in_order = helper.role() != Role::Streamd && !line.lied;
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
                failed.push(pending.fails(helper, died()));
            }
        }
        failed.reverse();
        // That is asked again by whoever sees the successor come up.
        line.queued.retain(|pending| !pending.purpose.comes_first());
        if helper.role() == Role::Mountd {
            let queued = std::mem::take(&mut line.queued);
            self.pool.take_back(helper, queued);
        }
        failed
    }

    /// The helper will not come back, or not for a while.
    pub(super) fn closed(&mut self, helper: Instance) -> Vec<Outcome> {
        // What another mountd can do it does; without the first, `hopeless` says.
        let failed = if helper.is_extra() { self.gone(helper) } else { Vec::new() };
        self.line(helper).state = State::Closed;
        failed
    }

    /// The outcome of the request of that number. The fault says why the helper is to be killed: its answer fits no
    /// request. None: nothing of this helper is believed any more.
    pub(super) fn answered(
        &mut self,
        now: Duration,
        helper: Instance,
        id: u64,
        result: Result<HelperReply, Fault>,
    ) -> Result<Option<Outcome>, String> {
        let line = self.line(helper);
        if line.lied || (line.killed && line.sent.is_empty()) {
            return Ok(None);
        }
        let at = line.sent.iter().position(|pending| pending.id == id);
        // streamd answers when the output has left, execd a start when it is ready; otherwise they answer in
        // order. A fault may also be our own: a request that could not be sent.
        let waits = |pending: &Pending| helper.role() == Role::Streamd || pending.ask.starts();
        let in_turn = |&at: &usize| result.is_err() || line.sent.iter().take(at).all(waits);
        let Some(at) = at.filter(in_turn) else {
            return Err(format!("it answered {id}, which is no request under way"));
        };
        if result.is_ok() {
            line.sent.iter_mut().take(at).for_each(|pending| pending.begun = pending.ask.starts());
        }
        let Some(pending) = line.sent.remove(at) else { return Ok(None) };
        (line.heard, line.is_new) = (now, false);
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
        self.pool.note(helper, &pending, &result);
        Ok(Some(Outcome { helper, purpose: pending.purpose, result, answered: pending.tries <= 1 }))
    }

    /// Whether that request, which is under way, is one that must not be given up; or that helper keeps a file open for it.
    pub(super) fn is_kept(&self, helper: Instance, id: u64) -> bool {
        let sent = self.lines.get(&helper).into_iter().flat_map(|line| &line.sent);
        sent.filter(|pending| pending.id == id)
            .any(|pending| !pending.ask.may_fail() || matches!(pending.ask, Ask::ReadOn { .. }))
    }

    /// The helper is being killed; true if it was not yet.
    pub(super) fn kill(&mut self, helper: Instance, lied: bool) -> bool {
        let line = self.line(helper);
        line.lied |= lied;
        matches!(line.state, State::Up(_)) && !std::mem::replace(&mut line.killed, true)
    }

    /// When the oldest request of a helper has taken too long.
    fn deadlines(&self) -> impl Iterator<Item = (Instance, Duration)> + '_ {
        self.lines.iter().filter_map(|(&helper, line)| Some((helper, line.deadline(helper.role())?)))
    }

    /// The deadline that comes first.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        let pings = self.lines.values().filter_map(Line::ping_at);
        let deadlines = self.deadlines().map(|(_, deadline)| deadline).chain(pings);
        deadlines.chain(self.missing_at()).chain(self.idle_at()).min()
    }

    /// The helpers that hang.
    pub(super) fn late(&self, now: Duration) -> Vec<Instance> {
        self.deadlines().filter(|&(_, deadline)| deadline <= now).map(|(helper, _)| helper).collect()
    }

    /// Asks for a sign of life where it is time to.
    pub(super) fn ping(&mut self, now: Duration) {
        for role in [Role::Execd, Role::Streamd] {
            let silent = |line: &Line| line.ping_at().is_some_and(|at| at <= now);
            if self.first(role).is_some_and(silent) {
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
        self.first(role).is_some_and(|line| line.state == State::Up(pid))
    }

    /// Whether execd may be starting something that is not known yet.
    pub(super) fn starts_under_way(&self) -> bool {
        self.first(Role::Execd).is_some_and(|line| line.sent.iter().any(|pending| pending.ask.starts()))
    }
}

impl Pending {
    fn fails(self, helper: Instance, fault: Fault) -> Outcome {
        Outcome { helper, purpose: self.purpose, result: Err(fault), answered: false }
    }
}

//! The requests to the helpers: queued, sent a few at a time, timed, and asked again of a successor where
//! that is safe.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::answer::{Answer, answer};
use super::pool::Pool;
use super::state::Purpose;
use crate::fault::Fault;
use crate::ids::Pid;
use crate::wire::mountd::Lane;
use crate::wire::{Instance, Reply, Request, Role, Terms, WORK, execd, streamd};

/// How many requests one helper may have in its socket. They fit it (`wire::channel`), so that init never
/// waits to send.
const WINDOW: usize = 16;
/// After how long without an answer execd is asked how much it has taken from its socket, when that may be
/// full of starts that all take their time. Others' starts wait for so long.
const PROD: Duration = Duration::from_millis(20);

/// A request that has no answer yet.
#[derive(Debug)]
pub(super) struct Pending {
    id: u64,
    pub(super) request: Arc<Request>,
    /// What it keeps its order with, of a request to mountd.
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
    /// The one helper that was asked has said so itself, or was not even asked: what it could not do is
    /// undone.
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
pub(super) struct Queue {
    pub(super) state: State,
    /// Only what was put first may be sent: the helper is not what it has to be yet.
    barred: bool,
    /// Of a mountd: what is in a lane of which it has something to do. All else that is asked of mountd is in
    /// the pool.
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

impl Queue {
    /// The next request that can be sent.
    fn send(&mut self, now: Duration) -> Option<(u64, Arc<Request>)> {
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
        if pending.tries > 1 {
            Arc::make_mut(&mut pending.request).set_repeated();
        }
        let sendable = (pending.id, pending.request.clone());
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
            let due = |pending: &Pending| Some(pending.sent + pending.terms().limit?);
            return self.sent.iter().filter_map(due).min();
        }
        let limit = self.sent.front().and_then(|pending| pending.terms().limit)?;
        Some(self.since + limit)
    }

    /// When it is to be asked for a sign of life: it owes answers that may take any time, and has been
    /// silent; or its socket may be full of starts.
    fn ping_at(&self) -> Option<Duration> {
        if !matches!(self.state, State::Up(_)) || self.killed || self.sent.is_empty() {
            return None;
        }
        let full = !self.barred && !self.queued.is_empty() && !self.has_room();
        if self.sent.iter().all(|pending| pending.terms().limit.is_none()) {
            Some(self.heard + WORK)
        } else {
            // Everything else is answered at once, also an earlier ping.
            (full && self.sent.iter().all(|pending| pending.request.starts())).then_some(self.heard + PROD)
        }
    }
}

/// The way to each helper.
#[derive(Debug)]
pub(super) struct Queues {
    pub(super) queues: BTreeMap<Instance, Queue>,
    pub(super) pool: Pool,
    last: u64,
}

impl Queues {
    pub(super) fn new() -> Queues {
        let queues = Instance::all().map(|helper| (helper, Queue::default())).collect();
        Queues { queues, pool: Pool::default(), last: 0 }
    }

    pub(super) fn queue(&mut self, helper: Instance) -> &mut Queue {
        self.queues.entry(helper).or_default()
    }

    fn first(&self, role: Role) -> Option<&Queue> {
        self.queues.get(&Instance::first(role))
    }

    /// Where a request waits.
    fn place(&mut self, pending: &Pending) -> &mut VecDeque<Pending> {
        match (&pending.lane, pending.request.role()) {
            (Some(lane), _) => match self.holder(lane) {
                Some(mountd) => &mut self.queue(mountd).queued,
                None => &mut self.pool.queued,
            },
            (None, role) => &mut self.queue(Instance::first(role)).queued,
        }
    }

    /// Puts a request at the end of its helper's queue.
    pub(super) fn ask(&mut self, request: impl Into<Request>, purpose: Purpose) {
        let pending = self.pending(request.into(), purpose);
        self.place(&pending).push_back(pending);
    }

    /// Puts a request that has been done in vain behind those that others may have.
    pub(super) fn ask_later(&mut self, request: impl Into<Request>, purpose: Purpose) {
        let pending = Pending { is_later: true, ..self.pending(request.into(), purpose) };
        self.place(&pending).push_back(pending);
    }

    /// Puts a request that nobody waits for at the end of its helper's queue. One like it that has not been
    /// sent yet is dropped: the later says all that it said. So a host that asks without end fills no queue.
    pub(super) fn ask_instead(&mut self, request: impl Into<Request>) {
        let pending = self.pending(request.into(), Purpose::Nothing);
        let queued = self.place(&pending);
        queued.retain(|old| old.purpose != Purpose::Nothing || !old.request.is_like(&pending.request));
        queued.push_back(pending);
    }

    /// Puts a request before all others; a barred helper takes it too.
    pub(super) fn ask_first(&mut self, request: impl Into<Request>, purpose: Purpose) {
        let pending = self.pending(request.into(), purpose);
        self.place(&pending).push_front(pending);
    }

    fn pending(&mut self, request: Request, purpose: Purpose) -> Pending {
        self.last += 1;
        let lane = match &request {
            Request::Mountd(request) => Some(request.lane()),
            Request::Netd(_) | Request::Execd(_) | Request::Streamd(_) => None,
        };
        let request = Arc::new(request);
        let (tries, sent, waits, is_later, begun) = (0, Duration::ZERO, None, false, false);
        Pending { id: self.last, request, lane, purpose, tries, sent, waits, is_later, begun }
    }

    /// What can be sent now, in order: (id, to whom, request).
    pub(super) fn sendable(&mut self, now: Duration) -> Vec<(u64, Instance, Arc<Request>)> {
        self.deal(now);
        let mut sendable = Vec::new();
        for (&helper, queue) in &mut self.queues {
            while let Some((id, request)) = queue.send(now) {
                sendable.push((id, helper, request));
            }
        }
        sendable
    }

    /// What a closed helper leaves undone. With the first mountd all are closed, but for what the others have
    /// to do.
    pub(super) fn hopeless(&mut self) -> Vec<Outcome> {
        let mut hopeless = Vec::new();
        for (&helper, queue) in self.queues.iter_mut().filter(|(_, queue)| queue.state == State::Closed) {
            let of_all = if helper == Instance::first(Role::Mountd) {
                std::mem::take(&mut self.pool.queued)
            } else {
                VecDeque::new()
            };
            let undone = queue.sent.drain(..).chain(queue.queued.drain(..)).chain(of_all);
            let fault = || Fault::new("asking", helper.role(), "it died too often: it is closed");
            hopeless.extend(undone.map(|pending| pending.fails(helper, fault())));
        }
        hopeless
    }

    /// Whether what is asked of the helper is refused at once.
    pub(super) fn is_closed(&self, role: Role) -> bool {
        self.first(role).is_some_and(|queue| queue.state == State::Closed)
    }

    /// The helper runs. `barred`: until [`Queues::unbar`] it only gets what comes first.
    pub(super) fn up(&mut self, now: Duration, helper: Instance, pid: Pid, barred: bool) {
        let queue = self.queue(helper);
        (queue.state, queue.barred, queue.killed, queue.lied) = (State::Up(pid), barred, false, false);
        (queue.heard, queue.is_new) = (now, true);
    }

    /// How many requests wait to be sent.
    #[cfg(test)]
    pub(super) fn waiting(&self, role: Role) -> usize {
        let pool = if role == Role::Mountd { self.pool.queued.len() } else { 0 };
        let queues = self.queues.iter().filter(|(helper, _)| helper.role() == role);
        pool + queues.map(|(_, queue)| queue.queued.len()).sum::<usize>()
    }

    /// The helper may have everything.
    pub(super) fn unbar(&mut self, role: Role) {
        self.queue(Instance::first(role)).barred = false;
    }

    /// The helper is dead. Requests that may be repeated wait for its successor, or another mountd; the
    /// others fail.
    pub(super) fn gone(&mut self, helper: Instance) -> Vec<Outcome> {
        let failed = self.give_up(helper, "it died before it answered");
        self.queue(helper).state = State::Down;
        failed
    }

    /// The helper is dead, or will be as soon as the kernel lets it. Who else can do what it had to do does
    /// it.
    pub(super) fn give_up(&mut self, helper: Instance, why: &'static str) -> Vec<Outcome> {
        let queue = self.queue(helper);
        let died = || Fault::new("asking", helper.role(), why);
        let mut failed = Vec::new();
        // What a liar had come to nobody knows: what must not be done twice is not asked again.
        let in_order = helper.role() != Role::Streamd && !queue.lied;
        for (at, mut pending) in std::mem::take(&mut queue.sent).into_iter().enumerate().rev() {
            if at > 0 && in_order {
                // It had not come to this one: it works on one after the other. Of execd's starts the oldest
                // may be what it died of; another one that it had begun runs nothing, for nobody knows of the
                // process.
                pending.tries -= 1;
            }
            if pending.tries < pending.terms().tries {
                queue.queued.push_front(pending);
            } else {
                failed.push(pending.fails(helper, died()));
            }
        }
        failed.reverse();
        // That is asked again by whoever sees the successor come up.
        queue.queued.retain(|pending| !pending.purpose.comes_first());
        if helper.role() == Role::Mountd {
            let queued = std::mem::take(&mut queue.queued);
            self.pool.take_back(helper, queued);
        }
        failed
    }

    /// The helper will not come back, or not for a while.
    pub(super) fn closed(&mut self, helper: Instance) -> Vec<Outcome> {
        // What another mountd can do it does; without the first, `hopeless` says.
        let failed = if helper.is_extra() { self.gone(helper) } else { Vec::new() };
        self.queue(helper).state = State::Closed;
        failed
    }

    /// The outcome of the request of that number. The fault says why the helper is to be killed: its answer
    /// fits no request. None: nothing of this helper is believed any more.
    pub(super) fn answered(
        &mut self,
        now: Duration,
        helper: Instance,
        id: u64,
        result: Result<Reply, Fault>,
    ) -> Result<Option<Outcome>, String> {
        let queue = self.queue(helper);
        if queue.lied || (queue.killed && queue.sent.is_empty()) {
            return Ok(None);
        }
        let at = queue.sent.iter().position(|pending| pending.id == id);
        // streamd answers when the output has left, execd a start when it is ready; otherwise they answer in
        // order. A fault may also be our own: a request that could not be sent.
        let waits = |pending: &Pending| helper.role() == Role::Streamd || pending.request.starts();
        let in_turn = |&at: &usize| result.is_err() || queue.sent.iter().take(at).all(waits);
        let Some(at) = at.filter(in_turn) else {
            return Err(format!("it answered {id}, which is no request under way"));
        };
        if result.is_ok() {
            queue.sent.iter_mut().take(at).for_each(|pending| pending.begun = pending.request.starts());
        }
        let Some(pending) = queue.sent.remove(at) else { return Ok(None) };
        (queue.heard, queue.is_new) = (now, false);
        if at == 0 {
            queue.since = now;
        }
        let result = match result {
            Err(fault) => Err(fault.clipped()),
            Ok(reply) => match answer(&pending.request, reply) {
                Some(answer) => Ok(answer),
                None => {
                    queue.sent.push_front(pending);
                    return Err(format!("its answer to {id} is one to another request"));
                }
            },
        };
        self.pool.note(helper, &pending, &result);
        Ok(Some(Outcome { helper, purpose: pending.purpose, result, answered: pending.tries <= 1 }))
    }

    /// Whether that request, which is under way, must not be given up.
    pub(super) fn is_kept(&self, helper: Instance, id: u64) -> bool {
        let mut sent = self.queues.get(&helper).into_iter().flat_map(|queue| &queue.sent);
        sent.any(|pending| pending.id == id && !pending.terms().may_fail)
    }

    /// The helper is being killed; true if it was not yet.
    pub(super) fn kill(&mut self, helper: Instance, lied: bool) -> bool {
        let queue = self.queue(helper);
        queue.lied |= lied;
        matches!(queue.state, State::Up(_)) && !std::mem::replace(&mut queue.killed, true)
    }

    /// When the oldest request of a helper has taken too long.
    fn deadlines(&self) -> impl Iterator<Item = (Instance, Duration)> + '_ {
        self.queues.iter().filter_map(|(&helper, queue)| Some((helper, queue.deadline(helper.role())?)))
    }

    /// The deadline that comes first.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        let pings = self.queues.values().filter_map(Queue::ping_at);
        let deadlines = self.deadlines().map(|(_, deadline)| deadline).chain(pings);
        deadlines.chain(self.missing_at()).chain(self.idle_at()).min()
    }

    /// The helpers that hang.
    pub(super) fn late(&self, now: Duration) -> Vec<Instance> {
        self.deadlines().filter(|&(_, deadline)| deadline <= now).map(|(helper, _)| helper).collect()
    }

    /// Asks for a sign of life where it is time to.
    pub(super) fn ping(&mut self, now: Duration) {
        let pings = [Request::from(execd::Request::Ping), Request::from(streamd::Request::Ping)];
        for ping in pings {
            let silent = |queue: &Queue| queue.ping_at().is_some_and(|at| at <= now);
            if self.first(ping.role()).is_some_and(silent) {
                self.ask_first(ping, Purpose::Ping);
            }
        }
    }

    /// Whether that process is a helper.
    pub(super) fn has(&self, pid: Pid) -> bool {
        self.queues.values().any(|queue| queue.state == State::Up(pid))
    }

    /// Whether that process is that helper.
    pub(super) fn is_up(&self, role: Role, pid: Pid) -> bool {
        self.first(role).is_some_and(|queue| queue.state == State::Up(pid))
    }
}

impl Pending {
    fn terms(&self) -> Terms {
        self.request.terms()
    }

    fn fails(self, helper: Instance, fault: Fault) -> Outcome {
        Outcome { helper, purpose: self.purpose, result: Err(fault), answered: false }
    }
}

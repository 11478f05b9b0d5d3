//! The requests to the helpers: queued, sent a few at a time, timed, and sent again to a helper's successor
//! where that is safe.

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

/// How many requests one helper may have in its socket. So many fit the socket's buffer (`wire::channel`), so
/// init never blocks on sending.
const WINDOW: usize = 16;
/// How long execd may be silent, while its socket may be full of slow starts, before a ping finds out how
/// many of them it has taken out. Starts that do not fit wait for that long.
const PROD: Duration = Duration::from_millis(20);

/// A request that has no answer yet.
#[derive(Debug)]
pub(super) struct Pending {
    id: u64,
    pub(super) request: Arc<Request>,
    /// Of a request to mountd: the lane whose order it keeps.
    pub(super) lane: Option<Lane>,
    purpose: Purpose,
    tries: u32,
    /// When it was last sent.
    sent: Duration,
    /// When it began to wait for a free mountd.
    pub(super) waits: Option<Duration>,
    /// It had its turn and has to be repeated, so other requests go first.
    pub(super) is_later: bool,
    /// Of a start: execd has taken it from its socket, for it has answered a request sent after it.
    begun: bool,
}

/// The result of a request, and what the request was for.
#[derive(Debug)]
pub(super) struct Outcome {
    /// The helper that was asked last, or would have been.
    pub(super) helper: Instance,
    /// What the request was for.
    pub(super) purpose: Purpose,
    /// The answer or the fault.
    pub(super) result: Result<Answer, Fault>,
    /// Whether no helper can have left the request half done: the only helper that was asked answered it and
    /// has undone what it could not complete, or the request was never sent.
    pub(super) answered: bool,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum State {
    #[default]
    Down,
    /// A helper that runs only while it is needed is being started.
    Starting,
    Up(Pid),
    Closed,
}

/// The requests to one helper.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) state: State,
    /// Only requests that were put first may be sent: the helper is not ready for the others yet.
    barred: bool,
    /// Waiting requests. For a mountd, only those whose lane this mountd is working on; the other requests to
    /// mountd are in the pool.
    pub(super) queued: VecDeque<Pending>,
    pub(super) sent: VecDeque<Pending>,
    /// When the helper began to work on the oldest of `sent`.
    since: Duration,
    /// When the helper came up, last answered, or last got a request while idle.
    pub(super) heard: Duration,
    /// The helper has not answered anything yet.
    pub(super) is_new: bool,
    /// `killed`: the helper is being killed. `lied`: nothing that it says is believed any more.
    pub(super) killed: bool,
    lied: bool,
}

impl Queue {
    /// Takes the next request that can be sent.
    fn send(&mut self, now: Duration) -> Option<(u64, Arc<Request>)> {
        let first = self.queued.front().is_some_and(|pending| pending.purpose.comes_first());
        // Such requests are few and small, and do not wait until a slow host lets the others go on.
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

    /// Whether the helper's socket has room for another request.
    fn has_room(&self) -> bool {
        self.sent.iter().filter(|pending| !pending.begun).count() < WINDOW
    }

    /// When the oldest request has taken too long; requests without a limit wait for the host and do not
    /// count. streamd and execd answer whatever is ready, in any order, so each request has its own time. The
    /// other helpers work on one request after the other, so the time of the first counts.
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

    /// When to ping the helper: if all the answers it owes may take any time and it has been silent, or if
    /// its socket may be full of starts.
    fn ping_at(&self) -> Option<Duration> {
        if !matches!(self.state, State::Up(_)) || self.killed || self.sent.is_empty() {
            return None;
        }
        let full = !self.barred && !self.queued.is_empty() && !self.has_room();
        if self.sent.iter().all(|pending| pending.terms().limit.is_none()) {
            Some(self.heard + WORK)
        } else {
            // Requests that are not starts, an earlier ping among them, are answered at once.
            (full && self.sent.iter().all(|pending| pending.request.starts())).then_some(self.heard + PROD)
        }
    }
}

/// The requests to all helpers.
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

    /// The queue in which a request waits.
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

    /// Puts a request that had no success yet behind the requests of others.
    pub(super) fn ask_later(&mut self, request: impl Into<Request>, purpose: Purpose) {
        let pending = Pending { is_later: true, ..self.pending(request.into(), purpose) };
        self.place(&pending).push_back(pending);
    }

    /// Puts a request that nothing waits for at the end of its helper's queue. An unsent request of the same
    /// kind is dropped, because the new one includes it. So a host that repeats a command without end fills
    /// no queue.
    pub(super) fn ask_instead(&mut self, request: impl Into<Request>) {
        let pending = self.pending(request.into(), Purpose::Nothing);
        let queued = self.place(&pending);
        queued.retain(|old| old.purpose != Purpose::Nothing || !old.request.is_like(&pending.request));
        queued.push_back(pending);
    }

    /// Puts a request before all others; it is sent even to a barred helper.
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

    /// The requests that can be sent now, in order: (id, helper, request).
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

    /// Fails the requests of closed helpers. If the first mountd is closed, the requests in the pool fail
    /// too; the other mountds finish what they were given.
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

    /// Whether the helper is closed, so that requests to it fail at once.
    pub(super) fn is_closed(&self, role: Role) -> bool {
        self.first(role).is_some_and(|queue| queue.state == State::Closed)
    }

    /// The helper runs. `barred`: until [`Queues::unbar`] only requests that were put first are sent to it.
    pub(super) fn up(&mut self, now: Duration, helper: Instance, pid: Pid, barred: bool) {
        let queue = self.queue(helper);
        (queue.state, queue.barred, queue.killed, queue.lied) = (State::Up(pid), barred, false, false);
        (queue.heard, queue.is_new) = (now, true);
    }

    /// How many requests wait to be sent to the role.
    #[cfg(test)]
    pub(super) fn waiting(&self, role: Role) -> usize {
        let pool = if role == Role::Mountd { self.pool.queued.len() } else { 0 };
        let queues = self.queues.iter().filter(|(helper, _)| helper.role() == role);
        pool + queues.map(|(_, queue)| queue.queued.len()).sum::<usize>()
    }

    /// The helper may get all requests now.
    pub(super) fn unbar(&mut self, role: Role) {
        self.queue(Instance::first(role)).barred = false;
    }

    /// The helper is dead. Requests that may be repeated wait for its successor or another mountd; the others
    /// fail.
    pub(super) fn gone(&mut self, helper: Instance) -> Vec<Outcome> {
        let failed = self.give_up(helper, "it died before it answered");
        self.queue(helper).state = State::Down;
        failed
    }

    /// The helper is dead, or will be as soon as the kernel lets it die. Its requests go to a successor or,
    /// for mountd, to another instance.
    pub(super) fn give_up(&mut self, helper: Instance, why: &'static str) -> Vec<Outcome> {
        let queue = self.queue(helper);
        let died = || Fault::new("asking", helper.role(), why);
        let mut failed = Vec::new();
        // How far a liar came is unknown, so a request that must not be carried out twice is not repeated.
        let in_order = helper.role() != Role::Streamd && !queue.lied;
        for (at, mut pending) in std::mem::take(&mut queue.sent).into_iter().enumerate().rev() {
            if at > 0 && in_order {
                // A helper works on one request after the other, so it had not begun this one. For execd's
                // starts: the helper may have died of the oldest; any other start that it had begun has left
                // no program running, because its process was never reported and so never released.
                pending.tries -= 1;
            }
            if pending.tries < pending.terms().tries {
                queue.queued.push_front(pending);
            } else {
                failed.push(pending.fails(helper, died()));
            }
        }
        failed.reverse();
        // These are asked again when the successor comes up.
        queue.queued.retain(|pending| !pending.purpose.comes_first());
        if helper.role() == Role::Mountd {
            let queued = std::mem::take(&mut queue.queued);
            self.pool.take_back(helper, queued);
        }
        failed
    }

    /// The helper will not come back, or not for some time.
    pub(super) fn closed(&mut self, helper: Instance) -> Vec<Outcome> {
        // Another mountd takes over the requests of an extra one. Those of the first helper of a role fail in
        // `hopeless`.
        let failed = if helper.is_extra() { self.gone(helper) } else { Vec::new() };
        self.queue(helper).state = State::Closed;
        failed
    }

    /// The outcome of the request with number `id`. The error says why the helper is to be killed: its answer
    /// fits no request. None: the answer is ignored, because the helper lied or is being given up.
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
        // streamd answers when the output has left, and execd answers a start when the process is ready; all
        // other requests are answered in order. A fault may also come from init itself: the request could not
        // be sent.
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

    /// Whether a request under way must not be given up when it cannot be sent.
    pub(super) fn is_kept(&self, helper: Instance, id: u64) -> bool {
        let mut sent = self.queues.get(&helper).into_iter().flat_map(|queue| &queue.sent);
        sent.any(|pending| pending.id == id && !pending.terms().may_fail)
    }

    /// Marks the helper as being killed; true if it was not marked before.
    pub(super) fn kill(&mut self, helper: Instance, lied: bool) -> bool {
        let queue = self.queue(helper);
        queue.lied |= lied;
        matches!(queue.state, State::Up(_)) && !std::mem::replace(&mut queue.killed, true)
    }

    /// For each helper, when its oldest request has taken too long.
    fn deadlines(&self) -> impl Iterator<Item = (Instance, Duration)> + '_ {
        self.queues.iter().filter_map(|(&helper, queue)| Some((helper, queue.deadline(helper.role())?)))
    }

    /// The earliest deadline.
    pub(super) fn next_deadline(&self) -> Option<Duration> {
        let pings = self.queues.values().filter_map(Queue::ping_at);
        let deadlines = self.deadlines().map(|(_, deadline)| deadline).chain(pings);
        deadlines.chain(self.missing_at()).chain(self.idle_at()).min()
    }

    /// The helpers whose deadline has passed.
    pub(super) fn late(&self, now: Duration) -> Vec<Instance> {
        self.deadlines().filter(|&(_, deadline)| deadline <= now).map(|(helper, _)| helper).collect()
    }

    /// Pings the helpers that are due for a ping.
    pub(super) fn ping(&mut self, now: Duration) {
        let pings = [Request::from(execd::Request::Ping), Request::from(streamd::Request::Ping)];
        for ping in pings {
            let silent = |queue: &Queue| queue.ping_at().is_some_and(|at| at <= now);
            if self.first(ping.role()).is_some_and(silent) {
                self.ask_first(ping, Purpose::Ping);
            }
        }
    }

    /// Whether a pid is that of a helper that is up.
    pub(super) fn has(&self, pid: Pid) -> bool {
        self.queues.values().any(|queue| queue.state == State::Up(pid))
    }

    /// Whether a pid is that of the first helper of a role.
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

//! Several mountds: which of them does what is asked of mountd, and how many there are.
//!
//! A request goes to a mountd that has nothing to do, so that what waits for a disk, a server or the share's
//! host holds up nothing else. Those of one lane (`wire::mountd::Lane`) stay in order on one mountd while
//! that has any of them, or keeps something of them. When a request has waited for long for any of them,
//! another is started; what has nothing to do for long is ended.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::answer::Answer;
use super::queue::{Pending, Queue, Queues, State};
use crate::fault::Fault;
use crate::wire::mountd::{self, Lane};
use crate::wire::{Instance, MOUNTDS, Request, Role};

/// How long a request waits before another mountd is started. Most are done in a few milliseconds, and to
/// start one costs as much; nobody is to be held up for a tenth of a second.
const PATIENCE: Duration = Duration::from_millis(50);
/// How long until the next one is started when more requests wait than are coming up.
const NEXT: Duration = Duration::from_millis(10);
/// How long until another one is started in the place of one that does not come up.
const COMES_UP: Duration = Duration::from_millis(500);
/// How long one that is not the first has nothing to do until it is ended.
const IDLE: Duration = Duration::from_secs(5);

/// What is asked of mountd, and of none of them yet.
#[derive(Debug, Default)]
pub(super) struct Pool {
    /// In the order in which it was asked, but for what comes back from a mountd that died: that is first.
    pub(super) queued: VecDeque<Pending>,
    /// Who keeps something of a lane: the file that it reads, the volumes that it fills.
    keepers: BTreeMap<Lane, Instance>,
    /// When a request went to a mountd that had done another the last time: they take turns, and whoever
    /// waits has his.
    moved: Duration,
    /// When one was started the last time.
    started: Duration,
}

impl Pool {
    /// What a mountd had to do and others can.
    pub(super) fn take_back(&mut self, mountd: Instance, mut queued: VecDeque<Pending>) {
        queued.append(&mut self.queued);
        self.queued = queued;
        self.keepers.retain(|_, keeper| *keeper != mountd);
    }

    /// A request was answered: whether its mountd keeps something.
    pub(super) fn note(&mut self, mountd: Instance, pending: &Pending, result: &Result<Answer, Fault>) {
        let Request::Mountd(request) = &*pending.request else { return };
        let lane = request.lane();
        match request {
            mountd::Request::PrepareContainer { .. }
            | mountd::Request::ReadFile { .. }
            | mountd::Request::ReadOn { .. }
            | mountd::Request::RemoveContainer { .. } => {}
            _ => return,
        }
        match result {
            Ok(Answer::Populating | Answer::Part { last: false, .. }) => {
                self.keepers.insert(lane, mountd);
            }
            // A fault may be init's own, and the mountd has not heard of it. It is asked the same again, or
            // to forget all.
            Err(_) | Ok(Answer::NotYet(_)) if matches!(request, mountd::Request::PrepareContainer { .. }) => {
            }
            _ => {
                self.keepers.remove(&lane);
            }
        }
    }

    /// The next request for a mountd of that number: what may be sent to more of them comes first.
    fn next_for(&self, number: u8) -> Option<usize> {
        let mut lanes = BTreeSet::new();
        let mut best = None;
        for (at, pending) in self.queued.iter().enumerate() {
            let mountds = pending.mountds();
            // The first of its lane.
            if !lanes.insert(pending.lane.as_ref()) || mountds <= number {
                continue;
            }
            let rank = (mountds, !pending.is_later);
            if best.is_none_or(|(highest, _)| rank > highest) {
                best = Some((rank, at));
            }
            if mountds == MOUNTDS {
                break;
            }
        }
        best.map(|(_, at)| at)
    }
}

impl Queues {
    /// The mountd that has something to do of a lane, or keeps something of it.
    pub(super) fn holder(&self, lane: &Lane) -> Option<Instance> {
        let alive = |mountd: &Instance| self.queues.get(mountd).is_some_and(|queue| !queue.killed);
        if let Some(keeper) = self.pool.keepers.get(lane).filter(|keeper| alive(keeper)) {
            return Some(*keeper);
        }
        let has =
            |queue: &Queue| queue.sent.iter().chain(&queue.queued).any(|p| p.lane.as_ref() == Some(lane));
        self.queues.iter().find(|(_, queue)| has(queue)).map(|(&mountd, _)| mountd)
    }

    /// Gives every mountd that has nothing to do the next request, and what else there is of its lane.
    pub(super) fn deal(&mut self, now: Duration) {
        let is_new = |pending: &&mut Pending| pending.waits.is_none();
        let new = self.pool.queued.iter_mut().rev().take_while(is_new);
        new.for_each(|pending| pending.waits = Some(now));
        for (mountd, queue) in &mut self.queues {
            if mountd.role() != Role::Mountd || !queue.is_free() {
                continue;
            }
            let Some(at) = self.pool.next_for(mountd.number()) else { continue };
            let Some(next) = self.pool.queued.remove(at) else { continue };
            // Seldom.
            if self.pool.queued.iter().any(|pending| pending.lane == next.lane) {
                let all = std::mem::take(&mut self.pool.queued).into_iter();
                (queue.queued, self.pool.queued) = all.partition(|pending| pending.lane == next.lane);
            }
            queue.queued.push_front(next);
            if !queue.is_new {
                self.pool.moved = now;
            }
        }
    }

    /// The mountds that could be started.
    fn startable(&self) -> impl Iterator<Item = Instance> + '_ {
        // While the first one is down, it comes up by itself.
        let first = self.queues.get(&Instance::first(Role::Mountd));
        let is_up = first.is_some_and(|queue| matches!(queue.state, State::Up(_)));
        let down = self.queues.iter().filter(|(_, queue)| queue.state == State::Down);
        down.map(|(&helper, _)| helper).filter(move |helper| is_up && helper.is_extra())
    }

    /// When another mountd is to be started: a request has waited for long, and nothing has moved meanwhile.
    pub(super) fn missing_at(&self) -> Option<Duration> {
        let next = self.pool.queued.front().and(self.startable().next())?;
        let waiting = self.pool.queued.iter().filter(|pending| pending.mountds() > next.number());
        let since = waiting.clone().filter_map(|pending| pending.waits).min()?;
        let coming = self.queues.values().filter(|queue| queue.state == State::Starting).count();
        let pause = if coming < waiting.count() { NEXT } else { COMES_UP };
        Some((since.max(self.pool.moved) + PATIENCE).max(self.pool.started + pause))
    }

    /// The mountd that is to be started now.
    pub(super) fn missing(&mut self, now: Duration) -> Option<Instance> {
        self.missing_at().filter(|&at| at <= now)?;
        let mountd = self.startable().next()?;
        self.queue(mountd).state = State::Starting;
        self.pool.started = now;
        Some(mountd)
    }

    /// Since when each mountd that is not the first has nothing to do.
    fn idlers(&self) -> impl Iterator<Item = (Instance, Duration)> + '_ {
        let keeps = |mountd: &Instance| self.pool.keepers.values().any(|keeper| keeper == mountd);
        let idle = self.queues.iter().filter(|(_, queue)| queue.is_free());
        let idle = idle.filter(move |(mountd, _)| mountd.is_extra() && !keeps(mountd));
        idle.map(|(&mountd, queue)| (mountd, queue.heard))
    }

    /// When the next of them is not needed any more.
    pub(super) fn idle_at(&self) -> Option<Duration> {
        self.idlers().map(|(_, since)| since + IDLE).min()
    }

    /// Those that are not needed any more. Nothing is sent to them from now on.
    pub(super) fn idle(&mut self, now: Duration) -> Vec<Instance> {
        let idle = self.idlers().filter(|&(_, since)| since + IDLE <= now);
        let idle: Vec<Instance> = idle.map(|(mountd, _)| mountd).collect();
        idle.iter().for_each(|&mountd| self.queue(mountd).killed = true);
        idle
    }
}

impl Pending {
    /// How many of the mountds it may be sent to.
    fn mountds(&self) -> u8 {
        match &*self.request {
            Request::Mountd(request) => request.mountds(),
            Request::Netd(_) | Request::Execd(_) | Request::Streamd(_) => 0,
        }
    }
}

impl Queue {
    /// Whether it could begin something now.
    fn is_free(&self) -> bool {
        matches!(self.state, State::Up(_)) && !self.killed && self.sent.is_empty() && self.queued.is_empty()
    }
}

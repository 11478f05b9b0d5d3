//! Several mountds: which of them a request goes to, and how many run.
//!
//! A request goes to a mountd that is idle, so one that waits for a disk, a server or the share's host delays
//! no others. Requests of one lane (`wire::mountd::Lane`) stay in order on one mountd, as long as it has any
//! of them to do or keeps state for that lane. When a request has waited too long for a free mountd, another
//! is started; a mountd that is idle for long is ended.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use super::answer::Answer;
use super::queue::{Pending, Queue, Queues, State};
use crate::fault::Fault;
use crate::wire::mountd::{self, Lane};
use crate::wire::{Instance, MOUNTDS, Request, Role};

/// How long a request waits before another mountd is started. Most requests take a few milliseconds, and
/// starting a mountd takes about as long; no request should wait for a tenth of a second.
const PATIENCE: Duration = Duration::from_millis(50);
/// The interval between two starts while more requests wait than mountds are starting.
const NEXT: Duration = Duration::from_millis(10);
/// How long a mountd may take to come up before another one is started in its place.
const COMES_UP: Duration = Duration::from_millis(500);
/// How long an extra mountd may be idle before it is ended.
const IDLE: Duration = Duration::from_secs(5);

/// The requests that no mountd has been given yet.
#[derive(Debug, Default)]
pub(super) struct Pool {
    /// In order of arrival, except that requests taken back from a dead mountd are first.
    pub(super) queued: VecDeque<Pending>,
    /// The mountds that keep state for a lane: a file that is being read, or volumes that are being filled.
    keepers: BTreeMap<Lane, Instance>,
    /// When a request last went to a mountd that had finished an earlier one. Then the mountds make progress,
    /// and the waiting requests get their turn.
    moved: Duration,
    /// When a mountd was last started.
    started: Duration,
}

impl Pool {
    /// Puts the requests of a dead mountd back; others can do them.
    pub(super) fn take_back(&mut self, mountd: Instance, mut queued: VecDeque<Pending>) {
        queued.append(&mut self.queued);
        self.queued = queued;
        self.keepers.retain(|_, keeper| *keeper != mountd);
    }

    /// A request was answered: records whether its mountd keeps state for the lane.
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
            // The fault may be init's own, and the mountd has not seen the request. It will get the request
            // again, or be told to forget everything.
            Err(_) | Ok(Answer::NotYet(_)) if matches!(request, mountd::Request::PrepareContainer { .. }) => {
            }
            _ => {
                self.keepers.remove(&lane);
            }
        }
    }

    /// The next request for the mountd with that number: requests that may go to more of the mountds come
    /// first.
    fn next_for(&self, number: u8) -> Option<usize> {
        let mut lanes = BTreeSet::new();
        let mut best = None;
        for (at, pending) in self.queued.iter().enumerate() {
            let mountds = pending.mountds();
            // Only the first request of each lane counts.
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
    /// The mountd that has requests of a lane to do, or keeps state for it.
    pub(super) fn holder(&self, lane: &Lane) -> Option<Instance> {
        let alive = |mountd: &Instance| self.queues.get(mountd).is_some_and(|queue| !queue.killed);
        if let Some(keeper) = self.pool.keepers.get(lane).filter(|keeper| alive(keeper)) {
            return Some(*keeper);
        }
        let has =
            |queue: &Queue| queue.sent.iter().chain(&queue.queued).any(|p| p.lane.as_ref() == Some(lane));
        self.queues.iter().find(|(_, queue)| has(queue)).map(|(&mountd, _)| mountd)
    }

    /// Gives every idle mountd the next request, and the other requests of its lane.
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
            // This is rare.
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

    /// The mountds that can be started.
    fn startable(&self) -> impl Iterator<Item = Instance> + '_ {
        // While the first mountd is down, init restarts it, and no extra one is started.
        let first = self.queues.get(&Instance::first(Role::Mountd));
        let is_up = first.is_some_and(|queue| matches!(queue.state, State::Up(_)));
        let down = self.queues.iter().filter(|(_, queue)| queue.state == State::Down);
        down.map(|(&helper, _)| helper).filter(move |helper| is_up && helper.is_extra())
    }

    /// When another mountd is to be started: a request has waited too long, and no mountd has made progress
    /// meanwhile.
    pub(super) fn missing_at(&self) -> Option<Duration> {
        let next = self.pool.queued.front().and(self.startable().next())?;
        let waiting = self.pool.queued.iter().filter(|pending| pending.mountds() > next.number());
        let since = waiting.clone().filter_map(|pending| pending.waits).min()?;
        let coming = self.queues.values().filter(|queue| queue.state == State::Starting).count();
        let pause = if coming < waiting.count() { NEXT } else { COMES_UP };
        Some((since.max(self.pool.moved) + PATIENCE).max(self.pool.started + pause))
    }

    /// The mountd that is to be started now, if any.
    pub(super) fn missing(&mut self, now: Duration) -> Option<Instance> {
        self.missing_at().filter(|&at| at <= now)?;
        let mountd = self.startable().next()?;
        self.queue(mountd).state = State::Starting;
        self.pool.started = now;
        Some(mountd)
    }

    /// For each extra mountd that is idle, since when it has been.
    fn idlers(&self) -> impl Iterator<Item = (Instance, Duration)> + '_ {
        let keeps = |mountd: &Instance| self.pool.keepers.values().any(|keeper| keeper == mountd);
        let idle = self.queues.iter().filter(|(_, queue)| queue.is_free());
        let idle = idle.filter(move |(mountd, _)| mountd.is_extra() && !keeps(mountd));
        idle.map(|(&mountd, queue)| (mountd, queue.heard))
    }

    /// When the next idle mountd is ended.
    pub(super) fn idle_at(&self) -> Option<Duration> {
        self.idlers().map(|(_, since)| since + IDLE).min()
    }

    /// The mountds that have been idle for too long. Nothing is sent to them from now on.
    pub(super) fn idle(&mut self, now: Duration) -> Vec<Instance> {
        let idle = self.idlers().filter(|&(_, since)| since + IDLE <= now);
        let idle: Vec<Instance> = idle.map(|(mountd, _)| mountd).collect();
        idle.iter().for_each(|&mountd| self.queue(mountd).killed = true);
        idle
    }
}

impl Pending {
    /// How many of the mountds it may be sent to, counted from the first.
    fn mountds(&self) -> u8 {
        match &*self.request {
            Request::Mountd(request) => request.mountds(),
            Request::Netd(_) | Request::Execd(_) | Request::Streamd(_) => 0,
        }
    }
}

impl Queue {
    /// Whether the mountd is up and has nothing to do.
    fn is_free(&self) -> bool {
        matches!(self.state, State::Up(_)) && !self.killed && self.sent.is_empty() && self.queued.is_empty()
    }
}

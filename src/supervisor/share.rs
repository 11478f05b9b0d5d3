//! What exited processes wrote to the share reaches the host before the host is told of their end.
//!
//! This is needed only where the guest's kernel writes late (`Config::share_is_late`); elsewhere nothing here
//! is used. One request to mountd serves all processes that have exited before it is sent. A container
//! without the share does not wait, whatever the share's host does.

use std::time::Duration;

use super::answer::Answer;
use super::state::{ProcessState, Purpose};
use super::{Supervisor, warn};
use crate::fault::Fault;
use crate::ids::{ContainerId, ProcessId};
use crate::wire::{MOUNT, mountd};

/// The processes whose end waits for the share.
#[derive(Debug, Default)]
pub(super) struct Syncing {
    /// In the order of their ends, each with the time at which it stops waiting: a host that does not answer
    /// blocks mountd in a way that no signal can interrupt.
    waiting: Vec<(Duration, ContainerId, ProcessId)>,
    /// How many of them the request under way covers, if there is one.
    under_way: Option<usize>,
}

impl Syncing {
    /// When the first process stops waiting.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.waiting.first().map(|&(until, ..)| until)
    }
}

impl Supervisor {
    /// A process has exited that may have written to the share.
    pub(super) fn wait_for_share(&mut self, container: &ContainerId, process: &ProcessId) {
        let record = self.containers.get_mut(container).and_then(|known| known.processes.get_mut(process));
        let Some(record) = record else { return };
        let ProcessState::Exited(status) = record.state else { return };
        record.state = ProcessState::Syncing(status);
        self.syncing.waiting.push((self.now + MOUNT, container.clone(), process.clone()));
        self.sync_share();
    }

    fn sync_share(&mut self) {
        if self.syncing.under_way.is_none() && !self.syncing.waiting.is_empty() {
            self.syncing.under_way = Some(self.syncing.waiting.len());
            self.queues.ask(mountd::Request::SyncShare, Purpose::ShareSynced);
        }
    }

    /// mountd has synced the share, or has failed to.
    pub(super) fn share_synced(&mut self, result: Result<Answer, Fault>) {
        warn(result);
        let count = self.syncing.under_way.take().unwrap_or(0);
        self.written_to_share(count);
        self.sync_share();
    }

    /// Stops the wait of the processes that have waited too long, with a line in the log.
    pub(super) fn give_share_up(&mut self) {
        let late = self.syncing.waiting.iter().take_while(|&&(until, ..)| until <= self.now).count();
        if late > 0 {
            log::warn!("the share's host does not answer: {late} processes' ends do not wait for it");
            self.syncing.under_way = self.syncing.under_way.map(|count| count.saturating_sub(late));
            self.written_to_share(late);
        }
    }

    fn written_to_share(&mut self, count: usize) {
        let count = count.min(self.syncing.waiting.len());
        let ended: Vec<_> = self.syncing.waiting.drain(..count).collect();
        ended.iter().for_each(|(_, container, process)| self.written(container, process));
    }
}

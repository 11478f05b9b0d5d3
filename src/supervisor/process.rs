//! A process: its start, its release, and its end (first its output, then its event).

use std::time::Duration;

use serde::Serialize;

use super::answer::Answer;
use super::state::{Asker, Container, ContainerEnd, ContainerState, Pod, ProcessState, Purpose};
use super::{Action, Supervisor, Ticket, warn};
use crate::fault::Fault;
use crate::frame::Message;
use crate::ids::{ContainerId, Pid, ProcessId, Signal, StreamId};
use crate::wire::{execd, mountd, streamd};

/// How long at most, and for how many finished processes, execd keeps duplicates of their output while no
/// start carries the release. To drop some, execd walks over all that it keeps, so a release waits for as
/// many as still run; the list travels in one message, which limits it.
const RELEASE: Duration = Duration::from_secs(1);
const RELEASE_MIN: usize = 16;
const RELEASE_MAX: usize = 512;

/// PROCESSASYNCEVENT's payload.
#[derive(Serialize)]
struct Finished<'a> {
    container: &'a ContainerId,
    process: &'a ProcessId,
    event: &'static str,
    status: u8,
}

// ---- start ----

impl Supervisor {
    pub(super) fn exec_started(
        &mut self,
        container: &ContainerId,
        process: &ProcessId,
        result: Result<Answer, Fault>,
    ) {
        let lied = || Fault::new("starting in container", container, "execd lied about it");
        match result {
            Ok(Answer::Started(pid)) if self.is_new_pid(pid) => self.started(container, process, pid),
            Ok(_) => self.exec_failed(container, process, lied()),
            Err(fault) => self.exec_failed(container, process, fault),
        }
    }

    fn exec_failed(&mut self, container: &ContainerId, process: &ProcessId, fault: Fault) {
        let Some(known) = self.containers.get_mut(container) else { return };
        let Some(record) = known.processes.remove(process) else { return };
        self.free_streams(record.stdio, record.stderr);
        if let ProcessState::Starting(asker) = record.state {
            self.tell(asker, Err(fault));
        }
        self.container_advances(container);
    }

    /// A process exists. It executes as soon as the commands that the host sent for it are done. It may have
    /// ended already.
    pub(super) fn started(&mut self, container: &ContainerId, process: &ProcessId, pid: Pid) {
        let Some(known) = self.containers.get_mut(container) else { return };
        let ends =
            if known.is_door() { self.leaving.is_some() } else { matches!(self.pod, Pod::Ending { .. }) };
        let ending = ends || !matches!(known.state, ContainerState::Running);
        let Some(record) = known.processes.get_mut(process) else { return };
        let ProcessState::Starting(asker) = record.state else { return };
        record.state = ProcessState::Held(pid);
        self.tell(asker, Ok(()));
        self.pids.insert(pid, (container.clone(), process.clone()));
        if let Some(status) = self.stray(pid) {
            self.pids.remove(&pid);
            self.process_exited(container, process, status);
        } else if ending {
            // The container or the pod is already ending, and what existed before has been killed.
            self.kill(pid, Signal::KILL, false);
        } else {
            self.held.push((container.clone(), process.clone()));
        }
    }

    /// Lets the held processes execute that wait for nothing more: the commands that came after their start
    /// and belong before it have been carried out. True if there were any.
    pub(super) fn release_held(&mut self) -> bool {
        let held = std::mem::take(&mut self.held);
        let before = held.len();
        for (container, process) in held {
            let known = self.containers.get_mut(&container);
            let Some(record) = known.and_then(|known| known.processes.get_mut(&process)) else { continue };
            match record.state {
                ProcessState::Held(_) if record.resizing > 0 => self.held.push((container, process)),
                ProcessState::Held(pid) => {
                    record.state = ProcessState::Running(pid);
                    self.actions.push(Action::Release { pid });
                }
                ProcessState::Starting(_)
                | ProcessState::Running(_)
                | ProcessState::Exited(_)
                | ProcessState::Syncing(_) => {}
            }
        }
        self.held.len() < before
    }

    /// The tty of a held process was resized, or could not be.
    pub(super) fn resized(
        &mut self,
        ticket: Ticket,
        container: &ContainerId,
        process: &ProcessId,
        result: Result<Answer, Fault>,
    ) {
        let known = self.containers.get_mut(container);
        if let Some(record) = known.and_then(|known| known.processes.get_mut(process)) {
            record.resizing = record.resizing.saturating_sub(1);
        }
        self.replies.close(ticket, result.map(|_| Vec::new()));
    }

    /// Tells the asker the result of starting a container or a process.
    pub(super) fn tell(&mut self, asker: Asker, result: Result<(), Fault>) {
        match (asker, result) {
            (Asker::Host(ticket), result) => self.replies.close(ticket, result.map(|()| Vec::new())),
            (Asker::Pod, Ok(())) => self.open_next(),
            (Asker::Pod, Err(fault)) => self.opening_failed(fault),
        }
    }
}

// ---- end ----

impl Supervisor {
    /// A process of a container was reaped.
    pub(super) fn process_exited(&mut self, container: &ContainerId, process: &ProcessId, status: u8) {
        let Some(known) = self.containers.get_mut(container) else { return };
        let Some(record) = known.processes.get_mut(process) else { return };
        record.state = ProcessState::Exited(status);
        let stdio = record.stdio;
        if known.init.as_ref() == Some(process) {
            known.state = ContainerState::Ending(ContainerEnd::Killing);
            self.close_ports(container);
            let request = mountd::Request::KillContainer { container: container.clone() };
            self.queues.ask(request, Purpose::KillLeft(container.clone()));
        } else {
            self.finish(container, process, stdio);
        }
    }

    pub(super) fn finish(&mut self, container: &ContainerId, process: &ProcessId, stdio: StreamId) {
        let purpose = Purpose::Output(container.clone(), process.clone());
        self.queues.ask(streamd::Request::Finish { stdio, pause: !self.host_reads_on }, purpose);
    }

    /// All output of an exited process has left, or never will.
    pub(super) fn output_left(
        &mut self,
        container: &ContainerId,
        process: &ProcessId,
        result: Result<Answer, Fault>,
    ) {
        if result.is_ok() {
            self.output_moves();
        }
        warn(result);
        let state =
            |known: &Container| known.processes.get(process).map(|record| (record.state, known.shares));
        match self.containers.get(container).and_then(state) {
            Some((ProcessState::Exited(_), true)) if self.config.share_is_late => {
                self.wait_for_share(container, process);
            }
            Some((ProcessState::Exited(_), _)) => self.written(container, process),
            // The output was given up, and has left after all.
            Some(_) | None => {}
        }
    }

    /// Everything that an exited process wrote is where it belongs.
    pub(super) fn written(&mut self, container: &ContainerId, process: &ProcessId) {
        let Some(known) = self.containers.get_mut(container) else { return };
        if known.init.as_ref() == Some(process) {
            if let ContainerState::Ending(step @ ContainerEnd::Output) = &mut known.state {
                *step = ContainerEnd::Files;
                let request = mountd::Request::RemoveContainer { container: container.clone() };
                self.queues.ask(request, Purpose::RemoveFiles(container.clone()));
            }
        } else {
            self.finished(container, process);
            self.container_advances(container);
        }
    }

    /// A process is finished: the host is told, and its streams are free.
    pub(super) fn finished(&mut self, container: &ContainerId, process: &ProcessId) {
        let Some(known) = self.containers.get_mut(container) else { return };
        let Some(status) = known.processes.get(process).and_then(|record| record.state.status()) else {
            return;
        };
        let Some(record) = known.processes.remove(process) else { return };
        self.free_streams(record.stdio, record.stderr);
        self.finished.push(record.stdio);
        self.release_at.get_or_insert(self.now + RELEASE);
        let event = Finished { container, process, event: "finished", status };
        match serde_json::to_vec(&event) {
            Ok(payload) => self.send(Message::ProcessAsyncEvent, payload),
            Err(error) => log::error!("{container}: {process}: telling its end: {error}"),
        }
    }

    /// The processes whose duplicates execd may close. A start carries them, because a separate request costs
    /// execd and init one more turn each.
    pub(super) fn take_finished(&mut self) -> Vec<StreamId> {
        self.release_at = None;
        std::mem::take(&mut self.finished)
    }

    /// Sends the release alone if no start has carried it in time.
    pub(super) fn release(&mut self) {
        let enough = self.pids.len().clamp(RELEASE_MIN, RELEASE_MAX);
        if self.release_at.is_some_and(|at| at <= self.now) || self.finished.len() >= enough {
            let finished = self.take_finished();
            self.queues.ask(execd::Request::Release { finished }, Purpose::Nothing);
        }
    }

    pub(super) fn free_streams(&mut self, stdio: StreamId, stderr: Option<StreamId>) {
        for stream in [Some(stdio), stderr].into_iter().flatten() {
            self.streams.remove(&stream);
        }
    }
}

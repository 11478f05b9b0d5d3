//! Ends: of a process (its output, then its event), of a container (what is left in it, then its files), of the pod, and
//! of the guest.

use std::time::Duration;

use serde::Serialize;

use super::answer::Answer;
use super::state::{
    Container, ContainerEnd, ContainerState, Leaving, LeavingStep, Pod, PodEnd, Process, ProcessState,
    Purpose,
};
use super::steps::init_died;
use super::{Action, Supervisor, Ticket, warn};
use crate::fault::Fault;
use crate::frame::Message;
use crate::ids::{ContainerId, Pid, ProcessId, Signal, StreamId};
use crate::wire::{execd, mountd, streamd};

/// How long DESTROYPOD waits after the kill, and after each process whose output has left, for the next one's. runV gives up
/// ten seconds after it has asked, so nothing here is waited for longer than [`END`] after the kill.
const OUTPUT: Duration = Duration::from_secs(2);
/// How long files always have to be unmounted.
const FILES: Duration = Duration::from_millis(1500);
/// How long after the kill everything is given up.
const END: Duration = Duration::from_millis(5500);
/// How long the last frame may take to leave.
const LAST_FRAME: Duration = Duration::from_millis(500);
/// How long mountd may sync after that, before the power goes off: a disk or a server that hangs would keep it for ever. What was written to
/// a filesystem that is still mounted then, and has not left, is lost; what was unmounted in time is not.
const SYNC: Duration = Duration::from_secs(10);

/// How long, and for how many finished processes, execd keeps duplicates if nothing is started. To throw some out it looks at all
/// that it keeps, so there are to be as many as still run; the list of them travels in a message.
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

// ---- a process ----

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

    fn finish(&mut self, container: &ContainerId, process: &ProcessId, stdio: StreamId) {
        let purpose = Purpose::Output(container.clone(), process.clone());
        self.queues.ask(streamd::Request::Finish { stdio, pause: !self.host_reads_on }, purpose);
    }

    /// The host reads: what others wrote is not given up yet.
    fn output_moves(&mut self) {
        if let Some(Leaving { abandon_at, give_up_at, .. }) = &mut self.leaving {
            *abandon_at = (self.now + OUTPUT).max(*abandon_at).min(*give_up_at - FILES);
        }
    }

    /// Everything that an exited process wrote has left, or never will.
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
            // It was given up, and has left after all.
            Some(_) | None => {}
        }
    }

    /// All that an exited process wrote is where it belongs.
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
    fn finished(&mut self, container: &ContainerId, process: &ProcessId) {
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

    /// Whose duplicates execd may close: told with the next start, for each request costs it and init a turn.
    pub(super) fn take_finished(&mut self) -> Vec<StreamId> {
        self.release_at = None;
        std::mem::take(&mut self.finished)
    }

    /// The same without a start, when none comes.
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

// ---- a container ----

impl Supervisor {
    /// mountd has killed what was left in a container whose init has exited.
    pub(super) fn left_killed(&mut self, container: &ContainerId, result: Result<Answer, Fault>) {
        warn(result);
        let Some(known) = self.containers.get_mut(container) else { return };
        let ContainerState::Ending(step @ ContainerEnd::Killing) = &mut known.state else { return };
        *step = ContainerEnd::Processes;
        // Also where mountd could not: these are init's children.
        let running: Vec<Pid> = known.processes.values().filter_map(|process| process.state.pid()).collect();
        running.into_iter().for_each(|pid| self.kill(pid, Signal::KILL, false));
        self.container_advances(container);
    }

    /// A process of a container is finished: if its init has exited and was the last, its own end goes on.
    pub(super) fn container_advances(&mut self, container: &ContainerId) {
        let Some(known) = self.containers.get_mut(container) else { return };
        let ContainerState::Ending(step @ ContainerEnd::Processes) = &mut known.state else { return };
        if known.processes.len() > 1 {
            return;
        }
        *step = ContainerEnd::Output;
        let Some(init) = known.init.clone() else { return };
        if let Some(stdio) = known.processes.get(&init).map(|process| process.stdio) {
            self.finish(container, &init, stdio);
        }
    }

    /// The container is cleaned up: the host may have its disk back, and hears of its init's end.
    pub(super) fn files_removed(&mut self, container: &ContainerId, result: Result<Answer, Fault>) {
        warn(result);
        let Some(known) = self.containers.get_mut(container) else { return };
        known.state = ContainerState::Exited;
        if let Some(init) = known.init.clone() {
            self.finished(container, &init);
        }
    }
}

// ---- the pod ----

impl Supervisor {
    /// The pod init was reaped. It ends when it is killed at the end of the pod, or the pod ends with it: the kernel
    /// has killed everything in its PID namespace.
    pub(super) fn pod_init_exited(&mut self) {
        match &mut self.pod {
            Pod::None => {}
            Pod::Starting { .. } => self.starting_pod_lost_init(),
            Pod::Running { opening, .. } => {
                log::error!("the pod init is gone: the pod ends");
                let failed = opening.take().map(|opening| (opening.ticket, init_died()));
                self.pod = Pod::Ending { init: None, step: PodEnd::Containers, failed };
            }
            Pod::Ending { init, .. } => *init = None,
        }
    }

    /// mountd has undone everything of the pod.
    pub(super) fn pod_files_destroyed(&mut self, result: Result<Answer, Fault>) {
        warn(result);
        self.containers.retain(|_, known| known.is_door());
        // Last: what mountd unmounts may be on the network.
        match std::mem::replace(&mut self.pod, Pod::None) {
            Pod::Ending { failed: Some((ticket, fault)), .. } => {
                let purpose = Purpose::Failed(ticket, Box::new(fault.clone()));
                if !self.reset_network(purpose) {
                    self.replies.close(ticket, Err(fault));
                }
            }
            Pod::None | Pod::Starting { .. } | Pod::Running { .. } | Pod::Ending { .. } => {
                self.reset_network(Purpose::Nothing);
            }
        }
    }

    /// Goes on with the ends of the pod and of the guest as far as they have come.
    pub(super) fn advance_ends(&mut self) {
        self.advance_pod_end();
        self.advance_leaving();
    }

    /// Whether nothing of the pod's containers is left to clean up.
    pub(super) fn containers_ended(&self) -> bool {
        let ended = |known: &Container| known.is_door() || matches!(known.state, ContainerState::Exited);
        self.containers.values().all(ended)
    }

    fn advance_pod_end(&mut self) {
        let ended = self.containers_ended();
        let Pod::Ending { init, step, .. } = &mut self.pod else { return };
        let init = *init;
        match (*step, init) {
            (PodEnd::Containers, Some(init)) if ended => {
                *step = PodEnd::Init;
                self.kill(init, Signal::KILL, false);
            }
            (PodEnd::Containers, None) if ended => self.destroy_files(),
            (PodEnd::Init, None) => self.destroy_files(),
            (PodEnd::Containers | PodEnd::Init | PodEnd::Files, _) => {}
        }
    }

    fn destroy_files(&mut self) {
        if let Pod::Ending { step, .. } = &mut self.pod {
            *step = PodEnd::Files;
        }
        self.queues.ask(mountd::Request::DestroyPod, Purpose::DestroyFiles);
    }
}

// ---- the guest ----

impl Supervisor {
    /// DESTROYPOD. A second one is answered with the first.
    pub(super) fn leave(&mut self, ticket: Ticket) {
        match &mut self.leaving {
            None => {}
            // The first has been answered, and this one comes before the power goes.
            Some(Leaving { step: LeavingStep::Said { .. } | LeavingStep::Syncing { .. }, .. }) => {
                return self.replies.close(ticket, Ok(Vec::new()));
            }
            Some(leaving) => return leaving.tickets.push(ticket),
        }
        let kill_at = self.now + self.config.grace;
        self.leaving = Some(Leaving {
            tickets: vec![ticket],
            kill_at,
            abandon_at: kill_at + OUTPUT,
            give_up_at: kill_at + END,
            step: LeavingStep::Term,
        });
        self.signal_all(Signal::TERM);
        let early = || Fault::new("starting", "the pod", "DESTROYPOD came before it ran");
        match &mut self.pod {
            Pod::None | Pod::Ending { .. } => {}
            Pod::Starting { .. } => self.undo_pod(early()),
            Pod::Running { init, opening, .. } => {
                let failed = opening.take().map(|opening| (opening.ticket, early()));
                self.pod = Pod::Ending { init: Some(*init), step: PodEnd::Containers, failed };
            }
        }
    }

    /// To the group of every process that is known. What they have left behind in other sessions ends with their
    /// container, when its init does.
    fn signal_all(&mut self, signal: Signal) {
        let pids: Vec<Pid> = self.pids.keys().copied().collect();
        pids.into_iter().for_each(|pid| self.kill(pid, signal, true));
    }

    fn advance_leaving(&mut self) {
        // With the pod its containers are gone; what came by the debugging door may be left.
        let idle = self.containers.values().all(|known| known.processes.is_empty());
        let Some(leaving) = &mut self.leaving else { return };
        let now = self.now;
        match leaving.step {
            LeavingStep::Term | LeavingStep::Killed | LeavingStep::Abandoned
                if matches!(self.pod, Pod::None) && idle =>
            {
                leaving.step = LeavingStep::Flushing;
                self.queues.ask(streamd::Request::Flush, Purpose::Flush);
            }
            LeavingStep::Term if now >= leaving.kill_at => {
                leaving.step = LeavingStep::Killed;
                self.signal_all(Signal::KILL);
            }
            LeavingStep::Killed if now >= leaving.abandon_at => {
                leaving.step = LeavingStep::Abandoned;
                log::warn!("the host does not read the processes' output: it is given up");
                self.abandon_output();
            }
            LeavingStep::Abandoned | LeavingStep::Flushing if now >= leaving.give_up_at => {
                log::warn!("leaving before everything has ended");
                self.say_goodbye();
            }
            // What has come so far only now: the rest of a container's end is still to come, and needs its time.
            LeavingStep::Abandoned => self.abandon_output(),
            LeavingStep::Said { until } if now >= until => self.sync(),
            LeavingStep::Syncing { until } if now >= until => {
                log::warn!("leaving before everything is on its disk or at its server");
                self.actions.push(Action::PowerOff);
            }
            LeavingStep::Term
            | LeavingStep::Killed
            | LeavingStep::Flushing
            | LeavingStep::Said { .. }
            | LeavingStep::Syncing { .. } => {}
        }
    }

    /// Of every process whose output is waited for, that of a container's init last: it waits for the others.
    fn abandon_output(&mut self) {
        while let Some((container, process)) = self.waits_for_output() {
            let fault =
                Fault::new("waiting for the output of", format!("{container}: {process}"), "given up");
            self.output_left(&container, &process, Err(fault));
        }
    }

    fn waits_for_output(&self) -> Option<(ContainerId, ProcessId)> {
        self.containers.iter().find_map(|(id, known)| {
            let init_waits = matches!(known.state, ContainerState::Ending(ContainerEnd::Output));
            let waits = |process: &ProcessId| init_waits || known.init.as_ref() != Some(process);
            let exited =
                |(_, process): &(&ProcessId, &Process)| matches!(process.state, ProcessState::Exited(_));
            let mut exited = known.processes.iter().filter(exited);
            exited.find(|(process, _)| waits(process)).map(|(process, _)| (id.clone(), process.clone()))
        })
    }

    /// streamd has written everything, or cannot.
    pub(super) fn flushed(&mut self, result: Result<Answer, Fault>) {
        warn(result);
        self.say_goodbye();
    }

    /// Answers everything that is owed, DESTROYPOD last.
    fn say_goodbye(&mut self) {
        let Some(leaving) = &mut self.leaving else { return };
        if matches!(leaving.step, LeavingStep::Said { .. } | LeavingStep::Syncing { .. }) {
            return;
        }
        leaving.step = LeavingStep::Said { until: self.now + LAST_FRAME };
        let tickets = std::mem::take(&mut leaving.tickets);
        for ticket in self.replies.under_way().into_iter().filter(|ticket| !tickets.contains(ticket)) {
            self.replies
                .close(ticket, Err(Fault::new("finishing", "the command", "the guest is going down")));
        }
        tickets.into_iter().for_each(|ticket| self.replies.close(ticket, Ok(Vec::new())));
    }

    /// Everything sent has left.
    pub(super) fn drained(&mut self) {
        self.unsent = 0;
        if self.leaving.as_ref().is_some_and(|leaving| matches!(leaving.step, LeavingStep::Said { .. })) {
            self.sync();
        }
    }

    fn sync(&mut self) {
        if let Some(leaving) = &mut self.leaving {
            leaving.step = LeavingStep::Syncing { until: self.now + SYNC };
            self.queues.ask(mountd::Request::Sync, Purpose::Sync);
        }
    }

    /// mountd has synced, or cannot.
    pub(super) fn synced(&mut self, result: Result<Answer, Fault>) {
        warn(result);
        self.actions.push(Action::PowerOff);
    }

    /// When the guest's end goes on by itself.
    pub(super) fn leaving_deadline(&self) -> Option<Duration> {
        let leaving = self.leaving.as_ref()?;
        Some(match leaving.step {
            LeavingStep::Term => leaving.kill_at,
            LeavingStep::Killed => leaving.abandon_at,
            LeavingStep::Abandoned | LeavingStep::Flushing => leaving.give_up_at,
            LeavingStep::Said { until } | LeavingStep::Syncing { until } => until,
        })
    }
}

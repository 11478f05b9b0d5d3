//! A container: the steps of NEWCONTAINER, which the first fault undoes, and its end (first the processes
//! that are left in it, then its files).

use std::collections::BTreeMap;
use std::time::Duration;

use super::Supervisor;
use super::answer::Answer;
use super::state::{Asker, Container, ContainerEnd, ContainerState, ContainerStep, Pod, Process, Purpose};
use super::warn;
use crate::command::Command;
use crate::fault::Fault;
use crate::ids::{ContainerId, Pid, Signal};
use crate::spec;
use crate::wire::{execd, mountd};

/// How long to wait for a disk that is being plugged (protocol.md «NEWCONTAINER»).
const PLUG: Duration = Duration::from_secs(2);

// ---- start ----

impl Supervisor {
    /// The first step of a container.
    pub(super) fn prepare_container(&mut self, asker: Asker, container: Box<spec::Container>, init: Process) {
        let (stdio, stderr) = (init.stdio, init.stderr);
        self.streams.extend([Some(stdio), stderr].into_iter().flatten());
        let id = container.id.clone();
        let until = self.now + PLUG;
        let record = Container {
            state: ContainerState::Preparing { asker, container: container.clone(), until },
            init: Some(container.process.id.clone()),
            reuses: self.containers.contains_key(&id),
            ports: self.mapped(&container),
            open: false,
            shares: container.fstype.is_empty() || !container.fsmap.is_empty(),
            processes: BTreeMap::from([(container.process.id.clone(), init)]),
        };
        self.containers.insert(id.clone(), record);
        let purpose = Purpose::Container(id, ContainerStep::Files);
        self.queues.ask(mountd::Request::PrepareContainer { container }, purpose);
    }

    pub(super) fn container_step(
        &mut self,
        id: &ContainerId,
        step: ContainerStep,
        result: Result<Answer, Fault>,
    ) {
        match (step, result) {
            (ContainerStep::Files, Ok(Answer::NotYet(fault))) => self.prepare_again(id, Some(fault)),
            (ContainerStep::Files, Ok(Answer::Populating)) => self.prepare_again(id, None),
            (ContainerStep::Files, Ok(_)) => {
                let purpose = Purpose::Container(id.clone(), ContainerStep::Ports);
                if !self.open_ports(id, purpose) {
                    self.start_init(id);
                }
            }
            (ContainerStep::Ports, Ok(_)) => self.start_init(id),
            (ContainerStep::Init, Ok(Answer::Started(pid))) if self.is_new_pid(pid) => {
                self.init_started(id, pid);
            }
            (ContainerStep::Init, Ok(_)) => {
                self.undo_container(id, Fault::new("starting container", id, "execd lied about it"));
            }
            (ContainerStep::Files | ContainerStep::Ports | ContainerStep::Init, Err(fault)) => {
                self.undo_container(id, fault);
            }
            (ContainerStep::Undo, result) => {
                super::warn(result);
                if let Some(ContainerState::Undoing { asker, fault }) = self.forget_container(id) {
                    self.tell(asker, Err(fault));
                }
            }
        }
    }

    /// A disk of the container was not there, or a volume is being filled: asks mountd again, behind the
    /// requests of others. A disk has to appear in time; filling a volume has no limit, but the host can
    /// cancel it.
    fn prepare_again(&mut self, id: &ContainerId, missing: Option<Fault>) {
        let Some(known) = self.containers.get(id) else { return };
        let ContainerState::Preparing { asker, container, until } = &known.state else { return };
        let runs = matches!(self.pod, Pod::Running { .. });
        match missing {
            Some(fault) if !runs || self.now >= *until => self.undo_container(id, fault),
            None if !runs => {
                self.undo_container(id, Fault::new("starting container", id, "the pod is ending"));
            }
            // Without its container, a pod whose STARTPOD carried it would end.
            None if matches!(asker, Asker::Host(_)) && self.is_killed(id) => {
                let why = "it was killed before its volumes were filled";
                self.undo_container(id, Fault::new("starting container", id, why));
            }
            Some(_) | None => {
                let request = mountd::Request::PrepareContainer { container: container.clone() };
                self.queues.ask_later(request, Purpose::Container(id.clone(), ContainerStep::Files));
            }
        }
    }

    /// Whether a SIGKILL is parked until the container has started.
    fn is_killed(&self, id: &ContainerId) -> bool {
        self.parked.iter().any(|(_, command)| {
            matches!(command, Command::KillContainer(kill) if kill.container == *id && kill.signal == Signal::KILL)
        })
    }

    fn start_init(&mut self, id: &ContainerId) {
        let Pod::Running { hostname, .. } = &self.pod else {
            return self.undo_container(id, Fault::new("starting container", id, "the pod is ending"));
        };
        let hostname = hostname.clone();
        let Some(container) = self.containers.get_mut(id) else { return };
        let ContainerState::Preparing { asker, .. } = container.state else { return };
        let state = std::mem::replace(&mut container.state, ContainerState::Starting { asker });
        if let ContainerState::Preparing { container, .. } = state {
            let spec::Container { process, sysctl, .. } = *container;
            let (container, process, finished) = (id.clone(), Box::new(process), self.take_finished());
            let request =
                execd::Request::StartProcess { container, process, init: true, hostname, sysctl, finished };
            self.queues.ask(request, Purpose::Container(id.clone(), ContainerStep::Init));
        }
    }

    fn init_started(&mut self, id: &ContainerId, pid: Pid) {
        let Some(container) = self.containers.get_mut(id) else { return };
        container.state = ContainerState::Running;
        if let Some(init) = container.init.clone() {
            self.started(id, &init, pid);
        }
    }

    /// mountd takes back what it built; the host is told afterwards.
    fn undo_container(&mut self, id: &ContainerId, fault: Fault) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let (ContainerState::Preparing { asker, .. } | ContainerState::Starting { asker }) = container.state
        else {
            return;
        };
        container.state = ContainerState::Undoing { asker, fault };
        self.close_ports(id);
        // An execd that died may have left a process that has not noticed it yet.
        self.queues.ask(mountd::Request::KillContainer { container: id.clone() }, Purpose::Nothing);
        let purpose = Purpose::Container(id.clone(), ContainerStep::Undo);
        self.queues.ask(mountd::Request::RemoveContainer { container: id.clone() }, purpose);
    }

    /// Forgets a container that could not be started. If an exited container had that id and was not removed,
    /// that one stays known.
    fn forget_container(&mut self, id: &ContainerId) -> Option<ContainerState> {
        let known = self.containers.get_mut(id)?;
        let state = std::mem::replace(&mut known.state, ContainerState::Exited);
        let processes = std::mem::take(&mut known.processes);
        if !known.reuses {
            self.containers.remove(id);
        }
        for process in processes.values() {
            self.free_streams(process.stdio, process.stderr);
        }
        Some(state)
    }
}

// ---- end ----

impl Supervisor {
    /// mountd has killed what was left in a container whose init has exited.
    pub(super) fn left_killed(&mut self, container: &ContainerId, result: Result<Answer, Fault>) {
        warn(result);
        let Some(known) = self.containers.get_mut(container) else { return };
        let ContainerState::Ending(step @ ContainerEnd::Killing) = &mut known.state else { return };
        *step = ContainerEnd::Processes;
        // Also if mountd has failed: these processes are init's children.
        let running: Vec<Pid> = known.processes.values().filter_map(|process| process.state.pid()).collect();
        running.into_iter().for_each(|pid| self.kill(pid, Signal::KILL, false));
        self.container_advances(container);
    }

    /// A process of a container is finished. If the init has exited and is the only one left, its output is
    /// next.
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

    /// The container is cleaned up: its disk may go back to the host, which is told of its init's end.
    pub(super) fn files_removed(&mut self, container: &ContainerId, result: Result<Answer, Fault>) {
        warn(result);
        let Some(known) = self.containers.get_mut(container) else { return };
        known.state = ContainerState::Exited;
        if let Some(init) = known.init.clone() {
            self.finished(container, &init);
        }
    }
}

//! The steps of STARTPOD, NEWCONTAINER and EXECCMD: each answer asks for the next, the first fault undoes those before.

use std::net::IpAddr;

use super::answer::Answer;
use super::commands::Gate;
use super::state::{
    Asker, ContainerState, ContainerStep, Opening, Pod, PodEnd, PodStep, ProcessState, Purpose,
};
use super::{Action, Config, Supervisor, Ticket};
use crate::command::Command;
use crate::fault::Fault;
use crate::ids::{ContainerId, Pid, ProcessId, Signal};
use crate::spec;
use crate::wire::mountd::{PodFiles, Share};
use crate::wire::{Request, execd, mountd, netd};

impl Supervisor {
    /// Asks for a step of STARTPOD, or goes on with the next if this pod does not need it.
    pub(super) fn ask_pod_step(&mut self, next: PodStep) {
        // What came by the debugging door.
        let running = self.unfinished();
        let Pod::Starting { spec, step, .. } = &mut self.pod else { return };
        if !super::network::needs(spec, next, self.config.local) {
            return self.pod_step(next, Ok(Answer::Done), true);
        }
        let request: Request = match next {
            PodStep::Loopback => netd::Request::SetLinkUp { device: "lo".to_owned() }.into(),
            PodStep::Ports => netd::Request::SetPorts { mapping: super::network::base(spec) }.into(),
            PodStep::Rescan => mountd::Request::Rescan.into(),
            PodStep::Interfaces => {
                netd::Request::SetInterfaces { interfaces: spec.interfaces.clone(), repeated: false }.into()
            }
            PodStep::Routes => {
                netd::Request::AddRoutes { routes: spec.routes.clone(), repeated: false }.into()
            }
            PodStep::Files => mountd::Request::PreparePod { pod: pod_files(spec, &self.config) }.into(),
            PodStep::Init => execd::Request::StartPod { hostname: spec.hostname.clone() }.into(),
            PodStep::Join => execd::Request::JoinPod { running }.into(),
            PodStep::Undo => mountd::Request::DestroyPod.into(),
            PodStep::UndoNetwork => {
                *step = Some(next);
                if !self.reset_network(Purpose::Pod(next)) {
                    self.pod_undone();
                }
                return;
            }
        };
        *step = Some(next);
        self.queues.ask(request, Purpose::Pod(next));
    }

    /// A step has come to an end. `answered`: the helper has said so, so that a step that failed has undone itself.
    pub(super) fn pod_step(&mut self, done: PodStep, result: Result<Answer, Fault>, answered: bool) {
        let Pod::Starting { step, spec, .. } = &mut self.pod else { return };
        *step = None;
        if result.is_ok() || !answered {
            self.network.note(done, spec, result.as_ref().ok());
        }
        let answer = match result {
            Err(fault) if matches!(done, PodStep::Undo | PodStep::UndoNetwork) => {
                log::warn!("{fault}");
                Answer::Done
            }
            Err(fault) => return self.undo_pod(fault),
            Ok(answer) => answer,
        };
        if let Answer::Started(pid) = answer {
            if !self.is_new_pid(pid) {
                return self.undo_pod(Fault::new("starting", "the pod init", "execd lied about it"));
            }
            self.pod_init_started(pid);
        }
        let Pod::Starting { init, fault, .. } = &self.pod else { return };
        match done {
            // After the files, which may be on the network.
            PodStep::Undo => self.ask_pod_step(PodStep::UndoNetwork),
            PodStep::UndoNetwork => self.pod_undone(),
            // DESTROYPOD came meanwhile, or the pod init died.
            _ if fault.is_some() => self.take_pod_down(),
            PodStep::Loopback => self.ask_pod_step(PodStep::Ports),
            PodStep::Ports => self.ask_pod_step(PodStep::Rescan),
            PodStep::Rescan => self.ask_pod_step(PodStep::Interfaces),
            PodStep::Interfaces => self.ask_pod_step(PodStep::Routes),
            PodStep::Routes => self.ask_pod_step(PodStep::Files),
            PodStep::Files => self.ask_pod_step(PodStep::Init),
            PodStep::Init => {
                // It leaves its mount namespace then, which execd has kept.
                self.actions.extend(init.map(|pid| Action::Release { pid }));
                self.ask_pod_step(PodStep::Join);
            }
            PodStep::Join => match *init {
                Some(init) => self.pod_started(init),
                None => self.take_pod_down(),
            },
        }
    }

    fn pod_init_started(&mut self, pid: Pid) {
        let gone = self.stray(pid).is_some();
        if let Pod::Starting { init, fault, .. } = &mut self.pod {
            if gone {
                fault.get_or_insert_with(init_died);
            } else {
                *init = Some(pid);
            }
        }
    }

    fn pod_started(&mut self, init: Pid) {
        if let Pod::Starting { ticket, spec, .. } = &mut self.pod {
            let (ticket, hostname) = (*ticket, std::mem::take(&mut spec.hostname));
            let rest = std::mem::take(&mut spec.containers).into();
            self.pod = Pod::Running { hostname, init, opening: Some(Opening { ticket, rest }) };
            self.open_next();
        }
    }

    /// The next container that STARTPOD carried, or its reply.
    fn open_next(&mut self) {
        let Pod::Running { opening, .. } = &mut self.pod else { return };
        let Some(container) = opening.as_mut().and_then(|opening| opening.rest.pop_front()) else {
            if let Some(Opening { ticket, .. }) = opening.take() {
                self.replies.close(ticket, Ok(Vec::new()));
            }
            return;
        };
        match self.container_gate(Asker::Pod, &container) {
            Gate::Go(init) => self.prepare_container(Asker::Pod, Box::new(container), init),
            Gate::No(fault) => self.opening_failed(fault),
            // An earlier one of that id is ending.
            Gate::Wait => {
                self.opening_failed(Fault::new(
                    "making container",
                    &container.id,
                    "the pod has two of that id",
                ));
            }
        }
    }

    /// One of the containers that STARTPOD carried could not be started: all of them end with the pod.
    fn opening_failed(&mut self, fault: Fault) {
        let Pod::Running { init, opening, .. } = &mut self.pod else { return };
        let Some(Opening { ticket, .. }) = opening.take() else { return };
        let init = *init;
        self.pod = Pod::Ending { init: Some(init), step: PodEnd::Containers, failed: Some((ticket, fault)) };
        // The kernel then kills everything in its namespaces. Without containers the pod's end does that next.
        if !self.containers_ended() {
            self.kill(init, Signal::KILL, false);
        }
    }

    /// Whoever asked for a container or a process hears what came of it.
    fn tell(&mut self, asker: Asker, result: Result<(), Fault>) {
        match (asker, result) {
            (Asker::Host(ticket), result) => self.replies.close(ticket, result.map(|()| Vec::new())),
            (Asker::Pod, Ok(())) => self.open_next(),
            (Asker::Pod, Err(fault)) => self.opening_failed(fault),
        }
    }

    /// What was done for STARTPOD is undone as soon as no step is under way.
    pub(super) fn undo_pod(&mut self, why: Fault) {
        let Pod::Starting { step, fault, .. } = &mut self.pod else { return };
        fault.get_or_insert(why);
        if step.is_none() {
            self.take_pod_down();
        }
    }

    /// First the pod init, for it uses what mountd made.
    fn take_pod_down(&mut self) {
        match self.pod.init() {
            Some(init) => self.kill(init, Signal::KILL, false),
            None => self.ask_pod_step(PodStep::Undo),
        }
    }

    /// The pod init of a pod that is being started is gone.
    pub(super) fn starting_pod_lost_init(&mut self) {
        if let Pod::Starting { init, .. } = &mut self.pod {
            *init = None;
        }
        self.undo_pod(init_died());
    }

    fn pod_undone(&mut self) {
        if let Pod::Starting { ticket, fault: Some(fault), .. } = std::mem::replace(&mut self.pod, Pod::None)
        {
            self.replies.close(ticket, Err(fault));
        }
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

    /// Its disk was not there, or a volume is being filled: mountd is asked again, behind what others have asked
    /// meanwhile. A disk has its time; a volume takes as long as it takes, unless the host gives it up.
    fn prepare_again(&mut self, id: &ContainerId, missing: Option<Fault>) {
        let Some(known) = self.containers.get(id) else { return };
        let ContainerState::Preparing { asker, container, until } = &known.state else { return };
        let runs = matches!(self.pod, Pod::Running { .. });
        match missing {
            Some(fault) if !runs || self.now >= *until => self.undo_container(id, fault),
            None if !runs => {
                self.undo_container(id, Fault::new("starting container", id, "the pod is ending"));
            }
            // Of a container that STARTPOD carried the pod would end.
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

    /// Whether a SIGKILL waits for its start.
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

    /// mountd takes back what it built; the host is told then.
    fn undo_container(&mut self, id: &ContainerId, fault: Fault) {
        let Some(container) = self.containers.get_mut(id) else { return };
        let (ContainerState::Preparing { asker, .. } | ContainerState::Starting { asker }) = container.state
        else {
            return;
        };
        container.state = ContainerState::Undoing { asker, fault };
        self.close_ports(id);
        // An execd that died may have left a process that has not noticed yet.
        self.queues.ask(mountd::Request::KillContainer { container: id.clone() }, Purpose::Nothing);
        let purpose = Purpose::Container(id.clone(), ContainerStep::Undo);
        self.queues.ask(mountd::Request::RemoveContainer { container: id.clone() }, purpose);
    }

    /// A container that could not be started is none. The one that has exited with its id was not removed, and stays.
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

    /// A process exists, and executes as soon as what the host has sent for it is done. It may have ended
    /// already.
    fn started(&mut self, container: &ContainerId, process: &ProcessId, pid: Pid) {
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
            // Too late: everything that was there has been killed.
            self.kill(pid, Signal::KILL, false);
        } else {
            self.held.push((container.clone(), process.clone()));
        }
    }

    /// Lets those execute that wait for nothing more: commands that came behind their start and belong before
    /// it have been carried out. True if there were some.
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

    /// The tty of a process that is held has its size, or cannot have it.
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
}

pub(super) fn init_died() -> Fault {
    Fault::new("starting", "the pod", "the pod init died")
}

fn pod_files(pod: &crate::spec::Pod, config: &Config) -> PodFiles {
    let share = match pod.share_dir.as_str() {
        "" => None,
        _ if config.local => Some(Share::Local),
        tag => {
            Some(Share::NineP { tag: tag.to_owned(), transport: config.nine_p, cache: config.share_cache })
        }
    };
    PodFiles {
        hostname: pod.hostname.clone(),
        address: first_address(pod),
        dns: pod.dns.clone(),
        dns_search: pod.dns_search.clone(),
        dns_options: pod.dns_options.clone(),
        share,
    }
}

/// The first address that the pod gives to a link of its. Which words are addresses netd says: it refuses a pod with others.
fn first_address(pod: &crate::spec::Pod) -> Option<IpAddr> {
    let mut words = pod.interfaces.iter().flat_map(|interface| {
        let listed = interface.ip_addresses.iter().map(|address| &address.ip_address);
        // The old style's counts where there is no list.
        let old = Some(&interface.ip_address).filter(|_| interface.ip_addresses.is_empty());
        listed.chain(old)
    });
    // One with a leading `-` is taken away.
    words.find_map(|word| word.parse().ok())
}

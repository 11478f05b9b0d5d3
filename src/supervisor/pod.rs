//! The pod: the steps of STARTPOD, the containers that STARTPOD carried, and the pod's end.

use std::net::IpAddr;

use super::answer::Answer;
use super::commands::Gate;
use super::state::{Asker, Container, ContainerState, Opening, Pod, PodEnd, PodStep, Purpose};
use super::{Action, Config, Supervisor, Ticket, warn};
use crate::command::Command;
use crate::fault::Fault;
use crate::ids::{Pid, Signal};
use crate::spec;
use crate::wire::mountd::{PodFiles, Share};
use crate::wire::{Request, execd, mountd, netd};

// ---- start ----

impl Supervisor {
    pub(super) fn start_pod(&mut self, ticket: Ticket, pod: Box<spec::Pod>) {
        let fault = |why: &str| Fault::new("starting", "the pod", why);
        match &self.pod {
            Pod::None => {}
            Pod::Starting { .. } | Pod::Ending { .. } => return self.park(ticket, Command::StartPod(pod)),
            Pod::Running { .. } => return self.refuse(ticket, fault("it runs already")),
        }
        if !self.config.local {
            // The clock is set before the pod's files are made (`Lane::Pod`). If that fails the pod starts
            // all the same, with a wrong clock.
            self.queues.ask_instead(mountd::Request::WakeUp);
        }
        self.pod = Pod::Starting { ticket, spec: pod, init: None, step: None, fault: None };
        self.ask_pod_step(PodStep::Loopback);
    }

    /// Asks a helper for a step of STARTPOD, or goes on with the next step if this pod does not need it.
    fn ask_pod_step(&mut self, next: PodStep) {
        // Before there is a pod, only processes started through the debugging door can be running.
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

    /// A step has ended. `answered`: the helper itself reported the result, so a step that failed has undone
    /// itself.
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
            // The network goes after the files, which may be on it.
            PodStep::Undo => self.ask_pod_step(PodStep::UndoNetwork),
            PodStep::UndoNetwork => self.pod_undone(),
            // DESTROYPOD came during the step, or the pod init died.
            _ if fault.is_some() => self.take_pod_down(),
            PodStep::Loopback => self.ask_pod_step(PodStep::Ports),
            PodStep::Ports => self.ask_pod_step(PodStep::Rescan),
            PodStep::Rescan => self.ask_pod_step(PodStep::Interfaces),
            PodStep::Interfaces => self.ask_pod_step(PodStep::Routes),
            PodStep::Routes => self.ask_pod_step(PodStep::Files),
            PodStep::Files => self.ask_pod_step(PodStep::Init),
            PodStep::Init => {
                // The pod init now leaves its mount namespace, which execd has kept.
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
}

// ---- the containers that STARTPOD carried ----

impl Supervisor {
    /// Starts the next container that STARTPOD carried, or sends STARTPOD's reply after the last.
    pub(super) fn open_next(&mut self) {
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
            // An earlier container with that id is still ending.
            Gate::Wait => {
                self.opening_failed(Fault::new(
                    "making container",
                    &container.id,
                    "the pod has two of that id",
                ));
            }
        }
    }

    /// A container that STARTPOD carried could not be started: the pod ends, and all its containers with it.
    pub(super) fn opening_failed(&mut self, fault: Fault) {
        let Pod::Running { init, opening, .. } = &mut self.pod else { return };
        let Some(Opening { ticket, .. }) = opening.take() else { return };
        let init = *init;
        self.pod = Pod::Ending { init: Some(init), step: PodEnd::Containers, failed: Some((ticket, fault)) };
        // The kernel then kills everything in the pod's PID namespace. Without containers, the pod's end
        // kills the init next anyway.
        if !self.containers_ended() {
            self.kill(init, Signal::KILL, false);
        }
    }
}

// ---- undoing ----

impl Supervisor {
    /// Undoes what was done for STARTPOD, as soon as no step is under way.
    pub(super) fn undo_pod(&mut self, why: Fault) {
        let Pod::Starting { step, fault, .. } = &mut self.pod else { return };
        fault.get_or_insert(why);
        if step.is_none() {
            self.take_pod_down();
        }
    }

    /// Kills the pod init before mountd undoes its part, because the init uses what mountd made.
    fn take_pod_down(&mut self) {
        match self.pod.init() {
            Some(init) => self.kill(init, Signal::KILL, false),
            None => self.ask_pod_step(PodStep::Undo),
        }
    }

    /// The pod init died while STARTPOD was under way.
    fn starting_pod_lost_init(&mut self) {
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
}

// ---- end ----

impl Supervisor {
    /// The pod init was reaped. Either it was killed at the end of the pod, or the pod ends now because it
    /// died: the kernel has killed everything in its PID namespace.
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

    /// Whether all containers of the pod have been cleaned up.
    fn containers_ended(&self) -> bool {
        let ended = |known: &Container| known.is_door() || matches!(known.state, ContainerState::Exited);
        self.containers.values().all(ended)
    }

    pub(super) fn advance_pod_end(&mut self) {
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

    /// mountd has undone everything of the pod, or has failed to.
    pub(super) fn pod_files_destroyed(&mut self, result: Result<Answer, Fault>) {
        warn(result);
        self.containers.retain(|_, known| known.is_door());
        // The network goes last: what mountd unmounted may have been on it.
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

/// The first address that the pod gives to one of its links. This takes words that parse as an address; netd
/// refuses a pod that has others.
fn first_address(pod: &crate::spec::Pod) -> Option<IpAddr> {
    let mut words = pod.interfaces.iter().flat_map(|interface| {
        let listed = interface.ip_addresses.iter().map(|address| &address.ip_address);
        // The old-style address counts only if there is no list.
        let old = Some(&interface.ip_address).filter(|_| interface.ip_addresses.is_empty());
        listed.chain(old)
    });
    // A word with a leading `-` is an address to remove, and does not parse.
    words.find_map(|word| word.parse().ok())
}

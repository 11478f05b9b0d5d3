//! The commands: which are legal in which state, and what each starts.

use super::state::{Asker, Container, ContainerState, Pod, Process, ProcessState, Purpose};
use super::{Supervisor, Ticket};
use crate::command::{Command, ExecCmd, Features, KillContainer, RemoveContainer, SignalProcess, WinSize};
use crate::fault::Fault;
use crate::frame::Message;
use crate::ids::{ContainerId, Pid, ProcessId};
use crate::spec::{self, CONTAINERS_MAX};
use crate::sysctl::Sysctls;
use crate::wire::{Instance, Role, execd, mountd, netd};
use std::time::Duration;

/// The protocol version that runV compares (protocol.md «Version»).
const API: u32 = 4244;
/// How many processes may be unfinished.
pub(super) const PROCESSES_MAX: usize = 4096;
/// After ONLINECPUMEM, when mountd looks again for what was plugged: ACPI tells the kernel some time after
/// the host has plugged it.
const ONLINE_AGAIN: [Duration; 4] =
    [Duration::from_millis(100), Duration::from_millis(500), Duration::from_secs(2), Duration::from_secs(5)];
/// The container id that means the guest's own namespaces (protocol.md «EXECCMD»).
pub(super) const DOOR: &str = "hyperstart";
/// Why the debugging door refuses other commands.
const DOOR_TAKES: &str = "it is the guest itself, and takes EXECCMD, WINSIZE and SIGNALPROCESS only";

/// Whether a command can be carried out now.
pub(super) enum Gate<T> {
    /// It can, with this value.
    Go(T),
    /// Something under way decides; the command waits.
    Wait,
    /// It is refused.
    No(Fault),
}

/// Where the process of an EXECCMD runs.
enum Place {
    Container {
        hostname: String,
    },
    /// Through the debugging door.
    Guest,
}

impl Supervisor {
    /// A frame came from the host.
    pub(super) fn take_command(&mut self, message: u32, size: usize, command: Result<Command, Fault>) {
        let ticket = self.replies.open(size);
        match command {
            Ok(command) => self.carry_out(ticket, command),
            Err(fault) => {
                log::info!("message {message}: {fault}");
                self.replies.close(ticket, Err(fault));
            }
        }
    }

    /// Carries a command out, parks it, or refuses it.
    pub(super) fn carry_out(&mut self, ticket: Ticket, command: Command) {
        let refused = self.leaving.is_some()
            && !matches!(
                command,
                Command::GetVersion | Command::Features | Command::Ping | Command::DestroyPod
            );
        if refused {
            let fault = Fault::new("taking", name(&command), "the guest is going down");
            return self.replies.close(ticket, Err(fault));
        }
        let result = match command {
            Command::GetVersion => Ok(API.to_be_bytes().to_vec()),
            Command::Features => self.features(),
            Command::Ping => Ok(Vec::new()),
            Command::Rescan if self.config.local => Ok(Vec::new()),
            Command::Rescan => return self.queues.ask(mountd::Request::Rescan, Purpose::Command(ticket)),
            Command::OnlineCpuMem => {
                self.online();
                Ok(Vec::new())
            }
            Command::DestroyPod => return self.leave(ticket),
            Command::StartPod(pod) => return self.start_pod(ticket, pod),
            Command::NewContainer(container) => return self.new_container(ticket, container),
            Command::ExecCmd(exec) => return self.exec(ticket, exec),
            Command::WinSize(size) => return self.resize(ticket, size),
            Command::KillContainer(kill) => return self.kill_container(ticket, kill),
            Command::SignalProcess(signal) => return self.signal_process(ticket, signal),
            Command::RemoveContainer(remove) => return self.remove_container(ticket, remove),
            Command::ReadFile(file) => return self.read_file(ticket, file),
            Command::WriteFile(file) => return self.write_file(ticket, file),
            Command::SetupInterface(interface) => return self.set_up_interface(ticket, interface),
            Command::SetupRoute(setup) => {
                let request = netd::Request::AddRoutes { routes: setup.routes, repeated: false };
                return self.queues.ask(request, Purpose::Command(ticket));
            }
            Command::DeleteInterface(interface) => {
                return self
                    .queues
                    .ask(mountd::Request::Unplug { device: interface.device }, Purpose::Command(ticket));
            }
        };
        self.replies.close(ticket, result);
    }

    /// FEATURES: tells the host what the guest supports. A host that asks is newer than runV, and from now on
    /// its readers are not given a pause to catch up (`host_reads_on`).
    fn features(&mut self) -> Result<Vec<u8>, Fault> {
        self.host_reads_on = true;
        let features = serde_json::to_vec(&Features::own())
            .map_err(|error| Fault::new("encoding", "the features", error.to_string()))?;
        Ok([API.to_be_bytes().as_slice(), &features].concat())
    }

    pub(super) fn refuse(&mut self, ticket: Ticket, fault: Fault) {
        self.replies.close(ticket, Err(fault));
    }

    pub(super) fn park(&mut self, ticket: Ticket, command: Command) {
        self.parked.push_back((ticket, command));
    }

    /// ONLINECPUMEM. The host has its reply at once. The kernel may not have seen yet what was just plugged,
    /// so mountd looks again later.
    fn online(&mut self) {
        // The processors and memory of a local guest are those of the machine.
        if !self.config.local {
            self.queues.ask_instead(mountd::Request::Online);
            self.online_again = ONLINE_AGAIN.iter().map(|&after| self.now + after).collect();
        }
    }

    /// On a tick: asks mountd to look again for plugged processors and memory, if it is time.
    pub(super) fn look_for_plugged(&mut self) {
        while self.online_again.front().is_some_and(|&at| at <= self.now) {
            self.online_again.pop_front();
            self.queues.ask_instead(mountd::Request::Online);
        }
    }

    /// Whether the pod runs, for commands about something in it; with its hostname.
    fn pod_gate(&self, doing: &str, to: &ContainerId) -> Gate<String> {
        match &self.pod {
            Pod::Running { hostname, opening: None, .. } => Gate::Go(hostname.clone()),
            Pod::Running { opening: Some(_), .. } | Pod::Starting { .. } => Gate::Wait,
            Pod::None => Gate::No(Fault::new(doing, to, "there is no pod")),
            Pod::Ending { .. } if self.next_pod_waits() => Gate::Wait,
            Pod::Ending { .. } => Gate::No(Fault::new(doing, to, "the pod is ending")),
        }
    }

    /// Whether a STARTPOD waits for the end of the current pod: the commands behind it are about the next
    /// pod.
    fn next_pod_waits(&self) -> bool {
        let starts = |(_, command): &(Ticket, Command)| matches!(command, Command::StartPod(_));
        matches!(self.pod, Pod::Ending { .. }) && self.parked.iter().any(starts)
    }

    fn new_container(&mut self, ticket: Ticket, container: Box<spec::Container>) {
        let gate = match self.pod_gate("making container", &container.id) {
            Gate::Go(_) if self.is_awaited(&container.id) => Gate::Wait,
            Gate::Go(_) => self.container_gate(Asker::Host(ticket), &container),
            Gate::Wait => Gate::Wait,
            Gate::No(fault) => Gate::No(fault),
        };
        match gate {
            Gate::Wait => self.park(ticket, Command::NewContainer(container)),
            Gate::No(fault) => self.refuse(ticket, fault),
            Gate::Go(init) => self.prepare_container(Asker::Host(ticket), container, init),
        }
    }

    /// Whether a running pod can have this container; with the record of its init.
    pub(super) fn container_gate(&self, asker: Asker, container: &spec::Container) -> Gate<Process> {
        let id = &container.id;
        let no = |why: &str| Gate::No(Fault::new("making container", id, why));
        if id.as_str() == DOOR {
            return no("that id is the guest's own");
        }
        match self.containers.get(id).map(|known| &known.state) {
            None if self.containers.len() >= CONTAINERS_MAX => {
                return no("there are 1024 containers: remove those that have exited");
            }
            None | Some(ContainerState::Exited) => {}
            Some(ContainerState::Running) => return no("it exists"),
            Some(_) => return Gate::Wait,
        }
        let checked = self.check_ports(container);
        let process =
            checked.and_then(|()| self.new_process(id, &container.process, ProcessState::Starting(asker)));
        match process {
            Ok(process) => Gate::Go(process),
            Err(fault) => Gate::No(fault),
        }
    }

    /// The record of a process, if its specification is valid and its streams are free.
    fn new_process(
        &self,
        container: &ContainerId,
        process: &spec::Process,
        state: ProcessState,
    ) -> Result<Process, Fault> {
        let fault =
            |why: String| Fault::new("starting in container", format!("{container}: {}", process.id), why);
        let (stdio, stderr) = process.check().map_err(fault)?;
        let taken = [Some(stdio), stderr].into_iter().flatten().find(|stream| self.streams.contains(stream));
        if let Some(stream) = taken {
            return Err(fault(format!("stream {stream} belongs to another process")));
        }
        if self.containers.values().map(|container| container.processes.len()).sum::<usize>() >= PROCESSES_MAX
        {
            return Err(fault("there are 4096 processes".to_owned()));
        }
        Ok(Process { stdio, stderr, terminal: process.terminal, resizing: 0, state })
    }

    fn exec(&mut self, ticket: Ticket, ExecCmd { container, process }: ExecCmd) {
        match self.exec_gate(ticket, &container, &process) {
            Gate::Wait => self.park(ticket, Command::ExecCmd(ExecCmd { container, process })),
            Gate::No(fault) => self.refuse(ticket, fault),
            Gate::Go((record, place)) => {
                self.streams.extend([Some(record.stdio), record.stderr].into_iter().flatten());
                let id = process.id.clone();
                if matches!(place, Place::Guest) {
                    self.containers.entry(container.clone()).or_insert_with(Container::door);
                }
                if let Some(known) = self.containers.get_mut(&container) {
                    known.processes.insert(id.clone(), record);
                }
                let finished = self.take_finished();
                let request = match place {
                    Place::Guest => execd::Request::StartInGuest { process, finished },
                    Place::Container { hostname } => {
                        let container = container.clone();
                        let sysctl = Sysctls::default();
                        execd::Request::StartProcess {
                            container,
                            process,
                            init: false,
                            hostname,
                            sysctl,
                            finished,
                        }
                    }
                };
                self.queues.ask(request, Purpose::Exec(container, id));
            }
        }
    }

    fn exec_gate(&self, ticket: Ticket, id: &ContainerId, process: &spec::Process) -> Gate<(Process, Place)> {
        let doing = "starting in container";
        let place = match self.door(id) {
            Some(Ok(())) => Place::Guest,
            Some(Err(fault)) => return Gate::No(fault),
            None => match self.running_container(doing, id) {
                Gate::Go(hostname) => Place::Container { hostname },
                Gate::Wait => return Gate::Wait,
                Gate::No(fault) => return Gate::No(fault),
            },
        };
        if self.containers.get(id).is_some_and(|known| known.processes.contains_key(&process.id)) {
            return Gate::No(Fault::new(doing, id, format!("process {} exists", process.id)));
        }
        match self.new_process(id, process, ProcessState::Starting(Asker::Host(ticket))) {
            Ok(record) => Gate::Go((record, place)),
            Err(fault) => Gate::No(fault),
        }
    }

    /// Whether a container runs; with the pod's hostname.
    pub(super) fn running_container(&self, doing: &str, id: &ContainerId) -> Gate<String> {
        let no = |why: &str| Gate::No(Fault::new(doing, id, why));
        match self.door(id) {
            Some(Ok(())) => return no(DOOR_TAKES),
            Some(Err(fault)) => return Gate::No(fault),
            None => {}
        }
        let hostname = match self.pod_gate(doing, id) {
            Gate::Go(hostname) => hostname,
            Gate::Wait => return Gate::Wait,
            Gate::No(fault) => return Gate::No(fault),
        };
        if self.is_awaited(id) {
            return Gate::Wait;
        }
        let Some(container) = self.containers.get(id) else { return no("no such container") };
        match &container.state {
            // The container's init has to execute first.
            ContainerState::Running if container.init.as_ref().is_some_and(|init| self.is_held(id, init)) => {
                Gate::Wait
            }
            ContainerState::Running => Gate::Go(hostname),
            ContainerState::Preparing { .. }
            | ContainerState::Starting { .. }
            | ContainerState::Undoing { .. } => Gate::Wait,
            ContainerState::Ending(_) | ContainerState::Exited => no("the container does not run"),
        }
    }

    /// If the id is the debugging door's: whether the door is open.
    fn door(&self, id: &ContainerId) -> Option<Result<(), Fault>> {
        let closed =
            || Fault::new("opening", DOOR, "it is closed: hyper_debug on the kernel cmdline opens it");
        let open = self.config.debug_door;
        (id.as_str() == DOOR).then(|| if open { Ok(()) } else { Err(closed()) })
    }

    /// Whether a container with that id, or the pod that it may belong to, was requested and is not started
    /// yet.
    fn is_awaited(&self, id: &ContainerId) -> bool {
        let asked = |(_, command): &(Ticket, Command)| matches!(command, Command::NewContainer(container) if container.id == *id);
        let pod_starts = matches!(self.pod, Pod::Starting { .. } | Pod::Running { opening: Some(_), .. });
        id.as_str() != DOOR && (pod_starts || self.next_pod_waits() || self.parked.iter().any(asked))
    }

    /// The pid of a running process, or why there is none.
    fn running(&self, doing: &str, id: &ContainerId, process: &ProcessId) -> Gate<Pid> {
        if let Some(Err(fault)) = self.door(id) {
            return Gate::No(fault);
        }
        if self.is_awaited(id) {
            return Gate::Wait;
        }
        let Some(container) = self.containers.get(id) else {
            return Gate::No(Fault::new(doing, id, "no such container"));
        };
        match &container.state {
            ContainerState::Preparing { .. }
            | ContainerState::Starting { .. }
            | ContainerState::Undoing { .. } => return Gate::Wait,
            // The command may be about a process whose EXECCMD is itself parked until the init executes.
            ContainerState::Running if container.init.as_ref().is_some_and(|init| self.is_held(id, init)) => {
                return Gate::Wait;
            }
            ContainerState::Running | ContainerState::Ending(_) | ContainerState::Exited => {}
        }
        match container.processes.get(process).map(|process| process.state) {
            Some(ProcessState::Running(pid)) => Gate::Go(pid),
            Some(ProcessState::Starting(_) | ProcessState::Held(_)) => Gate::Wait,
            Some(ProcessState::Exited(_) | ProcessState::Syncing(_)) | None => {
                Gate::No(Fault::new(doing, format!("{id}: {process}"), "no such process"))
            }
        }
    }

    /// Whether a process exists and does not execute yet.
    fn is_held(&self, container: &ContainerId, process: &ProcessId) -> bool {
        let known = self.containers.get(container).and_then(|known| known.processes.get(process));
        known.is_some_and(|known| matches!(known.state, ProcessState::Held(_)))
    }

    /// WINSIZE. A size that comes before the process executes is set before it executes, because a program
    /// may ask for the size of its tty first of all.
    fn resize(&mut self, ticket: Ticket, size: WinSize) {
        let WinSize { container, process, row, column } = &size;
        let held = self.is_held(container, process);
        match self.running("resizing the terminal of", container, process) {
            Gate::Wait if !held => return self.park(ticket, Command::WinSize(size)),
            Gate::No(fault) => return self.refuse(ticket, fault),
            Gate::Wait | Gate::Go(_) => {}
        }
        let known = self.containers.get_mut(container).and_then(|known| known.processes.get_mut(process));
        let Some(known) = known.filter(|known| known.terminal) else {
            let to = format!("{container}: {process}");
            let fault = Fault::new("resizing the terminal of", to, "the process has no terminal");
            return self.refuse(ticket, fault);
        };
        let request = execd::Request::Resize { stdio: known.stdio, row: *row, column: *column };
        let purpose = if held {
            known.resizing += 1;
            Purpose::Resized(ticket, size.container, size.process)
        } else {
            Purpose::Command(ticket)
        };
        self.queues.ask(request, purpose);
    }

    fn kill_container(&mut self, ticket: Ticket, kill: KillContainer) {
        if self.is_awaited(&kill.container) {
            return self.park(ticket, Command::KillContainer(kill));
        }
        let init = self.containers.get(&kill.container).and_then(|container| container.init.clone());
        let Some(init) = init else {
            let why = match self.door(&kill.container) {
                Some(Err(fault)) => return self.refuse(ticket, fault),
                Some(Ok(())) => DOOR_TAKES,
                None => "no such container",
            };
            return self.refuse(ticket, Fault::new("signalling container", &kill.container, why));
        };
        match self.running("signalling container", &kill.container, &init) {
            Gate::Wait => self.park(ticket, Command::KillContainer(kill)),
            Gate::No(fault) => self.refuse(ticket, fault),
            Gate::Go(pid) => {
                self.kill(pid, kill.signal, false);
                self.replies.close(ticket, Ok(Vec::new()));
            }
        }
    }

    fn signal_process(&mut self, ticket: Ticket, signal: SignalProcess) {
        match self.running("signalling", &signal.container, &signal.process) {
            Gate::Wait => self.park(ticket, Command::SignalProcess(signal)),
            Gate::No(fault) => self.refuse(ticket, fault),
            Gate::Go(pid) => {
                self.kill(pid, signal.signal, true);
                self.replies.close(ticket, Ok(Vec::new()));
            }
        }
    }

    fn remove_container(&mut self, ticket: Ticket, remove: RemoveContainer) {
        let id = &remove.container;
        if self.is_awaited(id) {
            return self.park(ticket, Command::RemoveContainer(remove));
        }
        let fault = |why: &str| Fault::new("removing container", id, why);
        match self.door(id) {
            Some(Err(fault)) => return self.refuse(ticket, fault),
            Some(Ok(())) => {
                let fault = fault(DOOR_TAKES);
                return self.refuse(ticket, fault);
            }
            None => {}
        }
        match self.containers.get(id).map(|container| &container.state) {
            None => {
                let fault = fault("no such container");
                self.refuse(ticket, fault);
            }
            Some(ContainerState::Running) => {
                let fault = fault("it runs");
                self.refuse(ticket, fault);
            }
            Some(ContainerState::Exited) => {
                self.containers.remove(id);
                self.replies.close(ticket, Ok(Vec::new()));
            }
            Some(_) => self.park(ticket, Command::RemoveContainer(remove)),
        }
    }

    /// Whether a pid that execd reports as started can be that of a new process. If it cannot, execd lies and
    /// is killed.
    pub(super) fn is_new_pid(&mut self, pid: Pid) -> bool {
        let taken = pid == self.config.warden || self.knows(pid);
        if taken {
            self.kill_liar(
                Instance::first(Role::Execd),
                format!("it says that it has started {pid}, which runs already"),
            );
        }
        !taken
    }
}

/// The command's name in the protocol.
fn name(command: &Command) -> &'static str {
    Message::from(command).name()
}

//! The pure state machine of PID 1: events go in, actions come out. It does no input or output and has no
//! clock of its own, so every ordering question can be a unit test.

mod answer;
mod commands;
mod container;
mod files;
mod network;
mod pod;
mod pool;
mod process;
mod queue;
mod replies;
mod share;
mod shutdown;
mod state;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::command::Command;
use crate::fault::Fault;
use crate::frame::Message;
use crate::ids::{ContainerId, Pid, ProcessId, Signal, StreamId};
use crate::wire::mountd::{NinePTransport, ShareCache};
use crate::wire::{Instance, Reply, Request, Role, execd};
use files::Reading;
use network::Network;
use queue::{Outcome, Queues};
use replies::{Replies, Ticket};
use share::Syncing;
use state::{Container, Leaving, Pod, ProcessState, Purpose};

/// Settings that are fixed before the first event.
#[derive(Debug, Clone)]
pub struct Config {
    /// The share is the directory at `paths::LOCAL_SHARE`, not a 9p export.
    pub local: bool,
    /// How a 9p export reaches the host.
    pub nine_p: NinePTransport,
    /// What the guest caches of the share.
    pub share_cache: ShareCache,
    /// Whether the kernel writes to the share late: what a process wrote may not have reached the share's
    /// host when the process has exited.
    pub share_is_late: bool,
    /// The kernel cmdline opened the debugging door: container `hyperstart`.
    pub debug_door: bool,
    /// How long DESTROYPOD lets processes end by themselves before it kills them.
    pub grace: Duration,
    /// The warden's pid, which no process of the pod can have.
    pub warden: Pid,
}

/// An input of the state machine.
#[derive(Debug)]
pub enum Event {
    /// A host opened the control channel.
    HostConnected,
    /// The host of a device left: replies that are still owed to it are dropped. (A host at a socket causes
    /// no such event; the next `HostConnected` does the same.)
    HostLeft,
    /// A whole frame was read.
    Command {
        /// The frame's message id.
        message: u32,
        /// How many bytes it counts for (`command::weight`). The total bounds what init holds for the host.
        size: usize,
        /// The result of `command::parse`.
        command: Result<Command, Fault>,
    },
    /// A helper is ready for requests, for the first time or after a restart.
    HelperUp {
        /// The helper.
        helper: Instance,
        /// The helper's pid, which no process of the pod can have.
        pid: Pid,
    },
    /// A helper died, or could not be started. Everything that it sent before has been passed on as events.
    HelperGone(Instance),
    /// A helper crashed too often and will not come back.
    HelperClosed(Instance),
    /// A helper answered a request.
    Reply {
        /// The helper.
        helper: Instance,
        /// The request's number.
        id: u64,
        /// The reply, or the fault that the helper reported.
        result: Result<Reply, Fault>,
    },
    /// A request could not be sent to a living helper, for lack of kernel memory.
    Unsent {
        /// The helper.
        helper: Instance,
        /// The request's number.
        id: u64,
        /// Why it could not be sent.
        fault: Fault,
    },
    /// A child was reaped.
    Exited {
        /// Its pid, which the kernel may use again.
        pid: Pid,
        /// Its exit code, or 128+n when signal n killed it.
        status: u8,
    },
    /// This pid is a helper's, or a living process that execd's next message names. Any recorded exit with
    /// that pid belongs to an earlier process, or has been handled.
    Reported {
        /// The pid.
        pid: Pid,
    },
    /// All bytes of all `Send` actions have left through the control port.
    ControlDrained,
    /// The time that `next_deadline` gave has come.
    Tick,
}

/// An output of the state machine. Actions are carried out in the order in which they are returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send a control frame.
    Send {
        /// The frame's type.
        message: Message,
        /// The frame's payload.
        payload: Vec<u8>,
    },
    /// Send a request to a helper.
    Ask {
        /// The number its reply will carry.
        id: u64,
        /// The helper; its role is `request.role()`.
        to: Instance,
        /// The request.
        request: Arc<Request>,
    },
    /// Send a signal to a child that has not been reaped.
    Kill {
        /// The child.
        pid: Pid,
        /// The signal.
        signal: Signal,
        /// Signal the process group that the child leads. If the child does not lead one (yet), signal the
        /// child alone.
        group: bool,
    },
    /// Let a child that execd created execute its program; init knows the child now.
    Release {
        /// The child.
        pid: Pid,
    },
    /// Kill a helper that hangs or lies; `HelperGone` follows.
    KillHelper {
        /// The helper.
        helper: Instance,
        /// The reason, for the log.
        why: String,
        /// Whether everything that the helper says from now on is ignored.
        lied: bool,
    },
    /// Start a helper that runs only while it is needed (an extra mountd).
    StartHelper {
        /// The helper.
        helper: Instance,
    },
    /// End a helper that is not needed any more; `HelperGone` follows.
    DismissHelper {
        /// The helper.
        helper: Instance,
    },
    /// Power off: everything has been done, answered and synced.
    PowerOff,
}

/// How many reaped children init remembers that have not been reported yet. It is more than the starts that
/// execd can have under way, with room for orphaned children of the helpers.
const STRAYS_MAX: usize = 1024;

/// The state of the guest.
#[derive(Debug)]
pub struct Supervisor {
    config: Config,
    now: Duration,
    /// Actions that have been decided and not yet returned.
    actions: Vec<Action>,
    replies: Replies,
    queues: Queues,
    pod: Pod,
    /// What STARTPOD has set up of the network.
    network: Network,
    /// Set once DESTROYPOD was requested; the guest's end cannot be cancelled.
    leaving: Option<Leaving>,
    containers: BTreeMap<ContainerId, Container>,
    /// The pids of the containers' running processes.
    pids: BTreeMap<Pid, (ContainerId, ProcessId)>,
    /// Processes that exist and do not execute yet.
    held: Vec<(ContainerId, ProcessId)>,
    /// The stream numbers in use.
    streams: BTreeSet<StreamId>,
    /// The stdio streams of finished processes that execd has not been told of. `release_at` is when it is
    /// told at the latest.
    finished: Vec<StreamId>,
    release_at: Option<Duration>,
    /// Exited processes that may have written to the share, and whose end waits for its sync.
    syncing: Syncing,
    /// Commands, in order of arrival, that wait until something under way has ended.
    parked: VecDeque<(Ticket, Command)>,
    /// When mountd looks again for processors and memory that were plugged, earliest first.
    online_again: VecDeque<Duration>,
    /// Children that were reaped before execd or the warden reported them.
    strays: VecDeque<(Pid, u8)>,
    /// The file that is being read; there is at most one.
    reading: Option<Reading>,
    /// An upper bound of the bytes that have not left through the control port.
    unsent: usize,
    /// Whether the connected host keeps a process's output until its own readers have read it. runV does not:
    /// it throws the output away on the event of the process's end.
    host_reads_on: bool,
}

impl Supervisor {
    /// A guest without a pod, whose helpers are not up yet.
    pub fn new(config: Config) -> Supervisor {
        Supervisor {
            config,
            now: Duration::ZERO,
            actions: Vec::new(),
            replies: Replies::default(),
            queues: Queues::new(),
            pod: Pod::None,
            network: Network::default(),
            leaving: None,
            containers: BTreeMap::new(),
            pids: BTreeMap::new(),
            held: Vec::new(),
            streams: BTreeSet::new(),
            finished: Vec::new(),
            release_at: None,
            syncing: Syncing::default(),
            parked: VecDeque::new(),
            online_again: VecDeque::new(),
            strays: VecDeque::new(),
            reading: None,
            unsent: 0,
            host_reads_on: false,
        }
    }

    /// The actions that follow from `event`. `now` is the time on the monotonic clock.
    pub fn on_event(&mut self, now: Duration, event: Event) -> Vec<Action> {
        self.now = now;
        match event {
            Event::HostConnected => {
                self.host_reads_on = false;
                self.replies.forget();
                self.send(Message::Ready, Vec::new());
            }
            Event::HostLeft => {
                self.host_reads_on = false;
                self.replies.forget();
            }
            Event::Command { message, size, command } => self.take_command(message, size, command),
            Event::HelperUp { helper, pid } => self.helper_up(helper, pid),
            Event::HelperGone(helper) => {
                let failed = self.queues.gone(helper);
                failed.into_iter().for_each(|outcome| self.go_on(outcome));
            }
            Event::HelperClosed(helper) => {
                let failed = self.queues.closed(helper);
                failed.into_iter().for_each(|outcome| self.go_on(outcome));
            }
            Event::Reply { helper, id, result } => match self.queues.answered(now, helper, id, result) {
                Ok(Some(outcome)) => self.go_on(outcome),
                Ok(None) => {}
                Err(why) => self.kill_liar(helper, why),
            },
            Event::Unsent { helper, id, fault } => self.unsent_request(helper, id, fault),
            Event::Exited { pid, status } => self.exited(pid, status),
            Event::Reported { pid } => self.strays.retain(|&(stray, _)| stray != pid),
            Event::ControlDrained => self.drained(),
            Event::Tick => self.tick(),
        }
        self.settle();
        std::mem::take(&mut self.actions)
    }

    /// When `Tick` is due, on the same clock; none if only an event can change anything.
    pub fn next_deadline(&self) -> Option<Duration> {
        let again = self.online_again.front().copied();
        let share = self.syncing.deadline();
        let deadlines = [self.queues.next_deadline(), self.leaving_deadline(), self.release_at, again, share];
        deadlines.into_iter().flatten().min()
    }

    /// How many more commands init accepts now. At zero the control port is not read: the host waits for
    /// NEXT.
    pub fn room(&self) -> usize {
        self.replies.room()
    }

    /// Whether a pid belongs to a running process of a container, to the pod init, or to a helper that is up.
    pub fn knows(&self, pid: Pid) -> bool {
        self.queues.has(pid) || self.pod.init() == Some(pid) || self.pids.contains_key(&pid)
    }

    /// Describes a child that is not a helper, for the log.
    pub fn who(&self, pid: Pid) -> String {
        match self.pids.get(&pid) {
            Some((container, process)) => format!("process {process} of container {container}"),
            None if self.pod.init() == Some(pid) => "the pod init".to_owned(),
            None => format!("process {pid}"),
        }
    }

    /// Whether a child with that pid was reaped before anything reported it.
    pub fn has_ended(&self, pid: Pid) -> bool {
        self.strays.iter().any(|&(stray, _)| stray == pid)
    }

    /// Runs after every event: carries on what can go on now, fails what a closed helper cannot do, and sends
    /// the requests and replies that may leave.
    fn settle(&mut self) {
        loop {
            self.advance_ends();
            let hopeless = self.queues.hopeless();
            let mut changed = !hopeless.is_empty();
            hopeless.into_iter().for_each(|outcome| self.go_on(outcome));
            let parked = std::mem::take(&mut self.parked);
            let waited = parked.len();
            parked.into_iter().for_each(|(ticket, command)| self.carry_out(ticket, command));
            changed |= self.parked.len() < waited;
            changed |= self.release_held();
            if !changed {
                break;
            }
        }
        self.release();
        for (id, to, request) in self.queues.sendable(self.now) {
            self.actions.push(Action::Ask { id, to, request });
        }
        let missing = self.queues.missing(self.now);
        self.actions.extend(missing.map(|helper| Action::StartHelper { helper }));
        let idle = self.queues.idle(self.now);
        self.actions.extend(idle.into_iter().map(|helper| Action::DismissHelper { helper }));
        for (message, payload) in self.replies.leave() {
            self.send(message, payload);
        }
    }

    fn helper_up(&mut self, helper: Instance, pid: Pid) {
        let role = helper.role();
        let pinned = matches!(self.pod, Pod::Running { .. } | Pod::Ending { init: Some(_), .. });
        // A process started outside the pod would run in the guest's own namespaces.
        let rejoins = role == Role::Execd && pinned;
        let adopts = role == Role::Execd && !self.streams.is_empty();
        // Until streamd has the processes' descriptors, it would take the end of their streams for the end of
        // streams that it does not know.
        let resends = role == Role::Streamd && !self.streams.is_empty();
        let was_closed = self.queues.is_closed(role);
        self.queues.up(self.now, helper, pid, rejoins || adopts || resends);
        if role == Role::Netd && was_closed {
            // While netd was closed, no request could close the ports of containers that ended.
            self.ask_ports(Purpose::Nothing);
        }
        if rejoins {
            self.queues.ask_first(execd::Request::JoinPod { running: self.unfinished() }, Purpose::Rejoin);
        } else if adopts {
            self.queues.ask_first(execd::Request::Adopt { running: self.unfinished() }, Purpose::Rejoin);
        }
        if resends {
            self.queues.ask_first(execd::Request::Resend, Purpose::Resend(pid));
        }
    }

    /// The stdio streams of the processes whose output a new execd is to keep: those that exist and are not
    /// finished.
    pub(super) fn unfinished(&self) -> Vec<StreamId> {
        let processes = self.containers.values().flat_map(|container| container.processes.values());
        let exist = processes.filter(|process| !matches!(process.state, ProcessState::Starting(_)));
        exist.map(|process| process.stdio).collect()
    }

    fn kill_liar(&mut self, helper: Instance, why: String) {
        if self.queues.kill(helper, true) {
            self.actions.push(Action::KillHelper { helper, why, lied: true });
        }
    }

    fn kill_helper(&mut self, helper: Instance, why: String) {
        if self.queues.kill(helper, false) {
            self.actions.push(Action::KillHelper { helper, why, lied: false });
        }
    }

    /// The kernel could not take a request. If the request may fail, it fails. A request that must not be
    /// given up (`Queues::is_kept`) is sent to a successor: the helper is killed, because nothing else makes
    /// the request reach a helper.
    fn unsent_request(&mut self, helper: Instance, id: u64, fault: Fault) {
        if !self.queues.is_kept(helper, id) {
            if let Ok(Some(outcome)) = self.queues.answered(self.now, helper, id, Err(fault)) {
                self.go_on(outcome);
            }
        } else {
            self.kill_helper(helper, fault.to_string());
        }
    }

    fn tick(&mut self) {
        self.look_for_plugged();
        self.give_share_up();
        self.queues.ping(self.now);
        for helper in self.queues.late(self.now) {
            let why = match helper.role() {
                Role::Streamd => "it does not answer",
                Role::Netd | Role::Mountd | Role::Execd => "it has been working on one request for too long",
            };
            self.kill_helper(helper, why.to_owned());
            if helper.role() == Role::Mountd {
                // A disk may hold the killed mountd in the kernel for ever.
                let failed = self.queues.give_up(helper, "it took too long");
                failed.into_iter().for_each(|outcome| self.go_on(outcome));
            }
        }
    }

    /// A child was reaped, and the kernel may use its pid again.
    fn exited(&mut self, pid: Pid, status: u8) {
        if self.pod.init() == Some(pid) {
            self.pod_init_exited();
        } else if let Some((container, process)) = self.pids.remove(&pid) {
            self.process_exited(&container, &process, status);
        } else {
            // A failed start leaves a child that is never reported, so old entries may be dropped. A
            // successful start is reported as soon as the process is ready, so its entry is among the newest.
            if self.strays.len() == STRAYS_MAX {
                self.strays.pop_front();
            }
            self.strays.push_back((pid, status));
        }
    }

    /// Takes the status of the last child with that pid that was reaped before it was reported.
    fn stray(&mut self, pid: Pid) -> Option<u8> {
        let status = self.strays.iter().rev().find(|(stray, _)| *stray == pid).map(|&(_, status)| status);
        self.strays.retain(|&(stray, _)| stray != pid);
        status
    }

    /// A request was answered or has failed: goes on with what it was made for.
    fn go_on(&mut self, Outcome { helper, purpose, result, answered }: Outcome) {
        match purpose {
            Purpose::Pod(step) => self.pod_step(step, result, answered),
            Purpose::Container(id, step) => self.container_step(&id, step, result),
            Purpose::Exec(container, process) => self.exec_started(&container, &process, result),
            Purpose::Command(ticket) => self.replies.close(ticket, result.map(|_| Vec::new())),
            Purpose::Resized(ticket, container, process) => {
                self.resized(ticket, &container, &process, result);
            }
            Purpose::Rescanned(ticket, interface) => self.rescanned(ticket, *interface, result),
            Purpose::Read => self.read_on(helper, result),
            Purpose::KillLeft(container) => self.left_killed(&container, result),
            Purpose::Output(container, process) => self.output_left(&container, &process, result),
            Purpose::ShareSynced => self.share_synced(result),
            Purpose::RemoveFiles(container) => self.files_removed(&container, result),
            Purpose::DestroyFiles => self.pod_files_destroyed(result),
            Purpose::Failed(ticket, fault) => {
                warn(result);
                self.replies.close(ticket, Err(*fault));
            }
            Purpose::Flush => self.flushed(result),
            Purpose::Sync => self.synced(result),
            Purpose::Rejoin => match result {
                Ok(_) => self.queues.unbar(Role::Execd),
                Err(fault) => self.kill_liar(helper, fault.to_string()),
            },
            // That streamd is dead; its successor gets a `Resend` of its own.
            Purpose::Resend(streamd) if !self.queues.is_up(Role::Streamd, streamd) => {}
            Purpose::Resend(_) => match result {
                // streamd has some of the descriptors, and would take the end of the other streams for the
                // end of unknown ones.
                Err(fault) if !self.queues.is_closed(Role::Execd) => {
                    self.kill_helper(Instance::first(Role::Streamd), fault.to_string());
                }
                // No helper holds the descriptors any more.
                result => {
                    warn(result);
                    self.queues.unbar(Role::Streamd);
                }
            },
            // If no answer comes, the helper is killed and that is logged.
            Purpose::Ping => {}
            Purpose::Nothing => warn(result),
        }
    }

    fn send(&mut self, message: Message, payload: Vec<u8>) {
        self.unsent += payload.len();
        self.actions.push(Action::Send { message, payload });
    }

    fn kill(&mut self, pid: Pid, signal: Signal, group: bool) {
        self.actions.push(Action::Kill { pid, signal, group });
    }
}

/// Logs a fault that changes nothing else.
fn warn<T>(result: Result<T, Fault>) {
    if let Err(fault) = result {
        log::warn!("{fault}");
    }
}

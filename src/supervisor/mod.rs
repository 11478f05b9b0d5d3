//! The pure state machine of PID 1: events in, actions out, no input or output and no clock of its own, so
//! that every ordering question is a unit test.

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

/// What is known before the first event.
#[derive(Debug, Clone)]
pub struct Config {
    /// The share is the directory at `paths::LOCAL_SHARE`, not a 9p export.
    pub local: bool,
    /// How a 9p export reaches the host.
    pub nine_p: NinePTransport,
    /// What the guest keeps of it.
    pub share_cache: ShareCache,
    /// Whether what a process has written may be on its way to the share's host when it has exited.
    pub share_is_late: bool,
    /// The kernel cmdline opened the debugging door: container `hyperstart`.
    pub debug_door: bool,
    /// How long DESTROYPOD lets processes end by themselves.
    pub grace: Duration,
    /// The warden: no process of the pod can have its number.
    pub warden: Pid,
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// A host opened the control channel.
    HostConnected,
    /// The host of a device left: what it asked and has no reply yet is nobody's. (Of a socket the next
    /// connection says so.)
    HostLeft,
    /// A whole frame came.
    Command {
        /// The frame's message id.
        message: u32,
        /// What it counts for in bytes (`command::weight`): what is held of the host's is bounded by it.
        size: usize,
        /// What `command::parse` made of it.
        command: Result<Command, Fault>,
    },
    /// A helper takes requests, for the first time or again.
    HelperUp {
        /// Which.
        helper: Instance,
        /// Its process: no process of the pod can have its number.
        pid: Pid,
    },
    /// A helper died, or could not be started. Everything it had sent has been reported before.
    HelperGone(Instance),
    /// A helper crashed too often and will not come back.
    HelperClosed(Instance),
    /// A helper answered.
    Reply {
        /// Which.
        helper: Instance,
        /// The request's number.
        id: u64,
        /// What came of it.
        result: Result<Reply, Fault>,
    },
    /// A request could not be sent to a helper that lives: the kernel had no memory for it.
    Unsent {
        /// To whom.
        helper: Instance,
        /// The request's number.
        id: u64,
        /// Why.
        fault: Fault,
    },
    /// A child was reaped.
    Exited {
        /// Its number, free again.
        pid: Pid,
        /// Its exit code, or 128+n when signal n killed it.
        status: u8,
    },
    /// A helper's process, or one that is alive and of which execd speaks next: any recorded exit with that
    /// pid is an earlier process's, or has been noticed.
    Reported {
        /// Its number.
        pid: Pid,
    },
    /// All bytes of all `Send`s have left through the control port.
    ControlDrained,
    /// `next_deadline` has come.
    Tick,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Send a control frame.
    Send {
        /// Its type.
        message: Message,
        /// Its payload.
        payload: Vec<u8>,
    },
    /// Send a request.
    Ask {
        /// The number its reply will carry.
        id: u64,
        /// To whom, of `request.role()`.
        to: Instance,
        /// What.
        request: Arc<Request>,
    },
    /// Send a signal to a child that has not been reaped.
    Kill {
        /// The child.
        pid: Pid,
        /// The signal.
        signal: Signal,
        /// To the process group that it leads; where it leads none (yet), to itself.
        group: bool,
    },
    /// Let a child execute that execd has made: it is known now.
    Release {
        /// The child.
        pid: Pid,
    },
    /// End a helper that hangs or lies; `HelperGone` will follow.
    KillHelper {
        /// Which.
        helper: Instance,
        /// Why, for the log.
        why: String,
        /// Nothing more that it says is to be heard.
        lied: bool,
    },
    /// Start a helper that runs only while it is needed.
    StartHelper {
        /// Which.
        helper: Instance,
    },
    /// End a helper that is not needed any more; `HelperGone` will follow.
    DismissHelper {
        /// Which.
        helper: Instance,
    },
    /// Everything is done, said and synced: power off.
    PowerOff,
}

/// How many reaped children are remembered that nobody has reported: more than the starts that execd can have
/// under way, with room for the helpers' own strays.
const STRAYS_MAX: usize = 1024;

/// The state of the guest.
#[derive(Debug)]
pub struct Supervisor {
    config: Config,
    now: Duration,
    /// What has been decided and not been handed out.
    actions: Vec<Action>,
    replies: Replies,
    queues: Queues,
    pod: Pod,
    /// What of the network was set up for the pod.
    network: Network,
    /// DESTROYPOD was asked for: there is no way back.
    leaving: Option<Leaving>,
    containers: BTreeMap<ContainerId, Container>,
    /// The running processes of the containers.
    pids: BTreeMap<Pid, (ContainerId, ProcessId)>,
    /// Processes that exist and do not execute yet.
    held: Vec<(ContainerId, ProcessId)>,
    /// The stream numbers in use.
    streams: BTreeSet<StreamId>,
    /// Finished processes of which execd has not been told, and when it is.
    finished: Vec<StreamId>,
    release_at: Option<Duration>,
    /// Exited processes that may have written to the share.
    syncing: Syncing,
    /// Commands that wait until something that was begun has come to an end, in order.
    parked: VecDeque<(Ticket, Command)>,
    /// When mountd looks again for processors and memory that were plugged, in order.
    online_again: VecDeque<Duration>,
    /// Children that were reaped before execd or the warden reported them.
    strays: VecDeque<(Pid, u8)>,
    /// The one file that is being read.
    reading: Option<Reading>,
    /// How many bytes may not have left through the control port yet.
    unsent: usize,
    /// The host that is there keeps a process's output until its own readers have read it. runV throws it
    /// away with the event of the process's end.
    host_reads_on: bool,
}

impl Supervisor {
    /// A guest without a pod, whose helpers are still to come up.
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

    /// What has to be done about `event`, `now` on the monotonic clock.
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

    /// When `Tick` is due, on the same clock; none: when something happens.
    pub fn next_deadline(&self) -> Option<Duration> {
        let again = self.online_again.front().copied();
        let share = self.syncing.deadline();
        let deadlines = [self.queues.next_deadline(), self.leaving_deadline(), self.release_at, again, share];
        deadlines.into_iter().flatten().min()
    }

    /// How many more commands are taken now. While none is, the control port is not read: the host waits for
    /// NEXT.
    pub fn room(&self) -> usize {
        self.replies.room()
    }

    /// Whether a process is one that runs for the pod, its init, or a helper that is up.
    pub fn knows(&self, pid: Pid) -> bool {
        self.queues.has(pid) || self.pod.init() == Some(pid) || self.pids.contains_key(&pid)
    }

    /// What a child is that is no helper, for the log.
    pub fn who(&self, pid: Pid) -> String {
        match self.pids.get(&pid) {
            Some((container, process)) => format!("process {process} of container {container}"),
            None if self.pod.init() == Some(pid) => "the pod init".to_owned(),
            None => format!("process {pid}"),
        }
    }

    /// Whether a child of that number was reaped that nobody has reported.
    pub fn has_ended(&self, pid: Pid) -> bool {
        self.strays.iter().any(|&(stray, _)| stray == pid)
    }

    /// After every event: what can go on now, what a closed helper cannot do, and what may leave.
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
        // A process that was started outside the pod would be in the guest's own namespaces.
        let rejoins = role == Role::Execd && pinned;
        let adopts = role == Role::Execd && !self.streams.is_empty();
        // Until it has the processes' descriptors it would take the end of their streams for that of
        // strangers.
        let resends = role == Role::Streamd && !self.streams.is_empty();
        let was_closed = self.queues.is_closed(role);
        self.queues.up(self.now, helper, pid, rejoins || adopts || resends);
        if role == Role::Netd && was_closed {
            // Of containers that ended meanwhile nobody could close the ports.
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

    /// The streams of the processes whose output a new execd is to keep: those that exist, and are not
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

    /// What may fail does. What must not be given up (`Queues::is_kept`) is asked again of a successor, which
    /// gets all that was asked; nothing else would make a helper hear of it.
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
                // A disk may hold it in the kernel for ever, dead as it is.
                let failed = self.queues.give_up(helper, "it took too long");
                failed.into_iter().for_each(|outcome| self.go_on(outcome));
            }
        }
    }

    /// A child was reaped. Whoever it was, its number is free again.
    fn exited(&mut self, pid: Pid, status: u8) {
        if self.pod.init() == Some(pid) {
            self.pod_init_exited();
        } else if let Some((container, process)) = self.pids.remove(&pid) {
            self.process_exited(&container, &process, status);
        } else {
            // A start that failed leaves one that nobody reports. What is reported is reported as soon as it
            // is ready, so it is among the last.
            if self.strays.len() == STRAYS_MAX {
                self.strays.pop_front();
            }
            self.strays.push_back((pid, status));
        }
    }

    /// The status of a child that was reaped before it was reported: the last one's of that number.
    fn stray(&mut self, pid: Pid) -> Option<u8> {
        let status = self.strays.iter().rev().find(|(stray, _)| *stray == pid).map(|&(_, status)| status);
        self.strays.retain(|&(stray, _)| stray != pid);
        status
    }

    /// An answer, or none: whoever asked goes on.
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
            // That one is dead, and its successor's is another.
            Purpose::Resend(streamd) if !self.queues.is_up(Role::Streamd, streamd) => {}
            Purpose::Resend(_) => match result {
                // It has some of them, and would take the end of the others for that of strangers.
                Err(fault) if !self.queues.is_closed(Role::Execd) => {
                    self.kill_helper(Instance::first(Role::Streamd), fault.to_string());
                }
                // Nobody has them.
                result => {
                    warn(result);
                    self.queues.unbar(Role::Streamd);
                }
            },
            // Without an answer it is killed, and that says enough.
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

/// A fault that changes nothing: the log has it.
fn warn<T>(result: Result<T, Fault>) {
    if let Err(fault) = result {
        log::warn!("{fault}");
    }
}

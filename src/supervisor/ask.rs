//! What the supervisor asks of the helpers, as plain values: they are compared in tests and asked again when a
//! helper was restarted. The event loop turns them into the edges' requests, and large ones into shared memory.

use std::sync::Arc;
use std::time::Duration;

use ipc_channel::ipc::IpcSharedMemory;

use crate::channel::{Bulk, Bytes, Payload};
use crate::fault::Fault;
use crate::ids::{ContainerId, Pid, StreamId};
use crate::spec::{Container, Interface, Process, Route};
use crate::sysctl::Sysctls;
use crate::wire::bootstrap::Adopter;
use crate::wire::mountd::PodFiles;
use crate::wire::netd::{Before, Network, PortMapping};
use crate::wire::{MOUNTDS, Role, execd, mountd, netd, streamd};

/// One request to one helper. The edges (src/wire) say what each means.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Ask {
    SetLinkUp {
        device: String,
    },
    SetInterfaces {
        interfaces: Vec<Interface>,
        repeated: bool,
    },
    AddRoutes {
        routes: Vec<Route>,
        repeated: bool,
    },
    SetPorts(Box<PortMapping>),
    ResetNetwork(Box<Network>),
    Rescan,
    /// The guest may have slept, or be a copy of one that did: the clock, the random pool.
    WakeUp,
    /// What was plugged of processors and memory is taken into use.
    Online,
    Unplug {
        device: String,
    },
    PreparePod(PodFiles),
    PrepareContainer(Box<Container>),
    ReadFile {
        container: ContainerId,
        file: String,
    },
    ReadOn {
        container: ContainerId,
    },
    WriteFile {
        container: ContainerId,
        file: String,
        data: Arc<Bytes>,
    },
    KillContainer {
        container: ContainerId,
    },
    RemoveContainer {
        container: ContainerId,
    },
    /// What was written to the share is to be at its host.
    SyncShare,
    /// What was written to any filesystem is to be on its disk or at its server.
    Sync,
    DestroyPod,
    StartPod {
        hostname: String,
    },
    Adopt {
        running: Vec<StreamId>,
    },
    JoinPod {
        running: Vec<StreamId>,
    },
    StartProcess {
        container: ContainerId,
        process: Box<Process>,
        init: bool,
        hostname: String,
        sysctl: Sysctls,
        finished: Vec<StreamId>,
    },
    /// The debugging door.
    StartInGuest {
        process: Box<Process>,
        finished: Vec<StreamId>,
    },
    Resize {
        stdio: StreamId,
        row: u16,
        column: u16,
    },
    Release {
        finished: Vec<StreamId>,
    },
    Resend,
    Finish {
        stdio: StreamId,
        pause: bool,
    },
    Flush,
    /// Of execd or streamd.
    Ping(Role),
}

/// The same as it travels: one edge's request.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum HelperRequest {
    Netd(netd::Request),
    Mountd(mountd::Request),
    Execd(execd::Request),
    Streamd(streamd::Request),
}

/// One edge's reply.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum HelperReply {
    Netd(netd::Reply),
    Mountd(mountd::Reply),
    Execd(execd::Reply),
    Streamd(streamd::Reply),
}

/// A helper that works on one request for this long without answering hangs. A link that is being plugged is waited for
/// for two seconds; a process that is being started has five.
pub(super) const WORK: Duration = Duration::from_secs(10);
/// mountd waits for disks (2 s), replays journals, and syncs.
pub(super) const MOUNT: Duration = Duration::from_secs(30);

/// How often a request that may be repeated is asked before it is given up: it may be what kills the helper.
const TRIES: u32 = 3;
/// The same where giving up loses what a process wrote. While a host reads slowly, the end of a stream is under way for as long as
/// it takes, and deaths meanwhile are hardly its doing.
const TRIES_FOR_OUTPUT: u32 = 100;

impl Ask {
    /// Who is asked.
    pub fn role(&self) -> Role {
        match self {
            Ask::SetLinkUp { .. }
            | Ask::SetInterfaces { .. }
            | Ask::AddRoutes { .. }
            | Ask::SetPorts(_)
            | Ask::ResetNetwork(_) => Role::Netd,
            Ask::Rescan
            | Ask::WakeUp
            | Ask::Online
            | Ask::Unplug { .. }
            | Ask::PreparePod(_)
            | Ask::PrepareContainer(_)
            | Ask::ReadFile { .. }
            | Ask::ReadOn { .. }
            | Ask::WriteFile { .. }
            | Ask::KillContainer { .. }
            | Ask::RemoveContainer { .. }
            | Ask::SyncShare
            | Ask::Sync
            | Ask::DestroyPod => Role::Mountd,
            Ask::StartPod { .. }
            | Ask::Adopt { .. }
            | Ask::JoinPod { .. }
            | Ask::StartProcess { .. }
            | Ask::StartInGuest { .. }
            | Ask::Resize { .. }
            | Ask::Release { .. }
            | Ask::Resend => Role::Execd,
            Ask::Finish { .. } | Ask::Flush => Role::Streamd,
            Ask::Ping(role) => *role,
        }
    }

    /// How long the helper may work on it. Not bounded where the host decides: a host that does not read the
    /// stream port is slow, not wrong. Then [`Ask::Ping`] tells which of the two it is.
    pub fn limit(&self) -> Option<Duration> {
        match self.role() {
            Role::Netd | Role::Execd => Some(WORK),
            Role::Mountd => Some(MOUNT),
            Role::Streamd => matches!(self, Ask::Ping(_)).then_some(WORK),
        }
    }

    /// The request as it travels. The fault (no memory to share) is for the event loop to hand back as the
    /// request's reply.
    pub fn into_request(self, memory: &Adopter<IpcSharedMemory>) -> Result<HelperRequest, Fault> {
        use HelperRequest::{Mountd, Netd};
        Ok(match self {
            Ask::SetLinkUp { device } => Netd(netd::Request::SetLinkUp { device }),
            Ask::SetInterfaces { interfaces, repeated } => {
                let interfaces = Bulk::new(interfaces, memory)?;
                Netd(netd::Request::SetInterfaces { interfaces, repeated })
            }
            Ask::AddRoutes { routes, repeated } => {
                let routes = Bulk::new(routes, memory)?;
                Netd(netd::Request::AddRoutes { routes, repeated })
            }
            Ask::SetPorts(mapping) => Netd(netd::Request::SetPorts { mapping: Bulk::new(*mapping, memory)? }),
            Ask::ResetNetwork(network) => {
                Netd(netd::Request::Reset { network: Bulk::new(*network, memory)? })
            }
            Ask::Rescan => Mountd(mountd::Request::Rescan),
            Ask::WakeUp => Mountd(mountd::Request::WakeUp),
            Ask::Online => Mountd(mountd::Request::Online),
            Ask::Unplug { device } => Mountd(mountd::Request::Unplug { device }),
            Ask::PreparePod(pod) => Mountd(mountd::Request::PreparePod { pod: Bulk::new(pod, memory)? }),
            Ask::PrepareContainer(container) => {
                Mountd(mountd::Request::PrepareContainer { container: Bulk::new(*container, memory)? })
            }
            Ask::ReadFile { container, file } => Mountd(mountd::Request::ReadFile { container, file }),
            Ask::ReadOn { .. } => Mountd(mountd::Request::ReadOn),
            Ask::WriteFile { container, file, data } => {
                let data = Payload::new(&data.0, memory)?;
                Mountd(mountd::Request::WriteFile { container, file, data })
            }
            Ask::KillContainer { container } => Mountd(mountd::Request::KillContainer { container }),
            Ask::RemoveContainer { container } => Mountd(mountd::Request::RemoveContainer { container }),
            Ask::SyncShare => Mountd(mountd::Request::SyncShare),
            Ask::Sync => Mountd(mountd::Request::Sync),
            Ask::DestroyPod => Mountd(mountd::Request::DestroyPod),
            Ask::StartPod { hostname } => HelperRequest::Execd(execd::Request::StartPod { hostname }),
            Ask::Adopt { running } => {
                HelperRequest::Execd(execd::Request::Adopt { running: Bulk::new(running, memory)? })
            }
            Ask::JoinPod { running } => {
                HelperRequest::Execd(execd::Request::JoinPod { running: Bulk::new(running, memory)? })
            }
            Ask::StartProcess { container, process, init, hostname, sysctl, finished } => {
                let process = Bulk::new(*process, memory)?;
                let sysctl = Bulk::new(sysctl, memory)?;
                HelperRequest::Execd(execd::Request::StartProcess {
                    container,
                    process,
                    init,
                    hostname,
                    sysctl,
                    finished,
                })
            }
            Ask::StartInGuest { process, finished } => {
                let process = Bulk::new(*process, memory)?;
                HelperRequest::Execd(execd::Request::StartInGuest { process, finished })
            }
            Ask::Resize { stdio, row, column } => {
                HelperRequest::Execd(execd::Request::Resize { stdio, row, column })
            }
            Ask::Release { finished } => HelperRequest::Execd(execd::Request::Release { finished }),
            Ask::Resend => HelperRequest::Execd(execd::Request::Resend),
            Ask::Finish { stdio, pause } => HelperRequest::Streamd(streamd::Request::Finish { stdio, pause }),
            Ask::Flush => HelperRequest::Streamd(streamd::Request::Flush),
            Ask::Ping(Role::Execd) => HelperRequest::Execd(execd::Request::Ping),
            Ask::Ping(_) => HelperRequest::Streamd(streamd::Request::Ping),
        })
    }

    /// What it keeps its order with; none of what is not mountd's.
    pub(super) fn lane(&self) -> Option<Lane> {
        match self {
            Ask::PrepareContainer(container) => Some(Lane::Container(container.id.clone())),
            Ask::ReadFile { container, .. }
            | Ask::ReadOn { container }
            | Ask::WriteFile { container, .. }
            | Ask::KillContainer { container }
            | Ask::RemoveContainer { container } => Some(Lane::Container(container.clone())),
            Ask::WakeUp | Ask::PreparePod(_) | Ask::DestroyPod => Some(Lane::Pod),
            Ask::Rescan | Ask::Online | Ask::Unplug { .. } => Some(Lane::Devices),
            Ask::SyncShare => Some(Lane::Share),
            Ask::Sync => Some(Lane::Everything),
            _ => None,
        }
    }

    /// How many of the mountds it may be sent to, counted from the first. The last is for kills and the one before for what ends
    /// something else, however many of the others are held up; and what may be sent to more of them comes first.
    pub(super) fn mountds(&self) -> u8 {
        match self {
            Ask::KillContainer { .. } => MOUNTDS,
            Ask::RemoveContainer { .. } | Ask::DestroyPod | Ask::Sync => MOUNTDS - 1,
            _ => MOUNTDS - 2,
        }
    }

    /// Whether its mountd keeps something of the container from then on, or does not any more.
    pub(super) fn is_about_parts(&self) -> bool {
        matches!(
            self,
            Ask::PrepareContainer(_)
                | Ask::ReadFile { .. }
                | Ask::ReadOn { .. }
                | Ask::RemoveContainer { .. }
        )
    }

    /// Whether it makes a child of init.
    pub(super) fn starts(&self) -> bool {
        matches!(self, Ask::StartPod { .. } | Ask::StartProcess { .. } | Ask::StartInGuest { .. })
    }

    /// How often it is asked, of one successor after the other, when helpers die over it. Once, unless it comes to the
    /// same twice.
    pub(super) fn tries(&self) -> u32 {
        match self {
            Ask::Resend | Ask::Finish { .. } | Ask::Flush => TRIES_FOR_OUTPUT,
            Ask::WakeUp
            | Ask::Online
            | Ask::SetInterfaces { .. }
            | Ask::AddRoutes { .. }
            | Ask::SetPorts(_)
            | Ask::ResetNetwork(_)
            | Ask::KillContainer { .. }
            | Ask::RemoveContainer { .. }
            | Ask::SyncShare
            | Ask::Sync
            | Ask::DestroyPod
            | Ask::Adopt { .. }
            | Ask::JoinPod { .. }
            | Ask::Resize { .. }
            | Ask::Release { .. } => TRIES,
            Ask::SetLinkUp { .. }
            | Ask::Rescan
            | Ask::Unplug { .. }
            | Ask::PreparePod(_)
            | Ask::PrepareContainer(_)
            | Ask::ReadFile { .. }
            | Ask::ReadOn { .. }
            | Ask::WriteFile { .. }
            | Ask::StartPod { .. }
            | Ask::StartProcess { .. }
            // A new helper is alive.
            | Ask::Ping(_)
            | Ask::StartInGuest { .. } => 1,
        }
    }

    /// It is asked of a successor. Where that does not come to the same by itself, it has to know.
    pub(super) fn again(self) -> Ask {
        match self {
            Ask::SetInterfaces { interfaces, .. } => Ask::SetInterfaces { interfaces, repeated: true },
            Ask::AddRoutes { routes, .. } => Ask::AddRoutes { routes, repeated: true },
            ask => ask,
        }
    }

    /// Whether it can be given up before it is sent: whoever asked for it is told.
    pub(super) fn may_fail(&self) -> bool {
        self.tries() == 1 || matches!(self, Ask::SetInterfaces { .. } | Ask::AddRoutes { .. })
    }

    /// What the reply says to this request: the pid of what was started, or that it is done. None if the reply
    /// is not one to it.
    pub(super) fn answer(&self, reply: HelperReply) -> Option<Answer> {
        let prepares = matches!(self, Ask::PrepareContainer(_));
        let reads = matches!(self, Ask::ReadFile { .. } | Ask::ReadOn { .. });
        match (self.role(), reply) {
            (Role::Execd, HelperReply::Execd(execd::Reply::Started { pid })) if self.starts() => {
                Some(Answer::Started(pid))
            }
            (Role::Execd, HelperReply::Execd(execd::Reply::Done)) if !self.starts() => Some(Answer::Done),
            (Role::Mountd, HelperReply::Mountd(mountd::Reply::NotYet { fault })) => {
                prepares.then(|| Answer::NotYet(fault.clipped()))
            }
            (Role::Mountd, HelperReply::Mountd(mountd::Reply::Populating)) => {
                prepares.then_some(Answer::Populating)
            }
            // A part that is empty and not the last would never end.
            (Role::Mountd, HelperReply::Mountd(mountd::Reply::Part { bytes, last })) => {
                let sane = bytes.0.len() <= mountd::PART_MAX && (last || !bytes.0.is_empty());
                (reads && sane).then_some(Answer::Part { bytes, last })
            }
            (Role::Mountd, HelperReply::Mountd(mountd::Reply::Done)) => (!reads).then_some(Answer::Done),
            (Role::Netd, HelperReply::Netd(reply)) => match (self, reply) {
                (Ask::SetInterfaces { interfaces, .. }, netd::Reply::Set { before }) => {
                    (before.len() == interfaces.len()).then_some(Answer::Set(before))
                }
                (Ask::SetInterfaces { .. }, _) | (_, netd::Reply::Set { .. }) => None,
                (_, netd::Reply::Done) => Some(Answer::Done),
            },
            (Role::Streamd, HelperReply::Streamd(reply)) => {
                let expected = match self {
                    Ask::Ping(_) => streamd::Reply::Alive,
                    _ => streamd::Reply::Drained,
                };
                (reply == expected).then_some(Answer::Done)
            }
            (Role::Netd | Role::Mountd | Role::Execd | Role::Streamd, _) => None,
        }
    }
}

/// A reply that fits its request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is done.
    Done,
    /// A child of init exists.
    Started(Pid),
    /// It is done, and this is what there was before.
    Set(Vec<Before>),
    /// Something is missing that may come.
    NotYet(Fault),
    /// It goes on when it is asked again.
    Populating,
    /// A part of a file.
    Part { bytes: Bytes, last: bool },
}

/// Requests to mountd that keep their order, and that one mountd does at a time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Lane {
    /// Those about one container.
    Container(ContainerId),
    /// Those about the pod. The clock is set before the pod's files are made.
    Pod,
    /// Those about devices.
    Devices,
    /// The share.
    Share,
    /// Every filesystem.
    Everything,
}

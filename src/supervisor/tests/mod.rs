//! Tests of every question of order: each is a guest whose helpers, children and host are played by the test.

mod commands;
mod door;
mod ends;
mod files;
mod helpers;
mod limits;
mod mountds;
mod network;
mod opening;
mod share;
mod walk;

use std::collections::BTreeMap;
use std::time::Duration;

use super::*;
use crate::command::parse;
use crate::wire::mountd::ShareCache;
use crate::wire::{execd, mountd, netd, streamd};

const GRACE: Duration = Duration::from_secs(3);
const WARDEN: Pid = Pid(2);
const POD_INIT: Pid = Pid(50);
const NETD: Instance = Instance::first(Role::Netd);
const MOUNTD: Instance = Instance::first(Role::Mountd);
const EXECD: Instance = Instance::first(Role::Execd);
const STREAMD: Instance = Instance::first(Role::Streamd);

/// A guest, with its unanswered requests, the frames that it has sent and the other actions that it has
/// returned.
struct World {
    supervisor: Supervisor,
    now: Duration,
    asked: Vec<(u64, Request)>,
    /// The helper to which each request was sent.
    to: BTreeMap<u64, Instance>,
    said: Vec<(Message, String)>,
    did: Vec<Action>,
    released: Vec<Pid>,
    /// How often mountd was asked to wake up. The test answers at once, so this request changes nothing else.
    woken: usize,
}

/// The configuration of a VM whose kernel writes to the share at once.
fn config() -> Config {
    Config {
        local: false,
        nine_p: NinePTransport::Virtio,
        share_cache: ShareCache::Coherent,
        share_is_late: false,
        debug_door: false,
        grace: GRACE,
        warden: WARDEN,
    }
}

impl World {
    /// A guest with all helpers up and a host connected.
    fn new() -> World {
        World::with(false)
    }

    fn with(debug_door: bool) -> World {
        World::configured(Config { debug_door, ..config() })
    }

    fn configured(config: Config) -> World {
        let mut world = World {
            supervisor: Supervisor::new(config),
            now: Duration::from_secs(1000),
            asked: Vec::new(),
            to: BTreeMap::new(),
            said: Vec::new(),
            did: Vec::new(),
            released: Vec::new(),
            woken: 0,
        };
        for (role, pid) in Role::ALL.into_iter().zip(10..) {
            world.feed(Event::HelperUp { helper: Instance::first(role), pid: Pid(pid) });
        }
        world.feed(Event::HostConnected);
        assert_eq!(world.said(), ["READY "]);
        world
    }

    /// A guest with a pod.
    fn with_pod() -> World {
        let mut world = World::new();
        world.tell(Message::StartPod, r#"{"hostname":"pod","shareDir":"s"}"#);
        world.pod_starts();
        assert_eq!(world.said(), ["ACK "]);
        world
    }

    /// Answers the steps of STARTPOD for a pod without a network.
    fn pod_starts(&mut self) {
        self.done(Role::Netd);
        self.done(Role::Mountd);
        self.started(POD_INIT);
        self.done(Role::Execd);
    }

    /// A guest with a pod and a container `c`, whose init has pid 100 and streams 1 and 2.
    fn with_container() -> World {
        let mut world = World::with_pod();
        world.new_container("c", 1);
        world.done(Role::Mountd);
        world.started(Pid(100));
        assert_eq!(world.said(), ["ACK "]);
        world
    }

    fn feed(&mut self, event: Event) {
        for action in self.supervisor.on_event(self.now, event) {
            match action {
                Action::Ask { id, to, request } if *request == mountd::Request::WakeUp.into() => {
                    self.woken += 1;
                    self.feed(Event::Reply { helper: to, id, result: Ok(done(&request)) });
                }
                Action::Ask { id, to, request } => {
                    assert_eq!(to.role(), request.role(), "{request:?}");
                    self.to.insert(id, to);
                    self.asked.push((id, Arc::unwrap_or_clone(request)));
                }
                Action::Send { message, payload } => {
                    self.said.push((message, String::from_utf8_lossy(&payload).into_owned()));
                }
                Action::Release { pid } => self.released.push(pid),
                other => self.did.push(other),
            }
        }
    }

    fn tell(&mut self, message: Message, payload: &str) {
        let command = parse(message.id(), payload.as_bytes());
        self.feed(Event::Command { message: message.id(), size: payload.len(), command });
    }

    fn new_container(&mut self, id: &str, stdio: u64) {
        let json =
            format!(r#"{{"id":"{id}","process":{{"args":["a"],"stdio":{stdio},"stderr":{}}}}}"#, stdio + 1);
        self.tell(Message::NewContainer, &json);
    }

    fn exec(&mut self, container: &str, process: &str, stdio: u64) {
        let json = format!(
            r#"{{"container":"{container}","process":{{"id":"{process}","args":["a"],"stdio":{stdio},"stderr":{}}}}}"#,
            stdio + 1
        );
        self.tell(Message::ExecCmd, &json);
    }

    /// The frames sent since the last call.
    fn said(&mut self) -> Vec<String> {
        self.said.drain(..).map(|(message, text)| format!("{message} {text}")).collect()
    }

    /// The actions since the last call.
    fn did(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.did)
    }

    /// The requests under way to the helpers of a role, in short form.
    fn asked(&self, role: Role) -> Vec<String> {
        self.asked.iter().filter(|(_, ask)| ask.role() == role).map(|(_, ask)| short(ask)).collect()
    }

    /// The requests under way to one mountd, in short form.
    fn asked_of(&self, mountd: u8) -> Vec<String> {
        let to = Instance::mountd(mountd);
        self.asked
            .iter()
            .filter(|(id, _)| self.to.get(id).copied() == to)
            .map(|(_, ask)| short(ask))
            .collect()
    }

    /// Takes the oldest request to a helper of the role.
    fn take(&mut self, role: Role) -> (u64, Request) {
        let at = self.asked.iter().position(|(_, ask)| ask.role() == role);
        self.asked.remove(at.unwrap_or_else(|| panic!("{role} has nothing to do; {:?}", self.said)))
    }

    /// Sends the reply of the helper that has the request. If no request has that id, the reply comes from
    /// the first helper of the role.
    fn reply(&mut self, role: Role, id: u64, result: Result<Reply, Fault>) {
        let helper = self.to.get(&id).copied().unwrap_or(Instance::first(role));
        self.feed(Event::Reply { helper, id, result });
    }

    /// The helper carries out its oldest request.
    fn done(&mut self, role: Role) {
        let (id, ask) = self.take(role);
        self.reply(role, id, Ok(done(&ask)));
    }

    /// execd carries out its oldest request, a start.
    fn started(&mut self, pid: Pid) {
        let (id, ask) = self.take(Role::Execd);
        assert!(ask.starts(), "{ask:?}");
        self.reply(Role::Execd, id, Ok(Reply::Execd(execd::Reply::Started { pid })));
    }

    /// The helper fails to carry out its oldest request.
    fn fails(&mut self, role: Role) {
        let (id, _) = self.take(role);
        self.reply(role, id, Err(failure(role)));
    }

    fn exits(&mut self, pid: Pid, status: u8) {
        self.feed(Event::Exited { pid, status });
    }

    fn dies(&mut self, role: Role) {
        self.goes(Instance::first(role));
    }

    fn goes(&mut self, helper: Instance) {
        self.asked.retain(|(id, _)| self.to.get(id) != Some(&helper));
        self.feed(Event::HelperGone(helper));
    }

    fn comes_up(&mut self, role: Role, pid: i32) {
        self.feed(Event::HelperUp { helper: Instance::first(role), pid: Pid(pid) });
    }

    /// Lets time pass until the next deadline.
    fn wait(&mut self) {
        self.now = self.supervisor.next_deadline().expect("something is due").max(self.now);
        self.feed(Event::Tick);
    }
}

/// The state of every link before it was set up.
const BEFORE: netd::Before = netd::Before { up: true, mtu: Some(1500) };

fn done(ask: &Request) -> Reply {
    match ask.role() {
        Role::Netd => match ask {
            Request::Netd(netd::Request::SetInterfaces { interfaces, .. }) => {
                Reply::Netd(netd::Reply::Set { before: vec![BEFORE; interfaces.len()] })
            }
            _ => Reply::Netd(netd::Reply::Done),
        },
        Role::Mountd => Reply::Mountd(mountd::Reply::Done),
        Role::Execd => Reply::Execd(execd::Reply::Done),
        Role::Streamd
            if matches!(
                ask,
                Request::Execd(execd::Request::Ping) | Request::Streamd(streamd::Request::Ping)
            ) =>
        {
            Reply::Streamd(streamd::Reply::Alive)
        }
        Role::Streamd => Reply::Streamd(streamd::Reply::Drained),
    }
}

fn failure(role: Role) -> Fault {
    Fault {
        who: role.name().to_owned(),
        doing: "doing it".to_owned(),
        to: String::new(),
        why: "no".to_owned(),
        errno: None,
    }
}

/// The short form of a request in which the tests compare it.
fn short(ask: &Request) -> String {
    match ask {
        Request::Netd(netd::Request::SetLinkUp { device }) => format!("up {device}"),
        Request::Netd(netd::Request::SetInterfaces { interfaces, repeated }) => {
            let names: Vec<_> = interfaces.iter().map(|interface| interface.device.as_str()).collect();
            format!("set up {}{}", names.join(" "), if *repeated { ", again" } else { "" })
        }
        Request::Netd(netd::Request::AddRoutes { routes, repeated }) => {
            let all: Vec<_> = routes.iter().map(|route| route.dest.as_str()).collect();
            format!("add routes {}{}", all.join(" "), if *repeated { ", again" } else { "" })
        }
        Request::Netd(netd::Request::SetPorts { mapping }) => {
            let all: Vec<_> = mapping
                .ports
                .iter()
                .map(|port| format!(" {}>{}/{}", port.host_port, port.container_port, port.protocol))
                .collect();
            format!("let in{}", all.concat())
        }
        Request::Netd(netd::Request::Reset { network }) => format!(
            "reset {} interfaces{}, {} routes{}",
            network.interfaces.len(),
            if network.before.is_empty() { "" } else { " as before" },
            network.routes.len(),
            if network.ports { ", ports" } else { "" }
        ),
        Request::Mountd(mountd::Request::Rescan) => "rescan".to_owned(),
        Request::Mountd(mountd::Request::WakeUp) => "wake up".to_owned(),
        Request::Mountd(mountd::Request::Online) => "online".to_owned(),
        Request::Mountd(mountd::Request::Unplug { device }) => format!("unplug {device}"),
        Request::Mountd(mountd::Request::PreparePod { .. }) => "prepare pod".to_owned(),
        Request::Mountd(mountd::Request::PrepareContainer { container }) => {
            format!("prepare {}", container.id)
        }
        Request::Mountd(mountd::Request::ReadFile { container, file }) => format!("read {container} {file}"),
        Request::Mountd(mountd::Request::ReadOn { .. }) => "read on".to_owned(),
        Request::Mountd(mountd::Request::WriteFile { container, file, data }) => {
            format!("write {container} {file}: {data:?}")
        }
        Request::Mountd(mountd::Request::KillContainer { container }) => format!("kill {container}"),
        Request::Mountd(mountd::Request::RemoveContainer { container }) => format!("remove {container}"),
        Request::Mountd(mountd::Request::SyncShare) => "sync share".to_owned(),
        Request::Mountd(mountd::Request::DestroyPod) => "destroy pod".to_owned(),
        Request::Execd(execd::Request::StartPod { hostname }) => format!("start pod {hostname}"),
        Request::Execd(execd::Request::Adopt { running }) => format!("adopt{}", listed(running)),
        Request::Execd(execd::Request::JoinPod { running }) => format!("join{}", listed(running)),
        Request::Execd(execd::Request::StartProcess { container, process, init, finished, .. }) => {
            let finished =
                if finished.is_empty() { String::new() } else { format!(", {finished:?} finished") };
            format!("start {container} {}{}{finished}", process.id, if *init { " as init" } else { "" })
        }
        Request::Execd(execd::Request::StartInGuest { process, .. }) => {
            format!("start in the guest {}", process.id)
        }
        Request::Execd(execd::Request::Resize { stdio, row, column }) => {
            format!("resize {stdio} {row}x{column}")
        }
        Request::Execd(execd::Request::Release { finished }) => format!("release {finished:?}"),
        Request::Execd(execd::Request::Resend) => "resend".to_owned(),
        Request::Streamd(streamd::Request::Finish { stdio, .. }) => format!("finish {stdio}"),
        Request::Streamd(streamd::Request::Flush) => "flush".to_owned(),
        Request::Mountd(mountd::Request::Sync) => "sync".to_owned(),
        Request::Execd(execd::Request::Ping) | Request::Streamd(streamd::Request::Ping) => "ping".to_owned(),
    }
}

fn listed(streams: &[StreamId]) -> String {
    streams.iter().map(|stream| format!(" {stream}")).collect()
}

fn kill(pid: i32, signal: Signal, group: bool) -> Action {
    Action::Kill { pid: Pid(pid), signal, group }
}

fn event(container: &str, process: &str, status: u8) -> String {
    format!(
        r#"PROCESSASYNCEVENT {{"container":"{container}","process":"{process}","event":"finished","status":{status}}}"#
    )
}

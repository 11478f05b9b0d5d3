//! PID 1's state machine between a host that sends anything, helpers that answer, fail, lie and die, and
//! processes that exit. Every command gets one reply, in order; no unknown process gets a signal; nothing
//! grows without bound; and the guest ends.
#![forbid(unsafe_code)]
#![no_main]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use hyperinit::command;
use hyperinit::fault::Fault;
use hyperinit::frame::Message;
use hyperinit::ids::Pid;
use hyperinit::supervisor::{Action, Config, Event, Supervisor};
use hyperinit::wire::mountd::{NinePTransport, ShareCache};
use hyperinit::wire::{Bytes, Instance, Reply, Request, Role, execd, mountd, netd, streamd};
use hyperinit_fuzz::{Choices, measure};
use libfuzzer_sys::fuzz_target;

const WARDEN: Pid = Pid(2);
/// The helpers' pids are below this, and the pids of the pod's processes begin here.
const FIRST: i32 = 1000;
/// The limits of supervisor/replies.rs and queue.rs.
const COMMANDS_MAX: usize = 256;
const WINDOW: usize = 16;
/// The memory that an input of a few kilobytes may make the supervisor hold, in bytes.
const HELD_MAX: usize = 16 << 20;

/// The expected reply to a command, if it is known beforehand.
type Owed = Option<(Message, Vec<u8>)>;

struct World {
    supervisor: Supervisor,
    now: Duration,
    asked: Vec<(u64, Instance, Request)>,
    alive: BTreeSet<Pid>,
    released: BTreeSet<Pid>,
    next_pid: i32,
    helpers: BTreeMap<Instance, Pid>,
    /// The mountds that the supervisor wants to start and that have not come up.
    wanted: BTreeSet<Instance>,
    doomed: BTreeSet<Instance>,
    owed: VecDeque<Owed>,
    ready: usize,
    last_ask: u64,
    off: bool,
}

fuzz_target!(|data: &[u8]| {
    let mut world = World::new();
    let mut choices = Choices::new(data);
    let ((), held) = measure(|| {
        while !choices.is_empty() && !world.off {
            world.step(&mut choices);
        }
    });
    assert!(held <= HELD_MAX, "{held} bytes");
    world.end();
});

impl World {
    fn new() -> World {
        let config = Config {
            local: false,
            nine_p: NinePTransport::Virtio,
            share_cache: ShareCache::Loose,
            share_is_late: true,
            debug_door: false,
            grace: Duration::from_secs(3),
            warden: WARDEN,
        };
        let mut world = World {
            supervisor: Supervisor::new(config),
            now: Duration::from_secs(1),
            asked: Vec::new(),
            alive: BTreeSet::new(),
            released: BTreeSet::new(),
            next_pid: FIRST,
            helpers: BTreeMap::new(),
            wanted: BTreeSet::new(),
            doomed: BTreeSet::new(),
            owed: VecDeque::new(),
            ready: 0,
            last_ask: 0,
            off: false,
        };
        Role::ALL.into_iter().for_each(|role| world.up(Instance::first(role)));
        world.connect();
        world
    }

    fn step(&mut self, choices: &mut Choices<'_>) {
        match choices.below(16) {
            0..=5 => self.host(choices),
            6..=10 => self.answer(choices),
            11 => self.exit(choices.below(256)),
            12 => {
                let first = Instance::first(Role::ALL[choices.below(4)]);
                let helper = match choices.below(3) {
                    0 => self.wanted.pop_first().unwrap_or(first),
                    1 => self.helpers.keys().copied().find(|helper| helper.is_extra()).unwrap_or(first),
                    _ => first,
                };
                if self.helpers.contains_key(&helper) { self.die(helper) } else { self.up(helper) }
            }
            13 => self.pass(Duration::from_millis(100 * u64::from(choices.byte()))),
            14 => match choices.below(4) {
                0 => self.connect(),
                1 => {
                    self.owed.clear();
                    self.feed(Event::HostLeft);
                }
                _ => self.feed(Event::ControlDrained),
            },
            _ => self.lie(choices),
        }
    }

    // ---- the host ----

    fn connect(&mut self) {
        self.owed.clear();
        let before = self.ready;
        self.feed(Event::HostConnected);
        assert_eq!(self.ready, before + 1, "READY");
    }

    fn host(&mut self, choices: &mut Choices<'_>) {
        let room = self.supervisor.room();
        assert!(room <= COMMANDS_MAX);
        if room == 0 {
            return;
        }
        let [c, p, s] = [4, 5, 6].map(|sides| choices.below(sides));
        let port = choices.below(4);
        let process = format!(r#"{{"id":"p{p}","args":["a"],"stdio":{},"stderr":{}}}"#, 2 * s, 2 * s + 1);
        let (message, json) = match choices.below(18) {
            0 => (Message::StartPod, format!(r#"{{"hostname":"h","shareDir":"{}"}}"#, &"s"[..p % 2])),
            1 => (Message::StartPod, r#"{"interfaces":[{"device":"eth0"}],"routes":[{"dest":"any"}],"portmappingWhiteLists":{"internalNetworks":["10.0.0.0/8"]}}"#.to_owned()),
            2 | 3 => (Message::NewContainer, format!(r#"{{"id":"c{c}","ports":[{{"hostPort":{port},"containerPort":80}}],"process":{process}}}"#)),
            4 | 5 => (Message::ExecCmd, format!(r#"{{"container":"c{c}","process":{process}}}"#)),
            6 => (Message::KillContainer, format!(r#"{{"container":"c{c}","signal":9}}"#)),
            7 => (Message::SignalProcess, format!(r#"{{"container":"c{c}","process":"p{p}","signal":15}}"#)),
            8 => (Message::RemoveContainer, format!(r#"{{"container":"c{c}"}}"#)),
            9 => (Message::WinSize, format!(r#"{{"container":"c{c}","process":"p{p}","row":1,"column":1}}"#)),
            10 => (Message::ReadFile, format!(r#"{{"container":"c{c}","file":"/f"}}"#)),
            11 => (Message::WriteFile, format!(r#"{{"container":"c{c}","file":"/f"}}data"#)),
            12 => (Message::SetupInterface, r#"{"device":"eth0"}"#.to_owned()),
            13 => (Message::OnlineCpuMem, "null".to_owned()),
            14 => (Message::GetVersion, "null".to_owned()),
            15 => (Message::DeleteInterface, r#"{"device":"eth0"}"#.to_owned()),
            16 if choices.below(16) == 0 => (Message::DestroyPod, "null".to_owned()),
            _ => (Message::Ping, "null".to_owned()),
        };
        self.tell(message, &json);
    }

    fn tell(&mut self, message: Message, json: &str) {
        self.owed.push_back(match message {
            Message::GetVersion => Some((Message::Ack, 4244_u32.to_be_bytes().to_vec())),
            Message::Ping => Some((Message::Ack, Vec::new())),
            _ => None,
        });
        let (message, payload) = (message.id(), json.as_bytes());
        let size = command::weight(message, payload);
        self.feed(Event::Command { message, size, command: command::parse(message, payload) });
    }

    // ---- the helpers ----

    fn up(&mut self, helper: Instance) {
        let pid = Pid(10 + i32::from(helper.place()));
        self.wanted.remove(&helper);
        self.helpers.insert(helper, pid);
        self.feed(Event::HelperUp { helper, pid });
    }

    fn die(&mut self, helper: Instance) {
        self.helpers.remove(&helper);
        self.doomed.remove(&helper);
        self.asked.retain(|(_, to, _)| *to != helper);
        self.feed(Event::HelperGone(helper));
    }

    /// A helper carries out its oldest request, or fails.
    fn answer(&mut self, choices: &mut Choices<'_>) {
        let Some((helper, how)) = self.busy(choices.below(8)).zip(Some(choices.below(8))) else { return };
        let at = self.asked.iter().position(|(_, to, _)| *to == helper).expect("it is busy");
        let (id, _, ask) = self.asked.remove(at);
        let result = match (&ask, how) {
            (_, 7) => Err(Fault::new("doing", "it", "no")),
            (
                Request::Execd(execd::Request::StartPod { .. })
                | Request::Execd(execd::Request::StartProcess { .. }),
                _,
            ) => {
                self.next_pid += 1;
                let pid = Pid(self.next_pid);
                if how == 6 {
                    self.feed(Event::Exited { pid, status: 3 });
                } else {
                    self.alive.insert(pid);
                }
                Ok(Reply::Execd(execd::Reply::Started { pid }))
            }
            (
                Request::Mountd(mountd::Request::ReadFile { .. })
                | Request::Mountd(mountd::Request::ReadOn { .. }),
                _,
            ) => {
                let part = mountd::Reply::Part { bytes: Bytes(b"part".to_vec()), last: how < 3 };
                Ok(Reply::Mountd(part))
            }
            (Request::Mountd(mountd::Request::PrepareContainer { .. }), 5) => {
                Ok(Reply::Mountd(mountd::Reply::Populating))
            }
            (Request::Mountd(mountd::Request::PrepareContainer { .. }), 6) => {
                let fault = Fault::new("waiting for", "it", "it is not there");
                Ok(Reply::Mountd(mountd::Reply::NotYet { fault }))
            }
            (Request::Streamd(streamd::Request::Ping), _) => Ok(Reply::Streamd(streamd::Reply::Alive)),
            _ => Ok(done(helper.role())),
        };
        self.feed(Event::Reply { helper, id, result });
    }

    /// A helper that has a request: the one with number `first`, or the next that has one.
    fn busy(&self, first: usize) -> Option<Instance> {
        let all: Vec<Instance> = Instance::all().collect();
        let mut helpers = all.iter().cycle().skip(first).take(all.len());
        helpers.find(|helper| self.asked.iter().any(|(_, to, _)| to == *helper)).copied()
    }

    /// A helper sends a reply that fits no request.
    fn lie(&mut self, choices: &mut Choices<'_>) {
        let (role, as_role) = (Role::ALL[choices.below(4)], Role::ALL[choices.below(4)]);
        let helper = Instance::first(role);
        if !self.helpers.contains_key(&helper) {
            return;
        }
        let id = self.last_ask.saturating_sub(choices.below(8) as u64);
        let result = match choices.below(4) {
            0 => Ok(Reply::Execd(execd::Reply::Started { pid: Pid(i32::from(choices.byte())) })),
            1 => Ok(Reply::Mountd(mountd::Reply::Part { bytes: Bytes(Vec::new()), last: false })),
            2 => Ok(Reply::Mountd(mountd::Reply::Populating)),
            _ => Ok(done(as_role)),
        };
        // A lie that happens to fit the request is an honest answer.
        if let Ok(Reply::Execd(execd::Reply::Started { pid })) = &result
            && (self.alive.contains(pid) || pid.0 <= FIRST)
            && self.asked.iter().any(|(asked, _, ask)| {
                *asked == id
                    && matches!(
                        ask,
                        Request::Execd(execd::Request::StartPod { .. })
                            | Request::Execd(execd::Request::StartProcess { .. })
                    )
            })
        {
            // The event loop passes on no pid that is not a child of init (event_loop.rs).
            return;
        }
        self.asked.retain(|(asked, to, _)| *asked != id || *to != helper);
        self.feed(Event::Reply { helper, id, result });
    }

    // ---- time and processes ----

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.feed(Event::Tick);
    }

    fn exit(&mut self, nth: usize) {
        let nth = nth % self.alive.len().max(1);
        if let Some(&pid) = self.alive.iter().nth(nth) {
            self.alive.remove(&pid);
            self.released.remove(&pid);
            self.feed(Event::Exited { pid, status: 1 });
        }
    }

    fn feed(&mut self, event: Event) {
        for action in self.supervisor.on_event(self.now, event) {
            match action {
                Action::Send { message, payload } => self.said(message, payload),
                Action::Ask { id, to, request } => {
                    assert!(self.helpers.contains_key(&to) && to.role() == request.role(), "nobody is there");
                    self.last_ask = self.last_ask.max(id);
                    self.asked.push((id, to, Arc::unwrap_or_clone(request)));
                }
                Action::Kill { pid, .. } => assert!(self.alive.contains(&pid), "{pid} is none of the pod's"),
                Action::Release { pid } => {
                    assert!(self.alive.contains(&pid) && self.released.insert(pid), "{pid} was let go");
                }
                Action::KillHelper { helper, .. } | Action::DismissHelper { helper } => {
                    self.doomed.insert(helper);
                }
                Action::StartHelper { helper } => {
                    assert!(!self.helpers.contains_key(&helper), "{helper} runs");
                    assert!(self.wanted.insert(helper), "{helper} is asked for twice");
                }
                Action::PowerOff => self.off = true,
            }
        }
        for helper in self.helpers.keys() {
            let under_way = self.asked.iter().filter(|(_, to, _)| to == helper).count();
            // Starts that execd has taken from its socket make room for others, each of which is a command.
            let most = if helper.role() == Role::Execd { WINDOW + COMMANDS_MAX } else { WINDOW };
            assert!(under_way <= most, "{under_way} requests to {helper}");
        }
        let doomed = std::mem::take(&mut self.doomed);
        doomed.into_iter().for_each(|role| self.die(role));
    }

    fn said(&mut self, message: Message, payload: Vec<u8>) {
        match message {
            Message::Ready => self.ready += 1,
            Message::ProcessAsyncEvent => {
                assert!(serde_json::from_slice::<serde_json::Value>(&payload).is_ok())
            }
            Message::Ack | Message::Error => {
                let owed = self.owed.pop_front().expect("a reply that nobody is owed");
                assert!(owed.is_none_or(|owed| owed == (message, payload)), "somebody else's reply");
            }
            other => panic!("{other}"),
        }
    }

    /// DESTROYPOD ends the guest, whatever came before, and by then every reply has been sent.
    fn end(&mut self) {
        if self.off {
            return;
        }
        self.tell(Message::DestroyPod, "null");
        for _ in 0..100_000 {
            if self.off {
                break;
            }
            let first = Role::ALL.into_iter().map(Instance::first);
            let down: Vec<Instance> = first.filter(|helper| !self.helpers.contains_key(helper)).collect();
            down.into_iter().for_each(|helper| self.up(helper));
            if !self.asked.is_empty() {
                self.answer(&mut Choices::new(&[]));
            } else if !self.alive.is_empty() {
                self.exit(0);
            } else if let Some(deadline) = self.supervisor.next_deadline() {
                self.now = self.now.max(deadline);
                self.feed(Event::Tick);
            } else {
                self.feed(Event::ControlDrained);
            }
        }
        assert!(self.off, "it does not end");
        assert!(self.owed.is_empty(), "{} commands without a reply", self.owed.len());
    }
}

fn done(role: Role) -> Reply {
    match role {
        Role::Netd => Reply::Netd(netd::Reply::Done),
        Role::Mountd => Reply::Mountd(mountd::Reply::Done),
        Role::Execd => Reply::Execd(execd::Reply::Done),
        Role::Streamd => Reply::Streamd(streamd::Reply::Drained),
    }
}

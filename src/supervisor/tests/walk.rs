//! A long random walk: a host that sends anything at any time; helpers that answer, fail, hang and die;
//! processes that exit. At the end every command has been answered, once and in order.

use std::collections::BTreeSet;

use super::*;

/// The random numbers (xorshift64*): the same seed gives the same walk.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) % sides
    }
}

struct Walk {
    world: World,
    dice: Dice,
    /// The running children of init, the pod init among them.
    alive: BTreeSet<Pid>,
    next_pid: i32,
    next_stream: u64,
    down: BTreeSet<Instance>,
    /// The running mountds other than the first.
    extra: BTreeSet<Instance>,
    commands: usize,
    replies: usize,
    starts: usize,
    events: usize,
}

impl Walk {
    fn new(seed: u64) -> Walk {
        Walk {
            world: World::configured(Config {
                debug_door: true,
                share_is_late: seed.is_multiple_of(2),
                ..config()
            }),
            dice: Dice(seed | 1),
            alive: BTreeSet::new(),
            next_pid: 1000,
            next_stream: 1,
            down: BTreeSet::new(),
            extra: BTreeSet::new(),
            commands: 0,
            replies: 0,
            starts: 0,
            events: 0,
        }
    }

    fn host(&mut self) {
        if self.world.supervisor.room() == 0 {
            return;
        }
        self.commands += 1;
        let container = match self.dice.roll(5) {
            0 => "hyperstart".to_owned(),
            nth => format!("c{}", nth - 1),
        };
        let process = format!("p{}", self.dice.roll(6));
        match self.dice.roll(16) {
            0 if self.dice.roll(2) == 0 => self.world.tell(Message::StartPod, network::POD),
            0 if self.dice.roll(2) == 0 => self.world.tell(Message::StartPod, r#"{"hostname":"pod"}"#),
            0 => {
                self.next_stream += 4;
                self.world.tell(Message::StartPod, &opening::pod(&["c1", "c2"], self.next_stream));
            }
            1 | 2 => {
                self.next_stream += 2;
                let container = format!("c{}", self.dice.roll(4));
                let ports = format!(r#"[{{"hostPort":{},"containerPort":80}}]"#, self.dice.roll(3));
                network::with_ports(&mut self.world, &container, self.next_stream, &ports);
            }
            3..=6 => {
                self.next_stream += 2;
                self.world.exec(&container, &process, self.next_stream);
            }
            7 => self
                .world
                .tell(Message::KillContainer, &format!(r#"{{"container":"{container}","signal":9}}"#)),
            8 => self.world.tell(
                Message::SignalProcess,
                &format!(r#"{{"container":"{container}","process":"{process}","signal":15}}"#),
            ),
            9 => self.world.tell(Message::RemoveContainer, &format!(r#"{{"container":"{container}"}}"#)),
            10 => self.world.tell(
                Message::WinSize,
                &format!(r#"{{"container":"{container}","process":"{process}","row":1,"column":1}}"#),
            ),
            11 => self.world.read(&container, "/f"),
            12 => self
                .world
                .tell(Message::WriteFile, &format!(r#"{{"container":"{container}","file":"/f"}}content"#)),
            13 => self.world.tell(Message::SetupInterface, r#"{"device":"eth1"}"#),
            14 => self.world.tell(Message::SetupRoute, r#"{"routes":[]}"#),
            _ => self.world.tell(Message::Ping, "null"),
        }
    }

    /// A helper carries out a request, or fails.
    fn work(&mut self) {
        let roles: Vec<Role> =
            Role::ALL.into_iter().filter(|role| !self.world.asked(*role).is_empty()).collect();
        let Some(&role) = roles.get(usize::try_from(self.dice.roll(roles.len().max(1) as u64)).unwrap())
        else {
            return;
        };
        if role == Role::Mountd {
            self.choose_mountd();
        }
        if self.dice.roll(20) == 0 {
            return self.world.fails(role);
        }
        let oldest = self.world.asked.iter().find(|(_, ask)| ask.role() == role);
        match oldest {
            Some((
                _,
                Request::Mountd(mountd::Request::ReadFile { .. })
                | Request::Mountd(mountd::Request::ReadOn { .. }),
            )) => {
                let last = self.dice.roll(3) == 0;
                return self.world.part(b"part", last);
            }
            Some((_, Request::Mountd(mountd::Request::PrepareContainer { container })))
                if self.dice.roll(3) == 0 =>
            {
                let id = container.id.clone();
                return self.world.populating(id.as_str());
            }
            _ => {}
        }
        let Some((_, ask)) = oldest.filter(|(_, ask)| ask.starts()) else { return self.world.done(role) };
        self.starts += usize::from(matches!(
            ask,
            Request::Execd(execd::Request::StartProcess { .. })
                | Request::Execd(execd::Request::StartInGuest { .. })
        ));
        self.next_pid += 1;
        let pid = Pid(self.next_pid);
        if self.dice.roll(4) == 0 {
            self.world.exits(pid, 3);
        } else {
            self.alive.insert(pid);
        }
        self.world.started(pid);
    }

    /// Lets a random mountd be the next to answer, by moving its oldest request to the front.
    fn choose_mountd(&mut self) {
        let mut seen = BTreeSet::new();
        let asked = self.world.asked.iter().enumerate().filter(|(_, (_, ask))| ask.role() == Role::Mountd);
        let oldest: Vec<usize> =
            asked.filter(|(_, (id, _))| seen.insert(self.world.to[id])).map(|(at, _)| at).collect();
        let nth = usize::try_from(self.dice.roll(oldest.len() as u64)).unwrap();
        let chosen = self.world.asked.remove(oldest[nth]);
        self.world.asked.insert(0, chosen);
    }

    fn die(&mut self) {
        let first = Role::ALL.into_iter().map(Instance::first);
        let alive: Vec<_> = first.chain(self.extra.iter().copied()).collect();
        let nth = usize::try_from(self.dice.roll(alive.len() as u64)).unwrap();
        self.end(alive[nth]);
    }

    /// A helper ends. The first helper of a role gets a successor; an extra mountd is started only on
    /// request.
    fn end(&mut self, helper: Instance) {
        if self.extra.remove(&helper) || (!helper.is_extra() && self.down.insert(helper)) {
            self.world.goes(helper);
        }
    }

    fn come_up(&mut self) {
        let Some(helper) = self.down.pop_first() else { return };
        if helper.is_extra() && self.dice.roll(8) == 0 {
            let closed = self.dice.roll(2) == 0;
            self.world.feed(if closed { Event::HelperClosed(helper) } else { Event::HelperGone(helper) });
            return;
        }
        self.next_pid += 1;
        if helper.is_extra() {
            self.extra.insert(helper);
        }
        self.world.feed(Event::HelperUp { helper, pid: Pid(self.next_pid) });
    }

    /// A process exits, by itself or killed.
    fn exit(&mut self) {
        let nth = usize::try_from(self.dice.roll(self.alive.len().max(1) as u64)).unwrap();
        if let Some(&pid) = self.alive.iter().nth(nth) {
            self.alive.remove(&pid);
            self.world.exits(pid, 1);
        }
    }

    /// Handles what the supervisor has done and sent: kills take effect later, in any order; replies and
    /// events are counted.
    fn settle(&mut self) {
        for action in self.world.did() {
            match action {
                // A helper that hangs in the kernel dies later, or never.
                Action::KillHelper { helper, .. } if helper.is_extra() && self.dice.roll(4) == 0 => {
                    self.world.asked.retain(|(id, _)| self.world.to.get(id) != Some(&helper));
                }
                Action::KillHelper { helper, .. } | Action::DismissHelper { helper } => self.end(helper),
                Action::StartHelper { helper } => {
                    assert!(helper.is_extra() && !self.extra.contains(&helper), "{helper} runs");
                    assert!(self.down.insert(helper), "{helper} is being started");
                }
                Action::Kill { pid, .. } => assert!(pid.0 >= 50, "{pid} is none of the pod's"),
                Action::PowerOff | Action::Send { .. } | Action::Ask { .. } | Action::Release { .. } => {}
            }
        }
        for said in self.world.said() {
            match said.split(' ').next() {
                Some("ACK" | "ERROR") => self.replies += 1,
                Some("PROCESSASYNCEVENT") => self.events += 1,
                _ => panic!("{said}"),
            }
        }
        assert!(self.replies <= self.commands);
        assert!(self.events <= self.starts);
    }

    fn step(&mut self) {
        match self.dice.roll(20) {
            0..=6 => self.host(),
            7..=14 => self.work(),
            15 | 16 => self.exit(),
            17 => self.come_up(),
            18 if self.dice.roll(4) == 0 => self.die(),
            _ => {
                self.world.now += Duration::from_millis(self.dice.roll(2000));
                self.world.feed(Event::Tick);
            }
        }
        self.settle();
    }

    /// All requests are answered and all processes exit, until nothing is left to do.
    fn finish(&mut self) {
        self.world.tell(Message::DestroyPod, "null");
        self.commands += 1;
        for _ in 0..100_000 {
            while !self.down.is_empty() {
                self.come_up();
            }
            self.settle();
            if !self.world.asked.is_empty() {
                self.work();
            } else if !self.alive.is_empty() {
                self.exit();
            } else if self.down.is_empty() {
                break;
            }
            self.settle();
        }
        self.world.feed(Event::ControlDrained);
        assert_eq!(self.world.asked(Role::Mountd), ["sync"]);
        self.world.done(Role::Mountd);
        assert!(self.world.did().contains(&Action::PowerOff), "the guest does not end");
    }
}

#[test]
fn nothing_that_is_owed_is_lost() {
    for seed in 1..=300 {
        let mut walk = Walk::new(seed);
        for _ in 0..600 {
            walk.step();
        }
        walk.finish();
        let known = format!("seed {seed}: {} commands, {} starts", walk.commands, walk.starts);
        assert_eq!(walk.replies, walk.commands, "one reply for each command; {known}");
        assert_eq!(walk.events, walk.starts, "one event for each process; {known}");
        assert!(walk.world.supervisor.streams.is_empty(), "every process is finished; {known}");
        assert!(walk.world.supervisor.pids.is_empty() && walk.world.supervisor.parked.is_empty(), "{known}");
    }
}

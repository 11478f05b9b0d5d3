//! One container takes as much as it can of a resource that the kernel counts by user, or of one kind of
//! kernel memory. What is charged to the pod ends at the pod's share of memory, and the guest goes on in
//! every case. All cases run in one VM, from a process of a container under the default profile.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]
#![cfg(target_arch = "x86_64")]

mod eater;
#[path = "../guest/mod.rs"]
mod guest;
#[path = "../support/probe.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod probe;
mod programs;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::{env, fs};

use hyperinit::command::Command;
use nix::libc;
use serde_json::{Value, json};

use guest::image::with_busybox;
use guest::processes::{process, replace};
use guest::{Guest, Kind, PATIENCE, Running, parse, scratch};

/// Tells this program, in a container, which resource to take.
const WHAT: &str = "QUOTAS";
/// The uid that the eater takes first: one that the guest gives to no container process.
const AS: &str = "QUOTAS_AS";
/// The helpers, each of which has its own user.
const HELPERS: [&str; 4] = ["netd", "mountd", "execd", "streamd"];

/// Prints a line apart from those of the test harness.
fn say(line: &str) {
    let mut out = std::io::stdout();
    out.write_all(format!("\n{line}\n").as_bytes()).and_then(|()| out.flush()).unwrap();
}

/// How taking a resource ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The kernel refuses more with this error. `enough` means that the eater has taken far more than a user
    /// could have without this guest's settings.
    Refused(&'static str),
    /// The pod's memory runs out: the kernel kills a process of the pod.
    Pod,
    /// The VM's memory runs out: the kernel kills the process that asks.
    Vm,
    /// `Pod` or `Vm`: part of the kernel's memory for it is charged to no cgroup, and which memory runs out
    /// first depends on how much the guest uses for itself.
    Either,
}

use End::{Either, Pod, Refused, Vm};

/// Each resource, the user that takes it, and how that ends. The name of a helper means that the container's
/// root takes the helper's uid.
const KINDS: [(&str, &str, End); 24] = [
    ("connections", "root", Refused("enough")),
    ("epoll watches", "root", Either),
    ("epoll watches", "streamd", Either),
    ("in-flight descriptors", "root", Refused("ETOOMANYREFS")),
    ("in-flight descriptors", "streamd", Refused("ETOOMANYREFS")),
    ("inodes", "root", Refused("ENOSPC")),
    ("inotify instances", "root", Refused("enough")),
    ("inotify instances", "mountd", Refused("enough")),
    ("inotify watches", "root", Refused("enough")),
    ("locks", "root", Vm),
    ("message queues", "root", Refused("EMFILE")),
    ("netlink dumps", "902", Vm),
    ("netlink queues", "902", Vm),
    ("open files", "root", Either),
    ("pings", "902", Vm),
    ("pipes", "root", Pod),
    ("ptys", "root", Refused("ENOSPC")),
    ("raw sockets", "root", Vm),
    ("tcp queues", "root", Pod),
    ("timerfds", "root", Either),
    ("timers", "root", Refused("EAGAIN")),
    ("timers", "streamd", Refused("EAGAIN")),
    ("udp queues", "root", Refused("enough")),
    ("unix queues", "root", Pod),
];

/// The VM, and what the test does in the guest itself.
struct World {
    guest: Guest,
}

impl World {
    fn boot() -> World {
        let directory = scratch();
        let image = with_busybox(&directory);
        let options = ["--memory", "256", "--initrd", image.to_str().unwrap()];
        // Without this the kernel logs every process at each kill, and a serial line is slow.
        let guest = Guest::boot_up(Kind::Vm, "sysctl.vm.oom_dump_tasks=0 hyper_debug", &options);
        fs::remove_dir_all(directory).unwrap();
        let root = guest.share.join("image/rootfs");
        fs::copy(env::current_exe().unwrap(), root.join("bin/eater")).unwrap();
        let all = programs::all().map(|(name, program, _)| (name, program));
        for (name, program) in all.into_iter().chain([("listener", programs::listener())]) {
            let path = root.join("bin").join(name);
            fs::write(&path, program).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        // With whitelists of port mappings the guest tracks connections.
        let lists = json!({"internalNetworks": ["10.1.0.0/16"], "externalNetworks": ["10.2.0.0/16"]});
        let pod = json!({"hostname": "pod-1", "shareDir": "share_dir", "portmappingWhiteLists": lists});
        guest.call(Command::StartPod(Box::new(parse(pod))));
        World { guest }
    }

    /// Runs a script in the guest itself, through the debugging door, and returns its output.
    fn door(&self, script: &str) -> String {
        let script = format!("PATH=/bin; {script}");
        let outcome =
            self.guest.exec("hyperstart", &["/bin/busybox", "sh", "-c", &script], json!({})).outcome();
        assert_eq!((outcome.status, outcome.stderr.as_str()), (0, ""), "{script:?} said {outcome:?}");
        outcome.stdout
    }

    /// Checks that the guest still works: every killed helper has a successor that serves, and output is
    /// complete.
    fn goes_on(&self, what: &str) {
        let from = self.guest.log().len();
        self.door("for name in netd mountd execd streamd; do busybox kill -9 $(busybox pidof $name); done");
        for name in HELPERS {
            self.guest.wait_for_log(from, &format!("{name} is up as"));
        }
        let whole: String = (1..=2000).map(|line| format!("{line}\n")).collect();
        assert!(self.guest.says("well", "seq 1 2000") == whole, "{what}: output is missing");
        let tty = self.guest.exec("well", &["tty"], json!({"terminal": true, "stderr": 0})).outcome();
        assert!(tty.stdout.starts_with("/dev/pts/"), "{what}: {tty:?}");
        assert_eq!(self.guest.container_says("new", "echo new", json!({})), "new\n", "{what}");
        let routes = json!({"routes": [{"dest": "198.51.100.0/24", "device": "no-such-link"}]});
        assert!(self.guest.refused(Command::SetupRoute(parse(routes))).contains("netd"), "{what}");
        let log = self.guest.log();
        assert!(!log.contains("died too often") && !log.contains("has to wait"), "{what}\n{log}");
    }

    /// Lets the eater run. Returns how it ended, and what the eater or the kernel said.
    fn eaten(&self, what: &str, running: Running<'_>) -> (End, String) {
        let from = self.guest.log().len();
        let mut text = String::new();
        loop {
            match running.streams.stdout.recv_within(PATIENCE) {
                Ok(Some(bytes)) => text.push_str(&String::from_utf8_lossy(&bytes)),
                Ok(None) => break,
                Err(error) => panic!("{what}: {error} after {text:?}\n{}", self.guest.log()),
            }
            if let Some(full) = text.lines().find_map(|line| line.strip_prefix("full ")) {
                self.goes_on(what);
                running.signal(9);
                assert_eq!(running.end().status, 137, "{what}");
                let word = programs::reason(full.split(' ').nth(1).unwrap());
                return (Refused(Box::leak(word.into_boxed_str())), full.to_owned());
            }
        }
        assert_eq!(running.status(), 137, "{what}: {text}");
        // The kernel logs before it kills, and QEMU writes the log to the file.
        self.guest.wait_for_log(from, "ut of memory");
        let log = self.guest.log()[from..].to_owned();
        let end = if log.contains("Memory cgroup out of memory") { Pod } else { Vm };
        self.goes_on(what);
        (end, log.lines().find(|line| line.contains("ut of memory")).unwrap_or_default().to_owned())
    }
}

/// Run in the container, this is the eater.
#[test]
fn a_container_that_takes_all_of_something_costs_the_guest_nothing() {
    if let Ok(what) = env::var(WHAT) {
        eater::eat(&what);
    }
    let world = World::boot();
    let guest = &world.guest;
    let well = guest.sleeper("well");
    let eater = guest.sleeper("eater");
    world.goes_on("before");
    hears_of_devices(&world);
    let test = "a_container_that_takes_all_of_something_costs_the_guest_nothing";
    let args = ["/bin/eater", "--exact", test, "--nocapture", "--test-threads=1"];
    let locked = json!({"type": "RLIMIT_MEMLOCK", "soft": u64::MAX, "hard": u64::MAX});
    let files = json!({"type": "RLIMIT_NOFILE", "soft": 524_288, "hard": 524_288});
    let limits = [locked, files];
    let mut wrong = Vec::new();
    for (what, user, expected) in KINDS {
        let more = match helpers_user(user) {
            Some(number) => {
                json!({"envs": [variable(WHAT, what), variable(AS, &number)], "rlimits": limits})
            }
            None => json!({"envs": [variable(WHAT, what)], "rlimits": limits, "user": user}),
        };
        let end = world.eaten(what, guest.exec("eater", &args, more));
        let _ = writeln!(std::io::stderr(), "{what}: {}", end.1);
        if !is_expected(expected, end.0) {
            wrong.push((what, end));
        }
        if what == "connections" {
            has_its_share_of_connections(guest);
        }
        guest.says("eater", "rm -rf /dev/shm/*");
    }
    for (name, _, expected) in programs::all() {
        if name == programs::WITH_LITTLE_CODE {
            world.door(&format!("echo {} > /proc/sys/net/core/bpf_jit_limit", programs::CODE));
        }
        let end =
            world.eaten(name, guest.exec("eater", &[&format!("/bin/{name}")], json!({"rlimits": limits})));
        let _ = writeln!(std::io::stderr(), "{name}: {}", end.1);
        if !is_expected(expected, end.0) {
            wrong.push((name, end));
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
    guest.finish(eater);
    guest.finish(well);
    guest.call(Command::DestroyPod);
    let World { guest } = world;
    assert!(guest.wait_for_end().success());
}

fn variable(name: &str, value: &str) -> Value {
    json!({"env": name, "value": value})
}

/// A process of a container's root that has taken the helper's uid tries to reach the helper: by its pid, and
/// by addressing all processes or all of that user.
fn cannot_reach(guest: &Guest, name: &str, pid: i32, user: u64) {
    let (number, everybody, kill) = (pid.try_into().unwrap(), u64::MAX, 9);
    let become_user = (libc::SYS_setresuid.cast_unsigned(), [user, user, user, 0, 0, 0]);
    let attempts: [(&str, i64, [u64; 3], i32); 4] = [
        ("kill", libc::SYS_kill, [number, kill, 0], libc::ESRCH),
        ("tgkill", libc::SYS_tgkill, [number, number, kill], libc::ESRCH),
        // The kernel returns success although the process may signal nobody: the others in the pod are
        // root's.
        ("kill everybody", libc::SYS_kill, [everybody, kill, 0], 0),
        // The process sets its own priority too, so the call succeeds.
        ("setpriority", libc::SYS_setpriority, [libc::PRIO_USER.into(), user, 19], 0),
    ];
    let before = nice(pid);
    for (what, call, [a, b, c], answer) in attempts {
        let program = guest.share.join("image/rootfs/bin/reach");
        let calls = [become_user, (call.cast_unsigned(), [a, b, c, 0, 0, 0])];
        fs::write(&program, probe::elf_of(&calls, &[])).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let status = guest.exec("eater", &["/bin/reach"], json!({})).outcome().status;
        assert_eq!(i32::from(status), answer, "{what} as the user of {name}");
    }
    assert_eq!(nice(pid), before, "{name} has the priority that it had");
}

/// The nice value (proc_pid_stat(5): field 19).
fn nice(pid: i32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    stat.rsplit_once(") ").unwrap().1.split(' ').nth(19 - 3).unwrap().to_owned()
}

/// The uid of a helper; none if the name is no helper's.
fn helpers_user(name: &str) -> Option<String> {
    let text = fs::read_to_string(format!("{}/policy/{name}.json", env!("CARGO_MANIFEST_DIR"))).ok()?;
    let policy: Value = serde_json::from_str(&text).unwrap();
    policy["user"]["uid"].as_u64().map(|number| number.to_string())
}

/// The guest gives no process a helper's uid, but a container's root may take it. That gains nothing: the
/// process can name no process outside the pod, and the in-flight descriptors that the kernel counts for
/// streamd's uid do not keep streamd from parking a connection for its successor.
#[test]
fn a_container_that_takes_a_helpers_number_reaches_nothing_of_the_helper() {
    if let Ok(what) = env::var(WHAT) {
        eater::eat(&what);
    }
    let mut guest = Guest::boot_with(Kind::Local, "");
    guest.start_pod();
    fs::copy(env::current_exe().unwrap(), guest.share.join("image/rootfs/bin/eater")).unwrap();
    drop((guest.sleeper("well"), guest.sleeper("eater")));
    let helpers = HELPERS.map(|name| process(&guest, name, None));
    let test = "a_container_that_takes_a_helpers_number_reaches_nothing_of_the_helper";
    let args = ["/bin/eater", "--exact", test, "--nocapture", "--test-threads=1"];
    for (name, pid) in HELPERS.into_iter().zip(helpers) {
        let user = helpers_user(name).unwrap();
        cannot_reach(&guest, name, pid, user.parse().unwrap());
        let envs = [variable(WHAT, "in-flight descriptors"), variable(AS, &user)];
        // Below the guest's own limit, on any machine.
        let files = json!({"type": "RLIMIT_NOFILE", "soft": 512, "hard": 512});
        let running = guest.exec("eater", &args, json!({"envs": envs, "rlimits": [files]}));
        running.read_until(" ETOOMANYREFS\n");
    }
    assert_eq!(HELPERS.map(|name| process(&guest, name, None)), helpers, "they live");
    // A connection that comes now is parked, and the next streamd gets it.
    guest.hang_up();
    guest.connect();
    replace(&guest, &HELPERS);
    let whole: String = (1..=2000).map(|line| format!("{line}\n")).collect();
    assert!(guest.says("well", "seq 1 2000") == whole, "output is missing");
    assert!(!guest.log().contains("parking"), "{}", guest.log());
}

fn is_expected(expected: End, end: End) -> bool {
    expected == end || expected == Either && matches!(end, Pod | Vm)
}

/// The kernel sends uevents (devices that appear and change) to every network namespace. So a container,
/// which may open netlink sockets, receives them, as under Docker without user namespaces. It can read the
/// same facts in /sys.
fn hears_of_devices(world: &World) {
    let listener = world.guest.exec("eater", &["/bin/listener"], json!({}));
    listener.read_until("listening");
    world.door("echo change > /sys/class/mem/null/uevent");
    let heard = listener.read_until("full");
    assert!(heard.contains("change@/devices/virtual/mem/null"), "{heard:?}");
    listener.signal(9);
    assert_eq!(listener.end().status, 137);
}

/// Checks that all connections together are limited to a part of the VM's memory.
fn has_its_share_of_connections(guest: &Guest) {
    let number = |script: &str| guest.says("well", script).trim().parse::<u64>().unwrap();
    let memory = number("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo") << 10;
    let most = number("cat /proc/sys/net/netfilter/nf_conntrack_max");
    let count = number("cat /proc/sys/net/netfilter/nf_conntrack_count");
    assert_eq!(most, memory / 64 / 512);
    assert!(count > most / 2 && count <= most, "{count} of {most}");
}

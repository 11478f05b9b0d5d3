//! The kernel's tracer, by tracefs: an instance of its own beside whatever else this machine traces, and gone
//! afterwards.

use std::fs;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::mount::{MsFlags, mount};

/// Where the kernel has it mounted.
const TRACEFS: &str = "/sys/kernel/tracing";
/// The kilobytes of the kernel's buffers, of all processors together. A recording that leaves out what is
/// known already fills a part of it.
const BUFFERS: usize = 128 * 1024;
/// Waits for the end of whoever has the other end of its stdin, however that comes, and removes the instance
/// `$1`; and tracefs itself, if `$2`. What a killed process has open is closed a little later.
const GUARD: &str = r#"read -r _
cd "$0/instances" || exit
echo 0 >"$1/tracing_on"
echo 0 >"$1/events/enable"
tries=100
until rmdir "$1" 2>/dev/null || [ "$((tries -= 1))" = 0 ]; do sleep 0.1; done
cd /
[ -z "$2" ] || umount "$0"
[ ! -e "$0/instances/$1" ]"#;

/// The events that a recording needs, each with what a kernel has it by.
const EVENTS: [(&str, &str); 5] = [
    ("capability/cap_capable", "Linux 6.14"),
    ("raw_syscalls/sys_enter", "CONFIG_FTRACE_SYSCALLS"),
    ("sched/sched_process_exec", "CONFIG_EVENT_TRACING"),
    ("task/task_newtask", "CONFIG_EVENT_TRACING"),
    ("task/task_rename", "CONFIG_EVENT_TRACING"),
];

/// An instance.
pub struct Tracer {
    path: PathBuf,
    guard: Child,
}

impl Tracer {
    /// One that records nothing yet.
    pub fn new() -> Tracer {
        let mounted = mounted();
        let instances = Path::new(TRACEFS).join("instances");
        remove_stale(&instances);
        let name = format!("hyperinit-{}", std::process::id());
        let path = instances.join(&name);
        fs::create_dir(&path).unwrap_or_else(|error| panic!("{}: {error}: needs root", path.display()));
        let tracer = Tracer { path, guard: guard(&name, mounted, Stdio::piped()) };
        for (event, needs) in EVENTS {
            let exists = tracer.path.join("events").join(event).exists();
            assert!(exists, "this kernel has no tracepoint {event}: it takes {needs}");
        }
        // Numbers, one after another on whatever processor: no clock says as surely what came first.
        tracer.set("trace_clock", "counter");
        let processors = tracer.processors().len();
        tracer.set("buffer_size_kb", &(BUFFERS / processors).max(1024).to_string());
        tracer.set("options/event-fork", "1");
        tracer
    }

    /// What a file of it is to say.
    pub fn set(&self, file: &str, text: &str) {
        fs::write(self.path.join(file), text).unwrap_or_else(|error| panic!("{file}: {text}: {error}"));
    }

    /// Which of an event count; none: all of them.
    pub fn filter(&self, event: &str, filter: &str) {
        self.set(&format!("events/{event}/filter"), filter);
    }

    /// Begins: with what this thread starts, and what that starts.
    pub fn start(&self) {
        self.set("set_event_pid", &nix::unistd::gettid().to_string());
        for (event, _) in EVENTS {
            self.set(&format!("events/{event}/enable"), "1");
        }
    }

    /// Ends the recording.
    pub fn stop(&self) {
        self.set("tracing_on", "0");
    }

    fn processors(&self) -> Vec<PathBuf> {
        fs::read_dir(self.path.join("per_cpu")).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// What each processor has recorded, in text. What was read is gone.
    pub fn pipes(&self) -> Vec<File> {
        let open = |path: PathBuf| {
            let options = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&path);
            options.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        };
        self.processors().into_iter().map(|path| open(path.join("trace_pipe"))).collect()
    }

    /// What the kernel could not record, as it counts it.
    pub fn lost(&self) -> Vec<String> {
        let lost = |line: &&str| {
            let (key, count) = line.split_once(": ").unwrap_or_default();
            matches!(key, "overrun" | "commit overrun" | "dropped events") && count != "0"
        };
        let mut all = Vec::new();
        for path in self.processors() {
            let stats = fs::read_to_string(path.join("stats")).unwrap();
            let processor = path.file_name().unwrap().display();
            all.extend(stats.lines().filter(lost).map(|line| format!("{processor}: {line}")));
        }
        all
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // As it would be if this process were killed, so that it is tried each time.
        drop(self.guard.stdin.take());
        let removed = self.guard.wait().is_ok_and(|status| status.success());
        assert!(removed || std::thread::panicking(), "{} could not be removed", self.path.display());
    }
}

/// Has tracefs mounted; whether it was not before.
fn mounted() -> bool {
    let there = || Path::new(TRACEFS).join("instances").exists();
    if there() {
        return false;
    }
    let result = mount(Some("nodev"), TRACEFS, Some("tracefs"), MsFlags::empty(), None::<&str>);
    result.unwrap_or_else(|error| {
        panic!("mounting tracefs on {TRACEFS}: {error}: needs root, and a kernel with CONFIG_FTRACE")
    });
    assert!(there(), "the tracefs of this kernel has no instances: it takes CONFIG_TRACING");
    true
}

/// In a process group of its own: what ends this one, at a terminal too, is not for it.
fn guard(name: &str, mounted: bool, stdin: Stdio) -> Child {
    let mut command = Command::new("sh");
    command.args(["-c", GUARD, TRACEFS, name, if mounted { "mounted" } else { "" }]);
    command.process_group(0).stdin(stdin).spawn().expect("sh")
}

/// What others could not remove that were killed together with their guards.
fn remove_stale(instances: &Path) {
    for entry in fs::read_dir(instances).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let Some(pid) = name.strip_prefix("hyperinit-") else { continue };
        let gone =
            fs::metadata(format!("/proc/{pid}")).is_err_and(|error| error.kind() == ErrorKind::NotFound);
        if gone {
            guard(&name, false, Stdio::null()).wait().unwrap();
        }
    }
}

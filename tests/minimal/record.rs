//! The kernel's record (tracefs) of what this guest's processes did once they were confined. Nothing of the product knows of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Names that a process of the guest gives itself, with prctl.
const NAMES: [&str; 7] = ["init", "warden", "netd", "mountd", "execd", "streamd", "podinit"];
/// The kilobytes of the kernel's buffer for each processor.
const BUFFER: &str = "65536";

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Every call with its arguments, of those that [`Record::start`] was told to keep; all zero for others.
    pub calls: BTreeMap<&'static str, BTreeSet<(u32, [u64; 6])>>,
    /// Every capability that the kernel asked for and found.
    pub capabilities: BTreeMap<&'static str, BTreeSet<usize>>,
}

/// A recording of the calling thread's descendants.
pub struct Record {
    instance: Instance,
    done: Arc<AtomicBool>,
    reader: JoinHandle<Seen>,
}

/// A tracer of its own, beside whatever else this machine traces.
struct Instance(PathBuf);

impl Instance {
    fn new() -> Instance {
        let path = format!("/sys/kernel/tracing/instances/hyperinit-{}", std::process::id());
        fs::create_dir(&path).expect("needs tracefs at /sys/kernel/tracing, and root");
        Instance(PathBuf::from(path))
    }

    fn set(&self, file: &str, text: &str) {
        fs::write(self.0.join(file), text).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("tracing_on"), "0");
        let _ = fs::write(self.0.join("events/enable"), "0");
        let _ = fs::remove_dir(&self.0);
    }
}

impl Record {
    /// Begins with whatever this thread starts. `kept` says which arguments of which call are worth a place.
    pub fn start(kept: HashMap<u32, [bool; 6]>, seccomp: u32) -> Record {
        let instance = Instance::new();
        instance.set("buffer_size_kb", BUFFER);
        instance.set("options/event-fork", "1");
        // Threads are called as their process is. What else runs below this thread waits in circles, and would drown them.
        let named = NAMES.map(|name| format!("comm == {name:?}")).join(" || ");
        for (event, filter) in [
            ("capability/cap_capable", format!("ret == 0 && ({named})")),
            ("raw_syscalls/sys_enter", named.clone()),
            ("sched/sched_process_exec", String::new()),
            ("task/task_newtask", String::new()),
            ("task/task_rename", String::new()),
        ] {
            let path = format!("events/{event}");
            assert!(
                instance.0.join(&path).exists(),
                "this kernel has no tracepoint {event}: it needs Linux 6.14"
            );
            if !filter.is_empty() {
                instance.set(&format!("{path}/filter"), &filter);
            }
            instance.set(&format!("{path}/enable"), "1");
        }
        instance.set("set_event_pid", &nix::unistd::gettid().to_string());
        let done = Arc::new(AtomicBool::new(false));
        let reader = {
            let (pipe, done) = (instance.0.join("trace_pipe"), Arc::clone(&done));
            let follower = Follower {
                kept,
                seccomp,
                tasks: HashMap::new(),
                groups: HashMap::new(),
                seen: Seen::default(),
            };
            std::thread::spawn(move || read(&pipe, &done, follower))
        };
        Record { instance, done, reader }
    }

    /// Ends it.
    pub fn stop(self) -> Seen {
        self.instance.set("tracing_on", "0");
        self.done.store(true, Ordering::SeqCst);
        self.reader.join().unwrap()
    }
}

fn read(pipe: &Path, done: &AtomicBool, mut follower: Follower) -> Seen {
    let mut file = fs::OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(pipe).unwrap();
    let (mut buffer, mut rest) = (vec![0; 1 << 20], Vec::new());
    loop {
        // Asked before the read: what was written until then is read.
        let last = done.load(Ordering::SeqCst);
        match file.read(&mut buffer) {
            Ok(count) if count > 0 => {
                rest.extend_from_slice(&buffer[..count]);
                let whole = rest.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
                for line in rest[..whole].split(|&byte| byte == b'\n') {
                    follower.line(&String::from_utf8_lossy(line));
                }
                rest.drain(..whole);
            }
            Ok(_) if last => return follower.seen,
            Err(error) if error.kind() == ErrorKind::WouldBlock && last => return follower.seen,
            Err(error) if !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                panic!("trace_pipe: {error}")
            }
            // The kernel tells of a buffer that is half full; a quiet time has to be seen to end, too.
            _ => drop(poll(&mut [PollFd::new(file.as_fd(), PollFlags::POLLIN)], PollTimeout::from(100u8))),
        }
    }
}

/// A process.
#[derive(Debug, Clone, Copy, Default)]
struct Group {
    role: Option<&'static str>,
    confined: bool,
}

/// A thread: whose.
#[derive(Debug, Clone, Copy)]
struct Task {
    group: i32,
}

/// Follows the events, one by one.
struct Follower {
    kept: HashMap<u32, [bool; 6]>,
    seccomp: u32,
    tasks: HashMap<i32, Task>,
    groups: HashMap<i32, Group>,
    seen: Seen,
}

impl Follower {
    /// `    netd-4711    [001] .....  12.345678: sys_enter: NR 44 (3, …)`
    fn line(&mut self, line: &str) {
        assert!(!line.contains("[LOST "), "the kernel's buffer is too small: {line}");
        let Some((head, tail)) = line.split_once("] ") else { return };
        let Some(pid) = head.rsplit_once(" [").and_then(|(task, _)| {
            task.trim_end().rsplit_once('-').and_then(|(_, pid)| pid.parse::<i32>().ok())
        }) else {
            return;
        };
        let mut parts = tail.splitn(3, ": ");
        let (Some(_), Some(event), Some(what)) = (parts.next(), parts.next(), parts.next()) else { return };
        match event {
            "sys_enter" => self.call(pid, what),
            "cap_capable" => self.capability(pid, what),
            "task_newtask" => self.born(pid, what),
            "task_rename" => self.renamed(pid, what),
            // What execd started becomes what it was told, and whoever has a name by a program's has not given it to himself.
            "sched_process_exec" => *self.group(pid) = Group::default(),
            _ => {}
        }
    }

    fn task(&mut self, pid: i32) -> &mut Task {
        self.tasks.entry(pid).or_insert(Task { group: pid })
    }

    fn group(&mut self, pid: i32) -> &mut Group {
        let group = self.task(pid).group;
        self.groups.entry(group).or_default()
    }

    fn call(&mut self, pid: i32, what: &str) {
        let words =
            what.trim_start_matches("NR ").split([' ', '(', ')', ',']).filter(|word| !word.is_empty());
        let words: Vec<&str> = words.collect();
        let Some(number) = words.first().and_then(|word| word.parse::<u32>().ok()) else { return };
        let mut arguments = [0; 6];
        for (to, word) in arguments.iter_mut().zip(words.get(1..).unwrap_or_default()) {
            *to = u64::from_str_radix(word, 16).unwrap();
        }
        let seccomp = self.seccomp;
        let group = self.group(pid);
        let Some(role) = group.role else { return };
        if group.confined {
            let kept = self.kept.get(&number).copied().unwrap_or_default();
            arguments.iter_mut().zip(kept).filter(|(_, kept)| !kept).for_each(|(argument, _)| *argument = 0);
            self.seen.calls.entry(role).or_default().insert((number, arguments));
        } else if number == seccomp {
            group.confined = true;
        }
    }

    fn capability(&mut self, pid: i32, what: &str) {
        let bit = what.split_once("cap ").and_then(|(_, rest)| rest.split(',').next()?.parse().ok());
        let (Some(bit), Some(role)) = (bit, self.group(pid).role) else { return };
        let role = match (role, self.group(pid).confined) {
            // Until it is confined it has what execd has.
            ("podinit", false) => "execd",
            (_, false) => return,
            (role, true) => role,
        };
        self.seen.capabilities.entry(role).or_default().insert(bit);
    }

    fn born(&mut self, parent: i32, what: &str) {
        let field = |name: &str| what.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        let pid: i32 = field("pid").unwrap().parse().unwrap();
        let flags = u64::from_str_radix(field("clone_flags").unwrap(), 16).unwrap();
        let mut group = pid;
        if flags & nix::libc::CLONE_THREAD as u64 != 0 {
            group = self.task(parent).group;
        } else {
            // A copy of execd acts for it until it executes something.
            let parent = *self.group(parent);
            let kept = if parent.role == Some("execd") { parent } else { Group::default() };
            self.groups.insert(pid, kept);
        }
        self.tasks.insert(pid, Task { group });
    }

    fn renamed(&mut self, pid: i32, what: &str) {
        let group = self.task(pid).group;
        let name = what.split(' ').find_map(|word| word.strip_prefix("newcomm=")).unwrap_or_default();
        // execve renames too, and is told of next; a thread's name is its own.
        if group == pid
            && let Some(role) = NAMES.into_iter().find(|&role| role == name)
        {
            self.groups.insert(pid, Group { role: Some(role), confined: false });
        }
    }
}

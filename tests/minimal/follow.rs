//! What the events of a record mean: which process is whose, whether it is confined, and what it does then.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;

/// Names that a process of the guest gives itself, with prctl.
pub const NAMES: [&str; 7] = ["init", "warden", "netd", "mountd", "execd", "streamd", "podinit"];

/// The processes whose calls are recorded, and the arguments of them that are: of other calls only that they
/// were made.
pub type Kept = BTreeMap<&'static str, HashMap<u32, [bool; 6]>>;

/// What was seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Every call with its arguments, of those that were to be kept; all zero for others.
    pub calls: BTreeMap<&'static str, BTreeSet<(u32, [u64; 6])>>,
    /// Every capability that the kernel asked for and found.
    pub capabilities: BTreeMap<&'static str, BTreeSet<usize>>,
}

/// A line of the record.
#[derive(Debug)]
pub struct Event {
    /// Its place among all others.
    pub at: u64,
    pid: i32,
    name: String,
    what: String,
}

impl Event {
    /// `    netd-4711    [001] ..... 12345: sys_enter: NR 44 (3, …)`
    pub fn parse(line: &str) -> Option<Event> {
        let (task, rest) = line.split_once(" [")?;
        let pid = task.trim_end().rsplit_once('-')?.1.parse().ok()?;
        let mut parts = rest.split_once("] ")?.1.splitn(3, ": ");
        let at = parts.next()?.rsplit(' ').next()?.parse().ok()?;
        Some(Event { at, pid, name: parts.next()?.to_owned(), what: parts.next()?.to_owned() })
    }

    /// `NAME=VALUE`
    fn field(&self, name: &str) -> Option<&str> {
        self.what.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }
}

/// A process.
#[derive(Debug, Clone, Copy, Default)]
struct Group {
    role: Option<&'static str>,
    confined: bool,
}

/// Follows the events, one by one.
#[derive(Debug)]
pub struct Follower {
    kept: Kept,
    seccomp: u32,
    /// The process that a thread is of, for those that are not its first.
    threads: HashMap<i32, i32>,
    groups: HashMap<i32, Group>,
    /// Calls of which nothing more is to be known.
    known: BTreeMap<&'static str, BTreeSet<u32>>,
    learnt: bool,
    /// So far.
    pub seen: Seen,
}

impl Follower {
    /// `seccomp`: the call that confines.
    pub fn new(kept: Kept, seccomp: u32) -> Follower {
        Follower {
            kept,
            seccomp,
            threads: HashMap::new(),
            groups: HashMap::new(),
            known: BTreeMap::new(),
            learnt: false,
            seen: Seen::default(),
        }
    }

    /// Whether [`Follower::asks`] says less than when this was asked last.
    pub fn learnt(&mut self) -> bool {
        std::mem::take(&mut self.learnt)
    }

    /// The calls that it wants to know of, as the kernel's filter of events; what does not fit in `length` it
    /// is told again.
    ///
    /// Threads are called as their process is. What else runs there waits in circles, and would drown them.
    pub fn asks(&self, length: usize) -> String {
        let mut filter = String::new();
        for name in NAMES {
            let or = if filter.is_empty() { "" } else { " || " };
            if !self.kept.contains_key(name) {
                write!(filter, "{or}(comm == {name:?} && id == {})", self.seccomp).unwrap();
                continue;
            }
            write!(filter, "{or}(comm == {name:?}").unwrap();
            for number in self.known.get(name).into_iter().flatten() {
                // Room is left for the others' names.
                if filter.len() + 64 * NAMES.len() < length {
                    write!(filter, "&&id!={number}").unwrap();
                }
            }
            filter.push(')');
        }
        filter
    }

    /// The next one.
    pub fn event(&mut self, event: &Event) {
        match event.name.as_str() {
            "sys_enter" => self.call(event),
            "cap_capable" => self.capability(event),
            "task_newtask" => self.born(event),
            "task_rename" => self.renamed(event),
            // What execd started becomes what it was told, and whoever has a name by a program's has not
            // given it to himself.
            "sched_process_exec" => *self.group(event.pid) = Group::default(),
            other => panic!("nobody asked for {other}"),
        }
    }

    fn process(&self, pid: i32) -> i32 {
        self.threads.get(&pid).copied().unwrap_or(pid)
    }

    fn group(&mut self, pid: i32) -> &mut Group {
        self.groups.entry(self.process(pid)).or_default()
    }

    fn call(&mut self, event: &Event) {
        let words = event.what.trim_start_matches("NR ").split([' ', '(', ')', ',']);
        let mut words = words.filter(|word| !word.is_empty());
        // -1 is what a call was made that is none.
        let Some(number) = words.next().and_then(|word| word.parse::<u32>().ok()) else { return };
        let seccomp = self.seccomp;
        let group = self.group(event.pid);
        let Some(role) = group.role else { return };
        if !group.confined {
            group.confined = number == seccomp;
            return;
        }
        let Some(kept) = self.kept.get(role) else { return };
        let kept = kept.get(&number);
        let mut arguments = [0; 6];
        for ((argument, word), kept) in arguments.iter_mut().zip(words).zip(kept.copied().unwrap_or_default())
        {
            if kept {
                *argument = u64::from_str_radix(word, 16).unwrap();
            }
        }
        if kept.is_none() && number != seccomp {
            self.learnt |= self.known.entry(role).or_default().insert(number);
        }
        self.seen.calls.entry(role).or_default().insert((number, arguments));
    }

    fn capability(&mut self, event: &Event) {
        let bit = event.what.split_once("cap ").and_then(|(_, rest)| rest.split(',').next()?.parse().ok());
        let group = *self.group(event.pid);
        let (Some(bit), Some(role)) = (bit, group.role) else { return };
        let role = match (role, group.confined) {
            // Until it is confined it has what execd has.
            ("podinit", false) => "execd",
            (_, false) => return,
            (role, true) => role,
        };
        self.seen.capabilities.entry(role).or_default().insert(bit);
    }

    fn born(&mut self, event: &Event) {
        let pid: i32 = event.field("pid").unwrap().parse().unwrap();
        let flags = u64::from_str_radix(event.field("clone_flags").unwrap(), 16).unwrap();
        if flags & nix::libc::CLONE_THREAD as u64 != 0 {
            self.threads.insert(pid, self.process(event.pid));
            return;
        }
        // A number is used again, and what was a thread may be a process now.
        self.threads.remove(&pid);
        // A copy of execd acts for it until it executes something.
        let parent = *self.group(event.pid);
        let group = if parent.role == Some("execd") { parent } else { Group::default() };
        self.groups.insert(pid, group);
    }

    fn renamed(&mut self, event: &Event) {
        let name = event.field("newcomm").unwrap_or_default();
        // execve renames too, and is told of next; a thread's name is its own.
        if self.process(event.pid) == event.pid
            && let Some(role) = NAMES.into_iter().find(|&role| role == name)
        {
            self.groups.insert(event.pid, Group { role: Some(role), confined: false });
        }
    }
}

#[test]
fn what_is_done_after_the_filter_counts() {
    let kept = Kept::from([("netd", HashMap::from([(46, [false, true, false, false, false, false])]))]);
    let mut follower = Follower::new(kept, 317);
    let all = r#"(comm == "netd")"#;
    assert!(follower.asks(4000).contains(all));
    let lines = [
        "    cargo-10      [000] ..... 1: task_newtask: pid=20 comm=cargo clone_flags=0 oom_score_adj=0",
        "    cargo-20      [001] ..... 2: task_rename: pid=20 oldcomm=cargo newcomm=netd oom_score_adj=0",
        "     netd-20      [001] ..... 3: sched_process_exec: filename=/netd pid=20 old_pid=20",
        "     netd-20      [001] ..... 4: sys_enter: NR 1 (1, 2, 3, 4, 5, 6)",
        "     netd-20      [001] ..... 5: task_rename: pid=20 oldcomm=netd newcomm=netd oom_score_adj=0",
        "     netd-20      [001] ..... 6: sys_enter: NR 2 (1, 2, 3, 4, 5, 6)",
        "     netd-20      [001] d..1. 7: cap_capable: cred 0, target_ns 0, capable_ns 0, cap 1, ret 0",
        "     netd-20      [001] ..... 8: sys_enter: NR 317 (1, 0, 3, 4, 5, 6)",
        "     netd-20      [001] ..... 9: sys_enter: NR 46 (1, ff, 3, 4, 5, 6)",
        "     netd-20      [001] ..... 10: task_newtask: pid=21 comm=netd clone_flags=10000 oom_score_adj=0",
        "     netd-21      [000] ..... 11: sys_enter: NR 3 (1, 2, 3, 4, 5, 6)",
        "     netd-21      [000] ..... 12: cap_capable: cred 0, target_ns 0, capable_ns 0, cap 12, ret 0",
    ];
    for line in lines {
        follower.event(&Event::parse(line).unwrap());
    }
    let calls = [(3, [0; 6]), (46, [0, 0xff, 0, 0, 0, 0])];
    assert_eq!(follower.seen.calls, BTreeMap::from([("netd", BTreeSet::from(calls))]));
    assert_eq!(follower.seen.capabilities, BTreeMap::from([("netd", BTreeSet::from([12]))]));
    // What is known is asked for no more; that whose arguments matter is.
    assert!(follower.learnt() && !follower.learnt());
    assert!(follower.asks(4000).contains(r#"(comm == "netd"&&id!=3)"#), "{}", follower.asks(4000));
    assert!(follower.asks(0).contains(all), "what has no place is left out");
}

#[test]
fn what_the_kernel_lost_is_no_event() {
    assert!(Event::parse("CPU:1 [LOST 42 EVENTS]").is_none());
}

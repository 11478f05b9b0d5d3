//! What the guest's processes have, as one sees it who is in the guest: by the container `hyperstart`, which
//! is the guest itself.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::{Duration, Instant};

use serde_json::json;

use super::guest::Guest;
use super::guest::processes::NAMES;

/// How much more memory of its own a process may have than when it was warm, in kB.
const GROWTH_MAX: i64 = 256;
/// How much less of the VM may be available, in kB: a container's share of the kernel's caches comes and
/// goes.
const LOSS_MAX: i64 = 16 << 10;
/// execd closes what is left of a process a second later, and a dying process takes a moment.
const SETTLES: Duration = Duration::from_secs(20);

/// Of each process: its number, descriptors, threads, and kB: RSS, PSS, and what is of no file. Then of the
/// VM, in kB: available memory, shared memory, the kernel's own that it cannot give back; then mounts of
/// init's namespace, and processes.
const SCRIPT: &str = r#"b=/bin/busybox
for p in /proc/[0-9]*; do
    { read name <$p/comm; } 2>/dev/null || continue
    [ -n "$($b readlink $p/exe)" ] || continue
    all=$((all + 1))
    case $name in init|warden|netd|mountd|execd|streamd|podinit) ;; *) continue ;; esac
    echo $name ${p#/proc/} $($b ls $p/fd | $b wc -l) $($b ls $p/task | $b wc -l) $($b awk '/^(Rss|Pss|Anonymous):/ { print $2 }' $p/smaps_rollup)
done
echo vm $($b awk '/^(MemAvailable|SUnreclaim|Shmem):/ { print $2 }' /proc/meminfo) $($b wc -l </proc/1/mountinfo) $all"#;

/// One reading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figures {
    processes: BTreeMap<String, [i64; 6]>,
    /// Available, shared and the kernel's memory, mounts, processes.
    vm: [i64; 5],
}

impl Figures {
    /// Reads them now.
    pub fn read(guest: &Guest) -> Figures {
        let outcome = guest.exec("hyperstart", &["/bin/busybox", "sh", "-c", SCRIPT], json!({})).outcome();
        assert_eq!((outcome.status, outcome.stderr.as_str()), (0, ""), "{}", outcome.stdout);
        let mut figures = Figures { processes: BTreeMap::new(), vm: [0; 5] };
        for line in outcome.stdout.lines() {
            let mut words = line.split_whitespace();
            let name = words.next().unwrap();
            let numbers: Vec<i64> = words.map(|word| word.parse().unwrap()).collect();
            if name == "vm" {
                figures.vm = numbers.try_into().unwrap();
            } else {
                let old = figures.processes.insert(name.to_owned(), numbers.try_into().unwrap());
                assert_eq!(old, None, "two processes of one name\n{}", outcome.stdout);
            }
        }
        assert!(NAMES.iter().all(|name| figures.processes.contains_key(*name)), "{}", outcome.stdout);
        figures
    }

    /// Reads them as soon as nothing ends any more.
    pub fn settled(guest: &Guest) -> Figures {
        let deadline = Instant::now() + SETTLES;
        let mut last = Figures::read(guest);
        loop {
            // What is closed a second later is seen to be.
            std::thread::sleep(Duration::from_millis(1500));
            let now = Figures::read(guest);
            if now.counts() == last.counts() || Instant::now() > deadline {
                return now;
            }
            last = now;
        }
    }

    /// Reads them until they are flat, or it is too late for that.
    pub fn settles_to(guest: &Guest, before: &Figures) -> Figures {
        let deadline = Instant::now() + SETTLES;
        loop {
            let now = Figures::settled(guest);
            if now.grown_since(before).is_empty() || Instant::now() > deadline {
                return now;
            }
        }
    }

    /// What must be the same to the last one: numbers of processes, descriptors, threads; mounts, processes.
    fn counts(&self) -> (Vec<[i64; 3]>, [i64; 2]) {
        let [.., mounts, processes] = self.vm;
        let each = self.processes.values().map(|&[pid, fds, threads, ..]| [pid, fds, threads]);
        (each.collect(), [mounts, processes])
    }

    /// What is not flat, in words.
    pub fn grown_since(&self, before: &Figures) -> Vec<String> {
        let mut grown = Vec::new();
        if self.counts() != before.counts() {
            grown.push(format!("{:?} before, {:?} after", before.counts(), self.counts()));
        }
        for (name, figures) in &self.processes {
            let more = figures[5] - before.processes[name][5];
            if more > GROWTH_MAX {
                grown.push(format!("{name}: {more} kB more"));
            }
        }
        if before.vm[0] - self.vm[0] > LOSS_MAX {
            grown.push(format!("the VM: {:?} before, {:?} after", before.vm, self.vm));
        }
        grown
    }

    /// In a line: memory of their own by process, and the VM's.
    pub fn line(&self) -> String {
        let mut line = String::new();
        for name in NAMES {
            let [_, fds, threads, .., own] = self.processes[name];
            let _ = write!(line, "{name} {own} kB {fds} fds {threads} thr; ");
        }
        let _ = write!(line, "{} kB available", self.vm[0]);
        line
    }

    /// Two readings as a table.
    pub fn beside(&self, after: &Figures) -> String {
        let mut table =
            "| | fds | threads | RSS kB | PSS kB | own kB |\n|---|---|---|---|---|---|\n".to_owned();
        let mut row = |name: &str, before: &[i64], after: &[i64]| {
            let _ = write!(table, "| {name} |");
            for (before, after) in before.iter().zip(after) {
                let _ = write!(table, " {before} → {after} |");
            }
            table.push('\n');
        };
        for name in NAMES {
            row(name, &self.processes[name][1..], &after.processes[name][1..]);
        }
        let mut text = table;
        let words = ["kB available", "kB shared", "kB of the kernel's", "mounts", "processes"];
        for ((word, before), after) in words.iter().zip(self.vm).zip(after.vm) {
            let _ = writeln!(text, "the VM: {before} → {after} {word}");
        }
        text
    }
}

//! What must be as before: PID 1, what it has, and the pod.

use std::fs;

use serde_json::json;

use super::guest::processes::{process, status};
use super::guest::{Guest, Running};

/// How much PID 1 may have grown, in kB.
const GROWTH_MAX: u64 = 1024;

/// PID 1 as it was, and somebody in the pod who answers.
pub struct Witness<'a> {
    guest: &'a Guest,
    pub init: i32,
    memory: u64,
    descriptors: usize,
    talker: Running<'a>,
    asked: u32,
}

impl<'a> Witness<'a> {
    /// A pod with a container `main` has to be there.
    pub fn new(guest: &'a Guest) -> Witness<'a> {
        let script = "while read line; do echo $line; done; exit 7";
        let talker = guest.exec("main", &["sh", "-c", script], json!({}));
        let init = process(guest, "init", None);
        let mut witness = Witness { guest, init, memory: 0, descriptors: 0, talker, asked: 0 };
        witness.talks();
        (witness.memory, witness.descriptors) = (memory(init), descriptors(init));
        witness
    }

    /// What the code of PID 1 needs once, it has: counts from now on.
    pub fn settle(&mut self) {
        self.memory = memory(self.init);
    }

    fn talks(&mut self) {
        self.asked += 1;
        let line = format!("{}\n", self.asked);
        self.talker.streams.stdin.write(line.as_bytes()).unwrap();
        self.talker.read_until(&line);
    }

    /// Nothing has changed, but that PID 1 has closed some descriptors for good.
    pub fn checks_with_fewer(&mut self, after: &str, closed: usize) {
        self.descriptors -= closed;
        self.checks(after, true);
    }

    /// Whether PID 1 has more than [`Witness::settle`] saw.
    pub fn has_grown(&self) -> bool {
        memory(self.init).saturating_sub(self.memory) >= GROWTH_MAX
    }

    /// Nothing has changed. A new streamd has not the stdin of what ran before.
    pub fn checks(&mut self, after: &str, streamd_lives: bool) {
        assert_eq!(process(self.guest, "init", None), self.init, "{after}: another PID 1");
        let now = memory(self.init);
        assert!(!self.has_grown(), "{after}: PID 1 has grown from {} to {now} kB", self.memory);
        let threads = fs::read_dir(format!("/proc/{}/task", self.init)).unwrap().count();
        assert_eq!(threads, 1, "{after}: threads of PID 1");
        // The pod init logs by the channel of the execd that has started it, which PID 1 keeps when that is
        // gone.
        let more = descriptors(self.init).checked_sub(self.descriptors);
        assert!(matches!(more, Some(0 | 1)), "{after}: descriptors of PID 1: {more:?} more");
        if streamd_lives {
            self.talks();
        }
    }

    /// The process that was there from the beginning ends as it should.
    pub fn ends(self) {
        assert_eq!(self.talker.outcome().status, 7);
    }
}

/// What PID 1 has for itself, in kB: not the pages of its program.
fn memory(init: i32) -> u64 {
    let kilobytes = |key| -> u64 { status(init, key).trim_end_matches(" kB").parse().unwrap() };
    kilobytes("RssAnon") + kilobytes("RssShmem")
}

fn descriptors(init: i32) -> usize {
    fs::read_dir(format!("/proc/{init}/fd")).unwrap().count()
}

//! A soak: mixed load in a VM for a while, and every process of the guest has as much memory and as many
//! descriptors and threads afterwards as it had when it was warm. The workers are those of tests/kills, but
//! nobody dies.
//!
//! `SOAK` says how many seconds (`make soak`: half an hour), `KILLS_SEED` runs the same choices again.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's panic is its report")]

#[allow(dead_code)] // its victims are tests/kills'
#[path = "../kills/driver.rs"]
mod driver;
mod figures;
#[path = "../guest/mod.rs"]
mod guest;
#[allow(dead_code)]
#[path = "../kills/killer.rs"]
mod killer;
#[path = "../kills/random.rs"]
mod random;
#[allow(dead_code)]
#[path = "../kills/work.rs"]
mod work;

use std::io::Write;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use driver::Counts;
use figures::Figures;
use guest::{Guest, Kind, PATIENCE, Running, kill};
use hyperinit::command::Command;
use hyperinit_client::{Client, ProcessStreams};
use random::Random;
use serde_json::json;
use work::Worker;

/// How many seconds there are in every `make test`.
const SHORT: u64 = 40;
/// A fifth of the time is for what the code needs once, has, and keeps; more, where a busy machine has not
/// started so many processes in it.
const WARM_UP: u32 = 5;
const WARM: u64 = 120;
/// The largest file, in bytes: half of the largest size in random.rs.
const LARGEST: usize = 200_000;
/// How many containers come and go at once.
const WORKERS: u64 = 3;
/// After so long all of them end, the host leaves and comes back, and the figures are read.
const PHASE: Duration = Duration::from_secs(60);
/// How much a process writes while its host leaves, in lines.
const LINES: u32 = 30_000;

fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// A number from the environment.
fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[test]
fn a_guest_has_no_more_after_a_soak_than_when_it_was_warm() {
    let seed = variable("KILLS_SEED").unwrap_or_else(random::seed);
    say(&format!("KILLS_SEED={seed}"));
    let asked = variable("SOAK");
    let length = Duration::from_secs(asked.unwrap_or(SHORT));
    let directory = guest::scratch();
    let image = guest::image::with_busybox(&directory);
    let mut guest = Guest::boot_up(Kind::Vm, "hyper_debug", &["--initrd", image.to_str().unwrap()]);
    if asked.is_some() {
        guest.live_on();
    }
    driver::start_pod(&guest);
    let mut soak = Soak { guest, random: Random(seed), counts: Counts::default(), returns: 0 };

    let start = Instant::now();
    while start.elapsed() < length / WARM_UP || soak.counts.processes.load(Ordering::Relaxed) < WARM {
        soak.load(Instant::now() + length / WARM_UP);
    }
    soak.largest();
    let warm_up = start.elapsed();
    let before = Figures::settled(&soak.guest);
    let (start, rest) = (Instant::now(), length - length / WARM_UP);
    while start.elapsed() < rest {
        soak.load(start + rest.min(start.elapsed() + PHASE));
        let now = Figures::settled(&soak.guest);
        say(&format!("after {} s: {}", (warm_up + start.elapsed()).as_secs(), now.line()));
    }
    let after = Figures::settles_to(&soak.guest, &before);
    soak.counts.seconds.store((warm_up + start.elapsed()).as_secs(), Ordering::Relaxed);
    say(&format!("{}, the host left {} times\n{}", soak.counts, soak.returns, before.beside(&after)));
    assert_eq!(soak.counts.errors.load(Ordering::Relaxed), 0, "an ERROR, and nobody has died");
    let grown = after.grown_since(&before);
    assert!(grown.is_empty(), "{grown:#?}\n{}", soak.guest.log());

    soak.guest.call(Command::DestroyPod);
    assert!(soak.guest.wait_for_end().success());
    std::fs::remove_dir_all(directory).unwrap();
}

/// A guest, what is done to it, and what there was.
struct Soak {
    guest: Guest,
    random: Random,
    counts: Counts,
    returns: u32,
}

impl Soak {
    /// What is largest of what the workers do: buffers grow to it, and how soon its turn comes by itself is
    /// chance.
    fn largest(&mut self) {
        let mut worker = Worker::new(&self.guest, &self.counts, Random(self.random.next()), 1);
        let container = worker.settle();
        worker.write_and_read(LARGEST);
        worker.leave(container);
    }

    /// Containers come and go until then; a host leaves in the middle of output.
    fn load(&mut self, until: Instant) {
        let (guest, counts) = (&self.guest, &self.counts);
        std::thread::scope(|scope| {
            for number in 1..=WORKERS {
                let mut worker = Worker::new(guest, counts, Random(self.random.next()), number);
                scope.spawn(move || {
                    let over = || Instant::now() >= until;
                    while !over() {
                        worker.round(&over);
                    }
                });
            }
        });
        self.leave_and_return();
        // What the workers wrote is the share's, which is on this machine.
        let files = std::fs::read_dir(self.guest.share.join("image/rootfs/tmp")).unwrap().flatten();
        files.for_each(|file| std::fs::remove_file(file.path()).unwrap());
    }

    /// A host that comes back gets what its processes have written meanwhile, and their ends.
    fn leave_and_return(&mut self) {
        // Numbers far from the workers'.
        let stdio = 500_000_000 + 2 * u64::from(self.returns);
        let script = format!("read word; seq {LINES}; read word; exit 6");
        let more = json!({"process": {"stdio": stdio, "stderr": stdio + 1}});
        let running = self.guest.container("writer", &["sh", "-c", &script], more);
        running.streams.stdin.write(b"go\n").unwrap();
        running.read_until("\n100\n");
        let Running { container, process, .. } = running;
        let logged = self.guest.log().len();
        self.guest.hang_up();
        // One that is back before the guest has looked was never away: docs/streams.md.
        self.guest.wait_for_log(logged, "the host has left the control port");
        self.guest.wait_for_log(logged, "the host has left the stream port");
        let (client, mut streams) = Client::resume(&self.guest.at(), &[(stdio, stdio + 1)]).unwrap();
        self.guest.be(client);
        let streams: ProcessStreams = streams.pop().unwrap();
        streams.stdin.write(b"end\n").unwrap();
        let text = streams.stdout.read_to_end(PATIENCE).unwrap();
        assert!(String::from_utf8(text).unwrap().ends_with(&format!("\n{}\n{LINES}\n", LINES - 1)));
        assert_eq!(self.guest.client().finished(&container, &process, PATIENCE).unwrap(), 6);
        assert!(self.guest.refused(kill("writer", 9)).contains("writer"));
        self.guest.remove("writer");
        self.returns += 1;
    }
}

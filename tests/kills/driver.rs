//! A guest, its workers, and who kills beside them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use hyperinit::command::Command;
use hyperinit_client::CallError;
use serde_json::json;

use super::guest::{Guest, Kind, parse};
use super::killer::Killer;
use super::random::Random;
use super::work::Worker;

/// How many hosts' worth of work there is at once.
const WORKERS: u64 = 4;
/// How much text there is, in bytes.
const PATTERN_SIZE: usize = 512 << 10;

/// What processes write: numbered lines, so that no part can be lost, doubled or exchanged unseen.
pub static PATTERN: LazyLock<Vec<u8>> =
    LazyLock::new(|| (0..PATTERN_SIZE / 16).flat_map(|line| format!("{line:015}\n").into_bytes()).collect());

/// As a tty puts it.
pub fn crlf(text: &[u8]) -> Vec<u8> {
    text.iter().flat_map(|&byte| if byte == b'\n' { vec![b'\r', b'\n'] } else { vec![byte] }).collect()
}

/// What there was.
#[derive(Default)]
pub struct Counts {
    kills: Mutex<BTreeMap<&'static str, u64>>,
    pub containers: AtomicU64,
    pub processes: AtomicU64,
    pub bytes: AtomicU64,
    pub replies: AtomicU64,
    pub errors: AtomicU64,
    stdins: AtomicU64,
    cut: AtomicU64,
    /// When, in deaths of streamd, a stdin was whole: from there on it is known where the host is in its
    /// frames.
    whole_at: AtomicU64,
    pub seconds: AtomicU64,
}

impl Counts {
    /// Ends a helper; nobody counts meanwhile.
    pub fn kill(&self, name: &'static str, kill: impl FnOnce()) {
        let mut kills = self.kills.lock().unwrap();
        kill();
        *kills.entry(name).or_default() += 1;
    }

    pub fn deaths_of_streamd(&self) -> u64 {
        self.kills.lock().unwrap().get("streamd").copied().unwrap_or_default()
    }

    /// A process's stdin has ended. Without a death since another's was whole, this one's must be.
    pub fn fed(&self, deaths_before: u64, whole: bool) {
        let now = self.deaths_of_streamd();
        let known = self.whole_at.load(Ordering::SeqCst) == now && deaths_before == now;
        assert!(whole || !known, "stdin was cut, and streamd has lived");
        if whole && deaths_before == now {
            self.whole_at.store(now, Ordering::SeqCst);
        }
        self.stdins.fetch_add(1, Ordering::Relaxed);
        self.cut.fetch_add(u64::from(!whole), Ordering::Relaxed);
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let kills = self.kills.lock().unwrap();
        let all: u64 = kills.values().sum();
        write!(f, "{all} kills {kills:?} in {} s: ", get(&self.seconds))?;
        write!(f, "{} containers, {} processes, ", get(&self.containers), get(&self.processes))?;
        write!(f, "{} bytes of output, ", get(&self.bytes))?;
        write!(f, "{} replies ({} of them ERROR), ", get(&self.replies), get(&self.errors))?;
        write!(f, "{} of {} stdins cut", get(&self.cut), get(&self.stdins))
    }
}

/// A pod with what the workers need.
pub fn start_pod(guest: &Guest) {
    std::fs::write(guest.share.join("image/rootfs/pattern"), &**PATTERN).unwrap();
    // White lists: containers have ports, and netd has work.
    let lists = json!({"internalNetworks": ["10.1.0.0/16"], "externalNetworks": ["10.2.0.0/16"]});
    let pod = json!({"hostname": "pod-1", "shareDir": "share_dir", "portmappingWhiteLists": lists});
    guest.call(Command::StartPod(Box::new(parse(pod))));
}

/// A guest and what is done to it.
pub struct Driver {
    guest: Guest,
    random: Random,
}

/// Says that a worker is gone, also if it panicked.
struct Gone<'a>(&'a AtomicBool);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// How many kills there are in every `make test`.
pub const FEW: u64 = 100;

impl Driver {
    pub fn new(random: Random) -> Driver {
        let guest = Guest::boot(Kind::Local);
        start_pod(&guest);
        Driver { guest, random }
    }

    /// So many kills.
    pub fn run(mut self, kills: u64) -> Counts {
        if kills > FEW {
            self.guest.live_on();
        }
        let (counts, over, start) = (Counts::default(), AtomicBool::new(false), Instant::now());
        let is_over = || over.load(Ordering::SeqCst);
        let guest = &self.guest;
        let mut silent = Vec::new();
        std::thread::scope(|scope| {
            let mut worker = |number| Worker::new(guest, &counts, Random(self.random.next()), number);
            let mut prober = worker(0);
            let container = prober.settle();
            let mut threads = Vec::new();
            for number in 1..=WORKERS {
                let mut worker = worker(number);
                let (over, is_over) = (&over, &is_over);
                threads.push(scope.spawn(move || {
                    let _gone = Gone(over);
                    while !is_over() {
                        worker.round(is_over);
                    }
                    worker.silent
                }));
            }
            let killer = Killer::new(guest, Random(self.random.next()), prober);
            let mut prober = killer.run(kills, &counts, &is_over);
            over.store(true, Ordering::SeqCst);
            for thread in threads {
                silent.extend(thread.join().unwrap());
            }
            prober.leave(container);
            silent.append(&mut prober.silent);
        });
        counts.seconds.store(start.elapsed().as_secs(), Ordering::Relaxed);
        self.end(silent);
        counts
    }

    /// Nothing is left over: no event, no reply, no byte of what failed to start; nobody was given up.
    fn end(self, silent: Vec<hyperinit_client::Output>) {
        let log = self.guest.log();
        assert!(!log.contains("died too often"), "{log}");
        match self.guest.client().event(Duration::ZERO) {
            Err(CallError::Late(_)) => {}
            other => panic!("{other:?}\n{log}"),
        }
        self.guest.call(Command::DestroyPod);
        for output in silent {
            assert!(
                !matches!(output.recv_within(Duration::ZERO), Ok(Some(_))),
                "output of what never started"
            );
            assert_eq!(output.eof_frames(), 0, "the end of what never started");
        }
        assert!(self.guest.wait_for_end().success());
    }
}

//! Who dies, when, and of what.

use std::time::{Duration, Instant};

use hyperinit::command::{Command, SetupRoute};
use hyperinit_client::CallError;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use super::driver::Counts;
use super::guest::processes::processes;
use super::guest::{Guest, PATIENCE};
use super::random::Random;
use super::work::{self, Worker};

/// The helpers.
pub const ROLES: [&str; 4] = ["netd", "mountd", "execd", "streamd"];
/// kill -9, abort, a forbidden system call, and what one ends a program by.
pub const SIGNALS: [Signal; 4] = [Signal::SIGKILL, Signal::SIGABRT, Signal::SIGSYS, Signal::SIGTERM];
/// init closes a helper after eight deaths between which it has answered nothing and not lived for a minute
/// (src/init/lifecycle.rs). After so many, something is asked of it first: a host that uses its guest does as
/// much.
const IN_A_ROW: u32 = 5;

/// Ends helpers.
pub struct Killer<'a> {
    guest: &'a Guest,
    random: Random,
    /// By role: deaths since it is known to have answered, and who died last.
    in_a_row: [u32; 4],
    last: [i32; 4],
    /// Asks the helpers something.
    prober: Worker<'a>,
}

impl<'a> Killer<'a> {
    /// `prober` has a container of its own that nobody else ends.
    pub fn new(guest: &'a Guest, random: Random, prober: Worker<'a>) -> Killer<'a> {
        Killer { guest, random, in_a_row: [0; 4], last: [0; 4], prober }
    }

    /// Ends some helpers, and goes on until `over`.
    pub fn run(mut self, kills: u64, counts: &Counts, over: &dyn Fn() -> bool) -> Worker<'a> {
        let mut done = 0;
        while done < kills && !over() {
            self.pause();
            // Now and then several at once.
            let victims = if self.random.once_in(8) { 1 + self.random.below(4) } else { 1 };
            for _ in 0..victims {
                let role = self.random.below(4) as usize;
                done += u64::from(self.end(role, counts));
            }
        }
        self.prober
    }

    /// Random moments: some in the middle of a restart, some in the middle of work.
    fn pause(&mut self) {
        let limit = self.random.one_of(&[1, 3_000, 20_000, 200_000]);
        let until = Instant::now() + Duration::from_micros(self.random.below(limit));
        std::thread::sleep(until.saturating_duration_since(Instant::now()));
        self.random.spin(20_000);
    }

    /// Ends the helper of that role; false if there is none now.
    fn end(&mut self, role: usize, counts: &Counts) -> bool {
        if self.in_a_row[role] >= IN_A_ROW {
            self.have_answer(role);
        }
        let mut up = helpers(self.guest, ROLES[role]);
        up.retain(|&pid| pid != self.last[role]);
        if up.is_empty() {
            return false;
        }
        let pid = self.random.one_of(&up);
        let signal = self.random.one_of(&SIGNALS);
        self.last[role] = pid;
        self.in_a_row[role] += 1;
        counts.kill(ROLES[role], || kill_and_wait(pid, signal));
        true
    }

    /// Asks a helper until it answers.
    fn have_answer(&mut self, role: usize) {
        let nothing = || self.guest.client().send(Command::SetupRoute(SetupRoute { routes: Vec::new() }));
        match ROLES[role] {
            "netd" => while !answered(nothing().wait(PATIENCE)) {},
            "mountd" => self.prober.write_and_read(100),
            // Its ACK is execd's, its end streamd's.
            _ => self.prober.run_one(work::Plan::small(7)),
        }
        self.in_a_row[role] = 0;
    }
}

/// Ends a helper, and waits until it is dead.
pub fn kill_and_wait(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
    // A dead process has no descriptors.
    while std::fs::read_link(format!("/proc/{pid}/fd/2")).is_ok() {
        std::thread::yield_now();
    }
}

/// Whether it is an ACK; an ERROR that a death explains is none.
fn answered(reply: Result<Vec<u8>, CallError>) -> bool {
    match reply {
        Ok(payload) => {
            assert!(payload.is_empty(), "{payload:?}");
            true
        }
        Err(error) => {
            work::explained(&error);
            false
        }
    }
}

/// The helper of that name, if it is up.
pub fn helper(guest: &Guest, name: &str) -> Option<i32> {
    helpers(guest, name).first().copied()
}

/// The helpers of that name; of mountd there may be several. A process that execd has just cloned has its
/// name too, but is in the pod.
fn helpers(guest: &Guest, name: &str) -> Vec<i32> {
    let Some(own) = processes(guest, "init").first().and_then(|&init| depth(init)) else { return Vec::new() };
    processes(guest, name).into_iter().filter(|&pid| depth(pid) == Some(own)).collect()
}

/// In how many PID namespaces a process is.
fn depth(pid: i32) -> Option<usize> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    Some(line.split_whitespace().count())
}

/// The containers' ports, so that netd has work: one for each worker.
pub fn ports(number: u64) -> serde_json::Value {
    json!([{"hostPort": 20_000 + number, "containerPort": 80, "protocol": "tcp"}])
}

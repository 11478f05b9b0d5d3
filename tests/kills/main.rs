//! Helpers that die at any moment, under load: a driver starts containers and processes, checks every byte of
//! their output, their statuses and every reply, while a random helper is ended by a random signal, again and
//! again.
//!
//! What a death may cost is in docs/design.md «When things die»: the command in flight (ERROR, once, in its
//! turn), and with streamd the stdin of running processes. Everything else that is lost fails the test.
//!
//! `KILLS_SEED` runs the same choices again, as far as the machine's timing lets it; `KILLS` says how many
//! there are (`make kills`).

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's panic is its report")]

mod driver;
#[path = "../guest/mod.rs"]
mod guest;
mod killer;
mod pods;
mod random;
mod work;

use std::io::Write;

use driver::{Driver, FEW};
use random::Random;

/// A number from the environment.
fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Numbers of a seed that is said.
fn random() -> Random {
    let seed = variable("KILLS_SEED").unwrap_or_else(random::seed);
    let _ = writeln!(std::io::stderr(), "KILLS_SEED={seed}");
    Random(seed)
}

/// How many kills there are.
fn kills() -> u64 {
    variable("KILLS").unwrap_or(FEW)
}

#[test]
fn nothing_is_lost_whoever_dies() {
    let counts = Driver::new(random()).run(kills());
    let _ = writeln!(std::io::stderr(), "{counts}");
}

#[test]
fn a_pod_starts_or_does_not_whoever_dies() {
    pods::starts_or_does_not(random(), kills() / 5);
}

#[test]
fn a_pod_ends_in_order_whoever_dies() {
    let mut random = random();
    for _ in 0..kills() / 20 {
        pods::ends_in_order(Random(random.next()));
    }
}

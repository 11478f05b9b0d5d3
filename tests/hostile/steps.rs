//! Death at every step: a helper is followed call by call, and killed at each in turn.

use hyperinit_client::CallError;
use serde_json::json;

use super::answers;
use super::guest::followed::Followed;
use super::guest::processes::process;
use super::guest::{Guest, Kind};
use super::place::until;
use super::witness::Witness;

/// How many stops (two for each call) lie between one death and the next, where a helper comes up and in a
/// start. Odd, so that it dies before and after calls.
const STRIDE: usize = 17;
const STARTS_STRIDE: usize = 5;

#[test]
fn a_helper_that_dies_at_any_step_of_coming_up_has_a_successor() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    for name in ["netd", "mountd", "execd", "streamd"] {
        let mut deaths = 0;
        for stops in (0..).step_by(STRIDE) {
            let from = guest.log().len();
            let followed = Followed::successor(&guest, name);
            let up = format!("{name} is up as");
            let reached = followed.follow(stops, || guest.log()[from..].contains(&up));
            let born = followed.pid();
            followed.kill();
            process(&guest, name, Some(born));
            answers(&guest, name);
            witness.checks(&format!("{name} died after {reached} stops"), name != "streamd");
            if reached < stops {
                break;
            }
            deaths += 1;
        }
        assert!(deaths > 5, "{name} died {deaths} times");
    }
}

/// Runs a container to its end while a helper is followed and dies after so many stops. Whether it died over
/// it.
fn dies_over(guest: &Guest, name: &str, stops: usize) -> bool {
    let followed = Followed::running(guest, name);
    let old = followed.pid();
    let died = std::thread::scope(|scope| {
        let container = scope.spawn(|| {
            let started = guest.try_container("short", &["sh", "-c", "echo said; exit 3"], json!({}));
            match started {
                Ok(running) => {
                    let outcome = running.end();
                    assert_eq!((outcome.stdout.as_str(), outcome.status), ("said\n", 3), "{name}, {stops}");
                    guest.remove("short");
                }
                Err(CallError::Refused(text)) if name != "streamd" => {
                    assert!(text.contains(&format!("{name}: it died before it answered")), "{text}");
                }
                Err(error) => panic!("{name}, {stops}: {error}"),
            }
        });
        let reached = followed.follow(stops, || container.is_finished());
        if reached == stops {
            followed.kill();
        } else {
            followed.leave();
        }
        if let Err(panic) = container.join() {
            std::panic::resume_unwind(panic);
        }
        reached == stops
    });
    if died {
        process(guest, name, Some(old));
    }
    died
}

#[test]
fn a_helper_that_dies_at_any_step_of_a_start_costs_that_start_at_most() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let processes = || guest.says("main", "ls -d /proc/[0-9]* | wc -l");
    let before = processes();
    let mut witness = Witness::new(&guest);
    for name in ["mountd", "execd", "streamd"] {
        let mut deaths = 0;
        for stops in (1..).step_by(STARTS_STRIDE) {
            if !dies_over(&guest, name, stops) {
                break;
            }
            answers(&guest, name);
            witness.checks(&format!("{name} died after {stops} stops"), name != "streamd");
            deaths += 1;
        }
        assert!(deaths > 10, "{name} died {deaths} times");
    }
    // What execd had made and not told of leaves by itself, and the witness's process with its stdin.
    until(&guest, "somebody is left", || (processes() == before).then_some(()));
}

#[test]
fn a_helper_that_does_not_come_up_is_killed() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let from = guest.log().len();
    let followed = Followed::successor(&guest, "netd");
    let born = followed.pid();
    // Its last sign of life is that it executes; then it stands still.
    followed.follow(40, || false);
    guest.wait_for_log(from, "netd is killed: it does not come up");
    followed.kill();
    process(&guest, "netd", Some(born));
    answers(&guest, "netd");
    witness.checks("a helper that did not come up", true);
}

//! Helpers that lie: bytes, descriptors and silence on each of init's edges from a process in the helper's
//! place.
//!
//! A helper of a guest in namespaces is stopped, and the test speaks through the ends of its sockets: the
//! guest is the product as it is, and is not changed for this. Root's CAP_SYS_PTRACE is what lets the test
//! have the sockets.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod between;
mod filters;
#[path = "../guest/mod.rs"]
mod guest;
mod lies;
mod log;
mod meaning;
mod place;
mod steps;
mod warden;
mod witness;

use guest::processes::process;
use guest::{Guest, Kind, refusal};
use hyperinit::command::Command;
use lies::Lie;
use nix::errno::Errno;
use place::Place;
use serde_json::json;
use witness::Witness;

/// Has the role answer something, so that its deaths are not in a row.
fn answers(guest: &Guest, name: &str) {
    match name {
        "netd" => {
            let routes = json!({"routes": [{"dest": "198.51.100.0/24", "device": "no-such-link"}]});
            let route = Command::SetupRoute(guest::parse(routes));
            assert!(guest.refused(route).contains("netd"));
        }
        "mountd" => assert_eq!(guest.container_says("short", "echo short", json!({})), "short\n"),
        _ => assert_eq!(guest.says("main", "echo new"), "new\n"),
    }
}

/// The helper is named with its lie, it is replaced, and everything else is as it was.
fn is_found_out(
    guest: &Guest,
    witness: &mut Witness<'_>,
    name: &str,
    place: Place,
    from: usize,
    lie: (&str, &str),
) {
    let (what, blame) = lie;
    guest.wait_for_log(from, &format!("{name} is killed: "));
    let log = guest.log();
    let line = log[from..].lines().find(|line| line.contains("is killed: ")).unwrap();
    assert!(line.contains(&format!("init: {name} is killed: ")) && line.contains(blame), "{what}: {line}");
    process(guest, name, Some(place.pid));
    answers(guest, name);
    // The liar's friends still have its end.
    witness.checks(what, name != "streamd");
}

/// Every lie of the form, from a process in the helper's place.
fn lies_to_init(name: &str) {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let all = [lies::forms(), lies::descriptors(), lies::messages(), lies::words()];
    for (number, lie) in all.into_iter().flatten().enumerate() {
        let from = guest.log().len();
        let place = Place::take(&guest, name);
        lie.tell(&place);
        let Lie { name: what, blame, .. } = &lie;
        is_found_out(&guest, &mut witness, name, place, from, (what, blame));
        if number == 0 {
            witness.settle();
        }
    }
    if name != "streamd" {
        witness.ends();
    }
}

#[test]
fn netds_lies_harm_nobody_and_are_named() {
    lies_to_init("netd");
}

#[test]
fn mountds_lies_harm_nobody_and_are_named() {
    lies_to_init("mountd");
}

#[test]
fn execds_lies_harm_nobody_and_are_named() {
    lies_to_init("execd");
}

#[test]
fn streamds_lies_harm_nobody_and_are_named() {
    lies_to_init("streamd");
}

#[test]
fn a_stream_of_replies_without_end_ends_with_the_first() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    for name in ["netd", "mountd", "execd", "streamd"] {
        let from = guest.log().len();
        let place = Place::take(&guest, name);
        let mut said = 0_u64;
        loop {
            match place.say(&lies::reply(said, lies::DONE), &[]) {
                Ok(()) => said += 1,
                Err(Errno::EAGAIN) => place.wait_to_say(),
                // Nobody listens any more.
                Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ECONNREFUSED) => break,
                Err(errno) => panic!("{errno}"),
            }
        }
        is_found_out(&guest, &mut witness, name, place, from, (name, "which is no request under way"));
    }
}

#[test]
fn a_liar_that_lies_again_and_again_is_closed() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    for _ in 0..8 {
        let from = guest.log().len();
        let place = Place::take(&guest, "netd");
        // An answer, but to nothing: it does not count as one.
        place.say(&lies::reply(1, lies::DONE), &[]).unwrap();
        guest.wait_for_log(from, "netd is gone");
    }
    guest.await_log("netd died too often: it is closed for a while");
    let routes = json!({"routes": [{"dest": "198.51.100.0/24", "device": "lo"}]});
    let text = refusal(guest.client().call(Command::SetupRoute(guest::parse(routes))));
    assert!(text.contains("netd: it died too often: it is closed"), "{text}");
    answers(&guest, "execd");
    answers(&guest, "mountd");
    assert_eq!(guest.log().matches("netd is up as").count(), 8, "{}", guest.log());
}

//! Lies in the warden's place: it starts the helpers, and is not believed either.

use std::os::fd::{AsFd, OwnedFd};

use hyperinit::ids::Pid;
use hyperinit::wire::warden::Reply;
use hyperinit::wire::{Instance, Role};
use nix::sys::signal::{Signal, kill};

use super::answers;
use super::guest::processes::{kill_hard, process, status};
use super::guest::{Guest, Kind, kill as kill_command};
use super::place::{Place, until};
use super::witness::Witness;

fn files(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
}

/// Puts it back to work.
fn resume(place: Place) {
    kill(nix::unistd::Pid::from_raw(place.pid), Signal::SIGCONT).unwrap();
}

#[test]
fn a_lie_of_the_wardens_is_named_and_the_next_helper_comes_up() {
    let spawned =
        |role, pid| Reply::Spawned { helper: Instance::first(role), pid: Pid(pid) }.encode().to_vec();
    let lies: [(&str, Vec<u8>, usize, &str); 11] = [
        ("empty", vec![], 0, "an empty packet"),
        ("short", vec![0, 0], 0, "a packet of 2 bytes"),
        ("long", vec![0; 6], 0, "a packet of 6 bytes"),
        ("longer", vec![0; 100_000], 0, "longer than any"),
        ("another role", vec![99, 0, 0, 0, 9], 3, "none of its words"),
        ("PID 1", vec![0, 0, 0, 0, 1], 3, "none of its words"),
        ("a negative number", vec![0, 255, 255, 255, 255], 3, "none of its words"),
        ("without sockets", spawned(Role::Netd, 3), 0, "0 descriptors"),
        ("one socket", spawned(Role::Netd, 3), 1, "1 descriptors"),
        ("two", spawned(Role::Netd, 3), 2, "2 descriptors"),
        ("many", spawned(Role::Netd, 3), 250, "longer than any"),
    ];
    // So many, and it is not heard any more.
    for lies in lies.chunks(6) {
        let guest = Guest::with_pod(Kind::Local);
        let _main = guest.sleeper("main");
        let mut witness = Witness::new(&guest);
        for (what, packet, fds, blame) in lies {
            let from = guest.log().len();
            let place = Place::take(&guest, "warden");
            let files = files(*fds);
            place.say(packet, &files.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
            guest.wait_for_log(from, "the warden lied: ");
            let log = guest.log();
            let line = log[from..].lines().find(|line| line.contains("the warden lied")).unwrap();
            assert!(line.contains(blame), "{what}: {line}");
            resume(place);
            let old = process(&guest, "netd", None);
            kill_hard(old);
            process(&guest, "netd", Some(old));
            answers(&guest, "netd");
            witness.checks(what, true);
        }
        witness.ends();
    }
}

#[test]
fn the_warden_cannot_have_another_process_taken_for_a_helper() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let inside =
        |pid| -> i32 { status(pid, "NSpid").split_ascii_whitespace().nth(1).unwrap().parse().unwrap() };
    let execd = process(&guest, "execd", None);
    for (what, name, pid) in [
        ("nobody asked", Role::Netd, execd),
        ("a helper", Role::Execd, process(&guest, "streamd", None)),
        ("the pod init", Role::Execd, process(&guest, "podinit", None)),
        ("itself", Role::Execd, process(&guest, "warden", None)),
    ] {
        let from = guest.log().len();
        let place = Place::take(&guest, "warden");
        if name == Role::Execd {
            // Now init waits for one.
            let old = process(&guest, "execd", None);
            kill_hard(old);
            guest.wait_for_log(from, "execd is gone");
        }
        let files = files(3);
        let packet = Reply::Spawned { helper: Instance::first(name), pid: Pid(inside(pid)) }.encode();
        place.say(&packet, &files.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
        guest.wait_for_log(from, &format!("the warden lied: nobody asked for {name} as {}", inside(pid)));
        resume(place);
        until(&guest, "no execd", || {
            guest.log()[from..].contains("execd is up").then_some(()).or((name == Role::Netd).then_some(()))
        });
        answers(&guest, "execd");
        witness.checks(what, true);
    }
    witness.ends();
}

#[test]
fn sockets_that_are_none_are_a_lie_and_the_helper_is_started_again() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let from = guest.log().len();
    let place = Place::take(&guest, "warden");
    kill_hard(process(&guest, "netd", None));
    guest.wait_for_log(from, "netd is gone");
    // A process that is init's child and nobody's: a helper of before would do, if there were one.
    let files = files(3);
    let packet = Reply::Spawned { helper: Instance::first(Role::Netd), pid: Pid(i32::MAX) }.encode();
    place.say(&packet, &files.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
    guest.wait_for_log(from, "the warden lied: nobody asked for netd");
    resume(place);
    guest.wait_for_log(from, "netd is up");
    answers(&guest, "netd");
    witness.checks("no sockets", true);
    witness.ends();
}

#[test]
fn a_warden_that_lies_without_end_is_not_heard_any_more() {
    lies_without_end(&[1]);
}

/// Each is a word of its own, that nobody has asked for.
#[test]
fn a_warden_that_refuses_without_end_is_not_heard_any_more() {
    lies_without_end(&Reply::Failed { helper: Instance::first(Role::Netd) }.encode());
}

fn lies_without_end(packet: &[u8]) {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let place = Place::take(&guest, "warden");
    while place.say(packet, &[]).is_ok() {}
    guest.await_log("the warden lied too often");
    assert_eq!(guest.log().matches("the warden lied: ").count(), 8);
    answers(&guest, "execd");
    answers(&guest, "mountd");
    answers(&guest, "netd");
    witness.checks_with_fewer("the warden is not heard", 2);
    witness.ends();
    guest.call(kill_command("main", 9));
    assert_eq!(main.outcome().status, 137);
    resume(place);
}

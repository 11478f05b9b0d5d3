//! Replies of the right form, to a request that is under way, that cannot be meant: and no reply at all.

use hyperinit::frame::Message;
use hyperinit_client::{CallError, Pending};
use nix::sys::signal::Signal;
use serde_json::json;

use super::guest::processes::{process, status};
use super::guest::{Guest, Kind, PATIENCE, parse_exec, refusal};
use super::is_found_out;
use super::lies::{DONE, part, refused, reply, started};
use super::place::Place;
use super::witness::Witness;

/// The number that a process has in the guest.
fn inside(pid: i32) -> i32 {
    // The machine's, the guest's, and of a process of the pod its own.
    status(pid, "NSpid").split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

/// The command that the helper has to be asked for something for.
fn ask(guest: &Guest, name: &str) -> Pending {
    let process = json!({"id": "asked", "args": ["true"], "stdio": 9001, "stderr": 9002});
    match name {
        "netd" => {
            // A successor, which is asked again, can only refuse it.
            let routes =
                json!({"routes": [{"dest": "198.51.100.0/24", "device": "no-such-link"}]}).to_string();
            guest.client().send_raw(Message::SetupRoute.id(), routes.as_bytes())
        }
        "mountd" => {
            let container = json!({"id": "asked", "image": "image", "rootfs": "rootfs", "process": process});
            guest.client().send_raw(Message::NewContainer.id(), container.to_string().as_bytes())
        }
        "reading mountd" => {
            let file = json!({"container": "main", "file": "/etc/passwd"}).to_string();
            guest.client().send_raw(Message::ReadFile.id(), file.as_bytes())
        }
        _ => guest.client().send(parse_exec("main", process)),
    }
}

/// The command fails, and its helper is replaced.
fn fails(pending: Pending) -> String {
    match pending.wait(PATIENCE) {
        Err(CallError::Refused(text)) => text,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_reply_that_cannot_be_meant_is_a_lie() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let to_another = "is one to another request";
    let lies: [(&str, &str, Vec<u8>, &str); 9] = [
        ("netd", "netd", vec![7], "no message of its edge"),
        ("mountd", "mountd", part(10, true), to_another),
        ("mountd", "reading mountd", DONE.to_vec(), to_another),
        ("mountd", "reading mountd", part(0, false), to_another),
        ("mountd", "reading mountd", part((64 << 10) + 1, true), to_another),
        ("mountd", "reading mountd", vec![2], to_another),
        ("execd", "execd", DONE.to_vec(), to_another),
        ("execd", "execd", vec![1], "no message of its edge"),
        ("execd", "execd", started(i32::MIN), "no child of init"),
    ];
    for (name, command, answer, blame) in lies {
        let from = guest.log().len();
        let place = Place::take(&guest, name);
        let pending = ask(&guest, command);
        place.say(&reply(place.request(), &answer), &[]).unwrap();
        let text = fails(pending);
        assert!(text.contains(name), "{text}");
        is_found_out(&guest, &mut witness, name, place, from, (command, blame));
    }
    // A number that is near the right one.
    for wrong in [-1_i64, 1, 1 << 32] {
        let from = guest.log().len();
        let place = Place::take(&guest, "execd");
        let pending = ask(&guest, "execd");
        let id = place.request().wrapping_add_signed(wrong);
        place.say(&reply(id, &started(5)), &[]).unwrap();
        fails(pending);
        is_found_out(&guest, &mut witness, "execd", place, from, ("another number", "execd"));
    }
    witness.ends();
    guest.finish(main);
}

#[test]
fn execd_cannot_pass_off_another_process_as_one_that_it_has_started() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let warden = process(&guest, "warden", None);
    let podinit = process(&guest, "podinit", None);
    let sleeper = std::fs::read_to_string(format!("/proc/{warden}/task/{warden}/children")).unwrap();
    assert!(sleeper.trim().is_empty(), "the warden has no children of its own");
    for name in ["nobody", "PID 1", "minus one", "warden", "netd", "streamd", "podinit"] {
        let (pid, blame) = match name {
            "nobody" => (4_000_000, "no child of init"),
            "PID 1" => (1, "no child of init"),
            "minus one" => (-1, "no child of init"),
            "warden" => (inside(warden), "which runs already"),
            "podinit" => (inside(podinit), "which runs already"),
            helper => (inside(process(&guest, helper, None)), "which is a helper"),
        };
        let from = guest.log().len();
        let place = Place::take(&guest, "execd");
        let pending = ask(&guest, "execd");
        place.say(&reply(place.request(), &started(pid)), &[]).unwrap();
        fails(pending);
        is_found_out(&guest, &mut witness, "execd", place, from, (name, blame));
    }
    witness.ends();
    guest.finish(main);
}

#[test]
fn a_second_answer_is_a_lie_and_the_first_one_counts() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let from = guest.log().len();
    let place = Place::take(&guest, "netd");
    let pending = ask(&guest, "netd");
    let id = place.request();
    for _ in 0..2 {
        place.say(&reply(id, DONE), &[]).unwrap();
    }
    pending.wait(PATIENCE).unwrap();
    is_found_out(&guest, &mut witness, "netd", place, from, ("twice", "which is no request under way"));
}

/// Starts are answered in any order: each once, and no other number.
#[test]
fn an_answer_to_a_start_that_is_not_under_way_is_a_lie_whatever_else_is() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let exec = |number: u64| {
        let id = format!("p{number}");
        let process =
            json!({"id": id, "args": ["true"], "stdio": 9001 + 2 * number, "stderr": 9002 + 2 * number});
        guest.client().send(parse_exec("main", process))
    };
    for (what, wrong) in [("again", 0), ("none", 100)] {
        let from = guest.log().len();
        let place = Place::take(&guest, "execd");
        let pending: Vec<Pending> = (0..3).map(exec).collect();
        let ids: Vec<u64> = (0..3).map(|_| place.request()).collect();
        place.say(&refused(ids[2]), &[]).unwrap();
        place.say(&reply(ids[2] + wrong, DONE), &[]).unwrap();
        let texts: Vec<String> = pending.into_iter().map(fails).collect();
        assert!(texts[0].contains("execd: it died") && texts[1].contains("execd: it died"), "{texts:?}");
        assert_eq!(texts[2], "test: failing it: no");
        is_found_out(&guest, &mut witness, "execd", place, from, (what, "which is no request under way"));
    }
    witness.ends();
    guest.finish(main);
}

#[test]
fn a_helper_that_is_silent_is_killed_and_named() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    for name in ["netd", "mountd", "execd"] {
        let from = guest.log().len();
        let place = Place::take(&guest, name);
        let text = refusal(ask(&guest, name).wait(PATIENCE));
        assert!(text.contains(name), "{text}");
        is_found_out(&guest, &mut witness, name, place, from, (name, "working on one request for too long"));
    }
}

#[test]
fn a_silent_streamd_is_killed_and_the_end_of_a_process_is_told() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let running = guest.exec("main", &["sh", "-c", "echo up; read x; exit 5"], json!({}));
    running.read_until("up\n");
    let from = guest.log().len();
    let place = Place::take(&guest, "streamd");
    running.signal(Signal::SIGKILL as i64);
    assert_eq!(running.end().status, 137);
    is_found_out(&guest, &mut witness, "streamd", place, from, ("silence", "does not answer"));
}

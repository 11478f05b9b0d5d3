//! What needs a guest of its own: its beginning, its end, and the hosts that come and go.

use std::io::Write;
use std::time::Duration;

use hyperinit::command::Command;
use hyperinit::frame::{self, Message};
use hyperinit::sandbox::{CapSet, ContainerProfile};
use hyperinit::spec::Pod;
use hyperinit::wire::Profile;
use serde_json::{Value, json};

use crate::guest::processes::status as status_of;
use crate::guest::{Guest, Kind, PATIENCE, parse, parse_exec, refusal};

fn start_pod(pod: Value) -> Command {
    Command::StartPod(Box::new(parse::<Pod>(pod)))
}

fn exec_json(stdio: u64, args: &[&str]) -> Vec<u8> {
    let process = json!({"id": format!("raw-{stdio}"), "args": args, "stdio": stdio, "stderr": stdio + 1});
    json!({"container": "main", "process": process}).to_string().into_bytes()
}

#[test]
fn a_pod_that_cannot_start_is_undone_and_a_better_one_starts() {
    let guest = Guest::boot(Kind::Local);
    let text = guest.refused(start_pod(json!({"hostname": "x\0y"})));
    assert!(text.contains("hostname") && text.contains("control character"), "{text}");
    let text = guest.refused(start_pod(json!({"hostname": "pod", "dns": ["1.1.1.1\nnameserver 2.2.2.2"]})));
    assert!(text.contains("dns"), "{text}");
    guest.start_pod();
    let main = guest.sleeper("main");
    assert_eq!(
        guest.says("main", "hostname; cat /etc/resolv.conf"),
        "pod-1\nnameserver 192.0.2.1\nsearch a.test\n"
    );
    guest.finish(main);
}

#[test]
fn the_privileged_profile_gives_more() {
    let guest = Guest::boot_with(Kind::Local, "hyper_profile=privileged");
    guest.start_pod();
    let main = guest.sleeper("main");
    guest.says("main", "mount -t tmpfs x /tmp && touch /tmp/x && umount /tmp");
    let status = guest.says("main", "cat /proc/self/status");
    // This machine may have fewer to give.
    let own = u64::from_str_radix(&status_of(std::process::id().cast_signed(), "CapPrm"), 16).unwrap();
    let granted = ContainerProfile::of(Profile::Privileged).unwrap().capabilities().intersection(CapSet(own));
    for key in ["CapPrm", "CapEff", "CapBnd"] {
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t")).unwrap();
        assert_eq!(CapSet(u64::from_str_radix(line, 16).unwrap()), granted, "{key}");
    }
    assert!(status.contains("Seccomp:\t2"), "{status}");
    assert_ne!(guest.sh("main", "reboot -f").status, 0, "the ceiling holds");
    guest.finish(main);
}

#[test]
fn the_debugging_door_is_closed() {
    let guest = Guest::with_pod(Kind::Local);
    let text = guest.refused(parse_exec("hyperstart", json!({"args": ["sh"], "stdio": 1, "stderr": 2})));
    assert!(text.contains("hyper_debug on the kernel cmdline opens it"), "{text}");
}

// ---- the end ----

#[test]
fn a_guest_without_a_pod_ends() {
    let guest = Guest::boot(Kind::Local);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

#[test]
fn destroypod_lets_processes_end_by_themselves_and_kills_the_others() {
    let guest = Guest::with_pod(Kind::Local);
    let deaf =
        guest.container("deaf", &["sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"], json!({}));
    let polite = "trap 'echo goodbye; exit 0' TERM; echo up; while :; do sleep 0.01; done";
    let polite = guest.container("polite", &["sh", "-c", polite], json!({}));
    let exec = guest.exec("deaf", &["sh", "-c", "echo up; sleep 1000"], json!({}));
    for running in [&deaf, &polite, &exec] {
        running.read_until("up\n");
    }
    let ended = guest.client().send(Command::DestroyPod);
    let outcome = polite.end();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("goodbye\n", 0));
    assert_eq!(exec.end().status, 143);
    assert_eq!(deaf.end().status, 137);
    ended.wait(PATIENCE).unwrap();
    assert!(guest.wait_for_end().success());
}

#[test]
fn destroypod_may_follow_anything_at_once() {
    let container = json!({"id": "c", "image": "image", "rootfs": "rootfs",
        "process": {"args": ["sleep", "1000"], "stdio": 1, "stderr": 2}});
    for count in 0..3 {
        let guest = Guest::boot(Kind::Local);
        let client = guest.client();
        let _streams = client.streams(1, 2);
        let commands = [
            (Message::StartPod, json!({"hostname": "pod-1", "shareDir": "share_dir"})),
            (Message::NewContainer, container.clone()),
        ];
        let pending: Vec<_> = commands
            .iter()
            .take(count)
            .map(|(message, json)| client.send_raw(message.id(), json.to_string().as_bytes()))
            .collect();
        client.call(Command::DestroyPod).unwrap();
        for pending in pending {
            // Done or refused, but answered, and before the last frame.
            assert!(!matches!(pending.wait(Duration::ZERO), Err(hyperinit::client::CallError::Late(_))));
        }
        assert!(guest.wait_for_end().success(), "behind {count} commands");
    }
}

#[test]
fn a_second_destroypod_is_answered_with_the_first() {
    let guest = Guest::with_pod(Kind::Local);
    let deaf =
        guest.container("deaf", &["sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"], json!({}));
    deaf.read_until("up\n");
    let first = guest.client().send(Command::DestroyPod);
    let between = guest.client().send(Command::Ping);
    let late = guest.client().send(parse_exec("deaf", json!({"args": ["true"], "stdio": 1, "stderr": 2})));
    let second = guest.client().send(Command::DestroyPod);
    assert_eq!(first.wait(PATIENCE), Ok(vec![]));
    assert_eq!(between.wait(PATIENCE), Ok(vec![]));
    assert!(refusal(late.wait(PATIENCE)).contains("the guest is going down"));
    assert_eq!(second.wait(PATIENCE), Ok(vec![]));
    assert_eq!(deaf.end().status, 137);
    assert!(guest.wait_for_end().success());
}

#[test]
fn the_ack_of_destroypod_is_the_last_frame() {
    let mut guest = Guest::with_pod(Kind::Local);
    drop(guest.sleeper("main"));
    let mut raw = guest.raw();
    raw.send(Message::DestroyPod, b"null");
    let mut last = None;
    let mut events = 0;
    while let Some((message, _)) = raw.next() {
        events += usize::from(message == Message::ProcessAsyncEvent);
        last = Some(message);
    }
    assert_eq!((last, events), (Some(Message::Ack), 1));
    assert!(guest.wait_for_end().success());
}

#[test]
fn a_guest_ends_though_its_host_has_left() {
    let mut guest = Guest::with_pod(Kind::Local);
    drop(guest.sleeper("main"));
    let mut raw = guest.raw();
    raw.send(Message::DestroyPod, b"null");
    drop(raw);
    assert!(guest.wait_for_end().success());
}

// ---- hosts ----

#[test]
fn what_happens_while_the_host_is_away_is_told_when_it_is_back() {
    let mut guest = Guest::with_pod(Kind::Local);
    drop(guest.sleeper("main"));
    let mut raw = guest.raw();
    raw.send(Message::ExecCmd, &exec_json(501, &["sh", "-c", "read x; seq 100000; exit 33"]));
    raw.expect(Message::Ack);
    raw.stream.write_all(&frame::stream(501, b"go\n").unwrap()).unwrap();
    let (number, first) = raw.next_stream().unwrap();
    assert_eq!(number, 501);
    drop(raw);
    // The next host gets every frame that the first one did not get whole.
    let mut raw = guest.raw();
    let mut text = Vec::new();
    loop {
        let (number, payload) = raw.next_stream().unwrap();
        assert_eq!(number, 501);
        if payload.is_empty() {
            break;
        }
        text.extend(payload);
    }
    let event = raw.expect(Message::ProcessAsyncEvent);
    assert!(String::from_utf8(event).unwrap().contains(r#""status":33"#));
    let all: String = (1..=100_000).map(|number| format!("{number}\n")).collect();
    assert!(all.as_bytes().starts_with(&first));
    // What was on its way to the first host is lost with it; nothing else is, and nothing comes twice.
    assert!(all.as_bytes().ends_with(&text) && text.len() + first.len() <= all.len(), "{} bytes", text.len());
    assert!(text.len() + first.len() + (1 << 20) > all.len(), "{} bytes", text.len());
}

#[test]
fn a_command_survives_its_host_and_its_reply_does_not() {
    let mut guest = Guest::with_pod(Kind::Local);
    let mut raw = guest.raw();
    let slow = json!({"id": "slow", "image": "no-such-disk", "fstype": "ext4",
        "process": {"args": ["true"], "stdio": 1, "stderr": 2}});
    raw.send(Message::NewContainer, slow.to_string().as_bytes());
    raw.send(Message::Ping, b"null");
    drop(raw);
    guest.connect();
    // The first reply of this connection is to its own first command.
    guest.call(Command::Ping);
    assert_eq!(guest.container_says("slow", "echo free again", json!({})), "free again\n");
}

#[test]
fn a_host_that_breaks_the_protocol_loses_its_connection_and_nothing_else() {
    let mut guest = Guest::with_pod(Kind::Local);
    drop(guest.sleeper("main"));
    for length in [0u32, 7, (16 << 20) + 1, u32::MAX] {
        let mut raw = guest.raw();
        let header = [Message::Ping.id().to_be_bytes(), length.to_be_bytes()].concat();
        raw.control.write_all(&header).unwrap();
        while raw.next().is_some() {}
    }
    for length in [0u32, 11, (1 << 20) + 1, u32::MAX] {
        let mut raw = guest.raw();
        raw.stream.write_all(&[&7u64.to_be_bytes()[..], &length.to_be_bytes()].concat()).unwrap();
        assert!(raw.next_stream().is_none());
    }
    guest.connect();
    assert_eq!(guest.says("main", "echo alive"), "alive\n");
    guest.await_log("the host sent a control frame of 7 bytes (at least 8, at most 16777216)");
}

#[test]
fn every_byte_is_credited_once_however_they_come() {
    let mut guest = Guest::with_pod(Kind::Local);
    drop(guest.sleeper("main"));
    let mut raw = guest.raw();
    let ping = frame::control(Message::Ping, b"null").unwrap();
    let exec = frame::control(Message::ExecCmd, &exec_json(601, &["cat"])).unwrap();
    let bytes: Vec<u8> = [&ping[..], &exec, &ping, &exec[..0], &ping].concat();
    let mut written = 0;
    // A byte at a time, then a header alone, then what runV writes.
    for portion in bytes.chunks(1).take(20).chain([&bytes[20..28], &bytes[28..]]) {
        raw.control.write_all(portion).unwrap();
        written += portion.len() as u64;
    }
    for _ in 0..4 {
        raw.expect(Message::Ack);
    }
    while raw.credited < written {
        assert_eq!(raw.next().map(|(message, _)| message), Some(Message::Next));
    }
    assert_eq!(raw.credited, written);
}

#[test]
fn a_frame_for_nobody_is_answered_by_its_end() {
    let mut guest = Guest::with_pod(Kind::Local);
    let mut raw = guest.raw();
    for payload in [&b"hello"[..], b""] {
        raw.stream.write_all(&frame::stream(4711, payload).unwrap()).unwrap();
        assert_eq!(raw.next_stream(), Some((4711, Vec::new())));
    }
}

#[test]
fn the_event_comes_when_the_end_has_been_written() {
    let mut guest = Guest::with_pod(Kind::Local);
    drop(guest.sleeper("main"));
    let mut raw = guest.raw();
    for stdio in (701..741).step_by(2) {
        raw.stream.set_nonblocking(false).unwrap();
        raw.send(Message::ExecCmd, &exec_json(stdio, &["sh", "-c", "echo out; echo err >&2; exit 5"]));
        raw.expect(Message::Ack);
        let event = raw.expect(Message::ProcessAsyncEvent);
        assert!(String::from_utf8(event).unwrap().contains(r#""status":5"#));
        // Nothing is waited for any more: all of it must be in the socket.
        raw.stream.set_nonblocking(true).unwrap();
        let mut frames: Vec<_> = (0..3).map(|_| raw.next_stream().unwrap()).collect();
        assert_eq!(frames.pop(), Some((stdio, Vec::new())), "the end is the last frame");
        frames.sort();
        assert_eq!(frames, [(stdio, b"out\n".to_vec()), (stdio + 1, b"err\n".to_vec())]);
    }
}

//! Tests that need a separate guest: its start, its end, and hosts that disconnect and reconnect.

use std::io::Write;
use std::time::Duration;

use hyperinit::command::Command;
use hyperinit::frame::{self, Message};
use hyperinit::sandbox::{CapSet, ContainerProfile};
use hyperinit::wire::Profile;
use serde_json::{Value, json};

use crate::guest::processes::{process, status as status_of};
use crate::guest::{Guest, Kind, PATIENCE, parse, parse_exec, refusal};

fn start_pod(pod: Value) -> Command {
    Command::StartPod(Box::new(parse(pod)))
}

/// Sends a STARTPOD that the client library would not send. Returns the refusal.
fn refused_pod(guest: &Guest, pod: &Value) -> String {
    refusal(guest.client().send_raw(Message::StartPod.id(), pod.to_string().as_bytes()).wait(PATIENCE))
}

fn exec_json(stdio: u64, args: &[&str]) -> Vec<u8> {
    let process = json!({"id": format!("raw-{stdio}"), "args": args, "stdio": stdio, "stderr": stdio + 1});
    json!({"container": "main", "process": process}).to_string().into_bytes()
}

#[test]
fn a_pod_that_cannot_start_is_undone_and_a_better_one_starts() {
    let guest = Guest::boot(Kind::Local);
    let text = refused_pod(&guest, &json!({"hostname": "x".repeat(65)}));
    assert!(text.contains("hostname") && text.contains("64"), "{text}");
    let text = refused_pod(&guest, &json!({"hostname": "pod", "dns": ["1.1.1.1\nnameserver 2.2.2.2"]}));
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
fn a_pod_has_its_resolver_and_its_share() {
    let guest = Guest::boot(Kind::Local);
    guest.call(start_pod(json!({
        "hostname": "own", "shareDir": "share_dir", "restartPolicy": "never",
        "dns": ["192.0.2.1", "2001:db8::1"], "dnsSearch": ["a.test", "b.test"], "dnsOptions": ["ndots:2", "rotate"],
    })));
    assert_eq!(
        guest.container_says("main", "hostname; cat /etc/resolv.conf", json!({})),
        "own\nnameserver 192.0.2.1\nnameserver 2001:db8::1\nsearch a.test b.test\noptions ndots:2 rotate\n"
    );
    let guest = Guest::boot(Kind::Local);
    guest.call(start_pod(json!({"hostname": "bare"})));
    let text = refusal(guest.try_container("main", &["true"], json!({})));
    assert!(text.contains("opening the root filesystem image"), "{text}");
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

#[test]
fn a_pod_that_fails_late_is_undone_too() {
    let guest = Guest::boot(Kind::Local);
    // READY does not wait for the helpers, and a request to a helper that is not up yet is also sent to its
    // successor.
    guest.await_log("execd is up");
    // When execd is asked for the pod init, mountd has already laid out the pod. The stopped execd does not
    // answer until init gives up on it.
    let execd = process(&guest, "execd", None);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(execd), nix::sys::signal::Signal::SIGSTOP).unwrap();
    let text =
        refused_pod(&guest, &json!({"hostname": "late", "shareDir": "share_dir", "dns": ["192.0.2.9"]}));
    assert!(text.contains("execd: it died before it answered"), "{text}");
    let root = format!("/proc/{}/root/run/hyperinit/pod", process(&guest, "init", None));
    assert!(!std::path::Path::new(&root).exists(), "undone before the answer");
    process(&guest, "execd", Some(execd));
    guest.start_pod();
    let main = guest.sleeper("main");
    let said = guest.says("main", "hostname; cat /etc/resolv.conf");
    assert_eq!(said, "pod-1\nnameserver 192.0.2.1\nsearch a.test\n");
    guest.finish(main);
}

#[test]
fn a_pod_with_an_interface_that_is_not_there_does_not_start() {
    let guest = Guest::boot(Kind::Local);
    let interface =
        json!({"device": "nosuch0", "ipAddresses": [{"ipAddress": "192.0.2.7", "netMask": "24"}]});
    let text = refused_pod(&guest, &json!({"hostname": "pod", "interfaces": [interface]}));
    assert!(text.contains("interfaces") || text.contains("nosuch0"), "{text}");
    guest.start_pod();
    assert_eq!(guest.container_says("main", "hostname", json!({})), "pod-1\n");
}

#[test]
fn two_pods_share_nothing() {
    let guests = [Guest::with_pod(Kind::Local), Guest::with_pod(Kind::Local)];
    let [one, two] = guests.each_ref().map(|guest| guest.sleeper("main"));
    let namespaces = "for n in cgroup ipc mnt net pid uts; do readlink /proc/self/ns/$n; done";
    guests[0].says("main", "echo word >/dev/shm/word");
    assert_eq!(guests[1].says("main", "ls /dev/shm"), "");
    let [one_has, two_has] = guests.each_ref().map(|guest| guest.says("main", namespaces));
    for (one_line, two_line) in one_has.lines().zip(two_has.lines()) {
        assert_ne!(one_line, two_line);
    }
    guests[0].finish(one);
    guests[1].finish(two);
}

#[test]
fn the_privileged_profile_gives_more() {
    let guest = Guest::boot_with(Kind::Local, "hyper_profile=privileged");
    guest.start_pod();
    let main = guest.sleeper("main");
    guest.says("main", "mount -t tmpfs x /tmp && touch /tmp/x && umount /tmp");
    let status = guest.says("main", "cat /proc/self/status");
    // This machine's root may have fewer capabilities to grant.
    let own = u64::from_str_radix(&status_of(std::process::id().cast_signed(), "CapPrm"), 16).unwrap();
    let granted = ContainerProfile::of(Profile::Privileged).unwrap().capabilities().intersection(CapSet(own));
    for key in ["CapPrm", "CapEff", "CapBnd"] {
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(":\t")).unwrap();
        assert_eq!(CapSet(u64::from_str_radix(line, 16).unwrap()), granted, "{key}");
    }
    assert!(status.contains("Seccomp:\t2"), "{status}");
    // Nothing is written to /sys: here it is the machine's.
    let options = guest.says("main", "awk '$5 == \"/sys\" { print $6 }' /proc/self/mountinfo");
    assert!(options.starts_with("rw,"), "{options}");
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
fn a_crowd_to_the_end() {
    crate::scenarios::crowd::a_crowd_to_the_end(Guest::with_pod(Kind::Local));
}

#[test]
fn what_a_process_says_at_the_end_is_told_before_the_end() {
    let mut guest = Guest::with_pod(Kind::Local);
    // The init of the container ignores SIGTERM: its end would end the container, and the polite process with
    // it.
    let deaf =
        guest.container("main", &["sh", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"], json!({}));
    deaf.read_until("up\n");
    drop(deaf);
    let mut raw = guest.raw();
    let script = "trap 'echo goodbye; exit 0' TERM; echo up; while :; do sleep 0.01; done";
    raw.send(Message::ExecCmd, &exec_json(801, &["sh", "-c", script]));
    raw.expect(Message::Ack);
    assert_eq!(raw.next_stream(), Some((801, b"up\n".to_vec())));
    raw.send(Message::DestroyPod, b"null");
    let mut before = Vec::new();
    loop {
        match raw.next().unwrap() {
            (Message::Ack, _) => break,
            (Message::ProcessAsyncEvent, event) => before.push(String::from_utf8(event).unwrap()),
            _ => {}
        }
    }
    assert!(
        before.iter().any(|event| event.contains("raw-801") && event.contains(r#""status":0"#)),
        "{before:?}"
    );
    // From now on no read waits: all frames must already be in the socket.
    raw.stream.set_nonblocking(true).unwrap();
    let mut said = Vec::new();
    while let Some((number, payload)) = raw.next_stream() {
        if number == 801 {
            said.push(payload);
            if said.last().is_some_and(Vec::is_empty) {
                break;
            }
        }
    }
    assert_eq!(said, [b"goodbye\n".to_vec(), Vec::new()]);
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
            // Each command was done or refused, but answered, before the last frame.
            assert!(!matches!(pending.wait(Duration::ZERO), Err(hyperinit_client::CallError::Late(_))));
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
    raw.send(Message::ExecCmd, &exec_json(501, &["sh", "-c", "read x; seq 300000; exit 33"]));
    raw.expect(Message::Ack);
    raw.stream.write_all(&frame::stream(501, b"go\n").unwrap()).unwrap();
    let (number, first) = raw.next_stream().unwrap();
    assert_eq!(number, 501);
    drop(raw);
    // The next host gets every frame that the first host did not receive completely.
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
    let all: String = (1..=300_000).map(|number| format!("{number}\n")).collect();
    assert!(all.as_bytes().starts_with(&first));
    // Only what was on its way to the first host is lost; nothing comes twice.
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
    // The first reply on this connection answers its own first command.
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
    let ping = frame::control(Message::Ping, b"null").unwrap();
    // Longer than one write of runV.
    let word = "x".repeat(1200);
    for (number, size) in [1, 7, 8, 9, 511, 512, 513, 1 << 20].into_iter().enumerate() {
        let mut raw = guest.raw();
        let exec = exec_json(601 + 2 * number as u64, &["echo", &word]);
        let exec = frame::control(Message::ExecCmd, &exec).unwrap();
        let bytes = [&ping[..], &exec, &ping, &ping].concat();
        // A header that arrives alone is credited before its frame is complete.
        raw.control.write_all(&ping[..8]).unwrap();
        while raw.credited < 8 {
            // The event of the previous process may come first.
            assert_ne!(raw.next().map(|(message, _)| message), Some(Message::Ack));
        }
        assert_eq!(raw.credited, 8);
        raw.control.write_all(&ping[8..]).unwrap();
        while raw.next().unwrap().0 != Message::Ack {}
        for portion in bytes.chunks(size) {
            raw.control.write_all(portion).unwrap();
        }
        let mut answers = 0;
        while answers < 4 {
            answers += usize::from(raw.next().unwrap().0 == Message::Ack);
        }
        // A read is credited before the commands that it completes are answered.
        assert_eq!(raw.credited, (ping.len() + bytes.len()) as u64, "{size} bytes at a time");
    }
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
        // From now on no read waits: all frames must already be in the socket.
        raw.stream.set_nonblocking(true).unwrap();
        let mut frames: Vec<_> = (0..3).map(|_| raw.next_stream().unwrap()).collect();
        assert_eq!(frames.pop(), Some((stdio, Vec::new())), "the end is the last frame");
        frames.sort();
        assert_eq!(frames, [(stdio, b"out\n".to_vec()), (stdio + 1, b"err\n".to_vec())]);
    }
}

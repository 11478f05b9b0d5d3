//! Containers and processes: how they start, and how they end.

use std::time::Duration;

use hyperinit::command::{Command, RemoveContainer, SignalProcess};
use hyperinit::frame::Message;
use hyperinit::ids::{ProcessId, Signal};
use hyperinit_client::CallError;
use serde_json::json;

use crate::guest::{Guest, Outcome, PATIENCE, container_id, kill, refusal};

pub fn a_container_has_its_streams_and_its_status(guest: &Guest) {
    let init = guest.container("life", &["sh", "-c", "echo out; echo err >&2; cat; exit 7"], json!({}));
    init.streams.stdin.write(b"in").unwrap();
    let expected = Outcome { status: 7, stdout: "out\nin".to_owned(), stderr: "err\n".to_owned() };
    assert_eq!(init.outcome(), expected);
    guest.remove("life");
}

pub fn every_status_arrives(guest: &Guest) {
    let main = guest.sleeper("status");
    for status in [0, 1, 2, 42, 125, 127, 128, 255] {
        assert_eq!(guest.sh("status", &format!("exit {status}")).status, status);
    }
    for signal in [1, 2, 6, 9, 11, 15, 34, 64] {
        assert_eq!(guest.sh("status", &format!("kill -{signal} $$")).status, 128 + signal, "signal {signal}");
    }
    guest.finish(main);
}

pub fn what_cannot_be_executed_says_why(guest: &Guest) {
    let main = guest.sleeper("refused");
    std::fs::write(guest.share.join("image/rootfs/tmp/text"), "no program").unwrap();
    let outcome = |program: &str| guest.exec("refused", &[program], json!({})).outcome();
    for (program, status, why) in [
        ("/bin/missing", 127, "/bin/missing: No such file or directory"),
        ("missing", 127, "missing: No such file or directory"),
        ("/etc/passwd/x", 127, "No such file or directory"),
        ("/etc/passwd", 126, "/etc/passwd: Permission denied"),
        ("/etc", 126, "/etc: Permission denied"),
    ] {
        let outcome = outcome(program);
        assert_eq!((outcome.status, outcome.stdout.as_str()), (status, ""), "{program}");
        assert!(outcome.stderr.contains(why), "{program}: {}", outcome.stderr);
    }
    guest.says("refused", "printf x >/tmp/text && chmod 755 /tmp/text");
    let text = outcome("/tmp/text");
    assert_eq!(text.status, 126, "not in a format that the kernel knows");
    assert!(text.stderr.contains("/tmp/text: Exec format error"), "{}", text.stderr);
    // A single argument may have 128 KiB (execve(2)).
    let long = guest.exec("refused", &["/bin/true", &"x".repeat(128 << 10)], json!({})).outcome();
    assert_eq!(long.status, 125);
    assert!(long.stderr.contains("/bin/true: Argument list too long"), "{}", long.stderr);
    // A container whose init cannot be executed ends like any other.
    let init = guest.container("no-init", &["/bin/missing"], json!({})).outcome();
    assert_eq!(init.status, 127);
    assert!(init.stderr.contains("/bin/missing: No such file or directory"), "{}", init.stderr);
    guest.remove("no-init");
    guest.finish(main);
}

pub fn signals_reach_the_init_and_the_group(guest: &Guest) {
    let script = "trap 'echo term; exit 3' TERM; echo ready; while :; do sleep 1; done";
    let init = guest.container("signals", &["sh", "-c", script], json!({}));
    init.read_until("ready\n");
    let group = guest.exec("signals", &["sh", "-c", "sleep 1000 & echo child; wait; echo waited"], json!({}));
    group.read_until("child\n");
    group.signal(9);
    assert_eq!(group.end().status, 137, "the shell and its sleep are one group");
    guest.call(kill("signals", 15));
    let outcome = init.end();
    assert_eq!((outcome.status, outcome.stdout.as_str()), (3, "term\n"));
    guest.remove("signals");
}

pub fn killcontainer_signals_the_init_alone(guest: &Guest) {
    // 138 means USR1, 143 means TERM. The exit status shows the first fatal signal.
    let script = "sleep 1000 & trap 'kill $!; wait $!; echo $?; exit 3' USR1; echo ready; wait $!";
    let alone = guest.container("alone", &["sh", "-c", script], json!({}));
    alone.read_until("ready\n");
    guest.call(kill("alone", 10));
    let outcome = alone.end();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("143\n", 3), "its child was spared");
    guest.remove("alone");

    let group = guest.container("group", &["sh", "-c", script], json!({}));
    group.read_until("ready\n");
    group.signal(10);
    let outcome = group.end();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("138\n", 3), "SIGNALPROCESS spares nobody");
    guest.remove("group");
}

pub fn what_is_not_there_cannot_be_signalled(guest: &Guest) {
    let main = guest.sleeper("there");
    assert!(guest.refused(kill("nobody", 9)).contains("no such container"));
    let signal = |process: &str| {
        Command::SignalProcess(SignalProcess {
            container: container_id("there"),
            process: ProcessId::try_from(process.to_owned()).unwrap(),
            signal: Signal::KILL,
        })
    };
    assert!(guest.refused(signal("nobody")).contains("no such process"));
    let bad = guest.client().send_raw(Message::KillContainer.id(), br#"{"container":"there","signal":65}"#);
    assert!(refusal(bad.wait(PATIENCE)).contains("invalid signal 65"));
    guest.call(kill("there", 9));
    assert_eq!(main.outcome().status, 137);
    assert!(guest.refused(kill("there", 9)).contains("no such process"), "it has exited");
    assert!(guest.refused(signal("init")).contains("no such process"));
    guest.remove("there");
}

pub fn a_duplicate_is_refused_and_the_live_one_untouched(guest: &Guest) {
    let main = guest.container("twice", &["sh", "-c", "cat; exit 6"], json!({}));
    let text = refusal(guest.try_container("twice", &["true"], json!({})));
    assert!(text.contains("it exists"), "{text}");
    let exec = guest.exec("twice", &["cat"], json!({"id": "one"}));
    let text = refusal(guest.try_exec("twice", &["true"], json!({"id": "one"})));
    assert!(text.contains("exists"), "{text}");
    exec.streams.stdin.write(b"alive").unwrap();
    assert_eq!(exec.outcome().stdout, "alive");
    main.streams.stdin.write(b"too").unwrap();
    let outcome = main.outcome();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("too", 6));
    // The id of an exited container is free, with and without REMOVECONTAINER.
    assert_eq!(guest.container("twice", &["sh", "-c", "exit 5"], json!({})).outcome().status, 5);
    guest.remove("twice");
    assert_eq!(guest.container_says("twice", "echo again", json!({})), "again\n");
}

pub fn only_an_exited_container_is_removed(guest: &Guest) {
    let remove = |id: &str| Command::RemoveContainer(RemoveContainer { container: container_id(id) });
    let main = guest.sleeper("remove");
    assert!(guest.refused(remove("remove")).contains("it runs"));
    assert_eq!(guest.says("remove", "echo alive"), "alive\n");
    guest.call(kill("remove", 9));
    assert_eq!(main.outcome().status, 137);
    guest.call(remove("remove"));
    assert!(guest.refused(remove("remove")).contains("no such container"));
}

pub fn the_end_of_its_init_ends_a_container(guest: &Guest) {
    let main = guest.container("whole", &["sh", "-c", "read x; exit 4"], json!({}));
    let exec = guest.exec("whole", &["sleep", "1000"], json!({}));
    let daemon = guest.exec("whole", &["sh", "-c", "setsid sh -c 'sleep 4711' & echo up"], json!({}));
    assert_eq!(daemon.outcome().stdout, "up\n");
    let watcher = guest.sleeper("watcher");
    guest.says("watcher", "until ps | grep -q '[s]leep 4711'; do :; done");
    main.streams.stdin.write(b"\n").unwrap();
    assert_eq!(exec.end().status, 137);
    assert_eq!(main.end().status, 4);
    assert!(!guest.says("watcher", "ps").contains("sleep 4711"), "also what was in a session of its own");
    assert!(refusal(guest.try_exec("whole", &["true"], json!({}))).contains("does not run"));
    guest.remove("whole");
    guest.finish(watcher);
}

pub fn orphans_are_reaped(guest: &Guest) {
    let main = guest.sleeper("orphans");
    for _ in 0..5 {
        guest.says("orphans", "(sh -c 'true' &) ; (sh -c 'exit 3' &)");
    }
    let deadline = std::time::Instant::now() + PATIENCE;
    while guest.says("orphans", "ps -o stat,comm").lines().any(|line| line.starts_with('Z')) {
        assert!(std::time::Instant::now() < deadline, "zombies stay");
    }
    guest.finish(main);
}

pub fn strange_ids_come_back_as_they_were(guest: &Guest) {
    let id = "say \"hi\" \\ ä 🦀";
    let container = guest.container(id, &["sleep", "1000"], json!({}));
    let exec = guest.exec(id, &["sh", "-c", "exit 8"], json!({"id": "p \"quoted\""}));
    assert_eq!(exec.outcome().status, 8);
    guest.finish(container);
    let bad = refusal(guest_container(guest, "a/b"));
    assert!(bad.contains("contains a slash"), "{bad}");
}

fn guest_container(guest: &Guest, id: &str) -> Result<Vec<u8>, CallError> {
    let json = format!(r#"{{"id":"{id}","process":{{"args":["true"],"stdio":7001,"stderr":7002}}}}"#);
    guest.client().send_raw(Message::NewContainer.id(), json.as_bytes()).wait(PATIENCE)
}

pub fn a_second_pod_is_refused(guest: &Guest) {
    let main = guest.sleeper("second");
    let text = guest.refused(Command::StartPod(Box::default()));
    assert!(text.contains("it runs already"), "{text}");
    assert_eq!(guest.says("second", "hostname"), "pod-1\n");
    guest.finish(main);
}

pub fn small_commands(guest: &Guest) {
    assert_eq!(guest.call(Command::GetVersion), 4244u32.to_be_bytes());
    assert!(guest.call(Command::Ping).is_empty());
    assert!(guest.call(Command::Rescan).is_empty());
    for id in [2, 3, 5, 7, 13, 26, 4711] {
        let text = refusal(guest.client().send_raw(id, b"null").wait(PATIENCE));
        assert!(text.contains("there is no such command"), "{id}: {text}");
    }
    for payload in [&b""[..], b"{}", br#"{"container":7,"signal":9}"#, b"\xff\xff"] {
        refusal(guest.client().send_raw(Message::KillContainer.id(), payload).wait(PATIENCE));
    }
    let odd = r#"{"container":"nobody","signal":9,"new":{"key":[1,2]}}"#;
    let text = refusal(guest.client().send_raw(Message::KillContainer.id(), odd.as_bytes()).wait(PATIENCE));
    assert!(text.contains("no such container"), "an unknown key is no error: {text}");
    let (written, credited) = guest.client().credit();
    assert_eq!(written, credited, "every byte is credited once");
}

pub fn replies_wait_their_turn_and_a_kill_does_not(guest: &Guest) {
    let script = "trap 'echo killed; exit 3' TERM; sleep 1000 & echo ready; wait";
    let victim = guest.container("victim", &["sh", "-c", script], json!({}));
    victim.read_until("ready\n");
    let exec = guest.exec("victim", &["sleep", "1000"], json!({}));
    // The guest waits for a disk that does not come.
    let slow = json!({"id": "slow", "image": "no-such-disk", "fstype": "ext4",
        "process": {"args": ["true"], "stdio": 7101, "stderr": 7102}});
    let slow = guest.client().send_raw(Message::NewContainer.id(), slow.to_string().as_bytes());
    let signal = SignalProcess {
        container: exec.container.clone(),
        process: exec.process.clone(),
        signal: Signal::KILL,
    };
    let signalled = guest.client().send(Command::SignalProcess(signal));
    assert_eq!(exec.end().status, 137);
    let killed = guest.client().send(kill("victim", 15));
    let ping = guest.client().send(Command::Ping);
    let outcome = victim.end();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("killed\n", 3), "the whole end of a container");
    // Both signals have been delivered, and the reply to the slow command has not come yet.
    let early = slow.wait(Duration::ZERO);
    assert!(matches!(early, Err(CallError::Late(_))), "the kill waited for the disk: {early:?}");
    for pending in [&signalled, &killed, &ping] {
        assert!(matches!(pending.wait(Duration::ZERO), Err(CallError::Late(_))), "a reply overtook another");
    }
    let text = refusal(slow.wait(PATIENCE));
    assert!(text.contains("waiting for the disk /dev/no-such-disk"), "{text}");
    for pending in [signalled, killed, ping] {
        pending.wait(PATIENCE).unwrap();
    }
    guest.remove("victim");
}

pub fn what_belongs_to_a_start_may_be_sent_behind_it(guest: &Guest) {
    let container = json!({"id": "behind", "image": "image", "rootfs": "rootfs",
        "process": {"args": ["sleep", "1000"], "stdio": 7201, "stderr": 7202}});
    let init = guest.client().streams(7201, 7202);
    let exec = guest.client().streams(7203, 7204);
    let client = guest.client();
    let send = |message: Message, json: serde_json::Value| {
        client.send_raw(message.id(), json.to_string().as_bytes())
    };
    let pending = [
        send(Message::NewContainer, container),
        send(
            Message::ExecCmd,
            json!({"container": "behind", "process": {"id": "e", "args": ["cat"], "stdio": 7203, "stderr": 7204}}),
        ),
        send(Message::SignalProcess, json!({"container": "behind", "process": "e", "signal": 15})),
        send(Message::RemoveContainer, json!({"container": "nobody"})),
    ];
    for pending in &pending[..3] {
        pending.wait(PATIENCE).unwrap();
    }
    assert!(refusal(pending[3].wait(PATIENCE)).contains("no such container"));
    let process = |id: &str| ProcessId::try_from(id.to_owned()).unwrap();
    let finished = |id: &str| client.finished(&container_id("behind"), &process(id), PATIENCE).unwrap();
    assert_eq!(finished("e"), 143);
    guest.call(kill("behind", 9));
    assert_eq!(finished("init"), 137);
    // The two channels are independent: the end of a stream may be read after the event.
    for stdout in [init.stdout, exec.stdout] {
        assert!(stdout.read_to_end(PATIENCE).unwrap().is_empty());
        assert_eq!(stdout.eof_frames(), 1);
    }
    guest.remove("behind");
}

pub fn process_ids_are_a_containers_own(guest: &Guest) {
    let (one, two) = (guest.sleeper("ids-1"), guest.sleeper("ids-2"));
    let same = guest.exec("ids-1", &["cat"], json!({"id": "same"}));
    let text = refusal(guest.try_exec("ids-1", &["true"], json!({"id": "init"})));
    assert!(text.contains("process init exists"), "{text}");
    assert_eq!(guest.sh("ids-2", "exit 3").status, 3);
    let other = guest.exec("ids-2", &["sh", "-c", "exit 4"], json!({"id": "same"}));
    assert_eq!(other.outcome().status, 4, "only its own container's ids are taken");
    same.streams.stdin.write(b"unharmed").unwrap();
    assert_eq!(same.outcome().stdout, "unharmed");
    // The id is free again once the end of its process has been told.
    for status in [5, 6] {
        let again = guest.exec("ids-1", &["sh", "-c", &format!("exit {status}")], json!({"id": "same"}));
        assert_eq!(again.outcome().status, status);
    }
    guest.finish(one);
    guest.finish(two);
}

pub fn fifty_containers_at_once(guest: &Guest) {
    let crowd: Vec<_> =
        (0..50).map(|number| guest.container(&format!("crowd-{number}"), &["cat"], json!({}))).collect();
    for (number, container) in crowd.iter().enumerate() {
        container.streams.stdin.write(format!("{number}").as_bytes()).unwrap();
    }
    for (number, container) in crowd.into_iter().enumerate() {
        let outcome = container.outcome();
        assert_eq!((outcome.status, outcome.stdout), (0, number.to_string()));
        guest.remove(&format!("crowd-{number}"));
    }
}

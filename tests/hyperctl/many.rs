//! One `hyperctl up` with many `call` and `exec` at once: none affects another.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::time::Duration;

use hyperinit::command::Command as Said;
use hyperinit::frame::{self, Message};
use hyperinit_client::mux;
use hyperinit_client::{CallError, Client};
use nix::pty::openpty;
use nix::sys::signal::Signal;
use serde_json::json;

use super::by_hand::{ByHand, wait_for_end};
use super::guest::PATIENCE;
use super::{Running, finish, read_until, signal, spawn, text};

fn hand() -> ByHand {
    let hand = ByHand::new(&["--local"]);
    hand.start("");
    hand
}

fn client(hand: &ByHand) -> Client {
    Client::visit(&hand.directory.path().join("guest")).unwrap()
}

/// An interactive exec, with the host's end of its terminal.
fn session(hand: &ByHand, script: &str) -> (Running, File) {
    let pty = openpty(None, None).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut command = hand.command("exec", &["-ti", "c", "--", "sh", "-c", script]);
    let child = spawn(command.stdin(end()).stdout(end()).stderr(end()));
    (child, File::from(pty.master))
}

#[test]
fn an_editor_and_a_shell_at_once() {
    let hand = hand();
    let script = |name: &str| {
        format!(r#"stty -echo; echo "{name} is up"; while read line; do echo "{name}: $line"; done"#)
    };
    let mut sessions = ["one", "two"].map(|name| (name, session(&hand, &script(name))));
    for (name, (_, terminal)) in &mut sessions {
        read_until(terminal, &format!("{name} is up\r\n"));
    }
    for round in 0..20 {
        // Input is written in one order, and the output read in the other.
        for (name, (_, terminal)) in &mut sessions {
            terminal.write_all(format!("{round} of {name}\n").as_bytes()).unwrap();
        }
        for (name, (_, terminal)) in sessions.iter_mut().rev() {
            assert_eq!(read_until(terminal, "\r\n"), format!("{name}: {round} of {name}\r\n"));
        }
    }
    for (_, (child, mut terminal)) in sessions {
        // Ctrl-D.
        terminal.write_all(&[4]).unwrap();
        assert_eq!(finish(child).status.code(), Some(0));
    }
}

#[test]
fn twenty_at_once_get_each_its_own() {
    let hand = hand();
    let all: Vec<Running> = (0..20u32)
        .map(|number| {
            let script = format!("cat; seq {number} {}; echo {number} >&2; exit {number}", number + 20_000);
            let mut child =
                spawn(hand.command("exec", &["-i", "c", "--", "sh", "-c", &script]).stdin(Stdio::piped()));
            let mut stdin = child.stdin.take().unwrap();
            std::thread::spawn(move || stdin.write_all(format!("in {number}\n").repeat(10_000).as_bytes()));
            child
        })
        .collect();
    for (number, child) in all.into_iter().enumerate() {
        let output = finish(child);
        let lines: Vec<String> = (number..=number + 20_000).map(|line| format!("{line}\n")).collect();
        let expected = format!("in {number}\n").repeat(10_000) + &lines.concat();
        assert!(text(&output.stdout) == expected, "{number}: {} bytes", output.stdout.len());
        assert_eq!(text(&output.stderr), format!("{number}\n"));
        assert_eq!(output.status.code(), Some(i32::try_from(number).unwrap()));
    }
}

#[test]
fn who_does_not_read_holds_up_nobody() {
    let hand = hand();
    // The program writes as much as it can; its hyperctl's output is not read.
    let mut slow = spawn(&mut hand.command("exec", &["c", "--", "sh", "-c", "seq 3000000"]));
    let mut first = [0; 2];
    slow.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    for round in 0..20 {
        let script = format!("cat; echo {round}");
        let mut child =
            spawn(hand.command("exec", &["-i", "c", "--", "sh", "-c", &script]).stdin(Stdio::piped()));
        child.stdin.take().unwrap().write_all(&[b'x'; 1 << 10]).unwrap();
        assert_eq!(text(&finish(child).stdout), format!("{}{round}\n", "x".repeat(1 << 10)));
    }
    let numbers: Vec<String> = (1..=3_000_000).map(|number| format!("{number}\n")).collect();
    let output = finish(slow);
    assert!([&first[..], &output.stdout].concat() == numbers.concat().as_bytes(), "all of it");
}

#[test]
fn a_program_that_does_not_read_holds_up_nobody() {
    let hand = hand();
    // The program reads nothing; it is sent as much as its hyperctl takes.
    let mut deaf = spawn(hand.command("exec", &["-i", "c", "--", "sleep", "100000"]).stdin(Stdio::piped()));
    let mut stdin = deaf.stdin.take().unwrap();
    std::thread::spawn(move || while stdin.write_all(&[0; 1 << 16]).is_ok() {});
    for round in 0..20 {
        let mut child = spawn(hand.command("exec", &["-i", "c", "--", "cat"]).stdin(Stdio::piped()));
        child.stdin.take().unwrap().write_all(&[b'x'; 1 << 18]).unwrap();
        assert!(finish(child).stdout == [b'x'; 1 << 18], "{round}");
    }
    signal(&deaf, Signal::SIGTERM);
    assert_eq!(finish(deaf).status.code(), Some(143));
}

#[test]
fn what_a_killed_exec_has_started_ends() {
    let hand = hand();
    let mut child = spawn(&mut hand.command("exec", &["c", "--", "yes", "of the killed"]));
    child.stdout.take().unwrap().read_exact(&mut [0; 1 << 16]).unwrap();
    signal(&child, Signal::SIGKILL);
    assert_eq!(finish(child).status.signal(), Some(9));
    wait_for_end(&hand, "yes of the killed");

    // A process with a terminal gets SIGHUP, because its terminal is gone.
    let script = "trap 'echo hup >/tmp/hup; exit' HUP; echo up; while :; do sleep 0.01; done; : orphan";
    let (child, mut terminal) = session(&hand, script);
    read_until(&mut terminal, "up\r\n");
    signal(&child, Signal::SIGKILL);
    assert_eq!(finish(child).status.signal(), Some(9));
    wait_for_end(&hand, ": orphan");
    assert_eq!(text(&hand.exec(&["c", "--", "cat", "/tmp/hup"]).stdout), "hup\n");
    // The container itself still runs.
    assert_eq!(hand.exec(&["c", "--", "true"]).status.code(), Some(0));
}

#[test]
fn who_leaves_by_a_signal_of_its_own_choice_sends_no_other() {
    let hand = hand();
    let script = "trap 'echo pipe >/tmp/pipe; sleep 0.1; echo end >>/tmp/pipe; exit' PIPE; \
         while :; do echo text 2>/dev/null; done; : piped";
    let mut child = spawn(&mut hand.command("exec", &["c", "--", "sh", "-c", script]));
    child.stdout.take().unwrap().read_exact(&mut [0; 4]).unwrap();
    assert_eq!(finish(child).status.code(), Some(128 + Signal::SIGPIPE as i32));
    wait_for_end(&hand, ": piped");
    assert_eq!(text(&hand.exec(&["c", "--", "cat", "/tmp/pipe"]).stdout), "pipe\nend\n");
}

#[test]
fn half_a_command_and_garbage_are_their_senders_concern() {
    let hand = hand();
    let at = hand.directory.path().join("guest");
    let other = client(&hand);
    let kill = json!({"container": "c", "signal": 9}).to_string();
    let kill = frame::control(Message::KillContainer, kill.as_bytes()).unwrap();
    for cut in [1, 7, 8, kill.len() - 1] {
        let (mut control, _stream) = mux::enter(&at).unwrap();
        control.write_all(&kill[..cut]).unwrap();
        drop(control);
        other.call(Said::Ping).unwrap();
    }
    // Bytes that are no frame, on either channel, end that connection and no other.
    for is_stream in [false, true] {
        let (mut control, mut stream) = mux::enter(&at).unwrap();
        let (speak, hear) = if is_stream { (&mut stream, &mut control) } else { (&mut control, &mut stream) };
        speak.write_all(&[0; 64]).unwrap();
        hear.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = hear.read_to_end(&mut Vec::new()).unwrap();
        other.call(Said::Ping).unwrap();
    }
    // Messages that only a guest may send are refused.
    for message in [Message::Ack, Message::Error, Message::Next, Message::ProcessAsyncEvent] {
        let refused = other.send_raw(message.id(), b"{}").wait(PATIENCE);
        assert!(matches!(refused, Err(CallError::Refused(_))), "{message}: {refused:?}");
    }
    assert_eq!(hand.exec(&["c", "--", "true"]).status.code(), Some(0), "the container runs");
}

#[test]
fn the_socket_is_its_owners() {
    let hand = hand();
    let at = hand.directory.path().join("guest");
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(&at), 0o700);
    assert_eq!(mode(&at.join("hyperctl.sock")), 0o600);
    let mut names: Vec<_> = fs::read_dir(&at).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["console.log", "hyperctl.sock"], "nobody waits at the guest's own sockets");
}

#[test]
fn the_pods_end_is_told_to_everybody() {
    let hand = hand();
    let mut waits = spawn(&mut hand.command("exec", &["c", "--", "sh", "-c", "echo up; sleep 100000"]));
    read_until(waits.stdout.as_mut().unwrap(), "up\n");
    let idle = client(&hand);
    idle.ready(PATIENCE).unwrap();
    hand.call("DESTROYPOD", "null", b"");
    assert_eq!(finish(waits).status.code(), Some(143), "SIGTERM, as the pod has it");
    assert!(matches!(idle.event(PATIENCE), Err(CallError::Broken(_))));
    assert_eq!(hand.wait().status.code(), Some(0));
}

#[test]
fn numbers_and_names_of_streams_are_each_hosts_own() {
    let hand = hand();
    let clients = [client(&hand), client(&hand)];
    let start = |client: &Client, id: &str, words: &str| {
        let process = json!({"id": id, "args": ["sh", "-c", words], "stdio": 7, "stderr": 8});
        client.send_raw(6, json!({"container": "c", "process": process}).to_string().as_bytes())
    };
    for round in 0..10 {
        let streams = clients.each_ref().map(|client| client.streams(7, 8));
        for (client, name) in clients.iter().zip(["a", "b"]) {
            start(client, name, &format!("read line; echo {name} $line {round}; echo {name} >&2"))
                .wait(PATIENCE)
                .unwrap();
        }
        // A connection can use each stream number only once at a time.
        let again = start(&clients[0], "again", "true").wait(PATIENCE);
        assert!(matches!(&again, Err(CallError::Refused(why)) if why.contains("stream 7")), "{again:?}");
        // A process name is unique in the container: the guest refuses a second one, and the owner of the
        // first still gets its event.
        let taken = start(&client(&hand), "a", "true").wait(PATIENCE);
        assert!(matches!(&taken, Err(CallError::Refused(why)) if why.contains("exists")), "{taken:?}");
        for (streams, name) in streams.iter().zip(["x", "y"]) {
            streams.stdin.write(format!("{name}\n").as_bytes()).unwrap();
        }
        for ((client, streams), (name, word)) in clients.iter().zip(&streams).zip([("a", "x"), ("b", "y")]) {
            let said = streams.stdout.read_to_end(PATIENCE).unwrap();
            assert_eq!(text(&said), format!("{name} {word} {round}\n"));
            assert_eq!(
                streams.stderr.as_ref().unwrap().read_to_end(PATIENCE).unwrap(),
                format!("{name}\n").as_bytes()
            );
            let event = client.event(PATIENCE).unwrap();
            assert_eq!((event.process.as_str(), event.status), (name, 0));
        }
    }
    assert!(matches!(clients[0].event(Duration::ZERO), Err(CallError::Late(_))), "nobody else's");
}

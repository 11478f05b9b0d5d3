//! `hyperctl exec` against a guest that the test plays.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use hyperinit::frame::{self, ControlDecoder, Message};
use hyperinit::greeting;
use hyperinit::sys::tty;
use nix::pty::openpty;
use nix::sys::signal::Signal;
use serde_json::{Value, from_slice, json};

use super::guest::PATIENCE;
use super::{Running, finish, hyperctl_path, scratch, signal, spawn, text};

/// The listening sockets that hyperctl connects to.
struct Listening {
    directory: tempfile::TempDir,
    control: UnixListener,
    stream: UnixListener,
}

/// The guest's ends of both channels.
struct Guest {
    control: UnixStream,
    stream: UnixStream,
    decoder: ControlDecoder,
}

fn listen() -> Listening {
    let directory = scratch();
    let bind = |name| UnixListener::bind(directory.path().join(name)).unwrap();
    Listening { control: bind("ctl.sock"), stream: bind("stream.sock"), directory }
}

fn exec(directory: &Path, options: &[&str]) -> Running {
    let mut command = Command::new(hyperctl_path());
    command.arg("exec").arg("--dir").arg(directory).args(options).args(["c", "--", "program"]);
    spawn(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()))
}

impl Listening {
    /// Accepts the next host, which has not sent anything yet.
    fn accept(&self) -> Guest {
        let [control, stream] = [&self.control, &self.stream].map(|listener| {
            let (connection, _) = listener.accept().unwrap();
            connection.set_read_timeout(Some(PATIENCE)).unwrap();
            connection
        });
        Guest { control, stream, decoder: ControlDecoder::default() }
    }
}

impl Guest {
    fn say(&mut self, message: Message, payload: &[u8]) {
        self.control.write_all(&frame::control(message, payload).unwrap()).unwrap();
    }

    /// The next command.
    fn hear(&mut self) -> (Option<Message>, Vec<u8>) {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return (Message::from_id(frame.tag), frame.payload.to_vec());
            }
            let mut chunk = [0; 4096];
            let count = self.control.read(&mut chunk).unwrap();
            assert_ne!(count, 0, "hyperctl hung up");
            self.decoder.push(&chunk[..count]);
            self.say(Message::Next, &u32::try_from(count).unwrap().to_be_bytes());
        }
    }

    /// Answers the greetings on both channels, and the GETVERSION behind them, by which hyperctl says that it
    /// reads on after the end of a stream.
    fn greet(&mut self) {
        let (message, payload) = self.hear();
        assert!(message == Some(Message::Ping) && greeting::is_greeting(&payload));
        self.say(Message::Ack, &payload);
        let mut greeting = [0; frame::STREAM_HEADER];
        self.stream.read_exact(&mut greeting).unwrap();
        self.stream.write_all(&greeting).unwrap();
        assert_eq!(self.hear().0, Some(Message::GetVersion));
        self.say(Message::Ack, &4244u32.to_be_bytes());
    }

    /// The process of an EXECCMD.
    fn hear_exec(&mut self) -> Value {
        let (message, payload) = self.hear();
        assert_eq!(message, Some(Message::ExecCmd));
        from_slice::<Value>(&payload).unwrap()["process"].clone()
    }

    /// Waits for a WINSIZE for that process. Returns its rows and columns.
    fn hear_size(&mut self, process: &Value) -> (i64, i64) {
        let (message, payload) = self.hear();
        assert_eq!(message, Some(Message::WinSize));
        let asked: Value = from_slice(&payload).unwrap();
        assert_eq!((&asked["container"], &asked["process"]), (&json!("c"), &process["id"]));
        (asked["row"].as_i64().unwrap(), asked["column"].as_i64().unwrap())
    }

    /// Ends the process with status 9.
    fn end(&mut self, process: &Value) {
        let number = process["stdio"].as_u64().unwrap();
        self.stream.write_all(&frame::stream(number, b"").unwrap()).unwrap();
        let event = json!({"container": "c", "process": process["id"], "event": "finished", "status": 9});
        self.say(Message::ProcessAsyncEvent, event.to_string().as_bytes());
    }

    /// Waits for a SIGNALPROCESS for that process. Returns its signal.
    fn hear_signal(&mut self, process: &Value) -> i64 {
        let (message, payload) = self.hear();
        assert_eq!(message, Some(Message::SignalProcess));
        let asked: Value = from_slice(&payload).unwrap();
        assert_eq!((&asked["container"], &asked["process"]), (&json!("c"), &process["id"]));
        asked["signal"].as_i64().unwrap()
    }
}

#[test]
fn a_signal_while_the_program_is_being_started_is_the_programs() {
    let place = listen();
    let child = exec(place.directory.path(), &[]);
    let mut guest = place.accept();
    guest.greet();
    let process = guest.hear_exec();
    // The start has no answer yet, because its container is still being made.
    signal(&child, Signal::SIGTERM);
    assert_eq!(guest.hear_signal(&process), 15);
    guest.say(Message::Ack, b"");
    guest.say(Message::Ack, b"");
    guest.end(&process);
    let output = finish(child);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(9), ""));
}

/// A signal that arrives before hyperctl has asked for the program waits until it has, and does not end
/// hyperctl.
#[test]
fn a_signal_before_the_program_is_asked_for_waits_for_it() {
    let place = listen();
    let child = exec(place.directory.path(), &[]);
    let mut guest = place.accept();
    signal(&child, Signal::SIGUSR1);
    guest.greet();
    let process = guest.hear_exec();
    assert_eq!(guest.hear_signal(&process), 10);
    guest.say(Message::Ack, b"");
    guest.say(Message::Ack, b"");
    guest.end(&process);
    assert_eq!(finish(child).status.code(), Some(9));
}

#[test]
fn a_terminals_size_is_sent_right_behind_the_start() {
    let place = listen();
    let pty = openpty(None, None).unwrap();
    tty::set_size(&pty.slave, 33, 99).unwrap();
    let mut command = Command::new(hyperctl_path());
    command.args(["exec", "-t", "--dir"]).arg(place.directory.path()).args(["c", "program"]);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    let child = spawn(command.stdout(pty.slave.try_clone().unwrap()));
    let mut guest = place.accept();
    guest.greet();
    let process = guest.hear_exec();
    assert_eq!(guest.hear_size(&process), (33, 99));
    // The start has no answer yet.
    tty::set_size(&pty.slave, 44, 111).unwrap();
    signal(&child, Signal::SIGWINCH);
    assert_eq!(guest.hear_size(&process), (44, 111));
    for _ in 0..3 {
        guest.say(Message::Ack, b"");
    }
    guest.end(&process);
    assert_eq!(finish(child).status.code(), Some(9));
}

#[test]
fn a_program_that_is_still_being_started_is_ended_with_hyperctl() {
    // The third signal ends hyperctl, or with a terminal the first.
    for (options, signals, last) in [(&[][..], 3, 9), (&["-t"], 1, 1)] {
        let place = listen();
        let child = exec(place.directory.path(), options);
        let mut guest = place.accept();
        guest.greet();
        let process = guest.hear_exec();
        for _ in 1..signals {
            signal(&child, Signal::SIGINT);
            assert_eq!(guest.hear_signal(&process), 2);
        }
        signal(&child, Signal::SIGINT);
        assert_eq!(guest.hear_signal(&process), last);
        assert_eq!(finish(child).status.code(), Some(130));
    }
}

#[test]
fn who_waits_for_the_guest_can_be_told_to_end() {
    let place = listen();
    let child = exec(place.directory.path(), &[]);
    // hyperctl is connected, and gets no answer.
    let _guest = place.accept();
    signal(&child, Signal::SIGTERM);
    let output = finish(child);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(143), ""));
}

//! Tests of the server with hosts of this machine and a guest that the test plays.

use std::io::{Read, Write};
use std::thread::JoinHandle;

use serde_json::Value;

use super::*;
use crate::{CallError, Client};

const SOON: Duration = Duration::from_secs(20);
/// How long a test waits to see that nothing happens.
const QUIET: Duration = Duration::from_millis(100);

/// How many bytes are sent before they are credited.
const CHUNK_SENT: usize = 1000;

/// The guest's ends of both channels, and the thread that serves it.
struct Played {
    directory: tempfile::TempDir,
    control: UnixStream,
    stream: UnixStream,
    commands: ControlDecoder,
    input: StreamDecoder,
    served: JoinHandle<Fault>,
}

/// A guest that has sent READY, with or without flow control.
fn played(has_flow: bool) -> Played {
    let directory = tempfile::tempdir().unwrap();
    let socket = HostSocket::open(directory.path()).unwrap();
    let [(ours, control), (our_stream, stream)] = [(); 2].map(|()| UnixStream::pair().unwrap());
    control.set_read_timeout(Some(SOON)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let served = std::thread::spawn(move || serve(socket, ours, our_stream, CHUNK_SENT));
    let (commands, input) = (ControlDecoder::default(), StreamDecoder::default());
    let mut guest = Played { directory, control, stream, commands, input, served };
    guest.say(Message::Ready, b"");
    assert_eq!(guest.input(), (flow::STREAM, Ask::Begin.frame()[frame::STREAM_HEADER..].to_vec()));
    let answer = if has_flow { flow::BEGUN.encode().to_vec() } else { Vec::new() };
    guest.output(flow::STREAM, &answer);
    assert_eq!(guest.command(), (Message::GetVersion, encode(&Command::Features).unwrap().1));
    guest.say(Message::Ack, b"");
    guest
}

impl Played {
    fn host(&self) -> Client {
        let (control, stream) = enter(self.directory.path()).unwrap();
        Client::over(control, stream).unwrap()
    }

    fn say(&mut self, message: Message, payload: &[u8]) {
        self.control.write_all(&frame::control(message, payload).unwrap()).unwrap();
    }

    /// The next command, credited as it is read.
    fn command(&mut self) -> (Message, Vec<u8>) {
        loop {
            if let Some(frame) = self.commands.next_frame().unwrap() {
                return (Message::from_id(frame.tag).unwrap(), frame.payload.to_vec());
            }
            let mut chunk = [0; 4096];
            let count = self.control.read(&mut chunk).unwrap();
            assert!(count > 0 && count <= CHUNK_SENT, "{count}");
            self.commands.push(&chunk[..count]);
            self.say(Message::Next, &u32::try_from(count).unwrap().to_be_bytes());
        }
    }

    /// Reads an EXECCMD and returns the numbers of its process's streams.
    fn exec(&mut self) -> (u64, u64) {
        let (message, payload) = self.command();
        assert_eq!(message, Message::ExecCmd);
        let process = serde_json::from_slice::<Value>(&payload).unwrap()["process"].clone();
        (process["stdio"].as_u64().unwrap(), process["stderr"].as_u64().unwrap())
    }

    fn output(&mut self, number: u64, payload: &[u8]) {
        self.stream.write_all(&frame::stream(number, payload).unwrap()).unwrap();
    }

    /// The next frame from the hosts.
    fn input(&mut self) -> (u64, Vec<u8>) {
        loop {
            if let Some(frame) = self.input.next_frame().unwrap() {
                return (frame.tag, frame.payload.to_vec());
            }
            let mut chunk = [0; 4096];
            let count = self.stream.read(&mut chunk).unwrap();
            assert_ne!(count, 0);
            self.input.push(&chunk[..count]);
        }
    }

    fn hears_nothing(&mut self) {
        self.stream.set_read_timeout(Some(QUIET)).unwrap();
        assert!(self.input.is_between_frames() && self.stream.read(&mut [0]).is_err());
        self.stream.set_read_timeout(Some(SOON)).unwrap();
    }

    fn ends(self) -> String {
        drop((self.control, self.stream));
        self.served.join().unwrap().to_string()
    }
}

/// Sends EXECCMD for a process with these stream numbers.
fn exec(client: &Client, id: &str, stdio: u64) -> crate::Pending {
    let process = json!({"id": id, "args": ["x"], "stdio": stdio, "stderr": stdio + 1});
    client.send_raw(6, json!({"container": "c", "process": process}).to_string().as_bytes())
}

fn finished(id: &str) -> Vec<u8> {
    json!({"container": "c", "process": id, "event": "finished", "status": 0}).to_string().into_bytes()
}

#[test]
fn a_process_may_write_before_its_start_is_answered() {
    let mut guest = played(true);
    let client = Client::visit_control(guest.directory.path()).unwrap();
    let start = exec(&client, "a", 1);
    let (stdout, _) = guest.exec();
    guest.output(stdout, b"early");
    // A client that took the output for a violation would hang up now.
    guest.hears_nothing();
    guest.say(Message::Ack, b"");
    start.wait(SOON).unwrap();
}

#[test]
fn each_hears_what_is_its_own_and_a_refusal_has_its_turn() {
    let mut guest = played(true);
    let (one, two) = (guest.host(), guest.host());
    one.ready(SOON).unwrap();
    let streams = [one.streams(1, 2), two.streams(1, 2)];
    let started = exec(&one, "p", 1);
    let first = guest.exec();
    let also = exec(&two, "q", 1);
    let second = guest.exec();
    assert_ne!(first, second, "the numbers are the guest's");
    // The command is refused here, and answered after the commands that were sent before it.
    let again = exec(&one, "r", 1);
    assert_eq!(guest.command().0, Message::Ping);
    guest.say(Message::Ack, b"for one");
    guest.say(Message::Error, b"for two");
    assert_eq!(started.wait(SOON).unwrap(), b"for one");
    assert_eq!(also.wait(SOON), Err(CallError::Refused("for two".to_owned())));
    assert!(matches!(again.wait(QUIET), Err(CallError::Late(_))));
    guest.say(Message::Ack, b"");
    assert!(matches!(again.wait(SOON), Err(CallError::Refused(why)) if why.contains("stream 1 ")));
    // Nothing is left of a process that was refused. The guest gets one of the same name from another host.
    let also = exec(&two, "p", 1);
    let third = guest.exec();
    guest.say(Message::Error, b"exists");
    also.wait(SOON).unwrap_err();
    guest.output(third.0, b"nobody's");
    guest.output(first.0, b"out");
    guest.output(first.1, b"err");
    guest.output(first.0, b"");
    // Another end, as in answer to a frame that came too late.
    guest.output(first.0, b"");
    guest.say(Message::ProcessAsyncEvent, &finished("p"));
    assert_eq!(streams[0].stdout.read_to_end(SOON).unwrap(), b"out");
    assert_eq!(streams[0].stderr.as_ref().unwrap().read_to_end(SOON).unwrap(), b"err");
    assert_eq!(one.event(SOON).unwrap().process, "p");
    assert!(matches!(two.event(QUIET), Err(CallError::Late(_))));
    assert_eq!(guest.ends(), "hyperinit: serving the guest: the guest closed the control channel");
}

#[test]
fn stdin_is_sent_as_far_as_it_is_read() {
    let mut guest = played(true);
    let (one, two) = (guest.host(), guest.host());
    let numbers = [&one, &two].map(|client| {
        let started = exec(client, "p", 1);
        let numbers = guest.exec();
        guest.say(Message::Ack, b"");
        started.wait(SOON).unwrap();
        numbers.0
    });
    let input = one.streams(1, 2).stdin;
    let writer = std::thread::spawn(move || input.write_in(100_000, &[b'x'; 200_000]).map(|()| input));
    assert_eq!(guest.input(), (numbers[0], vec![b'x'; 32 << 10]));
    guest.hears_nothing();
    // A host whose process does not read delays no other host.
    two.streams(1, 2).stdin.write(b"y").unwrap();
    assert_eq!(guest.input(), (numbers[1], b"y".to_vec()));
    let (mut sent, mut read) = (32 << 10, 0);
    while sent < 200_000 {
        let bytes = u32::try_from((sent - read).min(10_000)).unwrap();
        guest.output(flow::STREAM, &Credit { stdio: numbers[0], bytes }.encode());
        read += bytes as usize;
        let (number, payload) = guest.input();
        sent += payload.len();
        assert!(number == numbers[0] && sent - read <= 32 << 10, "{sent} sent, {read} read");
    }
    let input = writer.join().unwrap().unwrap();
    // The stream has ended: what comes for it is discarded.
    guest.output(numbers[0], b"");
    input.write(&[0; 1 << 20]).unwrap();
    guest.hears_nothing();
}

#[test]
fn output_that_nobody_reads_is_held() {
    let mut guest = played(true);
    let slow = guest.host();
    let streams = slow.streams(1, 2);
    let started = exec(&slow, "p", 1);
    let (stdio, _) = guest.exec();
    guest.say(Message::Ack, b"");
    started.wait(SOON).unwrap();
    // Fills what a client keeps, what the sockets hold, and what the server keeps for the client.
    let mut sent = 0;
    guest.stream.set_nonblocking(true).unwrap();
    let held = loop {
        guest.stream.set_nonblocking(false).unwrap();
        guest.output(stdio, &[b'x'; 10_000]);
        sent += 10_000;
        guest.stream.set_nonblocking(true).unwrap();
        let mut word = [0; 24];
        match guest.stream.read(&mut word) {
            Ok(count) => break word[..count].to_vec(),
            Err(_) => assert!(sent < 16 << 20, "nothing is held"),
        }
    };
    assert_eq!(held, Ask::Hold(stdio).frame());
    guest.stream.set_nonblocking(false).unwrap();
    let mut got = 0;
    while got < sent {
        got += streams.stdout.recv_within(SOON).unwrap().unwrap().len();
    }
    assert_eq!(guest.input(), (flow::STREAM, Ask::Go(stdio).frame()[frame::STREAM_HEADER..].to_vec()));
}

#[test]
fn a_guest_without_flow_control_is_served_too() {
    let mut guest = played(false);
    let host = guest.host();
    let started = exec(&host, "p", 1);
    let (stdio, _) = guest.exec();
    guest.say(Message::Ack, b"");
    started.wait(SOON).unwrap();
    host.streams(1, 2).stdin.write(&[b'x'; 100_000]).unwrap();
    let mut got = 0;
    while got < 100_000 {
        let (number, payload) = guest.input();
        assert_eq!(number, stdio);
        got += payload.len();
    }
}

#[test]
fn so_many_commands_of_one_host_and_then_the_others() {
    let mut guest = played(true);
    let (greedy, other) = (guest.host(), guest.host());
    let pending: Vec<_> = (0..100).map(|_| greedy.send(Command::Ping)).collect();
    for _ in 0..COMMANDS_MAX {
        assert_eq!(guest.command().0, Message::Ping);
    }
    let version = other.send(Command::GetVersion);
    assert_eq!(guest.command().0, Message::GetVersion, "it is not behind all of them");
    for _ in 0..COMMANDS_MAX {
        guest.say(Message::Ack, b"");
    }
    guest.say(Message::Ack, b"4");
    assert_eq!(version.wait(SOON).unwrap(), b"4");
    for _ in COMMANDS_MAX..100 {
        assert_eq!(guest.command().0, Message::Ping);
        guest.say(Message::Ack, b"");
    }
    pending.into_iter().for_each(|pending| drop(pending.wait(SOON).unwrap()));
}

#[test]
fn who_leaves_is_missed_by_its_own_programs_only() {
    let mut guest = played(true);
    let (mut control, stream) = enter(guest.directory.path()).unwrap();
    let host = Client::over(control.try_clone().unwrap(), stream).unwrap();
    let other = guest.host();
    for (client, id) in [(&host, "ended"), (&host, "runs"), (&other, "other")] {
        let started = exec(client, id, if id == "ended" { 1 } else { 3 });
        guest.exec();
        guest.say(Message::Ack, b"");
        started.wait(SOON).unwrap();
    }
    guest.say(Message::ProcessAsyncEvent, &finished("ended"));
    assert_eq!(host.event(SOON).unwrap().process, "ended");
    // The complete commands that it left behind are sent, before its goodbye.
    let half = frame::control(Message::RemoveContainer, b"half of it").unwrap();
    control
        .write_all(&[&frame::control(Message::OnlineCpuMem, b"null").unwrap(), &half[..12]].concat())
        .unwrap();
    drop(host);
    assert_eq!(guest.command().0, Message::OnlineCpuMem);
    let (message, payload) = guest.command();
    let wanted = json!({"container": "c", "process": "runs", "signal": 9});
    assert_eq!(
        (message, serde_json::from_slice::<Value>(&payload).unwrap()),
        (Message::SignalProcess, wanted)
    );
    guest.say(Message::Ack, b"");
    guest.say(Message::Error, b"it is gone");
    let ping = other.send(Command::Ping);
    assert_eq!(guest.command().0, Message::Ping);
    // The guest's end is reported after what the guest sent before it.
    guest.say(Message::Ack, b"last");
    guest.say(Message::ProcessAsyncEvent, &finished("other"));
    drop(guest.ends());
    assert_eq!(ping.wait(SOON).unwrap(), b"last");
    assert_eq!(other.event(SOON).unwrap().process, "other");
    assert!(matches!(other.event(SOON), Err(CallError::Broken(_))));
}

#[test]
fn a_guest_that_breaks_the_protocol_is_served_no_more() {
    for (message, payload, says) in [
        (Message::Ack, &b""[..], "a reply to no command"),
        (Message::Next, &[0, 0, 1, 0], "control bytes of "),
        (Message::Ping, b"", "which only a host does"),
        (Message::ProcessAsyncEvent, b"{}", "a bad PROCESSASYNCEVENT"),
    ] {
        let mut guest = played(true);
        guest.say(message, payload);
        let why = guest.served.join().unwrap().to_string();
        assert!(why.contains(says), "{why}");
    }
}

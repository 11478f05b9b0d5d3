//! Tests of the client with a guest that the test plays.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc::channel;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen as listen_for, socket,
};

use super::*;
use hyperinit_protocol::command::{RemoveContainer, WriteFile};
use hyperinit_protocol::frame::{self, ControlDecoder, Message, StreamDecoder};
use hyperinit_protocol::greeting as host;

const SOON: Duration = Duration::from_secs(20);
/// How long a test waits to see that nothing happens. On a slow machine a broken client might pass such a
/// check; a correct one never fails it.
const QUIET: Duration = Duration::from_millis(50);

/// The guest's ends of both channels.
struct Guest {
    control: UnixStream,
    stream: UnixStream,
    decoder: ControlDecoder,
    streams: StreamDecoder,
}

fn pair() -> (Client, Guest) {
    let (control, stream, guest) = sockets();
    (Client::over(control, stream).unwrap(), guest)
}

/// The host's ends of both channels, and the guest.
fn sockets() -> (UnixStream, UnixStream, Guest) {
    let (host_control, control) = UnixStream::pair().unwrap();
    let (host_stream, stream) = UnixStream::pair().unwrap();
    control.set_read_timeout(Some(SOON)).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let guest =
        Guest { control, stream, decoder: ControlDecoder::default(), streams: StreamDecoder::default() };
    (host_control, host_stream, guest)
}

impl Guest {
    fn say(&mut self, message: Message, payload: &[u8]) {
        self.control.write_all(&frame::control(message, payload).unwrap()).unwrap();
    }

    fn next(&mut self, count: usize) {
        self.say(Message::Next, &u32::try_from(count).unwrap().to_be_bytes());
    }

    /// Reads once and credits what it read, as a guest does.
    fn read(&mut self, at_most: usize) -> usize {
        let mut chunk = vec![0; at_most];
        let count = self.control.read(&mut chunk).unwrap();
        assert_ne!(count, 0, "the client hung up");
        self.decoder.push(&chunk[..count]);
        self.next(count);
        count
    }

    /// The next command, read in pieces of at most `at_most` bytes.
    fn command(&mut self, at_most: usize) -> (u32, Vec<u8>) {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return (frame.tag, frame.payload.to_vec());
            }
            self.read(at_most);
        }
    }

    fn output(&mut self, number: u64, payload: &[u8]) {
        self.stream.write_all(&frame::stream(number, payload).unwrap()).unwrap();
    }

    /// The next frame on the stream channel.
    fn input(&mut self) -> (u64, Vec<u8>) {
        loop {
            if let Some(frame) = self.streams.next_frame().unwrap() {
                return (frame.tag, frame.payload.to_vec());
            }
            let mut chunk = [0; 4096];
            let count = self.stream.read(&mut chunk).unwrap();
            assert_ne!(count, 0, "the client hung up");
            self.streams.push(&chunk[..count]);
        }
    }
}

fn remove(container: &str) -> Command {
    Command::RemoveContainer(RemoveContainer {
        container: ContainerId::try_from(container.to_owned()).unwrap(),
    })
}

fn large() -> Command {
    let file = hyperinit_protocol::command::File {
        container: ContainerId::try_from("c".to_owned()).unwrap(),
        file: "/f".to_owned(),
    };
    Command::WriteFile(WriteFile { file, data: vec![7; 3000] })
}

fn broken(result: Result<Vec<u8>, CallError>) -> String {
    match result {
        Err(CallError::Broken(why)) => why,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_call_has_its_reply() {
    let (client, mut guest) = pair();
    guest.say(Message::Ready, b"");
    client.ready(SOON).unwrap();
    let version = client.send(Command::GetVersion);
    assert_eq!(guest.command(4096), (0, b"null".to_vec()));
    guest.say(Message::Ack, &4244u32.to_be_bytes());
    assert_eq!(version.wait(SOON), Ok(4244u32.to_be_bytes().to_vec()));

    let refused = client.send(remove("x"));
    assert_eq!(guest.command(4096).1, br#"{"container":"x"}"#);
    guest.say(Message::Error, b"no such container");
    assert_eq!(refused.wait(SOON), Err(CallError::Refused("no such container".to_owned())));
}

/// A host sends at most 512 bytes, then nothing until every byte is credited, in whatever pieces the credit
/// comes.
#[test]
fn flow_control_is_runvs() {
    let (client, mut guest) = pair();
    let reply = client.send(large());
    let (_, payload) = encode(&large()).unwrap();
    let total = payload.len() + frame::CONTROL_HEADER;
    let mut got = 0;
    while got < total {
        let expected = CONTROL_CHUNK.min(total - got);
        let mut chunk = vec![0; expected];
        guest.control.read_exact(&mut chunk).unwrap();
        guest.decoder.push(&chunk);
        got += expected;
        guest.next(1);
        guest.next(expected - 2);
        guest.control.set_read_timeout(Some(QUIET)).unwrap();
        assert!(guest.control.read(&mut [0]).is_err(), "written before the credit for byte {got} came");
        guest.control.set_read_timeout(Some(SOON)).unwrap();
        guest.next(1);
    }
    let frame = guest.decoder.next_frame().unwrap().unwrap();
    assert_eq!((frame.tag, frame.payload), (15, &payload[..]));
    guest.say(Message::Ack, b"");
    assert_eq!(reply.wait(SOON), Ok(Vec::new()));
    assert_eq!(client.credit(), (total as u64, total as u64));
}

#[test]
fn replies_are_first_in_first_out() {
    let (client, mut guest) = pair();
    let pending: Vec<Pending> = (0..40).map(|number| client.send(remove(&format!("c{number}")))).collect();
    for number in 0..40 {
        assert_eq!(guest.command(7).1, format!(r#"{{"container":"c{number}"}}"#).into_bytes());
    }
    for number in 0..40 {
        match number % 2 {
            0 => guest.say(Message::Ack, &[number]),
            _ => guest.say(Message::Error, &[b'0' + number % 10]),
        }
    }
    // The replies are taken in the reverse order.
    for (number, pending) in (0..40).zip(&pending).rev() {
        let expected = match number % 2 {
            0 => Ok(vec![number]),
            _ => Err(CallError::Refused((number % 10).to_string())),
        };
        assert_eq!(pending.wait(SOON), expected);
    }
}

#[test]
fn a_wrong_credit_is_an_error_and_not_a_hang() {
    let (client, mut guest) = pair();
    let reply = client.send(Command::Ping);
    guest.command(4096);
    guest.next(1);
    assert!(broken(reply.wait(SOON)).contains("credited 13 control bytes of 12"));
    assert!(broken(client.call(Command::Ping)).contains("credited 13"), "and it stays so");

    let (client, mut guest) = pair();
    let reply = client.send(Command::Ping);
    guest.control.read_exact(&mut [0; 12]).unwrap();
    guest.next(11);
    guest.say(Message::Ack, b"");
    assert!(broken(reply.wait(SOON)).contains("not credited 1"));

    let (client, mut guest) = pair();
    let reply = client.send(Command::Ping);
    guest.command(4096);
    guest.say(Message::Next, &[0, 0, 0]);
    assert!(broken(reply.wait(SOON)).contains("NEXT with 3 bytes"));
}

#[test]
fn a_guest_that_breaks_the_protocol_is_told_from_one_that_is_slow() {
    let cases: [(&[u8], &str); 5] = [
        (&frame::control(Message::Ack, b"").unwrap(), "reply to no command"),
        (&[0, 0, 0, 9, 0, 0, 0, 7], "7 bytes"),
        (&frame::control(2u32, b"").unwrap(), "message 2"),
        (&frame::control(Message::Ping, b"").unwrap(), "PING, which only a host does"),
        (&frame::control(Message::ProcessAsyncEvent, b"{}").unwrap(), "bad PROCESSASYNCEVENT"),
    ];
    for (bytes, why) in cases {
        let (client, mut guest) = pair();
        guest.control.write_all(bytes).unwrap();
        let error = client.event(SOON).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    let (client, guest) = pair();
    assert!(matches!(client.send(Command::Ping).wait(QUIET), Err(CallError::Late(_))));
    assert!(matches!(client.ready(QUIET), Err(CallError::Late(_))));
    assert!(matches!(client.event(QUIET), Err(CallError::Late(_))));
    drop(guest);
    assert!(broken(client.call(Command::Ping)).len() > 1);
}

#[test]
fn events_come_between_replies_and_survive_the_end() {
    let (client, mut guest) = pair();
    let finished = |container: &str, process: &str, status: u8| {
        serde_json::to_vec(&serde_json::json!({
            "container": container, "process": process, "event": "finished", "status": status
        }))
        .unwrap()
    };
    let reply = client.send(Command::Ping);
    guest.command(4096);
    let mut bytes = frame::control(Message::ProcessAsyncEvent, &finished("c", "say \"hi\"", 3)).unwrap();
    bytes.extend(frame::control(Message::Ack, b"").unwrap());
    bytes.extend(frame::control(Message::ProcessAsyncEvent, &finished("c", "init", 137)).unwrap());
    for byte in bytes {
        guest.control.write_all(&[byte]).unwrap();
    }
    drop(guest);
    assert_eq!(reply.wait(SOON), Ok(Vec::new()));
    let id = |id: &str| ContainerId::try_from(id.to_owned()).unwrap();
    let process = |id: &str| ProcessId::try_from(id.to_owned()).unwrap();
    assert_eq!(client.finished(&id("c"), &process("init"), SOON), Ok(137));
    let other = Finished { container: "c".to_owned(), process: "say \"hi\"".to_owned(), status: 3 };
    assert_eq!(client.event(SOON), Ok(other));
    assert!(matches!(client.event(SOON), Err(CallError::Broken(_))));
}

#[test]
fn output_is_taken_apart_by_number_and_ends_with_stdio() {
    let (client, mut guest) = pair();
    let one = client.streams(1, 2);
    let two = client.streams(3, 0);
    guest.output(1, b"out");
    guest.output(3, b"tty");
    guest.output(2, b"err");
    guest.output(1, b"put");
    guest.output(1, b"");
    assert_eq!(one.stdout.read_to_end(SOON).unwrap(), b"output");
    let stderr = one.stderr.unwrap();
    assert_eq!(stderr.read_to_end(SOON).unwrap(), b"err");
    assert_eq!((one.stdout.eof_frames(), stderr.eof_frames()), (1, 0));
    assert_eq!(two.stdout.recv_within(SOON).unwrap().unwrap(), b"tty");
    assert!(matches!(two.stdout.recv_within(QUIET), Err(CallError::Late(_))));

    guest.output(1, b"late");
    let error = two.stdout.recv().unwrap_err().to_string();
    assert!(error.contains("4 bytes on stream 1 after its end"), "{error}");
}

#[test]
fn output_that_nobody_asked_for_is_a_violation() {
    let (client, mut guest) = pair();
    let known = client.streams(1, 2);
    guest.output(9, b"");
    guest.output(9, b"x");
    assert!(known.stdout.recv().unwrap_err().to_string().contains("1 bytes on stream 9, nobody's"));
    assert!(client.broken().is_some());
}

#[test]
fn a_visitor_hears_its_own_and_nobody_elses() {
    let (control, stream, mut guest) = sockets();
    let others = streams::Others::ThrownAway;
    let (client, _) = Client::start(control.into(), stream.into(), &[], others).unwrap();
    let own = client.streams(1, 2);
    guest.output(9, b"somebody else's");
    guest.output(1, b"own");
    guest.output(9, b"");
    guest.output(9, b"and who has the number next");
    guest.output(1, b"");
    assert_eq!(own.stdout.read_to_end(SOON).unwrap(), b"own");
    assert_eq!(client.broken(), None);
}

/// The patience with a guest that listens.
fn patience(answers: &'static [Duration]) -> greeting::Patience {
    greeting::Patience { answers, deadline: Instant::now() + SOON }
}

/// Greets on both channels, while the test plays the guest.
fn greet_and(
    known: &'static [(u64, u64)],
    answers: &'static [Duration],
    play: impl FnOnce(&mut Guest),
) -> (Client, Vec<ProcessStreams>, Guest) {
    let (control, stream, mut guest) = sockets();
    let host = std::thread::spawn(move || {
        let (mut control, mut stream) = (control.into(), stream.into());
        greeting::control(&mut control, patience(answers)).unwrap();
        greeting::streams(&mut stream, known, patience(answers)).unwrap();
        Client::start(control, stream, known, streams::Others::Wrong).unwrap()
    });
    play(&mut guest);
    let (client, streams) = host.join().unwrap();
    (client, streams, guest)
}

/// Reads the next greeting on the control channel, and returns its answer.
fn greeted(guest: &mut Guest) -> Vec<u8> {
    let (message, payload) = guest.command(4096);
    assert!(message == Message::Ping.id() && host::is_greeting(&payload));
    frame::control(Message::Ack, &payload).unwrap()
}

#[test]
fn what_comes_before_the_answer_to_a_greeting_is_anothers() {
    let event = br#"{"container":"c","process":"p","event":"finished","status":3}"#;
    let event = frame::control(Message::ProcessAsyncEvent, event).unwrap();
    let ready = frame::control(Message::Ready, b"").unwrap();
    let stale = [
        frame::control(Message::Ack, b"another's").unwrap(),
        frame::control(Message::Next, &512u32.to_be_bytes()).unwrap(),
        frame::control(Message::Error, b"another's").unwrap(),
    ];
    let whole = [&ready[..], &stale.concat(), &event].concat();
    let out = |number, payload: &[u8]| frame::stream(number, payload).unwrap();
    for (half, portion) in [(0, 4096), (0, 1), (1, 4096), (11, 3)] {
        let rest_of_a_frame = &frame::control(Message::Ack, b"1234").unwrap()[12 - half..];
        let (client, streams, mut guest) = greet_and(&[(1, 2)], &[SOON], |guest| {
            let bytes = [rest_of_a_frame, &whole, &greeted(guest)].concat();
            bytes.chunks(portion).for_each(|bytes| guest.control.write_all(bytes).unwrap());
            let (number, end) = guest.input();
            assert!(number >= 1 << 63 && end.is_empty());
            let rest_of_a_frame = &out(9, b"")[12 - half..];
            let bytes = [
                rest_of_a_frame,
                &out(9, b"another's"),
                &out(1, b"mine"),
                &out(number, b""),
                &out(2, b"err"),
            ];
            bytes.concat().chunks(portion).for_each(|bytes| guest.stream.write_all(bytes).unwrap());
        });
        let reply = client.send(Command::Ping);
        assert_eq!(guest.command(4096).0, Message::Ping.id());
        guest.say(Message::Ack, b"own");
        assert_eq!(reply.wait(SOON), Ok(b"own".to_vec()));
        let streams = streams.into_iter().next().unwrap();
        assert_eq!(streams.stderr.unwrap().recv_within(SOON).unwrap().unwrap(), b"err");
        match half {
            0 => {
                client.ready(SOON).unwrap();
                assert_eq!(client.event(SOON).unwrap().status, 3);
                assert_eq!(streams.stdout.recv_within(SOON).unwrap().unwrap(), b"mine");
            }
            // Where frames begin before the answer cannot be known.
            _ => assert!(matches!(client.event(QUIET), Err(CallError::Late(_)))),
        }
    }
}

#[test]
fn who_is_not_answered_greets_again_and_hears_the_last_answer() {
    let (client, _, mut guest) = greet_and(&[], &[QUIET, SOON], |guest| {
        let first = greeted(guest);
        let second = greeted(guest);
        assert_ne!(first, second);
        // The answer to the first greeting was only late.
        guest.control.write_all(&[first, second].concat()).unwrap();
        guest.input();
        let (number, _) = guest.input();
        guest.output(number, b"");
    });
    let reply = client.send(Command::Ping);
    guest.command(4096);
    guest.say(Message::Ack, b"own");
    assert_eq!(reply.wait(SOON), Ok(b"own".to_vec()));
    assert_eq!(client.broken(), None);
}

/// The client waits for a guest that does not listen, and leaves one that never answers.
#[test]
fn a_greeting_that_nobody_takes_has_its_time() {
    let (control, _, _guest) = sockets();
    let gone = greeting::Patience { answers: &[SOON], deadline: Instant::now() };
    let error = greeting::control(&mut control.into(), gone).unwrap_err().to_string();
    assert!(error.contains("it does not listen, or to another host"), "{error}");

    let (control, _, mut guest) = sockets();
    let host = std::thread::spawn(move || greeting::control(&mut control.into(), patience(&[QUIET, QUIET])));
    (0..2).for_each(|_| drop(greeted(&mut guest)));
    let error = host.join().unwrap().unwrap_err().to_string();
    assert!(error.contains("no answer"), "{error}");
}

#[test]
fn what_an_attempt_heard_that_failed_is_heard() {
    for control_answers in [false, true] {
        let (directory, [control, stream]) = listen();
        let at = directory.path().to_owned();
        let host = std::thread::spawn(move || Client::resume(&at, &[(1, 2)]).unwrap());
        let accept = || {
            let [control, stream] = [&control, &stream].map(|listener| {
                let (connection, _) = listener.accept().unwrap();
                connection.set_read_timeout(Some(SOON)).unwrap();
                connection
            });
            Guest { control, stream, decoder: ControlDecoder::default(), streams: StreamDecoder::default() }
        };
        let event = |status: u8| {
            let event =
                serde_json::json!({"container": "c", "process": "p", "event": "finished", "status": status});
            event.to_string().into_bytes()
        };
        let mut guest = accept();
        guest.say(Message::Ready, b"");
        guest.say(Message::ProcessAsyncEvent, &event(1));
        let answer = greeted(&mut guest);
        guest.output(9, b"another's");
        guest.output(1, b"one ");
        guest.output(2, b"err");
        guest.stream.write_all(&frame::stream(1, b"half").unwrap()[..14]).unwrap();
        if control_answers {
            guest.control.write_all(&answer).unwrap();
            guest.input();
        }
        guest.say(Message::ProcessAsyncEvent, &event(2));
        // The guest sends one more event before it learns that the host has left.
        assert_eq!(guest.control.read(&mut [0]).unwrap(), 0);
        guest.say(Message::ProcessAsyncEvent, &event(3));
        drop(guest);

        let mut guest = accept();
        guest.say(Message::Ready, b"");
        let answer = greeted(&mut guest);
        guest.control.write_all(&answer).unwrap();
        guest.output(1, b"half");
        let (number, _) = guest.input();
        guest.output(number, b"");
        guest.output(1, b"");
        let (client, streams) = host.join().unwrap();
        client.ready(SOON).unwrap();
        let statuses = [(); 3].map(|()| client.event(SOON).unwrap().status);
        assert_eq!(statuses, [1, 2, 3], "{control_answers}");
        let streams = streams.into_iter().next().unwrap();
        assert_eq!(streams.stdout.read_to_end(SOON).unwrap(), b"one half");
        assert_eq!(streams.stderr.unwrap().read_to_end(SOON).unwrap(), b"err");
        assert_eq!(client.broken(), None);
    }
}

#[test]
fn every_attempt_may_hear_ready_and_each_once() {
    let (control, stream, mut guest) = sockets();
    let ready = frame::control(Message::Ready, b"").unwrap();
    let control = Greeted { socket: control, before: ready.repeat(2), heard: ready.clone() };
    let (client, _) = Client::start(control, stream.into(), &[], streams::Others::Wrong).unwrap();
    client.ready(SOON).unwrap();
    let reply = client.send(Command::Ping);
    guest.command(4096);
    guest.say(Message::Ack, b"");
    assert_eq!(reply.wait(SOON), Ok(Vec::new()));
    guest.say(Message::Ready, b"");
    assert!(client.event(SOON).unwrap_err().to_string().contains("READY twice"));
}

#[test]
fn a_caller_hears_no_streams_at_all() {
    let (control, stream, mut guest) = sockets();
    let others = streams::Others::Everything;
    let (client, _) = Client::start(control.into(), stream.into(), &[], others).unwrap();
    guest.stream.write_all(&[0xff; 100]).unwrap();
    let reply = client.send(Command::Ping);
    guest.command(4096);
    guest.say(Message::Ack, b"");
    assert_eq!(reply.wait(SOON), Ok(Vec::new()));
    assert_eq!(client.broken(), None);
}

#[test]
fn dropped_output_is_discarded_and_a_slow_reader_slows_the_guest() {
    let (client, mut guest) = pair();
    let (slow, gone) = (client.streams(1, 2), client.streams(3, 4));
    drop(gone.stdout);
    let writer = std::thread::spawn(move || {
        for number in [1, 3] {
            for _ in 0..64 {
                guest.output(number, &[5; 64 << 10]);
            }
        }
        guest.output(1, b"");
        guest
    });
    std::thread::sleep(QUIET);
    assert!(!writer.is_finished(), "4 MiB went nowhere");
    assert_eq!(slow.stdout.read_to_end(SOON).unwrap().len(), 64 * (64 << 10));
    writer.join().unwrap();
}

#[test]
fn a_number_that_is_used_again_is_the_new_process() {
    let (client, mut guest) = pair();
    let first = client.streams(7, 8);
    guest.output(7, b"first");
    guest.output(7, b"");
    assert_eq!(first.stdout.read_to_end(SOON).unwrap(), b"first");
    let second = client.streams(7, 8);
    guest.output(7, b"second");
    guest.output(8, b"err");
    // The first process's `Output` gets none of this, and dropping it discards none.
    assert_eq!(first.stdout.recv_within(SOON).unwrap(), None);
    assert_eq!(first.stdout.eof_frames(), 0);
    drop(first);
    guest.output(7, b" more");
    guest.output(7, b"");
    assert_eq!(second.stdout.read_to_end(SOON).unwrap(), b"second more");
    assert_eq!(second.stderr.unwrap().read_to_end(SOON).unwrap(), b"err");
}

#[test]
fn streams_that_have_ended_and_that_nobody_reads_are_forgotten() {
    let (client, mut guest) = pair();
    for number in (1..40).step_by(2) {
        let ended = client.streams(number, number + 1);
        guest.output(number, b"said");
        guest.output(number, b"");
        assert_eq!(ended.stdout.read_to_end(SOON).unwrap(), b"said");
    }
    let dropped = client.streams(41, 42);
    let kept = client.streams(43, 44);
    assert_eq!(client.streams.count(), 4);
    drop(dropped);
    // This answers a frame for a stream that is gone.
    guest.output(1, b"");
    guest.output(41, b"said");
    guest.output(41, b"");
    guest.output(43, b"");
    assert_eq!(kept.stdout.read_to_end(SOON).unwrap(), b"");
    assert_eq!(client.streams.count(), 2);
    drop(kept);
    assert_eq!((client.streams.count(), client.broken()), (0, None));
}

#[test]
fn input_is_framed_and_closed() {
    let (client, mut guest) = pair();
    let one = client.streams(1, 2);
    one.stdin.write_in(16, &[1; 40]).unwrap();
    one.stdin.close().unwrap();
    let sizes: Vec<usize> = (0..4).map(|_| guest.input().1.len()).collect();
    assert_eq!(sizes, [16, 16, 8, 0]);

    // While the guest takes nothing the writer waits; it goes on when the guest does.
    let stdin = one.stdin.clone();
    let writer = std::thread::spawn(move || stdin.write(&[2; 4 << 20]));
    let mut total = 0;
    while total < 4 << 20 {
        total += guest.input().1.len();
    }
    writer.join().unwrap().unwrap();

    // The writer does not wait for a guest that is gone.
    let stdin = one.stdin.clone();
    let writer = std::thread::spawn(move || stdin.write(&[2; 4 << 20]));
    guest.input();
    drop(guest);
    assert!(matches!(writer.join().unwrap(), Err(CallError::Broken(_))));
}

#[test]
fn hanging_up_wakes_whoever_waits() {
    let (client, guest) = pair();
    let streams = client.streams(1, 2);
    let waiting = std::thread::spawn(move || streams.stdout.recv());
    let reply = client.send(Command::Ping);
    drop(client);
    assert!(matches!(waiting.join().unwrap(), Err(CallError::Broken(_))));
    assert!(broken(reply.wait(SOON)).contains("hung up"));
    drop(guest);
}

/// A guest's directory whose sockets listen, but accept no connection.
fn listen() -> (tempfile::TempDir, [UnixListener; 2]) {
    let directory = tempfile::tempdir().unwrap();
    let listeners =
        [CONTROL_SOCKET, STREAM_SOCKET].map(|name| UnixListener::bind(directory.path().join(name)).unwrap());
    (directory, listeners)
}

/// Tries to connect there, and returns why that failed; the failure must come in time.
fn late(directory: &Path) -> String {
    let (sender, fault) = channel();
    let directory = directory.to_owned();
    std::thread::spawn(move || sender.send(Client::connect_within(&directory, QUIET, || Ok(()))));
    fault.recv_timeout(SOON).expect("it waits for ever").unwrap_err().to_string()
}

#[test]
fn who_cannot_connect_has_its_time() {
    // Another host is connected, and the queue behind it is full.
    let (directory, [control, _stream]) = listen();
    listen_for(&control, Backlog::new(0).unwrap()).unwrap();
    let _first = UnixStream::connect(directory.path().join(CONTROL_SOCKET)).unwrap();
    let why = late(directory.path());
    assert!(why.contains("ctl.sock: others are connected, or waiting to be"), "{why}");
    control.accept().unwrap();
    Client::connect(directory.path()).unwrap();

    // Another host is connecting.
    let (directory, _listeners) = listen();
    let turn = File::open(directory.path()).unwrap();
    turn.lock().unwrap();
    let why = late(directory.path());
    assert!(why.contains("others are connected, or waiting to be"), "{why}");
    turn.unlock().unwrap();
    Client::connect(directory.path()).unwrap();
}

/// A guest binds its sockets before it listens on them. The test repeats the start, because a single client
/// may come too late to be refused.
#[test]
fn a_client_waits_for_a_guest_that_has_bound_its_sockets_and_does_not_listen_yet() {
    for _ in 0..20 {
        let directory = tempfile::tempdir().unwrap();
        let bound = [CONTROL_SOCKET, STREAM_SOCKET].map(|name| {
            let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
            bind(socket.as_raw_fd(), &UnixAddr::new(&directory.path().join(name)).unwrap()).unwrap();
            socket
        });
        let at = directory.path().to_owned();
        let (connecting, has_begun) = channel();
        let client = std::thread::spawn(move || {
            connecting.send(()).unwrap();
            Client::connect(&at).map(drop)
        });
        has_begun.recv_timeout(SOON).unwrap();
        for socket in &bound {
            std::thread::yield_now();
            listen_for(socket, Backlog::new(1).unwrap()).unwrap();
        }
        client.join().unwrap().unwrap();
    }
}

#[test]
fn a_guest_that_has_ended_refuses_its_clients_in_time() {
    let (directory, listeners) = listen();
    drop(listeners);
    let why = late(directory.path());
    assert!(why.contains("ctl.sock: Connection refused"), "{why}");
}

#[test]
fn a_directory_with_a_long_path_is_no_obstacle() {
    let root = std::env::temp_dir().join(format!("client-{}", std::process::id()));
    let directory = root.join("d".repeat(200));
    std::fs::create_dir_all(&directory).unwrap();
    let error = Client::connect(&directory).unwrap_err();
    assert!(error.is(nix::errno::Errno::ENOENT), "{error}");
    let handle = File::open(&directory).unwrap();
    let at = |name: &str| format!("/proc/self/fd/{}/{name}", handle.as_raw_fd());
    let control = std::os::unix::net::UnixListener::bind(at(CONTROL_SOCKET)).unwrap();
    let stream = std::os::unix::net::UnixListener::bind(at(STREAM_SOCKET)).unwrap();
    let client = Client::connect_within(&directory, SOON, || Ok(())).unwrap();
    let (mut guest, _) = control.accept().unwrap();
    stream.accept().unwrap();
    guest.write_all(&frame::control(Message::Ready, b"").unwrap()).unwrap();
    client.ready(SOON).unwrap();
    std::fs::remove_dir_all(root).unwrap();
}

//! The socket between execd and streamd: each in the other's place. Neither believes the other, and init sees
//! nothing of it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use hyperinit::ids::StreamId;
use hyperinit::sys::fd::send_fds;
use hyperinit::wire::streamd::Streams;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe};
use serde_json::json;

use super::answers;
use super::guest::processes::{kill_hard, process};
use super::guest::{Guest, Kind};
use super::place::Place;
use super::witness::Witness;

/// A packet, its descriptors, and what the log says of it.
type Lie = (&'static str, Vec<u8>, Vec<OwnedFd>, &'static str);

fn streams(stdio: u64, stderr: u64) -> Streams {
    let id = |number| StreamId::new(number);
    Streams { stdio: id(stdio).unwrap(), stderr: id(stderr), terminal: false, stdin: false, again: true }
}

/// Read ends of pipes that nobody writes.
fn pipes(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| pipe().unwrap().0).collect()
}

fn open(path: &str) -> OwnedFd {
    std::fs::File::open(path).unwrap().into()
}

/// Lies about size and number of descriptors.
fn lies() -> Vec<Lie> {
    let whole = streams(9001, 9002).encode().to_vec();
    let mut flags = whole.clone();
    flags[17] = 9;
    vec![
        ("one byte", vec![0], Vec::new(), "hearing from"),
        ("a byte less", whole[..18].to_vec(), pipes(2), "hearing from"),
        ("a byte more", [whole.as_slice(), &[0]].concat(), pipes(2), "hearing from"),
        ("long", vec![1; 150_000], pipes(2), "hearing from"),
        ("stream 0", vec![0; 19], pipes(1), "hearing from"),
        ("a flag that is none", flags, pipes(2), "hearing from"),
        ("no descriptor", whole.clone(), Vec::new(), "descriptors do not fit"),
        ("one of two", whole.clone(), pipes(1), "descriptors do not fit"),
        ("one more", whole.clone(), pipes(3), "descriptors do not fit"),
        ("253", whole, pipes(253), "hearing from"),
    ]
}

fn tell(between: &OwnedFd, packet: &[u8], fds: &[OwnedFd]) {
    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    send_fds(between, packet, &fds).unwrap();
}

fn resume(place: &Place) {
    kill(Pid::from_raw(place.pid), Signal::SIGCONT).unwrap();
}

#[test]
fn streamd_takes_nothing_of_execds_that_is_not_exact() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let streamd = process(&guest, "streamd", None);
    let mut all = lies();
    let one = || streams(9001, 0).encode().to_vec();
    all.extend([
        ("a file", one(), vec![open("/etc/passwd")], "watching stream 9001"),
        ("a directory", one(), vec![open("/")], "watching stream 9001"),
        ("memory", one(), vec![open("/dev/zero")], "watching stream 9001"),
    ]);
    for (what, packet, fds, blame) in all {
        let from = guest.log().len();
        let place = Place::take(&guest, "execd");
        tell(place.between.as_ref().unwrap(), &packet, &fds);
        guest.wait_for_log(from, "streamd: ");
        let log = guest.log();
        let line = log[from..].lines().find(|line| line.starts_with("streamd: ")).unwrap();
        assert!(line.contains(blame), "{what}: {line}");
        resume(&place);
        answers(&guest, "execd");
        witness.checks(what, true);
    }
    // What is nobody's error: an empty packet, a stream that is somebody's, ends of everything that can be
    // watched.
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let quiet: [(&str, Vec<u8>, Vec<OwnedFd>); 4] = [
        ("empty", Vec::new(), Vec::new()),
        ("somebody's", streams(1, 0).encode().to_vec(), pipes(1)),
        ("a socket", streams(9003, 0).encode().to_vec(), vec![socket.into()]),
        ("the wrong end", streams(9005, 0).encode().to_vec(), vec![pipe().unwrap().1]),
    ];
    for (what, packet, fds) in quiet {
        let place = Place::take(&guest, "execd");
        tell(place.between.as_ref().unwrap(), &packet, &fds);
        resume(&place);
        answers(&guest, "execd");
        witness.checks(what, true);
    }
    assert_eq!(process(&guest, "streamd", None), streamd, "it has not died of any");
    witness.ends();
}

#[test]
fn packets_without_end_do_not_keep_streamd_from_its_work() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let place = Place::take(&guest, "execd");
    let (between, over) = (place.between.as_ref().unwrap(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| {
            let mut sent = 0_u64;
            while !over.load(Ordering::Relaxed) {
                match send_fds(between, &[7; 5], &[]) {
                    Ok(()) => sent += 1,
                    Err(Errno::EAGAIN) => std::thread::yield_now(),
                    Err(errno) => panic!("{errno}"),
                }
            }
            sent
        });
        guest.await_log("5 bytes that are no streams");
        for _ in 0..20 {
            witness.checks("in the flood", true);
        }
        over.store(true, Ordering::Relaxed);
        assert!(flood.join().unwrap() > 1000);
    });
    resume(&place);
    answers(&guest, "execd");
    assert!(guest.log().len() < 1 << 20, "nor do they fill the log");
    witness.ends();
}

#[test]
fn what_streamd_says_to_execd_is_heard_by_nobody() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let terminal = guest.exec(
        "main",
        &["sh", "-c", "echo up; read x; stty size"],
        json!({"terminal": true, "stderr": 0}),
    );
    terminal.read_until("up\r\n");
    for (what, packet, fds, _) in lies() {
        let place = Place::take(&guest, "streamd");
        tell(place.between.as_ref().unwrap(), &packet, &fds);
        resume(&place);
        let old = process(&guest, "execd", None);
        kill_hard(old);
        process(&guest, "execd", Some(old));
        answers(&guest, "execd");
        witness.checks(what, true);
    }
    // What its predecessors kept is there.
    terminal.resize(12, 34);
    terminal.streams.stdin.write(b"\n").unwrap();
    assert!(terminal.end().stdout.contains("12 34"));
    witness.ends();
}

//! Hosts that come and go, and hosts that break the protocol.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

use hyperinit::frame::{self, STREAM_MAX};

use super::guest::{Host, Random, Streamd, World, pattern, pattern_at, readable, same};

fn bad_frames() -> Vec<Vec<u8>> {
    let header = |length: u32| [&1_u64.to_be_bytes()[..], &length.to_be_bytes()].concat();
    [0, 1, 11, STREAM_MAX as u32 + 1, 1 << 31, u32::MAX].map(header).to_vec()
}

#[test]
fn a_violation_on_a_device_makes_it_deaf_and_not_dumb() {
    for bad in bad_frames() {
        let (mut world, mut host) = World::device();
        let streamd = world.start();
        let mut process = world.piped(1, None);
        host.stdin(1, b"before", 16);
        let mut got = [0; 6];
        process.stdin.as_mut().unwrap().read_exact(&mut got).unwrap();
        host.socket.write_all(&bad).unwrap();
        // Thrown away, but read.
        host.stdin(1, &vec![1; 2 << 20], 16);
        host.stdin(99, b"unknown, and not answered", 100);
        process.stdout.as_mut().unwrap().write_all(b"output").unwrap();
        assert_eq!(host.frame(), (1, b"output".to_vec()));
        let mut rest = Vec::new();
        process.stdin.as_mut().unwrap().read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty(), "stdin ends rather than going on behind a gap");
        let memory = streamd.status("VmRSS");
        assert!(memory < 24 << 10, "{memory} kB, counted once for each of two threads");
        // So is a successor.
        streamd.kill();
        let mut streamd = world.start();
        host.stdin(99, b"unknown, and not answered", 100);
        process.exit();
        streamd.finish(1);
        assert_eq!(host.frame(), (1, Vec::new()));
        streamd.drained();
        assert!(host.hears_nothing_for(Duration::from_millis(100)));
        let (status, log) = streamd.leave();
        assert!(status.success() && log.contains("not listening until it connects again"), "{log}");
    }
}

#[test]
fn a_violation_on_a_connection_ends_that() {
    let mut world = World::listening("violation");
    let mut streamd = world.start();
    let mut process = world.piped(1, None);
    for bad in bad_frames() {
        let mut host = world.connect();
        process.stdout.as_mut().unwrap().write_all(b"x").unwrap();
        assert_eq!(host.frame(), (1, b"x".to_vec()));
        host.socket.write_all(&bad).unwrap();
        assert!(host.frame_or_end().is_none());
    }
    let mut host = world.connect();
    host.stdin(1, b"hello", 16);
    let mut got = [0; 5];
    process.stdin.as_mut().unwrap().read_exact(&mut got).unwrap();
    process.exit();
    streamd.finish(1);
    assert_eq!(host.frame(), (1, Vec::new()));
    streamd.drained();
    let (status, log) = streamd.leave();
    assert!(status.success() && log.contains("a stream frame of 11 bytes"), "{log}");
}

#[test]
fn the_host_after_one_that_broke_the_protocol_and_left_stays() {
    let mut world = World::listening("after");
    let streamd = world.start();
    let mut process = world.piped(1, None);
    for bad in bad_frames() {
        let mut host = world.connect();
        process.stdout.as_mut().unwrap().write_all(b"one").unwrap();
        assert_eq!(host.frame(), (1, b"one".to_vec()));
        let mut next = streamd.while_it_stands(|| {
            host.send(&bad);
            drop(host);
            world.connect()
        });
        for word in [b"two", b"six"] {
            process.stdout.as_mut().unwrap().write_all(word).unwrap();
            assert_eq!(next.frame(), (1, word.to_vec()));
            next.stdin(1, word, 16);
            let stdin = process.stdin.as_mut().unwrap();
            assert!(readable(stdin.as_fd(), Duration::from_secs(20)), "the next host is not heard");
            let mut got = [0; 3];
            stdin.read_exact(&mut got).unwrap();
            assert_eq!(&got, word);
        }
    }
    let (status, log) = streamd.leave();
    assert!(status.success() && log.contains("a stream frame of 11 bytes"), "{log}");
}

#[test]
fn half_a_frame_of_a_host_that_left_is_forgotten() {
    let mut world = World::listening("half");
    let streamd = world.start();
    let mut process = world.piped(1, None);
    let whole = frame::stream(1, b"stdin").unwrap();
    for cut in 1..whole.len() {
        let mut host = world.connect();
        host.socket.write_all(&whole[..cut]).unwrap();
        drop(host);
        let mut host = world.connect();
        host.socket.write_all(&whole).unwrap();
        let mut got = [0; 5];
        process.stdin.as_mut().unwrap().read_exact(&mut got).unwrap();
        assert_eq!(&got, b"stdin", "cut at {cut}");
    }
    streamd.leave_well();
}

#[test]
fn what_a_host_sent_before_it_left_is_read() {
    let mut world = World::listening("left");
    let mut streamd = world.start();
    for size in [1, 60 << 10, 200 << 10] {
        let mut process = world.piped(1, None);
        let mut host = world.connect();
        host.stdin(1, &vec![7; size], 16 << 10);
        host.close_stdin(1);
        drop(host);
        let mut got = Vec::new();
        process.stdin.as_mut().unwrap().read_to_end(&mut got).unwrap();
        assert_eq!(got.len(), size);
        process.exit();
        streamd.finish(1);
        // The end waits for the next host.
        assert_eq!(world.connect().frame(), (1, Vec::new()));
        streamd.drained();
    }
    streamd.leave_well();
}

/// A process's queue and pipe are full, and more is in the socket.
fn sends_and_leaves(streamd: &Streamd, mut host: Host, stdin: &[u8]) {
    let (first, rest) = stdin.split_at(MUCH - (64 << 10));
    host.stdin(1, first, 4096);
    // Of these little is left there: a socket that was full would not take the rest before it is nearly
    // empty.
    assert!(streamd.says_nothing_for(Duration::from_millis(500)));
    host.stdin(1, rest, 4096);
    host.close_stdin(1);
    host.stdin(3, b"others", 16);
    host.close_stdin(3);
}

const MUCH: usize = 400 << 10;

fn all_of(stdin: &mut std::fs::File) -> Vec<u8> {
    let mut got = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        assert!(readable(stdin.as_fd(), Duration::from_secs(20)), "neither more nor an end: {}", got.len());
        match stdin.read(&mut chunk).unwrap() {
            0 => return got,
            count => got.extend_from_slice(&chunk[..count]),
        }
    }
}

#[test]
fn what_a_host_sent_before_it_left_waits_for_who_reads_late() {
    for next_waits in [false, true] {
        let mut world = World::listening(&format!("late-{next_waits}"));
        let mut streamd = world.start();
        let (mut process, mut other) = (world.piped(1, None), world.piped(3, None));
        sends_and_leaves(&streamd, world.connect(), &pattern(1, 0, MUCH));
        let next = next_waits.then(|| world.connect());
        // Longer than it takes to see that the host has left.
        assert!(streamd.says_nothing_for(Duration::from_secs(1)));
        streamd.ask(r#""Ping""#);
        assert!(streamd.answer().contains("Alive"), "init is heard");
        same(&all_of(process.stdin.as_mut().unwrap()), &pattern(1, 0, MUCH));
        assert_eq!(all_of(other.stdin.as_mut().unwrap()), b"others");
        let mut next = next.unwrap_or_else(|| world.connect());
        process.stdout.as_mut().unwrap().write_all(b"output").unwrap();
        assert_eq!(next.frame(), (1, b"output".to_vec()));
        streamd.leave_well();
    }
}

#[test]
fn who_never_reads_does_not_keep_the_next_host_out() {
    let mut world = World::listening("never");
    let streamd = world.start();
    let (mut process, mut other) = (world.piped(1, None), world.piped(3, None));
    sends_and_leaves(&streamd, world.connect(), &pattern(1, 0, MUCH));
    // Nobody is kept out: the process has as long as it likes, and nothing wakes up.
    assert!(streamd.says_nothing_for(Duration::from_secs(1)));
    let before = streamd.status("voluntary_ctxt_switches");
    assert!(streamd.says_nothing_for(Duration::from_secs(6)));
    assert_eq!(streamd.status("voluntary_ctxt_switches"), before);
    let mut next = world.connect();
    process.stdout.as_mut().unwrap().write_all(b"output").unwrap();
    assert_eq!(next.frame(), (1, b"output".to_vec()));
    // Others lose nothing.
    assert_eq!(all_of(other.stdin.as_mut().unwrap()), b"others");
    let got = all_of(process.stdin.as_mut().unwrap());
    same(&got, &pattern(1, 0, got.len()));
    assert!(got.len() < MUCH, "a gap is worse than an end: nothing comes behind it");
    let (status, log) = streamd.leave();
    assert!(status.success() && log.contains("what the last one has sent is not read"), "{log}");
}

/// What it asks is not answered before it reads, and it has left.
#[test]
fn what_a_host_sent_before_it_left_is_read_behind_what_cannot_be_answered() {
    let mut world = World::listening("unanswered");
    let streamd = world.start();
    let mut process = world.piped(1, None);
    let mut host = world.connect();
    super::output::write_until_blocked(process.stdout.as_mut().unwrap(), 1);
    // More than is answered, and less than that and what the socket holds.
    let unknown: Vec<u8> = (1000..26_000).flat_map(|stream| frame::stream(stream, b"").unwrap()).collect();
    host.send(&unknown);
    host.stdin(1, b"stdin", 16);
    host.close_stdin(1);
    assert!(streamd.says_nothing_for(Duration::from_secs(1)));
    drop(host);
    assert_eq!(all_of(process.stdin.as_mut().unwrap()), b"stdin");
    let mut next = world.connect();
    assert_eq!(next.frame().0, 1);
    let (status, log) = streamd.leave();
    assert!(status.success(), "{log}");
}

#[test]
fn the_next_host_waits_until_the_first_has_left() {
    let mut world = World::listening("next");
    let streamd = world.start();
    let mut process = world.piped(1, None);
    let mut first = world.connect();
    process.stdout.as_mut().unwrap().write_all(b"one").unwrap();
    assert_eq!(first.frame(), (1, b"one".to_vec()));
    let mut second = world.connect();
    drop(first);
    // Nothing else happens: it is found all the same.
    second.stdin(1, b"x", 16);
    process.stdin.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    process.stdout.as_mut().unwrap().write_all(b"two").unwrap();
    assert_eq!(second.frame(), (1, b"two".to_vec()));
    streamd.leave_well();
}

/// Reads about `count` bytes and leaves; whole frames go to `got`.
fn read_some(host: &mut Host, count: u64, got: &mut BTreeMap<u64, usize>) {
    let mut decoder = frame::StreamDecoder::default();
    let mut chunk = vec![0; count as usize];
    host.socket.read_exact(&mut chunk).unwrap();
    decoder.push(&chunk);
    while let Some(frame) = decoder.next_frame().unwrap() {
        check(frame.tag, frame.payload, got);
    }
}

/// Goes on with what a stream has so far. What a host had in its socket and did not read is lost with it, so
/// a stream may go on later than it stopped; never earlier and never with another's bytes.
fn check(stream: u64, payload: &[u8], got: &mut BTreeMap<u64, usize>) {
    let at = got.entry(stream).or_default();
    let found = (*at..4 << 20).find(|&from| {
        payload.iter().enumerate().all(|(offset, &byte)| byte == pattern_at(stream, from + offset))
    });
    *at = found.expect("the stream goes on") + payload.len();
}

#[test]
fn hosts_come_and_go_while_processes_write() {
    let mut random = Random::new();
    let mut world = World::listening("reconnect");
    let mut streamd = world.start();
    let mut got = BTreeMap::new();
    let writers: Vec<_> = (1..4)
        .map(|stream| {
            let mut process = world.piped(stream, None);
            let mut to = process.stdout.take().unwrap();
            std::thread::spawn(move || {
                for from in (0..4 << 20).step_by(1 << 16) {
                    to.write_all(&super::guest::pattern(stream, from, 1 << 16)).unwrap();
                }
                process.exit();
            })
        })
        .collect();
    for _ in 0..40 {
        let mut host = world.connect();
        // What is read at all begins with a frame.
        read_some(&mut host, 12 + random.below(60_000), &mut got);
    }
    let mut host = world.connect();
    let asker = std::thread::spawn(move || {
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        (1..4).for_each(|stream| assert!(streamd.finish(stream)));
        streamd
    });
    let mut ends = 0;
    while ends < 3 {
        match host.frame() {
            (_, payload) if payload.is_empty() => ends += 1,
            (stream, payload) => check(stream, &payload, &mut got),
        }
    }
    let streamd = asker.join().unwrap();
    assert_eq!(got.values().copied().collect::<Vec<_>>(), [4 << 20; 3], "the last host got the rest");
    (0..3).for_each(|_| streamd.drained());
    streamd.leave_well();
}

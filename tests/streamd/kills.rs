//! kill -9 at any moment: the bytes on the port go on as if nothing had been.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::guest::{DEADLINE, Host, Piped, Random, Streamd, World, pattern, pattern_at, readable};

/// What the host has got, checked as it comes.
#[derive(Default)]
struct Got {
    bytes: BTreeMap<u64, usize>,
    ended: BTreeSet<u64>,
}

impl Got {
    fn add(&mut self, stream: u64, payload: &[u8]) {
        assert!(!self.ended.contains(&stream), "stream {stream} goes on after its end");
        if payload.is_empty() {
            assert!(stream < 100, "an end of stderr");
            self.ended.insert(stream);
            return;
        }
        let at = self.bytes.entry(stream).or_default();
        for &byte in payload {
            assert_eq!(byte, pattern_at(stream, *at), "byte {at} of stream {stream}");
            *at += 1;
        }
    }
}

/// Reads frames for as long as the host lives; counts bytes as they come.
fn watch(mut host: Host, total: Arc<AtomicU64>) -> (Arc<Mutex<Got>>, std::thread::JoinHandle<()>) {
    let got = Arc::new(Mutex::new(Got::default()));
    let mine = Arc::clone(&got);
    let watching = std::thread::spawn(move || {
        while let Some((stream, payload)) = host.frame_or_end() {
            mine.lock().unwrap().add(stream, &payload);
            total.fetch_add(12 + payload.len() as u64, Ordering::Release);
        }
    });
    (got, watching)
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "{what}");
        std::thread::yield_now();
    }
}

/// Writes a stream's pattern in portions of changing size until told to stop; returns how much.
fn flood(mut to: File, stream: u64, size: usize, seed: u64) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let mut random = Random(seed);
        let mut at = 0;
        while at < size {
            let portion = (1 + random.below(if at % 3 == 0 { 60_000 } else { 300 }) as usize).min(size - at);
            to.write_all(&pattern(stream, at, portion)).unwrap();
            at += portion;
        }
    })
}

/// Kills at a random moment: after some bytes more, and then some instructions.
fn kill_somewhen(streamd: Streamd, random: &mut Random, total: &AtomicU64, all: u64) {
    let target = (total.load(Ordering::Acquire) + random.below(200_000)).min(all);
    wait_until("output goes on", || total.load(Ordering::Acquire) >= target);
    spin(random.below(50_000));
    streamd.kill();
}

/// Lets a moment pass that no clock can tell.
fn spin(count: u64) {
    for turn in 0..count {
        std::hint::black_box(turn);
    }
}

#[test]
fn output_goes_on_with_the_next_byte() {
    output_goes_on(World::device());
}

#[test]
fn output_goes_on_in_a_ring() {
    output_goes_on(World::serial());
}

fn output_goes_on((mut world, host): (World, Host)) {
    const SIZE: usize = 3 << 20;
    let mut random = Random::new();
    let total = Arc::new(AtomicU64::new(0));
    let (got, watching) = watch(host, Arc::clone(&total));
    let mut writing = Vec::new();
    // Two processes with pipes and stderr, two with ttys.
    for stream in [1, 2] {
        let mut process = world.piped(stream, Some(stream + 100));
        writing.push(flood(process.stdout.take().unwrap(), stream, SIZE, random.below(u64::MAX)));
        writing.push(flood(process.stderr.take().unwrap(), stream + 100, SIZE, random.below(u64::MAX)));
    }
    for stream in [3, 4] {
        writing.push(flood(world.tty(stream), stream, SIZE, random.below(u64::MAX)));
    }
    let mut kills = 0;
    while writing.iter().any(|writer| !writer.is_finished()) {
        kill_somewhen(world.start(), &mut random, &total, 6 * SIZE as u64);
        kills += 1;
    }
    writing.into_iter().for_each(|writer| writer.join().unwrap());
    assert!(kills > 20, "{kills}");
    // The ends, asked again of every successor.
    let mut open: BTreeSet<u64> = (1..=4).collect();
    while !open.is_empty() {
        let mut streamd = world.start();
        for &stream in &open {
            streamd.finish(stream);
        }
        if random.below(4) == 0 {
            open.iter().for_each(|_| streamd.drained());
            open.clear();
            // It may say that a predecessor died while it read.
            assert!(streamd.leave().0.success());
        } else {
            spin(random.below(3_000_000));
            streamd.kill();
            kills += 1;
        }
    }
    drop(world);
    watching.join().unwrap();
    let got = got.lock().unwrap();
    assert_eq!(got.ended, (1..=4).collect());
    let wanted: BTreeMap<u64, usize> = [1, 2, 3, 4, 101, 102].map(|stream| (stream, SIZE)).into();
    assert_eq!(got.bytes, wanted);
    let _ = writeln!(std::io::stderr(), "{kills} kills");
}

#[test]
fn a_connection_is_handed_on() {
    const SIZE: usize = 2 << 20;
    let mut random = Random::new();
    let mut world = World::listening("kills");
    let streamd = world.start();
    let host = world.connect();
    let mut process = world.piped(1, None);
    let writing = flood(process.stdout.take().unwrap(), 1, SIZE, random.below(u64::MAX));
    let total = Arc::new(AtomicU64::new(0));
    let (got, watching) = watch(host, Arc::clone(&total));
    // Before it has accepted, there is nothing to hand on.
    wait_until("output", || total.load(Ordering::Acquire) > 0);
    streamd.kill();
    while !writing.is_finished() {
        kill_somewhen(world.start(), &mut random, &total, SIZE as u64);
    }
    writing.join().unwrap();
    let mut streamd = world.start();
    streamd.finish(1);
    streamd.drained();
    streamd.kill();
    drop(world);
    watching.join().unwrap();
    let got = got.lock().unwrap();
    assert_eq!((got.bytes[&1], got.ended.contains(&1)), (SIZE, true));
}

#[test]
fn stdin_of_who_comes_after_works() {
    let mut random = Random::new();
    let (mut world, mut host) = World::device();
    host.socket.set_write_timeout(Some(DEADLINE)).unwrap();
    for round in 0..30u64 {
        let streamd = world.start();
        let stream = 1000 * (round + 1);
        let mut old = world.piped(stream, None);
        let mut socket = host.socket.try_clone().unwrap();
        let size = [16, 5000, 70_000][random.below(3) as usize];
        let count = 1 + random.below(3_000_000) as usize / size;
        // The host sends on whatever happens to streamd, and its frames are whole.
        let sending = std::thread::spawn(move || {
            let bytes = pattern(stream, 0, size * count);
            for chunk in bytes.chunks(size) {
                socket.write_all(&hyperinit::frame::stream(stream, chunk).unwrap()).unwrap();
            }
        });
        let mut stdin = old.stdin.take().unwrap();
        let reading = std::thread::spawn(move || {
            let mut got = Vec::new();
            stdin.read_to_end(&mut got).unwrap();
            got
        });
        spin(random.below(2_000_000));
        streamd.kill();
        let mut streamd = world.start();
        sending.join().unwrap();
        // It may be the successor that has its stdin, when the predecessor had not come to it.
        host.close_stdin(stream);
        let got = reading.join().unwrap();
        assert!(pattern(stream, 0, got.len()) == got, "what it got is a beginning of what was sent");
        // The next process's stdin works: at once, or after the host has paused; a busy machine may need some
        // pauses more.
        let mut works = false;
        for attempt in 1..=20 {
            let mut new = world.piped(stream + attempt, None);
            host.stdin(stream + attempt, b"hello", 16);
            host.close_stdin(stream + attempt);
            let mut got = Vec::new();
            let mut stdin = new.stdin.take().unwrap();
            if readable(stdin.as_fd(), Duration::from_millis(2500)) {
                stdin.read_to_end(&mut got).unwrap();
            }
            assert!(got.is_empty() || got == b"hello", "{got:?}");
            new.exit();
            streamd.finish(stream + attempt);
            streamd.drained();
            world.release(stream + attempt);
            if got == b"hello" {
                works = true;
                break;
            }
            // It died while it read. What the host sends is thrown away until it has paused.
            assert!(streamd.says_nothing_for(Duration::from_millis(1500)));
        }
        if !works {
            panic!("round {round}: {:?}", streamd.leave());
        }
        old.exit();
        streamd.finish(stream);
        streamd.drained();
        world.release(stream);
        streamd.kill();
        // Ends and answers to unknown streams.
        while !host.hears_nothing_for(Duration::from_millis(1)) {
            assert_eq!(host.frame().1, b"");
        }
    }
}

/// A streamd that does not know where the host is in its frames takes a pause for the end of one. A host on a
/// busy machine pauses in the middle of one too: what then looks like a violation, or a long frame for
/// nobody, is its own mistake, and it waits for the next pause.
#[test]
fn a_host_that_was_held_up_in_the_middle_of_a_frame_is_heard_after_the_next_pause() {
    let (mut world, mut host) = World::device();
    let _old = world.piped(1, None);
    world.start().leave_well();
    let nonsense = hyperinit::frame::stream(1, &[0xff; 1000]).unwrap();
    let header = hyperinit::frame::stream_header(999, 200_000).unwrap();
    let misleading = [&nonsense[..500], &header, &nonsense[500 + header.len()..]].concat();
    // With one streamd; with a successor after the pause; and after the bytes that make no sense.
    const CUT: u64 = 2;
    let rounds =
        [(300, &nonsense), (500, &nonsense), (700, &nonsense), (900, &misleading), (1100, &misleading)];
    for (stream, frame) in rounds {
        world.died_while_it_read();
        let mut streamd = world.start();
        host.socket.write_all(&frame[..500]).unwrap();
        streamd.ask(r#""Flush""#);
        streamd.drained();
        // Longer than it waits, from when it has read that: on a busy machine well after it was sent.
        assert!(streamd.says_nothing_for(Duration::from_millis(3000)));
        if stream == 500 {
            streamd.kill();
            streamd = world.start();
        }
        host.socket.write_all(&frame[500..]).unwrap();
        streamd.ask(r#""Flush""#);
        streamd.drained();
        let cut = (frame == &misleading).then(|| world.piped(CUT, None));
        if cut.is_some() {
            // Swallowed.
            host.stdin(CUT, b"hel", 16);
        }
        if [700, 1100].contains(&stream) {
            streamd.kill();
            streamd = world.start();
        }
        assert!(streamd.says_nothing_for(Duration::from_millis(3000)));
        // At once, or, while it may be that somebody has not been sent again, after some pauses more.
        let hears = |mut process: Piped| {
            let (mut got, mut stdin) = (String::new(), process.stdin.take().unwrap());
            let readable = readable(stdin.as_fd(), Duration::from_millis(2500));
            readable.then(|| stdin.read_to_string(&mut got).map(|_| got).unwrap())
        };
        let heard = (0..20).any(|attempt| {
            let new = world.piped(stream + attempt, None);
            host.stdin(stream + attempt, b"hello", 16);
            host.close_stdin(stream + attempt);
            hears(new).as_deref() == Some("hello")
        });
        assert!(heard, "{:?}", streamd.leave());
        if let Some(cut) = cut {
            host.stdin(CUT, b"lo", 16);
            host.close_stdin(CUT);
            assert_eq!(hears(cut).as_deref(), Some(""), "an end is better than a gap");
        }
        streamd.kill();
    }
}

/// One whose start PID 1 never heard of, beside its successor.
#[test]
fn a_second_streamd_leaves_and_touches_nothing() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut process = world.piped(1, None);
    streamd.ask(r#""Flush""#);
    streamd.drained();
    let (status, log) = world.start_with(&[]).leave();
    assert_eq!(
        (status.code(), log.as_str()),
        (Some(1), "streamd: leaving: streamd: taking the output buffer: another streamd has it\n")
    );
    process.stdout.as_mut().unwrap().write_all(b"x").unwrap();
    assert_eq!(host.frame(), (1, b"x".to_vec()));
    streamd.leave_well();
}

#[test]
fn a_process_that_has_not_been_sent_again_is_not_unknown() {
    let (mut world, mut host) = World::device();
    let streamd = world.start();
    let mut process = world.piped(1, None);
    process.stdout.as_mut().unwrap().write_all(b"x").unwrap();
    assert_eq!(host.frame(), (1, b"x".to_vec()));
    streamd.kill();
    let mut streamd = world.start_with(&[]);
    host.stdin(1, b"sent before execd was asked", 4);
    streamd.ask(r#""Flush""#);
    streamd.drained();
    assert!(host.hears_nothing_for(Duration::from_millis(300)), "an end of a process that runs");
    world.resend();
    process.stdout.as_mut().unwrap().write_all(b"y").unwrap();
    assert_eq!(host.frame(), (1, b"y".to_vec()));
    streamd.leave_well();
}

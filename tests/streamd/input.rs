//! What the host sends arrives at stdin, whole, in order, and slows the host down rather than being lost.

use std::io::{Read, Write};
use std::time::Duration;

use hyperinit::frame;

use super::guest::{World, pattern, same};

const SIZE: usize = 8 << 20;

/// 8 MiB in frames of `frame` bytes to a reader that takes `portion` at a time.
fn stdin_is_exact(frame: usize, portion: usize) {
    let (mut world, mut host) = World::device();
    let streamd = world.start();
    let mut process = world.piped(1, None);
    let mut stdin = process.stdin.take().unwrap();
    let reading = std::thread::spawn(move || {
        let (mut got, mut chunk) = (Vec::new(), vec![0; portion]);
        loop {
            match stdin.read(&mut chunk).unwrap() {
                0 => return got,
                count => got.extend_from_slice(&chunk[..count]),
            }
        }
    });
    host.stdin(1, &pattern(1, 0, SIZE), frame);
    host.close_stdin(1);
    same(&reading.join().unwrap(), &pattern(1, 0, SIZE));
    streamd.leave_well();
}

#[test]
fn a_fast_reader_gets_everything() {
    stdin_is_exact(32 << 10, 1 << 16);
}

#[test]
fn frames_of_16_bytes_are_what_runv_sends() {
    stdin_is_exact(16, 1 << 16);
}

#[test]
fn the_largest_frames_to_a_slow_reader() {
    stdin_is_exact(frame::STREAM_MAX - frame::STREAM_HEADER, 700);
}

#[test]
fn a_frame_may_come_in_any_pieces() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut process = world.piped(1 << 40, None);
    let stdin = process.stdin.as_mut().unwrap();
    let frames =
        [frame::stream(1 << 40, b"first").unwrap(), frame::stream(1 << 40, b"second").unwrap()].concat();
    for cut in 1..frames.len() {
        for piece in [&frames[..cut], &frames[cut..]] {
            host.socket.write_all(piece).unwrap();
            // Answered when the piece has been read: the pieces arrive one by one.
            streamd.ask(r#""Flush""#);
            streamd.drained();
        }
        let mut got = [0; 11];
        stdin.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"firstsecond", "cut at {cut}");
    }
    for byte in &frames {
        host.socket.write_all(&[*byte]).unwrap();
    }
    let mut got = [0; 11];
    stdin.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"firstsecond");
    streamd.leave_well();
}

#[test]
fn an_empty_frame_closes_stdin_behind_what_waits() {
    let (mut world, mut host) = World::device();
    let streamd = world.start();
    let mut process = world.piped(1, None);
    // More than the pipe holds, so that some of it waits when the end comes.
    host.stdin(1, &pattern(1, 0, 200 << 10), 4096);
    host.close_stdin(1);
    host.stdin(1, b"behind the end", 100);
    let mut got = Vec::new();
    process.stdin.as_mut().unwrap().read_to_end(&mut got).unwrap();
    same(&got, &pattern(1, 0, 200 << 10));
    // It is not unknown, though its stdin is gone.
    host.stdin(1, b"more", 100);
    assert!(host.hears_nothing_for(Duration::from_millis(300)));
    streamd.leave_well();
}

#[test]
fn a_tty_is_never_closed_by_an_empty_frame() {
    let (mut world, mut host) = World::device();
    let streamd = world.start();
    let mut tty = world.tty(1);
    host.stdin(1, b"one", 16);
    host.close_stdin(1);
    host.stdin(1, b"two", 16);
    let mut got = [0; 6];
    tty.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"onetwo");
    // More than a tty holds, to a reader that comes late.
    let mut host_too = host.socket.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        for chunk in pattern(1, 0, 1 << 20).chunks(3000) {
            host_too.write_all(&frame::stream(1, chunk).unwrap()).unwrap();
        }
    });
    let mut got = vec![0; 1 << 20];
    tty.read_exact(&mut got).unwrap();
    same(&got, &pattern(1, 0, 1 << 20));
    sending.join().unwrap();
    streamd.leave_well();
}

#[test]
fn an_unknown_stream_is_answered_by_its_end_and_stderr_never() {
    let (mut world, mut host) = World::device();
    let streamd = world.start();
    let _process = world.piped(1, Some(2));
    host.stdin(99, b"nobody", 16);
    assert_eq!(host.frame(), (99, Vec::new()));
    host.close_stdin(u64::MAX);
    assert_eq!(host.frame(), (u64::MAX, Vec::new()));
    host.stdin(2, b"an end of this number would crash runV's client", 100);
    host.stdin(99, b"nobody", 16);
    assert_eq!(host.frame(), (99, Vec::new()));
    streamd.leave_well();
}

#[test]
fn answers_to_unknown_streams_are_bounded() {
    let (world, mut host) = World::device();
    let streamd = world.start();
    let mut socket = host.socket.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        let frames: Vec<u8> = (1..=1000).flat_map(|stream| frame::stream(stream, b"").unwrap()).collect();
        for _ in 0..600 {
            socket.write_all(&frames).unwrap();
        }
    });
    // It does not read while the host does not, and goes on when it does.
    for round in 0..600 {
        for stream in 1..=1000 {
            assert_eq!(host.frame(), (stream, Vec::new()), "round {round}");
        }
        assert!(world.buffer_size() < 4 << 20, "{}", world.buffer_size());
    }
    sending.join().unwrap();
    streamd.leave_well();
}

#[test]
fn a_process_that_stopped_reading_costs_the_others_nothing() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut gone = world.piped(1, None);
    gone.stdin = None;
    let mut reader = world.piped(3, None);
    host.stdin(1, &[1; 1 << 20], 4096);
    host.stdin(3, b"hello", 16);
    let mut got = [0; 5];
    reader.stdin.as_mut().unwrap().read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");
    streamd.ask(r#""Flush""#);
    streamd.drained();
    streamd.leave_well();
}

/// None of them has as much unread as one may have, and together they have as much as all may.
#[test]
fn all_that_do_not_read_have_an_end_together() {
    const PROCESSES: u64 = 24;
    const FRAME: usize = 4096;
    /// `input::QUEUES_MAX`, in bytes.
    const QUEUES: usize = 4 << 20;
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut readers: Vec<_> = (0..PROCESSES).map(|number| world.piped(2 * number + 1, None)).collect();
    // In turns, each its own bytes, 256 kB in all: less than a pipe and one queue hold.
    let mut frames = Vec::new();
    for _ in 0..64 {
        for number in 0..PROCESSES {
            frames.extend(frame::stream(2 * number + 1, &[number as u8; FRAME]).unwrap());
        }
    }
    let sent = host.send_until_full(&frames, Duration::from_secs(1));
    let pipes = PROCESSES as usize * (64 << 10);
    // Both directions of the socket, and what one read takes.
    let way = 1 << 20;
    assert!((QUEUES..QUEUES + pipes + way).contains(&sent), "{sent} bytes of {}", frames.len());
    assert!(sent < frames.len());
    streamd.ask(r#""Ping""#);
    assert!(streamd.answer().contains("Alive"), "init is heard all the same");
    let threads: Vec<_> = readers
        .iter_mut()
        .map(|reader| {
            let mut stdin = reader.stdin.take().unwrap();
            std::thread::spawn(move || {
                let mut got = Vec::new();
                stdin.read_to_end(&mut got).map(|_| got)
            })
        })
        .collect();
    host.send(&frames[sent..]);
    (0..PROCESSES).for_each(|number| host.close_stdin(2 * number + 1));
    for (number, thread) in threads.into_iter().enumerate() {
        assert!(thread.join().unwrap().unwrap() == vec![number as u8; 64 * FRAME], "process {number}");
    }
    streamd.leave_well();
}

//! What processes write arrives, whole, in order, in turn.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use hyperinit::sys::mount::new_mount;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::guest::{DEADLINE, World, pattern, same};

const SIZE: usize = 8 << 20;

/// Writes a stream's pattern in portions, and closes.
fn writer(mut to: File, stream: u64, size: usize, portion: usize) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let bytes = pattern(stream, 0, size);
        bytes.chunks(portion).for_each(|chunk| to.write_all(chunk).unwrap());
    })
}

#[test]
fn both_pipes_are_exact_and_one_end_comes_last() {
    let (mut world, mut host) = World::device();
    let mut process = world.piped(1, Some(2));
    let mut streamd = world.start();
    let out = writer(process.stdout.take().unwrap(), 1, SIZE, 50_000);
    let err = writer(process.stderr.take().unwrap(), 2, SIZE / 4, 777);
    let asker = std::thread::spawn(move || {
        out.join().unwrap();
        err.join().unwrap();
        process.exit();
        streamd.finish(1);
        streamd
    });
    let got = host.until_end(1);
    same(&got[&1], &pattern(1, 0, SIZE));
    same(&got[&2], &pattern(2, 0, SIZE / 4));
    let streamd = asker.join().unwrap();
    streamd.drained();
    assert!(host.hears_nothing_for(Duration::from_millis(300)), "a second end, or one of stderr");
    streamd.leave_well();
}

#[test]
fn a_ring_comes_round() {
    let (mut world, mut host) = World::serial();
    let mut process = world.piped(1, Some(2));
    let mut streamd = world.start();
    let out = writer(process.stdout.take().unwrap(), 1, SIZE, 50_000);
    let err = writer(process.stderr.take().unwrap(), 2, SIZE / 64, 77);
    let asker = std::thread::spawn(move || {
        out.join().unwrap();
        err.join().unwrap();
        process.exit();
        streamd.finish(1);
        streamd
    });
    let got = host.until_end(1);
    same(&got[&1], &pattern(1, 0, SIZE));
    same(&got[&2], &pattern(2, 0, SIZE / 64));
    let mut streamd = asker.join().unwrap();
    streamd.drained();
    assert!(world.buffer_size() < 1200 << 10, "{}", world.buffer_size());
    // Ends follow each other without a gap.
    world.release(1);
    (10..2000).for_each(|stream| assert!(streamd.finish(stream)));
    (10..2000).for_each(|stream| assert_eq!(host.frame(), (stream, Vec::new())));
    (10..2000).for_each(|_| streamd.drained());
    streamd.leave_well();
}

#[test]
fn a_tty_is_exact() {
    let (mut world, mut host) = World::device();
    let tty = world.tty(1);
    let mut streamd = world.start();
    let writing = writer(tty, 1, SIZE, 10_000);
    let asker = std::thread::spawn(move || {
        writing.join().unwrap();
        streamd.finish(1);
        streamd
    });
    let got = host.until_end(1);
    same(&got[&1], &pattern(1, 0, SIZE));
    let streamd = asker.join().unwrap();
    streamd.drained();
    streamd.leave_well();
}

#[test]
fn a_tty_may_be_closed_and_opened_again() {
    let (mut world, mut host) = World::device();
    let mut tty = world.tty(1);
    let mut streamd = world.start();
    let path = nix::unistd::ttyname(&tty).unwrap();
    tty.write_all(b"one").unwrap();
    drop(tty);
    assert_eq!(host.frame(), (1, b"one".to_vec()));
    let mut tty = File::options().read(true).write(true).open(path).unwrap();
    tty.write_all(b"two").unwrap();
    assert_eq!(host.frame(), (1, b"two".to_vec()));
    drop(tty);
    streamd.finish(1);
    assert_eq!(host.frame(), (1, Vec::new()));
    streamd.drained();
    streamd.leave_well();
}

/// How much a process can write before it has to wait, for good.
pub fn write_until_blocked(to: &mut File, stream: u64) -> usize {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    fcntl(&*to, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let mut written = 0;
    loop {
        match to.write(&pattern(stream, written, 4096)) {
            Ok(count) => written += count,
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                let mut fds = [PollFd::new(to.as_fd(), PollFlags::POLLOUT)];
                if poll(&mut fds, PollTimeout::from(1000u16)).unwrap() == 0 {
                    return written;
                }
            }
        }
    }
}

#[test]
fn a_host_that_does_not_read_stops_the_processes_and_loses_nothing() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut first = world.piped(1, None);
    let mut second = world.piped(3, None);
    let written = write_until_blocked(first.stdout.as_mut().unwrap(), 1);
    // A frame begins with a page: of small pieces, taken as they come, the ring holds half as much.
    assert!(written > 256 << 10, "{written}");
    // The port is full: others have what their pipes hold.
    let others = write_until_blocked(second.stdout.as_mut().unwrap(), 3);
    assert!(others <= 128 << 10, "{others}");
    assert!(world.buffer_size() < 2 << 20, "{}", world.buffer_size());
    let memory = streamd.status("VmRSS");
    assert!(memory < 24 << 10, "{memory} kB, counted once for each of two threads");
    first.exit();
    streamd.finish(1);
    assert!(streamd.says_nothing_for(Duration::from_millis(300)), "the end has not left yet");
    let mut got = host.until_end(1);
    same(&got[&1], &pattern(1, 0, written));
    streamd.drained();
    second.exit();
    streamd.finish(3);
    let rest = host.until_end(3).remove(&3).unwrap_or_default();
    let got = [got.remove(&3).unwrap_or_default(), rest].concat();
    same(&got, &pattern(3, 0, others));
    streamd.drained();
    streamd.leave_well();
}

#[test]
fn what_has_left_is_given_back() {
    let (mut world, mut host) = World::device();
    let mut process = world.piped(1, None);
    let mut streamd = world.start();
    let writing = writer(process.stdout.take().unwrap(), 1, 3 * SIZE, 1 << 16);
    let mut got = 0;
    while got < 3 * SIZE {
        got += host.frame().1.len();
        assert!(world.buffer_size() < 2 << 20, "{}", world.buffer_size());
    }
    writing.join().unwrap();
    process.exit();
    streamd.finish(1);
    assert_eq!(host.frame(), (1, Vec::new()));
    streamd.drained();
    world.release(1);
    streamd.kill();
    // Also by those who come after: each death leaves little, and nothing that adds up.
    for _ in 0..8 {
        let mut streamd = world.start();
        let mut process = world.piped(1, None);
        let writing = writer(process.stdout.take().unwrap(), 1, 300 << 10, 1 << 16);
        let mut got = 0;
        while got < 300 << 10 {
            got += host.frame().1.len();
        }
        writing.join().unwrap();
        process.exit();
        streamd.finish(1);
        assert_eq!(host.frame(), (1, Vec::new()));
        streamd.drained();
        world.release(1);
        streamd.kill();
    }
    assert!(world.buffer_size() < 800 << 10, "{}", world.buffer_size());
}

#[test]
fn a_flood_does_not_keep_the_port_for_itself() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let floods: Vec<_> = (10..14).map(|stream| world.piped(stream, None)).collect();
    let flooding: Vec<_> = floods
        .into_iter()
        .map(|mut process| {
            let mut to = process.stdout.take().unwrap();
            std::thread::spawn(move || while to.write_all(&[7; 4096]).is_ok() {})
        })
        .collect();
    // The flood is on.
    (0..100).for_each(|_| assert!(host.frame().0 >= 10));
    let mut quiet = world.piped(1, Some(2));
    let mut tty = world.tty(3);
    for round in 0..20u8 {
        quiet.stdout.as_mut().unwrap().write_all(&[round]).unwrap();
        quiet.stderr.as_mut().unwrap().write_all(&[round]).unwrap();
        tty.write_all(&[round]).unwrap();
        let mut missing = vec![1, 2, 3];
        // Each flooder has its turn in a round, and the buffer holds at most 1 MiB ahead of the quiet ones;
        // what is typed at a tty passes a worker of the kernel's, which has its turn when the machine has
        // time.
        let mut frames = 0;
        while !missing.is_empty() {
            let (stream, payload) = host.frame();
            frames += 1;
            assert!(frames < 100_000, "{missing:?} starve");
            if stream < 10 {
                assert_eq!(payload, [round]);
                missing.retain(|&waits| waits != stream);
            }
        }
    }
    // init is heard too.
    quiet.exit();
    streamd.finish(1);
    while host.frame() != (1, Vec::new()) {}
    let draining = std::thread::spawn(move || while host.frame_or_end().is_some() {});
    streamd.drained();
    streamd.kill();
    drop(world);
    flooding.into_iter().for_each(|flood| flood.join().unwrap());
    draining.join().unwrap();
}

#[test]
fn without_memory_output_waits() {
    // Two pages for numbers and headers, and twelve for everything else.
    let tmpfs = new_mount("tmpfs", &[("size", "57344")], 0).unwrap();
    let buffer: OwnedFd =
        nix::fcntl::openat(&tmpfs, "buffer", OFlag::O_RDWR | OFlag::O_CREAT, nix::sys::stat::Mode::S_IRWXU)
            .unwrap();
    let (mut world, mut host) = World::device_with_buffer(buffer);
    let mut process = world.piped(1, None);
    let tty = world.tty(3);
    let mut streamd = world.start();
    // More than fits, and less than what is given back at once: nothing ever fits again.
    let writing = writer(process.stdout.take().unwrap(), 1, 60_000, 60_000);
    let writing_too = writer(tty, 3, 5_000, 5_000);
    writing_too.join().unwrap();
    writing.join().unwrap();
    let mut got = 0;
    while got < 30_000 {
        got += host.frame().1.len();
    }
    // It waits, and does not die of it.
    streamd.ask(r#""Flush""#);
    streamd.drained();
    let (status, log) = streamd.leave();
    assert!(status.success() && log.contains("output waits"), "{status}: {log}");
}

/// What a tty has written has been taken, and is in no frame yet.
#[test]
fn without_memory_a_successor_waits_too() {
    let tmpfs = new_mount("tmpfs", &[("size", "188416")], 0).unwrap();
    let create = |name: &str| {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT;
        File::from(nix::fcntl::openat(&tmpfs, name, flags, nix::sys::stat::Mode::S_IRWXU).unwrap())
    };
    // 14 pages are left.
    let mut others = create("others");
    others.write_all(&[0; 131_072]).unwrap();
    let buffer = create("buffer");
    let (mut world, mut host) = World::device_with_buffer(buffer.try_clone().unwrap().into());
    let mut process = world.piped(1, None);
    let tty = world.tty(3);
    let streamd = world.start();
    let mut got = BTreeMap::<u64, Vec<u8>>::new();
    let mut hear = |got: &mut BTreeMap<u64, Vec<u8>>| {
        let (stream, payload) = host.frame();
        got.entry(stream).or_default().extend(payload);
    };
    writer(process.stdout.take().unwrap(), 1, 60_000, 60_000).join().unwrap();
    while got.get(&1).is_none_or(|got| got.len() < 30_000) {
        hear(&mut got);
    }
    writer(tty, 3, 2_000, 2_000).join().unwrap();
    // The third number of the page (helpers/streamd/buffer.rs).
    let pending = || {
        let mut number = [0; 8];
        buffer.read_exact_at(&mut number, 2 * 8).unwrap();
        u64::from_ne_bytes(number)
    };
    let start = Instant::now();
    while pending() != 3 {
        assert!(start.elapsed() < DEADLINE, "{} is pending", pending());
        std::thread::yield_now();
    }
    streamd.kill();
    let mut streamd = world.start();
    streamd.ask(r#""Ping""#);
    assert!(streamd.answer().contains("Alive"));
    assert!(streamd.says_nothing_for(Duration::from_millis(300)));
    others.set_len(0).unwrap();
    while got.values().map(Vec::len).sum::<usize>() < 62_000 {
        hear(&mut got);
    }
    same(&got[&1], &pattern(1, 0, 60_000));
    same(&got[&3], &pattern(3, 0, 2_000));
    let (status, log) = streamd.leave();
    assert!(status.success() && log.contains("output waits"), "{status}: {log}");
}

//! The end of a process: everything it wrote, one end-of-stream on stdio, then the answer.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use hyperinit::wire::streamd::forget;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::guest::{DEADLINE, World, id};

#[test]
fn a_process_that_wrote_nothing_ends_too_and_an_unknown_one_as_well() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut process = world.piped(1, Some(2));
    process.exit();
    for stream in [1, 77] {
        streamd.finish(stream);
        streamd.drained();
        assert_eq!(host.frame(), (stream, Vec::new()));
    }
    assert!(host.hears_nothing_for(Duration::from_millis(200)));
    streamd.leave_well();
}

#[test]
fn the_end_is_on_the_port_before_the_answer() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    for stream in 1..50 {
        let mut process = world.piped(stream, None);
        process.stdout.as_mut().unwrap().write_all(b"last words").unwrap();
        process.exit();
        streamd.finish(stream);
        streamd.drained();
        host.socket.set_nonblocking(true).unwrap();
        assert_eq!(host.frame(), (stream, b"last words".to_vec()));
        assert_eq!(host.frame(), (stream, Vec::new()));
        host.socket.set_nonblocking(false).unwrap();
        world.release(stream);
    }
    streamd.leave_well();
}

/// The pause of a megabyte is 110 ms, that of a few bytes is 10 (helpers/streamd/waiting.rs).
#[test]
fn a_host_whose_readers_lag_behind_gets_a_pause_before_the_answer() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut process = world.piped(1, None);
    let mut stdout = process.stdout.take().unwrap();
    let writer = std::thread::spawn(move || stdout.write_all(&vec![b'x'; 1_000_000]).unwrap());
    let mut read = 0;
    while read < 1_000_000 {
        read += host.frame().1.len();
    }
    writer.join().unwrap();
    process.exit();
    streamd.finish_with_pause(1);
    assert_eq!(host.frame(), (1, Vec::new()));
    let end = Instant::now();
    // The end of another process does not wait for these readers, and is answered first.
    let mut quiet = world.piped(3, None);
    quiet.exit();
    streamd.finish_with_pause(3);
    streamd.finish(77);
    streamd.drained();
    streamd.drained();
    streamd.drained();
    assert!(end.elapsed() >= Duration::from_millis(100), "{:?}", end.elapsed());
    streamd.leave_well();
}

#[test]
fn a_survivor_has_a_short_time_and_no_sigpipe() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    // The pipe's write end stays open: somebody else has it.
    let mut process = world.piped(1, Some(2));
    process.stdout.as_mut().unwrap().write_all(b"mine").unwrap();
    let start = Instant::now();
    streamd.finish(1);
    assert_eq!(host.frame(), (1, b"mine".to_vec()));
    process.stderr.as_mut().unwrap().write_all(b"a survivor's").unwrap();
    assert_eq!(host.until_end(1)[&2], b"a survivor's");
    streamd.drained();
    assert!(start.elapsed() >= Duration::from_millis(100) && start.elapsed() < DEADLINE);
    // A megabyte is more than a pipe holds, and a broken one would end the write.
    process.stdout.as_mut().unwrap().write_all(&[1; 1 << 20]).unwrap();
    process.stderr.as_mut().unwrap().write_all(&[1; 1 << 20]).unwrap();
    assert!(host.hears_nothing_for(Duration::from_millis(300)));
    // The number may be used again, and the survivor stays unheard.
    world.release(1);
    let mut second = world.piped(1, None);
    second.stdout.as_mut().unwrap().write_all(b"second").unwrap();
    assert_eq!(host.frame(), (1, b"second".to_vec()));
    second.exit();
    streamd.finish(1);
    assert_eq!(host.frame(), (1, Vec::new()));
    streamd.drained();
    streamd.leave_well();
}

/// Each of them is a process that init has forgotten, so a host could start more of them without end.
#[test]
fn so_many_processes_have_survivors_and_no_more() {
    const SURVIVORS_MAX: u64 = 256;
    const MORE: u64 = 8;
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut survivors = Vec::new();
    for stream in 1..=SURVIVORS_MAX + MORE {
        let mut process = world.piped(stream, None);
        survivors.push(process.stdout.take().unwrap());
        streamd.finish(stream);
    }
    for _ in 1..=SURVIVORS_MAX + MORE {
        streamd.drained();
        assert_eq!(host.frame().1, b"");
    }
    (1..=SURVIVORS_MAX + MORE).for_each(|stream| world.release(stream));
    let closed = |stdout: &std::fs::File| {
        let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0)
    };
    let count = || survivors.iter().filter(|stdout| closed(stdout)).count() as u64;
    let began = Instant::now();
    while count() < MORE {
        assert!(began.elapsed() < DEADLINE, "the oldest are not closed: {}", count());
        std::thread::yield_now();
    }
    assert_eq!(count(), MORE);
    streamd.leave_well();
}

#[test]
fn a_survivor_that_never_pauses_does_not_put_the_end_off() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut process = world.piped(1, None);
    let mut flood = process.stdout.as_ref().unwrap().try_clone().unwrap();
    process.stdout.as_mut().unwrap().write_all(b"mine").unwrap();
    let flooding = std::thread::spawn(move || while flood.write_all(&[b'y'; 4096]).is_ok() {});
    streamd.finish(1);
    let got = host.until_end(1);
    assert!(got[&1].starts_with(b"mine"));
    streamd.drained();
    // init is still heard.
    streamd.ask(r#""Flush""#);
    streamd.drained();
    process.exit();
    streamd.kill();
    drop(world);
    flooding.join().unwrap();
}

#[test]
fn a_tty_that_somebody_keeps_open_ends_after_the_grace() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut tty = world.tty(1);
    tty.write_all(b"shell").unwrap();
    streamd.finish(1);
    assert_eq!(host.until_end(1)[&1], b"shell");
    streamd.drained();
    tty.write_all(&[1; 1 << 20]).unwrap();
    assert!(host.hears_nothing_for(Duration::from_millis(300)));
    streamd.leave_well();
}

#[test]
fn its_end_closes_stdin_and_releases_what_waited() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut sleeper = world.piped(1, None);
    let mut reader = world.piped(3, None);
    let mut socket = host.socket.try_clone().unwrap();
    // More than pipe, queue and socket hold: the host is stopped.
    let sending = std::thread::spawn(move || {
        for _ in 0..64 {
            socket.write_all(&hyperinit::frame::stream(1, &[1; 32 << 10]).unwrap()).unwrap();
        }
        socket.write_all(&hyperinit::frame::stream(3, b"at last").unwrap()).unwrap();
    });
    // Output goes on meanwhile.
    reader.stdout.as_mut().unwrap().write_all(b"output").unwrap();
    assert_eq!(host.frame(), (3, b"output".to_vec()));
    let stdin = sleeper.stdin.take();
    sleeper.exit();
    streamd.finish(1);
    assert_eq!(host.frame(), (1, Vec::new()));
    streamd.drained();
    let mut got = [0; 7];
    reader.stdin.as_mut().unwrap().read_exact(&mut got).unwrap();
    assert_eq!(&got, b"at last");
    sending.join().unwrap();
    drop(stdin);
    streamd.leave_well();
}

#[test]
fn one_that_never_ran_is_forgotten_without_a_word() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut lost = world.piped(1, Some(2));
    let mut survived = world.piped(3, None);
    streamd.finish(3);
    assert_eq!(host.frame(), (3, Vec::new()));
    streamd.drained();
    for stream in [1, 3, 5] {
        world.send_raw(&forget(id(stream)), &[]);
    }
    assert_eq!(lost.stdin.as_mut().unwrap().read(&mut [0]).unwrap(), 0, "its stdin is closed");
    lost.stderr.as_mut().unwrap().write_all(b"last words").unwrap();
    // What has ended is still heard: no SIGPIPE for who survives it.
    world.release(3);
    survived.stdout.as_mut().unwrap().write_all(&[0; 1 << 20]).unwrap();
    assert!(host.hears_nothing_for(Duration::from_millis(300)));
    // Its number begins anew.
    let mut again = world.piped(1, Some(2));
    again.stderr.as_mut().unwrap().write_all(b"mine").unwrap();
    assert_eq!(host.frame(), (2, b"mine".to_vec()));
    again.exit();
    streamd.finish(1);
    assert_eq!(host.frame(), (1, Vec::new()));
    streamd.drained();
    streamd.leave_well();
}

/// The number is its own until its end has left, and init would wait for that for ever.
#[test]
fn no_start_takes_the_place_of_what_ends() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let ends = world.piped(1, None);
    streamd.finish(1);
    streamd.ask(r#""Ping""#);
    assert!(streamd.answer().contains("Alive"), "it knows of the end");
    let early = world.piped(1, None);
    assert_eq!(host.frame(), (1, Vec::new()));
    streamd.drained();
    drop((ends, early));
    let (status, log) = streamd.leave();
    assert!(status.success() && log.contains("has not ended"), "{log}");
}

#[test]
fn a_start_takes_the_place_of_what_had_its_number() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let _lost = world.piped(1, None);
    let mut again = world.piped(1, None);
    again.stdout.as_mut().unwrap().write_all(b"mine").unwrap();
    assert_eq!(host.frame(), (1, b"mine".to_vec()));
    again.exit();
    streamd.finish(1);
    assert_eq!(host.frame(), (1, Vec::new()));
    streamd.drained();
    streamd.leave_well();
}

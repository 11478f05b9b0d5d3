//! Flow control of single streams, for a host that asks for it (docs/streams.md «Flow control»).

use std::io::{Read, Write};
use std::time::Duration;

use hyperinit::flow::{self, Ask, BEGUN, Credit};

use super::guest::{Host, World, pattern, same};

/// How long nothing must happen to be taken for nothing happening.
const QUIET: Duration = Duration::from_millis(300);

fn begin(host: &mut Host) {
    host.send(&Ask::Begin.frame());
    assert_eq!(host.frame(), (flow::STREAM, BEGUN.encode().to_vec()));
}

/// Hears credits for one stdin until they come to so much.
fn credited(host: &mut Host, stdio: u64, wanted: usize) {
    let mut sum = 0;
    while sum < wanted {
        let (stream, payload) = host.frame();
        assert_eq!(stream, flow::STREAM);
        let credit = Credit::decode(&payload).unwrap();
        assert!(credit.stdio == stdio && credit.bytes > 0, "{credit:?}");
        sum += credit.bytes as usize;
    }
    assert_eq!(sum, wanted);
}

#[test]
fn a_host_is_told_what_was_read() {
    let (mut world, mut host) = World::device();
    let streamd = world.start();
    let mut process = world.piped(1, None);
    // One that has not asked hears nothing.
    host.stdin(1, b"before", 16);
    assert!(host.hears_nothing_for(QUIET));
    begin(&mut host);
    credited(&mut host, 1, 0);
    // What a pipe takes has been read, as far as streamd knows; what waits behind it has not.
    host.stdin(1, &pattern(1, 6, 200 << 10), 4096);
    let mut told = 0;
    while !host.hears_nothing_for(QUIET) {
        told += Credit::decode(&host.frame().1).unwrap().bytes as usize;
    }
    assert!((32 << 10..=64 << 10).contains(&told), "{told} bytes of a pipe");
    let mut got = vec![0; (200 << 10) + 6];
    process.stdin.as_mut().unwrap().read_exact(&mut got).unwrap();
    same(&got[6..], &pattern(1, 6, 200 << 10));
    credited(&mut host, 1, (200 << 10) - told);
    // What is thrown away waits no more either.
    host.stdin(1, &[0; 100 << 10], 4096);
    process.stdin = None;
    credited(&mut host, 1, 100 << 10);
    host.stdin(1, b"nobody reads", 100);
    credited(&mut host, 1, 12);
    streamd.leave_well();
}

#[test]
fn an_output_that_is_held_waits_and_the_others_do_not() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let mut held = world.piped(1, Some(2));
    let mut other = world.piped(3, None);
    begin(&mut host);
    host.send(&Ask::Hold(1).frame());
    // Answered when it has been heard.
    host.stdin(99, b"nobody", 16);
    assert_eq!(host.frame(), (99, Vec::new()));
    held.stdout.as_mut().unwrap().write_all(b"later").unwrap();
    held.stderr.as_mut().unwrap().write_all(b"stderr is another stream").unwrap();
    assert_eq!(host.frame(), (2, b"stderr is another stream".to_vec()));
    for round in 0..10u8 {
        other.stdout.as_mut().unwrap().write_all(&[round]).unwrap();
        assert_eq!(host.frame(), (3, vec![round]));
    }
    assert!(host.hears_nothing_for(QUIET));
    host.send(&Ask::Go(1).frame());
    assert_eq!(host.frame(), (1, b"later".to_vec()));
    // Its end does not wait.
    host.send(&Ask::Hold(1).frame());
    host.stdin(99, b"nobody", 16);
    assert_eq!(host.frame(), (99, Vec::new()));
    held.stdout.as_mut().unwrap().write_all(b"last").unwrap();
    held.exit();
    streamd.finish(1);
    assert_eq!(host.until_end(1)[&1], b"last");
    streamd.drained();
    streamd.leave_well();
}

#[test]
fn the_next_host_finds_nothing_held_and_is_told_nothing() {
    let mut world = World::listening("flow");
    let streamd = world.start();
    let mut process = world.piped(1, None);
    let mut host = world.connect();
    begin(&mut host);
    host.send(&Ask::Hold(1).frame());
    drop(host);
    process.stdout.as_mut().unwrap().write_all(b"said").unwrap();
    let mut host = world.connect();
    assert_eq!(host.frame(), (1, b"said".to_vec()));
    host.stdin(1, b"heard", 16);
    let mut got = [0; 5];
    process.stdin.as_mut().unwrap().read_exact(&mut got).unwrap();
    assert!(host.hears_nothing_for(QUIET));
    streamd.leave_well();
}

#[test]
fn a_successor_knows_that_the_host_is_to_be_told_and_holds_nothing() {
    let (mut world, mut host) = World::device();
    let streamd = world.start();
    let mut held = world.piped(1, None);
    begin(&mut host);
    host.send(&Ask::Hold(1).frame());
    host.stdin(99, b"nobody", 16);
    assert_eq!(host.frame(), (99, Vec::new()));
    held.stdout.as_mut().unwrap().write_all(b"more").unwrap();
    streamd.kill();
    let streamd = world.start();
    assert_eq!(host.frame(), (1, b"more".to_vec()));
    let mut new = world.piped(3, None);
    host.stdin(3, b"hello", 16);
    let mut got = [0; 5];
    new.stdin.as_mut().unwrap().read_exact(&mut got).unwrap();
    credited(&mut host, 3, 5);
    streamd.leave_well();
}

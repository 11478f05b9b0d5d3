//! By hand, and what is not to be trusted: packets.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::Duration;

use hyperinit::wire::streamd::Streams;

use super::guest::{World, id};

#[test]
fn it_leaves_when_there_are_no_more_requests() {
    let (world, _host) = World::device();
    world.start().leave_well();
}

#[test]
fn it_answers_first_what_was_asked() {
    let (world, mut host) = World::device();
    let mut streamd = world.start();
    streamd.finish(5);
    streamd.ask(r#""Flush""#);
    streamd.ask("no request");
    let answers = [streamd.answer(), streamd.answer(), streamd.answer()];
    assert_eq!(answers.iter().filter(|answer| *answer == r#"{"Ok":"Drained"}"#).count(), 2, "{answers:?}");
    assert_eq!(host.frame(), (5, Vec::new()));
    // The end of a process whose grace is not over when requests end.
    let mut world = world;
    let mut process = world.piped(6, None);
    streamd.finish(6);
    let (status, log) = streamd.leave();
    assert!(status.success(), "{log}");
    assert_eq!(host.frame(), (6, Vec::new()));
    process.exit();
}

#[test]
fn its_policy_is_printed_and_without_it_it_is_loud() {
    let output = Command::new(env!("CARGO_BIN_EXE_streamd")).arg("--policy").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("splice: from a process to the buffer"), "{text}");
    let (world, _host) = World::device();
    let (status, log) = world.start_with(&["--unconfined"]).leave();
    assert!(status.success() && log.contains("streamd: UNCONFINED"), "{log}");
}

#[test]
fn it_is_nobody_and_filtered() {
    let (world, _host) = World::device();
    let mut streamd = world.start();
    streamd.ask(r#""Flush""#);
    streamd.drained();
    let status = std::fs::read_to_string(format!("/proc/{}/status", streamd.pid())).unwrap();
    for line in [
        "Uid:\t4294963202\t4294963202\t4294963202\t4294963202",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line} in {status}");
    }
    streamd.leave_well();
}

#[test]
fn idle_it_does_not_wake_up() {
    let (mut world, mut host) = World::device();
    let process = world.piped(1, Some(2));
    let _tty = world.tty(3);
    let mut streamd = world.start();
    std::io::Write::write_all(&mut process.stdout.as_ref().unwrap(), b"x").unwrap();
    assert_eq!(host.frame(), (1, b"x".to_vec()));
    streamd.ask(r#""Flush""#);
    streamd.drained();
    // The last system calls of that round.
    assert!(streamd.says_nothing_for(Duration::from_millis(200)));
    let before = streamd.status("voluntary_ctxt_switches");
    assert!(streamd.says_nothing_for(Duration::from_secs(2)));
    assert_eq!(streamd.status("voluntary_ctxt_switches"), before);
    streamd.leave_well();
}

#[test]
fn packets_that_are_none_change_nothing() {
    let (mut world, mut host) = World::device();
    let mut streamd = world.start();
    let null = File::open("/dev/null").unwrap();
    let fds = [null.as_fd(); 5];
    let honest = Streams { stdio: id(7), stderr: Some(id(8)), terminal: false, stdin: true, again: false };
    let packet = honest.encode();
    // Too short, too long, empty, of no meaning; too few and too many descriptors; descriptors that cannot be
    // watched.
    world.send_raw(&packet[..18], &fds[..3]);
    world.send_raw(&[&packet[..], &[0]].concat(), &fds[..3]);
    world.send_raw(&[0; 4096], &[]);
    world.send_raw(&[0; 19], &fds[..1]);
    world.send_raw(b"", &[]);
    for count in [0, 1, 2, 3, 4, 5] {
        world.send_raw(&packet, &fds[..count]);
    }
    let mut process = world.piped(1, None);
    std::io::Write::write_all(process.stdout.as_mut().unwrap(), b"alive").unwrap();
    process.exit();
    streamd.finish(1);
    assert_eq!(host.until_end(1)[&1], b"alive");
    streamd.drained();
    // Stream 7 never came to be.
    host.close_stdin(7);
    assert_eq!(host.frame(), (7, Vec::new()));
    let open = std::fs::read_dir(format!("/proc/{}/fd", streamd.pid())).unwrap();
    let nulls =
        open.filter(|fd| std::fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(|to| to == null_path()));
    assert_eq!(nulls.count(), 0, "descriptors of refused packets are closed");
    let (status, log) = streamd.leave();
    assert!(status.success(), "{log}");
    assert!(log.lines().count() >= 10 && log.contains("its descriptors do not fit it"), "{log}");
}

fn null_path() -> std::path::PathBuf {
    "/dev/null".into()
}

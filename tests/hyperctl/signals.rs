//! Signals to hyperctl go to the program. Its standard streams work in whatever state it is given them.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use hyperinit::ids;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;

use super::guest::PATIENCE;
use super::run::{left, run};
use super::{Running, finish, read_until, spawn, text};

/// Sends any signal, including real-time ones.
fn send(child: &Running, number: i32) {
    let pid = ids::Pid(child.id().cast_signed());
    hyperinit::sys::signal::kill(pid, number, false).unwrap();
}

/// A shell script that prints each of these signals when it gets it. It busy-waits: if it waited in a call, a
/// signal that came just before the call would be noticed only with the next one.
fn saying(signals: &[i32]) -> String {
    let traps: String = signals.iter().map(|number| format!("trap 'echo got {number}' {number}; ")).collect();
    format!("{traps} echo up; while :; do :; done")
}

/// The command, started by a shell that has executed `words` before.
fn after(words: &str, command: &Command) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", &format!("{words}; exec \"$@\""), "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        shell.env(name, value.unwrap());
    }
    shell.stdin(Stdio::null());
    shell
}

#[test]
fn every_signal_that_a_program_can_have_is_its_own() {
    // All but KILL, PIPE, CHLD, STOP, URG, and the two that the C library reserves.
    let all: Vec<i32> = (1..=64).filter(|number| ![9, 13, 17, 19, 23, 32, 33].contains(number)).collect();
    // INT and TERM come twice in all; a third one would end hyperctl.
    let (mut command, directory) = run(&[], &saying(&all));
    let mut child = spawn(command.stdout(Stdio::piped()));
    let mut stdout = child.stdout.take().unwrap();
    read_until(&mut stdout, "up\n");
    for number in all {
        send(&child, number);
        let said = read_until(&mut stdout, "\n");
        assert_eq!(said, format!("got {number}\n"));
    }
    // Any number of SIGHUPs, which tell a program to read its configuration again, passes.
    for _ in 0..5 {
        send(&child, 1);
        assert_eq!(read_until(&mut stdout, "\n"), "got 1\n");
    }
    send(&child, 15);
    assert_eq!(finish(child).status.code(), Some(143));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

/// A signal goes to the program and not to its children, as under Docker. Only the signals of a terminal's
/// keys go to the whole group.
#[test]
fn a_signal_is_the_programs_alone() {
    let script = "sleep 1000 & child=$!; trap 'kill -0 $child && echo alone' USR1; trap : TSTP; \
         echo up; while :; do :; done";
    let (mut command, _directory) = run(&[], script);
    let mut child = spawn(command.stdout(Stdio::piped()));
    let mut stdout = child.stdout.take().unwrap();
    read_until(&mut stdout, "up\n");
    send(&child, 10);
    assert_eq!(read_until(&mut stdout, "\n"), "alone\n");
    // A background job of a script ignores INT, and stops and continues with its group.
    send(&child, 20);
    send(&child, 18);
    send(&child, 10);
    assert_eq!(read_until(&mut stdout, "\n"), "alone\n");
    send(&child, 15);
    assert_eq!(finish(child).status.code(), Some(143));
}

#[test]
fn what_was_ignored_stays_ignored() {
    let (command, directory) = run(&[], &saying(&[1, 10, 15]));
    let mut child = spawn(after("trap '' HUP USR1", &command).stdout(Stdio::piped()));
    let mut stdout = child.stdout.take().unwrap();
    read_until(&mut stdout, "up\n");
    send(&child, 1);
    send(&child, 10);
    // Signals arrive in order: an ignored one that had been passed on would have been printed before.
    for _ in 0..2 {
        send(&child, 15);
        assert_eq!(read_until(&mut stdout, "\n"), "got 15\n");
    }
    send(&child, 15);
    assert_eq!(finish(child).status.code(), Some(143));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

#[test]
fn a_caller_that_ignores_its_children_gets_a_status_all_the_same() {
    let (command, directory) = run(&[], "trap 'exit 9' TERM; echo up; (exit 3); kill -TERM $$; wait");
    let child = spawn(after("trap '' CHLD", &command).stdout(Stdio::piped()));
    let output = finish(child);
    assert_eq!((output.status.code(), text(&output.stdout)), (Some(9), "up\n"));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

/// Both ends of a pipe. The end `nonblocking`, which hyperctl gets, is in non-blocking mode.
fn pipe(nonblocking: usize) -> [OwnedFd; 2] {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
    let ends = [reader, writer];
    nix::fcntl::fcntl(&ends[nonblocking], nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    ends
}

#[test]
fn nothing_is_lost_in_pipes_that_somebody_made_non_blocking() {
    let (mut command, directory) = run(&["-i"], "seq 300000; seq 300000 >&2; cat; exit 5");
    let ([out, to_out], [err, to_err], [from_in, stdin]) = (pipe(1), pipe(1), pipe(0));
    let child = spawn(command.stdin(from_in).stdout(to_out).stderr(to_err));
    drop(command);
    // The test does not read until the pipe is full, so that hyperctl has to wait.
    wait_until_full(&out);
    let mut out = File::from(out);
    let mut said = String::new();
    let expected: String = (1..=300_000).map(|number| format!("{number}\n")).collect();
    while said.len() < expected.len() {
        let mut chunk = [0; 4096];
        let count = out.read(&mut chunk).unwrap();
        said.push_str(text(&chunk[..count]));
    }
    assert!(said == expected);
    wait_until_full(&err);
    let mut err = File::from(err);
    let errors = std::thread::spawn(move || {
        let mut said = String::new();
        err.read_to_string(&mut said).unwrap();
        said
    });
    // hyperctl's standard input, also non-blocking, has been empty all the time.
    let mut stdin = File::from(stdin);
    stdin.write_all(b"in").unwrap();
    let mut answer = [0; 2];
    out.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"in");
    drop(stdin);
    let output = finish(child);
    assert_eq!(output.status.code(), Some(5));
    assert!(errors.join().unwrap() == expected);
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

/// Waits until a pipe is full.
fn wait_until_full(reader: &OwnedFd) {
    let deadline = Instant::now() + PATIENCE;
    let size = nix::fcntl::fcntl(reader, nix::fcntl::FcntlArg::F_GETPIPE_SZ).unwrap();
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()), Ok(1));
    loop {
        let there = rustix::io::ioctl_fionread(reader).unwrap();
        // A large write needs whole pages: the rest of the last one may stay unused.
        if there + 4096 > u64::try_from(size).unwrap() {
            return;
        }
        assert!(Instant::now() < deadline, "{there} bytes");
        std::thread::yield_now();
    }
}

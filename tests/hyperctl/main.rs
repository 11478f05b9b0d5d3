//! Tests hyperctl as a person uses it: its error messages, and its runs. Needs root (for namespaces); some
//! tests boot a VM.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod by_hand;
#[path = "../guest/mod.rs"]
mod guest;
mod many;
mod options;
mod played;
mod run;
mod share;
mod signals;
mod up;

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::channel;

use guest::{BOOT, hyperctl_path};
use hyperinit::sys::process::ignore_nothing;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn hyperctl(line: &str) -> Command {
    let mut command = Command::new(hyperctl_path());
    command.args(line.split(' ')).stdin(Stdio::null());
    command
}

/// A hyperctl process. Dropping it kills the process, so that it does not outlive its test.
struct Running(Option<Child>);

impl std::ops::Deref for Running {
    type Target = Child;
    fn deref(&self) -> &Child {
        self.0.as_ref().unwrap()
    }
}

impl std::ops::DerefMut for Running {
    fn deref_mut(&mut self) -> &mut Child {
        self.0.as_mut().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            // Its guest dies with it.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn spawn(command: &mut Command) -> Running {
    // hyperctl would inherit the signals that the test ignores, as a shell's background job does.
    ignore_nothing().unwrap();
    loop {
        match command.spawn() {
            // The program was just copied. A child that another thread has forked, but that has not executed
            // its own program yet, still has the file open for writing.
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => std::thread::yield_now(),
            child => return Running(Some(child.unwrap())),
        }
    }
}

/// The output of a command, which must end in time.
fn finish(mut running: Running) -> Output {
    let child = running.0.take().unwrap();
    let pid = child.id();
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    receiver
        // The command may boot a VM.
        .recv_timeout(BOOT)
        .unwrap_or_else(|_| {
            // The pid is still valid: the thread has not reaped the process.
            let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
            panic!("hyperctl does not end")
        })
        .unwrap()
}

fn output(mut command: Command) -> Output {
    finish(spawn(command.stdout(Stdio::piped()).stderr(Stdio::piped())))
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn signal(child: &Running, signal: Signal) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
}

/// A temporary directory that every user may enter. Dropping it removes the directory.
fn scratch() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// Reads until the bytes so far end with `end`.
fn read_until(from: &mut impl Read, end: &str) -> String {
    let mut all = String::new();
    while !all.ends_with(end) {
        let mut byte = [0];
        from.read_exact(&mut byte).unwrap_or_else(|error| panic!("{error} after {all:?}"));
        all.push(char::from(byte[0]));
    }
    all
}

// ---- what it says when it cannot ----

#[test]
fn a_wrong_command_line_is_told_apart_from_what_a_container_says() {
    for (line, code) in [
        ("up --vm --local --dir d --share s", 2),
        ("up --dir d --share s", 2),
        ("call --dir d BREW", 2),
        ("initrd", 2),
        ("brew", 2),
        ("run --vm", 125),
        ("exec --dir d c", 125),
        ("run --local --memory 512 -- true", 125),
    ] {
        let output = output(hyperctl(line));
        assert_eq!(output.status.code(), Some(code), "{line}");
        assert!(
            text(&output.stderr).contains("For more information, try '--help'"),
            "{line}: {}",
            text(&output.stderr)
        );
        assert!(output.stdout.is_empty());
    }
    let help = output(hyperctl("run --help"));
    assert_eq!(help.status.code(), Some(0));
    assert!(text(&help.stdout).contains("--read-only"));
}

/// hyperctl in a place where a user other than root can execute it, outside of any checkout.
fn elsewhere(directory: &Path, line: &str) -> Command {
    let copy = directory.join("hyperctl");
    fs::copy(hyperctl_path(), &copy).unwrap();
    let mut command = Command::new(copy);
    command.args(line.split(' ')).current_dir(directory).env_remove("HYPERINIT_KERNEL");
    command.stdin(Stdio::null());
    command
}

#[test]
fn a_local_guest_without_root_says_so() {
    let directory = scratch();
    for (line, code) in [("up --local --dir d --share .", 1), ("run --local --rootfs . -- true", 125)] {
        let mut command = elsewhere(directory.path(), line);
        command.uid(65_534).gid(65_534);
        let output = output(command);
        assert_eq!(
            text(&output.stderr),
            "hyperctl: starting a local guest: only root can: use sudo, or --vm, which needs none\n"
        );
        assert_eq!(output.status.code(), Some(code));
    }
}

#[test]
fn what_is_missing_is_named_with_what_makes_it() {
    let directory = scratch();
    for (line, says) in [
        ("up --vm --dir d --share .", "a kernel: no .cache/kernel/vmlinuz: `make kernel` makes it"),
        ("up --vm --dir d --share . --kernel hyperctl", "an initramfs: no .cache/initrd.img: `make initrd`"),
        ("run -- true", "a root filesystem: no .cache/rootfs: `make rootfs`"),
        ("run --rootfs nowhere -- true", "looking for nowhere: No such file or directory"),
        ("up --local --dir d --share .", "hyperinit: not there: `make build floor`"),
        ("up --local --dir d --share hyperctl", "hyperctl: not a directory"),
        ("initrd --modules . -o f", "`depmod"),
        ("call --dir . PING", "connecting to ./hyperctl.sock: No such file or directory"),
        ("call --dir . PING {", "reading the JSON"),
        ("exec --dir . c -- true", "connecting to ./hyperctl.sock: No such file or directory"),
        ("exec --dir . ../c -- true", "naming the container"),
    ] {
        let output = output(elsewhere(directory.path(), line));
        assert!(text(&output.stderr).contains(says), "{line}: {}", text(&output.stderr));
        assert_eq!(text(&output.stderr).lines().count(), 1, "one line");
        assert!(!output.status.success());
    }
}

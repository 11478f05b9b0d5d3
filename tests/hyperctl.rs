//! hyperctl as a person meets it: what it says when it cannot, and what a run is like when it can. Needs root (for
//! namespaces); one test boots a VM.

#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod guest;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::channel;

use guest::{BOOT, PATIENCE, make_rootfs};
use hyperinit::client::{CallError, Client};
use hyperinit::sys::tty;
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

const HYPERCTL: &str = env!("CARGO_BIN_EXE_hyperctl");

fn hyperctl(line: &str) -> Command {
    let mut command = Command::new(HYPERCTL);
    command.args(line.split(' ')).stdin(Stdio::null());
    command
}

/// A hyperctl that does not outlive its test.
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
    Running(Some(command.spawn().unwrap()))
}

/// What a command came to; it must end in time.
fn finish(mut running: Running) -> Output {
    let child = running.0.take().unwrap();
    let pid = child.id();
    let (sender, receiver) = channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    receiver
        // It may be one that boots a VM.
        .recv_timeout(BOOT)
        .unwrap_or_else(|_| {
            // Not reaped: the thread still waits for it.
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

/// A directory that everybody may enter, and that goes with it.
fn scratch() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// `hyperctl run --local` in a root filesystem of its own, with more options.
fn run(options: &[&str], script: &str) -> (Command, tempfile::TempDir) {
    let directory = scratch();
    let rootfs = directory.path().join("rootfs");
    make_rootfs(&rootfs);
    let mut command = Command::new(HYPERCTL);
    // What it makes for itself must be gone with it.
    command.env("TMPDIR", directory.path());
    command.arg("run");
    if !options.contains(&"--vm") {
        command.arg("--local");
    }
    command.args(options).arg("--rootfs").arg(&rootfs).args(["--", "sh", "-c", script]);
    command.stdin(Stdio::null());
    (command, directory)
}

/// What is in the directory of a run besides its root filesystem.
fn left(directory: &tempfile::TempDir) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| !path.ends_with("rootfs")).collect()
}

// ---- what it says when it cannot ----

#[test]
fn a_wrong_command_line_is_told_apart_from_what_a_container_says() {
    for (line, code) in [
        ("up --vm --local --dir d --share s", 2),
        ("up --dir d --share s", 2),
        ("call --dir d BREW", 2),
        ("initrd -o f", 2),
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

/// hyperctl where a user other than root can execute it, and where no checkout is around it.
fn elsewhere(directory: &Path, line: &str) -> Command {
    let copy = directory.join("hyperctl");
    fs::copy(HYPERCTL, &copy).unwrap();
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
        ("up --local --dir d --share .", "hyperinit: not there: `cargo build`"),
        ("up --local --dir d --share hyperctl", "hyperctl: not a directory"),
        ("initrd --modules . -o f", "`depmod"),
        ("call --dir . PING", "connecting to ./ctl.sock: No such file or directory"),
        ("call --dir . PING {", "reading the JSON"),
        ("exec --dir . c -- true", "connecting to ./ctl.sock: No such file or directory"),
        ("exec --dir . ../c -- true", "naming the container"),
    ] {
        let output = output(elsewhere(directory.path(), line));
        assert!(text(&output.stderr).contains(says), "{line}: {}", text(&output.stderr));
        assert_eq!(text(&output.stderr).lines().count(), 1, "one line");
        assert!(!output.status.success());
    }
}

// ---- run ----

#[test]
fn a_run_is_its_program() {
    let (command, directory) = run(
        &["-e", "A=a b", "-e", "B=", "-w", "/made/here", "-u", "web:audio"],
        "echo \"$A/$B/$PWD/$(id -un)/$(id -gn)\"; echo err >&2; cat; exit 7",
    );
    let output = output(command);
    assert_eq!(text(&output.stdout), "a b///made/here/web/audio\n", "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "err\n");
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

#[test]
fn a_program_that_is_killed_or_cannot_be_started_has_a_shells_status() {
    assert_eq!(output(run(&[], "kill -9 $$").0).status.code(), Some(137));
    assert_eq!(output(run(&[], "exec nothing-of-this-name").0).status.code(), Some(127));
    let refused = output(run(&["-u", "nobody-of-this-name"], "true").0);
    assert_eq!(refused.status.code(), Some(125));
    assert!(text(&refused.stderr).starts_with("hyperctl: starting the container: execd: "));
    let read_only = output(run(&["--read-only"], "echo x >/file || exit 3").0);
    assert_eq!(read_only.status.code(), Some(3));
}

#[test]
fn what_goes_in_comes_out() {
    let (mut command, _directory) = run(&["-i"], "cat");
    let mut child = spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let bytes: Vec<u8> = (0..4u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut stdin = child.stdin.take().unwrap();
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent));
    let output = finish(child);
    writer.join().unwrap().unwrap();
    assert!(output.stdout == bytes, "{} of {} bytes", output.stdout.len(), bytes.len());
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_reader_that_leaves_ends_the_run() {
    let (mut command, directory) = run(&[], "yes");
    let mut child = spawn(command.stdout(Stdio::piped()));
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 4]).unwrap();
    drop(stdout);
    assert_eq!(finish(child).status.code(), Some(128 + Signal::SIGPIPE as i32));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
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

#[test]
fn signals_are_the_programs() {
    for (number, status) in [(Signal::SIGTERM, 15), (Signal::SIGINT, 2), (Signal::SIGHUP, 1)] {
        let traps =
            "for s in 1 2 15; do trap \"exit $s\" $s; done; echo up; while :; do sleep 100 & wait; done";
        let (mut command, directory) = run(&[], traps);
        let mut child = spawn(command.stdout(Stdio::piped()));
        let mut stdout = child.stdout.take().unwrap();
        read_until(&mut stdout, "up\n");
        signal(&child, number);
        assert_eq!(finish(child).status.code(), Some(status));
        assert_eq!(left(&directory), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_program_that_heeds_no_signal_is_ended_by_the_third() {
    let (mut command, directory) =
        run(&[], "trap 'echo no' INT; echo up; while :; do sleep 100 & wait; done");
    let mut child = spawn(command.stdout(Stdio::piped()));
    let mut stdout = child.stdout.take().unwrap();
    read_until(&mut stdout, "up\n");
    for _ in 0..2 {
        signal(&child, Signal::SIGINT);
        read_until(&mut stdout, "no\n");
    }
    signal(&child, Signal::SIGINT);
    assert_eq!(finish(child).status.code(), Some(130));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

/// Starts a run on a pty; the caller's end of it, the terminal itself, and the child.
fn run_on_tty(script: &str) -> (File, OwnedFd, Running, tempfile::TempDir) {
    let pty = openpty(None, None).unwrap();
    tty::set_size(&pty.slave, 33, 99).unwrap();
    let (mut command, directory) = run(&["-t", "-i"], script);
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let child = spawn(command.stdin(end()).stdout(end()).stderr(end()));
    (File::from(pty.master), pty.slave, child, directory)
}

#[test]
fn a_terminal_is_passed_on_with_its_size_and_restored() {
    let script = "trap 'echo int; exit 9' INT; trap 'stty size' WINCH; \
         while [ \"$(stty size)\" != '33 99' ]; do sleep 0.01; done; echo ready; \
         while :; do sleep 100 & wait; done";
    let (mut master, slave, child, _directory) = run_on_tty(script);
    let cooked = LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG;
    let before = tcgetattr(&slave).unwrap();
    assert!(before.local_flags.contains(cooked));
    read_until(&mut master, "ready\r\n");
    assert!(!tcgetattr(&slave).unwrap().local_flags.intersects(cooked), "raw");
    tty::set_size(&slave, 44, 111).unwrap();
    signal(&child, Signal::SIGWINCH);
    read_until(&mut master, "44 111\r\n");
    master.write_all(b"\x03").unwrap();
    read_until(&mut master, "int\r\n");
    assert_eq!(finish(child).status.code(), Some(9));
    assert!(tcgetattr(&slave).unwrap() == before, "restored");
}

#[test]
fn a_terminal_is_restored_when_hyperctl_is_told_to_end() {
    let (mut master, slave, child, _directory) = run_on_tty("echo ready; sleep 100");
    let before = tcgetattr(&slave).unwrap();
    read_until(&mut master, "ready\r\n");
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).status.code(), Some(143));
    assert!(tcgetattr(&slave).unwrap() == before, "restored");
}

#[test]
fn a_guest_that_does_not_come_up_says_why() {
    let output = output(run(&["--append", "hyper_log=loud"], "true").0);
    assert_eq!(output.status.code(), Some(125));
    let says = text(&output.stderr);
    assert!(says.starts_with("hyperctl: running the guest: it ended (exit status: 2); "), "{says}");
    assert!(says.contains("console.log ends with\n  hyperinit: no such log level"), "{says}");
}

#[test]
fn a_vm_runs_a_program_alike() {
    let script = "uname -s; cat; echo err >&2; exit 5";
    let (mut command, directory) = run(&["--vm", "-i"], script);
    let mut child = spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()));
    child.stdin.take().unwrap().write_all(b"in").unwrap();
    let output = finish(child);
    assert_eq!(text(&output.stdout), "Linux\nin", "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "err\n");
    assert_eq!(output.status.code(), Some(5));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

// ---- up and call ----

/// A guest that is up in `directory`/guest.
fn up(directory: &Path) -> (Running, Client) {
    up_with(directory, &["--local"])
}

fn up_with(directory: &Path, options: &[&str]) -> (Running, Client) {
    let mut command = Command::new(HYPERCTL);
    command.arg("up").args(options).arg("--share").arg(directory).arg("--dir").arg(directory.join("guest"));
    let mut child = spawn(command.stdin(Stdio::null()).stderr(Stdio::piped()));
    let alive = || match child.try_wait().unwrap() {
        None => Ok(()),
        Some(status) => panic!("hyperctl up ended: {status}"),
    };
    let client = Client::connect_within(&directory.join("guest"), BOOT, alive).unwrap();
    if let Err(error) = client.ready(BOOT) {
        let log = fs::read_to_string(directory.join("guest/console.log"));
        panic!("{error}; hyperctl up: {:?}; its guest: {log:?}", child.try_wait());
    }
    (child, client)
}

/// Waits until nobody is at the other end any more.
fn wait_for_hang_up(client: &Client) {
    match client.event(PATIENCE) {
        Err(CallError::Broken(_)) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_guest_ends_with_a_signal_and_leaves_its_log_only() {
    for number in [Signal::SIGTERM, Signal::SIGINT] {
        let directory = scratch();
        let (child, client) = up(directory.path());
        signal(&child, number);
        wait_for_hang_up(&client);
        assert_eq!(finish(child).status.code(), Some(0));
        let names: Vec<_> =
            fs::read_dir(directory.path().join("guest")).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["console.log"]);
    }
}

/// The kernel takes ten lines of a program in five seconds unless it is told otherwise.
#[test]
fn the_log_of_a_vm_is_complete() {
    let directory = scratch();
    let (child, client) = up_with(directory.path(), &["--vm", "--append", "hyper_log=debug"]);
    drop(client);
    let log = fs::read(directory.path().join("guest/console.log")).unwrap();
    let log = String::from_utf8_lossy(&log);
    let loaded = log.lines().filter(|line| line.contains(".ko took ")).count();
    assert!(loaded > 20 && log.contains("init: up after"), "{loaded} modules\n{log}");
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).status.code(), Some(0));
}

#[test]
fn a_guest_dies_with_a_hyperctl_that_is_killed() {
    let directory = scratch();
    let (child, client) = up(directory.path());
    signal(&child, Signal::SIGKILL);
    wait_for_hang_up(&client);
    assert_eq!(finish(child).status.signal(), Some(9));
    // A dying guest's connections end before its listening socket does.
    while std::os::unix::net::UnixStream::connect(directory.path().join("guest/ctl.sock")).is_ok() {
        std::thread::yield_now();
    }
    // Its directory is free again, whatever was left there; what was left of its cgroup goes with the next one.
    let (child, client) = up(directory.path());
    drop(client);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).status.code(), Some(0));
}

#[test]
fn a_directory_has_one_guest() {
    let directory = scratch();
    let (child, _client) = up(directory.path());
    let mut second = Command::new(HYPERCTL);
    second.args(["up", "--local", "--share"]).arg(directory.path());
    second.arg("--dir").arg(directory.path().join("guest")).stdin(Stdio::null());
    let output = output(second);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).ends_with("a guest is running there\n"), "{}", text(&output.stderr));
    assert!(directory.path().join("guest/ctl.sock").exists(), "the first one's");
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).status.code(), Some(0));
}

#[test]
fn the_log_is_followed_to_its_end() {
    let directory = scratch();
    let logs = |more: &[&str]| {
        let mut command = Command::new(HYPERCTL);
        command.args(["logs", "--dir"]).arg(directory.path().join("guest")).args(more).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let none = output(logs(&[]));
    assert_eq!(none.status.code(), Some(1));
    assert!(text(&none.stderr).contains("console.log"), "{}", text(&none.stderr));

    let (child, client) = up_with(directory.path(), &["--local", "--append", "hyper_log=info"]);
    let mut followed = spawn(&mut logs(&["-f"]));
    let mut out = followed.0.as_mut().unwrap().stdout.take().unwrap();
    let mut begun = read_until(&mut out, "up after");
    client.call(hyperinit::command::Command::DestroyPod).unwrap();
    assert_eq!(finish(child).status.code(), Some(0));
    // It ends with the guest, and has missed nothing.
    out.read_to_string(&mut begun).unwrap();
    assert_eq!(finish(followed).status.code(), Some(0));
    let log = fs::read_to_string(directory.path().join("guest/console.log")).unwrap();
    assert_eq!(begun, log);
    // The guest is gone, its log is not.
    assert_eq!(text(&output(logs(&[])).stdout), log);
}

#[test]
fn one_command_by_hand() {
    let directory = scratch();
    let (child, client) = up(directory.path());
    drop(client);
    let call = |words: &[&str]| {
        let mut command = Command::new(HYPERCTL);
        command.args(["call", "--dir"]).arg(directory.path().join("guest")).args(words).stdin(Stdio::null());
        output(command)
    };
    assert_eq!(text(&call(&["getversion"]).stdout), "4244\n");
    let ping = call(&["PING"]);
    assert_eq!((ping.status.code(), ping.stdout, ping.stderr), (Some(0), vec![], vec![]));
    let refused = call(&["KILLCONTAINER", r#"{"container":"c","signal":9}"#]);
    assert_eq!(refused.status.code(), Some(1));
    let says = text(&refused.stderr);
    assert!(says.starts_with("hyperctl: calling KILLCONTAINER: ") && says.lines().count() == 1, "{says}");
    assert_eq!(call(&["DESTROYPOD"]).status.code(), Some(0));
    assert_eq!(finish(child).status.code(), Some(0));
}

// ---- a pod by hand ----

/// A guest that a person has for a while: everything by `call` and `exec`.
struct ByHand {
    directory: tempfile::TempDir,
    guest: Option<Running>,
}

impl ByHand {
    fn new(options: &[&str]) -> ByHand {
        let directory = scratch();
        make_rootfs(&directory.path().join("image/rootfs"));
        let (child, client) = up_with(directory.path(), options);
        drop(client);
        ByHand { directory, guest: Some(child) }
    }

    fn command(&self, subcommand: &str, words: &[&str]) -> Command {
        let mut command = Command::new(HYPERCTL);
        command.args([subcommand, "--dir"]).arg(self.directory.path().join("guest")).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// A command that is done, with this on standard input; what it prints.
    fn call(&self, command: &str, json: &str, stdin: &[u8]) -> Vec<u8> {
        let mut child = spawn(self.command("call", &[command, json]).stdin(Stdio::piped()));
        child.stdin.take().unwrap().write_all(stdin).unwrap();
        let output = finish(child);
        assert!(output.status.success(), "{command}: {}", text(&output.stderr));
        output.stdout
    }

    fn exec(&self, words: &[&str]) -> Output {
        output(self.command("exec", words))
    }

    /// The pod and a container that says more than anybody reads.
    fn start(&self, network: &str) {
        self.call("STARTPOD", &format!(r#"{{"hostname": "hand", "shareDir": "share_dir"{network}}}"#), b"");
        let script = r#"["sh", "-c", "seq 300000; echo sat >/tmp/sat; sleep 100000"]"#;
        let process = format!(r#"{{"args": {script}, "stdio": 1, "stderr": 2}}"#);
        let container =
            format!(r#"{{"id": "c", "image": "image", "rootfs": "rootfs", "process": {process}}}"#);
        self.call("NEWCONTAINER", &container, b"");
    }

    /// What a person does in a pod; where the guest's network is its own, there too.
    fn use_it(&self) {
        let outcome = self.exec(&[
            "-e",
            "A=1",
            "-u",
            "web",
            "c",
            "--",
            "sh",
            "-c",
            "echo $A $(id -un); echo err >&2; exit 7",
        ]);
        assert_eq!((text(&outcome.stdout), text(&outcome.stderr)), ("1 web\n", "err\n"));
        assert_eq!(outcome.status.code(), Some(7));
        // What the container says goes nowhere, and holds it up no longer than somebody is there.
        let sat =
            self.exec(&["c", "--", "sh", "-c", "until [ -e /tmp/sat ]; do sleep 0.01; done; cat /tmp/sat"]);
        assert_eq!(text(&sat.stdout), "sat\n", "{}", text(&sat.stderr));

        let mut child = spawn(self.command("exec", &["-i", "c", "--", "cat"]).stdin(Stdio::piped()));
        let sent: Vec<u8> = (0..1u32 << 20).map(|at| (at % 251) as u8).collect();
        let mut stdin = child.stdin.take().unwrap();
        let bytes = sent.clone();
        let writer = std::thread::spawn(move || stdin.write_all(&bytes));
        assert!(finish(child).stdout == sent);
        writer.join().unwrap().unwrap();

        self.call("WRITEFILE", r#"{"container": "c", "file": "/tmp/file"}"#, b"content");
        assert_eq!(self.call("READFILE", r#"{"container": "c", "file": "/tmp/file"}"#, b""), b"content");
        assert_eq!(text(&self.exec(&["c", "--", "cat", "/tmp/file"]).stdout), "content");
        self.call(
            "SETUPINTERFACE",
            r#"{"device": "lo", "ipAddresses": [{"ipAddress": "192.0.2.7", "netMask": "24"}]}"#,
            b"",
        );
        let address = self.exec(&["c", "--", "sh", "-c", "ip addr show lo | grep -c 192.0.2.7/24"]);
        assert_eq!(text(&address.stdout), "1\n", "{}", text(&address.stderr));
    }

    /// The end, in order.
    fn end(mut self) {
        self.call("KILLCONTAINER", r#"{"container": "c", "signal": 9}"#, b"");
        // It has ended when it can be removed; nobody here hears its event.
        let deadline = std::time::Instant::now() + PATIENCE;
        while !output(self.command("call", &["REMOVECONTAINER", r#"{"container": "c"}"#])).status.success() {
            assert!(std::time::Instant::now() < deadline, "the container does not end");
        }
        self.call("DESTROYPOD", "null", b"");
        assert_eq!(finish(self.guest.take().unwrap()).status.code(), Some(0));
    }
}

#[test]
fn a_pod_by_hand() {
    let hand = ByHand::new(&["--local"]);
    hand.start("");
    hand.use_it();
    for (words, status, says) in [
        (&["c", "--", "missing"][..], 127, "missing"),
        (&["nowhere", "--", "true"], 125, "hyperctl: starting the program: "),
        (&["-u", "nobody-of-this-name", "c", "--", "true"], 125, "nobody-of-this-name"),
        (&["c", "--", "sh", "-c", "kill -9 $$"], 137, ""),
    ] {
        let outcome = hand.exec(words);
        assert_eq!(outcome.status.code(), Some(status), "{words:?}: {}", text(&outcome.stderr));
        assert!(text(&outcome.stderr).contains(says), "{}", text(&outcome.stderr));
    }
    hand.end();
}

#[test]
fn a_pod_by_hand_in_a_vm() {
    let hand = ByHand::new(&["--vm"]);
    hand.start("");
    hand.use_it();
    hand.end();
}

/// The words of a process of the container that still runs.
fn runs(hand: &ByHand, words: &str) -> bool {
    let look = format!("ps -o args | grep -v grep | grep -q '{words}'");
    hand.exec(&["c", "--", "sh", "-c", &look]).status.code() == Some(0)
}

#[test]
fn an_execs_signals_are_its_programs() {
    let hand = ByHand::new(&["--local"]);
    hand.start("");
    let trap = "trap 'exit 9' TERM; echo up; while :; do sleep 0.01; done";
    let mut child = spawn(&mut hand.command("exec", &["c", "--", "sh", "-c", trap]));
    read_until(&mut child.stdout.take().unwrap(), "up\n");
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).status.code(), Some(9));

    // One that heeds none is ended by the third.
    let deaf = "trap 'echo no' INT; echo up; while :; do sleep 0.01; done; : deaf";
    let mut child = spawn(&mut hand.command("exec", &["c", "--", "sh", "-c", deaf]));
    let mut stdout = child.stdout.take().unwrap();
    read_until(&mut stdout, "up\n");
    for _ in 0..2 {
        signal(&child, Signal::SIGINT);
        read_until(&mut stdout, "no\n");
    }
    signal(&child, Signal::SIGINT);
    assert_eq!(finish(child).status.code(), Some(130));
    assert!(!runs(&hand, ": deaf"));

    // A reader that leaves ends it too.
    let mut child = spawn(&mut hand.command("exec", &["c", "--", "yes", "long"]));
    child.stdout.take().unwrap().read_exact(&mut [0; 4]).unwrap();
    assert_eq!(finish(child).status.code(), Some(128 + Signal::SIGPIPE as i32));
    assert!(!runs(&hand, "yes long"));
    hand.end();
}

#[test]
fn an_exec_has_the_callers_terminal() {
    let hand = ByHand::new(&["--local"]);
    hand.start("");
    let script = "trap 'stty size' WINCH; while [ \"$(stty size)\" != '33 99' ]; do sleep 0.01; done; \
         echo ready; while :; do sleep 100 & wait; done";
    let pty = openpty(None, None).unwrap();
    tty::set_size(&pty.slave, 33, 99).unwrap();
    let before = tcgetattr(&pty.slave).unwrap();
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let mut command = hand.command("exec", &["-ti", "c", "--", "sh", "-c", script]);
    let child = spawn(command.stdin(end()).stdout(end()).stderr(end()));
    let mut master = File::from(pty.master);
    read_until(&mut master, "ready\r\n");
    tty::set_size(&pty.slave, 44, 111).unwrap();
    signal(&child, Signal::SIGWINCH);
    read_until(&mut master, "44 111\r\n");
    // The terminal goes with hyperctl.
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).status.code(), Some(143));
    assert!(tcgetattr(&pty.slave).unwrap() == before, "restored");
    assert!(!runs(&hand, "echo ready"));
    hand.end();
}

//! `hyperctl call` and `hyperctl exec`: a person drives a pod by hand.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};

use hyperinit::sys::tty;
use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::termios::tcgetattr;

use super::guest::{PATIENCE, make_rootfs};
use super::up::up_with;
use super::{Running, finish, hyperctl_path, output, read_until, scratch, signal, spawn, text};

/// A guest that a person uses for a while, entirely by `call` and `exec`.
pub struct ByHand {
    pub directory: tempfile::TempDir,
    guest: Option<Running>,
}

impl ByHand {
    pub fn new(options: &[&str]) -> ByHand {
        let directory = scratch();
        make_rootfs(&directory.path().join("image/rootfs"));
        let (child, client) = up_with(directory.path(), options);
        drop(client);
        ByHand { directory, guest: Some(child) }
    }

    pub fn command(&self, subcommand: &str, words: &[&str]) -> Command {
        let mut command = Command::new(hyperctl_path());
        command.args([subcommand, "--dir"]).arg(self.directory.path().join("guest")).args(words);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs a command that must succeed, with `stdin` on its standard input. Returns its output.
    pub fn call(&self, command: &str, json: &str, stdin: &[u8]) -> Vec<u8> {
        let mut child = spawn(self.command("call", &[command, json]).stdin(Stdio::piped()));
        child.stdin.take().unwrap().write_all(stdin).unwrap();
        let output = finish(child);
        let log = || fs::read(self.directory.path().join("guest/console.log")).unwrap_or_default();
        assert!(output.status.success(), "{command}: {}\n{}", text(&output.stderr), text(&log()));
        output.stdout
    }

    pub fn exec(&self, words: &[&str]) -> Output {
        output(self.command("exec", words))
    }

    /// Starts the pod, and a container that writes more than anybody reads.
    pub fn start(&self, network: &str) {
        self.call("STARTPOD", &format!(r#"{{"hostname": "hand", "shareDir": "share_dir"{network}}}"#), b"");
        let script = r#"["sh", "-c", "seq 300000; echo sat >/tmp/sat; sleep 100000"]"#;
        let process = format!(r#"{{"args": {script}, "stdio": 1, "stderr": 2}}"#);
        let container =
            format!(r#"{{"id": "c", "image": "image", "rootfs": "rootfs", "process": {process}}}"#);
        self.call("NEWCONTAINER", &container, b"");
    }

    /// Does what a person does in a pod, also in its network.
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
        // The container's output goes nowhere, and does not hold the container up.
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

    /// Waits until the guest has ended.
    pub fn wait(mut self) -> Output {
        finish(self.guest.take().unwrap())
    }

    fn end(self) {
        self.call("KILLCONTAINER", r#"{"container": "c", "signal": 9}"#, b"");
        // The container can be removed once it has ended. No host is connected to receive its event.
        let deadline = std::time::Instant::now() + PATIENCE;
        while !output(self.command("call", &["REMOVECONTAINER", r#"{"container": "c"}"#])).status.success() {
            assert!(std::time::Instant::now() < deadline, "the container does not end");
        }
        self.call("DESTROYPOD", "null", b"");
        assert_eq!(self.wait().status.code(), Some(0));
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

/// Over the guest's own channels, which take one host at a time.
#[test]
fn a_pod_by_hand_over_its_own_channels() {
    let hand = ByHand::new(&["--local", "--channels", "raw"]);
    hand.start("");
    hand.use_it();
    hand.end();
}

#[test]
fn a_pod_by_hand_in_a_vm() {
    let hand = ByHand::new(&["--vm"]);
    hand.start("");
    hand.use_it();
    hand.end();
}

/// Waits until no process of the container has these words on its command line. hyperctl has sent the signal
/// that ends the process, and has not waited.
pub fn wait_for_end(hand: &ByHand, words: &str) {
    let look = format!("ps -o args | grep -v grep | grep -q '{words}'");
    let deadline = std::time::Instant::now() + PATIENCE;
    while hand.exec(&["c", "--", "sh", "-c", &look]).status.code() != Some(1) {
        assert!(std::time::Instant::now() < deadline, "{words} still runs");
    }
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

    // A program that ignores SIGINT is ended by the third one.
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
    wait_for_end(&hand, ": deaf");

    // A reader that closes its end of the output ends the program too.
    let mut child = spawn(&mut hand.command("exec", &["c", "--", "yes", "long"]));
    child.stdout.take().unwrap().read_exact(&mut [0; 4]).unwrap();
    assert_eq!(finish(child).status.code(), Some(128 + Signal::SIGPIPE as i32));
    wait_for_end(&hand, "yes long");
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
    // The program's terminal goes away with hyperctl.
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).status.code(), Some(143));
    assert!(tcgetattr(&pty.slave).unwrap() == before, "restored");
    wait_for_end(&hand, "echo ready");
    hand.end();
}

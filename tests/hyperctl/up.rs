//! `hyperctl up`: runs a guest and its directory; `logs`: prints its log; `call`: sends one command.

use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hyperinit_client::mux::is_served;
use hyperinit_client::{CallError, Client};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpgid};

use super::guest::processes::children;
use super::guest::{BOOT, PATIENCE, make_rootfs};
use super::{Running, finish, hyperctl_path, output, read_until, scratch, signal, spawn, text};

/// A local guest that is up in `directory`/guest.
fn up(directory: &Path) -> (Running, Client) {
    up_with(directory, &["--local"])
}

/// A guest with other options. Returns when READY has come.
pub fn up_with(directory: &Path, options: &[&str]) -> (Running, Client) {
    let mut command = Command::new(hyperctl_path());
    command.arg("up").args(options).arg("--share").arg(directory).arg("--dir").arg(directory.join("guest"));
    let mut child = spawn(command.stdin(Stdio::null()).stderr(Stdio::piped()));
    let mut alive = || match child.try_wait().unwrap() {
        None => Ok(()),
        Some(status) => panic!("hyperctl up ended: {status}"),
    };
    let at = directory.join("guest");
    let client = if options.contains(&"raw") {
        Client::connect_within(&at, BOOT, alive)
    } else {
        let deadline = Instant::now() + BOOT;
        while !is_served(&at) {
            assert!(Instant::now() < deadline, "hyperctl up makes no socket");
            alive().unwrap();
            // No event tells that a socket exists.
            std::thread::sleep(Duration::from_millis(5));
        }
        Client::visit(&at)
    };
    let client = client.unwrap();
    if let Err(error) = client.ready(BOOT) {
        let log = fs::read_to_string(directory.join("guest/console.log"));
        panic!("{error}; hyperctl up: {:?}; its guest: {log:?}", child.try_wait());
    }
    (child, client)
}

/// Waits until the other end has closed the connection.
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

/// Limits and the score of the memory killer belong to the machine there, so it means nothing if the machine
/// refuses to change them.
#[test]
fn a_local_guest_that_may_raise_no_limit_says_nothing_of_it() {
    let directory = scratch();
    let guest = directory.path().join("guest");
    let mut command = Command::new("prlimit");
    command.args([
        "--nofile=4096:4096",
        "setpriv",
        "--bounding-set=-sys_resource",
        hyperctl_path(),
        "up",
        "--local",
        "--channels",
        "raw",
    ]);
    command.arg("--share").arg(directory.path()).arg("--dir").arg(&guest).stdin(Stdio::null());
    let child = spawn(&mut command);
    let client = Client::connect_within(&guest, BOOT, || Ok(())).unwrap();
    client.ready(BOOT).unwrap();
    signal(&child, Signal::SIGTERM);
    wait_for_hang_up(&client);
    assert_eq!(finish(child).status.code(), Some(0));
    let log = fs::read_to_string(guest.join("console.log")).unwrap();
    assert!(!log.contains("RLIMIT_") && !log.contains("oom_score_adj"), "{log}");
}

/// By default the kernel accepts ten lines of a program in five seconds.
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

/// QEMU's own exit status is 0 in both cases.
#[test]
fn a_vm_that_cannot_boot_is_an_error_with_its_last_words() {
    for (append, says) in [
        ("rdinit=/nothing", "Kernel panic - not syncing: "),
        // The VM's ports are virtio ports, not serial lines.
        ("hyper_use_serial", "init: the guest cannot boot: "),
    ] {
        let directory = scratch();
        let mut command = Command::new(hyperctl_path());
        command.args(["up", "--vm", "--append", append, "--share"]).arg(directory.path());
        command.arg("--dir").arg(directory.path().join("guest")).stdin(Stdio::null());
        let output = output(command);
        let words = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{append}: {words}");
        assert!(words.contains("it ended (exit status: 0); its log ends with"), "{words}");
        assert!(words.contains(says), "{words}");
    }
}

/// QEMU's exit status is 0 when SIGTERM ends it.
#[test]
fn a_vm_that_somebody_ends_is_an_error_that_says_how() {
    for (how, says) in [
        (Signal::SIGKILL, "it ended (signal: 9 (SIGKILL))"),
        (Signal::SIGTERM, "terminating on signal 15 from pid "),
    ] {
        let directory = scratch();
        let (child, client) = up_with(directory.path(), &["--vm", "--share-by", "9p"]);
        let [qemu] = children(child.id().cast_signed())[..] else { panic!("QEMU is hyperctl's one child") };
        kill(Pid::from_raw(qemu), how).unwrap();
        let output = finish(child);
        drop(client);
        let words = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words}");
        assert!(words.contains(says), "{words}");
    }
}

#[test]
fn a_guest_dies_with_a_hyperctl_that_is_killed() {
    let directory = scratch();
    let (child, client) = up_with(directory.path(), &["--local", "--channels", "raw"]);
    signal(&child, Signal::SIGKILL);
    wait_for_hang_up(&client);
    assert_eq!(finish(child).status.signal(), Some(9));
    // The connections of a dying guest close before its listening socket does.
    while std::os::unix::net::UnixStream::connect(directory.path().join("guest/ctl.sock")).is_ok() {
        std::thread::yield_now();
    }
    // The directory can be used again, whatever was left in it. The next guest removes what was left of the
    // cgroup.
    let (child, client) = up(directory.path());
    drop(client);
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).status.code(), Some(0));
}

#[test]
fn a_directory_has_one_guest() {
    let directory = scratch();
    let (child, _client) = up(directory.path());
    let mut second = Command::new(hyperctl_path());
    second.args(["up", "--local", "--share"]).arg(directory.path());
    second.arg("--dir").arg(directory.path().join("guest")).stdin(Stdio::null());
    let output = output(second);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).ends_with("a guest is running there\n"), "{}", text(&output.stderr));
    assert!(directory.path().join("guest/hyperctl.sock").exists(), "the first one's");
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).status.code(), Some(0));
}

#[test]
fn the_log_is_followed_to_its_end() {
    let directory = scratch();
    let logs = |more: &[&str]| {
        let mut command = Command::new(hyperctl_path());
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
    // `logs -f` ends with the guest, and has missed nothing.
    out.read_to_string(&mut begun).unwrap();
    assert_eq!(finish(followed).status.code(), Some(0));
    let log = fs::read_to_string(directory.path().join("guest/console.log")).unwrap();
    assert_eq!(begun, log);
    // The guest is gone, but its log remains.
    assert_eq!(text(&output(logs(&[])).stdout), log);
}

#[test]
fn one_command_by_hand() {
    let directory = scratch();
    let (child, client) = up(directory.path());
    drop(client);
    let call = |words: &[&str]| {
        let mut command = Command::new(hyperctl_path());
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

/// As in docs/hyperctl.md, nothing waits for the guest between the commands. Then several commands run at
/// once.
#[test]
fn a_pod_by_hand_and_who_comes_at_once() {
    who_comes_at_once(&["--local"]);
}

/// The commands run one after the other: none gets one channel and waits for the other.
#[test]
fn a_pod_by_hand_over_its_own_channels_and_who_comes_at_once() {
    who_comes_at_once(&["--local", "--channels", "raw"]);
}

fn who_comes_at_once(options: &[&str]) {
    let directory = scratch();
    make_rootfs(&directory.path().join("image/rootfs"));
    let at = directory.path().join("guest");
    let hyperctl = |words: &[&str]| {
        let mut command = Command::new(hyperctl_path());
        command.arg(words[0]).arg("--dir").arg(&at).args(&words[1..]).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    let mut up = Command::new(hyperctl_path());
    up.arg("up").args(options).arg("--share").arg(directory.path()).arg("--dir").arg(&at);
    let up = spawn(up.stdin(Stdio::null()));
    let container = r#"{"id": "c", "image": "image", "rootfs": "rootfs", "process": {"args": ["sleep", "1000"], "stdio": 1, "stderr": 2}}"#;
    for words in [["call", "STARTPOD", r#"{"shareDir": "share_dir"}"#], ["call", "NEWCONTAINER", container]] {
        let output = output(hyperctl(&words));
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""), "{words:?}");
    }
    for round in 0..10 {
        let words: [&[&str]; 4] = [
            &["exec", "c", "--", "echo", "said"],
            &["call", "PING"],
            &["exec", "c", "--", "echo", "said"],
            &["exec", "c", "--", "echo", "said"],
        ];
        for running in words.map(|words| spawn(&mut hyperctl(words))) {
            let output = finish(running);
            assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""), "round {round}");
        }
    }
    // The guest's processes are in other process groups, so the signals of a terminal's keys go to
    // hyperctl alone.
    let own = Pid::from_raw(up.id().cast_signed());
    let guests = children(own.as_raw());
    assert!(!guests.is_empty());
    for guest in guests {
        assert_ne!(getpgid(Some(Pid::from_raw(guest))), getpgid(Some(own)));
    }
    assert_eq!(output(hyperctl(&["call", "DESTROYPOD"])).status.code(), Some(0));
    assert_eq!(finish(up).status.code(), Some(0));
}

//! Calls of the kernel that fail: no memory, no descriptor, no space, an error of input or output. Each call
//! in turn that a process of the guest makes for a request fails once (ptrace: the process is the real one,
//! in its place and confined), and what then may happen is an ERROR that says so, or a clean death of a
//! helper; never a hang, a lie, or the death of PID 1.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]
#![cfg(target_arch = "x86_64")]

mod failing;
#[path = "../guest/mod.rs"]
mod guest;
mod limits;
mod memory;
#[path = "../support/probe.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod probe;
#[allow(dead_code)] // the rest is for those who lie
#[path = "../hostile/witness.rs"]
mod witness;

use std::io::Write;

use failing::{ACCEPT, Failed, Failing, calls_of};
use guest::processes::{process, replace};
use guest::{Guest, Kind, PATIENCE, Running, container_id, parse};
use hyperinit::command::{Command, File, WriteFile};
use hyperinit_client::{CallError, Client};
use nix::errno::Errno;
use nix::libc;
use serde_json::json;
use witness::Witness;

/// How much is written to a file and read again: it travels in shared memory, and comes back in parts.
const SIZE: usize = 150_000;

/// Has the role answer something, so that its deaths are not in a row.
fn answers(guest: &Guest, name: &str) {
    match name {
        "netd" => {
            let routes = json!({"routes": [{"dest": "198.51.100.0/24", "device": "no-such-link"}]});
            let route = Command::SetupRoute(parse(routes));
            assert!(guest.refused(route).contains("netd"));
        }
        "mountd" => assert_eq!(guest.container_says("other", "echo other", json!({})), "other\n"),
        _ => assert_eq!(guest.says("main", "echo new"), "new\n"),
    }
}

/// A reply, whatever it is: none is the failure that this is about.
fn replied(what: &str, reply: Result<Vec<u8>, CallError>) -> Result<Vec<u8>, String> {
    match reply {
        Ok(payload) => Ok(payload),
        Err(CallError::Refused(text)) => Err(text),
        Err(error) => panic!("{what}: {error}"),
    }
}

/// A file of a container's.
fn data_file() -> File {
    File { container: container_id("main"), file: "/tmp/file".to_owned() }
}

/// So much is written to it.
fn write(size: usize) -> Command {
    Command::WriteFile(WriteFile { file: data_file(), data: vec![b'x'; size] })
}

/// A container that writes, a file, and its end: everything that the helpers are for. The refusals.
fn everything(guest: &Guest, mark: &str) -> Vec<String> {
    let mut refusals = Vec::new();
    let ports = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
    let args = ["sh", "-c", "echo said; read word; exit 3"];
    let more = json!({"ports": ports});
    let running = match guest.try_container("short", &args, more) {
        Ok(running) => Some(running),
        Err(CallError::Refused(text)) => {
            refusals.push(text);
            None
        }
        Err(error) => panic!("{mark}: {error}"),
    };
    let written = replied(mark, guest.client().send(write(SIZE)).wait(PATIENCE));
    let read = replied(mark, guest.client().send(Command::ReadFile(data_file())).wait(PATIENCE));
    if let (Ok(_), Ok(read)) = (&written, &read) {
        let same = read.len() == SIZE && read.iter().all(|&byte| byte == b'x');
        assert!(same, "{mark}: {} bytes are not what was written", read.len());
    }
    refusals.extend([written.err(), read.err()].into_iter().flatten());
    if let Some(running) = running {
        let outcome = running.outcome();
        assert_eq!((outcome.stdout.as_str(), outcome.status), ("said\n", 3), "{mark}");
        guest.remove("short");
    }
    refusals
}

/// A process whose output has to arrive whatever becomes of streamd, and one that gives back what it is
/// given, for as long as there is the same streamd: a successor has not its stdin.
fn streams(guest: &Guest, mark: &str) -> Vec<String> {
    let streamd = process(guest, "streamd", None);
    let lines = |from: u32| (from..from + 20_000).map(|line| format!("{line}\n")).collect::<String>();
    let outcome = guest.sh("main", "seq 100000 119999; echo wrong >&2; exit 4");
    assert_eq!((outcome.status, outcome.stderr.as_str()), (4, "wrong\n"), "{mark}");
    assert!(outcome.stdout == lines(100_000), "{mark}: {} bytes of output arrived", outcome.stdout.len());
    let back = guest.exec("main", &["cat"], json!({}));
    let given = lines(200_000);
    back.streams.stdin.write(given.as_bytes()).unwrap();
    let returned = back.outcome().stdout;
    assert!(given.starts_with(&returned), "{mark}: something else came back");
    let lives = process(guest, "streamd", None) == streamd;
    assert!(!lives || returned == given, "{mark}: {} bytes came back", returned.len());
    everything(guest, mark)
}

/// A helper dies, and has a successor.
fn successor(guest: &Guest, _mark: &str) -> Vec<String> {
    replace(guest, &["netd"]);
    answers(guest, "netd");
    Vec::new()
}

/// Every call of a process fails in its turn.
fn each_call_fails(name: &str, stride: usize, work: fn(&Guest, &str) -> Vec<String>) {
    let guest = Guest::boot(Kind::Local);
    let lists = json!({"internalNetworks": ["10.1.0.0/16"], "externalNetworks": ["10.2.0.0/16"]});
    let pod = json!({"hostname": "pod-1", "shareDir": "share_dir", "portmappingWhiteLists": lists});
    guest.call(Command::StartPod(Box::new(parse(pod))));
    let _main = guest.sleeper("main");
    assert!(work(&guest, "before").is_empty());
    let mut witness = Witness::new(&guest);
    let (mut errors, mut deaths, mut unseen) = (0, 0, 0);
    for nth in (0..).step_by(stride) {
        let from = guest.log().len();
        let streamd = process(&guest, "streamd", None);
        let failing = Failing::seize(process(&guest, name, None));
        let pid = failing.pid();
        let (failed, refusals) = std::thread::scope(|scope| {
            let host = scope.spawn(|| work(&guest, &format!("{name}, call {nth}")));
            let failed = failing.fail(&calls_of(name), nth..nth + 1, || host.is_finished());
            let refusals = host.join();
            (failed, refusals.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let Some(Failed { call, errno, died }) = failed else { break };
        let what = format!("{name}, call {nth} ({call}: {errno})");
        let _ = writeln!(std::io::stderr(), "{what}: {refusals:?}{}", if died { ", died" } else { "" });
        let known = |text: &String| {
            let why = [errno.desc(), "it died before it answered", "no memory to share", "no such "];
            why.iter().any(|why| text.contains(why))
        };
        assert!(refusals.iter().all(known), "{what}: {refusals:?}\n{}", &guest.log()[from..]);
        if matches!(name, "init" | "warden") {
            assert!(!died, "{what}: it died, and is nobody's to start again");
        } else if died {
            process(&guest, name, Some(pid));
        }
        for helper in ["netd", "mountd", "execd"] {
            answers(&guest, helper);
        }
        assert!(work(&guest, &what).is_empty(), "{what}: something is left");
        if process(&guest, "streamd", None) != streamd {
            // It took the stdin of the witness's process along.
            witness = Witness::new(&guest);
        }
        witness.checks(&what, true);
        deaths += u32::from(died);
        errors += u32::from(!refusals.is_empty());
        unseen += u32::from(refusals.is_empty() && !died);
    }
    let _ = writeln!(
        std::io::stderr(),
        "{name}: {errors} with an ERROR, {deaths} deaths, {unseen} that nobody saw"
    );
    assert!(errors + deaths + unseen > 1, "{name}: it made no calls");
}

#[test]
fn each_call_of_netd_fails() {
    each_call_fails("netd", 1, everything);
}

#[test]
fn each_call_of_mountd_fails() {
    each_call_fails("mountd", 3, everything);
}

#[test]
fn each_call_of_execd_fails() {
    each_call_fails("execd", 2, everything);
}

#[test]
fn each_call_of_streamd_fails() {
    each_call_fails("streamd", 1, streams);
}

#[test]
fn each_call_of_init_fails() {
    each_call_fails("init", 1, everything);
}

#[test]
fn each_call_of_init_fails_while_a_helper_has_a_successor() {
    each_call_fails("init", 1, successor);
}

#[test]
fn each_call_of_the_warden_fails() {
    each_call_fails("warden", 1, successor);
}

/// PID 1 may watch no more for a while: a container has all that their user may. It tries until it may, and
/// closes no role for it.
#[test]
fn a_successor_that_init_cannot_watch_is_tried_until_it_can() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    answers(&guest, "streamd");
    let failing = Failing::seize(process(&guest, "init", None));
    let watch = ("epoll_ctl", nix::libc::SYS_epoll_ctl, nix::errno::Errno::ENOSPC);
    let failed = std::thread::scope(|scope| {
        let host = scope.spawn(|| {
            replace(&guest, &["streamd"]);
            answers(&guest, "streamd");
        });
        // Each successor and its log are watched: so many calls are more successors than may die in a row.
        let failed = failing.fail(&[watch], 0..40, || host.is_finished());
        host.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        failed
    });
    assert!(failed.is_some_and(|failed| !failed.died));
    let waited = guest.log().matches("has to wait: init: watching streamd").count();
    assert!(waited > 10, "{waited}: {}", guest.log());
    assert!(!guest.log().contains("died too often"), "{}", guest.log());
}

/// The host is there already when it is looked for, and nothing else happens in the guest that could have
/// anybody look again.
#[test]
fn a_connection_that_could_not_be_accepted_is_later() {
    for name in ["init", "streamd"] {
        let mut guest = Guest::with_pod(Kind::Local);
        let (stdio, stderr) = (5000, 5001);
        let more = json!({"process": {"stdio": stdio, "stderr": stderr}});
        let running = guest.container("main", &["sh", "-c", "read word; echo $word"], more);
        let Running { container, process: id, .. } = running;
        let from = guest.log().len();
        guest.hang_up();
        ["control", "stream"]
            .iter()
            .for_each(|port| guest.wait_for_log(from, &format!("the host has left the {port} port")));
        let failing = Failing::seize(process(&guest, name, None));
        let (control, stream) = Client::sockets(&guest.at()).unwrap();
        let (failed, client) = std::thread::scope(|scope| {
            let host = scope.spawn(|| {
                let client = Client::over(control, stream).unwrap();
                client.ready(PATIENCE).unwrap();
                let streams = client.streams(stdio, stderr);
                streams.stdin.write(b"word\n").unwrap();
                assert_eq!(streams.stdout.read_to_end(PATIENCE).unwrap(), b"word\n");
                client
            });
            // Once because it was interrupted, and once because it is told.
            let failed = failing.fail(&[ACCEPT], 0..2, || host.is_finished());
            (failed, host.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let failed = failed.expect("it has accepted nobody");
        assert_eq!((failed.call, failed.died), ("accept4", false), "{name}");
        guest.be(client);
        assert_eq!(guest.client().finished(&container, &id, PATIENCE).unwrap(), 0);
    }
}

/// sync(2) writes back all filesystems of the machine, and waits for each of its disks.
#[test]
fn a_local_guest_ends_without_a_sync_of_the_machine() {
    let guest = Guest::boot(Kind::Local);
    guest.start_pod();
    let _main = guest.sleeper("main");
    let failing = Failing::seize(process(&guest, "mountd", None));
    // Both syncs count: before the reply to DESTROYPOD, and before the guest ends.
    let (synced, status) = std::thread::scope(|scope| {
        let host = scope.spawn(move || {
            guest.call(Command::DestroyPod);
            guest.wait_for_end()
        });
        let synced = failing.fail(&[("sync", libc::SYS_sync, Errno::EIO)], 0..1, || host.is_finished());
        (synced, host.join().unwrap())
    });
    assert!(synced.is_none(), "mountd made the call");
    assert!(status.success());
}

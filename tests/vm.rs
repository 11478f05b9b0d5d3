//! Runs the scenarios in a VM: with a real kernel, virtio-serial and 9p.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod guest;
mod scenarios;

use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use guest::{Guest, Kind};
use hyperinit::command::Command;
use hyperinit::frame::Message;
use serde_json::json;

/// A scenario and its name.
type Scenario = (&'static str, fn(&Guest));

macro_rules! list {
    ($($module:ident: $($name:ident),+;)+) => {
        &[$($((concat!(stringify!($module), "::", stringify!($name)), scenarios::$module::$name)),+),+]
    };
}

/// All scenarios, and those for a share that is a filesystem.
const ALL: &[Scenario] = scenarios::for_all!(list);
const OF_FILESYSTEMS: &[Scenario] = scenarios::for_filesystems!(list);

/// Runs all scenarios in one VM, because a boot costs seconds.
fn run(guest: Guest, scenarios: impl IntoIterator<Item = Scenario>) {
    let mut failed = Vec::new();
    for (name, scenario) in scenarios {
        let _ = writeln!(std::io::stdout(), "vm: {name}");
        if catch_unwind(AssertUnwindSafe(|| scenario(&guest))).is_err() {
            failed.push(name);
        }
    }
    assert!(failed.is_empty(), "failed: {failed:?}\n{}", guest.log());
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

#[test]
fn every_scenario() {
    let more: Scenario = ("what_a_host_gives", what_a_host_gives);
    run(Guest::with_pod(Kind::Vm), ALL.iter().copied().chain([more]));
}

/// Runs over virtiofs the scenarios that 9p cannot serve, and all that concern files.
#[test]
fn every_scenario_of_files_by_virtiofs() {
    let guest = Guest::boot_up(Kind::Vm, "", &["--share-by", "virtiofs"]);
    guest.start_pod();
    let of_files = |(name, _): &Scenario| {
        ["exec::", "files::", "storage::"].iter().any(|module| name.starts_with(module))
    };
    run(guest, OF_FILESYSTEMS.iter().chain(ALL.iter().filter(|scenario| of_files(scenario))).copied());
}

/// A process gets a limit of open files above the kernel's initial maximum. In namespaces that maximum
/// belongs to the machine.
fn what_a_host_gives(guest: &Guest) {
    let limit = json!({"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 1_073_741_816, "hard": 1_073_741_816}]});
    let main = guest.sleeper("files");
    assert_eq!(guest.exec("files", &["sh", "-c", "ulimit -n"], limit).outcome().stdout, "1073741816\n");
    guest.finish(main);
}

/// The kernel's counts for the whole guest: open files, threads, mounts that a container sees, available
/// memory in kB.
fn belongings(guest: &Guest) -> [i64; 4] {
    let script = "read files rest </proc/sys/fs/file-nr; read one five fifteen threads pid </proc/loadavg
        echo $files ${threads#*/}; wc -l </proc/mounts; grep ^MemAvailable: /proc/meminfo | tr -cd 0-9";
    let said = guest.container_says("belongings", script, json!({}));
    let numbers: Vec<i64> = said.split_whitespace().map(|word| word.parse().unwrap()).collect();
    numbers.try_into().unwrap()
}

/// A VM has its own kernel, so whatever five hundred processes and fifty containers leave behind can be seen
/// from inside.
#[test]
fn a_crowd_leaves_nothing() {
    let guest = Guest::with_pod(Kind::Vm);
    let crowd = || {
        scenarios::life::fifty_containers_at_once(&guest);
        let main = guest.sleeper("main");
        for _ in 0..32 {
            let running: Vec<_> = (0..16).map(|_| guest.exec("main", &["cat"], json!({}))).collect();
            for process in running {
                assert_eq!(process.outcome().status, 0);
            }
        }
        guest.finish(main);
    };
    crowd();
    let before = belongings(&guest);
    crowd();
    let after = belongings(&guest);
    let [files, threads, mounts, memory] = std::array::from_fn(|at| after[at] - before[at]);
    // The kernel frees files and threads a moment after processes see them gone.
    assert!(files < 50 && threads < 20, "{before:?} before, {after:?} after");
    assert_eq!(mounts, 0, "{before:?} before, {after:?} after");
    assert!(memory > -(8 << 10), "{before:?} before, {after:?} after");
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

/// A VM of 512 MB, the default of hyperctl, has room for a crowd.
#[test]
fn a_crowd_to_the_end() {
    scenarios::crowd::a_crowd_to_the_end(Guest::with_pod(Kind::Vm));
}

/// DESTROYPOD on a port that has to be drained, and a machine that powers off.
#[test]
fn the_end() {
    let deaf = |guest: &Guest| {
        let script = "trap '' TERM; echo up; while :; do sleep 1; done";
        guest.container("deaf", &["sh", "-c", script], json!({})).read_until("up\n");
    };

    let guest = Guest::boot(Kind::Vm);
    let text = guest.refused(Command::StartPod(Box::new(guest::parse(json!({"shareDir": "no-such-tag"})))));
    assert!(text.contains("mounting the share no-such-tag"), "{text}");
    guest.start_pod();
    assert_eq!(guest.container_says("main", "hostname", json!({})), "pod-1\n");
    deaf(&guest);
    // A container that runs until the end has written a file. The host has the whole file when the reply
    // comes, although the guest's kernel may have held part of it.
    guest.says("deaf", "yes written | head -c 4000000 >/written");
    let (first, ping) = (guest.client().send(Command::DestroyPod), guest.client().send(Command::Ping));
    let second = guest.client().send(Command::DestroyPod);
    for pending in [first, ping, second] {
        assert_eq!(pending.wait(guest::PATIENCE), Ok(vec![]));
    }
    let written = std::fs::read(guest.share.join("image/rootfs/written")).unwrap();
    assert!(written == b"written\n".repeat(500_000), "{} bytes", written.len());
    assert!(guest.wait_for_end().success(), "after two of them");

    let guest = Guest::boot(Kind::Vm);
    assert_eq!(guest.call(Command::DestroyPod), b"");
    assert!(guest.wait_for_end().success(), "without a pod");

    let mut guest = Guest::with_pod(Kind::Vm);
    deaf(&guest);
    let mut raw = guest.raw();
    raw.send(Message::DestroyPod, b"null");
    drop(raw);
    assert!(guest.wait_for_end().success(), "without a host");

    let mut guest = Guest::with_pod(Kind::Vm);
    deaf(&guest);
    let mut raw = guest.raw();
    raw.send(Message::DestroyPod, b"null");
    let messages: Vec<_> = std::iter::from_fn(|| raw.next()).map(|(message, _)| message).collect();
    assert_eq!(messages, [Message::Next, Message::ProcessAsyncEvent, Message::Ack]);
    assert!(guest.wait_for_end().success(), "and the ACK was the last frame");
}

/// An ext4 image with a root filesystem in it.
fn disk(directory: &Path) -> PathBuf {
    let (root, image) = (directory.join("root"), directory.join("disk.img"));
    guest::make_rootfs(&root.join("rootfs"));
    File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let mut program = std::process::Command::new("mke2fs");
    let made = program
        .args(["-q", "-t", "ext4", "-d"])
        .arg(&root)
        .arg(&image)
        .env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin")
        .status();
    assert!(made.expect("mke2fs is missing: apt-get install e2fsprogs").success());
    image
}

#[test]
fn a_root_filesystem_on_a_disk() {
    let directory = guest::scratch();
    let image = disk(&directory);
    let guest = Guest::boot_up(Kind::Vm, "", &["--disk", image.to_str().unwrap()]);
    guest.start_pod();
    let on_disk = |more: serde_json::Value| {
        let mut all = json!({"image": "vda", "fstype": "ext4", "rootfs": "rootfs"});
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    let script = "mkdir /kept && echo word >/kept/file && grep ' / / ' /proc/self/mountinfo; df / | tail -1";
    let said = guest.container_says("disk", script, on_disk(json!({"initialize": true})));
    assert!(said.contains("/dev/vda"), "{said}");
    assert_eq!(
        guest.container_says("disk", "cat /kept/file /etc/hostname", on_disk(json!({}))),
        "word\npod-1\n"
    );
    let outcome = guest.container("disk", &["touch", "/new"], on_disk(json!({"readOnly": true}))).outcome();
    assert!(outcome.stderr.contains("Read-only file system"), "{}", outcome.stderr);
    guest.remove("disk");
    for (more, why) in [
        (json!({"fstype": "xfs"}), "mounting xfs from /dev/vda"),
        (json!({"rootfs": "missing"}), "opening the root filesystem missing"),
        (json!({"image": "../vda"}), "is not the name of a disk"),
        (json!({"fstype": "no-such-fs"}), "no-such-fs"),
    ] {
        let text = guest::refusal(guest.try_container("disk", &["true"], on_disk(more)));
        assert!(text.contains(why), "{text}");
    }
    assert_eq!(guest.container_says("disk", "cat /kept/file", on_disk(json!({}))), "word\n");
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
    std::fs::remove_dir_all(directory).unwrap();
}

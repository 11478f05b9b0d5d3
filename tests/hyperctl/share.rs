//! `--share-by`: by which of its two ways a VM gets its share, what hyperctl prints about it, and when
//! virtiofsd ends.

use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::time::Instant;

use nix::sys::signal::Signal;

use super::guest::processes::{children, kill_hard};
use super::guest::{PATIENCE, make_rootfs};
use super::run::run;
use super::up::up_with;
use super::{elsewhere, finish, output, scratch, signal, text};

/// Prints the type of the container's root filesystem.
const KIND: &str = "grep ' / ' /proc/mounts | cut -d ' ' -f 3";

#[test]
fn a_vm_shares_by_virtiofs_if_it_can_and_says_why_if_it_cannot() {
    let said = output(run(&["--vm"], KIND).0);
    assert_eq!((text(&said.stdout), text(&said.stderr)), ("virtiofs\n", ""));

    let said = output(run(&["--vm", "--share-by", "9p"], KIND).0);
    assert_eq!((text(&said.stdout), text(&said.stderr)), ("9p\n", ""), "who asks for it knows");

    let without = |options: &[&str]| {
        let (mut command, _directory) = run(options, KIND);
        command.env("HYPERINIT_VIRTIOFSD", "/nowhere/virtiofsd");
        output(command)
    };
    let said = without(&["--vm"]);
    let why = "$HYPERINIT_VIRTIOFSD is /nowhere/virtiofsd: No such file or directory";
    assert_eq!(text(&said.stdout), "9p\n");
    let line = text(&said.stderr);
    assert!(line.starts_with(&format!("hyperctl: sharing by 9p: {why}; UNIX sockets, ")), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    let said = without(&["--vm", "--share-by", "virtiofs"]);
    assert_eq!((said.status.code(), text(&said.stdout)), (Some(125), ""));
    let line = text(&said.stderr);
    assert!(
        line.starts_with("hyperctl: sharing by virtiofs ") && line.ends_with(&format!("{why}\n")),
        "{line}"
    );
}

/// Whichever virtiofsd is installed, this user has no subordinate user ids (subuid(5)).
#[test]
fn without_root_a_vm_shares_by_9p() {
    let directory = scratch();
    let rootfs = directory.path().join("rootfs");
    make_rootfs(&rootfs);
    let temporary = directory.path().join("tmp");
    fs::create_dir(&temporary).unwrap();
    let user = Some(65_534);
    for path in [rootfs.clone(), rootfs.join("etc"), temporary.clone()] {
        chown(path, user, user).unwrap();
    }
    let mut command = elsewhere(directory.path(), "run");
    for (option, name) in [("--kernel", "kernel/vmlinuz"), ("--initrd", "initrd.img")] {
        // Other users may not be able to enter the checkout.
        let copy = directory.path().join(option);
        fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache").join(name), &copy).unwrap();
        command.arg(option).arg(copy);
    }
    command.arg("--rootfs").arg(&rootfs).args(["--", "sh", "-c", KIND]);
    command.env("TMPDIR", &temporary).uid(65_534).gid(65_534);
    let said = output(command);
    let line = text(&said.stderr);
    assert_eq!(text(&said.stdout), "9p\n", "{line}");
    assert!(line.starts_with("hyperctl: sharing by 9p: "), "{line}");
}

/// Every virtiofsd process below hyperctl: one, or two, of which the second runs in a PID namespace below the
/// first.
fn virtiofsds(parent: u32) -> Vec<i32> {
    let mut all = children(parent.cast_signed());
    let mut next = 0;
    while let Some(&pid) = all.get(next) {
        all.extend(children(pid));
        next += 1;
    }
    let is_one =
        |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "virtiofsd\n");
    all.into_iter().filter(is_one).collect()
}

/// Processes that use the share of a dead virtiofsd would wait forever.
#[test]
fn a_guest_ends_with_its_virtiofsd() {
    let directory = scratch();
    let (child, client) = up_with(directory.path(), &["--vm", "--share-by", "virtiofs"]);
    let pids = virtiofsds(child.id());
    kill_hard(*pids.last().unwrap());
    let output = finish(child);
    drop(client);
    assert_eq!(output.status.code(), Some(1));
    let words = text(&output.stderr);
    assert!(
        words.contains("virtiofsd has ended (") && words.contains("), and the guest is nothing without it"),
        "{words}"
    );
}

#[test]
fn virtiofsd_ends_with_a_hyperctl_that_is_killed() {
    let directory = scratch();
    let (child, client) = up_with(directory.path(), &["--vm", "--share-by", "virtiofs"]);
    drop(client);
    let pids = virtiofsds(child.id());
    assert!(!pids.is_empty());
    signal(&child, Signal::SIGKILL);
    drop(child);
    let deadline = Instant::now() + PATIENCE;
    // A process that has ended but is not reaped has no program either.
    while let Some(pid) = pids.iter().find(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok()) {
        assert!(Instant::now() < deadline, "virtiofsd {pid} is still there");
        std::thread::yield_now();
    }
}

//! The share by 9p is the host's directory: owners, what a process has written when it has ended, what the
//! host changes.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use hyperinit::sys::page::Page;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::json;

use super::guest::{Guest, Kind};
use super::{read, write};

/// What the container's program below is told by.
const MAPPED: &str = "HYPERINIT_TEST_MAPPED";

#[test]
fn a_share_by_9p_is_the_hosts_directory() {
    let guest = Guest::with_pod(Kind::Vm);
    let main = guest.sleeper("main");
    files_belong_to_who_made_them(&guest);
    an_end_says_that_all_is_written(&guest);
    what_the_host_changes_is_seen(&guest);
    a_file_that_the_host_removed_can_be_written(&guest);
    the_hosts_null_device(&guest);
    what_9p_cannot_do(&guest);
    guest.finish(main);
}

#[test]
fn a_share_that_the_guest_keeps_is_written_when_a_process_ends() {
    let guest = Guest::boot_with(Kind::Vm, "hyper_share_cache=loose");
    guest.start_pod();
    let main = guest.sleeper("main");
    assert!(guest.says("main", "grep ' / 9p ' /proc/mounts").contains(",loose,"));
    files_belong_to_who_made_them(&guest);
    an_end_says_that_all_is_written(&guest);
    a_file_that_the_host_removed_can_be_written(&guest);
    guest.finish(main);
}

fn root(guest: &Guest) -> PathBuf {
    guest.share.join("image/rootfs")
}

fn files_belong_to_who_made_them(guest: &Guest) {
    let script =
        "cd /tmp; touch x; stat -c '%u %g' x; echo a >> x; mkdir d; touch d/y; umask 077; echo b >z; cat z
        chmod 644 z; ln -s z link; stat -c '%u %g %a' z d/y link; ! touch /etc/new 2>/dev/null";
    let user = json!({"user": "1000", "group": "100"});
    let outcome = guest.exec("main", &["sh", "-c", script], user).outcome();
    assert_eq!(
        (outcome.stdout.as_str(), outcome.stderr.as_str(), outcome.status),
        ("1000 100\nb\n1000 100 644\n1000 100 644\n1000 100 777\n", "", 0)
    );
    let owner = |path: &str| {
        let stat = fs::symlink_metadata(root(guest).join(path)).unwrap();
        (stat.uid(), stat.gid(), stat.mode() & 0o7777)
    };
    assert_eq!((owner("tmp/z"), owner("tmp/d")), ((1000, 100, 0o644), (1000, 100, 0o755)));
    // Another user's, in a sticky directory, and below his umask.
    let other = json!({"user": "1001", "group": "100"});
    let script = "cd /tmp; echo a >>x; rm -f x; mv d e; cat x";
    let outcome = guest.exec("main", &["sh", "-c", script], other).outcome();
    assert_eq!(outcome.stdout, "a\n");
    assert_eq!(outcome.stderr.matches("Permission denied").count(), 1, "{}", outcome.stderr);
    assert_eq!(outcome.stderr.matches("Operation not permitted").count(), 2, "{}", outcome.stderr);
    // What is made in a directory with setgid has the directory's group, and so do directories.
    guest.says("main", "mkdir /tmp/setgid; chown 0:34 /tmp/setgid; chmod 2777 /tmp/setgid");
    let script = "cd /tmp/setgid; touch file; mkdir sub; stat -c '%u %g %a' file sub";
    let outcome =
        guest.exec("main", &["sh", "-c", script], json!({"user": "1000", "group": "100"})).outcome();
    assert_eq!(outcome.stdout, "1000 34 644\n1000 34 2755\n", "{}", outcome.stderr);
    guest.says("main", "rm -r /tmp/*");
}

/// The program of a container: writes through a shared mapping, and is killed before it can unmap.
#[test]
#[ignore = "a container runs it: an_end_says_that_all_is_written"]
fn a_mapping_is_written() {
    let path = std::env::var_os(MAPPED).unwrap();
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let page = Page::map(&file).unwrap();
    page.set(0, u64::from_ne_bytes(*b"a mapped"));
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
}

fn an_end_says_that_all_is_written(guest: &Guest) {
    let root = root(guest);
    for number in 0..20 {
        guest
            .says("main", &format!("echo {number} >/tmp/last; mkdir /tmp/d{number}; rm -f /tmp/d{number}/x"));
        assert_eq!(fs::read_to_string(root.join("tmp/last")).unwrap(), format!("{number}\n"));
    }
    // Many at once, and one that goes on writing.
    let writer = guest.exec("main", &["sh", "-c", "while :; do echo x; done >/tmp/endless"], json!({}));
    let many: Vec<_> = (0..20)
        .map(|number| {
            let script = format!("head -c 100000 /dev/zero >/tmp/zero{number}; echo end >>/tmp/zero{number}");
            (number, guest.exec("main", &["sh", "-c", &script], json!({})))
        })
        .collect();
    for (number, process) in many {
        assert_eq!(process.outcome().status, 0);
        assert_eq!(fs::metadata(root.join(format!("tmp/zero{number}"))).unwrap().len(), 100_004);
    }
    writer.signal(9);
    assert_eq!(writer.outcome().status, 137);
    // Through a mapping.
    fs::copy(std::env::current_exe().unwrap(), root.join("program")).unwrap();
    fs::write(root.join("tmp/mapped"), [0; 8192]).unwrap();
    let args = ["/program", "--exact", "nine_p::a_mapping_is_written", "--include-ignored"];
    let envs = json!({"envs": [{"env": MAPPED, "value": "/tmp/mapped"}]});
    let outcome = guest.exec("main", &args, envs).outcome();
    assert_eq!(outcome.status, 137, "{outcome:?}");
    assert_eq!(fs::read(root.join("tmp/mapped")).unwrap().get(..8).unwrap(), b"a mapped");
    // An init's end too.
    let said = guest.container_says("one", "yes written | head -c 4000000 >/tmp/written", json!({}));
    assert_eq!(said, "");
    assert!(fs::read(root.join("tmp/written")).unwrap() == b"written\n".repeat(500_000));
    guest.says("main", "rm -r /tmp/* /program");
}

fn what_the_host_changes_is_seen(guest: &Guest) {
    let root = root(guest);
    let host = root.join("tmp/host");
    fs::create_dir(&host).unwrap();
    let file = |name: &str, text: &str| fs::write(host.join(name), text).unwrap();
    let look = "cd /tmp/host; for f in *; do echo $f $(cat $f); done";
    for name in ["kept", "longer", "removed", "renamed", "shorter"] {
        file(name, "the old text");
    }
    assert_eq!(guest.says("main", look).matches("the old text").count(), 5);
    // One that stays where it is and reads a file that grows.
    let tail = guest.exec("main", &["sh", "-c", "cd /tmp/host; exec tail -n +1 -f longer"], json!({}));
    tail.read_until("the old text");
    file("shorter", "short");
    file("new", "new");
    fs::remove_file(host.join("removed")).unwrap();
    fs::rename(host.join("renamed"), host.join("name")).unwrap();
    // As an editor does it, and what rotates a secret.
    file(".kept", "the new text");
    fs::rename(host.join(".kept"), host.join("kept")).unwrap();
    std::io::Write::write_all(
        &mut fs::File::options().append(true).open(host.join("longer")).unwrap(),
        b" and more",
    )
    .unwrap();
    tail.read_until("and more");
    let seen = "kept the new text\nlonger the old text and more\nname the old text\nnew new\nshorter short\n";
    assert_eq!(guest.says("main", look), seen);
    assert_eq!(guest.call(read("main", "/tmp/host/kept")), b"the new text");
    tail.signal(9);
    assert_eq!(tail.outcome().status, 137);
    // A program that is replaced.
    let program = |word: &str| {
        fs::write(host.join("program"), format!("#!/bin/sh\necho {word}\n")).unwrap();
        fs::set_permissions(host.join("program"), fs::Permissions::from_mode(0o755)).unwrap();
    };
    for word in ["one", "another"] {
        program(word);
        assert_eq!(guest.says("main", "/tmp/host/program"), format!("{word}\n"));
    }
    guest.says("main", "rm -r /tmp/host");
}

fn a_file_that_the_host_removed_can_be_written(guest: &Guest) {
    let path = root(guest).join("tmp/file");
    // The guest's view first: with the end of that process what was written is at the host.
    let is = |text: &str| {
        assert_eq!(guest.says("main", "cat /tmp/file"), text);
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    };
    guest.call(write("main", "/tmp/file", b"one"));
    guest.says("main", "ln -s file /tmp/link");
    is("one");
    fs::remove_file(&path).unwrap();
    guest.call(write("main", "/tmp/file", b"two"));
    is("two");
    // One that somebody has open.
    let holder = guest.exec("main", &["sh", "-c", "exec 3</tmp/file; echo open; sleep 100000"], json!({}));
    holder.read_until("open\n");
    fs::remove_file(&path).unwrap();
    guest.call(write("main", "/tmp/link", b"three"));
    is("three");
    assert!(fs::symlink_metadata(root(guest).join("tmp/link")).unwrap().is_symlink());
    assert_eq!(guest.says("main", "ls -A /tmp"), "file\nlink\n");
    holder.signal(9);
    assert_eq!(holder.outcome().status, 137);
    guest.says("main", "rm /tmp/*");
}

fn the_hosts_null_device(guest: &Guest) {
    let device = |name: &str, minor| {
        let path = guest.share.join(name);
        mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, minor)).unwrap();
    };
    device("null", 3);
    device("zero", 5);
    let map = |name: &str| json!({"source": name, "path": format!("/etc/{name}")});
    let script =
        "cat /etc/null; echo x >/etc/null && echo written; chmod 600 /etc/null 2>/dev/null || echo kept
        stat -c %a /dev/null; head -c 1 /etc/zero 2>/dev/null || echo no";
    let said = guest.container_says("null", script, json!({"fsmap": [map("null"), map("zero")]}));
    assert_eq!(said, "written\nkept\n666\nno\n");
}

/// QEMU's limits, as docs/limits.md has them.
fn what_9p_cannot_do(guest: &Guest) {
    for script in ["mkfifo /tmp/fifo", "exec 3<>/tmp/gone; rm /tmp/gone; cat /proc/self/fd/3"] {
        let outcome = guest.sh("main", script);
        assert!(outcome.status != 0 && !outcome.stderr.is_empty(), "{script}: {outcome:?}");
    }
}

//! The same scenarios in a VM: a real kernel, virtio-serial, 9p.
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod guest;
mod scenarios;

use std::fs::File;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use guest::{Guest, Kind};
use hyperinit::command::Command;
use serde_json::json;

macro_rules! list {
    ($($module:ident: $($name:ident),+;)+) => {
        /// Every scenario by its name.
        const ALL: &[(&str, fn(&Guest))] =
            &[$($((concat!(stringify!($module), "::", stringify!($name)), scenarios::$module::$name)),+),+];
    };
}

scenarios::for_all!(list);

/// One VM for all of them: a boot costs seconds.
#[test]
fn every_scenario() {
    let guest = Guest::with_pod(Kind::Vm);
    let mut failed = Vec::new();
    for (name, scenario) in ALL {
        let _ = writeln!(std::io::stdout(), "vm: {name}");
        if catch_unwind(AssertUnwindSafe(|| scenario(&guest))).is_err() {
            failed.push(*name);
        }
    }
    assert!(failed.is_empty(), "failed: {failed:?}\n{}", guest.log());
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
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

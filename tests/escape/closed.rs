//! What a VM closes at boot (src/init/closed.rs): the settings that it makes, and that a program which the
//! kernel starts by itself has no capabilities.

use std::fs;
use std::time::Instant;

use hyperinit::command::Command;
use hyperinit::init::closed::settings;
use hyperinit::wire::Profile;

use crate::guest::{Guest, Kind, PATIENCE};

/// The words of a setting, without the whitespace between them.
fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

/// A root process of the container reads every setting that the kernel has, and finds the guest's value.
fn each_setting_reads_back(guest: &Guest, profile: Profile) {
    let mut missing = Vec::new();
    for setting in settings(profile) {
        let path = setting.path();
        let read = guest.sh("main", &format!("cat {}", path.display()));
        match (profile, setting.name) {
            _ if read.stderr.contains("No such file") => missing.push(setting.name),
            // Reading it needs CAP_SYS_ADMIN.
            (Profile::Default, "net.core.bpf_jit_harden") => {
                assert!(read.stderr.contains("Operation not permitted"), "{}", read.stderr);
            }
            _ => assert_eq!(words(&read.stdout), words(setting.value), "{}: {}", setting.name, read.stderr),
        }
    }
    // Debian's kernel has all settings but these: it has no uevent helper, and Linux 6.1 cannot turn io_uring
    // off.
    let may_miss = ["kernel.hotplug", "kernel.io_uring_disabled"];
    assert!(missing.iter().all(|name| may_miss.contains(name)), "{missing:?}");
}

/// A core file is written to the working directory of the process if the process's limit allows one, and
/// nowhere else.
fn a_core_file_is_where_its_process_was(guest: &Guest) {
    let script = "cd /dev/shm; for limit in 0 unlimited; do
        sh -c \"ulimit -c $limit; kill -ABRT \\$\\$\"; ls; done; rm -f core";
    assert_eq!(guest.sh("main", script).stdout, "core\n");
}

#[test]
fn what_a_vm_has_closed_reads_back() {
    for (words, profile) in [("", Profile::Default), ("hyper_profile=privileged", Profile::Privileged)] {
        let guest = Guest::boot_with(Kind::Vm, words);
        guest.start_pod();
        let main = guest.sleeper("main");
        each_setting_reads_back(&guest, profile);
        a_core_file_is_where_its_process_was(&guest);
        match profile {
            Profile::Default | Profile::Restricted => {
                let refused = guest.sh("main", "echo x >/proc/sys/kernel/core_pattern");
                assert!(refused.stderr.contains("Read-only file system"), "{}", refused.stderr);
            }
            Profile::Privileged => a_program_that_the_kernel_starts_has_nothing(&guest),
        }
        guest.finish(main);
        guest.call(Command::DestroyPod);
        assert!(guest.wait_for_end().success());
    }
}

/// A process that may write to core_pattern can make the kernel start any program as the guest's root,
/// outside every filter. Here a container of the privileged profile does so. The program has no capability
/// and cannot be given one.
fn a_program_that_the_kernel_starts_has_nothing(guest: &Guest) {
    let root = "/../run/hyperinit/share/image/rootfs";
    let out = guest.share.join("image/rootfs/out");
    fs::create_dir(&out).unwrap();
    let script = format!(
        "echo '|{root}/bin/busybox cp /../proc/self/status {root}/out/status' >/proc/sys/kernel/core_pattern
        sh -c 'ulimit -c unlimited; kill -ABRT $$'"
    );
    guest.sh("main", &script);
    let status = || fs::read_to_string(out.join("status")).unwrap_or_default();
    let deadline = Instant::now() + PATIENCE;
    while !status().contains("nonvoluntary_ctxt_switches") {
        assert!(Instant::now() < deadline, "no program was started: {}", guest.log());
        std::thread::yield_now();
    }
    let status = status();
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        let line = status.lines().find(|line| line.starts_with(set)).unwrap();
        assert_eq!(words(line)[1], "0000000000000000", "{status}");
    }
    // Not even a process with all capabilities that a container may have can give it one.
    let given = guest.sh("main", "echo 4294967295 511 >/proc/sys/kernel/usermodehelper/bset");
    assert!(given.stderr.contains("Operation not permitted"), "{}", given.stderr);
}

//! Nobody waits for another container's disk, server or share: a disk that never comes, an NFS server that
//! stops, a share whose host stops.

use std::fs;

use hyperinit::command::Command;
use hyperinit_client::CallError;
use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use serde_json::json;

use super::guest::beside::{Beside, begin, is_held_up, kill, times};
use super::guest::{Guest, Kind, PATIENCE, container_id, make_rootfs, parse, scratch};
use super::{images, servers};

const MEMORY: u32 = 512;

#[test]
fn nobody_waits_for_anothers_disk_server_or_share() {
    let directory = scratch();
    let at = |name: &str| directory.join(name);
    make_rootfs(&at("share/image/rootfs"));
    make_rootfs(&at("root/rootfs"));
    fs::create_dir(at("export")).unwrap();
    let disk = images::ext4(&at("root.img"), 64, Some(&at("root")));
    let (virtiofsd, virtiofs) = servers::virtiofs(&directory, &at("share"), "by-virtiofs", MEMORY);
    let (nfs, netdev) = servers::nfs(&directory, &at("export"));
    let words = format!("{virtiofs} -device virtio-scsi-pci,id=scsi0");
    let disk = disk.display().to_string();
    let options = ["--net", &netdev, "--disk", &disk, "--qemu", &words];
    let guest = Guest::boot_up(Kind::Vm, "hyper_modules", &options);
    let addresses = [json!({"ipAddress": "10.0.2.15", "netMask": "255.255.255.0"})];
    let pod = json!({
        "hostname": "pod-1", "shareDir": "by-virtiofs",
        "interfaces": [{"device": "eth0", "ipAddresses": addresses}],
    });
    guest.call(Command::StartPod(Box::new(parse(pod))));
    // What is beside has a root on a disk, and nothing of the share.
    let on_disk = json!({"image": "vda", "fstype": "ext4", "rootfs": "rootfs"});
    let mut calm = Beside::default();
    calm.live(&guest, times(3), &on_disk);
    calm.done("nothing");

    a_disk_that_never_comes(&guest, &on_disk);

    let volume = json!({"device": "10.0.2.100:/data", "fstype": "nfs", "mount": "/data"});
    let with_nfs = json!({"image": "vda", "fstype": "ext4", "rootfs": "rootfs", "volumes": [volume]});
    // Three at a time: a request that is held up for half a minute is given up.
    for _ in 0..times(3).div_ceil(3) {
        held_up(&guest, &nfs, (&with_nfs, "/data/file"), &on_disk, "an NFS server that stops");
        held_up(&guest, &virtiofsd, (&json!({}), "/tmp/file"), &on_disk, "a share whose host stops");
    }
    the_power_goes_off(guest, &nfs, &with_nfs);
    fs::remove_dir_all(directory).unwrap();
}

/// Each is waited for for two seconds; here there are always some.
fn a_disk_that_never_comes(guest: &Guest, on_disk: &serde_json::Value) {
    let mut slow = Vec::new();
    let mut more = |count: usize| {
        for number in slow.len()..slow.len() + count {
            let root = json!({"image": "sda", "addr": format!("{}:1", number % 200), "fstype": "ext4"});
            slow.push(begin(guest, &format!("slow{number}"), &root));
        }
    };
    // More than may be waited for at once.
    more(20);
    let mut beside = Beside::default();
    for _ in 0..times(3) {
        more(2);
        beside.live(guest, 1, on_disk);
    }
    for slow in slow {
        match slow.wait(PATIENCE) {
            Err(CallError::Refused(text)) => assert!(text.contains("waiting for the disk SCSI"), "{text}"),
            other => panic!("{other:?}"),
        }
    }
    beside.done("disks that never come");
}

/// A container for which a server has to answer that has stopped, and others beside it.
fn held_up(
    guest: &Guest,
    server: &servers::Server,
    (slow, writes_to): (&serde_json::Value, &str),
    on_disk: &serde_json::Value,
    what: &str,
) {
    server.signal(SIGSTOP);
    let slow = begin(guest, "slow", slow);
    let mut beside = Beside::default();
    beside.live(guest, 3, on_disk);
    assert!(is_held_up(&slow));
    server.signal(SIGCONT);
    slow.wait(PATIENCE).unwrap_or_else(|error| panic!("{error}\n{}", guest.log()));
    beside.done(what);

    // Its end needs the server too: for what was written, and for unmounting.
    guest.says("slow", &format!("echo word >{writes_to}"));
    server.signal(SIGSTOP);
    let killed = guest.client().send(kill("slow"));
    let mut beside = Beside::default();
    beside.live(guest, 3, on_disk);
    server.signal(SIGCONT);
    guest.client().finished(&container_id("slow"), &parse(json!("init")), PATIENCE).unwrap();
    killed.wait(PATIENCE).unwrap_or_else(|error| panic!("{error}\n{}", guest.log()));
    guest.remove("slow");
    beside.done(&format!("{what}, at its container's end"));
}

/// The pod ends and the power goes off although a server has stopped that lacks what a container wrote:
/// neither unmounting nor sync(2) has a time limit of its own.
fn the_power_goes_off(guest: Guest, server: &servers::Server, with_nfs: &serde_json::Value) {
    // The file stays open, so what was written stays in the VM's memory for half a minute.
    let script = "exec 3>/data/late; echo late >&3; echo written; sleep 100000";
    let writer = guest.container("writer", &["sh", "-c", script], with_nfs.clone());
    writer.read_until("written");
    server.signal(SIGSTOP);
    guest.call(Command::DestroyPod);
    guest.await_log("leaving before everything");
    assert!(guest.wait_for_end().success());
    server.signal(SIGCONT);
}

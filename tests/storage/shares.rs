//! What comes from servers: the share by virtiofs, volumes by NFS; and all of it in one VM.

use std::fs;
use std::os::unix::fs::MetadataExt;

use hyperinit::command::Command;
use serde_json::{Value, json};

use super::guest::{Guest, Kind, make_rootfs, parse, refusal, scratch};
use super::{images, merged, read, servers, write};

const MEMORY: u32 = 512;

#[test]
fn a_share_by_virtiofs_and_volumes_by_nfs() {
    let directory = scratch();
    let (share, export) = (directory.join("share"), directory.join("export"));
    let root = share.join("image/rootfs");
    make_rootfs(&root);
    fs::create_dir(&export).unwrap();
    let (_virtiofsd, virtiofs) = servers::virtiofs(&directory, &share, "by-virtiofs", MEMORY);
    let (_nfs, netdev) = servers::nfs(&directory, &export);
    let guest =
        Guest::boot_up(Kind::Vm, "hyper_profile=privileged", &["--net", &netdev, "--qemu", &virtiofs]);
    let pod = |tag: &str| {
        let addresses = [json!({"ipAddress": "10.0.2.15", "netMask": "255.255.255.0"})];
        let pod = json!({"hostname": "pod-1", "shareDir": tag, "interfaces": [{"device": "eth0", "ipAddresses": addresses}]});
        Command::StartPod(Box::new(parse(pod)))
    };
    let text = guest.refused(pod("by-nobody"));
    assert_eq!(
        text,
        "mountd: mounting the share by-nobody: no 9p device offers it, and as virtiofs: Invalid argument"
    );
    // That VM has a 9p of another tag too.
    guest.call(pod("by-virtiofs"));
    let (script, said) = images::one_of_each(&root);

    let maps = share.join("maps");
    fs::create_dir_all(maps.join("dir")).unwrap();
    fs::write(maps.join("file"), "a file\n").unwrap();
    let fsmap = json!([
        {"source": "maps/dir", "path": "/mnt/dir"},
        {"source": "maps/file", "path": "/mnt/file", "readOnly": true},
        {"source": "maps/dir", "path": "/data", "dockerVolume": true},
    ]);
    let more = json!({"initialize": true, "fsmap": fsmap});
    let on_share = "grep -E ' (/|/mnt/dir) ' /proc/mounts | cut -d ' ' -f 1,3
        cat /mnt/file; echo word >/mnt/dir/word; echo x 2>/dev/null >/mnt/file || echo ro";
    let said_of_share = "by-virtiofs virtiofs\nby-virtiofs virtiofs\na file\nro\n";
    assert_eq!(guest.container_says("share", on_share, more.clone()), said_of_share);
    assert_eq!(guest.container_says("share", script, more), said);
    assert_eq!(fs::read_to_string(maps.join("dir/word")).unwrap(), "word\n");
    let sub = fs::metadata(maps.join("dir/_data/sub")).unwrap();
    assert_eq!((sub.uid(), sub.gid(), sub.mode() & 0o7777, sub.mtime()), (33, 34, 0o2750, 1_100_000_000));
    files(&guest);

    volumes(&guest, &export, script, said);
    settings(&guest);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
    fs::remove_dir_all(directory).unwrap();
}

/// In the profile `privileged` also those of the whole guest.
fn settings(guest: &Guest) {
    let script = "cat /proc/sys/kernel/core_pattern /proc/sys/kernel/shmmni /proc/sys/vm/overcommit_memory";
    let sysctl =
        json!({"kernel.core_pattern": "a-core", "kernel.shmmni": "1234", "vm.overcommit_memory": "1"});
    assert_eq!(guest.container_says("settings", script, json!({"sysctl": sysctl})), "a-core\n1234\n1\n");
    let none = json!({"sysctl": {"kernel.no_such": "1"}});
    let text = refusal(guest.try_container("settings", &["true"], none));
    assert_eq!(text, "execd: opening the sysctl kernel.no_such: No such file or directory");
}

fn files(guest: &Guest) {
    let main = guest.sleeper("files");
    let large: Vec<u8> = (0..3_000_000_u32).map(|at| (at / 7 % 251) as u8).collect();
    guest.call(write("files", "/tmp/large", &large));
    assert!(guest.call(read("files", "/tmp/large")) == large);
    guest.finish(main);
}

fn volumes(guest: &Guest, export: &std::path::Path, script: &str, said: &str) {
    let volume = |path: &str, more: Value| {
        let volume = json!({"device": format!("10.0.2.100:{path}"), "fstype": "nfs", "mount": "/data"});
        json!({"initialize": true, "volumes": [merged(volume, more)]})
    };
    let docker = || volume("/data", json!({"dockerVolume": true}));
    assert_eq!(guest.container_says("nfs", script, docker()), said);
    let sub = fs::metadata(export.join("sub")).unwrap();
    assert_eq!((sub.uid(), sub.gid(), sub.mode() & 0o7777, sub.mtime()), (33, 34, 0o2750, 1_100_000_000));
    let mounted = "grep ' /data ' /proc/mounts | cut -d ' ' -f 1,3; echo mine >/data/same; cat /data/link";
    assert_eq!(guest.container_says("nfs", mounted, docker()), "10.0.2.100:/data nfs4\nmine\n");
    let read_only = "cat /data/link; touch /data/new 2>/dev/null || echo ro";
    assert_eq!(
        guest.container_says("nfs", read_only, volume("/data", json!({"readOnly": true}))),
        "mine\nro\n"
    );
    // The host's other view of it.
    fs::create_dir(export.join("below")).unwrap();
    fs::write(export.join("below/file"), "the server's\n").unwrap();
    let main = guest.container("nfs", &["sleep", "100000"], volume("/data/below", json!({})));
    assert_eq!(guest.call(read("nfs", "/data/file")), b"the server's\n");
    guest.call(write("nfs", "/data/written", b"by WRITEFILE"));
    assert_eq!(fs::read(export.join("below/written")).unwrap(), b"by WRITEFILE");
    guest.finish(main);
    let text = refusal(guest.try_container("nfs", &["true"], volume("/data/nothing", json!({}))));
    assert_eq!(text, "mountd: mounting NFS from 10.0.2.100:/data/nothing: No such file or directory");
}

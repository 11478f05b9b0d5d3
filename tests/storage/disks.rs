//! Disks on virtio and SCSI: root filesystems, volumes, and disks that are plugged while a container waits
//! for them.

use std::fs;
use std::path::Path;

use hyperinit::command::Command;
use hyperinit_client::CallError;
use serde_json::{Value, json};

use super::guest::qmp::Qmp;
use super::guest::{Guest, Kind, make_rootfs, refusal, scratch};
use super::{images, merged, read, write};

/// A controller with its disks, and a place for a disk on virtio.
fn scsi(disks: &[&Path]) -> String {
    let mut words = "-device pcie-root-port,id=slot0 -device virtio-scsi-pci,id=scsi0".to_owned();
    for (target, disk) in disks.iter().enumerate() {
        let file = disk.display();
        words += &format!(" -drive if=none,id=scsi{target}-0,format=raw,file={file}");
        words += &format!(" -device scsi-hd,drive=scsi{target}-0,bus=scsi0.0,scsi-id={target},lun=0");
    }
    words
}

/// All that a guest with these modules can do with disks, in one VM.
#[test]
fn disks_are_roots_and_volumes() {
    let directory = scratch();
    let at = |name: &str| directory.join(name);
    make_rootfs(&at("root/rootfs"));
    let (script, said) = images::one_of_each(&at("root/rootfs"));
    fs::create_dir_all(at("file/_data")).unwrap();
    fs::write(at("file/_data/.hyper_file_volume_data_do_not_create_on_your_own"), "the file\n").unwrap();
    let root = images::ext4(&at("root.img"), 64, Some(&at("root")));
    let ext4 = images::ext4(&at("ext4.img"), 16, None);
    let xfs = images::xfs(&at("xfs.img"));
    let snapshot = images::snapshot(&xfs);
    let file = images::ext4(&at("file.img"), 16, Some(&at("file")));
    let plugged = [images::ext4(&at("virtio.img"), 16, None), images::ext4(&at("scsi.img"), 16, None)];
    let own = images::snapshot(&root);
    let disks =
        ["--disk", &own.display().to_string(), "--disk", &xfs.display().to_string()].map(str::to_owned);
    let words = scsi(&[&root, &ext4, &snapshot, &file]);
    let mut options: Vec<&str> = disks.iter().map(String::as_str).collect();
    options.extend(["--qemu", &words]);
    let guest = Guest::boot_up(Kind::Vm, "hyper_modules", &options);
    guest.start_pod();

    for disk in [json!({"image": "vda"}), json!({"image": "ignored", "addr": "0:0"})] {
        a_root(&guest, merged(disk, json!({"fstype": "ext4", "rootfs": "rootfs"})));
    }
    ext4_and_xfs(&guest);
    let image = guest.image("docker");
    images::one_of_each(&image);
    let volume = json!({"addr": "1:0", "fstype": "ext4", "mount": "/data", "dockerVolume": true});
    let docker = json!({"image": "docker", "initialize": true, "volumes": [volume]});
    full(&guest, &image, &docker);
    assert_eq!(guest.container_says("docker", script, docker.clone()), said);
    let also = "cat /data/link; echo mine >/data/same; cat /data/sub/file";
    assert_eq!(guest.container_says("docker", also, docker), "the image's\nmine\n");
    a_file(&guest);
    plug(&guest, &plugged);
    modules(&guest);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
    fs::remove_dir_all(directory).unwrap();
}

/// A root filesystem on a disk: kept, read-only, and words that make no sense.
fn a_root(guest: &Guest, disk: Value) {
    let with = |more: Value| merged(disk.clone(), more);
    let script = "mkdir /kept && echo word >/kept/file; df / | tail -1; ls /dev/sd* /dev/vd* 2>/dev/null";
    let said = guest.container("disk", &["sh", "-c", script], with(json!({"initialize": true}))).outcome();
    let device = if disk.get("addr").is_some() { "/dev/sda " } else { "/dev/vda " };
    assert!(said.stdout.starts_with(device) && said.stdout.lines().count() == 1, "{said:?}");
    guest.remove("disk");
    assert_eq!(
        guest.container_says("disk", "cat /kept/file /etc/hostname", with(json!({}))),
        "word\npod-1\n"
    );
    let outcome = guest.container("disk", &["touch", "/new"], with(json!({"readOnly": true}))).outcome();
    assert!(outcome.stderr.contains("Read-only file system"), "{outcome:?}");
    guest.remove("disk");
    for (more, why) in [
        (json!({"fstype": "xfs"}), format!("mounting xfs from {device}").trim_end().to_owned()),
        (json!({"fstype": "bogus"}), "the kernel has no such filesystem".to_owned()),
        (json!({"addr": "0:1"}), "waiting for the disk SCSI 0:1: No such file or directory".to_owned()),
        (json!({"addr": "0:0:0"}), "is not of the form TARGET:LUN".to_owned()),
    ] {
        let text = refusal(guest.try_container("disk", &["true"], with(more)));
        assert!(text.contains(&why), "{text}");
    }
}

/// Volumes by name and by address, of two filesystems, two of them snapshots of one.
fn ext4_and_xfs(guest: &Guest) {
    let volumes = |read_only| {
        json!({"volumes": [
            {"device": "vdb", "fstype": "xfs", "mount": "/xfs", "readOnly": read_only},
            {"addr": "1:0", "fstype": "ext4", "mount": "/made/for/ext4", "readOnly": read_only},
            {"device": "ignored", "addr": "2:0", "fstype": "xfs", "mount": "/snapshot", "readOnly": read_only},
        ]})
    };
    let script = "for at in /xfs /made/for/ext4 /snapshot; do echo $at >$at/file; stat -f -c %T $at; done; stat -c %a /xfs";
    assert_eq!(guest.container_says("volumes", script, volumes(false)), "xfs\next2/ext3\nxfs\n777\n");
    let script = "cat /xfs/file /made/for/ext4/file /snapshot/file
        for at in /xfs /made/for/ext4 /snapshot; do touch $at/new 2>/dev/null || echo ro; rm -r $at/* 2>/dev/null || echo ro; done";
    let said = "/xfs\n/made/for/ext4\n/snapshot\nro\nro\nro\nro\nro\nro\n";
    assert_eq!(guest.container_says("volumes", script, volumes(true)), said);
    // One disk in two containers at once.
    let one = guest.container("one", &["sleep", "100000"], volumes(false));
    let script = "until grep -q again /xfs/file; do :; done; rm /made/for/ext4/file";
    let two = guest.container("two", &["sh", "-c", script], volumes(false));
    guest.call(write("one", "/xfs/file", b"again"));
    assert_eq!(two.outcome().status, 0);
    assert!(refusal(guest.client().call(read("one", "/made/for/ext4/file"))).contains("No such file"));
    guest.finish(one);
    guest.remove("two");
}

/// An ext4 that is too small for what the image has, and for what the host writes.
fn full(guest: &Guest, image: &Path, docker: &Value) {
    fs::write(image.join("data/large"), vec![7; 20 << 20]).unwrap();
    let text = refusal(guest.try_container("full", &["true"], docker.clone()));
    assert_eq!(text, "mountd: populating the volume for /data with large: No space left on device");
    fs::remove_file(image.join("data/large")).unwrap();
    let plain = merged(docker.clone(), json!({"initialize": false}));
    let main = guest.container("full", &["sleep", "100000"], plain);
    assert_eq!(guest.says("full", "ls -A /data"), "", "it is as it was");
    let text = refusal(guest.client().call(write("full", "/data/large", &vec![7; (15 << 20) + 4096])));
    assert_eq!(text, "mountd: writing /data/large: No space left on device");
    guest.says("full", "rm /data/large");
    guest.finish(main);
}

fn a_file(guest: &Guest) {
    let volume = json!({"addr": "3:0", "fstype": "ext4", "mount": "/srv/new/file", "dockerVolume": true});
    let more = json!({"initialize": true, "volumes": [volume]});
    let script = "cat /srv/new/file; stat -c '%F %a' /srv/new/file; echo changed >/srv/new/file";
    assert_eq!(guest.container_says("file", script, more.clone()), "the file\nregular file 777\n");
    assert_eq!(guest.container_says("file", "cat /srv/new/file", more), "changed\n");
}

/// Disks that come while NEWCONTAINER waits for them, and go when the container has.
fn plug(guest: &Guest, disks: &[std::path::PathBuf; 2]) {
    let mut qmp = Qmp::connect(&guest.at());
    let devices = [
        (json!({"device": "vdc"}), json!({"driver": "virtio-blk-pci", "bus": "slot0"})),
        (json!({"addr": "4:2"}), json!({"driver": "scsi-hd", "bus": "scsi0.0", "scsi-id": 4, "lun": 2})),
    ];
    for ((disk, device), image) in devices.into_iter().zip(disks) {
        let id = device["driver"].as_str().unwrap().to_owned();
        let file = json!({"driver": "file", "filename": image});
        qmp.run("blockdev-add", json!({"driver": "raw", "node-name": "plugged", "file": file}));
        let volume = merged(disk, json!({"fstype": "ext4", "mount": "/plugged"}));
        let more = json!({"volumes": [volume]});
        let start = || guest.try_container("waits", &["sh", "-c", "echo word >/plugged/file"], more.clone());
        let started = std::thread::scope(|scope| {
            let waits = scope.spawn(start);
            qmp.run("device_add", merged(device, json!({"id": id, "drive": "plugged"})));
            waits.join().unwrap()
        });
        let container = match started {
            Ok(container) => container,
            // A busy machine may take longer than the two seconds that are waited.
            Err(CallError::Refused(text)) => {
                assert!(text.contains("waiting for the disk"), "{text}");
                let _ = std::io::Write::write_all(&mut std::io::stdout(), b"storage: the disk was late\n");
                start().unwrap_or_else(|error| panic!("{error}\n{}", guest.log()))
            }
            Err(error) => panic!("{error}\n{}", guest.log()),
        };
        assert_eq!(container.outcome().status, 0);
        guest.remove("waits");
        assert_eq!(guest.container_says("waits", "cat /plugged/file", more), "word\n");
        // Nobody uses it any more: the kernel lets it go.
        qmp.run("device_del", json!({"id": id}));
        qmp.wait_for("DEVICE_DELETED", &id);
        qmp.run("blockdev-del", json!({"node-name": "plugged"}));
    }
}

/// The guest's modules, in an image that has none.
fn modules(guest: &Guest) {
    // A kernel that is built without modules has none to show.
    if guest.container_says("modules", "[ -e /proc/modules ] || echo none", json!({})) == "none\n" {
        assert_eq!(
            guest.container_says("modules", "ls -d /lib/modules 2>/dev/null || echo none", json!({})),
            "none\n"
        );
        return;
    }
    let script = "cd /lib/modules/$(uname -r) && ls ext4.ko modules.dep && touch new 2>&1; rmmod ext4 2>/dev/null || echo stays";
    let outcome = guest.container("modules", &["sh", "-c", script], json!({})).outcome();
    assert!(outcome.stdout.starts_with("ext4.ko\nmodules.dep\n"), "{outcome:?}");
    assert!(
        outcome.stdout.contains("Read-only file system") && outcome.stdout.ends_with("stays\n"),
        "{outcome:?}"
    );
    guest.remove("modules");
    // An image's own are its own.
    let image = guest.image("own-modules");
    let release = guest.container_says("modules", "uname -r", json!({}));
    fs::create_dir_all(image.join("lib/modules").join(release.trim_end()).join("own")).unwrap();
    let more = json!({"image": "own-modules"});
    assert_eq!(guest.container_says("modules", "ls /lib/modules/$(uname -r)", more), "own\n");
}

//! Attacks that need a separate kernel: on devices, memory and tasks. One VM for the default profile, one for
//! the privileged profile.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command as Program;

use hyperinit::command::{Command, RemoveContainer};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use serde_json::json;

use crate::guest::{Guest, Kind, Running, container_id, kill, make_rootfs, scratch};
use crate::probe;

/// System call numbers of x86_64.
const MMAP: u64 = 9;
const FORK: u64 = 57;
/// PROT_READ, PROT_WRITE.
const WRITABLE: u64 = 3;
/// MAP_PRIVATE, MAP_ANONYMOUS, MAP_POPULATE: the memory is present at once, without being touched.
const AT_ONCE: u64 = 0x8022;
const A_MEGABYTE: (u64, [u64; 6]) = (MMAP, [0, 1 << 20, WRITABLE, AT_ONCE, u64::MAX, 0]);

/// A VM with a disk that belongs to no container, and with attackers in its image.
fn boot(append: &str) -> (Guest, PathBuf) {
    let directory = scratch();
    let disk = directory.join("disk.img");
    fs::write(&disk, vec![b'D'; 1 << 20]).unwrap();
    let root = root_disk(&directory);
    // Little memory, so that it runs out soon.
    let options = ["--disk", disk.to_str().unwrap(), "--disk", root.to_str().unwrap(), "--memory", "256"];
    // Without this the kernel logs every process at each kill, and a serial line is slow.
    let append = format!("sysctl.vm.oom_dump_tasks=0 {append}");
    let guest = Guest::boot_up(Kind::Vm, &append, &options);
    let root = guest.share.join("image/rootfs/bin");
    let program = |name: &str, calls: &[(u64, [u64; 6])]| {
        fs::write(root.join(name), probe::elf_forever(calls)).unwrap();
        fs::set_permissions(root.join(name), fs::Permissions::from_mode(0o755)).unwrap();
    };
    program("bomb", &[(FORK, [0; 6])]);
    program("hog", &[A_MEGABYTE]);
    program("swarm", &[A_MEGABYTE, (FORK, [0; 6])]);
    guest.start_pod();
    (guest, directory)
}

/// An ext4 image with a root filesystem in it.
fn root_disk(directory: &Path) -> PathBuf {
    let (root, image) = (directory.join("root"), directory.join("root.img"));
    make_rootfs(&root.join("rootfs"));
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let mut program = Program::new("mke2fs");
    let words = ["-q", "-t", "ext4", "-d"];
    let made =
        program.args(words).arg(&root).arg(&image).env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin").status();
    assert!(made.expect("mke2fs is missing: apt-get install e2fsprogs").success());
    image
}

/// Checks that the guest works, and that no helper has died since the boot.
fn is_well(guest: &Guest) {
    guest.call(Command::Ping);
    assert_eq!(guest.container_says("well", "echo well", json!({})), "well\n");
    assert!(!guest.log().contains(" is gone ("), "a helper has died\n{}", guest.log());
}

/// Ends a container by KILLCONTAINER, however many processes it has.
fn end(guest: &Guest, container: &str, init: Running<'_>) {
    guest.call(kill(container, 9));
    assert_eq!(init.end().status, 137);
    guest.call(Command::RemoveContainer(RemoveContainer { container: container_id(container) }));
}

#[test]
fn a_hostile_container_in_a_vm() {
    let (guest, directory) = boot("");
    the_guests_devices_are_nobodys(&guest);
    the_control_port_is_out_of_reach(&guest);
    the_memory_killer_takes_containers(&guest);
    a_memory_hog_starves_nobody(&guest);
    a_fork_bomb_starves_nobody(&guest);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
    fs::remove_dir_all(directory).unwrap();
}

/// The kernel's disks, ports to the host, memory devices and the like: `b:MAJOR:MINOR` or `c:MAJOR:MINOR`,
/// one a line.
fn devices(guest: &Guest, container: &str) -> String {
    let script = "for f in /sys/class/block/*/dev; do echo b:$(cat $f); done
        for f in /sys/class/virtio-ports/*/dev /sys/class/mem/*/dev /sys/class/misc/*/dev; do echo c:$(cat $f); done";
    let devices = guest.says(container, script);
    assert!(
        devices.contains("b:25") && devices.contains("c:1:3\n") && devices.lines().count() > 5,
        "{devices}"
    );
    devices
}

/// A script that makes a node of each device in each place, and prints which can be used.
fn make_nodes(devices: &str, places: &str) -> String {
    let devices = devices.lines().collect::<Vec<_>>().join(" ");
    format!(
        "for d in {devices}; do for at in {places}; do
            n=$at/node; rest=${{d#*:}}
            mknod $n ${{d%%:*}} ${{rest%:*}} ${{rest#*:}} || exit 1
            head -c 1 $n >/dev/null 2>&1 && echo $d was read at $at
            {{ echo x >$n; }} 2>/dev/null && echo $d was written at $at
            rm $n
        done; done; true"
    )
}

/// mknod of the guest's disks, memory and ports to the host: no node opens the device, whether a root process
/// made it or an image brought it.
fn the_guests_devices_are_nobodys(guest: &Guest) {
    let main = guest.sleeper("nodes");
    // The list includes /dev/null and the like, which cannot be used in these places either.
    let devices = devices(guest, "nodes");
    assert_eq!(guest.says("nodes", &make_nodes(&devices, "/dev /dev/shm")), "");
    guest.finish(main);
    // The share's server may treat nodes in its own way; a disk's filesystem does not.
    let on_disk = json!({"image": "vdb", "fstype": "ext4", "rootfs": "rootfs"});
    assert_eq!(guest.container_says("disk", &make_nodes(&devices, "/ /tmp /root"), on_disk), "");
    let root = guest.image("brought");
    for (number, device) in devices.lines().enumerate() {
        let mut parts = device.split(':');
        let kind = if parts.next() == Some("b") { SFlag::S_IFBLK } else { SFlag::S_IFCHR };
        let mut part = || parts.next().unwrap().parse().unwrap();
        let device = makedev(part(), part());
        mknod(&root.join(format!("node{number}")), kind, Mode::from_bits_truncate(0o666), device).unwrap();
    }
    let script = "for n in /node*; do [ -b $n ] || [ -c $n ] || echo $n is none
        head -c 1 $n >/dev/null 2>&1 && echo $n was read; done; true";
    assert_eq!(guest.container_says("brought", script, json!({"image": "brought"})), "");
}

/// The control port belongs to init. A container reaches it neither by a file in its /dev, nor by a socket,
/// nor by another name of the device (see above).
fn the_control_port_is_out_of_reach(guest: &Guest) {
    let script = "ls /dev | grep -E 'vport|hvc|ttyS|kmsg|vsock|mem|port'
        grep -r sh.hyper.channel /sys/class/virtio-ports/*/name | wc -l
        awk '$4 ~ /00010000/ { print $8 }' /proc/net/unix";
    let outcome = guest.container("port", &["sh", "-c", script], json!({})).outcome();
    // Both ports exist. No socket listens in the network namespace that the pod shares with some helpers. (A
    // connection that was accepted keeps its listener's name, but nobody can connect to it.)
    assert_eq!(outcome.stdout, "2\n", "{}", outcome.stderr);
    guest.remove("port");
}

/// oom_score_adj: the kernel never kills the guest's processes for memory. It kills a container's, which
/// cannot exempt themselves.
fn the_memory_killer_takes_containers(guest: &Guest) {
    let main = guest.sleeper("score");
    assert_eq!(guest.says("score", "cat /proc/1/oom_score_adj /proc/self/oom_score_adj"), "-1000\n0\n");
    for score in ["-1", "-1000"] {
        let outcome = guest.sh("score", &format!("echo {score} >/proc/self/oom_score_adj"));
        assert!(outcome.stderr.contains("Permission denied"), "{}", outcome.stderr);
    }
    guest.finish(main);
}

/// Memory hogs, one and hundreds of them, with private memory and with the pod's shared memory.
fn a_memory_hog_starves_nobody(guest: &Guest) {
    let main = guest.sleeper("hog");
    for _ in 0..2 {
        assert_eq!(guest.exec("hog", &["hog"], json!({})).outcome().status, 137);
        is_well(guest);
    }
    let hogs: Vec<_> = (0..4).map(|_| guest.exec("hog", &["hog"], json!({}))).collect();
    guest.call(Command::Ping);
    for hog in hogs {
        assert_eq!(hog.outcome().status, 137);
    }
    is_well(guest);
    let full =
        guest.sh("hog", "cat /dev/zero >/dev/shm/full; echo x >>/dev/shm/more; rm /dev/shm/*; echo end");
    assert!(matches!(full.status, 0 | 137), "{}", full.stderr);
    guest.says("hog", "rm -f /dev/shm/*");
    is_well(guest);
    let swarm = guest.exec("hog", &["swarm"], json!({}));
    guest.await_log("(swarm)");
    guest.call(Command::Ping);
    end(guest, "hog", main);
    assert_eq!(swarm.end().status, 137);
    is_well(guest);
}

/// A fork bomb gets no more than its share of the tasks and of processor time. Another container of the pod
/// still starts processes, and the host can end the bomb.
fn a_fork_bomb_starves_nobody(guest: &Guest) {
    let main = guest.sleeper("bomb");
    let watch = guest.sleeper("watch");
    let number = |script: &str| guest.says("watch", script).trim().parse::<u64>().unwrap();
    let room = number("cat /proc/sys/kernel/threads-max");
    let tasks = "read a b c d e </proc/loadavg; echo ${d#*/}";
    let before = number(tasks);
    let share = room / 4 * 3 / 4 * 3;
    let bomb = guest.exec("bomb", &["bomb"], json!({}));
    // The bomb has all the tasks that it can get, and tries on.
    let mut most = 0;
    while most < share {
        most = most.max(number(tasks));
    }
    for _ in 0..10 {
        most = most.max(number(tasks));
        guest.call(Command::Ping);
    }
    assert!(most < share + before + 64, "{most} tasks with {room} in the whole guest, {before} before");
    end(guest, "bomb", main);
    assert_eq!(bomb.end().status, 137);
    guest.finish(watch);
    is_well(guest);
}

/// A privileged container reads how the guest's resources are divided, and cannot open the ports, which have
/// a reader already. With CAP_SYS_ADMIN everything else belongs to the container: the documents say so.
#[test]
fn a_privileged_container_in_a_vm() {
    let (guest, directory) = boot("hyper_profile=privileged");
    let main = guest.sleeper("main");
    guest.says(
        "main",
        "mkdir /cg /devices; mount -t cgroup2 cgroup2 /cg; mount -t devtmpfs devtmpfs /devices",
    );
    let number = |path: &str| guest.says("main", &format!("cat /cg/{path}")).trim().parse::<u64>();
    let free = guest
        .says("main", "sed -n 's/^MemTotal: *//p' /proc/meminfo")
        .split(' ')
        .next()
        .unwrap()
        .parse::<u64>()
        .unwrap()
        << 10;
    let pods = number("pod/memory.max").unwrap();
    assert!(pods + (16 << 20) < free && pods > free / 2, "{pods} of {free}");
    let room = guest.says("main", "cat /proc/sys/kernel/threads-max").trim().parse::<u64>().unwrap();
    assert_eq!(number("pod/pids.max"), Ok(room / 4 * 3));
    assert_eq!(number("pod/main/pids.max"), Ok(room / 4 * 3 / 4 * 3));
    // Each process of the guest, by itself, weighs as much as the whole pod.
    assert_eq!(number("pod/cpu.weight"), Ok(100));
    // Some kernels have no autogroups.
    let autogroups = "cat /proc/sys/kernel/sched_autogroup_enabled 2>/dev/null || echo 0";
    assert_eq!(guest.says("main", autogroups), "0\n");
    // The guest's own processes are in the root cgroup, together with the kernel's. The container can name
    // only the pod init among them: a pid of another PID namespace reads as 0.
    assert_eq!(guest.says("main", "grep -vx 0 /cg/cgroup.procs"), "1\n");
    assert_eq!(guest.says("main", "ls -d /cg/*/"), "/cg/pod/\n");
    // Boot is over, so RCU no longer interrupts the other processors.
    assert_eq!(guest.says("main", "cat /sys/kernel/rcu_expedited"), "0\n");
    // A hog hits the pod's limit before the guest's memory runs out.
    assert_eq!(guest.exec("main", &["hog"], json!({})).outcome().status, 137);
    let kills = |file: &str| guest.says("main", &format!("sed -n 's/^oom_kill //p' {file}"));
    assert_eq!((kills("/cg/pod/memory.events").as_str(), kills("/proc/vmstat").as_str()), ("1\n", "1\n"));
    // Where device nodes work, the container can use them: what fails under the default profile succeeds
    // here.
    guest.says("main", "mkdir /nodes; mount -t tmpfs tmpfs /nodes");
    let disk = guest.says("main", "cat /sys/class/block/vda/dev");
    let used = guest.says("main", &make_nodes(&format!("b:{}", disk.trim()), "/nodes"));
    assert_eq!(used.lines().count(), 2, "{used}");
    // The ports are open already and can be opened only once.
    let opened = guest.sh("main", "for p in /devices/vport*; do cat $p; done");
    assert_eq!(opened.stderr.matches("Device or resource busy").count(), 2, "{}", opened.stderr);
    guest.call(Command::Ping);
    guest.finish(main);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
    assert!(Path::new(&directory).exists());
    fs::remove_dir_all(directory).unwrap();
}

//! Gaining rights: by programs, users, namespaces, mounts, cgroups, other roots.

use std::fs;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;

use super::{Effect, NULL, Place, int, one};
use crate::answer::{Answer, together};
use crate::guest::processes::status;

/// A setuid program that belongs to root, in the containers' image; the guest sees it in the share.
pub const SETUID: &str = "bin/gain";
/// The directories where the image may be: a container's own root, and the guest's places of the share.
const IMAGES: [&str; 3] =
    ["/", "/run/hyperinit/share/image/rootfs/", "/run/hyperinit/local-share/image/rootfs/"];

const NAMESPACES: [(&str, i32); 7] = [
    ("user", libc::CLONE_NEWUSER),
    ("mnt", libc::CLONE_NEWNS),
    ("net", libc::CLONE_NEWNET),
    ("pid", libc::CLONE_NEWPID),
    ("uts", libc::CLONE_NEWUTS),
    ("ipc", libc::CLONE_NEWIPC),
    ("cgroup", libc::CLONE_NEWCGROUP),
];

pub fn effects() -> Vec<Effect> {
    const GROUP: &str = "More rights";
    let namespaces = |place: &mut Place<'_>| {
        let answers = NAMESPACES.map(|(name, flag)| (name.to_owned(), unshares(place, flag)));
        together(&answers)
    };
    vec![
        one(GROUP, "executes a program", |place| place.once(executes)),
        one(GROUP, "becomes root by a setuid program", |place| place.once(gains)),
        one(GROUP, "becomes root by setresuid", |place| {
            place.once(|place| place.seat.call(libc::SYS_setresuid, [0, 0, 0]))
        }),
        one(GROUP, "has writable memory that it can execute", |place| {
            let flags = int(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let protection = int(libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
            let answer = place.seat.call(libc::SYS_mmap, [NULL, 4096, protection, flags, u64::MAX, 0]);
            if let Some(at) = answer.value() {
                place.seat.call(libc::SYS_munmap, [at, 4096]);
            }
            answer
        }),
        Effect { group: GROUP, name: "makes a namespace".to_owned(), act: Box::new(namespaces) },
        one(GROUP, "enters init's mount namespace", enters),
        one(GROUP, "mounts a tmpfs", mounts),
        one(GROUP, "mounts by descriptor (fsopen)", |place| {
            let kind = place.seat.text("tmpfs");
            place.makes(libc::SYS_fsopen, [kind, 1])
        }),
        one(GROUP, "unmounts", |place| {
            // MNT_EXPIRE only marks an unused mount: EAGAIN on this first call says that a second one would
            // unmount it.
            let at = place.seat.text("/dev/shm");
            let answer = place.seat.call(libc::SYS_umount2, [at, int(libc::MNT_EXPIRE)]);
            answer.past(Errno::EAGAIN).past(Errno::EBUSY)
        }),
        one(GROUP, "finds the guest's root by chroot", |place| place.once(breaks_out)),
        one("Cgroups", "the pod's memory.max for writing", |place| {
            place.opens("/sys/fs/cgroup/pod/memory.max", OFlag::O_WRONLY)
        }),
        one("Cgroups", "the root's cgroup.procs for writing", |place| {
            place.opens("/sys/fs/cgroup/cgroup.procs", OFlag::O_WRONLY)
        }),
        one("Cgroups", "the same, once it has mounted cgroup2", |place| place.once(mounts_cgroups)),
    ]
}

/// Executes a program of the image that sleeps. The tracer sees the result.
fn execute(place: &mut Place<'_>, program: &str) -> Answer {
    let mut answer = Answer::NotHere;
    for image in IMAGES {
        let path = place.seat.text(&format!("{image}{program}"));
        let words = [place.seat.text("sleep"), place.seat.text("1000")];
        let arguments = place.seat.words(&[words[0], words[1], NULL]);
        answer = place.seat.call(libc::SYS_execve, [path, arguments, NULL]);
        if answer != Answer::Refused(Errno::ENOENT) {
            break;
        }
    }
    answer
}

fn executes(place: &mut Place<'_>) -> Answer {
    execute(place, "bin/busybox")
}

/// Whether a setuid program runs as root.
fn gains(place: &mut Place<'_>) -> Answer {
    let pid = place.seat.pid();
    let uid = || status(pid, "Uid").split_whitespace().nth(1).map(str::to_owned);
    if uid().as_deref() == Some("0") {
        return Answer::NotHere;
    }
    match execute(place, SETUID) {
        Answer::Done(_) if uid().as_deref() == Some("0") => Answer::Done(0),
        Answer::Done(_) => Answer::Nothing,
        other => other,
    }
}

fn unshares(place: &mut Place<'_>, flag: i32) -> Answer {
    if place.name == "mountd" && flag == libc::CLONE_NEWNS {
        // mountd cannot make a copy of itself to try this. Its filter allows the call, which its work needs.
        return Answer::Done(0);
    }
    place.once(|place| place.seat.call(libc::SYS_unshare, [int(flag)]))
}

/// Enters the mount namespace of init by its file in /proc. init itself is already there.
fn enters(place: &mut Place<'_>) -> Answer {
    let Some(number) = place.number("init") else {
        return if place.name == "init" { Answer::NotHere } else { Answer::Unseen };
    };
    let file = place.open(&format!("/proc/{number}/ns/mnt"), OFlag::O_RDONLY);
    let Some(fd) = file.value() else { return file };
    let answer = place.once(|place| place.seat.call(libc::SYS_setns, [fd, 0]));
    place.close(file);
    answer
}

/// Mounts a tmpfs on a directory that every process has, and unmounts it.
fn mounts(place: &mut Place<'_>) -> Answer {
    let (kind, at) = (place.seat.text("tmpfs"), place.seat.text("/dev/shm"));
    let answer = place.seat.call(libc::SYS_mount, [kind, at, kind, 0, NULL]);
    if answer.value().is_some() {
        place.seat.call(libc::SYS_umount2, [at, int(libc::MNT_DETACH)]);
    }
    answer
}

fn mounts_cgroups(place: &mut Place<'_>) -> Answer {
    if place.name == "mountd" {
        // mountd cannot make a copy of itself to try this, and has the guest's mount of cgroup2 anyway.
        return Answer::NotHere;
    }
    let own = place.seat.call(libc::SYS_unshare, [int(libc::CLONE_NEWNS)]);
    let (kind, at) = (place.seat.text("cgroup2"), place.seat.text("/dev/shm"));
    let answer = match own {
        Answer::Done(_) => place.seat.call(libc::SYS_mount, [kind, at, kind, 0, NULL]),
        refused => refused,
    };
    if answer.value().is_none() {
        return answer;
    }
    place.opens("/dev/shm/cgroup.procs", OFlag::O_WRONLY)
}

/// Tries to reach a directory above its root: it changes its root to a directory below, and climbs from a
/// descriptor of the old root.
fn breaks_out(place: &mut Place<'_>) -> Answer {
    let Some(outer) = fs::metadata(format!("/proc/{}/root", place.seat.pid())).ok() else {
        return Answer::NotHere;
    };
    let root = place.open("/", OFlag::O_PATH | OFlag::O_DIRECTORY);
    let Some(fd) = root.value() else { return root };
    let below = place.seat.text("/dev");
    let answer = place.seat.call(libc::SYS_chroot, [below]);
    if answer.value().is_none() {
        return answer;
    }
    place.seat.call(libc::SYS_fchdir, [fd]);
    let up = place.seat.text("../../../../../../../..");
    place.seat.call(libc::SYS_chdir, [up]);
    let here = place.seat.text(".");
    place.seat.call(libc::SYS_chroot, [here]);
    let found = fs::metadata(format!("/proc/{}/root", place.seat.pid())).unwrap();
    if (found.dev(), found.ino()) == (outer.dev(), outer.ino()) { Answer::Nothing } else { Answer::Done(0) }
}

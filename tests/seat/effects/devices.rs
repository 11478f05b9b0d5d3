//! The guest's devices: its disk, its memory, its log, its ports to the host.

use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::stat::makedev;

use super::{AT_FDCWD, Effect, NULL, Place, int};
use crate::answer::{Answer, together};

/// For each device: the words of the row, its name in the guest's /dev, whether it is a block device, and its
/// device number, which serves where sysfs does not name it.
const DEVICES: [(&str, &str, bool, (u64, u64)); 5] = [
    ("a disk", "vda", true, (254, 0)),
    ("the kernel's memory", "mem", false, (1, 1)),
    ("the kernel's log", "kmsg", false, (1, 11)),
    ("the port of commands", "vport1p1", false, (0, 0)),
    ("the port of streams", "vport1p2", false, (0, 0)),
];

/// Opens each device by the node that the guest has, and by a node that the process makes.
pub fn effects() -> Vec<Effect> {
    DEVICES
        .into_iter()
        .map(|(what, name, block, numbers)| {
            let act = move |place: &mut Place<'_>| {
                if !place.world.vm {
                    return Answer::NotHere.word();
                }
                let own = place.opens(&format!("/dev/{name}"), OFlag::O_RDWR);
                let numbers = numbers_of(name).unwrap_or(numbers);
                let made = makes_a_node(place, block, numbers);
                together(&[(format!("/dev/{name}"), own), ("a node of it".to_owned(), made)])
            };
            Effect { group: "Devices", name: format!("opens {what}"), act: Box::new(act) }
        })
        .collect()
}

/// The device number that the guest's sysfs gives. The test reads it from outside every seat.
fn numbers_of(name: &str) -> Option<(u64, u64)> {
    let below = ["/sys/class/block", "/sys/class/virtio-ports", "/sys/class/misc", "/sys/class/mem"];
    let text = below.iter().find_map(|class| std::fs::read_to_string(format!("{class}/{name}/dev")).ok())?;
    let (major, minor) = text.trim_end().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Makes a node and opens it: in /dev/shm, with a tmpfs of the process's own if it can mount one; in /dev if
/// the process cannot enter a new mount namespace.
fn makes_a_node(place: &mut Place<'_>, block: bool, numbers: (u64, u64)) -> Answer {
    if place.name == "mountd" {
        // mountd cannot make a copy of itself that could move to another mount namespace, and nodes can be
        // made in the guest's /dev.
        return node_in(place, "/dev", block, numbers);
    }
    place.once(|place| {
        let moved = place.seat.call(libc::SYS_unshare, [int(libc::CLONE_NEWNS)]);
        if moved.value().is_none() {
            return node_in(place, "/dev", block, numbers);
        }
        let (kind, at) = (place.seat.text("tmpfs"), place.seat.text("/dev/shm"));
        place.seat.call(libc::SYS_mount, [kind, at, kind, 0, NULL]);
        node_in(place, "/dev/shm", block, numbers)
    })
}

fn node_in(place: &mut Place<'_>, directory: &str, block: bool, (major, minor): (u64, u64)) -> Answer {
    let kind = if block { libc::S_IFBLK } else { libc::S_IFCHR };
    let path = format!("{directory}/seat-node");
    let at = place.seat.text(&path);
    let made =
        place.seat.call(libc::SYS_mknodat, [AT_FDCWD, at, u64::from(kind | 0o600), makedev(major, minor)]);
    if made.value().is_none() {
        return made;
    }
    let answer = place.opens(&path, OFlag::O_RDWR);
    place.seat.call(libc::SYS_unlinkat, [AT_FDCWD, at, 0]);
    answer
}

//! What a container of the default profile can do from inside.

use std::ffi::CStr;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use hyperinit::sys::xattr;
use serde_json::json;

use crate::guest::processes::{process, status};
use crate::guest::{Guest, Kind, PATIENCE, refusal};

/// A container cannot uncover hidden or read-only files and directories: not by unmounting, mounting over, or
/// moving them, nor by another name for the file or another process's root. It cannot put files into them
/// either.
#[test]
fn masked_directories_stay_masked() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("masked");
    let hidden = "for d in /proc/acpi /proc/asound /proc/scsi /sys/firmware /sys/devices/virtual/powercap; do
            for at in $d /proc/self/root$d /proc/thread-self/root$d /proc/self/cwd$d /proc/../$d; do
                [ ! -e $at ] || [ -z \"$(ls -A $at)\" ] || echo $at is in sight
            done
        done
        for f in /proc/kcore /proc/keys /proc/timer_list /proc/interrupts; do
            [ ! -e $f ] || [ $(wc -c <$f) = 0 ] || echo $f is in sight
        done
        [ -e /sys/firmware ] && [ -e /proc/interrupts ]";
    assert_eq!(guest.says("masked", hidden), "");
    let attempts = "
        for at in /sys/firmware /proc/interrupts /proc/sys /proc/bus /proc/irq /proc/sysrq-trigger; do
            [ -e $at ] || continue
            umount $at 2>/dev/null && echo $at was unmounted
            umount -l $at 2>/dev/null && echo $at was detached
            mount -t proc x $at 2>/dev/null && echo $at was mounted over
            mount -o bind /tmp $at 2>/dev/null && echo $at was bound over
            mount -o remount,rw $at 2>/dev/null && echo $at was made writable
            mv $at /tmp/moved 2>/dev/null && echo $at was moved
            rm -r $at 2>/dev/null && echo $at was removed
            chmod 777 $at 2>/dev/null && echo the mode of $at was changed
            mkdir $at/new 2>/dev/null && echo $at was filled
        done
        unshare -m true 2>/dev/null && echo a namespace was made
        unshare -Ur true 2>/dev/null && echo a user namespace was made
        mkdir -p /tmp/new && chroot / mount -t proc proc /tmp/new 2>/dev/null && echo another proc
        mount -t sysfs x /tmp/new 2>/dev/null && echo another sysfs
        echo h 2>/dev/null >/proc/sysrq-trigger && echo sysrq was written
        true";
    assert_eq!(guest.says("masked", attempts), "");
    assert_eq!(guest.says("masked", hidden), "");
    let user = guest.exec("masked", &["sh", "-c", hidden], json!({"user": "web"})).outcome();
    assert_eq!((user.stdout.as_str(), user.status), ("", 0), "{}", user.stderr);
    // Within a container one empty directory covers all hidden directories. Another container has its own.
    let again = guest.sleeper("again");
    assert_eq!(guest.says("again", hidden), "");
    guest.finish(again);
    guest.finish(main);
}

/// CVE-2022-29162: if capabilities were inheritable, the inheritable capabilities of a file would take effect
/// for a user who has none.
#[test]
fn nothing_is_inheritable() {
    const XATTR: &CStr = c"security.capability";
    let guest = Guest::with_pod(Kind::Local);
    let root = guest.image("caps");
    let program = root.join("bin/busybox.inherits");
    fs::copy(root.join("bin/busybox"), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    // struct vfs_cap_data of linux/capability.h, revision 2, with the effective bit: nothing permitted,
    // everything inheritable.
    let words: [u32; 5] = [0x0200_0001, 0, u32::MAX, 0, 0x1ff];
    let value: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    xattr::set(File::open(&program).unwrap(), XATTR, &value).unwrap();
    let main = guest.container("caps", &["sleep", "100000"], json!({"image": "caps"}));
    for (user, effective) in [("web", "0000000000000000"), ("root", "00000000a80425fb")] {
        let args = ["/bin/busybox.inherits", "cat", "/proc/self/status"];
        let outcome = guest.exec("caps", &args, json!({"user": user})).outcome();
        for (key, value) in
            [("CapInh", "0000000000000000"), ("CapEff", effective), ("CapAmb", "0000000000000000")]
        {
            assert!(
                outcome.stdout.contains(&format!("{key}:\t{value}\n")),
                "{user}: {key}\n{}",
                outcome.stdout
            );
        }
    }
    guest.finish(main);
}

/// /proc/1: the pod init was cloned from execd, with a copy of the guest's mounts. A container cannot reach
/// anything of the guest through it, and under the default profile cannot even see what the pod init has.
#[test]
fn the_pod_init_leads_nowhere() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let ways = "for at in root/ root/dev cwd/ cwd/run fdinfo/ ns/mnt exe map_files/; do
            ls /proc/1/$at >/dev/null 2>&1 && [ -n \"$(ls -A /proc/1/$at)\" ] && echo $at is open
        done
        for at in mem environ maps auxv stack syscall io pagemap; do
            head -c 1 /proc/1/$at >/dev/null 2>&1 && [ -n \"$(head -c 1 /proc/1/$at)\" ] && echo $at is open
        done
        for fd in /proc/1/fd/*; do
            { readlink $fd || cat $fd || echo x >$fd; } >/dev/null 2>&1 && echo $fd is open
        done
        nsenter -t 1 -m true 2>/dev/null && echo entered
        true";
    assert_eq!(guest.says("main", ways), "");
    // Any process may read which mounts another one has.
    has_left_the_guest(&guest);
    guest.finish(main);
    drop(guest);

    // A process that may trace the pod init finds nothing of the guest either.
    let guest = Guest::boot_with(Kind::Local, "hyper_profile=privileged");
    guest.start_pod();
    let main = guest.sleeper("main");
    has_left_the_guest(&guest);
    assert_eq!(guest.says("main", "ls -A /proc/1/root/ /proc/1/cwd/"), "/proc/1/cwd/:\n\n/proc/1/root/:\n");
    assert_ne!(guest.sh("main", "nsenter -t 1 -m /bin/true; nsenter -t 1 -m ls /run").status, 0);
    guest.finish(main);
}

/// Waits until the pod init has an empty directory as its only mount. It moves there while the guest answers
/// STARTPOD.
fn has_left_the_guest(guest: &Guest) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mounts = guest.says("main", "cut -d ' ' -f 5 /proc/1/mountinfo");
        if mounts == "/\n" {
            return;
        }
        assert!(Instant::now() < deadline, "{mounts}");
    }
}

/// Sysctl injection: names and values that smuggle in another setting, and settings that affect the whole
/// guest.
#[test]
fn a_sysctl_is_one_setting_of_the_pods() {
    let guest = Guest::with_pod(Kind::Local);
    let kept = ["kernel/core_pattern", "kernel/hostname", "kernel/panic", "vm/swappiness"];
    let values = || kept.map(|name| fs::read_to_string(format!("/proc/sys/{name}")).unwrap());
    let before = values();
    let with = |name: &str, value: &str| {
        guest.try_container("sysctl", &["true"], json!({"sysctl": {name: value}})).map(|running| {
            running.end();
            guest.remove("sysctl");
        })
    };
    for (name, why) in [
        ("kernel.core_pattern", "only the privileged profile"),
        ("kernel/core_pattern", "not a dotted name"),
        ("kernel.shm/../core_pattern", "not a dotted name"),
        ("net.ipv4/../../kernel.core_pattern", "not a dotted name"),
        ("net...kernel.core_pattern", "not a dotted name"),
        ("net.", "not a dotted name"),
        (".net.ipv4.ip_forward", "not a dotted name"),
        ("kernel.shmmni\0", "Invalid argument"),
        ("kernel.shmmni\n", "No such file or directory"),
        ("kernel.shm_rmid_forced ", "No such file or directory"),
        ("fs.mqueue", "only the privileged profile"),
        ("kernel.msg", "No such file or directory"),
        ("net", "only the privileged profile"),
    ] {
        let text = refusal(with(name, "|/bin/sh"));
        assert!(text.contains(why), "{name:?}: {text}");
    }
    for value in ["1234\nkernel.core_pattern=|/bin/sh", "1234; sysctl", "|/bin/sh", "", &"1".repeat(1 << 16)]
    {
        let _ = with("kernel.shmmni", value);
    }
    assert_eq!(values(), before);
    with("kernel.shmmni", "1234").unwrap();
}

/// A passwd or group file of a gigabyte is refused by its size, and never read into memory.
#[test]
fn a_gigabyte_passwd_is_refused() {
    let guest = Guest::with_pod(Kind::Local);
    for name in ["passwd", "group"] {
        let root = guest.image(name);
        let file = File::options().write(true).open(root.join("etc").join(name)).unwrap();
        file.set_len(1 << 30).unwrap();
        let more = json!({"image": name, "process": {"user": "web"}});
        let text = refusal(guest.try_container(name, &["true"], more));
        assert!(text.contains(&format!("/etc/{name}")) && text.contains("larger than 4 MiB"), "{text}");
    }
    let execd = process(&guest, "execd", None);
    let peak: u64 = status(execd, "VmHWM").trim_end_matches("kB").trim().parse().unwrap();
    assert!(peak < 32 << 10, "execd took {peak} kB");
    assert_eq!(guest.container_says("main", "id -un", json!({"process": {"user": "web"}})), "web\n");
}

//! Hostile images: what an image puts in the places that the guest mounts over, binds from or writes to.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::{Value, json};

use crate::guest::{Guest, Kind, refusal};
use crate::{OUTSIDE, Outside, mounted_in_the_guest};

fn replace(root: &Path, path: &str, to: &str) {
    let path = root.join(path);
    let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
    symlink(to, path).unwrap();
}

/// Fills a directory with forged files, so that it looks like one of the kernel's.
fn forge(root: &Path, files: &[&str]) {
    for file in files {
        let path = root.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "forged").unwrap();
    }
}

const FORGED_PROC: [&str; 6] =
    ["sys/kernel/shmmni", "sysrq-trigger", "kcore", "self/attr/exec", "self/oom_score_adj", "self/setgroups"];

/// Checks from inside that the devices and the hidden files are the guest's, whatever the image has in their
/// places.
const LOOK: &str = "
    for d in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0; do
        [ $(stat -c %t:%T /dev/${d%%:*}) = ${d#*:} ] || echo /dev/$d is another
    done
    for f in kcore keys timer_list interrupts; do
        [ ! -e /proc/$f ] || [ $(stat -c %t:%T /proc/$f) = 1:3 ] || echo /proc/$f is in sight
    done
    grep -q ' /dev/pts .* - devpts ' /proc/self/mountinfo || echo /dev/pts is none
    grep -q ' /proc .* - proc ' /proc/self/mountinfo || echo /proc is none
    [ ! -L /dev/console ] || echo /dev/console is a link";

/// Starts a container of an image in which `set` has set a trap. If `refused` is given, the start has to fail
/// with that word. In either case nothing outside the container has changed.
fn is_safe(name: &str, set: impl FnOnce(&Path), more: Value, refused: Option<&str>) {
    let guest = Guest::with_pod(Kind::Local);
    let outside = Outside::new(&guest);
    let before = outside.content();
    set(&guest.image(name));
    let mut all = json!({"image": name, "initialize": true});
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    match refused {
        Some(word) => {
            let text = refusal(guest.try_container(name, &["true"], all));
            assert!(text.contains(word), "{name}: {text}");
        }
        None => {
            all["process"] = json!({"terminal": true, "stderr": 0});
            let script = format!("{LOOK}; echo typed >/dev/console; echo lost >/dev/null; tty");
            let outcome = guest.container(name, &["sh", "-c", &script], all).outcome();
            assert_eq!((outcome.stdout.as_str(), outcome.status), ("typed\r\n/dev/pts/0\r\n", 0), "{name}");
            guest.remove(name);
        }
    }
    assert_eq!(outside.content(), before, "{name}");
    assert_eq!(mounted_in_the_guest(&guest, OUTSIDE), Vec::<String>::new(), "{name}");
}

/// CVE-2026-41579: the guest makes and removes nodes and links in /dev, and would do so wherever a link in
/// its place leads.
#[test]
fn a_link_in_the_place_of_dev_is_refused() {
    is_safe("absolute", |root| replace(root, "dev", OUTSIDE), json!({}), Some("/dev"));
    is_safe("relative", |root| replace(root, "dev", "../../outside"), json!({}), Some("/dev"));
}

/// CVE-2025-31133: hidden files are covered by a bind mount of /dev/null, which the image has replaced.
/// CVE-2025-52565: the terminal is bound on, or from, a /dev/console or /dev/pts/N that leads elsewhere.
#[test]
fn an_images_own_dev_is_not_used() {
    let set = |root: &Path| {
        for (name, to) in [
            ("null", "/proc/sysrq-trigger"),
            ("console", "/run/hyperinit/share/outside/console"),
            ("ptmx", "/run/hyperinit/share/outside/ptmx"),
            ("pts", "/run/hyperinit/share/outside/pts"),
            ("shm", OUTSIDE),
            ("stdin", "/run/hyperinit/share/outside/file"),
        ] {
            replace(root, &format!("dev/{name}"), to);
        }
    };
    is_safe("links", set, json!({}), None);
    let set = |root: &Path| {
        forge(root, &["dev/null", "dev/console", "dev/ptmx", "dev/pts/0", "dev/pts/ptmx", "dev/tty"])
    };
    is_safe("files", set, json!({}), None);
}

/// CVE-2025-52881, CVE-2019-16884: what the guest writes below /proc goes to a file of the image, or to
/// another file of the kernel, and the covers below it hide nothing.
#[test]
fn an_images_own_proc_is_not_used() {
    let sysctl = json!({"sysctl": {"kernel.shmmni": "1234"}});
    let guest = Guest::with_pod(Kind::Local);
    let root = guest.image("proc");
    forge(&root.join("proc"), &FORGED_PROC);
    forge(&root.join("sys"), &["firmware/x", "fs/cgroup/cgroup.procs"]);
    let mut more = sysctl.clone();
    more["image"] = json!("proc");
    let script = format!("{LOOK}; cat /proc/sys/kernel/shmmni /proc/self/oom_score_adj; ls /sys/firmware");
    assert_eq!(guest.container_says("proc", &script, more), "1234\n0\n");
    for file in FORGED_PROC {
        assert_eq!(fs::read_to_string(root.join("proc").join(file)).unwrap(), "forged", "{file}");
    }
    drop(guest);
    let forged = |root: &Path| {
        forge(&root.join("tmp"), &FORGED_PROC);
        replace(root, "proc", "/tmp");
    };
    is_safe("link", forged, sysctl.clone(), Some("/proc"));
    is_safe("away", |root| replace(root, "proc", OUTSIDE), sysctl.clone(), Some("/proc"));
    is_safe("sys", |root| replace(root, "sys", OUTSIDE), sysctl, Some("/sys"));
}

/// CVE-2019-16884, CVE-2023-28642: a volume's mount point is a link to /proc, or to a hidden place in it. The
/// mount may succeed, which harms only the container itself. What was hidden stays hidden.
#[test]
fn a_volume_does_not_uncover_what_is_hidden() {
    let guest = Guest::with_pod(Kind::Local);
    fs::create_dir_all(guest.share.join("volume/_data")).unwrap();
    forge(&guest.share.join("volume"), &FORGED_PROC);
    for (number, to) in
        ["/proc", "/proc/self", "/sys", "/proc/sys", "/dev", "/dev/pts"].into_iter().enumerate()
    {
        let image = format!("volume{number}");
        let root = guest.image(&image);
        symlink(to, root.join("data")).unwrap();
        let more = json!({"image": image, "fsmap": [{"source": "volume", "path": "/data"}]});
        let Ok(running) = guest.try_container(
            &image,
            &[
                "sh",
                "-c",
                "umount /data 2>&1; mv /data /x 2>&1; cat /proc/kcore /proc/keys /proc/timer_list; echo end",
            ],
            more,
        ) else {
            continue;
        };
        let outcome = running.outcome();
        let hidden = outcome.stdout.replace("forged", "");
        let complaints = ["can't", "Operation not permitted", "end"];
        assert!(
            hidden.lines().all(|line| complaints.iter().any(|word| line.contains(word))),
            "{to}: {hidden}"
        );
        guest.remove(&image);
    }
    for file in FORGED_PROC {
        assert_eq!(
            fs::read_to_string(guest.share.join("volume").join(file)).unwrap(),
            "forged",
            "{to}",
            to = file
        );
    }
}

/// A file that the guest binds, or on which a host's volume is bound, is a link to a device or to a setting
/// of the kernel. If the guest followed the link, the file would replace that device or setting for the
/// container and for the guest.
#[test]
fn a_link_makes_no_file_of_a_device_or_a_setting() {
    let links = [
        "/dev/null",
        "../dev/console",
        "/dev/pts/ptmx",
        "/proc/sys/kernel/hostname",
        "/proc/kcore",
        "/sys/kernel/uevent_helper",
    ];
    for (number, to) in links.into_iter().enumerate() {
        let set = |root: &Path| {
            for file in ["hosts", "hostname", "resolv.conf", "app.conf", "mtab"] {
                replace(root, &format!("etc/{file}"), to);
            }
        };
        let fsmap = json!({"fsmap": [{"source": "outside/file", "path": "/etc/app.conf", "readOnly": true}]});
        is_safe(&format!("device{number}"), set, fsmap, None);
    }
    // The directories on the way to a mount point may not be links to the guest's own mounts either.
    let more = json!({"fsmap": [{"source": "outside/file", "path": "/etc/app/conf"}]});
    is_safe("way", |root| replace(root, "etc/app", "/dev"), more, Some("the guest's own"));
}

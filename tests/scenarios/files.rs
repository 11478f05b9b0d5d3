//! The filesystems that a container sees.

use hyperinit_client::CallError;
use serde_json::json;

use crate::guest::{Guest, Kind, Running, refusal};

pub fn the_init_layer_is_dockers(guest: &Guest) {
    let root = guest.image("layer");
    let files = "cat /etc/hosts; readlink /etc/mtab; cat /etc/hostname /etc/resolv.conf";
    let more = json!({"image": "layer", "initialize": true, "process": {"workdir": "/made/for/it"}});
    let said = guest.container_says("layer", &format!("pwd; {files}"), more);
    assert!(said.starts_with("/made/for/it\n127.0.0.1\tlocalhost\n::1\tlocalhost "), "{said}");
    assert!(said.contains("\n127.0.1.1\tpod-1\n"), "{said}");
    assert!(said.ends_with("/proc/mounts\npod-1\nnameserver 192.0.2.1\nsearch a.test\n"), "{said}");
    assert!(root.join("made/for/it").is_dir());

    let plain = guest.image("plain");
    let said = guest.container_says("plain", "ls /etc; cat /etc/hostname", json!({"image": "plain"}));
    assert!(!said.contains("mtab") && said.ends_with("pod-1\n"), "only what is bound: {said}");
    assert!(!plain.join("etc/mtab").exists());
    let more = json!({"image": "plain", "process": {"workdir": "/nowhere"}});
    let text = refusal(guest.try_container("plain", &["true"], more));
    assert!(text.contains("workdir /nowhere"), "{text}");
}

pub fn the_images_own_names_stay_in_it(guest: &Guest) {
    let root = guest.image("names");
    let own = |name: &str| root.join("etc").join(name);
    std::fs::write(own("resolv.conf"), "nameserver 198.51.100.1\n").unwrap();
    std::fs::write(own("hostname"), "the-images\n").unwrap();
    std::fs::write(own("hosts"), "192.0.2.7 the-images\n").unwrap();
    let script = "cat /etc/hostname /etc/resolv.conf; cat /etc/hosts | tail -n 1; \
        for f in hosts hostname resolv.conf; do echo \"192.0.2.8 mine\" >>/etc/$f && tail -n 1 /etc/$f; done";
    let said = guest.container_says("names", script, json!({"image": "names", "initialize": true}));
    let pods = "pod-1\nnameserver 192.0.2.1\nsearch a.test\n127.0.1.1\tpod-1\n";
    assert_eq!(said, format!("{pods}{}", "192.0.2.8 mine\n".repeat(3)), "a container's own, to write to");
    // The pod's files are bound over the image's, which stay unchanged.
    assert_eq!(std::fs::read_to_string(own("resolv.conf")).unwrap(), "nameserver 198.51.100.1\n");
    assert_eq!(std::fs::read_to_string(own("hostname")).unwrap(), "the-images\n");
    assert_eq!(std::fs::read_to_string(own("hosts")).unwrap(), "192.0.2.7 the-images\n");
    let again = guest.container_says("names", script, json!({"image": "names"}));
    assert_eq!(again, said, "nothing of it is another container's");
}

/// A program can resolve the names of its own machine.
pub fn names_resolve(guest: &Guest) {
    let root = guest.image("resolve");
    // `docker export` leaves this file empty.
    std::fs::write(root.join("etc/hosts"), "").unwrap();
    let script = "hostname -i; ping -c 1 localhost | head -n 1; ping6 -c 1 localhost | head -n 1";
    let said = guest.container_says("resolve", script, json!({"image": "resolve"}));
    let expected =
        "127.0.1.1\nPING localhost (127.0.0.1): 56 data bytes\nPING localhost (::1): 56 data bytes\n";
    assert_eq!(said, expected);
}

/// A link out of the image does not turn a device or a setting into a file.
pub fn an_images_links_do_not_reach_devices(guest: &Guest) {
    for (name, to) in
        [("null", "/dev/null"), ("ptmx", "/dev/pts/ptmx"), ("setting", "/proc/sys/kernel/hostname")]
    {
        let image = format!("link-{name}");
        let root = guest.image(&image);
        for file in ["hosts", "hostname", "resolv.conf"] {
            std::os::unix::fs::symlink(to, root.join("etc").join(file)).unwrap();
        }
        let script = "stat -c '%F' /dev/null /dev/ptmx /dev/pts/ptmx; stat -Lc '%F' /dev/ptmx; echo gone >/dev/null; \
            cat /proc/sys/kernel/hostname /etc/hostname; stat -c '%F' /etc/hosts /etc/resolv.conf";
        let said = guest.container_says("links", script, json!({"image": image, "initialize": true}));
        let device = "character special file\n";
        let files = "regular file\n".repeat(2);
        assert_eq!(said, format!("{device}symbolic link\n{device}{device}pod-1\npod-1\n{files}"), "{to}");
    }
}

/// An image of one static program works, read-only or not.
pub fn a_read_only_image_needs_no_mount_points(guest: &Guest) {
    let root = guest.share.join("bare/rootfs");
    std::fs::create_dir_all(&root).unwrap();
    std::fs::copy("/bin/busybox", root.join("busybox")).unwrap();
    let script = "b=/busybox; $b hostname -i; $b cat /etc/resolv.conf; $b pwd; $b ls /; $b ls /etc; $b ls -d /proc/self; \
        $b touch /new /etc/new; $b echo gone >/dev/null";
    let more = json!({"image": "bare", "readOnly": true, "initialize": true, "process": {"workdir": "/made/for/it"}});
    let outcome = guest.container("bare", &["/busybox", "sh", "-c", script], more).outcome();
    let expected = "127.0.1.1\nnameserver 192.0.2.1\nsearch a.test\n/made/for/it\n\
        busybox\ndev\netc\nmade\nproc\nsys\nhostname\nhosts\nresolv.conf\n/proc/self\n";
    assert_eq!(outcome.stdout, expected, "{}", outcome.stderr);
    assert_eq!(outcome.stderr.matches("Read-only file system").count(), 2, "{}", outcome.stderr);
    guest.remove("bare");
    assert_eq!(std::fs::read_dir(&root).unwrap().count(), 1, "the image is as it was");
}

/// As under Docker: binding low ports and ping, which need a capability on most machines, need none here.
pub fn users_have_all_ports_and_ping(guest: &Guest) {
    let main = guest.sleeper("ports");
    let settings =
        || guest.says("ports", "cd /proc/sys/net/ipv4; cat ip_unprivileged_port_start ping_group_range");
    assert_eq!(settings(), "0\n0\t2147483647\n");
    let as_user = |script: &str| guest.exec("ports", &["sh", "-c", script], json!({"user": "web"})).outcome();
    let outcome = as_user("nc -l -p 80 -e echo served & until nc 127.0.0.1 80 2>/dev/null; do :; done");
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("served\n", 0), "{}", outcome.stderr);
    guest.finish(main);
    // The host's sysctl takes precedence.
    let more = |start: &str| json!({"sysctl": {"net.ipv4.ip_unprivileged_port_start": start}});
    let main = guest.container("ports", &["sleep", "100000"], more("1024"));
    assert_eq!(settings(), "1024\n0\t2147483647\n");
    let outcome = as_user("nc -l -p 80 -e true");
    assert!(outcome.stderr.contains("Permission denied"), "{outcome:?}");
    guest.finish(main);
    let main = guest.container("ports", &["sleep", "100000"], more("0"));
    guest.finish(main);
}

pub fn a_read_only_root_is_read_only(guest: &Guest) {
    guest.image("ro");
    let script =
        "touch /new /tmp/new /etc/new; echo x >/etc/passwd; ls / /tmp; touch /dev/shm/new && echo shm";
    let more = json!({"image": "ro", "readOnly": true, "initialize": true});
    let outcome = guest.container("ro", &["sh", "-c", script], more).outcome();
    assert_eq!(outcome.stderr.matches("Read-only file system").count(), 4, "{}", outcome.stderr);
    assert!(!outcome.stdout.contains("new") && outcome.stdout.ends_with("shm\n"), "{}", outcome.stdout);
    guest.remove("ro");

    // The pod's files are bound over the image's. A place for them exists even if the image has none.
    let files = "cat /etc/hostname /etc/resolv.conf; ls /etc; grep -c ' / overlay ' /proc/mounts; true";
    let expected =
        "pod-1\nnameserver 192.0.2.1\nsearch a.test\ngroup\nhostname\nhosts\npasswd\nresolv.conf\n";
    let root = guest.image("ro-files");
    for name in ["hosts", "hostname", "resolv.conf"] {
        std::fs::write(root.join("etc").join(name), "the image's\n").unwrap();
    }
    let said = guest.container_says("ro", files, json!({"image": "ro-files", "readOnly": true}));
    assert_eq!(said, format!("{expected}0\n"));
    let said = guest.container_says("ro", files, json!({"image": "ro", "readOnly": true}));
    assert_eq!(said, format!("{expected}1\n"));
}

pub fn dev_is_private_and_small(guest: &Guest) {
    let main = guest.sleeper("dev");
    let said = guest.says(
        "dev",
        "ls -1 /dev; ls -1 /dev/pts; for l in fd stdin stdout stderr ptmx; do readlink /dev/$l; done",
    );
    let expected = "console fd full null ptmx pts random shm stderr stdin stdout tty urandom zero ptmx \
        /proc/self/fd /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2 pts/ptmx ";
    assert_eq!(said.replace('\n', " "), expected);
    let said = guest.says(
        "dev",
        "cd /dev; for n in full null random tty urandom zero; do stat -c '%n %F %a %t:%T' $n; done",
    );
    let expected: String = [("full", 7), ("null", 3), ("random", 8), ("tty", 0), ("urandom", 9), ("zero", 5)]
        .map(|(name, minor)| {
            let major = if name == "tty" { 5 } else { 1 };
            format!("{name} character special file 666 {major}:{minor}\n")
        })
        .concat();
    assert_eq!(said, expected);
    let modes = guest.says("dev", "cd /dev; stat -c '%n %F %a' console pts pts/ptmx shm");
    assert_eq!(
        modes,
        "console regular empty file 620\npts directory 755\npts/ptmx character special file 666\nshm directory 1777\n"
    );
    // A node that a container's root makes cannot be used, not even that of a harmless device. (On a VM's
    // share no node can be made at all.)
    let places =
        if guest.kind == Kind::Vm { &["/dev", "/dev/shm"][..] } else { &["/dev", "/dev/shm", "/tmp"] };
    for place in places {
        let outcome = guest.sh("dev", &format!("mknod {place}/node c 1 5 && head -c 1 {place}/node"));
        assert!(outcome.stderr.contains("Permission denied"), "{place}: {outcome:?}");
        guest.says("dev", &format!("rm {place}/node"));
    }
    guest.says(
        "dev",
        "echo x >/dev/null; head -c 4 /dev/zero >/dev/shm/zero; head -c 4 /dev/urandom >/dev/shm/random",
    );
    let outcome = guest.sh("dev", "echo x >/dev/full");
    assert!(outcome.stderr.contains("No space left on device"), "{}", outcome.stderr);
    guest.finish(main);
}

pub fn a_pod_shares_what_a_pod_shares(guest: &Guest) {
    let (one, two) = (guest.sleeper("one"), guest.sleeper("two"));
    guest.says("one", "echo shared >/dev/shm/word; echo private >/dev/private; echo image >/tmp/word");
    assert_eq!(guest.says("two", "cat /dev/shm/word"), "shared\n");
    assert_ne!(guest.sh("two", "cat /dev/private").status, 0, "/dev is each container's own");
    let namespaces =
        |id: &str| guest.says(id, "for n in ipc mnt net pid uts; do readlink /proc/self/ns/$n; done");
    let (one_has, two_has) = (namespaces("one"), namespaces("two"));
    for (one_line, two_line) in one_has.lines().zip(two_has.lines()) {
        assert_eq!(one_line == two_line, !one_line.starts_with("mnt"), "{one_line} {two_line}");
    }
    let marker = guest.exec("one", &["sleep", "31337"], json!({}));
    // A started process may not have executed its program yet.
    guest.says("two", "until ps | grep -q '[s]leep 31337'; do :; done");
    marker.signal(9);
    assert_eq!(marker.end().status, 137);
    assert_eq!(guest.says("two", "hostname"), "pod-1\n");
    guest.finish(one);
    guest.finish(two);
}

pub fn nothing_of_the_guest_is_in_sight(guest: &Guest) {
    let main = guest.sleeper("sight");
    let mounts = guest.says("sight", "cut -d ' ' -f 5 /proc/self/mountinfo | sort");
    for mount in mounts.lines() {
        let known = ["/", "/proc", "/sys", "/dev", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];
        let below = ["/proc/", "/sys/", "/dev/"];
        assert!(
            known.contains(&mount) || below.iter().any(|start| mount.starts_with(start)),
            "{mount} in {mounts}"
        );
    }
    let outcome = guest.sh(
        "sight",
        "ls /run/hyperinit /image /dev/vport* /dev/kmsg /dev/hvc* /dev/sd* /dev/vd* 2>/dev/null",
    );
    assert_eq!(outcome.stdout, "");
    // The container sees nothing of the share but its own image, neither beside it nor above it.
    let other = guest.image("sight-other");
    std::fs::write(other.join("secret"), "").unwrap();
    assert_eq!(guest.sh("sight", "find / -name secret -o -name sight-other 2>/dev/null").stdout, "");
    let root = "awk '$5 == \"/\" { print $4 }' /proc/self/mountinfo";
    assert!(guest.says("sight", root).ends_with("image/rootfs\n"), "the mount is the image's part alone");
    assert_eq!(guest.says("sight", "ls /../../../"), guest.says("sight", "ls /"));
    // The pod init is the only process of the guest in the pod, and the container cannot look into it.
    assert_eq!(guest.says("sight", "cat /proc/1/comm"), "podinit\n");
    assert_eq!(guest.says("sight", "tr -d '\\0' </proc/1/cmdline"), "podinit");
    assert_ne!(guest.sh("sight", "ls /proc/1/root/ /proc/1/cwd/").status, 0);
    guest.finish(main);
}

pub fn proc_and_sys_are_masked_and_read_only(guest: &Guest) {
    let main = guest.sleeper("masked");
    assert_eq!(
        guest.says(
            "masked",
            "cat /proc/kcore /proc/keys /proc/timer_list 2>/dev/null; ls /proc/scsi 2>/dev/null; ls /sys/firmware; true"
        ),
        ""
    );
    for path in [
        "/proc/sys/kernel/hostname",
        "/proc/sysrq-trigger",
        "/sys/kernel/uevent_helper",
        "/proc/irq/default_smp_affinity",
    ] {
        let outcome = guest.sh("masked", &format!("[ -e {path} ] || exit 9; echo 1 >{path}"));
        assert_ne!(outcome.status, 0, "{path} was written");
    }
    guest.finish(main);
}

fn with_sysctl<'a>(guest: &'a Guest, name: &str, value: &str) -> Result<Running<'a>, CallError> {
    guest.try_container("sysctl", &["sleep", "100000"], json!({"sysctl": {name: value}}))
}

pub fn sysctls_are_the_pods_own(guest: &Guest) {
    let container = with_sysctl(guest, "kernel.shmmni", "1234").unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(guest.says("sysctl", "cat /proc/sys/kernel/shmmni"), "1234\n");
    guest.finish(container);
    let container = with_sysctl(guest, "net.ipv4.ip_forward", "1").unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(guest.says("sysctl", "cat /proc/sys/net/ipv4/ip_forward"), "1\n");
    guest.finish(container);
    let container = with_sysctl(guest, "vm.overcommit_memory", "1").unwrap_or_else(|error| panic!("{error}"));
    if guest.kind == Kind::Vm {
        assert_eq!(guest.says("sysctl", "cat /proc/sys/vm/overcommit_memory"), "1\n");
    }
    guest.finish(container);
    for (name, why) in [
        ("kernel.core_pattern", "only the privileged profile may set it"),
        ("net.no.such", "No such file or directory"),
        ("net.../../kernel", "it is not a dotted name"),
    ] {
        let text = refusal(with_sysctl(guest, name, "1"));
        assert!(text.contains(why), "{text}");
    }
}

pub fn an_image_that_is_not_there_leaves_nothing(guest: &Guest) {
    for more in [
        json!({"image": "missing"}),
        json!({"rootfs": "missing"}),
        json!({"image": "../../.."}),
        json!({"image": "image/rootfs/etc/passwd"}),
    ] {
        let outside = more["image"] == "../../..";
        let text = refusal(guest.try_container("missing", &["true"], more));
        assert!(text.contains("opening the root filesystem") || outside, "{text}");
    }
    assert_eq!(guest.container_says("missing", "echo works", json!({})), "works\n");
}

pub fn an_image_cannot_lead_out_of_itself(guest: &Guest) {
    let root = guest.image("links");
    let link = |to: &str, at: &str| {
        let at = root.join(at);
        let _ = std::fs::remove_dir_all(&at).or_else(|_| std::fs::remove_file(&at));
        std::os::unix::fs::symlink(to, at).unwrap();
    };
    link("/etc/target", "etc/resolv.conf");
    link("../../../../../../../etc", "tmp/out");
    std::fs::write(root.join("etc/target"), "own\n").unwrap();
    let more = json!({"image": "links", "initialize": true, "process": {"workdir": "/tmp/out/made"}});
    let said = guest.container_says("links", "pwd -P; cat /etc/target", more);
    assert_eq!(said, "/etc/made\nnameserver 192.0.2.1\nsearch a.test\n");
    assert!(root.join("etc/made").is_dir());
    for at in ["proc", "dev", "sys"] {
        // A separate image for each: the guest need not look up again what it has already seen of the share.
        let image = format!("links-{at}");
        let root = guest.image(&image);
        std::fs::remove_dir(root.join(at)).unwrap();
        std::os::unix::fs::symlink("/tmp", root.join(at)).unwrap();
        let text = refusal(guest.try_container("links", &["true"], json!({"image": image})));
        assert!(text.contains(&format!("/{at}")), "{text}");
    }
}

//! What a process may do, and what it does not inherit.

use super::*;

/// Docker's fourteen, as the default profile has them.
const CAPABILITIES: &str = "00000000a80425fb";

#[test]
fn what_a_process_gets_is_what_its_profile_says() {
    guest(|guest| {
        let mut pod = pod(guest);
        let text = pod.shell("web", "cat /proc/self/status; echo oom: $(cat /proc/self/oom_score_adj)");
        let root = [
            ("CapInh", NONE),
            ("CapPrm", CAPABILITIES),
            ("CapEff", CAPABILITIES),
            ("CapBnd", CAPABILITIES),
            ("CapAmb", NONE),
            ("NoNewPrivs", "0"),
            ("Seccomp", "2"),
            ("SigBlk", NONE),
            ("SigIgn", NONE),
            ("SigCgt", NONE),
            ("Uid", "0 0 0 0"),
            ("Gid", "0 0 0 0"),
            ("Groups", "0"),
            ("Umask", "0022"),
            ("oom", "0"),
        ];
        for (key, value) in root {
            assert_eq!(status_of(&text, key), value, "{key}");
        }
        let (_, text, _) = pod.run("web", json!({"args": ["/bin/cat", "/proc/self/status"], "user": "web"}));
        for (key, value) in [("CapPrm", NONE), ("CapEff", NONE), ("CapInh", NONE), ("CapBnd", CAPABILITIES)] {
            assert_eq!(status_of(&text, key), value, "{key} of another user");
        }
        assert_eq!(status_of(&text, "Uid"), "33 33 33 33");
        assert_eq!(status_of(&text, "Gid"), "34 34 34 34");
        assert_eq!(status_of(&text, "Groups"), "29 34 44");
    });
}

/// execd is not root, and nothing of it shows: what it has made for a process is the process's, also for a
/// root without capabilities.
#[test]
fn nothing_of_a_process_belongs_to_execd() {
    guest(|guest| {
        image("web");
        let mut pod = Pod::with(guest, pod_files(), &["--profile", "restricted"]);
        pod.prepare("web", json!({})).unwrap();
        let words = "stat -L -c %u:%g /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2; stat -L -c %u:%g /proc/self; \
                     echo again >/dev/stdout; echo wrong >/dev/stderr";
        for (user, pipes, own) in [("", "0:0", "0:0"), ("web", "33:0", "33:34")] {
            let said = pod.run("web", json!({"args": ["/bin/sh", "-c", words], "user": user}));
            let out = format!("{pipes}\n{pipes}\n{pipes}\n{own}\nagain\n");
            assert_eq!(said, (0, out, "wrong\n".to_owned()), "of the user {user:?}");
        }
        assert_eq!(status(pod.execd.helper.pid(), "Uid"), ["4294963203"; 4].join(" "));
        assert_eq!(status(pod.init, "Uid"), "0 0 0 0");
    });
}

/// Until it executes, a process is not dumpable, whoever it has become and whatever the machine's
/// fs.suid_dumpable is: its /proc directory is root's.
#[test]
fn a_process_that_is_being_started_is_not_dumpable() {
    guest(|guest| {
        let mut pod = pod(guest);
        let request = pod.request("web", false, json!({"args": ["/bin/cat"], "user": "web"}));
        let pid = pod.execd.started(&request).unwrap();
        guest.adopt(pid);
        let owner = || fs::metadata(format!("/proc/{pid}/environ")).unwrap().uid();
        assert_eq!((status(pid, "Uid").as_str(), owner()), ("33 33 33 33", 0));
        let (_, fds) = pod.execd.packet().unwrap();
        release(pid);
        let mut fds = fds.into_iter().map(fs::File::from);
        let (mut stdin, out) = (fds.next().unwrap(), fds.next().unwrap());
        stdin.write_all(b"executed").unwrap();
        read_to(&out, "executed");
        assert_eq!(owner(), 33, "it is a program like any other");
        drop(stdin);
        assert_eq!(guest.wait(pid), 0);
    });
}

#[test]
fn signals_that_execd_inherited_as_ignored_are_not_ignored() {
    guest(|guest| {
        let mut pod = pod(guest);
        // As an init that ignores them would leave them.
        let (theirs, streamd) = socket_pair();
        let mut command = std::process::Command::new("/bin/busybox");
        let shell = "trap '' HUP INT TERM USR1; exec \"$0\" --stdio";
        command.args(["sh", "-c", shell, support::helper::binary(Role::Execd)]);
        pod.execd =
            Execd { helper: Helper::spawn(Role::Execd, command, Some(theirs)), streamd, kept: vec![] };
        pod.execd.done(&join(&[])).unwrap();
        let (_, text, _) = pod.run("web", json!({"args": ["/bin/cat", "/proc/self/status"]}));
        assert_eq!(status_of(&text, "SigIgn"), NONE);
    });
}

#[test]
fn nothing_of_execds_is_left_open() {
    guest(|guest| {
        let mut pod = pod(guest);
        // Others' pipes are in execd meanwhile.
        let _other = pod.exec("web", json!({"args": ["/bin/cat"]})).unwrap();
        for (more, fds) in [(json!({}), "0\n1\n2\n3\n"), (json!({"terminal": true}), "0\r\n1\r\n2\r\n3\r\n")]
        {
            let mut all = json!({"args": ["/bin/ls", "-1", "/proc/self/fd"]});
            for (key, value) in more.as_object().unwrap() {
                all[key] = value.clone();
            }
            // 3 is the directory that is being listed.
            assert_eq!(pod.run("web", all), (0, fds.to_owned(), String::new()));
        }
    });
}

/// CVE-2024-21626: execd's descriptors are no way out of the container.
#[test]
fn no_descriptor_leads_out() {
    guest(|guest| {
        let mut pod = pod(guest);
        let root = Path::new(paths::LOCAL_SHARE).join("web/rootfs");
        for fd in 0..32 {
            for path in [format!("/proc/self/fd/{fd}"), format!("/proc/self/fd/{fd}/..")] {
                let fault = pod.exec("web", json!({"workdir": path})).err().expect(&path);
                assert_eq!(fault.doing, "entering the workdir", "{fault}");
            }
            let program = format!("/proc/self/fd/{fd}/../bin/busybox");
            let (status, ..) = pod.run("web", json!({"args": [program, "true"]}));
            assert_eq!(status, 127, "{program}");
            let link = root.join(format!("fd{fd}"));
            symlink(format!("/proc/self/fd/{fd}/.."), &link).unwrap();
            assert!(pod.exec("web", json!({"workdir": format!("/fd{fd}")})).is_err());
        }
        for magic in ["/proc/self/root", "/proc/1/root", "/proc/1/cwd"] {
            assert!(pod.exec("web", json!({"workdir": magic})).is_err(), "{magic}");
        }
    });
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_setuid_program_works() {
    guest(|guest| {
        let root = image("web");
        // setuid(0): of a user other than root only a setuid program may.
        let elf = probe::elf(105, [0; 6]);
        program(&root, "plain", &elf, 0o755);
        program(&root, "setuid", &elf, 0o4755);
        let mut pod = Pod::start(guest);
        pod.prepare("web", json!({})).unwrap();
        assert_eq!(pod.run("web", json!({"args": ["/bin/plain"], "user": "web"})).0, Errno::EPERM as i32);
        assert_eq!(pod.run("web", json!({"args": ["/bin/setuid"], "user": "web"})).0, 0);
    });
}

/// One system call of the default profile that fails, each by the errno that the profile says. TIOCSTI among
/// them, and with bits in the upper half of ioctl's number, which the kernel does not look at and a filter of
/// 64 bits would take for another call (CVE-2019-10063, CVE-2023-1523).
#[cfg(target_arch = "x86_64")]
#[test]
fn what_the_profile_denies_fails() {
    const EPERM: i32 = Errno::EPERM as i32;
    const TIOCSTI: u64 = 0x5412;
    const TIOCLINUX: u64 = 0x541c;
    const CLONE_NEWUSER: u64 = 0x1000_0000;
    let all = [
        ("mount", 165, [0; 6], EPERM),
        ("umount2", 166, [0; 6], EPERM),
        ("unshare", 272, [CLONE_NEWUSER, 0, 0, 0, 0, 0], EPERM),
        ("clone", 56, [CLONE_NEWUSER | 17, 0, 0, 0, 0, 0], EPERM),
        ("clone3", 435, [0; 6], Errno::ENOSYS as i32),
        ("setns", 308, [0; 6], EPERM),
        ("ioctl TIOCSTI", 16, [0, TIOCSTI, probe::BASE, 0, 0, 0], EPERM),
        ("ioctl TIOCSTI, high bits", 16, [0, 0xdead_beef_0000_0000 | TIOCSTI, probe::BASE, 0, 0, 0], EPERM),
        ("ioctl TIOCLINUX, high bits", 16, [0, 1 << 32 | TIOCLINUX, probe::BASE, 0, 0, 0], EPERM),
        ("socket AF_VSOCK", 41, [40, 1, 0, 0, 0, 0], EPERM),
        ("socket AF_PACKET", 41, [17, 3, 0, 0, 0, 0], EPERM),
        ("socket AF_ALG", 41, [38, 5, 0, 0, 0, 0], EPERM),
        ("socket AF_KEY", 41, [15, 3, 2, 0, 0, 0], EPERM),
        ("socket AF_PACKET, high bits", 41, [1 << 32 | 17, 3, 0, 0, 0, 0], EPERM),
        ("io_uring_setup", 425, [0; 6], EPERM),
        ("modify_ldt", 154, [0; 6], EPERM),
        // Between two calls, and after the last: C libraries fall back.
        ("a number that no call has", 400, [0; 6], Errno::ENOSYS as i32),
        ("a call of a newer kernel", 999, [0; 6], Errno::ENOSYS as i32),
        ("bpf", 321, [0; 6], EPERM),
        ("x32 mount", 0x4000_0000 | 165, [0; 6], Errno::ENOSYS as i32),
        // And some that pass, with the kernel's own answer or none.
        ("unshare of nothing", 272, [0; 6], 0),
        ("ioctl TCGETS of a pipe", 16, [0, 0x5401, probe::BASE, 0, 0, 0], Errno::ENOTTY as i32),
        ("socket AF_UNIX", 41, [1, 1, 0, 0, 0, 0], 0),
        ("socket AF_INET of ICMP, raw", 41, [2, 3, 1, 0, 0, 0], 0),
        ("socket AF_NETLINK", 41, [16, 3, 0, 0, 0, 0], 0),
        ("close of nothing", 3, [99, 0, 0, 0, 0, 0], Errno::EBADF as i32),
    ];
    guest(move |guest| {
        let root = image("web");
        for (number, (_, call, arguments, _)) in all.iter().enumerate() {
            program(&root, &format!("probe{number}"), &probe::elf(*call, *arguments), 0o755);
        }
        let mut pod = Pod::start(guest);
        pod.prepare("web", json!({})).unwrap();
        for (number, (what, _, _, expected)) in all.iter().enumerate() {
            let terminal = what.contains("TIOC");
            let more = json!({"args": [format!("/bin/probe{number}")], "terminal": terminal});
            let (status, ..) = pod.run("web", more);
            assert_eq!(status, *expected, "{what}");
        }
    });
}

#[test]
fn the_privileged_profile_gives_more() {
    guest(|guest| {
        image("web");
        let mut pod = Pod::with(guest, pod_files(), &["--profile", "privileged"]);
        pod.prepare("web", json!({})).unwrap();
        let text = pod.shell("web", "mount -t tmpfs none /srv && cat /proc/self/status");
        assert_eq!(status_of(&text, "Seccomp"), "2");
        assert_ne!(status_of(&text, "CapEff"), CAPABILITIES);
        assert_eq!(status_of(&text, "CapEff"), status_of(&text, "CapBnd"));
    });
}

/// Nobody outside gains from a process that is about to be another.
#[test]
fn execd_cannot_be_traced_and_is_small() {
    guest(|guest| {
        let pod = pod(guest);
        let of_root =
            |name: &str| fs::metadata(format!("/proc/{}/{name}", pod.execd.helper.pid())).unwrap().uid();
        assert_eq!(of_root("fd"), 0);
        let text = fs::read_to_string(format!("/proc/{}/status", pod.execd.helper.pid())).unwrap();
        assert_eq!(status_of(&text, "Threads"), "1");
        assert_eq!(status_of(&text, "Seccomp"), "2");
        assert_eq!(status_of(&text, "NoNewPrivs"), "0", "setuid programs work");
        assert_eq!(status_of(&text, "CapBnd"), CAPABILITIES, "what it can give and no more");
    });
}

//! execd, confined, by hand, in namespaces of its own: the test is init, which reaps, and streamd, which takes the pipes.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use hyperinit::fault::Fault;
use hyperinit::ids::Pid;
use hyperinit::paths;
use hyperinit::wire::{Role, execd};
use nix::errno::Errno;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use support::guest::{Guest, guest, guest_with_cgroups};
use support::helper::Helper;
use support::image::{image, program};
use support::pod::{Execd, HOSTNAME, Pod, id, pod_files, socket_pair};
use support::{probe, read_all, read_to, read_until};

/// Docker's fourteen, as the default profile has them.
const CAPABILITIES: &str = "00000000a80425fb";
const NONE: &str = "0000000000000000";

/// A pod with one container, of the image of that name.
fn pod(guest: &Guest) -> Pod<'_> {
    image("web");
    let mut pod = Pod::start(guest);
    pod.prepare("web", json!({})).unwrap();
    pod
}

/// What /proc says of a process, by key.
fn status_of(text: &str, key: &str) -> String {
    let line = text.lines().find(|line| line.starts_with(&format!("{key}:")));
    line.unwrap_or_else(|| panic!("no {key} in {text}"))
        .split_whitespace()
        .skip(1)
        .collect::<Vec<_>>()
        .join(" ")
}

fn status(pid: Pid, key: &str) -> String {
    status_of(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap(), key)
}

#[test]
fn a_pod_init_is_one_in_namespaces_of_its_own_and_has_nothing() {
    guest(|guest| {
        let mut execd = Execd::start(&[]);
        let request = execd::Request::StartPod { hostname: HOSTNAME.to_owned() };
        let init = execd.started(&request).unwrap();
        guest.adopt_init(init);
        // Its last step is its filter; until then it works on.
        let confined = || status(init, "Seccomp") == "2" && status(init, "CapEff") == NONE;
        let until = std::time::Instant::now() + support::DEADLINE;
        while !confined() {
            assert!(std::time::Instant::now() < until, "it is not confined");
            std::thread::yield_now();
        }
        for key in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(init, key), NONE, "{key}");
        }
        assert_eq!(status(init, "NoNewPrivs"), "1");
        assert_eq!(status(init, "NSpid").split(' ').nth(1), Some("1"));
        assert_eq!(status(init, "PPid"), std::process::id().to_string(), "init's child");
        for name in ["pid", "mnt", "uts", "ipc"] {
            let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
            assert_ne!(of(&init.to_string()), of("thread-self"), "{name}");
        }
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
        assert_eq!(of(&init.to_string()), of("thread-self"), "the network is the guest's");
        let mounts = fs::read_to_string(format!("/proc/{init}/mountinfo")).unwrap();
        assert_eq!(
            mounts.lines().filter(|line| line.split(' ').nth(4) == Some("/proc")).count(),
            2,
            "its own /proc"
        );
        assert!(!mounts.contains("shared:") && !mounts.contains("master:"));
        let open: Vec<_> =
            fs::read_dir(format!("/proc/{init}/fd")).unwrap().map(|fd| fd.unwrap().file_name()).collect();
        assert_eq!(open, ["2"], "the log and nothing else");
        // TERM, INT and HUP mean nothing to it.
        guest.kill(init, Signal::SIGTERM);
        guest.kill(init, Signal::SIGINT);
        assert!(execd.done(&execd::Request::Resend).is_ok());
        assert_eq!(status(init, "State").chars().next(), Some('S'));
    });
}

#[test]
fn a_second_pod_is_not_inside_the_first() {
    guest(|guest| {
        let mut execd = Execd::start(&[]);
        for hostname in ["one", "two"] {
            let init = execd.started(&execd::Request::StartPod { hostname: hostname.to_owned() }).unwrap();
            guest.adopt_init(init);
            assert_eq!(status(init, "NSpid").split(' ').count(), 2);
        }
        for bad in ["x".repeat(65), "a\0b".to_owned()] {
            let fault = execd.started(&execd::Request::StartPod { hostname: bad }).unwrap_err();
            assert!(fault.to_string().contains("hostname"), "{fault}");
        }
    });
}

#[test]
fn nothing_starts_outside_a_pod() {
    guest(|guest| {
        let mut pod = pod(guest);
        let (mut fresh, request) = (Execd::start(&[]), pod.request("web", false, json!({})));
        let fault = fresh.started(&request).unwrap_err();
        assert!(fault.to_string().contains("has not joined the pod"), "{fault}");
        fresh.done(&execd::Request::JoinPod).unwrap();
        let pid = fresh.started(&request).unwrap();
        assert_eq!(guest.wait(pid), 0, "an execd that was restarted");
    });
}

#[test]
fn an_orphan_is_reaped_by_the_pod() {
    guest(|guest| {
        let mut pod = pod(guest);
        let orphan: Pid = {
            // The subshell that was its parent has ended when the number is told.
            let words = "pid=$(sleep 1000 >/dev/null & echo $!); echo $pid; read line";
            let running = pod.exec("web", json!({"args": ["/bin/sh", "-c", words]})).unwrap();
            let inside = read_to(&running.out, "\n");
            let parent = pod.shell("web", &format!("cat /proc/{}/stat", inside.trim()));
            assert_eq!(parent.split(' ').nth(3), Some("1"), "the pod init is its parent now: {parent}");
            drop(running.stdin);
            guest.wait(running.pid);
            Pid(inside.trim().parse().unwrap())
        };
        pod.shell("web", &format!("kill -9 {orphan}"));
        let until = std::time::Instant::now() + support::DEADLINE;
        while pod.shell("web", "ls /proc").lines().any(|name| name == orphan.to_string()) {
            assert!(std::time::Instant::now() < until, "it stays a zombie");
        }
    });
}

#[test]
fn bytes_go_in_and_out_by_pipes() {
    guest(|guest| {
        let mut pod = pod(guest);
        let words = "cat; echo oops >&2; exit 7";
        let mut running = pod.exec("web", json!({"args": ["/bin/sh", "-c", words]})).unwrap();
        running.stdin.take().unwrap().write_all(b"hello").unwrap();
        assert_eq!(read_all(running.out), "hello");
        assert_eq!(read_all(running.err.unwrap()), "oops\n");
        assert_eq!(guest.wait(running.pid), 7);
        assert!(!running.streams.terminal && !running.streams.again);
        assert_eq!(pod.execd.helper.log(), "");
    });
}

#[test]
fn a_process_is_in_the_pod_and_in_its_container() {
    guest_with_cgroups(|guest| {
        let mut pod = pod(guest);
        let mut running = pod.exec_init("web", json!({"args": ["/bin/cat"]})).unwrap();
        running.stdin.as_mut().unwrap().write_all(b"executed").unwrap();
        read_to(&running.out, "executed");
        let link = |pid: Pid, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
        for name in ["pid", "uts", "ipc", "net"] {
            assert_eq!(link(running.pid, name), link(pod.init, name), "{name}");
        }
        let kept = fs::metadata(paths::container_mount_ns(&id("web"))).unwrap().ino();
        assert_eq!(fs::metadata(format!("/proc/{}/ns/mnt", running.pid)).unwrap().ino(), kept);
        let procs = fs::read_to_string(paths::container_cgroup(&id("web")).join("cgroup.procs")).unwrap();
        assert_eq!(procs, format!("{}\n", running.pid));
        assert_eq!(status(running.pid, "PPid"), std::process::id().to_string(), "init's child");
        assert_eq!(pod.shell("web", "cat /proc/sys/kernel/hostname"), HOSTNAME);
        assert!(pod.shell("web", "ps").contains("/bin/cat"), "the pod's processes see each other");
        let stat = fs::read_to_string(format!("/proc/{}/stat", running.pid)).unwrap();
        let fields: Vec<&str> = stat.split(' ').collect();
        assert_eq!((fields[4], fields[5]), (fields[0], fields[0]), "leader of its group and session");
    });
}

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
            ("Groups", ""),
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
        assert_eq!(status_of(&text, "Groups"), "29 44");
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
        pod.execd = Execd { helper: Helper::spawn(Role::Execd, command, Some(theirs)), streamd };
        pod.execd.done(&execd::Request::JoinPod).unwrap();
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

#[test]
fn a_closed_pipe_kills_by_sigpipe() {
    guest(|guest| {
        let mut pod = pod(guest);
        let mut running = pod.exec("web", json!({"args": ["/bin/cat"]})).unwrap();
        drop(running.out);
        // execd keeps a duplicate, until the process is finished; here it is told so.
        pod.execd.done(&execd::Request::Release { stdio: running.streams.stdio }).unwrap();
        running.stdin.take().unwrap().write_all(b"x").unwrap();
        assert_eq!(guest.wait(running.pid), 128 + 13);
    });
}

#[test]
fn the_environment_is_the_protocols() {
    guest(|guest| {
        let mut pod = pod(guest);
        let mut env = |more: Value| {
            let mut all = json!({"args": ["/bin/env"]});
            for (key, value) in more.as_object().unwrap() {
                all[key] = value.clone();
            }
            let (status, out, _) = pod.run("web", all);
            assert_eq!(status, 0);
            out
        };
        assert_eq!(env(json!({})), format!("HOME=/root\nHOSTNAME={HOSTNAME}\nUSER=root\n"));
        assert_eq!(
            env(json!({"args": ["env"], "user": "4711"})),
            format!("HOME=/\nHOSTNAME={HOSTNAME}\nPATH=/usr/local/bin:/usr/bin:/bin:.\n")
        );
        assert_eq!(
            env(
                json!({"user": "web", "envs": [{"env": "HOME", "value": "/h"}, {"env": "E", "value": "a b\n\"$x"}]})
            ),
            format!("HOME=/h\nHOSTNAME={HOSTNAME}\nUSER=web\nE=a b\n\"$x\n")
        );
        assert!(env(json!({"terminal": true})).contains("TERM=xterm"));
        assert!(!env(json!({})).contains("TERM="));
    });
}

#[test]
fn arguments_arrive_as_they_are() {
    guest(|guest| {
        let mut pod = pod(guest);
        let long = "x".repeat(100_000);
        let args = json!(["/bin/printf", "[%s]", "", "a b", "*", "$HOME", "\u{1f980}", long]);
        let (status, out, err) = pod.run("web", json!({"args": args}));
        assert_eq!((status, err.as_str()), (0, ""));
        assert_eq!(out, format!("[][a b][*][$HOME][\u{1f980}][{long}]"));
        let fault = pod.exec("web", json!({"args": ["/bin/echo", "a\0b"]})).err().unwrap();
        assert!(fault.is(Errno::EINVAL), "{fault}");
    });
}

#[test]
fn users_and_groups_are_the_containers() {
    guest(|guest| {
        let mut pod = pod(guest);
        let mut id = |more: Value| {
            let mut all = json!({"args": ["/bin/id"]});
            for (key, value) in more.as_object().unwrap() {
                all[key] = value.clone();
            }
            pod.run("web", all).1.trim_end().to_owned()
        };
        assert_eq!(id(json!({})), "uid=0(root) gid=0(root)");
        assert_eq!(id(json!({"user": "web"})), "uid=33(web) gid=34(www) groups=29(audio),44(video)");
        assert_eq!(id(json!({"user": "33"})), "uid=33(web) gid=34(www)");
        assert_eq!(
            id(json!({"user": "web", "group": "audio"})),
            "uid=33(web) gid=29(audio) groups=29(audio),44(video)"
        );
        let more = json!({"user": "4711", "group": "42", "additionalGroups": ["audio", "77"]});
        assert_eq!(id(more), "uid=4711 gid=42 groups=29(audio),77");
        let mut refused = |more: Value| pod.exec("web", more).err().unwrap().to_string();
        assert_eq!(refused(json!({"user": "nobody"})), "execd: looking up the user nobody: no such user");
        assert_eq!(refused(json!({"group": "wheel"})), "execd: looking up the group wheel: no such group");
        assert!(refused(json!({"additionalGroups": ["wheel"]})).contains("looking up the group wheel"));
        assert!(refused(json!({"user": "4294967295"})).contains("no such user"));
    });
}

#[test]
fn an_image_without_accounts_has_root_and_numbers() {
    guest(|guest| {
        let root = image("web");
        fs::remove_dir_all(root.join("etc")).unwrap();
        let mut pod = Pod::start(guest);
        pod.prepare("web", json!({"readOnly": true})).unwrap();
        assert_eq!(
            pod.run("web", json!({"args": ["/bin/id"], "user": "7"})).1,
            "uid=7 gid=0 groups=0\n".replace(" groups=0", "")
        );
        assert!(pod.exec("web", json!({"user": "root"})).is_err());
    });
}

#[test]
fn a_hostile_passwd_is_a_fault_and_never_a_wait() {
    guest(|guest| {
        let mut pod = pod(guest);
        let passwd = Path::new(paths::LOCAL_SHARE).join("web/rootfs/etc/passwd");
        let mut refused = |make: &dyn Fn(&Path), why: &str| {
            fs::remove_file(&passwd).or_else(|_| fs::remove_dir(&passwd)).unwrap();
            make(&passwd);
            let fault = pod.exec("web", json!({"user": "web"})).err().unwrap();
            assert!(fault.to_string().contains(why), "{why}: {fault}");
        };
        refused(
            &|path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRUSR).unwrap(),
            "not a regular file",
        );
        refused(&|path| fs::create_dir(path).unwrap(), "not a regular file");
        refused(&|path| symlink("/dev/zero", path).unwrap(), "not a regular file");
        refused(&|path| symlink("passwd", path).unwrap(), "symbolic links");
        refused(&|path| symlink("/proc/self/fd/3", path).unwrap(), "symbolic links");
        refused(&|path| symlink("/proc/1/root/etc/passwd", path).unwrap(), "opening /etc/passwd");
        refused(&|path| fs::File::create(path).unwrap().set_len(1 << 40).unwrap(), "larger than 4 MiB");
        refused(&|path| symlink("../../../../../../etc/passwd", path).unwrap(), "symbolic links");
        refused(&|path| fs::write(path, "web:x:0").unwrap(), "no such user");
    });
}

#[test]
fn a_workdir_is_the_containers_or_a_fault() {
    guest(|guest| {
        let mut pod = pod(guest);
        let root = Path::new(paths::LOCAL_SHARE).join("web/rootfs");
        fs::create_dir_all("/run/outside").unwrap();
        symlink("/srv", root.join("link")).unwrap();
        symlink("/run/outside", root.join("out")).unwrap();
        fs::set_permissions(root.join("root"), fs::Permissions::from_mode(0o700)).unwrap();
        let mut cwd = |workdir: &str, user: &str| {
            let more = json!({"args": ["/bin/readlink", "/proc/self/cwd"], "workdir": workdir, "user": user});
            let running = pod.exec("web", more)?;
            let out = read_all(running.out);
            guest.wait(running.pid);
            Ok::<String, Fault>(out.trim_end().to_owned())
        };
        assert_eq!(cwd("", "").unwrap(), "/");
        assert_eq!(cwd("/srv", "web").unwrap(), "/srv");
        assert_eq!(cwd("srv/../srv", "").unwrap(), "/srv");
        assert_eq!(cwd("/link", "").unwrap(), "/srv");
        assert_eq!(cwd("../../..", "").unwrap(), "/");
        assert_eq!(
            cwd("/root", "web").unwrap(),
            "/root",
            "entered before the user is another, as Docker does"
        );
        let fault = cwd("/nowhere", "").unwrap_err();
        assert_eq!(fault.to_string(), "execd: entering the workdir /nowhere: No such file or directory");
        assert!(cwd("/out", "").unwrap_err().is(Errno::ENOENT));
        assert!(cwd("/etc/passwd", "").unwrap_err().is(Errno::ENOTDIR));
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

#[test]
fn limits_are_the_hosts() {
    guest(|guest| {
        let mut pod = pod(guest);
        let rlimits = json!([
            {"type": "RLIMIT_NOFILE", "soft": 4, "hard": 100},
            {"type": "RLIMIT_FSIZE", "soft": 8192, "hard": u64::MAX}
        ]);
        let more =
            json!({"args": ["/bin/sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -Sf"], "rlimits": rlimits});
        assert_eq!(pod.run("web", more).1, "4\n100\n16\n");
        let low = json!([{"type": "RLIMIT_NOFILE", "soft": 3, "hard": 3}, {"type": "RLIMIT_NPROC", "soft": 1, "hard": 1}]);
        let more =
            json!({"args": ["/bin/echo", "started"], "rlimits": low, "terminal": true, "workdir": "/srv"});
        assert_eq!(pod.run("web", more).1, "started\r\n", "a low limit is the process's, not its start's");
        let refused = json!({"rlimits": [{"type": "RLIMIT_FISH", "soft": 1, "hard": 1}]});
        assert!(pod.exec("web", refused).err().unwrap().to_string().contains("RLIMIT_FISH"));
        let refused = json!({"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 2, "hard": 1}]});
        assert!(pod.exec("web", refused).err().unwrap().to_string().contains("soft is above hard"));
    });
}

#[test]
fn a_program_that_cannot_be_executed_ran_and_failed() {
    guest(|guest| {
        let root = image("web");
        program(&root, "plain", b"no program", 0o755);
        program(&root, "forbidden", b"#!/bin/sh\n", 0o644);
        program(&root, "lost", b"#!/no/such/interpreter\n", 0o755);
        program(&root, "script", b"#!/bin/sh\necho from a script\n", 0o755);
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        fs::write(root.join("usr/bin/script"), "").unwrap();
        let mut pod = Pod::start(guest);
        pod.prepare("web", json!({})).unwrap();
        let mut run = |args: Value| pod.run("web", json!({"args": args}));
        for (args, status, word) in [
            (json!(["/bin/none"]), 127, "/bin/none: No such file or directory"),
            (json!(["none"]), 127, "none: No such file or directory"),
            (json!([""]), 127, "No such file or directory"),
            (json!(["/etc/passwd/x"]), 127, "/etc/passwd/x: No such file or directory"),
            (json!(["/bin/lost"]), 127, "/bin/lost: No such file or directory"),
            (json!(["/bin/plain"]), 126, "/bin/plain: Exec format error"),
            (json!(["forbidden"]), 126, "forbidden: Permission denied"),
            (json!(["/srv"]), 126, "/srv: Permission denied"),
            (json!(["/bin/echo", "x".repeat(200_000)]), 125, "/bin/echo: Argument list too long"),
        ] {
            let (code, out, err) = run(args.clone());
            assert_eq!((code, out.as_str()), (status, ""), "{args}");
            assert!(err.trim_end().ends_with(word), "{args}: {err}");
        }
        assert_eq!(
            run(json!(["script"])).1,
            "from a script\n",
            "past one of its name that is not executable"
        );
        assert_eq!(run(json!(["/bin/sh", "-c", "kill -9 $$"])).0, 137);
        let root_only = json!({"args": ["/bin/secret"], "user": "web"});
        program(&root, "secret", b"#!/bin/sh\n", 0o700);
        assert_eq!(pod.run("web", root_only).0, 126, "another user's eyes look for the program");
    });
}

#[test]
fn a_tty_is_the_processs_own() {
    guest(|guest| {
        let mut pod = pod(guest);
        let words = "tty; stat -c '%u %g %a' $(tty); echo x >/dev/tty; cat /proc/self/stat; ls -1 /dev/pts";
        let mut tty = |user: &str| {
            let more = json!({"args": ["/bin/sh", "-c", words], "terminal": true, "user": user});
            pod.run("web", more)
        };
        let (status, out, _) = tty("web");
        assert_eq!(status, 0, "{out}");
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines[..3], ["/dev/pts/0", "33 6 620", "x"], "{out}");
        // pid, comm, state, ppid, pgrp, session, the controlling terminal's device number, its foreground group
        let stat: Vec<&str> = lines[3].split(' ').collect();
        assert_eq!(
            (stat[6], stat[7]),
            ("34816", stat[4]),
            "pts/0 is its terminal, and it is in the foreground"
        );
        assert_eq!(lines[4..], ["0", "ptmx"], "its container's ttys only");
        let (_, out, _) = tty("");
        assert!(out.contains("0 6 620"), "{out}");
    });
}

#[test]
fn a_tty_has_a_size_and_signals() {
    guest(|guest| {
        let mut pod = pod(guest);
        let words =
            "trap 'echo size $(stty size); exit 3' WINCH; echo ready; while true; do sleep 0.01; done";
        let mut running =
            pod.exec("web", json!({"args": ["/bin/sh", "-c", words], "terminal": true})).unwrap();
        assert!(running.streams.terminal && running.stdin.is_none() && running.err.is_none());
        read_to(&running.out, "ready");
        let stdio = running.streams.stdio;
        pod.execd.done(&execd::Request::Resize { stdio, row: 41, column: 132 }).unwrap();
        assert!(read_until(&running.out, |_| false).contains("size 41 132"));
        assert_eq!(guest.wait(running.pid), 3);
        running = pod.exec("web", json!({"args": ["/bin/cat"], "terminal": true})).unwrap();
        // ^C, which only a controlling terminal turns into a signal.
        running.out.write_all(b"\x03").unwrap();
        assert_eq!(guest.wait(running.pid), 128 + 2);
        let piped = pod.exec("web", json!({"args": ["/bin/cat"]})).unwrap();
        let mut resize = |stdio| pod.execd.done(&execd::Request::Resize { stdio, row: 1, column: 1 });
        assert!(resize(piped.streams.stdio).unwrap_err().to_string().contains("no tty"));
        let nobody = hyperinit::ids::StreamId::new(999).unwrap();
        assert!(resize(nobody).unwrap_err().to_string().contains("no such stream"));
    });
}

#[test]
fn the_tty_of_a_containers_init_is_its_console() {
    guest(|guest| {
        let mut pod = pod(guest);
        let words = "echo to the console >/dev/console; read line; exit 4";
        let mut running =
            pod.exec_init("web", json!({"args": ["/bin/sh", "-c", words], "terminal": true})).unwrap();
        assert!(read_to(&running.out, "console\r\n").contains("to the console"));
        guest.inside("web", |mounts| {
            let line = mounts.lines().find(|line| line.contains(" /dev/console ")).unwrap();
            assert!(line.contains(" - devpts "), "{line}");
        });
        running.out.write_all(b"\n").unwrap();
        assert_eq!(guest.wait(running.pid), 4);
    });
}

#[test]
fn a_tty_with_a_stderr_stream_has_it_on_a_pipe() {
    guest(|guest| {
        let mut pod = pod(guest);
        let more = json!({"args": ["/bin/sh", "-c", "echo out; echo err >&2"], "terminal": true});
        let mut request = pod.request("web", false, more);
        let execd::Request::StartProcess { process, .. } = &mut request else { panic!() };
        let hyperinit::channel::Bulk::Here(process) = process else { panic!() };
        process.stderr = 900;
        let pid = pod.execd.started(&request).unwrap();
        let (streams, fds) = pod.execd.packet().unwrap();
        assert!(streams.terminal && !streams.stdin && fds.len() == 2);
        let mut files = fds.into_iter().map(fs::File::from);
        assert_eq!(read_all(files.next().unwrap()), "out\r\n");
        assert_eq!(read_all(files.next().unwrap()), "err\n");
        assert_eq!(guest.wait(pid), 0);
    });
}

#[test]
fn streams_are_numbers_and_different() {
    guest(|guest| {
        let mut pod = pod(guest);
        for (more, why) in [
            (json!({"stdio": 0}), "stdio is 0"),
            (json!({"stderr": 0}), "stderr is 0"),
            (json!({"stdio": 5, "stderr": 5}), "the same stream"),
        ] {
            let request = pod.request("web", false, more);
            let fault = pod.execd.started(&request).unwrap_err();
            assert!(fault.to_string().contains(why), "{fault}");
        }
        assert!(pod.execd.packet().is_none(), "streamd has heard nothing");
        let fault = pod.exec("nobody", json!({})).err().unwrap();
        assert!(fault.is(Errno::ENOENT), "{fault}");
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

/// One system call of the default profile that fails, each by the errno that the profile says.
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
        ("bpf", 321, [0; 6], EPERM),
        ("x32 mount", 0x4000_0000 | 165, [0; 6], Errno::ENOSYS as i32),
        // And some that pass, with the kernel's own answer or none.
        ("unshare of nothing", 272, [0; 6], 0),
        ("ioctl TCGETS of a pipe", 16, [0, 0x5401, probe::BASE, 0, 0, 0], Errno::ENOTTY as i32),
        ("socket AF_UNIX", 41, [1, 1, 0, 0, 0, 0], 0),
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

#[test]
fn a_new_streamd_gets_the_output_again_and_no_stdin() {
    guest(|guest| {
        let mut pod = pod(guest);
        let piped = pod.exec("web", json!({"args": ["/bin/cat"]})).unwrap();
        let tty = pod.exec("web", json!({"args": ["/bin/cat"], "terminal": true})).unwrap();
        let finished = pod.exec("web", json!({})).unwrap();
        guest.wait(finished.pid);
        pod.execd.done(&execd::Request::Release { stdio: finished.streams.stdio }).unwrap();
        let (pid, mut stdin) = (piped.pid, piped.stdin.unwrap());
        // The first streamd is gone with all that it had but one thing.
        drop((piped.out, piped.err));
        pod.execd.done(&execd::Request::Resend).unwrap();
        let (first, mut fds) = pod.execd.packet().unwrap();
        assert_eq!((first.stdio, first.again, first.stdin, fds.len()), (piped.streams.stdio, true, false, 2));
        let (second, _) = pod.execd.packet().unwrap();
        assert_eq!((second.stdio, second.terminal), (tty.streams.stdio, true));
        assert!(pod.execd.packet().is_none(), "what is finished is not sent");
        stdin.write_all(b"still here").unwrap();
        drop(stdin);
        assert_eq!(guest.wait(pid), 0, "execd has no duplicate of stdin: the process sees its end");
        pod.execd.done(&execd::Request::Release { stdio: first.stdio }).unwrap();
        assert_eq!(read_all(fs::File::from(fds.remove(0))), "still here");
    });
}

#[test]
fn what_is_kept_is_let_go() {
    guest(|guest| {
        let mut pod = pod(guest);
        let open =
            |pod: &Pod<'_>| fs::read_dir(format!("/proc/{}/fd", pod.execd.helper.pid())).unwrap().count();
        let before = open(&pod);
        for _ in 0..50 {
            let running = pod.exec("web", json!({})).unwrap();
            guest.wait(running.pid);
            pod.execd.done(&execd::Request::Release { stdio: running.streams.stdio }).unwrap();
            assert!(pod.exec("web", json!({"user": "nobody"})).is_err());
        }
        assert_eq!(open(&pod), before);
    });
}

#[test]
fn without_streamd_nothing_starts() {
    guest(|guest| {
        let mut pod = pod(guest);
        let root = Path::new(paths::LOCAL_SHARE).join("web/rootfs");
        program(&root, "ran", b"#!/bin/sh\n: >/ran\n", 0o755);
        let (_ours, theirs) = socket_pair();
        let streamd = std::mem::replace(&mut pod.execd.streamd, theirs);
        drop(streamd);
        let fault = pod.exec("web", json!({"args": ["/bin/ran"]})).err().unwrap();
        assert!(fault.is(Errno::EPIPE) && fault.doing == "handing to streamd", "{fault}");
        // The next start is after the end of the one before: its process was killed in its place.
        assert!(pod.exec("web", json!({"user": "nobody"})).is_err());
        assert!(!root.join("ran").exists());
    });
}

/// Whoever waits for its release sees execd's end, and leaves.
#[test]
fn a_start_that_was_not_released_runs_nothing() {
    guest(|guest| {
        let mut pod = pod(guest);
        let root = Path::new(paths::LOCAL_SHARE).join("web/rootfs");
        program(&root, "ran", b"#!/bin/sh\n: >/ran\n", 0o755);
        let request = pod.request("web", false, json!({"args": ["/bin/ran"]}));
        // Its reply comes before the release, and nobody takes it.
        assert!(!pod.execd.helper.ask_and_leave(&request).success());
        let (_, fds) = pod.execd.packet().unwrap();
        let mut files = fds.into_iter().map(fs::File::from).skip(1);
        assert_eq!(read_all(files.next().unwrap()), "");
        assert_eq!(read_all(files.next().unwrap()), "execd died before this process was released\n");
        assert!(!root.join("ran").exists());
    });
}

#[test]
fn an_execd_that_dies_takes_nobody_along() {
    guest(|guest| {
        let mut pod = pod(guest);
        let mut running = pod.exec("web", json!({"args": ["/bin/cat"]})).unwrap();
        let mut stdin = running.stdin.take().unwrap();
        stdin.write_all(b"released").unwrap();
        read_to(&running.out, "released");
        pod.execd.helper.kill();
        stdin.write_all(b"alive").unwrap();
        drop(stdin);
        assert_eq!(read_all(running.out), "alive");
        assert_eq!(guest.wait(running.pid), 0);
        pod.execd = Execd::start(&[]);
        pod.execd.done(&execd::Request::JoinPod).unwrap();
        assert_eq!(pod.shell("web", "echo again"), "again");
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

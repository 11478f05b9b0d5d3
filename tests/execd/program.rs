//! What a process is told: arguments, environment, users, workdir, limits; and programs that cannot be
//! executed.

use super::*;

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
        assert_eq!(id(json!({})), "uid=0(root) gid=0(root) groups=0(root)");
        assert_eq!(id(json!({"user": "web"})), "uid=33(web) gid=34(www) groups=29(audio),34(www),44(video)");
        assert_eq!(id(json!({"user": "33"})), "uid=33(web) gid=34(www) groups=29(audio),34(www),44(video)");
        assert_eq!(
            id(json!({"user": "web", "group": "audio"})),
            "uid=33(web) gid=29(audio) groups=29(audio),44(video)"
        );
        let more = json!({"user": "4711", "group": "42", "additionalGroups": ["audio", "77"]});
        assert_eq!(id(more), "uid=4711 gid=42 groups=29(audio),42,77");
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
        assert_eq!(pod.run("web", json!({"args": ["/bin/id"], "user": "7"})).1, "uid=7 gid=0 groups=0\n");
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
        // The kernel counts these as root's, and lets nobody of root's with a lower limit send any: execd
        // hears of the tty before.
        let (_unread, sender) = support::pod::socket_pair();
        for _ in 0..20 {
            hyperinit::sys::fd::send_fds(&sender, b"x", &[std::os::fd::AsFd::as_fd(&sender); 3]).unwrap();
        }
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

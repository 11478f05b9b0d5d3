//! The environment, user, terminal and limits of a process.

use hyperinit::command::{Command, WinSize};
use serde_json::{Value, json};

use crate::guest::{Guest, Kind, refusal};

pub fn the_environment_is_the_protocols(guest: &Guest) {
    let main = guest.sleeper("env");
    let env = |args: &[&str], more: Value| guest.exec("env", args, more).outcome().stdout;
    let sorted = |text: String| {
        let mut lines: Vec<_> = text.lines().map(|line| line.trim_end().to_owned()).collect();
        lines.sort();
        lines
    };
    assert_eq!(
        sorted(env(&["env"], json!({}))),
        ["HOME=/root", "HOSTNAME=pod-1", "PATH=/usr/local/bin:/usr/bin:/bin:.", "USER=root"]
    );
    let more =
        json!({"user": "web", "envs": [{"env": "HOME", "value": "/h"}, {"env": "A", "value": "b=c d"}]});
    assert_eq!(sorted(env(&["/bin/env"], more)), ["A=b=c d", "HOME=/h", "HOSTNAME=pod-1", "USER=web"]);
    assert_eq!(
        sorted(env(&["/bin/env"], json!({"user": "4711", "terminal": true, "stderr": 0}))),
        ["HOME=/", "HOSTNAME=pod-1", "TERM=xterm"]
    );
    guest.finish(main);
}

pub fn large_commands_arrive_whole(guest: &Guest) {
    // A request above 4 KiB goes to its helper in shared memory.
    let word: String = (0..20_000).map(|number| format!("{number},")).collect();
    let envs = json!([{"env": "LARGE", "value": word}]);
    let more = json!({"process": {"envs": envs}});
    let main = guest.container("big", &["sh", "-c", "printf %s \"$LARGE\"; cat"], more);
    assert!(main.read_until("19999,") == word, "a container's");
    let outcome = guest.exec("big", &["printf", "%s", &word], json!({"envs": envs})).outcome();
    assert_eq!((outcome.status, outcome.stderr.as_str()), (0, ""));
    assert!(outcome.stdout == word, "a process's");
    assert_eq!(main.outcome().status, 0);
    guest.remove("big");
}

pub fn users_and_groups_are_the_containers(guest: &Guest) {
    let main = guest.sleeper("users");
    let id = |more: Value| guest.exec("users", &["id"], more).outcome().stdout;
    assert_eq!(id(json!({})), "uid=0(root) gid=0(root) groups=0(root)\n");
    assert_eq!(id(json!({"user": "web"})), "uid=33(web) gid=34(www) groups=29(audio),34(www)\n");
    assert_eq!(id(json!({"user": "33", "group": "audio"})), "uid=33(web) gid=29(audio) groups=29(audio)\n");
    let more = json!({"user": "4711", "group": "42", "additionalGroups": ["audio", "77"]});
    assert_eq!(id(more), "uid=4711 gid=42 groups=29(audio),42,77\n");
    for (more, why) in [
        (json!({"user": "nobody"}), ["nobody", "no such user"]),
        (json!({"group": "wheel"}), ["wheel", "no such group"]),
        (json!({"additionalGroups": ["audio", "wheel"]}), ["wheel", "no such group"]),
        (json!({"workdir": "/nowhere"}), ["workdir", "/nowhere"]),
        (json!({"workdir": "/etc/passwd"}), ["workdir", "/etc/passwd"]),
        (json!({"rlimits": [{"type": "RLIMIT_X", "soft": 1, "hard": 1}]}), ["rlimit", "RLIMIT_X"]),
        (
            json!({"rlimits": [{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 8}]}),
            ["NOFILE", "soft is above hard"],
        ),
    ] {
        let text = refusal(guest.try_exec("users", &["true"], more));
        assert!(why.iter().all(|why| text.contains(why)), "{text}");
    }
    // The refused starts have left nothing behind, and an account that is made now is known at once.
    guest.says("users", "echo new:x:77:78::/new:/bin/sh >>/etc/passwd");
    assert_eq!(id(json!({"user": "new"})), "uid=77(new) gid=78 groups=78\n");
    guest.says("users", "echo more:x:79:new >>/etc/group");
    assert_eq!(id(json!({"user": "77"})), "uid=77(new) gid=78 groups=78,79(more)\n");
    guest.finish(main);
}

pub fn a_process_starts_clean(guest: &Guest) {
    let main = guest.sleeper("clean");
    let script = "umask; pwd; ls /proc/self/fd; ps -o pid,pgid,sid | grep \" $$ *$$ *$$\" | wc -l; ulimit -n; ulimit -Hn";
    let more = json!({"workdir": "/tmp", "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 99, "hard": 100}]});
    let outcome = guest.exec("clean", &["sh", "-c", script], more).outcome();
    // 3 is the directory that ls reads.
    assert_eq!(outcome.stdout, "0022\n/tmp\n0\n1\n2\n3\n1\n99\n100\n", "{}", outcome.stderr);
    let files = guest.says("clean", "ulimit -Sn; ulimit -Hn");
    let numbers: Vec<u64> = files.lines().map(|number| number.parse().unwrap()).collect();
    // The limits are those of Docker. A local guest cannot exceed the machine's.
    assert!(numbers[0] == 1024 && numbers[1] <= 524_288, "{files}");
    assert!(numbers[1] == 524_288 || guest.kind == Kind::Local, "{files}");
    let status = guest.exec("clean", &["cat", "/proc/self/status"], json!({})).outcome().stdout;
    for line in [
        "SigBlk:\t0000000000000000",
        "SigIgn:\t0000000000000000",
        "CapInh:\t0000000000000000",
        "CapEff:\t00000000a80425fb",
        "CapBnd:\t00000000a80425fb",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t0",
        "Seccomp:\t2",
    ] {
        assert!(status.contains(line), "{line} is not in {status}");
    }
    let status = guest.exec("clean", &["cat", "/proc/self/status"], json!({"user": "web"})).outcome().stdout;
    assert!(
        status.contains("CapEff:\t0000000000000000") && status.contains("CapPrm:\t0000000000000000"),
        "{status}"
    );
    assert_eq!(guest.says("clean", "cat /proc/self/oom_score_adj"), "0\n");
    guest.finish(main);
}

pub fn a_workdir_is_made_at_the_first_start_only(guest: &Guest) {
    let process = json!({"workdir": "/srv/made/deep"});
    let image = guest.image("workdir");
    let text =
        refusal(guest.try_container("workdir", &["true"], json!({"image": "workdir", "process": process})));
    assert!(text.contains("/srv/made/deep"), "{text}");
    assert!(!image.join("srv").exists());
    let more = json!({"image": "workdir", "initialize": true, "process": process});
    assert_eq!(
        guest.container_says("workdir", "pwd; stat -c '%u %g %a' .", more),
        "/srv/made/deep\n0 0 755\n"
    );
    // The directory exists now.
    let more = json!({"image": "workdir", "process": process});
    assert_eq!(guest.container_says("workdir", "pwd", more), "/srv/made/deep\n");
}

pub fn setuid_programs_work(guest: &Guest) {
    let main = guest.sleeper("setuid");
    guest.says("setuid", "cp /bin/busybox /tmp/ping && chmod 4755 /tmp/ping");
    // A raw socket needs a capability that a user does not have.
    let ping =
        |path: &str| guest.exec("setuid", &[path, "-c", "1", "127.0.0.1"], json!({"user": "web"})).outcome();
    assert_ne!(ping("/bin/ping").status, 0);
    let outcome = ping("/tmp/ping");
    assert_eq!(outcome.status, 0, "{}{}", outcome.stdout, outcome.stderr);
    guest.finish(main);
}

pub fn a_terminal_is_one(guest: &Guest) {
    let main = guest.sleeper("tty");
    let terminal = |script: &str| {
        guest.exec("tty", &["sh", "-c", script], json!({"terminal": true, "stderr": 0, "user": "web"}))
    };
    let running =
        terminal("tty; stat -c '%u %g %a' $(tty); echo to-tty >/dev/tty; read x; echo got $x; exit 3");
    running.read_until("to-tty\r\n");
    running.streams.stdin.write(b"typed\n").unwrap();
    let outcome = running.end();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("typed\r\ngot typed\r\n", 3), "with its echo");
    let outcome = terminal("stat -c '%u %g %a' $(tty)").outcome();
    assert_eq!(outcome.stdout, "33 5 620\r\n", "the user's and the group tty's");

    let running = terminal("trap 'stty size; exit 4' WINCH; stty size; echo ready; while :; do read x; done");
    running.read_until("ready\r\n");
    running.resize(42, 123);
    let outcome = running.end();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("42 123\r\n", 4));

    let running =
        terminal("trap 'echo interrupted; exit 5' INT; stty -echo; echo ready; while :; do read x; done");
    running.read_until("ready\r\n");
    running.streams.stdin.write(b"\x03").unwrap();
    let outcome = running.end();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("interrupted\r\n", 5));

    let pipes = guest.exec("tty", &["sh", "-c", "tty; [ -t 0 ] || [ -t 1 ] || read x"], json!({}));
    let size =
        WinSize { container: pipes.container.clone(), process: pipes.process.clone(), row: 1, column: 1 };
    assert!(guest.refused(Command::WinSize(size)).contains("the process has no terminal"));
    let outcome = pipes.outcome();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("not a tty\n", 1));

    let more = json!({"terminal": true});
    let outcome = guest.exec("tty", &["sh", "-c", "echo out; echo err >&2"], more).outcome();
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\r\n", "err\n"), "stderr of its own");
    guest.finish(main);
}

pub fn an_inits_terminal_is_the_console(guest: &Guest) {
    let more = json!({"process": {"terminal": true, "stderr": 0}});
    let script = "echo console >/dev/console; tty; exit 6";
    let outcome = guest.container("console", &["sh", "-c", script], more).outcome();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("console\r\n/dev/pts/0\r\n", 6));
    guest.remove("console");
}

pub fn a_container_may_not_what_it_has_no_business_with(guest: &Guest) {
    let main = guest.sleeper("denied");
    for script in [
        "mount -t tmpfs x /tmp",
        "unshare -m true",
        "hostname other",
        "mknod /tmp/disk b 8 0 && cat /tmp/disk",
        "echo 1 >/proc/sys/kernel/panic",
        "echo b >/proc/sysrq-trigger",
        "umount /proc",
        "chroot / mount -o remount,rw /sys",
        "nsenter -t 1 -m true",
    ] {
        let outcome = guest.sh("denied", script);
        assert_ne!(outcome.status, 0, "{script}: {}{}", outcome.stdout, outcome.stderr);
    }
    guest.finish(main);
}

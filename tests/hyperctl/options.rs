//! Tests the options of `run` and `exec` by what the program sees.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;

use super::guest::make_rootfs;
use super::run::{left, run};
use super::{finish, hyperctl_path, output, read_until, scratch, signal, spawn, text};

/// The output of a run whose exit status is 0 and whose stderr is empty.
fn said(options: &[&str], script: &str) -> String {
    let output = output(run(options, script).0);
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""), "{options:?}");
    text(&output.stdout).to_owned()
}

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[test]
fn a_program_has_dockers_environment() {
    let env = "env | grep -v '^_=\\|^SHLVL=\\|^PWD=' | sort";
    let words = format!("HOME=/root\nHOSTNAME=hyperinit\nPATH={PATH}\nUSER=root\n");
    assert_eq!(said(&[], env), words);
    assert_eq!(said(&["-u", "12345"], "echo $HOME"), "/\n");
    // The environment is the same for a program named by an absolute path, and programs in the sbin
    // directories are found.
    let (_, directory) = run(&[], "");
    let rootfs = directory.path().join("rootfs");
    fs::create_dir_all(rootfs.join("usr/local/sbin")).unwrap();
    fs::copy(rootfs.join("bin/busybox"), rootfs.join("usr/local/sbin/env")).unwrap();
    for program in ["env", "/bin/busybox"] {
        let mut command = Command::new(hyperctl_path());
        command.args(["run", "--local", "-e", "A=1", "--rootfs"]).arg(&rootfs).args([program, "env"]);
        command.stdin(Stdio::null());
        let output = output(command);
        let lines: Vec<_> = text(&output.stdout).lines().collect();
        assert!(lines.contains(&format!("PATH={PATH}").as_str()) && lines.contains(&"A=1"), "{lines:?}");
    }
    // The working directory is not searched for the program.
    let output = output(run(&["-w", "/bin", "-e", "PATH=/nowhere"], "true").0);
    assert_eq!(output.status.code(), Some(127));
}

#[test]
fn variables_come_from_files_and_from_here() {
    let directory = scratch();
    let file = directory.path().join("env");
    fs::write(&file, "# words\nA=of the file\nB='two  words' \nFROM_HERE\nNOWHERE\n").unwrap();
    let script = "echo \"$A/$B/$FROM_HERE/${NOWHERE-unset}/${ALSO-unset}\"";
    let options = ["--env-file", file.to_str().unwrap(), "-e", "A=1", "-e", "ALSO"];
    let (mut command, _directory) = run(&options, script);
    command.env("FROM_HERE", "h").env_remove("NOWHERE").env("ALSO", "a=b");
    let first = output(command);
    assert_eq!(text(&first.stdout), "1/'two  words' /h/unset/a=b\n", "{}", text(&first.stderr));
    let (mut command, _directory) = run(&["-e", "LATIN"], "true");
    command.env("LATIN", OsStr::from_bytes(b"\xe4"));
    let second = output(command);
    assert_eq!(second.status.code(), Some(125));
    assert!(text(&second.stderr).contains("passing on LATIN: "), "{}", text(&second.stderr));
    let third = output(run(&["--env-file", "/nowhere/env"], "true").0);
    assert!(text(&third.stderr).contains("/nowhere/env: No such file"), "{}", text(&third.stderr));
}

#[test]
fn a_run_says_what_docker_says() {
    let script =
        "hostname; echo $HOSTNAME; cat /proc/sys/kernel/shmmni; ulimit -n; ulimit -Hn; ulimit -c; id -G";
    let options = [
        "--hostname",
        "web-1",
        "--sysctl",
        "kernel.shmmni=1234",
        "--ulimit",
        "nofile=100:200",
        "--ulimit",
        "core=0",
        "--group-add",
        "audio",
        "--group-add",
        "4321",
        "-u",
        "web",
    ];
    let lines = said(&options, script);
    let lines: Vec<_> = lines.lines().collect();
    assert_eq!(lines[..6], ["web-1", "web-1", "1234", "100", "200", "0"]);
    let audio = said(&[], "sed -n 's/^audio:[^:]*:\\([0-9]*\\):.*/\\1/p' /etc/group");
    let groups: Vec<_> = lines[6].split(' ').collect();
    assert!(groups.contains(&"4321") && groups.contains(&audio.trim_end()), "{groups:?}, {audio:?}");
}

/// A parent that reaps orphans is there with and without `--init`.
#[test]
fn what_a_program_leaves_is_reaped() {
    let script = "(sleep 0.01 & echo $! >/tmp/left); left=$(cat /tmp/left); \
         while [ -e /proc/$left ]; do sleep 0.01; done; echo $$ >/tmp/own; [ $$ != 1 ] && echo reaped";
    for options in [&["--init"][..], &[]] {
        assert_eq!(said(options, script), "reaped\n");
    }
}

#[test]
fn a_directory_in_memory_is_empty_writable_and_gone() {
    for options in [&["--read-only"][..], &["--read-only", "--vm"]] {
        let options = [options, &["--tmpfs", "/run/mine", "--tmpfs", "/tmp", "-u", "web"]].concat();
        let (command, directory) = run(&options, "ls -A /tmp; echo x >/tmp/x && grep ' /tmp ' /proc/mounts");
        for place in ["run/mine", "tmp"] {
            fs::create_dir_all(directory.path().join("rootfs").join(place)).unwrap();
        }
        fs::write(directory.path().join("rootfs/tmp/old"), "").unwrap();
        let output = output(command);
        let mount = text(&output.stdout);
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), ""));
        assert_eq!(mount.lines().count(), 1, "{mount}");
        let words: Vec<_> = mount.split([' ', ',']).collect();
        for word in ["tmpfs", "rw", "nosuid", "nodev", "noexec"] {
            assert!(words.contains(&word), "{mount}");
        }
        assert!(!directory.path().join("rootfs/tmp/x").exists());
    }
}

#[test]
fn a_file_is_bound_in_place() {
    for kind in [&[][..], &["--vm"]] {
        let beside = scratch();
        let [conf, other] = ["x.conf", "y.conf"].map(|name| beside.path().join(name));
        fs::write(&conf, "one\n").unwrap();
        fs::write(&other, "two\n").unwrap();
        let volumes =
            [format!("{}:/etc/x.conf:rw", conf.display()), format!("{}:/new/y:ro", other.display())];
        let options = [kind, &["-v", &volumes[0], "-v", &volumes[1]]].concat();
        let (command, directory) =
            run(&options, "cat /etc/x.conf /new/y; echo word >>/etc/x.conf; echo x >/new/y || echo ro");
        let output = output(command);
        assert_eq!(text(&output.stdout), "one\ntwo\nro\n", "{}", text(&output.stderr));
        assert_eq!(fs::read_to_string(&conf).unwrap(), "one\nword\n");
        assert_eq!(fs::read_to_string(&other).unwrap(), "two\n");
        assert_eq!(left(&directory), Vec::<PathBuf>::new());
    }
}

#[test]
fn paths_need_not_be_text() {
    let directory = scratch();
    let [rootfs, data] = [&b"r\xe4"[..], b"d\xff"].map(|name| directory.path().join(OsStr::from_bytes(name)));
    make_rootfs(&rootfs);
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "read\n").unwrap();
    let mut volume = data.into_os_string();
    volume.push(":/data");
    for kind in ["--local", "--vm"] {
        let mut command = Command::new(hyperctl_path());
        command
            .args(["run", kind, "--rootfs"])
            .arg(&rootfs)
            .args(["cat", "/etc/passwd"])
            .stdin(Stdio::null());
        let alone = output(command);
        assert!(text(&alone.stdout).starts_with("root:"), "{kind}: {}", text(&alone.stderr));
        let mut command = Command::new(hyperctl_path());
        command
            .args(["run", kind, "--rootfs"])
            .arg(&rootfs)
            .arg("-v")
            .arg(&volume)
            .args(["cat", "/data/file"]);
        command.stdin(Stdio::null());
        let both = output(command);
        assert_eq!(text(&both.stdout), "read\n", "{kind}: {}", text(&both.stderr));
    }
}

#[test]
fn a_working_directory_that_is_none_is_refused() {
    let output = output(run(&["-w", "relative"], "true").0);
    assert_eq!(output.status.code(), Some(125));
    let says = "the working directory 'relative' is invalid, it needs to be an absolute path";
    assert!(text(&output.stderr).contains(says), "{}", text(&output.stderr));
}

#[test]
fn what_a_killed_hyperctl_leaves_goes_with_the_next() {
    let (mut command, directory) = run(&[], "echo up; sleep 1000");
    let mut killed = spawn(command.stdout(Stdio::piped()));
    read_until(&mut killed.stdout.take().unwrap(), "up\n");
    let mut command = Command::new(hyperctl_path());
    command.env("TMPDIR", directory.path()).args(["run", "--local", "-i", "--rootfs"]);
    command.arg(directory.path().join("rootfs")).args(["sh", "-c", "echo up; cat"]);
    let mut other = spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let mut stdout = other.stdout.take().unwrap();
    read_until(&mut stdout, "up\n");
    assert_eq!(left(&directory).len(), 2);
    signal(&killed, Signal::SIGKILL);
    finish(killed);
    assert_eq!(left(&directory).len(), 2, "nobody has come by");

    let mut command = Command::new(hyperctl_path());
    command.env("TMPDIR", directory.path()).args(["run", "--local", "--rootfs"]);
    command.arg(directory.path().join("rootfs")).args(["echo", "third"]).stdin(Stdio::null());
    assert_eq!(text(&output(command).stdout), "third\n");
    assert_eq!(left(&directory).len(), 1, "only the other's is left");
    drop(other.stdin.take());
    assert_eq!(finish(other).status.code(), Some(0));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

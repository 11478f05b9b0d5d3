//! `hyperctl run`: runs one program in a guest, a pod and a container of its own.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use hyperinit::sys::tty;
use nix::pty::openpty;
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, tcgetattr};

use super::guest::{BOOT, make_rootfs};
use super::{Running, elsewhere, finish, hyperctl_path, output, read_until, scratch, signal, spawn, text};

/// `hyperctl run --local` in a new root filesystem, with more options.
pub fn run(options: &[&str], script: &str) -> (Command, tempfile::TempDir) {
    let directory = scratch();
    let rootfs = directory.path().join("rootfs");
    make_rootfs(&rootfs);
    let mut command = Command::new(hyperctl_path());
    // hyperctl must remove what it makes for itself.
    command.env("TMPDIR", directory.path());
    command.arg("run");
    if !options.contains(&"--vm") {
        command.arg("--local");
    }
    command.args(options).arg("--rootfs").arg(&rootfs).args(["--", "sh", "-c", script]);
    command.stdin(Stdio::null());
    (command, directory)
}

/// The files in the directory of a run besides its root filesystem.
pub fn left(directory: &tempfile::TempDir) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| !path.ends_with("rootfs")).collect()
}

#[test]
fn a_run_is_its_program() {
    let (command, directory) = run(
        &["-e", "A=a b", "-e", "B=", "-w", "/made/here", "-u", "web:audio"],
        "echo \"$A/$B/$PWD/$(id -un)/$(id -gn)\"; echo err >&2; cat; exit 7",
    );
    let output = output(command);
    assert_eq!(text(&output.stdout), "a b///made/here/web/audio\n", "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "err\n");
    assert_eq!(output.status.code(), Some(7));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

/// The guest assembles its root over /tmp, visible only to itself.
#[test]
fn a_local_guest_does_not_change_the_mode_of_the_machines_tmp() {
    // The checkout may be below /tmp itself. The working directory is still the one that the new /tmp hides.
    let script = "mount -t tmpfs -o mode=1777 tmpfs /tmp && mkdir -p \"$PWD\" && mount -c --bind . \"$PWD\" \
                  && \"$0\" run --local --rootfs .cache/rootfs true && stat -c %a /tmp";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, hyperctl_path()]).env("TMPDIR", "/tmp");
    let output = output(command);
    assert_eq!((text(&output.stdout), text(&output.stderr)), ("1777\n", ""));
}

#[test]
fn a_program_that_is_killed_or_cannot_be_started_has_a_shells_status() {
    assert_eq!(output(run(&[], "kill -9 $$").0).status.code(), Some(137));
    assert_eq!(output(run(&[], "exec nothing-of-this-name").0).status.code(), Some(127));
    let refused = output(run(&["-u", "nobody-of-this-name"], "true").0);
    assert_eq!(refused.status.code(), Some(125));
    assert!(text(&refused.stderr).starts_with("hyperctl: starting the container: execd: "));
    let read_only = output(run(&["--read-only"], "echo x >/file || exit 3").0);
    assert_eq!(read_only.status.code(), Some(3));
}

#[test]
fn what_goes_in_comes_out() {
    let (mut command, _directory) = run(&["-i"], "cat");
    let mut child = spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let bytes: Vec<u8> = (0..4u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut stdin = child.stdin.take().unwrap();
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent));
    let output = finish(child);
    writer.join().unwrap().unwrap();
    assert!(output.stdout == bytes, "{} of {} bytes", output.stdout.len(), bytes.len());
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_reader_that_leaves_ends_the_run() {
    let (mut command, directory) = run(&[], "yes");
    let mut child = spawn(command.stdout(Stdio::piped()));
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 4]).unwrap();
    drop(stdout);
    assert_eq!(finish(child).status.code(), Some(128 + Signal::SIGPIPE as i32));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

#[test]
fn signals_are_the_programs() {
    for (number, status) in [(Signal::SIGTERM, 15), (Signal::SIGINT, 2), (Signal::SIGHUP, 1)] {
        let traps =
            "for s in 1 2 15; do trap \"exit $s\" $s; done; echo up; while :; do sleep 100 & wait; done";
        let (mut command, directory) = run(&[], traps);
        let mut child = spawn(command.stdout(Stdio::piped()));
        let mut stdout = child.stdout.take().unwrap();
        read_until(&mut stdout, "up\n");
        signal(&child, number);
        assert_eq!(finish(child).status.code(), Some(status));
        assert_eq!(left(&directory), Vec::<PathBuf>::new());
    }
}

#[test]
fn output_that_cannot_be_written_is_told() {
    let (mut command, directory) = run(&[], "echo said");
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = finish(spawn(command.stdout(full).stderr(Stdio::piped())));
    let says = "hyperctl: writing what the program says: No space left on device\n";
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(141), says));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

/// Every thread of hyperctl has these signals blocked.
#[test]
fn two_signals_at_once_do_not_end_hyperctl() {
    for round in 0..10 {
        let traps = "trap '' HUP; trap 'exit 7' TERM; echo up; while :; do sleep 100 & wait; done";
        let (mut command, directory) = run(&[], traps);
        let mut child = spawn(command.stdout(Stdio::piped()));
        let mut stdout = child.stdout.take().unwrap();
        read_until(&mut stdout, "up\n");
        signal(&child, Signal::SIGTERM);
        signal(&child, Signal::SIGHUP);
        assert_eq!(finish(child).status.code(), Some(7), "round {round}");
        assert_eq!(left(&directory), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_bench_that_is_ended_leaves_nothing() {
    // Ended once while the floor is measured, and once while the guest is.
    for (place, rounds) in [("floor", "100000"), ("guest", "1")] {
        let directory = scratch();
        let rootfs = directory.path().join("rootfs");
        make_rootfs(&rootfs);
        let mut command = Command::new(hyperctl_path());
        command.env("TMPDIR", directory.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            spawn(command.args(["bench", "--local", "--rounds", rounds, "--rootfs"]).arg(&rootfs));
        let is_there = || left(&directory).iter().any(|path| path.join(place).join("ctl.sock").exists());
        let deadline = Instant::now() + BOOT;
        while !is_there() {
            assert_eq!(child.try_wait().unwrap(), None, "{place}");
            assert!(Instant::now() < deadline, "{place} does not come up");
            std::thread::yield_now();
        }
        signal(&child, Signal::SIGINT);
        let output = finish(child);
        assert_eq!((output.status.code(), text(&output.stdout)), (Some(130), ""), "{}", text(&output.stderr));
        assert_eq!(left(&directory), Vec::<PathBuf>::new());
    }
}

#[test]
fn a_program_that_heeds_no_signal_is_ended_by_the_third() {
    let (mut command, directory) =
        run(&[], "trap 'echo no' INT; echo up; while :; do sleep 100 & wait; done");
    let mut child = spawn(command.stdout(Stdio::piped()));
    let mut stdout = child.stdout.take().unwrap();
    read_until(&mut stdout, "up\n");
    for _ in 0..2 {
        signal(&child, Signal::SIGINT);
        read_until(&mut stdout, "no\n");
    }
    signal(&child, Signal::SIGINT);
    assert_eq!(finish(child).status.code(), Some(130));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

/// Two directories for volumes, each with a file.
fn two_directories(directory: &Path) -> [PathBuf; 2] {
    ["one", "two"].map(|name| {
        let path = directory.join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("file"), format!("{name}\n")).unwrap();
        path
    })
}

#[test]
fn directories_of_the_host_are_volumes() {
    let beside = scratch();
    let [one, two] = two_directories(beside.path());
    let volumes = [format!("{}:/mnt/one", one.display()), format!("{}:/mnt/two:ro", two.display())];
    let script =
        "cat /mnt/one/file /mnt/two/file; echo new >/mnt/one/new; touch /mnt/two/new 2>/dev/null || echo ro";
    let (command, directory) = run(&["-v", &volumes[0], "--volume", &volumes[1]], script);
    let said = output(command);
    assert_eq!(text(&said.stdout), "one\ntwo\nro\n", "{}", text(&said.stderr));
    assert_eq!(fs::read_to_string(one.join("new")).unwrap(), "new\n");
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
    assert!(directory.path().join("rootfs/bin/busybox").exists(), "what was bound is where it was");

    let image = beside.path().join("image");
    let mut superblock = vec![0; 2048];
    superblock[1080..1082].copy_from_slice(&[0x53, 0xef]);
    fs::write(&image, superblock).unwrap();
    for (source, says) in [
        (&image, "only a VM has disks, a local guest has none"),
        (&beside.path().join("nothing"), "No such file or directory"),
    ] {
        let (command, directory) = run(&["-v", &format!("{}:/mnt", source.display())], "true");
        let said = output(command);
        assert_eq!(said.status.code(), Some(125));
        assert!(text(&said.stderr).contains(says), "{}", text(&said.stderr));
        assert_eq!(left(&directory), Vec::<PathBuf>::new());
    }
}

#[test]
fn without_root_a_directory_or_a_file_is_bound_all_the_same() {
    let directory = scratch();
    let [one, two] = two_directories(directory.path());
    let (one, two) = (one.display(), two.display());
    for what in ["", "/file"] {
        let line = format!("exec-child --bind {one}{what} {two}{what} -- /bin/busybox cat {two}/file");
        let mut command = elsewhere(directory.path(), &line);
        command.uid(65_534).gid(65_534);
        let said = output(command);
        assert_eq!((text(&said.stdout), text(&said.stderr)), ("one\n", ""));
    }
    let unseen = fs::read_to_string(directory.path().join("two/file")).unwrap();
    assert_eq!(unseen, "two\n", "nobody else sees it");
}

#[test]
fn a_vm_has_directories_and_disks() {
    let beside = scratch();
    let [one, _] = two_directories(beside.path());
    let image = |name: &str, program: &str, size: u64| {
        let path = beside.path().join(name);
        File::create(&path).unwrap().set_len(size).unwrap();
        let made =
            Command::new(program).arg("-q").arg(&path).env("PATH", "/sbin:/usr/sbin:/bin:/usr/bin").status();
        assert!(made.unwrap_or_else(|error| panic!("{program}: {error}")).success());
        path
    };
    let (ext2, xfs) = (image("ext2.img", "mkfs.ext2", 16 << 20), image("xfs.img", "mkfs.xfs", 300 << 20));
    let volume = |source: &Path, rest: &str| format!("{}:{rest}", source.display());
    // Disks of volumes come after the disk of `--disk`.
    let mut options = vec!["--vm", "--disk", xfs.to_str().unwrap()];
    let volumes = [volume(&one, "/mnt/one"), volume(&ext2, "/ext2")];
    options.extend(volumes.iter().flat_map(|volume| ["-v", volume]));
    let script = "cat /mnt/one/file; echo word >/mnt/one/word; echo kept >/ext2/file; grep /ext2 /proc/mounts | cut -d ' ' -f 1,3";
    let said = output(run(&options, script).0);
    assert_eq!(text(&said.stdout), "one\n/dev/vdb ext4\n", "{}", text(&said.stderr));
    assert_eq!(fs::read_to_string(one.join("word")).unwrap(), "word\n");

    let volumes = [volume(&ext2, "/ext2:ro,fstype=ext4"), volume(&xfs, "/xfs")];
    let options: Vec<&str> =
        ["--vm"].into_iter().chain(volumes.iter().flat_map(|volume| ["-v", volume])).collect();
    let script = "cat /ext2/file; touch /ext2/new 2>/dev/null || echo ro; stat -f -c %T /xfs";
    let said = output(run(&options, script).0);
    assert_eq!(text(&said.stdout), "kept\nro\nxfs\n", "{}", text(&said.stderr));
}

/// Starts a run on a pty. Returns the master end, the terminal, and the child.
fn run_on_tty(options: &[&str], script: &str) -> (File, OwnedFd, Running, tempfile::TempDir) {
    let pty = openpty(None, None).unwrap();
    tty::set_size(&pty.slave, 33, 99).unwrap();
    let (mut command, directory) = run(options, script);
    let end = || Stdio::from(pty.slave.try_clone().unwrap());
    let child = spawn(command.stdin(end()).stdout(end()).stderr(end()));
    (File::from(pty.master), pty.slave, child, directory)
}

#[test]
fn a_terminal_is_passed_on_with_its_size_and_restored() {
    let script = "trap 'echo int; exit 9' INT; trap 'stty size' WINCH; \
         while [ \"$(stty size)\" != '33 99' ]; do sleep 0.01; done; echo ready; \
         while :; do sleep 100 & wait; done";
    let (mut master, slave, child, _directory) = run_on_tty(&["-t", "-i"], script);
    let cooked = LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG;
    let before = tcgetattr(&slave).unwrap();
    assert!(before.local_flags.contains(cooked));
    read_until(&mut master, "ready\r\n");
    assert!(!tcgetattr(&slave).unwrap().local_flags.intersects(cooked), "raw");
    tty::set_size(&slave, 44, 111).unwrap();
    signal(&child, Signal::SIGWINCH);
    read_until(&mut master, "44 111\r\n");
    master.write_all(b"\x03").unwrap();
    read_until(&mut master, "int\r\n");
    assert_eq!(finish(child).status.code(), Some(9));
    assert!(tcgetattr(&slave).unwrap() == before, "restored");
}

/// The container's terminal turns line feeds into line ends, and the caller's must not do so again. Keys of
/// the caller's terminal do not go to the container.
#[test]
fn a_terminal_that_only_shows_gets_each_line_end_once() {
    let (mut master, slave, child, _directory) = run_on_tty(&["-t"], "echo one; echo two; read word");
    let before = tcgetattr(&slave).unwrap();
    let text = read_until(&mut master, "two\r\n");
    assert!(text.ends_with("one\r\ntwo\r\n"), "{text:?}");
    assert!(tcgetattr(&slave).unwrap().local_flags == before.local_flags);
    signal(&child, Signal::SIGINT);
    assert_eq!(finish(child).status.code(), Some(130));
    assert!(tcgetattr(&slave).unwrap() == before, "restored");
}

#[test]
fn a_terminal_is_restored_when_hyperctl_is_told_to_end() {
    let (mut master, slave, child, _directory) = run_on_tty(&["-t", "-i"], "echo ready; sleep 100");
    let before = tcgetattr(&slave).unwrap();
    read_until(&mut master, "ready\r\n");
    signal(&child, Signal::SIGTERM);
    assert_eq!(finish(child).status.code(), Some(143));
    assert!(tcgetattr(&slave).unwrap() == before, "restored");
}

#[test]
fn a_guest_that_does_not_come_up_says_why() {
    let output = output(run(&["--append", "hyper_log=loud"], "true").0);
    assert_eq!(output.status.code(), Some(125));
    let says = text(&output.stderr);
    assert!(says.starts_with("hyperctl: running the guest: it ended (exit status: 2); "), "{says}");
    assert!(says.contains("its log ends with\n  hyperinit: no such log level"), "{says}");
}

#[test]
fn a_vm_runs_a_program_alike() {
    let script = "uname -s; cat; echo err >&2; exit 5";
    let (mut command, directory) = run(&["--vm", "-i"], script);
    let mut child = spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()));
    child.stdin.take().unwrap().write_all(b"in").unwrap();
    let output = finish(child);
    assert_eq!(text(&output.stdout), "Linux\nin", "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "err\n");
    assert_eq!(output.status.code(), Some(5));
    assert_eq!(left(&directory), Vec::<PathBuf>::new());
}

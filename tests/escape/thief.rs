//! The process that is being started, and the pod init: every container can see them, but they belong to the
//! guest.

use std::fs::{self, File};
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use serde_json::json;

use crate::guest::{Guest, Kind};
use crate::{arm, attack, said, say, told};

/// How long the thief works.
const SPREE: Duration = Duration::from_secs(4);
/// The names of execd's processes, until they execute another program, and of the pod init.
const PREY: [&str; 2] = ["execd", "podinit"];

/// The ways into a process that are open, of all that a root process of a container can try.
fn ways_into(pid: i32) -> Vec<&'static str> {
    let at = |name: &str| format!("/proc/{pid}/{name}");
    let mut open = Vec::new();
    let mut note = |way: &'static str, is_open: bool| open.extend(is_open.then_some(way));
    note("mem", File::open(at("mem")).is_ok());
    note(
        "fd",
        fs::read_dir(at("fd")).is_ok_and(|fds| fds.flatten().any(|fd| fs::metadata(fd.path()).is_ok())),
    );
    note("root", fs::read_dir(at("root/")).is_ok());
    note("cwd", fs::read_dir(at("cwd/")).is_ok());
    note("exe", File::open(at("exe")).is_ok());
    note("environ", File::open(at("environ")).is_ok_and(|file| file.read_at(&mut [0], 0).is_ok()));
    note("maps", File::open(at("maps")).is_ok());
    note("ns/mnt", File::open(at("ns/mnt")).is_ok());
    // A readable address of a static position-independent program is known only from its maps. The null page
    // is never mapped, and the kernel checks the right (EPERM) before the address (EFAULT).
    let mut byte = [0];
    let remote = [RemoteIoVec { base: 0, len: 1 }];
    let read = process_vm_readv(Pid::from_raw(pid), &mut [IoSliceMut::new(&mut byte)], &remote);
    note("process_vm_readv", read == Err(nix::errno::Errno::EFAULT));
    open
}

fn name(pid: i32) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/comm")).ok().map(|comm| comm.trim_end().to_owned())
}

/// In a container: tries every way into each process that has the name of execd's processes or of the pod
/// init.
fn steal() -> ! {
    say("ready");
    let until = Instant::now() + SPREE;
    let (mut seen, mut robbed) = (0, Vec::new());
    while Instant::now() < until {
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let Some(before) = name(pid).filter(|name| PREY.contains(&name.as_str())) else { continue };
            let open = ways_into(pid);
            // Meanwhile the process may have become its container's own program, which does not count.
            if name(pid).as_ref() != Some(&before) {
                continue;
            }
            seen += usize::from(before == "execd");
            if !open.is_empty() {
                robbed.push(format!("{before} by {}", open.join(", ")));
            }
        }
    }
    robbed.sort();
    robbed.dedup();
    say(&format!("seen {seen}"));
    say(&format!("robbed [{}]", robbed.join("; ")));
    std::process::exit(0)
}

/// Checks the thief itself: an ordinary process of the same user is open to every way.
#[test]
fn the_thief_knows_its_trade() {
    let mut child = Command::new("/bin/busybox").arg("cat").stdin(Stdio::piped()).spawn().unwrap();
    let open = ways_into(child.id().cast_signed());
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(open, ["mem", "fd", "root", "cwd", "exe", "environ", "maps", "ns/mnt", "process_vm_readv"]);
}

/// ptrace and theft of descriptors (CVE-2016-9962): before it becomes the container's, execd's process is in
/// the container's PID namespace with the guest's descriptors and capabilities.
#[test]
fn a_process_that_is_being_started_cannot_be_robbed() {
    if told("steal").is_some() {
        steal();
    }
    let guest = Guest::with_pod(Kind::Local);
    arm(&guest.image("thief"));
    let main = guest.container("thief", &["sleep", "100000"], json!({"image": "thief"}));
    let other = guest.sleeper("other");
    let test = "thief::a_process_that_is_being_started_cannot_be_robbed";
    let thief = attack(&guest, "thief", test, "steal", "all");
    thief.read_until("ready\n");
    let until = Instant::now() + SPREE;
    while Instant::now() < until {
        for container in ["thief", "other"] {
            assert_eq!(guest.exec(container, &["true"], json!({})).outcome().status, 0);
        }
    }
    let outcome = thief.end();
    assert_eq!(outcome.status, 0, "{}", outcome.stderr);
    let seen: usize = said(&outcome.stdout, "seen").parse().unwrap();
    assert!(seen >= 10, "it has met {seen} processes only");
    assert_eq!(said(&outcome.stdout, "robbed"), "[]");
    guest.finish(other);
    guest.finish(main);
}

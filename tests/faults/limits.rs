//! Want that lasts: processes of the guest that get no descriptor at all, and files for which there is no
//! space.

use std::os::unix::process::CommandExt;

use serde_json::json;

use super::guest::processes::{process, status};
use super::guest::{Guest, Kind, refusal};
use super::witness::Witness;
use super::{SIZE, answers, data_file, everything, write};
use hyperinit::command::Command;

/// A limit of a running process, as long as this lives.
pub struct Limited {
    pid: i32,
    resource: &'static str,
    old: String,
}

impl Limited {
    /// The resource as prlimit(1) has it, and as /proc has.
    fn new(pid: i32, resource: &'static str, name: &str, most: u64) -> Limited {
        let text = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        let old = line.split_whitespace().next().unwrap().to_owned();
        assert!(limit(pid, resource, &most.to_string()));
        Limited { pid, resource, old }
    }

    /// No descriptor but the standard ones.
    fn descriptors(pid: i32) -> Limited {
        Limited::new(pid, "nofile", "Max open files", 3)
    }

    /// No more memory than it has.
    pub fn address_space(pid: i32) -> Limited {
        Limited::new(pid, "as", "Max address space", 4096)
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        // One that died has none.
        if std::path::Path::new(&format!("/proc/{}", self.pid)).exists() {
            limit(self.pid, self.resource, &self.old);
        }
    }
}

/// Sets a limit. The hard one stays: it could not be raised again. A helper may be a user of its own, and
/// only that one may limit it.
fn limit(pid: i32, resource: &str, most: &str) -> bool {
    let user: u32 = status(pid, "Uid").split_whitespace().next().unwrap().parse().unwrap();
    let mut prlimit = std::process::Command::new("prlimit");
    prlimit.arg(format!("--pid={pid}")).arg(format!("--{resource}={most}:")).uid(user).gid(user);
    prlimit.status().unwrap().success()
}

#[test]
fn pid_1_without_a_descriptor_left_goes_on() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let limited = Limited::descriptors(witness.init);
    assert!(guest.refused(write(SIZE)).contains("init: sharing memory: Too many open files"));
    guest.call(write(100));
    assert_eq!(guest.call(Command::ReadFile(data_file())).len(), 100);
    assert_eq!(guest.call(Command::GetVersion), 4244u32.to_be_bytes());
    assert_eq!(guest.container_says("other", "echo other", json!({})), "other\n");
    witness.checks("no descriptor", true);
    drop(limited);
    assert!(everything(&guest, "afterwards").is_empty());
    witness.ends();
}

#[test]
fn a_helper_without_a_descriptor_left_says_so() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    for name in ["mountd", "execd"] {
        let pid = process(&guest, name, None);
        let limited = Limited::descriptors(pid);
        for _ in 0..20 {
            let text = refusal(guest.try_container("other", &["true"], json!({})));
            assert!(text.contains(&format!("{name}: ")) && text.contains("Too many open files"), "{text}");
        }
        drop(limited);
        assert_eq!(process(&guest, name, None), pid, "it lives");
        answers(&guest, "mountd");
        witness.checks(name, true);
    }
    assert!(everything(&guest, "afterwards").is_empty());
    witness.ends();
}

/// Descriptors that streamd cannot take are not lost: its successor gets them.
#[test]
fn a_streamd_without_a_descriptor_left_loses_no_output() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    // It has become its own user by then, which may limit itself.
    answers(&guest, "streamd");
    let pid = process(&guest, "streamd", None);
    let _limited = Limited::descriptors(pid);
    let outcome = guest.sh("main", "echo said; echo wrong >&2; exit 3");
    assert_eq!((outcome.status, outcome.stdout.as_str(), outcome.stderr.as_str()), (3, "said\n", "wrong\n"));
    assert_ne!(process(&guest, "streamd", None), pid, "it has a successor, which has a limit of its own");
    assert!(everything(&guest, "afterwards").is_empty());
}

#[test]
fn a_file_that_must_not_grow_is_refused_or_costs_mountd() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let pid = process(&guest, "mountd", None);
    let limited = Limited::new(pid, "fsize", "Max file size", 1000);
    let text = guest.refused(write(SIZE));
    assert!(text.contains("File too large") || text.contains("it died before it answered"), "{text}");
    drop(limited);
    assert!(everything(&guest, "afterwards").is_empty());
    witness.checks("a file that must not grow", true);
    witness.ends();
}

#[test]
fn a_full_filesystem_is_refused() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    // The container's own /dev is a small tmpfs.
    let full = Command::WriteFile(hyperinit::command::WriteFile {
        file: hyperinit::command::File { file: "/dev/file".to_owned(), ..data_file() },
        data: vec![b'x'; 12 << 20],
    });
    let text = guest.refused(full);
    assert!(text.contains("mountd: ") && text.contains("No space left on device"), "{text}");
    guest.says("main", "rm -f /dev/file");
    assert!(everything(&guest, "afterwards").is_empty());
    witness.checks("a full filesystem", true);
    witness.ends();
}

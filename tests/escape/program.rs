//! The guest's own program, as a container can reach it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::json;

use crate::guest::{Guest, Kind};

/// CVE-2019-5736: an image names /proc/self/exe as its program, and so executes the guest's own program,
/// which execd's process still is at that moment. A second process of the container then writes to the
/// program by /proc/PID/exe.
#[test]
fn the_guests_program_is_nobodys_to_change() {
    let guest = Guest::with_pod(Kind::Local);
    let root = guest.image("exe");
    // Under this name and with `--stdio`, the program is a helper that waits for input and stays.
    symlink("/proc/self/exe", root.join("bin/netd")).unwrap();
    let main = guest.container("exe", &["sleep", "100000"], json!({"image": "exe"}));
    let program = guest.exec("exe", &["/bin/netd", "--stdio", "--unconfined"], json!({}));
    let pid = guest.says("exe", "until pidof netd; do :; done");
    let exe = format!("/proc/{}/exe", pid.trim());
    // The attack has reached the guest's program.
    let size = guest.says("exe", &format!("stat -L -c %s {exe}"));
    assert_eq!(size.trim(), fs::metadata(guests_program()).unwrap().len().to_string());
    // The mode is set to its present value, so that a guest which allows this is not damaged.
    let held = format!(
        "exec 9<{exe}; for at in {exe} /proc/self/fd/9; do chmod 755 $at; echo >$at; chown 0 $at; done"
    );
    let outcome = guest.sh("exe", &held);
    let denied = outcome.stderr.matches("Read-only file system").count();
    assert_eq!((denied, outcome.stderr.lines().count()), (6, 6), "{}", outcome.stderr);
    // Writing fails also when no process executes the program any more.
    let pid = pid.trim();
    let script = format!(
        "exec 9<{exe}; kill -9 {pid}; while [ -e /proc/{pid} ]; do :; done; chmod 755 /proc/self/fd/9"
    );
    let outcome = guest.sh("exe", &script);
    assert!(outcome.stderr.contains("Read-only file system"), "{}", outcome.stderr);
    assert_eq!(program.end().status, 137);
    guest.finish(main);
}

fn guests_program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_hyperinit"))
}

//! Shared parts of the per-helper tests: a guest made of namespaces, helpers driven by their `--stdio` door,
//! an image, a pod.
//!
//! The tests need root and leave nothing behind: each runs in the namespaces of one thread, on its own tmpfs.
// Each test binary uses a part of it.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

pub mod guest;
pub mod helper;
pub mod image;
pub mod limits;
pub mod net;
pub mod pod;
pub mod probe;

use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long any step may take before the test fails: many times what a loaded machine needs.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// Reads until the end of the file (for a pty: until its last process is gone), or until `enough` returns
/// true.
pub fn read_until(mut file: impl Read + AsFd, enough: impl Fn(&[u8]) -> bool) -> String {
    let until = Instant::now() + DEADLINE;
    let mut all = Vec::new();
    while !enough(&all) {
        let left = until.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::try_from(left).unwrap()).unwrap();
        assert!(ready > 0, "no more came than {:?}", String::from_utf8_lossy(&all));
        let mut bytes = [0; 4096];
        match file.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) => all.extend_from_slice(&bytes[..count]),
            // A pty reports EIO when no process has its other end open.
            Err(error) if error.raw_os_error() == Some(nix::libc::EIO) => break,
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            Err(error) => panic!("{error} after {:?}", String::from_utf8_lossy(&all)),
        }
    }
    String::from_utf8_lossy(&all).into_owned()
}

/// Reads until the end.
pub fn read_all(file: impl Read + AsFd) -> String {
    read_until(file, |_| false)
}

/// Reads until `text` has come.
pub fn read_to(file: impl Read + AsFd, text: &str) -> String {
    read_until(file, |all| all.windows(text.len()).any(|window| window == text.as_bytes()))
}

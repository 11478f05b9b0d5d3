//! The resource limits of a test's process.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the limit of open files to its maximum: some machines start with a low one.
pub fn allow_open_files() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

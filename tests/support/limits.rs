//! What a test's process may use.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// As many open files as there may be: some machines allow few at first.
pub fn allow_open_files() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

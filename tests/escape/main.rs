//! A hostile container: tries the known ways out of a container on a whole guest. Each test names the CVE or
//! the mechanism.
//!
//! Other tests cover: descriptors and the working directory (CVE-2024-21626), TIOCSTI and the 64-bit number
//! of ioctl (tests/execd/profile.rs); a setuid program that has to work (tests/scenarios/exec.rs).
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod attributes;
mod closed;
#[path = "../guest/mod.rs"]
mod guest;
mod image;
mod jail;
#[path = "../support/probe.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod probe;
mod program;
mod races;
#[cfg(target_arch = "x86_64")]
mod restricted;
mod thief;
#[cfg(target_arch = "x86_64")]
mod vm;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

use guest::{Guest, Running};
use serde_json::json;

/// Tells this program, in a container, which attack it is.
const ATTACK: &str = "ESCAPE";

/// In a container: the argument of the attack, if this is the attack named. In the test: none.
fn told(attack: &str) -> Option<String> {
    env::var(ATTACK).ok()?.strip_prefix(attack)?.strip_prefix(' ').map(str::to_owned)
}

/// Copies this very program into an image.
fn arm(root: &Path) {
    fs::copy(env::current_exe().unwrap(), root.join("bin/escape")).unwrap();
}

/// Starts a test of this program in a container, where it is the attack.
fn attack<'a>(guest: &'a Guest, container: &str, test: &str, attack: &str, what: &str) -> Running<'a> {
    let args = ["/bin/escape", "--exact", test, "--nocapture", "--test-threads=1"];
    let envs = json!([{"env": ATTACK, "value": format!("{attack} {what}")}]);
    guest.exec(container, &args, json!({"envs": envs}))
}

/// Prints a line of an attack apart from those of the test harness.
fn say(line: &str) {
    let mut out = std::io::stdout();
    out.write_all(format!("\n{line}\n").as_bytes()).and_then(|()| out.flush()).unwrap();
}

/// The rest of the line of an attack's output that begins with `word`.
fn said<'a>(text: &'a str, word: &str) -> &'a str {
    let line = text.lines().find_map(|line| line.strip_prefix(word)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {word} in {text:?}"))
}

/// A directory of the share that belongs to no image and must not change. The guest reaches it by the path
/// `OUTSIDE`.
struct Outside {
    at: PathBuf,
}

/// The guest's own path to it. The same path in an image leads to what the image has there.
const OUTSIDE: &str = "/run/hyperinit/share/outside";
const SECRET: &str = "the guest's\n";

impl Outside {
    fn new(guest: &Guest) -> Outside {
        let at = guest.share.join("outside");
        fs::create_dir_all(at.join("pts")).unwrap();
        for name in ["console", "file", "hosts", "null", "ptmx", "resolv.conf"] {
            fs::write(at.join(name), SECRET).unwrap();
        }
        Outside { at }
    }

    /// The names in the directory, with the text of each file and the number of entries of each directory.
    fn content(&self) -> BTreeMap<PathBuf, String> {
        let entries = fs::read_dir(&self.at).unwrap().map(|entry| entry.unwrap().path());
        entries
            .map(|path| {
                let is_file = fs::symlink_metadata(&path).unwrap().is_file();
                let text = if is_file {
                    fs::read_to_string(&path).unwrap()
                } else {
                    format!("{}", fs::read_dir(&path).unwrap().count())
                };
                (path, text)
            })
            .collect()
    }
}

/// The mount points below a path in the guest's own mount namespace.
fn mounted_in_the_guest(guest: &Guest, below: &str) -> Vec<String> {
    let init = guest::processes::process(guest, "init", None);
    let mounts = fs::read_to_string(format!("/proc/{init}/mountinfo")).unwrap();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    points.filter(|point| Path::new(point).starts_with(below)).map(str::to_owned).collect()
}

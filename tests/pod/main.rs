//! Tests of a whole pod in the whole guest, in namespaces of this machine.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod confined;
#[path = "../guest/mod.rs"]
mod guest;
mod guests;
mod held;
mod leaks;
#[path = "../scenarios/mod.rs"]
mod scenarios;

use guest::{Guest, Kind};
use hyperinit::command::Command;

/// Runs one scenario in a separate guest and ends the guest by DESTROYPOD.
fn run(scenario: fn(&Guest)) {
    let guest = Guest::with_pod(Kind::Local);
    scenario(&guest);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

macro_rules! tests {
    ($($module:ident: $($name:ident),+;)+) => {
        $(mod $module {
            $(#[test]
            fn $name() {
                crate::run(crate::scenarios::$module::$name);
            })+
        })+
    };
}

scenarios::for_all!(tests);
scenarios::for_filesystems!(tests);

//! The same scenarios in a VM: a real kernel, virtio-serial, 9p.
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod guest;
mod scenarios;

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use guest::{Guest, Kind};
use hyperinit::command::Command;

macro_rules! list {
    ($($module:ident: $($name:ident),+;)+) => {
        /// Every scenario by its name.
        const ALL: &[(&str, fn(&Guest))] =
            &[$($((concat!(stringify!($module), "::", stringify!($name)), scenarios::$module::$name)),+),+];
    };
}

scenarios::for_all!(list);

/// One VM for all of them: a boot costs seconds.
#[test]
fn every_scenario() {
    let guest = Guest::with_pod(Kind::Vm);
    let mut failed = Vec::new();
    for (name, scenario) in ALL {
        let _ = writeln!(std::io::stdout(), "vm: {name}");
        if catch_unwind(AssertUnwindSafe(|| scenario(&guest))).is_err() {
            failed.push(*name);
        }
    }
    assert!(failed.is_empty(), "failed: {failed:?}\n{}", guest.log());
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

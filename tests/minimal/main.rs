//! Policies are minimal: whatever one allows, a call, a value of an argument or a capability, some test has a
//! process use, or the entry says in `unseen` why it stays. The tests that start processes of the guest on
//! this machine run here once more, while the kernel records every call of every process.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's panic is its report")]

mod entries;
#[path = "../policy/files.rs"]
#[allow(dead_code)]
mod files;
mod follow;
#[path = "../policy/machine.rs"]
#[allow(dead_code)]
mod machine;
#[path = "../policy/meaning.rs"]
#[allow(dead_code)]
mod meaning;
mod record;
mod tracer;
mod workload;

use std::collections::HashMap;

use hyperinit_policy::{compiled, format, names, policy, table};

use follow::{Kept, Seen};
use format::Source;
use machine::Verdict;
use meaning::Meaning;
use policy::Syscalls;
use record::Record;
use table::Table;

/// Who has a list of what it may do.
const CONFINED: [&str; 5] = ["init", "mountd", "netd", "podinit", "streamd"];
/// What the workload makes the guest's processes do.
fn seen(table: &Table, sources: &[Source]) -> Seen {
    let mut kept = Kept::new();
    for name in CONFINED {
        let kept = kept.entry(name).or_default();
        for (call, rules) in Meaning::of(name, sources).rules {
            let Some(number) = table.number(&call) else { continue };
            for condition in rules.iter().flat_map(|rule| rule.when.iter().chain(&rule.unless)).flatten() {
                kept.entry(number).or_default()[condition.argument] = true;
            }
        }
    }
    let programs = workload::programs();
    let record = Record::start(kept, table.number("seccomp").unwrap());
    let failures = workload::run(&programs);
    let seen = record.stop();
    // What was not done because something else failed says nothing.
    assert!(failures.is_empty(), "the recorded tests failed:\n{}", failures.join("\n"));
    seen
}

/// `make test` leaves out what is run here whole, and nothing else.
#[test]
fn every_test_is_run_by_make_test() {
    let makefile = std::fs::read_to_string("Makefile").unwrap();
    let recorded = makefile.lines().find_map(|line| line.strip_prefix("recorded := ")).unwrap();
    assert_eq!(recorded.split(' ').collect::<Vec<_>>(), workload::whole());
}

#[test]
fn whatever_is_allowed_is_used() {
    let sources = files::sources();
    let table = files::table(std::env::consts::ARCH);
    let seen = seen(&table, &sources);
    let names: HashMap<u32, &str> =
        table.all().into_iter().map(|(number, name)| (u32::try_from(number).unwrap(), name)).collect();
    for role in CONFINED {
        let calls = seen.calls.get(role).unwrap_or_else(|| panic!("{role} was not followed"));
        let meaning = Meaning::of(role, &sources);
        // Nobody did what he may not: those that were followed are those that the policies are for.
        for (number, arguments) in calls {
            let name = names.get(number).copied();
            let verdict = meaning.verdict(name, arguments);
            assert_eq!(verdict, Verdict::Allow, "{role} made {name:?} {arguments:x?}, confined");
        }
    }
    let mut wrong = entries::rules(&sources, &table, &seen);
    wrong.extend(entries::capabilities(&sources, &seen));
    assert!(wrong.is_empty(), "policies that are not what is used:\n{}", wrong.join("\n"));
}

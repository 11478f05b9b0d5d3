//! Policies are minimal: whatever one allows, a call, a value of an argument or a capability, some test has a process use, or the
//! entry says in `unseen` why it stays. The tests that start processes of the guest on this machine run here once more, while the
//! kernel records every call of every process.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's panic is its report")]

#[path = "../../build/bpf.rs"]
#[allow(dead_code)]
mod bpf;
#[path = "../../build/compiled.rs"]
#[allow(dead_code)]
mod compiled;
#[path = "../policy/files.rs"]
#[allow(dead_code)]
mod files;
mod follow;
#[path = "../../build/format.rs"]
#[allow(dead_code)]
mod format;
#[path = "../policy/machine.rs"]
#[allow(dead_code)]
mod machine;
#[path = "../policy/meaning.rs"]
#[allow(dead_code)]
mod meaning;
#[path = "../../build/names.rs"]
#[allow(dead_code)]
mod names;
#[path = "../../build/policy.rs"]
#[allow(dead_code)]
mod policy;
mod record;
#[path = "../../build/table.rs"]
mod table;
mod tracer;
mod workload;

use std::collections::{BTreeSet, HashMap};

use serde_json::Value;

use follow::{Kept, Seen};
use format::Source;
use machine::Verdict;
use meaning::{Meaning, Rule};
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

/// The entries of a file, by the call's or the capability's name, that say why nothing uses them.
fn excused(source: &Source) -> BTreeSet<String> {
    let file: Value = serde_json::from_str(&source.text).unwrap();
    let rules = [&file["rules"], &file["seccomp"]["rules"], &file["capabilities"]];
    let rules = rules.into_iter().filter_map(Value::as_array).flatten();
    let excused = rules.filter(|rule| rule["unseen"].is_string());
    excused.map(|rule| rule["syscall"].as_str().or(rule["name"].as_str()).unwrap().to_owned()).collect()
}

/// What of a rule was never used.
fn unused(rule: &Rule, calls: &[[u64; 6]]) -> Vec<String> {
    if rule.always() || !rule.unless.is_empty() {
        return if calls.is_empty() { vec!["any".to_owned()] } else { Vec::new() };
    }
    let used = |all: &&Vec<meaning::Condition>| {
        calls.iter().any(|call| all.iter().all(|condition| condition.holds(call[condition.argument])))
    };
    rule.when.iter().filter(|all| !used(all)).map(|all| format!("{all:?}")).collect()
}

#[test]
fn whatever_is_allowed_is_used() {
    let sources = files::sources();
    let table = files::table(std::env::consts::ARCH);
    let seen = seen(&table, &sources);
    let names: HashMap<u32, &str> =
        table.all().into_iter().map(|(number, name)| (u32::try_from(number).unwrap(), name)).collect();

    let mut wrong = Vec::new();
    let nothing = BTreeSet::new();
    for role in CONFINED {
        let calls = seen.calls.get(role).unwrap_or(&nothing);
        assert!(!calls.is_empty(), "{role} was not followed");
        let meaning = Meaning::of(role, &sources);
        // Nobody did what he may not: those that were followed are those that the policies are for.
        for (number, arguments) in calls {
            let name = names.get(number).copied();
            let verdict = meaning.verdict(name, arguments);
            assert_eq!(verdict, Verdict::Allow, "{role} made {name:?} {arguments:x?}, confined");
        }
    }
    wrong.extend(unused_rules(&sources, &table, &seen));
    wrong.extend(unused_capabilities(&sources, &seen));
    assert!(wrong.is_empty(), "nothing uses\n{}", wrong.join("\n"));
}

/// Every entry of a file that none of the processes which have it used.
fn unused_rules(sources: &[Source], table: &Table, seen: &Seen) -> Vec<String> {
    let mut wrong = Vec::new();
    for source in sources {
        let users: Vec<&str> = match source.name.strip_prefix("lists/") {
            None => CONFINED.into_iter().filter(|role| *role == source.name).collect(),
            Some(list) => CONFINED
                .into_iter()
                .filter(|role| Meaning::includes(role, sources).iter().any(|name| name == list))
                .collect(),
        };
        if users.is_empty() {
            continue;
        }
        let excused = excused(source);
        for (call, rule) in Meaning::own(&source.name, sources) {
            let Some(number) = table.number(&call) else { continue };
            // What fails with an error does not get as far as the record.
            if excused.contains(&call) || rule.fails() {
                continue;
            }
            let made = users.iter().filter_map(|role| seen.calls.get(role)).flatten();
            let made: Vec<[u64; 6]> =
                made.filter(|(other, _)| *other == number).map(|(_, arguments)| *arguments).collect();
            wrong.extend(
                unused(&rule, &made).into_iter().map(|what| format!("{}: {call}: {what}", source.name)),
            );
        }
    }
    wrong
}

fn unused_capabilities(sources: &[Source], seen: &Seen) -> Vec<String> {
    let mut wrong = Vec::new();
    let nothing = BTreeSet::new();
    for role in CONFINED.into_iter().chain(["execd"]) {
        let source = sources.iter().find(|source| source.name == role).unwrap();
        let excused = excused(source);
        let used = seen.capabilities.get(role).unwrap_or(&nothing);
        let declared = Meaning::of(role, sources).capabilities;
        wrong.extend(
            declared
                .iter()
                .filter(|name| !excused.contains(*name))
                .filter(|name| !used.iter().any(|&bit| names::CAPABILITIES.get(bit) == Some(&name.as_str())))
                .map(|name| format!("{role}: {name}")),
        );
    }
    wrong
}

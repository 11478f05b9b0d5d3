//! The entries of policies, held against what was seen.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::CONFINED;
use crate::follow::Seen;
use crate::format::Source;
use crate::meaning::{Condition, Meaning, Rule};
use crate::names::CAPABILITIES;
use crate::policy::Syscalls;
use crate::table::Table;

/// What an entry says of who uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Claim {
    /// Something does.
    Used,
    /// `unseen`: nothing does, or not all of it.
    Unseen,
    /// `varies`: that depends.
    Varies,
}

/// The entries of a file, by the call's or the capability's name, that do not claim to be used.
fn claims(source: &Source) -> BTreeMap<String, Claim> {
    let file: Value = serde_json::from_str(&source.text).unwrap();
    let entries = [&file["rules"], &file["seccomp"]["rules"], &file["capabilities"]];
    let entries = entries.into_iter().filter_map(Value::as_array).flatten();
    let claim = |entry: &Value| match (entry["unseen"].is_string(), entry["varies"].is_string()) {
        (true, _) => Claim::Unseen,
        (_, true) => Claim::Varies,
        _ => Claim::Used,
    };
    let name = |entry: &Value| entry["syscall"].as_str().or(entry["name"].as_str()).map(str::to_owned);
    entries.filter_map(|entry| Some((name(entry)?, claim(entry)))).collect()
}

/// What is wrong with an entry, of which these parts were not used.
fn judge(entry: &str, claim: Claim, unused: Vec<String>) -> Vec<String> {
    match claim {
        Claim::Used => unused.into_iter().map(|part| format!("nothing uses {entry}{part}")).collect(),
        Claim::Unseen if unused.is_empty() => {
            vec![format!("{entry} is used, and `unseen` says that it is not")]
        }
        Claim::Unseen | Claim::Varies => Vec::new(),
    }
}

/// What of a rule was never used.
fn unused(rule: &Rule, calls: &[[u64; 6]]) -> Vec<String> {
    if rule.always() || !rule.unless.is_empty() {
        return if calls.is_empty() { vec![String::new()] } else { Vec::new() };
    }
    let used = |all: &&Vec<Condition>| {
        calls.iter().any(|call| all.iter().all(|condition| condition.holds(call[condition.argument])))
    };
    rule.when.iter().filter(|all| !used(all)).map(|all| format!(": {all:?}")).collect()
}

/// The processes that have a file's rules, each with the rules that it has of lists besides.
fn users(file: &str, sources: &[Source]) -> Vec<(&'static str, Vec<(String, Rule)>)> {
    let lists = |role| Meaning::includes(role, sources).into_iter().map(|list| format!("lists/{list}"));
    if file.starts_with("lists/") {
        let having = CONFINED.into_iter().filter(|role| lists(role).any(|list| list == file));
        return having.map(|role| (role, Vec::new())).collect();
    }
    let named = CONFINED.into_iter().filter(|role| *role == file);
    named.map(|role| (role, lists(role).flat_map(|list| Meaning::own(&list, sources)).collect())).collect()
}

/// What is wrong with rules: of a list any of the processes that include it may use one.
pub fn rules(sources: &[Source], table: &Table, seen: &Seen) -> Vec<String> {
    let mut wrong = Vec::new();
    for source in sources {
        let users = users(&source.name, sources);
        if users.is_empty() {
            continue;
        }
        let claims = claims(source);
        for (call, rule) in Meaning::own(&source.name, sources) {
            let Some(number) = table.number(&call) else { continue };
            // What fails with an error does not get as far as the record.
            if rule.fails() {
                continue;
            }
            let made = users.iter().flat_map(|(role, others)| made(seen, role, &call, number, others));
            let made: Vec<[u64; 6]> = made.collect();
            wrong.extend(judge(&format!("{}: {call}", source.name), claims[&call], unused(&rule, &made)));
        }
    }
    wrong
}

/// The arguments with which a process made a call, but for what other rules allow it.
fn made(
    seen: &Seen,
    role: &str,
    call: &str,
    number: u32,
    others: &[(String, Rule)],
) -> impl Iterator<Item = [u64; 6]> {
    let others: Vec<&Rule> = others.iter().filter(|(other, _)| other == call).map(|(_, rule)| rule).collect();
    let calls = seen.calls.get(role).into_iter().flatten();
    calls
        .filter(move |(other, arguments)| {
            *other == number && !others.iter().any(|rule| rule.holds(arguments))
        })
        .map(|(_, arguments)| *arguments)
}

/// What is wrong with capabilities.
pub fn capabilities(sources: &[Source], seen: &Seen) -> Vec<String> {
    let nothing = BTreeSet::new();
    let mut wrong = Vec::new();
    for role in CONFINED.into_iter().chain(["execd"]) {
        let claims = claims(sources.iter().find(|source| source.name == role).unwrap());
        let used = seen.capabilities.get(role).unwrap_or(&nothing);
        for name in Meaning::of(role, sources).capabilities {
            let used = used.iter().any(|&bit| CAPABILITIES.get(bit) == Some(&name.as_str()));
            let unused = if used { Vec::new() } else { vec![String::new()] };
            // None of its own: it is another policy's.
            let claim = claims.get(&name).copied().unwrap_or(Claim::Used);
            wrong.extend(judge(&format!("{role}: {name}"), claim, unused));
        }
    }
    wrong
}

#[test]
fn an_entry_is_judged_by_what_it_says_of_itself() {
    let part = || vec![": arg0 == 1".to_owned()];
    assert_eq!(judge("netd: send", Claim::Used, part()), ["nothing uses netd: send: arg0 == 1"]);
    assert_eq!(judge("netd: send", Claim::Unseen, Vec::new()).len(), 1, "it is used");
    for (claim, unused) in [
        (Claim::Used, Vec::new()),
        (Claim::Unseen, part()),
        (Claim::Varies, Vec::new()),
        (Claim::Varies, part()),
    ] {
        assert_eq!(judge("netd: send", claim, unused), Vec::<String>::new(), "{claim:?}");
    }
}

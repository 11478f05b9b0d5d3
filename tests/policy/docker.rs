//! The profile `default` beside Docker's: each difference has a row in policy/README.md's table «The default
//! profile and Docker's», and each row of names there is a difference.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

use crate::machine::Verdict;
use crate::meaning::{Condition, Meaning, conditions};
use crate::policy::Syscalls;
use crate::programs::ARCHITECTURES;
use crate::{sources, table};

/// arm64's number 79, by its name in the build's table and in Docker's.
const OTHER_NAME: (&str, &str) = ("fstatat", "newfstatat");

/// What one of the two answers to a name: the table's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Allowed,
    InPart,
    Denied,
}

impl Answer {
    fn word(self) -> &'static str {
        match self {
            Answer::Allowed => "allowed",
            Answer::InPart => "in part",
            Answer::Denied => "denied",
        }
    }
}

fn docker() -> Value {
    serde_json::from_str(include_str!("docker.json")).unwrap()
}

fn names(value: &Value) -> BTreeSet<String> {
    value.as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect()
}

fn holds(lists: &[Vec<Condition>], arguments: &[u64; 6]) -> bool {
    let met = |condition: &Condition| condition.holds(arguments[condition.argument]);
    lists.iter().any(|all| all.iter().all(met))
}

/// Arguments near every edge of these conditions, each alone.
fn edges(lists: &[Vec<Condition>]) -> Vec<[u64; 6]> {
    let values = lists.iter().flatten().flat_map(|condition| {
        condition.interesting().into_iter().map(|value| {
            let mut arguments = [0; 6];
            arguments[condition.argument] = value;
            arguments
        })
    });
    values.chain([[0; 6]]).collect()
}

/// The calls that the two answer differently: what the profile answers, and Docker.
fn differing_calls() -> BTreeMap<String, (Answer, Answer)> {
    let docker = docker();
    let ours = Meaning::of("container/default", &sources());
    let (allowed, errors) = (names(&docker["allowed"]), &docker["errors"]);
    let all: BTreeSet<&str> =
        ARCHITECTURES.iter().flat_map(|(arch, _)| table(arch).all()).map(|(_, name)| name).collect();
    let mut differences = BTreeMap::new();
    for name in all {
        let theirs = if name == OTHER_NAME.0 { OTHER_NAME.1 } else { name };
        let lists = conditions(&docker["conditional"][theirs]);
        let rules = ours.rules.get(name).map_or(&[][..], Vec::as_slice);
        let own = rules.iter().flat_map(|rule| rule.when.iter().chain(&rule.unless)).cloned();
        let both: Vec<Vec<Condition>> = own.chain(lists.clone()).collect();
        let here = |arguments: &[u64; 6]| match ours.verdict(Some(name), arguments) {
            Verdict::Errno(errno) => errno,
            verdict => u32::from(verdict != Verdict::Allow),
        };
        let there = |arguments: &[u64; 6]| match errors[theirs].as_str() {
            Some("ENOSYS") => libc::ENOSYS.unsigned_abs(),
            Some(other) => panic!("{other}"),
            None if allowed.contains(theirs) || holds(&lists, arguments) => 0,
            None => libc::EPERM.unsigned_abs(),
        };
        let edges = edges(&both);
        if edges.iter().any(|arguments| here(arguments) != there(arguments)) {
            differences.insert(name.to_owned(), (kind(&edges, here), kind(&edges, there)));
        }
    }
    differences
}

fn kind(edges: &[[u64; 6]], errno: impl Fn(&[u64; 6]) -> u32) -> Answer {
    let allowed = edges.iter().filter(|arguments| errno(arguments) == 0).count();
    match allowed {
        0 => Answer::Denied,
        all if all == edges.len() => Answer::Allowed,
        _ => Answer::InPart,
    }
}

/// The names of one kind that only one of the two has.
fn differing_names(
    key: &str,
    ours: impl IntoIterator<Item = String>,
    [here, there]: [Answer; 2],
) -> impl Iterator<Item = (String, (Answer, Answer))> {
    let theirs = names(&docker()[key]);
    let ours: BTreeSet<String> = ours.into_iter().collect();
    let all: Vec<String> = ours.symmetric_difference(&theirs).cloned().collect();
    all.into_iter().map(move |name| {
        let answers = if ours.contains(&name) { (here, there) } else { (there, here) };
        (name, answers)
    })
}

/// The rows of the table that have names: by name, the words of the two columns.
fn rows() -> BTreeMap<String, (String, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("policy/README.md");
    let text = std::fs::read_to_string(path).unwrap();
    let section =
        text.split("## ").find(|part| part.starts_with("The default profile and Docker's")).unwrap();
    let mut rows = BTreeMap::new();
    for line in section.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [names, here, there, why] = cells.as_slice() else { panic!("a row of other cells: {line}") };
        for name in names.split('`').skip(1).step_by(2) {
            assert!(!why.is_empty(), "no reason: {line}");
            let row = rows.insert(name.to_owned(), ((*here).to_owned(), (*there).to_owned()));
            assert!(row.is_none(), "{name} has two rows");
        }
    }
    rows
}

#[test]
fn every_difference_to_dockers_profile_has_its_row() {
    let sources = sources();
    let file: Value = sources
        .iter()
        .find(|source| source.name == "container/default")
        .map(|source| serde_json::from_str(&source.text).unwrap())
        .unwrap();
    let paths = |key: &str| names(&file["container"][key]);
    let mut differences = differing_calls();
    let capabilities = Meaning::of("container/default", &sources).capabilities;
    differences.extend(differing_names("capabilities", capabilities, [Answer::Allowed, Answer::Denied]));
    for key in ["masked_paths", "readonly_paths"] {
        differences.extend(differing_names(key, paths(key), [Answer::Denied, Answer::Allowed]));
    }
    let differences: BTreeMap<String, (String, String)> = differences
        .into_iter()
        .map(|(name, (here, there))| (name, (here.word().to_owned(), there.word().to_owned())))
        .collect();
    let rows = rows();
    for (name, words) in &differences {
        assert_eq!(rows.get(name), Some(words), "policy/README.md on {name}: here, Docker");
    }
    for name in rows.keys() {
        assert!(differences.contains_key(name), "policy/README.md: {name} is no difference");
    }
}

/// The names of Docker's list that say nothing here: no 64-bit kernel of the two architectures has them.
#[test]
fn dockers_names_are_known() {
    let docker = docker();
    let (allowed, nowhere) = (names(&docker["allowed"]), names(&docker["nowhere"]));
    assert!(allowed.len() > 300 && allowed.is_disjoint(&nowhere));
    for name in &allowed {
        assert!(table("x86_64").exists(name), "{name}");
    }
    let ours = Meaning::of("container/default", &sources());
    for name in &nowhere {
        assert!(!ours.rules.contains_key(name), "{name} is allowed");
        assert_eq!(table("x86_64").number(name).filter(|_| !OLD.contains(&name.as_str())), None, "{name}");
    }
}

/// Numbers of x86_64 that its kernel answers with ENOSYS.
const OLD: [&str; 4] = ["epoll_ctl_old", "epoll_wait_old", "get_thread_area", "set_thread_area"];

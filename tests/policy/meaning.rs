//! What a policy's JSON says, read without the compiler: the tests compare the programs with it.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::format::Source;
use crate::machine::Verdict;
use crate::names::constant;

/// `argN[:32] [& MASK] OP VALUE`
#[derive(Debug, Clone)]
pub struct Condition {
    /// N.
    pub argument: usize,
    low: bool,
    mask: Option<u64>,
    operator: String,
    value: u64,
}

impl Condition {
    fn parse(text: &str) -> Condition {
        let mut words = text.split(' ');
        let argument = words.next().unwrap();
        let (name, low) = argument.split_once(":32").map_or((argument, false), |(name, _)| (name, true));
        let mut operator = words.next().unwrap();
        let mut mask = None;
        if operator == "&" {
            mask = Some(value(words.next().unwrap()));
            operator = words.next().unwrap();
        }
        Condition {
            argument: name[3..].parse().unwrap(),
            low,
            mask,
            operator: operator.to_owned(),
            value: value(words.next().unwrap()),
        }
    }

    /// Whether an argument's value meets it.
    pub fn holds(&self, argument: u64) -> bool {
        let argument = if self.low { argument & 0xffff_ffff } else { argument };
        let argument = argument & self.mask.unwrap_or(u64::MAX);
        match self.operator.as_str() {
            "==" => argument == self.value,
            "!=" => argument != self.value,
            "<" => argument < self.value,
            "<=" => argument <= self.value,
            ">" => argument > self.value,
            ">=" => argument >= self.value,
            other => panic!("the operator {other}"),
        }
    }

    /// Values near the edge, on both sides, also with bits above the 32nd.
    pub fn interesting(&self) -> Vec<u64> {
        let around = [self.value, self.value.wrapping_add(1), self.value.wrapping_sub(1), 0, 1, u64::MAX];
        let bits = (0..64).map(|bit| self.value ^ 1 << bit);
        let other = self.mask.map(|mask| self.value | !mask);
        around.into_iter().chain(bits).chain(other).collect()
    }
}

fn value(word: &str) -> u64 {
    let one = |word: &str| match word.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).unwrap(),
        None => word.parse().ok().or_else(|| constant(word)).unwrap(),
    };
    word.split('|').map(one).fold(0, |all, one| all | one)
}

/// A rule.
#[derive(Debug, Clone)]
pub struct Rule {
    /// Any of these, all of its conditions.
    pub when: Vec<Vec<Condition>>,
    /// None of these.
    pub unless: Vec<Vec<Condition>>,
    errno: Option<String>,
}

impl Rule {
    /// Whether it holds whatever the arguments.
    pub fn always(&self) -> bool {
        self.when.is_empty() && self.unless.is_empty()
    }

    /// Whether the call fails where it holds.
    pub fn fails(&self) -> bool {
        self.errno.is_some()
    }

    /// Whether it holds for these.
    pub fn holds(&self, arguments: &[u64; 6]) -> bool {
        let all = |conditions: &Vec<Condition>| {
            conditions.iter().all(|condition| condition.holds(arguments[condition.argument]))
        };
        (self.when.is_empty() || self.when.iter().any(all)) && !self.unless.iter().any(all)
    }
}

/// What happens to a call without a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Without {
    /// It traps.
    Trap,
    /// It passes.
    Allow,
    /// It fails.
    Deny,
}

/// A policy's rules.
#[derive(Debug)]
pub struct Meaning {
    /// What happens to a call without a rule.
    pub without: Without,
    /// By system call.
    pub rules: BTreeMap<String, Vec<Rule>>,
    /// Names of capabilities.
    pub capabilities: Vec<String>,
    /// (uid, gid).
    pub user: (u64, u64),
    /// Whether it opens and makes files as root all the same.
    pub root_files: bool,
    /// Whether it sets it.
    pub no_new_privs: bool,
}

impl Meaning {
    /// The rules of one file, a policy's or a list's, without those that it includes.
    pub fn own(name: &str, sources: &[Source]) -> Vec<(String, Rule)> {
        let file = read(name, sources);
        all(if file["seccomp"].is_object() { &file["seccomp"] } else { &file })
    }

    /// The lists that a policy includes.
    pub fn includes(name: &str, sources: &[Source]) -> Vec<String> {
        let file = read(name, sources);
        let lists = file["seccomp"]["include"].as_array().into_iter().flatten();
        lists.map(|list| list.as_str().unwrap().to_owned()).collect()
    }

    /// What the files say of one policy.
    pub fn of(name: &str, sources: &[Source]) -> Meaning {
        let file = read(name, sources);
        let lists = Meaning::includes(name, sources).into_iter().map(|list| format!("lists/{list}"));
        let mut by_call = BTreeMap::<String, Vec<Rule>>::new();
        for (call, rule) in lists.chain([name.to_owned()]).flat_map(|file| Meaning::own(&file, sources)) {
            by_call.entry(call).or_default().push(rule);
        }
        let mut capabilities = Vec::new();
        for rule in file["capabilities"].as_array().unwrap() {
            match rule["of"].as_str() {
                Some(of) => capabilities.extend(Meaning::of(of, sources).capabilities),
                None => capabilities.push(rule["name"].as_str().unwrap().to_owned()),
            }
        }
        Meaning {
            without: match file["seccomp"]["default"].as_str().unwrap() {
                "trap" => Without::Trap,
                "allow" => Without::Allow,
                "deny" => Without::Deny,
                other => panic!("the default {other}"),
            },
            rules: by_call,
            capabilities,
            user: (file["user"]["uid"].as_u64().unwrap_or(0), file["user"]["gid"].as_u64().unwrap_or(0)),
            root_files: file["user"]["root_files"].as_bool().unwrap_or(false),
            no_new_privs: file["no_new_privs"].as_bool().unwrap(),
        }
    }

    /// The answer to a call of this name, or to a number without a name.
    pub fn verdict(&self, call: Option<&str>, arguments: &[u64; 6]) -> Verdict {
        let rules = call.and_then(|call| self.rules.get(call)).map_or(&[][..], Vec::as_slice);
        match (rules.iter().find(|rule| rule.holds(arguments)), self.without) {
            (None, Without::Trap) => Verdict::Trap,
            (None, Without::Allow) => Verdict::Allow,
            (None, Without::Deny) if call.is_some() => Verdict::Errno(libc::EPERM.unsigned_abs()),
            (None, Without::Deny) => Verdict::Errno(libc::ENOSYS.unsigned_abs()),
            (Some(Rule { errno: Some(errno), .. }), _) => {
                Verdict::Errno(u32::try_from(value(errno)).unwrap())
            }
            (Some(_), Without::Trap | Without::Deny) => Verdict::Allow,
            (Some(_), Without::Allow) => Verdict::Errno(libc::EPERM.unsigned_abs()),
        }
    }
}

fn read(name: &str, sources: &[Source]) -> Value {
    serde_json::from_str(&sources.iter().find(|source| source.name == name).unwrap().text).unwrap()
}

/// The rules of a list or a filter, and those of its groups, by system call.
fn all(filter: &Value) -> Vec<(String, Rule)> {
    let name = |value: &Value| value.as_str().unwrap().to_owned();
    let rules = filter["rules"].as_array().unwrap().iter().map(|rule| (name(&rule["syscall"]), parse(rule)));
    let calls = |group: &Value| group["syscalls"].as_array().unwrap().iter().map(name).collect::<Vec<_>>();
    let grouped = filter["groups"].as_array().into_iter().flatten().flat_map(calls);
    let always = Rule { when: Vec::new(), unless: Vec::new(), errno: None };
    grouped.map(|call| (call, always.clone())).chain(rules).collect()
}

fn parse(rule: &Value) -> Rule {
    Rule {
        when: conditions(&rule["when"]),
        unless: conditions(&rule["unless"]),
        errno: rule["errno"].as_str().map(str::to_owned),
    }
}

/// Lists of conditions; none where there is no value.
pub fn conditions(lists: &Value) -> Vec<Vec<Condition>> {
    let all = |list: &Value| {
        let texts = list.as_array().unwrap().iter().map(|text| text.as_str().unwrap());
        texts.map(Condition::parse).collect()
    };
    lists.as_array().into_iter().flatten().map(all).collect()
}

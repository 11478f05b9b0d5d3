//! The policy compiler: policy/*.json → capability masks and BPF. Pure; build.rs reads and writes the files.
//!
//! A rule that is unsorted, unexplained, misspelt or that can never hold is an error with the file's name and the line.

use std::collections::{BTreeMap, BTreeSet};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use serde::Deserialize;

use crate::compiled::{CapSet, CompiledPolicy, CompiledProfile, Device, Program};
use crate::names::{CAPABILITIES, constant};

/// The syscall table of the target.
pub trait Syscalls {
    /// The number of a call, if the target has it.
    fn number(&self, name: &str) -> Option<i64>;
    /// Whether any architecture has it.
    fn exists(&self, name: &str) -> bool;
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    about: String,
    #[serde(default)]
    user: User,
    no_new_privs: bool,
    capabilities: Vec<CapabilityRule>,
    seccomp: Seccomp,
    #[serde(default)]
    container: Option<Container>,
}

#[derive(Deserialize, Default, Clone, Copy)]
#[serde(deny_unknown_fields)]
struct User {
    uid: u32,
    gid: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CapabilityRule {
    name: String,
    why: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Seccomp {
    default: Default_,
    rules: Vec<Rule>,
}

/// What happens to a call without a rule.
#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Default_ {
    /// SIGSYS: the process names the call and dies. The rules allow.
    Trap,
    /// It passes. The rules deny.
    Allow,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    syscall: String,
    why: String,
    /// Any of these lists, all of its conditions; absent: always.
    #[serde(default)]
    when: Vec<Vec<String>>,
    /// Deny with this error. The default of a denial is EPERM; in an allow-list it makes a rule a denial.
    #[serde(default)]
    errno: Option<String>,
    /// Not every architecture has the call.
    #[serde(default)]
    optional: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Container {
    masked_paths: Vec<String>,
    readonly_paths: Vec<String>,
    devices: Vec<Device>,
    readonly_sys: bool,
}

/// An error at a place: `policy/netd.json:12: why`.
struct Place<'a> {
    file: &'a str,
    text: &'a str,
}

impl Place<'_> {
    /// The error at the first line that holds `key` with this value, or at the file's first.
    fn error(&self, key: &str, value: &str, why: &str) -> String {
        let quoted = format!("{value:?}");
        let line = self
            .text
            .lines()
            .position(|line| line.contains(&format!("\"{key}\"")) && line.contains(&quoted))
            .map_or(1, |line| line + 1);
        format!("{}:{line}: {value}: {why}", self.file)
    }
}

/// What a file holds: a process's policy, or a container profile.
pub enum Compiled {
    /// policy/*.json
    Policy(CompiledPolicy),
    /// policy/container/*.json
    Profile(CompiledProfile),
}

/// Compiles one file for an architecture (as in `CARGO_CFG_TARGET_ARCH`).
pub fn compile(file: &str, text: &str, arch: &str, syscalls: &dyn Syscalls) -> Result<Compiled, String> {
    let parsed: PolicyFile =
        serde_json::from_str(text).map_err(|error| format!("{file}:{}: {error}", error.line()))?;
    let place = Place { file, text };
    if parsed.about.trim().is_empty() {
        return Err(place.error("about", "", "says nothing"));
    }
    let capabilities = capabilities(&place, &parsed.capabilities)?;
    check_rules(&place, &parsed.seccomp.rules)?;
    let programs = programs(&place, &parsed.seccomp, arch, syscalls)?;
    let policy = CompiledPolicy {
        about: parsed.about,
        uid: parsed.user.uid,
        gid: parsed.user.gid,
        no_new_privs: parsed.no_new_privs,
        capabilities,
        programs,
        rules: readable(&parsed.capabilities, &parsed.seccomp),
    };
    Ok(match parsed.container {
        None => Compiled::Policy(policy),
        Some(Container { masked_paths, readonly_paths, devices, readonly_sys }) => {
            Compiled::Profile(CompiledProfile { policy, masked_paths, readonly_paths, devices, readonly_sys })
        }
    })
}

fn capabilities(place: &Place<'_>, rules: &[CapabilityRule]) -> Result<CapSet, String> {
    let mut set = CapSet::default();
    let mut last = "";
    for rule in rules {
        let error = |why: &str| Err(place.error("name", &rule.name, why));
        let Some(bit) = CAPABILITIES.iter().position(|&name| name == rule.name) else {
            return error("no such capability");
        };
        if rule.name.as_str() <= last {
            return error("is not in alphabetical order");
        }
        if rule.why.trim().is_empty() {
            return error("is not explained");
        }
        last = &rule.name;
        set.0 |= 1 << bit;
    }
    Ok(set)
}

fn check_rules(place: &Place<'_>, rules: &[Rule]) -> Result<(), String> {
    let mut last = "";
    for rule in rules {
        let error = |why: &str| Err(place.error("syscall", &rule.syscall, why));
        if rule.syscall.as_str() <= last {
            return error("is not in alphabetical order, or there twice");
        }
        if rule.why.trim().is_empty() {
            return error("is not explained");
        }
        if rule.when.iter().any(Vec::is_empty) {
            return error("has an empty list of conditions, which always holds: the others then say nothing");
        }
        if rule.when.iter().collect::<BTreeSet<_>>().len() != rule.when.len() {
            return error("has the same conditions twice");
        }
        last = &rule.syscall;
    }
    Ok(())
}

/// One program of what is allowed (or an allow-all), and one for each errno that something is denied with.
fn programs(
    place: &Place<'_>,
    seccomp: &Seccomp,
    arch: &str,
    syscalls: &dyn Syscalls,
) -> Result<Vec<Program>, String> {
    let target = TargetArch::try_from(arch).map_err(|error| format!("{}: {error}", place.file))?;
    let mut allowed = BTreeMap::new();
    let mut denied: BTreeMap<u16, BTreeMap<i64, Vec<SeccompRule>>> = BTreeMap::new();
    for rule in &seccomp.rules {
        let error = |why: &str| place.error("syscall", &rule.syscall, why);
        let Some(number) = syscalls.number(&rule.syscall) else {
            match (syscalls.exists(&rule.syscall), rule.optional) {
                (false, _) => return Err(error("no such system call")),
                (true, false) => {
                    return Err(error("not on this architecture; `optional` says that this is known"));
                }
                (true, true) => continue,
            }
        };
        let conditions = conditions(rule).map_err(|why| error(&why))?;
        let errno = match (&rule.errno, seccomp.default) {
            (Some(name), _) => Some(constant(name).ok_or_else(|| error("no such errno"))?),
            (None, Default_::Allow) => Some(u64::from(libc::EPERM.unsigned_abs())),
            (None, Default_::Trap) => None,
        };
        if let Some(errno) = errno {
            let errno = u16::try_from(errno).map_err(|_| error("no such errno"))?;
            denied.entry(errno).or_default().insert(number, conditions.clone());
        }
        if seccomp.default == Default_::Trap {
            // Also what is denied by errno: a trap would be the stricter answer.
            allowed.insert(number, if errno.is_some() { Vec::new() } else { conditions });
        }
    }
    let build = |rules, mismatch, matched| {
        SeccompFilter::new(rules, mismatch, matched, target)
            .and_then(BpfProgram::try_from)
            .map_err(|error| format!("{}: {error}", place.file))
    };
    let mut programs = Vec::new();
    for (errno, rules) in denied {
        let program = build(rules, SeccompAction::Allow, SeccompAction::Errno(u32::from(errno)))?;
        let mut packed = refuse_x32(arch);
        packed.extend(pack(&program));
        programs.push(packed);
    }
    if seccomp.default == Default_::Trap {
        // Last: once it is there, no other can be loaded.
        programs.push(pack(&build(allowed, SeccompAction::Trap, SeccompAction::Allow)?));
    }
    Ok(programs)
}

/// x86_64 has a second set of numbers for the same calls (x32), with bit 30 set: a list of what is denied would miss
/// them, so they are denied as a whole before anything else is looked at.
fn refuse_x32(arch: &str) -> Program {
    if arch != "x86_64" {
        return Vec::new();
    }
    const X32_BIT: u32 = 0x4000_0000;
    let instruction = |code: u32, jt: u8, jf: u8, k: u32| {
        u64::from(code) << 48 | u64::from(jt) << 40 | u64::from(jf) << 32 | u64::from(k)
    };
    vec![
        instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        instruction(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 0, 1, X32_BIT),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs()),
    ]
}

fn pack(program: &BpfProgram) -> Program {
    program
        .iter()
        .map(|i| u64::from(i.code) << 48 | u64::from(i.jt) << 40 | u64::from(i.jf) << 32 | u64::from(i.k))
        .collect()
}

fn conditions(rule: &Rule) -> Result<Vec<SeccompRule>, String> {
    rule.when
        .iter()
        .map(|all| {
            let all = all.iter().map(|text| condition(text)).collect::<Result<Vec<_>, _>>()?;
            SeccompRule::new(all).map_err(|error| error.to_string())
        })
        .collect()
}

/// `argN[:32] [& MASK] OP VALUE`: the whole argument, or its low 32 bits where that is what the kernel looks at.
fn condition(text: &str) -> Result<SeccompCondition, String> {
    let bad = |why: &str| format!("the condition {text:?} {why}");
    let words: Vec<&str> = text.split_whitespace().collect();
    let (argument, mask, operator, value) = match words.as_slice() {
        [argument, operator, value] => (*argument, None, *operator, *value),
        [argument, "&", mask, operator, value] => (*argument, Some(*mask), *operator, *value),
        _ => return Err(bad("is not `argN[:32] [& MASK] OP VALUE`")),
    };
    let (argument, width) = match argument.strip_suffix(":32") {
        Some(argument) => (argument, SeccompCmpArgLen::Dword),
        None => (argument, SeccompCmpArgLen::Qword),
    };
    let index = argument
        .strip_prefix("arg")
        .and_then(|index| index.parse::<u8>().ok())
        .filter(|&index| index < 6)
        .ok_or_else(|| bad("names no argument arg0 to arg5"))?;
    let number = |word: &str| number(word).ok_or_else(|| bad(&format!("has the unknown value {word}")));
    let value = number(value)?;
    let operator = match (operator, mask) {
        ("==", Some(mask)) => {
            let mask = number(mask)?;
            if value & !mask != 0 {
                return Err(bad("can never hold: the value has bits outside the mask"));
            }
            SeccompCmpOp::MaskedEq(mask)
        }
        ("==", None) => SeccompCmpOp::Eq,
        ("!=", None) => SeccompCmpOp::Ne,
        ("<", None) => SeccompCmpOp::Lt,
        ("<=", None) => SeccompCmpOp::Le,
        (">", None) => SeccompCmpOp::Gt,
        (">=", None) => SeccompCmpOp::Ge,
        _ => return Err(bad("has no such operator")),
    };
    if matches!(width, SeccompCmpArgLen::Dword) && value > u64::from(u32::MAX) {
        return Err(bad("can never hold: the value has more than 32 bits"));
    }
    SeccompCondition::new(index, width, operator, value).map_err(|error| bad(&error.to_string()))
}

/// A number, a constant's name, or several of them with `|`.
fn number(word: &str) -> Option<u64> {
    word.split('|').try_fold(0, |all, word| {
        let one = match word.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => word.parse().ok().or_else(|| constant(word)),
        };
        one.map(|one| all | one)
    })
}

/// The rules as `--policy` prints them.
fn readable(capabilities: &[CapabilityRule], seccomp: &Seccomp) -> Vec<(String, String)> {
    let capabilities = capabilities.iter().map(|rule| (rule.name.clone(), rule.why.clone()));
    let rules = seccomp.rules.iter().map(|rule| {
        let verb = match (seccomp.default, &rule.errno) {
            (Default_::Trap, None) => String::new(),
            (Default_::Allow, None) => "deny ".to_owned(),
            (_, Some(errno)) => format!("deny ({errno}) "),
        };
        let when: Vec<String> = rule.when.iter().map(|all| all.join(" and ")).collect();
        let when = if when.is_empty() { String::new() } else { format!(" when {}", when.join(", or ")) };
        (format!("{verb}{}{when}", rule.syscall), rule.why.clone())
    });
    capabilities.chain(rules).collect()
}

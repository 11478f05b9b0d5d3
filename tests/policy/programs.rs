//! Every program answers every call as its file says, for both architectures.

use crate::machine::{AARCH64, Call, I386, Verdict, X86_64, run};
use crate::meaning::{Condition, Meaning, Rule, Without};
use crate::policy::Syscalls;
use crate::{policies, sources, table};

/// Of the guest, as the kernel and this crate's build call them.
pub const ARCHITECTURES: [(&str, u32); 2] = [("x86_64", X86_64), ("aarch64", AARCH64)];
/// Above every number of both tables.
const NUMBERS: u32 = 600;
const X32_BIT: u32 = 0x4000_0000;

/// For every policy of every architecture: its name, what it says, and its answer to a call.
fn each(mut check: impl FnMut(&str, &Meaning, &str, &dyn Fn(u32, [u64; 6]) -> crate::machine::Run)) {
    let sources = sources();
    for (arch, audit) in ARCHITECTURES {
        let policies = policies(arch);
        assert_eq!(policies.len(), 10, "policies and profiles");
        for (name, policy) in policies {
            let answer = |number, arguments| run(&policy.program, &Call { arch: audit, number, arguments });
            check(&name, &Meaning::of(&name, &sources), arch, &answer);
        }
    }
}

#[test]
fn every_number_is_answered_as_the_file_says() {
    each(|name, meaning, arch, answer| {
        let all = table(arch).all();
        for number in 0..NUMBERS {
            let call = all.iter().find(|&&(known, _)| known == i64::from(number)).map(|&(_, call)| call);
            for arguments in [[0; 6], [1; 6], [u64::MAX; 6], [0x1_0000_0000; 6]] {
                let expected = meaning.verdict(call, &arguments);
                let run = answer(number, arguments);
                assert_eq!(run.verdict, expected, "{name} {arch} {number} {call:?} {arguments:x?}");
            }
        }
    });
}

#[test]
fn a_call_that_is_always_allowed_needs_no_look_at_its_arguments() {
    // Then the kernel remembers the answer and does not run the filter again.
    each(|name, meaning, arch, answer| {
        for (number, call) in table(arch).all() {
            let rules = meaning.rules.get(call).map_or(&[][..], Vec::as_slice);
            let run = answer(u32::try_from(number).unwrap(), [0; 6]);
            if rules.iter().any(Rule::always) || rules.is_empty() {
                assert!(!run.looked, "{name} {arch} {call}");
            }
        }
    });
}

#[test]
fn each_condition_decides() {
    let mut seen = 0;
    each(|name, meaning, arch, answer| {
        for (call, rules) in &meaning.rules {
            let Some(number) = table(arch).number(call) else { continue };
            if rules.iter().any(Rule::always) {
                continue;
            }
            for all in rules.iter().flat_map(|rule| rule.when.iter().chain(&rule.unless)) {
                let arguments = satisfying(all);
                let met = answer(number, arguments).verdict;
                assert_eq!(
                    met,
                    meaning.verdict(Some(call), &arguments),
                    "{name} {arch} {call} {arguments:x?}"
                );
                for condition in all {
                    let mut violated = 0;
                    let others = condition.interesting().into_iter().filter(|&value| !condition.holds(value));
                    for value in others {
                        let mut arguments = arguments;
                        arguments[condition.argument] = value;
                        let expected = meaning.verdict(Some(call), &arguments);
                        assert_eq!(
                            answer(number, arguments).verdict,
                            expected,
                            "{name} {arch} {call} {arguments:x?}"
                        );
                        let refused = match meaning.without {
                            Without::Trap => expected == Verdict::Trap,
                            Without::Allow | Without::Deny => expected != met,
                        };
                        violated += usize::from(refused);
                    }
                    // Whatever else of the rule is met.
                    assert!(violated > 0, "{name} {arch} {call}: nothing violates {condition:?} of {all:?}");
                    seen += violated;
                }
            }
        }
    });
    assert!(seen > 1000, "{seen}");
}

/// Arguments that meet all of these conditions.
fn satisfying(all: &[Condition]) -> [u64; 6] {
    let mut arguments = [0; 6];
    for condition in all {
        let same: Vec<&Condition> = all.iter().filter(|other| other.argument == condition.argument).collect();
        let candidates = same.iter().flat_map(|condition| condition.interesting());
        let value = candidates.into_iter().find(|&value| same.iter().all(|condition| condition.holds(value)));
        arguments[condition.argument] = value.expect("conditions that can be met");
    }
    arguments
}

#[test]
fn another_architecture_ends_the_process() {
    for (arch, _) in ARCHITECTURES {
        for (name, policy) in policies(arch) {
            for other in [I386, X86_64, AARCH64, 0] {
                if ARCHITECTURES.contains(&(arch, other)) {
                    continue;
                }
                for number in [0, 1, 59, 221] {
                    let call = Call { arch: other, number, arguments: [0; 6] };
                    assert_eq!(run(&policy.program, &call).verdict, Verdict::Kill, "{name} {arch} {call:x?}");
                }
            }
        }
    }
}

#[test]
fn x32_is_refused() {
    each(|name, meaning, arch, answer| {
        for number in [X32_BIT, X32_BIT | 1, X32_BIT | 59, X32_BIT | 520, u32::MAX] {
            let expected = match (meaning.without, arch) {
                (Without::Trap, _) => Verdict::Trap,
                // Numbers that aarch64 does not have.
                (Without::Allow, "aarch64") => Verdict::Allow,
                (Without::Allow | Without::Deny, _) => Verdict::Errno(libc::ENOSYS.unsigned_abs()),
            };
            assert_eq!(answer(number, [0; 6]).verdict, expected, "{name} {arch} {number:#x}");
        }
    });
}

#[test]
fn capabilities_are_the_declared_ones() {
    let sources = sources();
    for (name, policy) in policies("x86_64") {
        let mask = Meaning::of(&name, &sources)
            .capabilities
            .iter()
            .map(|name| 1 << crate::names::CAPABILITIES.iter().position(|known| known == name).unwrap())
            .fold(0, |all: u64, one: u64| all | one);
        assert_eq!(policy.capabilities.0, mask, "{name}");
    }
}

/// Loading one is a part of every container process's start, and the kernel's work is in proportion.
#[test]
fn a_containers_filter_stays_short() {
    for (name, policy) in policies("x86_64") {
        let most = if name.starts_with("container/") { 350 } else { 400 };
        assert!(policy.program.len() < most, "{name}: {} instructions", policy.program.len());
    }
}

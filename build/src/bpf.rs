//! Makes one BPF program for each policy: a binary search for the system call's number, which ends in an
//! answer or in conditions on the arguments; seccompiler compiles these.
//!
//! The search is for speed. When a program is loaded the kernel evaluates it once for every number, to
//! remember which calls need no filter (seccomp's action cache), and a container's process loads one when it
//! starts: with a chain of comparisons that would take a third of the time of a fork and execve
//! (policy/README.md has the figures).

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::compiled::Program;
use crate::names::constant;

/// x86_64 has a second set of numbers for its calls (x32), which have this bit set.
const X32_BIT: u32 = 0x4000_0000;

/// The answer to a system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The conditions; any one of them suffices. Empty: always.
    pub when: Vec<SeccompRule>,
    /// The answer if a condition holds.
    pub then: SeccompAction,
    /// The answer if no condition holds.
    pub otherwise: SeccompAction,
}

/// The numbers from `first` up to the next range, and the code that answers them.
struct Range {
    first: u32,
    code: Program,
}

/// The first x32 number, if the architecture has x32. A filter that lists what is denied would not cover
/// these numbers.
pub fn x32(arch: &str) -> Option<u32> {
    (arch == "x86_64").then_some(X32_BIT)
}

/// The program that answers each call by its number, and every other call with `otherwise`. All numbers from
/// `beyond` on fail with ENOSYS; none of them may be in `answers`.
pub fn program(
    answers: &BTreeMap<u32, Answer>,
    otherwise: &SeccompAction,
    beyond: Option<u32>,
    arch: &str,
) -> Result<Program, String> {
    let target = TargetArch::try_from(arch).map_err(|error| error.to_string())?;
    let without = ret(otherwise);
    let mut ranges = Vec::new();
    let mut next = 0;
    for (&number, answer) in answers {
        if number > next {
            add(&mut ranges, next, without.clone());
        }
        add(&mut ranges, number, leaf(number, answer, target)?);
        next = number + 1;
    }
    if beyond != Some(next) {
        add(&mut ranges, next, without);
    }
    if let Some(first) = beyond {
        add(&mut ranges, first, ret(&SeccompAction::Errno(libc::ENOSYS.unsigned_abs())));
    }
    let mut program = architecture(target)?;
    program.push(instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0));
    program.extend(search(&ranges)?);
    Ok(program)
}

/// Adds a range, or extends the last one if the code is the same.
fn add(ranges: &mut Vec<Range>, first: u32, code: Program) {
    if ranges.last().is_none_or(|last| last.code != code) {
        ranges.push(Range { first, code });
    }
}

/// Code that ends the process if the call is of another architecture, and falls through otherwise.
fn architecture(target: TargetArch) -> Result<Program, String> {
    let mut program = compile(BTreeMap::new(), SeccompAction::Allow, SeccompAction::Trap, target)?;
    // This drops the answer, the last instruction of a filter without rules.
    program.pop();
    Ok(program)
}

/// Code that finds the range of the number in the accumulator and runs its code.
fn search(ranges: &[Range]) -> Result<Program, String> {
    if let [Range { code, .. }] = ranges {
        return Ok(code.clone());
    }
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let pivot = right.first().map(|range| range.first).ok_or("a search in nothing")?;
    let below = search(left)?;
    let jump = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    let mut program = match u8::try_from(below.len()) {
        Ok(over) => vec![instruction(jump, over, 0, pivot)],
        // A conditional jump reaches 255 instructions, an unconditional one any number.
        Err(_) => {
            let over = u32::try_from(below.len()).map_err(|error| error.to_string())?;
            vec![instruction(jump, 0, 1, pivot), instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, over)]
        }
    };
    program.extend(below);
    program.extend(search(right)?);
    Ok(program)
}

/// The code that answers one call.
fn leaf(number: u32, answer: &Answer, target: TargetArch) -> Result<Program, String> {
    if answer.when.is_empty() {
        return Ok(ret(&answer.then));
    }
    let rules = BTreeMap::from([(i64::from(number), answer.when.clone())]);
    let program = compile(rules, answer.otherwise.clone(), answer.then.clone(), target)?;
    // The compiled filter begins with another check of the architecture, which is not needed here.
    let known = architecture(target)?;
    Ok(program.strip_prefix(known.as_slice()).map_or(program.clone(), <[u64]>::to_vec))
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    then: SeccompAction,
    target: TargetArch,
) -> Result<Program, String> {
    let program = SeccompFilter::new(rules, otherwise, then, target)
        .and_then(BpfProgram::try_from)
        .map_err(|error| error.to_string())?;
    Ok(program.iter().map(|i| instruction(u32::from(i.code), i.jt, i.jf, i.k)).collect())
}

fn ret(action: &SeccompAction) -> Program {
    vec![instruction(libc::BPF_RET | libc::BPF_K, 0, 0, u32::from(action.clone()))]
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> u64 {
    u64::from(code) << 48 | u64::from(jt) << 40 | u64::from(jf) << 32 | u64::from(k)
}

/// The rule that holds if all of these conditions hold.
pub fn all(conditions: &[String]) -> Result<SeccompRule, String> {
    let conditions = conditions.iter().map(|text| condition(text)).collect::<Result<Vec<_>, _>>()?;
    SeccompRule::new(conditions).map_err(|error| error.to_string())
}

/// Parses `argN[:32] [& MASK] OP VALUE`. `:32` compares the low 32 bits, for arguments of which the kernel
/// looks at no more; otherwise the whole argument counts.
fn condition(text: &str) -> Result<SeccompCondition, String> {
    let bad = |why: &str| format!("the condition {text:?} {why}");
    let words: Vec<&str> = text.split_whitespace().collect();
    let (argument, mask, operator, value) = match words.as_slice() {
        [argument, operator, value] => (*argument, None, *operator, *value),
        [argument, "&", mask, operator, value] => (*argument, Some(*mask), *operator, *value),
        _ => return Err(bad("is not `argN[:32] [& MASK] OP VALUE`")),
    };
    let (argument, low) = match argument.strip_suffix(":32") {
        Some(argument) => (argument, true),
        None => (argument, false),
    };
    let index = argument
        .strip_prefix("arg")
        .and_then(|index| index.parse::<u8>().ok())
        .filter(|&index| index < 6)
        .ok_or_else(|| bad("names no argument arg0 to arg5"))?;
    let number = |word: &str| {
        let number = number(word).ok_or_else(|| bad(&format!("has the unknown value {word}")))?;
        if low && number > u64::from(u32::MAX) {
            return Err(bad(&format!("narrows {word} to 32 bits: it says something else than it reads")));
        }
        Ok(number)
    };
    let value = number(value)?;
    let most = if low { u64::from(u32::MAX) } else { u64::MAX };
    let operator = match (operator, mask.map(number).transpose()?) {
        ("<", None) if value == 0 => return Err(bad("can never hold")),
        (">", None) if value == most => return Err(bad("can never hold")),
        (">=", None) if value == 0 => return Err(bad("says nothing: it always holds")),
        ("<=", None) if value == most => return Err(bad("says nothing: it always holds")),
        (_, Some(0)) => return Err(bad("says nothing: no bit is left")),
        ("==", Some(mask)) if value & !mask != 0 => {
            return Err(bad("can never hold: the value has bits outside the mask"));
        }
        ("==", Some(mask)) => SeccompCmpOp::MaskedEq(mask),
        ("==", None) => SeccompCmpOp::Eq,
        ("!=", None) => SeccompCmpOp::Ne,
        ("<", None) => SeccompCmpOp::Lt,
        ("<=", None) => SeccompCmpOp::Le,
        (">", None) => SeccompCmpOp::Gt,
        (">=", None) => SeccompCmpOp::Ge,
        _ => return Err(bad("has no such operator")),
    };
    // With a mask of low bits a comparison of 32 bits is enough, and shorter.
    let low = low || matches!(operator, SeccompCmpOp::MaskedEq(mask) if mask <= u64::from(u32::MAX));
    let width = if low { SeccompCmpArgLen::Dword } else { SeccompCmpArgLen::Qword };
    SeccompCondition::new(index, width, operator, value).map_err(|error| bad(&error.to_string()))
}

/// A number, the name of a constant, or several of these combined with `|`.
fn number(word: &str) -> Option<u64> {
    word.split('|').try_fold(0, |all, word| {
        let one = match word.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => word.parse().ok().or_else(|| constant(word)),
        };
        one.map(|one| all | one)
    })
}

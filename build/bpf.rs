//! One BPF program for each policy: a binary search for the system call's number, and at its end an answer or the
//! conditions on the arguments, which seccompiler compiles.
//!
//! The search is for speed. The kernel walks a program once for every number when it is loaded, to remember which
//! calls need no filter (seccomp's action cache), and a container's process loads one at its start: a chain of
//! comparisons costs that start a third of a fork and execve (policy/README.md has the figures).

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::compiled::Program;
use crate::names::constant;

/// x86_64 has a second set of numbers for the same calls (x32), with this bit set.
const X32_BIT: u32 = 0x4000_0000;

/// What a system call is answered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Any of these; empty: always.
    pub when: Vec<SeccompRule>,
    /// The answer then.
    pub then: SeccompAction,
}

/// The program that answers each call by number, and every other with `otherwise`. `refuse_x32`: a list of what is denied
/// would miss x32's numbers, so they fail with ENOSYS as a whole; a list of what is allowed does not have them.
pub fn program(
    answers: &BTreeMap<u32, Answer>,
    otherwise: &SeccompAction,
    arch: &str,
) -> Result<Program, String> {
    let target = TargetArch::try_from(arch).map_err(|error| error.to_string())?;
    let mut segments = vec![(0, ret(otherwise))];
    let mut add = |start: u32, code: Vec<u64>| match segments.last_mut() {
        Some((at, last)) if *at == start => *last = code,
        Some((_, last)) if *last == code => {}
        _ => segments.push((start, code)),
    };
    for (&number, answer) in answers {
        add(number, leaf(number, answer, otherwise, target)?);
        add(number + 1, ret(otherwise));
    }
    if arch == "x86_64" && *otherwise == SeccompAction::Allow {
        add(X32_BIT, ret(&SeccompAction::Errno(libc::ENOSYS.unsigned_abs())));
    }
    let mut program = architecture(target)?;
    program.push(instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0));
    program.extend(search(&segments));
    Ok(program)
}

/// Ends the process when the call is of another architecture; goes on after its last instruction otherwise.
fn architecture(target: TargetArch) -> Result<Program, String> {
    let mut program = compile(BTreeMap::new(), SeccompAction::Allow, SeccompAction::Trap, target)?;
    // What is left of a filter without rules: its answer.
    program.pop();
    Ok(program)
}

/// The number is in the accumulator: finds the last segment that starts at or before it.
fn search(segments: &[(u32, Vec<u64>)]) -> Program {
    let (left, right) = segments.split_at(segments.len() / 2);
    let Some((pivot, code)) = right.first() else { return Vec::new() };
    if left.is_empty() {
        return code.clone();
    }
    let jump = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    let below = search(left);
    let mut program = match u8::try_from(below.len()) {
        Ok(over) => vec![instruction(jump, over, 0, *pivot)],
        // A conditional jump reaches 255 instructions, the other kind all.
        Err(_) => vec![
            instruction(jump, 0, 1, *pivot),
            instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, u32::try_from(below.len()).unwrap_or(u32::MAX)),
        ],
    };
    program.extend(below);
    program.extend(search(right));
    program
}

/// The answer to one call.
fn leaf(
    number: u32,
    answer: &Answer,
    otherwise: &SeccompAction,
    target: TargetArch,
) -> Result<Vec<u64>, String> {
    if answer.when.is_empty() {
        return Ok(ret(&answer.then));
    }
    let rules = BTreeMap::from([(i64::from(number), answer.when.clone())]);
    compile(rules, otherwise.clone(), answer.then.clone(), target)
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

fn ret(action: &SeccompAction) -> Vec<u64> {
    vec![instruction(libc::BPF_RET | libc::BPF_K, 0, 0, u32::from(action.clone()))]
}

fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> u64 {
    u64::from(code) << 48 | u64::from(jt) << 40 | u64::from(jf) << 32 | u64::from(k)
}

/// All of these conditions.
pub fn all(conditions: &[String]) -> Result<SeccompRule, String> {
    let conditions = conditions.iter().map(|text| condition(text)).collect::<Result<Vec<_>, _>>()?;
    SeccompRule::new(conditions).map_err(|error| error.to_string())
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
    let operator = match (operator, mask.map(number).transpose()?) {
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
    let width = if low { SeccompCmpArgLen::Dword } else { SeccompCmpArgLen::Qword };
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

//! What the compiler refuses, by file, line and reason.

use crate::format::Source;
use crate::machine::{Call, Verdict, X86_64, run};
use crate::policy::{Compiled, compile};
use crate::table;

/// A policy file with these capabilities and rules; the first of either is on line 5 and on line 8 + their
/// number.
fn file(default: &str, head: &str, capabilities: &[&str], include: &str, rules: &[&str]) -> String {
    let lines = |items: &[&str]| items.join(",\n");
    format!(
        "{{\n\"about\": \"a test\",\n{head}\"no_new_privs\": true,\n\"capabilities\": [\n{}\n],\n\"seccomp\": {{\"default\": \
         \"{default}\", {include}\"rules\": [\n{}\n]}}\n}}\n",
        lines(capabilities),
        lines(rules)
    )
}

fn source(name: &str, text: String) -> Source {
    Source { name: name.to_owned(), file: format!("policy/{name}.json"), text }
}

fn errors(sources: &[Source]) -> Vec<String> {
    compile(sources, "x86_64", &table("x86_64")).expect_err("a mistake was accepted")
}

/// The error of a trapping policy with these rules, which are on lines 8 and on.
fn refused(rules: &[&str]) -> String {
    let errors = errors(&[source("p", file("trap", "", &[], "", rules))]);
    assert_eq!(errors.len(), 1, "{errors:?}");
    errors[0].clone()
}

const READ: &str = r#"{"syscall": "read", "why": "input"}"#;

#[test]
fn a_good_policy_compiles() {
    let text = file("trap", "", &[r#"{"name": "CAP_KILL", "why": "signals"}"#], "", &[READ]);
    let compiled = compile(&[source("p", text)], "x86_64", &table("x86_64")).unwrap();
    let [(name, Compiled::Policy(policy))] = compiled.as_slice() else { panic!("{compiled:?}") };
    assert_eq!((name.as_str(), policy.capabilities.0), ("p", 1 << 5));
    let printed: Vec<&str> = policy.rules.iter().map(|(what, _)| what.as_str()).collect();
    assert_eq!(printed, ["CAP_KILL", "read"]);
}

#[test]
fn rules_are_sorted_and_written_once() {
    let write = r#"{"syscall": "write", "why": "output"}"#;
    assert_eq!(
        refused(&[write, READ]),
        "policy/p.json:9: read: is not in alphabetical order, or there twice"
    );
    assert_eq!(refused(&[READ, READ]), "policy/p.json:9: read: is not in alphabetical order, or there twice");
}

#[test]
fn rules_are_explained() {
    assert_eq!(
        refused(&[READ, r#"{"syscall": "write", "why": " "}"#]),
        "policy/p.json:9: write: is not explained"
    );
    assert_eq!(
        refused(&[READ, r#"{"syscall": "write"}"#]),
        "policy/p.json:9: missing field `why` at line 9 column 20"
    );
}

#[test]
fn a_rule_that_nobody_is_seen_to_use_is_explained() {
    for key in ["unseen", "varies"] {
        let rule = |reason: &str| format!(r#"{{"syscall": "write", "why": "output", "{key}": "{reason}"}}"#);
        assert_eq!(refused(&[READ, &rule(" ")]), "policy/p.json:9: write: is not explained");
        let sources = [source("p", file("trap", "", &[], "", &[READ, &rule("only on Sundays")]))];
        assert!(compile(&sources, "x86_64", &table("x86_64")).is_ok());
    }
    let both = r#"{"syscall": "write", "why": "output", "unseen": "no", "varies": "perhaps"}"#;
    assert_eq!(refused(&[READ, both]), "policy/p.json:9: write: has `unseen` and `varies`");
    let kill = r#"{"name": "CAP_KILL", "why": "signals", "unseen": ""}"#;
    let errors = errors(&[source("p", file("trap", "", &[kill], "", &[]))]);
    assert_eq!(errors, ["policy/p.json:5: CAP_KILL: is not explained"]);
}

#[test]
fn names_are_known() {
    let error = refused(&[READ, r#"{"syscall": "wriet", "why": "output"}"#]);
    assert_eq!(error, "policy/p.json:9: wriet: no such system call");
    let error = refused(&[READ, r#"{"syscall": "write", "why": "output", "wehn": []}"#]);
    assert!(error.starts_with("policy/p.json:9: unknown field `wehn`"), "{error}");
    let error = refused(&[r#"{"syscall": "clone3", "why": "threads", "errno": "ENOSY"}"#]);
    assert_eq!(error, "policy/p.json:8: clone3: no such errno: ENOSY");
    // A constant, and no error.
    let error = refused(&[r#"{"syscall": "clone3", "why": "threads", "errno": "AF_UNIX"}"#]);
    assert_eq!(error, "policy/p.json:8: clone3: no such errno: AF_UNIX");
}

#[test]
fn another_architectures_calls_are_known_to_be() {
    let rule = r#"{"syscall": "open", "why": "files"}"#;
    let sources = [source("p", file("trap", "", &[], "", &[rule]))];
    assert!(compile(&sources, "x86_64", &table("x86_64")).is_ok());
    let errors = compile(&sources, "aarch64", &table("aarch64")).unwrap_err();
    assert_eq!(
        errors,
        ["policy/p.json:8: open: not on this architecture; `optional` says that this is known"]
    );
    let rule = r#"{"syscall": "open", "why": "files", "optional": true}"#;
    assert!(
        compile(&[source("p", file("trap", "", &[], "", &[rule]))], "aarch64", &table("aarch64")).is_ok()
    );
    let rule = r#"{"syscall": "opne", "why": "files", "optional": true}"#;
    assert_eq!(refused(&[rule]), "policy/p.json:8: opne: no such system call");
    let errors = compile(&[], "riscv64", &table("riscv64"));
    assert_eq!(errors.unwrap().len(), 0);
    assert!(compile(&sources, "sparc64", &table("sparc64")).is_err());
}

#[test]
fn conditions_mean_something() {
    for (condition, why) in [
        ("arg1 == ", "is not `argN[:32] [& MASK] OP VALUE`"),
        ("arg1 == 1 2", "is not `argN[:32] [& MASK] OP VALUE`"),
        ("arg6 == 1", "names no argument arg0 to arg5"),
        ("argument == 1", "names no argument arg0 to arg5"),
        ("arg1:16 == 1", "names no argument arg0 to arg5"),
        ("arg1 = 1", "has no such operator"),
        ("arg1 & 1 > 0", "has no such operator"),
        ("arg1 == F_STEFL", "has the unknown value F_STEFL"),
        ("arg1 == F_SETFL|F_GTEFL", "has the unknown value F_SETFL|F_GTEFL"),
        ("arg1 == -1", "has the unknown value -1"),
        ("arg1:32 == 0x100000000", "narrows 0x100000000 to 32 bits: it says something else than it reads"),
        (
            "arg1:32 & 0x100000000 == 0",
            "narrows 0x100000000 to 32 bits: it says something else than it reads",
        ),
        ("arg1 & 1 == 2", "can never hold: the value has bits outside the mask"),
        ("arg1 & 0 == 0", "says nothing: no bit is left"),
        ("arg1 < 0", "can never hold"),
        ("arg1 >= 0", "says nothing: it always holds"),
        ("arg1:32 > 0xffffffff", "can never hold"),
        ("arg1:32 <= 0xffffffff", "says nothing: it always holds"),
    ] {
        let rule = format!(r#"{{"syscall": "fcntl", "why": "flags", "when": [["{condition}"]]}}"#);
        let expected = format!("policy/p.json:8: fcntl: the condition {condition:?} {why}");
        assert_eq!(refused(&[&rule]), expected);
    }
    for (conditions, why) in [
        (
            r#""when": [[], ["arg0 == 1"]]"#,
            "has an empty list of conditions, which always holds: the others then say nothing",
        ),
        (
            r#""unless": [[]]"#,
            "has an empty list of conditions, which always holds: the others then say nothing",
        ),
        (r#""when": [["arg0 == 1"], ["arg0 == 1"]]"#, "has the same conditions twice"),
        (r#""when": [["arg0 == 1"]], "unless": [["arg0 == 2"]]"#, "has `when` and `unless`"),
        (
            r#""when": [["arg0 == 1"]], "errno": "ENOSYS""#,
            "fails only under conditions, in a list of what is allowed: say what is",
        ),
    ] {
        let rule = format!(r#"{{"syscall": "fcntl", "why": "flags", {conditions}}}"#);
        assert_eq!(refused(&[&rule]), format!("policy/p.json:8: fcntl: {why}"));
    }
}

#[test]
fn every_operator_and_width() {
    const HIGH: u64 = 0x7_0000_0000;
    for (condition, holds, fails) in [
        ("arg3 == 5", vec![5], vec![4, 6, HIGH | 5]),
        ("arg3 != 5", vec![4, 6, HIGH | 5], vec![5]),
        ("arg3 < 5", vec![0, 4], vec![5, 6, HIGH]),
        ("arg3 <= 5", vec![0, 5], vec![6, HIGH | 5]),
        ("arg3 > 5", vec![6, HIGH, HIGH | 5], vec![5, 0]),
        ("arg3 >= 5", vec![5, 6, HIGH], vec![4, 0]),
        ("arg3 > 0x700000005", vec![HIGH | 6, u64::MAX], vec![6, HIGH | 5, u64::from(u32::MAX)]),
        ("arg3 & 0x6 == 0x2", vec![2, 3, HIGH | 2], vec![0, 4, 6]),
        ("arg3 & 0x200000006 == 0x200000002", vec![HIGH | 2], vec![2, 0x1_0000_0002]),
        ("arg3:32 == 5", vec![5, HIGH | 5], vec![4]),
        ("arg3:32 != 5", vec![4, HIGH], vec![5, HIGH | 5]),
        ("arg3:32 < 5", vec![4, HIGH], vec![5, HIGH | 5]),
        ("arg3:32 & 1|4 == 4", vec![4, HIGH | 6], vec![5, 0, HIGH]),
    ] {
        for (key, met) in [("when", Verdict::Allow), ("unless", Verdict::Trap)] {
            let rule = format!(r#"{{"syscall": "fcntl", "why": "flags", "{key}": [["{condition}"]]}}"#);
            let sources = [source("p", file("trap", "", &[], "", &[&rule, READ]))];
            let compiled = compile(&sources, "x86_64", &table("x86_64")).unwrap();
            let Some((_, Compiled::Policy(policy))) = compiled.first() else { panic!() };
            let answer = |value| {
                let call = Call { arch: X86_64, number: 72, arguments: [0, 0, 0, value, 0, 0] };
                run(&policy.program, &call).verdict
            };
            let missed = if met == Verdict::Allow { Verdict::Trap } else { Verdict::Allow };
            holds.iter().for_each(|&value| assert_eq!(answer(value), met, "{key} {condition} {value:#x}"));
            fails.iter().for_each(|&value| assert_eq!(answer(value), missed, "{key} {condition} {value:#x}"));
        }
    }
}

#[test]
fn capabilities_are_sorted_explained_and_known() {
    let refused = |rules: &[&str]| errors(&[source("p", file("trap", "", rules, "", &[]))]);
    let kill = r#"{"name": "CAP_KILL", "why": "signals"}"#;
    for (rules, error) in [
        (
            vec![kill, r#"{"name": "CAP_CHOWN", "why": "owners"}"#],
            "policy/p.json:6: CAP_CHOWN: is not in alphabetical order, or there twice",
        ),
        (vec![kill, kill], "policy/p.json:6: CAP_KILL: is not in alphabetical order, or there twice"),
        (vec![r#"{"name": "CAP_KILL", "why": ""}"#], "policy/p.json:5: CAP_KILL: is not explained"),
        (vec![r#"{"name": "CAP_KIL", "why": "signals"}"#], "policy/p.json:5: CAP_KIL: no such capability"),
        (vec![r#"{"of": "nobody", "why": "signals"}"#], "policy/p.json:5: nobody: no such policy"),
        (
            vec![r#"{"of": "p", "why": "itself"}"#],
            "policy/p.json:5: p: says itself whose capabilities it has: name those",
        ),
        (
            vec![r#"{"name": "CAP_KILL", "of": "p", "why": "signals"}"#],
            "policy/p.json:5: CAP_KILL: is not either a `name` or an `of`",
        ),
    ] {
        assert_eq!(refused(&rules), [error]);
    }
}

#[test]
fn a_file_says_what_it_is_about() {
    let text = file("trap", "", &[], "", &[READ]).replace("a test", " ");
    assert_eq!(errors(&[source("p", text)]), ["policy/p.json:2: about: says nothing"]);
    let text = file("trap", "", &[], "", &[READ]).replace("about", "abuot");
    assert!(errors(&[source("p", text)])[0].starts_with("policy/p.json:2: unknown field `abuot`"));
    assert!(errors(&[source("p", "{\n".to_owned())])[0].starts_with("policy/p.json:2: EOF"));
}

/// A policy that denies by default, with these groups; the first of them is on line 7.
fn grouped(groups: &[&str], rules: &[&str]) -> Source {
    let groups = format!("\"groups\": [\n{}\n], ", groups.join(",\n"));
    source(
        "p",
        file("deny", "", &[], &groups, rules).replace("\"capabilities\": [\n\n]", "\"capabilities\": []"),
    )
}

#[test]
fn a_group_has_one_reason_and_is_checked_as_rules_are() {
    let refused = |groups: &[&str], rules: &[&str]| errors(&[grouped(groups, rules)]);
    let files = r#"{"why": "files", "syscalls": ["read", "write"]}"#;
    for (groups, rules, error) in [
        (
            vec![r#"{"why": "files", "syscalls": ["write", "read"]}"#],
            vec![],
            "policy/p.json:6: read: is not in alphabetical order, or there twice",
        ),
        (vec![r#"{"why": " ", "syscalls": ["read"]}"#], vec![], "policy/p.json:6: read: is not explained"),
        (
            vec![r#"{"why": "files", "syscalls": ["raed"]}"#],
            vec![],
            "policy/p.json:6: raed: no such system call",
        ),
        (
            vec![files, r#"{"why": "again", "syscalls": ["read"]}"#],
            vec![],
            "policy/p.json:7: read: narrows nothing: it always holds by policy/p.json:6",
        ),
        (
            vec![files],
            vec![READ],
            "policy/p.json:8: read: narrows nothing: it always holds by policy/p.json:6",
        ),
    ] {
        assert_eq!(refused(&groups, &rules), [error], "{groups:?}");
    }
}

#[test]
fn what_a_list_of_what_is_allowed_does_not_name_fails() {
    let clone3 = r#"{"syscall": "clone3", "why": "flags behind a pointer", "errno": "ENOSYS"}"#;
    let dup = r#"{"syscall": "dup3", "why": "a test", "when": [["arg0 == 7"]]}"#;
    let sources = [grouped(&[r#"{"why": "files", "syscalls": ["read", "write"]}"#], &[clone3, dup])];
    let compiled = compile(&sources, "x86_64", &table("x86_64")).unwrap();
    let Some((_, Compiled::Policy(policy))) = compiled.first() else { panic!() };
    let answer = |number, first| {
        run(&policy.program, &Call { arch: X86_64, number, arguments: [first, 0, 0, 0, 0, 0] }).verdict
    };
    let highest = u32::try_from(table("x86_64").all().last().unwrap().0).unwrap();
    let (eperm, enosys) = (Verdict::Errno(1), Verdict::Errno(38));
    for (number, first, expected) in [
        (0, 0, Verdict::Allow),
        (1, 0, Verdict::Allow),
        (2, 0, eperm),
        (435, 0, enosys),
        (292, 7, Verdict::Allow),
        (292, 6, eperm),
        // A number that no call has, and what is beyond.
        (400, 0, enosys),
        (highest, 0, eperm),
        (highest + 1, 0, enosys),
        (0x4000_0000, 0, enosys),
        (u32::MAX, 0, enosys),
    ] {
        assert_eq!(answer(number, first), expected, "{number} {first}");
    }
}

/// A list whose rules are on lines 4 and on.
fn list(default: &str, rules: &[&str]) -> Source {
    let rules = rules.join(",\n");
    let text = format!("{{\"about\": \"a list\",\n\"default\": \"{default}\",\n\"rules\": [\n{rules}\n]}}\n");
    source("lists/common", text)
}

const INCLUDE: &str = r#""include": ["common"], "#;

#[test]
fn a_list_and_a_file_add_up() {
    let some = r#"{"syscall": "fcntl", "why": "flags", "when": [["arg1 == 1"]]}"#;
    let more = r#"{"syscall": "fcntl", "why": "more flags", "when": [["arg1 == 2"]]}"#;
    let all = r#"{"syscall": "fcntl", "why": "flags"}"#;
    for (own, allowed) in [(more, 1..=2), (all, 0..=3)] {
        let sources = [list("trap", &[some, READ]), source("p", file("trap", "", &[], INCLUDE, &[own]))];
        let compiled = compile(&sources, "x86_64", &table("x86_64")).unwrap();
        let Some((_, Compiled::Policy(policy))) = compiled.first() else { panic!() };
        for value in 0..=3 {
            let call = Call { arch: X86_64, number: 72, arguments: [0, value, 0, 0, 0, 0] };
            let expected = if allowed.contains(&value) { Verdict::Allow } else { Verdict::Trap };
            assert_eq!(run(&policy.program, &call).verdict, expected, "{own} {value}");
        }
        let printed: Vec<&str> = policy.rules.iter().map(|(_, why)| why.as_str()).collect();
        assert_eq!(printed.len(), 3, "{printed:?}");
    }
    for (listed, own, why) in [
        (all, some, "narrows nothing: it always holds by policy/lists/common.json:4"),
        (all, all, "narrows nothing: it always holds by policy/lists/common.json:4"),
        (some, some, "has conditions that are already in policy/lists/common.json:4"),
        (
            some,
            r#"{"syscall": "fcntl", "why": "no", "errno": "ENOSYS"}"#,
            "has another answer in policy/lists/common.json:4",
        ),
        (
            some,
            r#"{"syscall": "fcntl", "why": "other flags", "unless": [["arg1 == 2"]]}"#,
            "has an `unless`, here or there, and does not add up with policy/lists/common.json:4",
        ),
    ] {
        let sources = [list("trap", &[listed]), source("p", file("trap", "", &[], INCLUDE, &[own]))];
        assert_eq!(errors(&sources), [format!("policy/p.json:8: fcntl: {why}")]);
    }
}

#[test]
fn a_list_is_checked_too_and_says_which_kind_it_is() {
    let policy = source("p", file("trap", "", &[], INCLUDE, &[]));
    assert_eq!(
        errors(&[list("allow", &[READ]), policy.clone()]),
        ["policy/p.json:7: common: allows where this file denies, or the other way round"]
    );
    assert_eq!(errors(std::slice::from_ref(&policy)), ["policy/p.json:7: common: no such list"]);
    let twice = list("trap", &[READ, READ]);
    assert_eq!(
        errors(&[twice, policy]),
        ["policy/lists/common.json:5: read: is not in alphabetical order, or there twice"]
    );
}

#[test]
fn nothing_is_allowed_that_is_denied_above() {
    let kill = r#"{"name": "CAP_KILL", "why": "signals"}"#;
    let over = |rules: &[&str]| {
        let text = file("allow", "", &[kill], "", rules)
            .replace("\"no_new_privs\": true", "\"no_new_privs\": false");
        source("over", text)
    };
    let middle = source("middle", {
        let text = file("allow", "\"below\": \"over\",\n", &[], "", &[]);
        text.replace("\"no_new_privs\": true", "\"no_new_privs\": false")
    });
    let under = |capabilities: &[&str]| {
        source("under", file("trap", "\"below\": \"middle\",\n", capabilities, "", &[READ]))
    };
    let deny = r#"{"syscall": "read", "why": "a test"}"#;
    let sometimes = r#"{"syscall": "read", "why": "a test", "when": [["arg0 == 7"]]}"#;
    assert_eq!(
        errors(&[over(&[deny]), middle.clone(), under(&[])]),
        ["policy/under.json:9: read: is denied by over, above it: policy/over.json:8"]
    );
    assert!(
        compile(&[over(&[sometimes]), middle.clone(), under(&[kill])], "x86_64", &table("x86_64")).is_ok()
    );
    assert_eq!(
        errors(&[over(&[]), middle.clone(), under(&[r#"{"name": "CAP_CHOWN", "why": "owners"}"#])]),
        ["policy/under.json:3: CAP_CHOWN: over, above it, does not have it"]
    );
    assert_eq!(errors(&[middle]), ["policy/middle.json:3: over: no such policy"]);
}

#[test]
fn what_is_above_lets_something_be_below() {
    let traps = source("over", file("trap", "", &[], "", &[READ]));
    let under = source("under", file("trap", "\"below\": \"over\",\n", &[], "", &[READ]));
    assert_eq!(errors(&[traps, under.clone()]), ["policy/under.json:3: over: nothing can be below it"]);
    let over = source("over", file("allow", "", &[], "", &[]));
    let setuid = source("under", under.text.replace("\"no_new_privs\": true", "\"no_new_privs\": false"));
    assert_eq!(
        errors(&[over, setuid]),
        ["policy/under.json:3: over: has set no_new_privs for all that is below it"]
    );
    let round = source("under", file("allow", "\"below\": \"under\",\n", &[], "", &[]));
    assert_eq!(errors(&[round]), ["policy/under.json:3: under: nothing can be below it"]);
}

#[test]
fn every_mistake_is_told_at_once() {
    let bad = file("trap", "", &[], "", &[READ, READ]);
    assert_eq!(errors(&[source("one", bad.clone()), source("two", bad)]).len(), 2);
}

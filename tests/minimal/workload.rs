//! What makes the guest's processes do what they do: the tests that start them on this machine.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use serde_json::Value;

/// Each with the tests of it that run on this machine's kernel. tests/hostile, tests/escape and tests/faults are not in it: they
/// have processes do what nobody has a use for, or have a tracer of their own.
type Program = (&'static str, &'static [&'static str]);

/// By itself: it starts processes that may have a handful of descriptors, and the kernel lets such a one send none while others
/// of its user have more under way.
const ALONE: Program = ("execd", &[]);
/// The others, the longest first.
const TOGETHER: [Program; 8] = [
    ("pod", &[]),
    ("streamd", &[]),
    ("resilience", &[]),
    ("netd", &[]),
    ("mountd", &[]),
    ("network", &["local::"]),
    ("openings", &["in_namespaces"]),
    // Their panics, aborts and last words.
    ("confined", &["panic", "allocation", "forbidden"]),
];

/// The programs, built as this one is.
pub fn programs() -> BTreeMap<String, PathBuf> {
    let cargo = Path::new(env!("CARGO"));
    // Under sudo a search path may lack the compiler, which is beside cargo.
    let paths = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect::<Vec<_>>();
    let paths = cargo.parent().map(Path::to_path_buf).into_iter().chain(paths);
    let mut command = Command::new(cargo);
    command
        .args(["test", "--locked", "--no-run", "--message-format=json"])
        .env("PATH", std::env::join_paths(paths).unwrap());
    for (name, _) in TOGETHER.iter().chain([&ALONE]) {
        command.args(["--test", name]);
    }
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "the workload does not build");
    let messages = String::from_utf8(output.stdout).unwrap();
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    messages
        .filter(|message| message["target"]["kind"][0] == "test")
        .filter_map(|message| {
            Some((message["target"]["name"].as_str()?.to_owned(), message["executable"].as_str()?.into()))
        })
        .collect()
}

/// Runs them, two at a time, for they mostly wait; what those say that failed.
pub fn run(programs: &BTreeMap<String, PathBuf>) -> Vec<String> {
    let failures = Mutex::new(Vec::new());
    let run = |(name, filters): Program| {
        let mut command = Command::new(&programs[name]);
        let output = command.args(filters).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            failures.lock().unwrap().push(format!("{name}, {}:\n{text}", output.status));
        }
    };
    run(ALONE);
    let queue = Mutex::new(VecDeque::from(TOGETHER));
    let next = || queue.lock().unwrap().pop_front();
    let lane = || {
        while let Some(program) = next() {
            run(program);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(lane);
        scope.spawn(lane);
    });
    failures.into_inner().unwrap()
}

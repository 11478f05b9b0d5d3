//! What makes the guest's processes do what they do: the tests that start them on this machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// Each with the tests of it that run on this machine's kernel. tests/hostile, tests/escape and tests/faults
/// are not in it: they have processes do what nobody has a use for, or have a tracer of their own.
const WORKLOAD: [(&str, &[&str]); 9] = [
    // Their panics, aborts and last words.
    ("confined", &["panic", "allocation", "forbidden"]),
    ("execd", &[]),
    ("mountd", &[]),
    ("netd", &[]),
    ("network", &["local::"]),
    ("openings", &["in_namespaces"]),
    ("pod", &[]),
    ("resilience", &[]),
    ("streamd", &[]),
];

/// Those of which every test runs here.
pub fn whole() -> Vec<&'static str> {
    WORKLOAD.iter().filter(|(_, filters)| filters.is_empty()).map(|(name, _)| *name).collect()
}

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
    for (name, _) in WORKLOAD {
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

/// Runs them one after another, as cargo does; what those say that failed. Two at a time they are faster by a
/// third, but they disturb each other: the kernel counts what a user's processes send each other (descriptors
/// under way) for all of them together.
pub fn run(programs: &BTreeMap<String, PathBuf>) -> Vec<String> {
    let mut failures = Vec::new();
    for (name, filters) in WORKLOAD {
        let mut command = Command::new(&programs[name]);
        let output = command.args(filters).current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            failures.push(format!("{name}, {}:\n{text}", output.status));
        }
    }
    failures
}

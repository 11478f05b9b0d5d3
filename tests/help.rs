//! Checks that `--help` of each program of the guest explains every option that the program takes.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

use std::fs;
use std::process::Command;

/// The options that a source file matches: `"--name" =>`.
fn options(source: &str) -> Vec<String> {
    let text = fs::read_to_string(format!("{}/{source}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let lines = text.lines().map(str::trim).filter(|line| line.starts_with("\"--"));
    lines.map(|line| line.split('"').nth(1).unwrap().to_owned()).collect()
}

#[test]
fn help_explains_every_option() {
    let helpers = ["netd", "mountd", "execd", "streamd"].map(|role| (role, "src/helper.rs"));
    for (name, source) in helpers.into_iter().chain([("hyperinit", "src/init/settings.rs")]) {
        let program = std::path::Path::new(env!("CARGO_BIN_EXE_hyperinit")).with_file_name(name);
        let output = Command::new(program).arg("--help").output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{name}: {output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let options = options(source);
        assert!(options.len() > 5, "{options:?}");
        for option in options {
            let explained = text.lines().any(|line| line.trim_start().starts_with(&format!("{option} ")));
            assert!(explained, "{name} --help does not explain {option}:\n{text}");
        }
    }
}

//! Compiles policy/*.json and policy/container/*.json into what the binaries embed, and the table of system call
//! names that a violation is told with.

#[path = "build/compiled.rs"]
#[allow(dead_code)]
mod compiled;
#[path = "build/names.rs"]
mod names;
#[path = "build/policy.rs"]
mod policy;

use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use policy::{Compiled, Syscalls, compile};
use serde::Serialize;
use syscalls::{aarch64, x86_64};

/// The tables of the `syscalls` crate, by architecture.
struct Table {
    arch: String,
}

impl Syscalls for Table {
    fn number(&self, name: &str) -> Option<i64> {
        match self.arch.as_str() {
            "x86_64" => name.parse::<x86_64::Sysno>().ok().map(|number| i64::from(number.id())),
            "aarch64" => name.parse::<aarch64::Sysno>().ok().map(|number| i64::from(number.id())),
            _ => None,
        }
    }

    fn exists(&self, name: &str) -> bool {
        name.parse::<x86_64::Sysno>().is_ok() || name.parse::<aarch64::Sysno>().is_ok()
    }
}

impl Table {
    /// (number, name) of every call.
    fn all(&self) -> Vec<(i64, &'static str)> {
        match self.arch.as_str() {
            "x86_64" => x86_64::Sysno::iter().map(|call| (i64::from(call.id()), call.name())).collect(),
            "aarch64" => aarch64::Sysno::iter().map(|call| (i64::from(call.id()), call.name())).collect(),
            _ => Vec::new(),
        }
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=policy");
    println!("cargo::rerun-if-changed=build");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let table = Table { arch: std::env::var("CARGO_CFG_TARGET_ARCH")? };
    let errors: Vec<String> = [("policy", ""), ("policy/container", "container-")]
        .into_iter()
        .flat_map(|(directory, prefix)| files(directory).into_iter().map(move |file| (file, prefix)))
        .filter_map(|(file, prefix)| one(&file, prefix, &table, &out).err())
        .map(|error| error.to_string())
        .collect();
    for error in &errors {
        println!("cargo::error={error}");
    }
    names(&table, &out)?;
    Ok(())
}

fn files(directory: &str) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    files.sort();
    files
}

fn one(file: &Path, prefix: &str, table: &Table, out: &Path) -> Result<(), Box<dyn Error>> {
    let text = std::fs::read_to_string(file)?;
    let bytes = match compile(&file.display().to_string(), &text, &table.arch, table)? {
        Compiled::Policy(policy) => encode(&policy)?,
        Compiled::Profile(profile) => encode(&profile)?,
    };
    let stem = file.file_stem().and_then(|stem| stem.to_str()).ok_or("a file name that is not text")?;
    std::fs::write(out.join(format!("{prefix}{stem}.policy")), bytes)?;
    Ok(())
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Box<dyn Error>> {
    Ok(bincode::serde::encode_to_vec(value, bincode::config::standard())?)
}

/// `&[(number, name)]`, sorted by number.
fn names(table: &Table, out: &Path) -> Result<(), Box<dyn Error>> {
    let mut all = table.all();
    all.sort_unstable();
    let mut text = String::from("&[");
    for (number, name) in all {
        write!(text, "({number}, {name:?}), ")?;
    }
    text.push(']');
    std::fs::write(out.join("syscalls.rs"), text)?;
    Ok(())
}

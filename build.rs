//! Compiles policy/**/*.json into what the binaries embed, and makes the table of system call names for the
//! report of a violation.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use hyperinit_policy::format::Source;
use hyperinit_policy::policy::{Compiled, compile};
use hyperinit_policy::table::Table;
use serde::Serialize;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=policy");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let table = Table { arch: std::env::var("CARGO_CFG_TARGET_ARCH")? };
    match compile(&sources(Path::new("policy"))?, &table.arch, &table) {
        Ok(all) => all.iter().try_for_each(|(name, compiled)| write(&out, name, compiled))?,
        Err(errors) => errors.iter().for_each(|error| println!("cargo::error={error}")),
    }
    names(&table, &out)
}

fn sources(root: &Path) -> Result<Vec<Source>, Box<dyn Error>> {
    let mut sources = Vec::new();
    for folder in ["", "container", "lists"] {
        for entry in std::fs::read_dir(root.join(folder))? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                let name = path.strip_prefix(root)?.with_extension("").display().to_string();
                let text = std::fs::read_to_string(&path)?;
                sources.push(Source { name, file: path.display().to_string(), text });
            }
        }
    }
    Ok(sources)
}

/// Writes a compiled file: `netd` → netd.policy, `container/default` → container-default.policy.
fn write(out: &Path, name: &str, compiled: &Compiled) -> Result<(), Box<dyn Error>> {
    let bytes = match compiled {
        Compiled::Policy(policy) => encode(policy)?,
        Compiled::Profile(profile) => encode(profile)?,
    };
    Ok(std::fs::write(out.join(format!("{}.policy", name.replace('/', "-"))), bytes)?)
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Box<dyn Error>> {
    Ok(bincode::serde::encode_to_vec(value, bincode::config::standard())?)
}

/// Writes the table of system call names: `&[(number, name)]`, sorted by number.
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

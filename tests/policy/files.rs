//! What is in policy/.

use std::path::Path;

use crate::compiled::CompiledPolicy;
use crate::format::Source;
use crate::policy::{Compiled, compile};
use crate::table::Table;

/// Every file below policy/.
pub fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("policy");
    let mut sources = Vec::new();
    for folder in ["", "container", "lists"] {
        for entry in std::fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "json") {
                let name = path.strip_prefix(&root).unwrap().with_extension("").display().to_string();
                let file = format!("policy/{name}.json");
                sources.push(Source { name, file, text: std::fs::read_to_string(&path).unwrap() });
            }
        }
    }
    sources
}

/// The system calls of an architecture.
pub fn table(arch: &str) -> Table {
    Table { arch: arch.to_owned() }
}

/// Every policy and profile, compiled.
pub fn policies(arch: &str) -> Vec<(String, CompiledPolicy)> {
    let compiled = compile(&sources(), arch, &table(arch)).unwrap();
    let policy = |compiled| match compiled {
        Compiled::Policy(policy) => policy,
        Compiled::Profile(profile) => profile.policy,
    };
    compiled.into_iter().map(|(name, compiled)| (name, policy(compiled))).collect()
}

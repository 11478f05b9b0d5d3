//! The policies: their compiler refuses what is wrong, the programs mean what the files say, and real processes live and
//! die by them. Needs root; changes nothing outside its own children.

#[path = "../../build/bpf.rs"]
mod bpf;
#[path = "../../build/compiled.rs"]
#[allow(dead_code)]
mod compiled;
#[path = "../../build/format.rs"]
mod format;
#[path = "../../build/names.rs"]
#[allow(dead_code)]
mod names;
#[path = "../../build/policy.rs"]
mod policy;
#[path = "../../build/table.rs"]
mod table;

mod compiler;
mod machine;
mod meaning;
mod processes;
mod programs;

use std::path::Path;

use compiled::CompiledPolicy;
use format::Source;
use policy::Compiled;
use table::Table;

/// Every file below policy/.
fn sources() -> Vec<Source> {
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

fn table(arch: &str) -> Table {
    Table { arch: arch.to_owned() }
}

/// Every policy and profile, compiled.
fn policies(arch: &str) -> Vec<(String, CompiledPolicy)> {
    let compiled = policy::compile(&sources(), arch, &table(arch)).unwrap();
    let policy = |compiled| match compiled {
        Compiled::Policy(policy) => policy,
        Compiled::Profile(profile) => profile.policy,
    };
    compiled.into_iter().map(|(name, compiled)| (name, policy(compiled))).collect()
}

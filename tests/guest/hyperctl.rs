//! Finds hyperctl. It is a package of its own, and cargo builds a package's programs only for the tests of
//! that package.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

/// The command that builds hyperctl.
const BUILD: &str = "cargo build --locked -p hyperctl";

/// The path of hyperctl, in the directory of the guest's program. Panics if hyperctl is missing, or older
/// than one of its sources, which cargo lists in `hyperctl.d`.
pub fn hyperctl_path() -> &'static str {
    static FOUND: OnceLock<String> = OnceLock::new();
    FOUND.get_or_init(|| {
        let program = Path::new(env!("CARGO_BIN_EXE_hyperinit")).with_file_name("hyperctl");
        let (Some(built), Ok(list)) = (modified(&program), fs::read_to_string(program.with_extension("d")))
        else {
            panic!("{} is missing: {BUILD}", program.display());
        };
        let newer =
            sources(&list).into_iter().find(|source| modified(source).is_none_or(|time| time > built));
        if let Some(newer) = newer {
            panic!("{} is older than {}: {BUILD}", program.display(), newer.display());
        }
        program.into_os_string().into_string().unwrap()
    })
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|file| file.modified()).ok()
}

/// The prerequisites of a make rule. A backslash precedes each space in a name.
fn sources(rule: &str) -> Vec<PathBuf> {
    let (_, names) = rule.trim_end().split_once(": ").unwrap_or_default();
    let names = names.replace("\\ ", "\0");
    names.split(' ').filter(|name| !name.is_empty()).map(|name| name.replace('\0', " ").into()).collect()
}

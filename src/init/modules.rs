//! Kernel modules: everything that the image carries, dependencies first, loaded at boot and never again.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::File;
use std::path::Path;
use std::time::Instant;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use crate::fault::{Fault, OrFault};

/// The order in which to load the modules of a `modules.dep` (depmod(8)): each after its dependencies.
///
/// A dependency without a line of its own is loaded too. A cycle is broken at the module that closes it.
pub fn load_order(modules_dep: &str) -> Vec<&str> {
    let needs: BTreeMap<&str, Vec<&str>> = modules_dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (module.trim(), needs.split_ascii_whitespace().collect()))
        .collect();
    let mut order = Vec::new();
    let mut seen = BTreeSet::new();
    for &module in needs.keys() {
        visit(module, &needs, &mut seen, &mut order);
    }
    order
}

/// Depth first, with an explicit stack, because the file determines the depth.
fn visit<'a>(
    module: &'a str,
    needs: &BTreeMap<&'a str, Vec<&'a str>>,
    seen: &mut BTreeSet<&'a str>,
    order: &mut Vec<&'a str>,
) {
    let mut stack = vec![(module, false)];
    while let Some((module, needs_done)) = stack.pop() {
        if needs_done {
            order.push(module);
        } else if seen.insert(module) {
            stack.push((module, true));
            stack.extend(needs.get(module).into_iter().flatten().rev().map(|&need| (need, false)));
        }
    }
}

/// Loads the modules below `directory` (`/lib/modules/<release>`). An image without modules has a kernel with
/// everything built in. A module that does not load is a warning: the feature that needs it reports the
/// failure.
pub fn load_all(directory: &Path) -> Result<(), Fault> {
    let dep = directory.join("modules.dep");
    let text = match std::fs::read_to_string(&dep) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        text => text.fault("reading", dep.display())?,
    };
    for module in load_order(&text) {
        let start = Instant::now();
        match load(&directory.join(module)) {
            Ok(()) => log::debug!("{module} took {:.1} ms", start.elapsed().as_secs_f64() * 1000.0),
            Err(fault) => log::warn!("{fault}"),
        }
    }
    Ok(())
}

fn load(path: &Path) -> Result<(), Fault> {
    let file = File::open(path).fault("opening", path.display())?;
    match finit_module(&file, &CString::default(), ModuleInitFlags::empty()) {
        // The module is already loaded, or its hardware is missing.
        Ok(()) | Err(Errno::EEXIST | Errno::ENODEV) => Ok(()),
        Err(errno) => Err(Fault::errno("loading", path.display(), errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_once() {
        let dep = "net/9p.ko: net/9pnet.ko fs/fscache.ko\nnet/9pnet.ko:\nfs/fscache.ko: fs/netfs.ko\nfs/netfs.ko:\nnet/9pnet_virtio.ko: net/9pnet.ko\n";
        let order = load_order(dep);
        let at = |name: &str| order.iter().position(|&module| module == name).unwrap();
        assert_eq!(order.len(), 5);
        assert!(at("net/9pnet.ko") < at("net/9p.ko") && at("fs/netfs.ko") < at("fs/fscache.ko"));
        assert!(at("fs/fscache.ko") < at("net/9p.ko") && at("net/9pnet.ko") < at("net/9pnet_virtio.ko"));
    }

    #[test]
    fn odd_files_are_no_trouble() {
        assert_eq!(load_order(""), Vec::<&str>::new());
        assert_eq!(load_order("no colon here\n\n"), Vec::<&str>::new());
        assert_eq!(load_order("a: b\nb: a\n").len(), 2, "a circle");
        assert_eq!(load_order("a: missing\n"), ["missing", "a"]);
        let deep: String = (0..20_000).map(|i| format!("m{i}: m{}\n", i + 1)).collect();
        assert_eq!(load_order(&deep).len(), 20_001);
    }
}

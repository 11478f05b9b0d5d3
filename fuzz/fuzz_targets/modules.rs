//! Any modules.dep: the order has every module once, after the modules that it needs unless the needs form a
//! circle.
#![forbid(unsafe_code)]
#![no_main]

use std::collections::{BTreeMap, BTreeSet};

use hyperinit::init::modules::load_order;
use hyperinit_fuzz::measure;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let (order, held) = measure(|| load_order(&text));
    assert!(held <= 64 * text.len() + 4096, "{held} bytes for a file of {}", text.len());
    let places: BTreeMap<&str, usize> = order.iter().enumerate().map(|(at, &module)| (module, at)).collect();
    assert_eq!(places.len(), order.len(), "a module twice");

    // If a module has several lines, the last one counts.
    let lines: BTreeMap<&str, Vec<&str>> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (module.trim(), needs.split_ascii_whitespace().collect()))
        .collect();
    let named: BTreeSet<&str> =
        lines.iter().flat_map(|(&module, needs)| needs.iter().copied().chain([module])).collect();
    assert!(named.iter().copied().eq(places.keys().copied()), "all that is named, and nothing else");
    for (module, needs) in &lines {
        for need in needs {
            let in_order = places[need] <= places[module];
            assert!(in_order || reaches(&lines, need, module), "{module} comes before {need}");
        }
    }
});

/// Whether a module needs another one, directly or through others.
fn reaches(lines: &BTreeMap<&str, Vec<&str>>, from: &str, to: &str) -> bool {
    let mut seen = BTreeSet::new();
    let mut next = vec![from];
    while let Some(module) = next.pop() {
        if module == to {
            return true;
        }
        if seen.insert(module) {
            next.extend(lines.get(module).into_iter().flatten());
        }
    }
    false
}

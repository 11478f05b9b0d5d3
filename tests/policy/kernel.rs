//! policy/kernel: every option of the guest kernel is in its place and has its reason. What they mean is
//! checked when the kernel is built (`hyperctl kernel --check`) and from inside it (tests/guest_kernel.rs).

use std::collections::BTreeSet;

use serde_json::Value;

/// The files and, in each, the groups and their options as they are written, which a map would sort.
fn files() -> Vec<(&'static str, String)> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("policy/kernel");
    ["common.json", "x86_64.json"]
        .map(|name| (name, std::fs::read_to_string(root.join(name)).unwrap()))
        .into()
}

/// What stands between `before` and the next quote, line by line.
fn written<'a>(text: &'a str, before: &str) -> Vec<&'a str> {
    text.lines().filter_map(|line| line.strip_prefix(before)?.split('"').next()).collect()
}

#[test]
fn the_options_of_the_guest_kernel_are_sorted_and_named_once() {
    let mut all = BTreeSet::new();
    for (name, text) in files() {
        let groups = written(&text, "    \"");
        assert!(groups.is_sorted() && groups.len() > 3, "{name}: {groups:?}");
        let value: Value = serde_json::from_str(&text).unwrap();
        let mut count = 0;
        for (group, options) in value["groups"].as_object().unwrap() {
            let options: Vec<_> =
                options.as_array().unwrap().iter().map(|entry| entry["option"].as_str().unwrap()).collect();
            assert!(options.is_sorted(), "{name}: {group}: {options:?}");
            for option in &options {
                assert!(all.insert((*option).to_owned()), "{name}: {option} is there twice");
            }
            count += options.len();
        }
        let lines = written(&text, "      {\"option\": \"");
        assert_eq!(lines.len(), count, "{name}: one option a line");
    }
}

#[test]
fn every_option_of_the_guest_kernel_has_a_reason() {
    for (name, text) in files() {
        let value: Value = serde_json::from_str(&text).unwrap();
        for entry in value["groups"].as_object().unwrap().values().flat_map(|group| group.as_array().unwrap())
        {
            let why = entry["why"].as_str().unwrap_or_default();
            assert!(why.len() >= 5 && !why.ends_with('.'), "{name}: {entry}");
            let option = entry["option"].as_str().unwrap();
            let is_name = |byte: u8| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_';
            assert!(!option.starts_with("CONFIG_") && option.bytes().all(is_name), "{name}: {entry}");
            // A feature is what an option gives.
            assert!(entry["feature"].is_null() || entry["is"] != false, "{name}: {entry}");
        }
    }
}

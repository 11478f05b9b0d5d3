//! Checks that the documents are complete and true. docs/protocol-coverage.md has a row for every command and
//! every key, every row names tests, and every test named exists. docs/protocol.md has every command and key,
//! docs/helpers.md every request. Every section of a document that is cited exists.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use hyperinit::frame::Message;
use hyperinit::wire::Role;

const DOCUMENT: &str = "docs/protocol-coverage.md";
/// The files with the types of the host's JSON.
const TYPES: [&str; 2] = ["protocol/src/spec.rs", "protocol/src/command.rs"];
/// The directory of the scenarios, which run both in namespaces and in a VM.
const SCENARIOS: &str = "tests/scenarios/";

/// A row of the table.
struct Row {
    line: String,
    /// The commands or keys of the row: the words in backticks.
    what: Vec<String>,
    /// The file and the name of each test.
    tests: Vec<(String, String)>,
}

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The words in backticks.
fn quoted(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn rows() -> Vec<Row> {
    let text = read(DOCUMENT);
    let lines = text.lines().filter(|line| line.starts_with("| ")).skip(1);
    lines
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split(" | ").collect();
            let [what, tests] = cells[..] else { panic!("not two cells: {line}") };
            let mut file = None;
            let mut named = Vec::new();
            for word in quoted(tests) {
                if word.ends_with(".rs") {
                    file = Some(word);
                } else {
                    named.push((
                        file.clone().unwrap_or_else(|| panic!("no file before {word}: {line}")),
                        word,
                    ));
                }
            }
            Row { line: line.to_owned(), what: quoted(what), tests: named }
        })
        .collect()
}

/// `Type.key` of each key that the guest reads, by the name that the host uses.
fn keys() -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    for path in TYPES {
        let (mut owner, mut renamed, mut serialized) = (String::new(), None, false);
        for line in read(path).lines().map(str::trim) {
            if let Some(attributes) = line.strip_prefix("#[derive(") {
                serialized = attributes.contains("Deserialize");
            } else if let Some(rest) = line.strip_prefix("pub struct ") {
                owner = if serialized { rest.trim_end_matches([' ', '{']).to_owned() } else { String::new() };
            } else if line == "}" {
                owner.clear();
            } else if let Some((_, name)) = line.split_once("rename = \"") {
                renamed = name.split('"').next().map(str::to_owned);
            } else if let (Some(field), false) = (line.strip_prefix("pub "), owner.is_empty()) {
                let Some((name, _)) = field.split_once(':') else { continue };
                keys.insert(format!("{owner}.{}", renamed.take().unwrap_or_else(|| camel(name))));
            }
        }
    }
    keys
}

/// camelCase, as serde makes it.
fn camel(name: &str) -> String {
    let mut words = name.split('_');
    let first = words.next().unwrap_or_default().to_owned();
    words.fold(first, |all, word| all + &word[..1].to_uppercase() + &word[1..])
}

/// Whether a file has a test of that name that runs.
fn is_test(file: &str, name: &str) -> bool {
    let text = read(file);
    let Some(at) = text.find(&format!("fn {name}(")) else { return false };
    if file.starts_with(SCENARIOS) {
        let word =
            |text: &str| text.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == name);
        // Scenarios that end their guest are called by name.
        return word(&read("tests/scenarios/mod.rs"))
            || ["tests/pod/guests.rs", "tests/vm.rs"].into_iter().all(|caller| word(&read(caller)));
    }
    // tests/confined/main.rs has its own harness: its tests are the processes that it starts.
    file == "tests/confined/main.rs" || text[..at].trim_end().ends_with("#[test]")
}

#[test]
fn every_row_names_tests_and_every_test_is_one() {
    let rows = rows();
    assert!(rows.len() > 50, "{} rows", rows.len());
    for row in rows {
        assert!(!row.tests.is_empty(), "no test: {}", row.line);
        for (file, name) in row.tests {
            assert!(is_test(&file, &name), "{file} has no test {name}");
        }
    }
}

/// docs/threat-model.md names tests, each after its file.
#[test]
fn the_threat_model_names_tests_that_exist() {
    let (mut file, mut count) = (None, 0);
    for word in quoted(&read("docs/threat-model.md")) {
        if ["src/", "tests/", "protocol/", "host/"].iter().any(|top| word.starts_with(top)) {
            file = Some(word);
        } else if word.contains('_')
            && word != "hyper_debug"
            && word.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
        {
            let file = file.as_deref().unwrap_or_else(|| panic!("no file before {word}"));
            assert!(is_test(file, &word), "{file} has no test {word}");
            count += 1;
        }
    }
    assert!(count > 50, "{count}");
}

/// docs/limits.md names constants, each with its module.
#[test]
fn every_limit_is_a_constant_of_that_name() {
    let sources = ["src", "helpers", "host", "protocol"]
        .map(|directory| files(&Path::new(env!("CARGO_MANIFEST_DIR")).join(directory), &["rs"]));
    let sources = sources.concat();
    let words = quoted(&read("docs/limits.md")).into_iter();
    let named: Vec<_> = words.filter_map(|word| Some(word.rsplit_once("::")?.1.to_owned())).collect();
    let named: Vec<_> =
        named.iter().filter(|name| name.chars().all(|c| c.is_ascii_uppercase() || c == '_')).collect();
    assert!(named.len() > 15, "{named:?}");
    for name in named {
        assert!(sources.contains(&format!("const {name}:")), "no constant is called {name}");
    }
}

/// The text of all files below a directory whose name has one of these extensions.
fn files(directory: &Path, extensions: &[&str]) -> String {
    let entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries
        .map(|path| match path.is_dir() {
            true => files(&path, extensions),
            false if extensions.iter().any(|wanted| path.extension().is_some_and(|of| of == *wanted)) => {
                fs::read_to_string(path).unwrap()
            }
            false => String::new(),
        })
        .collect()
}

/// The files and directories that cite sections of documents, as `protocol.md «Streams»`.
const CITING: [&str; 10] = [
    "src",
    "helpers",
    "host",
    "protocol",
    "tests",
    "docs",
    "README.md",
    "Cargo.toml",
    "protocol/Cargo.toml",
    "fuzz/Cargo.toml",
];

#[test]
fn every_section_that_is_cited_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let texts = CITING.map(|path| match path {
        file if root.join(file).is_file() => read(file),
        directory => files(&root.join(directory), &["rs", "md"]),
    });
    let cited: BTreeSet<(String, String)> = texts.iter().flat_map(|text| citations(text)).collect();
    assert!(cited.len() > 15, "{cited:?}");
    for (document, section) in cited {
        let text = read(&document);
        let is_heading = |line: &str| line.starts_with('#') && line.trim_start_matches('#').trim() == section;
        assert!(text.lines().any(is_heading), "{document} has no section «{section}»");
    }
}

/// The documents and sections that a text cites: the name of a document, followed directly by sections in «»,
/// separated by commas.
fn citations(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    // Written in two parts, so that this line is not itself a citation.
    for (at, _) in text.match_indices(concat!(".md", " «")) {
        let (before, behind) = text.split_at(at + ".md".len());
        let name = before.rsplit(|c: char| c.is_whitespace() || "(`[".contains(c)).next().unwrap_or_default();
        let document = if name.contains('/') || name == "CONTRIBUTING.md" { "" } else { "docs/" };
        let mut rest = behind.strip_prefix(' ');
        while let Some((section, behind)) =
            rest.and_then(|rest| rest.strip_prefix('«')).and_then(|rest| rest.split_once('»'))
        {
            found.push((format!("{document}{name}"), section.to_owned()));
            rest = behind.strip_prefix(", ");
        }
    }
    found
}

/// README is the first thing that a stranger reads: it is short, and its links lead to files.
#[test]
fn the_readme_is_short_and_its_links_exist() {
    let text = read("README.md");
    let words = text.split_whitespace().count();
    assert!(words <= 900, "{words} words");
    let links: Vec<&str> = text.split("](").skip(1).filter_map(|rest| rest.split(')').next()).collect();
    assert!(links.len() > 10, "{links:?}");
    for link in links {
        assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(link).is_file(), "README.md: no {link}");
    }
}

#[test]
fn the_protocols_page_has_every_command_and_every_key() {
    let text = read("docs/protocol.md");
    let missing: Vec<_> =
        Message::ALL.into_iter().filter(|message| !text.contains(&format!("`{message}`"))).collect();
    assert!(missing.is_empty(), "no command {missing:?}");
    let is_there =
        |key: &str| [format!("`{key}`"), format!("\"{key}\"")].iter().any(|word| text.contains(word));
    let missing: Vec<_> =
        keys().into_iter().filter(|key| !key.rsplit('.').next().is_some_and(is_there)).collect();
    assert!(missing.is_empty(), "no key {missing:?}");
}

/// docs/helpers.md has each request that a person can send to a helper.
#[test]
fn every_request_is_shown_by_hand() {
    let text = read("docs/helpers.md");
    let mut count = 0;
    for role in Role::ALL {
        let source = read(&format!("src/wire/{role}.rs"));
        let (_, requests) = source.split_once("pub enum Request {\n").unwrap();
        let variants = requests.split("\n}").next().unwrap().lines().filter_map(|line| {
            let name = line.strip_prefix("    ").filter(|name| name.starts_with(char::is_uppercase))?;
            Some(name.trim_end_matches([' ', '{', ',']))
        });
        for name in variants {
            let shown = [format!("{{\"{name}\":"), format!("{role} \"{name}\"\n")];
            assert!(shown.iter().any(|request| text.contains(request)), "{role}'s {name} is not shown");
            count += 1;
        }
    }
    assert!(count > 25, "{count}");
}

#[test]
fn every_command_has_a_row() {
    let what: BTreeSet<String> = rows().into_iter().flat_map(|row| row.what).collect();
    let missing: Vec<_> =
        Message::ALL.into_iter().map(Message::name).filter(|name| !what.contains(*name)).collect();
    assert!(missing.is_empty(), "{DOCUMENT} says nothing of {missing:?}");
}

#[test]
fn every_key_has_a_row_and_no_other_is_spoken_of() {
    let keys = keys();
    for known in ["Pod.portmappingWhiteLists", "Rlimit.type", "IpAddress.netMask", "WinSize.column"] {
        assert!(keys.contains(known), "{keys:?}");
    }
    let what: BTreeSet<String> =
        rows().into_iter().flat_map(|row| row.what).filter(|word| word.contains('.')).collect();
    assert_eq!(keys.difference(&what).collect::<Vec<_>>(), Vec::<&String>::new(), "keys without a row");
    assert_eq!(what.difference(&keys).collect::<Vec<_>>(), Vec::<&String>::new(), "rows without a key");
}

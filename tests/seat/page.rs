//! docs/seats.md: prints and reads the table of the answers.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::{env, fs};

use super::effects;
use super::reasons::{REASONS, Reason};
use super::world::{CONTAINER_ROOT, CONTAINER_USER};

/// The variable that makes the test write the page.
const WRITE: &str = "SEATS";
const PATH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/seats.md");
/// The line of the page behind which the test prints.
const MARK: &str =
    "<!-- From here on tests/seat prints this page: SEATS=write cargo test --test seat what_each -->\n";
/// The containers' profiles, `default` first. Each has a guest and two columns.
pub fn profiles() -> Vec<String> {
    let files = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/policy/container")).unwrap();
    let names =
        files.filter_map(|file| Some(file.unwrap().file_name().to_str()?.strip_suffix(".json")?.to_owned()));
    let mut names: Vec<_> = names.collect();
    names.sort();
    assert_eq!(names[0], "default");
    names
}

/// Answers which say that the VM's kernel lacks the part that would be tried.
const LACKS: [&str; 4] = ["–", "EINVAL", "ENOENT", "EAFNOSUPPORT"];

/// The processes with CAP_SYS_ADMIN that may nevertheless not look into other processes.
const ADMINS: [&str; 2] = ["mountd", "execd"];

/// The answers of one process, by row.
pub struct Column {
    /// The name in the head of the table.
    name: String,
    cells: BTreeMap<String, String>,
}

impl Column {
    /// The columns from the lines of all places of a guest.
    pub fn all_of(profile: &str, lines: &[String]) -> Vec<Column> {
        let mut columns: Vec<Column> = Vec::new();
        for line in lines {
            let [place, row, cell] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line:?}") };
            let name = head(profile, place);
            if columns.last().is_none_or(|column| column.name != name) {
                columns.push(Column { name, cells: BTreeMap::new() });
            }
            columns.last_mut().unwrap().cells.insert(row.to_owned(), cell.to_owned());
        }
        columns
    }

    fn cell(&self, row: &str) -> &str {
        self.cells.get(row).unwrap_or_else(|| panic!("{} has not tried: {row}", self.name))
    }
}

/// The name of a place in the head of the table.
fn head(profile: &str, place: &str) -> String {
    match place {
        CONTAINER_ROOT => format!("{profile}, root"),
        CONTAINER_USER => format!("{profile}, user"),
        "podinit" => "pod init".to_owned(),
        other => other.to_owned(),
    }
}

/// The whole table.
pub struct Table(Vec<Column>);

impl Table {
    pub fn new(mut columns: Vec<Column>) -> Table {
        // In the order of README's table: execd is tried last, but is not last there.
        let order = ["init", "warden", "netd", "mountd", "execd", "streamd", "pod init"];
        columns
            .sort_by_key(|column| order.iter().position(|name| *name == column.name).unwrap_or(order.len()));
        Table(columns)
    }

    /// Reads the table from the page.
    pub fn of_the_page() -> Table {
        let text = fs::read_to_string(PATH).unwrap();
        let (_, printed) = text.split_once(MARK).expect("the page has its mark");
        let cells = |line: &str| {
            line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect::<Vec<_>>()
        };
        let mut columns: Vec<Column> = Vec::new();
        for line in printed.lines().filter(|line| line.starts_with("| ")) {
            let words = cells(line);
            if words[0].is_empty() {
                if columns.is_empty() {
                    columns = words[1..]
                        .iter()
                        .map(|name| Column { name: name.clone(), cells: BTreeMap::new() })
                        .collect();
                }
                continue;
            }
            for (column, cell) in columns.iter_mut().zip(&words[1..]) {
                column.cells.insert(words[0].clone(), cell.replace("**", ""));
            }
        }
        Table(columns)
    }

    /// The cells where a process could do what the page says is refused, or make a call that the page says is
    /// trapped.
    pub fn more_than(&self, seen: &Column) -> Vec<String> {
        let column = self.0.iter().find(|column| column.name == seen.name);
        let column = column.unwrap_or_else(|| panic!("the page has no {}", seen.name));
        let mut more = Vec::new();
        for (row, cell) in &seen.cells {
            let expected = column.cell(row);
            // A machine's kernel may have parts that the VM's kernel lacks.
            let lacks = LACKS.iter().any(|lacks| expected.contains(lacks));
            // On newer kernels (seen on 6.18) CAP_SYS_ADMIN is enough to read these files (kernel/fork.c,
            // may_access_mm). The page says so.
            let lacks = lacks || row.starts_with("environ and maps") && ADMINS.contains(&seen.name.as_str());
            let opened = cell.contains("allowed") && !expected.contains("allowed") && !lacks;
            let untrapped = expected == "trap" && cell != "trap" && cell != "–";
            if opened || untrapped {
                more.push(format!("{}: {row}: {cell}, and the page says {expected}", seen.name));
            }
        }
        more
    }

    /// Checks that every cell that says «allowed» has a reason, and that every reason has a cell.
    pub fn has_reasons(&self) {
        let mut missing = Vec::new();
        for column in &self.0 {
            for (row, cell) in column.cells.iter().filter(|(_, cell)| cell.contains("allowed")) {
                if !REASONS.iter().any(|reason| reason.is_of(&column.name, row)) {
                    missing.push(format!("{}: {row}: {cell}", column.name));
                }
            }
        }
        let allowed = |reason: &Reason| {
            let mut columns = self.0.iter();
            columns.any(|column| {
                column
                    .cells
                    .iter()
                    .any(|(row, cell)| cell.contains("allowed") && reason.is_of(&column.name, row))
            })
        };
        let idle: Vec<_> =
            REASONS.iter().filter(|reason| !allowed(reason)).map(|reason| reason.why).collect();
        assert!(
            missing.is_empty(),
            "allowed without a reason in tests/seat/reasons.rs:\n{}",
            missing.join("\n")
        );
        assert!(idle.is_empty(), "reasons for what nobody can do: {idle:#?}");
    }

    /// Compares the table with the page, or writes the page.
    pub fn is_the_page(&self) {
        let text = fs::read_to_string(PATH).unwrap();
        let (before, printed) = text.split_once(MARK).expect("the page has its mark");
        let seen = self.print();
        if env::var(WRITE).as_deref() == Ok("write") {
            fs::write(PATH, format!("{before}{MARK}{seen}")).unwrap();
            return;
        }
        let different: Vec<_> = difference(printed, &seen);
        assert!(
            different.is_empty(),
            "docs/seats.md is not what was seen; SEATS=write cargo test --test seat what_each renews it\n{}",
            different.join("\n")
        );
    }

    fn print(&self) -> String {
        let mut text = String::new();
        let mut group = "";
        for effect in effects::all() {
            if effect.group != group {
                group = effect.group;
                let heads = self.0.iter().map(|column| column.name.as_str()).collect::<Vec<_>>();
                let _ = writeln!(
                    text,
                    "\n## {group}\n\n| | {} |\n|{}",
                    heads.join(" | "),
                    "---|".repeat(heads.len() + 1)
                );
            }
            let cells =
                self.0.iter().map(|column| column.cell(&effect.name).replace("allowed", "**allowed**"));
            let _ = writeln!(text, "| {} | {} |", effect.name, cells.collect::<Vec<_>>().join(" | "));
        }
        text + "\n" + &self.reasons()
    }

    fn reasons(&self) -> String {
        let mut text =
            "## Why what is allowed is allowed\n\n| who | what | why |\n|---|---|---|\n".to_owned();
        for Reason { seats, rows, why } in REASONS {
            let what = if *rows == [""] { "all of it".to_owned() } else { rows.join("; ") };
            let _ = writeln!(text, "| {} | {} | {why} |", seats.join("; "), what);
        }
        text
    }
}

/// The lines that are in only one of two texts.
fn difference(page: &str, seen: &str) -> Vec<String> {
    let only = |sign: char, one: &str, other: &str| {
        let other: Vec<_> = other.lines().collect();
        one.lines()
            .filter(|line| !other.contains(line))
            .map(|line| format!("{sign} {line}"))
            .collect::<Vec<_>>()
    };
    [only('-', page, seen), only('+', seen, page)].concat()
}

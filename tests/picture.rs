//! Checks that docs/processes.svg is made from docs/processes.txt. `PICTURE=write` makes it again.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/processes.txt");
const PICTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/processes.svg");

/// The size of a box, the distance between the corners of two boxes, and the margin, in pixels.
const SIZE: (i32, i32) = (170, 66);
const STEP: (i32, i32) = (260, 110);
const MARGIN: i32 = 20;

/// The middle of a box, and its lines of text.
struct Place {
    middle: (i32, i32),
    lines: Vec<String>,
}

/// `box NAME COLUMN ROW LINE | LINE …`
fn place(words: &str) -> (String, Place) {
    let [name, column, row, text] = words.splitn(4, ' ').collect::<Vec<_>>()[..] else {
        panic!("no box: {words}");
    };
    let at = |number: &str, step: i32, size: i32| MARGIN + number.parse::<i32>().unwrap() * step + size / 2;
    let middle = (at(column, STEP.0, SIZE.0), at(row, STEP.1, SIZE.1));
    (name.to_owned(), Place { middle, lines: text.split(" | ").map(str::to_owned).collect() })
}

/// The point where the line from the middle of a box to another point leaves the box.
fn border(from: (i32, i32), to: (i32, i32)) -> (i32, i32) {
    let (across, down) = (to.0 - from.0, to.1 - from.1);
    // It leaves through the left or right side, unless the line is too steep.
    if across.abs() * SIZE.1 >= down.abs() * SIZE.0 {
        let half = SIZE.0 / 2 * across.signum();
        (from.0 + half, from.1 + down * half / across)
    } else {
        let half = SIZE.1 / 2 * down.signum();
        (from.0 + across * half / down, from.1 + half)
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

/// A line with its text in a gap at the middle.
fn edge(svg: &mut String, from: (i32, i32), to: (i32, i32), text: &str) {
    let ((x1, y1), (x2, y2)) = (border(from, to), border(to, from));
    let (x, y) = (i32::midpoint(x1, x2), i32::midpoint(y1, y2));
    writeln!(svg, r##"<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#555"/>"##).unwrap();
    for paint in [r##"stroke="#fff" stroke-width="5""##, r##"fill="#333""##] {
        writeln!(svg, r#"<text x="{x}" y="{}" {paint}>{}</text>"#, y + 4, escaped(text)).unwrap();
    }
}

fn picture(source: &str) -> String {
    let lines = || source.lines().filter(|line| !line.starts_with('#'));
    let boxes: BTreeMap<String, Place> =
        lines().filter_map(|line| line.strip_prefix("box ")).map(place).collect();
    let right = boxes.values().map(|place| place.middle.0).max().unwrap() + SIZE.0 / 2 + MARGIN;
    let bottom = boxes.values().map(|place| place.middle.1).max().unwrap() + SIZE.1 / 2 + MARGIN;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {right} {bottom}\" font-family=\"sans-serif\" \
         font-size=\"12\" text-anchor=\"middle\">\n<!-- Made from docs/processes.txt by tests/picture.rs. -->\n\
         <rect width=\"{right}\" height=\"{bottom}\" fill=\"#fff\"/>\n"
    );
    for words in lines().filter_map(|line| line.strip_prefix("edge ")) {
        let [from, to, text] = words.splitn(3, ' ').collect::<Vec<_>>()[..] else {
            panic!("no edge: {words}")
        };
        edge(&mut svg, boxes[from].middle, boxes[to].middle, text);
    }
    for Place { middle: (x, y), lines } in boxes.values() {
        let (left, top) = (x - SIZE.0 / 2, y - SIZE.1 / 2);
        let (width, height) = SIZE;
        writeln!(svg, r##"<rect x="{left}" y="{top}" width="{width}" height="{height}" rx="6" fill="#eef3f8" stroke="#345"/>"##)
            .unwrap();
        for (number, line) in (0..).zip(lines) {
            let weight = if number == 0 { "bold" } else { "normal" };
            writeln!(
                svg,
                r#"<text x="{x}" y="{}" font-weight="{weight}">{}</text>"#,
                top + 22 + 17 * number,
                escaped(line)
            )
            .unwrap();
        }
    }
    svg + "</svg>\n"
}

#[test]
fn the_picture_is_what_its_source_says() {
    let wanted = picture(&fs::read_to_string(SOURCE).unwrap());
    if std::env::var_os("PICTURE").is_some_and(|word| word == "write") {
        fs::write(PICTURE, &wanted).unwrap();
    }
    let there = fs::read_to_string(PICTURE).unwrap_or_default();
    assert!(there == wanted, "docs/processes.svg is old: PICTURE=write cargo test --locked --test picture");
}

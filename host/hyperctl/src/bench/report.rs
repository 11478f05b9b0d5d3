//! Rows of numbers, as JSON.

use std::time::Duration;

use hyperinit_protocol::fault::Fault;
use serde::Serialize;

use super::floor::Floor;

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub struct Report {
    guest: &'static str,
    rows: Vec<Row>,
}

/// One number, with what it is compared with.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    unit: &'static str,
    value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    floor: Option<f64>,
    /// `value / floor`.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    #[serde(skip_serializing_if = "str::is_empty")]
    goal: &'static str,
}

impl Report {
    /// A report without rows; `guest` says what was measured: `vm`, `local` or `peers`.
    pub fn new(guest: &'static str) -> Report {
        Report { guest, rows: Vec::new() }
    }

    /// The floor's own rows.
    pub fn floor(&mut self, floor: &Floor) {
        self.time("floor: exec, p50", floor.exec, None, "");
        self.time("floor: control round trip, p50", floor.ping, None, "");
        self.rate("floor: port write, 64 kB", floor.write, None, "");
        self.rate("floor: port write, 4 kB", floor.write_small, None, "");
        self.rate("floor: port read", floor.read, None, "");
    }

    /// A time.
    pub fn time(&mut self, name: &str, time: Duration, floor: Option<Duration>, goal: &'static str) {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        self.row(name, "ms", ms(time), floor.map(ms), goal);
    }

    /// MB (10⁶ bytes) a second.
    pub fn rate(&mut self, name: &str, rate: f64, floor: Option<f64>, goal: &'static str) {
        self.row(name, "MB/s", rate, floor, goal);
    }

    /// Bytes, printed in MB.
    pub fn megabytes(&mut self, name: &str, bytes: f64, goal: &'static str) {
        self.row(name, "MB", bytes / 1e6, None, goal);
    }

    /// Anything else.
    pub fn row(
        &mut self,
        name: &str,
        unit: &'static str,
        value: f64,
        floor: Option<f64>,
        goal: &'static str,
    ) {
        let round = |value: f64| (value * 1e3).round() / 1e3;
        let ratio = floor.filter(|floor| *floor > 0.0).map(|floor| round(value / floor));
        let row =
            Row { name: name.to_owned(), unit, value: round(value), floor: floor.map(round), ratio, goal };
        self.rows.push(row);
    }

    /// One row a line: a person compares two reports with diff.
    pub fn to_json(&self) -> Result<String, Fault> {
        let json = |error: serde_json::Error| Fault::new("printing", "the report", error.to_string());
        let rows: Vec<String> =
            self.rows.iter().map(serde_json::to_string).collect::<Result<_, _>>().map_err(json)?;
        Ok(format!("{{\"guest\":\"{}\",\"rows\":[\n  {}\n]}}", self.guest, rows.join(",\n  ")))
    }
}

//! A crowd: whether a start takes longer the more there are, and how long the end of all takes.

use std::time::{Duration, Instant};

use hyperinit_protocol::command::Command;
use hyperinit_protocol::fault::Fault;
use serde_json::json;

use super::guest::{PATIENCE, Session, failed};
use super::median;
use super::report::Report;

const CONTAINERS: usize = 100;
const PROCESSES: usize = 1000;
const SLEEP: [&str; 3] = ["/bin/busybox", "sleep", "100000"];

impl Session {
    /// Starts them all, one after the other, and ends the pod: the last of the bench.
    pub(super) fn crowd(&mut self, report: &mut Report) -> Result<(), Fault> {
        let mut times = Vec::new();
        for number in 0..CONTAINERS {
            times.push(self.start_container(&container(number), &SLEEP)?);
        }
        let (first, last) = ends(&times, 10);
        report.time(
            "NEWCONTAINER, the last 10 of 100, beside the first 10, p50",
            last,
            Some(first),
            "<= 1.2 x",
        );
        times.clear();
        for number in 0..PROCESSES {
            let process = self.process(&format!("crowd-{number}"), &SLEEP, json!({}))?;
            let start = Instant::now();
            let (_streams, pending) = self.exec(&container(number % CONTAINERS), process)?;
            pending.wait(PATIENCE).map_err(failed("starting a process"))?;
            times.push(start.elapsed());
        }
        let (first, last) = ends(&times, 100);
        report.time(
            "exec to ACK, the last 100 of 1000, beside the first 100, p50",
            last,
            Some(first),
            "<= 1.2 x",
        );
        let start = Instant::now();
        self.client.call(Command::DestroyPod).map_err(failed("ending the pod"))?;
        report.time("DESTROYPOD, 100 containers and 1000 processes", start.elapsed(), None, "<= 5000 ms");
        Ok(())
    }
}

fn container(number: usize) -> String {
    format!("crowd-{number}")
}

/// The middle of the first and of the last `count` times.
fn ends(times: &[Duration], count: usize) -> (Duration, Duration) {
    let first = times.iter().take(count).copied().collect();
    let last = times.iter().rev().take(count).copied().collect();
    (median(first), median(last))
}

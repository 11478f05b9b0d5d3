//! `hyperctl bench`: what the guest costs, beside what the machine itself costs (`floor`), as JSON.
//!
//! The same VM is booted twice: with the floor in the place of init, then with the guest. Ratios to the floor
//! carry over to other machines; milliseconds do not.

mod crowd;
mod floor;
mod guest;
mod peers;
mod report;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyperinit_protocol::fault::{Fault, OrFault};

use super::cli::{Bench, GuestOptions, ShareBy};
use super::events::{self, Event, Signals};
use super::guest::{Guest, Plan};
use super::scratch::Scratch;
use super::up::plan;
use super::{attached, local, places, standard};
use floor::Floor;
use report::Report;

/// How long a guest may take to come up.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// The program that is started: it does nothing.
const PROGRAM: [&str; 2] = ["/bin/busybox", "true"];
/// Bytes that are moved for a row of throughput.
const BYTES: usize = 64 << 20;

/// Runs it all and prints the report. A signal ends it, and leaves nothing.
pub fn bench(options: &Bench) -> Result<ExitCode, Fault> {
    let (events, queue) = events::queue(Signals::Own)?;
    if options.local {
        // Before the directory that only root's guest would use is made.
        local::need_root()?;
    }
    let rootfs = places::ROOTFS.find(options.rootfs.as_deref())?;
    let scratch = Scratch::make()?;
    let current = Arc::new(Current::default());
    let (measured, options, directory) = (Arc::clone(&current), options.clone(), scratch.path().to_owned());
    std::thread::spawn(move || {
        let mut report = Report::new(match (options.local, options.peer.is_empty()) {
            (false, _) => "vm",
            (true, true) => "local",
            (true, false) => "peers",
        });
        let result = fill(&mut report, &options, &rootfs, &directory, &measured);
        // Rows that were measured before a failure are worth reading. A signal wants no report.
        let printed = if result.is_err() && measured.is_closed() { Ok(()) } else { print(&report) };
        // Nobody waits any more: hyperctl is ending.
        let _ = events.send(Event::Done(result.and(printed).map(|()| 0).map_err(Into::into)));
    });
    let status = loop {
        match queue.recv() {
            Ok(Event::Done(result)) => break result.map_err(|failure| failure.fault),
            Ok(Event::Signal(signal)) => break Ok(attached::status_of(signal)),
            Ok(_) => {}
            Err(_) => break Err(Fault::new("measuring", "the guest", "nobody is left")),
        }
    };
    current.close();
    status.map(ExitCode::from)
}

/// Measures the floor and then the guest, or hyperctl's commands beside those of other runtimes.
fn fill(
    report: &mut Report,
    options: &Bench,
    rootfs: &Path,
    directory: &Path,
    current: &Current,
) -> Result<(), Fault> {
    if options.peer.is_empty() {
        let floor = floor::measure(options, rootfs, &directory.join("floor"), current)?;
        report.floor(&floor);
        guest::measure(options, rootfs, &directory.join("guest"), current, &floor, report)?;
    } else {
        peers::measure(options, rootfs, directory, current, report)?;
    }
    binaries(report)
}

fn print(report: &Report) -> Result<(), Fault> {
    let line = format!("{}\n", report.to_json()?);
    standard::stdout().write_all(line.as_bytes()).fault("printing", "the report")
}

/// The guests and containers that are being measured. A signal drops them, wherever the measuring thread is.
#[derive(Default)]
struct Current(Mutex<State>);

enum State {
    /// A guest, the floor or other runtimes' containers: dropping ends them.
    Open(#[allow(dead_code, reason = "it is there to be dropped")] Vec<Box<dyn Send>>),
    /// hyperctl is ending.
    Closed,
}

impl Default for State {
    fn default() -> State {
        State::Open(Vec::new())
    }
}

impl Current {
    /// A guest, or the floor in its place.
    fn start(&self, options: &Bench, rootfs: &Path, directory: &Path, floor: bool) -> Result<(), Fault> {
        // runV's share is 9p, and so is what is measured if nobody says otherwise.
        let share_by = options.options.share_by.or(Some(ShareBy::NineP));
        let guest = GuestOptions { share_by, ..options.options.clone() };
        let mut plan: Plan = plan(options.local, directory, rootfs, &guest)?;
        if floor && options.local {
            plan.program = local::beside("floor")?;
        }
        self.hold(|| Guest::start(plan, |_| {}))
    }

    /// Starts something and holds it until `end` or `close`. Once hyperctl is ending it is not started.
    fn hold<T: Send + 'static>(&self, start: impl FnOnce() -> Result<T, Fault>) -> Result<(), Fault> {
        // `end` and `close` wait for this lock until the start is done.
        match &mut *self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            State::Open(held) => {
                held.push(Box::new(start()?));
                Ok(())
            }
            State::Closed => Err(Fault::new("starting", "what is measured", "hyperctl is ending")),
        }
    }

    /// Ends all that is held.
    fn end(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = State::default();
    }

    /// Whether hyperctl is ending.
    fn is_closed(&self) -> bool {
        matches!(*self.0.lock().unwrap_or_else(PoisonError::into_inner), State::Closed)
    }

    /// Ends all that is held, and nothing starts any more.
    fn close(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = State::Closed;
    }
}

/// How large the guest's program is, and compressed as in an initramfs.
fn binaries(report: &mut Report) -> Result<(), Fault> {
    let path: PathBuf = local::beside("hyperinit")?;
    let bytes = std::fs::read(&path).fault("reading", path.display())?;
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    let packed =
        packed.write_all(&bytes).and_then(|()| packed.finish()).fault("compressing", path.display())?;
    report.megabytes("guest binary", bytes.len() as f64, "<= 6 MB");
    report.megabytes("guest binary, gzip", packed.len() as f64, "<= 2.5 MB");
    Ok(())
}

/// The middle of some times.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Bytes a second, in MB.
fn rate(bytes: usize, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64()
}

fn floor_of(floor: &Floor) -> f64 {
    floor.exec.as_secs_f64() * 1e3
}

//! `hyperctl bench`: what the guest costs, beside what the machine itself costs (`floor`), as JSON.
//!
//! The same VM is booted twice: with the floor in the place of init, then with the guest. Ratios to the floor carry over
//! to other machines; milliseconds do not.

mod crowd;
mod floor;
mod guest;
mod report;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use hyperinit::fault::{Fault, OrFault};

use super::cli::Bench;
use super::guest::{Guest, Plan};
use super::up::plan;
use super::{local, places};
use floor::Floor;
use report::Report;

/// How long a guest may take to come up.
const BOOT_TIMEOUT: Duration = Duration::from_secs(180);
/// The program that is started: it does nothing.
const PROGRAM: [&str; 2] = ["/bin/busybox", "true"];
/// Bytes that are moved for a row of throughput.
const BYTES: usize = 64 << 20;

/// Runs it all and prints the report.
pub fn bench(options: &Bench) -> Result<ExitCode, Fault> {
    let rootfs = places::ROOTFS.find(options.rootfs.as_deref())?;
    let scratch = tempfile::Builder::new().prefix("hyperctl-").tempdir();
    let scratch = scratch.map_err(|error| Fault::io("making", "a temporary directory", &error))?;
    let floor = floor::measure(options, &rootfs, &scratch.path().join("floor"))?;
    let mut report = Report::new(if options.local { "local" } else { "vm" }, &floor);
    guest::measure(options, &rootfs, &scratch.path().join("guest"), &floor, &mut report)?;
    binaries(&mut report)?;
    let text = report.to_json()?;
    writeln!(std::io::stdout(), "{text}").fault("printing", "the report")?;
    Ok(ExitCode::SUCCESS)
}

/// A guest, or the floor in its place.
fn start(options: &Bench, rootfs: &Path, directory: &Path, floor: bool) -> Result<Guest, Fault> {
    let mut plan: Plan = plan(options.local, directory, rootfs, &options.options)?;
    if floor && options.local {
        plan.program = local::beside("floor")?;
    }
    Guest::start(plan, |_| {})
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

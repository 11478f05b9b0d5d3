//! `hyperctl up`: a guest in the foreground.

use std::path::Path;
use std::process::{ExitCode, ExitStatus};

use hyperinit::fault::{Fault, OrFault};

use super::cli::{GuestOptions, Up};
use super::events::{self, Event, Signals};
use super::guest::{Guest, Plan, gave_up, last_words};
use super::{local, vm};

/// How many lines of a dead guest's log are shown.
const LAST_LINES: usize = 10;

/// Starts a guest and stays until it ends, or until a signal ends it.
pub fn up(options: &Up) -> Result<ExitCode, Fault> {
    let (events, queue) = events::queue(Signals::Own)?;
    let plan = plan(options.kind.local, &options.dir, &options.share, &options.options)?;
    let guest = Guest::start(plan, move |status| drop(events.send(Event::GuestEnded(status))))?;
    let event = queue.recv();
    drop(guest);
    match event {
        Ok(Event::GuestEnded(status)) if !status.success() || gave_up(&options.dir) => {
            Err(died(&options.dir, status))
        }
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// How a guest is started.
pub fn plan(is_local: bool, directory: &Path, share: &Path, options: &GuestOptions) -> Result<Plan, Fault> {
    if is_local {
        local::need_root()?;
    }
    // The guest's process runs in the guest's directory.
    let share = share.canonicalize().fault("looking up the share", share.display())?;
    if !share.is_dir() {
        return Err(Fault::new("sharing", share.display(), "not a directory"));
    }
    match is_local {
        true => local::plan(directory, &share, &options.append),
        false => vm::plan(directory, &share, options),
    }
}

/// The guest's end as an error, with its last words.
pub fn died(directory: &Path, status: ExitStatus) -> Fault {
    let words = last_words(directory, LAST_LINES);
    let log = if words.is_empty() { " is empty".to_owned() } else { format!(" ends with{words}") };
    Fault::new("running", "the guest", format!("it ended ({status}); its log{log}"))
}

//! `hyperctl up`: a guest in the foreground.

use std::path::Path;
use std::process::{ExitCode, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use hyperinit_client::mux::{self, Door};
use hyperinit_client::{CONTROL_CHUNK, Client};
use hyperinit_protocol::fault::{Fault, OrFault};

use super::cli::{Channels, GuestOptions, Transport, Up};
use super::events::{self, Event, Failure, Signals};
use super::guest::{Guest, Plan, gave_up, hide_channels, last_words};
use super::{local, vm};

/// How many lines of a dead guest's log are shown.
const LAST_LINES: usize = 10;
/// A guest's end and that of its channels are heard by two threads, on a busy machine one well after the
/// other.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// How many control bytes a guest is sent before it has credited them: what it reads at once. runV's 512 make
/// 300 kB/s.
const CHUNK: usize = 64 << 10;
/// What ends the wait for a guest's channels is its own end.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Starts a guest and stays until it ends, or until a signal ends it.
pub fn up(options: &Up) -> Result<ExitCode, Fault> {
    let (events, queue) = events::queue(Signals::Own)?;
    let plan = plan(options.kind.local, &options.dir, &options.share, &options.options)?;
    let (ended, is_gone) = (events.clone(), Arc::new(AtomicBool::new(false)));
    let gone = Arc::clone(&is_gone);
    let ended = move |status| {
        gone.store(true, Ordering::Relaxed);
        drop(ended.send(Event::GuestEnded(status)));
    };
    let door = |directory: &Path| match options.channels {
        Channels::Served => Door::open(directory).map(Some),
        Channels::Raw => Ok(None),
    };
    let (guest, door) = Guest::start_behind(plan, door, ended)?;
    let is_served = door.is_some();
    if let Some(door) = door {
        let directory = options.dir.clone();
        let chunk = match options.options.transport {
            Transport::Virtio | Transport::Vsock => CHUNK,
            // Nothing slows a host down there: QEMU's UART heeds no CRTSCTS.
            Transport::Serial => CONTROL_CHUNK,
        };
        std::thread::spawn(move || {
            let fault = serve(door, &directory, &is_gone, chunk);
            // Nobody waits any more: hyperctl is ending.
            let _ = events.send(Event::Done(Err(Failure { fault, lost: true })));
        });
    }
    let status = wait(&queue, is_served);
    drop(guest);
    match status? {
        Some(status) if !status.success() || gave_up(&options.dir) => Err(died(&options.dir, status)),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Waits for the guest's own end, its status, or for a signal, none.
fn wait(queue: &Receiver<Event>, is_served: bool) -> Result<Option<ExitStatus>, Fault> {
    let gone = |_| Fault::new("waiting for", "the guest", "nobody is left");
    loop {
        match queue.recv().map_err(gone)? {
            Event::Signal(_) => return Ok(None),
            Event::GuestEnded(status) => {
                // Those whom it was served to hear what it has said.
                while is_served
                    && !matches!(
                        queue.recv_timeout(END_TIMEOUT),
                        Err(_) | Ok(Event::Done(_) | Event::Signal(_))
                    )
                {}
                return Ok(Some(status));
            }
            // Its connection may only be the first that is heard to end.
            Event::Done(Err(Failure { fault, .. })) => {
                return match queue.recv_timeout(END_TIMEOUT) {
                    Ok(Event::GuestEnded(status)) => Ok(Some(status)),
                    Ok(_) => Ok(None),
                    Err(_) => Err(fault),
                };
            }
            Event::Done(Ok(_)) | Event::Start { .. } | Event::Unread => {}
        }
    }
}

/// Connects to a guest that is being started and serves it to whoever comes; why that ended.
fn serve(door: Door, directory: &Path, is_gone: &AtomicBool, chunk: usize) -> Fault {
    let alive = || match is_gone.load(Ordering::Relaxed) {
        true => Err(Fault::new("connecting to", "the guest", "it has ended")),
        false => Ok(()),
    };
    let connected = Client::sockets_within(directory, FOREVER, alive);
    let (control, stream) = match connected {
        Ok(channels) => channels,
        Err(fault) => return fault,
    };
    hide_channels(directory);
    mux::serve(door, control, stream, chunk)
}

/// Serves a guest in namespaces to whoever comes, until its channels end.
pub fn serve_local(door: Door, directory: &Path) -> Fault {
    serve(door, directory, &AtomicBool::new(false), CHUNK)
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
        true => local::plan(directory, &share, options),
        false => vm::plan(directory, &share, options),
    }
}

/// The guest's end as an error, with its last words.
pub fn died(directory: &Path, status: ExitStatus) -> Fault {
    let words = last_words(directory, LAST_LINES);
    let log = if words.is_empty() { " is empty".to_owned() } else { format!(" ends with{words}") };
    Fault::new("running", "the guest", format!("it ended ({status}); its log{log}"))
}

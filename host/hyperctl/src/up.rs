//! `hyperctl up`: runs a guest in the foreground.

use std::path::Path;
use std::process::{ExitCode, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use hyperinit_client::mux::{self, HostSocket};
use hyperinit_client::{CONTROL_CHUNK, Client};
use hyperinit_protocol::fault::{Fault, OrFault};

use super::cli::{Channels, GuestOptions, Transport, Up};
use super::events::{self, Event, Failure, Signals};
use super::guest::{Guest, Plan, gave_up, hide_channels, last_words};
use super::{local, vm};

/// How many lines of a dead guest's log are shown.
const LAST_LINES: usize = 10;
/// How long to wait for the second of two events: the guest's end and the end of its channels are seen by two
/// threads, on a busy machine one well after the other.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// How many control bytes the guest is sent before it has credited them: as many as it reads at once. With
/// runV's 512 a transfer reaches only 300 kB/s.
const CHUNK: usize = 64 << 10;
/// The time limit for connecting to the guest's channels. In fact only the guest's end stops the attempts.
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
    let socket = |directory: &Path| match options.channels {
        Channels::Served => HostSocket::open(directory).map(Some),
        Channels::Raw => Ok(None),
    };
    let (guest, socket) = Guest::start_behind(plan, socket, ended)?;
    let is_served = socket.is_some();
    if let Some(socket) = socket {
        let directory = options.dir.clone();
        let chunk = match options.options.transport {
            Transport::Virtio | Transport::Vsock => CHUNK,
            // A serial line has no other flow control: QEMU's UART ignores CRTSCTS.
            Transport::Serial => CONTROL_CHUNK,
        };
        std::thread::spawn(move || {
            let fault = serve(socket, &directory, &is_gone, chunk);
            // If hyperctl is ending, the queue no longer has a receiver.
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

/// Waits for the guest's own end and returns its status, or for a signal and returns `None`.
fn wait(queue: &Receiver<Event>, is_served: bool) -> Result<Option<ExitStatus>, Fault> {
    let gone = |_| Fault::new("waiting for", "the guest", "nobody is left");
    loop {
        match queue.recv().map_err(gone)? {
            Event::Signal(_) => return Ok(None),
            Event::GuestEnded(status) => {
                // The hosts that are being served still get what the guest has sent.
                while is_served
                    && !matches!(
                        queue.recv_timeout(END_TIMEOUT),
                        Err(_) | Ok(Event::Done(_) | Event::Signal(_))
                    )
                {}
                return Ok(Some(status));
            }
            // The connection's end may be due to the guest's end, which is only seen later.
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

/// Connects to a guest that is being started and serves it to other hosts. Returns why that ended.
fn serve(socket: HostSocket, directory: &Path, is_gone: &AtomicBool, chunk: usize) -> Fault {
    let alive = || {
        if is_gone.load(Ordering::Relaxed) {
            Err(Fault::new("connecting to", "the guest", "it has ended"))
        } else {
            Ok(())
        }
    };
    let connected = Client::sockets_within(directory, FOREVER, alive);
    let (control, stream) = match connected {
        Ok(channels) => channels,
        Err(fault) => return fault,
    };
    hide_channels(directory);
    mux::serve(socket, control, stream, chunk)
}

/// Serves a local guest to all hosts that connect, until the guest's channels end.
pub fn serve_local(socket: HostSocket, directory: &Path) -> Fault {
    serve(socket, directory, &AtomicBool::new(false), CHUNK)
}

/// Plans a guest, in a VM or local.
pub fn plan(is_local: bool, directory: &Path, share: &Path, options: &GuestOptions) -> Result<Plan, Fault> {
    if is_local {
        local::need_root()?;
    }
    // The guest's process has another working directory, so the path has to be absolute.
    let share = share.canonicalize().fault("looking up the share", share.display())?;
    if !share.is_dir() {
        return Err(Fault::new("sharing", share.display(), "not a directory"));
    }
    if is_local { local::plan(directory, &share, options) } else { vm::plan(directory, &share, options) }
}

/// The fault for a guest that has ended, with the last lines of its log.
pub fn died(directory: &Path, status: ExitStatus) -> Fault {
    let words = last_words(directory, LAST_LINES);
    let log = if words.is_empty() { " is empty".to_owned() } else { format!(" ends with{words}") };
    Fault::new("running", "the guest", format!("it ended ({status}); its log{log}"))
}

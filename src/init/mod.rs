//! PID 1 boots the guest, starts the helpers, confines itself, and then only turns events into actions.
//!
//! A line in [`run`] marks the point after which every error is an event and no longer a reason to end.

mod boot;
mod bugs;
pub mod closed;
pub mod control;
mod event_loop;
mod inbox;
mod journal;
mod lifecycle;
pub mod modules;
mod outbox;
pub mod ports;
mod quotas;
mod root;
pub mod settings;
mod warden;

use std::convert::Infallible;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::reboot::{RebootMode, reboot};
use nix::unistd::getpid;

use crate::fault::{Fault, OrFault};
use crate::helper::asks_for_help;
use crate::logger;
use crate::sandbox::Policy;
use crate::sys::fd::close_strays;
use settings::{HELP, Settings, USAGE};

/// The policies that only this program carries.
struct Policies {
    init: Policy,
    warden: Policy,
}

impl Policies {
    fn decode() -> Result<Policies, Fault> {
        Ok(Policies {
            init: Policy::decode(crate::embedded_policy!("init"))?,
            warden: Policy::decode(crate::embedded_policy!("warden"))?,
        })
    }
}

/// The `main` of PID 1. Returns only if the guest could not boot, or was not started as PID 1.
pub fn main() -> ExitCode {
    logger::name("init");
    // PID 1's arguments are words of the kernel, and no one reads its output.
    if getpid().as_raw() != 1 && asks_for_help() {
        let _ = writeln!(std::io::stdout(), "{USAGE}\n\n{HELP}");
        return ExitCode::SUCCESS;
    }
    let settings = match Settings::from_args(std::env::args_os().skip(1)) {
        Ok(settings) => settings,
        Err(why) => {
            let _ = writeln!(std::io::stderr(), "hyperinit: {why}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if getpid().as_raw() != 1 {
        let _ = writeln!(
            std::io::stderr(),
            "hyperinit: not PID 1: boot it in a VM, or use `hyperctl up --local`"
        );
        return ExitCode::from(2);
    }
    let local = settings.local.is_some();
    match run(settings) {
        Ok(never) => match never {},
        Err(fault) => {
            log::error!("the guest cannot boot: {fault}");
            if !local {
                // A VM without its init is useless; the log on the console says why it ends.
                let _ = reboot(RebootMode::RB_POWER_OFF);
            }
            ExitCode::FAILURE
        }
    }
}

/// The times of the boot, for the log.
struct Boot {
    /// When PID 1 began.
    began: Instant,
    /// How long the kernel modules of the image took to load.
    modules: Duration,
}

fn run(mut settings: Settings) -> Result<Infallible, Fault> {
    let began = Instant::now();
    close_strays().fault("closing", "what was left open")?;
    let signals = boot::block_signals()?;
    let boot::Early { modules, expedited } = boot::early(&mut settings)?;
    let policies = Policies::decode()?;
    log::debug!("looking for the ports");
    let ports = ports::open(&settings)?;
    log::debug!("moving to the guest's own root");
    let program = boot::program()?;
    root::enter(&settings)?;
    boot::limits(&settings);
    closed::close(&settings);
    quotas::set(&settings);
    boot::network(&settings);
    boot::memory(&settings);
    let network = boot::leave_network();
    boot::calm(expedited);

    log::debug!("starting the warden");
    let inits = [ports.control.number(), signals.as_raw_fd()];
    let stays = warden::Stays { program, stream: ports.stream, network };
    let warden = warden::start(&settings, &policies.warden, stays, &inits)?;
    let mut guest =
        event_loop::EventLoop::new(&settings, signals, ports.control, warden, Boot { began, modules })?;
    log::debug!("confining init, starting the helpers");
    policies.init.confine_init()?;
    guest.start_helpers();
    policies.init.load_filter()?;
    // ---- From here on PID 1 neither bails nor panics: every error is an event. ----
    guest.run()
}

/// Ends the guest: powers the VM off, or ends the namespace. mountd has already synced
/// (supervisor/shutdown.rs), because a sync may hang and PID 1 must not.
fn leave(local: bool) -> ! {
    if local {
        std::process::exit(0);
    }
    let error = reboot(RebootMode::RB_POWER_OFF).fault("powering off", "").map(|_| ());
    log::error!("{error:?}");
    std::process::exit(1)
}

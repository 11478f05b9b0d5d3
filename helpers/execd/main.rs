//! execd: starts the pod init and the processes of the containers, as init's children.
#![forbid(unsafe_code)]

mod accounts;
mod child;
mod output_store;
mod passwd_cache;
mod pod;
mod report;
mod setup;
mod start;
mod streams;
mod system_v;
mod turns;

use std::os::fd::OwnedFd;
use std::process::ExitCode;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::sandbox::{CapSet, ContainerProfile, Policy, Scoped, caps};
use hyperinit::sys::fd::inherited;
use hyperinit::sys::process::{check_single_threaded, ignore_nothing};
use hyperinit::wire::Role;
use hyperinit::wire::bootstrap::{FD_OUTPUTS_IN, FD_OUTPUTS_OUT, FD_SOCKET};
use hyperinit::wire::execd::Request;
use hyperinit::{embedded_policy, helper};

use nix::sys::resource::{Resource, getrlimit, rlim_t};
use nix::sys::stat::{Mode, umask};
use output_store::OutputStore;
use passwd_cache::PasswdCache;
use pod::Namespaces;
use start::Becoming;
use streams::Streams;

/// execd's state: descriptors opened before it was confined, and the kept output of processes.
struct Execd {
    profile: ContainerProfile,
    scoped: Scoped,
    /// The capabilities that a container's root process keeps: those of the profile that execd itself has.
    keep: CapSet,
    podinit: Policy,
    home: Namespaces,
    proc: OwnedFd,
    streams: Streams,
    /// The containers' passwd and group files.
    passwd_cache: PasswdCache,
    /// Whether execd is in the pod's namespaces. A process of a container is never started outside them.
    joined: bool,
    /// Whether processes may be started in the guest's own namespaces. This is fixed at boot, because a
    /// compromised init could lie about it.
    debug_door: bool,
    /// Whether this is a local guest: settings that are not per namespace belong to its machine and are not
    /// changed.
    local: bool,
    /// execd's own hard limit of open files.
    files: rlim_t,
}

/// The program, alone or as a part of the guest's (src/main.rs).
pub fn main() -> ExitCode {
    helper::run(
        Role::Execd,
        embedded_policy!("execd"),
        |options| {
            if options.debug {
                // Processes started through the debugging door may have every capability.
                caps::permitted()
            } else {
                Ok(ContainerProfile::of(options.profile)?.capabilities())
            }
        },
        |options| {
            let socket = inherited(FD_SOCKET).fault("taking", "descriptor 3, the socket to streamd")?;
            let store = match (inherited(FD_OUTPUTS_IN), inherited(FD_OUTPUTS_OUT)) {
                (Ok(put), Ok(take)) => OutputStore::new(put, take),
                // execd was started by hand, without an inherited output store.
                _ => OutputStore::own()?,
            };
            check_single_threaded().fault("looking for", "other threads")?;
            // Every process inherits these settings.
            ignore_nothing().fault("restoring", "signals")?;
            umask(Mode::from_bits_truncate(0o022));
            let profile = ContainerProfile::of(options.profile)?;
            let scoped = profile.scoped();
            if scoped == Scoped::Missing {
                log::warn!(
                    "the kernel has no Landlock scopes (Linux 6.12): processes of a container signal one another"
                );
            }
            Ok(Execd {
                scoped,
                keep: profile.capabilities().intersection(caps::permitted()?),
                profile,
                podinit: Policy::decode(embedded_policy!("podinit"))?,
                home: Namespaces::own()?,
                proc: pod::guest_proc()?,
                streams: Streams::new(socket, store),
                passwd_cache: PasswdCache::default(),
                joined: false,
                debug_door: options.debug,
                local: options.local,
                files: getrlimit(Resource::RLIMIT_NOFILE).fault("asking for", "the limit of open files")?.1,
            })
        },
        turns::serve,
    )
}

/// The result of a request: it is done, or a start has begun.
enum Outcome {
    /// The request is done.
    Done,
    /// A process has been cloned; the answer is its number, once it is ready.
    Begun(report::Start, Becoming),
}

impl From<(report::Start, Becoming)> for Outcome {
    fn from((start, becoming): (report::Start, Becoming)) -> Outcome {
        Outcome::Begun(start, becoming)
    }
}

impl Execd {
    fn handle(&mut self, request: Request) -> Result<Outcome, Fault> {
        match request {
            Request::StartPod { hostname } => {
                self.joined = false;
                let start = pod::start(&self.home, &self.podinit, &hostname)?;
                return Ok(Outcome::Begun(start, Becoming::PodInit));
            }
            Request::JoinPod { running } => {
                self.joined = false;
                pod::join()?;
                self.streams.adopt(&running)?;
                self.joined = true;
            }
            Request::Adopt { running } => self.streams.adopt(&running)?,
            Request::StartProcess { container, process, init, hostname, sysctl, finished } => {
                self.streams.release(&finished);
                return self.start(&container, &process, init, &hostname, &sysctl).map(Outcome::from);
            }
            Request::StartInGuest { process, finished } => {
                self.streams.release(&finished);
                return self.start_in_guest(&process).map(Outcome::from);
            }
            Request::Resize { stdio, row, column } => self.streams.resize(stdio, row, column)?,
            Request::Release { finished } => {
                self.streams.release(&finished);
                self.streams.tidy();
            }
            Request::Resend => self.streams.resend()?,
            Request::Ping => {}
        }
        Ok(Outcome::Done)
    }
}

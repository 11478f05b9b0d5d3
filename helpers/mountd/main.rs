//! mountd: builds what the pod and its containers see of filesystems.
//!
//! It keeps nothing in memory between requests: what there is to know is in `/run/hyperinit`, where its successor
//! and a debugging person find it.

mod container;
mod hotplug;
mod kill;
mod layer;
mod pod;
mod sysctl;
mod tree;
mod unplug;
mod wake;

use std::process::ExitCode;

use hyperinit::fault::Fault;
use hyperinit::sandbox::{CapSet, ContainerProfile};
use hyperinit::wire::Role;
use hyperinit::wire::mountd::{Reply, Request};
use hyperinit::{embedded_policy, helper};
use nix::sys::stat::{Mode, umask};

use tree::Home;

/// What mountd opens before it is confined.
struct Mountd {
    home: Home,
    rules: Rules,
}

/// What this guest's containers may have.
struct Rules {
    profile: ContainerProfile,
    /// Settings that are not a namespace's own are the machine's, and stay as they are.
    local: bool,
}

/// The program, alone or as a part of the guest's (src/main.rs).
pub fn main() -> ExitCode {
    helper::run(
        Role::Mountd,
        embedded_policy!("mountd"),
        |_profile| Ok(CapSet::default()),
        |options| {
            // The mode of what is made is the mode that is meant: /dev/null is everybody's.
            umask(Mode::empty());
            let rules = Rules { profile: ContainerProfile::of(options.profile)?, local: options.local };
            Ok(Mountd { home: Home::open()?, rules })
        },
        |mountd, requests, replies| helper::serve(requests, replies, |request| mountd.handle(request)),
    )
}

impl Mountd {
    fn handle(&self, request: Request) -> Result<Reply, Fault> {
        match request {
            Request::Rescan => hotplug::rescan()?,
            Request::WakeUp => wake::wake_up()?,
            Request::Online => hotplug::online()?,
            Request::Unplug { device } => unplug::unplug(&device, self.rules.local)?,
            Request::PreparePod { pod } => pod::prepare(&pod.open()?)?,
            Request::PinPod { pid } => pod::pin(pid)?,
            Request::PrepareContainer { container } => {
                return container::prepare(&self.home, &self.rules, &container.open()?);
            }
            Request::KillContainer { container } => kill::container(&self.home, &container)?,
            Request::RemoveContainer { container } => container::remove(&container)?,
            Request::DestroyPod => pod::destroy()?,
        }
        Ok(Reply::Done)
    }
}

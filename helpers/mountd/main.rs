//! mountd: builds the filesystems that the pod and its containers see.
//!
//! Several mountds may run at once, each with requests about different containers (`wire::Instance`). Their
//! state is in `/run/hyperinit`, where a successor, another mountd or a person debugging finds it. In memory
//! a mountd keeps only work that init asks it to continue: the file that is being read, and the volumes that
//! are being filled.
#![forbid(unsafe_code)]

mod container;
mod disk;
mod files;
mod hotplug;
mod kill;
mod layer;
mod null;
mod pod;
mod populate;
mod scratch;
mod share;
mod source;
mod tree;
mod unplug;
mod volumes;
mod wake;

use std::process::ExitCode;

use hyperinit::fault::Fault;
use hyperinit::ids::ContainerId;
use hyperinit::sandbox::{CapSet, ContainerProfile};
use hyperinit::wire::Role;
use hyperinit::wire::mountd::{Reply, Request};
use hyperinit::{embedded_policy, helper};
use nix::sys::stat::{Mode, umask};

use container::Rules;
use files::Reading;
use populate::Populations;
use tree::Home;

/// mountd's state: descriptors opened before it was confined, and unfinished work.
struct Mountd {
    home: Home,
    rules: Rules,
    reading: Option<Reading>,
    populations: Populations,
}

/// The program, alone or as a part of the guest's (src/main.rs).
pub fn main() -> ExitCode {
    helper::run(
        Role::Mountd,
        embedded_policy!("mountd"),
        |_options| Ok(CapSet::default()),
        |options| {
            // Files get exactly the mode that is given: /dev/null, for example, is for every user.
            umask(Mode::empty());
            let rules = Rules {
                profile: ContainerProfile::of(options.profile)?,
                local: options.local,
                release: layer::release()?,
            };
            let populations = Populations::default();
            Ok(Mountd { home: Home::open()?, rules, reading: None, populations })
        },
        |mut mountd, requests, replies| helper::serve(requests, replies, |request| mountd.handle(request)),
    )
}

impl Mountd {
    fn handle(&mut self, request: Request) -> Result<Reply, Fault> {
        match request {
            // Devices, clock and random pool belong to the machine: a local guest leaves them alone, and init
            // does not ask it to change them.
            // Its files are on filesystems of the machine, which outlive it: it has nothing to sync.
            Request::Rescan | Request::WakeUp | Request::Online | Request::Sync if self.rules.local => {}
            Request::Rescan => hotplug::rescan()?,
            Request::WakeUp => wake::wake_up()?,
            Request::Online => hotplug::online()?,
            Request::Unplug { device } => unplug::unplug(&device, self.rules.local)?,
            Request::PreparePod { pod } => pod::prepare(&pod)?,
            Request::PrepareContainer { mut container } => {
                container.read_only |= self.rules.profile.readonly_root();
                return container::prepare(&self.home, &self.rules, &mut self.populations, &container);
            }
            Request::ReadFile { container, file } => {
                self.reading = Some(Reading::begin(&self.home, &container, &file)?);
                return self.read_on(&container);
            }
            Request::ReadOn { container } => return self.read_on(&container),
            Request::WriteFile { container, file, data } => {
                files::write_file(&self.home, &container, &file, &data.0)?;
            }
            Request::KillContainer { container } => kill::container(&self.home, &container)?,
            Request::RemoveContainer { container } => {
                self.populations.forget(&container);
                // The host may remove a disk after this, so nothing of the container may stay open.
                self.reading.take_if(|reading| reading.container == container);
                container::remove(&container)?;
            }
            Request::SyncShare => share::sync()?,
            Request::Sync => nix::unistd::sync(),
            Request::DestroyPod => {
                self.populations.forget_all();
                self.reading = None;
                let destroyed = pod::destroy();
                if !self.rules.local {
                    nix::unistd::sync();
                }
                destroyed?;
            }
        }
        Ok(Reply::Done)
    }

    /// Reads the next part of the container's file that is being read. After the end of the file, or a fault,
    /// no file is being read any more.
    fn read_on(&mut self, container: &ContainerId) -> Result<Reply, Fault> {
        let mut reading = self
            .reading
            .take_if(|reading| reading.container == *container)
            .ok_or_else(|| Fault::new("reading on", "a container's file", "none is being read"))?;
        let reply = reading.part()?;
        if let Reply::Part { last: false, .. } = reply {
            self.reading = Some(reading);
        }
        Ok(reply)
    }
}

//! Requests, carried out: each whole or not at all.

use std::time::{Duration, Instant};

use hyperinit::fault::Fault;
use hyperinit::spec::{Interface, Route};
use hyperinit::wire::netd::{Network, PortMapping};
use nix::errno::Errno;

use super::kernel::Kernel;
use super::plan::{Change, Step};
use super::{links, ports, routes};

/// How long one request waits for links that are being plugged (protocol.md «STARTPOD»).
const PLUGGED: Duration = Duration::from_secs(2);

/// What has been done, the newest last, as what takes it back.
struct Done<'a> {
    kernel: &'a mut Kernel,
    undo: Vec<Step>,
    /// What links that had to be taken down had.
    lost: Vec<Step>,
}

impl Done<'_> {
    fn change(&mut self, change: &Change) -> Result<(), Fault> {
        match self.kernel.apply(&change.step) {
            Err(fault) if fault.is(Errno::EBUSY) && !change.busy.is_empty() => {
                return self.change_down(change);
            }
            result => result?,
        }
        self.undo.extend(change.undo.clone());
        Ok(())
    }

    /// The same to a link that is taken down for it, and has afterwards what it had before.
    fn change_down(&mut self, change: &Change) -> Result<(), Fault> {
        let lost = match change.step.link() {
            Some(index) => self.kernel.would_lose(index)?,
            None => Vec::new(),
        };
        self.lost.extend(lost.clone());
        change.busy.iter().try_for_each(|change| self.change(change))?;
        lost.iter().try_for_each(|step| self.kernel.apply(step))
    }

    fn take_back(&mut self) {
        for step in self.undo.iter().rev().chain(&self.lost) {
            match self.kernel.apply(step) {
                // It was never lost.
                Err(fault) if fault.is(Errno::EEXIST) => {}
                Err(fault) => log::warn!("{fault}"),
                Ok(()) => {}
            }
        }
    }
}

/// Does the work, or takes back what of it was done.
fn all_or_nothing(
    kernel: &mut Kernel,
    work: impl FnOnce(&mut Done) -> Result<(), Fault>,
) -> Result<(), Fault> {
    let mut done = Done { kernel, undo: Vec::new(), lost: Vec::new() };
    let result = work(&mut done);
    if result.is_err() {
        done.take_back();
    }
    result
}

/// SetInterfaces.
pub fn set_interfaces(kernel: &mut Kernel, interfaces: &[Interface]) -> Result<(), Fault> {
    let wanted = interfaces.iter().map(links::Wanted::read).collect::<Result<Vec<_>, _>>()?;
    let until = Instant::now() + PLUGGED;
    all_or_nothing(kernel, |done| {
        wanted.iter().try_for_each(|wanted| {
            let link = done.kernel.await_link(&wanted.device, until)?;
            wanted.changes(&link).iter().try_for_each(|change| done.change(change))
        })
    })
}

/// AddRoutes.
pub fn add_routes(kernel: &mut Kernel, routes: &[Route]) -> Result<(), Fault> {
    let wanted = routes.iter().map(routes::Wanted::read).collect::<Result<Vec<_>, _>>()?;
    all_or_nothing(kernel, |done| {
        wanted.iter().try_for_each(|wanted| {
            let change = wanted.change(oif(done.kernel, wanted)?);
            done.change(&change)
        })
    })
}

fn oif(kernel: &mut Kernel, route: &routes::Wanted) -> Result<Option<u32>, Fault> {
    route.device.as_ref().map(|device| Ok(kernel.link(device)?.index)).transpose()
}

/// SetPorts.
pub fn set_ports(kernel: &mut Kernel, mapping: &PortMapping) -> Result<(), Fault> {
    kernel.transact(&ports::rules(mapping)?)
}

/// Reset: everything is tried; the first error is the answer.
pub fn reset(kernel: &mut Kernel, network: &Network) -> Result<(), Fault> {
    let mut first = Ok(());
    let mut keep = |result: Result<(), Fault>| {
        if first.is_ok() {
            first = result;
        }
    };
    for route in network.routes.iter().rev() {
        keep(remove_route(kernel, route));
    }
    for interface in network.interfaces.iter().rev() {
        keep(reset_interface(kernel, interface));
    }
    if network.ports {
        keep(kernel.transact(&ports::none()));
    }
    first
}

/// What is not there (any more) is as it should be.
fn unless_gone<T>(result: Result<T, Fault>) -> Result<Option<T>, Fault> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(fault)
            if [Errno::EADDRNOTAVAIL, Errno::ENODEV, Errno::ESRCH].iter().any(|errno| fault.is(*errno)) =>
        {
            Ok(None)
        }
        Err(fault) => Err(fault),
    }
}

fn remove_route(kernel: &mut Kernel, route: &Route) -> Result<(), Fault> {
    let wanted = routes::Wanted::read(route)?;
    let Some(oif) = unless_gone(oif(kernel, &wanted))? else { return Ok(()) };
    match wanted.change(oif).undo {
        Some(undo) => unless_gone(kernel.apply(&undo)).map(drop),
        None => Ok(()),
    }
}

fn reset_interface(kernel: &mut Kernel, interface: &Interface) -> Result<(), Fault> {
    let wanted = links::Wanted::read(interface)?;
    let renamed = match &wanted.rename {
        Some(name) => unless_gone(kernel.link(name))?,
        None => None,
    };
    let link = match renamed {
        Some(link) => Some(link),
        None => unless_gone(kernel.link(&wanted.device))?,
    };
    let Some(link) = link else { return Ok(()) };
    wanted.takes_back(&link).iter().try_for_each(|step| unless_gone(kernel.apply(step)).map(drop))
}

//! Carries out requests, each completely or not at all.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::time::{Duration, Instant};

use hyperinit::fault::Fault;
use hyperinit::spec::{Interface, Route};
use hyperinit::wire::netd::{Before, Network, PortMapping};
use netlink_packet_route::RouteNetlinkMessage;
use nix::errno::Errno;

use super::kernel::Kernel;
use super::plan::{Change, Step};
use super::{links, ports, routes, snapshot};

/// How long one request waits for links that are being plugged (protocol.md «STARTPOD»).
const PLUGGED: Duration = Duration::from_secs(2);

/// A record of the steps done, as the steps that undo them.
struct Done<'a> {
    kernel: &'a mut Kernel,
    undo: Vec<Step>,
    /// What links had before they were changed, by link number: a change may remove more from a link than it
    /// names, and so may undoing it.
    snapshots: BTreeMap<u32, Vec<Step>>,
    /// A predecessor died during the same request, so a step whose result is already there counts as done. It
    /// is unknown whether the predecessor did it or it was so before, so it is not undone if a later step
    /// fails.
    repeated: bool,
}

impl Done<'_> {
    /// Records what a link has, before its first change.
    fn remember(&mut self, index: u32) -> Result<(), Fault> {
        if let Entry::Vacant(new) = self.snapshots.entry(index) {
            new.insert(self.kernel.snapshot(index)?);
        }
        Ok(())
    }

    fn change(&mut self, change: &Change) -> Result<(), Fault> {
        match self.kernel.apply(&change.step) {
            Err(fault) if fault.is(Errno::EBUSY) && !change.busy.is_empty() => {
                return self.change_down(change);
            }
            Err(fault) if self.repeated && self.is_done(&change.step, &fault)? => return Ok(()),
            result => result?,
        }
        self.undo.extend(change.undo.clone());
        Ok(())
    }

    /// Whether the kernel refused a step because it is already done.
    fn is_done(&mut self, step: &Step, fault: &Fault) -> Result<bool, Fault> {
        match &step.message {
            RouteNetlinkMessage::DelAddress(_) => Ok(fault.is(Errno::EADDRNOTAVAIL)),
            RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::NewRoute(_) => {
                Ok(fault.is(Errno::EEXIST) && self.kernel.has(&step.message)?)
            }
            _ => Ok(false),
        }
    }

    /// Finds the link. If the request is repeated, the link may already have its new name.
    fn link(&mut self, wanted: &links::Wanted, until: Instant) -> Result<links::Link, Fault> {
        let link = self.kernel.await_link(&wanted.device, until);
        match &wanted.rename {
            Some(name) if self.repeated => match unless_gone(link)? {
                Some(link) => Ok(link),
                None => self.kernel.link(name),
            },
            _ => link,
        }
    }

    /// Makes a change for which the link must be taken down, and restores what the link had before.
    fn change_down(&mut self, change: &Change) -> Result<(), Fault> {
        let snapshot = match change.step.link() {
            Some(index) => self.kernel.snapshot(index)?,
            None => Vec::new(),
        };
        change.busy.iter().try_for_each(|change| self.change(change))?;
        snapshot.iter().try_for_each(|step| unless_there(self.kernel.apply(step)))
    }

    fn take_back(&mut self) {
        for step in self.undo.iter().rev() {
            // Undoing another step may already have removed it.
            warn(unless_gone(self.kernel.apply(step)).map(drop));
        }
        for (&index, snapshot) in &self.snapshots {
            // If the request is repeated, the order recorded is the predecessor's and does not show the
            // original one.
            warn(restore(self.kernel, index, snapshot, !self.repeated));
        }
    }
}

/// Restores what a link had. If its addresses are in a different order, they are removed first, because
/// packets are sent from the first address of a network.
fn restore(kernel: &mut Kernel, index: u32, snapshot: &[Step], in_order: bool) -> Result<(), Fault> {
    let now = kernel.snapshot(index)?;
    if in_order && !snapshot::same_order(&now, snapshot) {
        for step in snapshot::removals(&now) {
            warn(unless_gone(kernel.apply(&step)).map(drop));
        }
    }
    for step in snapshot {
        warn(unless_there(kernel.apply(step)));
    }
    Ok(())
}

fn warn(result: Result<(), Fault>) {
    if let Err(fault) = result {
        log::warn!("{fault}");
    }
}

/// Does the work; if it fails, undoes the part that was done.
fn all_or_nothing<T>(
    kernel: &mut Kernel,
    repeated: bool,
    work: impl FnOnce(&mut Done) -> Result<T, Fault>,
) -> Result<T, Fault> {
    let mut done = Done { kernel, undo: Vec::new(), snapshots: BTreeMap::new(), repeated };
    let result = work(&mut done);
    if result.is_err() {
        done.take_back();
    }
    result
}

/// Carries out SetInterfaces; returns what the links were before. Fails on an unusable value, a missing link
/// or a refusal of the kernel's; then the changes made so far have been undone.
pub fn set_interfaces(
    kernel: &mut Kernel,
    interfaces: &[Interface],
    repeated: bool,
) -> Result<Vec<Before>, Fault> {
    let wanted = interfaces.iter().map(links::Wanted::read).collect::<Result<Vec<_>, _>>()?;
    let until = Instant::now() + PLUGGED;
    all_or_nothing(kernel, repeated, |done| {
        let set = |wanted: &links::Wanted| {
            let link = done.link(wanted, until)?;
            let changes = wanted.changes(&link);
            if !changes.is_empty() {
                done.remember(link.index)?;
            }
            changes.iter().try_for_each(|change| done.change(change))?;
            // It is unknown what the predecessor found.
            Ok(if repeated { Before::default() } else { wanted.before(&link) })
        };
        wanted.iter().map(set).collect()
    })
}

/// Carries out AddRoutes. Fails as [`set_interfaces`] does.
pub fn add_routes(kernel: &mut Kernel, routes: &[Route], repeated: bool) -> Result<(), Fault> {
    let wanted = routes.iter().map(routes::Wanted::read).collect::<Result<Vec<_>, _>>()?;
    all_or_nothing(kernel, repeated, |done| {
        wanted.iter().try_for_each(|wanted| {
            let change = wanted.change(oif(done.kernel, wanted)?);
            done.change(&change)
        })
    })
}

fn oif(kernel: &mut Kernel, route: &routes::Wanted) -> Result<Option<u32>, Fault> {
    route.device.as_ref().map(|device| Ok(kernel.link(device)?.index)).transpose()
}

/// Carries out SetPorts, as one transaction. Fails on an unusable value or a refusal of the kernel's.
pub fn set_ports(kernel: &mut Kernel, mapping: &PortMapping) -> Result<(), Fault> {
    kernel.transact(&ports::rules(mapping)?)
}

/// Carries out Reset. Everything is tried; the first error is returned.
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
    for (at, interface) in network.interfaces.iter().enumerate().rev() {
        let looked = reset_interface(kernel, interface, network.before.get(at), &mut keep);
        keep(looked);
    }
    if network.ports {
        keep(kernel.transact(&ports::none()));
    }
    first
}

/// Turns the errors for a missing link, address or route into None: it is already gone.
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

/// Ignores EEXIST: the address or route is already there, or the kernel has added it by itself.
fn unless_there(result: Result<(), Fault>) -> Result<(), Fault> {
    match result {
        Err(fault) if fault.is(Errno::EEXIST) => Ok(()),
        result => result,
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

/// Undoes the changes of an interface. A step that cannot be undone does not prevent the others.
fn reset_interface(
    kernel: &mut Kernel,
    interface: &Interface,
    before: Option<&Before>,
    mut keep: impl FnMut(Result<(), Fault>),
) -> Result<(), Fault> {
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
    let mut done = Done { kernel, undo: Vec::new(), snapshots: BTreeMap::new(), repeated: false };
    let changes = wanted.takes_back(&link, before);
    changes.iter().for_each(|change| {
        let result = unless_gone(done.change(change)).map(drop);
        // EEXIST is ignored only for addresses: for a rename it means that another link has the name.
        let is_address = matches!(change.step.message, RouteNetlinkMessage::NewAddress(_));
        keep(if is_address { unless_there(result) } else { result });
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use serde_json::json;
    use std::process::Command;

    fn ip(words: &str) -> String {
        let output = Command::new("ip").args(words.split(' ')).output().unwrap();
        assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn all_of(link: &str) -> String {
        let lines = format!("{}{}", ip("route show"), ip("-6 route show"));
        let mut all: Vec<_> = lines.lines().filter(|line| !line.starts_with("fe80:")).collect();
        let addresses = ip(&format!("-oneline address show dev {link} scope global"));
        all.extend(addresses.lines().map(|line| line.split_once(link).unwrap().1));
        all.join("\n").replace(link, "LINK")
    }

    /// Linux before 6.2 needs this for each rename. On a newer kernel only this test exercises it.
    #[test]
    fn a_link_that_is_taken_down_for_its_name_has_afterwards_what_it_had() {
        let test = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            for words in [
                "link add eth0 type veth peer name other",
                "link set other up",
                "link set eth0 up",
                "address add 10.0.0.2/32 dev eth0",
                "route add 10.0.0.1 dev eth0",
                "route add default via 10.0.0.1",
                "address add fec0:0:0:1::2/128 dev eth0 nodad",
                "-6 route add fec0:0:0:1::1 dev eth0",
                "-6 route add default via fec0:0:0:1::1",
            ] {
                ip(words);
            }
            let before = all_of("eth0");
            let mut kernel = Kernel::open().unwrap();
            let link = kernel.link("eth0").unwrap();
            let interface = json!({"device": "eth0", "newDeviceName": "lan"});
            let wanted = links::Wanted::read(&serde_json::from_value(interface).unwrap()).unwrap();
            let rename = wanted.changes(&link).remove(0);
            let fault = all_or_nothing(&mut kernel, false, |done| {
                done.remember(link.index)?;
                done.change_down(&rename)?;
                Err::<(), _>(Fault::new("doing", "the next", "no"))
            });
            assert_eq!(fault.unwrap_err().why, "no");
            assert_eq!(all_of("eth0"), before);
            all_or_nothing(&mut kernel, false, |done| done.change_down(&rename)).unwrap();
            assert_eq!(all_of("lan"), before);
        };
        std::thread::spawn(test).join().unwrap();
    }
}

//! Links and their addresses: turns a host's description of an interface into changes of the existing link.
//! Pure functions.

use std::net::{IpAddr, Ipv4Addr};

use hyperinit::fault::Fault;
use hyperinit::spec::{Interface, IpAddress};
use hyperinit::wire::netd::Before;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecUnspec, InetDevConf, LinkAttribute, LinkFlags, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::address::{Network, bits};
use super::plan::{Change, Step, check_name};

/// A link as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number, which a rename does not change.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Whether it is up.
    pub up: bool,
    /// Its MTU in bytes.
    pub mtu: u32,
}

impl Link {
    /// Reads the kernel's description of a link.
    pub fn new(message: &LinkMessage) -> Link {
        let mut link = Link {
            index: message.header.index,
            name: String::new(),
            up: message.header.flags.contains(LinkFlags::Up),
            mtu: 0,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                _ => {}
            }
        }
        link
    }
}

/// A host's wishes for a link, parsed and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Its current name.
    pub device: String,
    /// Its new name, if that differs.
    pub rename: Option<String>,
    mtu: Option<u32>,
    addresses: Vec<(What, Network)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Add,
    Remove,
}

impl Wanted {
    /// Parses the host's description of an interface. Fails on a bad name, MTU or address, and names it.
    pub fn read(interface: &Interface) -> Result<Wanted, Fault> {
        check_name("device", &interface.device)?;
        let renamed = !interface.new_device_name.is_empty() && interface.new_device_name != interface.device;
        if renamed {
            check_name("newDeviceName", &interface.new_device_name)?;
        }
        let mtu = u32::try_from(interface.mtu)
            .map_err(|_| Fault::new("reading", "mtu", format!("{} is no size", interface.mtu)))?;
        Ok(Wanted {
            device: interface.device.clone(),
            rename: renamed.then(|| interface.new_device_name.clone()),
            mtu: (mtu != 0).then_some(mtu),
            addresses: addresses(interface)?,
        })
    }

    /// The link's final name.
    fn name(&self) -> &str {
        self.rename.as_deref().unwrap_or(&self.device)
    }

    /// The changes that make `link` as wanted: its name, its MTU, bringing it up, and its addresses.
    pub fn changes(&self, link: &Link) -> Vec<Change> {
        let mut changes = Vec::new();
        if let Some(name) = self.rename.as_ref().filter(|name| **name != link.name) {
            changes.push(rename(link, &self.device, name));
        }
        if let Some(mtu) = self.mtu.filter(|mtu| *mtu != link.mtu) {
            let (set, back) = (self.set_mtu(link, mtu), self.set_mtu(link, link.mtu));
            changes.push(Change::new(set, Some(back)));
        }
        if !link.up {
            changes.push(bring_up(link, self.name()));
        }
        if self.has_v4(What::Remove) {
            changes.push(Change::new(self.promote(link), None));
        }
        changes.extend(self.addresses.iter().map(|(what, network)| {
            let (add, remove) = (self.add(link, network), self.remove(link, network));
            match what {
                What::Add => Change::new(add, Some(remove)),
                What::Remove => Change::new(remove, Some(add)),
            }
        }));
        changes
    }

    /// The state of the link before the changes that has to be remembered.
    pub fn before(&self, link: &Link) -> Before {
        Before { up: link.up, mtu: self.mtu.filter(|mtu| *mtu != link.mtu).map(|_| link.mtu) }
    }

    /// The changes that return `link`, whatever has been done to it, to its earlier state: its MTU, its
    /// addresses, down if it was down or if that is unknown, and its old name.
    pub fn takes_back(&self, link: &Link, before: Option<&Before>) -> Vec<Change> {
        let before = before.copied().unwrap_or_default();
        let of = |kind: What| self.addresses.iter().rev().filter(move |(what, _)| *what == kind);
        let mut steps = Vec::new();
        if let Some(mtu) = before.mtu.filter(|mtu| *mtu != link.mtu) {
            steps.push(self.set_mtu(link, mtu));
        }
        // Addresses are added before others are removed, because the kernel would remove the routes together
        // with the last address.
        steps.extend(of(What::Remove).map(|(_, network)| self.add(link, network)));
        if self.has_v4(What::Add) {
            steps.push(self.promote(link));
        }
        steps.extend(of(What::Add).map(|(_, network)| self.remove(link, network)));
        if !before.up {
            steps.push(set_up(link, &link.name, false));
        }
        let mut changes: Vec<Change> = steps.into_iter().map(|step| Change::new(step, None)).collect();
        if self.rename.is_some() && link.name != self.device {
            changes.push(rename(&Link { up: before.up, ..link.clone() }, &link.name, &self.device));
        }
        changes
    }

    fn set_mtu(&self, link: &Link, mtu: u32) -> Step {
        Step { doing: "setting the MTU of", to: self.name().to_owned(), message: resize(link, mtu) }
    }

    /// Whether IPv4 addresses are to be added, or removed, as `kind` says.
    fn has_v4(&self, kind: What) -> bool {
        self.addresses.iter().any(|(what, network)| *what == kind && network.address.is_ipv4())
    }

    /// Makes the kernel keep a network's other addresses on the link when the first of them is removed; by
    /// default it removes them too. This is set for each link by netlink, because netd has no access to
    /// files, and the other links of a local guest are not its own.
    fn promote(&self, link: &Link) -> Step {
        let mut message = to(link);
        let mut settings = InetDevConf::default();
        settings.promote_secondaries = 1;
        let settings = AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(settings)]);
        message.attributes.push(LinkAttribute::AfSpecUnspec(vec![settings]));
        Step {
            doing: "keeping the other addresses of",
            to: self.name().to_owned(),
            message: RouteNetlinkMessage::SetLink(message),
        }
    }

    fn add(&self, link: &Link, network: &Network) -> Step {
        let message = RouteNetlinkMessage::NewAddress(address(link.index, network));
        Step { doing: "adding", to: format!("{network} to {}", self.name()), message }
    }

    fn remove(&self, link: &Link, network: &Network) -> Step {
        let message = RouteNetlinkMessage::DelAddress(address(link.index, network));
        Step { doing: "removing", to: format!("{network} from {}", self.name()), message }
    }
}

/// The addresses of the list; if that is empty, the single address of the old style.
fn addresses(interface: &Interface) -> Result<Vec<(What, Network)>, Fault> {
    let old = IpAddress { ip_address: interface.ip_address.clone(), net_mask: interface.net_mask.clone() };
    let old_style = interface.ip_addresses.is_empty() && !old.ip_address.is_empty();
    let all = if old_style { std::slice::from_ref(&old) } else { interface.ip_addresses.as_slice() };
    let read = |given: &IpAddress| {
        let (what, address) = match given.ip_address.strip_prefix('-') {
            Some(address) => (What::Remove, address),
            None => (What::Add, given.ip_address.as_str()),
        };
        let network = Network::new(address, &given.net_mask);
        network
            .map(|network| (what, network))
            .map_err(|why| Fault::new("reading", format!("an address of {}", interface.device), why))
    };
    all.iter().map(read).collect()
}

/// The step that brings up a link by its name, all that the loopback needs. Fails on a bad name.
pub fn up(device: &str) -> Result<Step, Fault> {
    check_name("device", device)?;
    let mut message = LinkMessage::default();
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes.push(LinkAttribute::IfName(device.to_owned()));
    Ok(Step { doing: "bringing up", to: device.to_owned(), message: RouteNetlinkMessage::SetLink(message) })
}

fn to(link: &Link) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = link.index;
    message
}

fn resize(link: &Link, mtu: u32) -> RouteNetlinkMessage {
    let mut message = to(link);
    message.attributes.push(LinkAttribute::Mtu(mtu));
    RouteNetlinkMessage::SetLink(message)
}

fn set_up(link: &Link, name: &str, up: bool) -> Step {
    let mut message = to(link);
    message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
    message.header.change_mask = LinkFlags::Up;
    let doing = if up { "bringing up" } else { "taking down" };
    Step { doing, to: name.to_owned(), message: RouteNetlinkMessage::SetLink(message) }
}

fn bring_up(link: &Link, name: &str) -> Change {
    Change::new(set_up(link, name, true), Some(set_up(link, name, false)))
}

/// The step that renames a link.
pub fn name(link: &Link, old: &str, new: &str) -> Step {
    let mut message = to(link);
    message.attributes.push(LinkAttribute::IfName(new.to_owned()));
    Step { doing: "renaming", to: format!("{old} to {new}"), message: RouteNetlinkMessage::SetLink(message) }
}

/// The change that renames a link. Linux 6.2 and later rename a link that is up. Earlier kernels return
/// EBUSY, and the link has to be taken down for the rename.
fn rename(link: &Link, old: &str, new: &str) -> Change {
    let plain = Change::new(name(link, old, new), Some(name(link, new, old)));
    let busy = if link.up {
        let down = Change::new(set_up(link, old, false), Some(set_up(link, old, true)));
        vec![down, plain.clone(), bring_up(link, new)]
    } else {
        Vec::new()
    };
    Change { busy, ..plain }
}

/// The message about an address, for both NEWADDR and DELADDR.
pub fn address(index: u32, network: &Network) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = network.prefix;
    message.attributes =
        vec![AddressAttribute::Local(network.address), AddressAttribute::Address(network.address)];
    match network.address {
        IpAddr::V4(address) => {
            message.header.family = AddressFamily::Inet;
            // A network of one or two addresses has no broadcast address.
            if network.prefix + 1 < bits(&network.address) {
                let everybody = address.to_bits() | (u32::MAX >> network.prefix);
                message.attributes.push(AddressAttribute::Broadcast(Ipv4Addr::from_bits(everybody)));
            }
        }
        IpAddr::V6(_) => {
            message.header.family = AddressFamily::Inet6;
            // The host has given the address to this guest. Duplicate address detection takes more than a
            // second, during which no process can bind to the address although the host has received its ACK.
            message.header.flags = AddressHeaderFlags::Nodad;
        }
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn wanted(value: serde_json::Value) -> Result<Wanted, Fault> {
        Wanted::read(&serde_json::from_value(value).unwrap())
    }

    fn link(up: bool) -> Link {
        Link { index: 7, name: "eth0".to_owned(), up, mtu: 1500 }
    }

    /// Changes, with the steps that undo them, as text for tests.
    fn words(changes: &[Change]) -> Vec<String> {
        let step = |step: &Step| format!("{} {}", step.doing, step.to);
        changes
            .iter()
            .map(|change| {
                format!("{} ({})", step(&change.step), change.undo.as_ref().map_or(String::new(), step))
            })
            .collect()
    }

    #[test]
    fn everything_in_order_and_how_it_is_taken_back() {
        let wanted = wanted(json!({"device": "eth0", "newDeviceName": "net0", "mtu": 1400, "ipAddresses": [
            {"ipAddress": "10.0.0.2", "netMask": "255.255.255.0"}, {"ipAddress": "-10.0.0.9", "netMask": "24"},
            {"ipAddress": "fec0::2", "netMask": "64"}]}))
        .unwrap();
        assert_eq!(
            words(&wanted.changes(&link(false))),
            [
                "renaming eth0 to net0 (renaming net0 to eth0)",
                "setting the MTU of net0 (setting the MTU of net0)",
                "bringing up net0 (taking down net0)",
                "keeping the other addresses of net0 ()",
                "adding 10.0.0.2/24 to net0 (removing 10.0.0.2/24 from net0)",
                "removing 10.0.0.9/24 from net0 (adding 10.0.0.9/24 to net0)",
                "adding fec0::2/64 to net0 (removing fec0::2/64 from net0)",
            ]
        );
        let renamed = Link { name: "net0".to_owned(), ..link(true) };
        let back = |link: &Link, before: Option<Before>| -> Vec<_> {
            let changes = wanted.takes_back(link, before.as_ref());
            changes.iter().map(|change| format!("{} {}", change.step.doing, change.step.to)).collect()
        };
        let unknown = [
            "adding 10.0.0.9/24 to net0",
            "keeping the other addresses of net0",
            "removing fec0::2/64 from net0",
            "removing 10.0.0.2/24 from net0",
            "taking down net0",
            "renaming net0 to eth0",
        ];
        assert_eq!(back(&renamed, None), unknown);
        assert_eq!(back(&link(false), None).len(), 5, "its name is the old one already");
        let known = back(&renamed, Some(Before { up: true, mtu: Some(1400) }));
        assert_eq!(known[0], "setting the MTU of net0");
        assert_eq!(
            (&known[1..5], &known[5..]),
            (&unknown.map(str::to_owned)[..4], &unknown.map(str::to_owned)[5..])
        );
        assert_eq!(wanted.before(&link(false)), Before { up: false, mtu: Some(1500) });
    }

    #[test]
    fn what_is_as_it_should_be_is_left_alone() {
        for name in ["", "eth0"] {
            let wanted = wanted(json!({"device": "eth0", "newDeviceName": name, "mtu": 1500})).unwrap();
            assert!(wanted.changes(&link(true)).is_empty(), "{name:?}");
        }
    }

    #[test]
    fn a_link_that_is_up_is_taken_down_for_its_name_only_if_it_must() {
        let wanted = wanted(json!({"device": "eth0", "newDeviceName": "net0"})).unwrap();
        let changes = wanted.changes(&link(true));
        assert_eq!(words(&changes), ["renaming eth0 to net0 (renaming net0 to eth0)"]);
        assert_eq!(
            words(&changes[0].busy),
            [
                "taking down eth0 (bringing up eth0)",
                "renaming eth0 to net0 (renaming net0 to eth0)",
                "bringing up net0 (taking down net0)"
            ]
        );
        assert!(wanted.changes(&link(false))[0].busy.is_empty(), "a busy name is an error");
    }

    #[test]
    fn the_old_style_has_one_address() {
        let wanted =
            wanted(json!({"device": "eth0", "ipAddress": "10.0.0.2", "netMask": "255.0.0.0"})).unwrap();
        assert_eq!(
            words(&wanted.changes(&link(true))),
            ["adding 10.0.0.2/8 to eth0 (removing 10.0.0.2/8 from eth0)"]
        );
    }

    #[test]
    fn an_address_as_the_kernel_has_it() {
        let network = |text| Network::parse(text).unwrap();
        let v4 = address(7, &network("10.1.2.3/20"));
        assert_eq!((v4.header.family, v4.header.prefix_len, v4.header.index), (AddressFamily::Inet, 20, 7));
        assert!(v4.attributes.contains(&AddressAttribute::Broadcast(Ipv4Addr::new(10, 1, 15, 255))));
        assert_eq!(v4.header.flags, AddressHeaderFlags::empty());
        for lonely in ["10.1.2.3/31", "10.1.2.3/32"] {
            assert_eq!(address(7, &network(lonely)).attributes.len(), 2);
        }
        let v6 = address(7, &network("fec0::2/64"));
        assert_eq!((v6.header.family, v6.header.flags), (AddressFamily::Inet6, AddressHeaderFlags::Nodad));
    }

    #[test]
    fn what_makes_no_sense_names_itself() {
        for (value, text) in [
            (json!({"device": ""}), "reading device: \"\" is not the name of a link"),
            (json!({"device": "e", "newDeviceName": "a/b"}), "reading newDeviceName: \"a/b\""),
            (json!({"device": "e", "mtu": 1u64 << 32}), "reading mtu: 4294967296 is no size"),
            (
                json!({"device": "e", "ipAddresses": [{"ipAddress": "10.0.0.300", "netMask": "8"}]}),
                "reading an address of e: \"10.0.0.300\" is not an address",
            ),
            (
                json!({"device": "e", "ipAddresses": [{"ipAddress": "--10.0.0.3", "netMask": "8"}]}),
                "\"-10.0.0.3\" is not an address",
            ),
            (
                json!({"device": "e", "ipAddress": "10.0.0.3", "netMask": "255.0.255.0"}),
                "\"255.0.255.0\" is not the mask of 10.0.0.3",
            ),
        ] {
            let fault = wanted(value).unwrap_err().to_string();
            assert!(fault.contains(text), "{fault}");
        }
    }
}

//! Turns a host's description of a route into the kernel's. Pure functions.

use std::net::IpAddr;

use hyperinit::fault::Fault;
use hyperinit::spec::Route;
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::address::Network;
use super::plan::{Change, Step, check_name};

/// The host's words for the default route.
const EVERYTHING: [&str; 3] = ["default", "any", "all"];

/// A host's wish for a route, parsed and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The destination; none for the default route.
    to: Option<Network>,
    gateway: Option<IpAddr>,
    /// The name of the link, if the host gives one.
    pub device: Option<String>,
}

impl Wanted {
    /// Parses a host's description of a route. Fails on a bad address or name, and names its key.
    pub fn read(route: &Route) -> Result<Wanted, Fault> {
        let fault = |key: &str, why: String| Fault::new("reading", format!("{key} of a route"), why);
        let to = match route.dest.as_str() {
            everything if EVERYTHING.contains(&everything) => None,
            dest => Some(Network::parse(dest).map_err(|why| fault("dest", why))?),
        };
        let gateway: Option<IpAddr> = match route.gateway.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| fault("gateway", format!("{text:?} is not an address")))?),
        };
        if let (Some(to), Some(gateway)) = (&to, &gateway)
            && to.address.is_ipv4() != gateway.is_ipv4()
        {
            return Err(fault("gateway", format!("{gateway} is of another family than {to}")));
        }
        let device = Some(route.device.clone()).filter(|device| !device.is_empty());
        match &device {
            Some(device) => check_name("device", device)?,
            None if gateway.is_none() => {
                return Err(fault("gateway", format!("{} has neither gateway nor device", route.dest)));
            }
            None => {}
        }
        Ok(Wanted { to, gateway, device })
    }

    /// The change that adds the route. `oif` is the number of the link, if one is named.
    pub fn change(&self, oif: Option<u32>) -> Change {
        let step = |doing, message| Step { doing, to: format!("the route to {self}"), message };
        let message = self.message(oif);
        let add = step("adding", RouteNetlinkMessage::NewRoute(message.clone()));
        Change::new(add, Some(step("removing", RouteNetlinkMessage::DelRoute(message))))
    }

    fn message(&self, oif: Option<u32>) -> RouteMessage {
        let mut message = RouteMessage::default();
        let one = self.to.map(|to| to.address).or(self.gateway);
        message.header = RouteHeader {
            address_family: match one {
                Some(IpAddr::V6(_)) => AddressFamily::Inet6,
                Some(IpAddr::V4(_)) | None => AddressFamily::Inet,
            },
            destination_prefix_length: self.to.map_or(0, |to| to.prefix),
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Boot,
            // Without a gateway, the destination is on the link itself.
            scope: if self.gateway.is_some() { RouteScope::Universe } else { RouteScope::Link },
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        let destination = self.to.map(|to| RouteAttribute::Destination(RouteAddress::from(to.address)));
        let gateway = self.gateway.map(|gateway| RouteAttribute::Gateway(RouteAddress::from(gateway)));
        message.attributes =
            [destination, gateway, oif.map(RouteAttribute::Oif)].into_iter().flatten().collect();
        message
    }
}

impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.to {
            Some(to) => write!(f, "{to}")?,
            None => f.write_str("everything")?,
        }
        if let Some(gateway) = &self.gateway {
            write!(f, " by {gateway}")?;
        }
        match &self.device {
            Some(device) => write!(f, " on {device}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn wanted(dest: &str, gateway: &str, device: &str) -> Result<Wanted, Fault> {
        let route = json!({"dest": dest, "gateway": gateway, "device": device});
        Wanted::read(&serde_json::from_value(route).unwrap())
    }

    #[test]
    fn everything_has_three_names() {
        for name in EVERYTHING {
            let wanted = wanted(name, "10.0.0.1", "").unwrap();
            let message = wanted.message(None);
            assert_eq!(message.header.destination_prefix_length, 0);
            assert_eq!(message.header.address_family, AddressFamily::Inet);
            assert_eq!(message.header.scope, RouteScope::Universe);
            assert_eq!(message.attributes.len(), 1);
            assert_eq!(wanted.to_string(), "everything by 10.0.0.1");
        }
        assert_eq!(
            wanted("default", "fec0::2", "eth0").unwrap().message(Some(3)).header.address_family,
            AddressFamily::Inet6
        );
    }

    #[test]
    fn a_host_and_a_network() {
        let host = wanted("192.0.2.7", "", "eth0").unwrap();
        let message = host.message(Some(3));
        assert_eq!((message.header.destination_prefix_length, message.header.scope), (32, RouteScope::Link));
        assert!(message.attributes.contains(&RouteAttribute::Oif(3)));
        assert_eq!(host.to_string(), "192.0.2.7/32 on eth0");
        for mask in ["192.0.2.0/24", "192.0.2.0/255.255.255.0"] {
            let network = wanted(mask, "10.0.0.1", "eth0").unwrap();
            assert_eq!(network.message(Some(3)).header.destination_prefix_length, 24);
        }
        let change = wanted("2001:db8::/32", "fec0::2", "").unwrap().change(None);
        assert!(matches!(change.step.message, RouteNetlinkMessage::NewRoute(_)));
        let Some(Step { message: RouteNetlinkMessage::DelRoute(undo), .. }) = change.undo else { panic!() };
        assert_eq!(undo.header.destination_prefix_length, 32);
    }

    #[test]
    fn what_makes_no_sense_names_itself() {
        for (dest, gateway, device, text) in [
            ("", "10.0.0.1", "", "reading dest of a route: \"\" is not an address"),
            ("default", "", "", "default has neither gateway nor device"),
            ("default", "here", "", "reading gateway of a route: \"here\""),
            ("10.0.0.0/33", "10.0.0.1", "", "\"33\" is not the mask of 10.0.0.0"),
            ("10.0.0.0/8", "fec0::2", "", "fec0::2 is of another family than 10.0.0.0/8"),
            ("default", "10.0.0.1", "a/b", "\"a/b\" is not the name of a link"),
        ] {
            let fault = wanted(dest, gateway, device).unwrap_err().to_string();
            assert!(fault.contains(text), "{fault}");
        }
    }
}

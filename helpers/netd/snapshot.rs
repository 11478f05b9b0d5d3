//! The addresses and routes of a link as the kernel lists them, and the steps that restore them. Pure
//! functions.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol,
};

use super::address::Network;
use super::plan::Step;

/// The steps that restore what a link had, from everything that the kernel listed: addresses first, then the
/// routes that they make possible. Routes through a gateway come last, because the gateway has to be
/// reachable.
pub fn steps(listed: Vec<RouteNetlinkMessage>, index: u32) -> Vec<Step> {
    let mut steps: Vec<Step> = listed.into_iter().filter_map(|message| restoring(message, index)).collect();
    // The sort is stable and so keeps the kernel's order otherwise: packets are sent from the first address
    // of a network.
    steps.sort_by_key(|step| rank(&step.message));
    steps
}

fn rank(message: &RouteNetlinkMessage) -> u8 {
    match message {
        RouteNetlinkMessage::NewRoute(route) => {
            let far = |attribute: &RouteAttribute| {
                matches!(attribute, RouteAttribute::Gateway(_) | RouteAttribute::Via(_))
            };
            1 + u8::from(route.attributes.iter().any(far))
        }
        _ => 0,
    }
}

/// The step that restores one listed object, if it is the link's: an address, or a route of the main table
/// that was added explicitly (the kernel adds its own routes with the addresses, and routers announce
/// theirs).
pub fn restoring(message: RouteNetlinkMessage, index: u32) -> Option<Step> {
    let message = match message {
        RouteNetlinkMessage::NewAddress(listed) if listed.header.index == index => {
            RouteNetlinkMessage::NewAddress(address(listed)?)
        }
        RouteNetlinkMessage::NewRoute(mut listed)
            if listed.attributes.contains(&RouteAttribute::Oif(index)) =>
        {
            let ours = listed.header.table == RouteHeader::RT_TABLE_MAIN
                && !matches!(listed.header.protocol, RouteProtocol::Kernel | RouteProtocol::Ra);
            if !ours {
                return None;
            }
            // These fields are informational.
            listed.header.flags = RouteFlags::empty();
            listed.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
            RouteNetlinkMessage::NewRoute(listed)
        }
        _ => return None,
    };
    Some(Step { doing: "restoring", to: format!("what link {index} had"), message })
}

/// The address to restore; none for an address that a router or the kernel assigns again.
fn address(mut listed: AddressMessage) -> Option<AddressMessage> {
    if !listed.header.flags.contains(AddressHeaderFlags::Permanent) {
        return None;
    }
    if local(&listed)?.is_ipv4() {
        return Some(listed);
    }
    if listed.header.scope == AddressScope::Link {
        return None;
    }
    // The address was the link's before, so duplicate address detection is not needed.
    listed.header.flags |= AddressHeaderFlags::Nodad;
    for attribute in &mut listed.attributes {
        if let AddressAttribute::Flags(flags) = attribute {
            *flags |= AddressFlags::Nodad;
        }
    }
    Some(listed)
}

/// Whether both have the same IPv4 addresses in the same order. The order of IPv6 addresses has no meaning.
pub fn same_order(one: &[Step], other: &[Step]) -> bool {
    v4(one)
        .map(|listed| (local(listed), listed.header.prefix_len))
        .eq(v4(other).map(|listed| (local(listed), listed.header.prefix_len)))
}

/// The steps that remove the IPv4 addresses from a link, the last one first.
pub fn removals(snapshot: &[Step]) -> Vec<Step> {
    let mut steps: Vec<Step> = v4(snapshot)
        .map(|listed| Step {
            doing: "removing",
            to: format!("what link {} has", listed.header.index),
            message: RouteNetlinkMessage::DelAddress(listed.clone()),
        })
        .collect();
    steps.reverse();
    steps
}

fn v4(snapshot: &[Step]) -> impl Iterator<Item = &AddressMessage> {
    snapshot.iter().filter_map(|step| match &step.message {
        RouteNetlinkMessage::NewAddress(listed) if local(listed).is_some_and(|local| local.is_ipv4()) => {
            Some(listed)
        }
        _ => None,
    })
}

/// Whether a listed address or route is the wanted one.
pub fn is_same(listed: &RouteNetlinkMessage, wanted: &RouteNetlinkMessage) -> bool {
    match (listed, wanted) {
        (RouteNetlinkMessage::NewAddress(listed), RouteNetlinkMessage::NewAddress(wanted)) => {
            let place = |address: &AddressMessage| (address.header.index, address.header.prefix_len);
            place(listed) == place(wanted) && local(listed) == local(wanted)
        }
        (RouteNetlinkMessage::NewRoute(listed), RouteNetlinkMessage::NewRoute(wanted)) => {
            let gateway = |route: &RouteMessage| {
                let is = |attribute: &&RouteAttribute| matches!(attribute, RouteAttribute::Gateway(_));
                route.attributes.iter().find(is).cloned()
            };
            let link = |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::Oif(_));
            let same_link =
                |attribute: &RouteAttribute| !link(attribute) || listed.attributes.contains(attribute);
            listed.header.table == wanted.header.table
                && listed.header.address_family == wanted.header.address_family
                && destination(listed) == destination(wanted)
                && gateway(listed) == gateway(wanted)
                // If no link is named, the gateway determines it.
                && wanted.attributes.iter().all(same_link)
        }
        _ => false,
    }
}

/// The destination of a route: network address and prefix length. None is the default route, which the kernel
/// lists without an address or with one of zeros.
fn destination(route: &RouteMessage) -> Option<(Vec<u8>, u8)> {
    let prefix = route.header.destination_prefix_length;
    route.attributes.iter().filter(|_| prefix > 0).find_map(|attribute| {
        let address = match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => IpAddr::V4(*address),
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => IpAddr::V6(*address),
            _ => return None,
        };
        Some((Network { address, prefix }.masked(), prefix))
    })
}

/// The link's own address. Where the two attributes differ, the other one is the address of the peer.
fn local(address: &AddressMessage) -> Option<IpAddr> {
    let local = address.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        address.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::super::links;
    use super::*;

    fn network(text: &str) -> Network {
        Network::parse(text).unwrap()
    }

    fn address(
        index: u32,
        text: &str,
        flags: AddressHeaderFlags,
        scope: AddressScope,
    ) -> RouteNetlinkMessage {
        let mut address = links::address(index, &network(text));
        (address.header.flags, address.header.scope) = (flags, scope);
        RouteNetlinkMessage::NewAddress(address)
    }

    fn route(protocol: RouteProtocol, table: u8, oif: u32, gateway: Option<&str>) -> RouteNetlinkMessage {
        let mut route = RouteMessage::default();
        (route.header.protocol, route.header.table) = (protocol, table);
        route.attributes = vec![RouteAttribute::Oif(oif)];
        let gateway = gateway.map(|text| RouteAddress::from(network(text).address));
        route.attributes.extend(gateway.map(RouteAttribute::Gateway));
        RouteNetlinkMessage::NewRoute(route)
    }

    const PERMANENT: AddressHeaderFlags = AddressHeaderFlags::Permanent;
    const MAIN: u8 = RouteHeader::RT_TABLE_MAIN;

    #[test]
    fn a_link_gets_back_what_was_given_to_it() {
        let back = restoring(address(7, "fec0::2/64", PERMANENT, AddressScope::Site), 7).unwrap();
        let nodad = PERMANENT | AddressHeaderFlags::Nodad;
        assert_eq!(back.message, address(7, "fec0::2/64", nodad, AddressScope::Site));
        let v4 = address(7, "169.254.0.2/16", PERMANENT, AddressScope::Link);
        assert_eq!(restoring(v4.clone(), 7).unwrap().message, v4, "no kernel gives itself one of IPv4");
        for (index, flags, scope) in [
            (8, PERMANENT, AddressScope::Site),
            (7, PERMANENT, AddressScope::Link),
            (7, AddressHeaderFlags::empty(), AddressScope::Site),
        ] {
            assert_eq!(restoring(address(index, "fec0::2/64", flags, scope), 7), None);
        }
        assert!(restoring(route(RouteProtocol::Boot, MAIN, 7, None), 7).is_some());
        for (protocol, table, oif) in [
            (RouteProtocol::Kernel, MAIN, 7),
            (RouteProtocol::Ra, MAIN, 7),
            (RouteProtocol::Boot, 255, 7),
            (RouteProtocol::Boot, MAIN, 8),
        ] {
            assert_eq!(restoring(route(protocol, table, oif, None), 7), None);
        }
    }

    #[test]
    fn what_others_need_is_given_back_before_them() {
        let first = address(7, "10.0.0.2/24", PERMANENT, AddressScope::Universe);
        let second = address(7, "10.0.0.1/24", PERMANENT, AddressScope::Universe);
        let far = route(RouteProtocol::Boot, MAIN, 7, Some("10.0.0.1"));
        let near = route(RouteProtocol::Boot, MAIN, 7, None);
        let listed = vec![far.clone(), near.clone(), first.clone(), second.clone()];
        let back: Vec<_> = steps(listed, 7).into_iter().map(|step| step.message).collect();
        assert_eq!(back, [first, second, near, far]);
    }

    #[test]
    fn addresses_have_an_order() {
        let address = |text| address(7, text, PERMANENT, AddressScope::Universe);
        let [first, second] = [address("10.0.0.2/24"), address("10.0.0.1/24")];
        let v6 = address("fec0::2/64");
        let snapshot = steps(vec![first.clone(), second.clone(), v6], 7);
        assert!(same_order(&snapshot, &snapshot[..2]));
        assert!(!same_order(&snapshot, &steps(vec![second.clone(), first.clone()], 7)));
        assert!(!same_order(&snapshot, &snapshot[..1]) && !same_order(&snapshot[..1], &snapshot));
        let removed: Vec<_> = removals(&snapshot).into_iter().map(|step| step.message).collect();
        let del = |message| match message {
            RouteNetlinkMessage::NewAddress(address) => RouteNetlinkMessage::DelAddress(address),
            other => other,
        };
        assert_eq!(removed, [del(second), del(first)]);
    }
}

//! A host's links, addresses and routes: netd turns them into messages that have the same meaning when they
//! are parsed again, and that can be taken back.
#![forbid(unsafe_code)]
#![no_main]

use hyperinit::spec::{Interface, IpAddress, Route};
use libfuzzer_sys::fuzz_target;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkAttribute;

#[path = "../../helpers/netd/address.rs"]
#[allow(dead_code)]
mod address;
#[path = "../../helpers/netd/links.rs"]
#[allow(dead_code)]
mod links;
#[path = "../../helpers/netd/plan.rs"]
#[allow(dead_code)]
mod plan;
#[path = "../../helpers/netd/routes.rs"]
mod routes;

use address::Network;
use plan::{Change, Step};

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let mut words = text.split('\n').map(str::to_owned);
    let mut word = || words.next().unwrap_or_default();
    let interface = Interface {
        device: word(),
        new_device_name: word(),
        mtu: word().parse().unwrap_or(0),
        ip_address: word(),
        net_mask: word(),
        ip_addresses: vec![IpAddress { ip_address: word(), net_mask: word() }],
    };
    let old_style = Interface { ip_addresses: Vec::new(), ..interface.clone() };
    for interface in [interface, old_style] {
        if let Ok(wanted) = links::Wanted::read(&interface) {
            assert!(!wanted.device.is_empty() && wanted.device.len() < 16);
            let link = links::Link { index: 2, name: wanted.device.clone(), up: true, mtu: 1500 };
            wanted.changes(&link).iter().for_each(said);
            wanted.changes(&links::Link { up: false, ..link.clone() }).iter().for_each(said);
            wanted.takes_back(&link, None).iter().for_each(said);
            wanted.takes_back(&link, Some(&wanted.before(&link))).iter().for_each(said);
        }
    }
    let route = Route { dest: word(), gateway: word(), device: word() };
    if let Ok(wanted) = routes::Wanted::read(&route) {
        said(&wanted.change(wanted.device.is_some().then_some(2)));
    }
    network(&route.dest);
});

fn said(change: &Change) {
    step(&change.step);
    change.undo.iter().for_each(step);
    change.busy.iter().for_each(said);
}

fn step(step: &Step) {
    let mut message =
        NetlinkMessage::new(Default::default(), NetlinkPayload::InnerMessage(step.message.clone()));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    // The kernel reports these settings in a form that differs from the one in which it takes them.
    if let RouteNetlinkMessage::SetLink(link) = &step.message
        && link.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::AfSpecUnspec(_)))
    {
        return;
    }
    let back = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes).expect("it was just said");
    assert_eq!(back.payload, message.payload);
}

/// Checks that an address and its mask survive being printed and parsed again, and that the mask is ones
/// followed by zeros.
fn network(text: &str) {
    let Ok(network) = Network::parse(text) else { return };
    assert_eq!(Network::parse(&network.to_string()), Ok(network));
    let (mask, masked) = (network.mask(), network.masked());
    assert_eq!(mask.len(), masked.len());
    let ones: u32 = mask.iter().map(|byte| byte.count_ones()).sum();
    assert_eq!(ones, u32::from(network.prefix));
    let leading: u32 = mask.iter().take_while(|byte| **byte == 255).count() as u32 * 8;
    assert!(ones - leading < 8 && mask.is_sorted_by(|a, b| a >= b));
}

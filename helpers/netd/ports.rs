//! Port mapping: turns the white lists and the mapped ports into one transaction, after which the table has
//! exactly their rules. Pure functions.
//!
//! ```text
//! table inet hyperstart {
//!     set open { tcp . 80 }                 # containers' ports
//!     map redirects { tcp . 8080 : 80 }     # host ports that are other ones
//!     chain hyperstart-INPUT { type filter hook input; policy drop;
//!         ct state established,related accept
//!         meta l4proto icmp accept
//!         meta l4proto ipv6-icmp accept
//!         iiftype loopback accept
//!         ip saddr INTERNAL accept                               # each
//!         ip saddr EXTERNAL meta l4proto . th dport @open accept # each
//!     }
//!     chain hyperstart-PREROUTING { type nat hook prerouting;
//!         ip saddr EXTERNAL redirect to meta l4proto . th dport map @redirects # each
//!     }
//! }
//! ```
//!
//! Every change replaces the whole table. The kernel switches from the old table to the new one atomically,
//! and remembers accepted connections by itself. So the end of a container needs no search for its rules, and
//! a restarted netd needs no state.

use std::collections::{BTreeMap, BTreeSet};

use hyperinit::fault::Fault;
use hyperinit::spec::NETWORKS_MAX;
use hyperinit::wire::netd::{PORTS_MAX, PortMapping};
use netlink_packet_netfilter::NetfilterMessage;
use netlink_packet_netfilter::nftables::InetHookNumber;

use super::address::Network;
use super::kernel::Item;
use super::nft::{self, Element, Policy, Rule};

const INPUT: &str = "hyperstart-INPUT";
const PREROUTING: &str = "hyperstart-PREROUTING";
const OPEN: &str = "open";
const REDIRECTS: &str = "redirects";
/// NF_IP_PRI_FILTER and NF_IP_PRI_NAT_DST of linux/netfilter_ipv4.h.
const FILTER: i32 = 0;
const NAT_DST: i32 = -100;
/// IPPROTO_ICMP and IPPROTO_ICMPV6.
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// The number of elements in one message, well below what a message holds.
const ELEMENTS_MAX: usize = 1000;

/// The transaction that replaces a pod's rules. Fails on a bad network, protocol or port, or on too many of
/// them.
pub fn rules(mapping: &PortMapping) -> Result<Vec<Item>, Fault> {
    let internal = networks("internalNetworks", &mapping.white_lists.internal_networks)?;
    let external = networks("externalNetworks", &mapping.white_lists.external_networks)?;
    let Ports { open, redirects } = Ports::read(mapping)?;
    let mut all = none();
    let mut add = |to: &str, message| all.push(item("adding", to, message));
    add("the table", nft::add_table());
    add("the set of open ports", nft::set(OPEN, 1, false));
    add("the map of redirected ports", nft::set(REDIRECTS, 2, true));
    for (set, elements) in [
        (OPEN, open.into_iter().map(|port| (port, None)).collect::<Vec<Element>>()),
        (REDIRECTS, redirects.into_iter().map(|(port, to)| (port, Some(to))).collect()),
    ] {
        for some in elements.chunks(ELEMENTS_MAX) {
            add("the ports", nft::elements(set, some.iter().copied()));
        }
    }
    add(INPUT, nft::chain(INPUT, "filter", InetHookNumber::LocalIn, FILTER, Policy::Drop));
    for rule in [nft::established(), nft::protocol(ICMP), nft::protocol(ICMPV6), nft::from_loopback()] {
        add("the rules of every pod", nft::rule(INPUT, then(rule, nft::accept())));
    }
    for network in &internal {
        let rule = then(nft::from(network), nft::accept());
        add(&format!("the internal network {network}"), nft::rule(INPUT, rule));
    }
    for network in &external {
        let rule = then(then(nft::from(network), nft::to_port_of(OPEN)), nft::accept());
        add(&format!("the external network {network}"), nft::rule(INPUT, rule));
    }
    add(PREROUTING, nft::chain(PREROUTING, "nat", InetHookNumber::PreRouting, NAT_DST, Policy::Accept));
    for network in &external {
        let rule = then(nft::from(network), nft::redirect_by(REDIRECTS));
        add(&format!("the external network {network}"), nft::rule(PREROUTING, rule));
    }
    Ok(all)
}

/// The transaction that removes the table, whether it exists or not.
pub fn none() -> Vec<Item> {
    vec![
        item("making sure of", "the table", nft::add_table()),
        item("removing", "the table", nft::delete_table()),
    ]
}

fn item(doing: &'static str, to: &str, message: NetfilterMessage) -> Item {
    Item { doing, to: to.to_owned(), message }
}

fn then(mut rule: Rule, more: Rule) -> Rule {
    rule.extend(more);
    rule
}

fn networks(key: &str, given: &[String]) -> Result<BTreeSet<Network>, Fault> {
    if given.len() > NETWORKS_MAX {
        return Err(Fault::new("reading", key, format!("more than {NETWORKS_MAX} networks")));
    }
    given.iter().map(|text| Network::parse(text).map_err(|why| Fault::new("reading", key, why))).collect()
}

/// A protocol's number and a port.
type ProtocolPort = (u8, u16);

/// The mapped ports.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ports {
    /// The containers' ports that are open.
    open: BTreeSet<ProtocolPort>,
    /// The map from host ports to containers' ports, where they differ.
    redirects: BTreeMap<ProtocolPort, u16>,
}

impl Ports {
    /// Reads the mapped ports. init has checked them, and netd checks them again before it uses them.
    fn read(mapping: &PortMapping) -> Result<Ports, Fault> {
        if mapping.ports.len() > PORTS_MAX {
            return Err(Fault::new("reading", "ports", format!("more than {PORTS_MAX}")));
        }
        let mut ports = Ports::default();
        let mut hosts = BTreeMap::new();
        for port in &mapping.ports {
            let fault = |why: String| Fault::new("reading", "ports", why);
            let Some((protocol, host)) = port.check().map_err(fault)? else { continue };
            let number = protocol.number();
            if hosts.insert((number, host), port.container_port).is_some_and(|old| old != port.container_port)
            {
                return Err(Fault::new("reading", "ports", format!("{host}/{protocol} leads to two ports")));
            }
            ports.open.insert((number, port.container_port));
            if host != port.container_port {
                ports.redirects.insert((number, host), port.container_port);
            }
        }
        Ok(ports)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_netfilter::NetfilterMessageInner;
    use netlink_packet_netfilter::nftables::NfTablesMessage;
    use serde_json::json;

    fn mapping(value: serde_json::Value) -> PortMapping {
        PortMapping {
            white_lists: serde_json::from_value(value["lists"].clone()).unwrap(),
            ports: serde_json::from_value(value["ports"].clone()).unwrap(),
        }
    }

    fn ports(value: serde_json::Value) -> Result<Ports, Fault> {
        Ports::read(&mapping(json!({"lists": {}, "ports": value})))
    }

    #[test]
    fn only_what_has_a_host_port_is_mapped_and_redirected_where_it_differs() {
        let read = ports(json!([
            {"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 53, "containerPort": 53, "protocol": "UDP"},
            {"hostPort": 5000, "containerPort": 80, "protocol": ""},
            {"containerPort": 9000, "protocol": "sctp"},
        ]));
        let expected = Ports {
            open: BTreeSet::from([(6, 80), (17, 53)]),
            redirects: BTreeMap::from([((6, 8080), 80), ((6, 5000), 80)]),
        };
        assert_eq!(read.unwrap(), expected);
        let fault = ports(json!([{"hostPort": 1, "containerPort": 2, "protocol": "tcp"},
            {"hostPort": 1, "containerPort": 3, "protocol": "tcp"}]));
        assert!(fault.unwrap_err().to_string().ends_with("reading ports: 1/tcp leads to two ports"));
        assert!(ports(json!([{"hostPort": 1, "containerPort": 2, "protocol": "icmp"}])).is_err());
        assert!(ports(json!([{"hostPort": 1, "containerPort": 0, "protocol": "tcp"}])).is_err());
    }

    #[test]
    fn the_old_table_goes_and_the_new_one_comes_in_one_transaction() {
        let items = rules(&mapping(json!({
            "lists": {"internalNetworks": ["10.0.0.0/8"], "externalNetworks": ["0.0.0.0/0", "::/0", "0.0.0.0/0"]},
            "ports": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]})))
        .unwrap();
        let words: Vec<_> = items.iter().map(|item| format!("{} {}", item.doing, item.to)).collect();
        assert_eq!(
            words,
            [
                "making sure of the table",
                "removing the table",
                "adding the table",
                "adding the set of open ports",
                "adding the map of redirected ports",
                "adding the ports",
                "adding the ports",
                "adding hyperstart-INPUT",
                "adding the rules of every pod",
                "adding the rules of every pod",
                "adding the rules of every pod",
                "adding the rules of every pod",
                "adding the internal network 10.0.0.0/8",
                "adding the external network 0.0.0.0/0",
                "adding the external network ::/0",
                "adding hyperstart-PREROUTING",
                "adding the external network 0.0.0.0/0",
                "adding the external network ::/0",
            ]
        );
        assert!(items.iter().all(|item| matches!(item.message.inner, NetfilterMessageInner::NfTables(_))));
        let empty = rules(&mapping(json!({"lists": {}, "ports": []}))).unwrap();
        assert!(!empty.iter().any(|item| matches!(
            item.message.inner,
            NetfilterMessageInner::NfTables(NfTablesMessage::NewSetElement(_))
        )));
    }

    #[test]
    fn networks_that_are_none_name_themselves() {
        for (lists, text) in [
            (
                json!({"internalNetworks": ["10.0.0.0/40"]}),
                "reading internalNetworks: \"40\" is not the mask",
            ),
            (json!({"externalNetworks": ["example.org"]}), "reading externalNetworks: \"example.org\""),
        ] {
            let fault = rules(&mapping(json!({"lists": lists, "ports": []}))).unwrap_err().to_string();
            assert!(fault.contains(text), "{fault}");
        }
        // A host cannot send this many; netd checks init's message again.
        let mut mapping = mapping(json!({"lists": {}, "ports": []}));
        mapping.white_lists.external_networks = vec!["10.0.0.0/8".to_owned(); NETWORKS_MAX + 1];
        let fault = rules(&mapping).unwrap_err().to_string();
        assert!(fault.contains("externalNetworks: more than 256 networks"), "{fault}");
    }
}

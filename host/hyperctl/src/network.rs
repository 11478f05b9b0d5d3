//! A VM's NICs: QEMU's arguments for them, and the network set-up of `hyperctl run`'s pod on the first one.

use std::ffi::OsString;
use std::fmt;
use std::net::IpAddr;

use hyperinit_protocol::fault::Fault;
use hyperinit_protocol::spec::{Interface, IpAddress, Pod, Protocol, Route};

/// QEMU's own network, whose addresses are always these (QEMU's documentation, "Using the user mode network
/// stack").
const USER: &str = "user";
const LINK: &str = "eth0";
const ADDRESSES: [(&str, &str); 2] = [("10.0.2.15", "24"), ("fec0::15", "64")];
const GATEWAYS: [&str; 2] = ["10.0.2.2", "fec0::2"];
const NAMESERVER: &str = "10.0.2.3";

/// A port of this machine that is forwarded to a port of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    protocol: Protocol,
    host: u16,
    guest: u16,
}

/// The form of QEMU's `hostfwd`. The port is on the loopback address: whether other machines may connect is
/// not for the VM of a test to decide.
impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:127.0.0.1:{}-:{}", self.protocol, self.host, self.guest)
    }
}

/// Parses `HOST:GUEST[/PROTOCOL]`.
pub fn forward(word: &str) -> Result<Forward, String> {
    let (ports, protocol) = word.split_once('/').unwrap_or((word, "tcp"));
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return Err("QEMU forwards tcp and udp".to_owned()),
    };
    let port = |text: &str| text.parse().ok().filter(|port| *port != 0);
    let both = ports.split_once(':').and_then(|(host, guest)| Some((port(host)?, port(guest)?)));
    let (host, guest) = both.ok_or("not of the form HOST:GUEST[/udp], ports from 1 to 65535")?;
    Ok(Forward { protocol, host, guest })
}

/// Checks a kind of network and its options.
pub fn netdev(word: &str) -> Result<String, String> {
    match word.split(',').next() {
        Some("") | None => Err("not of the form KIND[,OPTION…]".to_owned()),
        Some(_) => Ok(word.to_owned()),
    }
}

/// The VM's networks.
fn networks<'a>(net: &'a [String], publish: &[Forward]) -> Vec<&'a str> {
    match net {
        [] if !publish.is_empty() => vec![USER],
        net => net.iter().map(String::as_str).collect(),
    }
}

fn is_user(netdev: &str) -> bool {
    netdev.split(',').next() == Some(USER)
}

/// QEMU's arguments for the NICs.
pub fn arguments(net: &[String], publish: &[Forward]) -> Result<Vec<OsString>, Fault> {
    let networks = networks(net, publish);
    if !publish.is_empty() && !networks.first().is_some_and(|first| is_user(first)) {
        let why = "only QEMU's own network can, as the first: --net user";
        return Err(Fault::new("forwarding", "ports", why));
    }
    let mut all: Vec<OsString> = Vec::new();
    let mut add = |option: &str, value: String| all.extend([option.into(), value.into()]);
    for (number, netdev) in networks.iter().enumerate() {
        let (kind, more) = netdev
            .split_once(',')
            .map_or((*netdev, String::new()), |(kind, more)| (kind, format!(",{more}")));
        let forwards: String = match number {
            0 => publish.iter().map(|forward| format!(",hostfwd={forward}")).collect(),
            _ => String::new(),
        };
        add("-netdev", format!("{kind},id=net{number}{more}{forwards}"));
        // No boot ROM is needed, because QEMU loads the kernel itself.
        add("-device", format!("virtio-net-pci,netdev=net{number},romfile="));
    }
    Ok(all)
}

/// Puts a pod on the VM's first network, if that is QEMU's own.
pub fn set_up(pod: &mut Pod, net: &[String], publish: &[Forward], dns: &[IpAddr]) {
    let user = networks(net, publish).first().is_some_and(|first| is_user(first));
    pod.dns = dns.iter().map(IpAddr::to_string).collect();
    if !user {
        return;
    }
    if dns.is_empty() {
        pod.dns = vec![NAMESERVER.to_owned()];
    }
    let address = |(address, mask): (&str, &str)| IpAddress {
        ip_address: address.to_owned(),
        net_mask: mask.to_owned(),
    };
    let ip_addresses = ADDRESSES.map(address).into();
    pod.interfaces = vec![Interface { device: LINK.to_owned(), ip_addresses, ..Interface::default() }];
    let route = |gateway: &str| Route {
        dest: "default".to_owned(),
        gateway: gateway.to_owned(),
        device: LINK.to_owned(),
    };
    pod.routes = GATEWAYS.map(route).into();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(net: &[&str], publish: &[&str]) -> Result<String, Fault> {
        let net: Vec<String> = net.iter().map(|&word| word.to_owned()).collect();
        let publish: Vec<Forward> = publish.iter().map(|word| forward(word).unwrap()).collect();
        let all = arguments(&net, &publish)?;
        Ok(all.iter().map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn what_qemu_is_told() {
        assert_eq!(words(&[], &[]).unwrap(), "");
        assert_eq!(
            words(&["user", "tap,ifname=tap0,script=no"], &["8080:80", "53:5353/udp"]).unwrap(),
            "-netdev user,id=net0,hostfwd=tcp:127.0.0.1:8080-:80,hostfwd=udp:127.0.0.1:53-:5353 \
             -device virtio-net-pci,netdev=net0,romfile= -netdev tap,id=net1,ifname=tap0,script=no \
             -device virtio-net-pci,netdev=net1,romfile="
        );
        assert!(words(&[], &["1:2"]).unwrap().starts_with("-netdev user,id=net0,hostfwd="));
        assert!(words(&["tap", "user"], &["1:2"]).unwrap_err().to_string().contains("--net user"));
    }

    #[test]
    fn a_pod_on_qemus_own_network() {
        let mut pod = Pod::default();
        set_up(&mut pod, &[], &[], &["192.0.2.1".parse().unwrap()]);
        assert_eq!((pod.dns.as_slice(), pod.interfaces.len()), (&["192.0.2.1".to_owned()][..], 0));
        set_up(&mut pod, &["user,restrict=on".to_owned()], &[], &[]);
        assert_eq!(pod.dns, [NAMESERVER]);
        assert_eq!((pod.interfaces.len(), pod.interfaces[0].ip_addresses.len(), pod.routes.len()), (1, 2, 2));
    }
}

//! Sockets: to the host and to the guest's network, and what netd's own socket allows.

use std::fs;

use nix::libc;

use super::{Effect, NULL, Place, int, one};
use crate::answer::Answer;

/// The words of the row; the address family, type and protocol of the socket.
const SOCKETS: [(&str, i32, i32, i32); 12] = [
    ("AF_VSOCK, to the host", libc::AF_VSOCK, libc::SOCK_STREAM, 0),
    ("AF_PACKET, all packets", libc::AF_PACKET, libc::SOCK_RAW, 0x0300),
    ("AF_INET raw", libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP),
    ("AF_INET", libc::AF_INET, libc::SOCK_STREAM, 0),
    ("AF_UNIX", libc::AF_UNIX, libc::SOCK_STREAM, 0),
    ("AF_ALG", libc::AF_ALG, libc::SOCK_SEQPACKET, 0),
    ("AF_NETLINK route", libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE),
    ("AF_NETLINK netfilter", libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_NETFILTER),
    ("AF_NETLINK uevents", libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_KOBJECT_UEVENT),
    ("AF_NETLINK audit", libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_AUDIT),
    ("AF_NETLINK generic", libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_GENERIC),
    ("AF_KEY", libc::AF_KEY, libc::SOCK_RAW, 2),
];

/// nfnetlink's subsystems and messages (linux/netfilter/nfnetlink*.h).
const NFLOG_CONFIG: u16 = 4 << 8 | 1;
const NFQUEUE_CONFIG: u16 = 3 << 8 | 2;
const CONNTRACK_GET: u16 = 1 << 8 | 1;
const CONNTRACK_DELETE: u16 = 1 << 8 | 2;
const IPSET_PROTOCOL: u16 = 6 << 8 | 1;

pub fn effects() -> Vec<Effect> {
    let sockets = SOCKETS.map(|(what, family, kind, protocol)| Effect {
        group: "Sockets",
        name: format!("makes one of {what}"),
        act: Box::new(move |place| {
            let kind = kind | libc::SOCK_CLOEXEC;
            place.makes(libc::SYS_socket, [int(family), int(kind), int(protocol)]).word()
        }),
    });
    const OWN: &str = "The netfilter socket that it has";
    let requests = [
        // NFULNL_CFG_CMD_BIND, group 9, any protocol.
        one(OWN, "has packets copied to it by NFLOG", |p| asks(p, NFLOG_CONFIG, &[8, 0, 1, 0, 1, 0, 0, 0])),
        // NFQNL_CFG_CMD_BIND, queue 9.
        one(OWN, "decides on packets by NFQUEUE", |p| asks(p, NFQUEUE_CONFIG, &[8, 0, 1, 0, 1, 0, 0, 2])),
        one(OWN, "reads the table of connections", |p| asks(p, CONNTRACK_GET, &[])),
        one(OWN, "empties the table of connections", |p| asks(p, CONNTRACK_DELETE, &[])),
        one(OWN, "asks for sets of addresses (ipset)", |p| {
            asks(p, IPSET_PROTOCOL, &[5, 0, 1, 0, 6, 0, 0, 0])
        }),
    ];
    sockets.into_iter().chain(requests).collect()
}

/// Sends a request over the process's own netfilter socket and reads the answer.
fn asks(place: &mut Place<'_>, kind: u16, attributes: &[u8]) -> Answer {
    /// NLM_F_REQUEST and NLM_F_ACK.
    const FLAGS: u16 = 5;
    /// Identifies the answer to this request.
    const SEQUENCE: u32 = 0x5ea7;
    let Some(fd) = netfilter_socket(place.seat.pid()) else { return Answer::NotHere };
    let mut message = Vec::new();
    message.extend(u32::try_from(20 + attributes.len()).unwrap().to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(FLAGS.to_ne_bytes());
    message.extend(SEQUENCE.to_ne_bytes());
    message.extend(0_u32.to_ne_bytes());
    // nfgenmsg: AF_INET, version 0, and the group or queue.
    message.extend([u8::try_from(libc::AF_INET).unwrap(), 0, 0, 9]);
    message.extend(attributes);
    let at = place.seat.put(&message);
    let sent = place.seat.call(libc::SYS_sendto, [fd, at, message.len() as u64, 0, NULL, 0]);
    if sent.value().is_none() {
        return sent;
    }
    let reply = place.seat.put(&[0; 512]);
    loop {
        let received =
            place.seat.call(libc::SYS_recvfrom, [fd, reply, 512, int(libc::MSG_DONTWAIT), NULL, NULL]);
        let Some(length) = received.value() else { return received };
        let bytes = place.seat.look(reply, usize::try_from(length).unwrap());
        let word = |at: usize| bytes.get(at..at + 4).map(|four| u32::from_ne_bytes(four.try_into().unwrap()));
        if word(8) != Some(SEQUENCE) {
            continue;
        }
        // An error of 0 is the kernel's acknowledgement. A message of another type is the requested data, and
        // the acknowledgement follows it.
        let kind = u16::from_ne_bytes([bytes[4], bytes[5]]);
        if i32::from(kind) != libc::NLMSG_ERROR {
            continue;
        }
        return match word(16).unwrap_or_default().cast_signed() {
            0 => Answer::Done(0),
            errno => Answer::Refused(nix::errno::Errno::from_raw(-errno)),
        };
    }
}

/// The process's descriptor of a NETLINK_NETFILTER socket.
fn netfilter_socket(pid: i32) -> Option<u64> {
    // The columns of /proc/net/netlink: the second is the protocol, the last the inode.
    let table = fs::read_to_string(format!("/proc/{pid}/net/netlink")).ok()?;
    let inodes: Vec<String> = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|columns| columns.get(1) == Some(&libc::NETLINK_NETFILTER.to_string().as_str()))
        .filter_map(|columns| Some(format!("socket:[{}]", columns.last()?)))
        .collect();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    let mut own = open.filter(|entry| {
        fs::read_link(entry.path())
            .is_ok_and(|link| inodes.iter().any(|inode| link.as_os_str() == inode.as_str()))
    });
    own.next()?.file_name().to_str()?.parse().ok()
}

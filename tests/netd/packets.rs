//! What a netd that was taken over gets to hear over the socket on which it sets up port mapping.

use std::fs;
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use hyperinit::wire::Role;
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv, send};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::net::nft;
use super::support::DEADLINE;
use super::support::guest::guest;
use super::support::helper::Helper;

/// Of linux/netfilter/nfnetlink.h and nfnetlink_log.h: the log, a packet of it, what it is to do.
const LOG: u8 = 4;
const PACKET: u8 = 0;
const CONFIG: u8 = 1;

/// A duplicate of netd's socket to netfilter: the one that is of this namespace's sockets in
/// /proc/net/netlink.
fn of(netd: &Helper) -> OwnedFd {
    let protocol = NETLINK_NETFILTER.to_string();
    let all = fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
    let inodes: Vec<String> = all
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| words.get(1) == Some(&protocol.as_str()))
        .map(|words| format!("socket:[{}]", words.last().unwrap()))
        .collect();
    let pid = netd.pid();
    let numbers = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().map(|entry| entry.unwrap().path());
    let found =
        numbers.filter(|path| fs::read_link(path).is_ok_and(|to| inodes.contains(&to.display().to_string())));
    let [path] = <[_; 1]>::try_from(found.collect::<Vec<_>>()).expect("one socket of netd's to netfilter");
    let number = path.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let pidfd = pidfd_open(Pid::from_raw(pid.0).unwrap(), PidfdFlags::empty()).unwrap();
    pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).unwrap()
}

/// A message that asks for the packets of a log's group, whole and at once.
fn bind(group: u16) -> Vec<u8> {
    let attribute = |kind: u16, value: &[u8]| {
        let mut bytes = [(4 + value.len() as u16).to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    // NFULA_CFG_CMD: NFULNL_CFG_CMD_BIND. NFULA_CFG_MODE: so many bytes of each, NFULNL_COPY_PACKET.
    // NFULA_CFG_QTHRESH: after each.
    let attributes =
        [attribute(1, &[1]), attribute(2, &[0, 0, 4, 0, 2, 0]), attribute(5, &1_u32.to_be_bytes())].concat();
    let length = 20 + attributes.len() as u32;
    // nlmsghdr with NLM_F_REQUEST and NLM_F_ACK, nfgenmsg.
    let mut message = length.to_ne_bytes().to_vec();
    message.extend([CONFIG, LOG, 5, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    message.extend(group.to_be_bytes());
    message.extend(attributes);
    message
}

/// The types of the messages that have come, the low byte and the subsystem; waits for the first.
fn heard(socket: &impl AsFd) -> Vec<(u8, u8)> {
    let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
    let count = poll(&mut ready, PollTimeout::try_from(DEADLINE).unwrap()).unwrap();
    assert!(count > 0, "nothing comes");
    rest(socket)
}

/// The same without waiting.
fn rest(socket: &impl AsFd) -> Vec<(u8, u8)> {
    let mut types = Vec::new();
    let mut bytes = [0; 8192];
    loop {
        match recv(socket.as_fd().as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(_) => types.push((bytes[4], bytes[5])),
            Err(Errno::EAGAIN) => return types,
            Err(errno) => panic!("{errno}"),
        }
    }
}

/// Netfilter lets whoever may change it have packets. netd's socket answers such a request, and hears nothing
/// of any packet.
#[test]
fn netd_cannot_listen_to_packets() {
    guest(|_| {
        let mut netd = Helper::start(Role::Netd, &[], None);
        assert_eq!(netd.line(r#"{"SetLinkUp":{"device":"lo"}}"#), r#"{"Ok":"Done"}"#);
        let netds = of(&netd);
        let mut own = Socket::new(NETLINK_NETFILTER).unwrap();
        own.bind_auto().unwrap();
        own.connect(&SocketAddr::new(0, 0)).unwrap();
        for (socket, group) in [(netds.as_fd(), 7), (own.as_fd(), 8)] {
            send(socket.as_raw_fd(), &bind(group), MsgFlags::empty()).unwrap();
            // NLMSG_ERROR: yes or no.
            assert_eq!(heard(&socket), [(2, 0)]);
        }
        nft("add table inet test");
        nft("add chain inet test out { type filter hook output priority 0 ; }");
        // Each packet goes to netd's group before it goes to the other one.
        nft("add rule inet test out log group 7");
        nft("add rule inet test out log group 8");
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(b"a word of somebody's", socket.local_addr().unwrap()).unwrap();
        assert_eq!(heard(&own).first(), Some(&(PACKET, LOG)), "a socket without the filter hears it");
        assert_eq!(rest(&netds), []);
        assert!(netd.finish().success());
    });
}

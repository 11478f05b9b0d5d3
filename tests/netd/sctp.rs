//! SCTP by hand: the first packet of an association, from and to raw sockets, for a kernel may have no SCTP
//! of its own. What netfilter does with it is the same.

use std::net::{IpAddr, UdpSocket};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use super::support::DEADLINE;

/// The kinds of chunk that are sent here (RFC 9260, section 3.2).
const INIT: u8 = 1;
/// The header that all SCTP packets begin with, in bytes.
const HEADER: usize = 12;
/// The checksum in it.
const CHECKSUM: std::ops::Range<usize> = 8..12;

/// A socket for everything of SCTP that comes here to an address of the same family, with what the library
/// knows to do with one of datagrams.
pub fn raw(like: IpAddr) -> UdpSocket {
    let family = if like.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let raw = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp).unwrap();
    let raw = UdpSocket::from(raw);
    raw.set_read_timeout(Some(DEADLINE)).unwrap();
    raw
}

/// Sends an INIT from a port to one of an address. It is from the address that is of the same network.
pub fn send_init(from: u16, to: (IpAddr, u16)) {
    let packet = init(from, to.1);
    // The packet itself has the port.
    assert_eq!(raw(to.0).send_to(&packet, (to.0, 0)).unwrap(), packet.len());
}

/// The next packet with a whole checksum: its source address, the ports that it is from and to, and its first
/// chunk's kind.
pub fn receive(socket: &UdpSocket) -> (IpAddr, u16, u16, u8) {
    let mut packet = [0; 1500];
    let (count, from) = socket.recv_from(&mut packet).unwrap();
    // A raw socket of IPv4 has the IP header too, its length is in words; one of IPv6 has not.
    let header = if from.is_ipv4() { usize::from(packet[0] & 0xf) * 4 } else { 0 };
    let sctp = &packet[header..count];
    let mut blank = sctp.to_vec();
    blank[CHECKSUM].fill(0);
    assert_eq!(sctp[CHECKSUM], crc32c(&blank).to_le_bytes(), "its checksum is of the ports that it has");
    let port = |at: usize| u16::from_be_bytes([sctp[at], sctp[at + 1]]);
    (from.ip(), port(0), port(2), sctp[HEADER])
}

/// One packet (RFC 9260, sections 3.1 and 3.3.2).
fn init(from: u16, to: u16) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(from.to_be_bytes());
    packet.extend(to.to_be_bytes());
    // The verification tag of an INIT is 0; the checksum comes last.
    packet.extend([0; 8]);
    packet.extend([INIT, 0, 0, 20]);
    // The initiate tag, the window, the streams out and in, the first number.
    packet.extend(0x1234_5678_u32.to_be_bytes());
    packet.extend(65_536_u32.to_be_bytes());
    packet.extend([0, 1, 0, 1]);
    packet.extend(1_u32.to_be_bytes());
    let checksum = crc32c(&packet);
    packet[CHECKSUM].copy_from_slice(&checksum.to_le_bytes());
    packet
}

/// Castagnoli's, bit by bit (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let mut crc = u32::MAX;
    for &byte in bytes {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[test]
fn the_checksum_is_the_standards() {
    // RFC 3720, appendix B.4: 32 bytes of zeroes.
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
}

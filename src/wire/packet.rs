//! The packets of ipc-channel on its SEQPACKET sockets, for processes that receive them themselves.
//!
//! ipc-channel's own receive trusts its input: a false size makes it allocate, wait or panic, and surplus
//! descriptors stay open. So a process that does not trust its peer receives the packet from the socket
//! itself, checks its form here, and leaves only the decoding to ipc-channel (`channel::decode`).
//!
//! A packet consists of two native words, its own length and the message's length, and the message. (For a
//! message that does not fit a packet, ipc-channel sends a socket for the rest. None of ours is that long,
//! and such a packet is refused here.)

/// The size of the two words, in bytes.
const HEADER: usize = 2 * size_of::<usize>();
/// The longest packet that is received, in bytes: more than ipc-channel puts into one (208 kB, a socket's
/// default buffer).
pub const PACKET_MAX: usize = 256 << 10;

/// Wraps an encoded message into a packet.
pub fn wrap(message: &[u8]) -> Vec<u8> {
    let mut packet = Vec::with_capacity(HEADER + message.len());
    packet.extend_from_slice(&(HEADER + message.len()).to_ne_bytes());
    packet.extend_from_slice(&message.len().to_ne_bytes());
    packet.extend_from_slice(message);
    packet
}

/// The message in a packet; the error says what is wrong with the packet, for the log.
pub(super) fn unwrap(packet: &[u8]) -> Result<&[u8], String> {
    let words = packet.split_at_checked(HEADER).and_then(|(header, message)| {
        let (own, whole) = header.split_at_checked(size_of::<usize>())?;
        let word = |bytes: &[u8]| bytes.try_into().map(usize::from_ne_bytes).ok();
        Some((word(own)?, word(whole)?, message))
    });
    match words {
        None => Err(format!("a packet of {} bytes, which is too short for a message", packet.len())),
        Some((own, whole, message)) if own == packet.len() && whole == message.len() => Ok(message),
        Some((own, whole, message)) => Err(format!(
            "a packet of {} bytes with {} of a message that claims to be one of {own} with {whole}",
            packet.len(),
            message.len()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_says_what_is_wrong_with_it() {
        for length in 0..HEADER {
            assert!(unwrap(&vec![0; length]).unwrap_err().contains("too short"));
        }
        assert_eq!(unwrap(&wrap(b"")), Ok(b"".as_slice()));
        assert_eq!(unwrap(&wrap(b"abc")), Ok(b"abc".as_slice()));
        for word in [0, 1, 18, 20, 1 << 22, 1 << 40, 1 << 62, usize::MAX >> 1, 1 << 63, usize::MAX] {
            for at in [0, size_of::<usize>()] {
                let mut packet = wrap(b"abc");
                packet[at..at + size_of::<usize>()].copy_from_slice(&word.to_ne_bytes());
                let why = unwrap(&packet).unwrap_err();
                assert!(why.contains("19 bytes with 3") && why.contains(&word.to_string()), "{why}");
            }
        }
    }
}

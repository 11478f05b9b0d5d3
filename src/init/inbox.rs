//! Receives what the helpers and the warden send, directly from their sockets. Nothing is believed before it
//! is checked, nothing blocks, and no more than one packet is allocated.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sys::fd::{receive_bytes, receive_fds};
use crate::wire::packet::PACKET_MAX;
use crate::wire::warden::{self, REPLY_LEN};
use crate::wire::{Envelope, Reply, Role, Said, channel};

/// The result of receiving.
#[derive(Debug)]
pub enum Heard<T> {
    /// A message.
    Word(T),
    /// Nothing more for now.
    Nothing,
    /// The other end is gone.
    End,
    /// Something that no honest process sends, with its description for the log.
    Lie(String),
}

/// The buffer for one packet of a helper.
pub struct Buffer(Vec<u8>);

impl Buffer {
    /// Allocates the buffer, once.
    pub fn new() -> Buffer {
        Buffer(vec![0; PACKET_MAX])
    }
}

/// Receives the next message of a helper.
pub fn helper(role: Role, socket: &OwnedFd, buffer: &mut Buffer) -> Heard<Said<Reply>> {
    let packet = match receive_bytes(socket, &mut buffer.0) {
        Ok(0) => return end_or_lie(socket.as_fd()),
        Ok(count) => buffer.0.get(..count).unwrap_or_default(),
        Err(errno) => return no_packet(errno),
    };
    // ipc-channel decodes, and a bug in it must not end PID 1.
    let decoded = catch_unwind(AssertUnwindSafe(|| match role {
        Role::Netd => said(packet, Reply::Netd),
        Role::Mountd => said(packet, Reply::Mountd),
        Role::Execd => said(packet, Reply::Execd),
        Role::Streamd => said(packet, Reply::Streamd),
    }));
    match decoded {
        Ok(Ok(word)) => Heard::Word(word),
        Ok(Err(why)) => Heard::Lie(why),
        Err(_) => Heard::Lie("what cannot be decoded".to_owned()),
    }
}

fn said<R>(packet: &[u8], wrap: fn(R) -> Reply) -> Result<Said<Reply>, String>
where
    R: serde::Serialize + serde::de::DeserializeOwned,
{
    Ok(match channel::said(packet)? {
        Said::Up => Said::Up,
        Said::Reply(Envelope { id, body }) => Said::Reply(Envelope { id, body: body.map(wrap) }),
    })
}

/// Receives the next message of the warden, with its descriptors.
pub fn warden(socket: &OwnedFd) -> Heard<(warden::Reply, Vec<OwnedFd>)> {
    // The buffer has one byte more than a packet, so a longer packet is noticed and refused.
    let mut packet = [0; REPLY_LEN + 1];
    match receive_fds(socket, &mut packet) {
        Ok((0, _)) => end_or_lie(socket.as_fd()),
        Ok((count, fds)) => match packet.get(..count).and_then(warden::Reply::decode) {
            Some(reply) if reply.fds() == fds.len() => Heard::Word((reply, fds)),
            Some(_) => Heard::Lie(format!("{} descriptors with a word that has others", fds.len())),
            None => Heard::Lie(format!("a packet of {count} bytes, which is none of its words")),
        },
        Err(errno) => no_packet(errno),
    }
}

fn no_packet<T>(errno: Errno) -> Heard<T> {
    match errno {
        // The kernel's own want of memory does not mean that the other end is gone: the packet is received
        // later.
        Errno::EAGAIN | Errno::EINTR | Errno::ENOMEM | Errno::ENOBUFS => Heard::Nothing,
        // The packet is lost, but it was no lie: its descriptors could not be taken. The request that waits
        // for them has a time limit.
        Errno::EMFILE => {
            log::error!("no descriptor is left for what was sent");
            Heard::Nothing
        }
        Errno::EBADMSG => Heard::Lie("descriptors that nobody asked for".to_owned()),
        Errno::EMSGSIZE => Heard::Lie("a packet that is longer than any of its edge".to_owned()),
        // ECONNRESET: the other end died before it had read everything.
        _ => Heard::End,
    }
}

/// Nothing was received: the other end is gone, or the packet was empty.
fn end_or_lie<T>(socket: BorrowedFd<'_>) -> Heard<T> {
    let mut fds = [PollFd::new(socket, PollFlags::empty())];
    let gone = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0);
    if gone { Heard::End } else { Heard::Lie("an empty packet".to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fd::send_fds;
    use crate::wire::bootstrap::socket_pair;
    use crate::wire::packet::wrap;
    use crate::wire::{Instance, netd};

    fn lie<T: std::fmt::Debug>(heard: Heard<T>) -> String {
        match heard {
            Heard::Lie(why) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_helper_is_heard_and_its_end() {
        let (inits, helpers) = socket_pair().unwrap();
        let mut buffer = Buffer::new();
        assert!(matches!(helper(Role::Netd, &inits, &mut buffer), Heard::Nothing));
        send_fds(&helpers, &wrap(&[0]), &[]).unwrap();
        send_fds(&helpers, &wrap(&[1, 7, 0, 0]), &[]).unwrap();
        assert!(matches!(helper(Role::Netd, &inits, &mut buffer), Heard::Word(Said::Up)));
        match helper(Role::Netd, &inits, &mut buffer) {
            Heard::Word(Said::Reply(Envelope { id: 7, body: Ok(Reply::Netd(netd::Reply::Done)) })) => {}
            other => panic!("{other:?}"),
        }
        drop(helpers);
        assert!(matches!(helper(Role::Netd, &inits, &mut buffer), Heard::End));
    }

    #[test]
    fn lies_are_named_and_the_next_packet_is_heard() {
        let (inits, helpers) = socket_pair().unwrap();
        let mut buffer = Buffer::new();
        let mut tell = |bytes: &[u8], fds: usize| {
            send_fds(&helpers, bytes, &vec![inits.as_fd(); fds]).unwrap();
            lie(helper(Role::Execd, &inits, &mut buffer))
        };
        assert_eq!(tell(&[], 0), "an empty packet");
        assert_eq!(tell(&wrap(&[0]), 1), "descriptors that nobody asked for");
        assert_eq!(tell(&wrap(&[0]), 200), "descriptors that nobody asked for");
        assert!(tell(&[0; 15], 0).contains("too short"));
        assert!(tell(&wrap(&[9]), 0).contains("no message of its edge"));
        assert!(tell(&wrap(&vec![0; 180_000]), 3).contains("descriptors"));
    }

    #[test]
    fn the_warden_speaks_in_exact_packets() {
        let (inits, wardens) = socket_pair().unwrap();
        let spawned = warden::Reply::Spawned { helper: Instance::first(Role::Netd), pid: crate::ids::Pid(9) };
        let tell = |bytes: &[u8], fds: usize| {
            send_fds(&wardens, bytes, &vec![inits.as_fd(); fds]).unwrap();
            warden(&inits)
        };
        match tell(&spawned.encode(), 3) {
            Heard::Word((reply, fds)) => assert_eq!((reply, fds.len()), (spawned, 3)),
            other => panic!("{other:?}"),
        }
        for fds in [0, 1, 2, 4, 12, 200] {
            lie(tell(&spawned.encode(), fds));
        }
        lie(tell(&warden::Reply::Failed { helper: Instance::first(Role::Netd) }.encode(), 1));
        for bytes in [&[] as &[u8], &[0], &[0; REPLY_LEN - 1], &[0; REPLY_LEN + 1], &[0; 4096]] {
            lie(tell(bytes, 0));
        }
        drop(wardens);
        assert!(matches!(warden(&inits), Heard::End));
    }
}

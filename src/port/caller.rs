//! The peer of a new connection, of which only the host is let in.

use std::os::fd::OwnedFd;

use nix::errno::Errno;

use crate::sys::socket::{self, HOST_CID};

/// The peer of a new connection.
#[derive(Debug)]
pub enum Caller {
    /// The host.
    Host(OwnedFd),
    /// Another VM or a process of this VM, over vsock. The connection has been closed.
    Stranger,
}

/// Takes the next connection of a non-blocking listening socket, unix or vsock; EAGAIN if there is none.
/// Behind a stranger another connection may wait, for which no event comes.
pub fn accept(listener: &OwnedFd) -> Result<Caller, Errno> {
    let (connection, cid) = socket::accept(listener)?;
    match cid {
        Some(cid) if !is_host(cid) => {
            log::warn!("a connection from vsock CID {cid}, which is not the host's: closed");
            Ok(Caller::Stranger)
        }
        // A unix socket's file says who may connect.
        _ => Ok(Caller::Host(connection)),
    }
}

/// Only the host speaks to the guest (protocol.md «Channels»).
fn is_host(cid: u32) -> bool {
    cid == HOST_CID
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn only_the_host_is_the_host() {
        // The hypervisor, this machine itself, the host, a guest, anybody.
        let hosts: Vec<u32> = [0, 1, 2, 3, 4, u32::MAX].into_iter().filter(|&cid| is_host(cid)).collect();
        assert_eq!(hosts, [2]);
    }

    #[test]
    fn a_unix_socket_has_no_cid() {
        let directory = std::env::temp_dir().join(format!("host-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = OwnedFd::from(listener);
        assert_eq!(accept(&listener).unwrap_err(), Errno::EAGAIN);
        let _client = UnixStream::connect(&path).unwrap();
        assert!(matches!(accept(&listener), Ok(Caller::Host(_))));
        std::fs::remove_dir_all(directory).unwrap();
    }
}

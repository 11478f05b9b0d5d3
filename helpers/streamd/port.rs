//! The stream port: a device that stays while the host comes and goes, or a listening socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hyperinit::fault::Fault;
use hyperinit::sys::socket;
use nix::errno::Errno;

use super::park::Park;

/// The port.
pub enum Port {
    /// An open device.
    Device(OwnedFd),
    /// A listening socket, and its one live connection.
    Listener { listener: OwnedFd, connection: Option<OwnedFd>, park: Option<Park> },
}

impl Port {
    /// Where bytes go, if there is a host.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Port::Device(fd) => Some(fd.as_fd()),
            Port::Listener { connection, .. } => connection.as_ref().map(AsFd::as_fd),
        }
    }

    /// What to watch besides: the listening socket.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Port::Device(_) => None,
            Port::Listener { listener, .. } => Some(listener.as_fd()),
        }
    }

    /// Whether there is no connection and there could be one.
    pub fn wants_connection(&self) -> bool {
        matches!(self, Port::Listener { connection: None, .. })
    }

    /// Takes the next connection, if there is none and one waits.
    pub fn accept(&mut self) -> Option<BorrowedFd<'_>> {
        let Port::Listener { listener, connection, park } = self else { return None };
        if connection.is_some() {
            return None;
        }
        let accepted = match socket::accept(listener) {
            Ok(accepted) => accepted,
            Err(Errno::EAGAIN) => return None,
            Err(errno) => {
                log::warn!("{}", Fault::errno("accepting", "a connection", errno));
                return None;
            }
        };
        if let Some(Err(errno)) = park.as_ref().map(|park| park.park(accepted.as_fd())) {
            // It works, but ends with this process.
            log::warn!("{}", Fault::errno("parking", "the connection", errno));
        }
        *connection = Some(accepted);
        connection.as_ref().map(AsFd::as_fd)
    }

    /// The host hung up, or is hung up on. A device stays open.
    pub fn hang_up(&mut self) {
        if let Port::Listener { connection, park, .. } = self {
            *connection = None;
            if let Some(park) = park {
                park.clear();
            }
        }
    }
}

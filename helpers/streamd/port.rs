//! The stream port: a device that stays while the host comes and goes, a line that never tells, or a listening socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hyperinit::fault::Fault;
use hyperinit::host::{self, Caller};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::park::Park;

/// Who has connected.
pub enum Accepted<'a> {
    /// Nobody.
    Nobody,
    /// Somebody who is not the host, and has been hung up on; another may wait.
    Stranger,
    /// Somebody who has to wait: there was no memory or descriptor for the connection, and nothing will say when there is.
    Short,
    /// The host.
    Host(BorrowedFd<'a>),
}

/// The port.
pub enum Port {
    /// An open device.
    Device(OwnedFd),
    /// A serial line or a console: nothing tells whether anybody is at its other end.
    Line(OwnedFd),
    /// A listening socket, and its one live connection.
    Listener { listener: OwnedFd, connection: Option<OwnedFd>, park: Option<Park> },
}

impl Port {
    /// Where bytes go, if there is a host.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Port::Device(fd) | Port::Line(fd) => Some(fd.as_fd()),
            Port::Listener { connection, .. } => connection.as_ref().map(AsFd::as_fd),
        }
    }

    /// What to watch besides: the listening socket.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Port::Device(_) | Port::Line(_) => None,
            Port::Listener { listener, .. } => Some(listener.as_fd()),
        }
    }

    /// Whether there is no connection and there could be one.
    pub fn wants_connection(&self) -> bool {
        matches!(self, Port::Listener { connection: None, .. })
    }

    /// Whether only silence tells where the host's next frame begins.
    pub fn is_line(&self) -> bool {
        matches!(self, Port::Line(_))
    }

    /// Whether it stays while hosts come and go, and tells of that, if late.
    pub fn is_device(&self) -> bool {
        matches!(self, Port::Device(_))
    }

    /// Whether somebody waits to connect.
    pub fn has_caller(&self) -> bool {
        self.listener().is_some_and(|listener| {
            poll(&mut [PollFd::new(listener, PollFlags::POLLIN)], PollTimeout::ZERO)
                .is_ok_and(|count| count > 0)
        })
    }

    /// Takes the next connection, if there is none and one waits.
    pub fn accept(&mut self) -> Accepted<'_> {
        let Port::Listener { listener, connection, park } = self else { return Accepted::Nobody };
        if connection.is_some() {
            return Accepted::Nobody;
        }
        let accepted = match host::accept(listener) {
            Ok(Caller::Host(accepted)) => accepted,
            Ok(Caller::Stranger) => return Accepted::Stranger,
            Err(Errno::EAGAIN) => return Accepted::Nobody,
            Err(errno) => {
                log::warn!("{}", Fault::errno("accepting", "a connection", errno));
                return Accepted::Short;
            }
        };
        if let Some(Err(errno)) = park.as_ref().map(|park| park.park(accepted.as_fd())) {
            // It works, but ends with this process.
            log::warn!("{}", Fault::errno("parking", "the connection", errno));
        }
        let connection: &OwnedFd = connection.insert(accepted);
        Accepted::Host(connection.as_fd())
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

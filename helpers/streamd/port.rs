//! The stream port: a device that stays open while hosts come and go, a line that does not report its hosts,
//! or a listening socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hyperinit::fault::Fault;
use hyperinit::port::Kind;
use hyperinit::port::caller::{self, Caller};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::store::ConnectionStore;

/// The result of an attempt to accept a connection.
pub enum Accepted<'a> {
    /// No connection waits.
    Nobody,
    /// Another VM or process had connected, and its connection has been closed. Another connection may wait.
    Stranger,
    /// There was no memory or descriptor for the connection, and no event reports when there is.
    Short,
    /// The host's connection.
    Host(BorrowedFd<'a>),
}

/// The port.
pub enum Port {
    /// An open device.
    Device(OwnedFd),
    /// A serial line or a console: nothing tells whether a host is at the other end.
    Line(OwnedFd),
    /// A listening socket, and its one live connection.
    Listener { listener: OwnedFd, connection: Option<OwnedFd>, store: Option<ConnectionStore> },
}

impl Port {
    /// The descriptor to read and write, if there is a host.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Port::Device(fd) | Port::Line(fd) => Some(fd.as_fd()),
            Port::Listener { connection, .. } => connection.as_ref().map(AsFd::as_fd),
        }
    }

    /// The listening socket, if there is one. It is watched in addition to the connection.
    pub fn listener(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Port::Device(_) | Port::Line(_) => None,
            Port::Listener { listener, .. } => Some(listener.as_fd()),
        }
    }

    /// How the port reports its hosts.
    pub fn kind(&self) -> Kind {
        match self {
            Port::Device(_) => Kind::Device,
            Port::Line(_) => Kind::Line,
            Port::Listener { .. } => Kind::Socket,
        }
    }

    /// Whether a connection waits to be accepted.
    pub fn has_caller(&self) -> bool {
        self.listener().is_some_and(|listener| {
            poll(&mut [PollFd::new(listener, PollFlags::POLLIN)], PollTimeout::ZERO)
                .is_ok_and(|count| count > 0)
        })
    }

    /// Accepts the next connection, if none is open and one waits.
    pub fn accept(&mut self) -> Accepted<'_> {
        let Port::Listener { listener, connection, store } = self else { return Accepted::Nobody };
        if connection.is_some() {
            return Accepted::Nobody;
        }
        let accepted = match caller::accept(listener) {
            Ok(Caller::Host(accepted)) => accepted,
            Ok(Caller::Stranger) => return Accepted::Stranger,
            Err(Errno::EAGAIN) => return Accepted::Nobody,
            Err(errno) => {
                log::warn!("{}", Fault::errno("accepting", "a connection", errno));
                return Accepted::Short;
            }
        };
        if let Some(Err(errno)) = store.as_ref().map(|store| store.keep(accepted.as_fd())) {
            // The connection works, but a successor will not find it.
            log::warn!("{}", Fault::errno("keeping", "the connection", errno));
        }
        let connection: &OwnedFd = connection.insert(accepted);
        Accepted::Host(connection.as_fd())
    }

    /// Closes the connection. A device stays open.
    pub fn hang_up(&mut self) {
        if let Port::Listener { connection, store, .. } = self {
            *connection = None;
            if let Some(store) = store {
                store.clear();
            }
        }
    }
}

//! The socket where the hosts of this machine connect, and where each gets its two channels.
//!
//! A host that connects receives one packet with two descriptors: a control and a stream channel of its own.
//! Over these it speaks the hyperstart protocol, as with a guest.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::renameat;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::connect;
use hyperinit_protocol::fault::{Fault, OrFault};
use hyperinit_sys::fd::{receive_fds, send_fds};
use hyperinit_sys::socket::accept;

/// The socket's name in the guest's directory.
pub const MUX_SOCKET: &str = "hyperctl.sock";
/// The socket's name until it listens.
const NEW: &str = ".hyperctl.sock";
/// How long a host waits for its channels, which it gets when the guest is up: an emulated guest on a busy
/// machine takes minutes.
const TIMEOUT: Duration = Duration::from_secs(300);
/// The content of the packet: the version of what the descriptors are.
const WORD: &[u8] = b"1";

/// The listening socket.
#[derive(Debug)]
pub struct HostSocket(OwnedFd);

impl HostSocket {
    /// Makes the socket, accessible to the caller's user only. Hosts that connect wait until [`super::serve`]
    /// is called.
    pub fn open(directory: &Path) -> Result<HostSocket, Fault> {
        let path = directory.join(MUX_SOCKET);
        let parent = File::open(directory).fault("opening", directory.display())?;
        let made = || -> Result<OwnedFd, Errno> {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let socket = socket::socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
            // Set before the socket has a name: its file gets the mode of the socket (unix(7)), so no other
            // user can connect in between.
            fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
            // An address holds only 108 bytes; this one is short whatever the directory's path.
            let address = UnixAddr::new(format!("/proc/self/fd/{}/{NEW}", parent.as_raw_fd()).as_str())?;
            match unlinkat(&parent, NEW, UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(errno) => return Err(errno),
            }
            socket::bind(socket.as_raw_fd(), &address)?;
            socket::listen(&socket, Backlog::MAXCONN)?;
            // The socket gets its name once it listens, so a host that sees it can connect.
            renameat(&parent, NEW, &parent, MUX_SOCKET)?;
            Ok(socket)
        };
        made().map(HostSocket).fault("making", path.display())
    }

    /// Hands its channels to the next host that waits, and returns the server's ends, control and stream.
    /// `None` if no host waits, or if it has left.
    pub(super) fn receive(&self) -> Result<Option<(UnixStream, UnixStream)>, Errno> {
        // The pairs are made before the connection is accepted: without descriptors for them the host keeps
        // waiting.
        let pair = || UnixStream::pair().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)));
        let ((control, theirs), (stream, their_stream)) = (pair()?, pair()?);
        let caller = match accept(&self.0) {
            Ok((caller, _)) => caller,
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => return Ok(None),
            Err(errno) => return Err(errno),
        };
        match send_fds(&caller, WORD, &[theirs.as_fd(), their_stream.as_fd()]) {
            Ok(()) => Ok(Some((control, stream))),
            Err(_) => Ok(None),
        }
    }
}

impl AsFd for HostSocket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether the guest in this directory is served to many hosts.
pub fn is_served(directory: &Path) -> bool {
    directory.join(MUX_SOCKET).exists()
}

/// Connects to the server and returns control and stream. Waits for a guest that is being started.
pub fn enter(directory: &Path) -> Result<(UnixStream, UnixStream), Fault> {
    let path = directory.join(MUX_SOCKET);
    let fault = |why: &str| Fault::new("connecting to", path.display(), why);
    let deadline = Instant::now() + TIMEOUT;
    let socket = connect::unix_of(SockType::SeqPacket, directory, MUX_SOCKET, deadline)?;
    loop {
        let left = PollTimeout::try_from(deadline.saturating_duration_since(Instant::now()));
        let left = left.unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], left) {
            Err(Errno::EINTR) => {}
            Ok(0) => return Err(fault("the guest does not come up")),
            ready => {
                ready.fault("connecting to", path.display())?;
                break;
            }
        }
    }
    let mut packet = [0; 16];
    let (count, fds) = match receive_fds(&socket, &mut packet) {
        // A server that closes the socket with data unread causes ECONNRESET.
        Ok((0, _)) | Err(Errno::ECONNRESET) => return Err(fault("the guest has ended")),
        received => received.fault("connecting to", path.display())?,
    };
    match (packet.get(..count), <[OwnedFd; 2]>::try_from(fds)) {
        (Some(WORD), Ok([control, stream])) => Ok((control.into(), stream.into())),
        _ => Err(fault("it is another hyperctl's, of a version that is not known")),
    }
}

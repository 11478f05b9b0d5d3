//! Connections to the sockets in a guest's directory. No attempt lasts beyond its deadline, whichever other
//! hosts are connected.

use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};

use super::{CONTROL_SOCKET, STREAM_SOCKET, VSOCK_SOCKET};
use hyperinit_protocol::fault::{Fault, OrFault};

/// The guest's ports on vsock (protocol.md «Channels»).
const VSOCK_PORTS: [u32; 2] = [2718, 2719];
/// How long the device may take to answer: it has to ask the guest.
const VSOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest correct answer, in bytes.
const VSOCK_ANSWER_MAX: u64 = 32;
/// How long a socket may refuse connections: a guest that is starting binds its socket and listens on it in
/// two calls. A socket that refuses for longer belongs to a guest that has ended.
const REFUSED_MAX: Duration = Duration::from_secs(1);
/// The interval between two attempts to get this host's turn.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// The reason in the fault of a late connection.
const TAKEN: &str = "others are connected, or waiting to be";

/// Whether each host certainly has a connection of its own, which is so over vsock. A local guest's hosts
/// have one too, but the sockets in its directory look like those of QEMU's ports, so they are greeted like
/// those.
pub(super) fn has_connections(directory: &Path) -> bool {
    directory.join(VSOCK_SOCKET).exists()
}

/// Whether a guest's own channels are in the directory.
pub(super) fn are_there(directory: &Path) -> bool {
    has_connections(directory) || directory.join(CONTROL_SOCKET).exists()
}

/// Connects both channels and returns control and stream.
pub(super) fn sockets(directory: &Path, deadline: Instant) -> Result<(UnixStream, UnixStream), Fault> {
    // Without a common order, two hosts that connect at once could each get one channel and wait for the
    // other's.
    let turn = File::open(directory).fault("opening", directory.display())?;
    wait_for_turn(&turn, directory, deadline)?;
    if has_connections(directory) {
        let [control, stream] = VSOCK_PORTS;
        return Ok((vsock(directory, control, deadline)?, vsock(directory, stream, deadline)?));
    }
    Ok((unix(directory, CONTROL_SOCKET, deadline)?, unix(directory, STREAM_SOCKET, deadline)?))
}

/// Locks the directory. The host that has the lock may wait for a guest that another host uses.
fn wait_for_turn(turn: &File, directory: &Path, deadline: Instant) -> Result<(), Fault> {
    loop {
        match turn.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOOK_AGAIN),
            Err(TryLockError::WouldBlock) => {
                return Err(Fault::new("connecting in", directory.display(), TAKEN));
            }
            Err(TryLockError::Error(error)) => return Err(Fault::io("locking", directory.display(), &error)),
        }
    }
}

/// Connects to a port of the guest through its vsock device, with the protocol of Firecracker and its
/// relatives: one line names the port, and one line answers.
fn vsock(directory: &Path, port: u32, deadline: Instant) -> Result<UnixStream, Fault> {
    let mut socket = unix(directory, VSOCK_SOCKET, deadline)?;
    let to = format!("vsock port {port}");
    socket.set_read_timeout(Some(VSOCK_TIMEOUT)).fault("connecting to", &to)?;
    socket.write_all(format!("CONNECT {port}\n").as_bytes()).fault("connecting to", &to)?;
    let mut answer = Vec::new();
    #[expect(
        clippy::unbuffered_bytes,
        reason = "what follows the line is the guest's, and is not to be buffered here"
    )]
    for byte in (&socket).take(VSOCK_ANSWER_MAX).bytes() {
        match byte.fault("connecting to", &to)? {
            b'\n' => break,
            byte => answer.push(byte),
        }
    }
    if !answer.starts_with(b"OK ") {
        return Err(Fault::new("connecting to", to, "nobody listens"));
    }
    socket.set_read_timeout(None).fault("connecting to", &to)?;
    Ok(socket)
}

/// Connects to a socket in a directory, whatever the length of the directory's path: an address holds only
/// 108 bytes (unix(7)). If the queue of the socket is full, this waits for a place in it: QEMU takes one
/// connection at a time.
fn unix(directory: &Path, name: &str, deadline: Instant) -> Result<UnixStream, Fault> {
    unix_of(SockType::Stream, directory, name, deadline)
}

/// Like [`unix`], for a socket of another type.
pub(super) fn unix_of(
    kind: SockType,
    directory: &Path,
    name: &str,
    deadline: Instant,
) -> Result<UnixStream, Fault> {
    let path = directory.join(name);
    let parent = File::open(directory).fault("opening", directory.display())?;
    let connected = || -> std::io::Result<UnixStream> {
        let address = UnixAddr::new(format!("/proc/self/fd/{}/{name}", parent.as_raw_fd()).as_str())?;
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = UnixStream::from(socket::socket(AddressFamily::Unix, kind, flags, None)?);
        let listening_by = deadline.min(Instant::now() + REFUSED_MAX);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Zero would mean no limit. The write timeout limits connect(2) too (socket(7)).
            socket.set_write_timeout(Some(left.max(LOOK_AGAIN)))?;
            match socket::connect(socket.as_raw_fd(), &address) {
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNREFUSED) if Instant::now() < listening_by => std::thread::sleep(LOOK_AGAIN),
                connected => break connected?,
            }
        }
        socket.set_write_timeout(None)?;
        Ok(socket)
    };
    match connected() {
        Err(error) if error.raw_os_error() == Some(Errno::EAGAIN as i32) => {
            Err(Fault::new("connecting to", path.display(), TAKEN))
        }
        connected => connected.fault("connecting to", path.display()),
    }
}

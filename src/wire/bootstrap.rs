//! How a helper comes up: what it inherits, and how ipc-channel gets it.
//!
//! The warden makes the sockets of both directions, so that a helper never holds init's ends: whoever does can fill them,
//! and have PID 1 wait, or have the kernel add to what PID 1 receives. The helper inherits its ends at the fixed numbers
//! below, as everything else; what is not there is closed.

use std::cell::Cell;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use ipc_channel::ipc::{
    IpcOneShotServer, IpcReceiver, IpcSender, IpcSharedMemory, OpaqueIpcReceiver, OpaqueIpcSender,
};
use ipc_channel::{IpcError, TryRecvError};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::packet;
use crate::fault::{Fault, OrFault};
use crate::paths;
use crate::sys::fd::send_fds;

/// execd and streamd: their end of the SEQPACKET socket on which descriptors travel (src/wire/streamd.rs).
pub const FD_SOCKET: i32 = 3;
/// execd: one end of a socket pair in which it keeps duplicates of the processes' outputs, for its successors to find.
pub const FD_VAULT_IN: i32 = 4;
/// execd: the other end.
pub const FD_VAULT_OUT: i32 = 5;
/// streamd: the output buffer, a memfd; its file offset is where the next byte from a process goes.
pub const FD_BUFFER_IN: i32 = 4;
/// streamd: the same memfd opened a second time; its file offset is the next byte for the port.
pub const FD_BUFFER_OUT: i32 = 5;
/// streamd: the read end of a pipe through which a tty's bytes are spliced into the buffer.
pub const FD_PIPE_OUT: i32 = 6;
/// streamd: the write end of that pipe.
pub const FD_PIPE_IN: i32 = 7;
/// streamd: the stream port: a device, or a listening socket when `--listen` is given.
pub const FD_PORT: i32 = 8;
/// streamd: one end of a socket pair in which the accepted connection is kept for a successor.
pub const FD_CONNECTION_IN: i32 = 9;
/// streamd: the other end.
pub const FD_CONNECTION_OUT: i32 = 10;
/// Every helper with `--ipc`: where init's requests come from.
pub const FD_REQUESTS: i32 = 11;
/// Every helper with `--ipc`: where its replies go.
pub const FD_REPLIES: i32 = 12;

/// netd, mountd and execd with `--ipc`: the network namespace of the pod, which they enter. Missing where the guest has none of its own.
pub const FD_NETWORK: i32 = 13;

/// ipc-channel cannot wrap a descriptor, but it takes those that come in a message. So this is a channel to oneself, made
/// while the process may still make sockets.
pub struct Adopter<T> {
    door: OwnedFd,
    inside: IpcReceiver<T>,
    /// Something was sent and could not be taken: it may still be there, and is not to be taken for what is sent next.
    stale: Cell<bool>,
}

impl<T: Serialize + DeserializeOwned> Adopter<T> {
    /// Opens the channel; the first message is the one of these sockets, as [`Adopter::adopt`].
    fn open(first: &[OwnedFd]) -> Result<(Adopter<T>, T), Fault> {
        // ipc-channel makes a socket in the system's temporary directory; a helper's environment names none. It stays as it
        // was set first.
        if Path::new(paths::IPC).is_dir() {
            let _ = tempfile::env::override_temp_dir(Path::new(paths::IPC));
        }
        let (server, name) =
            IpcOneShotServer::<T>::new().map_err(|error| Fault::io("opening", "a server", &error))?;
        let door = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
            .fault("opening", "a socket")?;
        let address = UnixAddr::new(name.as_str()).fault("connecting to", &name)?;
        connect(std::os::fd::AsRawFd::as_raw_fd(&door), &address).fault("connecting to", &name)?;
        send(&door, first)?;
        let (inside, value) =
            server.accept().map_err(|error| Fault::new("taking", "a socket", error.to_string()))?;
        Ok((Adopter { door, inside, stale: Cell::new(false) }, value))
    }

    /// One descriptor, as ipc-channel has it. It asserts that what it needs can be had; then this is a fault.
    fn adopt_one(&self, fd: OwnedFd, what: &str, why: &str) -> Result<T, Fault> {
        while self.stale.get() {
            let taken = catch_unwind(AssertUnwindSafe(|| self.inside.try_recv()));
            self.stale.set(!matches!(taken, Ok(Err(TryRecvError::Empty))));
            if matches!(taken, Ok(Err(TryRecvError::IpcError(_)))) {
                return Err(Fault::new("taking", what, "an earlier one is in the way"));
            }
        }
        send(&self.door, &[fd])?;
        self.stale.set(true);
        let taken = catch_unwind(AssertUnwindSafe(|| self.inside.recv()))
            .map_err(|_| Fault::new("taking", what, why))?
            .map_err(|error| match error {
                IpcError::Io(error) => Fault::io("taking", what, &error),
                other => Fault::new("taking", what, other.to_string()),
            })?;
        self.stale.set(false);
        Ok(taken)
    }
}

/// The message of these sockets: each by its place.
fn send(door: &OwnedFd, sockets: &[OwnedFd]) -> Result<(), Fault> {
    let places: Vec<u8> = (0..).take(sockets.len()).collect();
    let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
    send_fds(door, &packet::wrap(&places), &fds).fault("taking", "a socket")
}

impl Adopter<OpaqueIpcSender> {
    /// For PID 1, before it is confined.
    pub fn new() -> Result<Adopter<OpaqueIpcSender>, Fault> {
        let (end, _other) = socket_pair()?;
        Ok(Adopter::open(&[end])?.0)
    }

    /// A socket as an end of ipc-channel's. The fault is also what is not a socket.
    pub fn adopt(&self, end: OwnedFd) -> Result<OpaqueIpcSender, Fault> {
        use nix::sys::stat::{SFlag, fstat};
        let kind = fstat(&end).fault("looking at", "a socket")?.st_mode & SFlag::S_IFMT.bits();
        if kind != SFlag::S_IFSOCK.bits() {
            return Err(Fault::new("taking", "a socket", "it is none"));
        }
        self.adopt_one(end, "a socket", "it is none of ipc-channel's")
    }
}

impl Adopter<IpcSharedMemory> {
    /// For PID 1, before it is confined.
    pub fn for_memory() -> Result<Adopter<IpcSharedMemory>, Fault> {
        Ok(Adopter::open(&[memory(&[0])?])?.0)
    }

    /// Bytes that travel in shared memory. ipc-channel writes them into a mapping, and where there is no memory that is the end
    /// of who writes (SIGBUS); here they are written to the file, and that is an error.
    pub fn share(&self, bytes: &[u8]) -> Result<IpcSharedMemory, Fault> {
        self.adopt_one(memory(bytes)?, "shared memory", "no memory to share")
    }
}

/// A memfd with these bytes.
fn memory(bytes: &[u8]) -> Result<OwnedFd, Fault> {
    let fault = |error: std::io::Error| Fault::io("sharing", "memory", &error);
    let mut file = File::from(memfd_create(c"request", MFdFlags::MFD_CLOEXEC).fault("sharing", "memory")?);
    file.write_all(bytes).map_err(fault)?;
    Ok(file.into())
}

/// A pair of connected sockets as ipc-channel's are.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd), Fault> {
    nix::sys::socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .fault("making", "a pair of sockets")
}

/// A helper's two ends, as ipc-channel has them.
#[derive(Serialize, Deserialize)]
struct Ends {
    requests: OpaqueIpcReceiver,
    replies: OpaqueIpcSender,
}

/// The end for a helper's replies alone, for one that receives with its own hands.
pub fn sender<R>(replies: OwnedFd) -> Result<IpcSender<R>, Fault>
where
    R: Serialize + DeserializeOwned,
{
    let (_, sender) = Adopter::<OpaqueIpcSender>::open(&[replies])?;
    Ok(sender.to())
}

/// What a helper inherits, as ends of ipc-channel's.
pub fn ends<Q, R>(requests: OwnedFd, replies: OwnedFd) -> Result<(IpcReceiver<Q>, IpcSender<R>), Fault>
where
    Q: Serialize + DeserializeOwned,
    R: Serialize + DeserializeOwned,
{
    let (_, ends) = Adopter::<Ends>::open(&[requests, replies])?;
    Ok((ends.requests.to(), ends.replies.to()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::wire::{Reply, execd};

    /// A helper's sender of replies, and init's end as it is.
    pub fn replies() -> (IpcSender<Reply<execd::Reply>>, OwnedFd) {
        let (_, requests) = socket_pair().unwrap();
        let (inits, replies) = socket_pair().unwrap();
        (ends::<u8, _>(requests, replies).unwrap().1, inits)
    }

    #[test]
    fn bytes_that_are_shared_arrive() {
        let adopter = Adopter::for_memory().unwrap();
        let (sender, receiver) = ipc_channel::ipc::channel().unwrap();
        for round in 0..3u8 {
            let bytes = vec![round; 100_000 + usize::from(round)];
            sender.send(adopter.share(&bytes).unwrap()).unwrap();
            assert_eq!(*receiver.recv().unwrap(), *bytes);
        }
        // One that could not be taken is not the next one's.
        send(&adopter.door, &[memory(b"stale").unwrap()]).unwrap();
        adopter.stale.set(true);
        assert_eq!(*adopter.share(b"fresh").unwrap(), *b"fresh");
        assert!(!adopter.stale.get());
    }

    #[test]
    fn ends_that_are_inherited_are_channels() {
        let adopter = Adopter::new().unwrap();
        for _ in 0..3 {
            let (inits_requests, requests) = socket_pair().unwrap();
            let (inits_replies, replies) = socket_pair().unwrap();
            let (inbox, outbox) = ends::<u64, String>(requests, replies).unwrap();
            let sender: IpcSender<u64> = adopter.adopt(inits_requests).unwrap().to();
            sender.send(7).unwrap();
            assert_eq!(inbox.recv().unwrap(), 7);
            outbox.send("seven".to_owned()).unwrap();
            let mut bytes = vec![0; 1024];
            let count = crate::sys::fd::receive_bytes(&inits_replies, &mut bytes).unwrap();
            assert_eq!(packet::decode::<String>(&bytes[..count]).unwrap(), "seven");
            drop(sender);
            inbox.recv().unwrap_err();
        }
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(adopter.adopt(file).unwrap_err().to_string().contains("it is none"));
    }
}

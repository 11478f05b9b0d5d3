//! Requests to helpers and replies from them, over ipc-channel, which no other module uses.
//!
//! A request is encoded once. A small request travels in the packet, a large one in a memfd. Only init makes
//! requests, and helpers trust them. Replies are small and init does not trust them: it receives the packets
//! itself (`init::inbox`) and decodes them with `said`.

use std::cell::Cell;
use std::fs::File;
use std::io::{ErrorKind, Write};
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use bincode::enc::write::Writer;
use bincode::error::EncodeError;
use ipc_channel::ipc::{
    IpcMessage, IpcOneShotServer, IpcReceiver, IpcSender, IpcSharedMemory, OpaqueIpcReceiver, OpaqueIpcSender,
};
use ipc_channel::{IpcError, TryRecvError};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::stat::{SFlag, fstat};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Bytes, Envelope, Instance, Request, Said, packet};
use crate::fault::{Fault, OrFault};
use crate::paths;
use crate::sys::fd::send_fds;

/// Requests of up to this many encoded bytes travel in the packet. With at most 16 requests under way they
/// cannot fill a helper's socket (208 kB), so init never waits in a send.
pub const INLINE_MAX: usize = 4096;
/// The reason in a fault when shared memory cannot be had.
const NO_MEMORY: &str = "no memory to share";

/// A request on the wire: its envelope, encoded with bincode.
#[derive(Serialize, Deserialize)]
enum Letter {
    /// The envelope is in the packet itself.
    Inline(Bytes),
    /// The envelope is in a memfd. No such letter goes to init, which maps no memory that a helper has made:
    /// the helper could truncate it while init reads (SIGBUS).
    Shared(IpcSharedMemory),
}

impl Letter {
    fn open<Q: DeserializeOwned>(&self) -> Result<Envelope<Q>, Fault> {
        let bytes: &[u8] = match self {
            Letter::Inline(Bytes(bytes)) => bytes,
            Letter::Shared(memory) => memory,
        };
        bincode::serde::decode_from_slice(bytes, bincode::config::standard())
            .map(|(envelope, _)| envelope)
            .map_err(|error| Fault::new("decoding", "a request", error.to_string()))
    }
}

// ---- init's side ----

/// The means by which PID 1 sends requests. It is made before PID 1 is confined.
pub struct Post {
    ends: Adopter<OpaqueIpcSender>,
    memory: Adopter<IpcSharedMemory>,
}

/// The destination of the requests to one helper.
pub struct Outbox {
    to: Instance,
    sender: IpcSender<Letter>,
}

/// The result of sending a request.
#[derive(Debug)]
pub enum Sent {
    /// The whole request is in the helper's socket.
    Whole,
    /// The helper's end is closed, so the request will never be read.
    Dying(String),
    /// The helper lives and did not get the request: it could not be encoded or sent, for lack of memory or
    /// descriptors.
    Unsent(Fault),
}

impl Post {
    /// Opens the channels; PID 1 calls this before it is confined.
    pub fn new() -> Result<Post, Fault> {
        let (end, _other) = super::bootstrap::socket_pair()?;
        let (ends, _) = Adopter::open(&[end])?;
        let (memory, _) = Adopter::open(&[memory(&[0])?.into()])?;
        Ok(Post { ends, memory })
    }

    /// Wraps init's end of a helper's request socket. Fails also if `end` is not a socket.
    pub fn outbox(&self, to: Instance, end: OwnedFd) -> Result<Outbox, Fault> {
        let kind = fstat(&end).fault("looking at", "a socket")?.st_mode & SFlag::S_IFMT.bits();
        if kind != SFlag::S_IFSOCK.bits() {
            return Err(Fault::new("taking", "a socket", "it is none"));
        }
        let sender = self.ends.adopt(end, "a socket", "it is none of ipc-channel's")?.to();
        Ok(Outbox { to, sender })
    }

    /// Sends one request. It never blocks, because requests are small or in shared memory and few are under
    /// way at a time.
    pub fn send(&self, outbox: &Outbox, id: u64, request: &Request) -> Sent {
        let letter = match self.letter(&Envelope { id, body: request }) {
            Ok(letter) => letter,
            Err(fault) => return Sent::Unsent(fault),
        };
        // ipc-channel panics if it cannot map the shared memory once more to put it into a message.
        let sent = catch_unwind(AssertUnwindSafe(|| outbox.sender.send(letter)));
        let unsent = |why: &str| Sent::Unsent(Fault::new("asking", outbox.to, why));
        match sent {
            Ok(Ok(())) => Sent::Whole,
            Ok(Err(IpcError::Disconnected)) => Sent::Dying("it has gone".to_owned()),
            Ok(Err(IpcError::Io(error))) => match error.kind() {
                ErrorKind::BrokenPipe
                | ErrorKind::ConnectionReset
                | ErrorKind::ConnectionRefused
                | ErrorKind::NotConnected => Sent::Dying(error.to_string()),
                _ => Sent::Unsent(Fault::io("asking", outbox.to, &error)),
            },
            Ok(Err(error @ IpcError::SerializationError(_))) => unsent(&error.to_string()),
            Err(_) => unsent(NO_MEMORY),
        }
    }

    fn letter<T: Serialize>(&self, value: &T) -> Result<Letter, Fault> {
        let mut sheet = Sheet::default();
        let encoded = bincode::serde::encode_into_writer(value, &mut sheet, bincode::config::standard());
        if let Some(fault) = sheet.fault.take() {
            return Err(fault);
        }
        encoded.map_err(|error| Fault::new("encoding", "a request", error.to_string()))?;
        match sheet.finish()? {
            Written::Inline(bytes) => Ok(Letter::Inline(Bytes(bytes))),
            Written::Shared(file) => {
                Ok(Letter::Shared(self.memory.adopt(file.into(), "shared memory", NO_MEMORY)?))
            }
        }
    }
}

/// The output of the encoder: up to [`INLINE_MAX`] bytes in memory, and anything longer in a memfd, so that a
/// large request is not held twice.
///
/// ipc-channel itself would write shared memory through a mapping; without free memory that kills the writer
/// (SIGBUS). A write to the file returns an error instead.
#[derive(Default)]
struct Sheet {
    /// The whole request, or the bytes still to be written to the file.
    bytes: Vec<u8>,
    file: Option<File>,
    /// Why the file could not be written; bincode's error cannot carry it.
    fault: Option<Fault>,
}

enum Written {
    Inline(Vec<u8>),
    Shared(File),
}

impl Sheet {
    fn add(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        if self.bytes.len() + bytes.len() > INLINE_MAX {
            self.flush()?;
        }
        match &mut self.file {
            Some(file) if bytes.len() > INLINE_MAX => write(file, bytes),
            _ => {
                self.bytes.extend_from_slice(bytes);
                Ok(())
            }
        }
    }

    fn flush(&mut self) -> Result<(), Fault> {
        match &mut self.file {
            Some(file) => write(file, &self.bytes)?,
            None => self.file = Some(memory(&self.bytes)?),
        }
        self.bytes.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<Written, Fault> {
        if self.file.is_some() {
            self.flush()?;
        }
        Ok(match self.file {
            Some(file) => Written::Shared(file),
            None => Written::Inline(self.bytes),
        })
    }
}

impl Writer for Sheet {
    fn write(&mut self, bytes: &[u8]) -> Result<(), EncodeError> {
        self.add(bytes).map_err(|fault| {
            self.fault = Some(fault);
            EncodeError::Other(NO_MEMORY)
        })
    }
}

/// A memfd that contains these bytes.
fn memory(bytes: &[u8]) -> Result<File, Fault> {
    let mut file = File::from(memfd_create(c"request", MFdFlags::MFD_CLOEXEC).fault("sharing", "memory")?);
    write(&mut file, bytes)?;
    Ok(file)
}

fn write(file: &mut File, bytes: &[u8]) -> Result<(), Fault> {
    file.write_all(bytes).map_err(|error| Fault::io("sharing", "memory", &error))
}

/// Decodes a helper's message from a packet that came without descriptors; the error says what is wrong with
/// it, for the log. The packet bounds what is allocated: every length inside the message is checked against
/// the bytes that are there.
pub fn said<R: Serialize + DeserializeOwned>(packet: &[u8]) -> Result<Said<R>, String> {
    decode(packet)
}

fn decode<T: Serialize + DeserializeOwned>(packet: &[u8]) -> Result<T, String> {
    let message = packet::unwrap(packet)?;
    IpcMessage::from_data(message.to_vec()).to().map_err(|error| format!("no message of its edge: {error}"))
}

// ---- a helper's side ----

/// The receiving end of a helper for init's requests.
pub struct Inbox<Q> {
    letters: IpcReceiver<Letter>,
    /// A duplicate of the request socket, for helpers that poll other descriptors too.
    socket: OwnedFd,
    edge: PhantomData<fn() -> Q>,
}

/// The sending end of a helper for its messages to init.
pub struct Voice<R>(IpcSender<Said<R>>);

/// Both ends of a helper, as one message.
#[derive(Serialize, Deserialize)]
struct Ends {
    requests: OpaqueIpcReceiver,
    replies: OpaqueIpcSender,
}

/// Wraps the two ends that a helper inherits.
pub fn ends<Q, R>(requests: OwnedFd, replies: OwnedFd) -> Result<(Inbox<Q>, Voice<R>), Fault>
where
    R: Serialize + DeserializeOwned,
{
    let socket = requests.try_clone().map_err(|error| Fault::io("duplicating", "init's channel", &error))?;
    let (_, ends) = Adopter::<Ends>::open(&[requests, replies])?;
    Ok((Inbox { letters: ends.requests.to(), socket, edge: PhantomData }, Voice(ends.replies.to())))
}

/// Wraps only the reply end, for a helper that receives its packets from the socket itself.
pub fn voice<R: Serialize + DeserializeOwned>(replies: OwnedFd) -> Result<Voice<R>, Fault> {
    let (_, sender) = Adopter::<OpaqueIpcSender>::open(&[replies])?;
    Ok(Voice(sender.to()))
}

/// Decodes the request in a packet that the helper received itself. Such a request is not in shared memory.
pub fn request<Q: DeserializeOwned>(packet: &[u8]) -> Result<Envelope<Q>, Fault> {
    let letter: Letter = decode(packet).map_err(|why| Fault::new("hearing", "init", why))?;
    letter.open()
}

impl<Q: DeserializeOwned> Inbox<Q> {
    /// Waits for the next request; none when init is gone, or when a request cannot be decoded.
    pub fn next(&self) -> Option<Envelope<Q>> {
        let letter = self.letters.recv().ok()?;
        letter.open().inspect_err(|fault| log::error!("{fault}")).ok()
    }
}

impl<Q> AsFd for Inbox<Q> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<R: Serialize> Voice<R> {
    /// Sends a message to init.
    pub fn say(&self, word: Said<R>) -> Result<(), Fault> {
        self.0.send(word).map_err(|error| Fault::new("telling", "init", error.to_string()))
    }
}

impl<R: Serialize> Clone for Voice<R> {
    fn clone(&self) -> Voice<R> {
        Voice(self.0.clone())
    }
}

// ---- descriptors that ipc-channel takes ----

/// Wraps descriptors for ipc-channel, which can only take descriptors that come in a message. So the process
/// opens a channel to itself, while it may still make sockets.
struct Adopter<T> {
    socket: OwnedFd,
    inside: IpcReceiver<T>,
    /// Whether a descriptor was sent that could not be received. It may still be in the socket and must not
    /// be mistaken for the next one.
    stale: Cell<bool>,
}

impl<T: Serialize + DeserializeOwned> Adopter<T> {
    /// Opens the channel. The first message carries these sockets, as in `adopt`.
    fn open(first: &[OwnedFd]) -> Result<(Adopter<T>, T), Fault> {
        // ipc-channel makes a socket in the temporary directory of the system, and a helper's environment
        // names none. Only the first call to override it has an effect.
        if Path::new(paths::IPC).is_dir() {
            let _ = tempfile::env::override_temp_dir(Path::new(paths::IPC));
        }
        let (server, name) =
            IpcOneShotServer::<T>::new().map_err(|error| Fault::io("opening", "a server", &error))?;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
            .fault("opening", "a socket")?;
        let address = UnixAddr::new(name.as_str()).fault("connecting to", &name)?;
        connect(socket.as_raw_fd(), &address).fault("connecting to", &name)?;
        send(&socket, first)?;
        let (inside, value) =
            server.accept().map_err(|error| Fault::new("taking", "a socket", error.to_string()))?;
        Ok((Adopter { socket, inside, stale: Cell::new(false) }, value))
    }

    /// Turns one descriptor into ipc-channel's type. ipc-channel panics if it lacks memory or descriptors;
    /// the panic becomes a fault here.
    fn adopt(&self, fd: OwnedFd, what: &str, why: &str) -> Result<T, Fault> {
        while self.stale.get() {
            let taken = catch_unwind(AssertUnwindSafe(|| self.inside.try_recv()));
            self.stale.set(!matches!(taken, Ok(Err(TryRecvError::Empty))));
            if matches!(taken, Ok(Err(TryRecvError::IpcError(_)))) {
                return Err(Fault::new("taking", what, "an earlier one is in the way"));
            }
        }
        send(&self.socket, &[fd])?;
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

/// Sends a message in which each socket is named by its index.
fn send(socket: &OwnedFd, sockets: &[OwnedFd]) -> Result<(), Fault> {
    let places: Vec<u8> = (0..).take(sockets.len()).collect();
    let fds: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
    send_fds(socket, &packet::wrap(&places), &fds).fault("taking", "a socket")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fd::receive_bytes;
    use crate::wire::bootstrap::socket_pair;
    use crate::wire::packet::PACKET_MAX;
    use crate::wire::{Role, execd, mountd};

    const MOUNTD: Instance = Instance::first(Role::Mountd);

    /// init's ends and the helper's ends of a channel.
    fn channel(post: &Post) -> (Outbox, OwnedFd, Inbox<mountd::Request>, Voice<mountd::Reply>) {
        let (inits_requests, requests) = socket_pair().unwrap();
        let (inits_replies, replies) = socket_pair().unwrap();
        let (inbox, voice) = ends(requests, replies).unwrap();
        (post.outbox(MOUNTD, inits_requests).unwrap(), inits_replies, inbox, voice)
    }

    fn file(size: usize) -> Request {
        let data = Bytes((0..size).map(|at| (at % 251) as u8).collect());
        mountd::Request::WriteFile {
            container: "c".to_owned().try_into().unwrap(),
            file: "/f".to_owned(),
            data,
        }
        .into()
    }

    #[test]
    fn a_request_arrives_as_it_was_sent_whatever_its_size() {
        let post = Post::new().unwrap();
        let (outbox, _, inbox, _voice) = channel(&post);
        for (id, size) in
            (1..).zip([0, 10, INLINE_MAX - 1, INLINE_MAX, INLINE_MAX + 1, 2 * INLINE_MAX, 3 << 20])
        {
            let request = file(size);
            assert!(matches!(post.send(&outbox, id, &request), Sent::Whole));
            let Envelope { id: other, body } = inbox.next().unwrap();
            assert_eq!((other, Request::from(body)), (id, request), "{size}");
        }
        drop(outbox);
        assert!(inbox.next().is_none());
    }

    #[test]
    fn a_small_request_travels_in_the_packet_and_a_large_one_in_shared_memory() {
        let post = Post::new().unwrap();
        for (size, inline) in [(INLINE_MAX - 100, true), (INLINE_MAX, false), (100_000, false)] {
            let letter = post.letter(&Envelope { id: 1, body: &file(size) }).unwrap();
            assert_eq!(matches!(letter, Letter::Inline(_)), inline, "{size}");
        }
        // Many small parts: the encoder fills the buffer and flushes it to the file again and again.
        let running: Vec<_> = (1..50_000).filter_map(crate::ids::StreamId::new).collect();
        let request = Request::from(execd::Request::JoinPod { running });
        let letter = post.letter(&Envelope { id: 1, body: &request }).unwrap();
        assert!(matches!(letter, Letter::Shared(_)));
        assert_eq!(Request::from(letter.open::<execd::Request>().unwrap().body), request);
    }

    #[test]
    fn a_request_in_a_packet_of_ones_own_is_decoded() {
        let post = Post::new().unwrap();
        let (inits, helpers) = socket_pair().unwrap();
        let outbox = post.outbox(Instance::first(Role::Execd), inits).unwrap();
        post.send(&outbox, 7, &execd::Request::Resend.into());
        let mut packet = vec![0; PACKET_MAX];
        let count = receive_bytes(&helpers, &mut packet).unwrap();
        let envelope: Envelope<execd::Request> = request(&packet[..count]).unwrap();
        assert_eq!((envelope.id, envelope.body), (7, execd::Request::Resend));
    }

    #[test]
    fn a_reply_arrives_and_a_helper_that_is_gone_is_noticed() {
        let post = Post::new().unwrap();
        let (outbox, inits, inbox, voice) = channel(&post);
        let fault = Fault::new("starting", "it", "x".repeat(100_000));
        voice.say(Said::Reply(Envelope { id: 1 << 40, body: Err(fault.clone()) })).unwrap();
        let mut packet = vec![0; PACKET_MAX];
        let count = receive_bytes(&inits, &mut packet).unwrap();
        match said::<mountd::Reply>(&packet[..count]) {
            Ok(Said::Reply(Envelope { id, body })) => assert_eq!((id, body), (1 << 40, Err(fault))),
            other => panic!("{other:?}"),
        }
        drop((inbox, voice));
        assert!(matches!(post.send(&outbox, 2, &mountd::Request::Sync.into()), Sent::Dying(_)));
    }

    #[test]
    fn what_is_no_socket_is_refused() {
        let file = OwnedFd::from(File::open("/dev/null").unwrap());
        let refused = Post::new().unwrap().outbox(MOUNTD, file);
        assert!(refused.err().unwrap().to_string().contains("it is none"));
    }

    #[test]
    fn memory_that_could_not_be_taken_is_not_the_next_requests() {
        let post = Post::new().unwrap();
        send(&post.memory.socket, &[memory(b"stale").unwrap().into()]).unwrap();
        post.memory.stale.set(true);
        let fresh = post.memory.adopt(memory(b"fresh").unwrap().into(), "shared memory", NO_MEMORY).unwrap();
        assert_eq!(*fresh, *b"fresh");
        assert!(!post.memory.stale.get());
    }

    #[test]
    fn a_length_inside_a_message_is_not_believed() {
        // The reply to request 1: a fault whose first text claims to have nearly 2^63 bytes.
        let long = [1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        for message in [&long[..], &[], &[1], &[1, 2], &[1, 0, 9], &[1, 1, 2, b'a']] {
            decode::<Envelope<Result<execd::Reply, Fault>>>(&packet::wrap(message)).unwrap_err();
        }
    }
}

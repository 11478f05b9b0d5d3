//! The control channel over a socket, written in any portions to a guest that has room or not. NEXT credits
//! exactly the bytes that were read; every frame and every reply comes once and in order. On a port that
//! hosts share this holds until the bytes show that another host has come.
#![forbid(unsafe_code)]
#![no_main]

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use hyperinit::frame::{CONTROL_MAX, ControlDecoder, Message};
use hyperinit::init::control::{Control, Input};
use hyperinit::init::ports::Port;
use hyperinit_fuzz::{Choices, measure};
use libfuzzer_sys::fuzz_target;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockname, listen, socket,
    socketpair,
};
use nix::unistd::{read, write};

/// More turns than one portion can need: a turn takes at least one frame.
const TURNS_MAX: usize = 1 << 16;

const FLAGS: SockFlag = SockFlag::SOCK_NONBLOCK.union(SockFlag::SOCK_CLOEXEC);

struct Guest {
    control: Control,
    epoll: Epoll,
    host: OwnedFd,
    /// Decodes what the guest sends.
    decoder: ControlDecoder,
    credited: usize,
    frames: Vec<(u32, Vec<u8>)>,
    replies: Vec<Vec<u8>>,
    device: bool,
    /// Whether another host has come.
    another: bool,
}

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    let sizes = [0; 3].map(|_: u8| 1 + usize::from(choices.byte()));
    let rooms = [0; 3].map(|_: u8| 1 + choices.below(8));
    let bytes = choices.rest();
    for guest in [Guest::connected(), Guest::device()] {
        run(guest, sizes, rooms, bytes);
    }
});

fn run(mut guest: Guest, sizes: [usize; 3], rooms: [usize; 3], bytes: &[u8]) {
    let expected = expected(bytes);
    let mut rest = bytes;
    let mut written = 0;
    for turn in 0.. {
        let (portion, others) = rest.split_at(sizes[turn % sizes.len()].min(rest.len()));
        if portion.is_empty() {
            break;
        }
        rest = others;
        assert_eq!(write(&guest.host, portion), Ok(portion.len()));
        written += portion.len();
        let ((), held) = measure(|| guest.turns(rooms[turn % rooms.len()]));
        assert!(held <= 8 * (bytes.len() + 4096) + (256 << 10), "{held} bytes");
        let violated = matches!(expected, Err(at) if at <= written);
        if violated && !guest.another {
            break;
        }
        assert!(guest.credited <= written, "credit for nothing");
        assert!(guest.another || guest.credited == written, "runV waits for this");
    }
    if guest.another {
        return;
    }
    if let Ok(expected) = &expected {
        assert_eq!(&guest.frames, expected);
    }
    let said: Vec<Vec<u8>> = (0..guest.frames.len()).map(reply).collect();
    // A violation ends a connection, and the replies that were on their way are lost.
    let heard = if expected.is_ok() || guest.device { said.len() } else { guest.replies.len() };
    assert_eq!(Some(&guest.replies[..]), said.get(..heard), "one for each, in order");
}

/// The frames in the bytes. The error is the number of bytes after which the guest may stop reading at the
/// latest.
fn expected(bytes: &[u8]) -> Result<Vec<(u32, Vec<u8>)>, usize> {
    let mut frames = Vec::new();
    let mut rest = bytes;
    while let Some((header, others)) = rest.split_first_chunk::<8>() {
        let [tag, length] =
            [0, 4].map(|at| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 bytes")));
        let length = length as usize;
        if !(8..=CONTROL_MAX).contains(&length) {
            return Err(bytes.len() - others.len());
        }
        if length - 8 > others.len() {
            break;
        }
        let (payload, others) = others.split_at(length - 8);
        frames.push((tag, payload.to_vec()));
        rest = others;
    }
    Ok(frames)
}

fn reply(at: usize) -> Vec<u8> {
    at.to_be_bytes().to_vec()
}

impl Guest {
    /// A guest on a port whose hosts follow each other.
    fn device() -> Guest {
        let (host, port) = socketpair(AddressFamily::Unix, SockType::Stream, None, FLAGS).expect("a socket");
        let (guest, inputs) = Guest::new(Port::Device(port), host);
        assert_eq!(inputs, [Input::Connected]);
        guest
    }

    /// A guest whose host has a connection of its own.
    fn connected() -> Guest {
        let new = || socket(AddressFamily::Unix, SockType::Stream, FLAGS, None).expect("a socket");
        let (listener, host) = (new(), new());
        // The kernel chooses the name.
        bind(listener.as_raw_fd(), &UnixAddr::new_unnamed()).expect("a name");
        listen(&listener, Backlog::new(1).expect("a number")).expect("it listens");
        let name: UnixAddr = getsockname(listener.as_raw_fd()).expect("its name");
        connect(host.as_raw_fd(), &name).expect("it connects");
        let (mut guest, inputs) = Guest::new(Port::Listener(listener), host);
        assert_eq!(inputs, []);
        assert_eq!(guest.control.turn(&guest.epoll, 1), [Input::Connected]);
        guest
    }

    fn new(port: Port, host: OwnedFd) -> (Guest, Vec<Input>) {
        let device = matches!(port, Port::Device(_));
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).expect("an epoll set");
        let mut control = Control::new(port, 0);
        let inputs = control.open(&epoll).expect("it can be watched");
        let guest = Guest {
            control,
            epoll,
            host,
            device,
            decoder: ControlDecoder::default(),
            credited: 0,
            frames: Vec::new(),
            replies: Vec::new(),
            another: false,
        };
        (guest, inputs)
    }

    /// Turns the control channel, as init's loop does, until there is nothing left to do.
    fn turns(&mut self, room: usize) {
        for _ in 0..TURNS_MAX {
            let mut events = [EpollEvent::empty(); 4];
            let count = self.epoll.wait(&mut events, EpollTimeout::ZERO).unwrap_or(0);
            for event in &events[..count] {
                assert!(!event.events().contains(EpollFlags::EPOLLHUP));
                self.control.ready(event.events());
            }
            if !self.control.wants_turn(room) {
                return self.hear();
            }
            let inputs = self.control.turn(&self.epoll, room);
            assert!(inputs.len() <= room, "more than there is room for");
            for input in inputs {
                match input {
                    Input::Frame(tag, payload) => {
                        self.control.send(Message::Ack, &reply(self.frames.len()));
                        self.frames.push((tag, payload));
                    }
                    Input::Left | Input::Greeted(_) => {
                        self.another = true;
                        self.control.left();
                    }
                    Input::Connected => panic!("nobody connected"),
                }
            }
            self.hear();
        }
        panic!("it never has enough");
    }

    /// Decodes what the guest has sent.
    fn hear(&mut self) {
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = read(self.host.as_fd(), &mut chunk) {
            self.decoder.push(&chunk[..count]);
            while let Some(frame) = self.decoder.next_frame().expect("the guest says frames") {
                match Message::from_id(frame.tag) {
                    Some(Message::Next) => {
                        let count: [u8; 4] = frame.payload.try_into().expect("a number");
                        self.credited += u32::from_be_bytes(count) as usize;
                    }
                    Some(Message::Ack) => self.replies.push(frame.payload.to_vec()),
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}

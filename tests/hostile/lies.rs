//! What a helper can send that no honest one sends, in bytes.

use std::os::fd::{AsFd, OwnedFd};

use hyperinit::wire::packet::wrap;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::place::Place;

/// A lie, and what the log says of it.
pub struct Lie {
    pub name: String,
    pub blame: &'static str,
    packets: Vec<(Vec<u8>, Vec<OwnedFd>)>,
}

impl Lie {
    fn new(name: impl Into<String>, blame: &'static str, packet: Vec<u8>) -> Lie {
        Lie { name: name.into(), blame, packets: vec![(packet, Vec::new())] }
    }

    fn with(mut self, fds: Vec<OwnedFd>) -> Lie {
        self.packets[0].1 = fds;
        self
    }

    /// Tells it. The first packet ends everything, so what cannot be sent then is no matter.
    pub fn tell(&self, place: &Place) {
        for (packet, fds) in &self.packets {
            let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            let _ = place.say(packet, &fds);
        }
    }
}

/// Numbers as postcard has them.
pub fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// The packet of a reply: `Said::Reply`, the number, `Ok`, and what follows.
pub fn reply(id: u64, answer: &[u8]) -> Vec<u8> {
    wrap(&[&[1], varint(id).as_slice(), &[0], answer].concat())
}

/// The packet of a reply that is a fault.
pub fn refused(id: u64) -> Vec<u8> {
    let words = ["test", "failing", "it", "no"].map(|word| [&[word.len() as u8], word.as_bytes()].concat());
    wrap(&[&[1], varint(id).as_slice(), &[1], &words.concat(), &[0]].concat())
}

/// `Done` of netd, mountd and execd, `Drained` of streamd.
pub const DONE: &[u8] = &[0];

/// `Started` of execd.
pub fn started(pid: i32) -> Vec<u8> {
    let zigzag = ((pid << 1) ^ (pid >> 31)) as u32;
    [&[1], varint(u64::from(zigzag)).as_slice()].concat()
}

/// `Part` of mountd.
pub fn part(length: usize, last: bool) -> Vec<u8> {
    [&[3], varint(length as u64).as_slice(), &vec![b'x'; length], &[u8::from(last)]].concat()
}

/// The words in front of a packet, whatever it has.
fn framed(own: usize, whole: usize, message: &[u8]) -> Vec<u8> {
    [own.to_ne_bytes().as_slice(), &whole.to_ne_bytes(), message].concat()
}

fn files(count: usize) -> Vec<OwnedFd> {
    (0..count).map(|_| std::fs::File::open("/dev/null").unwrap().into()).collect()
}

fn pair() -> [OwnedFd; 2] {
    let (a, b) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    [a, b]
}

const SIZES: [usize; 10] = [0, 1, 19, 4 << 20, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, usize::MAX];

/// Lies about the form of a packet.
pub fn forms() -> Vec<Lie> {
    let mut lies = vec![
        Lie::new("an empty packet", "an empty packet", Vec::new()),
        Lie::new("a long packet of nothing", "a packet of 180000 bytes with 179984", vec![0; 180_000]),
        Lie::new("a packet that is too long", "longer than any of its edge", reply(0, &vec![0; 300_000])),
    ];
    for length in [1, 7, 8, 15] {
        lies.push(Lie::new(format!("{length} bytes"), "which is too short for a message", vec![0; length]));
    }
    let claims = "that claims to be one of";
    for size in SIZES {
        let message = &[1, 0, 0, 0];
        lies.push(Lie::new(format!("a message of {size}"), claims, framed(20, size, message)));
        lies.push(Lie::new(format!("a packet of {size}"), claims, framed(size, 4, message)));
    }
    // ipc-channel's own form of a long message: the rest comes over a socket, on which nothing ever comes.
    let [rest, kept] = pair();
    let mut long = Lie::new("a rest that does not come", "descriptors", framed(20, 3 << 20, &[1, 0, 0, 0]));
    long.packets[0].1.push(rest);
    long.packets.push((wrap(&[0]), vec![kept]));
    lies.push(long);
    lies
}

/// Lies about descriptors: no reply has any.
pub fn descriptors() -> Vec<Lie> {
    let blame = "descriptors that nobody asked for";
    let mut lies = Vec::new();
    for count in [1, 3, 64, 253] {
        lies.push(Lie::new(format!("{count} files"), blame, reply(0, DONE)).with(files(count)));
    }
    let sockets = (0..32).flat_map(|_| pair()).collect();
    lies.push(Lie::new("64 sockets", blame, reply(0, DONE)).with(sockets));
    lies.push(Lie::new("a file and nothing said", blame, vec![0]).with(files(1)));
    lies
}

/// Lies in the message itself.
pub fn messages() -> Vec<Lie> {
    let blame = "no message of its edge";
    let long = [1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
    let mut lies: Vec<Lie> = [
        ("nothing", [].as_slice()),
        ("another kind of word", &[2]),
        ("a reply without an end", &[1, 0]),
        ("neither a value nor a fault", &[1, 0, 2]),
        ("a fault of 2^63 bytes", &long),
        ("a fault that is no text", &[1, 0, 1, 2, 0xc0, 0x80, 0, 0, 0, 0]),
        ("an answer that its edge does not have", &[1, 0, 0, 99]),
        ("a number without end", &[1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]),
    ]
    .into_iter()
    .map(|(name, message)| Lie::new(name, blame, wrap(message)))
    .collect();
    let noise: Vec<u8> = (0..50_000u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8 | 2).collect();
    lies.push(Lie::new("noise", blame, wrap(&noise)));
    lies
}

/// Valid words that nobody waits for.
pub fn words() -> Vec<Lie> {
    let mut lies = vec![Lie::new("up again", "it said twice that it is up", wrap(&[0]))];
    for id in [0, 1, 1 << 40, u64::MAX] {
        lies.push(Lie::new(format!("a reply to {id}"), "which is no request under way", reply(id, DONE)));
    }
    lies
}

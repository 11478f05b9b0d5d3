//! What hosts say, in every order and cut anywhere, and what each of them hears.

use super::*;
use crate::frame;
use nix::sys::epoll::EpollCreateFlags;
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, shutdown, socketpair};
use nix::unistd::write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as Address, UnixListener, UnixStream};

/// What the guest did, and what came.
#[derive(Debug, PartialEq, Eq)]
enum Did {
    Connected,
    Got(u32),
    Left,
    Greeted,
}

/// A port whose hosts are only told apart by what a test says of them, as virtio-serial's are by the kernel.
struct World {
    host: OwnedFd,
    epoll: Epoll,
    control: Control,
    decoder: ControlDecoder,
}

impl World {
    fn new() -> World {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (host, guest) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut control = Control::new(Port::Device(guest), 0);
        assert_eq!(control.open(&epoll).unwrap(), [Input::Connected]);
        World { host, epoll, control, decoder: ControlDecoder::default() }
    }

    /// A port that hosts connect to, and the first of them.
    fn listening() -> (World, Address) {
        let address = Address::from_abstract_name(format!(
            "hyperinit-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ))
        .unwrap();
        let listener = UnixListener::bind_addr(&address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut control = Control::new(Port::Listener(listener.into()), 0);
        assert_eq!(control.open(&epoll).unwrap(), []);
        let mut world = World { host: caller(&address), epoll, control, decoder: ControlDecoder::default() };
        assert_eq!(world.turns(), [Did::Connected]);
        assert_eq!(world.hears(), (0, vec![b"READY".to_vec()]));
        (world, address)
    }

    /// The host closes, and another one, or none, is there instead.
    fn closes(&mut self, next: OwnedFd) {
        self.host = next;
        self.decoder = ControlDecoder::default();
        self.control.ready(EpollFlags::all());
    }

    fn say(&mut self, bytes: &[u8]) {
        assert_eq!(write(&self.host, bytes), Ok(bytes.len()));
        self.control.ready(EpollFlags::EPOLLIN);
    }

    /// The kernel tells that the host has left, and is told by the next one that it is there.
    fn told(&mut self) {
        self.control.ready(EpollFlags::EPOLLHUP | EpollFlags::EPOLLIN);
    }

    fn told_of_the_next(&mut self) {
        self.control.ready(EpollFlags::EPOLLOUT);
    }

    /// As init's loop has it; each command is answered by its type.
    fn turns(&mut self) -> Vec<Did> {
        let mut did = Vec::new();
        loop {
            for input in self.control.turn(&self.epoll, 8) {
                did.push(match input {
                    Input::Frame(tag, _) => {
                        self.control.send(Message::Ack, &tag.to_be_bytes());
                        Did::Got(tag)
                    }
                    Input::Left => {
                        self.control.left();
                        Did::Left
                    }
                    Input::Greeted(greeting) => {
                        self.control.left();
                        self.control.send(Message::Ack, &greeting);
                        Did::Greeted
                    }
                    Input::Connected => {
                        self.control.send(Message::Ready, b"");
                        Did::Connected
                    }
                });
            }
            if !self.control.wants_turn(8) {
                return did;
            }
        }
    }

    /// What the host hears: how much is credited, and replies.
    fn hears(&mut self) -> (usize, Vec<Vec<u8>>) {
        let (mut credit, mut replies) = (0, Vec::new());
        let mut chunk = [0; 4096];
        while let Ok(count @ 1..) = read(&self.host, &mut chunk) {
            self.decoder.push(&chunk[..count]);
            while let Some(frame) = self.decoder.next_frame().unwrap() {
                match Message::from_id(frame.tag) {
                    Some(Message::Next) => {
                        credit += u32::from_be_bytes(frame.payload.try_into().unwrap()) as usize;
                    }
                    Some(Message::Ack) => replies.push(frame.payload.to_vec()),
                    Some(Message::Ready) => replies.push(b"READY".to_vec()),
                    other => panic!("{other:?}"),
                }
            }
        }
        (credit, replies)
    }
}

fn caller(address: &Address) -> OwnedFd {
    let stream = UnixStream::connect_addr(address).unwrap();
    stream.set_nonblocking(true).unwrap();
    stream.into()
}

/// A socket that is connected to nothing of the guest's.
fn nobody() -> OwnedFd {
    UnixStream::pair().unwrap().0.into()
}

fn exec() -> Vec<u8> {
    frame::control(Message::ExecCmd, br#"{"container":"c","process":{"id":"p"}}"#).unwrap()
}

fn answer(message: Message) -> Vec<u8> {
    message.id().to_be_bytes().to_vec()
}

const EXEC: Did = Did::Got(Message::ExecCmd as u32);

/// A host leaves in the middle of a command, and is reported gone before the next one speaks.
#[test]
fn half_a_command_of_a_host_that_left_is_no_part_of_anothers() {
    let exec = exec();
    for cut in 1..exec.len() {
        let mut world = World::new();
        world.say(&exec[..cut]);
        assert_eq!(world.turns(), []);
        assert_eq!(world.hears().0, cut);
        world.told();
        assert_eq!(world.turns(), [Did::Left]);
        world.told_of_the_next();
        world.say(&exec);
        assert_eq!(world.turns(), [EXEC], "cut at {cut}");
        assert_eq!(world.hears(), (exec.len(), vec![answer(Message::ExecCmd)]));
    }
}

/// A host leaves in the middle of a command and nothing tells. The next one greets until it is answered, and
/// in between leaves for a moment, of which the guest is told (host/client/greeting.rs).
#[test]
fn a_host_that_greets_is_understood_behind_half_a_command_when_it_comes_again() {
    let exec = exec();
    let [first, second] =
        [1, 2].map(|number| frame::control(Message::Ping, &greeting::greeting(number)).unwrap());
    for cut in 1..exec.len() {
        let mut world = World::new();
        world.say(&exec[..cut]);
        world.turns();
        world.say(&first);
        world.turns();
        world.told();
        world.turns();
        world.told_of_the_next();
        world.hears();
        world.say(&second);
        assert_eq!(world.turns(), [Did::Greeted], "cut at {cut}");
        assert_eq!(world.hears().1, [greeting::greeting(2)]);
    }
}

/// Commands that are read after their host was reported gone are carried out, and their replies forgotten.
#[test]
fn replies_to_a_host_that_left_at_once_are_nobodys() {
    let mut world = World::new();
    assert_eq!(write(&world.host, &[exec(), exec()].concat()), Ok(2 * exec().len()));
    world.told();
    assert_eq!(world.turns(), [EXEC, EXEC, Did::Left]);
    assert_eq!(world.hears(), (0, vec![]));
    world.told_of_the_next();
    world.say(&frame::control(Message::Ping, b"").unwrap());
    assert_eq!(world.turns(), [Did::Got(12)]);
    assert_eq!(world.hears(), (8, vec![answer(Message::Ping)]));
}

/// Behind the answer to a greeting come only replies to the new host, whatever earlier hosts asked.
#[test]
fn a_host_that_greets_hears_only_its_own() {
    let exec = exec();
    let greeting = greeting::greeting(7);
    let hello = frame::control(Message::Ping, &greeting).unwrap();
    for before in [Vec::new(), exec.clone(), [exec.clone(), exec.clone()].concat()] {
        for at_once in [true, false] {
            let mut world = World::new();
            if !at_once && !before.is_empty() {
                world.say(&before);
                world.turns();
                world.say(&hello);
            } else {
                world.say(&[&before[..], &hello].concat());
            }
            assert_eq!(world.turns().last(), Some(&Did::Greeted));
            assert_eq!(world.hears().1.last(), Some(&greeting), "{before:?}");
            // Now comes the report that the host before has left.
            world.told();
            world.told_of_the_next();
            world.say(&exec);
            assert_eq!(world.turns(), [EXEC]);
            assert_eq!(world.hears(), (exec.len(), vec![answer(Message::ExecCmd)]));
        }
    }
}

/// The first report after a greeting is taken for one about the host before. If the host that greeted has
/// left itself, in the middle of a command, the next one has to greet twice.
#[test]
fn a_host_that_greets_and_leaves_at_once_leaves_no_deaf_guest() {
    let hello = frame::control(Message::Ping, &greeting::greeting(7)).unwrap();
    for rest in [&[0; 8][..], &exec()[..3], &exec()[..20]] {
        let mut world = World::new();
        world.say(&[&hello, rest].concat());
        assert_eq!(world.turns(), [Did::Greeted]);
        let mut greeted = Vec::new();
        for _ in 0..2 {
            world.told();
            world.turns();
            world.told_of_the_next();
            world.say(&hello);
            greeted = world.turns();
            if greeted == [Did::Greeted] {
                break;
            }
        }
        assert_eq!(greeted, [Did::Greeted], "{rest:?}");
    }
}

/// What a host that greeted has begun to say goes on, whenever the report about the host before comes.
#[test]
fn a_late_report_costs_a_host_that_greeted_nothing() {
    let (exec, hello) = (exec(), frame::control(Message::Ping, &greeting::greeting(7)).unwrap());
    for cut in 0..=exec.len() {
        let mut world = World::new();
        world.say(&hello);
        assert_eq!(world.turns(), [Did::Greeted]);
        world.hears();
        world.say(&exec[..cut]);
        world.told();
        let mut did = world.turns();
        world.told_of_the_next();
        world.say(&exec[cut..]);
        did.extend(world.turns());
        assert_eq!(did, [EXEC], "cut at {cut}");
        assert_eq!(world.hears(), (exec.len(), vec![answer(Message::ExecCmd)]));
    }
}

/// The next host gets the rest of a frame that had left in part, and finds the answer to its greeting behind
/// it.
#[test]
fn what_has_left_in_part_leaves_whole_before_the_answer_to_a_greeting() {
    let mut world = World::new();
    let large = vec![7; 600 << 10];
    world.control.send(Message::Ack, &large);
    world.control.send(Message::Ack, b"another");
    let event = br#"{"event":"finished"}"#;
    world.control.send(Message::ProcessAsyncEvent, event);
    world.say(&frame::control(Message::Ping, &greeting::greeting(1)).unwrap());
    let mut heard = Vec::new();
    let mut chunk = vec![0; 1 << 16];
    loop {
        world.control.ready(EpollFlags::EPOLLOUT);
        world.turns();
        match read(&world.host, &mut chunk) {
            Ok(count) => heard.extend_from_slice(&chunk[..count]),
            Err(_) => break,
        }
    }
    let expected = [
        frame::control(Message::Ack, &large).unwrap(),
        frame::control(Message::ProcessAsyncEvent, event).unwrap(),
        frame::control(Message::Ack, &greeting::greeting(1)).unwrap(),
    ];
    assert!(heard == expected.concat(), "{} bytes", heard.len());
}

/// One read may hold thousands of commands, and the guest has room for a few.
#[test]
fn no_more_commands_are_taken_than_there_is_room_for() {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (host, guest) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let mut control = Control::new(Port::Device(guest), 0);
    assert_eq!(control.open(&epoll).unwrap(), [Input::Connected]);
    let all: Vec<u8> = (0..1000_u32).flat_map(|id| frame::control(id, b"").unwrap()).collect();
    assert_eq!(write(&host, &all), Ok(all.len()));
    assert!(control.turn(&epoll, 0).is_empty() && control.wants_turn(8));
    let mut next = 0..1000_u32;
    while next.start < next.end {
        assert!(control.wants_turn(8));
        let inputs = control.turn(&epoll, 7);
        assert!((1..=7).contains(&inputs.len()));
        for input in inputs {
            assert_eq!(Some(input), next.next().map(|id| Input::Frame(id, Vec::new())));
        }
    }
    // All of it was one read, and has one credit.
    let mut said = [0; 64];
    let count = read(&host, &mut said).unwrap();
    let credit = u32::try_from(all.len()).unwrap().to_be_bytes();
    assert_eq!(said[..count], frame::control(Message::Next, &credit).unwrap());
    assert!(control.turn(&epoll, 7).is_empty() && !control.wants_turn(8));
}

/// runV waits for the NEXT of what it has written; a host that does not read them is not read either.
#[test]
fn credits_that_nobody_reads_have_an_end() {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (host, guest) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let mut control = Control::new(Port::Device(guest), 0);
    control.open(&epoll).unwrap();
    let ping = frame::control(Message::Ping, b"").unwrap();
    let mut taken = 0_usize;
    while write(&host, &ping).is_ok() {
        control.ready(EpollFlags::EPOLLIN);
        while control.wants_turn(8) && control.readiness.readable {
            taken += control.turn(&epoll, 256).len();
            control.send(Message::Ack, b"");
            control.flush();
        }
    }
    assert!(
        taken > OUT_MAX / 40 && control.outbox.waiting() <= OUT_MAX + 64,
        "{taken}, {}",
        control.outbox.waiting()
    );
}

/// protocol.md «DESTROYPOD»: it is carried out also for a host that closes at once, whatever waits to be
/// written to it.
#[test]
fn the_last_command_of_a_host_that_does_not_read_is_carried_out() {
    let destroy = frame::control(Message::DestroyPod, b"").unwrap();
    let (mut world, address) = World::listening();
    while world.control.readiness.writable {
        world.control.send(Message::Ack, &[0; 1000]);
        world.control.flush();
    }
    world.control.send(Message::ProcessAsyncEvent, b"{}");
    assert_eq!(write(&world.host, &destroy), Ok(destroy.len()));
    world.closes(caller(&address));
    assert_eq!(world.turns(), [Did::Got(Message::DestroyPod as u32), Did::Connected]);
    assert!(world.control.wrote_all(), "READY and the event have left, and no reply is left");
}

#[test]
fn a_command_whose_host_closes_behind_it_is_whole() {
    let exec = exec();
    for cut in 1..exec.len() {
        let (mut world, _) = World::listening();
        world.say(&exec[..cut]);
        assert_eq!(world.turns(), []);
        assert_eq!(write(&world.host, &exec[cut..]), Ok(exec.len() - cut));
        world.closes(nobody());
        assert_eq!(world.turns(), [EXEC], "cut at {cut}");
        assert!(world.control.connection.is_none());
    }
}

/// The next connection has been waiting to be accepted.
#[test]
fn a_new_connection_hears_no_reply_to_the_one_before() {
    let ping = frame::control(Message::Ping, b"").unwrap();
    let wrong = [0; 8];
    for (also, what) in [(&[][..], "it closes"), (&wrong[..], "it says what makes no sense, and stays")] {
        let (mut world, address) = World::listening();
        assert_eq!(write(&world.host, &[&ping, also].concat()), Ok(ping.len() + also.len()));
        let next = caller(&address);
        let before = std::mem::replace(&mut world.host, next);
        if also.is_empty() {
            drop(before);
        }
        world.control.ready(EpollFlags::all());
        assert_eq!(world.turns(), [Did::Got(Message::Ping as u32), Did::Connected], "{what}");
        assert_eq!(world.hears(), (0, vec![b"READY".to_vec()]), "{what}");
    }
}

/// The connection before may have any number of commands under way.
#[test]
fn a_new_connection_needs_no_room_for_commands() {
    let ping = frame::control(Message::Ping, b"").unwrap();
    let (mut world, address) = World::listening();
    let words = [&ping, &[0; 8][..]].concat();
    assert_eq!(write(&world.host, &words), Ok(words.len()));
    let _next = caller(&address);
    world.control.ready(EpollFlags::all());
    assert_eq!(world.control.turn(&world.epoll, 2), [Input::Frame(Message::Ping.id(), Vec::new())]);
    assert!(world.control.wants_turn(0));
    assert_eq!(world.control.turn(&world.epoll, 0), [Input::Connected]);
    assert!(!world.control.wants_turn(0));
}

/// A host that writes and does not read costs no more memory than another.
#[test]
fn replies_that_cannot_be_written_are_not_kept() {
    let ping = frame::control(Message::Ping, b"").unwrap();
    let (mut world, _) = World::listening();
    shutdown(std::os::fd::AsRawFd::as_raw_fd(&world.host), Shutdown::Read).unwrap();
    for _ in 0..1000 {
        world.say(&ping);
        assert_eq!(world.turns(), [Did::Got(Message::Ping as u32)]);
        world.control.flush();
        assert!(world.control.wrote_all());
    }
    // Events are kept for the next host, and bounded: the connection ends before they are too many.
    for count in 1.. {
        world.control.send(Message::ProcessAsyncEvent, &[b' '; 1000]);
        assert!(world.control.outbox.waiting() <= 2 * OUT_MAX + 1100);
        world.say(&ping);
        if world.turns().is_empty() {
            assert!(count > OUT_MAX / 1000 && world.control.connection.is_none());
            break;
        }
    }
}

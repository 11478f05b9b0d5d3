//! The stream channel: it reads the host's frames, sends frames to the host, and continues both across a
//! change of host or of streamd.

use std::rc::Rc;
use std::time::Duration;

use hyperinit::clock::now;
use hyperinit::fault::{Fault, OrFault};
use hyperinit::flow::{self, Ask, BEGUN};
use hyperinit::frame::{StreamDecoder, Violation};
use hyperinit::ids::StreamId;
use hyperinit::port::{self, Action, Event, Hearing, Kind, Presence, Readiness, edges};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollFlags};
use nix::unistd::read;

use super::buffer::{Buffer, SLOT_FLOW, SLOT_INPUT, SLOT_PLACE, is_no_memory};
use super::engine::{LISTENER, PORT, nonblocking};
use super::input::{Place, is_want};
use super::port::{Accepted, Port};
use super::processes::{PAUSE, Processes, say};

/// How much is read from the host at once, in bytes.
const CHUNK: usize = 64 << 10;
/// After a loss of frame boundaries, the host must be silent for this long before its next byte is taken for
/// the start of a frame. An honest host writes a frame without a pause, and streamd keeps reading meanwhile.
const QUIET: Duration = Duration::from_secs(1);
/// A successor may not have been sent every process again for this long. Until then it does not answer a
/// frame of an unknown stream: the answer would be the end of a process that runs.
const RESEND: Duration = Duration::from_secs(10);
/// How long a host that connects waits for the processes to read the stdin that the previous host sent.
const PATIENCE: Duration = Duration::from_secs(5);

/// SLOT_INPUT: [`Hearing::Frames`], and SLOT_PLACE says where in its frames the host is.
const KNOWN: u64 = 0;
/// A read is under way. If this streamd dies now, its successor cannot know how much was read:
/// [`Hearing::Lost`].
const READING: u64 = 1;
/// [`Hearing::Deaf`].
const VIOLATED: u64 = 2;
/// [`Hearing::Guessed`], and SLOT_PLACE says where in its frames the host is.
const GUESSED: u64 = 3;

/// The stream channel.
pub struct StreamChannel {
    epoll: Rc<Epoll>,
    port: Port,
    presence: Presence,
    readiness: Readiness,
    decoder: StreamDecoder,
    place: Place,
    /// The bytes left of a frame whose beginning a predecessor read: they are discarded.
    skip: usize,
    /// The time until which the next host waits for the processes to read what the last one sent.
    patience: Option<Duration>,
    /// The time when sending is tried again after the kernel ran out of memory. No event reports that memory
    /// is available again.
    starved: Option<Duration>,
    /// The time until which frames of unknown streams are not answered ([`RESEND`]).
    unsure: Option<Duration>,
    chunk: Vec<u8>,
}

impl StreamChannel {
    /// Opens the channel and continues where a predecessor stopped.
    pub fn open(epoll: Rc<Epoll>, port: Port, buffer: &mut Buffer) -> Result<StreamChannel, Fault> {
        if let Some(listener) = port.listener() {
            nonblocking(listener)?;
            epoll.add(listener, edges(LISTENER)).fault("watching", "the listening socket")?;
        }
        if let Some(fd) = port.fd() {
            nonblocking(fd)?;
            epoll.add(fd, edges(PORT)).fault("watching", "the stream port")?;
        }
        let page = buffer.page();
        let place = Place::of_note([SLOT_PLACE, SLOT_PLACE + 1, SLOT_PLACE + 2].map(|slot| page.get(slot)));
        let hearing = match (page.get(SLOT_INPUT), place) {
            (KNOWN, Some(_)) => Hearing::Frames,
            (GUESSED, Some(_)) => Hearing::Guessed,
            (VIOLATED, _) if port.kind() != Kind::Line => Hearing::Deaf,
            _ => Hearing::Lost,
        };
        let presence = match port.fd() {
            Some(_) => Presence::resumed(port.kind(), QUIET, hearing),
            None => Presence::new(port.kind(), QUIET),
        };
        let place = place.unwrap_or_default();
        let mut decoder = StreamDecoder::default();
        decoder.push(place.half_header());
        let mut channel = StreamChannel {
            epoll,
            skip: place.rest(),
            port,
            presence,
            readiness: Readiness::UNTRIED,
            decoder,
            place,
            patience: None,
            starved: None,
            unsure: buffer.is_inherited().then(|| now() + RESEND),
            chunk: vec![0; CHUNK],
        };
        match channel.presence.hearing() {
            Hearing::Frames | Hearing::Guessed => {}
            Hearing::Lost => {
                log::warn!("a predecessor died while it read: not listening until the host pauses")
            }
            Hearing::Deaf => {
                log::warn!("the host has violated the protocol: not listening until it connects again")
            }
        }
        if channel.port.fd().is_none() {
            channel.start_over(buffer)?;
        }
        Ok(channel)
    }

    /// Handles an epoll event of the port or the connection.
    pub fn event(&mut self, events: EpollFlags) {
        self.readiness.note(events);
        self.presence.on(now(), port::told(events));
    }

    /// Handles an event of the listening socket: a host may be waiting there.
    pub fn called(&mut self) {
        self.presence.on(now(), Event::Told { gone: false, input: false });
    }

    /// Accepts the next connection if none is open and one waits; returns true if another may wait.
    pub fn accept(&mut self, buffer: &mut Buffer) -> Result<bool, Fault> {
        if !self.presence.may_accept() {
            return Ok(false);
        }
        // Start over before accepting: a successor that finds the connection must not continue in the middle
        // of a frame.
        self.start_over(buffer)?;
        let event = match self.port.accept() {
            Accepted::Nobody => Event::NoCaller,
            Accepted::Stranger => return Ok(true),
            Accepted::Short => Event::NotAccepted,
            Accepted::Host(connection) => {
                self.epoll.add(connection, edges(PORT)).fault("watching", "the connection")?;
                self.readiness = Readiness::UNTRIED;
                Event::Accepted
            }
        };
        self.presence.on(now(), event);
        Ok(false)
    }

    /// Ends the session of a host that has left, once all that it sent has been read; returns true if that
    /// changed something. On a device, bytes for which the processes have no room stay for the next host's
    /// session.
    pub fn part(&mut self, processes: &mut Processes, buffer: &mut Buffer) -> Result<bool, Fault> {
        if !self.presence.is_leaving() || self.may_read(processes, buffer) {
            return Ok(false);
        }
        if self.readiness.readable && self.is_gone() {
            return Ok(self.lose_patience(processes));
        }
        log::info!("the host has left the stream port");
        self.presence.on(now(), Event::ReadAll);
        processes.hold_none();
        self.hang_up();
        self.start_over(buffer)?;
        Ok(true)
    }

    /// Limits how long the next host waits while processes do not read what the last host sent. Closing the
    /// last host's connection would lose the rest, but a waiting host does not wait beyond [`PATIENCE`]: then
    /// the stdin of these processes ends. Returns true if it has ended.
    fn lose_patience(&mut self, processes: &mut Processes) -> bool {
        if !self.port.has_caller() {
            self.patience = None;
            return false;
        }
        if now() < *self.patience.get_or_insert_with(|| now() + PATIENCE) {
            return false;
        }
        log::warn!("a host waits, and what the last one has sent is not read: that ends");
        processes.end_full_inputs();
        true
    }

    fn hang_up(&mut self) {
        self.port.hang_up();
        self.patience = None;
    }

    /// Prepares for the next host: it gets whole frames, and its first byte begins one.
    fn start_over(&mut self, buffer: &mut Buffer) -> Result<(), Fault> {
        buffer.rewind()?;
        buffer.page().set(SLOT_FLOW, 0);
        self.hear_frames(buffer);
        Ok(())
    }

    /// Resets the decoder: the host's next byte begins a frame.
    fn hear_frames(&mut self, buffer: &Buffer) {
        self.decoder.reset();
        self.skip = 0;
        self.place = Place::default();
        self.note_place(buffer);
    }

    fn note_place(&self, buffer: &Buffer) {
        for (slot, number) in (SLOT_PLACE..).zip(self.place.note()) {
            buffer.page().set(slot, number);
        }
        self.note_known(buffer);
    }

    /// Records that the place on the page is the host's position.
    fn note_known(&self, buffer: &Buffer) {
        let known = if self.presence.hearing() == Hearing::Guessed { GUESSED } else { KNOWN };
        buffer.page().set(SLOT_INPUT, known);
    }

    /// Sends waiting frames; returns true if the port took them or took a part.
    pub fn send(&mut self, buffer: &mut Buffer) -> Result<bool, Fault> {
        let Some(fd) = self.port.fd().filter(|_| self.readiness.writable && buffer.waits()) else {
            return Ok(false);
        };
        match buffer.send(fd) {
            Ok(all) => {
                self.readiness.writable = all;
                Ok(true)
            }
            Err(errno) if is_want(errno) => {
                log::warn!("{}; output waits", Fault::errno("writing", "the stream port", errno));
                self.readiness.writable = false;
                self.starved = Some(now() + PAUSE);
                Ok(false)
            }
            Err(errno) => {
                log::info!("{}", Fault::errno("writing", "the stream port", errno));
                self.readiness.writable = false;
                self.presence.on(now(), Event::Gone);
                Ok(false)
            }
        }
    }

    fn may_read(&self, processes: &Processes, buffer: &Buffer) -> bool {
        self.readiness.readable
            && !processes.input_is_full()
            && (buffer.has_room_for_answers() || self.is_gone())
    }

    /// Whether this host has left for good: on a socket, the next host has a connection of its own.
    fn is_gone(&self) -> bool {
        self.presence.is_leaving() && self.presence.kind() == Kind::Socket
    }

    /// Reads a chunk from the host if all processes have room; returns true if bytes came or may come now.
    pub fn read(&mut self, processes: &mut Processes, buffer: &mut Buffer) -> Result<bool, Fault> {
        let mut total = 0;
        while total < CHUNK
            && self.may_read(processes, buffer)
            && let Some(fd) = self.port.fd()
        {
            // The host names a process only after execd has handed it over.
            processes.receive(buffer);
            let frames = self.presence.hears_frames();
            if frames {
                buffer.page().set(SLOT_INPUT, READING);
            }
            let got = read(fd, &mut self.chunk);
            if frames && !matches!(got, Ok(1..)) {
                self.note_known(buffer);
            }
            match got {
                Ok(0) => {
                    self.readiness.readable = false;
                    self.presence.on(now(), Event::Gone);
                }
                Ok(count) => {
                    total += count;
                    self.hear(count, processes, buffer)?;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    self.readiness.readable = false;
                    self.presence.on(now(), Event::Nothing);
                }
                Err(errno) => {
                    log::info!("{}", Fault::errno("reading", "the stream port", errno));
                    self.readiness.readable = false;
                    self.presence.on(now(), Event::Gone);
                }
            }
        }
        processes.flush();
        // The flush may have made room, and no event reports that.
        Ok(total > 0 || self.port.fd().is_some() && self.may_read(processes, buffer))
    }

    /// Acts on the first `count` bytes of the chunk.
    fn hear(&mut self, count: usize, processes: &mut Processes, buffer: &mut Buffer) -> Result<(), Fault> {
        self.presence.on(now(), Event::Bytes);
        if !self.presence.hears_frames() {
            processes.end_inputs();
            return Ok(());
        }
        let bytes = self.chunk.get(..count).unwrap_or_default();
        // Record the place before anything else: until it is recorded, a kill makes the successor discard
        // what it reads.
        if self.place.pass(bytes) {
            self.note_place(buffer);
        } else if self.presence.hearing() != Hearing::Guessed {
            buffer.page().set(SLOT_INPUT, VIOLATED);
        }
        let skip = self.skip.min(bytes.len());
        self.skip -= skip;
        self.decoder.push(bytes.get(skip..).unwrap_or_default());
        // A host that is gone receives no answers, and a lack of room for answers must not lose its last
        // frames.
        let gone = self.is_gone();
        loop {
            match self.decoder.next_frame() {
                Ok(Some(frame)) if is_word(frame.tag, frame.payload) => {
                    heed(frame.payload, processes, buffer)?;
                }
                Ok(Some(frame)) => {
                    if !stdin(frame.tag, frame.payload, processes, buffer)
                        && self.unsure.is_none_or(|until| now() >= until)
                        && (!gone || buffer.has_room_for_answers())
                    {
                        answer(frame.tag, buffer)?;
                    }
                }
                Ok(None) => return Ok(()),
                Err(violation) => {
                    self.violated(&violation, processes);
                    return Ok(());
                }
            }
        }
    }

    /// Handles bytes from the host that are not frames.
    fn violated(&mut self, violation: &Violation, processes: &mut Processes) {
        let guessed = self.presence.hearing() == Hearing::Guessed;
        let action = self.presence.on(now(), Event::Violation);
        let lost = self.presence.hearing() == Hearing::Lost;
        let until = if lost { "pauses" } else { "connects again" };
        log::warn!("the host sent {violation}: not listening until it {until}");
        if guessed {
            // The bytes that were misread belonged to some process.
            processes.end_inputs();
        } else {
            processes.hold_none();
        }
        if action == Some(Action::HangUp) {
            self.hang_up();
        }
    }

    /// When [`StreamChannel::tick`] has something to do.
    pub fn deadline(&self) -> Option<Duration> {
        [self.starved, self.presence.deadline(), self.patience].into_iter().flatten().min()
    }

    /// Acts on deadlines that have passed.
    pub fn tick(&mut self, processes: &mut Processes, buffer: &Buffer) {
        if self.starved.is_some_and(|until| now() >= until) {
            self.starved = None;
            self.readiness.writable = true;
        }
        let lost = self.presence.hearing() == Hearing::Lost;
        match self.presence.on(now(), Event::Tick) {
            Some(Action::Begin) => {
                if lost {
                    log::warn!("the host has paused: listening again");
                }
                self.hear_frames(buffer);
            }
            Some(Action::Paused) => self.paused(processes, buffer),
            Some(Action::Left | Action::EarlierLeft | Action::HangUp) | None => {}
        }
    }

    /// Checks a guess about where the host's frames begin, after the host has paused. If the host seems to be
    /// in the middle of a frame for a stream that no process has, the guess is wrong, and that frame would
    /// swallow what comes next.
    fn paused(&mut self, processes: &mut Processes, buffer: &Buffer) {
        let known = |number| is_known(number, processes, buffer);
        if !self.place.is_inside_nobodys(known) {
            return;
        }
        if self.unsure.is_some_and(|until| now() < until) {
            self.presence.on(now(), Event::Unsure);
            return;
        }
        log::warn!("the host has paused in a frame for nobody: taken for no frame");
        // The bytes that the frame swallowed belonged to some process.
        processes.end_inputs();
        self.hear_frames(buffer);
    }
}

/// Handles one stdin frame from the host; returns false if no process has or had its stream.
fn stdin(number: u64, payload: &[u8], processes: &mut Processes, buffer: &Buffer) -> bool {
    StreamId::new(number)
        .is_none_or(|stdio| processes.push(stdio, payload) || buffer.find_end(stdio).is_some())
}

/// Whether some process has or had this stream, or it is the flow control stream.
fn is_known(number: u64, processes: &Processes, buffer: &Buffer) -> bool {
    number == flow::STREAM
        || StreamId::new(number)
            .is_some_and(|stream| processes.knows(stream) || buffer.find_end(stream).is_some())
}

/// Whether a frame is a flow control message.
fn is_word(number: u64, payload: &[u8]) -> bool {
    number == flow::STREAM && Ask::decode(payload).is_some()
}

/// Acts on a flow control message from the host.
fn heed(payload: &[u8], processes: &mut Processes, buffer: &mut Buffer) -> Result<(), Fault> {
    match Ask::decode(payload) {
        Some(Ask::Hold(stream)) => processes.hold(stream, true),
        Some(Ask::Go(stream)) => processes.hold(stream, false),
        Some(Ask::Begin) => {
            buffer.page().set(SLOT_FLOW, 1);
            match say(BEGUN, buffer) {
                // The host asks again (host/client/src/mux).
                Err(fault) if is_no_memory(&fault) => log::warn!("{fault}; the host is not answered"),
                said => said?,
            }
        }
        None => {}
    }
    Ok(())
}

/// Answers a frame of an unknown stream with the end of that stream.
fn answer(number: u64, buffer: &mut Buffer) -> Result<(), Fault> {
    let Some(stdio) = StreamId::new(number) else { return Ok(()) };
    match buffer.append_empty(stdio) {
        Err(fault) if is_no_memory(&fault) => {
            log::warn!("{fault}; a frame for the unknown stream {stdio} is not answered");
            Ok(())
        }
        appended => appended,
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use hyperinit::frame;
    use hyperinit::sys::fd::send_fds;
    use hyperinit::wire::streamd::Streams;
    use nix::sys::epoll::EpollCreateFlags;
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use nix::unistd::{pipe, write};

    use super::super::engine::own_buffer;
    use super::*;

    /// A device whose hosts are told apart only by the events that a test reports, as the kernel does for
    /// virtio-serial.
    struct World {
        outside: OwnedFd,
        channel: StreamChannel,
        processes: Processes,
        buffer: Buffer,
    }

    impl World {
        fn new() -> World {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let (outside, port) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
            let epoll = Rc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
            let mut buffer = own_buffer(true).unwrap();
            let channel = StreamChannel::open(Rc::clone(&epoll), Port::Device(port), &mut buffer).unwrap();
            World { outside, channel, processes: Processes::new(epoll, None), buffer }
        }

        fn say(&mut self, bytes: &[u8]) {
            assert_eq!(write(&self.outside, bytes), Ok(bytes.len()));
            self.round(EpollFlags::EPOLLIN);
        }

        /// One round of the engine; returns true if the host has left.
        fn round(&mut self, events: EpollFlags) -> bool {
            self.channel.event(events);
            while self.channel.read(&mut self.processes, &mut self.buffer).unwrap() {}
            self.channel.send(&mut self.buffer).unwrap();
            self.channel.part(&mut self.processes, &mut self.buffer).unwrap()
        }

        /// The streams that were answered. No process has any stream, so each frame that was understood is
        /// answered with its stream's end.
        fn answered(&mut self) -> Vec<u64> {
            let (mut decoder, mut chunk) = (StreamDecoder::default(), [0; 4096]);
            while let Ok(count @ 1..) = read(&self.outside, &mut chunk) {
                decoder.push(&chunk[..count]);
            }
            let mut answered = Vec::new();
            while let Some(frame) = decoder.next_frame().unwrap() {
                assert!(frame.payload.is_empty());
                answered.push(frame.tag);
            }
            answered
        }
    }

    /// When the kernel had no memory to write to a stdin, no event reports that it has some again: only the
    /// next attempt shows it.
    #[test]
    fn the_host_is_read_when_its_stdin_could_be_written_without_an_event() {
        let mut world = World::new();
        let (execd, socket) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_NONBLOCK).unwrap();
        world.processes = Processes::new(Rc::clone(&world.channel.epoll), Some(socket));
        let [(stdin, stdin_in), (stdout, _stdout_in)] = [(); 2].map(|()| pipe().unwrap());
        let stdio = StreamId::new(5).unwrap();
        let packet = Streams { stdio, stderr: None, terminal: false, stdin: true, again: false };
        send_fds(&execd, &packet.encode(), &[stdin_in.as_fd(), stdout.as_fd()]).unwrap();
        let frame = frame::stream(5, &[b'x'; 32 << 10]).unwrap();
        while !world.processes.input_is_full() {
            world.say(&frame);
        }
        world.say(&frame);
        assert_eq!(read(&stdin, &mut [0; 64 << 10]), Ok(64 << 10));
        assert!(world.channel.read(&mut world.processes, &mut world.buffer).unwrap(), "there is more");
        assert!(world.channel.read(&mut world.processes, &mut world.buffer).unwrap());
        assert!(!world.channel.read(&mut world.processes, &mut world.buffer).unwrap());
    }

    /// A host leaves in the middle of a frame and is reported gone before the next one writes.
    #[test]
    fn half_a_frame_of_a_host_that_left_is_no_part_of_anothers() {
        let (first, second) = (frame::stream(5, &[b'x'; 40]).unwrap(), frame::stream(6, b"").unwrap());
        for cut in 1..first.len() {
            let mut world = World::new();
            world.say(&first[..cut]);
            assert!(world.round(EpollFlags::EPOLLHUP));
            let portion = cut % second.len();
            world.say(&second[..portion]);
            world.say(&second[portion..]);
            world.say(&first);
            assert_eq!(world.answered(), [6, 5], "cut at {cut}");
        }
    }

    /// EPOLLHUP is reported for as long as no host is connected. What the next host writes before its arrival
    /// is reported is heard.
    #[test]
    fn a_host_leaves_once() {
        let frame = frame::stream(5, &[b'x'; 40]).unwrap();
        let mut world = World::new();
        assert!(world.round(EpollFlags::EPOLLHUP));
        for portion in frame.chunks(9) {
            assert_eq!(write(&world.outside, portion), Ok(portion.len()));
            assert!(!world.round(EpollFlags::EPOLLHUP | EpollFlags::EPOLLIN));
        }
        assert_eq!(world.answered(), [5]);
    }
}

//! The host's side: the port, what has left through it, and where the host is in its frames.

use std::rc::Rc;
use std::time::{Duration, Instant};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::flow::{self, Ask, BEGUN};
use hyperinit::frame::{StreamDecoder, Violation};
use hyperinit::host::Silence;
use hyperinit::ids::StreamId;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollFlags};
use nix::unistd::read;

use super::buffer::{Buffer, SLOT_FLOW, SLOT_INPUT, SLOT_PLACE, is_no_memory};
use super::engine::{LISTENER, PORT, edges, nonblocking, now};
use super::input::{Place, is_want};
use super::port::{Accepted, Port};
use super::processes::{PAUSE, Processes, say};

/// How much is read from the host at once.
const CHUNK: usize = 64 << 10;
/// How long a host that is listened to has to be silent until its next byte is believed to begin a frame. An honest
/// host writes a frame at once, and nothing here keeps it from doing so.
const QUIET: Duration = Duration::from_secs(1);

/// How long a successor may not have been sent every process again. Meanwhile it takes no stream for unknown: the answer
/// would be the end of a process that runs.
const RESEND: Duration = Duration::from_secs(10);
/// How long another host has to wait while processes do not read what one that left has written for them.
const PATIENCE: Duration = Duration::from_secs(5);

/// SLOT_INPUT: where the host is in its frames stands at SLOT_PLACE.
const KNOWN: u64 = 0;
/// Something is being read: how much, nobody knows when the reader dies now.
const READING: u64 = 1;
/// The host has violated the protocol.
const VIOLATED: u64 = 2;
/// As KNOWN, if the pause after which it was believed to begin a frame was none in the middle of one.
const GUESSED: u64 = 3;

/// How the host is listened to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hearing {
    /// Frame by frame.
    Frames,
    /// A predecessor died while it read: what comes is thrown away until the host has been silent for a while.
    Lost { quiet: Duration },
    /// After a violation what comes is thrown away until the host connects again.
    Deaf,
}

/// The host.
pub struct Host {
    epoll: Rc<Epoll>,
    port: Port,
    decoder: StreamDecoder,
    place: Place,
    /// What is left of a frame whose beginning went with a predecessor, in bytes.
    skip: usize,
    hearing: Hearing,
    /// Where its frames begin was guessed from a pause. What looks like a violation may be a bad guess, for on a busy machine a host
    /// may be held up in the middle of a frame. So may a long frame for nobody: the next pause is its end.
    guessed: bool,
    /// When that pause is over.
    pause: Option<Duration>,
    /// The port may have something, or take something.
    readable: bool,
    writable: bool,
    /// The host has left; what it sent before is still read.
    hung_up: bool,
    /// Until when another one waits for that.
    patience: Option<Duration>,
    /// When sending is tried again: the kernel had no memory for it, and will not say when it has.
    starved: Option<Duration>,
    /// The same of accepting a connection.
    short: Option<Duration>,
    /// Until when unknown streams are not answered.
    unsure: Option<Duration>,
    silence: Silence,
    /// What comes next over a line begins a frame, whatever came before.
    anew: bool,
    /// The host of a device has left with half a frame read, which may be the next one's: what has come since, too little to tell.
    seam: Option<Vec<u8>>,
    chunk: Vec<u8>,
}

impl Host {
    /// Goes on where a predecessor stopped.
    pub fn open(epoll: Rc<Epoll>, port: Port, buffer: &mut Buffer) -> Result<Host, Fault> {
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
            (KNOWN | GUESSED, Some(_)) => Hearing::Frames,
            (VIOLATED, _) if !port.is_line() => Hearing::Deaf,
            _ => Hearing::Lost { quiet: now() + QUIET },
        };
        let guessed = page.get(SLOT_INPUT) == GUESSED;
        let pause = guessed.then(|| now() + QUIET);
        let place = place.unwrap_or_default();
        let mut decoder = StreamDecoder::default();
        decoder.push(place.half_header());
        let mut host = Host {
            epoll,
            skip: place.rest(),
            port,
            decoder,
            place,
            hearing,
            guessed,
            pause,
            readable: true,
            writable: true,
            hung_up: false,
            patience: None,
            starved: None,
            short: None,
            unsure: buffer.is_inherited().then(|| now() + RESEND),
            silence: Silence::default(),
            anew: false,
            seam: None,
            chunk: vec![0; CHUNK],
        };
        match host.hearing {
            Hearing::Frames => {}
            Hearing::Lost { .. } => {
                log::warn!("a predecessor died while it read: not listening until the host pauses")
            }
            Hearing::Deaf => {
                log::warn!("the host has violated the protocol: not listening until it connects again")
            }
        }
        if host.port.fd().is_none() {
            host.start_over(buffer)?;
        }
        Ok(host)
    }

    /// Something happened to the port.
    pub fn event(&mut self, events: EpollFlags) {
        // Each read that may come to nothing is a moment in which a kill costs more than it has to.
        let over = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR | EpollFlags::EPOLLRDHUP;
        self.readable |= events.intersects(EpollFlags::EPOLLIN | over);
        self.writable |= events.intersects(EpollFlags::EPOLLOUT | over);
        let speaks = events.contains(EpollFlags::EPOLLIN) && self.silence.ends(Instant::now());
        self.anew |= speaks && self.port.is_line();
        self.hung_up |= events.contains(EpollFlags::EPOLLHUP);
    }

    /// Takes the next connection, if there is none and one waits; true if another may wait.
    pub fn accept(&mut self, buffer: &mut Buffer) -> Result<bool, Fault> {
        if !self.port.wants_connection() || self.short.is_some() {
            return Ok(false);
        }
        // Before: once a successor can find the connection, it must not go on in the middle of a frame.
        self.start_over(buffer)?;
        match self.port.accept() {
            Accepted::Nobody => Ok(false),
            Accepted::Stranger => Ok(true),
            Accepted::Short => {
                self.short = Some(now() + PAUSE);
                Ok(false)
            }
            Accepted::Host(connection) => {
                self.epoll.add(connection, edges(PORT)).fault("watching", "the connection")?;
                self.readable = true;
                self.writable = true;
                Ok(false)
            }
        }
    }

    /// Takes leave of a host that hung up, once what it sent has been read, or on a device cannot be for now: true if that changed something.
    /// The host gets whole frames when it is back, and half a frame from it is forgotten, on a device once the next bytes say that it was its.
    pub fn part(&mut self, processes: &mut Processes, buffer: &mut Buffer) -> Result<bool, Fault> {
        if !self.hung_up || self.may_read(processes, buffer) {
            return Ok(false);
        }
        if self.readable && self.is_gone() {
            return Ok(self.lose_patience(processes));
        }
        log::info!("the host has left the stream port");
        processes.hold_none();
        buffer.page().set(SLOT_FLOW, 0);
        self.hung_up = false;
        self.hang_up();
        if self.hearing == Hearing::Frames && self.port.is_device() && self.place.is_inside() {
            self.seam.get_or_insert_default();
            buffer.rewind()?;
        } else {
            self.start_over(buffer)?;
        }
        Ok(true)
    }

    /// Processes do not read what a host that left has written, and with its connection that would be lost. It keeps nobody out for ever: true if
    /// the processes' time is over.
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
        if self.port.fd().is_none() {
            // That this host has left too says nothing of the next one.
            self.hung_up = false;
            self.patience = None;
        }
    }

    fn start_over(&mut self, buffer: &mut Buffer) -> Result<(), Fault> {
        buffer.rewind()?;
        buffer.page().set(SLOT_FLOW, 0);
        (self.guessed, self.pause) = (false, None);
        self.hear_frames(buffer);
        Ok(())
    }

    /// From here on the host's bytes are frames.
    fn hear_frames(&mut self, buffer: &Buffer) {
        self.decoder.reset();
        self.hearing = Hearing::Frames;
        self.skip = 0;
        self.seam = None;
        self.place = Place::default();
        self.note_place(buffer);
    }

    /// The bytes that are to be acted on: the first `count` of the chunk, with those before them that were too few to tell whether the frame
    /// of a host that left goes on. None if they still are: until then they are not noted, and a successor is lost.
    fn heard(&mut self, count: usize, processes: &Processes, buffer: &Buffer) -> Option<Vec<u8>> {
        let mut bytes = self.seam.take().unwrap_or_default();
        bytes.extend_from_slice(self.chunk.get(..count).unwrap_or_default());
        match self.place.goes_on(&bytes, |number| is_known(number, processes, buffer)) {
            None => {
                self.seam = Some(bytes);
                return None;
            }
            Some(true) => {}
            Some(false) => self.hear_frames(buffer),
        }
        Some(bytes)
    }

    fn note_place(&self, buffer: &Buffer) {
        for (slot, number) in (SLOT_PLACE..).zip(self.place.note()) {
            buffer.page().set(slot, number);
        }
        buffer.page().set(SLOT_INPUT, self.known());
    }

    fn known(&self) -> u64 {
        if self.guessed { GUESSED } else { KNOWN }
    }

    /// Sends what waits; true if anything went.
    pub fn send(&mut self, buffer: &mut Buffer) -> Result<bool, Fault> {
        let Some(fd) = self.port.fd().filter(|_| self.writable && buffer.waits()) else { return Ok(false) };
        match buffer.send(fd) {
            Ok(all) => {
                self.writable = all;
                Ok(true)
            }
            Err(errno) if is_want(errno) => {
                log::warn!("{}; output waits", Fault::errno("writing", "the stream port", errno));
                self.writable = false;
                self.starved = Some(now() + PAUSE);
                Ok(false)
            }
            Err(errno) => {
                log::info!("{}", Fault::errno("writing", "the stream port", errno));
                self.writable = false;
                self.hung_up = true;
                Ok(false)
            }
        }
    }

    fn may_read(&self, processes: &Processes, buffer: &Buffer) -> bool {
        self.readable && !processes.input_is_full() && (buffer.has_room_for_answers() || self.is_gone())
    }

    /// Whether this host will not be back: the next one is another connection.
    fn is_gone(&self) -> bool {
        self.hung_up && self.port.listener().is_some()
    }

    /// Reads a chunk from the host, if all its processes have room; true if something came, or may now.
    pub fn read(&mut self, processes: &mut Processes, buffer: &mut Buffer) -> Result<bool, Fault> {
        let mut total = 0;
        while total < CHUNK
            && self.may_read(processes, buffer)
            && let Some(fd) = self.port.fd()
        {
            // The host speaks of a process only after it was handed over.
            processes.receive(buffer);
            if self.hearing == Hearing::Frames {
                buffer.page().set(SLOT_INPUT, READING);
            }
            match read(fd, &mut self.chunk) {
                Ok(0) => {
                    self.readable = false;
                    self.hung_up = true;
                }
                Ok(count) => {
                    total += count;
                    self.hear(count, processes, buffer)?;
                }
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    self.readable = false;
                    if self.hearing == Hearing::Frames {
                        buffer.page().set(SLOT_INPUT, self.known());
                    }
                    if errno == Errno::EAGAIN {
                        self.silence.goes_on(Instant::now());
                    } else {
                        log::info!("{}", Fault::errno("reading", "the stream port", errno));
                        self.hung_up = true;
                    }
                }
            }
        }
        processes.flush();
        // What has just made room for more may have no event to tell of it.
        Ok(total > 0 || self.port.fd().is_some() && self.may_read(processes, buffer))
    }

    /// Acts on the first `count` bytes of the chunk.
    fn hear(&mut self, count: usize, processes: &mut Processes, buffer: &mut Buffer) -> Result<(), Fault> {
        if let Hearing::Lost { quiet } = &mut self.hearing {
            *quiet = now() + QUIET;
        }
        self.pause = self.guessed.then(|| now() + QUIET);
        if std::mem::take(&mut self.anew) && self.hearing == Hearing::Frames {
            self.hear_frames(buffer);
        }
        if self.hearing != Hearing::Frames {
            processes.end_inputs();
            return Ok(());
        }
        let held;
        let bytes = if self.seam.is_some() {
            let Some(bytes) = self.heard(count, processes, buffer) else { return Ok(()) };
            held = bytes;
            &held[..]
        } else {
            self.chunk.get(..count).unwrap_or_default()
        };
        // First of all: until it is noted, a kill makes a successor throw away what it reads.
        if self.place.pass(bytes) {
            self.note_place(buffer);
        } else if !self.guessed {
            buffer.page().set(SLOT_INPUT, VIOLATED);
        }
        let skip = self.skip.min(bytes.len());
        self.skip -= skip;
        self.decoder.push(bytes.get(skip..).unwrap_or_default());
        // Who is gone must not keep its last words from being read by answers that nobody takes.
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

    /// The bytes of the host make no sense.
    fn violated(&mut self, violation: &Violation, processes: &mut Processes) {
        let line = self.port.is_line();
        let until = if line || self.guessed { "pauses" } else { "connects again" };
        log::warn!("the host sent {violation}: not listening until it {until}");
        if self.guessed {
            // What was thrown away, or misunderstood, was somebody's.
            processes.end_inputs();
        } else {
            processes.hold_none();
            self.hang_up();
        }
        self.hearing = match line || self.guessed {
            true => Hearing::Lost { quiet: now() + QUIET },
            false => Hearing::Deaf,
        };
    }

    /// When [`Host::tick`] has something to do.
    pub fn deadline(&self) -> Option<Duration> {
        let quiet = match self.hearing {
            Hearing::Lost { quiet } => Some(quiet),
            Hearing::Frames | Hearing::Deaf => None,
        };
        let others = [self.starved, self.short, self.pause, self.patience];
        quiet.into_iter().chain(others.into_iter().flatten()).min()
    }

    /// A host that has been silent for long enough is listened to again.
    pub fn tick(&mut self, processes: &mut Processes, buffer: &Buffer) {
        if self.starved.is_some_and(|until| now() >= until) {
            self.starved = None;
            self.writable = true;
        }
        self.short = self.short.filter(|&until| now() < until);
        if self.pause.is_some_and(|until| now() >= until) {
            // It cannot be said to be silent, or whose the frame is.
            let unsure = self.readable || self.unsure.is_some_and(|until| now() < until);
            self.pause = unsure.then(|| now() + QUIET);
            let known = |number| is_known(number, processes, buffer);
            let lost = self.hearing == Hearing::Frames && self.place.is_inside_nobodys(known);
            if lost && self.pause.is_none() && self.seam.is_none() {
                log::warn!("the host has paused in a frame for nobody: taken for no frame");
                // What it swallowed was somebody's.
                processes.end_inputs();
                self.hear_frames(buffer);
            }
        }
        if let Hearing::Lost { quiet } = self.hearing
            && now() >= quiet
        {
            if self.readable {
                // It cannot be said to be silent.
                self.hearing = Hearing::Lost { quiet: now() + QUIET };
            } else {
                log::warn!("the host has paused: listening again");
                self.guessed = true;
                self.hear_frames(buffer);
            }
        }
    }
}

/// One frame from the host; false if nobody has or had its stream.
fn stdin(number: u64, payload: &[u8], processes: &mut Processes, buffer: &Buffer) -> bool {
    StreamId::new(number)
        .is_none_or(|stdio| processes.push(stdio, payload) || buffer.find_end(stdio).is_some())
}

/// Whether somebody has or had this stream.
fn is_known(number: u64, processes: &Processes, buffer: &Buffer) -> bool {
    number == flow::STREAM
        || StreamId::new(number)
            .is_some_and(|stream| processes.knows(stream) || buffer.find_end(stream).is_some())
}

/// Whether a frame is a word of flow control.
fn is_word(number: u64, payload: &[u8]) -> bool {
    number == flow::STREAM && Ask::decode(payload).is_some()
}

/// Heeds one.
fn heed(payload: &[u8], processes: &mut Processes, buffer: &mut Buffer) -> Result<(), Fault> {
    match Ask::decode(payload) {
        Some(Ask::Hold(stream)) => processes.hold(stream, true),
        Some(Ask::Go(stream)) => processes.hold(stream, false),
        Some(Ask::Begin) => {
            buffer.page().set(SLOT_FLOW, 1);
            match say(BEGUN, buffer) {
                // It asks again (host/client/src/mux).
                Err(fault) if is_no_memory(&fault) => log::warn!("{fault}; the host is not answered"),
                said => said?,
            }
        }
        None => {}
    }
    Ok(())
}

/// An unknown stream is answered by its end.
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

    /// A device whose hosts are only told apart by what a test says of them, as virtio-serial's are by the kernel.
    struct World {
        outside: OwnedFd,
        host: Host,
        processes: Processes,
        buffer: Buffer,
    }

    impl World {
        fn new() -> World {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let (outside, port) = socketpair(AddressFamily::Unix, SockType::Stream, None, flags).unwrap();
            let epoll = Rc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
            let mut buffer = own_buffer(true).unwrap();
            let host = Host::open(Rc::clone(&epoll), Port::Device(port), &mut buffer).unwrap();
            World { outside, host, processes: Processes::new(epoll, None), buffer }
        }

        fn say(&mut self, bytes: &[u8]) {
            assert_eq!(write(&self.outside, bytes), Ok(bytes.len()));
            self.round(EpollFlags::EPOLLIN);
        }

        /// As the engine has it; true if the host has left.
        fn round(&mut self, events: EpollFlags) -> bool {
            self.host.event(events);
            while self.host.read(&mut self.processes, &mut self.buffer).unwrap() {}
            self.host.send(&mut self.buffer).unwrap();
            self.host.part(&mut self.processes, &mut self.buffer).unwrap()
        }

        /// Nobody has any stream, so each frame that was understood is answered by its end: of which streams.
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

    /// Where the kernel had no memory to write to a stdin, nothing tells when it has: the next attempt is all there is.
    #[test]
    fn the_host_is_read_when_its_stdin_could_be_written_without_an_event() {
        let mut world = World::new();
        let (execd, socket) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_NONBLOCK).unwrap();
        world.processes = Processes::new(Rc::clone(&world.host.epoll), Some(socket));
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
        assert!(world.host.read(&mut world.processes, &mut world.buffer).unwrap(), "there is more");
        assert!(world.host.read(&mut world.processes, &mut world.buffer).unwrap());
        assert!(!world.host.read(&mut world.processes, &mut world.buffer).unwrap());
    }

    /// The new host's first bytes come before anything tells that there is one.
    #[test]
    fn what_a_host_sent_before_the_last_one_is_known_to_have_left_is_not_lost() {
        for size in [0, 40] {
            let [first, second] = [5, 6].map(|number| frame::stream(number, &vec![b'x'; size]).unwrap());
            for cut in 1..first.len() {
                let mut world = World::new();
                world.say(&first[..cut]);
                assert!(world.round(EpollFlags::EPOLLHUP));
                world.say(&first[cut..]);
                world.say(&second);
                assert_eq!(world.answered(), [5, 6], "cut at {cut} of {}", first.len());
            }
        }
    }

    /// A host leaves in the middle of a frame, and is known to have left when the next one comes.
    #[test]
    fn half_a_frame_of_a_host_that_left_is_no_part_of_anothers() {
        let (first, second) = (frame::stream(5, &[b'x'; 40]).unwrap(), frame::stream(6, b"").unwrap());
        for cut in 1..first.len() {
            let mut world = World::new();
            world.say(&first[..cut]);
            assert!(world.round(EpollFlags::EPOLLHUP));
            // In portions too, unless the first could be the rest of what was begun.
            let portion = if first.len() - cut < second.len() { 0 } else { cut % second.len() };
            world.say(&second[..portion]);
            world.say(&second[portion..]);
            world.say(&first);
            assert_eq!(world.answered(), [6, 5], "cut at {cut}");
        }
    }
}

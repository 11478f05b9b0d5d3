//! One guest, many hosts: the owner of the guest's two channels serves the hosts of this machine over
//! channels of their own.
//!
//! Everything happens in one thread that blocks only in poll(2), so a host that does not read, or stops in
//! the middle of a frame, delays no other. Frames are passed on whole, so half a command never reaches the
//! guest. Replies are matched to commands in order, because the guest answers in order.

mod host_socket;
mod line;
mod processes;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

use super::Finished;
use super::credit::Outgoing;
use super::encode::encode;
use hyperinit_protocol::command::Command;
use hyperinit_protocol::fault::{Fault, OrFault};
use hyperinit_protocol::flow::{self, Ask, Credit};
use hyperinit_protocol::frame::{self, CONTROL_MAX, ControlDecoder, Message, StreamDecoder, Violation};

pub use host_socket::{HostSocket, MUX_SOCKET, enter, is_served};
use line::{Came, Line};
use processes::{Goodbye, Processes};

/// How many bytes are read from a socket at once.
const CHUNK: usize = 64 << 10;
/// How many commands of one host may be in flight. The guest takes 256 from all hosts together and then no
/// more.
const COMMANDS_MAX: usize = 16;
/// No more commands are read from a host while this many bytes of its commands and replies are outstanding. A
/// READFILE counts as much as the largest file.
const BYTES_MAX: usize = 1 << 20;
/// No more stdin is read from any host while this many bytes of stdin wait for the guest.
const STDIN_MAX: usize = 256 << 10;
/// The guest's stream channel is not read while one host has this many bytes of output unread: a guest that
/// cannot hold the output of single processes has to hold all.
const OUTPUT_MAX: usize = 64 << 20;
/// A host's processes are held while the host has this many bytes of output unread: they wait, as on a full
/// pipe.
const HELD: usize = 256 << 10;
/// The maximum number of stdin bytes in one frame.
const STDIN_FRAME: usize = 32 << 10;
/// How long to wait before asking the guest again whether it has flow control: it may have had no memory for
/// the answer.
const ASK_AGAIN: Duration = Duration::from_secs(2);
/// How long hosts may take to read what is left once the guest has ended.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How long the control channel of a guest that is ending may outlive its stream channel.
const ENDING: Duration = Duration::from_secs(10);
/// How long no host is let in after a host could not be let in for want of descriptors.
const REST: Duration = Duration::from_millis(500);

/// A host of this machine, numbered in order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Visitor(u64);

/// A host's two channels.
#[derive(Debug)]
struct Host {
    control: Line,
    stream: Line,
    commands: ControlDecoder,
    input: StreamDecoder,
    /// A frame of stdin that has not been sent to its end, because its process does not read.
    rest: Option<Rest>,
    /// The guest was told to hold the output of some of this host's processes.
    holds: bool,
    /// The number of commands without a reply; `weight` is what they count, in bytes.
    under_way: usize,
    weight: usize,
}

/// The rest of a frame of stdin.
#[derive(Debug)]
struct Rest {
    /// The guest's number of the stream.
    stdin: u64,
    payload: Vec<u8>,
    /// How many bytes of the payload were sent.
    sent: usize,
}

/// Whether the guest has flow control of single streams ([`flow`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum HasFlow {
    /// Not known yet. The guest is asked once it is ready, and again at this time if it has not answered.
    Asked(Option<Instant>),
    Yes,
    No,
}

/// The guest's two channels.
#[derive(Debug)]
struct Guest {
    control: Line,
    stream: Line,
    outgoing: Outgoing,
    replies: ControlDecoder,
    output: StreamDecoder,
    /// READY has come.
    ready: bool,
    flow: HasFlow,
    /// When the stream channel ended.
    stream_ended: Option<Instant>,
}

/// A command that the guest has not answered.
#[derive(Debug)]
struct Owed {
    /// The host that gets the reply; `None` if it is for no host.
    visitor: Option<Visitor>,
    /// The position of the command's last byte, counted over all bytes sent.
    end: u64,
    weight: usize,
    /// The guest's numbers of the processes that the command starts.
    started: Vec<u64>,
    /// Why a command was refused here. A PING is sent in its place, so that the refusal is answered in its
    /// turn.
    refusal: Option<String>,
}

/// The state of the server.
#[derive(Debug)]
struct Mux {
    socket: HostSocket,
    guest: Guest,
    hosts: BTreeMap<Visitor, Host>,
    processes: Processes,
    owed: VecDeque<Owed>,
    /// The last host that has come; `served` is the last host whose stdin was read.
    last: Visitor,
    served: Visitor,
    /// No host is let in until this time.
    closed: Option<Instant>,
    chunk: Vec<u8>,
}

/// A socket of the server.
#[derive(Debug, Clone, Copy)]
enum Who {
    GuestStream,
    GuestControl,
    Stream(Visitor),
    Control(Visitor),
    HostSocket,
}

/// Serves hosts until the guest or its connection ends, and returns the reason. Both sockets are connected to
/// the guest, and nothing has been read from them. Hosts are let in once the guest has sent READY. `chunk` is
/// how many control bytes are sent before the guest has credited them: the larger it is, the sooner a large
/// file stops delaying other commands.
pub fn serve(socket: HostSocket, control: UnixStream, stream: UnixStream, chunk: usize) -> Fault {
    let guest = match (Line::new(control), Line::new(stream)) {
        (Ok(control), Ok(stream)) => Guest {
            control,
            stream,
            outgoing: Outgoing::new(chunk),
            replies: ControlDecoder::default(),
            output: StreamDecoder::default(),
            ready: false,
            flow: HasFlow::Asked(None),
            stream_ended: None,
        },
        (Err(error), _) | (_, Err(error)) => return Fault::io("setting up", "the guest's channels", &error),
    };
    let mut mux = Mux {
        socket,
        guest,
        hosts: BTreeMap::new(),
        processes: Processes::default(),
        owed: VecDeque::new(),
        last: Visitor(0),
        served: Visitor(0),
        closed: None,
        chunk: vec![0; CHUNK],
    };
    let why = loop {
        if let Err(why) = mux.turn() {
            break why;
        }
    };
    mux.last_words();
    why
}

impl Mux {
    /// Waits for events and handles them. The error is the guest's end.
    fn turn(&mut self) -> Result<(), Fault> {
        for (who, flags) in self.wait()? {
            let gone = flags.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
            let read = gone || flags.contains(PollFlags::POLLIN);
            match who {
                Who::GuestStream => {
                    self.guest.stream.told(flags);
                    if read {
                        self.hear_output(gone)?;
                    }
                }
                Who::GuestControl => {
                    self.guest.control.told(flags);
                    if read {
                        self.hear_replies(gone)?;
                    }
                }
                Who::Stream(visitor) | Who::Control(visitor) => self.host_event(visitor, who, flags),
                Who::HostSocket => self.let_in(),
            }
        }
        self.flush()
    }

    /// Waits in poll(2) and returns the sockets with events. The guest comes first, its output before its
    /// events.
    fn wait(&mut self) -> Result<Vec<(Who, PollFlags)>, Fault> {
        let now = Instant::now();
        self.closed = self.closed.filter(|&until| now < until);
        self.ask_for_flow(now);
        let ending = self.guest.stream_ended.map(|since| since + ENDING);
        if ending.is_some_and(|until| now >= until) {
            return Err(lost("the guest closed the stream channel"));
        }
        let fits = self.hosts.values().all(|host| host.stream.waiting() < OUTPUT_MAX);
        let takes_stdin = self.guest.stream.waiting() < STDIN_MAX;
        let mut all = Vec::with_capacity(3 + 2 * self.hosts.len());
        if self.guest.stream_ended.is_none() {
            let interest = self.guest.stream.interest(fits);
            all.push((Who::GuestStream, self.guest.stream.as_fd(), interest));
        }
        all.push((Who::GuestControl, self.guest.control.as_fd(), self.guest.control.interest(true)));
        // Round robin: the hosts after the one whose stdin was read last come first.
        let behind = self.hosts.range((Bound::Excluded(self.served), Bound::Unbounded));
        for (&visitor, host) in behind.chain(self.hosts.range(..=self.served)) {
            // Control before stream: the command that starts a process is handled before its stdin.
            all.push((Who::Control(visitor), host.control.as_fd(), host.control.interest(host.has_room())));
            let takes_stdin = takes_stdin && host.rest.is_none();
            all.push((Who::Stream(visitor), host.stream.as_fd(), host.stream.interest(takes_stdin)));
        }
        let asked = match self.guest.flow {
            HasFlow::Asked(again) => Some(again),
            HasFlow::Yes | HasFlow::No => None,
        };
        if asked.is_none() && self.closed.is_none() {
            all.push((Who::HostSocket, self.socket.as_fd(), PollFlags::POLLIN));
        }
        let mut fds: Vec<_> = all.iter().map(|&(_, fd, flags)| PollFd::new(fd, flags)).collect();
        let until = ending.into_iter().chain(self.closed).chain(asked.flatten()).min();
        let left = until.map(|until| until.saturating_duration_since(now).max(Duration::from_millis(1)));
        let left = left.map_or(PollTimeout::NONE, |left| left.try_into().unwrap_or(PollTimeout::MAX));
        match poll(&mut fds, left) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Fault::errno("waiting for", "hosts and the guest", errno)),
        }
        let told = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty()));
        let told = all.iter().map(|&(who, ..)| who).zip(told);
        Ok(told.filter(|(_, flags)| !flags.is_empty()).collect())
    }

    /// Asks a guest that is ready for flow control, as the first message on its stream channel. No host is
    /// let in before it has answered.
    fn ask_for_flow(&mut self, now: Instant) {
        if let HasFlow::Asked(again) = self.guest.flow
            && self.guest.ready
            && again.is_none_or(|again| now >= again)
        {
            self.guest.flow = HasFlow::Asked(Some(now + ASK_AGAIN));
            self.guest.stream.push(&Ask::Begin.frame());
            // A new guest has read nothing yet, so the socket has room. If writing fails, the next flush
            // tries again.
            let _ = self.guest.stream.flush();
        }
    }

    /// Reads a chunk of the processes' output; all of it once the guest has left.
    fn hear_output(&mut self, gone: bool) -> Result<(), Fault> {
        loop {
            match self.guest.stream.read(&mut self.chunk) {
                Came::Bytes(count) => self.take_output(count)?,
                Came::Nothing => return Ok(()),
                Came::End => {
                    self.guest.stream_ended = Some(Instant::now());
                    return Ok(());
                }
            }
            if !gone {
                return Ok(());
            }
        }
    }

    fn take_output(&mut self, count: usize) -> Result<(), Fault> {
        let Mux { guest, hosts, processes, chunk, .. } = self;
        guest.output.push(chunk.get(..count).unwrap_or_default());
        let mut credited = Vec::new();
        while let Some(frame) = guest.output.next_frame().map_err(broken)? {
            let (number, payload) = (frame.tag, frame.payload);
            if number == flow::STREAM {
                match Credit::decode(payload) {
                    Some(flow::BEGUN) => guest.flow = HasFlow::Yes,
                    Some(credit) => credited.extend(processes.credited(credit)),
                    // A guest without flow control answers with the end of an unknown stream.
                    None => guest.flow = HasFlow::No,
                }
                continue;
            }
            // A guest answers a frame for a stream that has ended with another end.
            if processes.has_ended(number) {
                continue;
            }
            let whose = processes.of_guest(number);
            if let Some((host, whose)) = whose.and_then(|whose| Some((hosts.get_mut(&whose.visitor)?, whose)))
            {
                host.stream.push(&frame::stream_header(whose.number, payload.len()).map_err(broken)?);
                host.stream.push(payload);
                if guest.flow == HasFlow::Yes
                    && host.stream.waiting() > HELD
                    && processes.holds(number, payload.len())
                {
                    host.holds = true;
                    guest.stream.push(&Ask::Hold(number).frame());
                }
            }
            if payload.is_empty() {
                processes.ended(number);
                // The rest of its stdin is discarded.
                credited.extend(whose.map(|whose| whose.visitor));
            }
        }
        credited.into_iter().for_each(|visitor| self.feed(visitor, false));
        Ok(())
    }

    /// Reads a chunk of replies and events; all of them once the guest has left. The error is the guest's
    /// end.
    fn hear_replies(&mut self, gone: bool) -> Result<(), Fault> {
        loop {
            match self.guest.control.read(&mut self.chunk) {
                Came::Bytes(count) => {
                    let mut decoder = std::mem::take(&mut self.guest.replies);
                    decoder.push(self.chunk.get(..count).unwrap_or_default());
                    while let Some(frame) = decoder.next_frame().map_err(broken)? {
                        self.take_reply(frame.tag, frame.payload).map_err(lost)?;
                    }
                    self.guest.replies = decoder;
                }
                Came::Nothing => return Ok(()),
                Came::End => {
                    if self.guest.stream_ended.is_none() {
                        self.hear_output(true)?;
                    }
                    return Err(lost("the guest closed the control channel"));
                }
            }
            if !gone {
                return Ok(());
            }
        }
    }

    /// Handles one frame from the guest; the error tells how the guest broke the protocol.
    fn take_reply(&mut self, id: u32, payload: &[u8]) -> Result<(), String> {
        match Message::from_id(id) {
            Some(Message::Next) => self.guest.outgoing.take_next(payload),
            Some(message @ (Message::Ack | Message::Error)) => self.pass_reply(message, payload),
            Some(Message::ProcessAsyncEvent) => {
                let visitor = self.processes.finished(&Finished::parse(payload)?);
                if let Some(host) = visitor.and_then(|visitor| self.hosts.get_mut(&visitor)) {
                    host.say(Message::ProcessAsyncEvent, payload);
                }
                Ok(())
            }
            Some(Message::Ready) => {
                self.guest.ready = true;
                // Tells the guest that the hosts of this machine keep reading after a process has ended.
                if let Ok((message, payload)) = encode(&Command::Features) {
                    self.say(message, &payload);
                }
                Ok(())
            }
            Some(message) => Err(format!("the guest sent {message}, which only a host does")),
            None => Err(format!("the guest sent message {id}")),
        }
    }

    fn pass_reply(&mut self, message: Message, payload: &[u8]) -> Result<(), String> {
        let owed = self.owed.pop_front().ok_or("the guest sent a reply to no command")?;
        self.guest.outgoing.check_answered(owed.end)?;
        if message == Message::Error {
            self.processes.refused(&owed.started);
        }
        let Some((visitor, host)) = owed.visitor.and_then(|who| Some((who, self.hosts.get_mut(&who)?)))
        else {
            return Ok(());
        };
        host.under_way -= 1;
        host.weight -= owed.weight;
        match owed.refusal {
            Some(why) => host.say(Message::Error, why.as_bytes()),
            None => host.say(message, payload),
        }
        // There is room now for commands that the host has sent meanwhile.
        self.take_commands(visitor, false);
        Ok(())
    }

    /// Handles an event at a host's socket.
    fn host_event(&mut self, visitor: Visitor, who: Who, flags: PollFlags) {
        let gone = flags.intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
        let Some(host) = self.hosts.get_mut(&visitor) else { return };
        let is_stream = matches!(who, Who::Stream(_));
        if is_stream { &mut host.stream } else { &mut host.control }.told(flags);
        let came = match (flags.contains(PollFlags::POLLIN), is_stream) {
            _ if gone => Came::End,
            (false, _) => Came::Nothing,
            // Other hosts may have used up the room in this round.
            (true, true) if self.guest.stream.waiting() >= STDIN_MAX => Came::Nothing,
            (true, true) => {
                self.served = visitor;
                self.hear_stdin(visitor)
            }
            (true, false) => self.hear_commands(visitor),
        };
        if came == Came::End {
            // Bytes that the host sent before it left still count. The sockets limit their number.
            while matches!(self.hear_commands(visitor), Came::Bytes(_)) {}
            self.take_commands(visitor, true);
            while matches!(self.hear_stdin(visitor), Came::Bytes(_)) {}
            self.feed(visitor, true);
            self.leave(visitor);
        }
    }

    /// Reads a chunk of commands, and passes on those that there is room for.
    fn hear_commands(&mut self, visitor: Visitor) -> Came {
        let Some(host) = self.hosts.get_mut(&visitor) else { return Came::Nothing };
        let came = host.control.read(&mut self.chunk);
        if let Came::Bytes(count) = came {
            host.commands.push(self.chunk.get(..count).unwrap_or_default());
            host.say(Message::Next, &u32::try_from(count).unwrap_or(u32::MAX).to_be_bytes());
            self.take_commands(visitor, false);
        }
        came
    }

    /// Passes on the complete commands that have come, while there is room for them and their replies, or
    /// `all` of them.
    fn take_commands(&mut self, visitor: Visitor, all: bool) {
        loop {
            let Some(host) = self.hosts.get_mut(&visitor).filter(|host| all || host.has_room()) else {
                return;
            };
            match host.commands.next_frame() {
                Ok(Some(frame)) => {
                    let (message, payload) = (frame.tag, frame.payload.to_vec());
                    self.command(visitor, message, payload);
                }
                Ok(None) => return,
                Err(violation) => return self.turn_out(visitor, &violation),
            }
        }
    }

    /// Passes a command on to the guest.
    fn command(&mut self, visitor: Visitor, message: u32, mut payload: Vec<u8>) {
        let file = if message == Message::ReadFile.id() { CONTROL_MAX } else { 0 };
        let weight = payload.len() + file;
        let heeded = self.processes.heed(visitor, message, &mut payload);
        let encoded = heeded.and_then(|started| match frame::control(message, &payload) {
            Ok(frame) => Ok((frame, started)),
            Err(violation) => {
                self.processes.refused(&started);
                Err(violation.to_string())
            }
        });
        if let Some(host) = self.hosts.get_mut(&visitor) {
            host.under_way += 1;
            host.weight += weight;
        }
        let (sent, started, refusal) = match encoded {
            Ok((frame, started)) => (frame, started, None),
            Err(why) => (frame::control(Message::Ping, b"null").unwrap_or_default(), Vec::new(), Some(why)),
        };
        let end = self.guest.outgoing.push(sent);
        self.owed.push_back(Owed { visitor: Some(visitor), end, weight, started, refusal });
    }

    /// Reads a chunk of stdin, and passes on what there is room for.
    fn hear_stdin(&mut self, visitor: Visitor) -> Came {
        let Some(host) = self.hosts.get_mut(&visitor) else { return Came::Nothing };
        let came = host.stream.read(&mut self.chunk);
        if let Came::Bytes(count) = came {
            host.input.push(self.chunk.get(..count).unwrap_or_default());
            self.feed(visitor, false);
        }
        came
    }

    /// Passes stdin on as far as its process has room, or `all` that has come.
    fn feed(&mut self, visitor: Visitor, all: bool) {
        let Mux { guest, hosts, processes, .. } = self;
        let Some(host) = hosts.get_mut(&visitor) else { return };
        let header = |number, length| frame::stream_header(number, length).unwrap_or_default();
        loop {
            if let Some(Rest { stdin, payload, sent }) = &mut host.rest {
                let left = payload.get(*sent..).unwrap_or_default();
                if left.is_empty() || processes.has_ended(*stdin) {
                    host.rest = None;
                    continue;
                }
                let room = match guest.flow {
                    HasFlow::Yes if !all => processes.room(*stdin),
                    HasFlow::Yes | HasFlow::No | HasFlow::Asked(_) => STDIN_FRAME,
                };
                let part = left.get(..room.min(STDIN_FRAME)).unwrap_or(left);
                if part.is_empty() {
                    return;
                }
                guest.stream.push(&header(*stdin, part.len()));
                guest.stream.push(part);
                processes.sent(*stdin, part.len());
                *sent += part.len();
                continue;
            }
            match host.input.next_frame() {
                Ok(None) => return,
                Ok(Some(frame)) => {
                    let ours = processes.of_host(visitor, frame.tag);
                    match ours.filter(|&ours| !processes.has_ended(ours)) {
                        Some(stdin) if frame.payload.is_empty() => guest.stream.push(&header(stdin, 0)),
                        Some(stdin) => {
                            host.rest = Some(Rest { stdin, payload: frame.payload.to_vec(), sent: 0 });
                        }
                        // A guest gives this answer to a frame for an unknown stream (protocol.md «Streams»).
                        None => host.stream.push(&header(frame.tag, 0)),
                    }
                }
                Err(violation) => return self.turn_out(visitor, &violation),
            }
        }
    }

    /// A host broke the protocol: only its connection is closed.
    fn turn_out(&mut self, visitor: Visitor, violation: &Violation) {
        log::warn!("{}", Fault::new("hearing", "a host of this machine", format!("it sent {violation}")));
        self.leave(visitor);
    }

    /// A host has left: the processes that it started by EXECCMD are ended, as if they had lost their
    /// terminal or their parent.
    fn leave(&mut self, visitor: Visitor) {
        if self.hosts.remove(&visitor).is_none() {
            return;
        }
        self.release(visitor);
        for Goodbye { container, process, signal } in self.processes.leave(visitor) {
            let payload = json!({"container": container, "process": process, "signal": signal}).to_string();
            self.say(Message::SignalProcess, payload.as_bytes());
        }
    }

    /// Sends the guest a message whose reply goes to no host.
    fn say(&mut self, message: Message, payload: &[u8]) {
        let Ok(frame) = frame::control(message, payload) else { return };
        let end = self.guest.outgoing.push(frame);
        self.owed.push_back(Owed { visitor: None, end, weight: 0, started: Vec::new(), refusal: None });
    }

    /// Tells the guest that it may take the output of a host's processes again.
    fn release(&mut self, visitor: Visitor) {
        for number in self.processes.release(visitor) {
            self.guest.stream.push(&Ask::Go(number).frame());
        }
    }

    /// Gives the next host at the socket its channels, and sends it READY.
    fn let_in(&mut self) {
        let channels = self.socket.receive().fault("letting in", "a host of this machine");
        let lines =
            channels.map(|both| both.map(|(control, stream)| (Line::new(control), Line::new(stream))));
        match lines {
            Ok(Some((Ok(control), Ok(stream)))) => {
                self.last = Visitor(self.last.0 + 1);
                let (commands, input) = (ControlDecoder::default(), StreamDecoder::default());
                let mut host = Host {
                    control,
                    stream,
                    commands,
                    input,
                    rest: None,
                    holds: false,
                    under_way: 0,
                    weight: 0,
                };
                host.say(Message::Ready, b"");
                self.hosts.insert(self.last, host);
            }
            Ok(_) => {}
            Err(fault) => {
                log::warn!("{fault}");
                self.closed = Some(Instant::now() + REST);
            }
        }
    }

    /// Writes what can be written. The error is the guest's end.
    fn flush(&mut self) -> Result<(), Fault> {
        let visitors: Vec<Visitor> = self.hosts.keys().copied().collect();
        for visitor in visitors {
            let Some(host) = self.hosts.get_mut(&visitor) else { continue };
            if host.control.flush().and_then(|()| host.stream.flush()).is_err() {
                self.leave(visitor);
                continue;
            }
            if host.holds && host.stream.waiting() < HELD / 4 {
                host.holds = false;
                self.release(visitor);
            }
            self.take_commands(visitor, false);
        }
        if let Some(chunk) = self.guest.outgoing.next_chunk() {
            self.guest.control.push(&chunk);
        }
        // An error means that the guest has left. Its channels are still read to their end.
        let _ = self.guest.control.flush();
        let _ = self.guest.stream.flush();
        Ok(())
    }

    /// The guest has ended: hosts still get what it has sent.
    fn last_words(&mut self) {
        let until = Instant::now() + LAST_WORDS;
        loop {
            self.hosts.retain(|_, host| {
                let sound = host.control.flush().and_then(|()| host.stream.flush()).is_ok();
                sound && host.control.waiting() + host.stream.waiting() > 0
            });
            let left = until.saturating_duration_since(Instant::now());
            if self.hosts.is_empty() || left.is_zero() {
                return;
            }
            let lines = || self.hosts.values().flat_map(|host| [&host.control, &host.stream]);
            let mut fds: Vec<_> =
                lines().map(|line| PollFd::new(line.as_fd(), line.interest(false))).collect();
            let left = left.max(Duration::from_millis(1)).try_into().unwrap_or(PollTimeout::MAX);
            if poll(&mut fds, left).is_err_and(|errno| errno != Errno::EINTR) {
                return;
            }
            let told: Vec<_> = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::empty())).collect();
            let lines = self.hosts.values_mut().flat_map(|host| [&mut host.control, &mut host.stream]);
            lines.zip(told).for_each(|(line, flags)| line.told(flags));
        }
    }
}

impl Host {
    /// Whether one more of this host's commands may be in flight.
    fn has_room(&self) -> bool {
        self.under_way < COMMANDS_MAX && self.weight + self.control.waiting() < BYTES_MAX
    }

    fn say(&mut self, message: Message, payload: &[u8]) {
        // Encoding cannot fail: the payload came in a frame, or it is short.
        self.control.push(&frame::control(message, payload).unwrap_or_default());
    }
}

fn lost(why: impl Into<String>) -> Fault {
    Fault::new("serving", "the guest", why.into())
}

fn broken(violation: Violation) -> Fault {
    lost(format!("it sent {violation}"))
}

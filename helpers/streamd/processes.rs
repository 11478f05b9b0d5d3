//! The processes' side of streamd. Descriptors arrive from execd; output is taken into the buffer in turns;
//! stdin is written as fast as processes read it; and the end of each exited process is written.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use hyperinit::clock::now;
use hyperinit::fault::{Fault, OrFault};
use hyperinit::flow::{self, Credit};
use hyperinit::ids::StreamId;
use hyperinit::port::edges;
use hyperinit::sys::fd::{peek, receive_fds};
use hyperinit::wire::streamd::{STREAMS_LEN, Streams as Packet, forgotten};
use nix::errno::Errno;
use nix::sys::epoll::Epoll;
use nix::unistd::read;

use super::buffer::{Buffer, CHUNK, SLOT_FLOW, Taken, is_no_memory};
use super::engine::{FIRST_TOKEN, nonblocking};
use super::input::{QUEUE_MAX, QUEUES_MAX, is_want};
use super::process::{End, Process, SURVIVOR_GRACE};
use super::waiting::{self, Waiting};

/// How long output waits after memory ran out.
pub const PAUSE: Duration = Duration::from_millis(100);

/// How many finished processes may have survivors (processes that still hold their pipes), whose output is
/// read and discarded. Beyond this number the pipes of the oldest are closed: init has forgotten these
/// processes, so nothing else bounds their number.
pub const SURVIVORS_MAX: usize = 256;
/// How many of execd's packets are taken in one round. This is more than an honest execd can have sent, so
/// every process that init or the host names has arrived. Further packets wait for the next round, so that a
/// flood of them delays nothing else for long.
const PACKETS_MAX: usize = 4 * 4096;
/// How many malformed packets are logged.
const TOLD_MAX: usize = 100;

/// The errors of a kernel that lacks the resources to receive or watch a descriptor.
const WANT: [Errno; 4] = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOSPC];

/// Exits, so that a successor receives all descriptors again. Without its descriptors a process would
/// silently have no output.
fn give_up(fault: &Fault) -> ! {
    log::error!("{fault}: a successor is needed");
    std::process::exit(1)
}

/// A source of output: its process, and its index among the process's sources.
type SourceId = (StreamId, usize);

/// What an epoll token watches.
#[derive(Clone, Copy)]
enum Watched {
    Source(usize),
    Stdin,
}

/// All processes.
pub struct Processes {
    epoll: Rc<Epoll>,
    socket: Option<OwnedFd>,
    /// Whether the socket may have more packets.
    more: bool,
    /// How many malformed packets have arrived on the socket.
    refused: usize,
    by_stdio: BTreeMap<StreamId, Process>,
    /// The descriptor that each epoll token stands for. Tokens are never reused.
    tokens: HashMap<u64, (StreamId, Watched)>,
    next_token: u64,
    /// Sources that may have output, in the order of their turns.
    ready: VecDeque<SourceId>,
    /// The sources in `ready`, so that each is there once.
    is_ready: BTreeSet<SourceId>,
    /// Processes with bytes queued for their stdin.
    behind: BTreeSet<StreamId>,
    /// Processes whose stdin may have taken bytes that have not been reported to the host.
    untold: BTreeSet<StreamId>,
    /// Processes that have exited and whose end-of-stream frame has not been written.
    finishing: BTreeSet<StreamId>,
    /// Processes whose end has been written and which have survivors, oldest first.
    over: VecDeque<StreamId>,
    /// The requests that await an answer.
    pub waiting: Waiting,
    /// The time until which no output is taken, because there was no memory.
    paused: Option<Duration>,
    /// The time until which stdin is not written, because there was no memory.
    starved: Option<Duration>,
    /// The scratch space into which survivors' output is read.
    discarded: Vec<u8>,
}

impl Processes {
    /// Starts without processes; they arrive over the socket, if there is one.
    pub fn new(epoll: Rc<Epoll>, socket: Option<OwnedFd>) -> Processes {
        Processes {
            epoll,
            socket,
            more: false,
            refused: 0,
            by_stdio: BTreeMap::new(),
            tokens: HashMap::new(),
            next_token: FIRST_TOKEN,
            ready: VecDeque::new(),
            is_ready: BTreeSet::new(),
            behind: BTreeSet::new(),
            untold: BTreeSet::new(),
            finishing: BTreeSet::new(),
            over: VecDeque::new(),
            waiting: Waiting::default(),
            paused: None,
            starved: None,
            discarded: vec![0; CHUNK],
        }
    }

    // ---- descriptors ----

    /// The socket on which execd hands over processes.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.socket.as_ref().map(AsFd::as_fd)
    }

    /// Takes every process that execd has handed over. It runs before any message of init or the host is
    /// acted on: both name a process only after execd has handed it over.
    pub fn receive(&mut self, buffer: &mut Buffer) {
        // An empty packet looks like the end of the socket. In a guest the socket never ends.
        let mut empty = 0;
        self.more = false;
        for _ in 0..PACKETS_MAX {
            let Some(socket) = self.socket.as_ref().filter(|_| empty < 2) else { return };
            // One byte longer than a packet, so that a longer packet is recognised and refused.
            let mut packet = [0; STREAMS_LEN + 1];
            // The recorded end of an older process with this number is forgotten before the packet is taken:
            // if a kill came between the two, the successor would give the new process that end.
            let peeked = peek(socket, &mut packet).map(|count| packet.get(..count).and_then(Packet::decode));
            match peeked {
                Ok(Some(packet)) if !packet.again => buffer.forget_end(packet.stdio),
                Ok(_) => {}
                Err(Errno::EAGAIN) => return,
                // If its packet were not taken, a process would be treated as if it did not exist.
                Err(errno) if is_want(errno) => give_up(&Fault::errno("hearing from", "execd", errno)),
                Err(errno) => return self.refuse(&Fault::errno("hearing from", "execd", errno)),
            }
            let added = match receive_fds(socket, &mut packet) {
                Ok((0, _)) => {
                    empty += 1;
                    continue;
                }
                Ok((count, fds)) => self.take(packet.get(..count).unwrap_or_default(), fds, buffer),
                Err(errno) => Err(Fault::errno("hearing from", "execd", errno)),
            };
            empty = 0;
            match added {
                Ok(()) => {}
                Err(fault) if WANT.iter().any(|&errno| fault.is(errno)) => give_up(&fault),
                Err(fault) => self.refuse(&fault),
            }
        }
        self.more = true;
    }

    /// Takes the packets that the last round left in the socket; returns true if there may have been any.
    pub fn receive_more(&mut self, buffer: &mut Buffer) -> bool {
        let more = self.more;
        if more {
            self.receive(buffer);
        }
        more
    }

    /// Logs a malformed packet, up to [`TOLD_MAX`] of them: a faulty execd must not fill the log.
    fn refuse(&mut self, fault: &Fault) {
        self.refused += 1;
        match self.refused {
            ..=TOLD_MAX => log::error!("{fault}"),
            count if count == TOLD_MAX + 1 => log::error!("{fault}; more of these are not told"),
            _ => {}
        }
    }

    /// Acts on one packet from execd.
    fn take(&mut self, packet: &[u8], fds: Vec<OwnedFd>, buffer: &Buffer) -> Result<(), Fault> {
        if let Some(stdio) = forgotten(packet) {
            // If the process has exited, its output and that of its survivors is still taken.
            if self.by_stdio.get(&stdio).is_some_and(|process| process.end == End::Running) {
                self.remove(stdio);
            }
            return Ok(());
        }
        match Packet::decode(packet) {
            Some(packet) => self.add(&packet, fds, buffer),
            None => {
                let why = format!("{} bytes that are no streams", packet.len());
                Err(Fault::new("hearing from", "execd", why))
            }
        }
    }

    fn add(&mut self, packet: &Packet, fds: Vec<OwnedFd>, buffer: &Buffer) -> Result<(), Fault> {
        let stdio = packet.stdio;
        let running = |process: &Process| process.end != End::Finished;
        if packet.again && self.by_stdio.get(&stdio).is_some_and(running) {
            // This streamd already has the process: the descriptors are duplicates.
            return Ok(());
        }
        let refused = |why| Err(Fault::new("adding", format!("stream {stdio}"), why));
        // init waits for the end of the earlier process and starts nothing with its number before that.
        if self.finishing.contains(&stdio) {
            return refused("the one before has not ended");
        }
        let Some(mut process) = Process::new(packet, fds) else {
            return refused("its descriptors do not fit it");
        };
        if packet.again && buffer.find_end(stdio).is_some() {
            process.end = End::Finished;
        }
        self.remove(stdio);
        match self.watch(stdio, &process) {
            Ok(tokens) => process.tokens = tokens,
            Err(fault) => {
                self.tokens.retain(|_, (of, _)| *of != stdio);
                return Err(fault);
            }
        }
        let over = process.end == End::Finished;
        self.by_stdio.insert(stdio, process);
        self.mark_all_ready(stdio);
        if over {
            self.has_survivors(stdio);
        }
        Ok(())
    }

    fn watch(&mut self, stdio: StreamId, process: &Process) -> Result<Vec<u64>, Fault> {
        let mut tokens = Vec::new();
        let sources = process.sources.iter().enumerate();
        let sources =
            sources.filter_map(|(at, source)| Some((source.fd.as_ref()?.as_fd(), Watched::Source(at))));
        let stdin = process.stdin().map(|fd| (fd, Watched::Stdin));
        for (fd, watched) in sources.chain(stdin) {
            let token = self.next_token;
            self.next_token += 1;
            nonblocking(fd)?;
            self.epoll.add(fd, edges(token)).fault("watching", format!("stream {stdio}"))?;
            self.tokens.insert(token, (stdio, watched));
            tokens.push(token);
        }
        Ok(tokens)
    }

    fn remove(&mut self, stdio: StreamId) {
        let Some(process) = self.by_stdio.remove(&stdio) else { return };
        process.sources.into_iter().filter_map(|source| source.fd).for_each(|fd| self.close(fd));
        for token in process.tokens {
            self.tokens.remove(&token);
        }
        self.behind.remove(&stdio);
        self.finishing.remove(&stdio);
        self.over.retain(|other| *other != stdio);
    }

    /// Records a finished process whose pipes a survivor can still write to.
    fn has_survivors(&mut self, stdio: StreamId) {
        self.over.push_back(stdio);
        if self.over.len() > SURVIVORS_MAX
            && let Some(oldest) = self.over.pop_front()
        {
            log::info!("stream {oldest} is over for long: who still writes to it is not read any more");
            self.remove(oldest);
        }
    }

    /// Closes a source. execd holds a duplicate, so closing alone would leave the source in the epoll set.
    fn close(&self, fd: OwnedFd) {
        if let Err(errno) = self.epoll.delete(&fd) {
            log::info!("{}", Fault::errno("leaving", "a stream", errno));
        }
    }

    fn mark_ready(&mut self, source: SourceId) {
        if self.is_ready.insert(source) {
            self.ready.push_back(source);
        }
    }

    fn mark_all_ready(&mut self, stdio: StreamId) {
        let sources = self.by_stdio.get(&stdio).map_or(0, |process| process.sources.len());
        (0..sources).for_each(|place| self.mark_ready((stdio, place)));
    }

    /// Handles an epoll event of a process's descriptor.
    pub fn event(&mut self, token: u64) {
        match self.tokens.get(&token) {
            Some(&(stdio, Watched::Source(place))) => {
                self.mark_ready((stdio, place));
                // A tty also takes the process's stdin.
                self.flush_if_behind(stdio);
            }
            Some(&(stdio, Watched::Stdin)) => self.flush_if_behind(stdio),
            None => {}
        }
    }

    // ---- output ----

    /// Takes one chunk from each source that may have output, while there is room; returns true if any was
    /// taken.
    pub fn take_turns(&mut self, buffer: &mut Buffer) -> bool {
        // Only the tick ends a pause, because it also retries the ends.
        if self.paused.is_some() {
            return false;
        }
        let mut moved = false;
        for _ in 0..self.ready.len() {
            if !buffer.has_room() || self.paused.is_some() {
                break;
            }
            let Some(id) = self.ready.pop_front() else { break };
            self.is_ready.remove(&id);
            moved |= self.take_turn(id, buffer);
            self.advance_end(id.0, buffer);
        }
        moved
    }

    fn take_turn(&mut self, id: SourceId, buffer: &mut Buffer) -> bool {
        let (stdio, place) = id;
        let Some(process) = self.by_stdio.get_mut(&stdio) else { return false };
        let end = process.end;
        let Some(source) = process.sources.get_mut(place) else { return false };
        let Some(fd) = &source.fd else { return false };
        if source.held && end == End::Running {
            // [`Processes::hold`] marks it ready when the host wants the stream again.
            return false;
        }
        let taken = if end == End::Finished {
            Ok(discard(fd, &mut self.discarded))
        } else {
            buffer.take(source.stream, fd.as_fd(), source.tty)
        };
        match taken {
            Ok(Taken::Bytes(count)) => {
                process.taken = process.taken.saturating_add(count);
                source.owed = source.owed.saturating_sub(count);
                self.mark_ready(id);
                true
            }
            Ok(Taken::Nothing) => {
                source.owed = 0;
                false
            }
            // A running process may close its tty and open it again.
            Ok(Taken::HungUp) if end == End::Running => false,
            Ok(Taken::End | Taken::HungUp) => {
                self.end_source(id);
                false
            }
            Err(fault) if is_no_memory(&fault) => {
                self.pause(&fault);
                self.mark_ready(id);
                false
            }
            Err(fault) => {
                // This source is broken; the others are not.
                log::error!("{fault}");
                self.end_source(id);
                false
            }
        }
    }

    fn end_source(&mut self, (stdio, place): SourceId) {
        let Some(process) = self.by_stdio.get_mut(&stdio) else { return };
        let ended = process.sources.get_mut(place).and_then(|source| source.fd.take());
        let over = process.is_silent() && process.end == End::Finished;
        if let Some(fd) = ended {
            self.close(fd);
        }
        if over {
            self.remove(stdio);
        }
    }

    fn pause(&mut self, fault: &Fault) {
        log::warn!("{fault}; output waits");
        self.paused = Some(now() + PAUSE);
    }

    /// Holds the output of a stream or lets it go again, as the host asked. The end of the process does not
    /// wait for the host.
    pub fn hold(&mut self, stream: u64, held: bool) {
        let sources = self.by_stdio.iter_mut().flat_map(|(&stdio, process)| {
            process.sources.iter_mut().enumerate().map(move |(place, source)| ((stdio, place), source))
        });
        let found = sources.filter(|(_, source)| source.stream.get() == stream).map(|(id, source)| {
            source.held = held;
            id
        });
        let found: Vec<SourceId> = found.collect();
        found.into_iter().for_each(|id| self.mark_ready(id));
    }

    /// Lets all held streams go: the host that held them has left.
    pub fn hold_none(&mut self) {
        let streams = self.by_stdio.values().flat_map(|process| &process.sources);
        let held: Vec<u64> = streams.filter(|source| source.held).map(|source| source.stream.get()).collect();
        held.into_iter().for_each(|stream| self.hold(stream, false));
    }

    // ---- ends ----

    /// Begins the end of a process that has exited: its remaining output is taken, then its end-of-stream
    /// frame is written.
    pub fn finish(&mut self, stdio: StreamId, id: u64, pause: bool, buffer: &mut Buffer) {
        self.receive(buffer);
        // A predecessor wrote the end and died before it could answer.
        if let Some(end) = buffer.find_end(stdio) {
            self.waiting.add(id, end, unknown_pause(pause));
            return;
        }
        let process = self.by_stdio.entry(stdio).or_insert_with(Process::unknown);
        if process.end == End::Finished {
            self.waiting.add(id, buffer.end(), unknown_pause(pause));
            return;
        }
        process.finish(id, pause);
        self.behind.remove(&stdio);
        self.finishing.insert(stdio);
        self.mark_all_ready(stdio);
        self.advance_end(stdio, buffer);
    }

    /// Writes the end of an exited process once all of its output has been taken.
    fn advance_end(&mut self, stdio: StreamId, buffer: &mut Buffer) {
        let Some(process) = self.by_stdio.get_mut(&stdio) else { return };
        let End::Finishing { id, deadline, pause } = process.end else { return };
        if !process.is_silent() {
            if process.owes() {
                return;
            }
            // Everything that the process wrote has been taken; a survivor can still write.
            match deadline {
                None => {
                    let deadline = Some(now() + SURVIVOR_GRACE);
                    process.end = End::Finishing { id, deadline, pause };
                    return;
                }
                Some(deadline) if now() < deadline => return,
                Some(_) => {}
            }
        }
        let end = match buffer.append_end(stdio) {
            Ok(end) => end,
            Err(fault) => return self.pause(&fault),
        };
        process.end = End::Finished;
        let pause = if pause { waiting::pause(process.taken) } else { Duration::ZERO };
        self.waiting.add(id, end, pause);
        self.finishing.remove(&stdio);
        if process.is_silent() {
            self.remove(stdio);
        } else {
            self.has_survivors(stdio);
        }
    }

    /// Writes the ends that are due, and ends pauses that are over.
    pub fn tick(&mut self, buffer: &mut Buffer) {
        if self.deadline().is_none_or(|deadline| now() < deadline) {
            return;
        }
        self.paused = self.paused.filter(|&until| now() < until);
        // Every round of the engine flushes stdin, so nothing more is needed here.
        self.starved = self.starved.filter(|&until| now() < until);
        let due: Vec<StreamId> = self.finishing.iter().copied().collect();
        for stdio in due {
            // There would be no memory for the other ends either.
            if self.paused.is_some() {
                return;
            }
            self.advance_end(stdio, buffer);
        }
    }

    /// When [`Processes::tick`] has something to do.
    pub fn deadline(&self) -> Option<Duration> {
        if self.paused.is_some() {
            // A pause postpones ends too.
            return self.paused.into_iter().chain(self.starved).min();
        }
        let ends = self.finishing.iter().filter_map(|stdio| match self.by_stdio.get(stdio)?.end {
            End::Finishing { deadline, .. } => deadline,
            End::Running | End::Finished => None,
        });
        ends.chain(self.starved).min()
    }

    /// Whether a request still has to be answered.
    pub fn owes_an_answer(&self) -> bool {
        !self.waiting.is_empty() || !self.finishing.is_empty()
    }

    // ---- stdin ----

    /// Whether the host must wait because one process, or all together, have too much unread stdin.
    pub fn input_is_full(&self) -> bool {
        self.unread().any(|(_, unread)| unread >= QUEUE_MAX) || self.inputs_are_full()
    }

    /// Whether all processes together have too much unread stdin.
    fn inputs_are_full(&self) -> bool {
        self.unread().map(|(_, unread)| unread).sum::<usize>() >= QUEUES_MAX
    }

    /// The processes with unread stdin, and the number of unread bytes of each.
    fn unread(&self) -> impl Iterator<Item = (StreamId, usize)> + '_ {
        self.behind.iter().filter_map(|stdio| Some((*stdio, self.by_stdio.get(stdio)?.waiting())))
    }

    /// Ends the stdin of the processes that keep the host waiting.
    pub fn end_full_inputs(&mut self) {
        let all = self.inputs_are_full();
        let full = self.unread().filter(|&(_, unread)| all || unread >= QUEUE_MAX);
        for stdio in full.map(|(stdio, _)| stdio).collect::<Vec<_>>() {
            self.by_stdio.get_mut(&stdio).into_iter().for_each(Process::drop_input);
            self.behind.remove(&stdio);
            self.untold.insert(stdio);
        }
    }

    /// Queues the payload of one stdin frame; returns false if no process has this stream.
    /// [`Processes::flush`] writes what is queued.
    pub fn push(&mut self, stdio: StreamId, payload: &[u8]) -> bool {
        let Some(process) = self.by_stdio.get_mut(&stdio) else { return self.is_stderr(stdio) };
        process.push(payload);
        if process.is_starved() {
            self.starved = Some(now() + PAUSE);
        }
        self.untold.insert(stdio);
        if process.waiting() > 0 {
            self.behind.insert(stdio);
        } else {
            self.behind.remove(&stdio);
        }
        true
    }

    /// Whether a process has this stream.
    pub fn knows(&self, stream: StreamId) -> bool {
        self.by_stdio.contains_key(&stream) || self.is_stderr(stream)
    }

    fn is_stderr(&self, stream: StreamId) -> bool {
        self.by_stdio.values().any(|process| process.sources.iter().any(|source| source.stream == stream))
    }

    /// Writes the queued bytes to every stdin, until EAGAIN.
    pub fn flush(&mut self) {
        let behind: Vec<StreamId> = self.behind.iter().copied().collect();
        behind.into_iter().for_each(|stdio| self.flush_if_behind(stdio));
    }

    fn flush_if_behind(&mut self, stdio: StreamId) {
        if !self.behind.contains(&stdio) {
            return;
        }
        let waiting = self.by_stdio.get_mut(&stdio).map_or(0, |process| {
            process.flush();
            if process.is_starved() {
                self.starved = Some(now() + PAUSE);
            }
            process.waiting()
        });
        if waiting == 0 {
            self.behind.remove(&stdio);
        }
        self.untold.insert(stdio);
    }

    /// Reports to a host that has asked for flow control how many bytes of stdin no longer wait; returns true
    /// if there was anything to report.
    pub fn tell(&mut self, buffer: &mut Buffer) -> Result<bool, Fault> {
        let mut told = false;
        if buffer.page().get(SLOT_FLOW) == 0 {
            // A host that begins flow control later is told only of bytes from then on.
            for stdio in std::mem::take(&mut self.untold) {
                if let Some(process) = self.by_stdio.get_mut(&stdio) {
                    process.tell(process.untold());
                }
            }
        }
        while buffer.has_room_for_answers()
            && let Some(stdio) = self.untold.pop_first()
        {
            let Some(process) = self.by_stdio.get_mut(&stdio) else { continue };
            let bytes = process.untold();
            if bytes == 0 {
                continue;
            }
            match say(Credit { stdio: stdio.get(), bytes }, buffer) {
                Err(fault) if is_no_memory(&fault) => {
                    log::warn!("{fault}; the host is told later what was read");
                    self.untold.insert(stdio);
                    self.starved = Some(now() + PAUSE);
                    return Ok(told);
                }
                said => said?,
            }
            process.tell(bytes);
            told = true;
        }
        Ok(told)
    }

    /// Ends every stdin: some bytes from the host were lost, it is unknown which process they were for, and a
    /// gap in stdin is worse than its end.
    pub fn end_inputs(&mut self) {
        self.by_stdio.values_mut().for_each(Process::drop_input);
        self.untold.extend(self.by_stdio.keys());
        self.behind.clear();
        // The lost bytes may have been a request to let a held stream go.
        self.hold_none();
    }
}

/// Appends a flow control message for the host. Fails as [`Buffer::append`] does.
pub fn say(credit: Credit, buffer: &mut Buffer) -> Result<(), Fault> {
    match StreamId::new(flow::STREAM) {
        Some(stream) => buffer.append(stream, &credit.encode()),
        None => Ok(()),
    }
}

/// The pause for a process whose output an earlier streamd moved: the amount is unknown, so the longest pause
/// applies.
fn unknown_pause(pause: bool) -> Duration {
    if pause { waiting::pause(usize::MAX) } else { Duration::ZERO }
}

/// Reads and discards output, because a survivor must not get SIGPIPE.
fn discard(fd: &OwnedFd, to: &mut [u8]) -> Taken {
    match read(fd, to) {
        Ok(0) => Taken::End,
        Ok(count) => Taken::Bytes(count),
        Err(Errno::EAGAIN) => Taken::Nothing,
        Err(Errno::EINTR) => Taken::Bytes(0),
        Err(_) => Taken::End,
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::epoll::EpollCreateFlags;

    use super::super::engine::own_buffer;
    use super::*;

    const ID: u64 = 5;

    /// An exited process without further output. `deadline` is when the grace period of its survivors ends.
    fn finishing(deadline: Option<Duration>) -> Processes {
        let epoll = Rc::new(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap());
        let mut processes = Processes::new(epoll, None);
        let stdio = StreamId::new(1).unwrap();
        let mut process = Process::unknown();
        process.end = End::Finishing { id: ID, deadline, pause: false };
        processes.by_stdio.insert(stdio, process);
        processes.finishing.insert(stdio);
        processes
    }

    /// There was no memory for the end of the process. The end is tried again after the pause, whatever else
    /// happens then.
    #[test]
    fn an_end_is_not_lost_by_a_pause() {
        let mut buffer = own_buffer(true).unwrap();
        let mut processes = finishing(None);
        processes.paused = Some(now());
        assert!(!processes.take_turns(&mut buffer));
        assert!(processes.deadline().is_some_and(|deadline| deadline <= now()), "it is not waited for");
        processes.tick(&mut buffer);
        assert_eq!(processes.waiting.owed(), [ID]);
        assert!(processes.deadline().is_none() && buffer.waits());
    }

    #[test]
    fn nothing_is_due_in_a_pause() {
        let mut buffer = own_buffer(true).unwrap();
        let mut processes = finishing(Some(now()));
        let until = now() + Duration::from_secs(60);
        processes.paused = Some(until);
        processes.tick(&mut buffer);
        assert_eq!(processes.deadline(), Some(until), "that would be a loop that never waits");
        // A retry of stdin is due even in a pause.
        processes.starved = Some(now());
        assert!(processes.deadline().is_some_and(|deadline| deadline <= now()));
        processes.tick(&mut buffer);
        assert_eq!((processes.deadline(), processes.waiting.owed()), (Some(until), vec![]));
    }
}

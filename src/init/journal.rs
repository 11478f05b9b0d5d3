//! The log of the helpers and the warden. Each sender has a channel of its own, on which it may write any
//! bytes. init puts the sender's name on every line and writes the line to the log. init takes only two
//! things from the bytes: where a line ends, and its level.
//!
//! A channel is a socket of packets, one for each write. Reading a packet neither blocks nor allocates, and a
//! line is written by one write.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::OwnedFd;
use std::time::Duration;

use log::Level;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use crate::fault::Fault;
use crate::logger;
use crate::sys::fd::receive_cut;
use crate::wire::Instance;

/// The first epoll token of a channel.
pub const LOGS: u64 = 1 << 32;
/// How many lines of one sender are written in a second, and how many bytes of them. Further lines are
/// counted.
const LINES_MAX: u32 = 512;
const BYTES_MAX: usize = 128 << 10;
/// A sender that has had this many further lines dropped is not read until the second is over. Its channel
/// then fills up, which costs the sender lines and PID 1 nothing.
const DROPPED_MAX: u32 = 4096;
const SECOND: Duration = Duration::from_secs(1);
/// The longest packet in bytes; a longer one is cut. A line is shorter (logger.rs).
const PACKET_MAX: usize = 1024;
/// How many packets of one channel are read in one turn.
const PACKETS_MAX: usize = 32;
/// How many packets of a dead sender are read. It is more than a channel holds, because another process may
/// be writing to the channel.
const LAST_MAX: usize = 1024;
/// How many channels of dead senders are kept while a process has the other end open. The processes that
/// execd has started have execd's channel, and the pod init outlives execd.
const FORMER_MAX: usize = 8;

/// The sender on a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sender {
    /// The warden.
    Warden,
    /// A helper, and the processes that it starts until they have streams of their own.
    Helper(Instance),
}

impl Sender {
    /// The sender's name in the log.
    fn name(self) -> &'static str {
        match self {
            Sender::Warden => "warden",
            Sender::Helper(helper) => helper.role().name(),
        }
    }
}

impl fmt::Display for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sender::Warden => f.write_str(self.name()),
            Sender::Helper(helper) => helper.fmt(f),
        }
    }
}

/// One channel.
struct Channel {
    sender: Sender,
    socket: OwnedFd,
    /// The sender has died.
    is_former: bool,
}

/// The sender's output in the present second.
#[derive(Debug, Default)]
struct Said {
    since: Duration,
    lines: u32,
    bytes: usize,
    dropped: u32,
    /// The sender is not read until the second is over.
    is_muted: bool,
}

impl Said {
    /// Whether a further line of this length may be written.
    fn may(&mut self, bytes: usize) -> bool {
        if self.lines < LINES_MAX && self.bytes + bytes <= BYTES_MAX {
            self.lines += 1;
            self.bytes += bytes;
            return true;
        }
        self.dropped = self.dropped.saturating_add(1);
        false
    }

    /// When [`Journal::tick`] has something to do.
    fn deadline(&self) -> Option<Duration> {
        (self.dropped > 0 || self.is_muted).then_some(self.since + SECOND)
    }
}

/// The result of one read from a channel.
enum Read {
    Packet,
    Nothing,
    End,
}

/// Every channel, and what its sender may still write.
pub struct Journal {
    channels: BTreeMap<u64, Channel>,
    said: BTreeMap<Sender, Said>,
    /// The token of the next channel.
    next: u64,
}

impl Journal {
    /// A journal without channels.
    pub fn new() -> Journal {
        Journal { channels: BTreeMap::new(), said: BTreeMap::new(), next: LOGS }
    }

    /// Adds the channel of a new sender, or of a successor. A channel that cannot be watched is read when its
    /// sender has died.
    pub fn listen(&mut self, epoll: &Epoll, sender: Sender, socket: OwnedFd) {
        let token = self.next;
        self.next += 1;
        if let Err(errno) = epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, token)) {
            log::error!("{}", Fault::errno("watching the log of", sender, errno));
        }
        self.channels.insert(token, Channel { sender, socket, is_former: false });
    }

    /// A channel is readable.
    pub fn hear(&mut self, epoll: &Epoll, token: u64, now: Duration) {
        let Some(sender) = self.channels.get(&token).map(|channel| channel.sender) else { return };
        for _ in 0..PACKETS_MAX {
            match self.read(token, now) {
                Read::Packet => {}
                Read::Nothing => return,
                Read::End => return self.close(epoll, token),
            }
        }
        let said = self.said.entry(sender).or_default();
        if said.dropped >= DROPPED_MAX && !said.is_muted {
            said.is_muted = true;
            self.watch(epoll, sender, EpollFlags::empty());
        }
    }

    /// A sender has died: reads its last words, however much it has written before.
    pub fn ended(&mut self, epoll: &Epoll, sender: Sender, now: Duration) {
        self.renew(epoll, sender, now);
        let own = |channel: &Channel| channel.sender == sender && !channel.is_former;
        let ended: Vec<u64> =
            self.channels.iter().filter(|(_, channel)| own(channel)).map(|(token, _)| *token).collect();
        for token in ended {
            let end = (0..LAST_MAX).map(|_| self.read(token, now)).find(|read| !matches!(read, Read::Packet));
            match end {
                Some(Read::End) => self.close(epoll, token),
                Some(Read::Packet | Read::Nothing) | None => {
                    self.channels.entry(token).and_modify(|channel| channel.is_former = true);
                }
            }
        }
        let former = |(token, channel): (&u64, &Channel)| channel.is_former.then_some(*token);
        let formers: Vec<u64> = self.channels.iter().filter_map(former).collect();
        for token in formers.iter().take(formers.len().saturating_sub(FORMER_MAX)) {
            self.close(epoll, *token);
        }
    }

    /// When [`Journal::tick`] has something to do.
    pub fn deadline(&self) -> Option<Duration> {
        self.said.values().filter_map(Said::deadline).min()
    }

    /// Acts on the time: logs the number of dropped lines, and reads senders again that were not read.
    pub fn tick(&mut self, epoll: &Epoll, now: Duration) {
        let over = |(sender, said): (&Sender, &Said)| {
            said.deadline().is_some_and(|deadline| deadline <= now).then_some(*sender)
        };
        let over: Vec<Sender> = self.said.iter().filter_map(over).collect();
        over.into_iter().for_each(|sender| self.renew(epoll, sender, now));
    }

    /// Begins a new second for a sender.
    fn renew(&mut self, epoll: &Epoll, sender: Sender, now: Duration) {
        let said =
            std::mem::replace(self.said.entry(sender).or_default(), Said { since: now, ..Said::default() });
        if said.dropped > 0 {
            log::warn!(
                "{} lines of {sender}'s were dropped: it may log {LINES_MAX} a second, and {BYTES_MAX} bytes",
                said.dropped
            );
        }
        if said.is_muted {
            self.watch(epoll, sender, EpollFlags::EPOLLIN);
        }
    }

    /// Reads one packet of a channel, and writes its lines.
    fn read(&mut self, token: u64, now: Duration) -> Read {
        let Some(Channel { sender, socket, .. }) = self.channels.get(&token) else { return Read::End };
        let mut packet = [0; PACKET_MAX];
        let packet = match receive_cut(socket, &mut packet) {
            // The logger's writes have at least one byte, so a sender of empty packets is not read any more.
            Ok(0) => return Read::End,
            Ok(count) => packet.get(..count).unwrap_or_default(),
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ENOMEM | Errno::ENOBUFS) => return Read::Nothing,
            Err(_) => return Read::End,
        };
        let said = self.said.entry(*sender).or_default();
        if now >= said.since + SECOND && said.deadline().is_none() {
            *said = Said { since: now, ..Said::default() };
        }
        let (level, text) = logger::level(packet);
        for line in text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
            if said.may(line.len()) {
                write(level, *sender, line);
            }
        }
        Read::Packet
    }

    /// Changes what epoll reports of a sender's channels. The kernel reports a closed other end in any case.
    fn watch(&self, epoll: &Epoll, sender: Sender, flags: EpollFlags) {
        for (token, channel) in self.channels.iter().filter(|(_, channel)| channel.sender == sender) {
            if let Err(errno) = epoll.modify(&channel.socket, &mut EpollEvent::new(flags, *token)) {
                log::error!("{}", Fault::errno("watching the log of", sender, errno));
            }
        }
    }

    fn close(&mut self, epoll: &Epoll, token: u64) {
        if let Some(channel) = self.channels.remove(&token) {
            // Closing alone leaves a socket in the epoll set while another process has it open. A channel
            // that could not be watched is not in the set.
            let _ = epoll.delete(&channel.socket);
        }
    }
}

fn write(level: Level, sender: Sender, line: &[u8]) {
    if level <= log::max_level() {
        logger::relay(level, &sender.to_string(), sender.name(), line);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::sys::epoll::EpollCreateFlags;
    use nix::sys::socket::{MsgFlags, send};

    use super::*;
    use crate::wire::Role;
    use crate::wire::bootstrap::socket_pair;

    /// A process that an execd has started keeps writing to that execd's channel after the execd has died;
    /// each successor has a channel of its own.
    #[test]
    fn so_many_channels_of_the_dead_are_kept_and_the_oldest_are_closed() {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        let mut journal = Journal::new();
        let execd = Sender::Helper(Instance::first(Role::Execd));
        let writers: Vec<OwnedFd> = (0..FORMER_MAX + 3)
            .map(|_| {
                let (writer, socket) = socket_pair().unwrap();
                journal.listen(&epoll, execd, socket);
                journal.ended(&epoll, execd, Duration::ZERO);
                writer
            })
            .collect();
        assert_eq!(journal.channels.len(), FORMER_MAX);
        let write = |writer: &OwnedFd| send(writer.as_raw_fd(), b"a line", MsgFlags::MSG_NOSIGNAL);
        let written: Vec<_> = writers.iter().map(|writer| write(writer).map_err(|_| "closed")).collect();
        assert_eq!(written[..3], [Err("closed"); 3]);
        assert_eq!(written[3..], [Ok(6); FORMER_MAX]);
        // The living execd's channel is not among them, and a channel that no process can write to is not
        // kept.
        let (_living, socket) = socket_pair().unwrap();
        journal.listen(&epoll, execd, socket);
        drop(writers);
        let tokens: Vec<u64> = journal.channels.keys().copied().collect();
        tokens.iter().for_each(|token| journal.hear(&epoll, *token, Duration::ZERO));
        assert_eq!(journal.channels.len(), 1);
    }
}

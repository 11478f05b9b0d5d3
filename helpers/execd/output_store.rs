//! The output store: duplicates of the running processes' outputs, in the queue of a socket pair that every
//! execd inherits. The kernel keeps them when execd or streamd or both die, in any order.
//!
//! Entries can only be appended to a queue and taken from its front. So a sweep rotates the queue: an entry
//! that stays is appended again, and only then taken from the front. A kill between the two leaves it in the
//! queue twice. Entry numbers only grow, so of two entries for one stream the later start is known.
//!
//! The kernel counts descriptors in flight by the sender's real user. A process of the same user without
//! capabilities, whose limit of open files is below that count, can send none (ETOOMANYREFS). execd has a
//! user of its own, so the output store's descriptors are not counted against any container.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::sys::fd::{peek, peek_fds, receive_fds, send_fds};
use hyperinit::wire::streamd::{STREAMS_LEN, Streams as Packet};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::time::{ClockId, clock_gettime};

/// The length of a mark: a number alone. A sweep is complete when it reaches its mark.
const MARK_LEN: usize = 8;
const ENTRY_LEN: usize = MARK_LEN + STREAMS_LEN;
/// Keeping this many useless entries costs less than removing them.
const SPARE: usize = 16;

/// The socket pair.
pub struct OutputStore {
    put: OwnedFd,
    take: OwnedFd,
    /// The number of entries in the queue.
    entries: usize,
    /// The last number given to an entry or a mark.
    last: u64,
}

/// The outputs of one process.
pub struct Entry {
    /// The entry's number: of two entries for one stream, the later one has the higher number.
    pub number: u64,
    /// The packet about the process for a new streamd.
    pub packet: Packet,
    /// stdout or tty, then stderr.
    pub fds: Vec<OwnedFd>,
}

impl OutputStore {
    /// The output store of these inherited descriptors.
    pub fn new(put: OwnedFd, take: OwnedFd) -> OutputStore {
        OutputStore { put, take, entries: 0, last: 0 }
    }

    /// An output store that ends with this process, for an execd that is run by hand. Errors are those of
    /// socketpair(2).
    pub fn own() -> Result<OutputStore, Fault> {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map(|(put, take)| OutputStore::new(put, take))
            .fault("making", "a socket pair")
    }

    /// Adds a process's outputs; returns the entry's number. Fails if the queue is full or the kernel refuses
    /// the descriptors.
    pub fn put(&mut self, packet: &Packet, fds: &[BorrowedFd<'_>]) -> Result<u64, Fault> {
        let number = self.next_number();
        send_fds(&self.put, &encode(number, packet), fds)
            .fault("keeping", format!("stream {}", packet.stdio))?;
        self.entries += 1;
        Ok(number)
    }

    /// Whether the useless entries should be removed, given the number of useful ones.
    pub fn is_full(&self, useful: usize) -> bool {
        self.entries > 2 * useful + SPARE
    }

    /// Whether there are more entries than the `useful` ones.
    pub fn has_more_than(&self, useful: usize) -> bool {
        self.entries > useful
    }

    /// Inspects every entry and removes those for which `keep` returns false. An entry that is there twice is
    /// kept once.
    pub fn sweep(&mut self, mut keep: impl FnMut(Entry) -> bool) -> Result<(), Fault> {
        let mark = self.next_number();
        send_fds(&self.put, &mark.to_be_bytes(), &[]).fault("sweeping", "the output store")?;
        let (mut seen, mut entries) = (BTreeSet::new(), 0);
        loop {
            // One byte longer than an entry, so that a longer packet is recognised and removed.
            let mut packet = [0; ENTRY_LEN + 1];
            let front = match peek_fds(&self.take, &mut packet) {
                Ok((count, fds)) => packet.get(..count).map(|packet| (packet, fds)),
                // The packet is really too long. Otherwise, only descriptor numbers may be lacking, which is
                // an error.
                Err(Errno::EMSGSIZE | Errno::EMFILE) if peek(&self.take, &mut packet) == Ok(packet.len()) => {
                    None
                }
                Err(errno) => return Err(Fault::errno("sweeping", "the output store", errno)),
            };
            let done = front.as_ref().is_some_and(|(packet, _)| *packet == mark.to_be_bytes());
            let entry = front.and_then(|(packet, fds)| decode(packet, fds));
            if let Some(entry) = entry.filter(|entry| seen.insert(entry.number)) {
                self.last = self.last.max(entry.number);
                let (number, streams) = (entry.number, entry.packet);
                let fds = entry.fds.iter().map(|fd| fd.try_clone()).collect::<Result<Vec<_>, _>>();
                let fds = fds.fault("sweeping", "the output store")?;
                if keep(entry) {
                    let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
                    send_fds(&self.put, &encode(number, &streams), &fds)
                        .fault("sweeping", "the output store")?;
                    entries += 1;
                }
            }
            receive_fds(&self.take, &mut packet)
                .map(drop)
                .or_else(only_cut)
                .fault("sweeping", "the output store")?;
            if done {
                self.entries = entries;
                return Ok(());
            }
        }
    }

    /// A number higher than all before it, including those of earlier execds.
    fn next_number(&mut self) -> u64 {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        self.last = (self.last + 1).max(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX));
        self.last
    }
}

fn only_cut(errno: Errno) -> Result<(), Errno> {
    match errno {
        Errno::EMSGSIZE | Errno::EMFILE => Ok(()),
        _ => Err(errno),
    }
}

fn encode(number: u64, packet: &Packet) -> [u8; ENTRY_LEN] {
    let mut out = [0; ENTRY_LEN];
    out[..MARK_LEN].copy_from_slice(&number.to_be_bytes());
    out[MARK_LEN..].copy_from_slice(&packet.encode());
    out
}

/// Decodes an entry. None: it is a mark, or not from an execd.
fn decode(bytes: &[u8], fds: Vec<OwnedFd>) -> Option<Entry> {
    let (number, packet) = bytes.split_first_chunk::<MARK_LEN>()?;
    let packet = Packet::decode(packet).filter(|packet| packet.again && packet.fds() == fds.len())?;
    Some(Entry { number: u64::from_be_bytes(*number), packet, fds })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyperinit::ids::StreamId;
    use nix::unistd::pipe;

    fn packet(stdio: u64) -> Packet {
        let stdio = StreamId::new(stdio).unwrap();
        Packet { stdio, stderr: None, terminal: false, stdin: false, again: true }
    }

    fn streams(store: &mut OutputStore) -> Vec<u64> {
        let mut all = Vec::new();
        store
            .sweep(|entry| {
                all.push(entry.packet.stdio.get());
                true
            })
            .unwrap();
        all
    }

    /// The output store as the successor of a killed execd sees it.
    fn successor(store: &OutputStore) -> OutputStore {
        OutputStore::new(store.put.try_clone().unwrap(), store.take.try_clone().unwrap())
    }

    #[test]
    fn what_is_put_in_is_there_for_every_successor() {
        let mut store = OutputStore::own().unwrap();
        let (out, end) = pipe().unwrap();
        let first = store.put(&packet(1), &[out.as_fd()]).unwrap();
        assert!(first < store.put(&packet(2), &[out.as_fd()]).unwrap());
        drop(out);
        let mut next = successor(&store);
        drop(store);
        assert_eq!(streams(&mut next), [1, 2]);
        assert_eq!(streams(&mut next), [1, 2]);
        nix::unistd::write(&end, b"x").expect("the reading end is kept");
        next.sweep(|entry| entry.packet.stdio.get() == 2).unwrap();
        assert_eq!(streams(&mut next), [2]);
        next.sweep(|_| false).unwrap();
        assert!(!next.has_more_than(0));
        assert_eq!(nix::unistd::write(&end, b"x"), Err(Errno::EPIPE), "nobody has it now");
    }

    #[test]
    fn a_sweep_that_is_cut_off_anywhere_loses_nothing() {
        let (out, _end) = pipe().unwrap();
        // Queues as a kill leaves them: with a mark; with a mark and an entry twice; with an entry that was
        // begun anew.
        for twice in 0..3 {
            let mut store = OutputStore::own().unwrap();
            let numbers = [1, 2, 1].map(|stdio| store.put(&packet(stdio), &[out.as_fd()]).unwrap());
            send_fds(&store.put, &7u64.to_be_bytes(), &[]).unwrap();
            for &number in numbers.iter().take(twice) {
                send_fds(&store.put, &encode(number, &packet(1)), &[out.as_fd()]).unwrap();
            }
            let mut next = successor(&store);
            assert_eq!(streams(&mut next), [1, 2, 1]);
            assert_eq!(next.entries, 3);
            assert!(next.next_number() > numbers[2]);
        }
    }

    #[test]
    fn what_no_execd_has_put_there_is_thrown_out() {
        let mut store = OutputStore::own().unwrap();
        let (out, _end) = pipe().unwrap();
        let start = Packet { again: false, ..packet(1) };
        send_fds(&store.put, &[1; 100], &[]).unwrap();
        send_fds(&store.put, &encode(1, &packet(1)), &[]).unwrap();
        send_fds(&store.put, &encode(1, &start), &[out.as_fd()]).unwrap();
        send_fds(&store.put, b"x", &[out.as_fd()]).unwrap();
        assert!(streams(&mut store).is_empty());
    }
}

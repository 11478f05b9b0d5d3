//! The output buffer: a memfd in which the kernel keeps the books (docs/streams.md).
//!
//! A kill arrives at the end of a system call, before a program can note what the call did. So the two
//! positions that matter are file offsets of two descriptions of the memfd, which every streamd inherits:
//! splice(2) moves bytes from a process to the first and advances it, sendfile(2) from the second to the port
//! and advances it, each in one call. What else a successor has to know stands in the first page.
//!
//! Places only grow. Where the port copies what it takes, they are in a ring, whose pages stay; a socket
//! refers to pages until its other end has read them, so there the file grows with the places, and whole
//! pages behind are given back. A taken payload's frame begins with a page: virtio-serial hands the host each
//! piece of a page by itself.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::frame::{STREAM_HEADER, stream_header};
use hyperinit::ids::StreamId;
use hyperinit::sys::page::{PAGE, Page, SLOTS};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SpliceFFlags, fallocate, fcntl, splice};
use nix::libc;
use nix::sys::sendfile::sendfile64;
use nix::sys::uio::{pread, pwrite};
use nix::unistd::{Whence, ftruncate, lseek64};

/// While this much waits for the port, nothing more is taken from processes: their pipes fill, and they wait.
pub const ROOM: u64 = 512 << 10;
/// Besides, this much may wait of answers to frames of unknown streams. While more waits, the host is not
/// read.
const ANSWERS: u64 = 256 << 10;
/// Behind the room for output and answers the ring has some for ends, and for the frame that is being taken.
const RING: u64 = 1 << 20;
/// What the largest frame needs, with the gap before it.
const SLACK: u64 = CHUNK as u64 + 3 * DATA;
const _: () = assert!(ROOM + ANSWERS + 2 * SLACK <= RING);
/// The stream of no process: such a frame fills a gap, and is not sent.
const GAP: u64 = 0;
/// A ring that never comes round.
const ENDLESS: u64 = 1 << 62;
/// The largest payload of a frame. A pipe holds 64 KiB by default, so one splice empties it.
pub const CHUNK: usize = 64 << 10;
/// The most that one read of a tty returns: its line discipline holds no more.
const TTY_CHUNK: usize = 4 << 10;
/// A tty holds little at once. A process that has written this much without a pause is writing more, so it
/// may run before its frame is sent.
const TTY_BULK: usize = 2 << 10;
/// How much that has left is given back at once.
const PUNCH: u64 = 256 << 10;
/// How much that has left is kept: a socket refers to these pages until the host has read them, and where
/// tmpfs uses huge pages, giving a part of one back overwrites it with zeros. More than the sending side of a
/// socket holds (wmem_default).
const KEPT: u64 = 256 << 10;
/// Where frames begin: behind the page of numbers.
const DATA: u64 = PAGE as u64;
const HEADER: u64 = STREAM_HEADER as u64;

/// «hyperin1»: the page means what this version says.
const MAGIC: u64 = u64::from_be_bytes(*b"hyperin1");
const SLOT_MAGIC: usize = 0;
/// The end of the last whole frame.
const SLOT_PUBLISHED: usize = 1;
/// The stream whose payload is being taken, 0 for none, and where its header belongs.
const SLOT_PENDING: usize = 2;
const SLOT_PENDING_AT: usize = 3;
/// Where the last frame ends that has wholly left.
const SLOT_BOUNDARY: usize = 4;
/// How far the streams that ended were recorded.
const SLOT_ENDS: usize = 5;
/// How well it is known where the host is in its frames, and three numbers that say where
/// (stream_channel.rs).
pub const SLOT_INPUT: usize = 6;
/// The first of the three.
pub const SLOT_PLACE: usize = 7;
/// Whether the host has asked to be told what becomes of stdin.
pub const SLOT_FLOW: usize = 10;
/// Pairs of (stream, where its end-of-stream frame begins), in a ring. init has at most 16 ends under way.
const SLOT_FIRST_END: usize = 16;
const ENDS: usize = 64;
const _: () = assert!(SLOT_FIRST_END + 2 * ENDS <= SLOTS);

/// What came of an attempt to take output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// This many bytes.
    Bytes(usize),
    /// There is nothing now.
    Nothing,
    /// There will never be more.
    End,
    /// No process has the tty open. A process may open it again.
    HungUp,
}

/// The buffer.
pub struct Buffer {
    input: OwnedFd,
    output: OwnedFd,
    pipe_out: OwnedFd,
    pipe_in: OwnedFd,
    page: Page,
    inherited: bool,
    /// After how much places come round.
    ring: u64,
    /// Where in the file `input` is.
    at: u64,
    /// Where in the file `output` is.
    sent: u64,
    published: u64,
    /// Start and end of the frames that have not wholly left, in order.
    frames: VecDeque<(u64, u64)>,
    boundary: u64,
    punched: u64,
}

impl Buffer {
    /// The buffer of these inherited descriptors: a new one, or what a predecessor left. `copied` says that
    /// the port, a device that all hosts use, copies what it takes.
    pub fn open(
        input: OwnedFd,
        output: OwnedFd,
        pipe_out: OwnedFd,
        pipe_in: OwnedFd,
        copied: bool,
    ) -> Result<Buffer, Fault> {
        alone(&input)?;
        let size = nix::sys::stat::fstat(&input).fault("looking at", "the output buffer")?.st_size;
        if size < i64::try_from(PAGE).unwrap_or(i64::MAX) {
            ftruncate(&input, DATA.cast_signed()).fault("making room in", "the output buffer")?;
        }
        let page = Page::map(&input).fault("mapping", "the output buffer")?;
        let inherited = page.get(SLOT_MAGIC) == MAGIC;
        if !inherited {
            seek(&input, DATA)?;
            seek(&output, DATA)?;
            page.set(SLOT_MAGIC, MAGIC);
        }
        let (published, boundary) = (page.get(SLOT_PUBLISHED), page.get(SLOT_BOUNDARY));
        let (at, sent) = (position(&input)?, position(&output)?);
        let mut buffer = Buffer {
            input,
            output,
            pipe_out,
            pipe_in,
            page,
            inherited,
            ring: if copied { RING } else { ENDLESS },
            at,
            sent,
            published,
            frames: VecDeque::new(),
            boundary,
            // How much a predecessor gave back is not known, and giving it back again costs little.
            punched: DATA,
        };
        // If the writer died before an end's frame was there, the end was not appended.
        (0..ENDS)
            .map(|end| SLOT_FIRST_END + 2 * end)
            .filter(|&slot| buffer.page.get(slot + 1) >= buffer.published)
            .for_each(|slot| buffer.page.set(slot, 0));
        buffer.find_frames()?;
        match buffer.finish_pending() {
            // Whatever is taken or appended next tries it again.
            Err(fault) if is_no_memory(&fault) => log::warn!("{fault}; output waits"),
            finished => finished?,
        }
        Ok(buffer)
    }

    /// The numbers that outlive this process.
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// Whether there was a predecessor.
    pub fn is_inherited(&self) -> bool {
        self.inherited
    }

    /// Whether more may be taken from processes.
    pub fn has_room(&self) -> bool {
        self.published - self.boundary < ROOM
    }

    /// Whether the host may be listened to, for it may have to be answered.
    pub fn has_room_for_answers(&self) -> bool {
        self.published - self.boundary < ROOM + ANSWERS
    }

    /// Whether something waits for the port.
    pub fn waits(&self) -> bool {
        !self.frames.is_empty()
    }

    /// Where everything accepted so far ends.
    pub fn end(&self) -> u64 {
        self.published
    }

    /// Whether everything before a place has left for the port.
    pub fn has_left(&self, end: u64) -> bool {
        self.boundary >= end
    }

    /// Where in the file a frame is that starts at a place. Its end is behind that, also where the ring comes
    /// round.
    fn in_file(&self, start: u64) -> u64 {
        DATA + start % self.ring
    }

    /// Where the next frame with a payload starts: at a page's start, with room for a header in the gap
    /// before.
    fn next_start(&self) -> u64 {
        match self.published.next_multiple_of(DATA) {
            start if start - self.published >= HEADER || start == self.published => start,
            start => start + DATA,
        }
    }

    /// A payload was taken and its header was not written: by a predecessor that died, or for want of memory.
    fn finish_pending(&mut self) -> Result<(), Fault> {
        let Some(stream) = StreamId::new(self.page.get(SLOT_PENDING)) else { return Ok(()) };
        if self.page.get(SLOT_PENDING_AT) == self.published {
            let payload = self.in_file(self.next_start()) + HEADER;
            let mut end = position(&self.input)?;
            if end < payload {
                return Err(Fault::new("reading", "the output buffer", "its books do not add up"));
            }
            // The tty's bytes that are still in the pipe.
            end += self.empty_pipe()?;
            self.publish(stream, usize::try_from(end - payload).unwrap_or(usize::MAX))?;
        }
        self.page.set(SLOT_PENDING, 0);
        Ok(())
    }

    /// Moves the content of the tty's pipe to the buffer; returns how many bytes.
    fn empty_pipe(&self) -> Result<u64, Fault> {
        let mut moved = 0;
        loop {
            match splice_to(self.pipe_out.as_fd(), self.input.as_fd(), CHUNK) {
                Ok(0) | Err(Errno::EAGAIN) => return Ok(moved),
                Ok(count) => moved += count as u64,
                Err(errno) => return Err(Fault::errno("filling", "the output buffer", errno)),
            }
        }
    }

    /// Finds the frames that a predecessor left, from the last end that it noted.
    fn find_frames(&mut self) -> Result<(), Fault> {
        let mut at = self.boundary;
        while at < self.published {
            let mut header = [0; STREAM_HEADER];
            let read = pread(&self.input, &mut header, self.in_file(at).cast_signed())
                .fault("reading", "the output buffer")?;
            let number = |bytes: &[u8]| bytes.iter().fold(0, |number, &byte| number << 8 | u64::from(byte));
            let (stream, length) = (number(&header[..8]), number(&header[8..]));
            if read < STREAM_HEADER || length < HEADER || at + length > self.published {
                return Err(Fault::new("reading", "the output buffer", "what is left in it are no frames"));
            }
            if stream != GAP {
                self.frames.push_back((at, at + length));
            }
            at += length;
        }
        self.note_sent();
        Ok(())
    }

    /// Takes what a process has written, as one frame. After a fault that is [`is_no_memory`] nothing is
    /// lost, and the next attempt goes on where this one stopped.
    pub fn take(&mut self, stream: StreamId, from: BorrowedFd<'_>, tty: bool) -> Result<Taken, Fault> {
        self.finish_pending()?;
        self.seek_payload()?;
        self.page.set(SLOT_PENDING_AT, self.published);
        self.page.set(SLOT_PENDING, stream.get());
        let taken = if tty { self.take_tty(from)? } else { splice_to(from, self.input.as_fd(), CHUNK) };
        let taken = match taken {
            Ok(0) => Taken::End,
            Ok(count) => {
                self.publish(stream, count)?;
                Taken::Bytes(count)
            }
            Err(Errno::EAGAIN) => Taken::Nothing,
            Err(Errno::EIO) if tty => Taken::HungUp,
            Err(errno) => {
                self.page.set(SLOT_PENDING, 0);
                return Err(Fault::errno("taking the output of", format!("stream {stream}"), errno));
            }
        };
        self.page.set(SLOT_PENDING, 0);
        Ok(taken)
    }

    /// One end of a splice has to be a pipe, so a tty's bytes take the way through one. They come in small
    /// portions, and several make one frame.
    fn take_tty(&self, from: BorrowedFd<'_>) -> Result<Result<usize, Errno>, Fault> {
        let (mut taken, mut since) = (0, 0);
        let last = loop {
            match splice_to(from, self.pipe_in.as_fd(), TTY_CHUNK) {
                Ok(count) if count > 0 => (taken, since) = (taken + count, since + count),
                Err(Errno::EAGAIN) if since >= TTY_BULK => {
                    since = 0;
                    std::thread::yield_now();
                }
                last => break last,
            }
            if taken + TTY_CHUNK > CHUNK {
                break Ok(taken);
            }
        };
        if taken == 0 {
            return Ok(last);
        }
        // An end or an error will be there again.
        let mut left = taken;
        while left > 0 {
            match splice_to(self.pipe_out.as_fd(), self.input.as_fd(), left) {
                Ok(count) => left = left.saturating_sub(count.max(1)),
                Err(errno) => return Err(Fault::errno("filling", "the output buffer", errno)),
            }
        }
        Ok(Ok(taken))
    }

    /// Leaves room for the next frame's header.
    fn seek_payload(&mut self) -> Result<(), Fault> {
        let payload = self.in_file(self.next_start()) + HEADER;
        if self.at != payload {
            seek(&self.input, payload)?;
            self.at = payload;
        }
        Ok(())
    }

    /// Makes a frame of a payload that stands behind the place of its header. None is no frame.
    fn publish(&mut self, stream: StreamId, payload: usize) -> Result<(), Fault> {
        if payload == 0 {
            return Ok(());
        }
        let start = self.next_start();
        self.at = self.in_file(start) + (STREAM_HEADER + payload) as u64;
        if start != self.published {
            let gap = usize::try_from(start - self.published).unwrap_or(usize::MAX);
            self.write_header(self.published, GAP, gap.saturating_sub(STREAM_HEADER))?;
        }
        self.write_header(start, stream.get(), payload)?;
        self.advance(start, payload);
        Ok(())
    }

    fn write_header(&self, at: u64, stream: u64, payload: usize) -> Result<(), Fault> {
        let header = stream_header(stream, payload)
            .map_err(|violation| Fault::new("writing", "a frame", violation.to_string()))?;
        let written = pwrite(&self.input, &header, self.in_file(at).cast_signed())
            .fault("writing to", "the output buffer")?;
        // At the edge of a page of which there was no memory for the next.
        if written == header.len() { Ok(()) } else { Err(no_memory()) }
    }

    fn advance(&mut self, start: u64, payload: usize) {
        self.published = start + (STREAM_HEADER + payload) as u64;
        self.page.set(SLOT_PUBLISHED, self.published);
        self.frames.push_back((start, self.published));
    }

    /// Appends an empty frame: the end of a stream, or the answer to an unknown one.
    pub fn append_empty(&mut self, stream: StreamId) -> Result<(), Fault> {
        self.append(stream, b"")
    }

    /// Appends a short frame of streamd's own.
    pub fn append(&mut self, stream: StreamId, payload: &[u8]) -> Result<(), Fault> {
        self.finish_pending()?;
        if self.published - self.boundary >= RING - SLACK {
            // So many ends, and a host that does not read.
            return Err(no_memory());
        }
        if !payload.is_empty() {
            let at = self.in_file(self.published) + HEADER;
            let written =
                pwrite(&self.input, payload, at.cast_signed()).fault("writing to", "the output buffer")?;
            if written != payload.len() {
                return Err(no_memory());
            }
        }
        self.write_header(self.published, stream.get(), payload.len())?;
        self.advance(self.published, payload.len());
        Ok(())
    }

    /// Appends a stream's end-of-stream frame; returns where it ends. A successor finds that it was.
    pub fn append_end(&mut self, stream: StreamId) -> Result<u64, Fault> {
        self.finish_pending()?;
        let count = self.page.get(SLOT_ENDS);
        let slot = SLOT_FIRST_END + 2 * (usize::try_from(count).unwrap_or(0) % ENDS);
        // The stream is noted last: until then the pair says nothing, and until `advance` the place is not
        // there yet. The count grows before, for the next end must not take this one's slot.
        self.page.set(slot, 0);
        self.page.set(slot + 1, self.published);
        self.page.set(slot, stream.get());
        self.page.set(SLOT_ENDS, count + 1);
        match self.append_empty(stream) {
            Ok(()) => Ok(self.published),
            Err(fault) => {
                // Another frame will stand there.
                self.page.set(slot, 0);
                Err(fault)
            }
        }
    }

    /// Where a stream's end-of-stream frame ends, if one was appended since the stream was begun.
    pub fn find_end(&self, stream: StreamId) -> Option<u64> {
        self.ends()
            .find(|&slot| self.page.get(slot) == stream.get())
            .map(|slot| self.page.get(slot + 1) + HEADER)
    }

    /// A stream of this number begins: the end of an earlier stream of the number is forgotten.
    pub fn forget_end(&self, stream: StreamId) {
        let slots: Vec<usize> = self.ends().filter(|&slot| self.page.get(slot) == stream.get()).collect();
        slots.into_iter().for_each(|slot| self.page.set(slot, 0));
    }

    /// The slots of ends that were really appended.
    fn ends(&self) -> impl Iterator<Item = usize> + '_ {
        (0..ENDS).map(|end| SLOT_FIRST_END + 2 * end).filter(|&slot| self.page.get(slot + 1) < self.published)
    }

    /// Sends what waits to the port; returns whether all of it went. EAGAIN is no error: the port is full.
    pub fn send(&mut self, port: BorrowedFd<'_>) -> Result<bool, Errno> {
        while let Some((start, end)) = self.next_part() {
            if self.sent != start {
                lseek64(&self.output, start.cast_signed(), Whence::SeekSet)?;
                self.sent = start;
            }
            let count = usize::try_from(end - start).unwrap_or(usize::MAX);
            match sendfile64(port, &self.output, None, count) {
                Ok(0) | Err(Errno::EAGAIN) => return Ok(false),
                Ok(count) => {
                    self.sent += count as u64;
                    self.note_sent();
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(true)
    }

    /// Where in the file the part of the first frame is that has not left: from, to.
    fn next_part(&self) -> Option<(u64, u64)> {
        let &(start, end) = self.frames.front()?;
        let (first, last) = (self.in_file(start), self.in_file(start) + (end - start));
        // The port's position is in this frame, or at the end of the one before.
        let start = if (first..=last).contains(&self.sent) { self.sent } else { first };
        Some((start, last))
    }

    /// The host is gone: the next one gets the frame that it had a part of from its start.
    pub fn rewind(&mut self) -> Result<(), Fault> {
        if let Some(&(start, _)) = self.frames.front() {
            let first = self.in_file(start);
            if self.sent != first {
                seek(&self.output, first)?;
                self.sent = first;
            }
        }
        Ok(())
    }

    /// Notes the frame that has wholly left, if one has, and gives back what is behind it.
    fn note_sent(&mut self) {
        if let Some((part, last)) = self.next_part()
            && part == last
            && let Some((_, end)) = self.frames.pop_front()
        {
            self.boundary = end;
            self.page.set(SLOT_BOUNDARY, end);
        }
        let whole = self.in_file(self.boundary).saturating_sub(KEPT) / DATA * DATA;
        if self.ring == ENDLESS && whole >= self.punched + PUNCH {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let (from, length) = (self.punched.cast_signed(), (whole - self.punched).cast_signed());
            match fallocate(&self.input, flags, from, length) {
                Ok(()) => self.punched = whole,
                Err(errno) => log::warn!("{}", Fault::errno("giving back", "the output buffer", errno)),
            }
        }
    }
}

/// Moves up to `count` bytes; never waits (EAGAIN).
fn splice_to(from: BorrowedFd<'_>, to: BorrowedFd<'_>, count: usize) -> Result<usize, Errno> {
    loop {
        match splice(from, None, to, None, count, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Err(Errno::EINTR) => {}
            moved => return moved,
        }
    }
}

/// Keeps other streamds out for as long as this process lives: one that the warden had started, and whose
/// start PID 1 never heard of, may be on its way beside its successor, and a step of both spoils the books.
fn alone(buffer: &OwnedFd) -> Result<(), Fault> {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(buffer, FcntlArg::F_SETLK(&whole)) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => {
            Err(Fault::new("taking", "the output buffer", "another streamd has it"))
        }
        Err(errno) => Err(Fault::errno("taking", "the output buffer", errno)),
    }
}

fn no_memory() -> Fault {
    Fault::errno("writing to", "the output buffer", Errno::ENOSPC)
}

/// Whether a fault of the buffer is want of memory, which may pass.
pub fn is_no_memory(fault: &Fault) -> bool {
    fault.is(Errno::ENOSPC) || fault.is(Errno::ENOMEM)
}

fn seek(file: &OwnedFd, to: u64) -> Result<(), Fault> {
    lseek64(file, to.cast_signed(), Whence::SeekSet).map(drop).fault("seeking in", "the output buffer")
}

fn position(file: &OwnedFd) -> Result<u64, Fault> {
    lseek64(file, 0, Whence::SeekCur).map(i64::cast_unsigned).fault("seeking in", "the output buffer")
}

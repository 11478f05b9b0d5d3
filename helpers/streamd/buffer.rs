//! The output buffer: a memfd whose file offsets record what was taken and what was sent (docs/streams.md).
//!
//! A kill can take effect as a system call ends, before the program can record what the call did. So the two
//! positions that matter are the file offsets of two open file descriptions of the memfd, which every streamd
//! inherits. splice(2) moves bytes from a process into the buffer and advances the first offset; sendfile(2)
//! moves bytes from the buffer to the port and advances the second. Each call does both at once. The first
//! page holds everything else that a successor needs.
//!
//! A place is a logical offset, and places only grow. If the port copies what it takes, places map onto a
//! ring whose pages stay allocated. A socket instead refers to the pages until its other end has read them,
//! so there the file grows with the places, and whole pages that have been sent are given back. The frame of
//! a taken payload begins at a page boundary, because virtio-serial hands the host each piece of a page
//! separately.

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

/// While this many bytes wait for the port, no more output is taken from processes: their pipes fill, and
/// their writes block.
pub const ROOM: u64 = 512 << 10;
/// Answers to frames of unknown streams may take this many bytes beyond [`ROOM`]. While more waits, nothing
/// is read from the host.
const ANSWERS: u64 = 256 << 10;
/// The size of the ring in bytes. Beyond the room for output and answers, it has room for end-of-stream
/// frames and for the frame that is being taken.
const RING: u64 = 1 << 20;
/// The bytes that the largest frame needs, with the gap before it.
const SLACK: u64 = CHUNK as u64 + 3 * DATA;
const _: () = assert!(ROOM + ANSWERS + 2 * SLACK <= RING);
/// A stream number that no process has: a frame with it fills a gap and is not sent.
const GAP: u64 = 0;
/// A ring size so large that places never wrap.
const ENDLESS: u64 = 1 << 62;
/// The largest payload of a frame, in bytes. A pipe holds 64 KiB by default, so one splice empties it.
pub const CHUNK: usize = 64 << 10;
/// The most bytes that one read of a tty returns: its line discipline holds no more.
const TTY_CHUNK: usize = 4 << 10;
/// A tty holds little at once. A process that has written this many bytes without a pause is likely to write
/// more, so it gets a chance to run before its frame is published.
const TTY_BULK: usize = 2 << 10;
/// How many sent bytes are given back in one call.
const PUNCH: u64 = 256 << 10;
/// How many sent bytes are kept. A socket refers to these pages until the host has read them, and where tmpfs
/// uses huge pages, giving back part of one overwrites it with zeros. This exceeds what the sending side of a
/// socket holds (wmem_default).
const KEPT: u64 = 256 << 10;
/// The file offset at which frames begin: after the page of numbers.
const DATA: u64 = PAGE as u64;
const HEADER: u64 = STREAM_HEADER as u64;

/// The bytes "hyperin1": the page has the layout of this version.
const MAGIC: u64 = u64::from_be_bytes(*b"hyperin1");
const SLOT_MAGIC: usize = 0;
/// The place where the last whole frame ends.
const SLOT_PUBLISHED: usize = 1;
/// The stream whose payload is being taken (0 for none); the next slot holds the place of its frame.
const SLOT_PENDING: usize = 2;
const SLOT_PENDING_AT: usize = 3;
/// The place where the last completely sent frame ends.
const SLOT_BOUNDARY: usize = 4;
/// How many ended streams have been recorded.
const SLOT_ENDS: usize = 5;
/// Whether the host's position in its frames is known (stream_channel.rs); SLOT_PLACE holds the position.
pub const SLOT_INPUT: usize = 6;
/// The first of the three numbers that give the host's position in its frames.
pub const SLOT_PLACE: usize = 7;
/// Whether the host has asked for flow control of stdin.
pub const SLOT_FLOW: usize = 10;
/// A ring of pairs (stream, place of its end-of-stream frame). init has at most 16 ends in progress.
const SLOT_FIRST_END: usize = 16;
const ENDS: usize = 64;
const _: () = assert!(SLOT_FIRST_END + 2 * ENDS <= SLOTS);

/// The result of an attempt to take output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// This many bytes were taken.
    Bytes(usize),
    /// There is no output now.
    Nothing,
    /// The source is at its end: there will never be more output.
    End,
    /// No process has the tty open. A process may open it again.
    HungUp,
}

/// The output buffer.
pub struct Buffer {
    input: OwnedFd,
    output: OwnedFd,
    pipe_out: OwnedFd,
    pipe_in: OwnedFd,
    page: Page,
    inherited: bool,
    /// The number of bytes after which places wrap to the start of the ring.
    ring: u64,
    /// The file offset of `input`.
    at: u64,
    /// The file offset of `output`.
    sent: u64,
    published: u64,
    /// The places of the start and end of each frame that is not completely sent, in order.
    frames: VecDeque<(u64, u64)>,
    boundary: u64,
    punched: u64,
}

impl Buffer {
    /// Opens the buffer of these inherited descriptors: a new one, or the one that a predecessor left.
    /// `copied` is true if the port copies what it takes, as every port but a socket does.
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
            // How much a predecessor gave back is unknown, and giving the same pages back again costs little.
            punched: DATA,
        };
        // An end whose frame would start at or after the published place was never appended: its writer died
        // before.
        (0..ENDS)
            .map(|end| SLOT_FIRST_END + 2 * end)
            .filter(|&slot| buffer.page.get(slot + 1) >= buffer.published)
            .for_each(|slot| buffer.page.set(slot, 0));
        buffer.find_frames()?;
        match buffer.finish_pending() {
            // The next take or append tries again.
            Err(fault) if is_no_memory(&fault) => log::warn!("{fault}; output waits"),
            finished => finished?,
        }
        Ok(buffer)
    }

    /// The page of numbers that outlive this process.
    pub fn page(&self) -> &Page {
        &self.page
    }

    /// Whether a predecessor left this buffer.
    pub fn is_inherited(&self) -> bool {
        self.inherited
    }

    /// Whether more may be taken from processes.
    pub fn has_room(&self) -> bool {
        self.published - self.boundary < ROOM
    }

    /// Whether frames may be read from the host: each may need an answer, which takes room.
    pub fn has_room_for_answers(&self) -> bool {
        self.published - self.boundary < ROOM + ANSWERS
    }

    /// Whether something waits for the port.
    pub fn waits(&self) -> bool {
        !self.frames.is_empty()
    }

    /// The place where everything accepted so far ends.
    pub fn end(&self) -> u64 {
        self.published
    }

    /// Whether everything before the place `end` has been sent to the port.
    pub fn has_left(&self, end: u64) -> bool {
        self.boundary >= end
    }

    /// The file offset of a frame that starts at a place. A frame is contiguous in the file, even if it runs
    /// past the point where the ring wraps.
    fn in_file(&self, start: u64) -> u64 {
        DATA + start % self.ring
    }

    /// The place where the next frame with a payload starts: at a page boundary. A gap before it has room for
    /// a header.
    fn next_start(&self) -> u64 {
        match self.published.next_multiple_of(DATA) {
            start if start - self.published >= HEADER || start == self.published => start,
            start => start + DATA,
        }
    }

    /// Publishes a payload that was taken without its header being written, because a predecessor died or
    /// memory ran out.
    fn finish_pending(&mut self) -> Result<(), Fault> {
        let Some(stream) = StreamId::new(self.page.get(SLOT_PENDING)) else { return Ok(()) };
        if self.page.get(SLOT_PENDING_AT) == self.published {
            let payload = self.in_file(self.next_start()) + HEADER;
            let mut end = position(&self.input)?;
            if end < payload {
                return Err(Fault::new("reading", "the output buffer", "its books do not add up"));
            }
            // Bytes of a tty may still be in the pipe.
            end += self.empty_pipe()?;
            self.publish(stream, usize::try_from(end - payload).unwrap_or(usize::MAX))?;
        }
        self.page.set(SLOT_PENDING, 0);
        Ok(())
    }

    /// Moves the content of the tty's pipe to the buffer; returns the number of bytes moved.
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

    /// Finds the frames that a predecessor left, starting at the boundary that it recorded.
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

    /// Takes the output that a process has written, as one frame. A fault for which [`is_no_memory`] holds
    /// loses nothing: the next attempt continues where this one stopped.
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

    /// Moves a tty's output through a pipe, because one end of a splice must be a pipe. A tty delivers small
    /// portions, so several make one frame.
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
        // If the last attempt met an end or an error, the next take will meet it again.
        let mut left = taken;
        while left > 0 {
            match splice_to(self.pipe_out.as_fd(), self.input.as_fd(), left) {
                Ok(count) => left = left.saturating_sub(count.max(1)),
                Err(errno) => return Err(Fault::errno("filling", "the output buffer", errno)),
            }
        }
        Ok(Ok(taken))
    }

    /// Moves the input offset to where the next payload belongs, leaving room for its header.
    fn seek_payload(&mut self) -> Result<(), Fault> {
        let payload = self.in_file(self.next_start()) + HEADER;
        if self.at != payload {
            seek(&self.input, payload)?;
            self.at = payload;
        }
        Ok(())
    }

    /// Turns a payload that is already in place behind its header's position into a frame. An empty payload
    /// makes no frame.
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
        // A short write stops at a page boundary: there was no memory for the next page.
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
            // The host does not read, and end-of-stream frames have filled the ring.
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

    /// Appends a stream's end-of-stream frame; returns the place where it ends. A successor can see that it
    /// was appended.
    pub fn append_end(&mut self, stream: StreamId) -> Result<u64, Fault> {
        self.finish_pending()?;
        let count = self.page.get(SLOT_ENDS);
        let slot = SLOT_FIRST_END + 2 * (usize::try_from(count).unwrap_or(0) % ENDS);
        // The stream is recorded last: until then the pair is void, and until `advance` the recorded place is
        // not yet published. The count grows before that, so that the next end does not take this end's slot.
        self.page.set(slot, 0);
        self.page.set(slot + 1, self.published);
        self.page.set(slot, stream.get());
        self.page.set(SLOT_ENDS, count + 1);
        match self.append_empty(stream) {
            Ok(()) => Ok(self.published),
            Err(fault) => {
                // Another frame will take that place.
                self.page.set(slot, 0);
                Err(fault)
            }
        }
    }

    /// The place where a stream's end-of-stream frame ends, if one was appended since the stream began.
    pub fn find_end(&self, stream: StreamId) -> Option<u64> {
        self.ends()
            .find(|&slot| self.page.get(slot) == stream.get())
            .map(|slot| self.page.get(slot + 1) + HEADER)
    }

    /// Forgets the recorded end of an earlier stream with this number: a new stream with it begins.
    pub fn forget_end(&self, stream: StreamId) {
        let slots: Vec<usize> = self.ends().filter(|&slot| self.page.get(slot) == stream.get()).collect();
        slots.into_iter().for_each(|slot| self.page.set(slot, 0));
    }

    /// The slots of ends whose frames were published.
    fn ends(&self) -> impl Iterator<Item = usize> + '_ {
        (0..ENDS).map(|end| SLOT_FIRST_END + 2 * end).filter(|&slot| self.page.get(slot + 1) < self.published)
    }

    /// Sends waiting frames to the port; returns whether all of them were sent. EAGAIN from the port means
    /// that it is full: the result is false, not an error.
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

    /// The file offsets of the unsent part of the first frame: its start and its end.
    fn next_part(&self) -> Option<(u64, u64)> {
        let &(start, end) = self.frames.front()?;
        let (first, last) = (self.in_file(start), self.in_file(start) + (end - start));
        // The send offset is either inside this frame, or at the end of the frame before it.
        let start = if (first..=last).contains(&self.sent) { self.sent } else { first };
        Some((start, last))
    }

    /// Prepares for the next host: a frame that the departed host received in part is sent again from its
    /// start.
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

    /// Records that the first frame is completely sent, if it is, and gives back the memory behind it.
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

/// Moves up to `count` bytes without blocking; returns EAGAIN if it would have to wait.
fn splice_to(from: BorrowedFd<'_>, to: BorrowedFd<'_>, count: usize) -> Result<usize, Errno> {
    loop {
        match splice(from, None, to, None, count, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Err(Errno::EINTR) => {}
            moved => return moved,
        }
    }
}

/// Locks the buffer against other streamds for as long as this process lives. The warden may have started a
/// streamd of whose start PID 1 never heard, and it may run beside its successor; steps of both would corrupt
/// the records.
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

/// Whether a fault of the buffer is a lack of memory (ENOSPC or ENOMEM), which may pass.
pub fn is_no_memory(fault: &Fault) -> bool {
    fault.is(Errno::ENOSPC) || fault.is(Errno::ENOMEM)
}

fn seek(file: &OwnedFd, to: u64) -> Result<(), Fault> {
    lseek64(file, to.cast_signed(), Whence::SeekSet).map(drop).fault("seeking in", "the output buffer")
}

fn position(file: &OwnedFd) -> Result<u64, Fault> {
    lseek64(file, 0, Whence::SeekCur).map(i64::cast_unsigned).fault("seeking in", "the output buffer")
}

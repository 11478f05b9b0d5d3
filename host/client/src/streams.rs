//! The stream channel: the frames of all processes come through one socket and are distributed by number.

use std::collections::{HashMap, VecDeque};
use std::io::{IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::CallError;
use super::greeting::Greeted;
use hyperinit_protocol::fault::{Fault, OrFault};
use hyperinit_protocol::frame::{self, StreamDecoder};

/// How many bytes of one stream are kept for a slow reader. Beyond that the socket is not read, so the
/// guest's processes wait as on a full pipe.
const KEPT: usize = 1 << 20;
/// The maximum number of stdin bytes in one frame, unless the caller asks for another.
const STDIN_FRAME: usize = 32 << 10;

/// The state that the reader thread and the callers share.
#[derive(Debug)]
pub(super) struct Streams {
    state: Mutex<State>,
    changed: Condvar,
    /// Held while a frame is written, because frames must not be interleaved.
    writer: Mutex<UnixStream>,
    socket: UnixStream,
}

#[derive(Debug, Default)]
struct State {
    sinks: HashMap<u64, Sink>,
    /// How many processes have been registered.
    generation: u64,
    others: Others,
    broken: Option<String>,
}

/// How to treat streams that no caller has registered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Others {
    /// As a violation of the protocol.
    #[default]
    Wrong,
    /// As another host's: their data is discarded.
    ThrownAway,
    /// As another host's, and no stream will be registered: data is discarded without looking for frames.
    Everything,
}

/// One direction of one stream: guest → host.
#[derive(Debug, Default)]
struct Sink {
    /// The number of the registration that this sink belongs to. Stream numbers are reused.
    generation: u64,
    chunks: VecDeque<Vec<u8>>,
    bytes: usize,
    ended: bool,
    /// How many EOF frames have come for this number. A frame for a stream that is gone is answered with
    /// another one.
    eof_frames: u32,
    /// The number of the stderr stream that ends with this stream; 0 if there is none.
    stderr: u64,
    /// The `Output` was dropped, so data is discarded.
    discard: bool,
}

/// The host's ends of a process's streams.
#[derive(Debug)]
pub struct ProcessStreams {
    /// The process's stdin, or the input of its tty.
    pub stdin: Input,
    /// The process's stdout, or the output of its tty.
    pub stdout: Output,
    /// The process's stderr, if it is a separate stream.
    pub stderr: Option<Output>,
}

/// One stream, host → guest.
#[derive(Debug, Clone)]
pub struct Input {
    streams: Arc<Streams>,
    number: u64,
}

/// One stream, guest → host. Data that comes after it was dropped is discarded. It has ended as soon as its
/// number is registered for another process.
#[derive(Debug)]
pub struct Output {
    streams: Arc<Streams>,
    number: u64,
    generation: u64,
}

/// Starts the thread that reads the channel. Registers the streams that are `known`; others can be registered
/// later.
pub(super) fn start(
    greeted: Greeted,
    known: &[(u64, u64)],
    others: Others,
) -> Result<(Arc<Streams>, Vec<ProcessStreams>, JoinHandle<()>), Fault> {
    let Greeted { socket, before, heard } = greeted;
    let heard = [before, heard].concat();
    let clone = || socket.try_clone().fault("duplicating", "the stream socket");
    let (writer, mut reader) = (Mutex::new(clone()?), clone()?);
    let state = Mutex::new(State { others, ..State::default() });
    let streams = Arc::new(Streams { state, changed: Condvar::new(), writer, socket });
    let known = known.iter().map(|&(stdio, stderr)| of_process(&streams, stdio, stderr)).collect();
    let for_reader = Arc::clone(&streams);
    let thread = std::thread::spawn(move || {
        let why = for_reader.read_all(&mut reader, &heard);
        for_reader.break_off(why);
    });
    Ok((streams, known, thread))
}

/// Registers a process's stream numbers afresh, with nothing received for them.
pub(super) fn of_process(streams: &Arc<Streams>, stdio: u64, stderr: u64) -> ProcessStreams {
    let mut state = streams.state();
    state.generation += 1;
    let generation = state.generation;
    state.sinks.insert(stdio, Sink { generation, stderr, ..Sink::default() });
    if stderr != 0 {
        state.sinks.insert(stderr, Sink { generation, ..Sink::default() });
    }
    drop(state);
    // Wakes the readers and the reader thread that wait on the previous process of these numbers.
    streams.changed.notify_all();
    let output = |number| Output { streams: Arc::clone(streams), number, generation };
    ProcessStreams {
        stdin: Input { streams: Arc::clone(streams), number: stdio },
        stdout: output(stdio),
        stderr: (stderr != 0).then(|| output(stderr)),
    }
}

impl Streams {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn broken(&self) -> Option<String> {
        self.state().broken.clone()
    }

    /// How many streams are registered.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.state().sinks.len()
    }

    pub(super) fn hang_up(&self) {
        self.break_off("hung up".to_owned());
    }

    fn break_off(&self, why: String) {
        self.state().broken.get_or_insert(why);
        self.changed.notify_all();
        // The guest may have closed it already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Reads until the connection ends, and returns the reason.
    fn read_all(&self, socket: &mut UnixStream, heard: &[u8]) -> String {
        let mut decoder = StreamDecoder::default();
        let mut chunk = vec![0; 64 << 10];
        let all = self.state().others == Others::Everything;
        if let Err(why) = self.take_frames(&mut decoder, heard) {
            return why;
        }
        loop {
            let count = match socket.read(&mut chunk) {
                Ok(0) => return "the guest closed the stream channel".to_owned(),
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return format!("reading the stream channel: {error}"),
            };
            let bytes = chunk.get(..count).filter(|_| !all).unwrap_or_default();
            if let Err(why) = self.take_frames(&mut decoder, bytes) {
                return why;
            }
        }
    }

    /// Handles every complete frame; the error tells how the guest broke the protocol.
    fn take_frames(&self, decoder: &mut StreamDecoder, bytes: &[u8]) -> Result<(), String> {
        decoder.push(bytes);
        loop {
            match decoder.next_frame() {
                Ok(Some(frame)) => self.take(frame.tag, frame.payload)?,
                Ok(None) => return Ok(()),
                Err(violation) => return Err(format!("the guest sent {violation}")),
            }
        }
    }

    /// Adds a frame's payload to its stream. Waits while that stream has too much data already.
    fn take(&self, number: u64, payload: &[u8]) -> Result<(), String> {
        let mut state = self.state();
        let whose = state.sinks.get(&number).map(|sink| sink.generation);
        loop {
            if let Some(why) = &state.broken {
                return Err(why.clone());
            }
            if payload.is_empty() {
                state.end(number);
                break;
            }
            let others = state.others;
            let Some(sink) = state.sinks.get_mut(&number) else {
                if others != Others::Wrong {
                    return Ok(());
                }
                return Err(format!("the guest sent {} bytes on stream {number}, nobody's", payload.len()));
            };
            if sink.ended {
                return Err(format!(
                    "the guest sent {} bytes on stream {number} after its end",
                    payload.len()
                ));
            }
            // The number may have been registered for another process while this waited.
            if sink.discard || Some(sink.generation) != whose {
                return Ok(());
            }
            if sink.bytes < KEPT {
                sink.bytes += payload.len();
                sink.chunks.push_back(payload.to_vec());
                break;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Writes one frame; waits until the guest takes it.
    fn write(&self, number: u64, payload: &[u8]) -> Result<(), CallError> {
        let broken = |why: String| CallError::Broken(why);
        if let Some(why) = self.broken() {
            return Err(broken(why));
        }
        let header = frame::stream_header(number, payload.len()).map_err(|v| broken(v.to_string()))?;
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut parts = [IoSlice::new(&header), IoSlice::new(payload)];
        let mut rest = &mut parts[..];
        while !rest.is_empty() {
            match writer.write_vectored(rest) {
                Ok(count) => IoSlice::advance_slices(&mut rest, count),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // Part of a frame may be in the socket, so no further frame can be written.
                    let why = self.broken().unwrap_or(format!("writing stream bytes: {error}"));
                    self.break_off(why.clone());
                    return Err(broken(why));
                }
            }
        }
        Ok(())
    }
}

impl State {
    /// Ends a stream, and with it the stderr of its process (protocol.md «Streams»).
    fn end(&mut self, number: u64) {
        // If no stream is registered, this answers a frame for a stream that is gone, and ends nothing.
        let Some(sink) = self.sinks.get_mut(&number) else { return };
        sink.eof_frames += 1;
        sink.ended = true;
        let (generation, stderr) = (sink.generation, sink.stderr);
        if let Some(stderr) = self.sink(stderr, generation) {
            stderr.ended = true;
        }
        self.forget(number);
        self.forget(stderr);
    }

    /// A stream of the process with this generation; none if the number has been registered for another
    /// process.
    fn sink(&mut self, number: u64, generation: u64) -> Option<&mut Sink> {
        self.sinks.get_mut(&number).filter(|sink| sink.generation == generation)
    }

    /// Removes a stream that has ended and whose `Output` was dropped.
    fn forget(&mut self, number: u64) {
        if self.sinks.get(&number).is_some_and(|sink| sink.ended && sink.discard) {
            self.sinks.remove(&number);
        }
    }
}

impl Input {
    /// Sends bytes; waits while the guest does not take them.
    pub fn write(&self, bytes: &[u8]) -> Result<(), CallError> {
        self.write_in(STDIN_FRAME, bytes)
    }

    /// Sends bytes in frames of at most `size` payload bytes (runV's have 16).
    pub fn write_in(&self, size: usize, bytes: &[u8]) -> Result<(), CallError> {
        bytes.chunks(size.max(1)).try_for_each(|chunk| self.streams.write(self.number, chunk))
    }

    /// Closes the process's stdin; a tty has no such end and ignores it.
    pub fn close(&self) -> Result<(), CallError> {
        self.streams.write(self.number, &[])
    }
}

impl Output {
    /// The next bytes; `None` at the end. Waits without a limit.
    pub fn recv(&self) -> Result<Option<Vec<u8>>, CallError> {
        self.take(None)
    }

    /// The next bytes; `None` at the end. `CallError::Late` if none come within `timeout`.
    pub fn recv_within(&self, timeout: Duration) -> Result<Option<Vec<u8>>, CallError> {
        self.take(Some(timeout))
    }

    /// Everything up to the end, which must come within `timeout`.
    pub fn read_to_end(&self, timeout: Duration) -> Result<Vec<u8>, CallError> {
        let deadline = Instant::now() + timeout;
        let mut all = Vec::new();
        while let Some(bytes) = self.recv_within(deadline.saturating_duration_since(Instant::now()))? {
            all.extend_from_slice(&bytes);
        }
        Ok(all)
    }

    /// How many EOF frames have come for this stream.
    pub fn eof_frames(&self) -> u32 {
        self.streams.state().sink(self.number, self.generation).map_or(0, |sink| sink.eof_frames)
    }

    fn take(&self, timeout: Option<Duration>) -> Result<Option<Vec<u8>>, CallError> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut state = self.streams.state();
        loop {
            let Some(sink) = state.sink(self.number, self.generation) else { return Ok(None) };
            if let Some(chunk) = sink.chunks.pop_front() {
                sink.bytes -= chunk.len();
                self.streams.changed.notify_all();
                return Ok(Some(chunk));
            }
            if sink.ended {
                return Ok(None);
            }
            if let Some(why) = &state.broken {
                return Err(CallError::Broken(why.clone()));
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            state = match left {
                Some(left) if left.is_zero() => {
                    return Err(CallError::Late(format!("nothing more on stream {} in time", self.number)));
                }
                Some(left) => {
                    let waited = self.streams.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.streams.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        let mut state = self.streams.state();
        if let Some(sink) = state.sink(self.number, self.generation) {
            sink.discard = true;
            sink.chunks.clear();
            sink.bytes = 0;
            state.forget(self.number);
        }
        drop(state);
        self.streams.changed.notify_all();
    }
}

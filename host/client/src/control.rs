//! The control channel: one thread writes with runV's flow control, another one reads.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::credit::Outgoing;
use super::greeting::Greeted;
use super::{CallError, Finished};
use hyperinit_protocol::fault::{Fault, OrFault};
use hyperinit_protocol::frame::{self, ControlDecoder, Message};

type Reply = Result<Vec<u8>, CallError>;

/// A command that was sent, and whose reply has not been taken yet.
#[derive(Debug)]
pub struct Pending {
    reply: Receiver<Reply>,
    what: String,
}

impl Pending {
    /// A command that could not even be sent.
    pub(super) fn failed(error: CallError) -> Pending {
        let (sender, reply) = sync_channel(1);
        // The receiver exists in this function, so the send cannot fail.
        let _ = sender.send(Err(error));
        Pending { reply, what: String::new() }
    }

    /// Waits for the reply and returns the payload of its ACK, or why there is none.
    pub fn wait(&self, timeout: Duration) -> Result<Vec<u8>, CallError> {
        match self.reply.recv_timeout(timeout) {
            Ok(reply) => reply,
            Err(RecvTimeoutError::Timeout) => {
                Err(CallError::Late(format!("no reply to {} within {timeout:?}", self.what)))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(CallError::Broken(format!("the reply to {} was taken before", self.what)))
            }
        }
    }
}

/// The state that the threads and the callers share.
#[derive(Debug)]
pub(super) struct Control {
    state: Mutex<State>,
    changed: Condvar,
    socket: UnixStream,
}

#[derive(Debug, Default)]
struct State {
    outgoing: Outgoing,
    /// Commands without a reply, oldest first.
    awaited: VecDeque<Awaited>,
    ready: bool,
    /// READY has come over this connection, not over an earlier one.
    said_ready: bool,
    /// Everything that earlier connections received has been handled.
    is_own: bool,
    events: VecDeque<Finished>,
    broken: Option<String>,
}

#[derive(Debug)]
struct Awaited {
    /// The position of the command's last byte, counted over all bytes sent.
    end: u64,
    reply: SyncSender<Reply>,
}

/// Starts the threads that write to and read from a connected socket.
pub(super) fn start(greeted: Greeted) -> Result<(Arc<Control>, Vec<JoinHandle<()>>), Fault> {
    let Greeted { socket, before, heard } = greeted;
    let writer = socket.try_clone().fault("duplicating", "the control socket")?;
    let reader = socket.try_clone().fault("duplicating", "the control socket")?;
    let control = Arc::new(Control { state: Mutex::default(), changed: Condvar::new(), socket });
    let (for_writer, for_reader) = (Arc::clone(&control), Arc::clone(&control));
    let threads = vec![
        std::thread::spawn(move || for_writer.write_all(writer)),
        std::thread::spawn(move || for_reader.read_all(reader, &before, &heard)),
    ];
    Ok((control, threads))
}

impl Control {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues a message.
    pub(super) fn send(&self, id: u32, payload: &[u8]) -> Pending {
        self.queue(&mut self.state(), id, payload)
    }

    /// Queues two messages; the writer sees either both of them or none.
    pub(super) fn send_both(&self, messages: [(u32, &[u8]); 2]) -> [Pending; 2] {
        let mut state = self.state();
        messages.map(|(id, payload)| self.queue(&mut state, id, payload))
    }

    fn queue(&self, state: &mut State, id: u32, payload: &[u8]) -> Pending {
        let frame = match frame::control(id, payload) {
            Ok(frame) => frame,
            Err(violation) => return Pending::failed(CallError::Refused(format!("not sent: {violation}"))),
        };
        if let Some(why) = &state.broken {
            return Pending::failed(CallError::Broken(why.clone()));
        }
        let (sender, reply) = sync_channel(1);
        let end = state.outgoing.push(frame);
        state.awaited.push_back(Awaited { end, reply: sender });
        self.changed.notify_all();
        let what = Message::from_id(id).map_or_else(|| format!("message {id}"), |known| known.to_string());
        Pending { reply, what }
    }

    pub(super) fn ready(&self, timeout: Duration) -> Result<(), CallError> {
        self.wait(timeout, "no READY", |state| state.ready.then_some(()))
    }

    pub(super) fn event(
        &self,
        timeout: Duration,
        what: &str,
        wanted: impl Fn(&Finished) -> bool,
    ) -> Result<Finished, CallError> {
        self.wait(timeout, &format!("waiting for {what}: no such event"), |state| {
            let at = state.events.iter().position(&wanted)?;
            state.events.remove(at)
        })
    }

    /// Waits until `take` finds something. What came before the connection broke can still be found.
    fn wait<T>(
        &self,
        timeout: Duration,
        late: &str,
        mut take: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, CallError> {
        let deadline = Instant::now() + timeout;
        let mut state = self.state();
        loop {
            if let Some(found) = take(&mut state) {
                return Ok(found);
            }
            if let Some(why) = &state.broken {
                return Err(CallError::Broken(why.clone()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(CallError::Late(format!("{late} within {timeout:?}")));
            }
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    pub(super) fn broken(&self) -> Option<String> {
        self.state().broken.clone()
    }

    pub(super) fn credit(&self) -> (u64, u64) {
        self.state().outgoing.credit()
    }

    pub(super) fn hang_up(&self) {
        self.break_off("hung up".to_owned());
    }

    /// Ends the connection for good: every outstanding command gets an error.
    fn break_off(&self, why: String) {
        let mut state = self.state();
        if state.broken.is_none() {
            for awaited in state.awaited.drain(..) {
                // If the `Pending` was dropped, there is no receiver.
                let _ = awaited.reply.send(Err(CallError::Broken(why.clone())));
            }
            state.broken = Some(why);
        }
        drop(state);
        self.changed.notify_all();
        // Wakes both threads. The guest may have closed the connection already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn write_all(&self, mut socket: UnixStream) {
        while let Some(chunk) = self.next_chunk() {
            if let Err(error) = socket.write_all(&chunk) {
                self.break_off(format!("writing control bytes: {error}"));
            }
        }
    }

    /// The next bytes of the oldest frame, once all bytes written have been credited; `None` when the
    /// connection has ended.
    fn next_chunk(&self) -> Option<Vec<u8>> {
        let mut state = self.state();
        loop {
            if state.broken.is_some() {
                return None;
            }
            if let Some(chunk) = state.outgoing.next_chunk() {
                return Some(chunk);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn read_all(&self, mut socket: UnixStream, before: &[u8], heard: &[u8]) {
        let mut decoder = ControlDecoder::default();
        decoder.push(before);
        if let Err(why) = self.take_frames(&mut decoder) {
            return self.break_off(why);
        }
        self.state().is_own = true;
        decoder.push(heard);
        if let Err(why) = self.take_frames(&mut decoder) {
            return self.break_off(why);
        }
        let mut chunk = vec![0; 64 << 10];
        loop {
            let count = match socket.read(&mut chunk) {
                Ok(0) => return self.break_off("the guest closed the control channel".to_owned()),
                Ok(count) => count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return self.break_off(format!("reading the control channel: {error}")),
            };
            decoder.push(chunk.get(..count).unwrap_or_default());
            if let Err(why) = self.take_frames(&mut decoder) {
                return self.break_off(why);
            }
        }
    }

    /// Handles every complete frame; the error tells how the guest broke the protocol.
    fn take_frames(&self, decoder: &mut ControlDecoder) -> Result<(), String> {
        let mut state = self.state();
        loop {
            let frame = decoder.next_frame().map_err(|violation| format!("the guest sent {violation}"))?;
            let Some(frame) = frame else { break };
            state.take_frame(frame.tag, frame.payload)?;
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }
}

impl State {
    fn take_frame(&mut self, id: u32, payload: &[u8]) -> Result<(), String> {
        let message = Message::from_id(id).ok_or_else(|| format!("the guest sent message {id}"))?;
        match message {
            Message::Next => self.outgoing.take_next(payload),
            Message::Ack => self.take_reply(Ok(payload.to_vec())),
            Message::Error => {
                self.take_reply(Err(CallError::Refused(String::from_utf8_lossy(payload).into_owned())))
            }
            Message::ProcessAsyncEvent => {
                self.events.push_back(Finished::parse(payload)?);
                Ok(())
            }
            Message::Ready if self.said_ready => Err("the guest sent READY twice".to_owned()),
            Message::Ready => {
                // Over sockets a guest sends READY to every connection.
                (self.ready, self.said_ready) = (true, self.is_own);
                Ok(())
            }
            Message::GetVersion
            | Message::StartPod
            | Message::DestroyPod
            | Message::ExecCmd
            | Message::WinSize
            | Message::Ping
            | Message::WriteFile
            | Message::ReadFile
            | Message::NewContainer
            | Message::KillContainer
            | Message::OnlineCpuMem
            | Message::SetupInterface
            | Message::SetupRoute
            | Message::RemoveContainer
            | Message::SignalProcess
            | Message::DeleteInterface => Err(format!("the guest sent {message}, which only a host does")),
        }
    }

    fn take_reply(&mut self, reply: Reply) -> Result<(), String> {
        let awaited = self.awaited.pop_front().ok_or("the guest sent a reply to no command")?;
        if let Err(why) = self.outgoing.check_answered(awaited.end) {
            let _ = awaited.reply.send(Err(CallError::Broken(why.clone())));
            return Err(why);
        }
        // If the `Pending` was dropped, there is no receiver.
        let _ = awaited.reply.send(reply);
        Ok(())
    }
}

//! Which host has asked for which process: it tells where the process's output and its end go, and what
//! happens to the process when the host leaves.
//!
//! Each host chooses the stream numbers of its processes itself. The guest gets others in their place: an
//! even number and the next, which are never reused. So two hosts may use the same number, and late data for
//! a stream never reaches another process's stream.

use std::collections::BTreeMap;

use nix::libc;
use serde_json::Value;

use super::Visitor;
use crate::Finished;
use hyperinit_protocol::command::JSON_MAX;
use hyperinit_protocol::flow::Credit;
use hyperinit_protocol::frame::Message;

/// How many bytes of one process's stdin may wait in the guest, in addition to what its pipe holds. The guest
/// keeps 4 MiB for all processes.
const STDIN_WINDOW: usize = 32 << 10;
/// After how many further bytes of an output the guest is told again to hold it. More than can have been on
/// the way when it was told.
const HOLD_AGAIN: usize = 4 << 20;

/// Every process that a host has asked for and that is not finished with, by the guest's number of its stdio.
#[derive(Debug, Default)]
pub struct Processes {
    all: BTreeMap<u64, Asked>,
    /// The last number that was given out.
    last: u64,
}

/// A process that was asked for.
#[derive(Debug)]
struct Asked {
    /// `None` if the host that asked for it has left.
    visitor: Option<Visitor>,
    container: String,
    process: String,
    /// Started by EXECCMD, so it ends with its host. A container's own process goes on.
    is_exec: bool,
    terminal: bool,
    /// The host's numbers of its streams.
    stdio: u64,
    stderr: u64,
    /// Its streams have ended.
    ended: bool,
    /// Its event has come.
    finished: bool,
    /// Its host has sent it a signal of its own to say goodbye.
    left: bool,
    /// How many bytes of stdin it was sent that may still wait in the guest.
    unread: usize,
    /// Which of its two outputs (stdio, stderr) the guest was told to hold; `since` counts the bytes that
    /// have come since it was last told.
    held: [bool; 2],
    since: usize,
}

/// The signal that a process gets because its host has left.
#[derive(Debug, PartialEq, Eq)]
pub struct Goodbye {
    pub container: String,
    pub process: String,
    pub signal: i32,
}

/// The host's end of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Whose {
    pub visitor: Visitor,
    /// The host's own number of the stream.
    pub number: u64,
}

/// The outputs of a process that were held; they no longer are.
fn released(number: u64, asked: &mut Asked) -> impl Iterator<Item = u64> + use<> {
    let held = std::mem::take(&mut asked.held);
    [number, number | 1].into_iter().zip(held).filter(|(_, held)| *held).map(|(number, _)| number)
}

impl Processes {
    /// Takes note of a command. In a command that starts processes, the numbers of their streams are
    /// replaced, and the guest's numbers of their stdio are returned. The error is why the command is
    /// refused: its host already uses the number.
    ///
    /// A command that makes no sense is left as it is: the guest answers it with an ERROR.
    pub fn heed(
        &mut self,
        visitor: Visitor,
        message: u32,
        payload: &mut Vec<u8>,
    ) -> Result<Vec<u64>, String> {
        let is_exec = match Message::from_id(message) {
            Some(Message::StartPod | Message::NewContainer) => false,
            Some(Message::ExecCmd) => true,
            Some(Message::SignalProcess) => {
                self.heed_signal(visitor, payload);
                return Ok(Vec::new());
            }
            _ => return Ok(Vec::new()),
        };
        if payload.len() > JSON_MAX {
            return Ok(Vec::new());
        }
        let Ok(mut value) = serde_json::from_slice::<Value>(payload) else { return Ok(Vec::new()) };
        let before = self.last;
        let started = if message == Message::StartPod.id() {
            match value.get_mut("containers").and_then(Value::as_array_mut) {
                Some(containers) => containers
                    .iter_mut()
                    .map(|container| self.start(visitor, is_exec, "id", container))
                    .collect::<Result<Vec<_>, _>>(),
                None => return Ok(Vec::new()),
            }
        } else {
            let key = if is_exec { "container" } else { "id" };
            self.start(visitor, is_exec, key, &mut value).map(|one| vec![one])
        };
        let started = started.inspect_err(|_| drop(self.all.split_off(&(before + 1))));
        let started = started?.into_iter().flatten().collect();
        if let Ok(bytes) = serde_json::to_vec(&value) {
            *payload = bytes;
        }
        Ok(started)
    }

    /// Registers a process that is being asked for, and returns the guest's number of its stdio.
    fn start(
        &mut self,
        visitor: Visitor,
        is_exec: bool,
        key: &str,
        value: &mut Value,
    ) -> Result<Option<u64>, String> {
        let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        let Some(container) = text(value, key) else { return Ok(None) };
        let Some(process) = value.get_mut("process").filter(|process| process.is_object()) else {
            return Ok(None);
        };
        let number = |key: &str| process.get(key).map_or(Some(0), Value::as_u64);
        let (Some(stdio), Some(stderr)) = (number("stdio"), number("stderr")) else { return Ok(None) };
        let taken = |number: u64| number != 0 && self.of_host(visitor, number).is_some();
        if let Some(number) = [stdio, stderr].into_iter().find(|&number| taken(number)) {
            return Err(format!("stream {number} belongs to another process of this connection"));
        }
        let terminal = process.get("terminal").and_then(Value::as_bool).unwrap_or_default();
        let id = text(process, "id").unwrap_or_else(|| "init".to_owned());
        self.last += 2;
        for (key, theirs, ours) in [("stdio", stdio, self.last), ("stderr", stderr, self.last | 1)] {
            // Equal or missing numbers are passed on as such: whether they are an error is the guest's
            // decision.
            let ours = if key == "stderr" && stderr == stdio { self.last } else { ours };
            if let (true, Some(field)) = (theirs != 0, process.get_mut(key)) {
                *field = ours.into();
            }
        }
        let (ended, finished, left) = (false, false, false);
        let asked = Asked {
            visitor: Some(visitor),
            container,
            process: id,
            is_exec,
            terminal,
            stdio,
            stderr,
            ended,
            finished,
            left,
            unread: 0,
            held: [false; 2],
            since: 0,
        };
        self.all.insert(self.last, asked);
        Ok(Some(self.last))
    }

    /// Notes the signals by which a host says goodbye to a process itself (hyperctl's exec does): the process
    /// then gets no other one.
    fn heed_signal(&mut self, visitor: Visitor, payload: &[u8]) {
        let Ok(value) = serde_json::from_slice::<Value>(payload) else { return };
        let is = |key: &str, word: &str| value.get(key).and_then(Value::as_str) == Some(word);
        let signal = value.get("signal").and_then(Value::as_i64);
        let (pipe, hangup) = (Some(i64::from(libc::SIGPIPE)), Some(i64::from(libc::SIGHUP)));
        for asked in self.all.values_mut().filter(|asked| asked.visitor == Some(visitor)) {
            if is("container", &asked.container) && is("process", &asked.process) {
                asked.left = signal == pipe || asked.terminal && signal == hangup;
            }
        }
    }

    /// The guest has refused to start these processes.
    pub fn refused(&mut self, started: &[u64]) {
        for number in started {
            self.all.remove(number);
        }
    }

    /// The host's end of one of the guest's streams; `None` if no host has it.
    pub fn of_guest(&self, number: u64) -> Option<Whose> {
        let asked = self.all.get(&(number & !1))?;
        let theirs = if number & 1 == 0 { asked.stdio } else { asked.stderr };
        Some(Whose { visitor: asked.visitor?, number: theirs })
    }

    /// The guest's number of one of a host's streams that takes input.
    pub fn of_host(&self, visitor: Visitor, number: u64) -> Option<u64> {
        let is = |asked: &Asked| {
            asked.visitor == Some(visitor) && (asked.stdio == number || asked.stderr == number)
        };
        let (&ours, asked) = self.all.iter().find(|(_, asked)| is(asked))?;
        Some(if asked.stdio == number { ours } else { ours | 1 })
    }

    /// Whether one of the guest's streams has ended.
    pub fn has_ended(&self, number: u64) -> bool {
        self.all.get(&(number & !1)).is_none_or(|asked| asked.ended)
    }

    /// Marks the streams of the process with this stdio as ended.
    pub fn ended(&mut self, stdio: u64) {
        if let Some(asked) = self.all.get_mut(&stdio) {
            asked.ended = true;
            self.forget(stdio);
        }
    }

    /// Marks a process as finished, and returns the host to tell.
    pub fn finished(&mut self, event: &Finished) -> Option<Visitor> {
        let is = |asked: &Asked| {
            !asked.finished && asked.container == event.container && asked.process == event.process
        };
        // The first match: the guest has one process of that name at a time.
        let (&number, asked) = self.all.iter_mut().find(|(_, asked)| is(asked))?;
        asked.finished = true;
        let visitor = asked.visitor;
        self.forget(number);
        visitor
    }

    /// How many more bytes of stdin the guest may be sent for a process: data that a process does not read
    /// must not keep the guest from reading that of others.
    pub fn room(&self, number: u64) -> usize {
        self.all.get(&(number & !1)).map_or(0, |asked| STDIN_WINDOW.saturating_sub(asked.unread))
    }

    /// Counts stdin bytes that were sent for a process.
    pub fn sent(&mut self, number: u64, bytes: usize) {
        if let Some(asked) = self.all.get_mut(&(number & !1)) {
            asked.unread += bytes;
        }
    }

    /// Counts stdin bytes that no longer wait in the guest. Returns the process's host.
    pub fn credited(&mut self, credit: Credit) -> Option<Visitor> {
        let asked = self.all.get_mut(&credit.stdio)?;
        asked.unread = asked.unread.saturating_sub(usize::try_from(credit.bytes).unwrap_or(usize::MAX));
        asked.visitor
    }

    /// Counts output of a process whose host is behind. Returns whether the guest has to be told to hold that
    /// output.
    pub fn holds(&mut self, number: u64, bytes: usize) -> bool {
        let Some(asked) = self.all.get_mut(&(number & !1)) else { return false };
        let held = &mut asked.held[usize::from(number & 1 == 1)];
        asked.since += bytes;
        // It is told again from time to time, because a streamd that has died takes that knowledge with it.
        let tell = !*held || asked.since > HOLD_AGAIN;
        *held = true;
        if tell {
            asked.since = 0;
        }
        tell
    }

    /// A host has caught up. Returns the outputs that the guest may take again.
    pub fn release(&mut self, visitor: Visitor) -> Vec<u64> {
        let theirs = self.all.iter_mut().filter(|(_, asked)| asked.visitor == Some(visitor));
        theirs.flat_map(|(&number, asked)| released(number, asked)).collect()
    }

    /// A host has left. Returns the signals for its processes.
    pub fn leave(&mut self, visitor: Visitor) -> Vec<Goodbye> {
        let theirs = self.all.iter_mut().filter(|(_, asked)| asked.visitor == Some(visitor));
        let (mut numbers, mut goodbyes) = (Vec::new(), Vec::new());
        for (&number, asked) in theirs {
            asked.visitor = None;
            numbers.push(number);
            if asked.is_exec && !asked.finished && !asked.left {
                let (container, process) = (asked.container.clone(), asked.process.clone());
                let signal = if asked.terminal { libc::SIGHUP } else { libc::SIGKILL };
                goodbyes.push(Goodbye { container, process, signal });
            }
        }
        numbers.into_iter().for_each(|number| self.forget(number));
        goodbyes
    }

    /// Removes a process that has finished, once its output has ended or its host has left.
    fn forget(&mut self, number: u64) {
        let done = |asked: &Asked| asked.finished && (asked.ended || asked.visitor.is_none());
        if self.all.get(&number).is_some_and(done) {
            self.all.remove(&number);
        }
    }
}

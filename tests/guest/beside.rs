//! Checks that other containers keep working while one operation is held up.

use std::io::Write;
use std::time::{Duration, Instant};

use hyperinit::command::{Command, ExecCmd, KillContainer};
use hyperinit::ids::Signal;
use hyperinit_client::{CallError, Pending};
use serde_json::{Value, json};

use super::{Guest, PATIENCE, container_id, merge, parse, process_value};

/// How many containers come and go beside the operation that is held up. The variable `BESIDE` overrides the
/// number for a run by hand.
pub fn times(usually: usize) -> usize {
    std::env::var("BESIDE").map_or(usually, |times| times.parse().expect("BESIDE is a number"))
}

/// The commands sent beside the operation that is held up, in order, and how long each took until the host
/// saw its effect.
#[derive(Default)]
pub struct Beside {
    replies: Vec<Pending>,
    starts: Vec<Duration>,
    execs: Vec<Duration>,
    ends: Vec<Duration>,
}

impl Beside {
    /// Starts a container, executes something in it and kills it, `times` times. Does not wait for replies:
    /// they come in the order of the commands, and one of an earlier command may be held up. `more` is merged
    /// into the JSON of each container.
    pub fn live(&mut self, guest: &Guest, times: usize, more: &Value) {
        for _ in 0..times {
            let id = format!("beside{}", self.starts.len());
            self.start(guest, &id, more);
            self.exec(guest, &id);
            self.end(guest, &id);
        }
    }

    fn start(&mut self, guest: &Guest, id: &str, more: &Value) {
        let (process, stdio, stderr) =
            process_value("init", &["sh", "-c", "echo up; exec sleep 100000"], json!({}));
        let streams = guest.client().streams(stdio, stderr);
        let begin = Instant::now();
        self.replies.push(guest.client().send(new_container(id, process, more)));
        let said = streams.stdout.recv_within(PATIENCE);
        let said = said.unwrap_or_else(|error| panic!("{id} is not started: {error}\n{}", guest.log()));
        assert_eq!(said.as_deref(), Some(&b"up\n"[..]), "{}", guest.log());
        self.starts.push(begin.elapsed());
    }

    fn exec(&mut self, guest: &Guest, id: &str) {
        let (process, stdio, stderr) = process_value("exec", &["echo", "word"], json!({}));
        let streams = guest.client().streams(stdio, stderr);
        let process = Box::new(parse(process));
        let begin = Instant::now();
        self.replies
            .push(guest.client().send(Command::ExecCmd(ExecCmd { container: container_id(id), process })));
        let said = streams.stdout.read_to_end(PATIENCE);
        let said = said.unwrap_or_else(|error| panic!("nothing runs in {id}: {error}\n{}", guest.log()));
        assert_eq!(said, b"word\n");
        ended(guest, id, "exec", 0);
        self.execs.push(begin.elapsed());
    }

    fn end(&mut self, guest: &Guest, id: &str) {
        let begin = Instant::now();
        self.replies.push(guest.client().send(kill(id)));
        ended(guest, id, "init", 128 + 9);
        self.ends.push(begin.elapsed());
    }

    /// Waits for all replies, once nothing is held up any more, and writes the times to standard error.
    pub fn done(self, beside: &str) {
        for reply in self.replies {
            reply.wait(PATIENCE).unwrap();
        }
        let text = |mut all: Vec<Duration>| {
            all.sort();
            let at = |place: usize| all.get(place).map_or(0, Duration::as_millis);
            format!("{} (at most {})", at(all.len() / 2), at(all.len() - 1))
        };
        let (start, exec, end) = (text(self.starts), text(self.execs), text(self.ends));
        let report = format!("{start} ms for a start, {exec} for an exec, {end} for a kill");
        let _ = writeln!(std::io::stderr(), "beside {beside}: {report}");
    }
}

fn ended(guest: &Guest, id: &str, process: &str, status: u8) {
    let finished = guest.client().finished(&container_id(id), &parse(json!(process)), PATIENCE);
    let finished =
        finished.unwrap_or_else(|error| panic!("{id}: {process} does not end: {error}\n{}", guest.log()));
    assert_eq!(finished, status);
}

fn new_container(id: &str, process: Value, more: &Value) -> Command {
    let mut container = json!({"id": id, "image": "image", "rootfs": "rootfs", "process": process});
    merge(&mut container, more.clone());
    Command::NewContainer(Box::new(parse(container)))
}

/// Asks for a container that lives until it is killed, without waiting for the reply.
pub fn begin(guest: &Guest, id: &str, more: &Value) -> Pending {
    let (process, _, _) = process_value("init", &["sleep", "100000"], json!({}));
    guest.client().send(new_container(id, process, more))
}

/// KILLCONTAINER with SIGKILL.
pub fn kill(id: &str) -> Command {
    Command::KillContainer(KillContainer { container: container_id(id), signal: Signal::KILL })
}

/// Whether a command is still under way. Panics if it has been answered.
pub fn is_held_up(pending: &Pending) -> bool {
    match pending.wait(Duration::ZERO) {
        Err(CallError::Late(_)) => true,
        other => panic!("it was answered: {other:?}"),
    }
}

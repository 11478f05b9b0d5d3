//! What a host does meanwhile, and what it has to get.

use std::sync::atomic::{AtomicU64, Ordering};

use hyperinit::command::{Command, File, RemoveContainer, SignalProcess, WinSize, WriteFile};
use hyperinit::ids::{ProcessId, Signal};
use hyperinit_client::{CallError, Output, Pending, ProcessStreams};
use serde_json::{Value, json};

use super::driver::{Counts, PATTERN, crlf};
use super::guest::{Guest, PATIENCE, container_id, kill, parse, parse_exec};
use super::killer::ports;
use super::random::Random;

/// How a process comes to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It exits.
    Itself,
    /// It is asked to by a signal, says a word and exits.
    Asked,
    /// By SIGKILL.
    Killed,
}

/// What a process is to do.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// How much it writes, in bytes.
    stdout: usize,
    stderr: usize,
    /// Its exit code, unless it is killed.
    status: u8,
    ending: Ending,
    terminal: bool,
    /// It writes bit by bit.
    slow: bool,
}

/// A process, and what the host has got of it.
struct Process {
    id: String,
    plan: Plan,
    numbers: (u64, u64),
    streams: ProcessStreams,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

/// A host of one container after the other, with several things under way.
pub struct Worker<'a> {
    guest: &'a Guest,
    counts: &'a Counts,
    random: Random,
    number: u64,
    /// Of starts that failed: nothing may ever come there.
    pub silent: Vec<Output>,
}

/// What an ERROR must be: the death of a helper.
pub fn explained(error: &CallError) {
    match error {
        CallError::Refused(text) if text.contains("it died before it answered") => {}
        error => panic!("not the death of a helper: {error}"),
    }
}

impl Plan {
    /// One that says little.
    pub fn small(status: u8) -> Plan {
        Plan { stdout: 10, stderr: 0, status, ending: Ending::Itself, terminal: false, slow: false }
    }

    fn random(random: &mut Random) -> Plan {
        let terminal = random.once_in(5);
        let slow = random.once_in(6);
        let size = |random: &mut Random| match (slow, terminal) {
            (true, _) => 1000 * random.below(20) as usize,
            (_, true) => random.size() / 8,
            _ => random.size(),
        };
        Plan {
            stdout: size(random),
            stderr: if terminal { 0 } else { size(random) },
            status: random.below(120) as u8,
            ending: random.one_of(&[Ending::Itself, Ending::Itself, Ending::Asked, Ending::Killed]),
            terminal,
            slow,
        }
    }

    fn script(&self) -> String {
        let write = |count: usize, to: &str| {
            if self.slow {
                format!(
                    "i=0; while [ $i -lt {} ]; do dd if=/pattern bs=1000 skip=$i count=1 {to} 2>/dev/null; i=$((i+1)); done",
                    count / 1000
                )
            } else {
                format!("head -c {count} /pattern {to}")
            }
        };
        let (out, err) = (write(self.stdout, ""), write(self.stderr, ">&2"));
        let status = self.status;
        match self.ending {
            Ending::Itself if self.terminal => format!("{out}; exit {status}"),
            Ending::Itself => format!("({out}) & {err}; wait; exit {status}"),
            // Ready for the signal when it has said everything.
            Ending::Asked | Ending::Killed => {
                format!("trap 'echo bye; exit {status}' TERM; {out}; {err}; echo up >&2; sleep 100000 & wait")
            }
        }
    }

    /// What is expected on stdout and stderr; with a tty all of it on the first.
    fn expected(&self) -> (Vec<u8>, Vec<u8>) {
        let (mut out, mut err) = (PATTERN[..self.stdout].to_vec(), PATTERN[..self.stderr].to_vec());
        if self.ending != Ending::Itself {
            err.extend(b"up\n");
        }
        if self.terminal {
            out.append(&mut err);
        }
        if self.ending == Ending::Asked {
            out.extend(b"bye\n");
        }
        if self.terminal { (crlf(&out), err) } else { (out, err) }
    }

    fn expected_status(&self) -> u8 {
        if self.ending == Ending::Killed { 128 + 9 } else { self.status }
    }
}

impl<'a> Worker<'a> {
    pub fn new(guest: &'a Guest, counts: &'a Counts, random: Random, number: u64) -> Worker<'a> {
        Worker { guest, counts, random, number, silent: Vec::new() }
    }

    fn container(&self) -> String {
        format!("c{}", self.number)
    }

    // ---- commands ----

    /// A reply that has to be an empty ACK or the death of a helper; true if it is an ACK.
    fn acked(&self, reply: Result<Vec<u8>, CallError>) -> bool {
        self.counts.replies.fetch_add(1, Ordering::Relaxed);
        match reply {
            Ok(payload) => {
                assert_eq!(payload, b"", "an ACK of another command");
                true
            }
            Err(error) => {
                explained(&error);
                self.counts.errors.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }

    /// A command that init answers itself, whoever dies.
    fn must(&self, command: Command) {
        let what = format!("{command:?}");
        let reply = self.guest.client().send(command).wait(PATIENCE);
        assert!(reply.is_ok(), "{what}: {reply:?}");
        self.acked(reply);
    }

    fn send_start(&self, id: &str, plan: &Plan, numbers: (u64, u64)) -> (Pending, ProcessStreams) {
        let (stdio, stderr) = numbers;
        let streams = self.guest.client().streams(stdio, stderr);
        let args = ["sh", "-c", &plan.script()];
        let process =
            json!({"id": id, "args": args, "stdio": stdio, "stderr": stderr, "terminal": plan.terminal});
        let command = match id {
            "init" => Command::NewContainer(Box::new(parse(self.container_value(process)))),
            _ => parse_exec(&self.container(), process),
        };
        (self.guest.client().send(command), streams)
    }

    fn container_value(&self, process: Value) -> Value {
        json!({"id": self.container(), "image": "image", "rootfs": "rootfs", "process": process,
            "ports": ports(self.number)})
    }

    /// Sends a start that is waited for later.
    fn begin(&mut self, id: Option<&str>, plan: Plan) -> (Pending, Process) {
        let numbers = new_numbers(plan.terminal);
        let id = id.map_or_else(|| format!("p{}", numbers.0), str::to_owned);
        let (pending, streams) = self.send_start(&id, &plan, numbers);
        (pending, Process { id, plan, numbers, streams, stdout: Vec::new(), stderr: Vec::new() })
    }

    /// Waits for a start, and starts again what a death has kept from starting.
    fn started(&mut self, (mut pending, mut process): (Pending, Process)) -> Process {
        while !self.acked(pending.wait(PATIENCE)) {
            // With the same numbers, or others: then nothing may come on the old ones.
            let ProcessStreams { stdout, stderr, .. } = process.streams;
            if self.random.once_in(2) {
                process.numbers = new_numbers(process.plan.terminal);
                self.silent.extend([Some(stdout), stderr].into_iter().flatten());
            } else {
                // Before the numbers are taken again: a drop discards what comes for them.
                drop((stdout, stderr));
            }
            (pending, process.streams) = self.send_start(&process.id, &process.plan, process.numbers);
        }
        self.counts.processes.fetch_add(1, Ordering::Relaxed);
        process
    }

    /// Sees a process through to its end.
    fn end(&mut self, mut process: Process) {
        if process.plan.ending != Ending::Itself {
            process.until_up();
            let signal = if process.plan.ending == Ending::Asked { Signal::TERM } else { Signal::KILL };
            if process.id == "init" {
                self.must(kill(&self.container(), i64::from(signal.get())));
            } else {
                self.must(Command::SignalProcess(SignalProcess {
                    container: container_id(&self.container()),
                    process: ProcessId::try_from(process.id.clone()).unwrap(),
                    signal,
                }));
            }
        }
        self.check_end(process);
    }

    /// The end of a process: all of its output, its end-of-stream frame, once, and its status.
    fn check_end(&mut self, mut process: Process) {
        process.read_to_end();
        let status = self.status(&process.id);
        let (stdout, stderr) = process.plan.expected();
        let what = format!("{}: {:?}", process.id, process.plan);
        same(&process.stdout, &stdout, &format!("{what}: stdout"));
        same(&process.stderr, &stderr, &format!("{what}: stderr"));
        assert_eq!(status, process.plan.expected_status(), "{what}");
        assert_eq!(process.streams.stdout.eof_frames(), 1, "{what}: its end-of-stream frames");
        self.counts.bytes.fetch_add((stdout.len() + stderr.len()) as u64, Ordering::Relaxed);
    }

    fn status(&self, id: &str) -> u8 {
        let (container, process) =
            (container_id(&self.container()), ProcessId::try_from(id.to_owned()).unwrap());
        self.guest.client().finished(&container, &process, PATIENCE).unwrap()
    }

    /// One process from its start to its end.
    pub fn run_one(&mut self, plan: Plan) {
        let begun = self.begin(None, plan);
        let process = self.started(begun);
        self.end(process);
    }

    // ---- rounds ----

    /// A container that lives until [`Worker::leave`].
    pub fn settle(&mut self) -> Container {
        let plan = Plan { ending: Ending::Killed, ..Plan::small(0) };
        let begun = self.begin(Some("init"), plan);
        Container(self.started(begun))
    }

    /// The end of a container.
    pub fn leave(&mut self, container: Container) {
        self.end(container.0);
        self.remove();
    }

    fn remove(&self) {
        self.must(Command::RemoveContainer(RemoveContainer { container: container_id(&self.container()) }));
        self.counts.containers.fetch_add(1, Ordering::Relaxed);
    }

    /// A container, things in it, and its end.
    pub fn round(&mut self, over: &dyn Fn() -> bool) {
        let mut plan = Plan::random(&mut self.random);
        if plan.ending == Ending::Itself && !self.random.once_in(4) {
            plan.ending = Ending::Asked;
        }
        let begun = self.begin(Some("init"), plan);
        let init = self.started(begun);
        if plan.ending == Ending::Itself {
            self.check_end(init);
            return self.remove();
        }
        for _ in 0..1 + self.random.below(12) {
            if over() {
                break;
            }
            match self.random.below(10) {
                0 => self.resize(),
                1 => self.feed(),
                2 => {
                    let size = self.random.size() / 2;
                    self.write_and_read(size);
                }
                3 => self.replies_in_order(),
                _ => self.several(),
            }
        }
        self.end_with_company(init);
    }

    /// Several processes at once.
    fn several(&mut self) {
        let count = 1 + self.random.below(5);
        let begun: Vec<_> = (0..count)
            .map(|_| {
                let plan = Plan::random(&mut self.random);
                self.begin(None, plan)
            })
            .collect();
        let mut processes: Vec<_> = begun.into_iter().map(|begun| self.started(begun)).collect();
        while !processes.is_empty() {
            let next = self.random.below(processes.len() as u64) as usize;
            self.end(processes.swap_remove(next));
        }
    }

    /// The end of a container ends what is in it: what was written is not lost, nor is a status.
    fn end_with_company(&mut self, init: Process) {
        let plan = Plan { ending: Ending::Killed, ..Plan::random(&mut self.random) };
        let mut company = None;
        if self.random.once_in(2) {
            let begun = self.begin(None, plan);
            let mut process = self.started(begun);
            process.until_up();
            company = Some(process);
        }
        self.end(init);
        if let Some(process) = company {
            self.check_end(process);
        }
        self.remove();
    }

    /// A tty gets the size that was ACKed.
    fn resize(&mut self) {
        let (row, column) = (10 + self.random.below(200) as u16, 10 + self.random.below(200) as u16);
        let plan = Plan { terminal: true, ending: Ending::Itself, ..Plan::small(9) };
        let (pending, mut process) = {
            let numbers = new_numbers(true);
            let id = format!("p{}", numbers.0);
            let script = "trap 'stty size; exit 9' WINCH; echo up; while :; do sleep 0.02; done";
            let streams = self.guest.client().streams(numbers.0, 0);
            let value = json!({"id": id, "args": ["sh", "-c", script], "stdio": numbers.0, "terminal": true});
            let pending = self.guest.client().send(parse_exec(&self.container(), value));
            (pending, Process { id, plan, numbers, streams, stdout: Vec::new(), stderr: Vec::new() })
        };
        if !self.acked(pending.wait(PATIENCE)) {
            return self.silent.push(process.streams.stdout);
        }
        process.until_up();
        let size = || {
            Command::WinSize(WinSize {
                container: container_id(&self.container()),
                process: ProcessId::try_from(process.id.clone()).unwrap(),
                row,
                column,
            })
        };
        let mut failed = false;
        loop {
            match self.guest.client().send(size()).wait(PATIENCE) {
                // The one that failed may have done it, and the process be gone.
                Err(CallError::Refused(text)) if failed && text.contains(": no such ") => break,
                reply if self.acked(reply.clone()) => break,
                _ => failed = true,
            }
        }
        process.read_to_end();
        let text = String::from_utf8_lossy(&process.stdout).into_owned();
        assert_eq!(text, format!("up\r\n{row} {column}\r\n"));
        assert_eq!(self.status(&process.id), 9);
    }

    /// stdin: a streamd that dies costs the rest of it, and leaves no gap.
    fn feed(&mut self) {
        let size = 1 + self.random.size();
        let deaths = self.counts.deaths_of_streamd();
        let numbers = new_numbers(false);
        let id = format!("p{}", numbers.0);
        let streams = self.guest.client().streams(numbers.0, numbers.1);
        let value = json!({"id": id, "args": ["cat"], "stdio": numbers.0, "stderr": numbers.1});
        let reply = self.guest.client().send(parse_exec(&self.container(), value)).wait(PATIENCE);
        if !self.acked(reply) {
            return self.silent.push(streams.stdout);
        }
        let frame = self.random.one_of(&[16, 5_000, 40_000]);
        streams.stdin.write_in(frame, &PATTERN[..size]).unwrap();
        streams.stdin.close().unwrap();
        let got = streams.stdout.read_to_end(PATIENCE).unwrap();
        assert!(PATTERN[..size].starts_with(&got), "{id}: a gap in its stdin");
        assert_eq!(self.status(&id), 0, "{id}");
        let whole = got.len() == size;
        self.counts.fed(deaths, whole);
    }

    /// A file is what was written to it.
    pub fn write_and_read(&mut self, size: usize) {
        let file = format!("/tmp/f{}", new_numbers(true).0);
        let container = container_id(&self.container());
        let from = self.random.below(1000) as usize;
        let data = &PATTERN[from..from + size];
        let write = || {
            let (container, file) = (container.clone(), file.clone());
            Command::WriteFile(WriteFile { file: File { container, file }, data: data.to_vec() })
        };
        while !self.acked(self.guest.client().send(write()).wait(PATIENCE)) {}
        let read = || Command::ReadFile(File { container: container.clone(), file: file.clone() });
        loop {
            match self.guest.client().send(read()).wait(PATIENCE) {
                Ok(got) => {
                    same(&got, data, &file);
                    return;
                }
                reply => assert!(!self.acked(reply)),
            }
        }
    }

    /// Commands of which each reply tells whose it is.
    fn replies_in_order(&mut self) {
        let client = self.guest.client();
        let name = format!("nobody-{}", new_numbers(true).0);
        let pending = [
            client.send(Command::GetVersion),
            client.send(kill(&name, 9)),
            client.send(Command::Ping),
            client.send(Command::RemoveContainer(RemoveContainer { container: container_id(&name) })),
        ];
        let replies = pending.map(|pending| pending.wait(PATIENCE));
        self.counts.replies.fetch_add(replies.len() as u64, Ordering::Relaxed);
        let [version, killed, ping, removed] = replies;
        assert_eq!(version.unwrap(), 4244u32.to_be_bytes());
        assert_eq!(ping.unwrap(), b"");
        for refused in [killed, removed] {
            let text = super::guest::refusal(refused);
            assert!(text.contains(&name) && text.contains("no such container"), "{text}");
        }
    }
}

/// A container that lives.
pub struct Container(Process);

impl Process {
    /// Reads until it has said that it is ready for a signal.
    fn until_up(&mut self) {
        let what = format!("{}: {:?}", self.id, self.plan);
        let (output, to) = match &self.streams.stderr {
            Some(stderr) => (stderr, &mut self.stderr),
            None => (&self.streams.stdout, &mut self.stdout),
        };
        let up: &[u8] = if self.plan.terminal { b"up\r\n" } else { b"up\n" };
        while !to.ends_with(up) {
            match output.recv_within(PATIENCE) {
                Ok(Some(bytes)) => to.extend(bytes),
                other => panic!("{what}: {other:?} after {} bytes", to.len()),
            }
        }
    }

    fn read_to_end(&mut self) {
        self.stdout.extend(self.streams.stdout.read_to_end(PATIENCE).unwrap());
        if let Some(stderr) = &self.streams.stderr {
            self.stderr.extend(stderr.read_to_end(PATIENCE).unwrap());
        }
    }
}

/// Stream numbers that nobody has; a tty has no second one.
fn new_numbers(terminal: bool) -> (u64, u64) {
    static NEXT: AtomicU64 = AtomicU64::new(1_000_000);
    let stdio = NEXT.fetch_add(2, Ordering::Relaxed);
    (stdio, if terminal { 0 } else { stdio + 1 })
}

fn same(got: &[u8], wanted: &[u8], what: &str) {
    if got != wanted {
        let at = got.iter().zip(wanted).position(|(a, b)| a != b);
        panic!("{what}: {} bytes instead of {}, differ at {at:?}", got.len(), wanted.len());
    }
}

//! The guest: the same through the whole protocol.

use std::collections::VecDeque;
use std::path::Path;
use std::time::{Duration, Instant};

use hyperinit_client::{CallError, Client, Pending, ProcessStreams};
use hyperinit_protocol::command::{Command, ExecCmd, KillContainer, RemoveContainer};
use hyperinit_protocol::fault::{Fault, OrFault};
use hyperinit_protocol::ids::{ContainerId, Signal};
use hyperinit_protocol::spec::{Container, Pod, Process};
use serde_json::{Value, json};

use super::super::cli::Bench;
use super::super::guest::{CONSOLE, SHARE_TAG};
use super::floor::Floor;
use super::report::Report;
use super::{BOOT_TIMEOUT, BYTES, Current, PROGRAM, floor_of, median, rate};

/// How long one thing may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);
/// For how long an idle guest is watched.
const IDLE: Duration = Duration::from_secs(5);

/// The host of a guest that is measured.
pub(super) struct Session {
    pub(super) client: Client,
    next_stream: u64,
    /// Processes that are started for a row.
    execs: u32,
    /// Containers that are.
    containers: u32,
}

/// Boots a guest and adds its rows.
pub(super) fn measure(
    options: &Bench,
    rootfs: &Path,
    directory: &Path,
    current: &Current,
    floor: &Floor,
    report: &mut Report,
) -> Result<(), Fault> {
    let mut options = options.clone();
    options.options.append.push_str(" hyper_log=info");
    current.start(&options, rootfs, directory, false)?;
    let client = Client::connect_within(directory, BOOT_TIMEOUT, || Ok(()))?;
    client.ready(BOOT_TIMEOUT).map_err(failed("booting"))?;
    client.introduce();
    let mut session = Session::new(client, options.rounds);
    boot(&directory.join(CONSOLE), report);
    session.pod(report)?;
    session.containers(floor, report)?;
    session.one_by_one(floor.exec, report)?;
    session.in_flight(floor, report)?;
    session.throughput(floor, report)?;
    session.pings(floor, report)?;
    session.idle_containers(report)?;
    if options.local {
        processes(directory, report)?;
    }
    session.crowd(report)?;
    current.end();
    Ok(())
}

pub(super) fn failed(doing: &'static str) -> impl Fn(CallError) -> Fault {
    move |error| Fault::new(doing, "", error.to_string())
}

/// What init says of its own boot: `up after N ms, M ms of them for modules`.
fn boot(console: &Path, report: &mut Report) {
    let log = std::fs::read(console).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let Some((_, said)) = log.rsplit_once("init: up after ") else { return };
    let numbers: Vec<f64> = said
        .split(|c: char| !c.is_ascii_digit() && c != '.')
        .filter_map(|word| word.parse().ok())
        .take(2)
        .collect();
    if let [whole, modules] = numbers[..] {
        report.row("exec of init to READY, without modules", "ms", whole - modules, None, "<= 64 ms");
        report.row("kernel modules of the image", "ms", modules, None, "");
    }
}

impl Session {
    pub(super) fn new(client: Client, rounds: u32) -> Session {
        Session { client, next_stream: 1, execs: rounds, containers: rounds.div_ceil(10) }
    }

    /// A process with streams of its own.
    pub(super) fn process(&mut self, id: &str, args: &[&str], more: Value) -> Result<Process, Fault> {
        self.next_stream += 2;
        let mut value =
            json!({"id": id, "args": args, "stdio": self.next_stream, "stderr": self.next_stream + 1});
        if let (Value::Object(value), Value::Object(more)) = (&mut value, more) {
            value.extend(more);
        }
        parse(value)
    }

    /// Starts a process; what is to be waited for.
    pub(super) fn exec(
        &mut self,
        container: &str,
        process: Process,
    ) -> Result<(ProcessStreams, Pending), Fault> {
        let streams = self.client.streams(process.stdio, process.stderr);
        let exec = ExecCmd { container: id(container)?, process: Box::new(process) };
        Ok((streams, self.client.send(Command::ExecCmd(exec))))
    }

    pub(super) fn start_container(&mut self, name: &str, args: &[&str]) -> Result<Duration, Fault> {
        let process = self.process("init", args, json!({}))?;
        let container: Container =
            parse(json!({"id": name, "image": "", "rootfs": "", "process": process, "initialize": false}))?;
        let _ = self.client.streams(process.stdio, process.stderr);
        let start = Instant::now();
        self.client.call(Command::NewContainer(Box::new(container))).map_err(failed("making a container"))?;
        Ok(start.elapsed())
    }

    fn end_container(&mut self, name: &str) -> Result<(), Fault> {
        let container = id(name)?;
        let kill = KillContainer { container: container.clone(), signal: Signal::KILL };
        self.client.call(Command::KillContainer(kill)).map_err(failed("ending a container"))?;
        let init = parse(json!("init"))?;
        self.client.finished(&container, &init, PATIENCE).map_err(failed("ending a container"))?;
        let remove = Command::RemoveContainer(RemoveContainer { container });
        match self.client.call(remove) {
            // The original guest removes a container when its init ends.
            Ok(_) | Err(CallError::Refused(_)) => Ok(()),
            Err(error) => Err(failed("removing a container")(error)),
        }
    }

    fn pod(&mut self, report: &mut Report) -> Result<(), Fault> {
        let pod: Pod = parse(json!({"hostname": "bench", "shareDir": SHARE_TAG}))?;
        let start = Instant::now();
        self.client.call(Command::StartPod(Box::new(pod))).map_err(failed("starting the pod"))?;
        report.time("STARTPOD", start.elapsed(), None, "<= 51 ms");
        self.start_container("main", &["/bin/busybox", "sleep", "100000"]).map(drop)
    }

    fn containers(&mut self, floor: &Floor, report: &mut Report) -> Result<(), Fault> {
        let mut times = Vec::new();
        for number in 0..self.containers {
            let name = format!("c{number}");
            times.push(self.start_container(&name, &["/bin/busybox", "sleep", "100000"])?);
            self.end_container(&name)?;
        }
        let floor = Some(floor.first_exec);
        report.time(
            "NEWCONTAINER from the share, p50",
            median(times),
            floor,
            "<= 71 ms (0.6 of the C original's 119)",
        );
        Ok(())
    }

    pub(super) fn one_by_one(&mut self, floor: Duration, report: &mut Report) -> Result<(), Fault> {
        let (mut to_ack, mut to_exit) = (Vec::new(), Vec::new());
        for number in 0..self.execs {
            let process = self.process(&format!("e{number}"), &PROGRAM, json!({}))?;
            let name = process.id.clone();
            let start = Instant::now();
            let (_streams, pending) = self.exec("main", process)?;
            pending.wait(PATIENCE).map_err(failed("starting a process"))?;
            to_ack.push(start.elapsed());
            self.client.finished(&id("main")?, &name, PATIENCE).map_err(failed("ending a process"))?;
            to_exit.push(start.elapsed());
        }
        let exec = Some(floor);
        report.time("exec to exit event, p50", median(to_exit), exec, "<= 2.5 x");
        report.time("exec to ACK, p50", median(to_ack), exec, "<= 1.5 x");
        Ok(())
    }

    fn in_flight(&mut self, floor: &Floor, report: &mut Report) -> Result<(), Fault> {
        for (width, goal) in [(1, ">= 95/s"), (8, ">= 120/s"), (32, ">= 120/s")] {
            let start = Instant::now();
            let mut under_way: VecDeque<(ProcessStreams, hyperinit_protocol::ids::ProcessId)> =
                VecDeque::new();
            for number in 0..self.execs {
                if under_way.len() == width {
                    self.wait_for_one(&mut under_way)?;
                }
                let process = self.process(&format!("w{width}-{number}"), &PROGRAM, json!({}))?;
                let name = process.id.clone();
                let (streams, _pending) = self.exec("main", process)?;
                under_way.push_back((streams, name));
            }
            while !under_way.is_empty() {
                self.wait_for_one(&mut under_way)?;
            }
            let rate = f64::from(self.execs) / start.elapsed().as_secs_f64();
            let floor = 1e3 / floor_of(floor);
            report.row(&format!("execs a second, {width} in flight"), "/s", rate, Some(floor), goal);
        }
        Ok(())
    }

    fn wait_for_one(
        &self,
        under_way: &mut VecDeque<(ProcessStreams, hyperinit_protocol::ids::ProcessId)>,
    ) -> Result<(), Fault> {
        let Some((_streams, name)) = under_way.pop_front() else { return Ok(()) };
        self.client.finished(&id("main")?, &name, PATIENCE).map(drop).map_err(failed("ending a process"))
    }

    fn throughput(&mut self, floor: &Floor, report: &mut Report) -> Result<(), Fault> {
        let count = format!("count={}", BYTES / (64 << 10));
        let dd = ["/bin/busybox", "dd", "if=/dev/zero", "bs=64k", &count];
        for (name, more, goal) in
            [("stdout, pipe", json!({}), ">= 0.4 x"), ("stdout, tty", json!({"terminal": true}), ">= 0.2 x")]
        {
            let process = self.process(name.replace(", ", "-").as_str(), &dd, more)?;
            let start = Instant::now();
            let (streams, pending) = self.exec("main", process)?;
            pending.wait(PATIENCE).map_err(failed("starting a process"))?;
            let mut bytes = 0;
            while let Some(chunk) = streams.stdout.recv_within(PATIENCE).map_err(failed("reading output"))? {
                bytes += chunk.len();
            }
            report.rate(name, rate(bytes, start.elapsed()), Some(floor.write), goal);
        }
        let process = self.process("stdin", &["/bin/busybox", "dd", "of=/dev/null", "bs=64k"], json!({}))?;
        let name = process.id.clone();
        let (streams, pending) = self.exec("main", process)?;
        pending.wait(PATIENCE).map_err(failed("starting a process"))?;
        let start = Instant::now();
        let sent = streams.stdin.write(&vec![0; BYTES]).and_then(|()| streams.stdin.close());
        sent.map_err(failed("writing stdin"))?;
        self.client.finished(&id("main")?, &name, PATIENCE).map_err(failed("ending a process"))?;
        report.rate("stdin to a fast reader", rate(BYTES, start.elapsed()), Some(floor.read), ">= 0.15 x");
        Ok(())
    }

    fn pings(&mut self, floor: &Floor, report: &mut Report) -> Result<(), Fault> {
        let mut times = Vec::new();
        for _ in 0..self.execs {
            let start = Instant::now();
            self.client.call(Command::Ping).map_err(failed("pinging"))?;
            times.push(start.elapsed());
        }
        report.time("PING, p50", median(times), Some(floor.ping), "<= 3 x");
        Ok(())
    }

    /// What the guest's kernel has free, in bytes, as a container sees it.
    fn memory(&mut self) -> Result<f64, Fault> {
        let process = self.process(
            &format!("m{}", self.next_stream),
            &["/bin/busybox", "cat", "/proc/meminfo"],
            json!({}),
        )?;
        let name = process.id.clone();
        let (streams, pending) = self.exec("main", process)?;
        pending.wait(PATIENCE).map_err(failed("starting a process"))?;
        let text = streams.stdout.read_to_end(PATIENCE).map_err(failed("reading output"))?;
        self.client.finished(&id("main")?, &name, PATIENCE).map_err(failed("ending a process"))?;
        let text = String::from_utf8_lossy(&text).into_owned();
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
        let kilobytes =
            line.and_then(|line| line.split_whitespace().next()).and_then(|word| word.parse::<f64>().ok());
        kilobytes
            .map(|kilobytes| kilobytes * 1024.0)
            .ok_or_else(|| Fault::new("reading", "/proc/meminfo", "no MemAvailable in it"))
    }

    /// What one more container costs that only sleeps.
    fn idle_containers(&mut self, report: &mut Report) -> Result<(), Fault> {
        let before = self.memory()?;
        for number in 0..self.containers {
            self.start_container(&format!("idle{number}"), &["/bin/busybox", "sleep", "100000"])?;
        }
        let after = self.memory()?;
        let each = (before - after) / f64::from(self.containers) / 1e3;
        report.row("an idle container, all of the guest's memory", "kB", each, None, "<= 250 kB");
        for number in 0..self.containers {
            self.end_container(&format!("idle{number}"))?;
        }
        Ok(())
    }
}

/// What this machine says of the guest's own processes: it sees them only when they are its own.
fn processes(directory: &Path, report: &mut Report) -> Result<(), Fault> {
    let own: Vec<u32> = own_processes(directory)?;
    let mut bytes = 0.0;
    for pid in &own {
        let path = format!("/proc/{pid}/smaps_rollup");
        let text = std::fs::read_to_string(&path).fault("reading", &path)?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
        let kilobytes =
            line.and_then(|line| line.split_whitespace().next()).and_then(|word| word.parse::<f64>().ok());
        bytes += kilobytes.unwrap_or_default() * 1024.0;
    }
    report.megabytes("all of hyperinit's processes, PSS", bytes, "<= 6 MB");
    let before = switches(&own);
    std::thread::sleep(IDLE);
    report.row("wake-ups of an idle guest in 5 s", "", switches(&own) - before, None, "0");
    Ok(())
}

/// The guest's processes that execute hyperinit: PID 1, which has the log, and its children.
fn own_processes(directory: &Path) -> Result<Vec<u32>, Fault> {
    let program = super::local::beside("hyperinit")?;
    let entries = std::fs::read_dir("/proc").fault("reading", "/proc")?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let all: Vec<u32> = pids
        .filter(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program))
        .collect();
    let of_guest =
        |pid: &u32| in_log(*pid, directory) || parent(*pid).is_some_and(|init| in_log(init, directory));
    Ok(all.into_iter().filter(of_guest).collect())
}

fn parent(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// Whether the process logs where this guest does.
fn in_log(pid: u32, directory: &Path) -> bool {
    std::fs::read_link(format!("/proc/{pid}/fd/2")).is_ok_and(|log| log == directory.join(CONSOLE))
}

/// How often they have gone to sleep.
fn switches(pids: &[u32]) -> f64 {
    let tasks = pids.iter().filter_map(|pid| std::fs::read_dir(format!("/proc/{pid}/task")).ok());
    let texts =
        tasks.flatten().flatten().filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok());
    texts
        .flat_map(|text| {
            let line = text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
            line.and_then(|line| line.trim().parse::<f64>().ok())
        })
        .sum()
}

fn id(name: &str) -> Result<ContainerId, Fault> {
    ContainerId::try_from(name.to_owned()).map_err(|why| Fault::new("naming", "a container", why))
}

pub(super) fn parse<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, Fault> {
    serde_json::from_value(value).map_err(|error| Fault::new("encoding", "a command", error.to_string()))
}

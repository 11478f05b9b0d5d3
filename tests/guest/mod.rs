//! A guest for a test: `hyperctl up` as a child, the client library as its host, a busybox for its
//! containers.

#![allow(dead_code)] // each test file uses its part

pub mod beside;
pub mod followed;
mod hyperctl;
pub mod image;
#[allow(clippy::duplicate_mod, reason = "tests/network has tests/support too, the others have one of both")]
#[path = "../support/limits.rs"]
mod limits;
pub mod processes;
pub mod qmp;
mod raw;
mod rootfs;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Program, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use hyperinit::command::{Command, ExecCmd, KillContainer, RemoveContainer, SignalProcess, WinSize};
use hyperinit::fault::Fault;
use hyperinit::frame::Message;
use hyperinit::ids::{ContainerId, ProcessId, Signal};
use hyperinit::spec::{Container, Pod, Process};
use hyperinit_client::{CallError, Client, ProcessStreams};
use nix::sys::signal::{Signal::SIGTERM, kill as kill_process};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::Pid;
use serde_json::{Value, json};

pub use hyperctl::hyperctl_path;
pub use raw::Raw;
pub use rootfs::make_rootfs;

/// How long anything may take before a test gives up; nothing is asserted about speed.
pub const PATIENCE: Duration = Duration::from_secs(180);
/// How long a guest may take to come up: an emulated machine among many others takes its time.
pub const BOOT: Duration = Duration::from_secs(180);
/// How long a guest may be there, unless its test says otherwise. Not everything that a test waits for has a
/// limit of its own, a frame that the guest does not take for one: it then breaks, and the test fails with
/// the guest's log.
const LIFE: Duration = Duration::from_secs(15 * 60);

/// Where a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// In namespaces of this machine.
    Local,
    /// In QEMU.
    Vm,
}

/// A running guest. Dropping it ends it.
pub struct Guest {
    pub kind: Kind,
    /// None while the host is away.
    client: Option<Client>,
    pub directory: PathBuf,
    pub share: PathBuf,
    hyperctl: Child,
    /// Dropped, it keeps the guest from being ended for its age.
    life: Option<Sender<()>>,
}

impl Guest {
    /// A guest without a pod.
    pub fn boot(kind: Kind) -> Guest {
        Guest::boot_with(kind, "")
    }

    /// The same with words on its kernel command line.
    pub fn boot_with(kind: Kind, append: &str) -> Guest {
        Guest::boot_up(kind, append, &[])
    }

    /// The same with more options of `hyperctl up`.
    pub fn boot_up(kind: Kind, append: &str, options: &[&str]) -> Guest {
        let guest = Guest::boot_to(kind, append, options, &Client::connect);
        guest.client().ready(BOOT).unwrap_or_else(|error| panic!("{error}\n{}", guest.log()));
        guest
    }

    /// The same with another way to connect to what is in the guest's directory. READY is still to come.
    pub fn boot_to(
        kind: Kind,
        append: &str,
        options: &[&str],
        connect: &dyn Fn(&Path) -> Result<Client, Fault>,
    ) -> Guest {
        let directory = scratch();
        let share = directory.join("share");
        make_rootfs(&share.join("image/rootfs"));
        Guest::boot_on(kind, directory, share, append, options, connect)
    }

    /// The same with a share that is there, and a directory that goes with the guest.
    pub fn boot_on(
        kind: Kind,
        directory: PathBuf,
        share: PathBuf,
        append: &str,
        options: &[&str],
        connect: &dyn Fn(&Path) -> Result<Client, Fault>,
    ) -> Guest {
        limits::allow_open_files();
        let append = if append.contains("hyper_log=") {
            append.to_owned()
        } else {
            format!("hyper_log=info {append}")
        };
        let mut program = Program::new(hyperctl_path());
        program
            .arg("up")
            .arg(match kind {
                Kind::Local => "--local",
                Kind::Vm => "--vm",
            })
            .arg("--dir")
            .arg(directory.join("guest"))
            .arg("--share")
            .arg(&share)
            // Its host is the test.
            .args(["--channels", "raw"])
            .args(["--append", &append])
            .args(options)
            .stdin(Stdio::null());
        if kind == Kind::Vm && !options.contains(&"--share-by") {
            // runV's share is 9p.
            program.args(["--share-by", "9p"]);
        }
        // From here on its end is Drop's, also when it does not come up.
        let hyperctl = program.spawn().unwrap();
        let life = Some(end_after(LIFE, pid_of(&hyperctl), directory.join("guest/console.log")));
        let mut guest = Guest { kind, client: None, directory, share, hyperctl, life };
        let deadline = Instant::now() + BOOT;
        loop {
            match connect(&guest.at()) {
                Ok(client) => {
                    guest.client = Some(client);
                    return guest;
                }
                Err(fault) => assert!(Instant::now() < deadline, "{fault}"),
            }
            if let Some(status) = guest.hyperctl.try_wait().unwrap() {
                panic!("hyperctl up ended with {status}");
            }
            // Nothing tells when a socket is there.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Its test goes on for as long as it was told to.
    pub fn live_on(&mut self) {
        self.life = None;
    }

    /// Where its sockets are.
    pub fn at(&self) -> PathBuf {
        self.directory.join("guest")
    }

    /// Waits until the guest has logged something, from a byte of its log on.
    pub fn wait_for_log(&self, from: usize, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().get(from..).unwrap_or_default().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} is not logged\n{}", self.log());
            // QEMU writes the file, and tells nobody.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A guest with a pod that has the share.
    pub fn with_pod(kind: Kind) -> Guest {
        let guest = Guest::boot(kind);
        guest.start_pod();
        guest
    }

    /// STARTPOD with what most tests need.
    pub fn start_pod(&self) {
        let pod = json!({"hostname": "pod-1", "shareDir": "share_dir", "dns": ["192.0.2.1"], "dnsSearch": ["a.test"]});
        self.call(Command::StartPod(Box::new(parse::<Pod>(pod))));
    }

    /// The host's connection.
    pub fn client(&self) -> &Client {
        self.client.as_ref().expect("the host is connected")
    }

    /// The host goes away.
    pub fn hang_up(&mut self) {
        self.client = None;
    }

    /// The host comes back, in its own way.
    pub fn be(&mut self, client: Client) {
        self.client = Some(client);
    }

    /// The host comes back; a local guest then says READY again.
    pub fn connect(&mut self) {
        let (client, _) =
            Client::resume(&self.at(), &[]).unwrap_or_else(|fault| panic!("{fault}\n{}", self.log()));
        if self.kind == Kind::Local {
            client.ready(PATIENCE).unwrap_or_else(|error| panic!("{error}\n{}", self.log()));
        }
        self.client = Some(client);
    }

    /// The host goes away, and somebody comes who speaks in bytes.
    pub fn raw(&mut self) -> Raw {
        let from = self.log().len();
        self.hang_up();
        if self.kind == Kind::Vm {
            // Over virtio-serial a host that does not greet may lose replies that come before the guest knows
            // of the change.
            self.wait_for_log(from, "the host has left the control port");
        }
        let mut raw = Raw::connect(&self.directory.join("guest"));
        if self.kind == Kind::Local {
            raw.expect(Message::Ready);
        }
        raw
    }

    /// The guest's log so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.directory.join("guest/console.log")).unwrap_or_default())
            .into_owned()
    }

    /// Waits until the guest's log says that.
    pub fn await_log(&self, text: &str) {
        self.wait_for_log(0, text);
    }

    /// A command that must succeed.
    pub fn call(&self, command: Command) -> Vec<u8> {
        let what = format!("{command:?}");
        let reply = self.client().send(command).wait(PATIENCE);
        reply.unwrap_or_else(|error| panic!("{what}: {error}\n{}", self.log()))
    }

    /// A command that must be refused; the reason.
    pub fn refused(&self, command: Command) -> String {
        let what = format!("{command:?}");
        match self.client().send(command).wait(PATIENCE) {
            Err(CallError::Refused(text)) => text,
            other => panic!("{what}: {other:?}\n{}", self.log()),
        }
    }

    /// Waits for the end of `hyperctl up` after DESTROYPOD.
    pub fn wait_for_end(mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.hyperctl.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the guest does not end\n{}", self.log());
            // There is no event for the end of a child that a thread of this process could share.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The process of hyperctl.
    pub fn hyperctl(&self) -> u32 {
        self.hyperctl.id()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.life = None;
        let _ = kill_process(pid_of(&self.hyperctl), SIGTERM);
        let _ = self.hyperctl.wait();
        if std::thread::panicking() {
            let _ = std::io::stderr().write_all(self.log().as_bytes());
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// Ends a guest after so long, unless what is returned is dropped before. The guest's log says so, which is
/// what a failing test shows.
fn end_after(limit: Duration, hyperctl: Pid, log: PathBuf) -> Sender<()> {
    let (life, over) = channel();
    std::thread::spawn(move || {
        if over.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            let _ = fs::File::options()
                .append(true)
                .open(log)
                .and_then(|mut log| writeln!(log, "the test ends this guest, which has lived for {limit:?}"));
            let _ = kill_process(hyperctl, SIGTERM);
        }
    });
    life
}

// ---- processes ----

/// A process that was started, and its host's ends.
pub struct Running<'a> {
    pub guest: &'a Guest,
    pub container: ContainerId,
    pub process: ProcessId,
    pub streams: ProcessStreams,
}

/// What a process came to.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub status: u8,
    pub stdout: String,
    pub stderr: String,
}

impl Guest {
    /// Starts a container whose init has these words; more of its JSON in `more`.
    pub fn container(&self, id: &str, args: &[&str], more: Value) -> Running<'_> {
        self.try_container(id, args, more).unwrap_or_else(|error| panic!("{id}: {error}\n{}", self.log()))
    }

    /// The same, which may be refused.
    pub fn try_container(&self, id: &str, args: &[&str], more: Value) -> Result<Running<'_>, CallError> {
        let mut value = json!({"id": id, "image": "image", "rootfs": "rootfs"});
        let (container, process) = split(more);
        merge(&mut value, container);
        let (process, stdio, stderr) = process_value("init", args, process);
        value["process"] = process;
        let container: Container = parse(value);
        let (container_id, process_id) = (container.id.clone(), container.process.id.clone());
        let streams = self.client().streams(stdio, stderr);
        self.client().send(Command::NewContainer(Box::new(container))).wait(PATIENCE)?;
        Ok(Running { guest: self, container: container_id, process: process_id, streams })
    }

    /// A container that lives until it is killed.
    pub fn sleeper(&self, id: &str) -> Running<'_> {
        self.container(id, &["sleep", "100000"], json!({}))
    }

    /// Starts a process in a container; more of its JSON in `more`.
    pub fn exec(&self, container: &str, args: &[&str], more: Value) -> Running<'_> {
        self.try_exec(container, args, more)
            .unwrap_or_else(|error| panic!("{args:?}: {error}\n{}", self.log()))
    }

    /// The same, which may be refused.
    pub fn try_exec(&self, container: &str, args: &[&str], more: Value) -> Result<Running<'_>, CallError> {
        let (value, stdio, stderr) = process_value("", args, more);
        let process: Process = parse(value);
        let (container, id) = (container_id(container), process.id.clone());
        let streams = self.client().streams(stdio, stderr);
        let exec = ExecCmd { container: container.clone(), process: Box::new(process) };
        self.client().send(Command::ExecCmd(exec)).wait(PATIENCE)?;
        Ok(Running { guest: self, container, process: id, streams })
    }

    /// Runs a shell script in a container to its end.
    pub fn sh(&self, container: &str, script: &str) -> Outcome {
        self.exec(container, &["sh", "-c", script], json!({})).outcome()
    }

    /// Runs a shell script that must succeed and complain of nothing; its output.
    pub fn says(&self, container: &str, script: &str) -> String {
        let outcome = self.sh(container, script);
        assert_eq!(
            (outcome.status, outcome.stderr.as_str()),
            (0, ""),
            "{script:?} said {:?}",
            outcome.stdout
        );
        outcome.stdout
    }

    /// A container whose init is a shell script that must succeed and complain of nothing; its output. The id
    /// is free again afterwards.
    pub fn container_says(&self, id: &str, script: &str, more: Value) -> String {
        let outcome = self.container(id, &["sh", "-c", script], more).outcome();
        assert_eq!(
            (outcome.status, outcome.stderr.as_str()),
            (0, ""),
            "{script:?} said {:?}",
            outcome.stdout
        );
        self.remove(id);
        outcome.stdout
    }

    /// REMOVECONTAINER.
    pub fn remove(&self, id: &str) {
        self.call(Command::RemoveContainer(RemoveContainer { container: container_id(id) }));
    }

    /// A root filesystem of its own in the share; its path there.
    pub fn image(&self, name: &str) -> PathBuf {
        let root = self.share.join(name).join("rootfs");
        make_rootfs(&root);
        root
    }

    /// KILLCONTAINER with SIGKILL, the end, and REMOVECONTAINER.
    pub fn finish(&self, running: Running<'_>) {
        let container = running.container.clone();
        self.call(Command::KillContainer(KillContainer {
            container: container.clone(),
            signal: Signal::KILL,
        }));
        assert_eq!(running.outcome().status, 128 + 9);
        self.call(Command::RemoveContainer(RemoveContainer { container }));
    }
}

impl Running<'_> {
    /// Closes stdin, reads everything, waits for the event.
    pub fn outcome(self) -> Outcome {
        let _ = self.streams.stdin.close();
        self.end_before(1)
    }

    /// The same without closing stdin.
    pub fn end(self) -> Outcome {
        self.end_before(0)
    }

    /// The same of a process that may have ended before the last so many frames for its stdin came: each is
    /// then answered by a further end of its stream.
    pub fn end_before(self, frames: u32) -> Outcome {
        self.end_within(frames, PATIENCE)
    }

    /// As `outcome`, of a program that may take longer than others.
    pub fn outcome_within(self, patience: Duration) -> Outcome {
        let _ = self.streams.stdin.close();
        self.end_within(1, patience)
    }

    fn end_within(self, frames: u32, patience: Duration) -> Outcome {
        let stdout = self.streams.stdout.read_to_end(patience);
        let stdout = stdout.unwrap_or_else(|error| panic!("stdout: {error}\n{}", self.guest.log()));
        let stderr = self
            .streams
            .stderr
            .as_ref()
            .map(|stderr| stderr.read_to_end(PATIENCE).unwrap())
            .unwrap_or_default();
        let status = self.status();
        let eofs = self.streams.stdout.eof_frames();
        assert!((1..=1 + frames).contains(&eofs), "{eofs} EOF frames on stdio\n{}", self.guest.log());
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Outcome { status, stdout: text(stdout), stderr: text(stderr) }
    }

    /// Waits for the event.
    pub fn status(&self) -> u8 {
        let finished = self.guest.client().finished(&self.container, &self.process, PATIENCE);
        finished.unwrap_or_else(|error| panic!("{error}\n{}", self.guest.log()))
    }

    /// SIGNALPROCESS.
    pub fn signal(&self, signal: i64) {
        self.guest.call(Command::SignalProcess(SignalProcess {
            container: self.container.clone(),
            process: self.process.clone(),
            signal: Signal::try_from(signal).unwrap(),
        }));
    }

    /// WINSIZE.
    pub fn resize(&self, row: u16, column: u16) {
        self.guest.call(Command::WinSize(WinSize {
            container: self.container.clone(),
            process: self.process.clone(),
            row,
            column,
        }));
    }

    /// Reads output until it contains `wanted`; returns all of it.
    pub fn read_until(&self, wanted: &str) -> String {
        let mut text = String::new();
        while !text.contains(wanted) {
            match self.streams.stdout.recv_within(PATIENCE) {
                Ok(Some(bytes)) => text.push_str(&String::from_utf8_lossy(&bytes)),
                other => {
                    panic!("{other:?} while waiting for {wanted:?}, after {text:?}\n{}", self.guest.log())
                }
            }
        }
        text
    }
}

/// KILLCONTAINER.
pub fn kill(id: &str, signal: i64) -> Command {
    Command::KillContainer(KillContainer {
        container: container_id(id),
        signal: Signal::try_from(signal).unwrap(),
    })
}

/// EXECCMD.
pub fn parse_exec(container: &str, process: Value) -> Command {
    Command::ExecCmd(ExecCmd { container: container_id(container), process: Box::new(parse(process)) })
}

/// The text of a refusal.
pub fn refusal<T>(result: Result<T, CallError>) -> String {
    match result {
        Err(CallError::Refused(text)) => text,
        Err(error) => panic!("not refused but: {error}"),
        Ok(_) => panic!("not refused"),
    }
}

pub fn container_id(id: &str) -> ContainerId {
    ContainerId::try_from(id.to_owned()).unwrap()
}

pub fn parse<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// `more` of a container: its own keys, and its process's.
fn split(mut more: Value) -> (Value, Value) {
    let process = more.as_object_mut().and_then(|map| map.remove("process")).unwrap_or_else(|| json!({}));
    (more, process)
}

fn merge(value: &mut Value, more: Value) {
    if let (Value::Object(value), Value::Object(more)) = (value, more) {
        value.extend(more);
    }
}

/// A process with stream numbers of its own.
fn process_value(id: &str, args: &[&str], more: Value) -> (Value, u64, u64) {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    let stdio = NEXT.fetch_add(2, Ordering::Relaxed);
    let id = if id.is_empty() { format!("exec-{stdio}") } else { id.to_owned() };
    let mut value = json!({"id": id, "args": args, "stdio": stdio, "stderr": stdio + 1});
    merge(&mut value, more);
    let number = |key: &str| value.get(key).and_then(Value::as_u64).unwrap();
    let (stdio, stderr) = (number("stdio"), number("stderr"));
    (value, stdio, stderr)
}

// ---- files ----

/// A directory of one's own below the system's temporary one, or below /var/tmp where nothing in that one can
/// be setuid or a device: so is Debian 13's /tmp, and images have both.
pub fn scratch() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let temporary = std::env::temp_dir();
    let plain = !statvfs(&temporary).unwrap().flags().intersects(FsFlags::ST_NOSUID | FsFlags::ST_NODEV);
    let place = if plain { temporary } else { PathBuf::from("/var/tmp") };
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = place.join(format!("hyperinit-test-{}-{number}", std::process::id()));
        match fs::create_dir(&path) {
            // A test that was killed has left it, and its number is this one's now.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => {
                made.unwrap();
                return path;
            }
        }
    }
}

//! A guest for a test: `hyperctl up` is a child process, the client library is the host, and the containers
//! run busybox.

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

/// How long any step may take before the test fails. The tests assert nothing about speed.
pub const PATIENCE: Duration = Duration::from_secs(180);
/// How long a guest may take to boot: an emulated machine is slow beside many others.
pub const BOOT: Duration = Duration::from_secs(180);
/// How long a guest may live unless its test calls `live_on`. Some waits have no limit of their own, for
/// example for a frame that the guest does not take. When the guest is ended, such a wait breaks, and the
/// test fails with the guest's log.
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
    /// `None` while the host is away.
    client: Option<Client>,
    pub directory: PathBuf,
    pub share: PathBuf,
    hyperctl: Child,
    /// Dropping it stops the thread that ends the guest after `LIFE`.
    life: Option<Sender<()>>,
}

impl Guest {
    /// A guest without a pod.
    pub fn boot(kind: Kind) -> Guest {
        Guest::boot_with(kind, "")
    }

    /// A guest without a pod, with `append` on its kernel command line.
    pub fn boot_with(kind: Kind, append: &str) -> Guest {
        Guest::boot_up(kind, append, &[])
    }

    /// A guest without a pod, with more options for `hyperctl up`.
    pub fn boot_up(kind: Kind, append: &str, options: &[&str]) -> Guest {
        let guest = Guest::boot_to(kind, append, options, &Client::connect);
        guest.client().ready(BOOT).unwrap_or_else(|error| panic!("{error}\n{}", guest.log()));
        guest
    }

    /// Boots a guest and connects with `connect`, which takes the guest's directory. READY has not come yet.
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

    /// Boots a guest with an existing share. Its directory is removed with the guest.
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
            // The test is the guest's host.
            .args(["--channels", "raw"])
            .args(["--append", &append])
            .args(options)
            .stdin(Stdio::null());
        if kind == Kind::Vm && !options.contains(&"--share-by") {
            // runV shares files by 9p.
            program.args(["--share-by", "9p"]);
        }
        // From here on, Drop ends the guest, even if it does not come up.
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
            // No event tells that a socket exists.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets the guest live as long as its test: `LIFE` no longer ends it.
    pub fn live_on(&mut self) {
        self.life = None;
    }

    /// The directory of the guest's sockets.
    pub fn at(&self) -> PathBuf {
        self.directory.join("guest")
    }

    /// Waits until the guest has logged `text` behind byte `from` of its log.
    pub fn wait_for_log(&self, from: usize, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().get(from..).unwrap_or_default().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} is not logged\n{}", self.log());
            // QEMU writes the file without any event.
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// A guest with a pod that has the share.
    pub fn with_pod(kind: Kind) -> Guest {
        let guest = Guest::boot(kind);
        guest.start_pod();
        guest
    }

    /// Sends STARTPOD with the settings that most tests need.
    pub fn start_pod(&self) {
        let pod = json!({"hostname": "pod-1", "shareDir": "share_dir", "dns": ["192.0.2.1"], "dnsSearch": ["a.test"]});
        self.call(Command::StartPod(Box::new(parse::<Pod>(pod))));
    }

    /// The host's connection.
    pub fn client(&self) -> &Client {
        self.client.as_ref().expect("the host is connected")
    }

    /// Closes the host's connection.
    pub fn hang_up(&mut self) {
        self.client = None;
    }

    /// Connects the host by a client that the test has made.
    pub fn be(&mut self, client: Client) {
        self.client = Some(client);
    }

    /// Connects the host again. A local guest then sends READY again.
    pub fn connect(&mut self) {
        let (client, _) =
            Client::resume(&self.at(), &[]).unwrap_or_else(|fault| panic!("{fault}\n{}", self.log()));
        if self.kind == Kind::Local {
            client.ready(PATIENCE).unwrap_or_else(|error| panic!("{error}\n{}", self.log()));
        }
        self.client = Some(client);
    }

    /// Closes the host's connection and opens one that sends and receives raw bytes.
    pub fn raw(&mut self) -> Raw {
        let from = self.log().len();
        self.hang_up();
        if self.kind == Kind::Vm {
            // Over virtio-serial, a host that does not greet the guest may lose the replies sent before the
            // guest has noticed the change.
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

    /// Waits until the guest has logged `text`.
    pub fn await_log(&self, text: &str) {
        self.wait_for_log(0, text);
    }

    /// Sends a command that must succeed, and returns the reply.
    pub fn call(&self, command: Command) -> Vec<u8> {
        let what = format!("{command:?}");
        let reply = self.client().send(command).wait(PATIENCE);
        reply.unwrap_or_else(|error| panic!("{what}: {error}\n{}", self.log()))
    }

    /// Sends a command that must be refused, and returns the reason.
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
            // No event that a thread of this process could share tells of the end of a child.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The pid of hyperctl.
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

/// Ends a guest after `limit`, unless the returned sender is dropped before. The guest's log, which a failing
/// test shows, says so.
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

/// A process that was started, with the host's ends of its streams.
pub struct Running<'a> {
    pub guest: &'a Guest,
    pub container: ContainerId,
    pub process: ProcessId,
    pub streams: ProcessStreams,
}

/// The exit status and the output of a process.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub status: u8,
    pub stdout: String,
    pub stderr: String,
}

impl Guest {
    /// Starts a container whose init has these arguments. `more` is merged into its JSON.
    pub fn container(&self, id: &str, args: &[&str], more: Value) -> Running<'_> {
        self.try_container(id, args, more).unwrap_or_else(|error| panic!("{id}: {error}\n{}", self.log()))
    }

    /// Starts a container as `container` does; the guest may refuse it.
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

    /// Starts a container that lives until it is killed.
    pub fn sleeper(&self, id: &str) -> Running<'_> {
        self.container(id, &["sleep", "100000"], json!({}))
    }

    /// Starts a process in a container. `more` is merged into its JSON.
    pub fn exec(&self, container: &str, args: &[&str], more: Value) -> Running<'_> {
        self.try_exec(container, args, more)
            .unwrap_or_else(|error| panic!("{args:?}: {error}\n{}", self.log()))
    }

    /// Starts a process as `exec` does; the guest may refuse it.
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

    /// Runs a shell script that must exit with 0 and write nothing to stderr. Returns its stdout.
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

    /// Starts a container whose init is a shell script that must exit with 0 and write nothing to stderr.
    /// Returns its stdout, and removes the container, so its id is free again.
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

    /// Sends REMOVECONTAINER.
    pub fn remove(&self, id: &str) {
        self.call(Command::RemoveContainer(RemoveContainer { container: container_id(id) }));
    }

    /// Makes another root filesystem in the share and returns its path.
    pub fn image(&self, name: &str) -> PathBuf {
        let root = self.share.join(name).join("rootfs");
        make_rootfs(&root);
        root
    }

    /// Sends KILLCONTAINER with SIGKILL, waits for the end, and sends REMOVECONTAINER.
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
    /// Closes stdin, reads all output, and waits for the event PROCESSASYNCEVENT.
    pub fn outcome(self) -> Outcome {
        let _ = self.streams.stdin.close();
        self.end_before(1)
    }

    /// Reads all output and waits for the event, with stdin left open.
    pub fn end(self) -> Outcome {
        self.end_before(0)
    }

    /// As `end`, for a process that may have ended before the last `frames` frames for its stdin arrived. The
    /// guest answers each of those with one more EOF frame.
    pub fn end_before(self, frames: u32) -> Outcome {
        self.end_within(frames, PATIENCE)
    }

    /// As `outcome`, for a program that may take longer than `PATIENCE`.
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

    /// Waits for the event and returns the exit status.
    pub fn status(&self) -> u8 {
        let finished = self.guest.client().finished(&self.container, &self.process, PATIENCE);
        finished.unwrap_or_else(|error| panic!("{error}\n{}", self.guest.log()))
    }

    /// Sends SIGNALPROCESS.
    pub fn signal(&self, signal: i64) {
        self.guest.call(Command::SignalProcess(SignalProcess {
            container: self.container.clone(),
            process: self.process.clone(),
            signal: Signal::try_from(signal).unwrap(),
        }));
    }

    /// Sends WINSIZE.
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

/// The command KILLCONTAINER.
pub fn kill(id: &str, signal: i64) -> Command {
    Command::KillContainer(KillContainer {
        container: container_id(id),
        signal: Signal::try_from(signal).unwrap(),
    })
}

/// The command EXECCMD.
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

/// Splits `more` into the keys of the container and those of its process.
fn split(mut more: Value) -> (Value, Value) {
    let process = more.as_object_mut().and_then(|map| map.remove("process")).unwrap_or_else(|| json!({}));
    (more, process)
}

fn merge(value: &mut Value, more: Value) {
    if let (Value::Object(value), Value::Object(more)) = (value, more) {
        value.extend(more);
    }
}

/// The JSON of a process with unused stream numbers, and the numbers of its stdio and stderr.
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

/// Makes a new directory below the system's temporary directory. If that is mounted nosuid or nodev, as
/// Debian 13's /tmp is, the new directory is below /var/tmp, because images contain setuid programs and
/// devices.
pub fn scratch() -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let temporary = std::env::temp_dir();
    let plain = !statvfs(&temporary).unwrap().flags().intersects(FsFlags::ST_NOSUID | FsFlags::ST_NODEV);
    let place = if plain { temporary } else { PathBuf::from("/var/tmp") };
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = place.join(format!("hyperinit-test-{}-{number}", std::process::id()));
        match fs::create_dir(&path) {
            // A killed test, whose process had the pid of this one, has left the directory.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => {
                made.unwrap();
                return path;
            }
        }
    }
}

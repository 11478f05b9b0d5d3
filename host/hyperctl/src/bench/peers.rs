//! `hyperctl bench --local --peer PROGRAM`: how long other runtimes of this machine, such as runc, take for
//! the same work.
//!
//! A peer has the command line of runc. The contestants take turns, so a busy moment of the machine meets
//! each of them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hyperinit_client::{Client, mux::HostSocket};
use hyperinit_protocol::command::Command as Message;
use hyperinit_protocol::fault::{Fault, OrFault};
use serde_json::{Value, json};

use super::super::cli::Bench;
use super::super::up::{plan, serve_local};
use super::guest::Session;
use super::report::Report;
use super::{BOOT_TIMEOUT, Current, PROGRAM, median};
use crate::guest::{Guest, SHARE_TAG};

/// The container's init while processes are started in the container.
const SLEEPER: [&str; 3] = ["/bin/busybox", "sleep", "100000"];
/// The name of a peer's container, unique below the peer's own state directory.
const NAME: &str = "bench";

/// Measures the commands of hyperctl and of each peer, and adds their rows.
pub(super) fn measure(
    options: &Bench,
    rootfs: &Path,
    directory: &Path,
    current: &Current,
    report: &mut Report,
) -> Result<(), Fault> {
    let rootfs = rootfs.canonicalize().fault("looking up", rootfs.display())?;
    let peers: Vec<Peer> = options
        .peer
        .iter()
        .enumerate()
        .map(|(number, program)| Peer::new(program, &directory.join(format!("peer{number}")), &rootfs))
        .collect::<Result<_, _>>()?;
    runs(options, &rootfs, &peers, report)?;
    execs(options, &rootfs, directory, &peers, current, report)?;
    for peer in &peers {
        let size = std::fs::metadata(&peer.program).fault("looking at", peer.program.display())?.len();
        report.megabytes(&format!("program: {}", peer.name()), size as f64, "");
    }
    Ok(())
}

/// Another runtime, with a bundle and a state directory of its own.
struct Peer {
    program: PathBuf,
    directory: PathBuf,
}

impl Peer {
    /// Makes a bundle of what the runtime's own `spec` says.
    fn new(program: &Path, directory: &Path, rootfs: &Path) -> Result<Peer, Fault> {
        let program = program.canonicalize().fault("looking up", program.display())?;
        let peer = Peer { program, directory: directory.to_owned() };
        std::fs::create_dir_all(peer.state()).fault("making", directory.display())?;
        finish("making a bundle with", peer.command().arg("spec").arg("--bundle").arg(directory))?;
        for (name, args) in [("run", &PROGRAM[..]), ("sleep", &SLEEPER[..])] {
            let bundle = directory.join(name);
            std::fs::create_dir(&bundle).fault("making", bundle.display())?;
            let spec = directory.join("config.json");
            let text = std::fs::read(&spec).fault("reading", spec.display())?;
            let mut value: Value = serde_json::from_slice(&text)
                .map_err(|error| Fault::new("reading", spec.display(), error.to_string()))?;
            value["process"]["args"] = json!(args);
            value["process"]["terminal"] = json!(false);
            value["root"]["path"] = json!(rootfs);
            let config = bundle.join("config.json");
            std::fs::write(&config, value.to_string()).fault("writing", config.display())?;
        }
        Ok(peer)
    }

    fn name(&self) -> String {
        self.program.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(self.state());
        command
    }

    /// Runs a container to its end.
    fn run(&self) -> Command {
        let mut command = self.command();
        command.arg("run").arg("--bundle").arg(self.directory.join("run")).arg(NAME);
        command
    }

    /// Starts a container that stays until the value is dropped.
    fn start(&self) -> Result<Container, Fault> {
        let mut start = self.command();
        start.args(["run", "--detach", "--bundle"]).arg(self.directory.join("sleep")).arg(NAME);
        let mut delete = self.command();
        delete.args(["delete", "--force", NAME]);
        // Before the start: a start that fails halfway may leave something.
        let container = Container { delete };
        // The sleeper inherits the standard streams.
        start.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        finish("starting a container with", &mut start)?;
        Ok(container)
    }

    /// Runs a process in the container that stays.
    fn exec(&self) -> Command {
        let mut command = self.command();
        command.args(["exec", NAME]).args(PROGRAM);
        command
    }
}

/// A peer's container that stays until this is dropped.
struct Container {
    delete: Command,
}

impl Drop for Container {
    fn drop(&mut self) {
        // Nothing is left to be told of a failure.
        let _ = self.delete.stdout(Stdio::null()).stderr(Stdio::null()).status();
    }
}

/// One command line whose time is a row.
struct Contestant {
    row: String,
    command: Command,
    times: Vec<Duration>,
}

impl Contestant {
    fn new(row: String, command: Command) -> Contestant {
        Contestant { row, command, times: Vec::new() }
    }
}

/// The whole life of a container: from the command line to its exit.
fn runs(options: &Bench, rootfs: &Path, peers: &[Peer], report: &mut Report) -> Result<(), Fault> {
    let mut own = Command::new(own_program()?);
    own.args(["run", "--local", "--rootfs"]).arg(rootfs).arg("--").args(PROGRAM);
    let mut contestants = vec![Contestant::new("run: hyperctl run --local".to_owned(), own)];
    contestants
        .extend(peers.iter().map(|peer| Contestant::new(format!("run: {} run", peer.name()), peer.run())));
    race(options.rounds.div_ceil(4), rootfs, contestants, report).map(drop)
}

/// One more process in a container that is there: from the command line to its exit.
fn execs(
    options: &Bench,
    rootfs: &Path,
    directory: &Path,
    peers: &[Peer],
    current: &Current,
    report: &mut Report,
) -> Result<(), Fault> {
    let directory = directory.join("guest");
    let plan = plan(true, &directory, rootfs, &options.options)?;
    let served = directory.clone();
    current.hold(|| {
        let (guest, socket) = Guest::start_behind(plan, HostSocket::open, |_| {})?;
        std::thread::spawn(move || serve_local(socket, &served));
        Ok(guest)
    })?;
    let client = Client::visit(&directory)?;
    client.ready(BOOT_TIMEOUT).map_err(super::guest::failed("booting"))?;
    let mut session = Session::new(client, options.rounds);
    let pod = super::guest::parse(json!({"hostname": "bench", "shareDir": SHARE_TAG}))?;
    session.client.call(Message::StartPod(pod)).map_err(super::guest::failed("starting the pod"))?;
    session.start_container("main", &SLEEPER)?;
    for peer in peers {
        current.hold(|| peer.start())?;
    }

    let mut own = Command::new(own_program()?);
    own.args(["exec", "--dir"]).arg(&directory).arg("main").args(PROGRAM);
    let mut contestants = vec![Contestant::new("exec: hyperctl exec".to_owned(), own)];
    contestants
        .extend(peers.iter().map(|peer| Contestant::new(format!("exec: {} exec", peer.name()), peer.exec())));
    let bare = race(options.rounds, rootfs, contestants, report)?;
    // The same processes, started by a client that stays connected.
    session.one_by_one(bare, report)?;
    current.end();
    Ok(())
}

/// Lets the contestants take turns, and adds a row for each, beside fork, exec and wait of the program
/// itself, whose median it returns.
fn race(
    rounds: u32,
    rootfs: &Path,
    mut contestants: Vec<Contestant>,
    report: &mut Report,
) -> Result<Duration, Fault> {
    let [program, args @ ..] = &PROGRAM;
    let mut bare = Command::new(rootfs.join(program.trim_start_matches('/')));
    bare.args(args);
    let mut bare = Contestant::new(String::new(), bare);
    for _ in 0..rounds {
        for contestant in contestants.iter_mut().chain([&mut bare]) {
            let start = Instant::now();
            finish("running", contestant.command.stdin(Stdio::null()))?;
            contestant.times.push(start.elapsed());
        }
    }
    let bare = median(bare.times);
    for contestant in contestants {
        report.time(&contestant.row, median(contestant.times), Some(bare), "");
    }
    Ok(bare)
}

/// Runs a command to its end, which must be a success.
fn finish(doing: &'static str, command: &mut Command) -> Result<(), Fault> {
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command.status().fault(doing, &program)?;
    if status.success() { Ok(()) } else { Err(Fault::new(doing, program, status.to_string())) }
}

fn own_program() -> Result<PathBuf, Fault> {
    std::env::current_exe().fault("looking up", "hyperctl's own program")
}

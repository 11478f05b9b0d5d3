//! The main function of every helper: `open → confine → loop`, with requests from init or by hand.
//!
//! The warden starts a helper as `netd --ipc`. By hand, `netd --stdio` reads one JSON request per line and
//! prints one JSON reply per line, confined. `--policy` prints the helper's rights. `--unconfined` omits the
//! confinement and says so.

use std::io::{Stdin, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;

use log::LevelFilter;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::unistd::read;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::fault::{Fault, OrFault};
use crate::logger;
use crate::sandbox::{CapSet, Policy};
use crate::sys::fd::{inherited, receive_bytes};
use crate::sys::heap;
use crate::wire::bootstrap::{FD_NETWORK, FD_REPLIES, FD_REQUESTS};
use crate::wire::channel::{self, Inbox, Voice};
use crate::wire::packet::PACKET_MAX;
use crate::wire::{Envelope, Profile, Role, Said};

/// The command line of a helper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The way in which requests come.
    pub mode: Mode,
    /// Omit the confinement.
    pub unconfined: bool,
    /// The pod's container profile.
    pub profile: Profile,
    /// The stream port is a listening socket (streamd).
    pub listen: bool,
    /// The level of the log.
    pub log: LevelFilter,
    /// The debugging door is open (execd).
    pub debug: bool,
    /// The guest runs in namespaces of a machine whose settings are not the guest's.
    pub local: bool,
}

/// The way in which requests come to a helper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// `--ipc`: from init, over the sockets that the warden left.
    Ipc,
    /// `--stdio`: by hand, as lines on standard input.
    Stdio,
    /// `--policy`: there are no requests; the helper prints its policy and ends.
    Policy,
}

const USAGE: &str = "usage: (--stdio | --policy | --ipc) [--unconfined] [--profile NAME] \
     [--listen] [--log LEVEL] [--debug] [--local]";

impl Options {
    /// Parses the arguments after the program's name.
    pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Options, String> {
        let mut args = args.into_iter();
        let mut mode = None;
        let mut options = Options {
            mode: Mode::Stdio,
            unconfined: false,
            profile: Profile::Default,
            listen: false,
            log: LevelFilter::Warn,
            debug: false,
            local: false,
        };
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| format!("{arg} wants a value\n{USAGE}"));
            match arg.as_str() {
                "--stdio" => mode = Some(Mode::Stdio),
                "--policy" => mode = Some(Mode::Policy),
                "--ipc" => mode = Some(Mode::Ipc),
                "--unconfined" => options.unconfined = true,
                "--listen" => options.listen = true,
                "--debug" => options.debug = true,
                "--local" => options.local = true,
                "--profile" => {
                    options.profile = Profile::named(&value()?).map_err(|why| format!("{why}\n{USAGE}"))?;
                }
                "--log" => options.log = value()?.parse().map_err(|_| USAGE.to_owned())?,
                other => return Err(format!("unknown argument: {other}\n{USAGE}")),
            }
        }
        options.mode = mode.ok_or(USAGE)?;
        Ok(options)
    }
}

/// The source of requests; [`Replies`] is the other direction.
pub enum Requests<Q> {
    /// From init.
    Ipc(Inbox<Q>),
    /// From init, for a helper that takes the packets from the socket itself.
    Packets(OwnedFd, Vec<u8>),
    /// By hand.
    Stdio(Input),
}

/// Requests by hand: lines on standard input.
pub struct Input {
    stdin: Stdin,
    /// The number of the last request. The first request has number 1.
    count: u64,
    /// Bytes of further requests that were already read.
    text: Vec<u8>,
}

/// The result of [`Requests::take`].
#[derive(Debug)]
pub enum Asked<Q> {
    /// A request with its number.
    Request(Envelope<Q>),
    /// No request for now.
    Nothing,
    /// There will be no more requests.
    Over,
}

/// The destination of replies.
pub enum Replies<R> {
    /// To init.
    Ipc(Voice<R>),
    /// By hand: lines on standard output.
    Stdio,
}

impl<Q: Serialize + DeserializeOwned> Requests<Q> {
    /// Waits for the next request. Returns none when init or standard input is gone. A line that is not a
    /// request is answered with an error at once.
    pub fn next<R: Serialize>(&mut self, replies: &Replies<R>) -> Option<Envelope<Q>> {
        if let Requests::Ipc(inbox) = self {
            return inbox.next();
        }
        loop {
            match self.take(replies) {
                Ok(Asked::Request(request)) => return Some(request),
                Ok(Asked::Nothing) => self.wait(PollTimeout::NONE).ok().map(drop)?,
                Ok(Asked::Over) | Err(_) => return None,
            }
        }
    }

    /// The descriptor to wait for before [`Requests::take`].
    pub fn watched(&self) -> BorrowedFd<'_> {
        match self {
            Requests::Ipc(inbox) => inbox.as_fd(),
            Requests::Packets(socket, _) => socket.as_fd(),
            Requests::Stdio(input) => input.stdin.as_fd(),
        }
    }

    /// Whether a request may be there that was already read, so that nothing has to be waited for.
    pub fn has_read_more(&self) -> bool {
        matches!(self, Requests::Stdio(input) if input.text.contains(&b'\n'))
    }

    /// Takes the next request, if one is there. A line that is not a request is answered with an error at
    /// once.
    pub fn take<R: Serialize>(&mut self, replies: &Replies<R>) -> Result<Asked<Q>, Fault> {
        match self {
            Requests::Ipc(..) if !self.wait(PollTimeout::ZERO)? => Ok(Asked::Nothing),
            Requests::Ipc(inbox) => Ok(inbox.next().map_or(Asked::Over, Asked::Request)),
            Requests::Packets(socket, packet) => match receive_bytes(&*socket, packet) {
                Ok(0) | Err(Errno::ECONNRESET) => Ok(Asked::Over),
                Ok(count) => channel::request(packet.get(..count).unwrap_or_default()).map(Asked::Request),
                Err(Errno::EAGAIN | Errno::EINTR) => Ok(Asked::Nothing),
                Err(errno) => Err(Fault::errno("hearing", "init", errno)),
            },
            Requests::Stdio(..) => self.take_line(replies),
        }
    }

    fn take_line<R: Serialize>(&mut self, replies: &Replies<R>) -> Result<Asked<Q>, Fault> {
        loop {
            let Requests::Stdio(input) = self else { return Ok(Asked::Over) };
            if let Some(line) = input.line() {
                let id = input.count;
                match serde_json::from_slice(&line) {
                    Ok(body) => return Ok(Asked::Request(Envelope { id, body })),
                    Err(error) => {
                        replies.send(id, Err(Fault::new("reading", "the request", error.to_string())))?;
                    }
                }
            } else if !self.wait(PollTimeout::ZERO)? {
                return Ok(Asked::Nothing);
            } else if let Requests::Stdio(input) = self
                && !input.read()?
            {
                return Ok(Asked::Over);
            }
        }
    }

    /// Waits until there is something to take. Returns false if nothing came in time.
    fn wait(&self, timeout: PollTimeout) -> Result<bool, Fault> {
        let mut fds = [PollFd::new(self.watched(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(count) => Ok(count > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(Fault::errno("waiting for", "requests", errno)),
        }
    }
}

impl Input {
    /// Takes the next whole line that is not empty.
    fn line(&mut self) -> Option<Vec<u8>> {
        loop {
            let end = self.text.iter().position(|&byte| byte == b'\n')?;
            let line: Vec<u8> = self.text.drain(..=end).collect();
            if !line.trim_ascii().is_empty() {
                self.count += 1;
                return Some(line);
            }
        }
    }

    /// Reads what is there. Returns false at the end. A last line needs no newline.
    fn read(&mut self) -> Result<bool, Fault> {
        let mut chunk = [0; 4096];
        let count = loop {
            match read(&self.stdin, &mut chunk) {
                Err(Errno::EINTR) => {}
                count => break count.fault("reading", "standard input")?,
            }
        };
        if count == 0 && !self.text.is_empty() {
            self.text.push(b'\n');
            return Ok(true);
        }
        self.text.extend_from_slice(chunk.get(..count).unwrap_or_default());
        Ok(count > 0)
    }
}

impl<R: Serialize> Clone for Replies<R> {
    fn clone(&self) -> Replies<R> {
        match self {
            Replies::Ipc(voice) => Replies::Ipc(voice.clone()),
            Replies::Stdio => Replies::Stdio,
        }
    }
}

impl<R: Serialize> Replies<R> {
    /// Tells init that this helper is confined and takes requests. By hand nothing is printed.
    fn up(&self) -> Result<(), Fault> {
        match self {
            Replies::Ipc(voice) => voice.say(Said::Up),
            Replies::Stdio => Ok(()),
        }
    }

    /// Sends the reply to the request of this number.
    pub fn send(&self, id: u64, result: Result<R, Fault>) -> Result<(), Fault> {
        match self {
            Replies::Ipc(voice) => voice.say(Said::Reply(Envelope { id, body: result })),
            Replies::Stdio => {
                let mut line = serde_json::to_string(&result)
                    .map_err(|error| Fault::new("printing", "the reply", error.to_string()))?;
                line.push('\n');
                let mut out = std::io::stdout().lock();
                out.write_all(line.as_bytes())
                    .and_then(|()| out.flush())
                    .map_err(|error| Fault::io("printing", "the reply", &error))
            }
        }
    }
}

/// With `--ipc`: takes the ends of the sockets that the warden left.
fn connect<Q, R>(role: Role, mode: &Mode) -> Result<(Requests<Q>, Replies<R>), Fault>
where
    Q: Serialize + DeserializeOwned,
    R: Serialize + DeserializeOwned,
{
    if *mode != Mode::Ipc {
        let input = Input { stdin: std::io::stdin(), count: 0, text: Vec::new() };
        return Ok((Requests::Stdio(input), Replies::Stdio));
    }
    let end =
        |number| inherited(number).fault("taking", format!("descriptor {number}, an end of init's channel"));
    // streamd also waits for its processes, and none of its requests is large enough to come in shared
    // memory.
    if role == Role::Streamd {
        let voice = channel::voice(end(FD_REPLIES)?)?;
        return Ok((Requests::Packets(end(FD_REQUESTS)?, vec![0; PACKET_MAX]), Replies::Ipc(voice)));
    }
    heap::keep_messages();
    let (inbox, voice) = channel::ends(end(FD_REQUESTS)?, end(FD_REPLIES)?)?;
    Ok((Requests::Ipc(inbox), Replies::Ipc(voice)))
}

/// Enters the pod's network namespace, if the warden left one: the links are there, and mounts, processes and
/// settings of a helper belong there too. streamd does not use the network.
fn enter_network(role: Role, mode: &Mode) -> Result<(), Fault> {
    if *mode != Mode::Ipc || role == Role::Streamd {
        return Ok(());
    }
    match inherited(FD_NETWORK) {
        Ok(network) => setns(network, CloneFlags::CLONE_NEWNET).fault("entering", "the pod's network"),
        Err(_) => Ok(()),
    }
}

/// The text that `--help` prints below the usage.
const HELP: &str = "
One helper of a guest: it reads requests and answers them, confined. docs/helpers.md has every request.

  --stdio         reads one JSON request a line from standard input, prints one JSON reply a line
  --policy        prints what this helper may do, with the reason of each line
  --ipc           requests come from init, over descriptors that the warden leaves
  --unconfined    keeps every capability and loads no filter
  --profile NAME  the containers' profile: default, privileged, restricted (mountd, execd)
  --listen        the stream port is a listening socket (streamd)
  --log LEVEL     off, error, warn (default), info, debug, trace; to standard error
  --debug         opens the debugging door (execd)
  --local         the guest is in namespaces of a machine whose settings are not its own (mountd)
  --help          prints this";

/// Whether the first argument is `--help`.
pub fn asks_for_help() -> bool {
    std::env::args_os().nth(1).is_some_and(|word| word == "--help")
}

/// A helper's `main`: it parses, connects, opens and confines, then calls `serve` until there are no more
/// requests.
///
/// `grants` are the capabilities of the programs that the helper executes: the containers' for execd, none
/// for the others. `open` runs with everything that the warden left to the process; `serve` runs confined.
pub fn run<Q, R, S>(
    role: Role,
    policy: &'static [u8],
    grants: impl FnOnce(&Options) -> Result<CapSet, Fault>,
    open: impl FnOnce(&Options) -> Result<S, Fault>,
    serve: impl FnOnce(S, Requests<Q>, Replies<R>) -> Result<(), Fault>,
) -> ExitCode
where
    Q: Serialize + DeserializeOwned,
    R: Serialize + DeserializeOwned,
{
    if asks_for_help() {
        let _ = writeln!(std::io::stdout(), "{USAGE}\n{HELP}");
        return ExitCode::SUCCESS;
    }
    let words = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned());
    let options = match Options::parse(words) {
        Ok(options) => options,
        Err(usage) => {
            let _ = writeln!(std::io::stderr(), "{role}: {usage}");
            return ExitCode::from(2);
        }
    };
    // A helper that the warden started logs through init.
    logger::start(role.name(), options.log, options.mode == Mode::Ipc);
    let outcome = Policy::decode(policy).and_then(|policy| {
        if options.mode == Mode::Policy {
            let _ = writeln!(std::io::stdout(), "{policy}");
            return Ok(());
        }
        let granted = grants(&options)?;
        let (requests, replies) = connect(role, &options.mode)?;
        // This comes after the connection: the sockets of the channels belong to the guest's network, and
        // what is opened from here on to the pod's.
        enter_network(role, &options.mode)?;
        let state = open(&options)?;
        if options.unconfined {
            log::warn!("UNCONFINED: no capability dropped, no seccomp filter");
        } else {
            policy.confine(granted)?;
        }
        replies.up()?;
        serve(state, requests, replies)
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(fault) => {
            log::error!("leaving: {fault}");
            ExitCode::FAILURE
        }
    }
}

/// The loop of a helper that answers one request after the other.
pub fn serve<Q, R>(
    mut requests: Requests<Q>,
    replies: Replies<R>,
    mut handle: impl FnMut(Q) -> Result<R, Fault>,
) -> Result<(), Fault>
where
    Q: Serialize + DeserializeOwned,
    R: Serialize,
{
    while let Some(Envelope { id, body }) = requests.next(&replies) {
        replies.send(id, handle(body))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options, String> {
        Options::parse(args.iter().map(|&arg| arg.to_owned()))
    }

    #[test]
    fn one_way_for_requests_is_needed() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["--stdio", "--profile", "root"]).is_err());
        let options = parse(&["--ipc", "--profile", "privileged", "--log", "debug"]).unwrap();
        assert_eq!(options.mode, Mode::Ipc);
        assert_eq!((options.profile, options.log), (Profile::Privileged, LevelFilter::Debug));
        assert!(!options.unconfined);
    }
}

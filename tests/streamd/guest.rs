//! What surrounds a streamd: the warden that keeps its descriptors, execd, init, the processes and the host.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use hyperinit::frame::{self, StreamDecoder};
use hyperinit::ids::StreamId;
use hyperinit::sys::fd::send_fds;
use hyperinit::wire::bootstrap::{
    FD_BUFFER_IN, FD_BUFFER_OUT, FD_CONNECTION_IN, FD_CONNECTION_OUT, FD_PIPE_IN, FD_PIPE_OUT, FD_PORT,
    FD_SOCKET,
};
use hyperinit::wire::streamd::Streams;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, pipe2};

use super::limits::allow_open_files;

/// Longer than anything honest takes on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(120);

pub fn id(number: u64) -> StreamId {
    StreamId::new(number).unwrap()
}

/// Everything that outlives a streamd.
pub struct World {
    execd: OwnedFd,
    inherited: BTreeMap<i32, OwnedFd>,
    listen: Option<PathBuf>,
    /// What execd has kept of each process.
    kept: BTreeMap<u64, (Streams, Vec<OwnedFd>)>,
}

impl World {
    fn new(port: OwnedFd, listen: Option<PathBuf>) -> World {
        let buffer = memfd_create(c"streamd", MFdFlags::MFD_CLOEXEC).unwrap();
        World::with_buffer(port, listen, buffer)
    }

    fn with_buffer(port: OwnedFd, listen: Option<PathBuf>, buffer: OwnedFd) -> World {
        allow_open_files();
        let pair =
            || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let (execd, streamd) = pair();
        let again = format!("/proc/self/fd/{}", buffer.as_raw_fd());
        let output = File::options().read(true).write(true).open(again).unwrap();
        let (pipe_out, pipe_in) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (connection_in, connection_out) = pair();
        let inherited = BTreeMap::from([
            (FD_SOCKET, streamd),
            (FD_BUFFER_IN, buffer),
            (FD_BUFFER_OUT, output.into()),
            (FD_PIPE_OUT, pipe_out),
            (FD_PIPE_IN, pipe_in),
            (FD_PORT, port),
            (FD_CONNECTION_IN, connection_in),
            (FD_CONNECTION_OUT, connection_out),
        ]);
        World { execd, inherited, listen, kept: BTreeMap::new() }
    }

    /// A port that is there for good, as a device is, and the host at its other end.
    pub fn device() -> (World, Host) {
        let (port, host) = UnixStream::pair().unwrap();
        (World::new(port.into(), None), Host::new(host))
    }

    /// A serial port: one that copies what it takes, as virtio-serial does too.
    pub fn serial() -> (World, Host) {
        let pty = raw_pty();
        let (host, cable) = UnixStream::pair().unwrap();
        let master = File::from(pty.master);
        let (mut from, mut to) = (master.try_clone().unwrap(), cable.try_clone().unwrap());
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
        });
        let (mut from, mut to) = (cable, master);
        std::thread::spawn(move || std::io::copy(&mut from, &mut to));
        (World::new(pty.slave, None), Host::new(host))
    }

    /// As `device`, with a buffer of the test's.
    pub fn device_with_buffer(buffer: OwnedFd) -> (World, Host) {
        let (port, host) = UnixStream::pair().unwrap();
        (World::with_buffer(port.into(), None, buffer), Host::new(host))
    }

    /// A listening port.
    pub fn listening(name: &str) -> World {
        let path = std::env::temp_dir().join(format!("streamd-{name}-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        World::new(UnixListener::bind(&path).unwrap().into(), Some(path))
    }

    /// The host connects to a listening port.
    pub fn connect(&self) -> Host {
        Host::new(UnixStream::connect(self.listen.as_ref().unwrap()).unwrap())
    }

    /// Starts a streamd, confined, and hands it what execd has kept.
    pub fn start(&self) -> Streamd {
        let streamd = self.start_with(&[]);
        self.resend();
        streamd
    }

    /// execd's `Resend`.
    pub fn resend(&self) {
        for (packet, fds) in self.kept.values() {
            self.send(packet, fds.iter().map(AsFd::as_fd));
        }
    }

    pub fn start_with(&self, arguments: &[&str]) -> Streamd {
        let mut command = Command::new(env!("CARGO_BIN_EXE_streamd"));
        command.arg("--stdio").args(arguments);
        if self.listen.is_some() {
            command.arg("--listen");
        }
        let mappings = self
            .inherited
            .iter()
            .map(|(&child_fd, fd)| FdMapping { parent_fd: fd.try_clone().unwrap(), child_fd });
        command.fd_mappings(mappings.collect()).unwrap();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let requests = child.stdin.take();
        let output = BufReader::new(child.stdout.take().unwrap());
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        let mut errors = child.stderr.take().unwrap();
        let log = std::thread::spawn(move || {
            let mut log = String::new();
            let _ = errors.read_to_string(&mut log);
            log
        });
        Streamd { child, requests, answers, log: Some(log) }
    }

    /// Sends one packet as execd does.
    pub fn send<'a>(&self, packet: &Streams, fds: impl Iterator<Item = BorrowedFd<'a>>) {
        self.send_raw(&packet.encode(), &fds.collect::<Vec<_>>());
    }

    pub fn send_raw(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) {
        let start = Instant::now();
        while let Err(errno) = send_fds(&self.execd, packet, fds) {
            assert!(errno == Errno::EAGAIN && start.elapsed() < DEADLINE, "{errno}");
            std::thread::yield_now();
        }
    }

    /// A process with pipes. Without `stderr` it has none.
    pub fn piped(&mut self, stdio: u64, stderr: Option<u64>) -> Piped {
        let (stdin, stdin_in) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (out, stdout) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (err, stderr_in) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let packet =
            Streams { stdio: id(stdio), stderr: stderr.map(id), terminal: false, stdin: true, again: false };
        let mut kept = vec![out];
        kept.extend(stderr.map(|_| err));
        self.send(&packet, [stdin_in.as_fd()].into_iter().chain(kept.iter().map(AsFd::as_fd)));
        self.kept.insert(stdio, (Streams { stdin: false, again: true, ..packet }, kept));
        Piped { stdin: Some(stdin.into()), stdout: Some(stdout.into()), stderr: Some(stderr_in.into()) }
    }

    /// A process with a raw tty: its end of it.
    pub fn tty(&mut self, stdio: u64) -> File {
        let pty = raw_pty();
        let packet = Streams { stdio: id(stdio), stderr: None, terminal: true, stdin: false, again: false };
        self.send(&packet, [pty.master.as_fd()].into_iter());
        self.kept.insert(stdio, (Streams { again: true, ..packet }, vec![pty.master]));
        pty.slave.into()
    }

    /// execd's `Release`.
    pub fn release(&mut self, stdio: u64) {
        self.kept.remove(&stdio);
    }

    /// As if streamd had been killed while it read from the host (helpers/streamd/buffer.rs: the sixth number
    /// of the page).
    pub fn died_while_it_read(&self) {
        let reading = 1u64.to_ne_bytes();
        assert_eq!(nix::sys::uio::pwrite(&self.inherited[&FD_BUFFER_IN], &reading, 6 * 8), Ok(8));
    }

    /// How much memory the buffer holds, in bytes.
    pub fn buffer_size(&self) -> u64 {
        let blocks = nix::sys::stat::fstat(&self.inherited[&FD_BUFFER_IN]).unwrap().st_blocks;
        blocks.unsigned_abs() * 512
    }
}

fn raw_pty() -> OpenptyResult {
    let pty = openpty(None, None).unwrap();
    let mut raw = tcgetattr(&pty.slave).unwrap();
    cfmakeraw(&mut raw);
    tcsetattr(&pty.slave, SetArg::TCSANOW, &raw).unwrap();
    pty
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(path) = &self.listen {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The process's ends of its pipes.
pub struct Piped {
    pub stdin: Option<File>,
    pub stdout: Option<File>,
    pub stderr: Option<File>,
}

impl Piped {
    /// It exits, and nobody is left of it.
    pub fn exit(&mut self) {
        (self.stdin, self.stdout, self.stderr) = (None, None, None);
    }
}

/// A running streamd and init's side of it.
pub struct Streamd {
    child: Child,
    requests: Option<ChildStdin>,
    answers: Receiver<String>,
    log: Option<JoinHandle<String>>,
}

impl Streamd {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Asks for something; false when it is dead.
    pub fn ask(&mut self, request: &str) -> bool {
        writeln!(self.requests.as_mut().unwrap(), "{request}").is_ok()
    }

    pub fn finish(&mut self, stdio: u64) -> bool {
        self.ask(&format!("{{\"Finish\":{{\"stdio\":{stdio}}}}}"))
    }

    /// Asks for the end of a process whose host throws away what its readers have not read by then.
    pub fn finish_with_pause(&mut self, stdio: u64) -> bool {
        self.ask(&format!("{{\"Finish\":{{\"stdio\":{stdio},\"pause\":true}}}}"))
    }

    /// Its next answer.
    pub fn answer(&self) -> String {
        self.answers.recv_timeout(DEADLINE).expect("an answer")
    }

    pub fn drained(&self) {
        assert_eq!(self.answer(), r#"{"Ok":"Drained"}"#);
    }

    /// Whether it stays silent for so long.
    pub fn says_nothing_for(&self, time: Duration) -> bool {
        self.answers.recv_timeout(time) == Err(RecvTimeoutError::Timeout)
    }

    /// Does something while it stands still, so that it sees all of that at once.
    pub fn while_it_stands<T>(&self, act: impl FnOnce() -> T) -> T {
        let pid = Pid::from_raw(self.pid().cast_signed());
        kill(pid, Signal::SIGSTOP).unwrap();
        let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WNOWAIT;
        waitid(Id::Pid(pid), flags).unwrap();
        let acted = act();
        kill(pid, Signal::SIGCONT).unwrap();
        acted
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// There are no more requests: how it leaves, and what it said.
    pub fn leave(mut self) -> (ExitStatus, String) {
        self.requests = None;
        let status = self.child.wait().unwrap();
        (status, self.log.take().unwrap().join().unwrap())
    }

    /// It lives and leaves without a complaint.
    pub fn leave_well(self) {
        let (status, log) = self.leave();
        assert!(status.success() && log.is_empty(), "{status}: {log}");
    }

    /// A number of /proc/PID/status, summed up over its threads.
    pub fn status(&self, key: &str) -> u64 {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let number = |text: String| -> u64 {
            let line = text.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
            line.split_whitespace().nth(1).unwrap().parse().unwrap()
        };
        tasks.map(|task| number(std::fs::read_to_string(task.unwrap().path().join("status")).unwrap())).sum()
    }
}

impl Drop for Streamd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The host: frames in and out.
pub struct Host {
    pub socket: UnixStream,
    decoder: StreamDecoder,
}

/// The host leaves. Closing its socket would not do: a child that another test is just starting has a
/// duplicate of it until it executes its program, and a host that streamd can still write to has not left.
impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Host {
    fn new(socket: UnixStream) -> Host {
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        Host { socket, decoder: StreamDecoder::default() }
    }

    /// The next frame.
    pub fn frame(&mut self) -> (u64, Vec<u8>) {
        self.frame_or_end().expect("a frame, not the end of the connection")
    }

    /// The next frame, none at the end of the connection.
    pub fn frame_or_end(&mut self) -> Option<(u64, Vec<u8>)> {
        let mut chunk = [0; 64 << 10];
        loop {
            if let Some(frame) = self.decoder.next_frame().expect("streamd keeps the protocol") {
                return Some((frame.tag, frame.payload.to_vec()));
            }
            match self.socket.read(&mut chunk) {
                // A read with a timeout is not begun again after a signal (signal(7)), as of a child's end.
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                read => match read.expect("a frame in time") {
                    0 => return None,
                    count => self.decoder.push(&chunk[..count]),
                },
            }
        }
    }

    /// Everything of all streams up to the end of `stdio`, that included.
    pub fn until_end(&mut self, stdio: u64) -> BTreeMap<u64, Vec<u8>> {
        let mut got = BTreeMap::<u64, Vec<u8>>::new();
        loop {
            let (stream, payload) = self.frame();
            if payload.is_empty() {
                assert_eq!(stream, stdio, "the end of another stream");
                return got;
            }
            got.entry(stream).or_default().extend(payload);
        }
    }

    /// Whether nothing comes for so long.
    pub fn hears_nothing_for(&self, time: Duration) -> bool {
        self.decoder.pending() == 0 && !readable(self.socket.as_fd(), time)
    }

    /// Sends stdin in frames of `size` bytes.
    pub fn stdin(&mut self, stdio: u64, bytes: &[u8], size: usize) {
        // Many frames a write: what arrives is a stream all the same.
        for part in bytes.chunks(size * 1000) {
            let frames: Vec<u8> =
                part.chunks(size).flat_map(|chunk| frame::stream(stdio, chunk).unwrap()).collect();
            self.socket.write_all(&frames).unwrap();
        }
    }

    /// Sends bytes for as long as some are taken, and gives up when none is for so long; how many were.
    pub fn send_until_full(&mut self, bytes: &[u8], time: Duration) -> usize {
        let mut sent = 0;
        self.socket.set_nonblocking(true).unwrap();
        while sent < bytes.len() {
            match self.socket.write(&bytes[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)];
                    let time = PollTimeout::try_from(time).unwrap();
                    if poll(&mut fds, time).unwrap() == 0 {
                        break;
                    }
                }
                Err(error) => panic!("{error}"),
            }
        }
        self.socket.set_nonblocking(false).unwrap();
        sent
    }

    /// Sends bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub fn close_stdin(&mut self, stdio: u64) {
        self.socket.write_all(&frame::stream(stdio, b"").unwrap()).unwrap();
    }
}

/// Numbers that look random, from a seed.
pub struct Random(pub u64);

impl Random {
    /// Of STREAMD_SEED, or of the time; printed, so that a failure can be run again.
    pub fn new() -> Random {
        let seed = std::env::var("STREAMD_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
            now.as_nanos() as u64
        });
        let _ = writeln!(std::io::stderr(), "STREAMD_SEED={seed}");
        Random(seed)
    }

    /// One below `limit` (splitmix64).
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// Bytes of which any part tells where it is from: one stream's differ from another's.
pub fn pattern(stream: u64, from: usize, count: usize) -> Vec<u8> {
    (from..from + count).map(|at| pattern_at(stream, at)).collect()
}

pub fn pattern_at(stream: u64, at: usize) -> u8 {
    let mixed = (at as u64 / 7).wrapping_mul(0x9e37_79b9).wrapping_add(stream * 31) ^ at as u64;
    (mixed ^ mixed >> 8 ^ mixed >> 16) as u8
}

/// The first place where two byte strings differ.
pub fn same(got: &[u8], wanted: &[u8]) {
    let at = got.iter().zip(wanted).position(|(a, b)| a != b);
    assert!(
        at.is_none() && got.len() == wanted.len(),
        "{} of {} bytes, differ at {at:?}",
        got.len(),
        wanted.len()
    );
}

/// Whether there is something to read within so long.
pub fn readable(fd: BorrowedFd<'_>, time: Duration) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(time).unwrap()).unwrap() > 0
}

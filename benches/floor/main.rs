//! Measures what the machine itself costs: a bare PID 1 with the guest's kernel, modules and ports, which
//! does none of init's work.
//!
//! It boots as init does. Lines on the control port say what to measure, and each is answered by one line:
//!
//! | line | what is measured | answer |
//! |---|---|---|
//! | `ping` | the round trip, by the host | `ok` |
//! | `mount KIND TAG OPTIONS` | nothing: mounts the share, a `9p` or a `virtiofs`, at [`SHARE`] | `ok` |
//! | `exec N PATH ARG…` | N times, one after the other: start the program, wait for its end | `ok P50 MEAN` in ns |
//! | `write BYTES CHUNK` | that many bytes to the stream port, CHUNK in a write | `ok NS` |
//! | `read BYTES` | that many from the stream port, from the first to come | `ok NS` |
//! | `quit` | nothing: powers off, or ends the namespace | |
//!
//! A line that cannot be carried out is answered `error WHY`. A program is started by std's `Command`:
//! posix_spawn(3), which shares the parent's memory until the execution, so there is no faster way. Its
//! standard streams are /dev/null and its environment is empty. With `--local` (the arguments of hyperinit)
//! the ports are unix sockets with one host at a time, and `mount` does nothing, because the namespace sees
//! the machine's files.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::init::modules;
use hyperinit::init::ports::{self, Port};
use hyperinit::init::settings::Settings;
use hyperinit::logger;
use log::LevelFilter;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::utsname::uname;

/// The mount point of `mount`.
const SHARE: &str = "/share";
/// The largest CHUNK, in bytes.
const CHUNK_MAX: usize = 16 << 20;
/// How many bytes `read` reads at once at most.
const READ_CHUNK: usize = 64 << 10;
/// The longest line, in bytes.
const LINE_MAX: u64 = 64 << 10;
/// The pause between two attempts to read from a host that is not there. A port without a host reports an end
/// of file, not that there is nothing to read.
const HOST_WAIT: Duration = Duration::from_millis(5);

fn main() -> ExitCode {
    logger::start("floor", LevelFilter::Warn, false);
    let settings = match Settings::from_args(std::env::args_os().skip(1)) {
        Ok(settings) => settings,
        Err(why) => {
            log::error!("{why}");
            return ExitCode::from(2);
        }
    };
    let local = settings.local.is_some();
    if !local && nix::unistd::getpid().as_raw() != 1 {
        log::error!("not PID 1: boot it in a VM, or use --local");
        return ExitCode::from(2);
    }
    let outcome = boot(&settings).and_then(|ports| serve(ports, local));
    if let Err(fault) = &outcome {
        log::error!("{fault}");
    }
    if !local {
        let _ = reboot(RebootMode::RB_POWER_OFF);
    }
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Boots as init does, and no further: the kernel's filesystems, the modules, the ports.
fn boot(settings: &Settings) -> Result<ports::Ports, Fault> {
    if settings.local.is_none() {
        for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
            let _ = std::fs::create_dir_all(at);
            // The kernel may have mounted devtmpfs itself.
            let _ = mount(Some(kind), at, Some(kind), MsFlags::empty(), None::<&str>);
        }
        modules::load_all(&Path::new("/lib/modules").join(uname().fault("asking", "uname")?.release()))?;
    }
    let mut settings = settings.clone();
    if settings.local.is_none() {
        let cmdline = std::fs::read_to_string("/proc/cmdline").fault("reading", "/proc/cmdline")?;
        // init reports the words that make no sense.
        drop(settings.add_cmdline(&cmdline));
    }
    ports::open(&settings)
}

/// Serves one host after the other, until one sends `quit`.
fn serve(ports: ports::Ports, local: bool) -> Result<(), Fault> {
    loop {
        let control = host(&ports.control)?;
        let mut stream = host(&ports.stream)?;
        let mut answers = control.try_clone().fault("sharing", "the control port")?;
        let mut lines = BufReader::new(control);
        loop {
            let mut line = String::new();
            let count = (&mut lines).take(LINE_MAX).read_line(&mut line).fault("reading", "a line")?;
            if count == 0 {
                if local {
                    break;
                }
                std::thread::sleep(HOST_WAIT);
                continue;
            }
            if line.trim_end() == "quit" {
                return Ok(());
            }
            let answer = match handle(line.trim_end(), &mut stream, local) {
                Ok(numbers) => ["ok".to_owned()].into_iter().chain(numbers).collect::<Vec<_>>().join(" "),
                Err(fault) => format!("error {fault}"),
            };
            answers.write_all(format!("{answer}\n").as_bytes()).fault("answering", "the host")?;
        }
    }
}

/// The host's end of a port as a plain blocking file.
fn host(port: &Port) -> Result<File, Fault> {
    let again = |fd: &OwnedFd| fd.try_clone().fault("sharing", "a port");
    let fd = match port {
        Port::Device(fd) | Port::Line(fd) => again(fd)?,
        Port::Listener(fd) | Port::Vsock(fd) => {
            let listener = UnixListener::from(again(fd)?);
            listener.set_nonblocking(false).fault("listening on", "a socket")?;
            OwnedFd::from(listener.accept().fault("accepting", "the host")?.0)
        }
    };
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::empty())).fault("making", "a port blocking")?;
    Ok(File::from(fd))
}

/// Carries out one line. The words that it returns follow `ok`.
fn handle(line: &str, stream: &mut File, local: bool) -> Result<Vec<String>, Fault> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let took = |time: Duration| vec![time.as_nanos().to_string()];
    match words[..] {
        ["ping"] => Ok(Vec::new()),
        ["mount", kind, tag, options] => mount_share(kind, tag, options, local).map(|()| Vec::new()),
        ["exec", count, program, ref arguments @ ..] => exec(number(count)?, program, arguments),
        ["write", bytes, chunk] => write(stream, number(bytes)?, number(chunk)?).map(took),
        ["read", bytes] => read(stream, number(bytes)?).map(took),
        _ => Err(Fault::new("reading", "the line", "no such command, or not its arguments")),
    }
}

fn number(word: &str) -> Result<usize, Fault> {
    match word.parse() {
        Ok(number) if number > 0 => Ok(number),
        _ => Err(Fault::new("reading", word, "not a number above 0")),
    }
}

fn mount_share(kind: &str, tag: &str, options: &str, local: bool) -> Result<(), Fault> {
    if local {
        return Ok(());
    }
    std::fs::create_dir_all(SHARE).fault("making", SHARE)?;
    mount(Some(tag), SHARE, Some(kind), MsFlags::MS_NODEV, Some(options)).fault("mounting the share", tag)
}

/// The p50 and the mean of `count` starts, in nanoseconds.
fn exec(count: usize, program: &str, arguments: &[&str]) -> Result<Vec<String>, Fault> {
    let mut times = Vec::new();
    for _ in 0..count {
        let mut command = Command::new(program);
        command.args(arguments).env_clear();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let start = Instant::now();
        let status = command.status().fault("executing", program)?;
        times.push(start.elapsed().as_nanos());
        if !status.success() {
            return Err(Fault::new("executing", program, format!("it ended with {status}")));
        }
    }
    let mean = times.iter().sum::<u128>() / times.len() as u128;
    times.sort_unstable();
    Ok(vec![times[times.len() / 2].to_string(), mean.to_string()])
}

fn write(stream: &mut File, bytes: usize, chunk: usize) -> Result<Duration, Fault> {
    if chunk > CHUNK_MAX {
        return Err(Fault::new("writing", "the stream port", format!("CHUNK is above {CHUNK_MAX}")));
    }
    let buffer = vec![0; chunk];
    let start = Instant::now();
    let mut left = bytes;
    while left > 0 {
        let portion = left.min(chunk);
        stream.write_all(&buffer[..portion]).fault("writing", "the stream port")?;
        left -= portion;
    }
    Ok(start.elapsed())
}

/// The clock starts with the first bytes, so that the host's delay before them does not count.
fn read(stream: &mut File, bytes: usize) -> Result<Duration, Fault> {
    let mut buffer = vec![0; READ_CHUNK];
    let mut start = None;
    let mut left = bytes;
    while left > 0 {
        let portion = left.min(READ_CHUNK);
        match stream.read(&mut buffer[..portion]).fault("reading", "the stream port")? {
            0 if start.is_some() => return Err(Fault::new("reading", "the stream port", "the host is gone")),
            // A host that has not opened the stream port yet.
            0 => std::thread::sleep(HOST_WAIT),
            count => {
                start.get_or_insert_with(Instant::now);
                left -= count;
            }
        }
    }
    Ok(start.map_or(Duration::ZERO, |start| start.elapsed()))
}

//! The floor: a bare PID 1 (benches/floor) that starts the same program and moves bytes through the same
//! ports.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use hyperinit_client::{CONTROL_SOCKET, STREAM_SOCKET};
use hyperinit_protocol::boot::{NinePTransport, ShareCache, nine_p_options};
use hyperinit_protocol::fault::{Fault, OrFault};

use super::super::cli::{Bench, ShareBy};
use super::super::guest::SHARE_TAG;
use super::super::initrd;
use super::super::places;
use super::{BOOT_TIMEOUT, BYTES, Current, PROGRAM, median, rate};

/// Between two looks for a port that is not there.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Where the floor mounts the share.
const SHARE: &str = "/share";

/// What the machine itself costs.
pub struct Floor {
    /// fork, exec and wait of the program, p50.
    pub exec: Duration,
    /// The first exec of a container's program from a share whose pages nobody has.
    pub first_exec: Duration,
    /// A line to the control port and back, p50.
    pub ping: Duration,
    /// MB a second to the stream port in writes of 64 kB, and of 4 kB.
    pub write: f64,
    pub write_small: f64,
    /// MB a second from the stream port.
    pub read: f64,
}

struct Lines {
    control: BufReader<UnixStream>,
}

impl Lines {
    /// Says one line and returns the words of the answer.
    fn ask(&mut self, line: &str) -> Result<Vec<String>, Fault> {
        self.say(line)?;
        self.answer(line)
    }

    fn say(&mut self, line: &str) -> Result<(), Fault> {
        self.control.get_mut().write_all(format!("{line}\n").as_bytes()).fault("asking the floor to", line)
    }

    fn answer(&mut self, line: &str) -> Result<Vec<String>, Fault> {
        let mut answer = String::new();
        self.control.read_line(&mut answer).fault("hearing the floor's answer to", line)?;
        let mut words = answer.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("ok") => Ok(words.collect()),
            _ => Err(Fault::new("asking the floor to", line, answer.trim().to_owned())),
        }
    }
}

/// The first number of an answer, in nanoseconds.
fn nanoseconds(words: &[String]) -> Result<Duration, Fault> {
    let number = words.first().and_then(|word| word.parse().ok()).map(Duration::from_nanos);
    number.ok_or_else(|| Fault::new("reading", "the floor's answer", "it is no number"))
}

/// Boots it and measures everything.
pub(super) fn measure(
    options: &Bench,
    rootfs: &Path,
    directory: &Path,
    current: &Current,
) -> Result<Floor, Fault> {
    let mut options = options.clone();
    if !options.local {
        std::fs::create_dir_all(directory).fault("making", directory.display())?;
        let image = directory.join("floor.img");
        let asked = &mut options.options;
        let boot = places::boot(asked.kernel.as_deref(), asked.initrd.as_deref())?;
        initrd::replace_init(&boot.initrd, "floor", &image)?;
        (asked.kernel, asked.initrd) = (Some(boot.kernel), Some(image));
    }
    current.start(&options, rootfs, directory, true)?;
    let (control, mut stream) = connect(directory)?;
    let mut lines = Lines { control: BufReader::new(control) };
    lines.ask("ping")?;
    let mount = match options.options.share_by {
        Some(ShareBy::Virtiofs) => format!("mount virtiofs {SHARE_TAG} rw"),
        // The fast way, whatever the guest's is: coherently, each exec would read a program again that
        // nothing else has in use.
        Some(ShareBy::NineP) | None => {
            let options = nine_p_options(NinePTransport::Virtio, ShareCache::Loose);
            format!("mount 9p {SHARE_TAG} {options}")
        }
    };
    lines.ask(&mount)?;
    let root = if options.local { rootfs.display().to_string() } else { SHARE.to_owned() };
    let program = format!("{root}{} {}", PROGRAM[0], PROGRAM[1]);
    let first_exec = nanoseconds(&lines.ask(&format!("exec 1 {program}"))?)?;
    let exec = nanoseconds(&lines.ask(&format!("exec {} {program}", options.rounds))?)?;
    let ping = pings(&mut lines, options.rounds)?;
    let mut write = |chunk: usize| {
        let line = format!("write {BYTES} {chunk}");
        lines.say(&line)?;
        let start = Instant::now();
        read_all(&mut stream)?;
        let seen = start.elapsed();
        // What the host saw: the guest's last write may return before it has been taken.
        nanoseconds(&lines.answer(&line)?).map(|said| rate(BYTES, said.max(seen)))
    };
    let (write_large, write_small) = (write(64 << 10)?, write(4 << 10)?);
    let line = format!("read {BYTES}");
    lines.say(&line)?;
    stream.write_all(&vec![0; BYTES]).fault("writing", "the stream port")?;
    let read = rate(BYTES, nanoseconds(&lines.answer(&line)?)?);
    current.end();
    Ok(Floor { exec, first_exec, ping, write: write_large, write_small, read })
}

fn pings(lines: &mut Lines, count: u32) -> Result<Duration, Fault> {
    let mut times = Vec::new();
    for _ in 0..count {
        let start = Instant::now();
        lines.ask("ping")?;
        times.push(start.elapsed());
    }
    Ok(median(times))
}

fn read_all(stream: &mut UnixStream) -> Result<(), Fault> {
    let mut buffer = vec![0; 1 << 20];
    let mut left = BYTES;
    while left > 0 {
        match stream.read(&mut buffer).fault("reading", "the stream port")? {
            0 => return Err(Fault::new("reading", "the stream port", "the floor is gone")),
            count => left = left.saturating_sub(count),
        }
    }
    Ok(())
}

/// Both ports, as soon as they are there.
fn connect(directory: &Path) -> Result<(UnixStream, UnixStream), Fault> {
    let deadline = Instant::now() + BOOT_TIMEOUT;
    // What is connected is kept: the floor has one host, and would wait for the other port of one that went
    // away.
    let control = connect_to(&directory.join(CONTROL_SOCKET), deadline)?;
    Ok((control, connect_to(&directory.join(STREAM_SOCKET), deadline)?))
}

fn connect_to(path: &Path, deadline: Instant) -> Result<UnixStream, Fault> {
    loop {
        match UnixStream::connect(path) {
            Ok(port) => return Ok(port),
            Err(error) if Instant::now() > deadline => {
                return Err(Fault::io("connecting to", path.display(), &error));
            }
            Err(_) => std::thread::sleep(LOOK_AGAIN),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc::sync_channel;

    use super::*;

    #[test]
    fn a_port_that_is_late_costs_no_other_its_host() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_owned();
        let (late, told) = sync_channel(0);
        let host = std::thread::spawn(move || {
            let ports = connect(&path);
            told.recv().unwrap();
            ports
        });
        let control = UnixListener::bind(directory.path().join(CONTROL_SOCKET)).unwrap();
        let (mut first, _) = control.accept().unwrap();
        first.set_read_timeout(Some(LOOK_AGAIN * 10)).unwrap();
        let why = first.read(&mut [0]).unwrap_err().kind();
        assert_eq!(why, std::io::ErrorKind::WouldBlock, "it is still connected");
        let stream = UnixListener::bind(directory.path().join(STREAM_SOCKET)).unwrap();
        stream.accept().unwrap();
        late.send(()).unwrap();
        let (mut says, _) = host.join().unwrap().unwrap();
        says.write_all(b"p").unwrap();
        assert_eq!(first.read(&mut [0]).unwrap(), 1);
    }
}

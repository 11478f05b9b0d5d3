//! The floor program over unix sockets: tests every line of its protocol, so that the ratios of the bench can
//! be relied on.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// Far more than any step takes on a busy machine.
const DEADLINE: Duration = Duration::from_secs(60);

/// The program and its two ports. Dropping it ends the program and removes the directory.
struct Floor {
    child: Child,
    directory: PathBuf,
    control: BufReader<UnixStream>,
    stream: UnixStream,
}

impl Floor {
    fn start(name: &str) -> Floor {
        let directory = std::env::temp_dir().join(format!("floor-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (ctl, stream) = (directory.join("ctl.sock"), directory.join("stream.sock"));
        let mut child = Command::new(env!("CARGO_BIN_EXE_floor"))
            .arg("--local")
            .args([Path::new("--ctl"), &ctl, Path::new("--stream"), &stream])
            .args([Path::new("--share"), &directory])
            .spawn()
            .unwrap();
        let control = BufReader::new(connect(&ctl, &mut child));
        let stream = connect(&stream, &mut child);
        Floor { child, directory, control, stream }
    }

    fn say(&mut self, line: &str) {
        self.control.get_mut().write_all(format!("{line}\n").as_bytes()).unwrap();
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.control.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn ask(&mut self, line: &str) -> String {
        self.say(line);
        self.answer()
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Connects once the program listens.
fn connect(path: &Path, child: &mut Child) -> UnixStream {
    let start = Instant::now();
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            stream.set_read_timeout(Some(DEADLINE)).unwrap();
            return stream;
        }
        assert_eq!(child.try_wait().unwrap(), None, "the floor program left");
        assert!(start.elapsed() < DEADLINE, "nobody listens on {}", path.display());
        std::thread::yield_now();
    }
}

/// The numbers after `ok`.
fn numbers(answer: &str) -> Vec<u64> {
    let mut words = answer.split(' ');
    assert_eq!(words.next(), Some("ok"), "{answer}");
    words.map(|word| word.parse().unwrap()).collect()
}

#[test]
fn every_line_is_answered() {
    let mut floor = Floor::start("lines");
    assert_eq!(floor.ask("ping"), "ok");
    assert_eq!(floor.ask("mount 9p share_dir trans=virtio"), "ok");
    let times = numbers(&floor.ask("exec 5 /bin/sh -c :"));
    assert!(times.len() == 2 && times.iter().all(|&time| time > 0), "{times:?}");

    floor.say("write 100000 4096");
    let mut bytes = vec![1; 100_000];
    floor.stream.read_exact(&mut bytes).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0));
    assert_eq!(numbers(&floor.answer()).len(), 1);

    floor.say("read 200000");
    floor.stream.write_all(&[7; 200_000]).unwrap();
    assert_eq!(numbers(&floor.answer()).len(), 1);

    floor.say("quit");
    assert!(floor.child.wait().unwrap().success());
}

#[test]
fn what_cannot_be_done_is_said_and_the_next_line_is_answered() {
    let mut floor = Floor::start("errors");
    for line in [
        "",
        "exec",
        "exec 0 /bin/true",
        "exec 1 /nothing/there",
        "exec 1 /bin/sh -c false",
        "write 1 x",
        "jump",
    ] {
        let answer = floor.ask(line);
        assert!(answer.starts_with("error floor: "), "{line:?}: {answer}");
    }
    assert_eq!(floor.ask("ping"), "ok");
}

//! `hyperctl logs`: what a guest has logged, and what it logs.

use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use hyperinit_protocol::fault::{Fault, OrFault};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::cli::Logs;
use super::guest::CONSOLE;
use super::standard;

/// How often it is looked whether the guest still runs, in milliseconds: no event tells of the end of a lock.
const LOOK_AGAIN: u16 = 500;
/// How much is copied at once, in bytes.
const CHUNK: usize = 64 << 10;

/// Prints the log; with `follow` until the guest ends.
pub fn logs(options: &Logs) -> Result<ExitCode, Fault> {
    let path = options.dir.join(CONSOLE);
    let mut log = File::open(&path).fault("opening", path.display())?;
    let events = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).fault("watching", "files")?;
    events.add_watch(&path, AddWatchFlags::IN_MODIFY).fault("watching", path.display())?;
    let mut out = standard::stdout();
    loop {
        // In this order: what it wrote last is not missed.
        let running =
            options.follow && is_running(&log).fault("asking whether a guest runs with", path.display())?;
        match copy(&mut log, &mut out) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
            copied => copied.fault("copying", path.display())?,
        }
        if !running {
            return Ok(ExitCode::SUCCESS);
        }
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, LOOK_AGAIN).fault("waiting for", path.display())?;
        // Which ones does not matter: there is one file.
        while events.read_events().is_ok() {}
    }
}

/// Whether a guest writes to the log: it and its hyperctl hold the lock.
fn is_running(log: &File) -> io::Result<bool> {
    match log.try_lock_shared() {
        Ok(()) => log.unlock().map(|()| false),
        Err(TryLockError::WouldBlock) => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Copies what there is. A log that has become shorter is another guest's.
fn copy(log: &mut File, out: &mut impl Write) -> io::Result<()> {
    if log.metadata()?.len() < log.stream_position()? {
        log.seek(SeekFrom::Start(0))?;
    }
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = log.read(&mut chunk)?;
        if count == 0 {
            return out.flush();
        }
        out.write_all(chunk.get(..count).unwrap_or_default())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_is_copied_once_and_a_new_log_from_its_start() {
        let path = std::env::temp_dir().join(format!("hyperctl-logs-{}", std::process::id()));
        let mut writer = File::options().create(true).truncate(true).write(true).open(&path).unwrap();
        let mut log = File::open(&path).unwrap();
        let mut out = Vec::new();
        for line in ["one\n", "two\n"] {
            writer.write_all(line.as_bytes()).unwrap();
            copy(&mut log, &mut out).unwrap();
        }
        assert_eq!(out, b"one\ntwo\n");
        std::fs::write(&path, "new\n").unwrap();
        copy(&mut log, &mut out).unwrap();
        assert_eq!(out, b"one\ntwo\nnew\n");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_guest_that_runs_holds_the_lock() {
        let path = std::env::temp_dir().join(format!("hyperctl-lock-{}", std::process::id()));
        let writer = File::create(&path).unwrap();
        let log = File::open(&path).unwrap();
        assert!(!is_running(&log).unwrap());
        writer.try_lock().unwrap();
        assert!(is_running(&log).unwrap());
        drop(writer);
        assert!(!is_running(&log).unwrap());
        std::fs::remove_file(path).unwrap();
    }
}

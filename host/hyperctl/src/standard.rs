//! hyperctl's standard streams.
//!
//! Another process may have made one of them non-blocking, as Node does with a pipe that it shares: the flag
//! belongs to the open file, not to a descriptor. So the flag is left as it is, and EAGAIN is answered by
//! waiting in poll(2).

use std::io::{self, Read, Stderr, Stdin, Stdout, Write};
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{read, write};

/// A stream whose reads and writes block even if it was made non-blocking. Nothing is buffered.
pub struct Patient<T>(T);

/// Standard input.
pub fn stdin() -> Patient<Stdin> {
    Patient(io::stdin())
}

/// Standard output.
pub fn stdout() -> Patient<Stdout> {
    Patient(io::stdout())
}

/// Standard error.
pub fn stderr() -> Patient<Stderr> {
    Patient(io::stderr())
}

impl<T: AsFd> Patient<T> {
    /// Repeats a call until it succeeds or fails with another error than EAGAIN and EINTR.
    fn wait_for<R>(&self, event: PollFlags, mut act: impl FnMut(&T) -> Result<R, Errno>) -> io::Result<R> {
        loop {
            match act(&self.0) {
                Err(Errno::EAGAIN) => {
                    let mut fds = [PollFd::new(self.0.as_fd(), event)];
                    match poll(&mut fds, PollTimeout::NONE) {
                        // The next attempt reports an error or a hang-up.
                        Ok(_) | Err(Errno::EINTR) => {}
                        Err(errno) => return Err(errno.into()),
                    }
                }
                Err(Errno::EINTR) => {}
                done => return Ok(done?),
            }
        }
    }
}

impl<T: AsFd> Read for Patient<T> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.wait_for(PollFlags::POLLIN, |stream| read(stream, bytes))
    }
}

impl<T: AsFd> Write for Patient<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.wait_for(PollFlags::POLLOUT, |stream| write(stream, bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;

    #[test]
    fn a_pipe_that_blocks_nobody_is_waited_for() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let sent: Vec<u8> = (0..1u32 << 20).map(|at| (at % 251) as u8).collect();
        let bytes = sent.clone();
        // This is more than a pipe holds, so one of the two has to wait from the first byte on.
        let thread = std::thread::spawn(move || Patient(writer).write_all(&bytes));
        let mut heard = Vec::new();
        Patient(reader).read_to_end(&mut heard).unwrap();
        thread.join().unwrap().unwrap();
        assert!(heard == sent, "{} bytes", heard.len());
    }

    #[test]
    fn whoever_waits_hears_that_the_reader_has_gone() {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        let thread = std::thread::spawn(move || Patient(writer).write_all(&vec![0; 1 << 20]));
        Patient(&reader).read_exact(&mut [0; 1]).unwrap();
        drop(reader);
        assert_eq!(thread.join().unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}

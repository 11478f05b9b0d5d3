//! The kernel's record of what this guest's processes did once they were confined. Nothing of the product
//! knows of it.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::follow::{Event, Follower, Kept, NAMES, Seen};
use crate::tracer::Tracer;

/// The longest filter, in bytes: the kernel takes a page less one.
const FILTER: usize = 4000;

/// A recording of the calling thread's descendants.
pub struct Record {
    tracer: Arc<Tracer>,
    done: Arc<AtomicBool>,
    reader: Option<JoinHandle<Reader>>,
}

impl Record {
    /// Begins with whatever this thread starts. `kept` says which calls of a process are worth a place, and
    /// `seccomp` which call confines it.
    pub fn start(kept: Kept, seccomp: u32) -> Record {
        let tracer = Arc::new(Tracer::new());
        let named = NAMES.map(|name| format!("comm == {name:?}")).join(" || ");
        tracer.filter("capability/cap_capable", &format!("ret == 0 && ({named})"));
        let reader = Reader::new(&tracer, Follower::new(kept, seccomp));
        reader.ask(&tracer);
        let done = Arc::new(AtomicBool::new(false));
        let reader = {
            let (tracer, done) = (Arc::clone(&tracer), Arc::clone(&done));
            std::thread::spawn(move || reader.read(&tracer, &done))
        };
        tracer.start();
        Record { tracer, done, reader: Some(reader) }
    }

    /// Ends it.
    pub fn stop(mut self) -> Seen {
        let reader = self.end().expect("it was not stopped before").expect("reading the record");
        let lost = [reader.lost, self.tracer.lost()].concat();
        assert!(
            lost.is_empty(),
            "the kernel's buffers (BUFFERS in tests/minimal/tracer.rs) were too small: {lost:?}"
        );
        reader.follower.seen
    }

    fn end(&mut self) -> Option<std::thread::Result<Reader>> {
        let reader = self.reader.take()?;
        self.tracer.stop();
        self.done.store(true, Ordering::SeqCst);
        Some(reader.join())
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        // The reader has a share of the tracer, and is to have none when this process ends.
        drop(self.end());
    }
}

/// What one processor has recorded.
struct Pipe {
    file: File,
    /// Of a line whose rest is still to come.
    part: Vec<u8>,
}

/// Reads the processors' records and has them followed in their order.
struct Reader {
    pipes: Vec<Pipe>,
    /// What was read and is not to be followed yet, in no order.
    held: Vec<Event>,
    follower: Follower,
    lost: Vec<String>,
}

impl Reader {
    fn new(tracer: &Tracer, follower: Follower) -> Reader {
        let pipes = tracer.pipes().into_iter().map(|file| Pipe { file, part: Vec::new() }).collect();
        Reader { pipes, held: Vec::new(), follower, lost: Vec::new() }
    }

    /// Asks for no more than is not known yet: what a process does again and again would fill every buffer.
    fn ask(&self, tracer: &Tracer) {
        tracer.filter("raw_syscalls/sys_enter", &self.follower.asks(FILTER));
    }

    fn read(mut self, tracer: &Tracer, done: &AtomicBool) -> Reader {
        loop {
            // Asked before the read: what was written until then is read.
            let last = done.load(Ordering::SeqCst);
            let read = self.round();
            if self.follower.learnt() {
                self.ask(tracer);
            }
            match (read, last) {
                (true, _) => {}
                (false, true) => return self.finish(),
                (false, false) => self.wait(),
            }
        }
    }

    /// Reads from every processor, and follows what nothing can come before any more; whether there was
    /// something to read.
    ///
    /// The kernel writes on one processor while another's record is read, so what is read last may be later
    /// than what is still to be read. But what happened before something that an earlier round has read was
    /// written by the end of that round, and this one finds it.
    fn round(&mut self) -> bool {
        let horizon = self.held.iter().map(|event| event.at).max().unwrap_or(0);
        let before = self.held.len();
        for pipe in &mut self.pipes {
            pipe.read(horizon, &mut self.held, &mut self.lost);
        }
        let read = self.held.len() > before;
        self.follow(horizon);
        read
    }

    fn follow(&mut self, horizon: u64) {
        self.held.sort_by_key(|event| event.at);
        let ready = self.held.partition_point(|event| event.at <= horizon);
        for event in self.held.drain(..ready) {
            self.follower.event(&event);
        }
    }

    fn finish(mut self) -> Reader {
        self.follow(u64::MAX);
        self
    }

    /// The kernel tells of a buffer that is half full; a quiet time has to be seen to end, too.
    fn wait(&self) {
        let mut pipes: Vec<_> =
            self.pipes.iter().map(|pipe| PollFd::new(pipe.file.as_fd(), PollFlags::POLLIN)).collect();
        let _ = poll(&mut pipes, PollTimeout::from(100u8));
    }
}

impl Pipe {
    /// Reads until there is nothing left or something later than `horizon`.
    fn read(&mut self, horizon: u64, held: &mut Vec<Event>, lost: &mut Vec<String>) {
        let mut buffer = [0; 1 << 16];
        let mut last = 0;
        while last <= horizon {
            let count = match self.file.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => panic!("trace_pipe: {error}"),
            };
            self.part.extend_from_slice(&buffer[..count]);
            let whole = self.part.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
            let lines: Vec<u8> = self.part.drain(..whole).collect();
            for line in String::from_utf8_lossy(&lines).lines() {
                match Event::parse(line) {
                    Some(event) => {
                        last = event.at;
                        held.push(event);
                    }
                    None if line.trim().is_empty() => {}
                    // `CPU:1 [LOST 42 EVENTS]`, and nothing else that is known of.
                    None => lost.push(line.to_owned()),
                }
            }
        }
    }
}

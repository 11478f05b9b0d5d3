//! What is tried from every seat. An effect is a call, or some, whose answer tells whether the process could
//! do the harm; it does none: what it opens it closes, what it changes it changes to what it was, and what
//! cannot be taken back a copy of the process does.

mod devices;
mod kernel;
mod others;
mod outside;
mod rights;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
pub use rights::SETUID;

use super::answer::Answer;
use super::seat::Seat;
use super::world::World;

/// A row of the table.
pub struct Effect {
    /// The heading that it is below.
    pub group: &'static str,
    pub name: String,
    act: Box<dyn Fn(&mut Place<'_>) -> String>,
}

impl Effect {
    /// Tries it; the cell of the table.
    pub fn attempt(&self, place: &mut Place<'_>) -> String {
        place.seat.clear();
        (self.act)(place)
    }
}

/// Where an effect is tried.
pub struct Place<'a> {
    pub seat: &'a mut Seat,
    pub world: &'a World,
    /// The process, by its name in the world.
    pub name: &'a str,
}

impl Place<'_> {
    /// The number of another process here.
    fn number(&self, name: &str) -> Option<u64> {
        if name == self.name { None } else { self.world.number(name, self.seat.pid()) }
    }

    /// Opens a file, and closes it.
    fn opens(&mut self, path: &str, flags: OFlag) -> Answer {
        let answer = self.open(path, flags);
        self.close(answer);
        answer
    }

    fn open(&mut self, path: &str, flags: OFlag) -> Answer {
        let path = self.seat.text(path);
        let flags = (flags | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).bits();
        self.seat.call(libc::SYS_openat, [AT_FDCWD, path, int(flags), 0])
    }

    fn close(&mut self, answer: Answer) {
        if let Some(fd) = answer.value() {
            self.seat.call(libc::SYS_close, [fd]);
        }
    }

    /// A call that returns a descriptor, which is closed.
    fn makes<const N: usize>(&mut self, number: i64, arguments: [u64; N]) -> Answer {
        let answer = self.seat.call(number, arguments);
        self.close(answer);
        answer
    }

    /// What cannot be taken back: a copy of the process does it, or the process itself where its filter would
    /// trap that too.
    fn once(&mut self, act: impl FnOnce(&mut Place<'_>) -> Answer) -> Answer {
        match self.seat.child() {
            Ok(mut child) => {
                let (world, name) = (self.world, self.name);
                let answer = act(&mut Place { seat: &mut child, world, name });
                self.seat.end_child(child);
                answer
            }
            Err(Answer::Trapped) => act(self),
            Err(answer) => panic!("{}: it makes no child: {answer:?}", self.name),
        }
    }
}

/// An effect that is one answer.
fn one(group: &'static str, name: &str, act: fn(&mut Place<'_>) -> Answer) -> Effect {
    Effect { group, name: name.to_owned(), act: Box::new(move |place| act(place).word()) }
}

/// The current directory, in whose place an absolute path is resolved.
const AT_FDCWD: u64 = int(libc::AT_FDCWD);
/// A pointer to nothing.
const NULL: u64 = 0;

/// An int as an argument.
const fn int(value: i32) -> u64 {
    value as i64 as u64
}

/// Every row, in the order of the page. What may end a process is last.
pub fn all() -> Vec<Effect> {
    let groups =
        [others::effects(), kernel::effects(), devices::effects(), outside::effects(), rights::effects()];
    groups.into_iter().flatten().chain(others::last()).collect()
}

/// A bad address is found after the right to use it.
fn past_fault(answer: Answer) -> Answer {
    answer.past(Errno::EFAULT)
}

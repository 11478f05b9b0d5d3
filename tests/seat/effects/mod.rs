//! The effects that are tried from every seat. An effect is one or more calls whose answer tells whether the
//! process could do the harm. The test does no harm itself: it closes what it opens and sets what it changes
//! to the old value. What cannot be undone is done in a copy of the process.

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
    /// The heading of its table.
    pub group: &'static str,
    pub name: String,
    act: Box<dyn Fn(&mut Place<'_>) -> String>,
}

impl Effect {
    /// Tries the effect and returns the cell of the table.
    pub fn attempt(&self, place: &mut Place<'_>) -> String {
        place.seat.clear();
        (self.act)(place)
    }
}

/// A process from which an effect is tried.
pub struct Place<'a> {
    pub seat: &'a mut Seat,
    pub world: &'a World,
    /// The name of the process, as `World` finds it.
    pub name: &'a str,
}

impl Place<'_> {
    /// The pid of another process in this one's PID namespace.
    fn number(&self, name: &str) -> Option<u64> {
        if name == self.name { None } else { self.world.number(name, self.seat.pid()) }
    }

    /// Opens a file and closes it.
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

    /// Makes a call that returns a descriptor, and closes the descriptor.
    fn makes<const N: usize>(&mut self, number: i64, arguments: [u64; N]) -> Answer {
        let answer = self.seat.call(number, arguments);
        self.close(answer);
        answer
    }

    /// Does what cannot be undone in a copy of the process. If the filter traps clone, the process itself
    /// tries it, for the filter would trap it too.
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

/// An effect with a single answer.
fn one(group: &'static str, name: &str, act: fn(&mut Place<'_>) -> Answer) -> Effect {
    Effect { group, name: name.to_owned(), act: Box::new(move |place| act(place).word()) }
}

/// The current directory; an absolute path ignores it.
const AT_FDCWD: u64 = int(libc::AT_FDCWD);
/// A null pointer.
const NULL: u64 = 0;

/// An `int` as an argument of a system call.
const fn int(value: i32) -> u64 {
    value as i64 as u64
}

/// Every row, in the order of the page. The effects that may end a process are last.
pub fn all() -> Vec<Effect> {
    let groups =
        [others::effects(), kernel::effects(), devices::effects(), outside::effects(), rights::effects()];
    groups.into_iter().flatten().chain(others::last()).collect()
}

/// Counts EFAULT as success: the kernel checks the right before it reads from a bad address.
fn past_fault(answer: Answer) -> Answer {
    answer.past(Errno::EFAULT)
}

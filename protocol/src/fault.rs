//! The one error type and its one printed form: `who: doing what to what: why`.

use std::fmt;
use std::io;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// The longest part of a fault in bytes. A fault may quote its object, and the host's names can be as long as
/// its messages. With this limit an ERROR is shorter than four parts, and a helper's fault is shorter than
/// its reader's buffer.
pub const PART_MAX: usize = 1 << 10;

/// An error in the form in which people read it and processes exchange it.
///
/// `who` is a process of hyperinit (`mountd`), `doing` a verb phrase (`mounting the rootfs`), `to` the object
/// (a path, a name; may be empty), `why` the reason, and `errno` the kernel's answer if there was one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The process that failed.
    pub who: String,
    /// What it was doing.
    pub doing: String,
    /// The object of `doing`; may be empty.
    pub to: String,
    /// The reason.
    pub why: String,
    /// The errno behind `why`, if a system call failed.
    pub errno: Option<i32>,
}

impl Fault {
    /// A fault with a reason in words.
    pub fn new(doing: impl Into<String>, to: impl fmt::Display, why: impl Into<String>) -> Fault {
        Fault {
            who: crate::logger::who().to_owned(),
            doing: doing.into(),
            to: to.to_string(),
            why: why.into(),
            errno: None,
        }
        .clipped()
    }

    /// The fault with each part cut to [`PART_MAX`], for faults that another process made.
    pub fn clipped(mut self) -> Fault {
        [&mut self.who, &mut self.doing, &mut self.to, &mut self.why].into_iter().for_each(clip);
        self
    }

    /// A fault from an errno.
    pub fn errno(doing: impl Into<String>, to: impl fmt::Display, errno: Errno) -> Fault {
        Fault { errno: Some(errno as i32), ..Fault::new(doing, to, errno.desc()) }
    }

    /// A fault from an error of the standard library; keeps the errno if there is one.
    pub fn io(doing: impl Into<String>, to: impl fmt::Display, error: &io::Error) -> Fault {
        match error.raw_os_error() {
            Some(raw) => Fault::errno(doing, to, Errno::from_raw(raw)),
            None => Fault::new(doing, to, error.to_string()),
        }
    }

    /// Whether the kernel's answer was `errno`.
    pub fn is(&self, errno: Errno) -> bool {
        self.errno == Some(errno as i32)
    }
}

/// Cuts a text to [`PART_MAX`] and marks the cut.
fn clip(text: &mut String) {
    const MARK: &str = "…";
    if text.len() > PART_MAX {
        let end = (0..=PART_MAX - MARK.len()).rev().find(|&at| text.is_char_boundary(at));
        text.truncate(end.unwrap_or(0));
        text.push_str(MARK);
        // This frees the memory of the part that was cut off.
        text.shrink_to_fit();
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.who, self.doing)?;
        if !self.to.is_empty() {
            write!(f, " {}", self.to)?;
        }
        write!(f, ": {}", self.why)
    }
}

impl std::error::Error for Fault {}

/// Turns the error of a system call into a fault at the call: `open(p).fault("opening", p)?`.
pub trait OrFault<T> {
    /// The value, or a fault that says what was being done to what.
    fn fault(self, doing: &str, to: impl fmt::Display) -> Result<T, Fault>;
}

impl<T> OrFault<T> for Result<T, Errno> {
    fn fault(self, doing: &str, to: impl fmt::Display) -> Result<T, Fault> {
        self.map_err(|errno| Fault::errno(doing, to, errno))
    }
}

impl<T> OrFault<T> for io::Result<T> {
    fn fault(self, doing: &str, to: impl fmt::Display) -> Result<T, Fault> {
        self.map_err(|error| Fault::io(doing, to, &error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_printed_form() {
        crate::logger::name("mountd");
        let fault = Fault::errno("mounting", "/dev/sda", Errno::ENXIO);
        assert_eq!(fault.to_string(), "mountd: mounting /dev/sda: No such device or address");
        assert!(fault.is(Errno::ENXIO) && !fault.is(Errno::EPERM));
        assert_eq!(Fault::new("syncing", "", "no disk").to_string(), "mountd: syncing: no disk");
    }

    #[test]
    fn a_fault_is_short_whatever_it_quotes() {
        let long = "ä".repeat(1 << 20);
        let fault = Fault::new("reading", &long, long.clone());
        for part in [&fault.to, &fault.why] {
            assert!(part.len() <= PART_MAX && part.capacity() <= 2 * PART_MAX && part.ends_with("ä…"));
        }
        assert_eq!(Fault { why: long, ..fault.clone() }.clipped(), fault);
        let whole = "x".repeat(PART_MAX);
        assert_eq!(Fault::new("reading", "", whole.clone()).why, whole);
    }
}

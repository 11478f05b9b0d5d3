//! The one error type and its one printed form: `who: doing what to what: why`.

use std::fmt;
use std::io;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// An error as a person reads it and as it travels between processes.
///
/// `who` is a process of hyperinit (`mountd`), `doing` a verb phrase (`mounting the rootfs`), `to` the
/// object (a path, a name; may be empty), `why` the reason, and `errno` the kernel's answer if it was one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// The process that failed.
    pub who: String,
    /// What it was doing.
    pub doing: String,
    /// To what, or empty.
    pub to: String,
    /// Why it could not be done.
    pub why: String,
    /// The errno behind `why`, if a system call said so.
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
    }

    /// A fault whose reason is the kernel's.
    pub fn errno(doing: impl Into<String>, to: impl fmt::Display, errno: Errno) -> Fault {
        Fault { errno: Some(errno as i32), ..Fault::new(doing, to, errno.desc()) }
    }

    /// A fault from the standard library; keeps the errno if there is one.
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

/// Turns the errors of system calls into faults at the call: `open(p).fault("opening", p)?`.
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
}

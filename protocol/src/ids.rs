//! Names and numbers with a meaning, checked once on input.

use std::fmt;
use std::num::NonZeroU64;

/// The users and groups of the guest's own processes (policy/*.json). The guest gives no process in a
/// container one of these numbers, because the kernel lets a user signal all of its own processes, and counts
/// their resources together. What a container's root gains by taking such a number:
/// docs/decisions/helper-users.md.
pub const HELPER_USERS: std::ops::RangeInclusive<u32> = 0xffff_f000..=0xffff_f0ff;

use serde::{Deserialize, Serialize};

/// The longest container or process id in bytes. A container's id is the name of a directory and of a cgroup
/// (NAME_MAX is 255).
pub const ID_MAX: usize = 128;

/// What is wrong with an id, in words.
fn check(id: &str) -> Result<(), &'static str> {
    match id {
        "" => Err("is empty"),
        _ if id.len() > ID_MAX => Err("is longer than 128 bytes"),
        _ if id.starts_with('.') => Err("begins with a dot"),
        _ if id.contains('/') => Err("contains a slash"),
        _ if id.chars().any(char::is_control) => Err("contains a control character"),
        _ => Ok(()),
    }
}

/// The part of an id that an error quotes; the rest of an id that is too long is cut off.
fn shown(id: &str) -> String {
    id.chars().take(ID_MAX).collect()
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The id as the host sent it.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;
            fn try_from(id: String) -> Result<Self, String> {
                check(&id).map_err(|why| format!("the id {:?} {why}", shown(&id)))?;
                Ok($name(id))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id!(
    /// A container's id. It is also the name of a directory and a cgroup, so it can never be a path.
    ContainerId
);
id!(
    /// A process's id, unique in its container.
    ProcessId
);

/// A stream number of protocol.md «Streams», which is never zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StreamId(pub NonZeroU64);

impl StreamId {
    /// The stream with that number; none for zero, which means «no stream».
    pub fn new(number: u64) -> Option<StreamId> {
        NonZeroU64::new(number).map(StreamId)
    }

    /// The number as it stands in a frame.
    pub fn get(self) -> u64 {
        self.0.get()
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A process number in the guest's own PID namespace; always positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Pid(pub i32);

impl fmt::Display for Pid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A signal's number as kill(2) takes it: 1 to 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub struct Signal(u8);

impl Signal {
    /// `SIGHUP`: the terminal is gone, or: read the configuration again.
    pub const HUP: Signal = Signal(1);
    /// `SIGINT`: a terminal's ^C.
    pub const INT: Signal = Signal(2);
    /// `SIGQUIT`: a terminal's ^\\.
    pub const QUIT: Signal = Signal(3);
    /// `SIGKILL`: end at once.
    pub const KILL: Signal = Signal(9);
    /// `SIGPIPE`: written to a pipe without a reader.
    pub const PIPE: Signal = Signal(13);
    /// `SIGTERM`: a request to end.
    pub const TERM: Signal = Signal(15);
    /// `SIGCONT`: continue.
    pub const CONT: Signal = Signal(18);
    /// `SIGTSTP`: a terminal's ^Z.
    pub const TSTP: Signal = Signal(20);
    /// `SIGWINCH`: the terminal's size has changed.
    pub const WINCH: Signal = Signal(28);
    /// The last real-time signal of Linux.
    const MAX: u8 = 64;

    /// The number.
    pub fn get(self) -> i32 {
        i32::from(self.0)
    }
}

impl TryFrom<i64> for Signal {
    type Error = String;
    fn try_from(number: i64) -> Result<Signal, String> {
        match u8::try_from(number) {
            Ok(number @ 1..=Signal::MAX) => Ok(Signal(number)),
            _ => Err(format!("invalid signal {number}")),
        }
    }
}

impl From<Signal> for i64 {
    fn from(signal: Signal) -> i64 {
        i64::from(signal.0)
    }
}

impl fmt::Display for Signal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_one_that_kill_takes() {
        for bad in [0, -1, 65, 256 + 9, i64::MIN] {
            assert_eq!(Signal::try_from(bad), Err(format!("invalid signal {bad}")));
        }
        assert_eq!(Signal::try_from(9), Ok(Signal::KILL));
        assert_eq!(Signal::try_from(64).map(Signal::get), Ok(64));
    }

    #[test]
    fn an_id_is_never_a_path() {
        for bad in ["", ".", "..", ".hidden", "a/b", "a\0b", "a\nb", &"x".repeat(129)] {
            assert!(ContainerId::try_from(bad.to_owned()).is_err(), "{bad:?}");
        }
        let long = ContainerId::try_from("x".repeat(1 << 20)).unwrap_err();
        assert!(long.len() < 2 * ID_MAX && long.ends_with("is longer than 128 bytes"), "{long}");
        for good in ["a", "say \"hi\"", "ä", &"x".repeat(128)] {
            assert!(ContainerId::try_from(good.to_owned()).is_ok(), "{good:?}");
        }
    }
}

//! What a change is: a message to the kernel, what it does as an error says it, and what takes it back.

use hyperinit::fault::Fault;
use netlink_packet_route::RouteNetlinkMessage;

/// The kernel's IFNAMSIZ, without its zero.
const NAME_MAX: usize = 15;

/// One message, and what it does as an error says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// A verb phrase.
    pub doing: &'static str,
    /// To what.
    pub to: String,
    /// The message.
    pub message: RouteNetlinkMessage,
}

impl Step {
    /// The number of the link that it is about, if it is about one.
    pub fn link(&self) -> Option<u32> {
        match &self.message {
            RouteNetlinkMessage::SetLink(message) => Some(message.header.index),
            _ => None,
        }
    }
}

/// A step that can be taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// What to do.
    pub step: Step,
    /// What takes it back.
    pub undo: Option<Step>,
    /// What comes to the same, where the kernel says EBUSY.
    pub busy: Vec<Change>,
}

impl Change {
    /// A change and what takes it back.
    pub fn new(step: Step, undo: Option<Step>) -> Change {
        Change { step, undo, busy: Vec::new() }
    }
}

/// What the kernel takes as a link's name (dev_valid_name in net/core/dev.c).
pub fn check_name(key: &str, name: &str) -> Result<(), Fault> {
    let bad = name.is_empty()
        || name.len() > NAME_MAX
        || name == "."
        || name == ".."
        || name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
    if bad { Err(Fault::new("reading", key, format!("{name:?} is not the name of a link"))) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_the_kernel_takes() {
        for bad in ["", ".", "..", "a/b", "a b", "a:0", "sixteen-letters!", "a\n"] {
            assert!(check_name("device", bad).is_err(), "{bad:?}");
        }
        assert!(check_name("device", "fifteen-letters").is_ok());
    }
}

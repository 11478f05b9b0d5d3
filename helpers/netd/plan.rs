//! A change: a message to the kernel, its description for errors, and the step that undoes it.

use hyperinit::fault::Fault;
use netlink_packet_route::RouteNetlinkMessage;

/// The longest name of a link: the kernel's IFNAMSIZ without the terminating zero.
const NAME_MAX: usize = 15;

/// One message, with its description for errors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The action as an error names it: a verb phrase.
    pub doing: &'static str,
    /// The object of the action, as an error names it.
    pub to: String,
    /// The message.
    pub message: RouteNetlinkMessage,
}

impl Step {
    /// The number of the link that the message concerns, if it concerns one.
    pub fn link(&self) -> Option<u32> {
        match &self.message {
            RouteNetlinkMessage::SetLink(message) => Some(message.header.index),
            _ => None,
        }
    }
}

/// A step that can be undone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The step to do.
    pub step: Step,
    /// The step that undoes it, if any.
    pub undo: Option<Step>,
    /// The changes with the same result, for a kernel that refuses the step with EBUSY.
    pub busy: Vec<Change>,
}

impl Change {
    /// A change from a step and the step that undoes it.
    pub fn new(step: Step, undo: Option<Step>) -> Change {
        Change { step, undo, busy: Vec::new() }
    }
}

/// Checks a link's name as the kernel does (dev_valid_name in net/core/dev.c).
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

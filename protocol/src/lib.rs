//! The hyperstart protocol, and the conventions that host and guest share beyond it.
//!
//! [`frame`] turns bytes into frames, and [`command`] turns a frame's JSON into a typed command. [`spec`] and
//! [`ids`] have the objects of commands, [`flow`] and [`greeting`] have messages that runV does not know, and
//! [`boot`] has the words of the kernel's command line. [`fault`] is the one error type, which travels as the
//! text of an ERROR, and [`logger`] has the one form of a log line. Only the logger makes system calls, to
//! write.
#![forbid(unsafe_code)]

pub mod boot;
pub mod command;
pub mod fault;
pub mod flow;
pub mod frame;
pub mod greeting;
pub mod ids;
pub mod logger;
pub mod spec;

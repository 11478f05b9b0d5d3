//! The hyperstart protocol, and what both of its sides say beside it.
//!
//! [`frame`] turns bytes into frames, [`command`] turns a frame's JSON into a typed command, [`spec`] and
//! [`ids`] are the nouns of commands, [`flow`] and [`greeting`] are words that runV does not know, and
//! [`boot`] has those of the kernel's command line. [`fault`] is the one error type, which travels as the
//! text of an ERROR, and [`logger`] the one form of a log line. Nothing here makes a system call but the
//! logger, which writes.
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

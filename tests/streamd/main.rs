//! streamd, the real binary, confined, between an execd, an init, a host and processes that the tests play.
//! Needs root: it becomes a user of its own.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod by_hand;
mod ends;
mod flow;
mod guest;
mod hosts;
mod input;
mod kills;
#[path = "../support/limits.rs"]
mod limits;
mod output;

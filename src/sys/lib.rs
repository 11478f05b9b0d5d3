//! System calls that nix does not wrap, one subject per file. Apart from `sandbox`, only this crate has
//! `unsafe` code.
#![allow(unsafe_code)]

pub mod fd;
pub mod heap;
pub mod mount;
pub mod page;
pub mod process;
pub mod random;
pub mod signal;
pub mod socket;
pub mod spawn;
pub mod tty;
pub mod xattr;

//! The system call tables of the `syscalls` crate, by architecture.

use std::collections::BTreeSet;

use syscalls::{aarch64, x86_64};

use crate::policy::Syscalls;

/// The system calls of one architecture.
pub struct Table {
    /// The architecture, as in `CARGO_CFG_TARGET_ARCH`.
    pub arch: String,
}

impl Syscalls for Table {
    fn number(&self, name: &str) -> Option<u32> {
        match self.arch.as_str() {
            "x86_64" => name.parse::<x86_64::Sysno>().ok().and_then(|call| u32::try_from(call.id()).ok()),
            "aarch64" => name.parse::<aarch64::Sysno>().ok().and_then(|call| u32::try_from(call.id()).ok()),
            _ => None,
        }
    }

    fn exists(&self, name: &str) -> bool {
        name.parse::<x86_64::Sysno>().is_ok() || name.parse::<aarch64::Sysno>().is_ok()
    }

    fn numbers(&self) -> BTreeSet<u32> {
        self.all().into_iter().filter_map(|(number, _)| u32::try_from(number).ok()).collect()
    }
}

impl Table {
    /// (number, name) of every call. The iterators of the crate omit the last one.
    pub fn all(&self) -> Vec<(i64, &'static str)> {
        match self.arch.as_str() {
            "x86_64" => (0..=x86_64::Sysno::last() as usize)
                .filter_map(x86_64::Sysno::new)
                .map(|call| (i64::from(call.id()), call.name()))
                .collect(),
            "aarch64" => (0..=aarch64::Sysno::last() as usize)
                .filter_map(aarch64::Sysno::new)
                .map(|call| (i64::from(call.id()), call.name()))
                .collect(),
            _ => Vec::new(),
        }
    }
}

//! What build.rs makes of a policy file and a binary embeds: shared by the compiler and by `sandbox`.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::names::CAPABILITIES;

/// A set of capabilities as the kernel's bit mask (capabilities(7): bit n is capability n).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CapSet(pub u64);

impl CapSet {
    /// Every capability that this version knows.
    pub const ALL: CapSet = CapSet((1 << CAPABILITIES.len()) - 1);

    /// Both.
    pub fn union(self, other: CapSet) -> CapSet {
        CapSet(self.0 | other.0)
    }

    /// What is in both.
    pub fn intersection(self, other: CapSet) -> CapSet {
        CapSet(self.0 & other.0)
    }

    /// Whether capability `bit` is in it.
    pub fn has(self, bit: usize) -> bool {
        self.0 >> bit & 1 == 1
    }
}

impl fmt::Display for CapSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = CAPABILITIES
            .iter()
            .enumerate()
            .filter(|&(bit, _)| self.has(bit))
            .map(|(_, &name)| name)
            .collect();
        f.write_str(if names.is_empty() { "nothing".to_owned() } else { names.join(" ") }.as_str())
    }
}

/// One BPF program: instructions as in `struct sock_filter`, packed big end first (code, jt, jf, k).
pub type Program = Vec<u64>;

/// A process's policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompiledPolicy {
    /// What the process is and why it may do what it may.
    pub about: String,
    /// The user and group that it runs as.
    pub uid: u32,
    /// See `uid`.
    pub gid: u32,
    /// Whether it opens and makes files as root all the same.
    pub root_files: bool,
    /// Whether it and all that it executes may gain nothing by execve.
    pub no_new_privs: bool,
    /// Whether it is in a mount namespace of its own with nothing in it.
    pub empty_root: bool,
    /// What it may do.
    pub capabilities: CapSet,
    /// Its filter. With the ones that it inherits, the strictest answer counts.
    pub program: Program,
    /// Every rule as a person reads it: (what, why).
    pub rules: Vec<(String, String)>,
}

/// A device node of a container's private /dev.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// Below /dev.
    pub name: String,
    /// The character device's major number.
    pub major: u32,
    /// The character device's minor number.
    pub minor: u32,
}

/// What a container's processes get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompiledProfile {
    /// Capabilities, filter.
    pub policy: CompiledPolicy,
    /// Paths hidden from the container.
    pub masked_paths: Vec<String>,
    /// Paths that the container can only read.
    pub readonly_paths: Vec<String>,
    /// The nodes of its /dev.
    pub devices: Vec<Device>,
    /// Whether /sys is read-only.
    pub readonly_sys: bool,
    /// Whether the root filesystem is read-only, whatever the host says.
    pub readonly_root: bool,
    /// Whether what is started is in a Landlock scope of its own.
    pub scoped: bool,
}

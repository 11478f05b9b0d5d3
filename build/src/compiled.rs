//! The compiled form of a policy file, which build.rs makes and a binary embeds; the compiler and `sandbox`
//! share it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::names::CAPABILITIES;

/// A set of capabilities as the kernel's bit mask (capabilities(7): bit n is capability n).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CapSet(pub u64);

impl CapSet {
    /// Every capability that this version of hyperinit knows.
    pub const ALL: CapSet = CapSet((1 << CAPABILITIES.len()) - 1);

    /// The capabilities that are in either set.
    pub fn union(self, other: CapSet) -> CapSet {
        CapSet(self.0 | other.0)
    }

    /// The capabilities that are in both sets.
    pub fn intersection(self, other: CapSet) -> CapSet {
        CapSet(self.0 & other.0)
    }

    /// Whether the set has capability `bit`.
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

/// A BPF program. Each instruction is a `struct sock_filter`, packed from the most significant bits on (code,
/// jt, jf, k).
pub type Program = Vec<u64>;

/// The policy of a process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompiledPolicy {
    /// What the process is and why it may do what it may.
    pub about: String,
    /// The user that it runs as.
    pub uid: u32,
    /// The group that it runs as.
    pub gid: u32,
    /// Whether it opens and creates files as root all the same.
    pub root_files: bool,
    /// Whether no_new_privs is set, so that execve grants nothing to it and its descendants.
    pub no_new_privs: bool,
    /// Whether it is in a mount namespace of its own that contains nothing.
    pub empty_root: bool,
    /// The capabilities that it has.
    pub capabilities: CapSet,
    /// Its seccomp filter. If it inherits others, the strictest answer counts.
    pub program: Program,
    /// Every rule in readable form: (rule, reason).
    pub rules: Vec<(String, String)>,
}

/// A device node of a container's private /dev.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// The path below /dev.
    pub name: String,
    /// The character device's major number.
    pub major: u32,
    /// The character device's minor number.
    pub minor: u32,
}

/// What a container's processes get.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CompiledProfile {
    /// Their capabilities and filter.
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
    /// Whether the container's processes are in a Landlock scope of their own.
    pub scoped: bool,
}

//! Confinement: a policy of policy/*.json, compiled by build.rs, entered once and never left.
//!
//! `Policy::confine` is for a process that has one thread. init, whose readers start after its capabilities
//! are gone and before its filter is there, takes the two steps one by one; the filter then reaches every
//! thread.
#![allow(unsafe_code)]

pub mod caps;
mod empty;
mod landlock;
mod sigsys;

use std::fmt;

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::de::DeserializeOwned;

use crate::fault::{Fault, OrFault};
use crate::wire::Profile;
pub use hyperinit_policy::compiled::{CapSet, CompiledPolicy, CompiledProfile, Device, Program};

/// The compiled policy of one process, embedded by its binary: `embedded_policy!("netd")`.
#[macro_export]
macro_rules! embedded_policy {
    ($name:literal) => {
        include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".policy"))
    };
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Fault> {
    bincode::serde::decode_from_slice(bytes, bincode::config::standard())
        .map(|(value, _)| value)
        .map_err(|error| Fault::new("decoding", "the embedded policy", error.to_string()))
}

/// What one process may do.
#[derive(Debug, Clone)]
pub struct Policy(CompiledPolicy);

impl Policy {
    /// Decodes what build.rs embedded.
    pub fn decode(bytes: &[u8]) -> Result<Policy, Fault> {
        decode(bytes).map(Policy)
    }

    /// The capabilities it keeps.
    pub fn capabilities(&self) -> CapSet {
        self.0.capabilities
    }

    /// Leaves the guest's mounts if the policy says so, drops every capability but the policy's and becomes
    /// its user, then installs its filter. There is no way back. A violation is then told by name and ends
    /// the process. `grants` are capabilities that it must hold because what it executes may have them (its
    /// bounding set); most processes execute nothing.
    pub fn confine(&self, grants: CapSet) -> Result<(), Fault> {
        sigsys::install(sigsys::Then::Die)?;
        if self.0.empty_root {
            empty::enter()?;
        }
        self.drop_privileges(grants)?;
        self.load_filter()
    }

    /// As `confine`, for PID 1: a violation is told by name and fails with EPERM, for its death is the VM's.
    /// Call [`Policy::load_filter`] once its threads run.
    pub fn confine_init(&self) -> Result<(), Fault> {
        sigsys::install(sigsys::Then::Fail)?;
        self.drop_privileges(CapSet::default())
    }

    /// The first step: no core dumps, no ptrace, the policy's user, and its capabilities. They are a thread's
    /// own: call it while there is one.
    fn drop_privileges(&self, grants: CapSet) -> Result<(), Fault> {
        // The hard limit is what containers inherit from execd: theirs to use.
        let (_, hard) = getrlimit(Resource::RLIMIT_CORE).fault("asking for", "RLIMIT_CORE")?;
        setrlimit(Resource::RLIMIT_CORE, 0, hard).fault("setting", "RLIMIT_CORE")?;
        // By hand, or in a namespace, this process may have less than it would in a VM.
        let keep = self.0.capabilities.union(grants).intersection(caps::permitted()?);
        caps::drop_bounding(grants)?;
        if self.0.uid != 0 {
            caps::become_user(self.0.uid, self.0.gid)?;
            if self.0.root_files {
                caps::open_files_as_root()?;
            }
        }
        caps::set(keep, keep, CapSet::default())?;
        // Last: a change of user or capabilities sets it to what fs.suid_dumpable says.
        caps::not_dumpable()?;
        if self.0.no_new_privs {
            caps::no_new_privs()?;
        }
        Ok(())
    }

    /// The second step: the filter, for every thread of the process.
    pub fn load_filter(&self) -> Result<(), Fault> {
        load(&self.0.program)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\nuser {}:{}", self.0.about, self.0.uid, self.0.gid)?;
        if self.0.root_files {
            writeln!(f, "opens and makes files as root")?;
        }
        if self.0.empty_root {
            writeln!(f, "an empty directory for a root")?;
        }
        let rules = self.0.rules.iter().map(|(what, why)| format!("{what}: {why}"));
        f.write_str(&rules.collect::<Vec<_>>().join("\n"))
    }
}

/// What a container's processes get: policy/container/*.json.
#[derive(Debug, Clone)]
pub struct ContainerProfile(CompiledProfile);

impl ContainerProfile {
    /// The embedded profile of that name.
    pub fn of(profile: Profile) -> Result<ContainerProfile, Fault> {
        decode(match profile {
            Profile::Default => embedded_policy!("container-default").as_slice(),
            Profile::Privileged => embedded_policy!("container-privileged").as_slice(),
            Profile::Restricted => embedded_policy!("container-restricted").as_slice(),
        })
        .map(ContainerProfile)
    }

    /// The capabilities of a root process of the container.
    pub fn capabilities(&self) -> CapSet {
        self.0.policy.capabilities
    }

    /// Whether setuid programs gain nothing.
    pub fn no_new_privs(&self) -> bool {
        self.0.policy.no_new_privs
    }

    /// Paths hidden from the container.
    pub fn masked_paths(&self) -> &[String] {
        &self.0.masked_paths
    }

    /// Paths that the container can only read.
    pub fn readonly_paths(&self) -> &[String] {
        &self.0.readonly_paths
    }

    /// The nodes of its private /dev.
    pub fn devices(&self) -> &[Device] {
        &self.0.devices
    }

    /// Whether its /sys is read-only.
    pub fn readonly_sys(&self) -> bool {
        self.0.readonly_sys
    }

    /// Whether every root filesystem is read-only, whatever the host says.
    pub fn readonly_root(&self) -> bool {
        self.0.readonly_root
    }

    /// Whether each start is a scope of its own for signals and abstract sockets, as far as the kernel has
    /// that.
    pub fn scoped(&self) -> Scoped {
        match self.0.scoped {
            false => Scoped::No,
            true if landlock::available() => Scoped::Yes,
            true => Scoped::Missing,
        }
    }

    /// Installs the containers' filter. The caller holds CAP_SYS_ADMIN, or has set no_new_privs.
    pub fn load_filter(&self) -> Result<(), Fault> {
        load(&self.0.policy.program)
    }
}

/// Whether a process is in a scope of Landlock's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoped {
    /// The profile has none.
    No,
    /// It is.
    Yes,
    /// The profile has one, and the kernel none.
    Missing,
}

impl Scoped {
    /// Enters it, if there is one. The caller has set no_new_privs, or holds CAP_SYS_ADMIN.
    pub fn enter(self) -> Result<(), Fault> {
        match self {
            Scoped::Yes => landlock::enter(),
            Scoped::No | Scoped::Missing => Ok(()),
        }
    }
}

/// Installs one BPF program by raw seccomp(2), for every thread. seccompiler's own call would set
/// no_new_privs, which containers would inherit.
fn load(program: &[u64]) -> Result<(), Fault> {
    let mut filter: Vec<libc::sock_filter> = program
        .iter()
        .map(|&packed| {
            let [code_high, code_low, jt, jf, k3, k2, k1, k0] = packed.to_be_bytes();
            let code = u16::from_be_bytes([code_high, code_low]);
            libc::sock_filter { code, jt, jf, k: u32::from_be_bytes([k3, k2, k1, k0]) }
        })
        .collect();
    let len = u16::try_from(filter.len()).map_err(|_| Fault::new("loading", "a filter", "it is too long"))?;
    let fprog = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
    // SAFETY: `fprog` points at `len` instructions that outlive the call; the kernel copies and checks them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_TSYNC,
            &raw const fprog,
        )
    };
    match result {
        0 => Ok(()),
        thread if thread > 0 => {
            Err(Fault::new("loading", "a filter", format!("thread {thread} has another one")))
        }
        _ => Err(Fault::errno("loading", "a filter", Errno::last())),
    }
}

//! Confinement: a process enters a policy of policy/*.json, which build.rs compiles, once and for good.
//!
//! `Policy::confine` is for a process that has one thread. init takes the two steps separately: its reader
//! threads start after its capabilities are gone and before the filter is installed, and the filter then
//! applies to every thread.
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
    /// Decodes the bytes that build.rs embedded.
    pub fn decode(bytes: &[u8]) -> Result<Policy, Fault> {
        decode(bytes).map(Policy)
    }

    /// The capabilities that the process keeps.
    pub fn capabilities(&self) -> CapSet {
        self.0.capabilities
    }

    /// Leaves the guest's mounts if the policy says so, drops every capability but the policy's, becomes the
    /// policy's user, then installs the filter. There is no way back. After that a violation is logged with
    /// the system call's name and ends the process. `grants` are capabilities that stay in its bounding set,
    /// because the programs that it executes may have them; most processes execute nothing.
    pub fn confine(&self, grants: CapSet) -> Result<(), Fault> {
        sigsys::install(sigsys::Then::Die)?;
        if self.0.empty_root {
            empty::enter()?;
        }
        self.drop_privileges(grants)?;
        self.load_filter()
    }

    /// Like `confine`, for PID 1: a violation is logged with the system call's name and the call fails with
    /// EPERM, because the death of PID 1 ends the VM. Call [`Policy::load_filter`] once its threads run.
    pub fn confine_init(&self) -> Result<(), Fault> {
        sigsys::install(sigsys::Then::Fail)?;
        self.drop_privileges(CapSet::default())
    }

    /// The first step: no core dumps, no ptrace, the policy's user and its capabilities. User and
    /// capabilities belong to a thread, so call it while there is only one.
    fn drop_privileges(&self, grants: CapSet) -> Result<(), Fault> {
        // The hard limit is not changed: containers inherit it from execd and may use it.
        let (_, hard) = getrlimit(Resource::RLIMIT_CORE).fault("asking for", "RLIMIT_CORE")?;
        setrlimit(Resource::RLIMIT_CORE, 0, hard).fault("setting", "RLIMIT_CORE")?;
        // In a namespace, or when started by hand, this process may have fewer capabilities than in a VM.
        let keep = self.0.capabilities.union(grants).intersection(caps::permitted()?);
        caps::drop_bounding(grants)?;
        if self.0.uid != 0 {
            caps::become_user(self.0.uid, self.0.gid)?;
            if self.0.root_files {
                caps::open_files_as_root()?;
            }
        }
        caps::set(keep, keep, CapSet::default())?;
        // Last, because a change of user or capabilities sets dumpable to the value of fs.suid_dumpable.
        caps::not_dumpable()?;
        if self.0.no_new_privs {
            caps::no_new_privs()?;
        }
        Ok(())
    }

    /// The second step: installs the filter, for every thread of the process.
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

/// The confinement of a container's processes: policy/container/*.json.
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

    /// The device nodes of the container's private /dev.
    pub fn devices(&self) -> &[Device] {
        &self.0.devices
    }

    /// Whether the container's /sys is read-only.
    pub fn readonly_sys(&self) -> bool {
        self.0.readonly_sys
    }

    /// Whether every root filesystem is read-only, whatever the host asks for.
    pub fn readonly_root(&self) -> bool {
        self.0.readonly_root
    }

    /// Whether each start gets its own scope for signals and abstract sockets, if the kernel has scopes.
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

/// Whether a process is put into a Landlock scope.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoped {
    /// The profile asks for no scope.
    No,
    /// The profile asks for a scope, and the kernel has them.
    Yes,
    /// The profile asks for a scope, but the kernel has none.
    Missing,
}

impl Scoped {
    /// Enters a scope for `Yes`; does nothing otherwise. The caller has set no_new_privs, or holds
    /// CAP_SYS_ADMIN.
    pub fn enter(self) -> Result<(), Fault> {
        match self {
            Scoped::Yes => landlock::enter(),
            Scoped::No | Scoped::Missing => Ok(()),
        }
    }
}

/// Installs one BPF program for every thread by a direct seccomp(2). seccompiler's own call would set
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

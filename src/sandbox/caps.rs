//! Capabilities (capabilities(7)): the calling thread's sets.

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid, setgroups, setresgid, setresuid};

use super::CapSet;
use crate::fault::{Fault, OrFault};

/// The header of capset(2); version 3 has two words for each set.
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

const VERSION_3: u32 = 0x2008_0522;

#[repr(C)]
#[derive(Default, Clone, Copy)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Sets the thread's sets. A capability that leaves the permitted set never comes back.
pub fn set(effective: CapSet, permitted: CapSet, inheritable: CapSet) -> Result<(), Fault> {
    let header = Header { version: VERSION_3, pid: 0 };
    let word = |shift: u32| {
        let part = |set: CapSet| u32::try_from(set.0 >> shift & u64::from(u32::MAX)).unwrap_or_default();
        Data { effective: part(effective), permitted: part(permitted), inheritable: part(inheritable) }
    };
    let data = [word(0), word(32)];
    // SAFETY: the header's version asks for exactly the two words that `data` has; both outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) };
    Errno::result(result).map(drop).fault("keeping", permitted)
}

/// The thread's permitted set.
pub fn permitted() -> Result<CapSet, Fault> {
    let mut header = Header { version: VERSION_3, pid: 0 };
    let mut data = [Data::default(); 2];
    // SAFETY: the header's version asks for exactly the two words that `data` has; both outlive the call.
    let result = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) };
    Errno::result(result).fault("asking for", "capabilities")?;
    Ok(CapSet(u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32))
}

/// Drops everything but `keep` from the bounding set: no program that the thread executes can regain it.
pub fn drop_bounding(keep: CapSet) -> Result<(), Fault> {
    // Goes past the known names: a kernel may have capabilities that this version does not know, up to number
    // 63.
    for bit in (0..64).filter(|&bit| !keep.has(bit)) {
        // SAFETY: PR_CAPBSET_DROP takes a number and touches no memory.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, bit as libc::c_ulong, 0, 0, 0) };
        match Errno::result(result) {
            Ok(_) => {}
            // The kernel's last capability was the previous one.
            Err(Errno::EINVAL) => break,
            Err(errno) => return Err(Fault::errno("dropping", format!("capability {bit}"), errno)),
        }
    }
    Ok(())
}

/// Becomes a user other than root and keeps the permitted set; the effective set is empty afterwards.
pub fn become_user(uid: u32, gid: u32) -> Result<(), Fault> {
    let (user, group) = (Uid::from_raw(uid), Gid::from_raw(gid));
    keep_on_setuid(true)?;
    setgroups(&[]).fault("dropping", "supplementary groups")?;
    setresgid(group, group, group).fault("becoming group", gid)?;
    setresuid(user, user, user).fault("becoming user", uid)?;
    keep_on_setuid(false)
}

/// Becomes root, with the whole permitted set effective, and stays not dumpable. Fails with EPERM where
/// CAP_SETUID or CAP_SETGID is missing.
pub fn become_root() -> Result<(), Fault> {
    let (user, group) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(group, group, group).fault("becoming group", 0)?;
    setresuid(user, user, user).fault("becoming user", 0)?;
    // The change of user has set dumpable to the value of fs.suid_dumpable (prctl(2)).
    not_dumpable()
}

/// Makes the thread open and create files as root, whatever its user (setfsuid(2)). Call it after
/// [`become_user`]. It makes the whole permitted set effective, because the kernel asks for CAP_SETUID and
/// CAP_SETGID. Fails with EPERM where these are missing.
pub fn open_files_as_root() -> Result<(), Fault> {
    let all = permitted()?;
    set(all, all, CapSet::default())?;
    let (user, group, same) = (Uid::from_raw(0), Gid::from_raw(0), u32::MAX);
    setfsgid(group);
    setfsuid(user);
    // setfsuid and setfsgid report only the previous number, and no error. A call with an invalid number
    // changes nothing and so tells the current one.
    match (setfsuid(Uid::from_raw(same)), setfsgid(Gid::from_raw(same))) {
        before if before == (user, group) => Ok(()),
        _ => Err(Fault::errno("opening files as", "root", Errno::EPERM)),
    }
}

/// Whether a change away from user 0 keeps the permitted set (PR_SET_KEEPCAPS).
pub fn keep_on_setuid(keep: bool) -> Result<(), Fault> {
    // SAFETY: PR_SET_KEEPCAPS takes a flag and touches no memory.
    let result = unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, libc::c_ulong::from(keep), 0, 0, 0) };
    Errno::result(result).map(drop).fault("keeping capabilities for", "another user")
}

/// After this, execve grants no privileges (PR_SET_NO_NEW_PRIVS).
pub fn no_new_privs() -> Result<(), Fault> {
    // SAFETY: PR_SET_NO_NEW_PRIVS takes a flag and touches no memory.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    Errno::result(result).map(drop).fault("setting", "no_new_privs")
}

/// Keeps processes without CAP_SYS_PTRACE from tracing this process and from looking into its /proc directory
/// (PR_SET_DUMPABLE).
pub fn not_dumpable() -> Result<(), Fault> {
    // SAFETY: PR_SET_DUMPABLE takes a flag and touches no memory.
    let result = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
    Errno::result(result).map(drop).fault("setting", "dumpable")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_print_their_names() {
        assert_eq!(CapSet(1 << 5 | 1 << 22).to_string(), "CAP_KILL CAP_SYS_BOOT");
        assert_eq!(CapSet::default().to_string(), "nothing");
        assert_eq!(CapSet::ALL.0.count_ones(), 41);
    }
}

//! The handler of SIGSYS: it logs the process and the system call of a violation.
//!
//! Everything here is async-signal-safe: no allocation, no lock, one write.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};

use crate::fault::{Fault, OrFault};
use crate::logger;

/// The number and name of the target's system calls, sorted by number.
static NAMES: &[(i64, &str)] = include!(concat!(env!("OUT_DIR"), "/syscalls.rs"));

/// What happens after a violation is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Then {
    /// The process exits with 128 + SIGSYS, as if the signal had killed it.
    Die,
    /// The call fails with EPERM and the process continues; for PID 1.
    Fail,
}

/// Installs the handler, and unblocks SIGSYS: a blocked SIGSYS would kill the process without a message.
pub fn install(then: Then) -> Result<(), Fault> {
    // The choice is kept in the kernel as the handler's address, so an attacker who writes to this process's
    // memory does not change it.
    let handler = match then {
        Then::Die => die as *const (),
        Then::Fail => fail as *const (),
    };
    // SAFETY: an all-zero sigaction is a valid one.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is complete and both handlers have the signature that SA_SIGINFO asks for.
    let result = unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) };
    Errno::result(result).map(drop).fault("handling", "SIGSYS")?;
    SigSet::from(Signal::SIGSYS).thread_unblock().fault("unblocking", "SIGSYS")
}

/// The prefix of siginfo_t for SIGSYS (sigaction(2)); libc does not name its fields.
#[repr(C)]
struct SigsysInfo {
    signo: i32,
    errno: i32,
    code: i32,
    call_addr: *const libc::c_void,
    syscall: i32,
    arch: u32,
}

extern "C" fn die(_signal: i32, info: *const libc::siginfo_t, context: *mut libc::c_void) {
    tell(info, context);
    // SAFETY: async-signal-safe. The status is 128 + SIGSYS, as a shell would report it.
    unsafe { libc::_exit(128 + libc::SIGSYS) };
}

extern "C" fn fail(_signal: i32, info: *const libc::siginfo_t, context: *mut libc::c_void) {
    tell(info, context);
    refuse(context);
}

fn tell(info: *const libc::siginfo_t, context: *const libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t of SIGSYS, of which SigsysInfo is the documented layout.
    let number = i64::from(unsafe { (*info.cast::<SigsysInfo>()).syscall });
    report(number, arguments(context.cast()));
}

/// The low 32 bits of the interrupted call's first four arguments. Policies look at these four, and the low
/// bits put no whole address into the log.
fn arguments(context: *const libc::ucontext_t) -> [u32; 4] {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the kernel passes the interrupted context; it is read by value.
    let registers = unsafe { (*context).uc_mcontext.gregs };
    #[cfg(target_arch = "x86_64")]
    let order = [libc::REG_RDI, libc::REG_RSI, libc::REG_RDX, libc::REG_R10];
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the kernel passes the interrupted context; it is read by value.
    let registers = unsafe { (*context).uc_mcontext.regs };
    #[cfg(target_arch = "aarch64")]
    let order = [0, 1, 2, 3];
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    order.map(|at| registers.get(at as usize).map_or(0, |&value| value as u32))
}

/// Makes the interrupted call return -EPERM.
fn refuse(context: *mut libc::c_void) {
    let context = context.cast::<libc::ucontext_t>();
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the kernel passes the interrupted context, writable until the handler returns.
    unsafe {
        (*context).uc_mcontext.gregs[libc::REG_RAX as usize] = -i64::from(libc::EPERM);
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: the kernel passes the interrupted context, writable until the handler returns.
    unsafe {
        (*context).uc_mcontext.regs[0] = (-i64::from(libc::EPERM)) as u64;
    }
}

/// A line that is assembled without allocation.
struct Line {
    bytes: [u8; 160],
    len: usize,
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for &byte in text {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = byte;
                self.len += 1;
            }
        }
    }

    fn push_number(&mut self, number: u64, base: u64) {
        let mut digits = [0u8; 20];
        let mut at = digits.len();
        let mut rest = number;
        while at > 0 {
            at -= 1;
            let digit = usize::try_from(rest % base).unwrap_or(0);
            digits[at] = b"0123456789abcdef".get(digit).copied().unwrap_or(b'?');
            rest /= base;
            if rest == 0 {
                break;
            }
        }
        self.push(digits.get(at..).unwrap_or_default());
    }
}

/// `netd: seccomp: the system call socket (41) is not allowed: 0x2 0x1 0x0 0x0`
fn report(number: i64, arguments: [u32; 4]) {
    let mut line = Line { bytes: [0; 160], len: 0 };
    line.push(logger::error_priority());
    line.push(logger::who_in_signal().as_bytes());
    line.push(b": seccomp: the system call ");
    let name = NAMES.binary_search_by_key(&number, |&(number, _)| number).ok().and_then(|at| NAMES.get(at));
    line.push(name.map_or("?", |&(_, name)| name).as_bytes());
    line.push(b" (");
    line.push_number(number.unsigned_abs(), 10);
    line.push(b") is not allowed:");
    for argument in arguments {
        line.push(b" 0x");
        line.push_number(u64::from(argument), 16);
    }
    line.push(b"\n");
    // SAFETY: `bytes` has at least `len` initialised bytes; the log is descriptor 2 by wire::bootstrap.
    unsafe { libc::write(2, line.bytes.as_ptr().cast(), line.len) };
}

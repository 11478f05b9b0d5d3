//! The registers of x86_64 in which a system call is made: all that this test knows of an architecture.

use nix::libc::user_regs_struct;
use nix::sys::ptrace;
use nix::unistd::Pid;

/// `syscall`, the instruction.
pub const INSTRUCTION: [u8; 2] = [0x0f, 0x05];
/// What is below the stack pointer belongs to the function that runs (System V ABI: 128 bytes).
const RED_ZONE: u64 = 128;

/// What a stopped process goes on with.
#[derive(Clone, Copy)]
pub struct Registers(user_regs_struct);

impl Registers {
    /// Of a process that stands.
    pub fn of(pid: Pid) -> Registers {
        Registers(ptrace::getregs(pid).unwrap())
    }

    /// Gives them to a process that stands.
    pub fn give(self, pid: Pid) {
        ptrace::setregs(pid, self.0).unwrap();
    }

    /// Where the instruction is that has just been executed, if it was a system call.
    pub fn instruction(self) -> u64 {
        self.0.rip - INSTRUCTION.len() as u64
    }

    /// The end of the memory of the stack that nothing uses.
    pub fn free_stack(self) -> u64 {
        (self.0.rsp - RED_ZONE) & !0xf
    }

    /// As before a call, which is made by the instruction at this address.
    pub fn calling(self, instruction: u64, number: i64, arguments: [u64; 6]) -> Registers {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let rax = number.cast_unsigned();
        // No call is under way that the kernel would restart.
        let orig_rax = u64::MAX;
        Registers(user_regs_struct { rax, orig_rax, rip: instruction, rdi, rsi, rdx, r10, r8, r9, ..self.0 })
    }

    /// After a call: what it returned, an errno as a negative number.
    pub fn result(self) -> i64 {
        self.0.rax.cast_signed()
    }
}

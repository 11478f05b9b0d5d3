//! The registers of a system call on x86_64: the only part of this test that depends on the architecture.

use nix::libc::user_regs_struct;
use nix::sys::ptrace;
use nix::unistd::Pid;

/// The instruction `syscall`.
pub const INSTRUCTION: [u8; 2] = [0x0f, 0x05];
/// The size of the area below the stack pointer that belongs to the running function (System V ABI), in
/// bytes.
const RED_ZONE: u64 = 128;

/// The registers of a stopped process.
#[derive(Clone, Copy)]
pub struct Registers(user_regs_struct);

impl Registers {
    /// Reads the registers of a stopped process.
    pub fn of(pid: Pid) -> Registers {
        Registers(ptrace::getregs(pid).unwrap())
    }

    /// Sets the registers of a stopped process.
    pub fn give(self, pid: Pid) {
        ptrace::setregs(pid, self.0).unwrap();
    }

    /// The address of the instruction just executed, if that was a system call.
    pub fn instruction(self) -> u64 {
        self.0.rip - INSTRUCTION.len() as u64
    }

    /// The end of the unused memory of the stack.
    pub fn free_stack(self) -> u64 {
        (self.0.rsp - RED_ZONE) & !0xf
    }

    /// The registers before a call, which the instruction at this address makes.
    pub fn calling(self, instruction: u64, number: i64, arguments: [u64; 6]) -> Registers {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let rax = number.cast_unsigned();
        // No interrupted call is left for the kernel to restart.
        let orig_rax = u64::MAX;
        Registers(user_regs_struct { rax, orig_rax, rip: instruction, rdi, rsi, rdx, r10, r8, r9, ..self.0 })
    }

    /// The return value of a call: an errno is a negative number.
    pub fn result(self) -> i64 {
        self.0.rax.cast_signed()
    }
}

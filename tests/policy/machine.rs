//! The kernel's side of a filter: classic BPF over `struct seccomp_data` (seccomp(2)), as much of it as the
//! kernel's action cache understands too. A program that uses more panics.

/// A system call as a filter sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The architecture (linux/audit.h).
    pub arch: u32,
    /// Its number.
    pub number: u32,
    /// Its arguments.
    pub arguments: [u64; 6],
}

/// AUDIT_ARCH_X86_64.
pub const X86_64: u32 = 0xc000_003e;
/// AUDIT_ARCH_AARCH64.
pub const AARCH64: u32 = 0xc000_00b7;
/// AUDIT_ARCH_I386.
pub const I386: u32 = 0x4000_0003;

/// What a filter answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// SECCOMP_RET_ALLOW.
    Allow,
    /// SECCOMP_RET_TRAP.
    Trap,
    /// SECCOMP_RET_ERRNO.
    Errno(u32),
    /// SECCOMP_RET_KILL_PROCESS.
    Kill,
}

/// What came of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The answer.
    pub verdict: Verdict,
    /// Whether an argument was looked at: the kernel cannot remember the answer then.
    pub looked: bool,
}

impl Call {
    /// The word at an offset of `struct seccomp_data` (little end first, as both architectures are).
    fn word(&self, offset: u32) -> u32 {
        let half = |value: u64, high: bool| {
            u32::try_from(if high { value >> 32 } else { value & 0xffff_ffff }).unwrap()
        };
        match offset {
            0 => self.number,
            4 => self.arch,
            16..64 if offset.is_multiple_of(4) => {
                half(self.arguments[(offset as usize - 16) / 8], offset % 8 == 4)
            }
            _ => panic!("a load from {offset}"),
        }
    }
}

/// Runs a filter.
pub fn run(program: &[u64], call: &Call) -> Run {
    let (mut at, mut accumulator, mut looked) = (0, 0, false);
    loop {
        let [c1, c0, jt, jf, k3, k2, k1, k0] = program[at].to_be_bytes();
        let (code, k) = (u16::from_be_bytes([c1, c0]), u32::from_be_bytes([k3, k2, k1, k0]));
        at += 1;
        let branch = |holds: bool| usize::from(if holds { jt } else { jf });
        match code {
            // LD W ABS
            0x20 => {
                accumulator = call.word(k);
                looked |= k >= 16;
            }
            // ALU AND K
            0x54 => accumulator &= k,
            // JMP JA, JEQ K, JGT K, JGE K
            0x05 => at += k as usize,
            0x15 => at += branch(accumulator == k),
            0x25 => at += branch(accumulator > k),
            0x35 => at += branch(accumulator >= k),
            // RET K
            0x06 => return Run { verdict: verdict(k), looked },
            _ => panic!("the instruction {code:#x}"),
        }
    }
}

fn verdict(k: u32) -> Verdict {
    match (k & 0xffff_0000, k & 0xffff) {
        (0x7fff_0000, 0) => Verdict::Allow,
        (0x0003_0000, 0) => Verdict::Trap,
        (0x0005_0000, errno @ 1..) => Verdict::Errno(errno),
        (0x8000_0000, 0) => Verdict::Kill,
        _ => panic!("the answer {k:#x}"),
    }
}

//! Programs that use up a resource for which nix has no call: each repeats a few system calls.

use nix::errno::Errno;

use super::End::{self, Either, Refused};
use super::probe::{self, RESULT};

/// Numbers of system calls on x86_64.
const MMAP: u64 = 9;
const SIGPROCMASK: u64 = 14;
const SHMGET: u64 = 29;
const SHMAT: u64 = 30;
const GETPID: u64 = 39;
const SOCKET: u64 = 41;
const SETSOCKOPT: u64 = 54;
const SEMGET: u64 = 64;
const MSGGET: u64 = 68;
const MSGSND: u64 = 69;
const SIGQUEUEINFO: u64 = 129;
const MLOCK: u64 = 149;
const IO_SETUP: u64 = 206;

/// The program of `socket-filters`, run where the kernel may keep only [`CODE`] bytes of compiled filters.
pub const WITH_LITTLE_CODE: &str = "compiled-filters";
/// The value of `net.core.bpf_jit_limit` for it, in bytes.
pub const CODE: u32 = 4 << 20;

/// How often a program repeats its calls at most.
const MANY: u32 = 1 << 20;
const MEGABYTE: u64 = 1 << 20;
/// IPC_CREAT and mode 0600.
const CREATE: u64 = 0o1600;

/// Each program with its name and how it ends.
pub fn all() -> [(&'static str, Vec<u8>, End); 9] {
    [
        ("asynchronous-io", asynchronous(), Refused("EAGAIN")),
        ("locked-memory", locked(), Either),
        ("page-tables", page_tables(), Either),
        ("pending-signals", pending(), Refused("EAGAIN")),
        ("socket-filters", filters(), Either),
        (WITH_LITTLE_CODE, filters(), Refused("ENOTSUPP")),
        ("sysv-memory", shared(), Either),
        // The error of sending to a queue that could not be made.
        ("sysv-messages", messages(), Refused("EINVAL")),
        ("sysv-semaphores", semaphores(), Refused("ENOSPC")),
    ]
}

/// The name of the error in the report of a program or of the eater.
pub fn reason(word: &str) -> String {
    match word.as_bytes() {
        b"00" => "enough".to_owned(),
        // Two digits; the first may exceed nine (ENOTSUPP is 524).
        [tens, ones] => {
            let number = i32::from(tens - b'0') * 10 + i32::from(ones - b'0');
            if number == 524 { "ENOTSUPP".to_owned() } else { format!("{:?}", Errno::from_raw(number)) }
        }
        _ => word.to_owned(),
    }
}

/// Makes contexts for 128 asynchronous requests each. The kernel writes each context's handle to a separate
/// page (PROT_READ, PROT_WRITE; MAP_PRIVATE, MAP_ANONYMOUS).
fn asynchronous() -> Vec<u8> {
    let calls = [(MMAP, [0, 4096, 3, 0x22, u64::MAX, 0]), (IO_SETUP, [128, RESULT, 0, 0, 0, 0])];
    probe::elf_until(MANY, &calls, &[])
}

/// Maps locked memory (MAP_LOCKED), beyond the usual limit, which the host has raised.
fn locked() -> Vec<u8> {
    probe::elf_until(MANY, &[(MMAP, [0, 4 * MEGABYTE, 3, 0x2022, u64::MAX, 0])], &[])
}

/// Uses up memory by page tables. Each round maps a gigabyte of addresses without memory (PROT_NONE;
/// MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE), and then one page with memory (PROT_READ, PROT_WRITE;
/// MAP_POPULATE). So each page needs a page table of its own.
fn page_tables() -> Vec<u8> {
    let map = |length, protection, flags: u64| (MMAP, [0, length, protection, 0x22 | flags, u64::MAX, 0]);
    probe::elf_forever(&[map(1 << 30, 0, 0x4000), map(4096, 3, 0x8000)])
}

/// Blocks all signals and sends signals to itself.
fn pending() -> Vec<u8> {
    /// SIGRTMIN.
    const SIGNAL: u64 = 34;
    let at = probe::data_until(3);
    let calls = [
        (SIGPROCMASK, [0, at, 0, 8, 0, 0]),
        (GETPID, [0; 6]),
        (SIGQUEUEINFO, [RESULT, SIGNAL, at + 8, 0, 0, 0]),
    ];
    // A mask of all signals, and a siginfo_t of SI_QUEUE: the kernel reports an error if it cannot queue such
    // a signal.
    let mut data = vec![0xff; 8];
    data.extend([0; 128]);
    data[16..20].fill(0xff);
    probe::elf_until(MANY, &calls, &data)
}

/// Attaches filters to UDP sockets (SO_ATTACH_FILTER), as long as a socket's option memory has room for
/// (`net.core.optmem_max`).
fn filters() -> Vec<u8> {
    /// `X = A` and `return 0`, each a struct sock_filter of linux/filter.h. Instructions without constants
    /// keep the compiled filter short.
    const COPY: [u8; 8] = [7, 0, 0, 0, 0, 0, 0, 0];
    const RETURN: [u8; 8] = [6, 0, 0, 0, 0, 0, 0, 0];
    const LENGTH: u16 = 2000;
    let at = probe::data_until(2);
    let calls = [(SOCKET, [2, 2, 0, 0, 0, 0]), (SETSOCKOPT, [RESULT, 1, 26, at, 16, 0])];
    let mut data = LENGTH.to_le_bytes().to_vec();
    data.extend([0; 6]);
    data.extend((at + 16).to_le_bytes());
    (1..LENGTH).for_each(|_| data.extend(COPY));
    data.extend(RETURN);
    probe::elf_until(MANY, &calls, &data)
}

/// Makes and attaches System V shared memory; mlock makes the kernel fill it.
fn shared() -> Vec<u8> {
    let calls = [
        (SHMGET, [0, 4 * MEGABYTE, CREATE, 0, 0, 0]),
        (SHMAT, [RESULT, 0, 0, 0, 0, 0]),
        (MLOCK, [RESULT, 4 * MEGABYTE, 0, 0, 0, 0]),
    ];
    probe::elf_until(MANY, &calls, &[])
}

/// Makes System V message queues and sends each a message of 8,000 bytes (IPC_NOWAIT), read from the
/// program's own memory.
fn messages() -> Vec<u8> {
    let calls = [(MSGGET, [0, CREATE, 0, 0, 0, 0]), (MSGSND, [RESULT, probe::BASE, 8000, 0o4000, 0, 0])];
    probe::elf_until(MANY, &calls, &[0; 8192])
}

/// Makes System V semaphore sets of the maximum size.
fn semaphores() -> Vec<u8> {
    probe::elf_until(MANY, &[(SEMGET, [0, 32_000, CREATE, 0, 0, 0])], &[])
}

/// Listens to the kernel's messages about devices (AF_NETLINK, NETLINK_KOBJECT_UEVENT, group 1): says
/// `listening`, and then prints the first message.
pub fn listener() -> Vec<u8> {
    const WRITE: u64 = 1;
    const RECVFROM: u64 = 45;
    const BIND: u64 = 49;
    /// The first free descriptor behind the standard streams.
    const FIRST: u64 = 3;
    const TEXT: &[u8; 12] = b"\nlistening\n\0";
    let address = probe::data_until(5);
    let text = address + 12;
    let message = text + 12;
    let calls = [
        (SOCKET, [16, 3, 15, 0, 0, 0]),
        (BIND, [FIRST, address, 12, 0, 0, 0]),
        (WRITE, [1, text, 11, 0, 0, 0]),
        (RECVFROM, [FIRST, message, 1024, 0, 0, 0]),
        (WRITE, [1, message, RESULT, 0, 0, 0]),
    ];
    let mut data = vec![16, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    data.extend(TEXT);
    data.extend([0; 1024]);
    probe::elf_until(1, &calls, &data)
}

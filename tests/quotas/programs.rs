//! Programs that take all of what nix has no call for: a few system calls again and again.

use nix::errno::Errno;

use super::End::{self, Either, Pod, Refused};
use super::probe::{self, RESULT};

/// System calls, by their numbers on x86_64.
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

/// The same as before it, where the kernel may keep [`CODE`] bytes of compiled filters.
pub const WITH_LITTLE_CODE: &str = "compiled-filters";
/// A value of `net.core.bpf_jit_limit`.
pub const CODE: u32 = 4 << 20;

/// How often at most.
const MANY: u32 = 1 << 20;
const MEGABYTE: u64 = 1 << 20;
/// IPC_CREAT, and a mode.
const CREATE: u64 = 0o1600;

/// Each with its name and what becomes of it.
pub fn all() -> [(&'static str, Vec<u8>, End); 9] {
    [
        ("asynchronous-io", asynchronous(), Refused("EAGAIN")),
        ("locked-memory", locked(), Pod),
        ("page-tables", page_tables(), Pod),
        ("pending-signals", pending(), Refused("EAGAIN")),
        ("socket-filters", filters(), Either),
        (WITH_LITTLE_CODE, filters(), Refused("ENOTSUPP")),
        ("sysv-memory", shared(), Pod),
        // What would be sent to the queue that there is not.
        ("sysv-messages", messages(), Refused("EINVAL")),
        ("sysv-semaphores", semaphores(), Refused("ENOSPC")),
    ]
}

/// What such a program says, or the eater: the name of an error.
pub fn reason(word: &str) -> String {
    match word.as_bytes() {
        b"00" => "enough".to_owned(),
        // Two digits, of which the first may be more than nine (ENOTSUPP is 524).
        [tens, ones] => {
            let number = i32::from(tens - b'0') * 10 + i32::from(ones - b'0');
            if number == 524 { "ENOTSUPP".to_owned() } else { format!("{:?}", Errno::from_raw(number)) }
        }
        _ => word.to_owned(),
    }
}

/// A queue of 128 requests each, whose place the kernel writes to a page of its own (PROT_READ, PROT_WRITE;
/// MAP_PRIVATE, MAP_ANONYMOUS).
fn asynchronous() -> Vec<u8> {
    let calls = [(MMAP, [0, 4096, 3, 0x22, u64::MAX, 0]), (IO_SETUP, [128, RESULT, 0, 0, 0, 0])];
    probe::elf_until(MANY, &calls, &[])
}

/// MAP_LOCKED, beyond the limit that the host has raised.
fn locked() -> Vec<u8> {
    probe::elf_until(MANY, &[(MMAP, [0, 4 * MEGABYTE, 3, 0x2022, u64::MAX, 0])], &[])
}

/// A page wherever the kernel needs a table of pages, and one of those tables, for it: a gigabyte of
/// addresses without memory (PROT_NONE; MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE), and a page with
/// (PROT_READ, PROT_WRITE; MAP_POPULATE).
fn page_tables() -> Vec<u8> {
    let map = |length, protection, flags: u64| (MMAP, [0, length, protection, 0x22 | flags, u64::MAX, 0]);
    probe::elf_forever(&[map(1 << 30, 0, 0x4000), map(4096, 3, 0x8000)])
}

/// Signals that the process blocks and sends to itself.
fn pending() -> Vec<u8> {
    /// SIGRTMIN.
    const SIGNAL: u64 = 34;
    let at = probe::data_until(3);
    let calls = [
        (SIGPROCMASK, [0, at, 0, 8, 0, 0]),
        (GETPID, [0; 6]),
        (SIGQUEUEINFO, [RESULT, SIGNAL, at + 8, 0, 0, 0]),
    ];
    // All signals; a siginfo_t of SI_QUEUE, whose loss the kernel tells.
    let mut data = vec![0xff; 8];
    data.extend([0; 128]);
    data[16..20].fill(0xff);
    probe::elf_until(MANY, &calls, &data)
}

/// Filters as long as a socket's memory for options has room for (`net.core.optmem_max`): SO_ATTACH_FILTER on
/// a UDP socket.
fn filters() -> Vec<u8> {
    /// `X = A`, and `return 0`: struct sock_filter of linux/filter.h. Without numbers the kernel makes no
    /// more of it.
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

/// System V shared memory: made, attached, and filled by the kernel (mlock).
fn shared() -> Vec<u8> {
    let calls = [
        (SHMGET, [0, 4 * MEGABYTE, CREATE, 0, 0, 0]),
        (SHMAT, [RESULT, 0, 0, 0, 0, 0]),
        (MLOCK, [RESULT, 4 * MEGABYTE, 0, 0, 0, 0]),
    ];
    probe::elf_until(MANY, &calls, &[])
}

/// System V message queues, each with a message of 8,000 bytes (IPC_NOWAIT): what is in the program itself.
fn messages() -> Vec<u8> {
    let calls = [(MSGGET, [0, CREATE, 0, 0, 0, 0]), (MSGSND, [RESULT, probe::BASE, 8000, 0o4000, 0, 0])];
    probe::elf_until(MANY, &calls, &[0; 8192])
}

/// System V semaphores, as many in a set as there may be.
fn semaphores() -> Vec<u8> {
    probe::elf_until(MANY, &[(SEMGET, [0, 32_000, CREATE, 0, 0, 0])], &[])
}

/// Says `listening` when the kernel's messages about devices come to it (AF_NETLINK, NETLINK_KOBJECT_UEVENT,
/// group 1), and then the first of them.
pub fn listener() -> Vec<u8> {
    const WRITE: u64 = 1;
    const RECVFROM: u64 = 45;
    const BIND: u64 = 49;
    /// Its first descriptor that is not a standard stream.
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

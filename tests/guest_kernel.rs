//! Checks from inside that the guest kernel does what policy/kernel says. The test's own PID 1 asks, and no
//! filter keeps it from asking. Debian's kernel answers differently, which shows that the questions can fail.
//!
//! `make guest-kernel-test` builds that kernel and runs this test. `make test` does not, because the build
//! takes minutes.
#![forbid(unsafe_code)]
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's panic is its report")]

mod guest;
#[path = "support/probe.rs"]
#[allow(dead_code, reason = "each test binary uses a part of it")]
mod probe;

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use cpio::NewcBuilder;
use guest::{Guest, Kind};
use hyperinit_client::Client;

const ENOSYS: &str = "38";
/// System calls by their x86_64 numbers, and the errno of each (0: it succeeded).
const CALLS: &[(&str, u64, [u64; 6], &str)] = &[
    ("bpf", 321, [0; 6], ENOSYS),
    ("delete_module", 176, [0; 6], ENOSYS),
    ("finit_module", 313, [0; 6], ENOSYS),
    ("init_module", 175, [0; 6], ENOSYS),
    ("io_uring_setup", 425, [0; 6], ENOSYS),
    ("ioperm", 173, [0; 6], ENOSYS),
    ("iopl", 172, [3, 0, 0, 0, 0, 0], ENOSYS),
    ("kcmp", 312, [0; 6], ENOSYS),
    ("kexec_file_load", 320, [0; 6], ENOSYS),
    ("kexec_load", 246, [0; 6], ENOSYS),
    ("modify_ldt", 154, [0; 6], ENOSYS),
    // AF_ALG and AF_KEY, SOCK_SEQPACKET and SOCK_RAW: EAFNOSUPPORT.
    ("socket_alg", 41, [38, 5, 0, 0, 0, 0], "97"),
    ("socket_key", 41, [15, 3, 2, 0, 0, 0], "97"),
    // NETLINK_XFRM: EPROTONOSUPPORT.
    ("socket_xfrm", 41, [16, 3, 6, 0, 0, 0], "93"),
    ("swapon", 167, [0; 6], ENOSYS),
    // CLONE_NEWTIME, CLONE_NEWUSER: EINVAL.
    ("unshare_time", 272, [0x80, 0, 0, 0, 0, 0], "22"),
    ("unshare_user", 272, [0x1000_0000, 0, 0, 0, 0, 0], "22"),
    ("userfaultfd", 323, [0; 6], ENOSYS),
    ("x32_getpid", 0x4000_0027, [0; 6], ENOSYS),
];

/// Names of questions, the shell scripts that ask them, and the expected output.
const QUESTIONS: &[(&str, &str, &str)] = &[
    ("binfmt_misc", "mount -t binfmt_misc none /mnt 2>/dev/null; echo $?", "255"),
    (
        "core_pattern",
        "echo '|/started' >/proc/sys/kernel/core_pattern; echo 1 >/proc/sys/kernel/core_pipe_limit; sh -c 'kill -SEGV $$'; cat /ran 2>/dev/null || echo none",
        "none",
    ),
    ("debugfs", "mount -t debugfs none /mnt 2>/dev/null; echo $?", "255"),
    ("dmesg_restrict", "cat /proc/sys/kernel/dmesg_restrict", "1"),
    ("heap", "dmesg | grep -o 'heap alloc:[a-z]*'", "heap alloc:on"),
    ("kcore", "[ -e /proc/kcore ]; echo $?", "1"),
    ("lockdown", "dmesg | grep -c 'Kernel is locked down from Kernel configuration'", "1"),
    ("mem", "mknod /mem c 1 1; head -c 1 /mem >/dev/null 2>&1; echo $?", "1"),
    ("memory that can be written and executed", "dmesg | grep -c 'Checked W+X mappings: passed'", "1"),
    ("modules", "[ -e /proc/modules ]; echo $?", "1"),
    ("panic_on_oops", "cat /proc/sys/kernel/panic_on_oops", "1"),
    ("port", "mknod /port c 1 4; head -c 1 /port >/dev/null 2>&1; echo $?", "1"),
    ("release", "uname -r | grep -c 'hyperinit$'", "1"),
    ("stack", "dmesg | grep -o 'stack:all(zero)'", "stack:all(zero)"),
    ("sysrq", "[ -e /proc/sysrq-trigger ]; echo $?", "1"),
    ("tracefs", "mount -t tracefs none /mnt 2>/dev/null; echo $?", "255"),
    ("vsyscall", "grep -c vsyscall /proc/self/maps", "0"),
];

/// The path of a file in the checkout's .cache.
fn cached(name: &str, made_by: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache").join(name);
    assert!(path.exists(), "no .cache/{name}: {made_by}");
    path
}

/// An initramfs whose init asks every question and powers off.
fn asking(directory: &Path) -> PathBuf {
    let busybox = fs::read("/bin/busybox").expect("busybox is missing: apt-get install busybox-static");
    let mut init = "#!/bin/busybox sh\n/bin/busybox --install -s /bin\nexport PATH=/bin\n\
        mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev\n\
        exec </dev/console >/dev/console 2>&1\n"
        .to_owned();
    for (name, question, _) in QUESTIONS {
        init += &format!("echo \"answer:{name}:$({question})\"\n");
    }
    for (name, ..) in CALLS {
        init += &format!("/calls/{name}; echo \"answer:{name}:$?\"\n");
    }
    init += "echo answered\npoweroff -f\n";
    let started = "#!/bin/busybox sh\n/bin/busybox cat >/dev/null\necho started >/ran\n";
    let mut bytes = Vec::new();
    let mut add = |path: &str, mode: u32, content: &[u8]| {
        let mut file = NewcBuilder::new(path).mode(mode).write(&mut bytes, content.len().try_into().unwrap());
        file.write_all(content).unwrap();
        file.finish().unwrap();
    };
    for path in ["bin", "calls", "dev", "mnt", "proc", "sys"] {
        add(path, 0o040_755, &[]);
    }
    let programs = [("init", init.as_bytes()), ("started", started.as_bytes()), ("bin/busybox", &busybox)];
    for (path, content) in programs {
        add(path, 0o100_755, content);
    }
    for (name, number, arguments, _) in CALLS {
        add(&format!("calls/{name}"), 0o100_755, &probe::elf(*number, *arguments));
    }
    cpio::newc::trailer(&mut bytes).unwrap();
    let image = directory.join("asking.img");
    fs::write(&image, bytes).unwrap();
    image
}

/// A kernel's answers, by the name of the question.
fn answers(kernel: &Path) -> BTreeMap<String, String> {
    let directory = guest::scratch();
    let image = asking(&directory);
    let options = ["--kernel", kernel.to_str().unwrap(), "--initrd", image.to_str().unwrap()];
    let guest = Guest::boot_to(Kind::Vm, "", &options, &Client::connect);
    guest.await_log("answered");
    let log = guest.log();
    let line = |line: &str| {
        let (name, answer) = line.trim_end().strip_prefix("answer:")?.split_once(':')?;
        Some((name.to_owned(), answer.to_owned()))
    };
    fs::remove_dir_all(directory).unwrap();
    log.lines().filter_map(line).collect()
}

#[test]
#[ignore = "it needs the guest kernel: make guest-kernel-test"]
fn the_guest_kernel_is_what_its_policy_says() {
    let said = answers(&cached("guest-kernel/vmlinuz", "make guest-kernel"));
    let calls = CALLS.iter().map(|(name, _, _, expected)| (*name, *expected));
    let questions = QUESTIONS.iter().map(|(name, _, expected)| (*name, *expected));
    let expected: BTreeMap<_, _> =
        calls.chain(questions).map(|(name, answer)| (name.to_owned(), answer.to_owned())).collect();
    assert_eq!(said, expected);

    let debians = answers(&cached("kernel/vmlinuz", "make kernel"));
    for (name, answer) in [
        ("bpf", "22"),
        ("core_pattern", "started"),
        ("io_uring_setup", "14"),
        ("kcore", "0"),
        ("mem", "0"),
        ("modules", "0"),
        ("release", "0"),
        ("unshare_user", "0"),
    ] {
        assert_eq!(debians.get(name).map(String::as_str), Some(answer), "{name}: {debians:?}");
    }
}

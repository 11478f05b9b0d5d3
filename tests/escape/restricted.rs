//! What a container of the profile `restricted`, meant for untrusted code, can do from inside, as root and as
//! a user.

use std::fs;
use std::io::Read;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::Path;

use hyperinit::sandbox::{ContainerProfile, Scoped};
use hyperinit::wire::Profile;
use nix::errno::Errno;
use serde_json::json;

use crate::guest::{Guest, Kind};
use crate::{arm, attack, probe, said, say, told};

const EPERM: i32 = Errno::EPERM as i32;
/// The users of the attempts.
const USERS: [&str; 2] = ["root", "web"];

fn boot() -> Guest {
    let guest = Guest::boot_with(Kind::Local, "hyper_log=warn hyper_profile=restricted");
    guest.start_pod();
    guest
}

fn program(root: &Path, name: &str, elf: &[u8], mode: u32) {
    let path = root.join("bin").join(name);
    fs::write(&path, elf).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
}

/// System calls with their arguments, and the errno of each.
const CALLS: [(&str, u64, [u64; 6], i32); 34] = [
    ("socket AF_PACKET", 41, [17, 3, 0, 0, 0, 0], EPERM),
    ("socket AF_NETLINK", 41, [16, 3, 0, 0, 0, 0], EPERM),
    ("socket AF_INET of ICMP, raw", 41, [2, 3, 1, 0, 0, 0], EPERM),
    ("socket AF_INET6, raw, high bits", 41, [10, 7 << 32 | 3, 58, 0, 0, 0], EPERM),
    ("socket AF_INET, raw, close-on-exec", 41, [2, 0o2_000_003, 1, 0, 0, 0], EPERM),
    ("socket AF_VSOCK", 41, [40, 1, 0, 0, 0, 0], EPERM),
    ("socket AF_ALG", 41, [38, 5, 0, 0, 0, 0], EPERM),
    ("setuid to another", 105, [5, 0, 0, 0, 0, 0], EPERM),
    ("setgid to another", 106, [5, 0, 0, 0, 0, 0], EPERM),
    ("setgroups", 116, [0; 6], EPERM),
    ("setresuid to another", 117, [5, 5, 5, 0, 0, 0], EPERM),
    ("chroot", 161, [probe::BASE, 0, 0, 0, 0, 0], EPERM),
    ("ptrace", 101, [0; 6], EPERM),
    ("process_vm_readv", 310, [1, 0, 0, 0, 0, 0], EPERM),
    ("mount", 165, [0; 6], EPERM),
    ("umount2", 166, [0; 6], EPERM),
    ("unshare, a user namespace", 272, [0x1000_0000, 0, 0, 0, 0, 0], EPERM),
    ("clone, a user namespace", 56, [0x1000_0000 | 17, 0, 0, 0, 0, 0], EPERM),
    ("setns", 308, [0; 6], EPERM),
    ("mknod, a device", 133, [probe::BASE, 0o020_666, 0x0101, 0, 0, 0], EPERM),
    ("chown", 92, [probe::BASE, 0, 0, 0, 0, 0], EPERM),
    ("personality", 135, [0x004_0000, 0, 0, 0, 0, 0], EPERM),
    ("io_uring_setup", 425, [1, 0, 0, 0, 0, 0], EPERM),
    ("io_setup", 206, [0; 6], EPERM),
    ("bpf", 321, [0; 6], EPERM),
    ("keyctl", 250, [0; 6], EPERM),
    ("userfaultfd", 323, [0; 6], EPERM),
    ("perf_event_open", 298, [0; 6], EPERM),
    ("msgget", 68, [0; 6], EPERM),
    ("sethostname", 170, [0; 6], EPERM),
    ("a call of a newer kernel", 999, [0; 6], Errno::ENOSYS as i32),
    // Calls that an ordinary program makes.
    ("socket AF_INET", 41, [2, 1, 0, 0, 0, 0], 0),
    ("socket AF_INET6 of UDP", 41, [10, 0o2_000_002, 0, 0, 0, 0], 0),
    ("pipe2", 293, [probe::BASE, 0, 0, 0, 0, 0], Errno::EFAULT as i32),
];

#[test]
fn what_the_restricted_profile_denies_fails_for_root_too() {
    let guest = boot();
    let root = guest.share.join("image/rootfs");
    for (number, (_, call, arguments, _)) in CALLS.iter().enumerate() {
        program(&root, &format!("probe{number}"), &probe::elf(*call, *arguments), 0o755);
    }
    let main = guest.sleeper("main");
    for user in USERS {
        for (number, (what, _, _, expected)) in CALLS.iter().enumerate() {
            let outcome =
                guest.exec("main", &[&format!("/bin/probe{number}")], json!({"user": user})).outcome();
            assert_eq!(i32::from(outcome.status), *expected, "{user}: {what}");
        }
    }
    guest.finish(main);
}

#[test]
fn nobody_has_a_capability_or_gains_by_a_setuid_program() {
    let guest = boot();
    let root = guest.share.join("image/rootfs");
    let secret = root.join("secret");
    fs::write(&secret, "").unwrap();
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let theirs = root.join("theirs");
    fs::write(&theirs, "").unwrap();
    fs::set_permissions(&theirs, fs::Permissions::from_mode(0o600)).unwrap();
    chown(&theirs, Some(5), Some(5)).unwrap();
    let open = |path: &[u8]| probe::elf_of(&[(2, [probe::data_at(1), 0, 0, 0, 0, 0])], path);
    program(&root, "plain", &open(b"/secret\0"), 0o755);
    program(&root, "setuid", &open(b"/secret\0"), 0o4755);
    program(&root, "another", &open(b"/theirs\0"), 0o755);
    let main = guest.sleeper("main");
    let status = |user: &str, name: &str| {
        i32::from(guest.exec("main", &[&format!("/bin/{name}")], json!({"user": user})).outcome().status)
    };
    assert_eq!(status("root", "plain"), 0, "root's own file");
    assert_eq!(status("root", "another"), Errno::EACCES as i32, "a file of another user's is closed to root");
    assert_eq!(status("web", "plain"), Errno::EACCES as i32);
    assert_eq!(status("web", "setuid"), Errno::EACCES as i32);
    for user in USERS {
        let words = ["sh", "-c", "grep -E '^(Cap|NoNewPrivs|Seccomp:)' /proc/self/status; : >/made"];
        let outcome = guest.exec("main", &words, json!({"user": user})).outcome();
        let sets: Vec<&str> = outcome.stdout.split_whitespace().skip(1).step_by(2).collect();
        let none = "0000000000000000";
        assert_eq!(sets, [none, none, none, none, none, "1", "2"], "{user}: {}", outcome.stdout);
        assert!(outcome.stderr.contains("Read-only file system"), "{user}: {}", outcome.stderr);
    }
    guest.finish(main);
}

/// Processes of the same start reach one another by signals and abstract sockets; processes of two starts do
/// not.
#[test]
fn a_start_is_a_scope_of_signals_and_abstract_sockets() {
    if let Some(what) = told("scope") {
        return attempt(&what);
    }
    let guest = boot();
    arm(&guest.share.join("image/rootfs"));
    let main = guest.sleeper("main");
    let scoped = ContainerProfile::of(Profile::Restricted).unwrap().scoped() == Scoped::Yes;
    let test = "restricted::a_start_is_a_scope_of_signals_and_abstract_sockets";
    let listening = attack(&guest, "main", test, "scope", "listen");
    listening.read_until("\nlistening\n");
    let outcome = attack(&guest, "main", test, "scope", "connect").outcome();
    let expected = if scoped { "Some(PermissionDenied)" } else { "None" };
    assert_eq!(said(&outcome.stdout, "connected:"), expected, "{}", outcome.stdout);
    listening.signal(9);
    assert_eq!(listening.end().status, 137);
    // A process of this start, and the container's first process, which runs as the same user.
    let script = "sleep 100000 & kill $! && echo its own; kill -0 $(pidof sleep | tr ' ' '\\n' | sort -n | head -1) 2>/dev/null || echo kept out";
    let expected = if scoped { "its own\nkept out\n" } else { "its own\n" };
    assert_eq!(guest.sh("main", script).stdout, expected);
    if !scoped {
        assert_eq!(guest.log().matches("no Landlock scopes").count(), 1, "it is said once");
    }
    guest.finish(main);
}

/// The part of the test that runs in the container.
fn attempt(what: &str) {
    let address = SocketAddr::from_abstract_name("restricted").unwrap();
    match what {
        "listen" => {
            let _listener = UnixListener::bind_addr(&address).unwrap();
            say("listening");
            let _ = std::io::stdin().read(&mut [0]);
            std::thread::park();
        }
        _ => say(&format!(
            "connected: {:?}",
            UnixStream::connect_addr(&address).err().map(|error| error.kind())
        )),
    }
}

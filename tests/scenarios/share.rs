//! What a filesystem can do, on a share that is one: the machine's own in namespaces, virtiofs in a VM.
//! QEMU's 9p cannot do all of it (docs/limits.md).

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Instant;

use hyperinit::sys::xattr;
use nix::errno::Errno;
use nix::libc;
use serde_json::json;

use super::probe;
use crate::guest::{Guest, Kind, PATIENCE};

/// The number of a call, and its arguments.
type Call = (i64, [u64; 6]);
/// Stands for the address of the data behind the calls.
const DATA: u64 = u64::MAX;

/// The root of the image on this machine.
fn root(guest: &Guest) -> PathBuf {
    guest.share.join("image/rootfs")
}

/// Puts a program that makes these calls into the image. Its exit status is the errno of the last call.
fn program(guest: &Guest, name: &str, calls: &[Call], data: &[u8]) {
    let at = probe::data_at(calls.len() as u64);
    let place = |argument: u64| if argument == DATA { at } else { argument };
    let calls: Vec<_> =
        calls.iter().map(|(call, arguments)| (call.cast_unsigned(), arguments.map(place))).collect();
    let path = root(guest).join("bin").join(name);
    fs::write(&path, probe::elf_of(&calls, data)).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

pub fn sockets_are_files_that_connect(guest: &Guest) {
    let path = b"/tmp/socket\0";
    let address = [&(libc::AF_UNIX as u16).to_ne_bytes()[..], path].concat();
    let (stream, length) = (libc::SOCK_STREAM as u64, address.len() as u64);
    let socket = (libc::SYS_socket, [libc::AF_UNIX as u64, stream, 0, 0, 0, 0]);
    let calls = [
        socket,
        (libc::SYS_bind, [3, DATA, length, 0, 0, 0]),
        (libc::SYS_listen, [3, 1, 0, 0, 0, 0]),
        socket,
        (libc::SYS_connect, [4, DATA, length, 0, 0, 0]),
    ];
    program(guest, "a-socket", &calls, &address);
    program(guest, "a-dead-socket", &[calls[0], (libc::SYS_connect, [3, DATA, length, 0, 0, 0])], &address);
    let script = "rm -f /tmp/socket; a-socket; echo $?; stat -c '%F %a' /tmp/socket; a-dead-socket; echo $?; rm /tmp/socket";
    let refused = Errno::ECONNREFUSED as i32;
    assert_eq!(guest.container_says("socket", script, json!({})), format!("0\nsocket 755\n{refused}\n"));
}

pub fn fifos_lead_from_one_process_to_another(guest: &Guest) {
    let script = "cd /tmp; mkfifo -m 600 fifo; stat -c '%F %a' fifo; echo word >fifo & cat fifo; rm fifo";
    assert_eq!(guest.container_says("fifo", script, json!({})), "fifo 600\nword\n");
}

/// A file without a name works by its descriptor and by its name below /proc.
pub fn a_file_without_a_name_is_a_file(guest: &Guest) {
    let times: Vec<u8> =
        [1_000_000_000_i64, 0, 1_100_000_000, 0].into_iter().flat_map(i64::to_ne_bytes).collect();
    for (name, call, data) in [
        ("f-truncate", (libc::SYS_ftruncate, [3, 5, 0, 0, 0, 0]), &[][..]),
        ("f-chmod", (libc::SYS_fchmod, [3, 0o640, 0, 0, 0, 0]), &[]),
        ("f-chown", (libc::SYS_fchown, [3, 33, 34, 0, 0, 0]), &[]),
        ("f-utimens", (libc::SYS_utimensat, [3, 0, DATA, 0, 0, 0]), &times),
    ] {
        program(guest, name, &[call], data);
    }
    let script = "cd /tmp; exec 3<>nameless; rm nameless; echo 'many words' >&3
        f-truncate && f-chmod && f-chown && f-utimens || echo $?
        stat -L -c '%s %a %u:%g %Y %h' /proc/self/fd/3; cat /proc/self/fd/3; echo
        echo more >>/proc/self/fd/3; truncate -s 7 /proc/self/fd/3; chmod 600 /proc/self/fd/3
        chown 0:0 /proc/self/fd/3; touch -d @1200000000 /proc/self/fd/3
        stat -L -c '%s %a %u:%g %Y' /proc/self/fd/3; cat /proc/self/fd/3";
    let said = guest.container_says("nameless", script, json!({}));
    assert_eq!(said, "5 640 33:34 1100000000 0\nmany \n7 600 0:0 1200000000\nmany mo");
}

/// Where the share cannot make such a file, the errno is the one on which programs fall back to a named file.
pub fn a_file_that_never_had_a_name(guest: &Guest) {
    let flags = (libc::O_TMPFILE | libc::O_RDWR) as u64;
    program(guest, "o-tmpfile", &[(libc::SYS_open, [DATA, flags, 0o600, 0, 0, 0])], b"/tmp\0");
    let said = guest.container_says("tmpfile", "o-tmpfile; echo $?", json!({}));
    let without = format!("{}\n", Errno::EOPNOTSUPP as i32);
    let allowed: &[&str] = match guest.kind {
        Kind::Local => &["0\n"],
        Kind::Vm => &["0\n", &without],
    };
    assert!(allowed.contains(&said.as_str()), "{said}");
}

/// The capabilities of a program count when a user executes it, whether the host or the container set them.
pub fn a_files_capabilities_are_its_programs(guest: &Guest) {
    // struct vfs_cap_data of linux/capability.h: revision 2 with the effective bit; CAP_NET_RAW is permitted,
    // nothing is inheritable.
    let capabilities: Vec<u8> =
        [0x0200_0001_u32, 1 << 13, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    let name = c"security.capability";
    let busybox = root(guest).join("bin/busybox");
    for by in ["host", "container"] {
        fs::create_dir_all(root(guest).join("capable").join(by)).unwrap();
        fs::copy(&busybox, root(guest).join("capable").join(by).join("cat")).unwrap();
    }
    let by_host = File::open(root(guest).join("capable/host/cat")).unwrap();
    xattr::set(&by_host, name, &capabilities).unwrap();
    let path = b"/capable/container/cat\0";
    let data = [&path[..], name.to_bytes_with_nul(), &capabilities].concat();
    let at = probe::data_at(1);
    let (name_at, value_at) = (at + path.len() as u64, at + (path.len() + name.count_bytes() + 1) as u64);
    let set = (libc::SYS_setxattr, [DATA, name_at, value_at, capabilities.len() as u64, 0, 0]);
    program(guest, "set-capabilities", &[set], &data);
    let main = guest.sleeper("capable");
    assert_eq!(guest.says("capable", "set-capabilities; echo $?"), "0\n");
    for (program, effective) in
        [("/bin/cat", "0"), ("/capable/host/cat", "2000"), ("/capable/container/cat", "2000")]
    {
        let script = format!("{program} /proc/self/status | grep CapEff: | cut -f 2 | sed s/^0*//");
        let outcome = guest.exec("capable", &["sh", "-c", &script], json!({"user": "web"})).outcome();
        let expected = effective.trim_start_matches('0');
        assert_eq!((outcome.stdout.trim_end(), outcome.stderr.as_str()), (expected, ""), "{program}");
    }
    guest.finish(main);
    let by_container = File::open(root(guest).join("capable/container/cat")).unwrap();
    assert_eq!(xattr::get(&by_container, name).unwrap(), capabilities);
}

pub fn an_access_list_lets_in_whom_it_names(guest: &Guest) {
    // linux/posix_acl_xattr.h: version 2; each entry is a tag, permissions and an id. The owner has rw, user
    // 33 r, the group nothing, the mask r, others nothing.
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (0x01_u16, 6_u16, u32::MAX),
        (0x02, 4, 33),
        (0x04, 0, u32::MAX),
        (0x10, 4, u32::MAX),
        (0x20, 0, u32::MAX),
    ] {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    let (path, name) = (b"/tmp/listed\0", c"system.posix_acl_access");
    let data = [&path[..], name.to_bytes_with_nul(), &list].concat();
    let at = probe::data_at(1);
    let (name_at, value_at) = (at + path.len() as u64, at + (path.len() + name.count_bytes() + 1) as u64);
    let set = (libc::SYS_setxattr, [DATA, name_at, value_at, list.len() as u64, 0, 0]);
    program(guest, "set-list", &[set], &data);
    let main = guest.sleeper("listed");
    assert_eq!(guest.says("listed", "umask 077; echo word >/tmp/listed; set-list; echo $?"), "0\n");
    let read = |user: &str| guest.exec("listed", &["cat", "/tmp/listed"], json!({"user": user})).outcome();
    assert_eq!(read("33").stdout, "word\n");
    assert!(read("34").stderr.contains("Permission denied"));
    guest.says("listed", "rm /tmp/listed");
    guest.finish(main);
}

/// The host changes a file in place, replaces it, removes it and makes it again. A container that has read
/// the file sees each change.
pub fn what_the_host_changes_is_seen(guest: &Guest) {
    let directory = root(guest).join("tmp/of-the-host");
    fs::create_dir(&directory).unwrap();
    let file = directory.join("file");
    fs::write(&file, "first\n").unwrap();
    let main = guest.sleeper("seen");
    let wait_for_both = |text: &str, names: &str| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = guest.sh("seen", "cd /tmp/of-the-host; cat file; ls").stdout;
            if said == format!("{text}{names}") {
                return;
            }
            assert!(Instant::now() < deadline, "{said:?} and not {text:?} and {names:?}");
        }
    };
    let wait_for = |text: &str| wait_for_both(text, "file\n");
    wait_for("first\n");
    fs::write(&file, "again\n").unwrap();
    wait_for("again\n");
    fs::write(directory.join("new"), "third\n").unwrap();
    fs::rename(directory.join("new"), &file).unwrap();
    wait_for("third\n");
    fs::remove_file(&file).unwrap();
    wait_for_both("", "");
    fs::write(&file, "fourth\n").unwrap();
    wait_for("fourth\n");
    fs::write(directory.join("other"), "").unwrap();
    wait_for_both("fourth\n", "file\nother\n");
    guest.finish(main);
    fs::remove_dir_all(directory).unwrap();
}

/// The process that writes ends, while another one of the container goes on.
pub fn what_a_process_has_written_is_the_hosts_when_it_ends(guest: &Guest) {
    let main = guest.sleeper("written");
    let path = root(guest).join("tmp/written");
    for round in 0..20 {
        guest
            .says("written", &format!("seq {round} 30000 >/tmp/written; chmod 64{} /tmp/written", round % 8));
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 30_001 - round, "{round}");
        assert!(text.ends_with("\n30000\n"), "{round}");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640 + (round % 8) as u32);
    }
    guest.says("written", "rm /tmp/written");
    assert!(!path.exists());
    guest.finish(main);
}

//! How a VM has its share: by virtiofs where that can work, else by QEMU's own 9p, which needs nothing and
//! can less.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hyperinit_protocol::fault::{Fault, OrFault};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{Uid, User, getegid, geteuid};

use super::cli::{GuestOptions, ShareBy};
use super::guest::VIRTIOFS_SOCKET;
use super::service::Service;
use super::{initrd, places, standard};

/// Names the program, before all others.
const VARIABLE: &str = "HYPERINIT_VIRTIOFSD";
/// QEMU's own, until QEMU 7.2: Debian has it in qemu-system-common. It comes first, for it alone can be told
/// how long the guest may believe what it has read; it needs root.
const QEMUS: &str = "/usr/lib/qemu/virtiofsd";
/// Where packages put the other one: Debian and Fedora, Arch.
const PLACES: [&str; 2] = ["/usr/libexec/virtiofsd", "/usr/lib/virtiofsd"];
/// Its name in PATH: `cargo install virtiofsd` puts it there.
const NAME: &str = "virtiofsd";
/// What an initramfs has to have, here as a file's name.
const MODULE: &str = "virtiofs";
/// What 9p cannot do, of what programs do (docs/limits.md).
const WITHOUT: &str =
    "UNIX sockets, FIFOs, open files without a name and file capabilities do not work there";
/// QEMU's keeps what the guest has read in the guest's memory, and the guest asks after so many seconds
/// whether it has changed (docs/bench.md has what it costs). `cache=auto` would throw away what was read with
/// every open(2), so that each exec reads its program again.
const CACHE: &str = "cache=always,timeout=1";
/// Words of `--qemu` by which the VM's memory is not what hyperctl makes it, and virtiofsd could not see all
/// of it.
const MEMORY_WORDS: [&str; 4] = ["memory-backend", "memdev=", "-mem-path", "maxmem="];

/// How a VM's share is served.
#[derive(Debug, Clone, PartialEq)]
pub enum Share {
    /// By QEMU itself.
    NineP,
    /// By a program beside it.
    Virtiofs(Service),
}

/// Which of the two kinds of virtiofsd a program is; they take other words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// QEMU's own, in C, until QEMU 7.2.
    Qemus,
    /// The one that came after it, in Rust.
    Rusts,
}

/// How to share a directory with a VM that is going to have this initramfs. Where nobody asked for 9p and it
/// is 9p, a line on standard error says why.
pub fn choose(directory: &Path, initrd: &Path, options: &GuestOptions) -> Result<Share, Fault> {
    if options.share_by == Some(ShareBy::NineP) {
        return Ok(Share::NineP);
    }
    match virtiofsd(directory, initrd, options) {
        Ok(service) => Ok(Share::Virtiofs(service)),
        Err(why) if options.share_by == Some(ShareBy::Virtiofs) => {
            Err(Fault::new("sharing by virtiofs", directory.display(), why))
        }
        Err(why) => {
            // What a program will do cannot be read from its image: whoever has less than he could is told,
            // whatever he runs.
            let line = format!("hyperctl: sharing by 9p: {why}; {WITHOUT}\n");
            let _ = standard::stderr().write_all(line.as_bytes());
            Ok(Share::NineP)
        }
    }
}

/// The service, or why it would not work.
fn virtiofsd(directory: &Path, initrd: &Path, options: &GuestOptions) -> Result<Service, String> {
    if let Some(word) = MEMORY_WORDS.into_iter().find(|word| options.qemu.contains(word)) {
        return Err(format!("by `{word}` in --qemu the VM has memory that virtiofsd cannot see"));
    }
    let is_root = geteuid().is_root();
    let program = program(is_root)?;
    let kind = kind(&program)?;
    let maps = if is_root { may_unshare().map(|()| Vec::new())? } else { maps(kind, options)? };
    match initrd::has_module(initrd, MODULE) {
        Ok(true) => {}
        Ok(false) => return Err(format!("{} has no module {MODULE}", initrd.display())),
        Err(fault) => return Err(format!("{}: {}", initrd.display(), fault.why)),
    }
    let mut arguments = match kind {
        Kind::Qemus => words_of_qemus(directory),
        Kind::Rusts => words_of_rusts(directory),
    };
    arguments.push(format!("--rlimit-nofile={}", files_max()).into());
    arguments.extend(maps);
    Ok(Service {
        program,
        arguments,
        socket: VIRTIOFS_SOCKET,
        is_given_socket: true,
        binds: options.binds.clone(),
    })
}

/// How many files virtiofsd may have open, one for each that the guest knows of: as many as it may allow
/// itself wherever it runs. By itself it wants a million, and ends where it gets less.
fn files_max() -> u64 {
    const ENOUGH: u64 = 1_000_000;
    // Zero leaves the limit as it is.
    getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard.min(ENOUGH))
}

fn program(is_root: bool) -> Result<PathBuf, String> {
    if let Some(named) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        let path = PathBuf::from(named);
        let found = path.canonicalize().fault("looking for", path.display());
        return found.map_err(|fault| format!("${VARIABLE} is {}: {}", path.display(), fault.why));
    }
    let qemus = is_root.then(|| PathBuf::from(QEMUS));
    let mut all = qemus.into_iter().chain(PLACES.map(PathBuf::from)).chain(places::in_path(NAME));
    let missing = if is_root {
        "there is no virtiofsd (`apt-get install virtiofsd`, before Debian 13 qemu-system-common)"
    } else {
        "there is no virtiofsd that works without root (`apt-get install virtiofsd`, before Debian 13 `cargo \
         install virtiofsd`)"
    };
    all.find(|file| file.is_file()).ok_or_else(|| missing.to_owned())
}

/// QEMU's says «virtiofsd version 7.2.22», the other one «virtiofsd 1.14.0».
fn kind(program: &Path) -> Result<Kind, String> {
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    kind_of(&said).ok_or_else(|| format!("{} --version says no version of virtiofsd", program.display()))
}

fn kind_of(version: &str) -> Option<Kind> {
    let rest = version.strip_prefix("virtiofsd ")?;
    Some(if rest.starts_with("version ") { Kind::Qemus } else { Kind::Rusts })
}

/// Its sandbox is namespaces in both kinds: whoever breaks it from the guest finds no file but the share, no
/// network and no process. In its other one, chroot, it keeps a descriptor of the machine's /proc, from which
/// `..` leads out.
fn words_of_qemus(directory: &Path) -> Vec<OsString> {
    // A comma ends an option there, unless a backslash is before it.
    let mut source = OsString::from("source=");
    let mut escaped = Vec::new();
    for &byte in directory.as_os_str().as_bytes() {
        if matches!(byte, b',' | b'\\') {
            escaped.push(b'\\');
        }
        escaped.push(byte);
    }
    source.push(OsString::from_vec(escaped));
    let mut words: Vec<OsString> = ["-f", "--fd=0", "-o"].map(OsString::from).into();
    words.push(source);
    for option in ["sandbox=namespace", CACHE, "xattr", "posix_acl", "announce_submounts", "log_level=warn"] {
        words.extend(["-o", option].map(OsString::from));
    }
    words
}

/// The same for the other one. It tells of submounts unless it is told not to.
fn words_of_rusts(directory: &Path) -> Vec<OsString> {
    let mut words: Vec<OsString> = [
        "--fd=0",
        "--sandbox=namespace",
        "--cache=auto",
        "--xattr",
        "--posix-acl",
        "--log-level=warn",
        "--shared-dir",
    ]
    .map(OsString::from)
    .into();
    words.push(directory.into());
    words
}

/// Whether the sandbox can be made. Root has it in namespaces of the machine's users, and may lack the right
/// to make them: in a container.
fn may_unshare() -> Result<(), String> {
    // They go with the thread.
    let tried = std::thread::spawn(|| unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID)).join();
    match tried {
        Ok(Ok(())) => Ok(()),
        Ok(Err(errno)) => Err(format!("virtiofsd may not make namespaces for itself ({})", errno.desc())),
        Err(_) => Err("virtiofsd may not make namespaces for itself".to_owned()),
    }
}

/// Without root it is in a user namespace of its own, whose root is the caller and whose other users are his
/// subordinate ones (subuid(5)). With the caller alone it could make no file for any other user of a
/// container; 9p makes them all his.
fn maps(kind: Kind, options: &GuestOptions) -> Result<Vec<OsString>, String> {
    if kind == Kind::Qemus {
        return Err("QEMU's own virtiofsd needs root".to_owned());
    }
    if !options.binds.is_empty() {
        return Err("without root virtiofsd cannot share what -v puts together".to_owned());
    }
    if ["newuidmap", "newgidmap"].iter().any(|name| places::in_path(name).is_none()) {
        return Err("without root virtiofsd needs newuidmap (`apt-get install uidmap`)".to_owned());
    }
    let (user, group) = (geteuid(), getegid());
    let name = User::from_uid(user).ok().flatten().map(|user| user.name).unwrap_or_default();
    let mut words = Vec::new();
    for (file, option, own) in
        [("/etc/subuid", "--uid-map", user.as_raw()), ("/etc/subgid", "--gid-map", group.as_raw())]
    {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let (first, count) = subordinate(&text, &name, user)
            .ok_or_else(|| format!("without root virtiofsd needs a range of users in {file}"))?;
        words.extend([option.into(), format!(":0:{own}:1:").into()]);
        words.extend([option.into(), format!(":1:{first}:{count}:").into()]);
    }
    Ok(words)
}

/// A user's first range in a file of subuid(5): its begin, and how many there are.
fn subordinate(text: &str, name: &str, user: Uid) -> Option<(u32, u32)> {
    let number = user.to_string();
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let is_theirs = fields.next().is_some_and(|who| who == name || who == number);
        let range = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        (is_theirs && range.1 > 0).then_some(range)
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use super::*;

    fn text(words: &[OsString]) -> String {
        words.join(OsStr::new(" ")).into_string().unwrap()
    }

    #[test]
    fn each_kind_is_told_by_its_version_and_has_its_own_words() {
        assert_eq!(kind_of("virtiofsd version 7.2.22 (Debian 1:7.2)\nusing FUSE"), Some(Kind::Qemus));
        assert_eq!(kind_of("virtiofsd 1.14.0\n"), Some(Kind::Rusts));
        assert_eq!(kind_of("busybox"), None);
        let share = Path::new("/srv/a,b\\c");
        let qemus = text(&words_of_qemus(share));
        assert!(qemus.starts_with("-f --fd=0 -o source=/srv/a\\,b\\\\c -o sandbox=namespace "), "{qemus}");
        let rusts = text(&words_of_rusts(share));
        assert!(rusts.ends_with("--shared-dir /srv/a,b\\c"), "{rusts}");
    }

    #[test]
    fn subordinate_users_are_found_by_name_and_by_number() {
        let file = "root:1:2\nweb:100000:65536\n1001:300000:10\nbad:x:1\n";
        assert_eq!(subordinate(file, "web", Uid::from_raw(33)), Some((100_000, 65_536)));
        assert_eq!(subordinate(file, "somebody", Uid::from_raw(1001)), Some((300_000, 10)));
        assert_eq!(subordinate(file, "bad", Uid::from_raw(7)), None);
        assert_eq!(subordinate("", "web", Uid::from_raw(33)), None);
    }
}

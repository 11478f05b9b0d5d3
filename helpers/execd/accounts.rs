//! Reads passwd(5) and group(5) of a container. Their text is untrusted, and group is read only if it is
//! needed.

use std::io::Read;
use std::os::fd::AsFd;
use std::path::Path;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::HELPER_USERS;
use hyperinit::spec::Process;
use hyperinit::sys::mount::{Resolve, openat2};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag};
use nix::sys::stat::{FileStat, SFlag, fstat};

/// The largest file that is read, in bytes: a thousand times the size of a distribution's.
const FILE_MAX: u64 = 4 << 20;
/// The kernel's NGROUPS_MAX.
const GROUPS_MAX: usize = 65_536;
/// The group of ttys if /etc/group does not name one.
const TTY_GROUP: u32 = 5;

/// The user and groups of a process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The user's number.
    pub uid: u32,
    /// The primary group's number.
    pub gid: u32,
    /// The supplementary groups.
    pub groups: Vec<u32>,
    /// `USER`, if passwd knows the user.
    pub name: Option<String>,
    /// `HOME`, if passwd knows the user and gives a directory.
    pub home: Option<String>,
    /// The group of the process's tty.
    pub tty_group: u32,
}

/// One well-formed line of passwd.
struct User<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

/// One well-formed line of group.
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

/// Parses the number of a user or group: digits only, and not -1, which setresuid(2) takes for "unchanged".
fn number(word: &str) -> Option<u32> {
    let digits = word.bytes().all(|byte| byte.is_ascii_digit());
    word.parse().ok().filter(|&number| digits && number != u32::MAX)
}

fn users(passwd: &str) -> impl Iterator<Item = User<'_>> {
    passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let (uid, gid) = (number(fields.nth(1)?)?, number(fields.next()?)?);
        Some(User { name, uid, gid, home: fields.nth(1).unwrap_or("") })
    })
}

fn groups(group: &str) -> impl Iterator<Item = Group<'_>> {
    group.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = number(fields.nth(1)?)?;
        Some(Group { name, gid, members: fields.next().unwrap_or("") })
    })
}

/// Works out the user and groups of `process` from the container's two files. `group` is called only if its
/// text is needed. Fails if a name is unknown, or if a number belongs to one of the guest's own processes.
pub fn identify(
    process: &Process,
    passwd: &str,
    group: impl FnOnce() -> Result<String, Fault>,
) -> Result<Identity, Fault> {
    let by_number = match process.user.as_str() {
        "" => Some(0),
        word => number(word),
    };
    // A name of digits is a number, as in Docker.
    let user = users(passwd).find(|user| by_number.map_or(user.name == process.user, |uid| user.uid == uid));
    let (uid, primary) = match (&user, by_number) {
        (Some(user), _) => (user.uid, user.gid),
        (None, Some(uid)) => (uid, 0),
        (None, None) => return Err(Fault::new("looking up the user", &process.user, "no such user")),
    };
    // A user that the host names gets the groups that the container's files list for it, as in Docker.
    // Without a named user there are none.
    let member = user.as_ref().filter(|_| !process.user.is_empty());
    let mut names = [&process.group].into_iter().chain(&process.additional_groups);
    let needed =
        process.terminal || member.is_some() || names.any(|word| !word.is_empty() && number(word).is_none());
    let text = if needed { group()? } else { String::new() };
    let look_up = |word: &String| match number(word) {
        Some(gid) => Ok(gid),
        None => groups(&text)
            .find(|group| group.name == word)
            .map(|group| group.gid)
            .ok_or_else(|| Fault::new("looking up the group", word, "no such group")),
    };
    let gid = if process.group.is_empty() { primary } else { look_up(&process.group)? };
    let mut supplementary: Vec<u32> =
        process.additional_groups.iter().map(look_up).collect::<Result<_, _>>()?;
    if let Some(user) = member {
        let is_member = |group: &Group<'_>| group.members.split(',').any(|member| member == user.name);
        supplementary.extend(groups(&text).filter(is_member).map(|group| group.gid).take(GROUPS_MAX));
    }
    // The primary group is also a supplementary one. Otherwise a program that may change its group could
    // leave its group, and with it any access that is denied to that group (CVE-2022-36109).
    supplementary.push(gid);
    supplementary.sort_unstable();
    supplementary.dedup();
    supplementary.truncate(GROUPS_MAX);
    no_helpers("user", &process.user, &[uid])?;
    no_helpers("group", &process.group, &supplementary)?;
    Ok(Identity {
        uid,
        gid,
        groups: supplementary,
        name: user.as_ref().map(|user| user.name.to_owned()),
        home: user.as_ref().map(|user| user.home.to_owned()).filter(|home| !home.is_empty()),
        tty_group: groups(&text)
            .find(|group| group.name == "tty" && !HELPER_USERS.contains(&group.gid))
            .map_or(TTY_GROUP, |group| group.gid),
    })
}

/// Refuses the numbers of the guest's own processes, whether the host gives them by number or the image in
/// its files.
fn no_helpers(what: &str, name: &str, numbers: &[u32]) -> Result<(), Fault> {
    match numbers.iter().find(|number| HELPER_USERS.contains(number)) {
        Some(number) => Err(Fault::new(
            format!("becoming the {what}"),
            name,
            format!("{number} is one of the guest's own"),
        )),
        None => Ok(()),
    }
}

/// Reads one of the two files; returns its text and its metadata. An image without the file has no names.
/// This does not block, whatever kind of file is there.
pub fn read(path: &str) -> Result<(String, Option<FileStat>), Fault> {
    let flags = (OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    let file = match openat2(AT_FDCWD, Path::new(path), flags, 0, Resolve::InRoot) {
        Ok(file) => file,
        Err(Errno::ENOENT | Errno::ENOTDIR) => return Ok((String::new(), None)),
        Err(errno) => return Err(Fault::errno("opening", path, errno)),
    };
    let stat = fstat(file.as_fd()).fault("looking at", path)?;
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(Fault::new("reading", path, "it is not a regular file"));
    }
    // The capacity allows reading the file in one piece plus one read for its end. The reported size is
    // trusted for nothing else.
    let size = u64::try_from(stat.st_size).unwrap_or(0).min(FILE_MAX);
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1);
    let count =
        std::fs::File::from(file).take(FILE_MAX + 1).read_to_end(&mut bytes).fault("reading", path)?;
    if count as u64 > FILE_MAX {
        return Err(Fault::new("reading", path, "it is larger than 4 MiB"));
    }
    Ok((String::from_utf8_lossy(&bytes).into_owned(), Some(stat)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbad line\n:x:1:1::/:\nweb:x:33:34:www:/srv:/bin/false\nnum:x:12x:1::/:\nweb:x:99:99:second:/other:\nshort:x:40:41";
    const GROUP: &str =
        "root:x:0:\ntty:x:6:\nwww:x:34:web\naudio:x:29:web,other\nempty:x:\nsecret:x:50:webmaster";

    fn process(json: serde_json::Value) -> Process {
        serde_json::from_value(json).unwrap()
    }

    fn who(json: serde_json::Value) -> Result<Identity, Fault> {
        identify(&process(json), PASSWD, || Ok(GROUP.to_owned()))
    }

    #[test]
    fn a_name_has_its_groups_and_its_home() {
        let web = who(serde_json::json!({"user": "web"})).unwrap();
        assert_eq!((web.uid, web.gid, web.groups), (33, 34, vec![29, 34]), "the first line of a name counts");
        assert_eq!((web.name.as_deref(), web.home.as_deref()), (Some("web"), Some("/srv")));
    }

    #[test]
    fn a_number_need_not_exist() {
        let nobody = who(serde_json::json!({"user": "4711", "group": "42"})).unwrap();
        assert_eq!((nobody.uid, nobody.gid, nobody.groups, nobody.name), (4711, 42, vec![42], None));
        let web = who(serde_json::json!({"user": "33"})).unwrap();
        assert_eq!((web.uid, web.gid, web.groups, web.home.as_deref()), (33, 34, vec![29, 34], Some("/srv")));
        let root = who(serde_json::json!({})).unwrap();
        assert_eq!((root.groups, root.home.as_deref()), (vec![0], Some("/root")));
    }

    #[test]
    fn no_number_means_leave_it_as_it_is() {
        for json in [
            serde_json::json!({"user": "4294967295"}),
            serde_json::json!({"user": "-1"}),
            serde_json::json!({"user": "+0"}),
            serde_json::json!({"group": "4294967295"}),
            serde_json::json!({"additionalGroups": ["4294967295"]}),
        ] {
            assert!(who(json.clone()).is_err(), "{json}");
        }
        let minus =
            identify(&process(serde_json::json!({"user": "evil"})), "evil:x:4294967295:0::/:", || {
                Ok(String::new())
            });
        assert!(minus.is_err(), "nor from the image's file");
    }

    #[test]
    fn the_guests_own_numbers_are_nobodys() {
        for json in [
            serde_json::json!({"user": "4294963204"}),
            serde_json::json!({"group": "4294963200"}),
            serde_json::json!({"additionalGroups": ["4294963455"]}),
        ] {
            let fault = who(json.clone()).unwrap_err();
            assert!(fault.to_string().contains("one of the guest's own"), "{json}: {fault}");
        }
        let by_file = |passwd: &str, group: &str, json: serde_json::Value| {
            identify(&process(json), passwd, || Ok(group.to_owned()))
        };
        let evil = || serde_json::json!({"user": "evil"});
        assert!(by_file("evil:x:4294963201:0::/:", "", evil()).is_err());
        assert!(by_file("evil:x:1:4294963201::/:", "", evil()).is_err());
        assert!(by_file("evil:x:1:1::/:", "own:x:4294963202:evil", evil()).is_err());
        assert!(by_file("", "own:x:4294963202:", serde_json::json!({"group": "own"})).is_err());
        let tty = by_file("", "tty:x:4294963202:", serde_json::json!({"terminal": true})).unwrap();
        assert_eq!(tty.tty_group, TTY_GROUP);
        assert!(who(serde_json::json!({"user": "4294963456"})).is_ok(), "the next is anybody's");
    }

    #[test]
    fn a_name_must_exist() {
        assert!(who(serde_json::json!({"user": "nobody"})).unwrap_err().to_string().contains("no such user"));
        assert!(
            who(serde_json::json!({"group": "nogroup"})).unwrap_err().to_string().contains("no such group")
        );
        assert!(who(serde_json::json!({"user": "num"})).is_err(), "a line that is no account is none");
        let more = who(serde_json::json!({"user": "web", "additionalGroups": ["audio", "7"]})).unwrap();
        assert_eq!(more.groups, [7, 29, 34]);
    }

    #[test]
    fn the_group_file_is_read_only_where_it_is_needed() {
        let never = || -> Result<String, Fault> { panic!("not needed") };
        identify(&process(serde_json::json!({"user": "4711", "group": "1"})), PASSWD, never).unwrap();
        identify(&process(serde_json::json!({"additionalGroups": ["1"]})), PASSWD, never).unwrap();
        let tty = who(serde_json::json!({"terminal": true})).unwrap();
        assert_eq!(tty.tty_group, 6);
    }

    #[test]
    fn a_line_cut_anywhere_is_no_trouble() {
        for end in 0..PASSWD.len() {
            let _ = identify(&process(serde_json::json!({"user": "short"})), &PASSWD[..end], || {
                Ok(GROUP[..end.min(GROUP.len())].to_owned())
            });
        }
    }
}

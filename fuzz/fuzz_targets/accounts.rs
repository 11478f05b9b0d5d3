//! passwd and group files of any image, together with any user names of a host: they decide which user a
//! process runs as.
#![forbid(unsafe_code)]
#![no_main]

use hyperinit::spec::Process;
use hyperinit_fuzz::{Choices, measure};
use libfuzzer_sys::fuzz_target;

#[path = "../../helpers/execd/accounts.rs"]
#[allow(dead_code)]
mod accounts;

/// The kernel's NGROUPS_MAX.
const GROUPS_MAX: usize = 65_536;

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    let [user, group, more] = [0; 3].map(|_: u8| {
        let length = choices.below(16);
        String::from_utf8_lossy(choices.bytes(length)).into_owned()
    });
    let terminal = choices.byte() % 2 == 1;
    let rest = choices.rest();
    // A zero byte, which no field can contain, ends passwd.
    let (passwd, groups) = rest.split_at(rest.iter().position(|&byte| byte == 0).unwrap_or(rest.len() / 2));
    let (passwd, groups) = (String::from_utf8_lossy(passwd), String::from_utf8_lossy(groups));
    let json = serde_json::json!({
        "user": user, "group": group, "additionalGroups": if more.is_empty() { vec![] } else { vec![more] },
        "terminal": terminal, "args": ["a"],
    });
    let process: Process = serde_json::from_value(json).expect("a process");
    let mut read = 0;
    let (identity, held) = measure(|| {
        accounts::identify(&process, &passwd, || {
            read += 1;
            Ok(groups.clone().into_owned())
        })
    });
    assert!(held <= 8 * (passwd.len() + groups.len()) + 16_384, "{held} bytes");
    assert!(read <= 1, "the group file is read once");
    let Ok(identity) = identity else { return };
    let numbers = [identity.uid, identity.gid].into_iter().chain(identity.groups.iter().copied());
    assert!(numbers.into_iter().all(|number| number != u32::MAX), "leave it as it is");
    assert!(identity.groups.is_sorted_by(|a, b| a < b) && identity.groups.len() <= GROUPS_MAX);
    // A process is root only if the host named user 0, or a name that the image gives number 0.
    if identity.uid == 0 && !process.user.is_empty() && process.user.parse() != Ok(0_u32) {
        let named = |line: &str| {
            let mut fields = line.split(':');
            fields.next() == Some(process.user.as_str())
                && fields.nth(1).and_then(|uid| uid.parse().ok()) == Some(0_u32)
        };
        assert!(passwd.lines().any(named), "{:?} is root", process.user);
    }
    if let Some(name) = &identity.name {
        assert!(passwd.lines().any(|line| line.split(':').next() == Some(name)), "{name:?} is nobody's");
    }
});

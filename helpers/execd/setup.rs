//! Computes the environment, program paths and limits of a process from the host's request. Pure functions.

use hyperinit::fault::Fault;
use hyperinit::spec::{Process, Rlimit};
use nix::sys::resource::{RLIM_INFINITY, Resource, rlim_t};

use super::accounts::Identity;

/// The search path of a program without a slash (protocol.md «EXECCMD»).
const PATH: &str = "/usr/local/bin:/usr/bin:/bin:.";
/// OCI's names of the limits.
const LIMITS: [(&str, Resource); 16] = [
    ("RLIMIT_AS", Resource::RLIMIT_AS),
    ("RLIMIT_CORE", Resource::RLIMIT_CORE),
    ("RLIMIT_CPU", Resource::RLIMIT_CPU),
    ("RLIMIT_DATA", Resource::RLIMIT_DATA),
    ("RLIMIT_FSIZE", Resource::RLIMIT_FSIZE),
    ("RLIMIT_LOCKS", Resource::RLIMIT_LOCKS),
    ("RLIMIT_MEMLOCK", Resource::RLIMIT_MEMLOCK),
    ("RLIMIT_MSGQUEUE", Resource::RLIMIT_MSGQUEUE),
    ("RLIMIT_NICE", Resource::RLIMIT_NICE),
    ("RLIMIT_NOFILE", Resource::RLIMIT_NOFILE),
    ("RLIMIT_NPROC", Resource::RLIMIT_NPROC),
    ("RLIMIT_RSS", Resource::RLIMIT_RSS),
    ("RLIMIT_RTPRIO", Resource::RLIMIT_RTPRIO),
    ("RLIMIT_RTTIME", Resource::RLIMIT_RTTIME),
    ("RLIMIT_SIGPENDING", Resource::RLIMIT_SIGPENDING),
    ("RLIMIT_STACK", Resource::RLIMIT_STACK),
];

/// The environment, with each name once. The host's variables override those from passwd, which override the
/// defaults.
pub fn environment(process: &Process, identity: &Identity, hostname: &str) -> Vec<String> {
    let mut variables: Vec<(&str, &str)> = vec![("HOME", "/"), ("HOSTNAME", hostname)];
    if process.terminal {
        variables.push(("TERM", "xterm"));
    }
    if !process.args.first().is_some_and(|program| program.starts_with('/')) {
        variables.push(("PATH", PATH));
    }
    let accounts = [("USER", &identity.name), ("HOME", &identity.home)];
    variables.extend(accounts.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?))));
    variables.extend(process.envs.iter().map(|env| (env.env.as_str(), env.value.as_str())));
    let mut unique: Vec<(&str, &str)> = Vec::new();
    let mut places = std::collections::BTreeMap::new();
    for (name, value) in variables {
        let place = *places.entry(name).or_insert(unique.len());
        match unique.get_mut(place) {
            Some(variable) => variable.1 = value,
            None => unique.push((name, value)),
        }
    }
    unique.into_iter().map(|(name, value)| format!("{name}={value}")).collect()
}

/// The paths to try for a program: its own if it has a slash, else one for each directory of `PATH`.
pub fn candidates(program: &str, environment: &[String]) -> Vec<String> {
    if program.is_empty() {
        return Vec::new();
    }
    if program.contains('/') {
        return vec![program.to_owned()];
    }
    let path = environment.iter().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(PATH);
    path.split(':')
        .map(|directory| if directory.is_empty() { "." } else { directory })
        .map(|directory| format!("{directory}/{program}"))
        .collect()
}

/// The default limit of open files of a container's process, as under Docker: (soft, hard). Programs that use
/// select(2), or that close every possible descriptor, rely on a low soft limit.
const FILES: (rlim_t, rlim_t) = (1024, 524_288);

/// A limit: (soft, hard).
pub type Limit = (Resource, rlim_t, rlim_t);

/// The limits of a container's process. `most` is the hard limit of open files that the process inherits; the
/// default does not raise it. Fails as [`named_limits`] does.
pub fn limits(rlimits: &[Rlimit], most: rlim_t) -> Result<Vec<Limit>, Fault> {
    let mut limits = named_limits(rlimits)?;
    if !limits.iter().any(|&(resource, ..)| resource == Resource::RLIMIT_NOFILE) {
        let (soft, hard) = FILES;
        limits.push((Resource::RLIMIT_NOFILE, soft.min(most), hard.min(most)));
    }
    Ok(limits)
}

/// The limits that the host has named. Fails on an unknown resource, or if a soft limit is above the hard
/// one.
pub fn named_limits(rlimits: &[Rlimit]) -> Result<Vec<Limit>, Fault> {
    rlimits
        .iter()
        .map(|limit| {
            let fault = |why| Fault::new("reading the limit", &limit.kind, why);
            let &(_, resource) =
                LIMITS.iter().find(|(name, _)| *name == limit.kind).ok_or_else(|| fault("no such limit"))?;
            if limit.soft > limit.hard {
                return Err(fault("soft is above hard"));
            }
            // OCI writes "unlimited" as the largest unsigned or the largest signed number.
            let value = |value: u64| if value >= i64::MAX.cast_unsigned() { RLIM_INFINITY } else { value };
            Ok((resource, value(limit.soft), value(limit.hard)))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(json: serde_json::Value) -> Process {
        serde_json::from_value(json).unwrap()
    }

    fn identity() -> Identity {
        Identity {
            uid: 33,
            gid: 33,
            groups: vec![],
            name: Some("web".to_owned()),
            home: Some("/srv".to_owned()),
            tty_group: 5,
        }
    }

    #[test]
    fn the_host_has_the_last_word() {
        let process = process(serde_json::json!({
            "args": ["sh"], "terminal": true,
            "envs": [{"env": "HOME", "value": "/h"}, {"env": "A", "value": "1"}, {"env": "A", "value": "2"}]
        }));
        assert_eq!(
            environment(&process, &identity(), "pod"),
            ["HOME=/h", "HOSTNAME=pod", "TERM=xterm", &format!("PATH={PATH}"), "USER=web", "A=2"]
        );
    }

    #[test]
    fn an_absolute_program_gets_no_path() {
        let process = process(serde_json::json!({"args": ["/bin/sh"]}));
        let nobody = Identity { name: None, home: None, ..identity() };
        assert_eq!(environment(&process, &nobody, "pod"), ["HOME=/", "HOSTNAME=pod"]);
    }

    #[test]
    fn a_program_is_looked_for_in_its_own_path() {
        let environment = ["PATH=/a::/b".to_owned()];
        assert_eq!(candidates("sh", &environment), ["/a/sh", "./sh", "/b/sh"]);
        assert_eq!(candidates("./sh", &environment), ["./sh"]);
        assert_eq!(candidates("sh", &[]).len(), 4);
        assert!(candidates("", &environment).is_empty());
    }

    #[test]
    fn limits_have_names_and_an_order() {
        let limit = |kind: &str, soft, hard| [Rlimit { kind: kind.to_owned(), soft, hard }];
        assert_eq!(named_limits(&limit("RLIMIT_NOFILE", 1, 2)).unwrap(), [(Resource::RLIMIT_NOFILE, 1, 2)]);
        assert_eq!(named_limits(&limit("RLIMIT_CORE", 0, u64::MAX)).unwrap()[0].2, RLIM_INFINITY);
        assert!(named_limits(&limit("NOFILE", 1, 2)).is_err());
        assert!(named_limits(&limit("RLIMIT_NOFILE", 3, 2)).is_err());
    }

    #[test]
    fn open_files_are_limited_as_by_docker_if_the_host_says_nothing() {
        let limit = |kind: &str| Rlimit { kind: kind.to_owned(), soft: 1, hard: 2 };
        let files = |soft, hard| (Resource::RLIMIT_NOFILE, soft, hard);
        assert_eq!(limits(&[], 1_000_000).unwrap(), [files(1024, 524_288)]);
        assert_eq!(limits(&[], 4096).unwrap(), [files(1024, 4096)], "a machine's root may have no more");
        assert_eq!(limits(&[], 512).unwrap(), [files(512, 512)]);
        let core = (Resource::RLIMIT_CORE, 1, 2);
        assert_eq!(limits(&[limit("RLIMIT_CORE")], 4096).unwrap(), [core, files(1024, 4096)]);
        assert_eq!(limits(&[limit("RLIMIT_NOFILE")], 4096).unwrap(), [files(1, 2)]);
    }
}

//! What each process of the running guest may do, as the kernel has it, is what policy/*.json says.

use std::fs;

use hyperinit::embedded_policy;
use hyperinit::sandbox::{CapSet, ContainerProfile, Policy};
use hyperinit::wire::Profile;
use serde_json::{Value, json};

use crate::guest::processes::{NAMES, process, status};
use crate::guest::{Guest, Kind};

/// What a file of policy/ says.
fn file(name: &str) -> Value {
    let path = format!("{}/policy/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn declared(name: &str) -> CapSet {
    let policy: &[u8] = match name {
        "init" => embedded_policy!("init"),
        "warden" => embedded_policy!("warden"),
        "netd" => embedded_policy!("netd"),
        "mountd" => embedded_policy!("mountd"),
        "execd" => embedded_policy!("execd"),
        "streamd" => embedded_policy!("streamd"),
        "podinit" => embedded_policy!("podinit"),
        other => panic!("{other} has no policy"),
    };
    Policy::decode(policy).unwrap().capabilities()
}

fn sets(pid: i32, key: &str) -> CapSet {
    CapSet(u64::from_str_radix(&status(pid, key), 16).unwrap())
}

#[test]
fn every_process_has_exactly_what_its_policy_says() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let available = sets(std::process::id().cast_signed(), "CapPrm");
    let granted = ContainerProfile::of(Profile::Default).unwrap().capabilities();
    for name in NAMES {
        let pid = process(&guest, name, None);
        let keeps = match name {
            // It holds what it grants.
            "execd" => declared(name).union(granted),
            _ => declared(name),
        };
        let keeps = keeps.intersection(available);
        let bounding = match name {
            "warden" => keeps,
            "execd" => granted.intersection(available),
            _ => CapSet::default(),
        };
        assert_eq!(sets(pid, "CapPrm"), keeps, "{name}");
        assert_eq!(sets(pid, "CapEff"), keeps, "{name}");
        assert_eq!(sets(pid, "CapBnd"), bounding, "{name}");
        assert_eq!(sets(pid, "CapInh"), CapSet::default(), "{name}");
        assert_eq!(sets(pid, "CapAmb"), CapSet::default(), "{name}");
        let policy = file(name);
        let uid = policy["user"]["uid"].as_u64().unwrap_or(0);
        assert_eq!(status(pid, "Uid"), format!("{uid}\t{uid}\t{uid}\t{uid}"), "{name}");
        assert_eq!(status(pid, "NoNewPrivs"), u8::from(policy["no_new_privs"] == true).to_string(), "{name}");
        assert_eq!(status(pid, "Seccomp"), "2", "{name}");
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let text = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            assert!(text.contains("Seccomp:\t2"), "every thread of {name}");
        }
    }
    guest.finish(main);
}

/// The kinds of what a process has open, without the standard streams.
fn open_kinds(pid: i32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let above = entries.filter(|entry| entry.file_name().to_str().unwrap().parse::<i32>().unwrap() > 2);
    let mut kinds: Vec<String> = above
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .map(|target| target.display().to_string())
        .map(|target| target.split(['[', ' ']).next().unwrap_or_default().trim_end_matches(':').to_owned())
        .collect();
    kinds.sort();
    kinds.dedup();
    kinds
}

#[test]
fn every_process_has_open_what_it_needs() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    for (name, kinds) in [
        ("init", &["/dev/null", "anon_inode", "socket"][..]),
        ("netd", &["socket"]),
        ("mountd", &["/dev/null", "/proc", "/run/hyperinit", "mnt", "socket"]),
        ("execd", &["/proc", "ipc", "pid", "pipe", "socket", "uts"]),
        ("streamd", &["/memfd:streamd", "anon_inode", "pipe", "socket"]),
        ("podinit", &[]),
    ] {
        let pid = process(&guest, name, None);
        let open = open_kinds(pid);
        assert!(open.iter().all(|kind| kinds.contains(&kind.as_str())), "{name} has {open:?} open");
    }
    let outcome = guest.exec("main", &["ls", "/proc/self/fd"], json!({})).outcome();
    assert_eq!(outcome.stdout, "0\n1\n2\n3\n", "3 is the directory that ls reads");
    guest.finish(main);
}

#[test]
fn nobody_outside_sees_into_a_helper() {
    let guest = Guest::with_pod(Kind::Local);
    for name in NAMES {
        let pid = process(&guest, name, None);
        // Not dumpable: its /proc belongs to root whoever it runs as.
        let owner =
            std::os::unix::fs::MetadataExt::uid(&fs::metadata(format!("/proc/{pid}/environ")).unwrap());
        assert_eq!(owner, 0, "{name}");
    }
}

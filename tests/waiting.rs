//! Checks that containers do not wait for what holds up another container: its files, or the mountd that
//! works for it. tests/storage covers what real disks, servers and shares hold up.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod guest;

use std::fs;
use std::time::Instant;

use guest::beside::{Beside, begin, is_held_up, kill, times};
use guest::processes::{process, processes, status};
use guest::{Guest, Kind, PATIENCE};
use hyperinit_client::{CallError, Pending};
use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
use nix::unistd::Pid;
use serde_json::json;

fn signal(pid: i32, signal: nix::sys::signal::Signal) {
    nix::sys::signal::kill(Pid::from_raw(pid), signal).unwrap();
}

/// Simulates a mountd that does not return from the kernel: it is stopped.
#[test]
fn a_mountd_that_is_held_up_holds_up_its_own_container_only() {
    let guest = Guest::with_pod(Kind::Local);
    let first = process(&guest, "mountd", None);
    signal(first, SIGSTOP);
    let slow = begin(&guest, "slow", &json!({}));
    let mut beside = Beside::default();
    beside.live(&guest, 34, &json!({}));
    assert!(is_held_up(&slow));
    // The mountds that work meanwhile are confined as the first one is.
    let others: Vec<i32> = processes(&guest, "mountd").into_iter().filter(|&pid| pid != first).collect();
    assert!(!others.is_empty());
    for other in others {
        for key in [
            "Uid",
            "Gid",
            "Groups",
            "CapPrm",
            "CapEff",
            "CapBnd",
            "CapInh",
            "CapAmb",
            "NoNewPrivs",
            "Seccomp",
        ] {
            assert_eq!(status(other, key), status(first, key), "{key}");
        }
        assert_eq!(status(other, "Seccomp_filters"), status(first, "Seccomp_filters"));
    }
    signal(first, SIGCONT);
    slow.wait(PATIENCE).unwrap();
    beside.done("a mountd that is held up");
    guest.call(kill("slow"));
    // The mountds that are no longer needed are ended.
    let deadline = Instant::now() + PATIENCE;
    while processes(&guest, "mountd") != [first] {
        assert!(Instant::now() < deadline, "more than one mountd is there\n{}", guest.log());
        std::thread::yield_now();
    }
    assert!(!guest.log().contains("mountd 1 is gone"), "{}", guest.log());
}

/// Filling a volume may take any time, and KILLCONTAINER with SIGKILL still gives it up.
#[test]
fn a_volume_of_many_files_that_is_filled_holds_up_its_own_container_only() {
    let guest = Guest::with_pod(Kind::Local);
    let data = guest.image("full").join("data");
    // A million files for a hundred containers beside it (`BESIDE=100`).
    let times = times(5);
    for directory in 0..times * 10 {
        let directory = data.join(directory.to_string());
        fs::create_dir_all(&directory).unwrap();
        (0..1000).for_each(|file| fs::write(directory.join(file.to_string()), "").unwrap());
    }
    let mut beside = Beside::default();
    // A few at a time: a start that fills a volume must not end before the containers beside it have.
    for round in 0..times.div_ceil(5) {
        let volume = format!("volume{round}");
        fs::create_dir(guest.share.join(&volume)).unwrap();
        let fsmap = json!([{"source": volume, "path": "/data", "dockerVolume": true}]);
        let more = json!({"image": "full", "initialize": true, "fsmap": fsmap});
        // Three starts fill the same volume, and all of them are held up.
        let ids: Vec<String> = (0..3).map(|number| format!("slow{round}-{number}")).collect();
        let slow: Vec<Pending> = ids.iter().map(|id| begin(&guest, id, &more)).collect();
        beside.live(&guest, 5, &json!({}));
        slow.iter().for_each(|slow| assert!(is_held_up(slow)));
        for id in &ids {
            guest.client().send(kill(id));
        }
        for slow in slow {
            match slow.wait(PATIENCE) {
                Err(CallError::Refused(text)) => assert!(text.contains("it was killed before"), "{text}"),
                other => panic!("{other:?}"),
            }
        }
    }
    beside.done("volumes that are filled");
}

//! What processes wrote to the share reaches its host before the host is told of their ends.

use super::*;

/// A container `c` in a guest whose kernel writes to the share late.
fn late() -> World {
    let mut world = World::configured(Config {
        share_cache: ShareCache::Loose,
        share_is_late: true,
        debug_door: true,
        ..config()
    });
    world.tell(Message::StartPod, r#"{"hostname":"pod","shareDir":"s"}"#);
    world.pod_starts();
    world.new_container("c", 1);
    world.done(Role::Mountd);
    world.started(Pid(100));
    assert_eq!(world.said(), ["ACK ", "ACK "]);
    world
}

/// Starts processes with these ids in a container, with pids from 200 on.
fn start(world: &mut World, container: &str, processes: &[&str]) {
    for (number, process) in (0..).zip(processes) {
        world.exec(container, process, 11 + 2 * u64::try_from(number).unwrap());
        world.started(Pid(200 + number));
    }
    world.said();
}

#[test]
fn one_sync_serves_all_that_exited_before_it() {
    let mut world = late();
    start(&mut world, "c", &["p", "q", "r"]);
    world.exits(Pid(200), 1);
    assert_eq!(world.asked(Role::Mountd), [""; 0], "its output first");
    world.done(Role::Streamd);
    assert_eq!((world.said(), world.asked(Role::Mountd)), (vec![], vec!["sync share".to_owned()]));
    for (pid, status) in [(201, 2), (202, 3)] {
        world.exits(Pid(pid), status);
        world.done(Role::Streamd);
    }
    assert_eq!(world.asked(Role::Mountd), ["sync share"], "these have to wait for the next");
    world.done(Role::Mountd);
    assert_eq!(
        (world.said(), world.asked(Role::Mountd)),
        (vec![event("c", "p", 1)], vec!["sync share".to_owned()])
    );
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "q", 2), event("c", "r", 3)]);
    assert!(world.asked(Role::Mountd).is_empty());
}

#[test]
fn an_init_waits_with_its_files() {
    let mut world = late();
    world.exits(Pid(100), 4);
    world.done(Role::Mountd);
    world.done(Role::Streamd);
    assert_eq!((world.said(), world.asked(Role::Mountd)), (vec![], vec!["sync share".to_owned()]));
    world.done(Role::Mountd);
    assert_eq!((world.said(), world.asked(Role::Mountd)), (vec![], vec!["remove c".to_owned()]));
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "init", 4)]);
}

#[test]
fn a_share_that_cannot_be_synced_holds_nobody_up() {
    let mut world = late();
    start(&mut world, "c", &["p", "q"]);
    world.exits(Pid(200), 1);
    world.done(Role::Streamd);
    world.fails(Role::Mountd);
    assert_eq!(world.said(), [event("c", "p", 1)]);

    // If mountd dies, its successor gets the request.
    world.exits(Pid(201), 2);
    world.done(Role::Streamd);
    world.dies(Role::Mountd);
    assert!(world.said().is_empty());
    world.comes_up(Role::Mountd, 30);
    assert_eq!(world.asked(Role::Mountd), ["sync share"]);
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "q", 2)]);
}

#[test]
fn a_host_that_does_not_answer_holds_nobody_up_who_has_nothing_of_the_share() {
    let mut world = late();
    for (id, stdio, more) in [
        ("disk", 3, r#""image":"vda","fstype":"ext4""#),
        ("both", 5, r#""image":"vda","fstype":"ext4","fsmap":[{"source":"a","path":"/a"}]"#),
    ] {
        let process = format!(r#"{{"args":["a"],"stdio":{stdio},"stderr":{}}}"#, stdio + 1);
        world.tell(Message::NewContainer, &format!(r#"{{"id":"{id}","process":{process},{more}}}"#));
        world.done(Role::Mountd);
        world.started(Pid(stdio + 100));
    }
    start(&mut world, "c", &["p"]);
    for (number, container) in (0..).zip(["disk", "both"]) {
        world.exec(container, "p", 31 + 2 * u64::try_from(number).unwrap());
        world.started(Pid(300 + number));
    }
    world.said();
    world.exits(Pid(200), 1);
    world.done(Role::Streamd);
    for pid in [300, 301] {
        world.exits(Pid(pid), 0);
        world.done(Role::Streamd);
    }
    assert_eq!(world.said(), [event("disk", "p", 0)]);
    // mountd is killed for the delay, which may not end it; the ends have been reported.
    world.wait();
    let is_mountd = |action: &Action| matches!(action, Action::KillHelper { helper, .. } if helper.role() == Role::Mountd);
    while !world.did().iter().any(is_mountd) {
        world.wait();
    }
    assert_eq!(world.said(), [event("c", "p", 1), event("both", "p", 0)]);
    world.dies(Role::Mountd);
    world.comes_up(Role::Mountd, 30);
    world.done(Role::Mountd);
    assert!(world.said().is_empty() && world.asked(Role::Mountd).is_empty(), "{:?}", world.asked);
}

/// DESTROYPOD gives up unread output only once.
#[test]
fn output_that_is_given_up_waits_for_the_share_too() {
    let mut world = late();
    start(&mut world, "c", &["p"]);
    world.exits(Pid(200), 1);
    world.tell(Message::DestroyPod, "null");
    world.exits(Pid(100), 137);
    while world.asked(Role::Mountd).last().is_none_or(|asked| asked != "sync share") {
        if world.asked(Role::Mountd).is_empty() {
            world.wait();
        } else {
            world.done(Role::Mountd);
        }
    }
    assert!(world.said().is_empty());
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "p", 1)]);
    // streamd has written the output after all.
    world.done(Role::Streamd);
    assert!(world.said().is_empty());
}

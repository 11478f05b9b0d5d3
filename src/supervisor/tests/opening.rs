//! An old-style STARTPOD, which carries its containers: they start one after the other, or everything is
//! undone.

use super::*;

/// The payload for a pod with containers of these ids. The first has the streams `stdio` and `stdio` + 1, the
/// next has the next two, and so on.
pub fn pod(ids: &[&str], stdio: u64) -> String {
    let containers: Vec<String> = (0..)
        .zip(ids)
        .map(|(nth, id)| {
            let stdio = stdio + 2 * nth;
            format!(r#"{{"id":"{id}","process":{{"args":["a"],"stdio":{stdio},"stderr":{}}}}}"#, stdio + 1)
        })
        .collect();
    format!(r#"{{"hostname":"pod","containers":[{}]}}"#, containers.join(","))
}

/// A guest whose pod runs, and whose containers `a` and `b` have not started yet.
fn opening() -> World {
    let mut world = World::new();
    world.tell(Message::StartPod, &pod(&["a", "b"], 1));
    world.pod_starts();
    assert!(world.said().is_empty());
    assert_eq!(world.asked(Role::Mountd), ["prepare a"]);
    world
}

/// Checks that a pod whose containers could not all be started ends, together with its container `running`,
/// and that the host is told why.
fn is_undone(world: &mut World, running: Option<(Pid, &str)>, why: &str) {
    assert_eq!(world.did(), [kill(POD_INIT.0, Signal::KILL, false)]);
    assert!(world.said().is_empty(), "the reply comes when everything is undone");
    world.exits(POD_INIT, 137);
    if let Some((pid, id)) = running {
        world.exits(pid, 137);
        assert_eq!(world.asked(Role::Mountd), [format!("kill {id}")]);
        world.done(Role::Mountd);
        world.done(Role::Streamd);
        world.done(Role::Mountd);
        assert_eq!(world.said(), [event(id, "init", 137)]);
    }
    assert_eq!(world.asked(Role::Mountd), ["destroy pod"]);
    world.done(Role::Mountd);
    let said = world.said();
    assert!(matches!(said.as_slice(), [said] if said.starts_with("ERROR") && said.contains(why)), "{said:?}");
    assert!(world.supervisor.containers.is_empty() && world.supervisor.streams.is_empty());
    world.tell(Message::StartPod, "{}");
    assert_eq!(world.asked(Role::Netd), ["up lo"], "another pod may be started");
}

#[test]
fn its_containers_start_one_after_the_other() {
    let mut world = opening();
    world.done(Role::Mountd);
    assert_eq!(world.asked(Role::Execd), ["start a init as init"]);
    assert!(world.asked(Role::Mountd).is_empty(), "b waits for a");
    world.started(Pid(100));
    assert_eq!(world.asked(Role::Mountd), ["prepare b"]);
    world.done(Role::Mountd);
    assert!(world.said().is_empty());
    world.started(Pid(101));
    assert_eq!(world.said(), ["ACK "]);
    assert_eq!(world.released, [POD_INIT, Pid(100), Pid(101)]);
    world.exec("b", "p", 9);
    world.started(Pid(102));
    assert_eq!(world.said(), ["ACK "]);
}

#[test]
fn what_is_said_meanwhile_waits_for_all_of_them() {
    let mut world = opening();
    world.exec("b", "p", 9);
    world.new_container("c", 11);
    world.tell(Message::KillContainer, r#"{"container":"a","signal":15}"#);
    world.done(Role::Mountd);
    world.started(Pid(100));
    world.done(Role::Mountd);
    assert!(world.said().is_empty() && world.did().is_empty());
    world.started(Pid(101));
    assert_eq!(world.did(), [kill(100, Signal::TERM, false)]);
    assert_eq!(world.asked(Role::Execd), ["start b p"]);
    assert_eq!(world.asked(Role::Mountd), ["prepare c"]);
}

#[test]
fn one_that_fails_takes_all_with_it() {
    let mut world = opening();
    world.fails(Role::Mountd);
    assert_eq!(world.asked(Role::Mountd), ["kill a", "remove a"]);
    world.done(Role::Mountd);
    world.done(Role::Mountd);
    is_undone(&mut world, None, "mountd: doing it: no");

    let mut world = opening();
    world.done(Role::Mountd);
    world.started(Pid(100));
    world.done(Role::Mountd);
    world.fails(Role::Execd);
    world.done(Role::Mountd);
    world.done(Role::Mountd);
    is_undone(&mut world, Some((Pid(100), "a")), "execd: doing it: no");
}

#[test]
fn one_that_makes_no_sense_takes_all_with_it() {
    for (ids, why) in [(["a", "a"], "it exists"), (["a", "hyperstart"], "the guest's own")] {
        let mut world = World::new();
        world.tell(Message::StartPod, &pod(&ids, 1));
        world.pod_starts();
        world.done(Role::Mountd);
        world.started(Pid(100));
        is_undone(&mut world, Some((Pid(100), "a")), why);
    }
}

#[test]
fn one_that_ends_at_once_was_started() {
    let mut world = opening();
    world.done(Role::Mountd);
    world.exits(Pid(100), 3);
    world.started(Pid(100));
    assert_eq!(world.asked(Role::Mountd), ["kill a"]);
    world.done(Role::Mountd);
    assert_eq!(world.asked(Role::Mountd), ["prepare b"]);
    world.done(Role::Mountd);
    world.started(Pid(101));
    assert_eq!(world.said(), ["ACK "]);
    world.done(Role::Streamd);
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("a", "init", 3)]);
}

#[test]
fn a_pod_init_that_dies_meanwhile_is_told_as_startpods_end() {
    let mut world = opening();
    world.exits(POD_INIT, 1);
    world.done(Role::Mountd);
    assert_eq!(world.asked(Role::Mountd), ["kill a", "remove a"], "too late to start its init");
    world.done(Role::Mountd);
    world.done(Role::Mountd);
    assert_eq!(world.asked(Role::Mountd), ["destroy pod"]);
    world.done(Role::Mountd);
    assert!(world.said().join("").ends_with("starting the pod: the pod init died"));
}

#[test]
fn destroypod_comes_before_it_is_open() {
    let mut world = opening();
    world.tell(Message::DestroyPod, "null");
    world.done(Role::Mountd);
    world.done(Role::Mountd);
    world.done(Role::Mountd);
    assert_eq!(world.did(), [kill(POD_INIT.0, Signal::KILL, false)]);
    world.exits(POD_INIT, 137);
    world.done(Role::Mountd);
    assert!(world.said().join("").contains("DESTROYPOD came before it ran"));
    world.done(Role::Streamd);
    assert_eq!(world.said(), ["ACK "]);
}

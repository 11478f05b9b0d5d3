//! What a host can make init hold is limited, and beyond each limit the host gets an ERROR.

use super::*;
use crate::fault::PART_MAX;
use crate::spec::CONTAINERS_MAX;
use crate::supervisor::commands::PROCESSES_MAX;

/// A container that has exited; it is remembered until it is removed.
fn exited_container(world: &mut World, id: &str, pid: i32) {
    world.new_container(id, 1);
    world.done(Role::Mountd);
    world.started(Pid(pid));
    world.exits(Pid(pid), 0);
    world.done(Role::Mountd);
    world.done(Role::Streamd);
    world.done(Role::Mountd);
    assert_eq!(world.said(), ["ACK ", &event(id, "init", 0)]);
    world.asked.retain(|(_, ask)| !matches!(ask, Request::Execd(execd::Request::Release { .. })));
}

#[test]
fn so_many_containers_and_no_more() {
    let mut world = World::with_pod();
    for at in 0..CONTAINERS_MAX {
        exited_container(&mut world, &format!("c{at}"), 100);
        // No execd answers the releases here, so the list is emptied by hand.
        world.supervisor.finished.clear();
    }
    world.new_container("one-more", 1);
    assert!(world.said().join("").contains("there are 1024 containers"));
    exited_container(&mut world, "c7", 100);
    world.tell(Message::RemoveContainer, r#"{"container":"c7"}"#);
    assert_eq!(world.said(), ["ACK "]);
    exited_container(&mut world, "one-more", 100);
}

#[test]
fn so_many_processes_and_no_more() {
    let mut world = World::with_container();
    for at in 1..PROCESSES_MAX {
        let pid = 100 + i32::try_from(at).unwrap();
        world.exec("c", &format!("p{at}"), 1 + 2 * at as u64);
        world.started(Pid(pid));
        assert_eq!(world.said(), ["ACK "]);
    }
    world.exec("c", "one-more", 1 << 40);
    assert!(world.said().join("").contains("there are 4096 processes"));
    world.new_container("d", 1 << 40);
    assert!(world.said().join("").contains("there are 4096 processes"));
    world.exits(Pid(101), 0);
    world.done(Role::Streamd);
    assert_eq!(world.said(), [event("c", "p1", 0)]);
    world.exec("c", "one-more", 1 << 40);
    world.started(Pid(90_000));
    assert_eq!(world.said(), ["ACK "]);
    let streams = world.supervisor.streams.len();
    assert_eq!(streams, 2 * PROCESSES_MAX, "two for each");
}

/// The host has its reply at once, so no other limit slows it down.
#[test]
fn a_host_that_asks_for_the_same_again_and_again_fills_no_queue() {
    let mut world = World::with_pod();
    for _ in 0..5_000 {
        world.tell(Message::OnlineCpuMem, "null");
        world.now += Duration::from_millis(1);
        world.feed(Event::Tick);
    }
    assert_eq!(world.said().len(), 5_000);
    let under_way = world.asked(Role::Mountd).len();
    assert!(under_way <= 16 && world.supervisor.queues.waiting(Role::Mountd) <= 1, "{under_way}");
    for _ in 0..under_way {
        world.done(Role::Mountd);
    }
    assert_eq!(world.asked(Role::Mountd), ["online"], "the last of them is not forgotten");
}

#[test]
fn containers_that_end_while_netd_hangs_leave_one_list_of_ports() {
    let mut world = network::pod();
    for at in 0..100_u16 {
        let ports = format!(r#"[{{"hostPort":{},"containerPort":80}}]"#, 1000 + at);
        network::with_ports(&mut world, &format!("c{at}"), 1 + 2 * u64::from(at), &ports);
        world.done(Role::Mountd);
        world.done(Role::Netd);
        world.started(Pid(100 + i32::from(at)));
    }
    for pid in 100..200 {
        world.exits(Pid(pid), 0);
    }
    let under_way = world.asked(Role::Netd).len();
    assert!(under_way <= 16 && world.supervisor.queues.waiting(Role::Netd) <= 1, "{under_way}");
    for _ in 0..under_way {
        world.done(Role::Netd);
    }
    assert_eq!(world.asked(Role::Netd), ["let in"], "and it is the last one: nothing is open");
}

#[test]
fn what_a_helper_says_of_a_failure_is_short() {
    let mut world = World::with_pod();
    world.tell(Message::SetupRoute, r#"{"routes":[]}"#);
    let (id, _) = world.take(Role::Netd);
    let long = Fault { why: "x".repeat(1 << 20), ..failure(Role::Netd) };
    world.reply(Role::Netd, id, Err(long));
    let said = world.said().join("");
    assert!(said.starts_with("ERROR netd: ") && said.len() < 2 * PART_MAX, "{}", said.len());
}

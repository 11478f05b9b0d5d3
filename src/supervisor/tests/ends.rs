//! The ends of processes, containers, the pod and the guest.

use super::*;

#[test]
fn the_event_follows_the_output() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.started(Pid(101));
    world.said();
    world.exits(Pid(101), 42);
    assert_eq!(world.asked(Role::Streamd), ["finish 3"]);
    assert!(world.said().is_empty());
    world.done(Role::Streamd);
    assert_eq!(world.said(), [event("c", "p", 42)]);
    assert!(world.asked(Role::Execd).is_empty(), "execd is told with the next start");
    world.exec("c", "p", 3);
    assert_eq!(
        world.asked(Role::Execd),
        [format!("start c p, {:?} finished", [StreamId::new(3).unwrap()])],
        "id and stream are free"
    );
}

/// When runV's client is told of the end, it throws away the output that its readers have not read.
#[test]
fn only_a_host_that_reads_on_behind_an_end_hears_of_it_without_a_pause() {
    let mut world = World::with_container();
    let pauses = |world: &mut World| {
        world.exec("c", "p", 3);
        world.started(Pid(101));
        world.exits(Pid(101), 0);
        let Some((_, Request::Streamd(streamd::Request::Finish { pause, .. }))) = world.asked.last() else {
            panic!("{:?}", world.asked)
        };
        let pause = *pause;
        world.done(Role::Streamd);
        pause
    };
    assert!(pauses(&mut world), "a host that has said nothing of itself");
    world.tell(Message::GetVersion, "null");
    assert!(pauses(&mut world), "runV asks for the version");
    world.said();
    world.tell(Message::GetVersion, r#"{"features":true}"#);
    let said = world.said().join("");
    assert!(said.ends_with(r#""features":["prompt-events"]}"#), "{said}");
    assert!(!pauses(&mut world));
    world.feed(Event::HostLeft);
    assert!(pauses(&mut world), "the next host may be runV");
    world.tell(Message::GetVersion, r#"{"features":true}"#);
    assert!(!pauses(&mut world));
    world.feed(Event::HostConnected);
    assert!(pauses(&mut world), "another connection is another host's");
}

#[test]
fn execd_hears_of_ends_though_nothing_is_started() {
    let mut world = World::with_container();
    let ids = |numbers: &[u64]| numbers.iter().filter_map(|&id| StreamId::new(id)).collect::<Vec<_>>();
    for round in 0..2 {
        world.exec("c", "p", 3);
        world.started(Pid(101));
        world.exits(Pid(101), 0);
        world.done(Role::Streamd);
        world.wait();
        assert_eq!(world.asked(Role::Execd), [format!("release {:?}", ids(&[3]))], "round {round}");
        world.done(Role::Execd);
        assert_eq!(world.supervisor.next_deadline(), None);
    }
    for number in 0..16 {
        world.exec("c", &format!("p{number}"), 3 + 2 * number);
    }
    for number in 0..16 {
        world.started(Pid(200 + number));
    }
    for number in 0..16 {
        world.exits(Pid(200 + number), 0);
        world.done(Role::Streamd);
    }
    assert_eq!(world.asked(Role::Execd).len(), 1, "sixteen are enough to be told at once");
}

/// Each release makes execd walk over all the duplicates that it keeps.
#[test]
fn execd_hears_of_many_ends_now_and_then() {
    let mut world = World::with_container();
    for number in 0..1000 {
        world.exec("c", &format!("p{number}"), 3 + 2 * number);
        world.started(Pid(200 + i32::try_from(number).unwrap()));
    }
    for number in 0..1000 {
        world.exits(Pid(200 + number), 0);
        world.done(Role::Streamd);
    }
    let released = world.asked.iter().filter_map(|(_, ask)| match ask {
        Request::Execd(execd::Request::Release { finished }) => Some(finished.len()),
        _ => None,
    });
    let released: Vec<usize> = released.collect();
    assert!(released.iter().sum::<usize>() > 980 && released.len() < 8, "{released:?}");
    assert!(released.iter().all(|&count| count <= 512), "they travel in one message: {released:?}");
}

#[test]
fn an_end_that_comes_before_its_start_is_not_lost() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.exits(Pid(101), 9);
    world.started(Pid(101));
    assert_eq!(world.said(), ["ACK "]);
    world.done(Role::Streamd);
    assert_eq!(world.said(), [event("c", "p", 9)]);
}

#[test]
fn a_stranger_that_exits_is_nobodys() {
    let mut world = World::with_container();
    world.exits(Pid(4711), 1);
    world.exec("c", "p", 3);
    world.feed(Event::Reported { pid: Pid(4711) });
    world.started(Pid(4711));
    assert!(world.asked(Role::Streamd).is_empty(), "that number was another process's");
    assert_eq!(world.said(), ["ACK "]);
}

#[test]
fn an_id_with_a_quote_is_escaped() {
    let mut world = World::with_container();
    world.exec("c", "say \\\"hi\\\"", 3);
    world.started(Pid(101));
    world.exits(Pid(101), 0);
    world.said();
    world.done(Role::Streamd);
    assert_eq!(world.said(), [event("c", "say \\\"hi\\\"", 0)]);
}

#[test]
fn the_end_of_its_init_is_the_end_of_a_container() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.started(Pid(101));
    world.exec("c", "late", 5);
    world.said();
    world.exits(Pid(100), 7);
    assert_eq!(world.asked(Role::Mountd), ["kill c"]);
    world.exec("c", "too late", 7);
    world.done(Role::Mountd);
    assert_eq!(world.did(), [kill(101, Signal::KILL, false)], "mountd is not the only one who kills");
    world.started(Pid(102));
    assert_eq!(world.did(), [kill(102, Signal::KILL, false)], "started while the others were killed");
    world.exits(Pid(101), 137);
    world.exits(Pid(102), 137);
    assert_eq!(world.asked(Role::Streamd), ["finish 3", "finish 5"]);
    world.done(Role::Streamd);
    assert!(world.asked(Role::Streamd) == ["finish 5"] && world.asked(Role::Mountd).is_empty());
    world.done(Role::Streamd);
    assert_eq!(world.asked(Role::Streamd), ["finish 1"]);
    world.done(Role::Streamd);
    assert_eq!(world.asked(Role::Mountd), ["remove c"]);
    let said = world.said();
    assert_eq!(said[..1], ["ACK "]);
    assert!(said[1].ends_with("the container does not run"));
    assert_eq!(said[2..], [event("c", "p", 137), event("c", "late", 137)]);
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "init", 7)], "the host may have its disk back now");
    world.new_container("c", 1);
    assert_eq!(world.asked(Role::Mountd), ["prepare c"], "its id may be used again");
}

#[test]
fn a_start_that_fails_late_does_not_hold_up_its_containers_end() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.exits(Pid(100), 0);
    world.done(Role::Mountd);
    assert!(world.asked(Role::Streamd).is_empty());
    world.fails(Role::Execd);
    assert_eq!(world.asked(Role::Streamd), ["finish 1"]);
}

#[test]
fn signals_reach_only_who_runs() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.started(Pid(101));
    world.exits(Pid(101), 0);
    world.said();
    for json in
        [r#"{"container":"c","process":"p","signal":9}"#, r#"{"container":"c","process":"q","signal":9}"#]
    {
        world.tell(Message::SignalProcess, json);
        assert!(world.said().join("").ends_with("no such process"));
    }
    world.exits(Pid(100), 0);
    world.tell(Message::KillContainer, r#"{"container":"c","signal":9}"#);
    assert!(world.said().join("").ends_with("no such process"));
    assert!(world.did().is_empty());
}

/// Carries out the guest's end for a pod whose containers have no running processes any more.
fn guest_ends(world: &mut World) {
    assert_eq!(world.asked(Role::Mountd), ["destroy pod"]);
    world.done(Role::Mountd);
    no_pod_guest_ends(world);
}

fn no_pod_guest_ends(world: &mut World) {
    assert_eq!(world.asked(Role::Streamd), ["flush"]);
    world.said();
    world.done(Role::Streamd);
    assert_eq!(world.said().last().map(String::as_str), Some("ACK "));
    assert!(world.did().is_empty());
    power_goes_off(world);
}

/// The last frame has left, and mountd has synced: the power goes off.
fn power_goes_off(world: &mut World) {
    world.feed(Event::ControlDrained);
    assert_eq!(world.asked(Role::Mountd), ["sync"]);
    assert!(world.did().is_empty());
    world.done(Role::Mountd);
    assert_eq!(world.did(), [Action::PowerOff]);
}

#[test]
fn a_disk_that_hangs_does_not_keep_the_power_on() {
    let mut world = World::new();
    world.tell(Message::DestroyPod, "null");
    world.done(Role::Streamd);
    assert_eq!(world.said(), ["ACK "]);
    world.feed(Event::ControlDrained);
    assert_eq!(world.asked(Role::Mountd), ["sync"]);
    world.feed(Event::ControlDrained);
    world.tell(Message::DestroyPod, "null");
    assert_eq!(world.said(), ["ACK "], "it has been carried out");
    assert_eq!(world.asked(Role::Mountd), ["sync"], "once");
    world.did();
    let asked = world.now;
    world.now += Duration::from_secs(9);
    world.feed(Event::Tick);
    assert!(world.did().is_empty());
    world.wait();
    assert_eq!(world.now - asked, Duration::from_secs(10));
    assert_eq!(world.did(), [Action::PowerOff]);
}

#[test]
fn a_mountd_that_cannot_be_had_does_not_keep_the_power_on() {
    let mut world = World::new();
    world.tell(Message::DestroyPod, "null");
    world.done(Role::Streamd);
    for mountd in Instance::all().filter(|helper| helper.role() == Role::Mountd) {
        world.feed(Event::HelperClosed(mountd));
    }
    world.did();
    world.feed(Event::ControlDrained);
    assert_eq!(world.did(), [Action::PowerOff]);
}

#[test]
fn destroypod_without_a_pod() {
    let mut world = World::new();
    world.tell(Message::DestroyPod, "null");
    no_pod_guest_ends(&mut world);
}

#[test]
fn destroypod_asks_then_kills_then_tidies_up() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.started(Pid(101));
    world.said();
    world.tell(Message::DestroyPod, "null");
    assert_eq!(world.did(), [kill(100, Signal::TERM, true), kill(101, Signal::TERM, true)]);
    world.tell(Message::Ping, "null");
    world.exec("c", "q", 5);
    world.tell(Message::DestroyPod, "null");
    assert!(world.said().is_empty(), "nothing leaves before the ACK of DESTROYPOD");
    world.exits(Pid(101), 0);
    world.done(Role::Streamd);
    assert_eq!(world.said(), [event("c", "p", 0)]);
    world.wait();
    world.wait();
    assert_eq!(world.did(), [kill(100, Signal::KILL, true)], "the grace is over");
    world.exits(Pid(100), 137);
    world.done(Role::Mountd);
    world.done(Role::Streamd);
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "init", 137)]);
    assert_eq!(world.did(), [kill(POD_INIT.0, Signal::KILL, false)]);
    world.exits(POD_INIT, 137);
    guest_ends(&mut world);
}

#[test]
fn destroypod_while_the_pod_starts() {
    for step in 0..4 {
        let mut world = World::new();
        world.tell(Message::StartPod, r#"{"hostname":"pod"}"#);
        let roles = [Role::Netd, Role::Mountd, Role::Execd, Role::Execd];
        for (at, role) in roles.into_iter().enumerate().take(step + 1) {
            if at == step {
                world.tell(Message::DestroyPod, "null");
                assert!(world.did().is_empty(), "step {step}: what is under way ends first");
            }
            if at == 2 { world.started(POD_INIT) } else { world.done(role) }
        }
        if step >= 2 {
            assert_eq!(world.did(), [kill(POD_INIT.0, Signal::KILL, false)], "step {step}");
            world.exits(POD_INIT, 137);
        }
        guest_ends(&mut world);
    }
}

#[test]
fn destroypod_while_a_container_starts() {
    let mut world = World::with_pod();
    world.new_container("c", 1);
    world.new_container("d", 3);
    world.exec("c", "p", 5);
    world.tell(Message::DestroyPod, "null");
    world.done(Role::Mountd);
    world.done(Role::Mountd);
    assert!(world.asked(Role::Execd).is_empty(), "nothing is started any more");
    for _ in 0..4 {
        world.done(Role::Mountd);
    }
    let said = world.said();
    assert!(said.len() == 3 && said.iter().all(|text| text.starts_with("ERROR")), "{said:?}");
    assert_eq!(world.did(), [kill(POD_INIT.0, Signal::KILL, false)]);
    world.exits(POD_INIT, 137);
    guest_ends(&mut world);
}

#[test]
fn destroypod_kills_what_was_started_meanwhile() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.tell(Message::DestroyPod, "null");
    world.did();
    world.released.clear();
    world.started(Pid(101));
    assert_eq!(world.did(), [kill(101, Signal::KILL, false)]);
    assert!(world.released.is_empty(), "and never executes");
}

#[test]
fn destroypod_waits_for_output_that_moves() {
    let mut world = World::with_container();
    for number in 0..8 {
        world.exec("c", &format!("e{number}"), 11 + 2 * number);
        world.started(Pid(200 + number as i32));
    }
    world.said();
    world.tell(Message::DestroyPod, "null");
    for number in 0..8 {
        world.exits(Pid(200 + number), 0);
    }
    world.now += GRACE;
    world.feed(Event::Tick);
    for number in 0..3 {
        // If the host read nothing, its output would be given up after two of these waits.
        world.now += Duration::from_millis(1000);
        world.feed(Event::Tick);
        world.done(Role::Streamd);
        assert_eq!(world.said(), [event("c", &format!("e{number}"), 0)]);
    }
    world.wait();
    assert_eq!(world.said().len(), 5, "but not for as long as the host likes");
    assert!(world.now < Duration::from_secs(1008));
}

#[test]
fn destroypod_gives_output_up_that_nobody_reads() {
    let mut world = World::with_container();
    world.tell(Message::DestroyPod, "null");
    world.exits(Pid(100), 0);
    world.done(Role::Mountd);
    world.wait();
    world.wait();
    assert_eq!(world.asked(Role::Mountd), ["remove c"]);
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "init", 0)]);
    world.exits(POD_INIT, 137);
    world.done(Role::Mountd);
    assert_eq!(world.asked(Role::Streamd), ["finish 1", "flush"]);
    world.wait();
    world.wait();
    assert_eq!(world.said(), ["ACK "], "in less than the ten seconds that runV waits");
    assert!(world.now < Duration::from_secs(1010));
    world.did();
    world.wait();
    assert_eq!(world.asked(Role::Mountd), ["sync"], "also if the host does not take the last frame");
    world.done(Role::Mountd);
    assert_eq!(world.did(), [Action::PowerOff]);
}

/// This holds whatever the process is called, and however late its exit is handled.
#[test]
fn destroypod_has_time_for_the_files_of_who_is_given_up() {
    for (process, late) in [("a", false), ("z", false), ("z", true)] {
        let mut world = World::with_container();
        world.exec("c", process, 3);
        world.started(Pid(101));
        world.said();
        world.tell(Message::DestroyPod, "null");
        world.exits(Pid(100), 0);
        world.exits(Pid(101), 0);
        if !late {
            world.done(Role::Mountd);
        }
        world.wait();
        world.wait();
        if late {
            world.done(Role::Mountd);
        }
        assert_eq!(world.asked(Role::Mountd), ["remove c"], "{process}");
        world.done(Role::Mountd);
        assert_eq!(world.said(), [event("c", process, 0), event("c", "init", 0)]);
        world.exits(POD_INIT, 137);
        assert_eq!(world.asked(Role::Mountd), ["destroy pod"]);
    }
}

#[test]
fn destroypod_does_not_wait_for_a_helper_that_hangs() {
    let mut world = World::with_container();
    world.new_container("slow", 3);
    world.tell(Message::DestroyPod, "null");
    for _ in 0..3 {
        world.wait();
    }
    assert!(world.now < Duration::from_secs(1010));
    let said = world.said();
    assert!(said[0].contains("the guest is going down") && said[1] == "ACK ", "{said:?}");
}

#[test]
fn a_dead_pod_init_ends_the_pod_in_order() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.started(Pid(101));
    world.said();
    world.exits(POD_INIT, 137);
    world.tell(Message::ExecCmd, r#"{"container":"c","process":{"args":["a"],"stdio":9,"stderr":10}}"#);
    assert!(world.said().join("").ends_with("the pod is ending"));
    world.exits(Pid(101), 137);
    world.exits(Pid(100), 137);
    world.done(Role::Mountd);
    world.done(Role::Streamd);
    world.done(Role::Streamd);
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "p", 137), event("c", "init", 137)]);
    assert_eq!(world.asked(Role::Mountd), ["destroy pod"]);
    world.done(Role::Mountd);
    world.tell(Message::StartPod, "{}");
    assert_eq!(world.asked(Role::Netd), ["up lo"], "the guest goes on");
}

/// A pod whose init is gone, and whose only container `c` still has to be cleaned up.
fn dying_pod() -> World {
    let mut world = World::with_container();
    world.exits(POD_INIT, 137);
    world.exits(Pid(100), 137);
    world.done(Role::Mountd);
    world.done(Role::Streamd);
    assert_eq!(world.asked(Role::Mountd), ["remove c"]);
    world
}

#[test]
fn what_follows_a_startpod_that_waits_for_the_last_pods_end_waits_too() {
    let mut world = dying_pod();
    world.exec("c", "early", 5);
    assert!(world.said().join("").ends_with("the pod is ending"), "it is of the pod that ends");
    world.tell(Message::StartPod, r#"{"hostname":"next"}"#);
    world.new_container("c", 7);
    world.exec("c", "p", 9);
    assert_eq!(world.said(), [""; 0]);
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "init", 137)]);
    world.done(Role::Mountd);
    world.pod_starts();
    assert_eq!(world.said(), ["ACK "]);
    assert_eq!(world.asked(Role::Mountd), ["prepare c"]);
    world.done(Role::Mountd);
    world.started(Pid(200));
    world.started(Pid(201));
    assert_eq!(world.said(), ["ACK ", "ACK "]);
}

#[test]
fn what_is_said_of_the_containers_that_a_waiting_startpod_brings_waits_for_them() {
    let mut world = dying_pod();
    world.tell(
        Message::StartPod,
        r#"{"containers":[{"id":"c","process":{"args":["a"],"stdio":7,"stderr":8}}]}"#,
    );
    world.tell(Message::KillContainer, r#"{"container":"c","signal":9}"#);
    world.tell(Message::RemoveContainer, r#"{"container":"c"}"#);
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "init", 137)]);
    world.done(Role::Mountd);
    world.pod_starts();
    world.done(Role::Mountd);
    world.started(Pid(200));
    let said = world.said();
    assert_eq!(said[..2], ["ACK ", "ACK "]);
    assert!(said.len() == 3 && said[2].ends_with("removing container c: it runs"), "{said:?}");
    assert_eq!(world.did(), [kill(200, Signal::KILL, false)]);
}

#[test]
fn destroypod_ends_what_waits_for_the_last_pods_end() {
    let mut world = dying_pod();
    world.tell(Message::StartPod, "{}");
    world.new_container("d", 7);
    world.tell(Message::DestroyPod, "null");
    let said = world.said();
    assert!(said.len() == 2 && said.iter().all(|said| said.ends_with("the guest is going down")), "{said:?}");
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "init", 137)]);
    world.done(Role::Mountd);
    no_pod_guest_ends(&mut world);
}

/// Found by fuzzing: the second DESTROYPOD had no reply.
#[test]
fn a_destroypod_behind_the_last_ack_has_its_own() {
    let mut world = World::new();
    world.tell(Message::DestroyPod, "null");
    world.done(Role::Streamd);
    assert_eq!(world.said(), ["ACK "]);
    world.tell(Message::DestroyPod, "null");
    assert_eq!(world.said(), ["ACK "]);
    power_goes_off(&mut world);
}

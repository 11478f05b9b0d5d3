//! The commands: which are legal in which state, the order of replies, and the undoing of faults.

use super::*;

#[test]
fn what_needs_no_pod() {
    let mut world = World::new();
    world.tell(Message::GetVersion, "null");
    assert_eq!(world.said, [(Message::Ack, "\0\0\u{10}\u{fffd}".to_owned())]);
    world.said.clear();
    world.tell(Message::Ping, "null");
    world.tell(Message::Ready, "null");
    assert_eq!(
        (world.said(), world.asked(Role::Mountd)),
        (vec!["ACK ".to_owned()], vec!["rescan".to_owned()])
    );
    world.done(Role::Mountd);
    assert_eq!(world.said(), ["ACK "]);
    for (message, json, why) in [
        (
            Message::ExecCmd,
            r#"{"container":"c","process":{"args":["a"],"stdio":1,"stderr":2}}"#,
            "there is no pod",
        ),
        (Message::KillContainer, r#"{"container":"c","signal":9}"#, "no such container"),
        (Message::SignalProcess, r#"{"container":"c","process":"p","signal":9}"#, "no such container"),
        (Message::WinSize, r#"{"container":"c","process":"p","row":1,"column":1}"#, "no such container"),
        (Message::RemoveContainer, r#"{"container":"c"}"#, "no such container"),
        (
            Message::NewContainer,
            r#"{"id":"c","process":{"args":["a"],"stdio":1,"stderr":2}}"#,
            "there is no pod",
        ),
        (Message::ReadFile, r#"{"container":"c","file":"/f"}"#, "there is no pod"),
        (Message::Ack, "", "only the guest says that"),
    ] {
        world.tell(message, json);
        let said = world.said().join("");
        assert!(said.starts_with("ERROR ") && said.ends_with(why), "{message}: {said}");
    }
}

#[test]
fn what_was_plugged_is_looked_for_again_and_the_host_does_not_wait() {
    let mut world = World::new();
    world.tell(Message::OnlineCpuMem, "null");
    assert_eq!(
        (world.said(), world.asked(Role::Mountd)),
        (vec!["ACK ".to_owned()], vec!["online".to_owned()])
    );
    let began = world.now;
    world.fails(Role::Mountd);
    let mut looks = Vec::new();
    while world.supervisor.next_deadline().is_some() {
        world.wait();
        assert_eq!(world.asked(Role::Mountd), ["online"], "a look, whatever came of the one before");
        world.done(Role::Mountd);
        looks.push((world.now - began).as_millis());
    }
    assert_eq!(looks, [100, 500, 2000, 5000]);
    assert!(world.said().is_empty() && world.did().is_empty());
}

#[test]
fn what_is_the_machines_is_left_alone() {
    let mut supervisor = Supervisor::new(Config { local: true, ..config() });
    for (role, pid) in Role::ALL.into_iter().zip(10..) {
        supervisor.on_event(Duration::ZERO, Event::HelperUp { helper: Instance::first(role), pid: Pid(pid) });
    }
    for (message, json) in [(Message::OnlineCpuMem, "null"), (Message::StartPod, "{}")] {
        let command = parse(message.id(), json.as_bytes());
        let event = Event::Command { message: message.id(), size: json.len(), command };
        let actions = supervisor.on_event(Duration::ZERO, event);
        let asks_mountd =
            |action: &Action| matches!(action, Action::Ask { request, .. } if request.role() == Role::Mountd);
        assert!(!actions.is_empty() && !actions.iter().any(asks_mountd), "{actions:?}");
    }
}

#[test]
fn a_pod_starts_step_by_step() {
    let mut world = World::new();
    world.tell(Message::StartPod, r#"{"hostname":"pod","shareDir":"tag","dns":["1.1.1.1"]}"#);
    assert_eq!((world.asked(Role::Netd), world.woken), (vec!["up lo".to_owned()], 1));
    world.done(Role::Netd);
    let Some((_, Request::Mountd(mountd::Request::PreparePod { pod: files }))) = world.asked.first().cloned()
    else {
        panic!("{:?}", world.asked)
    };
    assert_eq!(
        files.share,
        Some(mountd::Share::NineP {
            tag: "tag".to_owned(),
            transport: NinePTransport::Virtio,
            cache: ShareCache::Coherent
        })
    );
    assert_eq!((files.hostname.as_str(), files.dns), ("pod", vec!["1.1.1.1".to_owned()]));
    world.done(Role::Mountd);
    assert_eq!(world.asked(Role::Execd), ["start pod pod"]);
    assert!(world.released.is_empty());
    world.started(POD_INIT);
    assert_eq!(world.released, [POD_INIT]);
    assert_eq!(world.asked(Role::Execd), ["join"]);
    assert!(world.said().is_empty());
    world.done(Role::Execd);
    assert_eq!(world.said(), ["ACK "]);
}

#[test]
fn a_pods_name_has_its_first_address() {
    let address = |interfaces: &str| {
        let mut world = World::new();
        world.tell(Message::StartPod, &format!(r#"{{"hostname":"pod","interfaces":{interfaces}}}"#));
        for _ in 0..8 {
            if let Some(files) = world.asked.iter().find_map(|(_, ask)| match ask {
                Request::Mountd(mountd::Request::PreparePod { pod: files }) => Some(files.clone()),
                _ => None,
            }) {
                return files.address.map(|address| address.to_string());
            }
            world.done(if world.asked(Role::Mountd).is_empty() { Role::Netd } else { Role::Mountd });
        }
        panic!("{:?}", world.asked)
    };
    assert_eq!(address("[]"), None);
    let old = r#"[{"device":"eth0","ipAddress":"192.0.2.7","netMask":"24"}]"#;
    assert_eq!(address(old).as_deref(), Some("192.0.2.7"));
    let list = r#"[{"device":"eth0","ipAddress":"192.0.2.1","ipAddresses":[{"ipAddress":"-192.0.2.2"}]},
        {"device":"eth1","ipAddresses":[{"ipAddress":"2001:db8::7","netMask":"64"},{"ipAddress":"192.0.2.7"}]}]"#;
    assert_eq!(address(list).as_deref(), Some("2001:db8::7"));
}

#[test]
fn a_second_pod_is_refused_and_the_first_untouched() {
    let mut world = World::with_container();
    world.tell(Message::StartPod, r#"{"hostname":"other"}"#);
    assert!(world.said().join("").ends_with("it runs already"));
    assert!(world.asked.is_empty() && world.did().is_empty());
    world.exec("c", "p", 3);
    assert_eq!(world.asked(Role::Execd), ["start c p"]);
}

#[test]
fn a_second_pod_waits_for_what_becomes_of_the_first() {
    let mut world = World::new();
    world.tell(Message::StartPod, r#"{"hostname":"a"}"#);
    world.tell(Message::StartPod, r#"{"hostname":"b"}"#);
    world.fails(Role::Netd);
    assert_eq!(world.asked(Role::Mountd), ["destroy pod"]);
    world.done(Role::Mountd);
    assert_eq!(world.said(), ["ERROR netd: doing it: no"]);
    assert_eq!(world.asked(Role::Netd), ["up lo"], "the second one begins");
}

/// Starts a pod and answers STARTPOD's first `steps` requests, so that the next one is under way.
fn starting(steps: usize) -> (World, Role) {
    let mut world = World::new();
    world.tell(Message::StartPod, r#"{"hostname":"pod"}"#);
    let roles = [Role::Netd, Role::Mountd, Role::Execd, Role::Execd];
    for (at, role) in roles.into_iter().enumerate() {
        if at == steps {
            return (world, role);
        }
        if at == 2 { world.started(POD_INIT) } else { world.done(role) }
    }
    unreachable!("there are four steps")
}

/// Checks that a failed STARTPOD is undone, whatever step it had reached.
fn is_undone(world: &mut World, has_init: bool) {
    if has_init {
        assert_eq!(world.did(), [kill(POD_INIT.0, Signal::KILL, false)]);
        world.exits(POD_INIT, 137);
    }
    assert_eq!(world.asked(Role::Mountd), ["destroy pod"]);
    assert!(world.said().is_empty(), "the reply comes when everything is undone");
    world.done(Role::Mountd);
    assert!(world.did().is_empty());
}

#[test]
fn a_pod_that_cannot_start_is_undone_whatever_the_step() {
    for step in 0..4 {
        let (mut world, role) = starting(step);
        world.fails(role);
        is_undone(&mut world, step > 2);
        assert_eq!(world.said(), [format!("ERROR {role}: doing it: no")], "step {step}");
        world.tell(Message::StartPod, "{}");
        assert_eq!(world.asked(Role::Netd), ["up lo"], "step {step}: another one may start");
    }
}

#[test]
fn a_helper_that_dies_over_a_pods_start_undoes_it() {
    for step in 0..3 {
        let (mut world, role) = starting(step);
        world.dies(role);
        if role == Role::Mountd {
            assert!(world.asked.is_empty());
            world.comes_up(role, 70);
        }
        is_undone(&mut world, step > 2);
        assert!(world.said().join("").ends_with("it died before it answered"), "step {step}");
    }
}

#[test]
fn a_pod_init_that_dies_in_the_middle_undoes_the_pod() {
    let (mut world, role) = starting(3);
    world.exits(POD_INIT, 1);
    assert!(world.did().is_empty());
    world.done(role);
    is_undone(&mut world, false);
    assert!(world.said().join("").ends_with("the pod init died"));
    // The exit comes before execd's reply.
    let (mut world, _) = starting(2);
    world.exits(POD_INIT, 1);
    world.started(POD_INIT);
    is_undone(&mut world, false);
}

#[test]
fn a_container_starts_step_by_step() {
    let mut world = World::with_pod();
    world.new_container("c", 1);
    assert_eq!(world.asked(Role::Mountd), ["prepare c"]);
    world.done(Role::Mountd);
    assert_eq!(world.asked(Role::Execd), ["start c init as init"]);
    assert!(world.said().is_empty());
    world.released.clear();
    world.started(Pid(100));
    assert_eq!((world.said(), world.released), (vec!["ACK ".to_owned()], vec![Pid(100)]));
}

#[test]
fn a_container_that_cannot_start_is_undone() {
    let mut world = World::with_pod();
    world.new_container("c", 1);
    world.fails(Role::Mountd);
    assert_eq!(world.asked(Role::Mountd), ["kill c", "remove c"]);
    world.done(Role::Mountd);
    assert!(world.said().is_empty());
    world.done(Role::Mountd);
    assert_eq!(world.said(), ["ERROR mountd: doing it: no"]);
    world.new_container("c", 1);
    world.done(Role::Mountd);
    world.fails(Role::Execd);
    world.done(Role::Mountd);
    world.fails(Role::Mountd);
    assert_eq!(world.said(), ["ERROR execd: doing it: no"], "the first fault is the answer");
    world.new_container("c", 1);
    assert_eq!(world.asked(Role::Mountd), ["prepare c"], "id and streams are free again");
}

/// A guest whose container `c` has exited, with no request to execd under way.
fn exited() -> World {
    let mut world = World::with_container();
    world.exits(Pid(100), 0);
    world.done(Role::Mountd);
    world.done(Role::Streamd);
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "init", 0)]);
    world.asked.clear();
    world
}

#[test]
fn what_has_exited_stays_known_when_its_id_cannot_be_used_again() {
    for from in [Role::Mountd, Role::Execd] {
        let mut world = exited();
        for _ in 0..2 {
            world.new_container("c", 1);
            if from == Role::Execd {
                world.done(Role::Mountd);
            }
            world.fails(from);
            world.tell(Message::KillContainer, r#"{"container":"c","signal":9}"#);
            world.done(Role::Mountd);
            world.done(Role::Mountd);
            let said = world.said();
            assert!(said.len() == 2 && said[1].ends_with("c: init: no such process"), "{said:?}");
            world.exec("c", "p", 3);
            assert!(world.said().join("").ends_with("the container does not run"));
        }
        world.tell(Message::RemoveContainer, r#"{"container":"c"}"#);
        assert_eq!(world.said(), ["ACK "], "it has exited, and nobody has removed it");
        world.new_container("c", 1);
        world.fails(Role::Mountd);
        world.done(Role::Mountd);
        world.tell(Message::RemoveContainer, r#"{"container":"c"}"#);
        world.done(Role::Mountd);
        assert!(world.said().join("").ends_with("no such container"), "it has been removed");
    }
}

#[test]
fn a_disk_that_is_not_there_yet_is_asked_for_again_and_holds_up_nobody() {
    let mut world = World::with_container();
    let not_yet = |world: &mut World| {
        let (id, ask) = world.take(Role::Mountd);
        assert_eq!(short(&ask), "prepare d");
        let reply = mountd::Reply::NotYet { fault: failure(Role::Mountd) };
        world.reply(Role::Mountd, id, Ok(Reply::Mountd(reply)));
    };
    world.new_container("d", 3);
    world.exits(Pid(100), 0);
    not_yet(&mut world);
    assert_eq!(world.asked(Role::Mountd), ["kill c"], "others come first");
    world.done(Role::Mountd);
    world.now += Duration::from_millis(1999);
    not_yet(&mut world);
    assert!(world.said().is_empty());
    world.now += Duration::from_millis(1);
    not_yet(&mut world);
    assert_eq!(world.asked(Role::Mountd), ["kill d", "remove d"]);
    world.done(Role::Mountd);
    world.done(Role::Mountd);
    assert_eq!(world.said(), ["ERROR mountd: doing it: no"], "after the time that it had");
    world.new_container("d", 3);
    not_yet(&mut world);
    world.done(Role::Mountd);
    world.started(Pid(101));
    assert_eq!(world.said(), ["ACK "], "it came");
}

#[test]
fn a_duplicate_leaves_the_live_one_untouched() {
    let mut world = World::with_container();
    world.new_container("c", 3);
    assert!(world.said().join("").ends_with("it exists"));
    world.new_container("d", 2);
    assert!(world.said().join("").ends_with("stream 2 belongs to another process"));
    world.exec("c", "init", 3);
    assert!(world.said().join("").ends_with("process init exists"));
    world.exec("c", "p", 3);
    world.exec("c", "q", 4);
    assert!(world.asked == [world.asked[0].clone()] && world.did().is_empty());
    world.started(Pid(101));
    assert_eq!(world.said().len(), 2, "one started, one refused for its stream");
}

#[test]
fn words_that_make_no_sense_are_refused() {
    let mut world = World::with_container();
    for (process, why) in [
        (r#"{"id":"p","args":[],"stdio":3,"stderr":4}"#, "args"),
        (r#"{"id":"p","args":["a"],"stdio":0,"stderr":4}"#, "stdio"),
        (r#"{"id":"p","args":["a"],"stdio":3}"#, "stderr"),
        (r#"{"id":"p","args":["a"],"stdio":3,"stderr":3,"terminal":true}"#, "stderr"),
        (
            r#"{"id":"p","args":["a"],"stdio":3,"stderr":4,"rlimits":[{"type":"FILES","hard":1,"soft":1}]}"#,
            "rlimits",
        ),
    ] {
        world.tell(Message::ExecCmd, &format!(r#"{{"container":"c","process":{process}}}"#));
        let said = world.said().join("");
        assert!(said.starts_with("ERROR") && said.contains(why), "{said}");
    }
    assert!(world.asked.is_empty());
}

#[test]
fn replies_leave_in_order_while_work_overlaps() {
    let mut world = World::with_container();
    world.new_container("slow", 3);
    world.exec("c", "p", 5);
    world.tell(Message::Ping, "null");
    world.started(Pid(101));
    assert!(world.said().is_empty(), "the oldest command has no answer yet");
    world.fails(Role::Mountd);
    world.done(Role::Mountd);
    world.done(Role::Mountd);
    assert_eq!(world.said(), ["ERROR mountd: doing it: no", "ACK ", "ACK "]);
}

#[test]
fn a_kill_takes_effect_at_once_and_its_reply_waits() {
    let mut world = World::with_container();
    world.new_container("slow", 3);
    world.tell(Message::KillContainer, r#"{"container":"c","signal":9}"#);
    assert_eq!(world.did(), [kill(100, Signal::KILL, false)]);
    assert!(world.said().is_empty());
    world.done(Role::Mountd);
    world.started(Pid(101));
    assert_eq!(world.said(), ["ACK ", "ACK "]);
}

#[test]
fn what_is_said_of_something_that_starts_waits_for_it() {
    let mut world = World::new();
    world.tell(Message::StartPod, "{}");
    world.new_container("c", 1);
    world.exec("c", "p", 3);
    world.tell(Message::SignalProcess, r#"{"container":"c","process":"p","signal":10}"#);
    world.tell(Message::KillContainer, r#"{"container":"c","signal":15}"#);
    world.done(Role::Netd);
    world.done(Role::Mountd);
    world.started(POD_INIT);
    world.done(Role::Execd);
    world.done(Role::Mountd);
    assert!(world.did().is_empty());
    world.started(Pid(100));
    assert_eq!(world.did(), [kill(100, Signal::TERM, false)]);
    world.started(Pid(101));
    let usr1 = Signal::try_from(10).unwrap();
    assert_eq!(world.did(), [kill(101, usr1, true)]);
    assert_eq!(world.said(), ["ACK "; 5]);
}

#[test]
fn what_is_said_of_a_container_that_waits_for_its_id_waits_with_it() {
    let mut world = World::with_container();
    world.exits(Pid(100), 0);
    world.new_container("c", 3);
    world.tell(Message::KillContainer, r#"{"container":"c","signal":9}"#);
    world.done(Role::Mountd);
    world.done(Role::Streamd);
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "init", 0)]);
    world.done(Role::Mountd);
    world.started(Pid(101));
    assert_eq!(world.did(), [kill(101, Signal::KILL, false)]);
    assert_eq!(world.said(), ["ACK ", "ACK "]);
}

#[test]
fn what_waited_for_something_that_failed_fails_too() {
    let mut world = World::with_pod();
    world.new_container("c", 1);
    world.exec("c", "p", 3);
    world.tell(Message::KillContainer, r#"{"container":"c","signal":9}"#);
    world.new_container("c", 5);
    world.fails(Role::Mountd);
    world.done(Role::Mountd);
    world.done(Role::Mountd);
    let said = world.said();
    assert_eq!(said.len(), 3, "{said:?}");
    assert!(said[1].ends_with("no such container") && said[2].ends_with("no such container"), "{said:?}");
    assert_eq!(world.asked(Role::Mountd), ["prepare c"], "the second of that id begins");
}

#[test]
fn winsize_is_for_terminals() {
    let mut world = World::with_container();
    world.tell(Message::WinSize, r#"{"container":"c","process":"init","row":1,"column":1}"#);
    assert!(world.said().join("").ends_with("the process has no terminal"));
    world.tell(
        Message::ExecCmd,
        r#"{"container":"c","process":{"id":"t","args":["a"],"stdio":3,"terminal":true}}"#,
    );
    world.started(Pid(101));
    world.tell(Message::WinSize, r#"{"container":"c","process":"t","row":24,"column":80}"#);
    assert_eq!(world.asked(Role::Execd), ["resize 3 24x80"]);
    world.fails(Role::Execd);
    assert_eq!(world.said(), ["ACK ", "ERROR execd: doing it: no"]);
}

/// A process may ask for the size of its terminal first of all.
#[test]
fn a_process_executes_when_its_terminal_has_the_size_that_was_sent_behind_its_start() {
    let size = |process: &str, row: u16| {
        format!(r#"{{"container":"c","process":"{process}","row":{row},"column":80}}"#)
    };
    let mut world = World::with_pod();
    world.released.clear();
    let json = r#"{"id":"c","process":{"args":["a"],"stdio":1,"terminal":true}}"#;
    world.tell(Message::NewContainer, json);
    world.tell(Message::WinSize, &size("init", 24));
    world.done(Role::Mountd);
    world.tell(Message::WinSize, &size("init", 25));
    world.exec("c", "p", 3);
    world.tell(Message::SignalProcess, r#"{"container":"c","process":"p","signal":9}"#);
    world.tell(Message::KillContainer, r#"{"container":"c","signal":15}"#);
    world.started(Pid(100));
    assert_eq!(world.asked(Role::Execd), ["resize 1 24x80", "resize 1 25x80"]);
    world.done(Role::Execd);
    assert_eq!(world.said(), ["ACK ", "ACK "]);
    world.tell(Message::WinSize, &size("init", 26));
    world.done(Role::Execd);
    assert_eq!(world.asked(Role::Execd), ["resize 1 26x80"], "one that came late is still in time");
    assert!(world.released.is_empty() && world.did().is_empty());
    // A WINSIZE that fails holds up no process.
    world.fails(Role::Execd);
    assert_eq!(world.released, [Pid(100)]);
    assert_eq!(world.did(), [kill(100, Signal::TERM, false)], "the signal comes behind it");
    assert_eq!(world.asked(Role::Execd), ["start c p"]);
    world.started(Pid(101));
    assert_eq!(world.released, [Pid(100), Pid(101)], "what has no size to wait for executes at once");
    assert_eq!(world.did(), [kill(101, Signal::KILL, true)]);
    assert_eq!(world.said(), ["ACK ", "ACK ", "ACK ", "ACK ", "ERROR execd: doing it: no"]);
}

#[test]
fn a_process_that_ends_before_it_executes_is_reported_and_never_released() {
    let mut world = World::with_container();
    world.released.clear();
    let exec = r#"{"container":"c","process":{"id":"t","args":["a"],"stdio":3,"terminal":true}}"#;
    world.tell(Message::ExecCmd, exec);
    world.tell(Message::WinSize, r#"{"container":"c","process":"t","row":24,"column":80}"#);
    world.started(Pid(101));
    world.exits(Pid(101), 137);
    assert_eq!(world.asked(Role::Streamd), ["finish 3"]);
    // If execd dies over the request, its successor gets it.
    world.dies(Role::Execd);
    world.comes_up(Role::Execd, 70);
    world.done(Role::Execd);
    assert_eq!(world.asked(Role::Execd), ["resize 3 24x80"]);
    world.done(Role::Execd);
    world.done(Role::Streamd);
    assert_eq!(world.said(), ["ACK ".to_owned(), "ACK ".to_owned(), event("c", "t", 137)]);
    assert!(world.released.is_empty());
}

#[test]
fn only_what_has_exited_is_removed() {
    let mut world = World::with_container();
    world.tell(Message::RemoveContainer, r#"{"container":"c"}"#);
    assert!(world.said().join("").ends_with("it runs"));
    world.exits(Pid(100), 0);
    world.tell(Message::RemoveContainer, r#"{"container":"c"}"#);
    world.done(Role::Mountd);
    world.done(Role::Streamd);
    assert!(world.said().is_empty(), "it is being cleaned up");
    world.done(Role::Mountd);
    assert_eq!(world.said(), [event("c", "init", 0), "ACK ".to_owned()]);
    world.tell(Message::RemoveContainer, r#"{"container":"c"}"#);
    assert!(world.said().join("").ends_with("no such container"));
}

#[test]
fn a_new_connection_gets_ready_and_no_old_reply() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.tell(Message::Ping, "null");
    world.feed(Event::HostConnected);
    assert_eq!(world.said(), ["READY "]);
    world.tell(Message::Ping, "null");
    assert_eq!(world.said(), ["ACK "]);
    world.started(Pid(101));
    assert!(world.said().is_empty());
    world.exits(Pid(101), 3);
    world.done(Role::Streamd);
    assert_eq!(world.said(), [event("c", "p", 3)], "but what happened is told");
}

#[test]
fn a_host_that_asks_too_much_waits() {
    let mut world = World::with_container();
    world.new_container("slow", 3);
    let mut count = 0;
    while world.supervisor.room() > 0 {
        world.tell(Message::Ping, "null");
        count += 1;
    }
    assert!(count > 100, "{count}");
    world.done(Role::Mountd);
    world.started(Pid(101));
    assert!(world.supervisor.room() > 0);
    assert_eq!(world.said().len(), count + 1);
}

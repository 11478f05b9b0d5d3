//! The debugging door: processes in the guest's own namespaces, as if it were a container `hyperstart`.

use super::*;

/// A guest without a pod, with a process `p` that was started through the door: pid 100, streams 1 and 2.
fn with_process() -> World {
    let mut world = World::with(true);
    world.exec("hyperstart", "p", 1);
    assert_eq!(world.asked(Role::Execd), ["start in the guest p"]);
    world.started(Pid(100));
    assert_eq!(world.said(), ["ACK "]);
    assert_eq!(world.released, [Pid(100)]);
    world
}

#[test]
fn it_is_closed_unless_it_was_opened() {
    let mut world = World::with_pod();
    for (message, json) in [
        (
            Message::ExecCmd,
            r#"{"container":"hyperstart","process":{"id":"p","args":["a"],"stdio":1,"stderr":2}}"#,
        ),
        (Message::SignalProcess, r#"{"container":"hyperstart","process":"p","signal":9}"#),
        (Message::WinSize, r#"{"container":"hyperstart","process":"p","row":1,"column":1}"#),
        (Message::KillContainer, r#"{"container":"hyperstart","signal":9}"#),
        (Message::RemoveContainer, r#"{"container":"hyperstart"}"#),
        (Message::ReadFile, r#"{"container":"hyperstart","file":"/f"}"#),
        (Message::WriteFile, r#"{"container":"hyperstart","file":"/f"}"#),
    ] {
        world.tell(message, json);
        let said = world.said().join("");
        assert!(said.starts_with("ERROR") && said.contains("it is closed"), "{message}: {said}");
    }
    assert!(world.asked.is_empty());
}

#[test]
fn it_needs_no_pod_and_its_processes_outlive_one() {
    let mut world = with_process();
    world.tell(Message::StartPod, "{}");
    world.pod_starts();
    assert_eq!(world.said(), ["ACK "]);
    world.exits(POD_INIT, 1);
    world.done(Role::Mountd);
    assert!(world.did().is_empty() && world.said().is_empty());
    world.tell(Message::SignalProcess, r#"{"container":"hyperstart","process":"p","signal":15}"#);
    assert_eq!(world.did(), [kill(100, Signal::TERM, true)]);
    world.exits(Pid(100), 143);
    world.done(Role::Streamd);
    assert_eq!(world.said(), ["ACK ".to_owned(), event("hyperstart", "p", 143)]);
    assert!(world.supervisor.streams.is_empty());
}

#[test]
fn its_processes_have_names_streams_and_sizes_of_their_own() {
    let mut world = with_process();
    world.exec("hyperstart", "p", 3);
    assert!(world.said().join("").contains("process p exists"));
    world.exec("hyperstart", "q", 1);
    assert!(world.said().join("").contains("stream 1 belongs"));
    world.tell(Message::WinSize, r#"{"container":"hyperstart","process":"p","row":1,"column":1}"#);
    assert!(world.said().join("").contains("the process has no terminal"));
    let tty = r#"{"container":"hyperstart","process":{"id":"t","terminal":true,"args":["a"],"stdio":5}}"#;
    world.tell(Message::ExecCmd, tty);
    world.started(Pid(101));
    world.tell(Message::WinSize, r#"{"container":"hyperstart","process":"t","row":1,"column":2}"#);
    assert_eq!(world.asked(Role::Execd), ["resize 5 1x2"]);
}

#[test]
fn it_is_no_container() {
    let mut world = with_process();
    for (message, json) in [
        (Message::KillContainer, r#"{"container":"hyperstart","signal":9}"#),
        (Message::RemoveContainer, r#"{"container":"hyperstart"}"#),
        (Message::ReadFile, r#"{"container":"hyperstart","file":"/f"}"#),
        (Message::WriteFile, r#"{"container":"hyperstart","file":"/f"}"#),
    ] {
        world.tell(message, json);
        let said = world.said().join("");
        assert!(said.starts_with("ERROR") && said.contains("it is the guest itself"), "{message}: {said}");
    }
    let mut world = World::with_pod();
    world.new_container("hyperstart", 1);
    assert!(world.said().join("").contains("the guest's own"));
}

#[test]
fn a_process_that_could_not_be_started_is_forgotten() {
    let mut world = World::with(true);
    world.exec("hyperstart", "p", 1);
    world.fails(Role::Execd);
    assert!(world.said().join("").starts_with("ERROR"));
    assert!(world.supervisor.streams.is_empty());
    world.exec("hyperstart", "p", 1);
    assert_eq!(world.asked(Role::Execd), ["start in the guest p"]);
}

#[test]
fn a_new_execd_gets_their_outputs_without_a_pod_too() {
    let mut world = with_process();
    world.dies(Role::Execd);
    world.comes_up(Role::Execd, 20);
    world.exec("hyperstart", "q", 3);
    assert_eq!(world.asked(Role::Execd), ["adopt 1"]);
    world.done(Role::Execd);
    assert_eq!(world.asked(Role::Execd), ["start in the guest q"]);
}

#[test]
fn the_guest_ends_with_them() {
    let mut world = with_process();
    world.tell(Message::DestroyPod, "null");
    assert_eq!(world.did(), [kill(100, Signal::TERM, true)]);
    assert!(world.asked.is_empty(), "it may say something yet");
    world.now += GRACE;
    world.feed(Event::Tick);
    assert_eq!(world.did(), [kill(100, Signal::KILL, true)]);
    world.exits(Pid(100), 137);
    world.done(Role::Streamd);
    assert_eq!(world.said(), [event("hyperstart", "p", 137)]);
    assert_eq!(world.asked(Role::Streamd), ["flush"]);
    world.done(Role::Streamd);
    assert_eq!(world.said(), ["ACK "]);
}

#[test]
fn one_that_starts_while_the_guest_ends_is_killed() {
    let mut world = World::with(true);
    world.exec("hyperstart", "p", 1);
    world.tell(Message::DestroyPod, "null");
    world.started(Pid(100));
    assert_eq!(world.did(), [kill(100, Signal::KILL, false)]);
    world.exits(Pid(100), 137);
    world.done(Role::Streamd);
    world.done(Role::Streamd);
    assert_eq!(world.said().len(), 3, "the start, its end, the guest's");
}

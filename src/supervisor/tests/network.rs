//! The network of a pod: its steps, its undo, the ports of its containers, and the commands of one interface.

use super::*;

pub const POD: &str = r#"{"hostname":"pod","interfaces":[{"device":"eth0","ipAddresses":[{"ipAddress":"10.0.0.2","netMask":"24"}]}],
    "routes":[{"dest":"default","gateway":"10.0.0.1"}],"portmappingWhiteLists":{"internalNetworks":["10.0.0.0/8"]}}"#;

/// The requests of STARTPOD for `POD`, in order.
const STEPS: [(Role, &str); 8] = [
    (Role::Netd, "up lo"),
    (Role::Netd, "let in"),
    (Role::Mountd, "rescan"),
    (Role::Netd, "set up eth0"),
    (Role::Netd, "add routes default"),
    (Role::Mountd, "prepare pod"),
    (Role::Execd, "start pod pod"),
    (Role::Execd, "join"),
];
const INIT: usize = 6;

/// What is taken back if step `steps` fails. The failed step has undone itself.
fn taken_back(steps: usize) -> Option<&'static str> {
    match steps {
        0 | 1 => None,
        2 | 3 => Some("reset 0 interfaces, 0 routes, ports"),
        4 => Some("reset 1 interfaces as before, 0 routes, ports"),
        _ => Some("reset 1 interfaces as before, 1 routes, ports"),
    }
}

/// Starts a pod and answers STARTPOD's first `steps` requests, so that the next one is under way.
fn starting(steps: usize) -> World {
    let mut world = World::new();
    world.tell(Message::StartPod, POD);
    for (at, (role, words)) in STEPS.into_iter().enumerate().take(steps + 1) {
        assert_eq!(world.asked(role), [words]);
        if at == steps {
            break;
        }
        if at == INIT { world.started(POD_INIT) } else { world.done(role) }
    }
    world
}

/// Checks that a failed STARTPOD is undone.
fn is_undone(world: &mut World, has_init: bool, taken_back: Option<&str>) {
    if has_init {
        assert_eq!(world.did(), [kill(POD_INIT.0, Signal::KILL, false)]);
        world.exits(POD_INIT, 137);
    }
    assert_eq!(world.asked(Role::Mountd), ["destroy pod"]);
    assert!(world.asked(Role::Netd).is_empty(), "what is unmounted may be on the network");
    world.done(Role::Mountd);
    if let Some(taken_back) = taken_back {
        assert_eq!(world.asked(Role::Netd), [taken_back]);
        assert!(world.said().is_empty(), "the reply comes when everything is undone");
        world.done(Role::Netd);
    }
    assert!(world.asked.is_empty() && world.did().is_empty());
}

pub fn pod() -> World {
    let mut world = starting(STEPS.len() - 1);
    world.done(Role::Execd);
    assert_eq!(world.said(), ["ACK "]);
    world
}

pub fn with_ports(world: &mut World, id: &str, stdio: u64, ports: &str) {
    let stderr = stdio + 1;
    let json = format!(
        r#"{{"id":"{id}","ports":{ports},"process":{{"args":["a"],"stdio":{stdio},"stderr":{stderr}}}}}"#
    );
    world.tell(Message::NewContainer, &json);
}

const WEB: &str =
    r#"[{"hostPort":8080,"containerPort":80,"protocol":"tcp"},{"containerPort":9,"protocol":"tcp"}]"#;

/// A guest with a container `c` that has the ports `WEB`, and whose init has pid 100 and streams 1 and 2.
fn web() -> World {
    let mut world = pod();
    with_ports(&mut world, "c", 1, WEB);
    world.done(Role::Mountd);
    world.done(Role::Netd);
    world.started(Pid(100));
    assert_eq!(world.said(), ["ACK "]);
    world
}

#[test]
fn the_filter_comes_before_the_links_and_the_links_before_the_files() {
    pod();
}

#[test]
fn a_step_that_fails_undoes_those_before_it() {
    for (step, (role, _)) in STEPS.into_iter().enumerate() {
        let mut world = starting(step);
        world.fails(role);
        is_undone(&mut world, step > INIT, taken_back(step));
        assert_eq!(world.said(), [format!("ERROR {role}: doing it: no")], "step {step}");
        world.tell(Message::StartPod, "{}");
        assert_eq!(world.asked(Role::Netd), ["up lo"], "step {step}: another one may start");
    }
}

#[test]
fn what_netd_died_over_is_taken_back_too_for_a_part_of_it_may_be_done() {
    let again = ["set up eth0, again", "add routes default, again"];
    for (step, tries, expected) in
        [(0, 1, taken_back(0)), (3, 3, Some("reset 1 interfaces, 0 routes, ports")), (4, 3, taken_back(5))]
    {
        let mut world = starting(step);
        for pid in 1..=tries {
            world.dies(Role::Netd);
            world.comes_up(Role::Netd, 69 + pid);
            if pid < tries {
                assert_eq!(world.asked(Role::Netd), [again[step - 3]]);
            }
        }
        is_undone(&mut world, false, expected);
        assert!(world.said().join("").ends_with("it died before it answered"), "step {step}");
    }
}

#[test]
fn the_filter_is_asked_for_again() {
    let mut world = starting(1);
    world.dies(Role::Netd);
    world.comes_up(Role::Netd, 70);
    assert_eq!(world.asked(Role::Netd), ["let in"], "it comes to the same twice");
    for pid in 71..73 {
        world.dies(Role::Netd);
        world.comes_up(Role::Netd, pid);
    }
    is_undone(&mut world, false, Some("reset 0 interfaces, 0 routes, ports"));
    assert!(world.said().join("").ends_with("it died before it answered"));
}

#[test]
fn a_netd_that_dies_over_the_undo_is_asked_again() {
    let mut world = starting(5);
    world.fails(Role::Mountd);
    world.done(Role::Mountd);
    world.dies(Role::Netd);
    world.comes_up(Role::Netd, 70);
    assert_eq!(world.asked(Role::Netd), ["reset 1 interfaces as before, 1 routes, ports"]);
    world.fails(Role::Netd);
    assert_eq!(world.said(), ["ERROR mountd: doing it: no"], "the first fault is the answer");
}

#[test]
fn destroypod_in_the_middle_undoes_what_was_done() {
    for (step, (role, _)) in STEPS.into_iter().enumerate().take(5) {
        let mut world = starting(step);
        world.tell(Message::DestroyPod, "null");
        assert!(world.did().is_empty(), "a step is under way");
        world.done(role);
        is_undone_leaving(&mut world, taken_back(step + 1));
        let said = world.said();
        assert!(said[0].ends_with("DESTROYPOD came before it ran") && said[1] == "ACK ", "{said:?}");
    }
}

fn is_undone_leaving(world: &mut World, taken_back: Option<&str>) {
    assert_eq!(world.asked(Role::Mountd), ["destroy pod"]);
    world.done(Role::Mountd);
    if let Some(taken_back) = taken_back {
        assert_eq!(world.asked(Role::Netd), [taken_back]);
        world.done(Role::Netd);
    }
    assert_eq!(world.asked(Role::Streamd), ["flush"]);
    world.done(Role::Streamd);
}

#[test]
fn a_pod_that_ends_takes_its_network_with_it() {
    let mut world = web();
    world.exits(POD_INIT, 1);
    world.exits(Pid(100), 137);
    assert_eq!(world.asked(Role::Netd), ["let in"]);
    world.done(Role::Netd);
    world.done(Role::Mountd);
    world.done(Role::Streamd);
    world.done(Role::Mountd);
    assert_eq!(world.asked(Role::Mountd), ["destroy pod"]);
    assert!(world.asked(Role::Netd).is_empty());
    world.tell(Message::StartPod, POD);
    world.done(Role::Mountd);
    assert_eq!(
        world.asked(Role::Netd),
        ["reset 1 interfaces as before, 1 routes, ports", "up lo"],
        "then the next one's"
    );
}

#[test]
fn without_white_lists_ports_mean_nothing() {
    let empty =
        r#"{"hostname":"pod","portmappingWhiteLists":{"internalNetworks":[],"externalNetworks":null}}"#;
    for pod in [r#"{"hostname":"pod"}"#, empty] {
        let mut world = World::new();
        world.tell(Message::StartPod, pod);
        world.done(Role::Netd);
        world.done(Role::Mountd);
        world.started(POD_INIT);
        world.done(Role::Execd);
        with_ports(&mut world, "c", 1, r#"[{"hostPort":1,"containerPort":0,"protocol":"any"}]"#);
        world.done(Role::Mountd);
        assert_eq!(world.asked(Role::Execd), ["start c init as init"]);
        assert!(world.asked(Role::Netd).is_empty());
    }
}

#[test]
fn ports_are_open_before_there_is_anybody_to_answer_and_closed_when_there_is_nobody() {
    let mut world = pod();
    with_ports(&mut world, "c", 1, WEB);
    assert!(world.asked(Role::Netd).is_empty());
    world.done(Role::Mountd);
    assert_eq!(world.asked(Role::Netd), ["let in 8080>80/tcp"], "what has no host port is nobody's");
    assert!(world.asked(Role::Execd).is_empty());
    world.done(Role::Netd);
    world.started(Pid(100));
    with_ports(&mut world, "d", 3, r#"[{"hostPort":53,"containerPort":53,"protocol":"udp"}]"#);
    world.done(Role::Mountd);
    assert_eq!(world.asked(Role::Netd), ["let in 8080>80/tcp 53>53/udp"], "all of them, each time");
    world.done(Role::Netd);
    world.started(Pid(101));
    world.exits(Pid(100), 0);
    assert_eq!(world.asked(Role::Netd), ["let in 53>53/udp"]);
    world.fails(Role::Netd);
    world.done(Role::Mountd);
    world.done(Role::Streamd);
    world.done(Role::Mountd);
    assert_eq!(world.said(), ["ACK ".to_owned(), "ACK ".to_owned(), event("c", "init", 0)]);
    with_ports(&mut world, "e", 5, WEB);
    world.done(Role::Mountd);
    assert_eq!(world.asked(Role::Netd), ["let in 53>53/udp 8080>80/tcp"], "they are free again");
}

#[test]
fn ports_that_cannot_be_opened_undo_the_container() {
    let mut world = pod();
    with_ports(&mut world, "c", 1, WEB);
    world.done(Role::Mountd);
    world.fails(Role::Netd);
    assert_eq!(world.asked(Role::Netd), ["let in"]);
    assert_eq!(world.asked(Role::Mountd), ["kill c", "remove c"]);
    world.done(Role::Netd);
    world.done(Role::Mountd);
    world.done(Role::Mountd);
    assert_eq!(world.said(), ["ERROR netd: doing it: no"]);
    assert!(world.asked.is_empty());
}

#[test]
fn a_container_whose_init_does_not_start_closes_its_ports() {
    let mut world = pod();
    with_ports(&mut world, "c", 1, WEB);
    world.done(Role::Mountd);
    world.done(Role::Netd);
    world.fails(Role::Execd);
    assert_eq!(world.asked(Role::Netd), ["let in"]);
    world.done(Role::Mountd);
    world.done(Role::Mountd);
    assert_eq!(world.said(), ["ERROR execd: doing it: no"]);
}

#[test]
fn a_container_whose_files_failed_never_opened_a_port() {
    let mut world = pod();
    with_ports(&mut world, "c", 1, WEB);
    world.fails(Role::Mountd);
    assert!(world.asked(Role::Netd).is_empty());
}

#[test]
fn a_netd_that_dies_over_ports_is_asked_again() {
    let mut world = pod();
    with_ports(&mut world, "c", 1, WEB);
    world.done(Role::Mountd);
    world.dies(Role::Netd);
    assert!(world.said().is_empty());
    world.comes_up(Role::Netd, 70);
    assert_eq!(world.asked(Role::Netd), ["let in 8080>80/tcp"]);
    world.feed(Event::HelperClosed(NETD));
    assert_eq!(world.asked(Role::Mountd), ["kill c", "remove c"], "a closed netd opens nothing");
}

#[test]
fn a_host_port_leads_to_one_container() {
    let mut world = web();
    for (ports, why) in [
        (r#"[{"hostPort":8080,"containerPort":81}]"#, "the host's 8080/tcp leads to container c"),
        (
            r#"[{"hostPort":1,"containerPort":81},{"hostPort":1,"containerPort":82}]"#,
            "the host's 1/tcp leads to container d",
        ),
        (
            r#"[{"hostPort":1,"containerPort":81,"protocol":"icmp"}]"#,
            "protocol: no such protocol: \"icmp\" (tcp, udp, sctp)",
        ),
        (r#"[{"hostPort":1,"containerPort":0}]"#, "containerPort: is 0 for the host's 1/tcp"),
    ] {
        with_ports(&mut world, "d", 3, ports);
        let said = world.said().join("");
        assert!(said.starts_with("ERROR") && said.ends_with(why), "{said}");
    }
    let many: Vec<_> =
        (1..=4096).map(|port| format!(r#"{{"hostPort":{port},"containerPort":{port}}}"#)).collect();
    with_ports(&mut world, "d", 3, &format!("[{}]", many.join(",")));
    assert!(world.said().join("").ends_with("the pod would have more than 4096"));
    assert!(world.asked.is_empty());
    let udp = r#"[{"hostPort":8080,"containerPort":80,"protocol":"udp"}]"#;
    with_ports(&mut world, "d", 3, udp);
    assert_eq!(world.asked(Role::Mountd), ["prepare d"], "another protocol has ports of its own");
}

#[test]
fn an_interface_is_looked_for_on_the_bus_first() {
    let mut world = World::new();
    let interface = r#"{"device":"eth1","ipAddresses":[{"ipAddress":"10.0.0.2","netMask":"24"}]}"#;
    for fails in [false, true] {
        world.tell(Message::SetupInterface, interface);
        assert_eq!(world.asked(Role::Mountd), ["rescan"]);
        if fails {
            world.fails(Role::Mountd)
        } else {
            world.done(Role::Mountd)
        }
        assert_eq!(world.asked(Role::Netd), ["set up eth1"], "the kernel may have seen it all the same");
        if fails {
            world.fails(Role::Netd)
        } else {
            world.done(Role::Netd)
        }
        assert_eq!(world.said(), [if fails { "ERROR netd: doing it: no" } else { "ACK " }]);
    }
    world.tell(Message::SetupInterface, interface);
    world.done(Role::Mountd);
    world.tell(Message::SetupRoute, r#"{"routes":[{"dest":"default"}]}"#);
    world.dies(Role::Netd);
    world.comes_up(Role::Netd, 70);
    // netd had not begun the second request; a part of the first may have been done.
    assert_eq!(world.asked(Role::Netd), ["set up eth1, again", "add routes default"]);
    for pid in 71..73 {
        world.dies(Role::Netd);
        world.comes_up(Role::Netd, pid);
    }
    assert!(world.said().join("").ends_with("it died before it answered"), "three deaths over it are enough");
    assert_eq!(world.asked(Role::Netd), ["add routes default"]);
    let (id, _) = world.take(Role::Netd);
    world.feed(Event::Unsent { helper: NETD, id, fault: failure(Role::Netd) });
    assert_eq!(world.said(), ["ERROR netd: doing it: no"], "what was not even sent is not repeated");
}

/// What the first netd has done of the step has not been undone.
#[test]
fn a_step_of_a_pods_network_that_fails_again_is_taken_back() {
    for sent in [true, false] {
        let mut world = starting(3);
        world.dies(Role::Netd);
        world.comes_up(Role::Netd, 70);
        let (id, _) = world.take(Role::Netd);
        let fault = failure(Role::Netd);
        world.feed(if sent {
            Event::Reply { helper: NETD, id, result: Err(fault) }
        } else {
            Event::Unsent { helper: NETD, id, fault }
        });
        is_undone(&mut world, false, Some("reset 1 interfaces, 0 routes, ports"));
        assert_eq!(world.said(), ["ERROR netd: doing it: no"]);
    }
}

#[test]
fn a_local_guest_has_no_bus() {
    let mut world = World::new();
    world.supervisor.config.local = true;
    world.tell(Message::SetupInterface, r#"{"device":"eth1"}"#);
    assert_eq!(world.asked(Role::Netd), ["set up eth1"]);
    world.done(Role::Netd);
    world.tell(Message::StartPod, POD);
    world.done(Role::Netd);
    world.done(Role::Netd);
    assert_eq!(world.asked(Role::Netd), ["set up eth0"]);
}

#[test]
fn routes_and_unplugging_are_one_request_each() {
    let mut world = World::with_pod();
    world.tell(Message::SetupRoute, r#"{"routes":[{"dest":"default"},{"dest":"10.0.0.0/8"}]}"#);
    world.tell(Message::DeleteInterface, r#"{"device":"eth1"}"#);
    assert_eq!(world.asked(Role::Netd), ["add routes default 10.0.0.0/8"]);
    assert_eq!(world.asked(Role::Mountd), ["unplug eth1"]);
    world.fails(Role::Mountd);
    world.done(Role::Netd);
    assert_eq!(world.said(), ["ACK ", "ERROR mountd: doing it: no"]);
}

#[test]
fn what_the_links_were_is_said_of_each() {
    for before in [0, 2] {
        let mut world = starting(3);
        let (id, _) = world.take(Role::Netd);
        let reply = netd::Reply::Set { before: vec![BEFORE; before] };
        world.reply(Role::Netd, id, Ok(Reply::Netd(reply)));
        assert!(matches!(world.did().as_slice(), [Action::KillHelper { helper: NETD, lied: true, .. }]));
    }
}

#[test]
fn ports_that_nobody_could_close_are_closed_when_netd_is_tried_again() {
    let mut world = web();
    world.dies(Role::Netd);
    world.comes_up(Role::Netd, 70);
    assert!(world.asked(Role::Netd).is_empty(), "the rules are the kernel's");
    world.dies(Role::Netd);
    world.feed(Event::HelperClosed(NETD));
    world.exits(Pid(100), 0);
    assert!(world.asked(Role::Netd).is_empty());
    world.comes_up(Role::Netd, 71);
    assert_eq!(world.asked(Role::Netd), ["let in"]);
    let mut world = World::with_pod();
    world.feed(Event::HelperClosed(NETD));
    world.comes_up(Role::Netd, 70);
    assert!(world.asked(Role::Netd).is_empty(), "without white lists there are none");
}

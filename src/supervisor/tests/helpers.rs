//! Helpers that die, hang or lie.

use super::super::STRAYS_MAX;
use super::*;

#[test]
fn a_start_that_was_under_way_fails_and_the_next_one_waits() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.dies(Role::Execd);
    assert!(world.said().join("").ends_with("it died before it answered"));
    world.exec("c", "p", 3);
    assert!(world.asked.is_empty());
    world.comes_up(Role::Execd, 70);
    assert_eq!(world.asked(Role::Execd), ["join 1"], "outside the pod nothing is started");
    world.done(Role::Execd);
    assert_eq!(world.asked(Role::Execd), ["start c p"]);
    world.started(Pid(101));
    assert_eq!(world.said(), ["ACK "]);
}

#[test]
fn an_execd_that_cannot_enter_the_pod_is_killed() {
    let mut world = World::with_container();
    world.dies(Role::Execd);
    world.comes_up(Role::Execd, 70);
    world.exec("c", "p", 3);
    world.fails(Role::Execd);
    assert!(matches!(world.did().as_slice(), [Action::KillHelper { helper: EXECD, .. }]));
    world.dies(Role::Execd);
    world.comes_up(Role::Execd, 71);
    assert_eq!(world.asked(Role::Execd), ["join 1"]);
}

#[test]
fn what_may_be_repeated_is_asked_again() {
    let mut world = World::with_container();
    world.exits(Pid(100), 0);
    world.dies(Role::Mountd);
    assert!(world.asked(Role::Streamd).is_empty());
    world.comes_up(Role::Mountd, 70);
    assert_eq!(world.asked(Role::Mountd), ["kill c"]);
    for pid in 71..73 {
        world.dies(Role::Mountd);
        world.comes_up(Role::Mountd, pid);
    }
    assert_eq!(world.asked(Role::Streamd), ["finish 1"], "three deaths over it are enough");
}

#[test]
fn what_the_helper_had_not_come_to_has_not_been_tried() {
    let mut world = World::with_container();
    world.new_container("d", 3);
    world.exits(Pid(100), 0);
    // The request stands behind another one once, and is the first three times.
    for pid in 70..73 {
        world.dies(Role::Mountd);
        world.comes_up(Role::Mountd, pid);
        assert_eq!(world.asked(Role::Mountd)[0], "kill c");
        assert!(world.asked(Role::Streamd).is_empty());
    }
    world.dies(Role::Mountd);
    assert_eq!(world.asked(Role::Streamd), ["finish 1"]);
}

#[test]
fn a_death_costs_the_oldest_start_only() {
    let mut world = World::with_container();
    for (process, stream) in [("p", 3), ("q", 5), ("r", 7)] {
        world.exec("c", process, stream);
    }
    world.dies(Role::Execd);
    assert!(world.said().join("").ends_with("it died before it answered"));
    world.comes_up(Role::Execd, 70);
    world.done(Role::Execd);
    assert_eq!(world.asked(Role::Execd), ["start c q", "start c r"]);
    world.started(Pid(101));
    world.started(Pid(102));
    assert_eq!(world.said(), ["ACK ", "ACK "]);
}

#[test]
fn what_a_liar_may_have_begun_is_not_begun_again() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.exec("c", "q", 5);
    let (first, _) = world.asked[0];
    world.reply(Role::Execd, first + 100, Err(failure(Role::Execd)));
    world.reply(Role::Execd, first + 100, Ok(Reply::Execd(execd::Reply::Done)));
    world.dies(Role::Execd);
    world.comes_up(Role::Execd, 70);
    world.done(Role::Execd);
    assert!(world.asked.is_empty());
    let said = world.said();
    assert_eq!(said.iter().filter(|said| said.starts_with("ERROR")).count(), 2, "{said:?}");
}

#[test]
fn the_end_of_a_stream_is_not_given_up_because_a_host_reads_slowly() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.started(Pid(101));
    world.exits(Pid(101), 1);
    world.said();
    for pid in 0..50 {
        world.dies(Role::Streamd);
        world.comes_up(Role::Streamd, 200 + pid);
        world.done(Role::Execd);
        assert_eq!(world.asked(Role::Streamd), ["finish 3"]);
        assert!(world.said().is_empty());
    }
    world.done(Role::Streamd);
    assert_eq!(world.said(), [event("c", "p", 1)]);
}

#[test]
fn a_new_streamd_gets_the_descriptors_before_it_hears_of_ends() {
    let mut world = with_output_to_resend();
    assert!(world.asked(Role::Streamd).is_empty());
    assert_eq!(world.asked(Role::Execd), ["resend"]);
    world.done(Role::Execd);
    assert_eq!(world.asked(Role::Streamd), ["finish 3"]);
    world.done(Role::Streamd);
    assert_eq!(world.said(), [event("c", "p", 1)]);
}

/// A guest in which a process has ended, and whose new streamd (pid 70) does not have its descriptors yet.
fn with_output_to_resend() -> World {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.started(Pid(101));
    world.exits(Pid(101), 1);
    world.said();
    world.dies(Role::Streamd);
    world.comes_up(Role::Streamd, 70);
    world
}

#[test]
fn a_streamd_that_dies_over_the_descriptors_has_not_given_them_to_the_next() {
    let mut world = with_output_to_resend();
    // execd's answer about the first streamd's descriptors is still under way.
    world.feed(Event::HelperGone(STREAMD));
    world.comes_up(Role::Streamd, 71);
    assert_eq!(world.asked(Role::Execd), ["resend", "resend"]);
    world.done(Role::Execd);
    assert!(world.asked(Role::Streamd).is_empty());
    world.done(Role::Execd);
    assert_eq!(world.asked(Role::Streamd), ["finish 3"]);
}

#[test]
fn a_streamd_that_could_not_be_given_all_gives_way_to_one_that_can() {
    let mut world = with_output_to_resend();
    world.fails(Role::Execd);
    let did = world.did();
    assert!(matches!(did.as_slice(), [Action::KillHelper { helper: STREAMD, lied: false, .. }]), "{did:?}");
    assert!(world.asked(Role::Streamd).is_empty());
    world.dies(Role::Streamd);
    world.comes_up(Role::Streamd, 71);
    world.done(Role::Execd);
    assert_eq!(world.asked(Role::Streamd), ["finish 3"]);
}

#[test]
fn without_an_execd_the_ends_are_told_all_the_same() {
    let mut world = with_output_to_resend();
    world.dies(Role::Execd);
    world.feed(Event::HelperClosed(EXECD));
    assert_eq!(world.asked(Role::Streamd), ["finish 3"]);
}

#[test]
fn a_new_execd_is_told_whose_output_it_keeps() {
    let mut world = World::with_container();
    world.exec("c", "known", 3);
    world.started(Pid(101));
    world.exec("c", "ended", 5);
    world.started(Pid(102));
    world.exits(Pid(102), 0);
    world.exec("c", "gone", 7);
    world.started(Pid(103));
    world.exits(Pid(103), 0);
    let (second, _) = world.asked.pop().unwrap();
    world.reply(Role::Streamd, second, Ok(done(&Request::Streamd(streamd::Request::Flush))));
    world.exec("c", "failed", 9);
    world.dies(Role::Execd);
    world.exec("c", "waits", 11);
    world.comes_up(Role::Execd, 70);
    assert_eq!(world.asked(Role::Execd), ["join 5 1 3"], "what is not finished, and has been started");
    // If that execd dies too, the streams in the next request are up to date.
    world.exits(Pid(101), 0);
    world.done(Role::Streamd);
    world.done(Role::Streamd);
    world.dies(Role::Execd);
    world.comes_up(Role::Execd, 71);
    assert_eq!(world.asked(Role::Execd), ["join 1"]);
    world.done(Role::Execd);
    assert_eq!(world.asked(Role::Execd), ["start c waits"]);
}

#[test]
fn a_new_streamd_does_not_wait_for_an_execd_that_is_no_more() {
    let mut world = World::with_container();
    world.exits(Pid(100), 1);
    world.done(Role::Mountd);
    world.dies(Role::Execd);
    world.dies(Role::Streamd);
    world.comes_up(Role::Streamd, 70);
    assert!(world.asked(Role::Streamd).is_empty());
    world.feed(Event::HelperClosed(EXECD));
    assert_eq!(world.asked(Role::Streamd), ["finish 1"]);
}

#[test]
fn a_closed_role_answers_error_and_the_rest_goes_on() {
    let mut world = World::with_container();
    world.new_container("d", 3);
    world.asked.clear();
    world.feed(Event::HelperClosed(MOUNTD));
    assert!(world.said().join("").contains("it died too often: it is closed"));
    world.exec("c", "p", 3);
    world.started(Pid(101));
    world.exits(Pid(100), 5);
    assert_eq!(world.did(), [kill(101, Signal::KILL, false)]);
    world.exits(Pid(101), 137);
    world.done(Role::Streamd);
    world.done(Role::Streamd);
    assert_eq!(world.said(), ["ACK ".to_owned(), event("c", "p", 137), event("c", "init", 5)]);
}

#[test]
fn a_closed_role_that_comes_back_has_everything_asked_of_it() {
    let mut world = World::with_container();
    world.feed(Event::HelperClosed(EXECD));
    world.exec("c", "p", 3);
    assert!(world.said().join("").contains("it died too often: it is closed"));
    world.feed(Event::HelperClosed(EXECD));
    world.asked.clear();
    world.comes_up(Role::Execd, 70);
    world.exec("c", "q", 5);
    assert_eq!(world.asked(Role::Execd), ["join 1"], "it has to enter the pod first");
    world.done(Role::Execd);
    assert_eq!(world.asked(Role::Execd), ["start c q"]);
    world.started(Pid(101));
    assert_eq!(world.said(), ["ACK "]);
}

#[test]
fn a_helper_that_hangs_is_killed_and_what_waited_behind_it_has_its_own_time() {
    let mut world = World::with_container();
    for dest in ["192.0.2.1", "192.0.2.2"] {
        let routes = format!(r#"{{"routes":[{{"dest":"{dest}","device":"eth0"}}]}}"#);
        world.tell(Message::SetupRoute, &routes);
    }
    let first = world.supervisor.next_deadline().unwrap();
    world.now += Duration::from_secs(9);
    world.fails(Role::Netd);
    assert_eq!(world.supervisor.next_deadline(), Some(first + Duration::from_secs(9)));
    world.now += Duration::from_secs(9);
    world.feed(Event::Tick);
    assert!(world.did().is_empty());
    world.wait();
    assert!(matches!(world.did().as_slice(), [Action::KillHelper { helper: NETD, .. }]));
    assert_eq!(world.supervisor.next_deadline(), None, "once is enough");
}

/// A start takes as long as its container makes it take, and no other start waits for it.
#[test]
fn starts_are_answered_in_any_order_and_each_has_its_own_time() {
    let mut world = World::with_container();
    for (process, stream) in [("p", 3), ("q", 5), ("r", 7)] {
        world.exec("c", process, stream);
        world.now += Duration::from_secs(1);
    }
    let first = world.supervisor.next_deadline().unwrap();
    let started = |pid| Ok(Reply::Execd(execd::Reply::Started { pid: Pid(pid) }));
    let (r, _) = world.asked.remove(2);
    world.reply(Role::Execd, r, started(103));
    let (q, _) = world.asked.remove(1);
    world.reply(Role::Execd, q, Err(failure(Role::Execd)));
    assert_eq!(world.released, [POD_INIT, Pid(100), Pid(103)], "it executes");
    assert!(world.said().is_empty(), "replies have their order");
    assert_eq!(world.supervisor.next_deadline(), Some(first), "the first has no more time than it had");
    world.started(Pid(101));
    assert_eq!(world.said(), ["ACK ", "ERROR execd: doing it: no", "ACK "]);
    // A request that is not a start is answered at once, and after the requests that were sent before it.
    world.exec("c", "s", 9);
    world.exits(Pid(101), 0);
    world.done(Role::Streamd);
    world.wait();
    let (start, _) = world.take(Role::Execd);
    assert!(world.asked(Role::Execd)[0].starts_with("release "), "{:?}", world.asked);
    world.exec("c", "t", 11);
    let t = world.asked.remove(1).0;
    world.reply(Role::Execd, t, started(105));
    assert!(matches!(world.did().as_slice(), [Action::KillHelper { helper: EXECD, lied: true, .. }]));
    world.reply(Role::Execd, start, started(104));
    assert!(!world.released.contains(&Pid(104)) && !world.released.contains(&Pid(105)));
}

#[test]
fn a_start_that_is_never_answered_ends_execd_though_others_are() {
    let mut world = World::with_container();
    world.exec("c", "hangs", 3);
    let until = world.supervisor.next_deadline().unwrap();
    for number in 0..9 {
        world.exec("c", &format!("p{number}"), 5 + 2 * number);
        let (id, _) = world.asked.remove(1);
        let pid = Pid(200 + number as i32);
        world.reply(Role::Execd, id, Ok(Reply::Execd(execd::Reply::Started { pid })));
        world.now += Duration::from_secs(1);
        world.feed(Event::Tick);
        assert!(world.did().is_empty());
    }
    world.now = until;
    world.feed(Event::Tick);
    assert!(matches!(world.did().as_slice(), [Action::KillHelper { helper: EXECD, lied: false, .. }]));
}

/// Sixteen starts that hang leave room for others as soon as execd has taken them from its socket.
#[test]
fn starts_that_hang_keep_no_others_from_being_asked_for() {
    let mut world = World::with_container();
    for number in 0..40 {
        world.exec("c", &format!("p{number}"), 3 + 2 * number);
    }
    assert_eq!(world.asked.len(), 16);
    let began = world.now;
    for sent in [32, 40] {
        world.wait();
        assert!(world.now <= began + Duration::from_millis(100), "{:?}", world.now - began);
        let at =
            world.asked.iter().position(|(_, ask)| *ask == Request::Execd(execd::Request::Ping)).unwrap();
        assert_eq!(at, world.asked.len() - 1);
        world.feed(Event::Tick);
        let (ping, ask) = world.asked.remove(at);
        assert_eq!(world.asked.len(), at, "once");
        world.reply(Role::Execd, ping, Ok(done(&ask)));
        assert_eq!(world.asked.len(), sent);
    }
    // The deadlines of the hanging starts have not moved.
    assert_eq!(world.supervisor.next_deadline(), Some(began + Duration::from_secs(10)));
    let (last, _) = world.asked.pop().unwrap();
    world.reply(Role::Execd, last, Ok(Reply::Execd(execd::Reply::Started { pid: Pid(300) })));
    assert!(world.released.contains(&Pid(300)) && world.did().is_empty());
}

#[test]
fn a_request_that_could_not_be_sent_fails_at_once_or_is_asked_of_a_successor() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    let unsent = |role, id| {
        let helper = Instance::first(role);
        Event::Unsent { helper, id, fault: Fault::new("asking", role, "no memory") }
    };
    let (id, _) = world.take(Role::Execd);
    world.feed(unsent(Role::Execd, id));
    assert!(world.said().join("").ends_with("asking execd: no memory"));
    assert!(world.did().is_empty());
    // The id and the streams of the process that failed are free.
    world.exec("c", "p", 3);
    world.started(Pid(101));
    world.said();
    // If this request were given up, the host would never see the end of the stream.
    world.exits(Pid(101), 1);
    let (id, _) = world.take(Role::Streamd);
    world.feed(unsent(Role::Streamd, id));
    assert!(matches!(world.did().as_slice(), [Action::KillHelper { helper: STREAMD, lied: false, .. }]));
    world.dies(Role::Streamd);
    world.comes_up(Role::Streamd, 70);
    world.done(Role::Execd);
    assert_eq!(world.asked(Role::Streamd), ["finish 3"]);
    world.done(Role::Streamd);
    assert_eq!(world.said(), [event("c", "p", 1)]);
    // An execd that did not join the pod must not start anything, so its successor gets the request again. A
    // failure to send is no lie of execd's.
    for pid in [71, 72] {
        world.dies(Role::Execd);
        world.comes_up(Role::Execd, pid);
        let (id, request) = world.take(Role::Execd);
        assert!(short(&request).starts_with("join"), "{request:?}");
        world.feed(unsent(Role::Execd, id));
        assert!(matches!(world.did().as_slice(), [Action::KillHelper { helper: EXECD, lied: false, .. }]));
    }
}

#[test]
fn a_reply_that_comes_after_all_counts() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.wait();
    world.started(Pid(101));
    assert_eq!(world.said(), ["ACK "], "the process runs, so it must be known");
    world.dies(Role::Execd);
    world.exits(Pid(101), 0);
    assert_eq!(world.asked(Role::Streamd), ["finish 3"]);
}

#[test]
fn a_host_that_reads_slowly_is_no_fault_of_streamd() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.started(Pid(101));
    world.exits(Pid(101), 0);
    for _ in 0..3 {
        assert_eq!(world.asked(Role::Streamd), ["finish 3"]);
        world.wait();
        let (ping, _) = world.asked.remove(1);
        world.reply(Role::Streamd, ping, Ok(Reply::Streamd(streamd::Reply::Alive)));
        assert!(world.did().is_empty());
    }
    world.done(Role::Streamd);
    assert_eq!(world.said(), ["ACK ".to_owned(), event("c", "p", 0)]);
    assert_eq!(world.asked(Role::Streamd), [""; 0], "who owes nothing is not asked");
}

#[test]
fn a_streamd_that_does_not_say_that_it_is_alive_is_killed() {
    for finished in [1, 16, 20] {
        let mut world = World::with_container();
        for number in 0..finished {
            world.exec("c", &format!("e{number}"), 11 + 2 * number);
            world.started(Pid(200 + number as i32));
            world.exits(Pid(200 + number as i32), 0);
        }
        let before = world.asked(Role::Streamd).len();
        world.wait();
        assert_eq!(world.asked(Role::Streamd)[before..], ["ping"], "{finished}");
        world.wait();
        assert!(matches!(world.did().as_slice(), [Action::KillHelper { helper: STREAMD, lied: false, .. }]));
        world.dies(Role::Streamd);
        world.comes_up(Role::Streamd, 70);
        world.done(Role::Execd);
        assert_eq!(world.asked(Role::Streamd).len(), before, "{finished}: its successor has the same to do");
    }
}

#[test]
fn no_more_is_under_way_than_a_socket_holds() {
    let mut world = World::with_container();
    for number in 0..40 {
        world.exec("c", &format!("p{number}"), 3 + 2 * number);
    }
    assert_eq!(world.asked.len(), 16);
    world.started(Pid(200));
    assert_eq!(world.asked.len(), 16);
}

/// Checks what follows a lie: the helper is killed, nothing more that it says is believed, and its requests
/// fail.
fn lies(role: Role, id: impl FnOnce(u64) -> u64, reply: Reply) {
    let mut world = World::with_container();
    match role {
        Role::Execd => world.exec("c", "p", 3),
        Role::Mountd => world.new_container("d", 3),
        Role::Netd | Role::Streamd => panic!("not in this test"),
    }
    let (asked, ask) = world.asked[0].clone();
    world.reply(role, id(asked), Ok(reply.clone()));
    assert!(matches!(world.did().as_slice(), [Action::KillHelper { .. }]), "{reply:?}");
    world.reply(role, asked, Ok(done(&ask)));
    world.reply(role, asked, Err(failure(role)));
    assert!(world.did().is_empty() && world.said().is_empty(), "{reply:?}");
    world.dies(role);
    world.comes_up(role, 70);
    for _ in 0..3 {
        if !world.asked(role).is_empty() {
            world.done(role);
        }
    }
    assert!(world.said().join("").starts_with("ERROR"), "{reply:?}");
}

#[test]
fn a_helper_that_lies_is_killed_and_not_believed() {
    let started = |pid| Reply::Execd(execd::Reply::Started { pid: Pid(pid) });
    lies(Role::Execd, |id| id + 1, started(101));
    lies(Role::Execd, |_| u64::MAX, started(101));
    lies(Role::Execd, |id| id, Reply::Execd(execd::Reply::Done));
    lies(Role::Execd, |id| id, Reply::Mountd(mountd::Reply::Done));
    lies(Role::Mountd, |_| 0, Reply::Mountd(mountd::Reply::Done));
    lies(Role::Mountd, |id| id, started(101));
}

#[test]
fn nobody_is_started_twice() {
    for taken in [WARDEN, Pid(10), POD_INIT, Pid(100)] {
        let mut world = World::with_container();
        world.exec("c", "p", 3);
        world.started(taken);
        assert!(matches!(world.did().as_slice(), [Action::KillHelper { helper: EXECD, .. }]), "{taken}");
        assert!(world.said().join("").starts_with("ERROR"), "{taken}");
    }
}

#[test]
fn a_request_of_ours_that_cannot_be_sent_is_no_lie() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.exec("c", "q", 5);
    let (second, _) = world.asked.remove(1);
    world.reply(Role::Execd, second, Err(failure(Role::Execd)));
    assert!(world.did().is_empty());
    world.started(Pid(101));
    assert_eq!(world.said(), ["ACK ", "ERROR execd: doing it: no"]);
}

/// Any number of unreported children may end. The supervisor remembers the last `STRAYS_MAX`, which is more
/// than an honest execd has under way.
#[test]
fn so_many_that_ended_before_they_were_reported_are_remembered_and_no_more() {
    let mut world = World::with_container();
    for (process, stream) in [("p", 3), ("q", 5)] {
        world.exec("c", process, stream);
    }
    let many = i32::try_from(STRAYS_MAX).unwrap();
    for pid in 1000..1000 + many + 10 {
        world.exits(Pid(pid), 9);
        assert!(world.supervisor.strays.len() <= STRAYS_MAX);
    }
    assert_eq!(world.supervisor.strays.len(), STRAYS_MAX);
    // Failed starts leave exits that are never reported. The exit that is asked for is among the last.
    world.started(Pid(1000 + many + 9));
    assert_eq!(world.asked(Role::Streamd), ["finish 3"], "the last that ended");
    world.started(Pid(1000));
    assert_eq!(world.asked(Role::Streamd), ["finish 3"], "for all that is known the other runs");
    assert!(!world.supervisor.has_ended(Pid(1000 + many + 9)), "it has been reported");
}

/// The kernel reuses pids. A failed start left an exit; the next process has the same pid and is alive.
#[test]
fn who_is_there_has_not_ended_before() {
    let mut world = World::with_container();
    world.exec("c", "p", 3);
    world.exec("c", "q", 5);
    world.exits(Pid(101), 127);
    world.fails(Role::Execd);
    world.feed(Event::Reported { pid: Pid(101) });
    world.started(Pid(101));
    assert!(world.asked(Role::Streamd).is_empty(), "it runs");
    world.exits(Pid(101), 3);
    assert_eq!(world.asked(Role::Streamd), ["finish 5"]);
    world.done(Role::Streamd);
    assert_eq!(world.said().last(), Some(&event("c", "q", 3)));
}

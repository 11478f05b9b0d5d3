//! Several mountds: a disk, a server or a file that blocks one request does not hold up the others.

use super::*;
use crate::wire::MOUNTDS;

fn mountd(number: u8) -> Instance {
    Instance::mountd(number).unwrap()
}

impl World {
    /// The mountds that the supervisor wants to start come up; returns their numbers.
    pub(super) fn grow(&mut self) -> Vec<u8> {
        let mut grown = Vec::new();
        for action in self.did() {
            match action {
                Action::StartHelper { helper } => {
                    grown.push(helper.number());
                    self.feed(Event::HelperUp { helper, pid: Pid(500 + i32::from(helper.number())) });
                }
                other => panic!("{other:?}"),
            }
        }
        grown
    }

    /// A mountd carries out its oldest request.
    fn mountd_does(&mut self, number: u8) {
        let of = Instance::mountd(number);
        let at = self.asked.iter().position(|(id, _)| self.to.get(id).copied() == of).unwrap();
        let (id, ask) = self.asked.remove(at);
        self.reply(Role::Mountd, id, Ok(done(&ask)));
    }
}

/// Lets time pass.
fn pass(world: &mut World, milliseconds: u64) {
    world.now += Duration::from_millis(milliseconds);
    world.feed(Event::Tick);
}

/// A guest with a running container `c`, whose first mountd never finishes a request for `slow`.
fn held_up() -> World {
    let mut world = World::with_container();
    world.new_container("slow", 11);
    assert_eq!(world.asked_of(0), ["prepare slow"]);
    world
}

#[test]
fn the_end_of_one_container_does_not_wait_for_anothers_disk() {
    let mut world = held_up();
    world.exits(Pid(100), 9);
    assert_eq!(world.asked(Role::Mountd), ["prepare slow"]);
    world.wait();
    assert_eq!(world.grow(), [1]);
    assert_eq!(world.asked_of(1), ["kill c"]);
    world.mountd_does(1);
    world.done(Role::Streamd);
    assert_eq!(world.asked_of(1), ["remove c"]);
    world.mountd_does(1);
    assert_eq!(world.said(), [event("c", "init", 9)]);
    assert_eq!(world.asked_of(0), ["prepare slow"]);
}

#[test]
fn another_mountd_is_started_only_when_nothing_has_moved_for_a_while() {
    let mut world = held_up();
    world.new_container("d", 21);
    pass(&mut world, 49);
    assert!(world.did().is_empty());
    // The first mountd makes progress, so the waiting request has its turn.
    world.done(Role::Mountd);
    assert_eq!(world.asked_of(0), ["prepare d"]);
    world.new_container("e", 31);
    pass(&mut world, 49);
    assert!(world.did().is_empty());
    pass(&mut world, 1);
    assert_eq!(world.grow(), [1]);
    assert_eq!(
        (world.asked_of(0), world.asked_of(1)),
        (vec!["prepare d".to_owned()], vec!["prepare e".to_owned()])
    );
    // No request waits, so no further mountd is started.
    pass(&mut world, 1000);
    assert!(world.did().is_empty());
}

#[test]
fn all_that_wait_get_one_soon_when_nothing_moves() {
    let mut world = held_up();
    for number in 0..3 {
        world.new_container(&format!("d{number}"), 21 + 2 * number);
    }
    let begin = world.now;
    for number in 1..=3 {
        world.wait();
        assert_eq!(world.grow(), [number], "what a new one takes tells of no turn");
    }
    assert_eq!(world.now - begin, Duration::from_millis(70));
    assert_eq!(world.asked_of(3), ["prepare d2"]);
}

#[test]
fn what_one_container_asks_keeps_its_order_on_one_mountd() {
    let mut world = held_up();
    for file in ["/1", "/2"] {
        world.tell(Message::WriteFile, &format!(r#"{{"container":"c","file":"{file}"}}x"#));
    }
    world.wait();
    assert_eq!(world.grow(), [1]);
    let written = world.asked_of(1);
    assert!(written.len() == 2 && written[0].contains("/1") && written[1].contains("/2"), "{written:?}");
    world.exits(Pid(100), 9);
    assert_eq!(world.asked_of(1).last().unwrap(), "kill c", "behind them");
    // That mountd dies: its first request fails, and another mountd does the rest in order.
    world.goes(mountd(1));
    assert_eq!(world.asked_of(1), [""; 0]);
    world.done(Role::Mountd);
    let next = world.asked_of(0);
    assert!(next[0].contains("/2") && next[1] == "kill c", "{next:?}");
}

#[test]
fn the_next_part_is_asked_of_the_mountd_that_has_the_file() {
    let mut world = held_up();
    world.read("c", "/f");
    world.wait();
    assert_eq!(world.grow(), [1]);
    let (id, _) = world.asked.remove(1);
    // The first mountd is free now, too.
    world.done(Role::Mountd);
    let part = mountd::Reply::Part { bytes: crate::wire::Bytes(b"part".to_vec()), last: false };
    world.reply(Role::Mountd, id, Ok(Reply::Mountd(part)));
    assert_eq!(world.asked_of(1), ["read on"]);
    // The container ends: its requests go to the mountd that has the file open.
    world.exits(Pid(100), 9);
    assert_eq!(world.asked_of(1), ["read on", "kill c"]);
}

#[test]
fn a_volume_is_filled_by_one_mountd_and_given_up_there() {
    let mut world = held_up();
    world.populating("slow");
    assert_eq!(world.asked_of(0), ["prepare slow"]);
    world.new_container("d", 21);
    for _ in 0..3 {
        world.populating("slow");
        assert_eq!(world.asked_of(0), ["prepare slow"], "in between nobody else has it");
    }
    pass(&mut world, 50);
    assert_eq!(world.grow(), [1], "what it answers does not move anybody");
    assert_eq!(world.asked_of(1), ["prepare d"]);
    world.tell(Message::KillContainer, r#"{"container":"slow","signal":9}"#);
    world.populating("slow");
    assert_eq!(world.asked_of(0), ["kill slow", "remove slow"]);
}

#[test]
fn there_is_always_one_for_kills_and_one_for_unmounting() {
    let mut world = World::with_container();
    for stream in 0..u64::from(MOUNTDS) + 5 {
        world.new_container(&format!("slow{stream}"), 1000 + 2 * stream);
        pass(&mut world, 50);
        world.grow();
    }
    let busy = |world: &World| (0..MOUNTDS).filter(|&number| !world.asked_of(number).is_empty()).count();
    assert_eq!(busy(&world), usize::from(MOUNTDS) - 2);
    assert_eq!(world.supervisor.queues.waiting(Role::Mountd), 7);
    world.exits(Pid(100), 9);
    pass(&mut world, 50);
    assert_eq!(world.grow(), [MOUNTDS - 2]);
    assert_eq!(world.asked_of(MOUNTDS - 2), ["kill c"], "before those that have waited for longer");
    world.mountd_does(MOUNTDS - 2);
    world.done(Role::Streamd);
    assert_eq!(world.asked_of(MOUNTDS - 2), ["remove c"]);
    pass(&mut world, 1000);
    assert!(world.did().is_empty(), "the last one is for kills");
}

#[test]
fn a_disk_that_was_looked_for_in_vain_is_looked_for_when_nobody_else_waits() {
    let mut world = World::with_container();
    for (number, id) in ["d", "e", "f"].into_iter().enumerate() {
        world.new_container(id, 21 + 2 * number as u64);
    }
    let mut prepared = Vec::new();
    for _ in 0..4 {
        let (id, ask) = world.take(Role::Mountd);
        prepared.push(short(&ask));
        let reply = mountd::Reply::NotYet { fault: failure(Role::Mountd) };
        world.reply(Role::Mountd, id, Ok(Reply::Mountd(reply)));
    }
    assert_eq!(prepared, ["prepare d", "prepare e", "prepare f", "prepare d"]);
    world.new_container("g", 31);
    let (id, ask) = world.take(Role::Mountd);
    world.reply(Role::Mountd, id, Ok(done(&ask)));
    assert_eq!(world.asked(Role::Mountd), ["prepare g"], "before f and d");
}

#[test]
fn one_that_is_not_needed_any_more_is_ended_and_its_place_is_free() {
    let mut world = held_up();
    world.new_container("d", 21);
    world.wait();
    assert_eq!(world.grow(), [1]);
    world.mountd_does(1);
    pass(&mut world, 4999);
    assert!(world.did().is_empty());
    pass(&mut world, 1);
    assert_eq!(world.did(), [Action::DismissHelper { helper: mountd(1) }]);
    // Nothing is sent to a dismissed mountd.
    world.exits(Pid(100), 9);
    pass(&mut world, 50);
    assert_eq!(world.grow(), [2]);
    assert_eq!(world.asked_of(2), ["kill c"]);
    world.goes(mountd(1));
    world.tell(Message::WriteFile, r#"{"container":"slow","file":"/f"}x"#);
    world.tell(Message::SetupInterface, r#"{"device":"eth1"}"#);
    pass(&mut world, 50);
    assert_eq!(world.grow(), [1]);
    assert_eq!(world.asked_of(1), ["rescan"]);
    assert!(world.did().is_empty(), "the first one always runs");
}

#[test]
fn one_that_hangs_in_the_kernel_is_given_up_and_its_place_stays_taken() {
    let mut world = held_up();
    pass(&mut world, 30_000);
    assert!(matches!(world.did().as_slice(), [Action::KillHelper { helper: MOUNTD, lied: false, .. }]));
    world.asked.clear();
    // The killed mountd is not dead yet, and may never die: the host is told, and another mountd undoes what
    // is left.
    pass(&mut world, 50);
    assert_eq!(world.grow(), [1]);
    assert_eq!(world.asked_of(1), ["kill slow", "remove slow"]);
    world.done(Role::Mountd);
    world.done(Role::Mountd);
    assert!(world.said().concat().contains("mountd: it took too long"));
    // A reply of the killed mountd is ignored.
    world.feed(Event::Reply { helper: MOUNTD, id: 1, result: Err(failure(Role::Mountd)) });
    world.new_container("d", 21);
    assert_eq!(world.asked_of(1), ["prepare d"]);
    world.goes(MOUNTD);
    world.comes_up(Role::Mountd, 80);
    world.new_container("e", 31);
    assert_eq!(world.asked_of(0), ["prepare e"]);
    assert!(world.did().is_empty());
}

#[test]
fn while_the_first_comes_up_no_other_is_started() {
    let mut world = World::with_container();
    world.dies(Role::Mountd);
    world.exits(Pid(100), 9);
    pass(&mut world, 1000);
    assert!(world.did().is_empty());
    world.comes_up(Role::Mountd, 70);
    assert_eq!(world.asked_of(0), ["kill c"]);
}

#[test]
fn one_that_cannot_be_started_is_asked_for_again_or_the_next_one() {
    let mut world = held_up();
    world.new_container("d", 21);
    pass(&mut world, 50);
    assert_eq!(world.did(), [Action::StartHelper { helper: mountd(1) }]);
    pass(&mut world, 499);
    assert!(world.did().is_empty(), "one is coming for the one that waits");
    pass(&mut world, 1);
    assert_eq!(world.did(), [Action::StartHelper { helper: mountd(2) }], "the other takes its time");
    world.feed(Event::HelperGone(mountd(1)));
    pass(&mut world, 500);
    assert_eq!(world.did(), [Action::StartHelper { helper: mountd(1) }]);
    world.feed(Event::HelperClosed(mountd(1)));
    pass(&mut world, 500);
    assert_eq!(world.did(), [Action::StartHelper { helper: mountd(3) }]);
    world.feed(Event::HelperGone(mountd(1)));
    pass(&mut world, 500);
    assert_eq!(world.did(), [Action::StartHelper { helper: mountd(1) }], "it is not closed any more");
}

#[test]
fn the_pods_requests_keep_their_order_and_hold_up_no_container() {
    let mut world = World::with_container();
    world.tell(Message::SetupInterface, r#"{"device":"eth1"}"#);
    assert_eq!(world.asked_of(0), ["rescan"]);
    world.tell(Message::OnlineCpuMem, "null");
    assert_eq!(world.asked_of(0), ["rescan", "online"], "they wait for the same locks of the kernel");
    world.new_container("d", 21);
    pass(&mut world, 50);
    assert_eq!(world.grow(), [1]);
    assert_eq!(world.asked_of(1), ["prepare d"]);
}

//! READFILE and WRITEFILE: the parts, their limit, and what goes on meanwhile; also volumes that take long to
//! fill.

use super::*;
use crate::wire::Bytes;
use crate::wire::mountd::{FILE_MAX, PART_MAX};

impl World {
    pub(super) fn read(&mut self, container: &str, file: &str) {
        self.tell(Message::ReadFile, &format!(r#"{{"container":"{container}","file":"{file}"}}"#));
    }

    /// mountd answers its oldest request with a part of a file.
    pub(super) fn part(&mut self, bytes: &[u8], last: bool) {
        let (id, _) = self.take(Role::Mountd);
        let reply = mountd::Reply::Part { bytes: Bytes(bytes.to_vec()), last };
        self.reply(Role::Mountd, id, Ok(Reply::Mountd(reply)));
    }

    /// mountd answers that a container's volumes are not filled yet.
    pub(super) fn populating(&mut self, container: &str) {
        let (id, ask) = self.take(Role::Mountd);
        assert_eq!(short(&ask), format!("prepare {container}"));
        self.reply(Role::Mountd, id, Ok(Reply::Mountd(mountd::Reply::Populating)));
    }

    /// Sends more parts than the largest file has.
    fn largest_but_not_the_last(&mut self) {
        let part = vec![b'x'; PART_MAX];
        for _ in 0..=FILE_MAX / PART_MAX {
            self.part(&part, false);
        }
    }

    /// Sends a file of the largest size, to its end.
    fn largest(&mut self) {
        let part = vec![b'x'; PART_MAX];
        for _ in 0..FILE_MAX / PART_MAX {
            self.part(&part, false);
        }
        self.part(&part[..FILE_MAX % PART_MAX], true);
    }
}

#[test]
fn a_file_comes_in_parts_and_leaves_as_one_reply() {
    let mut world = World::with_container();
    world.read("c", "/f");
    assert_eq!(world.asked(Role::Mountd), ["read c /f"]);
    world.part(b"one ", false);
    assert_eq!(world.asked(Role::Mountd), ["read on"]);
    world.exec("c", "p", 3);
    world.started(Pid(101));
    assert!(world.said().is_empty(), "replies keep their order");
    world.part(b"two", true);
    assert_eq!(world.said(), ["ACK one two", "ACK "]);
    world.read("c", "/empty");
    world.part(b"", true);
    assert_eq!(world.said(), ["ACK "]);
    world.read("c", "/no");
    world.fails(Role::Mountd);
    world.read("c", "/f");
    world.part(b"half", false);
    world.fails(Role::Mountd);
    assert_eq!(world.said(), ["ERROR mountd: doing it: no", "ERROR mountd: doing it: no"]);
}

#[test]
fn a_file_is_written_in_one_go() {
    let mut world = World::with_container();
    world.tell(Message::WriteFile, r#"{"container":"c","file":"/f"}content"#);
    assert_eq!(world.asked(Role::Mountd), ["write c /f: 7 bytes"]);
    world.done(Role::Mountd);
    assert_eq!(world.said(), ["ACK "]);
}

#[test]
fn files_are_of_containers_that_run() {
    let mut world = World::with_container();
    world.read("d", "/f");
    world.read("hyperstart", "/f");
    assert_eq!(world.said().iter().filter(|said| said.starts_with("ERROR ")).count(), 2);
    world.new_container("d", 3);
    world.read("d", "/f");
    assert_eq!(world.asked(Role::Mountd), ["prepare d"], "it is not there yet");
    world.done(Role::Mountd);
    world.started(Pid(101));
    assert_eq!(world.asked(Role::Mountd), ["read d /f"]);
    world.part(b"x", true);
    assert_eq!(world.said(), ["ACK ", "ACK x"]);
    world.exits(Pid(101), 0);
    world.read("d", "/f");
    world.tell(Message::WriteFile, r#"{"container":"d","file":"/f"}"#);
    for said in world.said() {
        assert!(said.ends_with("the container does not run"), "{said}");
    }
}

#[test]
fn one_file_is_held_at_a_time_and_nothing_else_waits_for_it() {
    let mut world = World::with_container();
    world.read("c", "/a");
    world.read("c", "/b");
    world.read("c", "/c");
    world.tell(Message::KillContainer, r#"{"container":"c","signal":15}"#);
    assert_eq!(world.did(), [kill(100, Signal::TERM, false)], "at once");
    assert_eq!(world.asked(Role::Mountd), ["read c /a"]);
    world.largest();
    assert_eq!(world.said.len(), 1);
    assert_eq!(world.asked(Role::Mountd), Vec::<String>::new(), "the host has not taken it yet");
    world.feed(Event::ControlDrained);
    assert_eq!(world.asked(Role::Mountd), ["read c /b"]);
    world.part(b"b", true);
    assert_eq!(world.asked(Role::Mountd), ["read c /c"], "there is room for another");
    world.part(b"c", true);
    assert_eq!(world.said.len(), 4);
}

#[test]
fn what_is_held_does_not_hold_up_what_it_waits_for() {
    let mut world = World::with_container();
    world.new_container("d", 3);
    world.read("d", "/first");
    world.read("c", "/second");
    world.read("c", "/third");
    world.wait();
    assert_eq!(world.grow(), [1]);
    let mut left = FILE_MAX;
    while left > 0 {
        world.populating("d");
        let part = left.min(PART_MAX);
        left -= part;
        world.part(&vec![b'x'; part], left == 0);
    }
    assert!(world.said().is_empty(), "it waits for two before it");
    assert_eq!(world.asked(Role::Mountd), ["prepare d"], "a third file is not held");
    world.done(Role::Mountd);
    world.started(Pid(101));
    assert_eq!(world.asked(Role::Mountd), ["read d /first"]);
    world.part(b"1", true);
    assert_eq!(world.said.len(), 3);
}

#[test]
fn a_mountd_that_lies_about_a_file_is_killed() {
    let endless = |world: &mut World| world.largest_but_not_the_last();
    let empty = |world: &mut World| world.part(b"", false);
    let huge = |world: &mut World| world.part(&vec![0; PART_MAX + 1], true);
    let nothing = |world: &mut World| world.done(Role::Mountd);
    for lie in [&endless as &dyn Fn(&mut World), &empty, &huge, &nothing] {
        let mut world = World::with_container();
        world.read("c", "/f");
        lie(&mut world);
        assert!(
            matches!(world.did().as_slice(), [Action::KillHelper { helper: MOUNTD, .. }]),
            "it was believed"
        );
        world.dies(Role::Mountd);
        let said = world.said().join("");
        assert!(said.starts_with("ERROR ") && said.len() < 200, "{said}");
        world.comes_up(Role::Mountd, 20);
        world.read("c", "/f");
        world.part(b"f", true);
        assert_eq!(world.said(), ["ACK f"]);
    }
}

#[test]
fn a_part_answers_nothing_else() {
    let mut world = World::with_container();
    world.tell(Message::WriteFile, r#"{"container":"c","file":"/f"}content"#);
    world.part(b"f", true);
    assert!(matches!(world.did().as_slice(), [Action::KillHelper { helper: MOUNTD, .. }]));
}

#[test]
fn a_volume_takes_as_long_as_it_takes_and_holds_up_nobody() {
    let mut world = World::with_container();
    world.new_container("d", 3);
    world.exits(Pid(100), 0);
    world.populating("d");
    world.wait();
    assert_eq!(world.grow(), [1]);
    assert_eq!((world.asked_of(0), world.asked_of(1)), (vec!["prepare d".into()], vec!["kill c".into()]));
    world.populating("d");
    world.done(Role::Mountd);
    world.now += Duration::from_secs(100);
    world.populating("d");
    assert!(world.said().is_empty());
    world.tell(Message::DestroyPod, "null");
    world.populating("d");
    assert_eq!(world.asked(Role::Mountd), ["kill d", "remove d"], "there is no pod to be in any more");
}

#[test]
fn a_container_that_is_killed_while_a_volume_is_filled_is_given_up() {
    let mut world = World::with_container();
    world.new_container("d", 3);
    world.populating("d");
    world.tell(Message::KillContainer, r#"{"container":"d","signal":15}"#);
    world.populating("d");
    assert_eq!(world.asked(Role::Mountd), ["prepare d"], "its init may have something to say to that");
    world.tell(Message::KillContainer, r#"{"container":"d","signal":9}"#);
    world.tell(Message::RemoveContainer, r#"{"container":"d"}"#);
    world.populating("d");
    assert_eq!(world.asked(Role::Mountd), ["kill d", "remove d"]);
    world.done(Role::Mountd);
    assert!(world.said().is_empty(), "what was copied is not removed yet");
    world.done(Role::Mountd);
    let said = world.said();
    assert!(
        said[0].starts_with("ERROR ") && said[0].ends_with("it was killed before its volumes were filled"),
        "{said:?}"
    );
    assert!(said[1..].iter().all(|said| said.ends_with("no such container")) && said.len() == 4, "{said:?}");
    world.new_container("d", 3);
    world.done(Role::Mountd);
    world.started(Pid(101));
    assert_eq!(world.said(), ["ACK "]);
}

#[test]
fn a_kill_that_comes_before_the_start_is_known_to_take_long_waits_for_it() {
    let mut world = World::with_container();
    world.new_container("d", 3);
    world.tell(Message::KillContainer, r#"{"container":"d","signal":9}"#);
    world.done(Role::Mountd);
    world.started(Pid(101));
    assert_eq!(world.said(), ["ACK ", "ACK "]);
    assert_eq!(world.did().last(), Some(&kill(101, Signal::KILL, false)));
}

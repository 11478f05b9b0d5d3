//! A container whose disk hangs holds up only the processes started in it.

use std::os::fd::AsFd;
use std::time::{Duration, SystemTime};

use hyperinit::command::Command;
use hyperinit_client::{CallError, Pending};
use nix::fcntl::AT_FDCWD;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};
use serde_json::json;

use crate::guest::{Guest, Kind, PATIENCE, container_id, parse, parse_exec};

/// More starts than can be on their way to execd at once.
const HELD: u64 = 40;

fn exec(guest: &Guest, container: &str, number: u64, args: &[&str]) -> Pending {
    let process = json!({"id": format!("p{number}"), "args": args, "stdio": number, "stderr": number + 1});
    guest.client().send(parse_exec(container, process))
}

#[test]
fn starts_that_a_disk_holds_up_hold_up_nothing_else() {
    let guest = Guest::with_pod(Kind::Local);
    let root = guest.image("slow");
    let good = guest.sleeper("good");
    let slow = guest.container("slow", &["sleep", "100000"], json!({"image": "slow"}));
    // Simulates a disk that hangs: opening this file blocks. Its new modification time makes it differ from
    // the version that execd remembers.
    let passwd = std::fs::File::options().write(true).open(root.join("etc/passwd")).unwrap();
    passwd.set_modified(SystemTime::now()).unwrap();
    let hanging =
        Fanotify::init(InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC, EventFFlags::O_RDONLY);
    let hanging = hanging.unwrap();
    let path = root.join("etc/passwd");
    hanging.mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_OPEN_PERM, AT_FDCWD, Some(&path)).unwrap();
    let held: Vec<Pending> =
        (0..HELD).map(|number| exec(&guest, "slow", 20_001 + 2 * number, &["true"])).collect();
    let mut fds = [PollFd::new(hanging.as_fd(), PollFlags::POLLIN)];
    assert!(poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).unwrap() > 0, "nobody opens it");
    // The replies wait for their turn, but the commands have been carried out.
    let mut replies = Vec::new();
    for number in (30_001..).step_by(2).take(100) {
        let streams = guest.client().streams(number, number + 1);
        let words = number.to_string();
        replies.push(exec(&guest, "good", number, &["echo", &words]));
        assert_eq!(streams.stdout.read_to_end(PATIENCE).unwrap(), format!("{words}\n").as_bytes());
        let process = parse(json!(format!("p{number}")));
        assert_eq!(guest.client().finished(&container_id("good"), &process, PATIENCE), Ok(0));
        if number == 30_001 {
            let early = held[0].wait(Duration::ZERO);
            assert!(matches!(early, Err(CallError::Late(_))), "it was waited for: {early:?}");
        }
    }
    let streams = guest.client().streams(40_001, 40_002);
    let process = json!({"id": "other", "args": ["echo", "other"], "stdio": 40_001, "stderr": 40_002});
    let other = json!({"id": "other", "image": "image", "rootfs": "rootfs", "process": process});
    replies.push(guest.client().send(Command::NewContainer(parse(other))));
    assert_eq!(streams.stdout.read_to_end(PATIENCE).unwrap(), b"other\n");
    // The held starts fail by their time limit, or succeed if they are released in time.
    drop(hanging);
    for pending in held {
        match pending.wait(PATIENCE) {
            Ok(_) => {}
            Err(CallError::Refused(text)) => assert!(text.contains("timed out"), "{text}"),
            Err(error) => panic!("{error}"),
        }
    }
    for reply in replies {
        reply.wait(PATIENCE).unwrap();
    }
    assert!(!guest.log().contains("execd is killed"), "{}", guest.log());
    guest.finish(good);
    guest.finish(slow);
}

//! The bytes of processes arrive completely and in order, whichever side is slow.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::guest::{Guest, PATIENCE, Running, parse_exec};

const LARGE: usize = 8 << 20;

/// Bytes in which a lost, doubled or swapped piece is noticed.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length / 8)
        .flat_map(|number| (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect()
}

/// Writes bytes to a file of the image, from where a program can print them. Returns the path in the
/// container.
fn file(guest: &Guest, name: &str, bytes: &[u8]) -> String {
    std::fs::write(guest.share.join("image/rootfs/tmp").join(name), bytes).unwrap();
    format!("/tmp/{name}")
}

fn read(running: &Running<'_>) -> Vec<u8> {
    running.streams.stdout.read_to_end(PATIENCE).unwrap()
}

pub fn eight_megabytes_out_and_in(guest: &Guest) {
    let main = guest.sleeper("large");
    let bytes = pattern(LARGE);
    let path = file(guest, "large", &bytes);
    let out = guest.exec("large", &["cat", &path], json!({}));
    assert!(read(&out) == bytes, "out");
    assert_eq!(out.status(), 0);

    let sum = guest.says("large", &format!("md5sum <{path}"));
    let running = guest.exec("large", &["md5sum"], json!({}));
    let (small, rest) = bytes.split_at(1 << 20);
    running.streams.stdin.write_in(16, &small[..1 << 16]).unwrap();
    running.streams.stdin.write_in(12_345, &small[1 << 16..]).unwrap();
    running.streams.stdin.write(rest).unwrap();
    assert_eq!(running.outcome().stdout, sum, "in");
    guest.finish(main);
}

pub fn both_ways_at_once(guest: &Guest) {
    let main = guest.sleeper("both");
    let bytes = pattern(LARGE);
    let running = guest.exec("both", &["cat"], json!({}));
    let stdin = running.streams.stdin.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| stdin.write(&bytes).and_then(|()| stdin.close()).unwrap());
        assert!(read(&running) == bytes);
    });
    assert_eq!(running.status(), 0);
    guest.finish(main);
}

pub fn a_host_that_reads_late_gets_everything(guest: &Guest) {
    let main = guest.sleeper("late");
    let bytes = pattern(LARGE);
    let path = file(guest, "late", &bytes);
    let script = format!("cat {path} & echo $! >/dev/shm/late; wait; exit 9");
    let running = guest.exec("late", &["sh", "-c", &script], json!({}));
    // The test does not read until cat sleeps in its write to the pipe and its position has not changed since
    // the last look.
    let blocked = "until [ -s /dev/shm/late ]; do :; done
        cat=/proc/$(cat /dev/shm/late)
        until grep -q '^State:.S' $cat/status && [ \"$now\" = \"$before\" ] && [ -n \"$now\" ]; do
            before=$now; now=$(grep pos: $cat/fdinfo/3)
        done
        >/tmp/late-blocked";
    let watch = guest.exec("late", &["sh", "-c", blocked], json!({}));
    // The port is full, so no stream and no event can tell the host.
    let mark = guest.share.join("image/rootfs/tmp/late-blocked");
    let deadline = Instant::now() + PATIENCE;
    while !mark.exists() {
        assert!(Instant::now() < deadline, "the process is never blocked");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(read(&running) == bytes);
    assert_eq!((running.status(), watch.outcome().status), (9, 0));
    guest.finish(main);
}

pub fn a_process_that_does_not_read_holds_up_no_output(guest: &Guest) {
    const FRAME: usize = 32 << 10;
    const COUNT: usize = 128;
    let main = guest.sleeper("deaf");
    let deaf = guest.exec("deaf", &["sleep", "100000"], json!({}));
    let talker = guest.exec("deaf", &["sh", "-c", "while :; do echo talk; done"], json!({}));
    let stdin = deaf.streams.stdin.clone();
    std::thread::scope(|scope| {
        // More than the pipe and the guest's queue hold: this waits until the process is gone.
        let writer = scope.spawn(move || stdin.write_in(FRAME, &vec![0; COUNT * FRAME]));
        for _ in 0..50 {
            talker.read_until("talk\n");
        }
        deaf.signal(9);
        writer.join().unwrap().unwrap();
    });
    assert_eq!(deaf.end_before(COUNT as u32).status, 137);
    talker.signal(9);
    assert_eq!(talker.end().status, 137);
    let outcome = guest.exec("deaf", &["cat"], json!({}));
    outcome.streams.stdin.write(b"heard").unwrap();
    assert_eq!(outcome.outcome().stdout, "heard");
    guest.finish(main);
}

pub fn sixty_four_at_once(guest: &Guest) {
    let main = guest.sleeper("many");
    let running: Vec<_> = (0..64)
        .map(|number| {
            let script = format!("read x; seq {number} {}; echo $x >&2; exit {number}", number + 500);
            guest.exec("many", &["sh", "-c", &script], json!({}))
        })
        .collect();
    for (number, running) in running.iter().enumerate() {
        running.streams.stdin.write(format!("word {number}\n").as_bytes()).unwrap();
    }
    for (number, running) in running.into_iter().enumerate() {
        let outcome = running.end();
        let expected: String = (number..=number + 500).map(|line| format!("{line}\n")).collect();
        assert_eq!(usize::from(outcome.status), number);
        assert!(outcome.stdout == expected && outcome.stderr == format!("word {number}\n"), "{number}");
    }
    guest.finish(main);
}

pub fn a_flood_starves_nobody(guest: &Guest) {
    let main = guest.sleeper("flood");
    let flood = guest.exec("flood", &["cat", "/dev/zero"], json!({}));
    let discarded = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while let Ok(Some(chunk)) = flood.streams.stdout.recv_within(PATIENCE) {
                discarded.fetch_add(chunk.len(), Ordering::Relaxed);
            }
        });
        // At least ten commands, and at least until the output has become a flood.
        let start = Instant::now();
        for number in 0.. {
            assert_eq!(guest.says("flood", &format!("echo {number}")), format!("{number}\n"));
            if number >= 10 && discarded.load(Ordering::Relaxed) > 1 << 20 {
                break;
            }
            assert!(start.elapsed() < PATIENCE, "{discarded:?}");
        }
        flood.signal(9);
    });
    assert_eq!(flood.status(), 137);
    guest.finish(main);
}

pub fn a_survivor_does_not_hold_up_the_end(guest: &Guest) {
    let main = guest.sleeper("survivor");
    let script = "(read x </dev/shm/go; echo late; echo $? >/dev/shm/survivor) & echo early; exit 3";
    guest.says("survivor", "mkfifo /dev/shm/go");
    let outcome = guest.exec("survivor", &["sh", "-c", script], json!({})).outcome();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("early\n", 3));
    // The survivor's output is now discarded, and writing it does not kill the survivor.
    guest.says("survivor", "echo go >/dev/shm/go; while [ ! -s /dev/shm/survivor ]; do :; done");
    assert_eq!(guest.says("survivor", "cat /dev/shm/survivor"), "0\n");
    guest.finish(main);
}

pub fn stdin_ends_when_the_host_says_so(guest: &Guest) {
    let main = guest.sleeper("end");
    let running = guest.exec("end", &["sh", "-c", "cat; echo end; exit 2"], json!({}));
    running.streams.stdin.write(b"one\n").unwrap();
    running.read_until("one\n");
    running.streams.stdin.close().unwrap();
    let outcome = running.end();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("end\n", 2));
    let closed = guest.exec("end", &["sh", "-c", "exec <&- >&- 2>&-; exit 7"], json!({}));
    assert_eq!(closed.end().status, 7, "a process that closes everything is finished all the same");
    guest.finish(main);
}

pub fn stdin_ends_once(guest: &Guest) {
    let main = guest.sleeper("ends");
    let script = "cat; echo; read -r x; echo $?";
    let running = guest.exec("ends", &["sh", "-c", script], json!({}));
    running.streams.stdin.write(b"last words").unwrap();
    for _ in 0..2 {
        running.streams.stdin.close().unwrap();
        running.streams.stdin.write(b"after the end").unwrap();
    }
    // The first of the four frames behind the words is the end of stdin; each of the other three may be
    // answered by an EOF frame.
    assert_eq!(running.end_before(3).stdout, "last words\n1\n");
    guest.finish(main);
}

pub fn stdout_and_stderr_are_apart(guest: &Guest) {
    let main = guest.sleeper("apart");
    let script = "i=0; while [ $i -lt 3000 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done";
    let outcome = guest.sh("apart", script);
    let lines = |word: &str| (0..3000).map(|number| format!("{word} {number}\n")).collect::<String>();
    assert_eq!(outcome.status, 0);
    assert!(outcome.stdout == lines("out") && outcome.stderr == lines("err"));
    guest.finish(main);
}

pub fn a_stream_belongs_to_one_process(guest: &Guest) {
    let main = guest.sleeper("owner");
    let owner = guest.exec("owner", &["cat"], json!({"stdio": 7301, "stderr": 7302}));
    for (stdio, stderr, why) in [
        (7301, 7309, "stream 7301 belongs to another process"),
        (7309, 7302, "stream 7302 belongs to another process"),
        (7302, 7309, "stream 7302 belongs to another process"),
        (7309, 7309, "stderr: is the same stream as stdio"),
        (7309, 0, "stderr: is 0 without a terminal"),
        (7309, u64::MAX, "18446744073709551615 is no process's"),
        (0, 7309, "stdio"),
    ] {
        let thief = json!({"id": "thief", "args": ["true"], "stdio": stdio, "stderr": stderr});
        let text = guest.refused(parse_exec("owner", thief));
        assert!(text.contains(why), "{text}");
    }
    owner.streams.stdin.write(b"unharmed").unwrap();
    assert_eq!(owner.outcome().stdout, "unharmed");
    let next = guest.exec("owner", &["echo", "free again"], json!({"stdio": 7302, "stderr": 7301}));
    assert_eq!(next.outcome().stdout, "free again\n");
    guest.finish(main);
}

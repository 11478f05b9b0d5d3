//! Terminals as the host uses them (protocol.md «Streams», WINSIZE).

use hyperinit::command::Command;
use serde_json::{Value, json};

use super::streams::pattern;
use crate::guest::{Guest, PATIENCE, container_id, parse, parse_exec};

fn terminal() -> Value {
    json!({"terminal": true, "stderr": 0})
}

/// A terminal in raw mode is like a pipe: it changes nothing and loses nothing, however slowly either side
/// reads.
pub fn eight_megabytes_through_it(guest: &Guest) {
    let main = guest.sleeper("tty-large");
    let bytes = pattern(8 << 20);
    let script = "stty raw -echo; echo up; head -c 8388608";
    let running = guest.exec("tty-large", &["sh", "-c", script], terminal());
    running.read_until("up\n");
    let stdin = running.streams.stdin.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| stdin.write(&bytes).unwrap());
        assert!(running.streams.stdout.read_to_end(PATIENCE).unwrap() == bytes);
    });
    assert_eq!(running.status(), 0);
    guest.finish(main);
}

/// Only a typed Control-D ends the input of a terminal.
pub fn an_empty_frame_does_not_close_it(guest: &Guest) {
    let main = guest.sleeper("tty-end");
    let running = guest.exec("tty-end", &["sh", "-c", "stty -echo; echo up; cat; echo end"], terminal());
    running.read_until("up\r\n");
    running.streams.stdin.close().unwrap();
    running.streams.stdin.write(b"still\n").unwrap();
    running.read_until("still\r\n");
    running.streams.stdin.write(b"\x04").unwrap();
    running.read_until("end\r\n");
    assert_eq!(running.status(), 0);
    guest.finish(main);
}

/// The terminal has the size that was sent directly behind the start when the process first asks for it.
pub fn its_size_may_be_sent_behind_the_start(guest: &Guest) {
    const ROUNDS: u64 = 40;
    let main = guest.sleeper("tty-first");
    for round in 0..ROUNDS {
        let (stdio, id) = (50_001 + round, format!("first-{round}"));
        let process = json!({"id": id, "args": ["stty", "size"], "stdio": stdio, "terminal": true});
        let streams = guest.client().streams(stdio, 0);
        // Every fourth process is the init of a container.
        let (container, start) = if round % 4 == 0 {
            let json = json!({"id": id, "image": "image", "rootfs": "rootfs", "process": process});
            (id.as_str(), Command::NewContainer(parse(json)))
        } else {
            ("tty-first", parse_exec("tty-first", process))
        };
        let size = json!({"container": container, "process": id, "row": 43, "column": 132});
        let [started, resized] = guest.client().send_with_size(&start, parse(size));
        let said = streams.stdout.read_to_end(PATIENCE).unwrap();
        assert_eq!(String::from_utf8_lossy(&said), "43 132\r\n", "round {round}");
        started.wait(PATIENCE).unwrap();
        resized.wait(PATIENCE).unwrap();
        let process = parse(json!(id));
        assert_eq!(guest.client().finished(&container_id(container), &process, PATIENCE), Ok(0));
        if round % 4 == 0 {
            guest.remove(container);
        }
    }
    guest.finish(main);
}

/// busybox's stty accepts only sizes from 2 to 29,999.
pub fn its_size_is_any(guest: &Guest) {
    let main = guest.sleeper("tty-size");
    let script = "echo up; while read x; do stty size; done";
    let running = guest.exec("tty-size", &["sh", "-c", script], terminal());
    running.read_until("up\r\n");
    for (row, column) in [(2, 2), (43, 132), (29_999, 29_999), (24, 80)] {
        running.resize(row, column);
        running.streams.stdin.write(b"\n").unwrap();
        running.read_until(&format!("\r\n{row} {column}\r\n"));
    }
    running.streams.stdin.write(b"\x04").unwrap();
    assert_eq!(running.status(), 0);
    guest.finish(main);
}

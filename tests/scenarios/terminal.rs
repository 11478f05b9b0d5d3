//! Terminals as the host meets them (protocol.md «Streams», WINSIZE).

use serde_json::{Value, json};

use super::streams::pattern;
use crate::guest::{Guest, PATIENCE};

fn terminal() -> Value {
    json!({"terminal": true, "stderr": 0})
}

/// A terminal in raw mode is a pipe: it changes nothing and loses nothing, however slowly either side reads.
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

/// Only what is typed ends its input: Control-D.
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

/// busybox's stty takes sizes from 2 to 29,999 for true.
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

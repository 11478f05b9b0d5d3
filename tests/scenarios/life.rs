//! Containers and processes: how they come to be, and how they end.

use serde_json::json;

use crate::guest::{Guest, Outcome};

pub fn a_container_has_its_streams_and_its_status(guest: &Guest) {
    let init = guest.container("life", &["sh", "-c", "echo out; echo err >&2; cat; exit 7"], json!({}));
    init.streams.stdin.write(b"in").unwrap();
    let expected = Outcome { status: 7, stdout: "out\nin".to_owned(), stderr: "err\n".to_owned() };
    assert_eq!(init.outcome(), expected);
    guest.remove("life");
}

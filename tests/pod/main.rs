//! A whole pod in the whole guest.

#[path = "../guest/mod.rs"]
mod guest;

use guest::{Guest, Kind, Outcome};
use hyperinit::command::Command;
use serde_json::json;

#[test]
fn smoke() {
    let guest = Guest::with_pod(Kind::Local);
    let init = guest.container("c", &["sh", "-c", "echo out; echo err >&2; cat; exit 7"], json!({}));
    init.streams.stdin.write(b"in").unwrap();
    assert_eq!(
        init.outcome(),
        Outcome { status: 7, stdout: "out\nin".to_owned(), stderr: "err\n".to_owned() }
    );
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

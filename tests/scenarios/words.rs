//! Correct and incorrect commands of a host (protocol.md «Control messages», «JSON»).

use hyperinit::command::Command;
use hyperinit::frame::Message;
use serde_json::{Value, json};

use crate::guest::{Guest, PATIENCE, container_id, refusal};

pub fn only_the_guest_says_that(guest: &Guest) {
    for message in [Message::Ack, Message::Error, Message::Next, Message::ProcessAsyncEvent] {
        let text = refusal(guest.client().send_raw(message.id(), b"null").wait(PATIENCE));
        assert!(text.contains("only the guest says that"), "{message}: {text}");
    }
    for payload in ["", "null", "{}"] {
        let ping = guest.client().send_raw(Message::Ping.id(), payload.as_bytes());
        assert_eq!(ping.wait(PATIENCE), Ok(vec![]), "{payload:?} is no argument");
    }
}

pub fn a_wrong_word_is_named(guest: &Guest) {
    let process = json!({"id": "p", "args": ["true"], "stdio": 7401, "stderr": 7402});
    let container = |key: &str, value: Value| {
        let mut all = json!({"id": "wrong", "image": "image", "rootfs": "rootfs", "process": process});
        all[key] = value;
        all
    };
    for (message, payload, key) in [
        (Message::NewContainer, json!(null), ""),
        (Message::NewContainer, json!([]), ""),
        (Message::NewContainer, container("id", json!(7)), "id"),
        (Message::NewContainer, container("id", json!("../wrong")), "id"),
        (Message::NewContainer, container("readOnly", json!("true")), "readOnly"),
        (Message::NewContainer, container("process", json!({"args": "true"})), "args"),
        (Message::NewContainer, container("process", json!({"args": ["true"], "stdio": "7401"})), "stdio"),
        (Message::NewContainer, container("process", json!({"args": ["true"], "stdio": -1})), "stdio"),
        (Message::ExecCmd, json!({"process": process}), "container"),
        (Message::ExecCmd, json!({"container": "wrong"}), "process"),
        (Message::WinSize, json!({"container": "wrong", "process": "p", "row": 24}), "column"),
        (Message::WinSize, json!({"container": "wrong", "process": "p", "row": 65536, "column": 1}), "row"),
        (Message::KillContainer, json!({"container": "wrong"}), "signal"),
        (Message::SignalProcess, json!({"container": "wrong", "signal": 9}), "process"),
        (Message::RemoveContainer, json!({}), "container"),
    ] {
        let text = payload.to_string();
        let text = refusal(guest.client().send_raw(message.id(), text.as_bytes()).wait(PATIENCE));
        assert!(text.contains(message.name()) && text.contains(key), "{message} {payload}: {text}");
    }
    // Incomplete JSON, JSON with more behind it, and text that is not UTF-8.
    for payload in
        [&b"{\"container\":"[..], b"{\"container\":\"c\",\"signal\":9}{", b"\xff\xfe", b"{\"a\":\"\xc3\"}"]
    {
        refusal(guest.client().send_raw(Message::KillContainer.id(), payload).wait(PATIENCE));
    }
    guest.call(Command::Ping);
}

/// runV sends keys that the C original never parsed, and `null` for whatever is empty.
pub fn unknown_words_are_overlooked(guest: &Guest) {
    let main = guest.sleeper("unknown");
    let streams = guest.client().streams(7411, 7412);
    let exec = json!({
        "container": "unknown", "frobnicate": {"deep": [1, {"deeper": null}]},
        "process": {
            "id": "p", "args": ["echo", "hi"], "stdio": 7411, "stderr": 7412, "frob": 1, "user": null, "group": null,
            "additionalGroups": null, "envs": null, "rlimits": null, "workdir": null,
        }
    });
    guest.client().send_raw(Message::ExecCmd.id(), exec.to_string().as_bytes()).wait(PATIENCE).unwrap();
    assert_eq!(streams.stdout.read_to_end(PATIENCE).unwrap(), b"hi\n");
    let process = "p".to_owned().try_into().unwrap();
    assert_eq!(guest.client().finished(&container_id("unknown"), &process, PATIENCE), Ok(0));
    guest.finish(main);
}

/// Deprecated keys that runV still sends, and ports, which mean nothing without a whitelist.
pub fn what_means_nothing_is_overlooked(guest: &Guest) {
    let more = json!({
        "restartPolicy": "always",
        "ports": [{"hostPort": 80, "containerPort": 8080, "protocol": "tcp"}],
    });
    for _ in 0..2 {
        // The same ports again: the first container is gone, and was not restarted.
        assert_eq!(guest.container_says("nothing", "echo once", more.clone()), "once\n");
    }
}

/// docs/limits.md: the guest answers each with an ERROR and goes on. An ERROR that quoted the whole id would
/// be too long to send.
pub fn what_is_too_much_is_refused(guest: &Guest) {
    let refused = |message: Message, payload: Value| {
        let call = guest.client().send_raw(message.id(), payload.to_string().as_bytes());
        let text = refusal(call.wait(PATIENCE));
        assert!(text.len() < 4096, "{} bytes", text.len());
        text
    };
    let routes = vec![json!({}); 4097];
    assert!(refused(Message::SetupRoute, json!({ "routes": routes })).contains("routes: more than 4096"));
    let path = "/".repeat(4097);
    let text = refused(Message::ReadFile, json!({"container": "c", "file": path}));
    assert!(text.contains("file: longer than 4096 bytes"), "{text}");
    let id = "\x7f".repeat(3 << 20);
    let text = refused(Message::RemoveContainer, json!({ "container": id }));
    assert!(text.contains("is longer than 128 bytes"), "{text}");
    let pings: Vec<_> = (0..2000).map(|_| guest.client().send_raw(Message::Ping.id(), b"null")).collect();
    pings.into_iter().for_each(|ping| assert_eq!(ping.wait(PATIENCE), Ok(vec![])));
}

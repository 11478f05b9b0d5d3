//! Measures how much memory a command's JSON takes when parsed: init counts each byte of it several times
//! (`command::weight`), and this test checks that factor. It is a separate program because it counts every
//! allocation.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

use std::alloc::System;
use std::sync::{Mutex, PoisonError};

use hyperinit::command::{Command, JSON_MAX, JSON_WEIGHT, parse};
use hyperinit::frame::Message;
use hyperinit::spec::{
    ADDRESSES_MAX, ARGS_MAX, CONTAINERS_MAX, GROUPS_MAX, INTERFACES_MAX, PORTS_MAX, RLIMITS_MAX, ROUTES_MAX,
    VOLUMES_MAX,
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static COUNTED: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Held while a test counts: the counter covers the whole program, and so another test too.
static COUNTING: Mutex<()> = Mutex::new(());

/// The C library's overhead for a block, in bytes: a header word, and rounding.
const BLOCK: usize = 16;

/// A JSON list of `count` equal elements.
fn list(element: &str, count: usize) -> String {
    format!("[{}]", vec![element; count].join(","))
}

/// How many bytes of memory the command takes for each byte of its JSON. A list takes the next power of two.
fn grown(message: Message, json: &str) -> f64 {
    assert!(json.len() <= JSON_MAX, "{} bytes", json.len());
    let region = Region::new(COUNTED);
    let command = parse(message.id(), json.as_bytes());
    let counts = region.change();
    let command: Command = command.unwrap_or_else(|fault| panic!("{fault}"));
    let bytes = counts.bytes_allocated - counts.bytes_deallocated;
    let blocks = counts.allocations - counts.deallocations;
    drop(command);
    (bytes + blocks * BLOCK) as f64 / json.len() as f64
}

fn container(more: &str) -> String {
    format!(r#"{{"id":"c","process":{{{more}}}}}"#)
}

fn exec(more: &str) -> String {
    format!(r#"{{"container":"c","process":{{"id":"p",{more}}}}}"#)
}

/// Every list at its maximum length, with the smallest possible elements; and text. A list slightly longer
/// than a power of two has twice the capacity that it needs.
fn shapes() -> Vec<(&'static str, Message, String)> {
    let full = |element: &str, fits: usize| list(element, fits.min((JSON_MAX - 200) / (element.len() + 1)));
    vec![
        ("args", Message::ExecCmd, exec(&format!(r#""args":{}"#, full("\"\"", ARGS_MAX)))),
        ("args of a byte", Message::ExecCmd, exec(&format!(r#""args":{}"#, full("\"a\"", ARGS_MAX)))),
        ("a little more than half", Message::ExecCmd, exec(&format!(r#""args":{}"#, list("\"a\"", 65_537)))),
        ("envs", Message::ExecCmd, exec(&format!(r#""envs":{}"#, full(r#"{"env":""}"#, ARGS_MAX)))),
        (
            "envs of a byte",
            Message::ExecCmd,
            exec(&format!(r#""envs":{}"#, full(r#"{"env":"a","value":"b"}"#, ARGS_MAX))),
        ),
        ("groups", Message::ExecCmd, exec(&format!(r#""additionalGroups":{}"#, full("\"1\"", GROUPS_MAX)))),
        (
            "rlimits",
            Message::ExecCmd,
            exec(&format!(r#""rlimits":{}"#, full(r#"{"type":"","hard":1,"soft":1}"#, RLIMITS_MAX))),
        ),
        (
            "containers",
            Message::StartPod,
            format!(r#"{{"containers":{}}}"#, full(&container(""), CONTAINERS_MAX)),
        ),
        ("interfaces", Message::StartPod, format!(r#"{{"interfaces":{}}}"#, full("{}", INTERFACES_MAX))),
        ("addresses", Message::SetupInterface, format!(r#"{{"ipAddresses":{}}}"#, full("{}", ADDRESSES_MAX))),
        ("routes", Message::SetupRoute, format!(r#"{{"routes":{}}}"#, full("{}", ROUTES_MAX))),
        (
            "routes of a byte",
            Message::SetupRoute,
            format!(r#"{{"routes":{}}}"#, full(r#"{"dest":"a"}"#, ROUTES_MAX)),
        ),
        ("half the routes", Message::SetupRoute, format!(r#"{{"routes":{}}}"#, list("{}", 2049))),
        (
            "ports",
            Message::NewContainer,
            format!(r#"{{"id":"c","process":{{}},"ports":{}}}"#, full("{}", PORTS_MAX)),
        ),
        (
            "volumes",
            Message::NewContainer,
            format!(r#"{{"id":"c","process":{{}},"volumes":{}}}"#, full(r#"{"mount":"a"}"#, VOLUMES_MAX)),
        ),
        (
            "fsmap",
            Message::NewContainer,
            format!(
                r#"{{"id":"c","process":{{}},"fsmap":{}}}"#,
                full(r#"{"source":"a","path":"b"}"#, VOLUMES_MAX)
            ),
        ),
        (
            "text",
            Message::NewContainer,
            format!(r#"{{"id":"c","process":{{}},"image":"{}"}}"#, "x".repeat(1 << 20)),
        ),
    ]
}

#[test]
fn json_grows_by_no_more_than_it_is_counted_for() {
    let _counting = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut worst: f64 = 0.0;
    for (what, message, json) in shapes() {
        let (times, length) = (grown(message, &json), json.len());
        assert!(times <= JSON_WEIGHT as f64, "{what}: {length} bytes grow {times:.1}-fold");
        worst = worst.max(times);
    }
    assert!(
        worst > JSON_WEIGHT as f64 / 2.0,
        "it is counted for more than the {worst:.1}-fold that it grows"
    );
}

/// JSON of nearly the maximum size grows less: longer lists are refused.
#[test]
fn large_json_grows_less() {
    let _counting = COUNTING.lock().unwrap_or_else(PoisonError::into_inner);
    let args = exec(&format!(
        r#""args":{0},"envs":{1},"additionalGroups":{2}"#,
        list("\"a\"", ARGS_MAX),
        list(r#"{"env":"a","value":"b"}"#, ARGS_MAX),
        list("\"1\"", GROUPS_MAX)
    ));
    let args = &args[..args.len().min(JSON_MAX)];
    let ports = container(&format!(r#""args":{}"#, list("\"a\"", 900)));
    let pod = format!(r#"{{"containers":{}}}"#, list(&ports, 1000));
    for (message, json) in [(Message::ExecCmd, args), (Message::StartPod, pod.as_str())] {
        assert!(json.len() > JSON_MAX / 4 * 3, "{} bytes", json.len());
        let times = grown(message, json);
        assert!(times <= 12.0, "{} bytes grow {times:.1}-fold", json.len());
    }
}

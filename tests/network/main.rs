//! The network of a whole guest: in namespaces with links into another one, and in a VM with QEMU's own
//! network.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's panic is its report")]

#[path = "../guest/mod.rs"]
mod guest;
mod local;
#[path = "../support/mod.rs"]
mod support;
mod vm;

use hyperinit::command::{Command, SetupRoute};
use serde_json::{Value, json};

use guest::parse;

/// STARTPOD with the share, and more of its JSON.
fn start_pod(more: Value) -> Command {
    let mut pod = json!({"hostname": "pod-1", "shareDir": "share_dir"});
    pod.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    Command::StartPod(Box::new(parse(pod)))
}

fn set_up(interface: Value) -> Command {
    Command::SetupInterface(parse(interface))
}

fn delete(device: &str) -> Command {
    Command::DeleteInterface(parse(json!({"device": device})))
}

fn routes(routes: Value) -> Command {
    Command::SetupRoute(SetupRoute { routes: parse(routes) })
}

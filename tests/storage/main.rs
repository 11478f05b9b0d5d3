//! Storage on the real devices, in VMs: disks on virtio and SCSI, a share by 9p and by virtiofs, volumes of
//! an NFS server.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's panic is its report")]

mod disks;
#[path = "../guest/mod.rs"]
mod guest;
mod images;
mod nine_p;
mod servers;
mod shares;
mod waiting;

use hyperinit::command::{Command, File, WriteFile};
use serde_json::Value;

use guest::container_id;

fn merged(mut all: Value, more: Value) -> Value {
    all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    all
}

fn read(container: &str, path: &str) -> Command {
    Command::ReadFile(File { container: container_id(container), file: path.to_owned() })
}

fn write(container: &str, path: &str, data: &[u8]) -> Command {
    let file = File { container: container_id(container), file: path.to_owned() };
    Command::WriteFile(WriteFile { file, data: data.to_vec() })
}

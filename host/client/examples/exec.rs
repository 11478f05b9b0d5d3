//! Runs a program in a container of a running guest, and prints what it writes.
//!
//! `cargo run -p hyperinit-client --example exec -- DIR CONTAINER PROGRAM [ARGUMENT…]`, where DIR is the
//! directory that `hyperctl up --dir DIR` has made, and CONTAINER has been started with NEWCONTAINER or
//! STARTPOD.
#![forbid(unsafe_code)]

use std::error::Error;
use std::io::Write;
use std::path::Path;

use hyperinit_client::{Client, TIMEOUT};
use hyperinit_protocol::command::{Command, ExecCmd};
use hyperinit_protocol::ids::{ContainerId, ProcessId};
use hyperinit_protocol::spec::Process;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, container, program @ ..] = arguments.as_slice() else {
        return Err("usage: exec DIR CONTAINER PROGRAM [ARGUMENT…]".into());
    };
    let container = ContainerId::try_from(container.clone())?;
    let id = ProcessId::try_from(format!("example-{}", std::process::id()))?;
    // Any two numbers that no other process of the guest uses.
    let stdio: u64 = 1 << 32 | u64::from(std::process::id()) << 1;
    // The keys of docs/protocol.md «Process»; keys that are left out have the defaults stated there.
    let process: Process = serde_json::from_value(serde_json::json!({
        "id": &id, "args": program, "stdio": stdio, "stderr": stdio | 1,
    }))?;

    let client = Client::visit(Path::new(directory))?;
    // The streams are registered before the program can write.
    let streams = client.streams(stdio, stdio | 1);
    client.call(Command::ExecCmd(ExecCmd { container: container.clone(), process: Box::new(process) }))?;
    std::io::stdout().write_all(&streams.stdout.read_to_end(TIMEOUT)?)?;
    if let Some(stderr) = &streams.stderr {
        std::io::stderr().write_all(&stderr.read_to_end(TIMEOUT)?)?;
    }
    let status = client.finished(&container, &id, TIMEOUT)?;
    writeln!(std::io::stderr(), "exit status {status}")?;
    Ok(())
}

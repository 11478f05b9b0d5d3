//! QEMU's control socket (QMP): how a host changes a VM's hardware.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::PATIENCE;

/// A connection to one QEMU.
pub struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
    /// Events about devices that no test has waited for yet.
    events: Vec<Value>,
}

impl Qmp {
    /// Connects to the VM whose sockets are in that directory.
    pub fn connect(directory: &Path) -> Qmp {
        let writer = UnixStream::connect(directory.join("qmp.sock")).unwrap();
        writer.set_read_timeout(Some(PATIENCE)).unwrap();
        let reader = BufReader::new(writer.try_clone().unwrap());
        let mut qmp = Qmp { reader, writer, events: Vec::new() };
        assert!(qmp.line()["QMP"].is_object());
        qmp.run("qmp_capabilities", json!({}));
        qmp
    }

    /// Runs a command that must succeed, and returns its result.
    pub fn run(&mut self, command: &str, arguments: Value) -> Value {
        let line = json!({"execute": command, "arguments": arguments});
        self.writer.write_all(format!("{line}\n").as_bytes()).unwrap();
        loop {
            let answer = self.line();
            if answer.get("event").is_none() {
                assert!(answer.get("return").is_some(), "{line}: {answer}");
                return answer["return"].clone();
            }
            self.events.push(answer);
        }
    }

    /// Waits for an event of that name about that device.
    pub fn wait_for(&mut self, event: &str, device: &str) {
        let is = |value: &Value| value["event"] == event && value["data"]["device"] == device;
        while !self.events.iter().any(is) {
            let next = self.line();
            self.events.push(next);
        }
        self.events.retain(|value| !is(value));
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line:?}: {error}"))
    }
}

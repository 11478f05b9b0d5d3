//! A program that serves a device to QEMU (vhost-user): started before it, and ended after it.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use hyperinit::fault::{Fault, OrFault};

use super::guest;

/// How long it may take to listen.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How often its socket is looked for.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// What is to be started.
#[derive(Debug, Clone, PartialEq)]
pub struct Service {
    /// The program; it runs in the guest's directory.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<OsString>,
    /// The socket that QEMU connects to, in the guest's directory.
    pub socket: &'static str,
}

/// A running one. Dropping it ends it.
pub struct Running(Child);

impl Service {
    /// Starts it and waits until it listens. What it has to complain about goes to `log`. It dies with the calling thread.
    pub fn start(&self, directory: &Path, log: &File) -> Result<Running, Fault> {
        let output = || log.try_clone().fault("duplicating", "the log");
        let mut command = guest::tied();
        command.arg("--").arg(&self.program).args(&self.arguments);
        command.current_dir(directory).stdin(Stdio::null()).stdout(output()?).stderr(output()?);
        let mut running = Running(command.spawn().fault("starting", self.program.display())?);
        let (socket, deadline) = (directory.join(self.socket), Instant::now() + TIMEOUT);
        while !socket.exists() {
            let gone = running.0.try_wait().fault("waiting for", self.program.display())?;
            if let Some(status) = gone {
                return Err(Fault::new("starting", self.program.display(), format!("it ended ({status})")));
            }
            if Instant::now() >= deadline {
                return Err(Fault::new("waiting for", socket.display(), "nobody makes it"));
            }
            std::thread::sleep(LOOK_AGAIN);
        }
        Ok(running)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

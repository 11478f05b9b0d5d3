//! Every command with any payload. A payload that is understood has the same meaning when it is encoded
//! again, for init and for the edges; one that is not understood gets a short ERROR; neither takes more
//! memory than it counts for.
#![forbid(unsafe_code)]
#![no_main]

use hyperinit::command::{self, Command};
use hyperinit::fault;
use hyperinit::frame::Message;
use hyperinit_fuzz::{Choices, measure};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The memory that one byte of JSON may cost while it is parsed, in bytes: a list that grows also holds its
/// old half.
const GROWTH: usize = 96;

fuzz_target!(|data: &[u8]| {
    let mut choices = Choices::new(data);
    let id = u32::from(choices.byte());
    let payload = choices.rest();
    let (parsed, held) = measure(|| command::parse(id, payload));
    assert!(held <= GROWTH * payload.len() + 16_384, "{held} bytes for {}", payload.len());
    assert!(command::weight(id, payload) >= payload.len());
    match parsed {
        Err(fault) => assert!(fault.to_string().len() <= 4 * fault::PART_MAX),
        Ok(command) => {
            assert_eq!(Message::from(&command).id(), id);
            again(id, payload, &command);
        }
    }
});

fn again(id: u32, payload: &[u8], command: &Command) {
    match command {
        Command::GetVersion
        | Command::Features
        | Command::Ping
        | Command::Rescan
        | Command::OnlineCpuMem
        | Command::DestroyPod => {}
        Command::StartPod(pod) => {
            same(id, pod, command);
            crosses(&**pod);
        }
        Command::NewContainer(container) => {
            same(id, container, command);
            crosses(&**container);
        }
        Command::ExecCmd(exec) => {
            same(id, exec, command);
            crosses(&*exec.process);
            if let Ok((stdio, stderr)) = exec.process.check() {
                assert!(Some(stdio) != stderr && (stderr.is_some() || exec.process.terminal));
            }
        }
        Command::WinSize(size) => same(id, size, command),
        Command::KillContainer(kill) => same(id, kill, command),
        Command::SignalProcess(signal) => same(id, signal, command),
        Command::RemoveContainer(remove) => same(id, remove, command),
        Command::ReadFile(file) => same(id, file, command),
        Command::WriteFile(write) => {
            assert!(payload.ends_with(&write.data), "the file's bytes are the payload's last");
            let mut again = serde_json::to_vec(&write.file).expect("JSON");
            again.extend_from_slice(&write.data);
            assert_eq!(command::parse(id, &again).as_ref(), Ok(command));
        }
        Command::SetupInterface(interface) | Command::DeleteInterface(interface) => {
            same(id, interface, command);
            crosses(interface);
        }
        Command::SetupRoute(setup) => {
            same(id, setup, command);
            crosses(&setup.routes);
        }
    }
}

fn same(id: u32, body: &impl Serialize, command: &Command) {
    let json = serde_json::to_vec(body).expect("JSON");
    assert_eq!(command::parse(id, &json).as_ref(), Ok(command));
}

/// Checks that a value survives the encoding in which it is sent to a helper.
fn crosses<T: Serialize + DeserializeOwned + PartialEq>(value: &T) {
    let config = bincode::config::standard();
    let bytes = bincode::serde::encode_to_vec(value, config).expect("bytes");
    let (back, length): (T, usize) = bincode::serde::decode_from_slice(&bytes, config).expect("a value");
    assert!(back == *value && length == bytes.len());
}

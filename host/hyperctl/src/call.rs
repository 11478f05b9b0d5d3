//! `hyperctl call`: one command, its reply printed.

use std::io::{Read, Write};
use std::process::ExitCode;

use hyperinit_client::{Client, TIMEOUT};
use hyperinit_protocol::fault::{Fault, OrFault};
use hyperinit_protocol::frame::Message;
use serde::de::IgnoredAny;

use super::cli::Call;
use super::{guest, standard};

/// Sends the command and prints what the guest's ACK carries; its ERROR is a fault.
///
/// READY is not waited for: whoever was connected before may have had it, and a guest that is not up yet
/// answers when it is.
pub fn call(options: &Call) -> Result<ExitCode, Fault> {
    let mut payload = json(options)?;
    if options.command == Message::WriteFile {
        standard::stdin().read_to_end(&mut payload).fault("reading", "standard input")?;
    }
    guest::wait_for_sockets(&options.dir);
    let client = Client::visit_control(&options.dir)?;
    let reply = client.send_raw(options.command.id(), &payload).wait(TIMEOUT);
    let reply = reply.map_err(|error| Fault::new("calling", options.command, error.to_string()))?;
    standard::stdout().write_all(&printed(options.command, reply)).fault("writing", "standard output")?;
    Ok(ExitCode::SUCCESS)
}

/// The command of that name, in whatever case; not what only a guest says.
pub fn command(name: &str) -> Result<Message, String> {
    let commands = || {
        let from_guest = [Message::Ack, Message::Error, Message::Next, Message::ProcessAsyncEvent];
        Message::ALL.into_iter().filter(move |message| !from_guest.contains(message))
    };
    commands().find(|message| message.name().eq_ignore_ascii_case(name)).ok_or_else(|| {
        let names: Vec<_> = commands().map(Message::name).collect();
        format!("no such command; there are {}", names.join(", "))
    })
}

/// The payload as it was given: what the keys mean is the guest's to say.
fn json(options: &Call) -> Result<Vec<u8>, Fault> {
    let bytes = options.json.as_bytes();
    serde_json::from_slice::<IgnoredAny>(bytes)
        .map_err(|error| Fault::new("reading", "the JSON", error.to_string()))?;
    Ok(bytes.to_vec())
}

/// What a person reads: the version as a number, a file as it is, other text as a line.
fn printed(command: Message, reply: Vec<u8>) -> Vec<u8> {
    match (command, <[u8; 4]>::try_from(reply.as_slice())) {
        (Message::GetVersion, Ok(version)) => format!("{}\n", u32::from_be_bytes(version)).into_bytes(),
        (Message::ReadFile, _) => reply,
        _ if reply.is_empty() => reply,
        _ => [reply, b"\n".to_vec()].concat(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_have_their_names_in_the_protocol() {
        assert_eq!(command("StartPod"), Ok(Message::StartPod));
        assert_eq!(command("READY"), Ok(Message::Ready), "a host's READY rescans");
        for guests in ["ACK", "error", "NEXT", "PROCESSASYNCEVENT", ""] {
            assert!(command(guests).unwrap_err().contains("GETVERSION, STARTPOD"));
        }
    }

    #[test]
    fn the_payload_is_json_as_it_was_written() {
        let options =
            |json: &str| Call { dir: "d".into(), command: Message::StartPod, json: json.to_owned() };
        assert_eq!(json(&options(r#"{"hostname": "a",  "x":1}"#)).unwrap(), br#"{"hostname": "a",  "x":1}"#);
        assert!(json(&options("{hostname}")).unwrap_err().to_string().contains("reading the JSON"));
    }

    #[test]
    fn replies_are_for_people() {
        assert_eq!(printed(Message::GetVersion, 4244u32.to_be_bytes().to_vec()), b"4244\n");
        assert_eq!(printed(Message::ReadFile, b"no newline".to_vec()), b"no newline");
        assert_eq!(printed(Message::StartPod, b"text".to_vec()), b"text\n");
        assert_eq!(printed(Message::Ping, vec![]), b"");
    }
}

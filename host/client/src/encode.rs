//! Encodes typed commands as messages, in the form in which runV writes them.

use serde::Serialize;

use hyperinit_protocol::command::Command;
use hyperinit_protocol::fault::Fault;
use hyperinit_protocol::frame::Message;

/// The message and the payload of a command. Commands without arguments carry `null`, as runV's do.
pub fn encode(command: &Command) -> Result<(Message, Vec<u8>), Fault> {
    let message = Message::from(command);
    let payload = match command {
        Command::GetVersion
        | Command::Ping
        | Command::Rescan
        | Command::OnlineCpuMem
        | Command::DestroyPod => b"null".to_vec(),
        Command::Features => br#"{"features":true}"#.to_vec(),
        Command::StartPod(pod) => json(message, pod)?,
        Command::NewContainer(container) => json(message, container)?,
        Command::ExecCmd(exec) => json(message, exec)?,
        Command::WinSize(size) => json(message, size)?,
        Command::KillContainer(kill) => json(message, kill)?,
        Command::SignalProcess(signal) => json(message, signal)?,
        Command::RemoveContainer(remove) => json(message, remove)?,
        Command::ReadFile(file) => json(message, file)?,
        Command::WriteFile(write) => {
            let mut payload = json(message, &write.file)?;
            payload.extend_from_slice(&write.data);
            payload
        }
        Command::SetupInterface(interface) | Command::DeleteInterface(interface) => json(message, interface)?,
        Command::SetupRoute(routes) => json(message, routes)?,
    };
    Ok((message, payload))
}

fn json<T: Serialize>(message: Message, value: &T) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(value).map_err(|error| Fault::new("encoding", message, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyperinit_protocol::command::parse;

    /// The guest parses exactly what the host encodes.
    #[test]
    fn the_guest_reads_what_was_meant() {
        let sent = [
            (
                17,
                r#"{"id":"c","image":"i","rootfs":"r","process":{"args":["a b","ü\""],"stdio":1,"stderr":2},"readOnly":true,"sysctl":{"a.b":"1"}}"#,
            ),
            (
                1,
                r#"{"hostname":"h","dns":["1.2.3.4"],"shareDir":"s","portmappingWhiteLists":{"internalNetworks":["10.0.0.0/8"]}}"#,
            ),
            (
                6,
                r#"{"container":"c","process":{"id":"p","args":["x"],"envs":[{"env":"A","value":"b"}],"rlimits":[{"type":"RLIMIT_CORE","hard":1,"soft":0}]}}"#,
            ),
            (11, r#"{"container":"c","process":"p","row":24,"column":80}"#),
            (18, r#"{"container":"c","signal":9}"#),
            (24, r#"{"container":"c","process":"p","signal":15}"#),
            (22, r#"{"container":"c"}"#),
            (16, r#"{"container":"c","file":"/f"}"#),
            (20, r#"{"device":"eth0","ipAddresses":[{"ipAddress":"10.0.0.2","netMask":"24"}],"mtu":9000}"#),
            (21, r#"{"routes":[{"dest":"default","gateway":"10.0.0.1","device":"eth0"}]}"#),
            (25, r#"{"device":"eth0"}"#),
            (15, "{\"container\":\"c\",\"file\":\"/f\"}\0binary{}"),
            (0, "null"),
            (4, "null"),
            (8, "null"),
            (12, "null"),
            (19, "null"),
        ];
        for (id, text) in sent {
            let command = parse(id, text.as_bytes()).unwrap();
            let (message, payload) = encode(&command).unwrap();
            assert_eq!(message.id(), id);
            assert_eq!(parse(message.id(), &payload).unwrap(), command);
        }
    }
}

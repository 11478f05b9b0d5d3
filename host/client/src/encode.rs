//! Encodes typed commands as messages, in the form in which runV writes them.

use serde::Serialize;
use serde_json::Value;

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

/// The value as JSON without the members that say nothing, as runV's encoder omits them: the original guest
/// refuses an empty list of containers, and waits for a disk when a container has an empty `fstype`.
fn json<T: Serialize>(message: Message, value: &T) -> Result<Vec<u8>, Fault> {
    let fault = |error: serde_json::Error| Fault::new("encoding", message, error.to_string());
    let mut value = serde_json::to_value(value).map_err(fault)?;
    omit_empty(&mut value);
    serde_json::to_vec(&value).map_err(fault)
}

/// Texts that runV sends even when they are empty: a variable's value, and where a container's root is.
const MAY_BE_EMPTY: [&str; 3] = ["value", "image", "rootfs"];

/// Removes the members of objects that are null, an empty list or an empty text, at every depth.
fn omit_empty(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|name, member| match member {
                Value::Null => false,
                Value::Array(items) => !items.is_empty(),
                Value::String(text) => !text.is_empty() || MAY_BE_EMPTY.contains(&name.as_str()),
                Value::Object(_) | Value::Bool(_) | Value::Number(_) => true,
            });
            members.values_mut().for_each(omit_empty);
        }
        Value::Array(items) => items.iter_mut().for_each(omit_empty),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
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

    #[test]
    fn members_that_say_nothing_are_omitted() {
        let process =
            r#"{"id":"init","args":["x"],"envs":[{"env":"A","value":""}],"workdir":"","rlimits":[]}"#;
        let text =
            format!(r#"{{"id":"c","image":"","rootfs":"r","fstype":"","volumes":[],"process":{process}}}"#);
        let (_, payload) = encode(&parse(17, text.as_bytes()).unwrap()).unwrap();
        let sent: Value = serde_json::from_slice(&payload).unwrap();
        let process = &sent["process"];
        for absent in
            [&sent["fstype"], &sent["volumes"], &sent["addr"], &process["workdir"], &process["rlimits"]]
        {
            assert!(absent.is_null(), "{sent}");
        }
        assert_eq!(sent["image"], "");
        assert_eq!(process["envs"], serde_json::json!([{"env": "A", "value": ""}]));
    }
}

//! Turns a control frame into a typed command (protocol.md «Control messages», «JSON»).
//!
//! init reads the host's bytes here and nowhere else; afterwards they are numbers, names and checked ids.
//! Unknown keys are ignored with a warning; a wrong type or a missing key is a fault that names the key.
//! Values are never printed: they may be environment variables.

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};

use crate::fault::Fault;
use crate::frame::Message;
use crate::ids::{ContainerId, ProcessId, Signal};
use crate::spec::{Container, Interface, PATH_MAX, Pod, Process, ROUTES_MAX, Route};
use objects::Objects;

mod objects;

/// The longest JSON in bytes. The kernel takes 2 MiB of arguments and environment for one process (a quarter
/// of the usual stack limit), and JSON's escapes make that longer.
pub const JSON_MAX: usize = 4 << 20;
/// How many bytes of init's memory one byte of JSON may take at worst, which is for empty objects (measured
/// by tests/weight.rs). Only short commands reach this ratio; the list limits of protocol/src/spec/bounds.rs
/// keep a command of 4 MiB below 12×.
pub const JSON_WEIGHT: usize = 48;
/// How many unknown keys of one command the log names; a command may have millions.
const UNKNOWN_NAMED: usize = 8;
/// How many characters of each such key the log quotes.
const UNKNOWN_LEN: usize = 64;

/// A request of the host: one variant for each command of protocol.md.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Return the version of the API.
    GetVersion,
    /// GETVERSION from a host newer than this API: also return what else the guest supports.
    Features,
    /// Answer, to show that the guest is alive.
    Ping,
    /// The host's READY: rescan the PCI bus.
    Rescan,
    /// Bring hot-plugged CPUs and memory online.
    OnlineCpuMem,
    /// Make the pod.
    StartPod(Box<Pod>),
    /// End everything and power off.
    DestroyPod,
    /// Make a container and start its init.
    NewContainer(Box<Container>),
    /// Start a further process in a container.
    ExecCmd(ExecCmd),
    /// Size a process's terminal.
    WinSize(WinSize),
    /// Signal a container's init.
    KillContainer(KillContainer),
    /// Signal a process's group.
    SignalProcess(SignalProcess),
    /// Forget a container that has exited.
    RemoveContainer(RemoveContainer),
    /// Write a file of a container.
    WriteFile(WriteFile),
    /// Read a file of a container.
    ReadFile(File),
    /// Configure a NIC.
    SetupInterface(Interface),
    /// Add routes.
    SetupRoute(SetupRoute),
    /// Unplug a NIC.
    DeleteInterface(Interface),
}

impl From<&Command> for Message {
    fn from(command: &Command) -> Message {
        match command {
            Command::GetVersion | Command::Features => Message::GetVersion,
            Command::Ping => Message::Ping,
            Command::Rescan => Message::Ready,
            Command::OnlineCpuMem => Message::OnlineCpuMem,
            Command::StartPod(_) => Message::StartPod,
            Command::DestroyPod => Message::DestroyPod,
            Command::NewContainer(_) => Message::NewContainer,
            Command::ExecCmd(_) => Message::ExecCmd,
            Command::WinSize(_) => Message::WinSize,
            Command::KillContainer(_) => Message::KillContainer,
            Command::SignalProcess(_) => Message::SignalProcess,
            Command::RemoveContainer(_) => Message::RemoveContainer,
            Command::WriteFile(_) => Message::WriteFile,
            Command::ReadFile(_) => Message::ReadFile,
            Command::SetupInterface(_) => Message::SetupInterface,
            Command::SetupRoute(_) => Message::SetupRoute,
            Command::DeleteInterface(_) => Message::DeleteInterface,
        }
    }
}

/// EXECCMD's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecCmd {
    /// The container.
    pub container: ContainerId,
    /// The process to start.
    pub process: Box<Process>,
}

/// WINSIZE's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WinSize {
    /// The container.
    pub container: ContainerId,
    /// The process with the terminal.
    pub process: ProcessId,
    /// The height in characters.
    pub row: u16,
    /// The width in characters.
    pub column: u16,
}

/// KILLCONTAINER's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KillContainer {
    /// The container whose init gets the signal.
    pub container: ContainerId,
    /// The signal.
    pub signal: Signal,
}

/// SIGNALPROCESS's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalProcess {
    /// The container.
    pub container: ContainerId,
    /// The process whose process group gets the signal.
    pub process: ProcessId,
    /// The signal.
    pub signal: Signal,
}

/// REMOVECONTAINER's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveContainer {
    /// The container.
    pub container: ContainerId,
}

/// A file of a container: READFILE's payload, and the beginning of WRITEFILE's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// The container.
    pub container: ContainerId,
    /// The file's path in the container.
    #[serde(deserialize_with = "crate::spec::text::<PATH_MAX, _>")]
    pub file: String,
}

/// WRITEFILE's payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriteFile {
    /// The file to write.
    pub file: File,
    /// The new content of the file.
    pub data: Vec<u8>,
}

/// SETUPROUTE's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetupRoute {
    /// The routes to add.
    #[serde(default, deserialize_with = "crate::spec::list::<ROUTES_MAX, _, _>")]
    pub routes: Vec<Route>,
}

/// How many bytes a command counts for towards the limit of what init holds for a host.
pub fn weight(id: u32, payload: &[u8]) -> usize {
    match Message::from_id(id) {
        Some(Message::WriteFile) => payload.len(),
        _ => payload.len().saturating_mul(JSON_WEIGHT),
    }
}

/// The command in a control frame. The fault is the text of the ERROR that the host gets.
pub fn parse(id: u32, payload: &[u8]) -> Result<Command, Fault> {
    let unknown = || Fault::new("reading", format_args!("message {id}"), "there is no such command");
    let message = Message::from_id(id).ok_or_else(unknown)?;
    let command = match message {
        Message::GetVersion if asks_for_features(payload) => Command::Features,
        Message::GetVersion => no_argument(message, payload, Command::GetVersion),
        Message::Ping => no_argument(message, payload, Command::Ping),
        Message::Ready => no_argument(message, payload, Command::Rescan),
        Message::OnlineCpuMem => no_argument(message, payload, Command::OnlineCpuMem),
        Message::DestroyPod => no_argument(message, payload, Command::DestroyPod),
        Message::StartPod => Command::StartPod(json(message, payload)?),
        Message::NewContainer => Command::NewContainer(json(message, payload)?),
        Message::ExecCmd => Command::ExecCmd(json(message, payload)?),
        Message::WinSize => Command::WinSize(json(message, payload)?),
        Message::KillContainer => Command::KillContainer(json(message, payload)?),
        Message::SignalProcess => Command::SignalProcess(json(message, payload)?),
        Message::RemoveContainer => Command::RemoveContainer(json(message, payload)?),
        Message::ReadFile => Command::ReadFile(json(message, payload)?),
        Message::WriteFile => Command::WriteFile(write_file(payload)?),
        Message::SetupInterface => Command::SetupInterface(json(message, payload)?),
        Message::SetupRoute => Command::SetupRoute(json(message, payload)?),
        Message::DeleteInterface => Command::DeleteInterface(json(message, payload)?),
        Message::Ack | Message::Error | Message::Next | Message::ProcessAsyncEvent => {
            return Err(Fault::new("reading", message, "only the guest says that"));
        }
    };
    Ok(command)
}

/// The payload of a GETVERSION that asks for more than the version number.
#[derive(Debug, Deserialize)]
struct VersionQuery {
    #[serde(default)]
    features: bool,
}

/// Whether GETVERSION asks for the guest's features. A payload without that question is ignored, as it always
/// was.
fn asks_for_features(payload: &[u8]) -> bool {
    json(Message::GetVersion, payload).is_ok_and(|query: VersionQuery| query.features)
}

/// What the guest supports beyond the API's version: the part of GETVERSION's reply after the four bytes of
/// the number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// The guest's name.
    pub name: String,
    /// The guest's version.
    pub version: String,
    /// The supported features, by name.
    pub features: Vec<String>,
}

impl Features {
    /// The guest tells a host that asked for features the end of a process without the pause that runV's
    /// client needs (protocol.md «Version»).
    pub const PROMPT_EVENTS: &str = "prompt-events";

    /// The features of this guest.
    pub fn own() -> Features {
        Features {
            name: "hyperinit".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            features: vec![Features::PROMPT_EVENTS.to_owned()],
        }
    }
}

/// A command without an argument; Go encodes that as `null`. Any other payload is harmless too, and only
/// logged.
fn no_argument(message: Message, payload: &[u8], command: Command) -> Command {
    if !payload.is_empty() && payload != b"null" {
        log::warn!("{message}: ignoring {} bytes of argument", payload.len());
    }
    command
}

/// WRITEFILE: one JSON object; every byte after it belongs to the file.
fn write_file(payload: &[u8]) -> Result<WriteFile, Fault> {
    let mut values = serde_json::Deserializer::from_slice(payload).into_iter::<IgnoredAny>();
    match values.next() {
        Some(Ok(IgnoredAny)) => {
            let (head, data) = payload.split_at(values.byte_offset());
            Ok(WriteFile { file: json(Message::WriteFile, head)?, data: data.to_vec() })
        }
        Some(Err(error)) => Err(malformed(Message::WriteFile, "", &error.to_string())),
        None => Err(malformed(Message::WriteFile, "", "there is no JSON")),
    }
}

/// A payload that is one JSON value.
fn json<T: DeserializeOwned>(message: Message, payload: &[u8]) -> Result<T, Fault> {
    if payload.len() > JSON_MAX {
        return Err(malformed(
            message,
            "",
            &format!("{} bytes of JSON are more than {JSON_MAX}", payload.len()),
        ));
    }
    let mut input = serde_json::Deserializer::from_slice(payload);
    let mut track = serde_path_to_error::Track::new();
    let mut unknown = Unknown::default();
    let tracked = serde_path_to_error::Deserializer::new(Objects(&mut input), &mut track);
    let value = serde_ignored::deserialize(tracked, |key| unknown.note(&key));
    let value = value.map_err(|error: serde_json::Error| {
        let key = match track.path().to_string() {
            root if root == "." => String::new(),
            key => key,
        };
        malformed(message, &key, &without_value(&error.to_string()))
    })?;
    input.end().map_err(|error| malformed(message, "", &error.to_string()))?;
    unknown.warn(message);
    Ok(value)
}

/// The fault of a payload that is not what its command needs.
fn malformed(message: Message, key: &str, why: &str) -> Fault {
    match key {
        "" => Fault::new("reading", message, why),
        key => Fault::new("reading", format_args!("{message}: {key}"), why),
    }
}

/// serde's error text without the value that it quotes. Of `invalid type: string "secret", expected u64` only
/// the part after the last `, expected ` is kept, so no text of the host can get into the result.
fn without_value(text: &str) -> String {
    match text.rsplit_once(", expected ") {
        Some((_value, expected)) => format!("expected {expected}"),
        None => text.to_owned(),
    }
}

/// The keys of a command that no field took.
#[derive(Default)]
struct Unknown {
    named: Vec<String>,
    count: usize,
}

impl Unknown {
    fn note(&mut self, key: &serde_ignored::Path<'_>) {
        self.count += 1;
        if self.named.len() < UNKNOWN_NAMED {
            self.named.push(key.to_string().chars().take(UNKNOWN_LEN).collect());
        }
    }

    fn warn(&self, message: Message) {
        if self.count > 0 {
            log::warn!("{message}: ignoring {} unknown keys: {:?}", self.count, self.named);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(message: Message, payload: &str) -> Result<Command, String> {
        parse(message.id(), payload.as_bytes()).map_err(|fault| fault.to_string())
    }

    fn container(id: &str) -> ContainerId {
        ContainerId::try_from(id.to_owned()).unwrap()
    }

    fn process(id: &str) -> ProcessId {
        ProcessId::try_from(id.to_owned()).unwrap()
    }

    #[test]
    fn commands_without_argument_come_as_null_or_nothing() {
        let commands = [
            (Message::GetVersion, Command::GetVersion),
            (Message::Ping, Command::Ping),
            (Message::Ready, Command::Rescan),
            (Message::OnlineCpuMem, Command::OnlineCpuMem),
            (Message::DestroyPod, Command::DestroyPod),
        ];
        for (message, command) in commands {
            for payload in ["", "null", "{}"] {
                assert_eq!(read(message, payload), Ok(command.clone()));
            }
        }
    }

    #[test]
    fn a_host_that_knows_more_asks_for_features() {
        assert_eq!(read(Message::GetVersion, r#"{"features":true}"#), Ok(Command::Features));
        for payload in ["", "null", "{}", r#"{"features":false}"#, r#"{"features":1}"#, "[true]", "{"] {
            assert_eq!(read(Message::GetVersion, payload), Ok(Command::GetVersion), "{payload}");
        }
    }

    #[test]
    fn what_is_no_command_is_an_error() {
        for id in [2, 3, 5, 7, 13, 26, u32::MAX] {
            let error = parse(id, b"null").unwrap_err().to_string();
            assert!(error.ends_with(&format!("reading message {id}: there is no such command")), "{error}");
        }
        for message in [Message::Ack, Message::Error, Message::Next, Message::ProcessAsyncEvent] {
            assert!(read(message, "null").unwrap_err().ends_with("only the guest says that"));
        }
    }

    /// Go writes an empty slice, map or pointer as null, and leaves out what is `omitempty`.
    #[test]
    fn a_pod_as_runv_sends_it() {
        let sent = r#"{"hostname":"pod-1","containers":null,"interfaces":null,"dns":["10.0.0.2"],"dnsOptions":null,
            "routes":null,"shareDir":"share_dir","portmappingWhiteLists":null}"#;
        let Ok(Command::StartPod(pod)) = read(Message::StartPod, sent) else { panic!() };
        let expected = Pod {
            hostname: "pod-1".to_owned(),
            dns: vec!["10.0.0.2".to_owned()],
            share_dir: "share_dir".to_owned(),
            ..Pod::default()
        };
        assert_eq!(*pod, expected);
        assert_eq!(read(Message::StartPod, "{}"), Ok(Command::StartPod(Box::default())));
    }

    #[test]
    fn a_container_as_runv_sends_it() {
        let sent = r#"{"id":"c1","rootfs":"rootfs","image":"c1","volumes":null,"fsmap":null,"process":{"id":"init",
            "terminal":false,"stdio":1,"stderr":2,"args":["/bin/sh","-c","true"],"envs":[{"env":"A","value":"b"}],
            "workdir":"/","rlimits":[{"type":"RLIMIT_NOFILE","hard":18446744073709551615,"soft":1024}]},
            "restartPolicy":"never","initialize":true,"readOnly":false}"#;
        let Ok(Command::NewContainer(c)) = read(Message::NewContainer, sent) else { panic!() };
        assert_eq!((c.id, c.rootfs.as_str(), c.image.as_str()), (container("c1"), "rootfs", "c1"));
        assert!(
            c.initialize
                && !c.read_only
                && c.volumes.is_empty()
                && c.sysctl.is_empty()
                && c.fstype.is_empty()
        );
        assert_eq!(c.process.args, ["/bin/sh", "-c", "true"]);
        assert_eq!((c.process.stdio, c.process.stderr, c.process.terminal), (1, 2, false));
        assert_eq!((c.process.rlimits[0].hard, c.process.rlimits[0].soft), (u64::MAX, 1024));
        assert!(c.process.user.is_empty() && c.process.additional_groups.is_empty());
    }

    #[test]
    fn an_exec_needs_little() {
        let Ok(Command::ExecCmd(exec)) = read(Message::ExecCmd, r#"{"container":"c","process":{}}"#) else {
            panic!()
        };
        assert_eq!((exec.container, exec.process.id.clone()), (container("c"), process("init")));
        assert_eq!(exec.process.check(), Err("args: there is no program".to_owned()));
    }

    #[test]
    fn small_commands() {
        assert_eq!(
            read(Message::WinSize, r#"{"container":"c","process":"p","row":24,"column":80}"#),
            Ok(Command::WinSize(WinSize {
                container: container("c"),
                process: process("p"),
                row: 24,
                column: 80
            }))
        );
        assert_eq!(
            read(Message::KillContainer, r#"{"container":"c","signal":9}"#),
            Ok(Command::KillContainer(KillContainer { container: container("c"), signal: Signal::KILL }))
        );
        assert_eq!(
            read(Message::SetupRoute, r#"{"routes":null}"#),
            Ok(Command::SetupRoute(SetupRoute { routes: Vec::new() }))
        );
        let interface =
            r#"{"device":"eth0","ipAddresses":[{"ipAddress":"10.0.0.2","netMask":"24"}],"mtu":1500}"#;
        let Ok(Command::SetupInterface(interface)) = read(Message::SetupInterface, interface) else {
            panic!()
        };
        assert_eq!(
            (interface.device.as_str(), interface.mtu, interface.ip_addresses.len()),
            ("eth0", 1500, 1)
        );
    }

    #[test]
    fn unknown_keys_are_ignored_however_deep() {
        let plain = r#"{"container":"c","process":{"args":["a"]}}"#;
        let odd = r#"{"container":"c","new":[{"x":[[]]}],"process":{"args":["a"],"ociHooks":null,"deep":{"er":1}}}"#;
        assert_eq!(read(Message::ExecCmd, odd), read(Message::ExecCmd, plain));
        let many = format!("{{\"container\":\"c\"{}}}", r#","k":0"#.repeat(10_000));
        assert!(read(Message::RemoveContainer, &many).is_ok());
    }

    #[test]
    fn an_error_names_the_key_and_not_the_value() {
        let cases = [
            (Message::ExecCmd, r#"{"process":{"args":["a"]}}"#, "EXECCMD: missing field `container`"),
            (
                Message::ExecCmd,
                r#"{"container":"c","process":{"envs":[{"value":"b"}]}}"#,
                "process.envs[0]: missing field `env`",
            ),
            (
                Message::ExecCmd,
                r#"{"container":"c","process":{"envs":[{"env":"A","value":7}]}}"#,
                "process.envs[0].value: expected a string",
            ),
            (
                Message::ExecCmd,
                r#"{"container":"c","process":{"stdio":"secret, expected x"}}"#,
                "process.stdio: expected u64",
            ),
            (Message::ExecCmd, r#"{"container":"c","process":{"stdio":1.5}}"#, "process.stdio: expected u64"),
            (Message::ExecCmd, r#"{"container":"c","process":{"stdio":-1}}"#, "process.stdio: expected u64"),
            (
                Message::ExecCmd,
                r#"{"container":"c","process":{"terminal":1}}"#,
                "process.terminal: expected a boolean",
            ),
            (
                Message::ExecCmd,
                r#"{"container":"c","process":{"terminal":"true"}}"#,
                "process.terminal: expected a boolean",
            ),
            (
                Message::ExecCmd,
                r#"{"container":"../c","process":{}}"#,
                "container: the id \"../c\" begins with a dot",
            ),
            (Message::KillContainer, r#"{"container":"c","signal":0}"#, "signal: invalid signal 0"),
            (Message::KillContainer, r#"{"container":"c","signal":"9"}"#, "signal: expected i64"),
            (
                Message::WinSize,
                r#"{"container":"c","process":"p","row":65536,"column":1}"#,
                "row: expected u16",
            ),
            (Message::NewContainer, r#"{"id":"c","process":null}"#, "process: expected struct Process"),
            (
                Message::NewContainer,
                r#"{"id":"c","sysctl":{"a":1},"process":{}}"#,
                "sysctl.a: expected a string",
            ),
            (Message::RemoveContainer, r#"{"container":"c","container":"d"}"#, "duplicate field `container`"),
            (Message::RemoveContainer, r#"{"container":"c"}x"#, "REMOVECONTAINER: trailing characters"),
            (Message::RemoveContainer, "null", "REMOVECONTAINER: expected struct RemoveContainer"),
            (Message::RemoveContainer, "", "REMOVECONTAINER: EOF while parsing"),
        ];
        for (message, payload, expected) in cases {
            let error = read(message, payload).unwrap_err();
            assert!(error.contains(expected), "{payload} → {error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    /// Each list has what the object needs, in the order of its fields.
    #[test]
    fn a_list_is_no_object_however_deep() {
        let container = r#"["c","","","","",[],[],{},{}]"#;
        let process = r#"["p","","",[],false,1,2,["/bin/sh"]]"#;
        let cases = [
            (Message::StartPod, "@", " []", "STARTPOD: expected struct Pod"),
            (Message::RemoveContainer, "@", r#"["c"]"#, "REMOVECONTAINER: expected struct RemoveContainer"),
            (
                Message::StartPod,
                r#"{"containers":[@]}"#,
                container,
                "containers[0]: expected struct Container",
            ),
            (
                Message::StartPod,
                r#"{"portmappingWhiteLists":@}"#,
                r#"[["10.0.0.0/8"]]"#,
                "portmappingWhiteLists: ",
            ),
            (
                Message::ExecCmd,
                r#"{"container":"c","process":@}"#,
                process,
                "process: expected struct Process",
            ),
            (
                Message::ExecCmd,
                r#"{"container":"c","process":{"envs":[@]}}"#,
                r#"["A","b"]"#,
                "process.envs[0]: ",
            ),
            (
                Message::ExecCmd,
                r#"{"container":"c","process":{"rlimits":[@]}}"#,
                r#"["a",1,1]"#,
                "process.rlimits[0]: ",
            ),
            (Message::NewContainer, r#"{"id":"c","process":@}"#, process, "process: expected struct Process"),
            (
                Message::NewContainer,
                r#"{"id":"c","process":{},"volumes":[{"mount":"a"},@]}"#,
                r#"["a","","m"]"#,
                "volumes[1]: ",
            ),
            (Message::NewContainer, r#"{"id":"c","process":{},"fsmap":[@]}"#, r#"["a","b"]"#, "fsmap[0]: "),
            (Message::NewContainer, r#"{"id":"c","process":{},"ports":[@]}"#, "[80,80]", "ports[0]: "),
            (Message::NewContainer, r#"{"id":"c","process":{},"sysctl":@}"#, r#"[["a","b"]]"#, "sysctl: "),
            (Message::SetupRoute, r#"{"routes":[@]}"#, r#"["default"]"#, "routes[0]: expected struct Route"),
            (Message::SetupInterface, r#"{"ipAddresses":[@]}"#, r#"["10.0.0.2","24"]"#, "ipAddresses[0]: "),
        ];
        for (message, json, list, expected) in cases {
            for list in [list, "[]"] {
                let error = read(message, &json.replace('@', list)).unwrap_err();
                assert!(error.contains(expected), "{json}, {list} → {error}");
            }
        }
    }

    #[test]
    fn a_files_bytes_follow_its_json() {
        let head = br#"{"container":"c","file":"/a\"}b"}"#;
        for data in [&b""[..], b"{}", b"\0\xff\n}", b" x"] {
            let Ok(Command::WriteFile(write)) = parse(Message::WriteFile.id(), &[head, data].concat()) else {
                panic!()
            };
            assert_eq!((write.file.file.as_str(), write.data.as_slice()), ("/a\"}b", data));
        }
        for bad in [&b""[..], b"7", b"{", b"[]rest", br#"{"container":"c"}rest"#, b"\xff"] {
            assert!(parse(Message::WriteFile.id(), bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn json_is_bounded_in_length_and_depth() {
        let long = vec![b' '; JSON_MAX + 1];
        assert!(parse(Message::StartPod.id(), &long).unwrap_err().why.contains("more than"));
        let deep = format!(r#"{{"x":{}}}"#, "[".repeat(100_000));
        assert!(read(Message::StartPod, &deep).is_err());
        assert!(read(Message::StartPod, &format!(r#"{{"dns":{}}}"#, "[".repeat(100_000))).is_err());
    }

    /// Parsing the deepest JSON takes less stack than PID 1 has reserved (sys/heap.rs); the rest is for the
    /// callers. Unknown values are skipped without recursion.
    #[test]
    fn the_deepest_json_needs_less_stack_than_there_is() {
        let deep = |key: &str, open: &str, close: &str, depth: usize| {
            format!(r#"{{"{key}":{}0{}}}"#, open.repeat(depth), close.repeat(depth))
        };
        let parse_all = move || {
            for depth in [120, 127, 128, 200_000] {
                for (open, close) in [("[", "]"), (r#"{"y":"#, "}")] {
                    let unknown = parse(Message::StartPod.id(), deep("x", open, close, depth).as_bytes());
                    assert!(unknown.is_ok(), "{unknown:?}");
                    for key in ["dns", "containers", "portmappingWhiteLists", "shareDir"] {
                        let known = parse(Message::StartPod.id(), deep(key, open, close, depth).as_bytes());
                        assert!(known.is_err() || open != "[", "{known:?}");
                    }
                }
            }
        };
        std::thread::Builder::new().stack_size(384 << 10).spawn(parse_all).unwrap().join().unwrap();
    }

    #[test]
    fn the_rules_of_streams() {
        let process = |terminal, stdio, stderr| {
            let json = format!(r#"{{"args":["a"],"terminal":{terminal},"stdio":{stdio},"stderr":{stderr}}}"#);
            serde_json::from_str::<Process>(&json).unwrap().check()
        };
        let stream = crate::ids::StreamId::new;
        assert_eq!(process(false, 1, 2), Ok((stream(1).unwrap(), stream(2))));
        assert_eq!(process(true, 1, 0), Ok((stream(1).unwrap(), None)));
        assert_eq!(process(true, 1, 2), Ok((stream(1).unwrap(), stream(2))));
        for (terminal, stdio, stderr) in
            [(false, 1, 0), (false, 0, 2), (true, 0, 0), (false, 3, 3), (true, 3, 3)]
        {
            assert!(process(terminal, stdio, stderr).is_err(), "{terminal} {stdio} {stderr}");
        }
    }

    #[test]
    fn specs_cross_the_edges_as_they_are() {
        let mut pod: Pod = serde_json::from_str(r#"{"interfaces":[{"device":"eth0"}],"dns":["a"]}"#).unwrap();
        pod.containers = vec![serde_json::from_str(r#"{"id":"c","process":{"rlimits":null}}"#).unwrap()];
        let bytes = bincode::serde::encode_to_vec(&pod, bincode::config::standard()).unwrap();
        let back: (Pod, usize) =
            bincode::serde::decode_from_slice(&bytes, bincode::config::standard()).unwrap();
        assert_eq!(back.0, pod);
    }
}

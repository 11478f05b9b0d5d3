//! The objects of protocol.md «JSON»: what a host says about pods, containers and processes.
//!
//! The same types serve the host's channel and the edges to the helpers. A number that protocol.md calls
//! optional gets its default here. A wrong type or a missing required key makes an error that names the key.

use serde::{Deserialize, Serialize};

use crate::flow;
use crate::ids::{ContainerId, ProcessId, StreamId};
pub use bounds::*;

mod bounds;

/// STARTPOD's payload.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Pod {
    /// The UTS name of the pod and the content of its `/etc/hostname`.
    #[serde(deserialize_with = "text::<HOSTNAME_MAX, _>")]
    pub hostname: String,
    /// Old style: containers started with the pod, in order.
    #[serde(deserialize_with = "list::<CONTAINERS_MAX, _, _>")]
    pub containers: Vec<Container>,
    /// NICs to configure.
    #[serde(deserialize_with = "list::<INTERFACES_MAX, _, _>")]
    pub interfaces: Vec<Interface>,
    /// `nameserver` lines of resolv.conf.
    #[serde(deserialize_with = "list::<DNS_MAX, _, _>")]
    pub dns: Vec<String>,
    /// The `search` line of resolv.conf.
    #[serde(deserialize_with = "list::<DNS_MAX, _, _>")]
    pub dns_search: Vec<String>,
    /// The `options` line of resolv.conf.
    #[serde(deserialize_with = "list::<DNS_MAX, _, _>")]
    pub dns_options: Vec<String>,
    /// Routes to add once the interfaces are up.
    #[serde(deserialize_with = "list::<ROUTES_MAX, _, _>")]
    pub routes: Vec<Route>,
    /// The 9p mount tag of the share; empty: no share.
    #[serde(deserialize_with = "null_is_default")]
    pub share_dir: String,
    /// Who may reach the pod's ports; absent: everyone.
    pub portmapping_white_lists: Option<PortmappingWhiteLists>,
    /// Deprecated, ignored.
    #[serde(deserialize_with = "null_is_default")]
    pub restart_policy: String,
}

/// The networks that may reach the pod.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PortmappingWhiteLists {
    /// CIDRs that may reach every port.
    #[serde(deserialize_with = "list::<NETWORKS_MAX, _, _>")]
    pub internal_networks: Vec<String>,
    /// CIDRs that may reach mapped ports.
    #[serde(deserialize_with = "list::<NETWORKS_MAX, _, _>")]
    pub external_networks: Vec<String>,
}

/// NEWCONTAINER's payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Container {
    /// The container's id.
    pub id: ContainerId,
    /// The root directory, below the image.
    #[serde(default, deserialize_with = "null_is_default")]
    pub rootfs: String,
    /// A directory below the share, or a block device name under /dev when `fstype` is set.
    #[serde(default, deserialize_with = "null_is_default")]
    pub image: String,
    /// SCSI `target:lun`; overrides `image`.
    #[serde(default, deserialize_with = "null_is_default")]
    pub addr: String,
    /// The filesystem of the block device `image`; empty: a directory of the share.
    #[serde(default, deserialize_with = "null_is_default")]
    pub fstype: String,
    /// Block devices and network filesystems to mount.
    #[serde(default, deserialize_with = "list::<VOLUMES_MAX, _, _>")]
    pub volumes: Vec<Volume>,
    /// Files and directories of the share to bind.
    #[serde(default, deserialize_with = "list::<VOLUMES_MAX, _, _>")]
    pub fsmap: Vec<Fsmap>,
    /// Sysctls by dotted name, set once the container is the root of its namespace.
    #[serde(default, deserialize_with = "map::<SYSCTLS_MAX, _>")]
    pub sysctl: std::collections::BTreeMap<String, String>,
    /// The container's init.
    pub process: Process,
    /// First start: Docker init layer, volume population, workdir.
    #[serde(default)]
    pub initialize: bool,
    /// Mount the root filesystem read-only.
    #[serde(default)]
    pub read_only: bool,
    /// Ignored.
    #[serde(default, deserialize_with = "null_is_default")]
    pub restart_policy: String,
    /// Ports to open when the container starts.
    #[serde(default, deserialize_with = "list::<PORTS_MAX, _, _>")]
    pub ports: Vec<Port>,
}

/// A process: a container's init, or the process of an EXECCMD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    /// Unique in its container; `init` by convention for the container's init.
    #[serde(default = "init_id")]
    pub id: ProcessId,
    /// The user's name or number; empty: 0.
    #[serde(default, deserialize_with = "null_is_default")]
    pub user: String,
    /// The group's name or number; empty: the user's group.
    #[serde(default, deserialize_with = "null_is_default")]
    pub group: String,
    /// Names or numbers of groups.
    #[serde(default, deserialize_with = "list::<GROUPS_MAX, _, _>")]
    pub additional_groups: Vec<String>,
    /// Whether the process has a tty.
    #[serde(default)]
    pub terminal: bool,
    /// The stream of stdin and stdout, or of the tty; 0 is refused.
    #[serde(default)]
    pub stdio: u64,
    /// The stream of stderr; 0 only with a tty.
    #[serde(default)]
    pub stderr: u64,
    /// The program and its arguments; at least one.
    #[serde(default, deserialize_with = "list::<ARGS_MAX, _, _>")]
    pub args: Vec<String>,
    /// Environment variables, which override the defaults of protocol.md «EXECCMD».
    #[serde(default, deserialize_with = "list::<ARGS_MAX, _, _>")]
    pub envs: Vec<Env>,
    /// The working directory; empty: `/`.
    #[serde(default, deserialize_with = "null_is_default")]
    pub workdir: String,
    /// Resource limits.
    #[serde(default, deserialize_with = "list::<RLIMITS_MAX, _, _>")]
    pub rlimits: Vec<Rlimit>,
}

impl Process {
    /// The process's streams by the rules of protocol.md «Streams», or what is wrong with the process. Users,
    /// paths and programs are not checked: only the container knows them.
    pub fn check(&self) -> Result<(StreamId, Option<StreamId>), String> {
        if self.args.is_empty() {
            return Err("args: there is no program".to_owned());
        }
        if let Some(rlimit) = self.rlimits.iter().find(|rlimit| !RLIMITS.contains(&rlimit.kind.as_str())) {
            return Err(format!("rlimits: no such limit: {:?}", rlimit.kind));
        }
        let stdio = StreamId::new(self.stdio).ok_or("stdio: is 0")?;
        if [self.stdio, self.stderr].contains(&flow::STREAM) {
            return Err(format!("stdio, stderr: {} is no process's", flow::STREAM));
        }
        match StreamId::new(self.stderr) {
            None if !self.terminal => Err("stderr: is 0 without a terminal".to_owned()),
            Some(stderr) if stderr == stdio => Err("stderr: is the same stream as stdio".to_owned()),
            stderr => Ok((stdio, stderr)),
        }
    }
}

/// The limits that setrlimit(2) knows, by their OCI names.
pub const RLIMITS: [&str; 16] = [
    "RLIMIT_AS",
    "RLIMIT_CORE",
    "RLIMIT_CPU",
    "RLIMIT_DATA",
    "RLIMIT_FSIZE",
    "RLIMIT_LOCKS",
    "RLIMIT_MEMLOCK",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_NOFILE",
    "RLIMIT_NPROC",
    "RLIMIT_RSS",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
    "RLIMIT_SIGPENDING",
    "RLIMIT_STACK",
];

fn init_id() -> ProcessId {
    ProcessId::try_from("init".to_owned()).expect("`init` is a good id")
}

/// One environment variable. Its value is never logged.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Env {
    /// The name.
    pub env: String,
    /// The value.
    #[serde(default, deserialize_with = "null_is_default")]
    pub value: String,
}

impl std::fmt::Debug for Env {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}=…", self.env)
    }
}

/// One resource limit, named as in OCI: `RLIMIT_NOFILE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// The limit's OCI name.
    #[serde(rename = "type")]
    pub kind: String,
    /// The hard limit.
    pub hard: u64,
    /// The soft limit.
    pub soft: u64,
}

/// A block device or network filesystem, bound into a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// A name under /dev, or `server:/path` for `nfs`.
    #[serde(default, deserialize_with = "null_is_default")]
    pub device: String,
    /// SCSI `target:lun`.
    #[serde(default, deserialize_with = "null_is_default")]
    pub addr: String,
    /// The mount point in the container.
    pub mount: String,
    /// The filesystem.
    #[serde(default, deserialize_with = "null_is_default")]
    pub fstype: String,
    /// Bind read-only.
    #[serde(default)]
    pub read_only: bool,
    /// Populate from the image when new.
    #[serde(default)]
    pub docker_volume: bool,
}

/// A file or directory of the share, bound into a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Fsmap {
    /// The path below the share.
    pub source: String,
    /// The path in the container.
    pub path: String,
    /// Bind read-only.
    #[serde(default)]
    pub read_only: bool,
    /// Populate from the image when new.
    #[serde(default)]
    pub docker_volume: bool,
}

/// A NIC, as in SETUPINTERFACE, DELETEINTERFACE and STARTPOD.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Interface {
    /// The link's current name.
    #[serde(deserialize_with = "text::<NAME_MAX, _>")]
    pub device: String,
    /// The link's new name; empty or equal to `device`: unchanged.
    #[serde(deserialize_with = "text::<NAME_MAX, _>")]
    pub new_device_name: String,
    /// Addresses to add. A leading `-` removes the address instead.
    #[serde(deserialize_with = "list::<ADDRESSES_MAX, _, _>")]
    pub ip_addresses: Vec<IpAddress>,
    /// Old style: a single address.
    #[serde(deserialize_with = "null_is_default")]
    pub ip_address: String,
    /// Old style: the mask of `ip_address`.
    #[serde(deserialize_with = "null_is_default")]
    pub net_mask: String,
    /// The MTU in bytes; 0: unchanged.
    #[serde(deserialize_with = "null_is_default")]
    pub mtu: u64,
}

/// An address and its mask.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IpAddress {
    /// The address; a leading `-` removes it.
    pub ip_address: String,
    /// The mask, dotted or as a prefix length.
    pub net_mask: String,
}

/// A route.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Route {
    /// `default`, `any`, `all`, an address, or address/mask.
    pub dest: String,
    /// The next hop.
    #[serde(deserialize_with = "null_is_default")]
    pub gateway: String,
    /// The link's name.
    #[serde(deserialize_with = "null_is_default")]
    pub device: String,
}

/// A mapped port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Port {
    /// The port on the VM.
    pub host_port: u16,
    /// The port of the container.
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    #[serde(deserialize_with = "null_is_default")]
    pub protocol: String,
}

impl Port {
    /// The mapping: the protocol and the host's port; none if the port is not mapped. The error says what is
    /// wrong with it.
    pub fn check(&self) -> Result<Option<(Protocol, u16)>, String> {
        if self.host_port == 0 {
            return Ok(None);
        }
        let protocol = match self.protocol.to_ascii_lowercase().as_str() {
            "" | "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => return Err(format!("protocol: no such protocol: {:?} (tcp, udp, sctp)", self.protocol)),
        };
        if self.container_port == 0 {
            return Err(format!("containerPort: is 0 for the host's {}/{protocol}", self.host_port));
        }
        Ok(Some((protocol, self.host_port)))
    }
}

/// A transport protocol that has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP, which is also the default.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Protocol {
    /// Its number in an IP header (protocols(5)).
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        })
    }
}

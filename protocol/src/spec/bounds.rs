//! The limits of the lists and names that a host can send. A longer list gets an ERROR that names the list,
//! before memory is allocated for it: an empty object is two bytes of JSON, and a hundred bytes of init's
//! memory.
//!
//! docs/limits.md lists these limits together with all others.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// Containers that a guest remembers, including those that have exited and were not removed.
pub const CONTAINERS_MAX: usize = 1024;
/// NICs of one STARTPOD: more than a PCI bus has slots.
pub const INTERFACES_MAX: usize = 256;
/// Addresses of one NIC.
pub const ADDRESSES_MAX: usize = 256;
/// Routes of one command.
pub const ROUTES_MAX: usize = 4096;
/// Nameservers, search domains and options, for each of the three lists; resolv.conf(5) uses three
/// nameservers and six search domains.
pub const DNS_MAX: usize = 64;
/// Networks of each white list; each is a rule that packets are matched against.
pub const NETWORKS_MAX: usize = 256;
/// Mapped ports of a pod; this many fit one transaction of the kernel.
pub const PORTS_MAX: usize = 4096;
/// Volumes of a container, and likewise fsmaps; each is a mount or two.
pub const VOLUMES_MAX: usize = 1024;
/// Sysctls of a container: more than its namespaces have.
pub const SYSCTLS_MAX: usize = 1024;
/// Arguments of a process, and likewise environment variables. The kernel's 2 MiB for both would hold a few
/// more only if they are empty.
pub const ARGS_MAX: usize = 128 << 10;
/// Additional groups of a process: the kernel's NGROUPS_MAX.
pub const GROUPS_MAX: usize = 65_536;
/// Resource limits of a process: four times as many as exist.
pub const RLIMITS_MAX: usize = 64;

/// The pod's hostname in bytes: the kernel's HOST_NAME_MAX.
pub const HOSTNAME_MAX: usize = 64;
/// A path in bytes: the kernel's PATH_MAX. It travels to mountd in the packet itself, which has to fit the
/// socket.
pub const PATH_MAX: usize = 4096;
/// A link's name in bytes: more than the kernel's limit of 15, which netd reports. It travels in the packet
/// too.
pub const NAME_MAX: usize = 255;

/// Go's encoder writes an empty slice, map or pointer as `null`, which means the default.
pub fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    if !deserializer.is_human_readable() {
        // Between processes a value is always present: postcard and bincode have no null.
        return T::deserialize(deserializer);
    }
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// A list of at most `MAX` elements; `null` is the empty list. The list has grown by doubling, so its spare
/// memory is freed.
pub fn list<'de, const MAX: usize, D, T>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let AtMost(mut list) = null_is_default::<D, AtMost<MAX, Vec<T>>>(deserializer)?;
    list.shrink_to_fit();
    Ok(list)
}

/// A map of at most `MAX` names and values; `null` is the empty map.
pub fn map<'de, const MAX: usize, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: Deserializer<'de>,
{
    null_is_default::<D, AtMost<MAX, BTreeMap<String, String>>>(deserializer).map(|AtMost(map)| map)
}

/// A text of at most `MAX` bytes; `null` is the empty text.
pub fn text<'de, const MAX: usize, D>(deserializer: D) -> Result<String, D::Error>
where
    D: Deserializer<'de>,
{
    let text: String = null_is_default(deserializer)?;
    if text.len() <= MAX { Ok(text) } else { Err(D::Error::custom(format_args!("longer than {MAX} bytes"))) }
}

/// A collection of at most `MAX` elements.
#[derive(Default)]
struct AtMost<const MAX: usize, T>(T);

fn more_than<E: Error>(max: usize) -> E {
    E::custom(format_args!("more than {max}"))
}

impl<'de, const MAX: usize, T: DeserializeOwned> Deserialize<'de> for AtMost<MAX, Vec<T>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(Counter::<MAX, Vec<T>>(PhantomData)).map(AtMost)
    }
}

impl<'de, const MAX: usize> Deserialize<'de> for AtMost<MAX, BTreeMap<String, String>> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Counter::<MAX, BTreeMap<String, String>>(PhantomData)).map(AtMost)
    }
}

struct Counter<const MAX: usize, T>(PhantomData<T>);

impl<'de, const MAX: usize, T: DeserializeOwned> Visitor<'de> for Counter<MAX, Vec<T>> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a sequence")
    }

    /// Allocates as elements come: the length that the sequence claims is not trusted.
    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while let Some(element) = sequence.next_element()? {
            if list.len() >= MAX {
                return Err(more_than(MAX));
            }
            list.push(element);
        }
        Ok(list)
    }
}

impl<'de, const MAX: usize> Visitor<'de> for Counter<MAX, BTreeMap<String, String>> {
    type Value = BTreeMap<String, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<BTreeMap<String, String>, A::Error> {
        let mut map = BTreeMap::new();
        while let Some((name, value)) = entries.next_entry()? {
            if map.len() >= MAX {
                return Err(more_than(MAX));
            }
            map.insert(name, value);
        }
        Ok(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::parse;
    use crate::frame::Message;

    /// A JSON list of `count` times `element`.
    fn repeated(element: &str, count: usize) -> String {
        format!("[{}]", vec![element; count].join(","))
    }

    /// The result of a command in whose JSON `@` stands for a list of `count` elements.
    fn said(message: Message, json: &str, element: &str, count: usize) -> Result<(), String> {
        let json = json.replace('@', &repeated(element, count));
        parse(message.id(), json.as_bytes()).map(drop).map_err(|fault| fault.to_string())
    }

    #[test]
    fn every_list_has_an_end() {
        use Message::{ExecCmd, NewContainer, SetupInterface, SetupRoute, StartPod};
        let container = r#"{"id":"c","process":{}}"#;
        for (message, json, element, max, key) in [
            (StartPod, r#"{"containers":@}"#, container, CONTAINERS_MAX, "containers"),
            (StartPod, r#"{"interfaces":@}"#, "{}", INTERFACES_MAX, "interfaces"),
            (StartPod, r#"{"dns":@}"#, r#""""#, DNS_MAX, "dns"),
            (StartPod, r#"{"dnsSearch":@}"#, r#""""#, DNS_MAX, "dnsSearch"),
            (StartPod, r#"{"dnsOptions":@}"#, r#""""#, DNS_MAX, "dnsOptions"),
            (StartPod, r#"{"routes":@}"#, "{}", ROUTES_MAX, "routes"),
            (
                StartPod,
                r#"{"portmappingWhiteLists":{"internalNetworks":@}}"#,
                r#""""#,
                NETWORKS_MAX,
                "portmappingWhiteLists.internalNetworks",
            ),
            (
                StartPod,
                r#"{"portmappingWhiteLists":{"externalNetworks":@}}"#,
                r#""""#,
                NETWORKS_MAX,
                "portmappingWhiteLists.externalNetworks",
            ),
            (SetupInterface, r#"{"ipAddresses":@}"#, "{}", ADDRESSES_MAX, "ipAddresses"),
            (SetupRoute, r#"{"routes":@}"#, "{}", ROUTES_MAX, "routes"),
            (
                NewContainer,
                r#"{"id":"c","process":{},"volumes":@}"#,
                r#"{"mount":"m"}"#,
                VOLUMES_MAX,
                "volumes",
            ),
            (
                NewContainer,
                r#"{"id":"c","process":{},"fsmap":@}"#,
                r#"{"source":"s","path":"p"}"#,
                VOLUMES_MAX,
                "fsmap",
            ),
            (NewContainer, r#"{"id":"c","process":{},"ports":@}"#, "{}", PORTS_MAX, "ports"),
            (ExecCmd, r#"{"container":"c","process":{"args":@}}"#, r#""""#, ARGS_MAX, "process.args"),
            (ExecCmd, r#"{"container":"c","process":{"envs":@}}"#, r#"{"env":""}"#, ARGS_MAX, "process.envs"),
            (
                ExecCmd,
                r#"{"container":"c","process":{"additionalGroups":@}}"#,
                r#""""#,
                GROUPS_MAX,
                "process.additionalGroups",
            ),
            (
                ExecCmd,
                r#"{"container":"c","process":{"rlimits":@}}"#,
                r#"{"type":"","hard":0,"soft":0}"#,
                RLIMITS_MAX,
                "process.rlimits",
            ),
        ] {
            assert_eq!(said(message, json, element, max), Ok(()), "{key}");
            let error = said(message, json, element, max + 1).unwrap_err();
            assert!(error.contains(key) && error.contains(&format!("more than {max}")), "{error}");
        }
    }

    #[test]
    fn sysctls_have_an_end() {
        let with = |count: usize| {
            let all: Vec<_> = (0..count).map(|at| format!(r#""s{at}":"""#)).collect();
            let json = format!(r#"{{"id":"c","process":{{}},"sysctl":{{{}}}}}"#, all.join(","));
            parse(Message::NewContainer.id(), json.as_bytes()).map(drop).map_err(|fault| fault.to_string())
        };
        assert_eq!(with(SYSCTLS_MAX), Ok(()));
        assert!(with(SYSCTLS_MAX + 1).unwrap_err().contains("sysctl: more than 1024"));
    }

    #[test]
    fn what_travels_in_a_message_is_short() {
        use Message::{DeleteInterface, ReadFile, StartPod};
        for (message, json, max, key) in [
            (StartPod, r#"{"hostname":"@"}"#, HOSTNAME_MAX, "hostname"),
            (ReadFile, r#"{"container":"c","file":"@"}"#, PATH_MAX, "file"),
            (DeleteInterface, r#"{"device":"@"}"#, NAME_MAX, "device"),
        ] {
            let said = |length: usize| {
                let json = json.replace('@', &"x".repeat(length));
                parse(message.id(), json.as_bytes()).map(drop).map_err(|fault| fault.to_string())
            };
            assert_eq!(said(max), Ok(()));
            let error = said(max + 1).unwrap_err();
            assert!(error.contains(&format!("{key}: longer than {max} bytes")), "{error}");
        }
    }
}

//! The pod's own files: the share, hosts, hostname, resolv.conf, the shared memory, the kept namespaces.

use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::ids::ContainerId;
use hyperinit::paths;
use hyperinit::wire::mountd::PodFiles;
use nix::mount::{MsFlags, mount};

use super::share;
use super::tree::unmount;

/// The largest resolv.conf in bytes: every container has a copy in memory.
const RESOLV_CONF_MAX: usize = 64 << 10;

/// The lines of every hosts file.
const HOSTS: &str = "\
127.0.0.1\tlocalhost
::1\tlocalhost ip6-localhost ip6-loopback
fe00::\tip6-localnet
ff00::\tip6-mcastprefix
ff02::1\tip6-allnodes
ff02::2\tip6-allrouters
";
/// The pod's own address if it has none on a network (as in Debian's installer).
const NO_ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 1, 1));

/// Carries out PreparePod completely or not at all.
pub fn prepare(pod: &PodFiles) -> Result<(), Fault> {
    let resolv_conf = resolv_conf(pod)?;
    check_line("hostname", &pod.hostname)?;
    // Every attempt to undo an earlier pod may have failed. Its resolv.conf would then apply to this pod, and
    // its kept namespaces would be in the way.
    if Path::new(paths::POD).exists() {
        log::warn!("something of an earlier pod was left");
        destroy()?;
    }
    let prepared = lay_out(pod, resolv_conf);
    if prepared.is_err()
        && let Err(fault) = destroy()
    {
        log::warn!("{fault}");
    }
    prepared
}

fn lay_out(pod: &PodFiles, resolv_conf: Option<String>) -> Result<(), Fault> {
    for directory in
        [paths::POD_NS, paths::POD_SHM, paths::CONTAINERS, paths::STAGE, paths::VOLUME, paths::SHARE]
    {
        fs::create_dir_all(directory).fault("making", directory)?;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("shm"), paths::POD_SHM, Some("tmpfs"), flags, Some("mode=1777"))
        .fault("mounting tmpfs on", paths::POD_SHM)?;
    if let Some(text) = resolv_conf {
        write(paths::POD_RESOLV_CONF, &text)?;
    }
    write(paths::POD_HOSTNAME, &format!("{}\n", pod.hostname))?;
    write(paths::POD_HOSTS, &hosts(pod))?;
    pod.share.as_ref().map_or(Ok(()), share::mount)
}

/// The text of resolv.conf(5); none if it would be empty.
fn resolv_conf(pod: &PodFiles) -> Result<Option<String>, Fault> {
    let mut text = String::new();
    for server in &pod.dns {
        check_line("dns", server)?;
        text.push_str(&format!("nameserver {server}\n"));
    }
    for (keyword, key, words) in
        [("search", "dnsSearch", &pod.dns_search), ("options", "dnsOptions", &pod.dns_options)]
    {
        for word in words {
            check_line(key, word)?;
        }
        if !words.is_empty() {
            text.push_str(&format!("{keyword} {}\n", words.join(" ")));
        }
    }
    if text.len() > RESOLV_CONF_MAX {
        let why = format!("resolv.conf would have more than {RESOLV_CONF_MAX} bytes");
        return Err(Fault::new("reading", "dns", why));
    }
    Ok(Some(text).filter(|text| !text.is_empty()))
}

/// The text of hosts(5), as Docker writes it.
fn hosts(pod: &PodFiles) -> String {
    let address = pod.address.unwrap_or(NO_ADDRESS);
    let name = pod.hostname.as_str();
    match name.split_once('.') {
        _ if name.is_empty() => HOSTS.to_owned(),
        Some((short, _)) => format!("{HOSTS}{address}\t{name} {short}\n"),
        None => format!("{HOSTS}{address}\t{name}\n"),
    }
}

/// Refuses a word with a control character: a line break in it would add a line of its own.
fn check_line(key: &str, word: &str) -> Result<(), Fault> {
    if word.chars().any(char::is_control) {
        Err(Fault::new("reading", key, "it contains a control character"))
    } else {
        Ok(())
    }
}

/// Writes a file that every user of a container may read.
fn write(path: &str, text: &str) -> Result<(), Fault> {
    fs::write(path, text).fault("writing", path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).fault("setting the mode of", path)
}

/// Undoes PreparePod, and removes the namespaces of the pod init that execd kept and every remaining
/// container. A missing part is no error. Everything is tried; the first error is returned.
pub fn destroy() -> Result<(), Fault> {
    let mut first = Ok(());
    let mut keep = |result: Result<(), Fault>| {
        if first.is_ok() {
            first = result;
        }
    };
    for id in containers() {
        keep(super::container::remove(&id));
    }
    for name in paths::POD_NAMESPACES {
        keep(unmount(Path::new(paths::POD_NS).join(name).as_path()));
    }
    keep(unmount(Path::new(paths::SHARE)));
    keep(unmount(Path::new(paths::POD_SHM)));
    keep(match fs::remove_dir_all(paths::POD) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Fault::io("removing", paths::POD, &error)),
        _ => Ok(()),
    });
    first
}

/// The containers that have a directory.
fn containers() -> Vec<ContainerId> {
    let Ok(entries) = fs::read_dir(paths::CONTAINERS) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| ContainerId::try_from(name).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(dns: &[&str], search: &[&str], options: &[&str]) -> PodFiles {
        let owned = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        PodFiles {
            hostname: "pod".to_owned(),
            address: None,
            dns: owned(dns),
            dns_search: owned(search),
            dns_options: owned(options),
            share: None,
        }
    }

    #[test]
    fn resolv_conf_has_the_lines_of_the_manual() {
        assert_eq!(resolv_conf(&pod(&[], &[], &[])).unwrap(), None);
        assert_eq!(
            resolv_conf(&pod(&["1.1.1.1", "::1"], &["a.test", "b.test"], &["ndots:2"])).unwrap().unwrap(),
            "nameserver 1.1.1.1\nnameserver ::1\nsearch a.test b.test\noptions ndots:2\n"
        );
    }

    #[test]
    fn hosts_has_the_pods_name() {
        let last = |hostname: &str, address: Option<&str>| {
            let address = address.map(|address| address.parse().unwrap());
            let text = hosts(&PodFiles { hostname: hostname.to_owned(), address, ..pod(&[], &[], &[]) });
            text.strip_prefix(HOSTS).unwrap().to_owned()
        };
        assert_eq!(last("pod", None), "127.0.1.1\tpod\n");
        assert_eq!(last("pod", Some("192.0.2.7")), "192.0.2.7\tpod\n");
        assert_eq!(last("web.a.test", Some("2001:db8::7")), "2001:db8::7\tweb.a.test web\n");
        assert_eq!(last("", Some("192.0.2.7")), "");
    }

    #[test]
    fn a_resolv_conf_has_an_end() {
        let long = "x".repeat(RESOLV_CONF_MAX);
        assert_eq!(resolv_conf(&pod(&[], &[&long], &[])).unwrap_err().to, "dns");
    }

    #[test]
    fn no_word_writes_a_line_of_its_own() {
        for bad in [
            pod(&["1.1.1.1\nnameserver 2.2.2.2"], &[], &[]),
            pod(&[], &["a\nb"], &[]),
            pod(&[], &[], &["\0"]),
        ] {
            assert!(resolv_conf(&bad).is_err(), "{bad:?}");
        }
    }
}

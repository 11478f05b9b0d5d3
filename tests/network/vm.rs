//! In a VM: a real kernel's modules, a virtio NIC, QEMU's own network, and NICs that come and go.

use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::time::Instant;

use hyperinit::command::Command;
use serde_json::json;

use super::guest::qmp::Qmp;
use super::guest::{Guest, Kind, PATIENCE, hyperctl_path, make_rootfs, scratch};
use super::support::net::serve;
use super::{delete, set_up, start_pod};

/// Where a NIC can be plugged.
const SLOT: &str = "-device pcie-root-port,id=slot0";

/// A port of this machine that nobody has now.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// What comes from a port of this machine that QEMU forwards, once somebody answers.
fn hears(port: u16) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut text = String::new();
        // QEMU takes every connection, and ends it when the guest does not.
        let read = TcpStream::connect(("127.0.0.1", port)).and_then(|mut stream| {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.read_to_string(&mut text)
        });
        if read.is_ok() && !text.is_empty() {
            return text.trim_end().to_owned();
        }
        assert!(Instant::now() < deadline, "{read:?}");
    }
}

#[test]
fn a_vm_is_on_the_network() {
    let (v4, v6) = (serve("127.0.0.1:0", "four\n"), serve("[::1]:0", "six\n"));
    let forwarded = free_port();
    let publish = format!("{forwarded}:8080");
    let guest = Guest::boot_up(Kind::Vm, "", &["--net", "user", "--publish", &publish, "--qemu", SLOT]);
    guest.call(start_pod(json!({
        "interfaces": [{"device": "eth0", "ipAddresses": [
            {"ipAddress": "10.0.2.15", "netMask": "255.255.255.0"}, {"ipAddress": "fec0::15", "netMask": "64"}]}],
        "routes": [{"dest": "default", "gateway": "10.0.2.2"}, {"dest": "default", "gateway": "fec0::2", "device": "eth0"}],
        "dns": ["10.0.2.3", "fec0::3"],
        "portmappingWhiteLists": {"internalNetworks": ["192.0.2.0/24"], "externalNetworks": ["10.0.2.0/24"]}})));
    guest.sleeper("c");
    let hears_from_host = |address: &str, port| guest.says("c", &format!("nc {address} {port} </dev/null"));
    assert_eq!(hears_from_host("10.0.2.2", v4), "four\n");
    assert_eq!(hears_from_host("fec0::2", v6), "six\n");
    assert_eq!(guest.says("c", "cat /etc/resolv.conf"), "nameserver 10.0.2.3\nnameserver fec0::3\n");
    // What the kernel is told for port mapping: as many connections as take a 64th of memory, at 512 bytes
    // each.
    let kept = guest.says(
        "c",
        "read name kilobytes unit </proc/meminfo; cd /proc/sys/net/netfilter
        echo $((kilobytes * 1024 / 64 / 512 - $(cat nf_conntrack_max))); cat nf_conntrack_tcp_timeout_established",
    );
    assert_eq!(kept, "0\n300\n");
    // The host's port leads to QEMU's 8080, and that to the container's 80.
    let ports = json!({"ports": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]});
    let web = guest.container("web", &["nc", "-ll", "-p", "80", "-e", "/bin/echo", "web"], ports);
    assert_eq!(hears(forwarded), "web");
    guest.finish(web);

    plugged(&guest, v4);
    renamed(&guest, v4);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

#[test]
fn hyperctl_runs_a_container_on_the_network() {
    let directory = scratch();
    let rootfs = directory.join("rootfs");
    make_rootfs(&rootfs);
    let (v4, v6, published) = (serve("127.0.0.1:0", "four\n"), serve("[::1]:0", "six\n"), free_port());
    let script = format!(
        "cat /etc/resolv.conf; nc 10.0.2.2 {v4} </dev/null; nc fec0::2 {v6} </dev/null; nc -l -p 80 -e /bin/echo in"
    );
    let mut program = std::process::Command::new(hyperctl_path());
    program.args(["run", "--vm", "--rootfs"]).arg(&rootfs);
    program.args(["--publish", &format!("{published}:80"), "--dns", "10.0.2.3", "--dns", "fec0::3"]);
    program.args(["--", "/bin/sh", "-c", &script]);
    let running = program.stdout(Stdio::piped()).spawn().unwrap();
    assert_eq!(hears(published), "in");
    let output = running.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(text, "nameserver 10.0.2.3\nnameserver fec0::3\nfour\nsix\n");
    std::fs::remove_dir_all(directory).unwrap();
}

/// A NIC that is plugged while the pod runs, and unplugged again.
fn plugged(guest: &Guest, v4: u16) {
    let mut qmp = Qmp::connect(&guest.directory.join("guest"));
    let lan = json!({"device": "eth1", "newDeviceName": "lan", "mtu": 1400,
        "ipAddresses": [{"ipAddress": "10.9.0.15", "netMask": "24"}, {"ipAddress": "fec0:9::15", "netMask": "64"}]});
    for _ in 0..2 {
        let refused = guest.refused(set_up(lan.clone()));
        assert_eq!(refused, "netd: looking for the link eth1: No such device", "after two seconds");
        qmp.run(
            "netdev_add",
            json!({"type": "user", "id": "more", "net": "10.9.0.0/24", "ipv6-prefix": "fec0:9::"}),
        );
        qmp.run(
            "device_add",
            json!({"driver": "virtio-net-pci", "id": "nic", "netdev": "more", "bus": "slot0", "romfile": ""}),
        );
        guest.call(set_up(lan.clone()));
        assert_eq!(guest.says("c", &format!("nc 10.9.0.2 {v4} </dev/null")), "four\n");
        let link = guest.says("c", "ip address show dev lan");
        assert!(link.contains("mtu 1400") && link.contains("fec0:9::15/64"), "{link}");
        guest.call(delete("lan"));
        assert_eq!(guest.says("c", "ls /sys/class/net"), "eth0\nlo\n");
        let gone = guest.refused(delete("lan"));
        assert_eq!(gone, "mountd: unplugging lan: No such file or directory");
        qmp.run("device_del", json!({"id": "nic"}));
        qmp.wait_for("DEVICE_DELETED", "nic");
        qmp.run("netdev_del", json!({"id": "more"}));
    }
    let own = guest.refused(delete("lo"));
    assert_eq!(own, "mountd: unplugging lo: it is no device on the PCI bus");
}

/// A link that is up gets another name, also from a kernel that calls it busy, and keeps what it has.
fn renamed(guest: &Guest, v4: u16) {
    let has = |link: &str| {
        // But for what a router (QEMU is one) tells, which it tells again.
        let text = guest.says(
            "c",
            "(ip route; ip -6 route; ip address | grep -wE 'global|site') | grep -vE 'expires|dynamic'",
        );
        let mut lines: Vec<String> =
            text.lines().map(|line| line.replace(link, "LINK").trim().to_owned()).collect();
        lines.sort();
        lines
    };
    let before = has("eth0");
    for start in ["default via 10.0.2.2 dev LINK", "default via fec0::2 dev LINK", "inet6 fec0::15/64"] {
        assert!(before.iter().any(|line| line.starts_with(start)), "{before:?}");
    }
    guest.call(set_up(json!({"device": "eth0", "newDeviceName": "wan"})));
    assert_eq!(has("wan"), before);
    // The undo of a rename gives it back as well.
    let refused = guest.refused(set_up(
        json!({"device": "wan", "newDeviceName": "lan", "ipAddress": "10.0.2.15", "netMask": "24"}),
    ));
    assert!(refused.starts_with("netd: adding 10.0.2.15/24 to lan: File exists"), "{refused}");
    assert_eq!(has("wan"), before);
    assert_eq!(guest.says("c", "ls /sys/class/net"), "lo\nwan\n");
    assert_eq!(guest.says("c", &format!("nc 10.0.2.2 {v4} </dev/null")), "four\n");
    guest.call(set_up(json!({"device": "wan", "newDeviceName": "wan"})));
    guest.call(set_up(json!({"device": "wan"})));
    assert_eq!(guest.says("c", &format!("nc 10.0.2.2 {v4} </dev/null")), "four\n");
}

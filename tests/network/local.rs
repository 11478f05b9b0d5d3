//! In namespaces.

use std::io::Read;
use std::time::Instant;

use hyperinit::command::Command;
use serde_json::{Value, json};

use super::guest::processes::{kill_hard, process};
use super::guest::{Guest, Kind, PATIENCE, kill};
use super::support::net::{SYSTEM_PATH, World, serve};
use super::{delete, routes, set_up, start_pod};

/// A guest without a pod, and a world that its links lead to.
fn guest() -> (Guest, World, String) {
    let guest = Guest::boot(Kind::Local);
    let namespace = format!("/proc/{}/ns/net", process(&guest, "netd", None));
    (guest, World::new(), namespace)
}

/// A program in the guest's network.
fn look(namespace: &str, words: &str) -> String {
    let mut program = std::process::Command::new("nsenter");
    let output =
        program.arg(format!("--net={namespace}")).args(words.split(' ')).env("PATH", SYSTEM_PATH).output();
    let output = output.expect("nsenter is missing: apt-get install util-linux");
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Looks until something is to be seen.
fn look_until(namespace: &str, words: &str, seen: impl Fn(&str) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let text = look(namespace, words);
        if seen(&text) {
            return;
        }
        assert!(Instant::now() < deadline, "{text}");
        std::thread::yield_now();
    }
}

/// What a server says there, once there is one.
fn hears(world: &World, from: &str) -> String {
    let address: std::net::SocketAddr = from.parse().unwrap();
    world.inside(move || {
        let deadline = Instant::now() + PATIENCE / 3;
        loop {
            match std::net::TcpStream::connect_timeout(&address, PATIENCE / 6) {
                Ok(mut stream) => {
                    let mut text = String::new();
                    stream.read_to_string(&mut text).unwrap();
                    return text.trim_end().to_owned();
                }
                // It is not listening yet.
                Err(error) => assert!(Instant::now() < deadline, "{address}: {error}"),
            }
        }
    })
}

fn interfaces() -> Value {
    json!([{"device": "eth0", "newDeviceName": "lan", "mtu": 1400, "ipAddresses": [
        {"ipAddress": "10.1.0.2", "netMask": "255.255.0.0"}, {"ipAddress": "10.2.0.2", "netMask": "16"},
        {"ipAddress": "fec0:1::2", "netMask": "64"}]}])
}

fn pod() -> Value {
    json!({"interfaces": interfaces(), "dns": ["10.1.0.1", "fec0:1::1"],
        "routes": [{"dest": "default", "gateway": "10.1.0.1"}, {"dest": "any", "gateway": "fec0:1::1", "device": "lan"}],
        "portmappingWhiteLists": {"internalNetworks": ["10.1.0.0/16", "fec0:1::/64"], "externalNetworks": ["10.2.0.0/16"]}})
}

const WORLD: [&str; 3] = ["10.1.0.1/16", "10.2.0.1/16", "fec0:1::1/64"];

#[test]
fn a_pod_has_a_network_and_its_containers_have_ports() {
    let (guest, world, namespace) = guest();
    world.link_to(&namespace, "eth0", &WORLD);
    guest.call(start_pod(pod()));
    assert_eq!(
        guest.container_says("a", "cat /etc/resolv.conf; ifconfig lan | grep -o MTU:1400", json!({})),
        "nameserver 10.1.0.1\nnameserver fec0:1::1\nMTU:1400\n"
    );
    // Out of a container, over both gateways.
    let port = world.inside(|| serve("[::]:0", "out\n"));
    for server in ["10.1.0.1", "fec0:1::1"] {
        assert_eq!(guest.container_says("a", &format!("nc {server} {port} </dev/null"), json!({})), "out\n");
    }
    // And into one.
    let web = json!({"ports": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]});
    let serve = ["nc", "-ll", "-p", "80", "-e", "/bin/echo", "web"];
    let running = guest.container("web", &serve, web.clone());
    assert_eq!(hears(&world, "10.1.0.2:80"), "web");
    assert_eq!(hears(&world, "10.2.0.2:80"), "web");
    assert_eq!(hears(&world, "10.2.0.2:8080"), "web");
    assert_eq!(hears(&world, "[fec0:1::2]:80"), "web");
    let taken = guest.try_container("other", &["true"], web.clone());
    assert!(super::guest::refusal(taken).ends_with("the host's 8080/tcp leads to container web"));
    // A netd that dies loses none of it, and its successor goes on.
    let old = process(&guest, "netd", None);
    kill_hard(old);
    process(&guest, "netd", Some(old));
    assert_eq!(hears(&world, "10.2.0.2:8080"), "web");
    guest.finish(running);
    look_until(&namespace, "nft list table inet hyperstart", |table| !table.contains("elements"));
    assert!(world.is_kept_from("10.2.0.2:80"));
    let again = guest.container("web", &serve, web);
    assert_eq!(hears(&world, "10.2.0.2:8080"), "web");
    guest.finish(again);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

#[test]
fn an_interface_while_the_pod_runs() {
    let (guest, world, namespace) = guest();
    guest.start_pod();
    world.link_to(&namespace, "eth0", &WORLD);
    guest.call(set_up(interfaces()[0].clone()));
    guest.call(routes(
        json!([{"dest": "192.0.2.0/24", "gateway": "10.1.0.1"}, {"dest": "198.51.100.7", "device": "lan"}]),
    ));
    let text = look(&namespace, "ip route show");
    for line in ["192.0.2.0/24 via 10.1.0.1 dev lan", "198.51.100.7 dev lan scope link"] {
        assert!(text.contains(line), "{text}");
    }
    for (command, why) in [
        (set_up(interfaces()[0].clone()), "netd: looking for the link eth0: No such device"),
        (
            set_up(json!({"device": "lan", "ipAddress": "10.1.0.2", "netMask": "16"})),
            "netd: adding 10.1.0.2/16 to lan: File exists",
        ),
        (
            set_up(json!({"device": "lan", "ipAddress": "10.1.0.2", "netMask": "255.0.255.0"})),
            "netd: reading an address of lan",
        ),
        (
            routes(json!([{"dest": "default", "gateway": "10.9.0.1"}])),
            "netd: adding the route to everything by 10.9.0.1: Network is unreachable",
        ),
        (
            routes(
                json!([{"dest": "203.0.113.0/24", "gateway": "10.1.0.1"}, {"dest": "nowhere", "device": "lan"}]),
            ),
            "netd: reading dest of a route",
        ),
        (delete("lan"), "mountd: unplugging lan: a guest in namespaces has no devices of its own"),
    ] {
        let refused = guest.refused(command);
        assert!(refused.starts_with(why), "{refused}");
        assert!(!look(&namespace, "ip route show").contains("203.0.113"));
    }
    guest.call(set_up(json!({"device": "lan", "ipAddress": "-10.1.0.2", "netMask": "16"})));
    assert!(!look(&namespace, "ip address show dev lan").contains("10.1.0.2/"));
}

#[test]
fn a_pod_that_does_not_start_leaves_no_network() {
    let (guest, world, namespace) = guest();
    world.link_to(&namespace, "eth0", &WORLD);
    let refused = |more: Value, why: &str| {
        let mut all = pod();
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let text = guest.refused(start_pod(all));
        assert!(text.contains(why), "{text}");
        assert!(!look(&namespace, "nft list ruleset").contains("hyperstart"), "{why}");
        let link = look(&namespace, "ip address show dev eth0");
        assert!(!link.contains("inet ") && !link.contains(",UP"), "{why}: {link}");
    };
    refused(
        json!({"routes": [{"dest": "default", "gateway": "10.1.0.1"}, {"dest": "default", "gateway": "10.9.0.1"}]}),
        "Network is unreachable",
    );
    refused(
        json!({"portmappingWhiteLists": {"internalNetworks": ["10.1.0.0/33"]}}),
        "reading internalNetworks",
    );
    refused(json!({"dnsSearch": ["a\nb"]}), "reading dnsSearch");
    guest.call(start_pod(pod()));
    assert!(look(&namespace, "nft list ruleset").contains("hyperstart"));
    // The pod's end, without that of the guest.
    guest.sleeper("c");
    kill_hard(process(&guest, "podinit", None));
    look_until(&namespace, "nft list ruleset", |rules| !rules.contains("hyperstart"));
    look_until(&namespace, "ip address show dev eth0", |link| {
        !link.contains("inet ") && !link.contains(",UP")
    });
    let text = guest.refused(kill("c", 9));
    assert!(text.contains("no such container"), "{text}");
    guest.call(start_pod(pod()));
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

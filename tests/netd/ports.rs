//! Port mapping: real packets, from networks that may and networks that may not.

use std::io::{Read, Write};
use std::net::IpAddr;

use hyperinit::wire::Role;
use serde_json::{Value, json};

use super::net::{World, listen, map, nft, reset, set};
use super::sctp;
use super::support::guest::guest;
use super::support::helper::Helper;

/// A world with an internal, an external and another network behind one link, and netd.
fn with_world(test: impl FnOnce(&World, &mut Helper) + Send + 'static) {
    guest(|_| {
        let world = World::new();
        let there =
            ["10.1.0.1/16", "10.2.0.1/16", "10.3.0.1/16", "fec0:1::1/64", "fec0:2::1/64", "fec0:3::1/64"];
        world.link("eth0", &there);
        let mut netd = Helper::start(Role::Netd, &[], None);
        let here = ["10.1.0.2", "10.2.0.2", "10.3.0.2", "fec0:1::2", "fec0:2::2", "fec0:3::2"];
        let address = |address: &&str| json!({"ipAddress": address, "netMask": if address.contains(':') { "64" } else { "16" }});
        let all: Vec<Value> = here.iter().map(address).collect();
        set(&mut netd, json!([{"device": "eth0", "ipAddresses": all}])).unwrap();
        world.until_ready("eth0");
        netd.line(r#"{"SetLinkUp":{"device":"lo"}}"#);
        test(&world, &mut netd);
    });
}

fn lists() -> Value {
    json!({"internalNetworks": ["10.1.0.0/16", "fec0:1::/64"], "externalNetworks": ["10.2.0.0/255.255.0.0", "fec0:2::/64"]})
}

#[test]
fn who_may_reach_what() {
    with_world(|world, netd| {
        let _servers = ["0.0.0.0:80", "0.0.0.0:81"].map(listen);
        let _servers6 = ["[fec0:1::2]:80", "[fec0:2::2]:80", "[fec0:3::2]:80", "[fec0:2::2]:81"].map(listen);
        // Without white lists nobody is kept out.
        world.connect("10.3.0.2:80");
        map(
            netd,
            lists(),
            json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"},
            {"hostPort": 81, "containerPort": 81, "protocol": "udp"}]),
        )
        .unwrap();
        for (to, may) in [
            // The internal networks, everything.
            ("10.1.0.2:80", true),
            ("10.1.0.2:81", true),
            ("[fec0:1::2]:80", true),
            // The external ones, the container's port by both its numbers.
            ("10.2.0.2:80", true),
            ("10.2.0.2:8080", true),
            ("10.2.0.2:81", false),
            ("[fec0:2::2]:80", true),
            ("[fec0:2::2]:8080", true),
            ("[fec0:2::2]:81", false),
            // Others, nothing.
            ("10.3.0.2:80", false),
            ("10.3.0.2:8080", false),
            ("[fec0:3::2]:80", false),
        ] {
            if may { drop(world.connect(to)) } else { assert!(world.is_kept_from(to), "{to}") }
        }
        // The guest itself, and what it asks for.
        assert!(std::net::TcpStream::connect("127.0.0.1:80").is_ok());
        let outside = world.inside(|| std::net::TcpListener::bind("10.3.0.1:90").unwrap());
        assert!(std::net::TcpStream::connect("10.3.0.1:90").is_ok());
        drop(outside);
        assert_eq!(netd.log(), "");
    });
}

#[test]
fn udp_and_sctp_are_mapped_too() {
    with_world(|world, netd| {
        let server = std::net::UdpSocket::bind("0.0.0.0:53").unwrap();
        server.set_read_timeout(Some(super::support::DEADLINE)).unwrap();
        map(
            netd,
            lists(),
            json!([{"hostPort": 5353, "containerPort": 53, "protocol": "udp"},
            {"hostPort": 9, "containerPort": 90, "protocol": "sctp"},
            {"hostPort": 91, "containerPort": 91, "protocol": "tcp"}]),
        )
        .unwrap();
        world.inside(|| {
            for from in ["10.3.0.1:7", "10.2.0.1:7"] {
                let socket = std::net::UdpSocket::bind(from).unwrap();
                let to = from.replace("0.1:7", "0.2:5353");
                socket.send_to(from.as_bytes(), to).unwrap();
            }
        });
        let mut text = [0; 64];
        let count = server.recv(&mut text).unwrap();
        assert_eq!(&text[..count], b"10.2.0.1:7", "the first one came from nowhere");
        // The same of SCTP: those that are kept out go first, and would come first.
        for [nowhere, external, internal] in
            [["10.3.0.", "10.2.0.", "10.1.0."], ["fec0:3::", "fec0:2::", "fec0:1::"]]
        {
            let at = |network: &str, host: u8| format!("{network}{host}").parse::<IpAddr>().unwrap();
            let server = sctp::raw(at(internal, 2));
            let send = |packets: Vec<(u16, (IpAddr, u16))>| {
                world.inside(move || packets.into_iter().for_each(|(from, to)| sctp::send_init(from, to)));
            };
            // From nowhere, by each of its numbers; a port that is TCP's; the external network.
            send(vec![
                (7, (at(nowhere, 2), 9)),
                (7, (at(nowhere, 2), 90)),
                (7, (at(external, 2), 91)),
                (8, (at(external, 2), 9)),
            ]);
            let led = sctp::receive(&server);
            assert_eq!(led, (at(external, 1), 8, 90, 1), "it leads to the container's port");
            // Of two links either's packet may come first.
            send(vec![(8, (at(internal, 2), 4))]);
            assert_eq!(sctp::receive(&server), (at(internal, 1), 8, 4, 1));
        }
        let table = nft("list table inet hyperstart");
        assert!(table.contains("sctp . 9 : 90") && table.contains("udp . 5353 : 53"), "{table}");
    });
}

#[test]
fn each_change_is_whole_and_what_was_accepted_goes_on() {
    with_world(|world, netd| {
        let server = listen("0.0.0.0:80");
        let ports = json!([{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]);
        map(netd, lists(), ports).unwrap();
        let mut client = world.connect("10.2.0.2:8080");
        let (mut served, _) = server.accept().unwrap();
        // The container ends; another netd knows what to do.
        netd.kill();
        let mut netd = Helper::start(Role::Netd, &[], None);
        map(&mut netd, lists(), json!([])).unwrap();
        assert!(world.is_kept_from("10.2.0.2:80") && world.is_kept_from("10.2.0.2:8080"));
        client.write_all(b"still").unwrap();
        served.set_nonblocking(false).unwrap();
        let mut text = [0; 5];
        served.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"still", "a connection that was accepted goes on");
        // The white lists are there.
        world.connect("10.1.0.2:80");
        // A change that the kernel (here: netd) refuses leaves everything as it was.
        let before = nft("list ruleset");
        for (lists, ports) in [
            (json!({"internalNetworks": ["10.1.0.0/16", "nowhere"]}), json!([])),
            (lists(), json!([{"hostPort": 1, "containerPort": 1, "protocol": "gre"}])),
        ] {
            assert_eq!(map(&mut netd, lists, ports).unwrap_err().errno, None);
            assert_eq!(nft("list ruleset"), before);
        }
    });
}

#[test]
fn nothing_else_is_touched_and_nothing_is_left() {
    with_world(|world, netd| {
        nft("add table inet mine");
        nft("add chain inet mine input { type filter hook input priority 10 ; policy accept ; }");
        let before = nft("list ruleset");
        // The first reset finds nothing.
        for ports in [json!([]), json!([{"hostPort": 1, "containerPort": 2, "protocol": "tcp"}])] {
            reset(netd, json!([]), json!([]), true).unwrap();
            assert_eq!(nft("list ruleset"), before);
            map(netd, lists(), ports).unwrap();
            assert!(nft("list ruleset").starts_with(&before), "mine is as it was");
        }
        let table = nft("list table inet hyperstart");
        let mut rest = table.as_str();
        for line in [
            "type inet_proto . inet_service",
            "elements = { tcp . 2 }",
            "elements = { tcp . 1 : 2 }",
            "type filter hook input priority filter; policy drop;",
            "ct state established,related accept",
            "meta l4proto icmp accept",
            "meta l4proto ipv6-icmp accept",
            "iiftype loopback accept",
            "ip saddr 10.1.0.0/16 accept",
            "ip6 saddr fec0:1::/64 accept",
            "ip saddr 10.2.0.0/16 meta l4proto . th dport @open accept",
            "ip6 saddr fec0:2::/64 meta l4proto . th dport @open accept",
            "type nat hook prerouting priority dstnat; policy accept;",
            "ip saddr 10.2.0.0/16 redirect to :meta l4proto . th dport map @redirects",
        ] {
            let Some((_, behind)) = rest.split_once(line) else { panic!("{line:?} is not in {rest}") };
            rest = behind;
        }
        reset(netd, json!([]), json!([]), true).unwrap();
        assert_eq!(nft("list ruleset"), before);
        let _server = listen("0.0.0.0:80");
        world.connect("10.3.0.2:80");
    });
}

#[test]
fn everybody_may_be_a_network() {
    with_world(|world, netd| {
        let _server = listen("0.0.0.0:80");
        let everybody = json!({"externalNetworks": ["0.0.0.0/0", "::/0"]});
        map(netd, everybody, json!([{"hostPort": 80, "containerPort": 80, "protocol": "tcp"}])).unwrap();
        world.connect("10.3.0.2:80");
    });
}

#[test]
fn as_many_ports_as_there_may_be() {
    with_world(|world, netd| {
        let _server = listen("0.0.0.0:80");
        let port = |n: u16| json!({"hostPort": 10_000 + n, "containerPort": 20_000 + n, "protocol": "tcp"});
        let mut ports: Vec<Value> = (0..4095).map(port).collect();
        ports.push(json!({"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}));
        let networks: Vec<String> = (0..255).map(|n| format!("10.2.{n}.0/24")).collect();
        let lists = json!({"internalNetworks": networks, "externalNetworks": networks});
        map(netd, lists.clone(), json!(ports)).unwrap();
        world.connect("10.2.0.2:8080");
        ports.push(json!({"hostPort": 8081, "containerPort": 80, "protocol": "tcp"}));
        assert!(map(netd, lists, json!(ports)).unwrap_err().to_string().ends_with("more than 4096"));
    });
}

/// netd remembers nothing, however often it is asked.
#[test]
fn a_thousand_mappings_leave_netd_as_it_was() {
    guest(|_| {
        let mut netd = Helper::start(Role::Netd, &[], None);
        let memory = |netd: &Helper| -> u64 {
            let status = std::fs::read_to_string(format!("/proc/{}/status", netd.pid().0)).unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        let mut some = |times: u32| {
            for turn in 0..times {
                let ports = json!([{"hostPort": 8000 + turn % 100, "containerPort": 80, "protocol": "tcp"}]);
                map(&mut netd, lists(), ports).unwrap();
                map(&mut netd, lists(), json!([])).unwrap();
            }
            memory(&netd)
        };
        let (warm, after) = (some(100), some(1000));
        assert!(after <= warm + 64, "{warm} kB before, {after} kB after");
    });
}

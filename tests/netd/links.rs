//! Interfaces: real links, and what the kernel made of them.

use std::fs;
use std::net::TcpListener;
use std::time::Instant;

use hyperinit::wire::Role;
use hyperinit::wire::netd::Reply;
use nix::errno::Errno;
use serde_json::json;

use super::net::{World, addresses, everything, ip, ip_json, reset, reset_to, set, set_again};
use super::support::DEADLINE;
use super::support::guest::guest;
use super::support::helper::Helper;

fn netd() -> Helper {
    Helper::start(Role::Netd, &[], None)
}

#[test]
fn a_link_gets_all_that_is_wanted_at_once() {
    guest(|_| {
        let world = World::new();
        world.link("eth0", &[]);
        let mut netd = netd();
        set(
            &mut netd,
            json!([{"device": "eth0", "newDeviceName": "net0", "mtu": 1400, "ipAddresses": [
            {"ipAddress": "10.1.0.2", "netMask": "255.255.255.0"}, {"ipAddress": "10.2.0.2", "netMask": "16"},
            {"ipAddress": "fec0:1::2", "netMask": "64"}]}]),
        )
        .unwrap();
        let link = &ip_json("link show dev net0")[0];
        assert_eq!(link["mtu"], 1400);
        assert!(link["flags"].as_array().unwrap().contains(&json!("UP")), "{link}");
        let (all, usable) = addresses("net0");
        assert_eq!(all, ["10.1.0.2/24", "10.2.0.2/16", "fec0:1::2/64"]);
        assert!(usable, "nobody waits for an address to be asked for: {}", ip("address"));
        assert_eq!(ip_json("-4 address show dev net0")[0]["addr_info"][0]["broadcast"], "10.1.0.255");
        for at in ["10.1.0.2:0", "[fec0:1::2]:0"] {
            TcpListener::bind(at).unwrap();
        }
        assert_eq!(netd.log(), "");
    });
}

#[test]
fn the_old_style_and_removal() {
    guest(|_| {
        let world = World::new();
        world.link("eth0", &[]);
        let mut netd = netd();
        set(&mut netd, json!([{"device": "eth0", "ipAddress": "10.1.0.2", "netMask": "255.0.0.0"}])).unwrap();
        assert_eq!(addresses("eth0").0, ["10.1.0.2/8"]);
        set(
            &mut netd,
            json!([{"device": "eth0", "ipAddresses": [
            {"ipAddress": "-10.1.0.2", "netMask": "8"}, {"ipAddress": "fec0::5", "netMask": "64"}]}]),
        )
        .unwrap();
        assert_eq!(addresses("eth0").0, ["fec0::5/64"]);
        set(&mut netd, json!([{"device": "eth0", "ipAddress": "-fec0::5", "netMask": "64"}])).unwrap();
        assert_eq!(addresses("eth0").0, Vec::<String>::new());
        let fault = set(&mut netd, json!([{"device": "eth0", "ipAddress": "-10.9.9.9", "netMask": "8"}]));
        let fault = fault.unwrap_err();
        assert!(fault.is(Errno::EADDRNOTAVAIL), "{fault}");
        assert!(fault.to_string().starts_with("netd: removing 10.9.9.9/8 from eth0: "), "{fault}");
    });
}

#[test]
fn only_the_address_that_is_named_is_removed() {
    guest(|_| {
        let world = World::new();
        world.link("eth0", &["10.1.0.1/24"]);
        let mut netd = netd();
        let all: Vec<_> =
            (2..5).map(|n| json!({"ipAddress": format!("10.1.0.{n}"), "netMask": "24"})).collect();
        set(&mut netd, json!([{"device": "eth0", "ipAddresses": all}])).unwrap();
        ip("route add default via 10.1.0.1");
        // The first one: the kernel calls the others its secondaries.
        set(&mut netd, json!([{"device": "eth0", "ipAddress": "-10.1.0.2", "netMask": "24"}])).unwrap();
        assert_eq!(addresses("eth0").0, ["10.1.0.3/24", "10.1.0.4/24"]);
        assert!(ip("route show").contains("default via 10.1.0.1"), "{}", ip("route show"));
        reset(
            &mut netd,
            json!([{"device": "eth0", "ipAddress": "10.1.0.3", "netMask": "24"}]),
            json!([]),
            false,
        )
        .unwrap();
        assert_eq!(addresses("eth0").0, ["10.1.0.4/24"]);
    });
}

#[test]
fn a_name_that_is_no_other_changes_nothing() {
    guest(|_| {
        let world = World::new();
        world.link("eth0", &["10.1.0.1/24"]);
        let mut netd = netd();
        set(&mut netd, json!([{"device": "eth0", "ipAddress": "10.1.0.2", "netMask": "24"}])).unwrap();
        ip("route add default via 10.1.0.1");
        let before = everything();
        for name in ["", "eth0"] {
            set(&mut netd, json!([{"device": "eth0", "newDeviceName": name}])).unwrap();
            assert_eq!(everything(), before, "the link was not taken down, and its routes are there");
        }
    });
}

#[test]
fn a_link_that_is_up_is_renamed() {
    guest(|_| {
        let world = World::new();
        world.link("eth0", &["10.1.0.1/24"]);
        let mut netd = netd();
        set(&mut netd, json!([{"device": "eth0", "ipAddress": "10.1.0.2", "netMask": "24"}])).unwrap();
        set(&mut netd, json!([{"device": "eth0", "newDeviceName": "lan"}])).unwrap();
        assert_eq!(addresses("lan").0, ["10.1.0.2/24"]);
        assert!(ip("route show").contains("10.1.0.0/24 dev lan"), "{}", ip("route show"));
        let listener = TcpListener::bind("10.1.0.2:0").unwrap();
        world.connect(&listener.local_addr().unwrap().to_string());
    });
}

#[test]
fn an_item_that_fails_undoes_the_earlier_ones() {
    guest(|_| {
        let world = World::new();
        world.link("eth0", &[]);
        world.link("eth1", &[]);
        ip("address add 10.1.0.9/24 dev eth0");
        let before = everything();
        let mut netd = netd();
        for (interfaces, errno, text) in [
            (
                json!([{"device": "eth1", "newDeviceName": "lan", "mtu": 1300, "ipAddress": "10.3.0.2", "netMask": "8"},
                    {"device": "eth0", "newDeviceName": "net0", "mtu": 1400, "ipAddresses": [
                        {"ipAddress": "-10.1.0.9", "netMask": "24"}, {"ipAddress": "10.1.0.2", "netMask": "24"},
                        {"ipAddress": "fec0::2", "netMask": "64"}, {"ipAddress": "10.1.0.2", "netMask": "24"}]}]),
                Errno::EEXIST,
                "netd: adding 10.1.0.2/24 to net0: File exists",
            ),
            (
                json!([{"device": "eth1", "ipAddress": "10.3.0.2", "netMask": "8"},
                    {"device": "eth0", "newDeviceName": "eth1"}]),
                Errno::EEXIST,
                "netd: renaming eth0 to eth1: File exists",
            ),
            (
                json!([{"device": "eth1", "ipAddress": "10.3.0.2", "netMask": "8"}, {"device": "eth0", "mtu": 5}]),
                Errno::EINVAL,
                "netd: setting the MTU of eth0: Invalid argument (mtu less than device minimum)",
            ),
            (
                json!([{"device": "eth1", "newDeviceName": "lan"}, {"device": "eth9"}]),
                Errno::ENODEV,
                "netd: looking for the link eth9: No such device",
            ),
        ] {
            let fault = set(&mut netd, interfaces).unwrap_err();
            assert!(fault.is(errno), "{fault}");
            // Kernels add more or fewer words.
            assert!(fault.to_string().starts_with(text), "{fault}");
            assert_eq!(everything(), before, "{text}");
        }
        assert_eq!(netd.log(), "", "nothing of it could not be undone");
    });
}

#[test]
fn what_cannot_be_read_never_reaches_the_kernel() {
    guest(|_| {
        let world = World::new();
        world.link("eth0", &[]);
        let before = everything();
        let mut netd = netd();
        let fault = set(
            &mut netd,
            json!([{"device": "eth0", "ipAddress": "10.1.0.2", "netMask": "24"},
            {"device": "eth0", "ipAddress": "10.1.0.2", "netMask": "255.0.255.0"}]),
        );
        assert!(fault.unwrap_err().to_string().contains("is not the mask"));
        assert_eq!(everything(), before);
    });
}

/// Whether a process sleeps in poll(2).
fn waits(pid: hyperinit::ids::Pid) -> bool {
    let call = fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap();
    let number = call.split(' ').next().unwrap().parse::<i64>();
    number.is_ok_and(|number| [nix::libc::SYS_poll, nix::libc::SYS_ppoll].contains(&number))
}

#[test]
fn a_link_that_is_being_plugged_is_waited_for() {
    guest(|_| {
        let world = World::new();
        let mut netd = netd();
        // News that nobody has read yet must not pass for the link's.
        world.link("other", &[]);
        let pid = netd.pid();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let until = Instant::now() + DEADLINE;
                while !waits(pid) {
                    assert!(Instant::now() < until, "netd does not wait");
                    std::thread::yield_now();
                }
                world.link("more", &[]);
                world.link("eth0", &[]);
            });
            set(&mut netd, json!([{"device": "eth0", "ipAddress": "10.1.0.2", "netMask": "24"}])).unwrap();
        });
        assert_eq!(addresses("eth0").0, ["10.1.0.2/24"]);
    });
}

#[test]
fn news_that_nobody_reads_does_no_harm() {
    guest(|_| {
        let world = World::new();
        world.link("eth0", &[]);
        let mut netd = netd();
        for _ in 0..300 {
            // Each change is told to whoever listens: more than a socket holds.
            ip("link set eth0 mtu 1400");
            ip("link set eth0 mtu 1500");
        }
        set(&mut netd, json!([{"device": "eth0", "ipAddress": "10.1.0.2", "netMask": "24"}])).unwrap();
        assert_eq!(addresses("eth0").0, ["10.1.0.2/24"]);
    });
}

#[test]
fn a_reset_takes_back_what_is_there_of_it() {
    guest(|_| {
        let world = World::new();
        world.link("eth0", &[]);
        world.link("eth1", &["10.1.0.1/24"]);
        ip("link set lo up");
        let before = everything();
        let interfaces = json!([{"device": "eth1", "newDeviceName": "lan", "ipAddresses": [
            {"ipAddress": "10.1.0.2", "netMask": "24"}, {"ipAddress": "fec0::2", "netMask": "64"}]},
            {"device": "eth9", "ipAddress": "10.9.0.2", "netMask": "24"}]);
        let routes = json!([{"dest": "default", "gateway": "10.1.0.1", "device": "lan"},
            {"dest": "10.7.0.0/16", "gateway": "10.9.0.1", "device": "eth9"}]);
        let mut netd = netd();
        set(&mut netd, json!([interfaces[0]])).unwrap();
        ip("route add default via 10.1.0.1 dev lan");
        // A part of it was never done; and the second time nothing of it is there.
        for _ in 0..2 {
            reset(&mut netd, interfaces.clone(), routes.clone(), true).unwrap();
            assert_eq!(everything(), before);
        }
    });
}

#[test]
fn what_a_link_loses_by_the_way_is_there_again_when_it_fails() {
    guest(|_| {
        let world = World::new();
        world.link("eth0", &["10.1.0.1/24"]);
        world.link("eth1", &[]);
        world.link("eth2", &[]);
        ip("link set eth0 up");
        for words in [
            "address add 10.1.0.9/24 dev eth0",
            "address add 10.1.0.8/24 dev eth0",
            "address add fec0:1::9/64 dev eth0 nodad",
            "route add 10.7.0.0/16 dev eth0",
            "route add default via 10.7.0.1 src 10.1.0.9",
            "-6 route add default via fec0:1::1",
            // Of a link that is down.
            "address add 10.2.0.9/24 dev eth1",
            "address add fec0:2::9/64 dev eth1 nodad",
        ] {
            ip(words);
        }
        let before = everything();
        let mut netd = netd();
        for changes in [
            // The last address takes the routes with it, the first one its secondaries.
            json!({"ipAddresses": [{"ipAddress": "-10.1.0.9", "netMask": "24"}]}),
            json!({"ipAddresses": [{"ipAddress": "-10.1.0.8", "netMask": "24"}, {"ipAddress": "-10.1.0.9", "netMask": "24"}]}),
            // A link of this size has no IPv6.
            json!({"mtu": 1279}),
            json!({"newDeviceName": "lan", "mtu": 1000, "ipAddresses": [{"ipAddress": "-10.1.0.9", "netMask": "24"}]}),
        ] {
            for device in ["eth0", "eth1"] {
                let mut first = changes.clone();
                first["device"] = json!(device);
                if device == "eth1" {
                    first["ipAddresses"] = json!([{"ipAddress": "-10.2.0.9", "netMask": "24"}]);
                }
                let fails = json!({"device": "eth2", "ipAddress": "-10.9.9.9", "netMask": "8"});
                let fault = set(&mut netd, json!([first, fails])).unwrap_err();
                assert!(fault.is(Errno::EADDRNOTAVAIL), "{fault}");
                assert_eq!(everything(), before, "{first}");
            }
        }
        assert_eq!(netd.log(), "");
    });
}

#[test]
fn what_a_predecessor_has_done_of_it_is_done() {
    guest(|_| {
        let interfaces = json!([{"device": "eth0", "newDeviceName": "net0", "mtu": 1400, "ipAddresses": [
            {"ipAddress": "-10.1.0.9", "netMask": "24"}, {"ipAddress": "10.1.0.2", "netMask": "24"},
            {"ipAddress": "fec0::2", "netMask": "64"}]}]);
        // After each of its steps somebody may have died.
        let steps = [
            "link set eth0 name net0",
            "link set net0 mtu 1400",
            "link set net0 up",
            "address del 10.1.0.9/24 dev net0",
            "address add 10.1.0.2/24 broadcast + dev net0",
            "address add fec0::2/64 dev net0 nodad",
        ];
        let mut whole = None;
        for done in 0..=steps.len() {
            let world = World::new();
            world.link("eth0", &[]);
            world.link("eth1", &[]);
            ip("address add 10.1.0.9/24 dev eth0");
            steps[..done].iter().for_each(|step| drop(ip(step)));
            let mut netd = netd();
            if done == 1 {
                set(&mut netd, interfaces.clone()).unwrap_err();
            }
            // What fails leaves what was there as it is, for who knows whose it is.
            let before = everything();
            let fails = json!([interfaces[0], {"device": "eth1", "newDeviceName": "lo"}]);
            let fault = set_again(&mut netd, fails).unwrap_err();
            assert!(fault.is(Errno::EEXIST), "{done}: {fault}");
            assert_eq!(everything(), before, "{done}");
            set_again(&mut netd, interfaces.clone()).unwrap();
            assert_eq!(*whole.get_or_insert_with(everything), everything(), "{done}");
            assert_eq!(netd.log(), "");
            ip("link delete net0");
            ip("link delete eth1");
        }
    });
}

#[test]
fn a_reset_makes_a_link_what_it_was() {
    guest(|_| {
        let world = World::new();
        world.link("eth0", &["10.1.0.1/24"]);
        world.link("eth1", &[]);
        for words in [
            "link set eth0 up",
            "address add 10.1.0.9/24 dev eth0",
            "address add fec0:1::9/64 dev eth0 nodad",
            "route add default via 10.1.0.1",
            "-6 route add default via fec0:1::1",
        ] {
            ip(words);
        }
        let before = everything();
        let interfaces = json!([
            {"device": "eth0", "newDeviceName": "lan", "mtu": 1400, "ipAddresses": [
                {"ipAddress": "10.1.0.2", "netMask": "24"}, {"ipAddress": "-10.1.0.9", "netMask": "24"},
                {"ipAddress": "-fec0:1::9", "netMask": "64"}, {"ipAddress": "fec0:1::2", "netMask": "64"}]},
            {"device": "eth1", "newDeviceName": "wan", "mtu": 1300, "ipAddress": "10.2.0.2", "netMask": "24"}]);
        let mut netd = netd();
        let Reply::Set { before: links } = set(&mut netd, interfaces.clone()).unwrap() else { panic!() };
        assert_eq!(
            links.iter().map(|link| (link.up, link.mtu)).collect::<Vec<_>>(),
            [(true, Some(1500)), (false, Some(1500))]
        );
        for _ in 0..2 {
            reset_to(&mut netd, interfaces.clone(), json!([]), false, links.clone()).unwrap();
            assert_eq!(everything(), before);
        }
        assert_eq!(netd.log(), "");
    });
}

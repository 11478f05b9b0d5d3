//! Routes: in the kernel's tables, or not at all.

use hyperinit::wire::Role;
use nix::errno::Errno;
use serde_json::json;

use super::net::{World, everything, ip, route, route_again, set};
use super::support::guest::guest;
use super::support::helper::Helper;

/// netd, and eth0 with addresses in 10.1.0.0/24 and fec0:1::/64.
fn with_link(test: impl FnOnce(&mut Helper) + Send + 'static) {
    guest(|_| {
        let world = World::new();
        world.link("eth0", &["10.1.0.1/24", "fec0:1::1/64"]);
        let mut netd = Helper::start(Role::Netd, &[], None);
        set(
            &mut netd,
            json!([{"device": "eth0", "ipAddresses": [
            {"ipAddress": "10.1.0.2", "netMask": "24"}, {"ipAddress": "fec0:1::2", "netMask": "64"}]}]),
        )
        .unwrap();
        test(&mut netd);
    });
}

#[test]
fn routes_of_every_kind() {
    with_link(|netd| {
        let routes = json!([
            {"dest": "default", "gateway": "10.1.0.1"},
            {"dest": "192.0.2.7", "gateway": "10.1.0.1", "device": "eth0"},
            {"dest": "198.51.100.0/24", "device": "eth0"},
            {"dest": "203.0.113.0/255.255.255.0", "gateway": "10.1.0.1", "device": ""},
            {"dest": "any", "gateway": "fec0:1::1", "device": "eth0"},
            {"dest": "2001:db8::/32", "gateway": "fec0:1::1"},
            {"dest": "2001:db8::7", "device": "eth0"},
        ]);
        route(netd, routes).unwrap();
        let (v4, v6) = (ip("route show"), ip("-6 route show"));
        for line in [
            "default via 10.1.0.1 dev eth0",
            "192.0.2.7 via 10.1.0.1 dev eth0",
            "198.51.100.0/24 dev eth0 scope link",
            "203.0.113.0/24 via 10.1.0.1 dev eth0",
        ] {
            assert!(v4.lines().any(|route| route.trim_end().starts_with(line)), "{line:?} is not in {v4}");
        }
        for line in
            ["default via fec0:1::1 dev eth0", "2001:db8::/32 via fec0:1::1 dev eth0", "2001:db8::7 dev eth0"]
        {
            assert!(v6.lines().any(|route| route.starts_with(line)), "{line:?} is not in {v6}");
        }
        assert_eq!(netd.log(), "");
    });
}

#[test]
fn an_item_that_fails_undoes_the_earlier_ones() {
    with_link(|netd| {
        ip("route add 10.7.0.0/16 via 10.1.0.1");
        let before = everything();
        for (last, errno, text) in [
            (
                json!({"dest": "default", "gateway": "10.9.0.1"}),
                Errno::ENETUNREACH,
                "netd: adding the route to everything by 10.9.0.1: Network is unreachable (Nexthop has invalid gateway)",
            ),
            (
                json!({"dest": "10.7.0.0/16", "gateway": "10.1.0.1"}),
                Errno::EEXIST,
                "netd: adding the route to 10.7.0.0/16 by 10.1.0.1: File exists",
            ),
            (
                json!({"dest": "10.7.0.0/8", "gateway": "10.1.0.1"}),
                Errno::EINVAL,
                "netd: adding the route to 10.7.0.0/8 by 10.1.0.1: Invalid argument (Invalid prefix for given prefix length)",
            ),
            (
                json!({"dest": "10.7.0.1", "device": "eth7"}),
                Errno::ENODEV,
                "netd: looking for the link eth7: No such device",
            ),
        ] {
            let fault = route(
                netd,
                json!([{"dest": "192.0.2.0/24", "gateway": "10.1.0.1"},
                {"dest": "2001:db8::/32", "gateway": "fec0:1::1"}, last]),
            );
            let fault = fault.unwrap_err();
            assert!(fault.is(errno), "{fault}");
            assert!(fault.to_string().starts_with(text), "{fault}");
            assert_eq!(everything(), before, "{text}");
        }
        assert_eq!(netd.log(), "");
    });
}

#[test]
fn what_a_predecessor_has_done_of_it_is_done() {
    with_link(|netd| {
        let routes = json!([
            {"dest": "198.51.100.0/24", "device": "eth0"},
            {"dest": "0.0.0.0/0", "gateway": "10.1.0.1"},
            {"dest": "2001:db8::1/32", "gateway": "fec0:1::1", "device": "eth0"},
        ]);
        let before = everything();
        route(netd, routes.clone()).unwrap();
        let whole = everything();
        assert!(route(netd, routes.clone()).unwrap_err().is(Errno::EEXIST), "it is somebody else's");
        route_again(netd, routes.clone()).unwrap();
        assert_eq!(everything(), whole);
        ip("route delete default");
        route_again(netd, routes.clone()).unwrap();
        assert_eq!(everything(), whole);
        for other in [
            json!({"dest": "default", "gateway": "10.1.0.7"}),
            json!({"dest": "198.51.100.0/24", "gateway": "10.1.0.1"}),
        ] {
            let fault = route_again(netd, json!([other])).unwrap_err();
            assert!(fault.is(Errno::EEXIST), "another one is in its place: {fault}");
            assert_eq!(everything(), whole);
        }
        let mut fails = routes.clone();
        fails.as_array_mut().unwrap().push(json!({"dest": "192.0.2.7", "gateway": "10.9.0.1"}));
        assert!(route_again(netd, fails.clone()).unwrap_err().is(Errno::ENETUNREACH));
        assert_eq!(everything(), whole, "who knows whose they are");
        ip("route delete 198.51.100.0/24");
        ip("route delete default");
        ip("route delete 2001:db8::/32");
        assert_eq!(everything(), before);
        assert!(route_again(netd, fails).unwrap_err().is(Errno::ENETUNREACH));
        assert_eq!(everything(), before);
    });
}

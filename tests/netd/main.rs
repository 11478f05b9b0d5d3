//! netd, confined, by hand, in a network namespace of its own.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test's panic is its report")]

mod links;
mod net;
mod packets;
mod ports;
mod routes;
mod sctp;
#[path = "../support/mod.rs"]
mod support;

use std::fs;
use std::process::Command;

use hyperinit::fault::Fault;
use hyperinit::wire::Role;
use hyperinit::wire::netd::{Reply, Request};
use nix::errno::Errno;
use support::guest::guest;
use support::helper::{Helper, binary};

fn up(netd: &mut Helper, device: &str) -> Result<Reply, Fault> {
    netd.ask(&Request::SetLinkUp { device: device.to_owned() })
}

/// Whether the link is up, as the kernel tells the thread's own namespace.
fn addresses_of_loopback() -> String {
    fs::read_to_string("/proc/thread-self/net/if_inet6").unwrap()
}

#[test]
fn the_loopback_comes_up() {
    guest(|_| {
        assert_eq!(addresses_of_loopback(), "", "a new namespace's loopback is down");
        let mut netd = Helper::start(Role::Netd, &[], None);
        assert_eq!(up(&mut netd, "lo").unwrap(), Reply::Done);
        assert!(addresses_of_loopback().contains(" lo"), "it has its address, so it is up");
        assert_eq!(up(&mut netd, "lo").unwrap(), Reply::Done, "up is up");
        assert_eq!(netd.log(), "");
        assert!(netd.finish().success());
    });
}

#[test]
fn the_kernels_answer_is_the_answer() {
    guest(|_| {
        let mut netd = Helper::start(Role::Netd, &[], None);
        let fault = up(&mut netd, "eth7").unwrap_err();
        assert!(fault.is(Errno::ENODEV), "{fault}");
        assert_eq!(fault.to_string(), "netd: bringing up eth7: No such device");
        assert_eq!(up(&mut netd, "lo").unwrap(), Reply::Done, "it goes on");
    });
}

#[test]
fn a_bad_name_never_reaches_the_kernel() {
    guest(|_| {
        let mut netd = Helper::start(Role::Netd, &[], None);
        for bad in ["", ".", "a/b", "sixteen-letters!", "a b", "lo\n"] {
            let fault = up(&mut netd, bad).unwrap_err();
            assert_eq!((fault.doing.as_str(), fault.errno), ("reading", None), "{fault}");
        }
    });
}

#[test]
fn a_line_that_is_no_request_is_answered() {
    guest(|_| {
        let mut netd = Helper::start(Role::Netd, &[], None);
        for bad in ["{", "\"SetLinkUp\"", "{\"Reboot\":{}}", "\u{fffd}", "[[[[[["] {
            let reply = netd.line(bad);
            assert!(reply.contains("reading") && reply.contains("the request"), "{reply}");
        }
        assert_eq!(netd.line(r#"{"SetLinkUp":{"device":"lo"}}"#), r#"{"Ok":"Done"}"#);
    });
}

/// What /proc says of a process, by key.
fn status(pid: hyperinit::ids::Pid, key: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
}

#[test]
fn it_is_a_user_with_one_capability() {
    guest(|_| {
        let mut netd = Helper::start(Role::Netd, &[], None);
        // An answer: it is confined by now.
        up(&mut netd, "lo").unwrap();
        let pid = netd.pid();
        assert_eq!(status(pid, "Uid"), "4294963201 4294963201 4294963201 4294963201");
        assert_eq!(status(pid, "Groups"), "");
        assert_eq!(
            (status(pid, "CapEff").as_str(), status(pid, "CapBnd").as_str()),
            ("0000000000001000", "0000000000000000")
        );
        assert_eq!((status(pid, "Seccomp:").as_str(), status(pid, "NoNewPrivs").as_str()), ("2", "1"));
    });
}

#[test]
fn it_says_what_it_may_do() {
    let output = Command::new(binary(Role::Netd)).arg("--policy").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    assert!(text.contains("CAP_NET_ADMIN: ") && text.contains("\nsendto: "), "{text}");
    assert!(text.contains("user 4294963201:4294963201"), "{text}");
}

#[test]
fn unconfined_is_loud() {
    guest(|_| {
        let mut netd = Helper::start(Role::Netd, &["--unconfined"], None);
        up(&mut netd, "lo").unwrap();
        assert!(netd.log().contains("UNCONFINED"), "{}", netd.log());
        assert_eq!(status(netd.pid(), "Seccomp:"), "0");
    });
}

#[test]
fn a_wrong_argument_is_told() {
    for arguments in [&["--stdio", "--fast"][..], &[], &["--stdio", "--profile", "root"]] {
        let output = Command::new(binary(Role::Netd)).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("usage: "), "{arguments:?}");
    }
}

//! Guests that are opened in other ways: by an old-style STARTPOD, which carries its containers, and by the
//! debugging door. Each runs in namespaces and in one VM.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod guest;

use std::fs;
use std::path::Path;

use guest::processes::replace;
use guest::{Guest, Kind, Outcome, PATIENCE, Running, kill, parse, parse_exec, refusal, scratch};
use hyperinit::command::Command;
use hyperinit::sandbox::{CapSet, ContainerProfile};
use hyperinit::spec::Pod;
use hyperinit::wire::Profile;
use serde_json::{Value, json};

#[test]
fn in_namespaces() {
    let guest = Guest::boot_with(Kind::Local, "hyper_debug");
    // The share exists before the pod does.
    the_door(&guest, "/run/hyperinit/local-share/image/rootfs/bin/busybox");
    old_style(&guest);
    the_door_in_a_pod(&guest, "/run/hyperinit/local-share/image/rootfs/bin/busybox");
    the_end(guest, "/run/hyperinit/local-share/image/rootfs/bin/busybox");
}

#[test]
fn in_a_vm() {
    let directory = scratch();
    let image = guest::image::with_busybox(&directory);
    let guest = Guest::boot_up(Kind::Vm, "hyper_debug", &["--initrd", image.to_str().unwrap()]);
    the_door(&guest, "/bin/busybox");
    old_style(&guest);
    the_door_in_a_pod(&guest, "/bin/busybox");
    the_end(guest, "/bin/busybox");
    fs::remove_dir_all(directory).unwrap();
}

// ---- the debugging door ----

/// Runs a script in the guest itself.
fn script<'a>(guest: &'a Guest, busybox: &str, script: &str, more: Value) -> Running<'a> {
    // busybox's applets are the only programs of the guest.
    let path = Path::new(busybox).parent().unwrap().display();
    let script = format!("PATH={path}; {script}");
    guest.exec("hyperstart", &[busybox, "sh", "-c", &script], more)
}

fn says(guest: &Guest, busybox: &str, words: &str) -> String {
    let outcome = script(guest, busybox, words, json!({})).outcome();
    assert_eq!((outcome.status, outcome.stderr.as_str()), (0, ""), "{words}: {:?}", outcome.stdout);
    outcome.stdout
}

fn the_door(guest: &Guest, busybox: &str) {
    assert_eq!(says(guest, busybox, "busybox cat /proc/1/comm"), "init\n", "the guest's own processes");
    let tree = says(
        guest,
        busybox,
        "for one in pid mnt uts ipc net; do busybox readlink /proc/self/ns/$one; busybox readlink /proc/1/ns/$one; done",
    );
    for pair in tree.lines().collect::<Vec<_>>().chunks(2) {
        assert_eq!(
            pair[0] == pair[1],
            !pair[0].starts_with("net:"),
            "init's own namespaces, and the pod's network: {pair:?}"
        );
    }
    let mounts = "busybox mkdir /m && busybox mount -t tmpfs x /m && busybox umount /m && busybox rmdir /m";
    says(guest, busybox, mounts);

    // Streams, statuses, signals.
    let cat = script(guest, busybox, "busybox cat; echo end >&2; exit 3", json!({}));
    cat.streams.stdin.write(b"typed\n").unwrap();
    let outcome = cat.outcome();
    assert_eq!(outcome, Outcome { status: 3, stdout: "typed\n".to_owned(), stderr: "end\n".to_owned() });
    let sleeper = script(guest, busybox, "echo up; exec busybox sleep 1000", json!({}));
    sleeper.read_until("up\n");
    sleeper.signal(15);
    assert_eq!(sleeper.outcome().status, 143);
    let missing = guest.exec("hyperstart", &["/no/such/program"], json!({})).outcome();
    assert_eq!(missing.status, 127, "{}", missing.stderr);

    // A terminal, and its size.
    let terminal = json!({"terminal": true, "stderr": 0});
    let shell = guest.exec("hyperstart", &[busybox, "sh", "-i"], terminal);
    shell.resize(33, 44);
    let stty = format!("{busybox} stty size; exit 5\n");
    shell.streams.stdin.write(stty.as_bytes()).unwrap();
    shell.read_until("33 44");
    assert_eq!(shell.end().status, 5);

    // Users are numbers, because the guest has no passwd file.
    let user =
        script(guest, busybox, "busybox grep -E '^(Uid|CapEff)' /proc/self/status", json!({"user": "33"}));
    assert_eq!(user.outcome().stdout, "Uid:\t33\t33\t33\t33\nCapEff:\t0000000000000000\n");
    let text = refusal(guest.try_exec("hyperstart", &[busybox], json!({"user": "web"})));
    assert!(text.contains("no such user"), "{text}");
    let text = guest.refused(kill("hyperstart", 9));
    assert!(text.contains("it is the guest itself"), "{text}");
}

fn the_door_in_a_pod(guest: &Guest, busybox: &str) {
    // The door's processes are outside the pod, and can look into a container from there.
    let pid = "busybox readlink /proc/self/ns/pid";
    let outside = says(guest, busybox, pid);
    assert_ne!(outside, guest.says("a", "readlink /proc/self/ns/pid"));
    let inside = "busybox nsenter --mount=/run/hyperinit/containers/a/mnt /bin/busybox cat /etc/hostname";
    assert_eq!(says(guest, busybox, inside), "old\n");
    // The door does not widen a container's rights.
    let status = guest.says("a", "cat /proc/self/status");
    let line = status.lines().find_map(|line| line.strip_prefix("CapBnd:\t")).unwrap();
    let bounding = CapSet(u64::from_str_radix(line, 16).unwrap());
    let granted = ContainerProfile::of(Profile::Default).unwrap().capabilities();
    assert_eq!(bounding.intersection(granted), bounding, "{line}");

    // A new execd can start both kinds of process, and a process started earlier goes on.
    if guest.kind == Kind::Local {
        let door = script(guest, busybox, "echo up; read word; echo $word", json!({}));
        door.read_until("up\n");
        replace(guest, &["execd"]);
        assert_eq!(says(guest, busybox, pid), outside);
        assert_eq!(guest.says("a", "echo a"), "a\n");
        door.streams.stdin.write(b"still here\n").unwrap();
        door.read_until("still here\n");
        assert_eq!(door.outcome().status, 0);
    }
}

/// A process started through the door ends with the guest.
fn the_end(guest: Guest, busybox: &str) {
    let polite = "trap 'echo goodbye; exit 4' TERM; echo up; while :; do busybox sleep 0.01; done";
    let polite = script(&guest, busybox, polite, json!({}));
    polite.read_until("up\n");
    let ended = guest.client().send(Command::DestroyPod);
    let outcome = polite.end();
    assert_eq!((outcome.status, outcome.stdout.as_str()), (4, "goodbye\n"));
    ended.wait(PATIENCE).unwrap();
    assert!(guest.wait_for_end().success());
}

// ---- the old style ----

fn pod(containers: Value) -> Command {
    let pod = json!({"hostname": "old", "shareDir": "share_dir", "containers": containers});
    Command::StartPod(Box::new(parse::<Pod>(pod)))
}

fn container(id: &str, stdio: u64, args: &[&str]) -> Value {
    json!({"id": id, "image": "image", "rootfs": "rootfs", "initialize": true,
        "process": {"args": args, "stdio": stdio, "stderr": stdio + 1}})
}

/// Leaves a pod with the container `a`, which runs, and `b`, which has ended.
fn old_style(guest: &Guest) {
    const FIRST: u64 = 1_000_000;
    let sleeps = ["sleep", "100000"];

    // One container cannot start, so nothing is left of the other, and the guest is as before.
    let missing = json!({"id": "b", "image": "no-such-image", "process": {"args": ["true"], "stdio": FIRST + 2, "stderr": FIRST + 3}});
    let stdout = guest.client().streams(FIRST, FIRST + 1);
    let text = guest.refused(pod(json!([container("a", FIRST, &sleeps), missing])));
    assert!(text.contains("no-such-image"), "{text}");
    assert_eq!(stdout.stdout.read_to_end(PATIENCE).unwrap(), b"");
    let finished = guest.client().finished(&guest::container_id("a"), &guest::parse(json!("init")), PATIENCE);
    assert_eq!(finished.unwrap(), 137, "it ran, so its end is told");
    let text = guest.refused(parse_exec("a", json!({"args": ["true"], "stdio": FIRST, "stderr": FIRST + 1})));
    assert!(text.contains("there is no pod"), "{text}");

    // The same stream numbers are free again.
    let said = guest.client().streams(FIRST + 2, FIRST + 3);
    let lives = container("a", FIRST, &sleeps);
    guest.call(pod(json!([lives, container("b", FIRST + 2, &["cat", "/etc/hostname"])])));
    assert_eq!(said.stdout.read_to_end(PATIENCE).unwrap(), b"old\n");
    assert_eq!(guest.says("a", "hostname"), "old\n");
    let text = guest.refused(pod(json!([])));
    assert!(text.contains("it runs already"), "{text}");
}

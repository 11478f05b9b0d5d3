//! The seats: tries from the place of every process of the guest what that process can do. The test stops the
//! real process and makes it call what it should not be able to call (seat.rs). Each row of the table is an
//! effect, each column a process.
//!
//! In a VM the answers have to equal docs/seats.md, which this test writes with `SEATS=write`. In namespaces
//! a process may be able to do less, because the machine's root may lack a right, but never more.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]
#![cfg(target_arch = "x86_64")]

mod answer;
mod effects;
#[path = "../guest/mod.rs"]
mod guest;
mod page;
mod reasons;
mod registers;
mod seat;
mod world;

use std::os::unix::fs::PermissionsExt;
use std::{env, fs};

use effects::Place;
use guest::processes::process;
use guest::{Guest, Kind, Running, scratch};
use hyperinit::embedded_policy;
use hyperinit::sandbox::{ContainerProfile, Policy};
use hyperinit::wire::Profile;
use nix::libc;
use page::{Column, Table};
use seat::Seat;
use serde_json::json;
use world::{CONTAINER_ROOT, CONTAINER_USER, OTHER_ROOT, OTHER_USER, World};

/// The guest's own processes. execd is tried last, because [`without_the_door`] takes rights from it.
const GUESTS: [&str; 7] = ["init", "warden", "netd", "mountd", "streamd", "podinit", "execd"];
/// The processes of a container.
const CONTAINERS: [&str; 2] = [CONTAINER_ROOT, CONTAINER_USER];
/// Set in the VM: the places from which this program tries the effects there.
const PLACES: &str = "SEAT_PLACES";

/// Tries every effect from the place of one process. Returns lines of the process, the row, and the answer.
fn attempt_from(world: &World, name: &str) -> Vec<String> {
    // An effect of the previous place may have ended a process; this waits for its successor.
    for name in GUESTS {
        world.pid(name);
    }
    let mut seat = Seat::take(world.pid(name));
    if name == "execd" && world.vm {
        without_the_door(&mut seat);
    }
    let mut place = Place { seat: &mut seat, world, name };
    let attempts = effects::all();
    attempts.iter().map(|effect| format!("{name}\t{}\t{}", effect.name, effect.attempt(&mut place))).collect()
}

/// In the VM the test comes in by the debugging door, for which execd holds additional rights. This drops
/// them, and execd cannot regain them.
fn without_the_door(seat: &mut Seat) {
    const VERSION_3: u64 = 0x2008_0522;
    let own = Policy::decode(embedded_policy!("execd")).unwrap().capabilities();
    let all = own.union(ContainerProfile::of(Profile::Default).unwrap().capabilities());
    let (low, high) = (all.0 & u64::from(u32::MAX), all.0 >> 32);
    seat.clear();
    let header = seat.words(&[VERSION_3]);
    // Effective, permitted, inheritable: the low halves, then the high ones.
    let sets = seat.words(&[low << 32 | low, high << 32, high]);
    assert!(seat.call(libc::SYS_capset, [header, sets]).value().is_some());
}

/// Starts the containers' processes of a guest.
fn containers(guest: &Guest) -> [Running<'_>; 4] {
    let words = |command: &'static str| command.split(' ').collect::<Vec<_>>();
    let root = guest.share.join("image/rootfs");
    fs::copy(root.join("bin/busybox"), root.join(effects::SETUID)).unwrap();
    fs::set_permissions(root.join(effects::SETUID), fs::Permissions::from_mode(0o4755)).unwrap();
    let web = json!({"user": "web"});
    [
        guest.container("main", &words(CONTAINER_ROOT), json!({})),
        guest.exec("main", &words(CONTAINER_USER), web.clone()),
        guest.container("other", &words(OTHER_ROOT), json!({})),
        guest.exec("other", &words(OTHER_USER), web),
    ]
}

/// Tries the effects from these places in a VM, where this very program runs.
fn in_a_vm(profile: &str, places: &[&'static str]) -> Vec<String> {
    let disk = scratch();
    fs::File::create(disk.join("disk")).unwrap().set_len(1 << 20).unwrap();
    let options = ["--disk", &disk.join("disk").display().to_string()];
    let guest = Guest::boot_up(Kind::Vm, &format!("hyper_debug hyper_profile={profile}"), &options);
    guest.start_pod();
    if profile == "restricted" {
        // Debian's Linux 6.1 is older than the scopes.
        guest.await_log("the kernel has no Landlock scopes (Linux 6.12)");
    }
    let _containers = containers(&guest);
    let tool = "/run/hyperinit/share/image/rootfs/bin/seat";
    fs::copy(env::current_exe().unwrap(), guest.share.join("image/rootfs/bin/seat")).unwrap();
    let words = [tool, "--exact", "in_the_guest_itself", "--nocapture", "--test-threads=1"];
    let envs = json!([{"env": PLACES, "value": places.join("\n")}]);
    let outcome = guest.exec("hyperstart", &words, json!({"envs": envs})).outcome();
    fs::remove_dir_all(disk).unwrap();
    assert_eq!(outcome.status, 0, "{}\n{}\n{}", outcome.stdout, outcome.stderr, guest.log());
    outcome.stdout.lines().filter(|line| line.contains('\t')).map(str::to_owned).collect()
}

/// Not a test of its own: the VM executes it.
#[test]
fn in_the_guest_itself() {
    let Ok(places) = env::var(PLACES) else { return };
    let world = World { init: 1, vm: true };
    for place in places.lines() {
        let lines = attempt_from(&world, place);
        // Written at once, when all processes of the guest run again.
        let text = lines.iter().map(|line| format!("{line}\n")).collect::<String>();
        std::io::Write::write_all(&mut std::io::stdout(), format!("\n{text}").as_bytes()).unwrap();
    }
}

/// Tries the effects from these places of a guest in namespaces.
fn in_namespaces(profile: &str, places: &[&'static str]) -> Vec<String> {
    let guest = Guest::boot_with(Kind::Local, &format!("hyper_profile={profile}"));
    guest.start_pod();
    let _containers = containers(&guest);
    let world = World { init: process(&guest, "init", None), vm: false };
    places.iter().flat_map(|place| attempt_from(&world, place)).collect()
}

/// Tries the effects from every place: the guest's own processes, and the containers' under each profile.
fn columns(boot: fn(&str, &[&'static str]) -> Vec<String>) -> Vec<Column> {
    let profiles = page::profiles();
    let places = |profile: &str| {
        if profile == "default" { [&GUESTS[..], &CONTAINERS].concat() } else { CONTAINERS.to_vec() }
    };
    std::thread::scope(|scope| {
        let run = |profile: &'_ str| boot(profile, &places(profile));
        let runs: Vec<_> =
            profiles.iter().map(|profile| (profile, scope.spawn(move || run(profile)))).collect();
        let mut columns = Vec::new();
        for (profile, run) in runs {
            let lines = run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            columns.extend(Column::all_of(profile, &lines));
        }
        columns
    })
}

#[test]
fn what_each_process_can_do_is_what_the_page_says() {
    let seen = Table::new(columns(in_a_vm));
    seen.is_the_page();
    seen.has_reasons();
}

#[test]
fn in_namespaces_nobody_can_do_more() {
    let table = Table::of_the_page();
    let more: Vec<String> =
        columns(in_namespaces).iter().flat_map(|column| table.more_than(column)).collect();
    assert!(more.is_empty(), "{}", more.join("\n"));
}

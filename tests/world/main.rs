//! Common programs in a Debian root. Each scenario states the output that plain Linux and a Docker container
//! give.
//!
//! A scenario is a shell script and its output. It runs in a separate guest in namespaces, and with all the
//! others in one VM for each kind of share. `scripts/world` makes the roots. `make test` runs the scenarios
//! of the root `core` in namespaces, and those of a user also under the profile `restricted`. `make world`
//! (`WORLD=all`) runs all of them, in VMs too, and each first in a plain chroot, which shows that the
//! scenario itself is right. `WORLD_ONLY=NAME,…` limits the VMs to the named scenarios.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

#[path = "../guest/mod.rs"]
mod guest;
mod root;
mod scenarios;

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use guest::{Guest, Kind, scratch};
use hyperinit::command::Command;
use hyperinit_client::Client;
use root::{Root, Set};
use serde_json::{Value, json};

/// How long a scenario may take. A VM without hardware virtualization takes minutes for what a machine does
/// in seconds, and a share by 9p is asked for each part of each path: npm looks up very many.
const PATIENCE: Duration = Duration::from_secs(3600);

/// What a program does, and its output.
struct Scenario {
    /// The name of the test, filled in by the list.
    name: &'static str,
    /// The root that it needs.
    set: Set,
    /// The user who runs it.
    user: &'static str,
    script: &'static str,
    /// The expected standard output. Standard error has to be empty, and the exit status 0.
    says: &'static str,
}

/// The place where a scenario runs: `$ON` in its script.
#[derive(Clone, Copy, PartialEq, Eq)]
enum On {
    /// In a chroot of the machine, without hyperinit.
    Plain,
    /// In a guest in namespaces.
    Local,
    /// In a VM with a share by 9p.
    P9,
    /// In a VM with a share by virtiofs.
    Virtiofs,
}

impl On {
    fn name(self) -> &'static str {
        match self {
            On::Plain => "plain",
            On::Local => "local",
            On::P9 => "9p",
            On::Virtiofs => "virtiofs",
        }
    }

    /// The directory for UNIX sockets and FIFOs, `$RUN` in the script: 9p supports neither, docs/limits.md
    /// says why.
    fn run(self) -> &'static str {
        match self {
            On::Plain | On::Local | On::Virtiofs => "/tmp",
            On::P9 => "/dev/shm",
        }
    }
}

/// The environment of a shell under Docker, with `$ON` and `$RUN`.
fn environment(on: On, user: &str) -> Vec<(&'static str, String)> {
    let home = match user {
        "root" => "/root".to_owned(),
        "postgres" => "/var/lib/postgresql".to_owned(),
        user => format!("/home/{user}"),
    };
    vec![
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
        ("HOME", home),
        ("ON", on.name().to_owned()),
        ("RUN", on.run().to_owned()),
    ]
}

/// Text in front of each script.
const PRELUDE: &str = "set -eu
cd /tmp
# Until a command succeeds: what it waits for tells nobody.
until_true() { local left=600; until \"$@\" >/dev/null 2>&1; do left=$((left - 1)); [ $left -gt 0 ] || return 1; sleep 0.1; done; }
";

fn words(scenario: &Scenario) -> [String; 3] {
    ["bash".to_owned(), "-c".to_owned(), format!("{PRELUDE}{}", scenario.script)]
}

/// Runs a scenario in a container of a guest. `more` is merged into the container's JSON.
fn run(guest: &Guest, on: On, scenario: &Scenario, more: &Value) {
    let words = words(scenario);
    let args: Vec<&str> = words.iter().map(String::as_str).collect();
    let envs: Vec<Value> = environment(on, scenario.user)
        .into_iter()
        .map(|(name, value)| json!({"env": name, "value": value}))
        .collect();
    let process = json!({"user": scenario.user, "envs": envs});
    let mut container = json!({"process": process, "initialize": true});
    container.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let outcome = guest.container(scenario.name, &args, container).outcome_within(PATIENCE);
    guest.remove(scenario.name);
    judge(scenario, i32::from(outcome.status), &outcome.stdout, &outcome.stderr);
}

fn judge(scenario: &Scenario, status: i32, stdout: &str, stderr: &str) {
    assert!(
        (status, stdout, stderr) == (0, scenario.says, ""),
        "{}: exit status {status}\n--- said\n{stdout}--- and not\n{}--- complained\n{stderr}",
        scenario.name,
        scenario.says,
    );
}

/// A guest with this root as its share, and a running pod.
fn guest(kind: Kind, root: &Root, words: &str, options: &[&str]) -> Guest {
    let words = format!("hyper_log=warn {words}");
    let guest = Guest::boot_on(kind, scratch(), root.share(), &words, options, &Client::connect);
    guest.client().ready(guest::BOOT).unwrap_or_else(|error| panic!("{error}\n{}", guest.log()));
    guest.start_pod();
    guest
}

fn end(guest: Guest) {
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

/// Runs a scenario in namespaces.
fn in_namespaces(scenario: &'static Scenario) {
    if root::all() {
        // In a separate root, so that what the scenario leaves is gone when it runs again.
        root::with(scenario.set, |root| {
            let (status, stdout, stderr) =
                root.chroot(scenario.user, &words(scenario), &environment(On::Plain, scenario.user));
            judge(scenario, status, &stdout, &stderr);
        });
    }
    root::with(scenario.set, |root| {
        let guest = guest(Kind::Local, root, "", &[]);
        run(&guest, On::Local, scenario, &json!({}));
        end(guest);
    });
}

/// Runs the scenarios in one VM, because a boot costs seconds.
fn in_a_vm(on: On, options: &[&str]) {
    root::with(root::largest(), |root| {
        let mut guest = guest(Kind::Vm, root, "", &[&["--memory", "1024", "--cpus", "2"], options].concat());
        // Each scenario has its own limit, and all together take longer than other tests.
        guest.live_on();
        let only = std::env::var("WORLD_ONLY").ok();
        let wanted = |name| only.as_ref().is_none_or(|only| only.split(',').any(|one| one == name));
        let all = ALL.iter().filter(|scenario| scenario.set <= root.set && wanted(scenario.name));
        run_all(on, all, |scenario| {
            // The scenarios share one root, and some use the same names.
            let words = ["bash", "-c", "shopt -s dotglob; rm -rf /tmp/*"];
            assert_eq!(guest.container("clean", &words, json!({})).outcome_within(PATIENCE).status, 0);
            guest.remove("clean");
            run(&guest, on, scenario, &json!({}));
        });
        end(guest);
    });
}

/// Runs scenarios in one guest, and reports all that fail.
fn run_all<'a>(on: On, all: impl Iterator<Item = &'a &'static Scenario>, run: impl Fn(&Scenario)) {
    let mut failed = Vec::new();
    for scenario in all {
        let say = |what: &str| writeln!(std::io::stdout(), "world: {} on {}{what}", scenario.name, on.name());
        let begin = Instant::now();
        let _ = say("");
        let ended = catch_unwind(AssertUnwindSafe(|| run(scenario)));
        let how = if ended.is_ok() { "passed" } else { "failed" };
        let _ = say(&format!(": {how} after {} s", begin.elapsed().as_secs()));
        if ended.is_err() {
            failed.push(scenario.name);
        }
    }
    assert!(failed.is_empty(), "on {}: {failed:?}", on.name());
}

/// Scenarios of a user that need what the profile `restricted` denies: another user's rights, and access to
/// other processes.
const NOT_RESTRICTED: [&str; 3] =
    ["everybodys_files_are_theirs", "gdb_stops_a_program", "strace_sees_the_calls"];

/// What needs no privileges also works under the profile for untrusted code, with volumes to write to.
#[test]
fn a_user_works_in_the_restricted_profile() {
    root::with(root::largest(), |root| {
        let guest = guest(Kind::Local, root, "hyper_profile=restricted", &[]);
        let all = ALL.iter().filter(|scenario| {
            scenario.set <= root.set && scenario.user != "root" && !NOT_RESTRICTED.contains(&scenario.name)
        });
        run_all(On::Local, all, |scenario| {
            let mut volumes = Vec::new();
            for at in ["/tmp", "/home/user"] {
                let source = format!("{}{at}", scenario.name);
                let directory = root.share().join(&source);
                std::fs::create_dir_all(&directory).unwrap();
                std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o1777)).unwrap();
                volumes.push(json!({"source": source, "path": at}));
            }
            run(&guest, On::Local, scenario, &json!({"fsmap": volumes}));
        });
        end(guest);
    });
}

macro_rules! list {
    ($($module:ident: $($(#[$ignored:meta])? $name:ident),+;)+) => {
        /// Every scenario.
        const ALL: &[&Scenario] = &[$($(&Scenario { name: stringify!($name), ..scenarios::$module::$name() }),+),+];

        $(mod $module {
            $(#[test]
            $(#[$ignored])?
            fn $name() {
                crate::in_namespaces(crate::named(stringify!($name)));
            })+
        })+
    };
}

scenarios::for_all!(list);

fn named(name: &str) -> &'static Scenario {
    ALL.iter().find(|scenario| scenario.name == name).unwrap()
}

#[test]
#[ignore = "takes minutes: make world"]
fn in_a_vm_by_9p() {
    in_a_vm(On::P9, &["--share-by", "9p"]);
}

#[test]
#[ignore = "takes minutes: make world"]
fn in_a_vm_by_virtiofs() {
    in_a_vm(On::Virtiofs, &["--share-by", "virtiofs"]);
}

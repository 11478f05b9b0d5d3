//! The attributes that a process has from its start and that a later call or an execve(2) does not reset.

use nix::sys::prctl;

use super::*;
use crate::guest::Kind;

/// The attributes of this process. A start gives each process the same values of the first part; the second
/// part is inherited from whoever started the guest.
fn attributes() -> (String, String) {
    let given = format!(
        "parent-death signal {:?}, keeps capabilities {}, subreaper {}, dumpable {}, no_new_privs {}",
        prctl::get_pdeathsig().unwrap(),
        prctl::get_keepcaps().unwrap(),
        prctl::get_child_subreaper().unwrap(),
        prctl::get_dumpable().unwrap(),
        prctl::get_no_new_privs().unwrap(),
    );
    let read = |file: &str| fs::read_to_string(format!("/proc/self/{file}")).unwrap().trim().to_owned();
    let stat = read("stat");
    // proc_pid_stat(5) counts from one; the name of the program ends with the parenthesis.
    let field =
        |number: usize| stat.rsplit(") ").next().unwrap().split(' ').nth(number - 3).unwrap().to_owned();
    let status = read("status");
    let line = |key: &str| status.lines().find(|line| line.starts_with(key)).unwrap_or_default().to_owned();
    let inherited = format!(
        "nice {}, real-time priority {}, policy {}, personality {}, core dump filter {}, timer slack {} ns, {}",
        field(19),
        field(40),
        field(41),
        read("personality"),
        read("coredump_filter"),
        prctl::get_timerslack().unwrap(),
        line("THP_enabled"),
    );
    (given, inherited)
}

/// The container's first process and a process that joins the container have what Docker's have too.
/// tests/scenarios/exec.rs has a test of their session, signals, limits, descriptors and capabilities.
#[test]
fn a_started_process_has_the_attributes_of_a_new_one() {
    if told("attributes").is_some() {
        let (given, inherited) = attributes();
        say(&format!("given {given}"));
        say(&format!("inherited {inherited}"));
        return;
    }
    let guest = Guest::boot(Kind::Local);
    guest.start_pod();
    let root = guest.share.join("image/rootfs");
    arm(&root);
    let test = "attributes::a_started_process_has_the_attributes_of_a_new_one";
    let args = ["/bin/escape", "--exact", test, "--nocapture", "--test-threads=1"];
    let envs = json!([{"env": ATTACK, "value": "attributes all"}]);
    let first = guest.container("first", &args, json!({"process": {"envs": envs}})).outcome();
    let main = guest.sleeper("main");
    let joined = attack(&guest, "main", test, "attributes", "all").outcome();
    let (_, inherited) = attributes();
    for outcome in [first, joined] {
        assert_eq!(
            said(&outcome.stdout, "given"),
            "parent-death signal None, keeps capabilities false, subreaper false, dumpable true, no_new_privs false",
            "{}",
            outcome.stderr
        );
        assert_eq!(said(&outcome.stdout, "inherited"), inherited);
    }
    guest.finish(main);
}

//! Real processes under every policy: what is forbidden ends them with the call's name, what is denied fails,
//! a panic is reported, and they have what is declared and no more. Needs root; changes nothing outside its
//! own children.
//!
//! The program executes itself again for each process: with [`ACT`] in its environment it is the confined
//! one. So it has no test harness, for that has threads, and what enters a policy has one.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

#[path = "../policy/files.rs"]
mod files;
#[path = "../policy/machine.rs"]
#[allow(dead_code)]
mod machine;
#[path = "../policy/meaning.rs"]
#[allow(dead_code)]
mod meaning;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::num::NonZeroUsize;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, Output, Stdio};

use hyperinit::embedded_policy;
use hyperinit::logger;
use hyperinit::sandbox::{CapSet, ContainerProfile, Policy};
use hyperinit::wire::Profile;
use hyperinit_policy::{compiled, format, names, policy, table};
use log::LevelFilter;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::kmod::init_module;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::inotify::{InitFlags, Inotify};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::kill;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};
use nix::unistd::{Pid, chroot, execve, pipe, sethostname, setresuid};

use files::{policies, sources};
use machine::Verdict;
use meaning::Meaning;
use policy::Syscalls;

/// `POLICY ACT`: what the process is to be, and to do then.
const ACT: &str = "POLICY_TEST_ACT";
/// As a shell says it of SIGSYS.
const DIED: i32 = 128 + libc::SIGSYS;

/// A system call, by a safe function of nix, that does nothing to the machine even where it is allowed.
struct Sample {
    call: &'static str,
    arguments: [u64; 6],
    make: fn() -> Result<(), Errno>,
}

/// Calls that most processes have no business with.
fn samples() -> Vec<Sample> {
    let sample = |call, make| Sample { call, arguments: [0; 6], make };
    vec![
        sample("chroot", || chroot("/nonexistent")),
        sample("execve", || execve(c"/nonexistent", &[c""], &[c""]).map(drop)),
        Sample {
            call: "fcntl",
            arguments: [0, libc::F_GET_SEALS as u64, 0, 0, 0, 0],
            make: || fcntl(std::io::stdin(), FcntlArg::F_GET_SEALS).map(drop),
        },
        sample("inotify_init1", || Inotify::init(InitFlags::empty()).map(drop)),
        Sample { call: "kill", arguments: [1, 0, 0, 0, 0, 0], make: || kill(Pid::from_raw(1), None) },
        sample("memfd_create", || memfd_create(c"", MFdFlags::empty()).map(drop)),
        sample("mount", || mount(None::<&str>, "/nonexistent", None::<&str>, MsFlags::empty(), None::<&str>)),
        sample("openat", || {
            File::open("/").map(drop).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap()))
        }),
        sample("pipe2", || pipe().map(drop)),
        Sample {
            call: "prctl",
            arguments: [libc::PR_GET_DUMPABLE as u64, 0, 0, 0, 0, 0],
            make: || nix::sys::prctl::get_dumpable().map(drop),
        },
        sample("setresuid", || setresuid(0.into(), 0.into(), 0.into())),
        sample("setns", || setns(std::io::stdin(), CloneFlags::CLONE_NEWNS)),
        sample("socket", || socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).map(drop)),
        sample("umount2", || umount2("/nonexistent", MntFlags::empty())),
        Sample {
            call: "unshare",
            arguments: [libc::CLONE_NEWUTS as u64, 0, 0, 0, 0, 0],
            make: || unshare(CloneFlags::CLONE_NEWUTS),
        },
    ]
}

/// Calls that fail with EPERM by a filter, and by another error (or not at all) without one.
fn denials() -> BTreeMap<&'static str, fn() -> Result<(), Errno>> {
    let denials: [(_, fn() -> Result<(), Errno>); 8] = [
        ("clock_settime", || clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(-1, 0))),
        ("init_module", || init_module(&[], c"")),
        ("mount", || mount(None::<&str>, "/nonexistent", None::<&str>, MsFlags::empty(), None::<&str>)),
        ("sethostname", || sethostname("x".repeat(100))),
        ("setns", || setns(std::io::stdin(), CloneFlags::CLONE_NEWNS)),
        ("socket", || socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None).map(drop)),
        ("umount2", || umount2("/nonexistent", MntFlags::empty())),
        ("unshare", || unshare(CloneFlags::CLONE_NEWUTS)),
    ];
    BTreeMap::from(denials)
}

/// The policies that trap.
const TRAPPING: [&str; 5] = ["init", "mountd", "netd", "podinit", "streamd"];
/// The others, and what of [`denials`] each denies.
const DENYING: [(&str, &[&str]); 5] = [
    (
        "container/default",
        &["clock_settime", "init_module", "mount", "sethostname", "setns", "socket", "umount2", "unshare"],
    ),
    ("container/privileged", &["clock_settime", "init_module", "socket"]),
    (
        "container/restricted",
        &["clock_settime", "init_module", "mount", "sethostname", "setns", "socket", "umount2", "unshare"],
    ),
    ("execd", &["clock_settime", "init_module", "socket"]),
    // mountd is below the warden, and sets the clock.
    ("warden", &["init_module", "socket"]),
];

/// What the process of a policy passes on to what it executes.
fn grants(policy: &str) -> CapSet {
    match policy {
        "execd" => ContainerProfile::of(Profile::Default).unwrap().capabilities(),
        "warden" => Policy::decode(embedded_policy!("warden")).unwrap().capabilities(),
        _ => CapSet::default(),
    }
}

/// Becomes what a policy says, as the process does that it is for.
fn enter(policy: &'static str) {
    logger::start(policy, LevelFilter::Warn, false);
    let confine = |bytes: &[u8]| Policy::decode(bytes).unwrap().confine(grants(policy)).unwrap();
    match policy {
        "init" => {
            let policy = Policy::decode(embedded_policy!("init")).unwrap();
            policy.confine_init().unwrap();
            policy.load_filter().unwrap();
        }
        "execd" => confine(embedded_policy!("execd")),
        "mountd" => confine(embedded_policy!("mountd")),
        "netd" => confine(embedded_policy!("netd")),
        "podinit" => confine(embedded_policy!("podinit")),
        "streamd" => confine(embedded_policy!("streamd")),
        "warden" => confine(embedded_policy!("warden")),
        "container/default" => ContainerProfile::of(Profile::Default).unwrap().load_filter().unwrap(),
        "container/privileged" => ContainerProfile::of(Profile::Privileged).unwrap().load_filter().unwrap(),
        "container/restricted" => ContainerProfile::of(Profile::Restricted).unwrap().load_filter().unwrap(),
        other => panic!("no such policy: {other}"),
    }
}

/// In the confined process: does what it is told, and leaves.
fn act(text: &str) -> ! {
    let (policy, act) = text.split_once(' ').unwrap();
    let policy =
        TRAPPING.into_iter().chain(DENYING.map(|(name, _)| name)).find(|&name| name == policy).unwrap();
    let samples = samples();
    let denials = denials();
    // A process that turns in circles is ended.
    setrlimit(Resource::RLIMIT_CPU, 10, 10).unwrap();
    enter(policy);
    let code = match act.split_once(' ').unwrap_or((act, "")) {
        ("call", call) => {
            let sample = samples.iter().find(|sample| sample.call == call).unwrap();
            say(&format!("{call}: {:?}", (sample.make)()));
            0
        }
        ("deny", call) => {
            say(&format!("{call}: {:?}", denials[call]()));
            0
        }
        ("panic", _) => {
            let panicked = std::panic::catch_unwind(|| panic!("on purpose"));
            if panicked.is_err() { 101 } else { 0 }
        }
        ("exhaust", _) => {
            let size = NonZeroUsize::new(isize::MAX as usize).unwrap().get();
            say(&format!("{}", Vec::<u8>::with_capacity(size).capacity()));
            0
        }
        ("thread", _) => {
            let thread = std::thread::Builder::new().spawn(|| 7);
            thread.ok().and_then(|thread| thread.join().ok()).map_or(1, |value| i32::from(value != 7))
        }
        ("stay", _) => {
            say("ready");
            if policy == "podinit" {
                let _ = nix::sys::signal::SigSet::from(nix::sys::signal::Signal::SIGCHLD).wait();
            }
            let _ = std::io::stdin().read_line(&mut String::new());
            0
        }
        other => panic!("no such act: {other:?}"),
    };
    // Without the exit handlers, which the pod init does not run either.
    hyperinit::sys::process::exit(code)
}

/// On standard output.
fn say(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
    let _ = std::io::stdout().flush();
}

/// Starts a confined process.
fn start(policy: &str, act: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .env(ACT, format!("{policy} {act}"))
        .env_remove("RUST_BACKTRACE")
        .env_remove("RUST_LIB_BACKTRACE")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn run(policy: &str, act: &str) -> Output {
    start(policy, act).wait_with_output().unwrap()
}

/// What the process said, and what it wrote on standard error.
fn said(output: &Output) -> (Vec<String>, Vec<String>) {
    let lines =
        |bytes: &[u8]| -> Vec<String> { String::from_utf8_lossy(bytes).lines().map(str::to_owned).collect() };
    (lines(&output.stdout), lines(&output.stderr))
}

/// The number of a system call of this machine.
fn number(call: &str) -> u32 {
    files::table(std::env::consts::ARCH).number(call).unwrap()
}

fn what_is_forbidden_ends_the_process_and_is_named() {
    let sources = sources();
    for policy in TRAPPING.into_iter().filter(|&policy| policy != "init") {
        let meaning = Meaning::of(policy, &sources);
        let forbidden =
            samples().into_iter().filter(|it| meaning.verdict(Some(it.call), &it.arguments) == Verdict::Trap);
        let mut died = 0;
        for Sample { call, .. } in forbidden {
            let output = run(policy, &format!("call {call}"));
            let (said, errors) = said(&output);
            assert_eq!(output.status.code(), Some(DIED), "{policy} {call}: {said:?} {errors:?}");
            let line =
                format!("{policy}: seccomp: the system call {call} ({}) is not allowed: ", number(call));
            assert_eq!((errors.len(), said.len()), (1, 0), "{policy} {call}: {said:?} {errors:?}");
            assert!(errors[0].starts_with(&line), "{errors:?}");
            died += 1;
        }
        assert!(died >= 7, "{policy}: {died} samples");
    }
}

fn what_is_forbidden_to_init_fails_and_is_named() {
    let meaning = Meaning::of("init", &sources());
    let mut failed = 0;
    for Sample { call, arguments, .. } in samples() {
        if meaning.verdict(Some(call), &arguments) != Verdict::Trap {
            continue;
        }
        let output = run("init", &format!("call {call}"));
        let (said, errors) = said(&output);
        assert_eq!(output.status.code(), Some(0), "{call}: {said:?} {errors:?}");
        assert_eq!(said, [format!("{call}: Err(EPERM)")], "{errors:?}");
        let line = format!("init: seccomp: the system call {call} ({}) is not allowed: ", number(call));
        assert!(errors.len() == 1 && errors[0].starts_with(&line), "{errors:?}");
        failed += 1;
    }
    assert!(failed >= 10, "{failed} samples");
}

fn a_violation_names_its_arguments() {
    let output = run("streamd", "call fcntl");
    let (_, errors) = said(&output);
    let line = format!("is not allowed: 0x0 {:#x} 0x", libc::F_GET_SEALS);
    assert!(errors.len() == 1 && errors[0].contains(&line), "{errors:?}");
}

fn what_is_denied_fails_and_the_process_goes_on() {
    for (policy, denied) in DENYING {
        for call in denials().keys() {
            let output = run(policy, &format!("deny {call}"));
            let (said, errors) = said(&output);
            let text = format!("{policy} {call}: {said:?} {errors:?}");
            let answer = said.first().unwrap_or_else(|| panic!("{text}"));
            let expected = answer.ends_with("Err(EPERM)") == denied.contains(call);
            assert!(expected && errors.is_empty() && output.status.code() == Some(0), "{text}");
        }
    }
}

fn a_panic_is_reported_under_every_filter() {
    for policy in TRAPPING.into_iter().chain(DENYING.map(|(name, _)| name)) {
        let output = run(policy, "panic");
        let (_, errors) = said(&output);
        // The pod init has not even the lock that unwinding takes.
        let (code, lines) = if policy == "podinit" { (DIED, 2) } else { (101, 1) };
        assert_eq!((output.status.code(), errors.len()), (Some(code), lines), "{policy}: {errors:?}");
        let line = &errors[0];
        assert!(
            line.starts_with(&format!("{policy}: panicked at ")) && line.ends_with("on purpose"),
            "{line}"
        );
    }
}

fn an_allocation_that_fails_is_reported() {
    for policy in ["init", "mountd", "netd", "streamd", "execd"] {
        let output = run(policy, "exhaust");
        let (_, errors) = said(&output);
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{policy}: {errors:?}");
        let line = format!("memory allocation of {} bytes failed", isize::MAX);
        assert_eq!(errors.first(), Some(&line), "{policy}: {errors:?}");
    }
}

fn threads_start_where_the_policy_has_them() {
    for (policy, threads) in [
        ("warden", true),
        ("container/default", true),
        ("container/privileged", true),
        ("container/restricted", true),
        ("mountd", false),
        ("netd", false),
        ("podinit", false),
        ("streamd", false),
    ] {
        let output = run(policy, "thread");
        let (_, errors) = said(&output);
        let expected = if threads { 0 } else { DIED };
        assert_eq!(output.status.code(), Some(expected), "{policy}: {errors:?}");
    }
}

/// A field of /proc/PID/status, the words after its name.
fn field<'a>(status: &'a str, name: &str) -> Vec<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {status}")).split_whitespace().collect()
}

fn a_process_has_what_is_declared_and_no_more() {
    let sources = sources();
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    // A machine may give its root less than everything; a policy cannot give what is not there.
    let had = u64::from_str_radix(field(&own, "CapPrm")[0], 16).unwrap();
    assert!(had.count_ones() > 30, "needs root's capabilities, has {had:#x}");
    for (policy, compiled) in policies(std::env::consts::ARCH) {
        if policy.starts_with("container/") {
            continue;
        }
        let mut child = start(&policy, "stay");
        let ready = BufReader::new(child.stdout.take().unwrap())
            .lines()
            .any(|line| line.is_ok_and(|line| line == "ready"));
        assert!(ready, "{policy}: {:?}", child.wait_with_output());
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        let mounts = std::fs::read_to_string(format!("/proc/{}/mountinfo", child.id())).unwrap();
        let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();

        let meaning = Meaning::of(&policy, &sources);
        let caps = |name| u64::from_str_radix(field(&status, name)[0], 16).unwrap();
        let declared = compiled.capabilities.0 | grants(&policy).0;
        assert_eq!(caps("CapEff"), declared & had, "{policy}");
        assert_eq!(caps("CapPrm"), declared & had, "{policy}");
        assert_eq!(caps("CapBnd"), grants(&policy).0 & had, "{policy}");
        assert_eq!((caps("CapInh"), caps("CapAmb")), (0, 0), "{policy}");
        assert_eq!(field(&status, "Seccomp"), ["2"], "{policy}");
        assert_eq!(mounts.lines().count() == 1, compiled.empty_root, "{policy}: {mounts}");
        assert_eq!(field(&status, "NoNewPrivs"), [u8::from(meaning.no_new_privs).to_string()], "{policy}");
        let (uid, gid) = (meaning.user.0.to_string(), meaning.user.1.to_string());
        // The fourth is whose files it opens and makes.
        for (key, own) in [("Uid", uid.as_str()), ("Gid", gid.as_str())] {
            let files = if meaning.root_files { "0" } else { own };
            assert_eq!(field(&status, key), [own, own, own, files], "{policy}");
        }
        let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
        assert_eq!(core.split_whitespace().nth(4), Some("0"), "{policy}: {core}");
    }
}

/// The tests, by name.
const TESTS: [(&str, fn()); 8] = [
    ("what_is_forbidden_ends_the_process_and_is_named", what_is_forbidden_ends_the_process_and_is_named),
    ("what_is_forbidden_to_init_fails_and_is_named", what_is_forbidden_to_init_fails_and_is_named),
    ("a_violation_names_its_arguments", a_violation_names_its_arguments),
    ("what_is_denied_fails_and_the_process_goes_on", what_is_denied_fails_and_the_process_goes_on),
    ("a_panic_is_reported_under_every_filter", a_panic_is_reported_under_every_filter),
    ("an_allocation_that_fails_is_reported", an_allocation_that_fails_is_reported),
    ("threads_start_where_the_policy_has_them", threads_start_where_the_policy_has_them),
    ("a_process_has_what_is_declared_and_no_more", a_process_has_what_is_declared_and_no_more),
];

fn main() -> ExitCode {
    if let Ok(text) = std::env::var(ACT) {
        act(&text);
    }
    let wanted: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    if !nix::unistd::geteuid().is_root() {
        say("needs root: sudo -E cargo test --test confined");
        return ExitCode::FAILURE;
    }
    let mut failed = 0;
    for (name, test) in TESTS {
        if wanted.is_empty() || wanted.iter().any(|part| name.contains(part.as_str())) {
            let passed = std::panic::catch_unwind(test).is_ok();
            say(&format!("test {name} ... {}", if passed { "ok" } else { "FAILED" }));
            failed += usize::from(!passed);
        }
    }
    say(&format!("{failed} failed"));
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

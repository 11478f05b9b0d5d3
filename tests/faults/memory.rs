//! No memory: a limit of address space under each process of the guest while it runs, and in a VM a container
//! that takes all that the kernel promises (vm.overcommit_memory=2), or a cgroup with the guest's own
//! processes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Instant;

use hyperinit::command::{Command, KillContainer};
use hyperinit::ids::Signal;
use serde_json::json;

use super::guest::image::with_busybox;
use super::guest::processes::process;
use super::guest::{Guest, Kind, PATIENCE, Running, container_id, scratch};
use super::limits::Limited;
use super::witness::Witness;
use super::{SIZE, answers, data_file, everything, probe, replied, write};

/// Every kind of command, each of which has a reply; some need more than the C library has at hand, in many
/// small pieces and in shared memory. The refusals.
fn anything(guest: &Guest, mark: &str) -> Vec<String> {
    let mut refusals = Vec::new();
    // An emulated machine takes its time.
    let (words, bytes) = if guest.kind == Kind::Local { (60_000, 10 << 20) } else { (20_000, 1 << 20) };
    let large: Vec<_> = (0..words).map(|number| format!("{number}")).collect();
    let mut args = vec!["true"];
    args.extend(large.iter().map(String::as_str));
    for args in [&args[..], &["true"]] {
        match guest.try_exec("main", args, json!({})).map(Running::end) {
            Ok(_) => {}
            Err(error) => refusals.extend(replied(mark, Err(error)).err()),
        }
    }
    let commands = [
        Command::GetVersion,
        Command::Ping,
        write(100),
        write(SIZE),
        write(bytes),
        Command::ReadFile(data_file()),
        Command::OnlineCpuMem,
    ];
    for command in commands {
        refusals.extend(replied(mark, guest.client().send(command).wait(PATIENCE)).err());
    }
    refusals
}

#[test]
fn pid_1_without_address_space_goes_on() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    assert!(anything(&guest, "before").is_empty());
    // So many words leave holes in its heap, which are for the next as many: those must not make it grow.
    for wave in 0..6 {
        witness.settle();
        let limited = Limited::address_space(witness.init);
        for round in 0..5 {
            let refusals = anything(&guest, &format!("wave {wave}, round {round}"));
            assert!(refusals.iter().any(|text| text.contains("init: ")), "{refusals:?}");
        }
        assert_eq!(guest.container_says("other", "echo other", json!({})), "other\n");
        // Nothing is to be had, and everything is here that it may hold.
        let pending: Vec<_> = (0..250).map(|_| guest.client().send(write(4000))).collect();
        for pending in pending {
            replied("at once", pending.wait(PATIENCE)).unwrap();
        }
        let running: Vec<_> =
            (0..50).map(|_| guest.exec("main", &["sh", "-c", "read word"], json!({}))).collect();
        drop(limited);
        assert!(everything(&guest, "afterwards").is_empty());
        assert!(anything(&guest, "afterwards").is_empty());
        running.into_iter().for_each(|running| assert_eq!(running.outcome().status, 1));
        if wave > 0 && !witness.has_grown() {
            break;
        }
    }
    witness.checks("no address space", true);
    witness.ends();
}

#[test]
fn a_helper_without_address_space_says_so_or_has_a_successor() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    for name in ["netd", "mountd", "execd", "streamd"] {
        answers(&guest, name);
        assert!(anything(&guest, "before").is_empty());
        let mut witness = Witness::new(&guest);
        let streamd = process(&guest, "streamd", None);
        // So many words leave holes in PID 1's heap, which are for the next as many: how many get so far is
        // chance, but it does not grow by each wave.
        for wave in 0..6 {
            witness.settle();
            let limited = Limited::address_space(process(&guest, name, None));
            for round in 0..3 {
                let mark = format!("{name}, wave {wave}, round {round}");
                anything(&guest, &mark);
                everything(&guest, &mark);
            }
            drop(limited);
            for helper in ["netd", "mountd", "execd"] {
                answers(&guest, helper);
            }
            assert!(everything(&guest, name).is_empty(), "{name}");
            if wave > 0 && !witness.has_grown() {
                break;
            }
        }
        witness.checks(name, process(&guest, "streamd", None) == streamd);
    }
    assert!(!guest.log().contains("died too often"), "{}", guest.log());
}

/// x86_64's numbers.
const MMAP: u64 = 9;
const POLL: u64 = 7;

/// A program that maps private memory without end, in ever smaller pieces, and touches none of it: (address,
/// length, PROT_READ and PROT_WRITE, MAP_PRIVATE and MAP_ANONYMOUS). In between it waits for a millisecond,
/// for others have work to do too.
fn hog(guest: &Guest) {
    let map = |length: u64| (MMAP, [0, length, 3, 0x22, u64::MAX, 0]);
    let path = guest.share.join("image/rootfs/bin/hog");
    let mut calls = vec![map(4 << 20), map(1 << 20), map(1 << 16)];
    calls.extend([map(1 << 12); 16]);
    calls.push((POLL, [0, 0, 1, 0, 0, 0]));
    fs::write(&path, probe::elf_forever(&calls)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Waits until nothing is refused any more.
fn recovers(guest: &Guest, mark: &str) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let refusals = anything(guest, mark);
        if refusals.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "{mark}: {refusals:?}\n{}", guest.log());
    }
}

/// Nothing that the kernel promises is left: what a container has mapped counts, whether it is used or not.
#[test]
fn a_container_that_has_all_memory_promised_costs_errors() {
    let guest = Guest::boot_up(Kind::Vm, "hyper_profile=privileged", &["--memory", "256"]);
    hog(&guest);
    guest.start_pod();
    let main = guest.sleeper("main");
    let strict = json!({"sysctl": {"vm.overcommit_memory": "2"}});
    assert_eq!(guest.container_says("strict", "cat /proc/sys/vm/overcommit_memory", strict), "2\n");
    assert!(anything(&guest, "before").is_empty());
    for round in 0..2 {
        let greedy = guest.container("greedy", &["hog"], json!({}));
        let deadline = Instant::now() + PATIENCE;
        let want = ["Cannot allocate memory", "No space left on device"];
        let mut refusals = Vec::<String>::new();
        while !want.iter().any(|want| refusals.iter().any(|text| text.contains(want))) {
            assert!(Instant::now() < deadline, "it has not everything: {refusals:?}\n{}", guest.log());
            refusals = anything(&guest, "with a hog");
        }
        for _ in 0..3 {
            assert!(!anything(&guest, "with a hog").is_empty());
        }
        let kill = KillContainer { container: container_id("greedy"), signal: Signal::KILL };
        guest.call(Command::KillContainer(kill));
        assert_eq!(greedy.end().status, 137);
        guest.remove("greedy");
        recovers(&guest, &format!("after hog {round}"));
        assert_eq!(guest.container_says("other", "echo other", json!({})), "other\n");
    }
    guest.finish(main);
    assert!(!guest.log().contains(" is gone ("), "a helper has died\n{}", guest.log());
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

/// The guest's own processes in a cgroup that may have no more than it has, for a while: who may do that
/// (CAP_SYS_ADMIN) may do worse, but this passes.
#[test]
fn a_guest_without_memory_of_its_own_goes_on_when_it_has_some() {
    // The kernel tells at each want who was there, and a serial line is slow.
    let append = "sysctl.vm.oom_dump_tasks=0 hyper_debug rcupdate.rcu_expedited=1";
    let directory = scratch();
    let image = with_busybox(&directory);
    let guest = Guest::boot_up(Kind::Vm, append, &["--memory", "256", "--initrd", image.to_str().unwrap()]);
    guest.start_pod();
    let main = guest.sleeper("main");
    let door = |script: &str| {
        let script = format!("PATH=/bin; cd /sys/fs/cgroup; {script}");
        guest.exec("hyperstart", &["/bin/busybox", "sh", "-c", &script], json!({}))
    };
    assert_eq!(
        door("busybox cat /sys/kernel/rcu_expedited").outcome().stdout,
        "1\n",
        "what the host has said"
    );
    // Kernel threads have no program.
    let moved = door(
        "busybox mkdir own; for p in $(busybox cat cgroup.procs); do
        [ $p = $$ ] || ! busybox readlink /proc/$p/exe >/dev/null || echo $p >own/cgroup.procs; done
        busybox cat own/cgroup.procs | busybox wc -l",
    )
    .outcome();
    assert_eq!(moved.stdout, "7\n", "init, the warden, four helpers and the pod init: {moved:?}");
    assert!(anything(&guest, "before").is_empty());
    // The shell is born where execd is. Then it needs nothing of the guest's, and says afterwards what it has
    // seen.
    let limited = door(
        "echo $$ >cgroup.procs; busybox cat own/memory.current >own/memory.max; busybox sleep 4; busybox cat own/memory.max
        echo max >own/memory.max; busybox grep '^max ' own/memory.events",
    );
    let mut refusals = Vec::new();
    for round in 0..3 {
        refusals.extend(anything(&guest, &format!("round {round}")));
    }
    let outcome = limited.outcome();
    recovers(&guest, "afterwards");
    let (limit, reached) = outcome.stdout.split_once("\nmax ").unwrap();
    assert!(limit.parse::<u64>().is_ok() && reached.trim() != "0", "{outcome:?}, {refusals:?}");
    assert_eq!(guest.container_says("other", "echo other", json!({})), "other\n");
    guest.finish(main);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
    fs::remove_dir_all(directory).unwrap();
}

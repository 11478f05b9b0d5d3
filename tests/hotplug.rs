//! Hardware that is plugged while the guest runs, and a guest that was paused.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod guest;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use guest::qmp::Qmp;
use guest::{Guest, Kind, PATIENCE};
use hyperinit::command::Command;
use serde_json::json;

/// How long the VM is paused: several times the error of an RTC that counts whole seconds.
const SLEEP: Duration = Duration::from_secs(5);

/// The processors and the memory (kB) that a container sees.
fn machine(guest: &Guest) -> (u64, u64) {
    let outcome = guest.sh("c", "nproc; sed -n 's/^MemTotal: *//p' /proc/meminfo");
    let numbers: Vec<u64> =
        outcome.stdout.lines().map(|line| line.split(' ').next().unwrap().parse().unwrap()).collect();
    (numbers[0], numbers[1])
}

#[test]
fn processors_and_memory_are_plugged() {
    // Without memhp_default_state=offline, below, some kernels bring memory online by themselves.
    let qemu = "-smp 1,maxcpus=2 -m 512,slots=2,maxmem=1G";
    // Privileged, so that the container can read the pod's limits.
    let append = "memhp_default_state=offline hyper_profile=privileged";
    let guest = Guest::boot_up(Kind::Vm, append, &["--qemu", qemu]);
    guest.start_pod();
    let sleeper = guest.sleeper("c");
    guest.says("c", "mkdir /cg; mount -t cgroup2 cgroup2 /cg");
    let limit = || guest.says("c", "cat /cg/pod/memory.max").trim().parse::<u64>().unwrap();
    let limited = limit();
    let (processors, memory) = machine(&guest);
    assert_eq!(processors, 1);
    // ONLINECPUMEM with nothing plugged is no error.
    guest.call(Command::OnlineCpuMem);

    let mut qmp = Qmp::connect(&guest.at());
    let slots = qmp.run("query-hotpluggable-cpus", json!({}));
    let slot = slots.as_array().unwrap().iter().find(|slot| slot.get("qom-path").is_none()).unwrap();
    let mut processor = slot["props"].clone();
    processor["driver"] = slot["type"].clone();
    processor["id"] = json!("plugged-cpu");
    qmp.run("device_add", processor);
    let ram = json!({"qom-type": "memory-backend-ram", "id": "ram", "size": 256 << 20});
    qmp.run("object-add", ram);
    qmp.run("device_add", json!({"driver": "pc-dimm", "id": "plugged-ram", "memdev": "ram"}));
    // Rescan (READY from the host) is for devices on the PCI bus, ONLINECPUMEM for processors and memory.
    guest.call(Command::Rescan);
    guest.call(Command::OnlineCpuMem);

    let deadline = Instant::now() + PATIENCE;
    loop {
        let (processors, now) = machine(&guest);
        // The kernel keeps a few percent of new memory for itself.
        if processors == 2 && now >= memory + (240 << 10) && limit() >= limited + (240 << 20) {
            break;
        }
        assert!(Instant::now() < deadline, "{processors} processors, {now} kB\n{}", guest.log());
    }
    guest.finish(sleeper);
}

#[test]
fn a_guest_that_slept_wakes_up_at_its_pods_start() {
    let guest = Guest::boot(Kind::Vm);
    let mut qmp = Qmp::connect(&guest.at());
    qmp.run("stop", json!({}));
    std::thread::sleep(SLEEP);
    qmp.run("cont", json!({}));
    guest.start_pod();
    let sleeper = guest.sleeper("c");
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let said: u64 = guest.sh("c", "date +%s").stdout.trim().parse().unwrap();
    let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    assert!((before - 2..=after + 2).contains(&said), "it is {before} to {after}, and the guest says {said}");
    // This line shows the renewal that keeps two copies of a guest apart. virtio-rng delivers the host's
    // randomness.
    guest.wait_for_log(0, "the random pool is renewed with the host's randomness");
    guest.wait_for_log(0, "the clock said ");
    guest.finish(sleeper);
}

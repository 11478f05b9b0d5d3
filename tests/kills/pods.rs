//! Pods that start and end while helpers die.

use std::time::{Duration, Instant};

use hyperinit::command::Command;
use serde_json::json;

use super::driver::FEW;
use super::guest::processes::{kill_hard, process};
use super::guest::{Guest, Kind, PATIENCE, parse};
use super::killer::{SIGNALS, helper, kill_and_wait};
use super::random::Random;
use super::work::explained;

/// One of the helpers at a random moment of so many microseconds; none if it is not up then.
fn kill_one(guest: &Guest, random: &mut Random, within: u64) {
    std::thread::sleep(Duration::from_micros(random.below(within)));
    let role = random.one_of(&super::killer::ROLES);
    if let Some(pid) = helper(guest, role) {
        kill_and_wait(pid, random.one_of(&SIGNALS));
    }
}

/// Everything works, and every helper has answered something. Of so many deaths init may not have heard yet.
fn works(guest: &Guest, mut deaths: u64) {
    let outcome = loop {
        match guest.try_container("works", &["hostname"], json!({})) {
            Ok(running) => break running.outcome(),
            Err(error) => {
                explained(&error);
                assert!(deaths > 0, "{error}\n{}", guest.log());
                deaths -= 1;
            }
        }
    };
    assert_eq!((outcome.status, outcome.stdout.as_str()), (0, "pod-1\n"));
    guest.remove("works");
}

/// STARTPOD is an ACK, or an ERROR after which it can be asked again as if nothing had been.
pub fn starts_or_does_not(mut random: Random, rounds: u64) {
    let mut guest = Guest::boot(Kind::Local);
    if rounds > FEW {
        guest.live_on();
    }
    let lists = json!({"internalNetworks": ["10.1.0.0/16"], "externalNetworks": ["10.2.0.0/16"]});
    let pod = json!({"hostname": "pod-1", "shareDir": "share_dir", "dns": ["192.0.2.1"], "portmappingWhiteLists": lists});
    let start = || guest.client().send(Command::StartPod(Box::new(parse(pod.clone()))));
    // Of deaths in the round before init may not have heard yet: nothing in it asks netd once the pod is
    // there.
    let mut unheard = 0;
    for _ in 0..rounds {
        let mut pending = start();
        let new = random.below(3);
        for _ in 0..new {
            kill_one(&guest, &mut random, 10_000);
        }
        let deaths = unheard + new;
        unheard = new;
        // Each death explains one ERROR.
        let mut errors = 0;
        while let Err(error) = pending.wait(PATIENCE) {
            explained(&error);
            errors += 1;
            assert!(errors <= deaths, "{error}\n{}", guest.log());
            pending = start();
        }
        works(&guest, deaths - errors);
        let init = process(&guest, "podinit", None);
        kill_hard(init);
        // Once it has been reaped, the next STARTPOD waits until the pod has ended.
        let deadline = Instant::now() + PATIENCE;
        while std::path::Path::new(&format!("/proc/{init}")).exists() {
            assert!(Instant::now() < deadline, "{}", guest.log());
            std::thread::yield_now();
        }
    }
    assert!(!guest.log().contains("died too often"), "{}", guest.log());
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

/// DESTROYPOD asks everybody to end, reports each end and all output, and is ACKed.
pub fn ends_in_order(mut random: Random) {
    let guest = Guest::with_pod(Kind::Local);
    let script = "trap 'echo goodbye; exit 7' TERM; echo up; while :; do sleep 0.01; done";
    let polite: Vec<_> = (0..4)
        .map(|number| {
            let running = guest.container(&format!("polite-{number}"), &["sh", "-c", script], json!({}));
            running.read_until("up\n");
            running
        })
        .collect();
    let sleeper = guest.sleeper("sleeper");
    let exec = guest.exec("sleeper", &["sleep", "100000"], json!({}));
    let pending = guest.client().send(Command::DestroyPod);
    let start = Instant::now();
    for _ in 0..3 {
        kill_one(&guest, &mut random, 30_000);
    }
    for running in polite {
        let outcome = running.end();
        assert_eq!((outcome.stdout.as_str(), outcome.status), ("goodbye\n", 7));
    }
    // Its container's init may be gone first.
    assert!([143, 137].contains(&exec.end().status));
    assert_eq!(sleeper.end().status, 143);
    let reply = pending.wait(PATIENCE);
    assert_eq!(reply, Ok(Vec::new()), "after {:?}\n{}", start.elapsed(), guest.log());
    assert!(guest.wait_for_end().success());
}

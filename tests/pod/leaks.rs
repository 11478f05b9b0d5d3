//! Checks that five hundred processes and fifty containers leave nothing behind.

use std::collections::BTreeMap;
use std::fs;

use hyperinit::command::{Command, File, WriteFile};
use serde_json::json;

use crate::guest::processes::{NAMES, children, process, status, wait_for_rest};
use crate::guest::{Guest, Kind, PATIENCE, container_id, kill, refusal};

/// How much a process's memory may grow without a leak, in kB: allocator buffers come and go.
const MEMORY: i64 = 1024;

/// The resources of a guest, by name.
fn belongings(guest: &Guest) -> BTreeMap<String, i64> {
    let mut all = BTreeMap::new();
    let count = |path: String| fs::read_dir(path).unwrap().count() as i64;
    for name in NAMES {
        let pid = process(guest, name, None);
        all.insert(format!("{name}: descriptors"), count(format!("/proc/{pid}/fd")));
        all.insert(format!("{name}: threads"), count(format!("/proc/{pid}/task")));
        let rss = status(pid, "VmRSS");
        all.insert(format!("{name}: kB"), rss.trim_end_matches("kB").trim().parse().unwrap());
    }
    let init = process(guest, "init", None);
    let root = format!("/proc/{init}/root");
    let mounts = fs::read_to_string(format!("/proc/{init}/mountinfo")).unwrap();
    all.insert("mounts".to_owned(), mounts.lines().count() as i64);
    all.insert("containers".to_owned(), count(format!("{root}/run/hyperinit/containers")));
    // On a machine without cgroup v2 the guest has no cgroups.
    let cgroup = fs::read_to_string(format!("/proc/{init}/cgroup")).unwrap();
    if cgroup.lines().any(|line| line.contains("::") && line.contains("hyperctl-")) {
        let cgroups = fs::read_dir(format!("{root}/sys/fs/cgroup/pod")).unwrap().flatten();
        all.insert("cgroups".to_owned(), cgroups.filter(|entry| entry.path().is_dir()).count() as i64);
    }
    // Includes zombies.
    all.insert("children".to_owned(), children(init).len() as i64);
    all
}

/// Runs processes of four kinds, sixteen a round, and one that cannot start.
fn processes(guest: &Guest, rounds: usize) {
    for round in 0..rounds {
        let running: Vec<_> = (0..16)
            .map(|number| match number % 4 {
                0 => guest.exec("main", &["echo", "out"], json!({})),
                1 => guest.exec("main", &["sh", "-c", "echo err >&2; exit 3"], json!({"user": "web"})),
                2 => guest.exec("main", &["tty"], json!({"terminal": true, "stderr": 0})),
                _ => guest.exec("main", &["sleep", "1000"], json!({})),
            })
            .collect();
        for (number, running) in running.into_iter().enumerate() {
            if number % 4 == 3 {
                running.signal(9);
            }
            let status = running.end().status;
            assert_eq!(status, [0, 3, 0, 137][number % 4], "round {round}");
        }
        assert_eq!(guest.exec("main", &["/missing"], json!({})).end().status, 127);
    }
}

fn containers(guest: &Guest, count: usize) {
    for number in 0..count {
        let id = format!("c{number}");
        let more = json!({"initialize": number % 2 == 0, "readOnly": number % 3 == 0});
        let running = guest.container(&id, &["sleep", "1000"], more);
        let exec = guest.exec(&id, &["sleep", "1000"], json!({}));
        guest.call(kill(&id, 9));
        assert_eq!((exec.end().status, running.end().status), (137, 137));
        guest.remove(&id);
        // A container that is refused half-way leaves nothing either.
        for more in [
            json!({"rootfs": "missing"}),
            json!({"process": {"user": "missing"}}),
            json!({"sysctl": {"net.missing": "1"}}),
        ] {
            refusal(guest.try_container(&id, &["true"], more));
        }
    }
}

#[test]
fn five_hundred_processes_and_fifty_containers_leave_nothing() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    // A first run allocates what is allocated only once.
    processes(&guest, 4);
    containers(&guest, 5);
    let before = settled(&guest);
    processes(&guest, 30);
    containers(&guest, 50);
    let after = settled(&guest);
    for (name, was) in &before {
        let is = after[name];
        let allowed = if name.ends_with("kB") { MEMORY } else { 0 };
        assert!(is - was <= allowed, "{name}: {was} before, {is} after\n{before:#?}\n{after:#?}");
    }
    guest.finish(main);
}

/// The resources once execd has been told of the last ends: it is told with the next start.
fn settled(guest: &Guest) -> BTreeMap<String, i64> {
    guest.says("main", "true");
    let deadline = std::time::Instant::now() + crate::guest::PATIENCE;
    loop {
        let now = belongings(guest);
        // Two equal measurements mean that nothing is in progress.
        std::thread::yield_now();
        let again = belongings(guest);
        if now == again || std::time::Instant::now() > deadline {
            return again;
        }
    }
}

/// The anonymous memory of PID 1, in kB.
fn own_memory(guest: &Guest) -> i64 {
    wait_for_rest(guest, "init");
    let pid = process(guest, "init", None);
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("Anonymous:")).unwrap();
    line.trim_end_matches("kB").trim().parse().unwrap()
}

/// How much memory PID 1 may keep, in kB: its buffers for the port and for the helpers, and the end of its
/// heap.
const KEPT: i64 = 224;

/// Files are the largest payloads of a host. While files pass through PID 1, it also starts processes. The
/// small blocks of those processes must not end up behind large ones and so keep the large ones from being
/// returned to the kernel.
#[test]
fn files_leave_nothing_in_pid_1() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    processes(&guest, 4);
    let before = own_memory(&guest);
    for round in 0..12 {
        let files: Vec<_> = (0..8)
            .map(|number| {
                let file = File { container: container_id("main"), file: format!("/tmp/file-{number}") };
                (file, vec![number; (7919 * round + 104_729 * usize::from(number)) % 200_000])
            })
            .collect();
        let mut running = Vec::new();
        let writes: Vec<_> = files
            .iter()
            .map(|(file, data)| {
                running.push(guest.exec("main", &["sleep", "1000"], json!({})));
                let write = WriteFile { file: file.clone(), data: data.clone() };
                guest.client().send(Command::WriteFile(write))
            })
            .collect();
        writes.into_iter().for_each(|write| assert_eq!(write.wait(PATIENCE).unwrap(), b""));
        let reads: Vec<_> =
            files.iter().map(|(file, _)| guest.client().send(Command::ReadFile(file.clone()))).collect();
        for (read, (_, data)) in reads.into_iter().zip(&files) {
            assert!(read.wait(PATIENCE).unwrap() == *data);
        }
        for process in running {
            process.signal(9);
            assert_eq!(process.end().status, 137);
        }
    }
    let after = own_memory(&guest);
    assert!(after - before <= KEPT, "{before} kB before, {after} kB after");
    guest.finish(main);
}

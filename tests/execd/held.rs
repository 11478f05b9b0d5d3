//! Starts that something holds up: the container's disk, or the container itself. Nobody else waits for them.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::AT_FDCWD;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::fanotify::{EventFFlags, Fanotify, FanotifyEvent, InitFlags, MarkFlags, MaskFlags};

use super::*;

/// A file that nobody can open as long as this is there: as on a disk that hangs. Who tries is in the kernel,
/// and can be killed.
struct Hanging(Fanotify);

impl Hanging {
    fn new(path: &Path) -> Hanging {
        let fanotify =
            Fanotify::init(InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_CLOEXEC, EventFFlags::O_RDONLY);
        let fanotify = fanotify.unwrap();
        fanotify.mark(MarkFlags::FAN_MARK_ADD, MaskFlags::FAN_OPEN_PERM, AT_FDCWD, Some(path)).unwrap();
        Hanging(fanotify)
    }

    /// Who has tried.
    fn tried(&self) -> Vec<FanotifyEvent> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::try_from(support::DEADLINE).unwrap()).unwrap();
        assert!(ready > 0, "nobody has tried to open it");
        self.0.read_events().unwrap()
    }
}

/// A pod with the containers `web` and `slow`; what is to hang in `slow`'s image.
fn with_slow(guest: &Guest) -> (Pod<'_>, std::path::PathBuf) {
    let mut pod = pod(guest);
    let root = image("slow");
    pod.prepare("slow", json!({})).unwrap();
    (pod, root.join("etc/passwd"))
}

fn open_descriptors(pid: Pid) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// The process of a reply, and its streams, which came before it.
fn begun(pod: &mut Pod<'_>, reply: Result<execd::Reply, Fault>) -> (Pid, u64, Vec<fs::File>) {
    let Ok(execd::Reply::Started { pid }) = reply else { panic!("{reply:?}") };
    pod.guest.adopt(pid);
    let (streams, fds) = pod.execd.packet().expect("streamd is told before init");
    (pid, streams.stdio.get(), fds.into_iter().map(fs::File::from).collect())
}

/// Starts and ends twenty processes of `web` while a start of `slow` is held up. What came of that, if it
/// came meanwhile: it is late at some time.
fn others_go_on(pod: &mut Pod<'_>) -> Option<Result<execd::Reply, Fault>> {
    let mut slow = None;
    for number in 0..20 {
        let request = pod.request("web", false, json!({"args": ["/bin/echo", number.to_string()]}));
        pod.execd.helper.send(&request);
        let mut reply = pod.execd.helper.receive();
        if reply.is_err() && slow.is_none() {
            assert!(number > 0, "it was waited for: {reply:?}");
            slow = Some(std::mem::replace(&mut reply, pod.execd.helper.receive()));
        }
        let (pid, _, mut files) = begun(pod, reply);
        release(pid);
        assert_eq!(read_all(files.swap_remove(1)), format!("{number}\n"));
        assert_eq!(pod.guest.wait(pid), 0);
    }
    slow
}

#[test]
fn a_start_that_its_disk_holds_up_holds_up_no_other() {
    guest(|guest| {
        let (mut pod, passwd) = with_slow(guest);
        others_go_on(&mut pod);
        let before = open_descriptors(pod.execd.helper.pid());
        let hanging = Hanging::new(&passwd);
        let request = pod.request("slow", false, json!({"args": ["/bin/echo", "late"], "terminal": true}));
        pod.execd.helper.send(&request);
        let tried = hanging.tried();
        let pid = Pid(tried[0].pid());
        guest.adopt(pid);
        assert_eq!(status(pid, "State").chars().next(), Some('D'), "it hangs in the kernel");
        let late = others_go_on(&mut pod).unwrap_or_else(|| pod.execd.helper.receive());
        let fault = late.unwrap_err();
        assert!(fault.is(Errno::ETIMEDOUT), "{fault}");
        assert_eq!(guest.wait(pid), 128 + 9, "it must not go on");
        assert_eq!(pod.execd.packet().map(|(streams, _)| streams), None, "nobody has heard of its streams");
        drop((tried, hanging));
        // What is kept of those that have ended, one for each, is thrown out.
        let finished: Vec<_> = (1..200).filter_map(hyperinit::ids::StreamId::new).collect();
        pod.execd.done(&execd::Request::Release { finished }).unwrap();
        assert!(open_descriptors(pod.execd.helper.pid()) <= before, "execd keeps nothing of it");
    });
}

#[test]
fn a_start_that_is_held_up_goes_on_when_it_can() {
    guest(|guest| {
        let (mut pod, passwd) = with_slow(guest);
        let hanging = Hanging::new(&passwd);
        let mut said = BTreeMap::new();
        for word in ["a", "b", "c"] {
            let request = pod.request("slow", false, json!({"args": ["/bin/echo", word]}));
            let execd::Request::StartProcess { process, .. } = &request else { panic!("{request:?}") };
            said.insert(process.stdio, word);
            pod.execd.helper.send(&request);
        }
        let tried = hanging.tried();
        // Another's start between them, whose descriptors have the next numbers.
        let request = pod.request("web", false, json!({"args": ["/bin/true"]}));
        pod.execd.helper.send(&request);
        let reply = pod.execd.helper.receive();
        let (pid, ..) = begun(&mut pod, reply);
        release(pid);
        assert_eq!(guest.wait(pid), 0);
        drop((tried, hanging));
        for _ in 0..3 {
            let reply = pod.execd.helper.receive();
            let (pid, stdio, mut files) = begun(&mut pod, reply);
            release(pid);
            assert_eq!(read_all(files.swap_remove(1)), format!("{}\n", said.remove(&stdio).unwrap()));
            assert_eq!(guest.wait(pid), 0);
        }
    });
}

/// A process that is stopped as soon as it is born has execd's descriptors, not its own: those that it needs
/// are still there when it goes on.
#[test]
fn a_start_that_is_stopped_at_its_birth_holds_up_no_other() {
    guest_with_cgroups(|guest| {
        let (mut pod, _) = with_slow(guest);
        let freeze = paths::container_cgroup(&id("slow")).join("cgroup.freeze");
        for goes_on in [true, false] {
            fs::write(&freeze, "1").unwrap();
            let request = pod.request("slow", false, json!({"args": ["/bin/echo", "late"]}));
            pod.execd.helper.send(&request);
            let late = if goes_on {
                let request = pod.request("web", false, json!({"args": ["/bin/cat"]}));
                let pid = pod.execd.started(&request).unwrap();
                guest.adopt(pid);
                drop(pod.execd.packet());
                release(pid);
                assert_eq!(guest.wait(pid), 0, "its stdin has ended: nobody else has the other end");
                fs::write(&freeze, "0").unwrap();
                pod.execd.helper.receive()
            } else {
                others_go_on(&mut pod).unwrap_or_else(|| pod.execd.helper.receive())
            };
            if goes_on {
                let (pid, _, mut files) = begun(&mut pod, late);
                release(pid);
                assert_eq!(read_all(files.swap_remove(1)), "late\n");
                assert_eq!(guest.wait(pid), 0);
            } else {
                let fault = late.unwrap_err();
                assert!(fault.is(Errno::ETIMEDOUT), "{fault}");
            }
        }
        assert_eq!(pod.shell("web", "echo on"), "on");
    });
}

/// Whether a process waits for its release, and has taken what it was sent.
fn waits_for_release(pid: Pid) -> bool {
    let waits = format!("{} ", nix::libc::SYS_rt_sigtimedwait);
    let call = || fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap();
    call().starts_with(&waits) && status(pid, "ShdPnd") == format!("{:016x}", 0) && call().starts_with(&waits)
}

/// Whoever may signal a process of the pod can stop it, and have it go on; to let it execute is init's alone.
#[test]
fn nobody_in_the_pod_releases_a_start_or_holds_up_anothers() {
    guest(|guest| {
        let (mut pod, passwd) = with_slow(guest);
        let root = passwd.parent().unwrap().parent().unwrap().to_owned();
        program(&root, "ran", b"#!/bin/sh\n: >/ran\n", 0o755);
        let request = pod.request("slow", false, json!({"args": ["/bin/ran"]}));
        let held = pod.execd.started(&request).unwrap();
        guest.adopt(held);
        drop(pod.execd.packet());
        let inside = status(held, "NSpid").split(' ').nth(1).unwrap().to_owned();
        for signals in ["CONT", "STOP CONT", "CONT CONT", "STOP"] {
            for signal in signals.split(' ') {
                assert_eq!(pod.shell("web", &format!("kill -{signal} {inside}")), "");
            }
            let deadline = std::time::Instant::now() + support::DEADLINE;
            let settled = || waits_for_release(held) || status(held, "State").starts_with('T');
            while !settled() {
                assert!(std::time::Instant::now() < deadline, "{signals}: {}", status(held, "State"));
                std::thread::yield_now();
            }
            assert!(!root.join("ran").exists(), "{signals}");
        }
        // It is stopped; the others are not its business.
        others_go_on(&mut pod);
        release(held);
        assert_eq!(guest.wait(held), 0);
        assert!(root.join("ran").exists());
    });
}

/// Whom nobody knows runs nothing, however late it is ready.
#[test]
fn so_many_starts_are_under_way_and_those_of_an_execd_that_died_run_nothing() {
    const MOST: usize = 256;
    guest(|guest| {
        let (mut pod, passwd) = with_slow(guest);
        let root = passwd.parent().unwrap().parent().unwrap().to_owned();
        program(&root, "ran", b"#!/bin/sh\n: >/ran\n", 0o755);
        let hanging = Hanging::new(&passwd);
        for _ in 0..=MOST {
            let request = pod.request("slow", false, json!({"args": ["/bin/ran"]}));
            pod.execd.helper.send(&request);
        }
        let fault = pod.execd.helper.receive::<execd::Reply>().unwrap_err();
        let (full, late) = ("256 starts are under way", fault.is(Errno::ETIMEDOUT));
        assert!(fault.to_string().contains(full) || late, "{fault}");
        let tried = hanging.tried();
        for event in &tried {
            guest.adopt(Pid(event.pid()));
        }
        pod.execd.helper.kill();
        let pids: Vec<_> = tried.iter().map(|event| Pid(event.pid())).collect();
        assert!(!pids.is_empty());
        drop((tried, hanging));
        for pid in pids {
            assert!([125, 128 + 9].contains(&guest.wait(pid)), "{pid}");
        }
        assert!(!root.join("ran").exists());
    });
}

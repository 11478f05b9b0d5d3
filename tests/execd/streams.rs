//! Pipes and ttys, and the way to streamd.

use hyperinit::ids::StreamId;
use nix::mount::{MntFlags, umount2};

use super::*;

#[test]
fn bytes_go_in_and_out_by_pipes() {
    guest(|guest| {
        let mut pod = pod(guest);
        let words = "cat; echo oops >&2; exit 7";
        let mut running = pod.exec("web", json!({"args": ["/bin/sh", "-c", words]})).unwrap();
        running.stdin.take().unwrap().write_all(b"hello").unwrap();
        assert_eq!(read_all(running.out), "hello");
        assert_eq!(read_all(running.err.unwrap()), "oops\n");
        assert_eq!(guest.wait(running.pid), 7);
        assert!(!running.streams.terminal && !running.streams.again);
        assert_eq!(pod.execd.helper.log(), "");
    });
}

#[test]
fn a_closed_pipe_kills_by_sigpipe() {
    guest(|guest| {
        let mut pod = pod(guest);
        let mut running = pod.exec("web", json!({"args": ["/bin/cat"]})).unwrap();
        drop(running.out);
        // execd keeps a duplicate, until the process is finished; here it is told so.
        pod.execd.done(&execd::Request::Release { finished: vec![running.streams.stdio] }).unwrap();
        // busybox's cat tries sendfile(2) first, which tells it before there is anything to read.
        let _ = running.stdin.take().unwrap().write_all(b"x");
        assert_eq!(guest.wait(running.pid), 128 + 13);
    });
}

#[test]
fn a_tty_is_the_processs_own() {
    guest(|guest| {
        let mut pod = pod(guest);
        let words = "tty; stat -c '%u %g %a' $(tty); echo x >/dev/tty; cat /proc/self/stat; ls -1 /dev/pts";
        let mut tty = |user: &str| {
            let more = json!({"args": ["/bin/sh", "-c", words], "terminal": true, "user": user});
            pod.run("web", more)
        };
        let (status, out, _) = tty("web");
        assert_eq!(status, 0, "{out}");
        let lines: Vec<&str> = out.lines().collect();
        assert_eq!(lines[..3], ["/dev/pts/0", "33 6 620", "x"], "{out}");
        // pid, comm, state, ppid, pgrp, session, the controlling terminal's device number, its foreground
        // group
        let stat: Vec<&str> = lines[3].split(' ').collect();
        assert_eq!(
            (stat[6], stat[7]),
            ("34816", stat[4]),
            "pts/0 is its terminal, and it is in the foreground"
        );
        assert_eq!(lines[4..], ["0", "ptmx"], "its container's ttys only");
        let (_, out, _) = tty("");
        assert!(out.contains("0 6 620"), "{out}");
    });
}

#[test]
fn a_tty_has_a_size_and_signals() {
    guest(|guest| {
        let mut pod = pod(guest);
        let words =
            "trap 'echo size $(stty size); exit 3' WINCH; echo ready; while true; do sleep 0.01; done";
        let mut running =
            pod.exec("web", json!({"args": ["/bin/sh", "-c", words], "terminal": true})).unwrap();
        assert!(running.streams.terminal && running.stdin.is_none() && running.err.is_none());
        read_to(&running.out, "ready");
        let stdio = running.streams.stdio;
        pod.execd.done(&execd::Request::Resize { stdio, row: 41, column: 132 }).unwrap();
        assert!(read_until(&running.out, |_| false).contains("size 41 132"));
        assert_eq!(guest.wait(running.pid), 3);
        running = pod.exec("web", json!({"args": ["/bin/cat"], "terminal": true})).unwrap();
        // ^C, which only a controlling terminal turns into a signal.
        running.out.write_all(b"\x03").unwrap();
        assert_eq!(guest.wait(running.pid), 128 + 2);
        let piped = pod.exec("web", json!({"args": ["/bin/cat"]})).unwrap();
        let mut resize = |stdio| pod.execd.done(&execd::Request::Resize { stdio, row: 1, column: 1 });
        assert!(resize(piped.streams.stdio).unwrap_err().to_string().contains("no tty"));
        let nobody = hyperinit::ids::StreamId::new(999).unwrap();
        assert!(resize(nobody).unwrap_err().to_string().contains("no such stream"));
    });
}

#[test]
fn the_tty_of_a_containers_init_is_its_console() {
    guest(|guest| {
        let mut pod = pod(guest);
        let words = "echo to the console >/dev/console; read line; exit 4";
        let mut running =
            pod.exec_init("web", json!({"args": ["/bin/sh", "-c", words], "terminal": true})).unwrap();
        assert!(read_to(&running.out, "console\r\n").contains("to the console"));
        guest.inside("web", |mounts| {
            let line = mounts.lines().find(|line| line.contains(" /dev/console ")).unwrap();
            assert!(line.contains(" - devpts "), "{line}");
        });
        running.out.write_all(b"\n").unwrap();
        assert_eq!(guest.wait(running.pid), 4);
    });
}

#[test]
fn a_tty_with_a_stderr_stream_has_it_on_a_pipe() {
    guest(|guest| {
        let mut pod = pod(guest);
        let more = json!({"args": ["/bin/sh", "-c", "echo out; echo err >&2"], "terminal": true});
        let mut request = pod.request("web", false, more);
        let execd::Request::StartProcess { process, .. } = &mut request else { panic!() };
        process.stderr = 900;
        let pid = pod.execd.started(&request).unwrap();
        release(pid);
        let (streams, fds) = pod.execd.packet().unwrap();
        assert!(streams.terminal && !streams.stdin && fds.len() == 2);
        let mut files = fds.into_iter().map(fs::File::from);
        assert_eq!(read_all(files.next().unwrap()), "out\r\n");
        assert_eq!(read_all(files.next().unwrap()), "err\n");
        assert_eq!(guest.wait(pid), 0);
    });
}

#[test]
fn streams_are_numbers_and_different() {
    guest(|guest| {
        let mut pod = pod(guest);
        for (more, why) in [
            (json!({"stdio": 0}), "stdio is 0"),
            (json!({"stderr": 0}), "stderr is 0"),
            (json!({"stdio": 5, "stderr": 5}), "the same stream"),
        ] {
            let request = pod.request("web", false, more);
            let fault = pod.execd.started(&request).unwrap_err();
            assert!(fault.to_string().contains(why), "{fault}");
        }
        assert!(pod.execd.packet().is_none(), "streamd has heard nothing");
        let fault = pod.exec("nobody", json!({})).err().unwrap();
        assert!(fault.is(Errno::ENOENT), "{fault}");
    });
}

#[test]
fn a_new_streamd_gets_the_output_again_and_no_stdin() {
    guest(|guest| {
        let mut pod = pod(guest);
        let piped = pod.exec("web", json!({"args": ["/bin/cat"]})).unwrap();
        let tty = pod.exec("web", json!({"args": ["/bin/cat"], "terminal": true})).unwrap();
        let finished = pod.exec("web", json!({})).unwrap();
        guest.wait(finished.pid);
        pod.execd.done(&execd::Request::Release { finished: vec![finished.streams.stdio] }).unwrap();
        let (pid, mut stdin) = (piped.pid, piped.stdin.unwrap());
        // The first streamd is gone with all that it had but one thing.
        drop((piped.out, piped.err));
        pod.execd.done(&execd::Request::Resend).unwrap();
        let (first, mut fds) = pod.execd.packet().unwrap();
        assert_eq!((first.stdio, first.again, first.stdin, fds.len()), (piped.streams.stdio, true, false, 2));
        let (second, _) = pod.execd.packet().unwrap();
        assert_eq!((second.stdio, second.terminal), (tty.streams.stdio, true));
        assert!(pod.execd.packet().is_none(), "what is finished is not sent");
        stdin.write_all(b"still here").unwrap();
        drop(stdin);
        assert_eq!(guest.wait(pid), 0, "execd has no duplicate of stdin: the process sees its end");
        pod.execd.done(&execd::Request::Release { finished: vec![first.stdio] }).unwrap();
        assert_eq!(read_all(fs::File::from(fds.remove(0))), "still here");
    });
}

#[test]
fn what_is_kept_is_let_go() {
    guest(|guest| {
        let mut pod = pod(guest);
        let open =
            |pod: &Pod<'_>| fs::read_dir(format!("/proc/{}/fd", pod.execd.helper.pid())).unwrap().count();
        let before = open(&pod);
        for _ in 0..50 {
            let running = pod.exec("web", json!({})).unwrap();
            guest.wait(running.pid);
            pod.execd.done(&execd::Request::Release { finished: vec![running.streams.stdio] }).unwrap();
            assert!(pod.exec("web", json!({"user": "nobody"})).is_err());
        }
        assert_eq!(open(&pod), before);
    });
}

#[test]
fn without_streamd_nothing_starts() {
    guest(|guest| {
        let mut pod = pod(guest);
        let root = Path::new(paths::LOCAL_SHARE).join("web/rootfs");
        program(&root, "ran", b"#!/bin/sh\n: >/ran\n", 0o755);
        let (_ours, theirs) = socket_pair();
        let streamd = std::mem::replace(&mut pod.execd.streamd, theirs);
        drop(streamd);
        let fault = pod.exec("web", json!({"args": ["/bin/ran"]})).err().unwrap();
        assert!(fault.is(Errno::EPIPE) && fault.doing == "handing to streamd", "{fault}");
        // The next start is after the end of the one before: its process was killed in its place.
        assert!(pod.exec("web", json!({"user": "nobody"})).is_err());
        assert!(!root.join("ran").exists());
    });
}

/// The next process's packet, as a new streamd gets it.
fn resent(pod: &Pod<'_>) -> (hyperinit::ids::StreamId, Vec<fs::File>) {
    let (streams, fds) = pod.execd.packet().expect("it is sent again");
    assert!(streams.again && !streams.stdin);
    (streams.stdio, fds.into_iter().map(fs::File::from).collect())
}

#[test]
fn execd_and_streamd_may_die_together() {
    guest(|guest| {
        let mut pod = pod(guest);
        let words = "read line; echo $line; read line; echo $line >&2; exit 6";
        let mut piped = pod.exec("web", json!({"args": ["/bin/sh", "-c", words]})).unwrap();
        let tty = pod.exec("web", json!({"args": ["/bin/sh", "-c", words], "terminal": true})).unwrap();
        let (pid, mut stdin) = (piped.pid, piped.stdin.take().unwrap());
        let (first, second) = (piped.streams.stdio, tty.streams.stdio);
        // streamd and everything that it had is no more when execd dies.
        drop((piped.out, piped.err, tty.out));
        for _ in 0..3 {
            pod.execd.is_replaced(&[first, second]);
        }
        assert!(pod.execd.packet().is_none() && pod.execd.forgotten().is_none());
        stdin.write_all(b"meanwhile\n").unwrap();
        pod.execd.done(&execd::Request::Resend).unwrap();
        let (stream, out) = resent(&pod);
        assert_eq!((stream, read_to(&out[0], "\n")), (first, "meanwhile\n".to_owned()));
        stdin.write_all(b"at last\n").unwrap();
        assert_eq!((guest.wait(pid), read_to(&out[1], "\n")), (6, "at last\n".to_owned()));
        let (stream, mut out) = resent(&pod);
        assert_eq!(stream, second);
        pod.execd.done(&execd::Request::Resize { stdio: second, row: 41, column: 132 }).unwrap();
        out[0].write_all(b"a\nb\n").unwrap();
        assert_eq!(guest.wait(tty.pid), 6);
    });
}

#[test]
fn what_is_finished_or_never_ran_is_kept_by_no_successor() {
    guest(|guest| {
        let mut pod = pod(guest);
        let runs = pod.exec("web", json!({"args": ["/bin/cat"]})).unwrap();
        let ended = pod.exec("web", json!({})).unwrap();
        guest.wait(ended.pid);
        // init never hears of this one, and its number is used again.
        let request = pod.request("web", false, json!({"args": ["/bin/true"], "stdio": 700, "stderr": 701}));
        let lost = pod.execd.started(&request).unwrap();
        guest.adopt(lost);
        assert!(pod.execd.packet().is_some());
        pod.execd.is_replaced(&[runs.streams.stdio]);
        assert_eq!(pod.execd.forgotten(), Some(ended.streams.stdio));
        assert_eq!(pod.execd.forgotten().unwrap().get(), 700);
        let again = pod.exec("web", json!({"args": ["/bin/cat"], "stdio": 700, "stderr": 701})).unwrap();
        pod.execd.is_replaced(&[runs.streams.stdio, again.streams.stdio]);
        assert!(pod.execd.forgotten().is_none(), "streamd was told before");
        pod.execd.done(&execd::Request::Resend).unwrap();
        assert_eq!(resent(&pod).0, runs.streams.stdio);
        assert_eq!(resent(&pod).0, again.streams.stdio);
        assert!(pod.execd.packet().is_none());
        // The later one of the number.
        let (mut stdin, pid) = (again.stdin.unwrap(), again.pid);
        stdin.write_all(b"x").unwrap();
        drop((stdin, runs.stdin));
        assert_eq!((guest.wait(pid), guest.wait(runs.pid), guest.wait(lost)), (0, 0, 125));
    });
}

#[test]
fn what_execd_keeps_is_not_counted_against_the_containers() {
    guest(|guest| {
        let mut pod = pod(guest);
        let cats: Vec<_> = (0..40).map(|_| pod.exec("web", json!({"args": ["/bin/cat"]})).unwrap()).collect();
        // A process with few descriptors sends one, its tty's, to execd.
        let low = json!([{"type": "RLIMIT_NOFILE", "soft": 20, "hard": 20}]);
        let more = json!({"args": ["/bin/echo", "started"], "rlimits": low, "terminal": true});
        assert_eq!(pod.run("web", more).1, "started\r\n");
        for cat in cats {
            drop(cat.stdin);
            assert_eq!(guest.wait(cat.pid), 0);
        }
    });
}

/// A request for a process at the debugging door that runs until it is killed.
fn at_the_door(stdio: u64) -> execd::Request {
    let process = json!({"id": "door", "stdio": stdio, "stderr": stdio + 1, "args": ["/bin/sleep", "1000"]});
    let process = serde_json::from_value(process).unwrap();
    execd::Request::StartInGuest { process, finished: Vec::new() }
}

/// STARTPOD may have listed what runs before execd started what the door had been asked for.
#[test]
fn what_comes_by_the_door_while_a_pod_starts_keeps_its_output() {
    guest(|guest| {
        image("web");
        let mut pod = Pod::with(guest, pod_files(), &["--debug"]);
        let pid = pod.execd.started(&at_the_door(77)).unwrap();
        guest.adopt(pid);
        release(pid);
        assert_eq!(pod.execd.packet().unwrap().0.stdio.get(), 77);
        pod.execd.done(&join(&[])).unwrap();
        pod.execd.done(&execd::Request::Resend).unwrap();
        let (again, _) = pod.execd.packet().expect("it is kept, and nobody is told to forget it");
        assert!(again.again && again.stdio.get() == 77);
        // Of what it does not know, and nobody lists, a successor still tells streamd.
        pod.execd.is_replaced(&[]);
        assert_eq!(pod.execd.forgotten().map(StreamId::get), Some(77));
        guest.kill(pid, Signal::SIGKILL);
    });
}

#[test]
fn the_door_is_open_after_a_pods_end() {
    guest(|guest| {
        image("web");
        let mut pod = Pod::with(guest, pod_files(), &["--debug"]);
        guest.kill(pod.init, Signal::SIGKILL);
        pod.mountd(&hyperinit::wire::mountd::Request::DestroyPod).unwrap();
        let pid = pod.execd.started(&at_the_door(77)).unwrap();
        guest.adopt(pid);
        release(pid);
        let container = pod.request("web", false, json!({}));
        let fault = pod.execd.started(&container).unwrap_err();
        assert!(fault.to_string().contains("has not joined the pod"), "{fault}");
        guest.kill(pid, Signal::SIGKILL);
    });
}

#[test]
fn an_execd_that_finds_no_way_back_to_the_pod_ends() {
    guest(|guest| {
        image("web");
        let mut pod = Pod::with(guest, pod_files(), &["--debug"]);
        umount2(Path::new(paths::POD_NS).join("uts").as_path(), MntFlags::MNT_DETACH).unwrap();
        pod.execd.helper.ask_and_leave(&at_the_door(77));
        let log = pod.execd.helper.log();
        assert!(log.contains("entering a namespace"), "{log}");
        assert!(!log.contains("repl"), "{log}");
    });
}

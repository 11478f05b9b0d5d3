//! Helpers that are killed while a pod runs: the pod goes on, no output and no exit status is lost, and the
//! next command works.

#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, reason = "a test's panic is its report")]

mod guest;

use std::time::Instant;

use guest::followed::Followed;
use guest::processes::{kill_hard, process, replace, wait_for_rest};
use guest::{Guest, Kind, PATIENCE, Running, kill, refusal};
use hyperinit::command::Command;
use hyperinit::frame::Message;
use hyperinit_client::{CallError, Pending};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};

/// A process that answers each line with its number and the line, and exits with 7 at the end of its stdin.
fn talker<'a>(guest: &'a Guest, container: &str) -> Running<'a> {
    let script = "n=0; while read line; do n=$((n+1)); echo $n $line; echo e$n >&2; done; exit 7";
    guest.exec(container, &["sh", "-c", script], json!({}))
}

/// Sends commands, and waits until the guest has read them and PID 1 has nothing more to do: it has sent its
/// requests to the helpers.
fn send_through(guest: &Guest, commands: &[(Message, Value)]) -> Vec<Pending> {
    let client = guest.client();
    // The client has written everything sent before, for it has been answered.
    let mut end = client.credit().0;
    let pending = commands.iter().map(|(message, json)| {
        let json = json.to_string();
        end += 8 + json.len() as u64;
        client.send_raw(message.id(), json.as_bytes())
    });
    let pending = pending.collect();
    let deadline = Instant::now() + PATIENCE;
    while client.credit().1 < end {
        assert!(Instant::now() < deadline, "not read\n{}", guest.log());
        std::thread::yield_now();
    }
    wait_for_rest(guest, "init");
    pending
}

/// Checks everything that has to work after a helper's death.
fn works(guest: &Guest, id: &str) {
    let outcome = guest.sh("main", "echo new; exit 3");
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("new\n", 3));
    let container = guest.container(id, &["sleep", "100000"], json!({}));
    assert_eq!(guest.says(id, "hostname"), "pod-1\n");
    guest.finish(container);
    guest.call(Command::Ping);
}

#[test]
fn netd_mountd_and_execd_are_replaced_and_the_pod_notices_nothing() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let talker = talker(&guest, "main");
    let script = "trap 'stty size; exit 4' WINCH; echo up; while :; do read x; done";
    let terminal = guest.exec("main", &["sh", "-c", script], json!({"terminal": true, "stderr": 0}));
    terminal.read_until("up\r\n");
    for round in 0..3 {
        for name in ["netd", "mountd", "execd"] {
            talker.streams.stdin.write(format!("{name}\n").as_bytes()).unwrap();
            talker.read_until(&format!("{name}\n"));
            let ends_meanwhile = guest.exec("main", &["sh", "-c", "read x; echo bye; exit 9"], json!({}));
            let old = process(&guest, name, None);
            kill_hard(old);
            ends_meanwhile.streams.stdin.write(b"\n").unwrap();
            assert_eq!(ends_meanwhile.end().status, 9, "{name}");
            process(&guest, name, Some(old));
            works(&guest, &format!("c-{name}-{round}"));
        }
    }
    terminal.resize(42, 123);
    let outcome = terminal.end();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("42 123\r\n", 4));
    let outcome = talker.outcome();
    assert_eq!(outcome.status, 7);
    let errors: String = (1..=9).map(|number| format!("e{number}\n")).collect();
    assert_eq!(outcome.stderr, errors);
    guest.finish(main);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

#[test]
fn streamd_is_replaced_and_no_byte_of_output_is_lost() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let script = "i=0; while [ $i -lt 40000 ]; do i=$((i+1)); echo line $i; done; exit 5";
    let running = guest.exec("main", &["sh", "-c", script], json!({}));
    let mut text = running.read_until("line 10\n");
    for _ in 0..3 {
        replace(&guest, &["streamd"]);
        text.push_str(&running.read_until("0\n"));
    }
    let outcome = running.end();
    text.push_str(&outcome.stdout);
    let expected: String = (1..=40_000).map(|number| format!("line {number}\n")).collect();
    assert!(text == expected, "{} bytes instead of {}\n{}", text.len(), expected.len(), guest.log());
    assert_eq!(outcome.status, 5);
    works(&guest, "after");
}

#[test]
fn streamds_death_costs_running_processes_their_stdin_and_nothing_else() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let running = guest.exec("main", &["sh", "-c", "echo up; cat; echo end; exit 4"], json!({}));
    let terminal = guest.exec(
        "main",
        &["sh", "-c", "stty -echo; echo up; read x; echo got $x; exit 6"],
        json!({"terminal": true, "stderr": 0}),
    );
    running.read_until("up\n");
    terminal.read_until("up\r\n");
    replace(&guest, &["streamd"]);
    let outcome = running.end();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("end\n", 4), "its stdin ended");
    terminal.streams.stdin.write(b"typed\n").unwrap();
    let outcome = terminal.end();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("got typed\r\n", 6), "a tty is not closed");
    works(&guest, "after");
}

#[test]
fn a_start_in_flight_is_an_error_and_the_next_one_works() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let execd = process(&guest, "execd", None);
    nix::sys::signal::kill(Pid::from_raw(execd), Signal::SIGSTOP).unwrap();
    let starts: Vec<_> = (0..4)
        .map(|number| {
            let process = json!({"id": format!("p{number}"), "args": ["true"], "stdio": 9000 + 2 * number, "stderr": 9001 + 2 * number});
            (Message::ExecCmd, json!({"container": "main", "process": process}))
        })
        .collect();
    let pending = send_through(&guest, &starts);
    kill_hard(execd);
    let mut answers = pending.into_iter().map(|pending| pending.wait(PATIENCE));
    let text = refusal(answers.next().unwrap());
    assert!(text.contains("execd: it died before it answered"), "{text}");
    // execd had not received these requests, so its successor did.
    assert!(answers.all(|answer| answer == Ok(Vec::new())));
    process(&guest, "execd", Some(execd));
    works(&guest, "after");
}

#[test]
fn a_container_in_the_making_is_undone_and_its_id_free() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    // mountd waits for a disk that does not come.
    let making = json!({"id": "making", "image": "no-such-disk", "fstype": "ext4",
        "process": {"args": ["true"], "stdio": 9001, "stderr": 9002}});
    for name in ["mountd", "execd"] {
        let helper = process(&guest, name, None);
        nix::sys::signal::kill(Pid::from_raw(helper), Signal::SIGSTOP).unwrap();
        let container = match name {
            "mountd" => making.clone(),
            _ => json!({"id": "making", "image": "image", "rootfs": "rootfs",
                "process": {"args": ["true"], "stdio": 9001, "stderr": 9002}}),
        };
        let commands = [
            (Message::NewContainer, container),
            (Message::KillContainer, json!({"container": "nobody", "signal": 9})),
        ];
        let [new, signal] = send_through(&guest, &commands).try_into().unwrap();
        if name == "execd" {
            // execd is asked only when mountd has finished.
            let init = process(&guest, "init", None);
            let kept = format!("/proc/{init}/root/run/hyperinit/containers/making/mnt");
            let deadline = Instant::now() + PATIENCE;
            while !std::path::Path::new(&kept).exists() {
                assert!(Instant::now() < deadline, "mountd makes nothing\n{}", guest.log());
                std::thread::yield_now();
            }
            wait_for_rest(&guest, "mountd");
            wait_for_rest(&guest, "init");
        }
        let early = signal.wait(std::time::Duration::ZERO);
        assert!(matches!(early, Err(CallError::Late(_))), "its turn comes later: {early:?}");
        kill_hard(helper);
        let text = refusal(new.wait(PATIENCE));
        assert!(text.contains(name), "{text}");
        assert!(refusal(signal.wait(PATIENCE)).contains("no such container"));
        process(&guest, name, Some(helper));
        assert_eq!(guest.container_says("making", "echo made", json!({})), "made\n");
        works(&guest, "after");
    }
}

/// A mountd that dies while it fills a volume leaves the volume new or complete for the next start.
#[test]
fn a_volume_is_new_or_whole_when_mountd_dies_over_it() {
    const FILES: usize = 2_000;
    let guest = Guest::with_pod(Kind::Local);
    let data = guest.image("docker").join("data");
    std::fs::create_dir(&data).unwrap();
    for number in 0..FILES {
        std::fs::write(data.join(number.to_string()), "").unwrap();
    }
    for (number, stage) in [".hyperinit-new/1", ".hyperinit-whole"].into_iter().enumerate() {
        let volume = format!("volume{number}");
        let at = guest.share.join(&volume);
        std::fs::create_dir(&at).unwrap();
        let map = json!({"source": volume, "path": "/data", "dockerVolume": true});
        let more = json!({"image": "docker", "initialize": true, "fsmap": [map]});
        let mountd = process(&guest, "mountd", None);
        let script = ["sh", "-c", "ls -A /data | wc -l"];
        std::thread::scope(|scope| {
            let start = scope.spawn(|| guest.try_container("docker", &script, more.clone()));
            while !at.join(stage).exists() && !start.is_finished() {}
            kill_hard(mountd);
            match start.join().unwrap() {
                // A fast machine may have filled the volume before this test sees the stage.
                Ok(container) => {
                    assert_eq!(container.outcome().stdout, format!("{FILES}\n"));
                    guest.remove("docker");
                }
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.contains("mountd: it died before it answered"), "{text}\n{}", guest.log());
                }
            }
        });
        process(&guest, "mountd", Some(mountd));
        let files = std::fs::read_dir(at.join("_data")).unwrap().count();
        // With all the files in place the mark may be gone already.
        let known = files == 0 || files == FILES || at.join(".hyperinit-whole").exists();
        assert!(known, "{files} and nobody who knows");
        assert_eq!(guest.container_says("docker", script[2], more), format!("{FILES}\n"), "{stage}");
        assert_eq!(std::fs::read_dir(&at).unwrap().count(), 1, "nothing else is left");
    }
}

#[test]
fn all_at_once_and_the_pod_still_ends_in_order() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let script = "trap 'echo goodbye; exit 0' TERM; echo up; while :; do sleep 0.01; done";
    let polite = guest.container("polite", &["sh", "-c", script], json!({}));
    polite.read_until("up\n");
    for round in 0..3 {
        replace(&guest, &["netd", "mountd", "execd", "streamd"]);
        works(&guest, &format!("all-{round}"));
    }
    for name in ["netd", "mountd", "execd", "streamd"] {
        kill_hard(process(&guest, name, None));
    }
    let ended = guest.client().send(Command::DestroyPod);
    let outcome = polite.end();
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("goodbye\n", 0));
    assert_eq!(main.end().status, 143);
    ended.wait(PATIENCE).unwrap();
    assert!(guest.wait_for_end().success());
}

#[test]
fn execd_and_streamd_at_once_or_in_turn_and_no_byte_of_output_is_lost() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let script = "i=0; while [ $i -lt 40000 ]; do i=$((i+1)); echo line $i; done; exit 5";
    let running = guest.exec("main", &["sh", "-c", script], json!({}));
    let mut text = running.read_until("line 10\n");
    for _ in 0..2 {
        for names in [&["execd"][..], &["streamd"], &["execd", "streamd"], &["streamd", "execd"]] {
            replace(&guest, names);
            guest.says("main", "true");
        }
        text.push_str(&running.read_until("0\n"));
    }
    let outcome = running.end();
    text.push_str(&outcome.stdout);
    let expected: String = (1..=40_000).map(|number| format!("line {number}\n")).collect();
    assert!(text == expected, "{} bytes instead of {}", text.len(), expected.len());
    assert_eq!(outcome.status, 5);
    works(&guest, "after");
}

#[test]
fn a_helper_that_hangs_is_replaced() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let execd = process(&guest, "execd", None);
    nix::sys::signal::kill(Pid::from_raw(execd), Signal::SIGSTOP).unwrap();
    let text = refusal(guest.try_exec("main", &["true"], json!({})));
    assert!(text.contains("it died before it answered"), "{text}");
    guest.await_log("execd is killed: it has been working on one request for too long");
    works(&guest, "after");
}

#[test]
fn without_a_warden_the_guest_goes_on_with_what_it_has() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    kill_hard(process(&guest, "warden", None));
    works(&guest, "after");
    kill_hard(process(&guest, "mountd", None));
    let text = refusal(guest.try_container("d", &["true"], json!({})));
    assert!(text.contains("mountd"), "{text}");
    let outcome = guest.sh("main", "echo still; exit 2");
    assert_eq!((outcome.stdout.as_str(), outcome.status), ("still\n", 2));
    let text = refusal(guest.try_container("d", &["true"], json!({})));
    assert!(text.contains("mountd: it died too often: it is closed"), "{text}");
    guest.await_log("the warden is gone");
    guest.call(kill("main", 9));
    assert_eq!(main.outcome().status, 137);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

/// docs/design.md: a helper that dies so many times with no answered request in between is closed.
const DEATHS: usize = 8;

/// Kills a helper until it is closed, each time before it has done anything.
fn close(guest: &Guest, name: &str) {
    let from = guest.log().len();
    let closed = format!("{name} died too often: it is closed for a while");
    let mut followed = Followed::successor(guest, name);
    for _ in 2..DEATHS {
        assert!(!guest.log()[from..].contains(&closed), "{}", guest.log());
        followed = followed.replace();
    }
    followed.kill();
    guest.await_log(&closed);
    // A helper that dies at once may have been reaped before init was told its pid.
    let (gone, soon) = (format!("{name} is gone"), format!("{name} died as soon as it was started"));
    let log = guest.log();
    let deaths = log[from..].lines().filter(|line| line.contains(&gone) || line.contains(&soon)).count();
    assert_eq!(deaths, DEATHS, "{log}");
}

#[test]
fn a_netd_that_dies_again_and_again_is_closed_and_the_rest_goes_on() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    close(&guest, "netd");
    let routes = json!({"routes": [{"dest": "198.51.100.0/24", "device": "lo"}]});
    let text = guest.refused(Command::SetupRoute(guest::parse(routes)));
    assert!(text.contains("netd: it died too often: it is closed"), "{text}");
    works(&guest, "after");
    guest.finish(main);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

#[test]
fn a_mountd_that_dies_again_and_again_is_closed_and_the_rest_goes_on() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let talker = talker(&guest, "main");
    close(&guest, "mountd");
    let text = refusal(guest.try_container("d", &["true"], json!({})));
    assert!(text.contains("mountd: it died too often: it is closed"), "{text}");
    talker.streams.stdin.write(b"still\n").unwrap();
    talker.read_until("1 still\n");
    assert_eq!(guest.says("main", "echo new"), "new\n");
    assert_eq!(talker.outcome().status, 7);
    guest.call(kill("main", 9));
    assert_eq!(main.outcome().status, 137);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

/// When the cause of the deaths has passed, the guest starts the helper again without a command from the
/// host, and the work left undone is no obstacle.
#[test]
fn a_helper_that_was_closed_comes_back() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let other = guest.sleeper("other");
    for name in ["netd", "mountd", "execd", "streamd"] {
        close(&guest, name);
    }
    let from = guest.log().len();
    guest.call(kill("main", 9));
    assert_eq!(main.status(), 137);
    guest.remove("main");
    for name in ["netd", "mountd", "execd", "streamd"] {
        guest.wait_for_log(from, &format!("{name} is up as"));
    }
    let main = guest.sleeper("main");
    works(&guest, "after");
    assert_eq!(guest.says("other", "echo new"), "new\n");
    guest.finish(main);
    guest.finish(other);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

#[test]
fn an_execd_that_dies_again_and_again_is_closed_and_the_rest_goes_on() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let talker = talker(&guest, "main");
    close(&guest, "execd");
    for text in [
        refusal(guest.try_exec("main", &["true"], json!({}))),
        refusal(guest.try_container("d", &["true"], json!({}))),
    ] {
        assert!(text.contains("execd: it died too often: it is closed"), "{text}");
    }
    talker.streams.stdin.write(b"still\n").unwrap();
    talker.read_until("1 still\n");
    assert_eq!(talker.outcome().status, 7);
    guest.call(Command::Ping);
    guest.call(kill("main", 9));
    assert_eq!(main.outcome().status, 137);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

#[test]
fn a_streamd_that_dies_again_and_again_is_closed_and_the_ends_of_processes_are_still_told() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let other = guest.exec("main", &["sleep", "100000"], json!({}));
    close(&guest, "streamd");
    guest.call(Command::Ping);
    other.signal(9);
    assert_eq!(other.status(), 137, "there is no output, but there is an end");
    guest.call(kill("main", 9));
    assert_eq!(main.status(), 137);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

#[test]
fn a_pod_init_that_dies_ends_the_pod_in_order() {
    let guest = Guest::with_pod(Kind::Local);
    let main = guest.sleeper("main");
    let other = guest.container("other", &["sh", "-c", "echo said; sleep 100000"], json!({}));
    other.read_until("said\n");
    let exec = guest.exec("main", &["sleep", "100000"], json!({}));
    kill_hard(process(&guest, "podinit", None));
    for running in [exec, main, other] {
        assert_eq!(running.end().status, 137);
    }
    // The kernel reaps the pod init only when everything in the pod has been reaped.
    guest.await_log("the pod init is gone: the pod ends");
    // The end is complete: another pod can be started.
    guest.start_pod();
    let main = guest.sleeper("main");
    works(&guest, "after");
    guest.finish(main);
    guest.call(Command::DestroyPod);
    assert!(guest.wait_for_end().success());
}

//! The log channels: whoever writes to one is named, is limited, and harms nobody else's.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hyperinit::sys::fd::send_fds;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::answers;
use super::guest::processes::{kill_hard, process};
use super::guest::{Guest, Kind};
use super::place::{Place, until};
use super::witness::Witness;

/// A process's log channel: its standard error.
fn channel(pid: i32) -> OwnedFd {
    let pidfd = pidfd_open(rustix::process::Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    pidfd_getfd(&pidfd, 2, PidfdGetfdFlags::empty()).unwrap()
}

/// One write, as the process would make it. False: the channel is full.
fn say(channel: &OwnedFd, text: &[u8]) -> bool {
    match nix::unistd::write(channel, text) {
        Ok(count) => {
            assert_eq!(count, text.len());
            true
        }
        Err(Errno::EAGAIN) => false,
        Err(errno) => panic!("{errno}"),
    }
}

/// Stops a process, and waits until it is.
fn stop(guest: &Guest, pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    until(guest, "it does not stop", || {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(") ").next().unwrap().starts_with('T').then_some(())
    });
}

#[test]
fn a_line_has_the_name_of_who_wrote_it() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let forged = "init: the warden lied: of nothing";
    for (process_name, named) in [
        ("warden", "warden"),
        ("netd", "netd"),
        ("mountd", "mountd"),
        ("execd", "execd"),
        ("streamd", "streamd"),
        // It came by way of execd, which has started it.
        ("podinit", "execd"),
    ] {
        let from = guest.log().len();
        let channel = channel(process(&guest, process_name, None));
        assert!(say(&channel, format!("<27>{forged}\nnetd: \x1b[2J\rtwo\n\n").as_bytes()));
        assert!(say(&channel, format!("<27>{named}: own").as_bytes()));
        let name = if named == "netd" { "netd".to_owned() } else { format!("{named}: netd") };
        guest.wait_for_log(from, &format!("{named}: {forged}\n{name}:  [2J two\n{named}: own\n"));
        let log = guest.log();
        assert!(!log[from..].lines().any(|line| line.starts_with("init: the warden lied")), "{log}");
        witness.checks(process_name, true);
    }
    witness.ends();
}

#[test]
fn no_bytes_in_a_log_channel_harm_pid_1() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let netd = process(&guest, "netd", None);
    let channel = channel(netd);
    let null = fs::File::open("/dev/null").unwrap();
    let all: [&[u8]; 6] = [b"\n", b"\0", b"<27>", &[0xff; 700], &[b'\n'; 4096], "\u{202e}\u{9b}".as_bytes()];
    for (number, bytes) in all.into_iter().enumerate() {
        assert!(say(&channel, bytes));
        send_fds(&channel, bytes, &[null.as_fd(); 200].map(|fd: BorrowedFd<'_>| fd)).unwrap();
        let from = guest.log().len();
        assert!(say(&channel, format!("netd: after {number}").as_bytes()));
        guest.wait_for_log(from, &format!("netd: after {number}\n"));
        witness.checks("bytes", true);
    }
    // A long line has an end.
    let from = guest.log().len();
    assert!(say(&channel, &[b'x'; 50_000]));
    assert!(say(&channel, b"<27>netd: short"));
    guest.wait_for_log(from, "netd: short\n");
    let log = guest.log();
    let line = log[from..].lines().find(|line| line.starts_with("netd: xxx")).unwrap();
    assert!((800..=900).contains(&line.len()), "{line}");
    assert_eq!(process(&guest, "netd", None), netd);
    witness.ends();
}

/// Two seconds of as many lines as a process can write.
#[test]
fn a_flood_is_limited_and_counted_and_the_others_are_heard() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let flooded = channel(process(&guest, "netd", None));
    let other = channel(process(&guest, "mountd", None));
    let from = guest.log().len();
    let began = std::time::Instant::now();
    let over = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(std::sync::atomic::Ordering::Relaxed) {
                if !say(&flooded, b"<27>netd: flood") {
                    std::thread::yield_now();
                }
            }
        });
        guest.wait_for_log(from, "lines of netd's were dropped");
        for number in 0..20 {
            assert!(say(&other, format!("<27>mountd: beside {number}").as_bytes()));
            guest.wait_for_log(from, &format!("mountd: beside {number}\n"));
            witness.checks("in the flood", true);
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    answers(&guest, "netd");
    let seconds = usize::try_from(began.elapsed().as_secs()).unwrap() + 2;
    let lines = guest.log()[from..].matches("netd: flood\n").count();
    assert!(lines <= 512 * seconds, "{lines} lines in {seconds} s");
    // It is heard again when it is quiet.
    until(&guest, "it is not heard again", || {
        let _ = say(&flooded, b"<27>netd: quiet");
        guest.log().contains("netd: quiet\n").then_some(())
    });
    witness.ends();
}

/// PID 1 does not listen: whoever logs does not wait for it, and what it had still said is there when it is
/// dead.
#[test]
fn a_full_channel_holds_up_nobody_and_the_last_words_of_the_dead_are_heard() {
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let init = process(&guest, "init", None);
    for (round, long) in [("short", 0), ("long", 850)] {
        let from = guest.log().len();
        let netd = process(&guest, "netd", None);
        let channel = channel(netd);
        stop(&guest, init);
        let line = |number: usize| format!("<27>netd: {round} {}{number}\n", "x".repeat(long));
        let fits = (0..100_000).take_while(|&number| say(&channel, line(number).as_bytes())).count();
        assert!((50..1000).contains(&fits), "{fits}");
        drop(channel);
        kill_hard(netd);
        kill(Pid::from_raw(init), Signal::SIGCONT).unwrap();
        guest.wait_for_log(from, "netd is gone");
        let log = guest.log();
        let (said, _) = log[from..].split_once("init: netd is gone").unwrap();
        assert_eq!(said.matches(&format!("netd: {round} ")).count(), fits, "{log}");
        assert!(said.contains(&line(fits - 1)["<27>".len()..]));
        answers(&guest, "netd");
        witness.checks(round, true);
    }
    witness.ends();
}

/// streamd logs what it cannot take, and PID 1 does not listen.
#[test]
fn lines_that_a_full_channel_cost_are_counted() {
    const COST: usize = 5;
    let guest = Guest::with_pod(Kind::Local);
    let _main = guest.sleeper("main");
    let mut witness = Witness::new(&guest);
    let init = process(&guest, "init", None);
    let channel = channel(process(&guest, "streamd", None));
    let place = Place::take(&guest, "execd");
    let wrong = || send_fds(place.between.as_ref().unwrap(), &[7; 5], &[]).unwrap();
    let from = guest.log().len();
    stop(&guest, init);
    let fits = (0..).take_while(|number| say(&channel, format!("<27>filled {number}").as_bytes())).count();
    (0..COST).for_each(|_| wrong());
    // Before it moves what comes later it has taken them.
    (0..2).for_each(|_| witness.checks("PID 1 is stopped", true));
    kill(Pid::from_raw(init), Signal::SIGCONT).unwrap();
    guest.wait_for_log(from, &format!("streamd: filled {}\n", fits - 1));
    wrong();
    guest.wait_for_log(
        from,
        &format!("streamd: {COST} lines were lost: the log was full\nstreamd: hearing from"),
    );
    assert_eq!(guest.log()[from..].matches("streamd: hearing from execd").count(), 1);
    kill(Pid::from_raw(place.pid), Signal::SIGCONT).unwrap();
    answers(&guest, "execd");
    witness.ends();
}

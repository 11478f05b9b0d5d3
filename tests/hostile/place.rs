//! A helper's place: it is stopped, and the test speaks through the ends of its sockets.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use hyperinit::sys::fd::{receive_bytes, send_fds};
use hyperinit::wire::bootstrap::{
    FD_CONNECTION_IN, FD_CONNECTION_OUT, FD_OUTPUTS_IN, FD_OUTPUTS_OUT, FD_REQUESTS, FD_SOCKET,
};
use hyperinit::wire::channel;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{SockType, getsockopt, setsockopt, sockopt};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::guest::processes::process;
use super::guest::{Guest, PATIENCE};

/// What is used of a helper that is stopped.
pub struct Place {
    pub pid: i32,
    requests: OwnedFd,
    replies: OwnedFd,
    /// execd and streamd: the socket between them.
    pub between: Option<OwnedFd>,
}

/// The descriptor on which a helper's requests come; none while it works. streamd waits for more than
/// requests.
fn waits_on(name: &str, pid: i32) -> Option<i32> {
    let call = fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?;
    let mut words = call.split_ascii_whitespace();
    let number: i64 = words.next()?.parse().ok()?;
    let first = words.next()?.strip_prefix("0x")?;
    match name {
        "streamd" => EPOLL_WAIT.contains(&number).then_some(FD_REQUESTS),
        _ => (number == libc::SYS_recvmsg).then(|| i32::from_str_radix(first, 16).ok())?,
    }
}

#[cfg(target_arch = "x86_64")]
const EPOLL_WAIT: [i64; 2] = [libc::SYS_epoll_wait, libc::SYS_epoll_pwait];
#[cfg(not(target_arch = "x86_64"))]
const EPOLL_WAIT: [i64; 1] = [libc::SYS_epoll_pwait];

/// Waits for something that nothing tells.
pub fn until<T>(guest: &Guest, what: &str, look: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}\n{}", guest.log());
        std::thread::yield_now();
    }
}

impl Place {
    /// Waits until the process has nothing to do, and takes its place.
    pub fn take(guest: &Guest, name: &str) -> Place {
        let pid = process(guest, name, None);
        let requests = until(guest, "it has always something to do", || waits_on(name, pid));
        Place::stop(guest, name, pid, requests)
    }

    fn stop(guest: &Guest, name: &str, pid: i32, requests: i32) -> Place {
        kill(nix::unistd::Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
        until(guest, "it does not stop", || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.rsplit(") ").next().unwrap().starts_with('T').then_some(())
        });
        let pidfd = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
        let get = |number| pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()).unwrap();
        // Standard output and error are its log. The warden keeps its helpers' above.
        let others: &[i32] = match name {
            "streamd" => &[FD_SOCKET, FD_CONNECTION_IN, FD_CONNECTION_OUT],
            "execd" => &[FD_SOCKET, FD_OUTPUTS_IN, FD_OUTPUTS_OUT],
            _ => &[],
        };
        let socket = |number: i32| fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap();
        let mut numbers = sockets(pid);
        numbers.retain(|number| (3..64).contains(number) && !others.contains(number));
        // A helper may wait for the requests' by a duplicate.
        numbers.retain(|number| socket(*number) != socket(requests));
        let mut replies: Vec<OwnedFd> = numbers.into_iter().map(get).collect();
        replies.retain(|socket| getsockopt(socket, sockopt::SockType) == Ok(SockType::SeqPacket));
        let between = others.first().map(|&number| get(number));
        let [replies] = <[OwnedFd; 1]>::try_from(replies).unwrap_or_else(|all| panic!("{name}: {all:?}"));
        // A liar may be privileged, and send more at once than others.
        setsockopt(&replies, sockopt::SndBufForce, &(4 << 20)).unwrap();
        Place { pid, requests: get(requests), replies, between }
    }

    /// One packet to init. What the other end does not take is lost.
    pub fn say(&self, packet: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        send_fds(&self.replies, packet, fds)
    }

    /// Waits until there is room for more, or nobody listens.
    pub fn wait_to_say(&self) {
        let mut fds = [PollFd::new(self.replies.as_fd(), PollFlags::POLLOUT)];
        poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).unwrap();
    }

    /// The number of the next request.
    pub fn request(&self) -> u64 {
        let mut fds = [PollFd::new(self.requests.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).unwrap();
        assert!(ready > 0, "nothing is asked");
        let mut packet = vec![0; 256 << 10];
        let count = receive_bytes(&self.requests, &mut packet).unwrap();
        // Whatever is asked.
        channel::request::<()>(&packet[..count]).unwrap().id
    }
}

/// The numbers of a process's sockets.
pub fn sockets(pid: i32) -> Vec<i32> {
    let all = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    all.filter(|entry| {
        fs::read_link(entry.path()).is_ok_and(|link| link.to_string_lossy().starts_with("socket:"))
    })
    .map(|entry| entry.file_name().to_str().unwrap().parse().unwrap())
    .collect()
}

//! The eater: a process of a container that takes as much of one resource as it can. It takes until the
//! kernel refuses more or ends it, reports the result, and keeps what it has.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::mqueue::{MQ_OFlag, MqAttr, mq_open, mq_unlink};
use nix::pty::posix_openpt;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::EventFd;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigEvent, SigevNotify};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind,
    getsockname, sendmsg, sendto, socket, socketpair,
};
use nix::sys::stat::Mode;
use nix::sys::timer::Timer;
use nix::sys::timerfd::{ClockId, TimerFd, TimerFlags};
use nix::unistd::{Uid, getpid, pause, pipe2, setresuid, write};

/// The largest number of descriptors that one packet can carry (SCM_MAX_FD).
const FDS: usize = 253;
/// How many objects share one set, instance or file.
const TOGETHER: usize = 500;
/// Where to stop with a resource that only memory limits and that takes long: far above the kernel's default
/// limit for a user.
const MANY: usize = 20_000;
/// The pseudo error of a resource of which the eater has taken the number that it wanted.
const ENOUGH: Errno = Errno::UnknownErrno;

/// Takes as much of `what` as it can, says `full COUNT ERROR`, and stays.
pub fn eat(what: &str) -> ! {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    // When the pod's memory runs out, the kernel would first drop this program's own pages, and read them
    // again and again.
    if getrlimit(Resource::RLIMIT_MEMLOCK).unwrap().1 == RLIM_INFINITY {
        mlockall(MlockAllFlags::MCL_CURRENT).unwrap();
    }
    if let Ok(number) = std::env::var(crate::AS) {
        let user = Uid::from_raw(number.parse().unwrap());
        setresuid(user, user, user).unwrap();
    }
    // Nothing is ever given back: each function leaks what it makes.
    let (count, errno) = match what {
        "connections" => connections(),
        "epoll watches" => watches(),
        "in-flight descriptors" => in_flight(),
        "inodes" => until(|at| File::create(format!("/dev/shm/{at}")).map(drop).map_err(errno)),
        "inotify instances" => {
            until(|count| enough(count, MANY / 10, || Inotify::init(InitFlags::empty()).map(keep)))
        }
        "inotify watches" => inotify(),
        "locks" => locks(),
        "message queues" => until(message_queue),
        "netlink dumps" => until(|_| dump()),
        "netlink queues" => netlink(),
        "open files" => until(|_| File::open("/dev/null").map(keep).map_err(errno)),
        "pings" => pings(SockType::Datagram),
        "pipes" => until(|_| pipe()),
        "ptys" => until(|_| posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY).map(keep)),
        "raw sockets" => pings(SockType::Raw),
        "tcp queues" => tcp(),
        "timerfds" => until(|_| TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::empty()).map(keep)),
        "timers" => until(|_| {
            Timer::new(nix::time::ClockId::CLOCK_MONOTONIC, SigEvent::new(SigevNotify::SigevNone)).map(keep)
        }),
        "udp queues" => udp(),
        "unix queues" => until(|_| {
            let (one, other) = UnixStream::pair().map_err(errno)?;
            one.set_nonblocking(true).map_err(errno)?;
            fill(&mut &one)?;
            keep((one, other));
            Ok(())
        }),
        other => panic!("nobody knows how to take all {other}"),
    };
    let why = if errno == ENOUGH { "enough".to_owned() } else { format!("{errno:?}") };
    crate::say(&format!("full {count} {why}"));
    loop {
        pause();
    }
}

fn keep<T>(thing: T) {
    std::mem::forget(thing);
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap())
}

/// Calls `more` until it fails. Returns the count and the error.
fn until(mut more: impl FnMut(usize) -> Result<(), Errno>) -> (usize, Errno) {
    (0..).find_map(|count| more(count).err().map(|errno| (count, errno))).unwrap()
}

/// Calls `more` unless `most` are there already.
fn enough(count: usize, most: usize, more: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
    if count < most { more() } else { Err(ENOUGH) }
}

/// Writes until the kernel would block.
fn fill(to: &mut impl Write) -> Result<(), Errno> {
    let bytes = [0; 32 << 10];
    loop {
        match to.write(&bytes) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(errno(error)),
        }
    }
}

fn watches() -> (usize, Errno) {
    let events: Vec<_> = (0..TOGETHER).map(|_| EventFd::new().unwrap()).collect();
    let mut set = Epoll::new(EpollCreateFlags::empty()).unwrap();
    until(|count| {
        if count > 0 && count % TOGETHER == 0 {
            keep(std::mem::replace(&mut set, Epoll::new(EpollCreateFlags::empty())?));
        }
        set.add(&events[count % TOGETHER], EpollEvent::new(EpollFlags::EPOLLIN, 0))
    })
}

fn inotify() -> (usize, Errno) {
    let path = |at: usize| format!("/dev/shm/watched{at}");
    (0..TOGETHER).for_each(|at| drop(File::create(path(at)).unwrap()));
    let mut instance = Inotify::init(InitFlags::empty()).unwrap();
    until(|count| {
        if count > 0 && count % TOGETHER == 0 {
            keep(std::mem::replace(&mut instance, Inotify::init(InitFlags::empty())?));
        }
        let path = path(count % TOGETHER);
        enough(count, MANY, || instance.add_watch(path.as_str(), AddWatchFlags::IN_MODIFY).map(drop))
    })
}

/// Puts descriptors of this process's standard input in flight: they lie unread in sockets.
fn in_flight() -> (usize, Errno) {
    let input = std::io::stdin();
    let fds = [input.as_raw_fd(); FDS];
    let pair = || {
        socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC,
        )
    };
    let mut ends = pair().unwrap();
    let mut sent = 0;
    let errno = loop {
        let byte = [std::io::IoSlice::new(&[0])];
        let rights = [ControlMessage::ScmRights(&fds)];
        match sendmsg::<()>(ends.0.as_raw_fd(), &byte, &rights, MsgFlags::empty(), None) {
            Ok(_) => sent += FDS,
            Err(Errno::EAGAIN) => match pair() {
                Ok(pair) => keep(std::mem::replace(&mut ends, pair)),
                Err(errno) => break errno,
            },
            Err(errno) => break errno,
        }
    };
    keep(ends);
    (sent, errno)
}

/// Takes locks on single bytes. Few share a file, because the kernel searches a file's locks for each new
/// one.
fn locks() -> (usize, Errno) {
    let open = |at: usize| {
        let path = format!("/dev/shm/locked{at}");
        File::options().create(true).truncate(true).write(true).open(path).map_err(errno)
    };
    let mut file = open(0).unwrap();
    until(|count| {
        if count > 0 && count % TOGETHER == 0 {
            keep(std::mem::replace(&mut file, open(count)?));
        }
        let start = i64::try_from(2 * (TOGETHER - count % TOGETHER)).unwrap();
        let lock =
            libc::flock { l_type: libc::F_WRLCK as _, l_whence: 0, l_start: start, l_len: 1, l_pid: 0 };
        fcntl(&file, FcntlArg::F_SETLK(&lock)).map(drop)
    })
}

fn message_queue(at: usize) -> Result<(), Errno> {
    let name = format!("/eaten{}-{at}", getpid());
    let flags = MQ_OFlag::O_CREAT | MQ_OFlag::O_RDWR;
    let queue = mq_open(name.as_str(), flags, Mode::S_IRWXU, Some(&MqAttr::new(0, 10, 8192, 0)))?;
    mq_unlink(name.as_str())?;
    keep(queue);
    Ok(())
}

fn pipe() -> Result<(), Errno> {
    let (out, into) = pipe2(OFlag::O_NONBLOCK)?;
    while write(&into, &[0; 4096]).is_ok() {}
    keep((out, into));
    Ok(())
}

/// Sends messages from user to user into netlink sockets that nobody reads.
fn netlink() -> (usize, Errno) {
    let open = || {
        let protocol = SockProtocol::NetlinkUserSock;
        let socket = socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::SOCK_NONBLOCK, protocol)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok::<OwnedFd, Errno>(socket)
    };
    let sender = open().unwrap();
    until(|_| {
        let socket = open()?;
        let to: NetlinkAddr = getsockname(socket.as_raw_fd())?;
        queue(sender.as_fd(), &to)?;
        keep(socket);
        Ok(())
    })
}

/// Requests a list of links (RTM_GETLINK, NLM_F_REQUEST | NLM_F_DUMP) and does not read it.
fn dump() -> Result<(), Errno> {
    const GET_LINKS: [u8; 32] =
        [32, 0, 0, 0, 18, 0, 1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let protocol = SockProtocol::NetlinkRoute;
    let socket = socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::SOCK_NONBLOCK, protocol)?;
    sendto(socket.as_raw_fd(), &GET_LINKS, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    keep(socket);
    Ok(())
}

fn queue(sender: BorrowedFd<'_>, to: &NetlinkAddr) -> Result<(), Errno> {
    loop {
        match sendto(sender.as_raw_fd(), &[0; 16 << 10], to, MsgFlags::MSG_DONTWAIT) {
            Ok(_) => {}
            Err(Errno::EAGAIN) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
}

/// Sends pings and does not read the replies.
fn pings(kind: SockType) -> (usize, Errno) {
    // An ICMP echo request: type 8, code 0. The kernel computes the checksum for a ping socket; for a raw
    // socket this one is right, because all other bytes are zero.
    let mut packet = [0; 32 << 10];
    packet[..4].copy_from_slice(&[8, 0, 0xf7, 0xff]);
    until(|_| {
        let socket = socket(AddressFamily::Inet, kind, SockFlag::SOCK_NONBLOCK, SockProtocol::Icmp)?;
        let socket = UdpSocket::from(socket);
        for _ in 0..8 {
            match socket.send_to(&packet, (Ipv4Addr::LOCALHOST, 0)).map_err(errno) {
                Ok(_) | Err(Errno::EAGAIN | Errno::ENOBUFS) => {}
                Err(errno) => return Err(errno),
            }
        }
        keep(socket);
        Ok(())
    })
}

fn udp() -> (usize, Errno) {
    let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    until(|count| {
        enough(count, MANY / 10, || Ok(()))?;
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).map_err(errno)?;
        let to = socket.local_addr().map_err(errno)?;
        (0..8).try_for_each(|_| sender.send_to(&[0; 32 << 10], to).map(drop)).map_err(errno)?;
        keep(socket);
        Ok(())
    })
}

fn tcp() -> (usize, Errno) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    until(|_| {
        let stream = TcpStream::connect(address).map_err(errno)?;
        let (other, _) = listener.accept().map_err(errno)?;
        stream.set_nonblocking(true).map_err(errno)?;
        fill(&mut &stream)?;
        keep((stream, other));
        Ok(())
    })
}

/// Sends packets to so many ports that each is a tracked connection. The kernel evicts some to make room for
/// others.
fn connections() -> (usize, Errno) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    for port in (10_000..).take(MANY) {
        // Later sends fail because nobody listens on the ports.
        let _ = socket.send_to(&[0], (Ipv4Addr::LOCALHOST, port));
    }
    (MANY, ENOUGH)
}

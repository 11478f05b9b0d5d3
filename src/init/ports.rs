//! The two channels to the host, found or made at boot, because PID 1 can open nothing later.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open as open_fd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, VsockAddr, bind,
    listen as listen_on, recv, socket,
};
use nix::sys::stat::Mode;
use nix::sys::termios::{ControlFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::settings::{Settings, Transport};
use crate::fault::{Fault, OrFault};
use crate::port::Kind;

/// How long the host may take to plug the ports. A guest without ports is useless to its host.
const PLUG_TIMEOUT: Duration = Duration::from_secs(30);
/// Where the kernel lists virtio-serial ports, each with a `name`.
const VIRTIO_PORTS: &str = "/sys/class/virtio-ports";
const CONTROL: &str = "sh.hyper.channel.0";
const STREAM: &str = "sh.hyper.channel.1";
/// Where the kernel lists virtio devices. The file `device` has the kind, which the PCI ids of modern devices
/// do not tell.
const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";
/// The kind of a vsock device (virtio 1.2, section 5).
const VSOCK_DEVICE: &str = "0x0013";
/// The ports of vsock that the guest listens on (protocol.md «Channels»).
const VSOCK_CONTROL: u32 = 2718;
const VSOCK_STREAM: u32 = 2719;
/// How many connections may wait for the present one to end.
const WAITING: i32 = 8;
/// The serial lines; the first one is the console.
const LINES: [&str; 2] = ["/dev/ttyS1", "/dev/ttyS2"];
/// Xen's consoles; the first one is the guest's.
const CONSOLES: [&str; 2] = ["/dev/hvc1", "/dev/hvc2"];

/// The guest's end of one channel.
pub enum Port {
    /// An open virtio-serial port. It stays open while hosts come and go; EPOLLHUP reports that no host is
    /// there.
    Device(OwnedFd),
    /// A serial line or a console in raw mode. No event tells whether a host is at the other end.
    Line(OwnedFd),
    /// A listening unix socket. Hosts connect, and one is served at a time.
    Listener(OwnedFd),
    /// A listening vsock socket. Other peers than the host can connect too.
    Vsock(OwnedFd),
}

impl Port {
    /// How the port reports its hosts.
    pub fn kind(&self) -> Kind {
        match self {
            Port::Device(_) => Kind::Device,
            Port::Line(_) => Kind::Line,
            Port::Listener(_) | Port::Vsock(_) => Kind::Socket,
        }
    }

    /// The descriptor's number.
    pub fn number(&self) -> RawFd {
        match self {
            Port::Device(fd) | Port::Line(fd) | Port::Listener(fd) | Port::Vsock(fd) => fd.as_raw_fd(),
        }
    }
}

/// Both channels.
pub struct Ports {
    /// Commands and replies, for PID 1.
    pub control: Port,
    /// The input and output of processes, for streamd.
    pub stream: Port,
}

/// Opens both channels over the transport that the settings or the devices name.
pub fn open(settings: &Settings) -> Result<Ports, Fault> {
    if let Some(local) = &settings.local {
        return Ok(Ports { control: listen(&local.ctl)?, stream: listen(&local.stream)? });
    }
    match settings.transport {
        Transport::Virtio => match wait_for("a vsock device or both virtio-serial ports", find_virtio)? {
            Virtio::Vsock => Ok(Ports { control: vsock(VSOCK_CONTROL)?, stream: vsock(VSOCK_STREAM)? }),
            Virtio::Serial(control, stream) => {
                Ok(Ports { control: device(&control)?, stream: device(&stream)? })
            }
        },
        Transport::Serial => lines(LINES),
        Transport::Xen => lines(CONSOLES),
    }
}

/// Opens what was found. A host that plugs a vsock device wants vsock, even if it plugs the ports too.
enum Virtio {
    Vsock,
    Serial(PathBuf, PathBuf),
}

fn find_virtio() -> Option<Virtio> {
    if has_vsock(Path::new(VIRTIO_DEVICES)) {
        return Some(Virtio::Vsock);
    }
    let port = |name| find(Path::new(VIRTIO_PORTS), Path::new("/dev"), name);
    Some(Virtio::Serial(port(CONTROL)?, port(STREAM)?))
}

/// Whether the virtio bus has a vsock device.
fn has_vsock(devices: &Path) -> bool {
    let Ok(entries) = std::fs::read_dir(devices) else { return false };
    let kind = |entry: std::fs::DirEntry| std::fs::read_to_string(entry.path().join("device"));
    entries.flatten().any(|entry| kind(entry).is_ok_and(|kind| kind.trim_end() == VSOCK_DEVICE))
}

fn vsock(port: u32) -> Result<Port, Fault> {
    let name = format!("vsock port {port}");
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener =
        socket(AddressFamily::Vsock, SockType::Stream, flags, None).fault("opening a socket for", &name)?;
    let address = VsockAddr::new(nix::libc::VMADDR_CID_ANY, port);
    bind(listener.as_raw_fd(), &address).fault("binding", &name)?;
    let waiting = Backlog::new(WAITING).fault("listening on", &name)?;
    listen_on(&listener, waiting).fault("listening on", &name)?;
    Ok(Port::Vsock(listener))
}

fn lines(paths: [&str; 2]) -> Result<Ports, Fault> {
    let all = || paths.iter().all(|path| Path::new(path).exists()).then_some(());
    wait_for(&paths.join(" and "), all)?;
    let [control, stream] = paths;
    Ok(Ports { control: line(control)?, stream: line(stream)? })
}

fn line(path: &str) -> Result<Port, Fault> {
    let fd = open_device(Path::new(path))?;
    let mut settings = tcgetattr(&fd).fault("asking for the settings of", path)?;
    make_raw(&mut settings);
    tcsetattr(&fd, SetArg::TCSANOW, &settings).fault("setting up", path)?;
    Ok(Port::Line(fd))
}

/// Makes the line pass bytes unchanged, at 115200 baud with eight bits. The other end may stop the flow
/// (CRTSCTS), and its absence means nothing (CLOCAL).
fn make_raw(settings: &mut Termios) {
    // cfsetspeed(3) is missing: its name for dynamic programs is not in the static C library.
    const SPEED: ControlFlags = ControlFlags::from_bits_retain(nix::libc::B115200);
    cfmakeraw(settings);
    settings.control_flags = settings.control_flags.difference(ControlFlags::CBAUD).union(SPEED);
    settings.control_flags |= ControlFlags::CLOCAL | ControlFlags::CREAD | ControlFlags::CRTSCTS;
}

fn listen(path: &Path) -> Result<Port, Fault> {
    // An earlier guest may have left its socket behind.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).fault("listening on", path.display())?;
    listener.set_nonblocking(true).fault("listening on", path.display())?;
    Ok(Port::Listener(OwnedFd::from(listener)))
}

fn device(path: &Path) -> Result<Port, Fault> {
    Ok(Port::Device(open_device(path)?))
}

fn open_device(path: &Path) -> Result<OwnedFd, Fault> {
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    open_fd(path, flags, Mode::empty()).fault("opening", path.display())
}

/// Looks until something is found. Between two looks it sleeps until the kernel announces a device.
fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T, Fault> {
    let events = uevents()?;
    let deadline = Instant::now() + PLUG_TIMEOUT;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Fault::new("waiting for", what, "the host has not plugged it"));
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut poll_fd = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        poll(&mut poll_fd, timeout).fault("waiting for", "a device")?;
        drain(&events);
    }
}

/// The kernel's announcements of devices (netlink(7), NETLINK_KOBJECT_UEVENT). Their text is not read.
fn uevents() -> Result<OwnedFd, Fault> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let events =
        socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkKObjectUEvent)
            .fault("opening", "the uevent socket")?;
    // Group 1: the kernel itself.
    bind(events.as_raw_fd(), &NetlinkAddr::new(0, 1)).fault("binding", "the uevent socket")?;
    Ok(events)
}

fn drain(events: &OwnedFd) {
    let mut buffer = [0; 4096];
    loop {
        match recv(events.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            // ENOBUFS: announcements were dropped. The next look finds the devices all the same.
            Ok(_) | Err(Errno::ENOBUFS) => {}
            Err(_) => return,
        }
    }
}

/// The device of the port called `name`, once both the port and its device node are there.
fn find(ports: &Path, dev: &Path, name: &str) -> Option<PathBuf> {
    for entry in std::fs::read_dir(ports).ok()?.flatten() {
        let named = std::fs::read_to_string(entry.path().join("name"));
        let node = dev.join(entry.file_name());
        if named.is_ok_and(|named| named.trim_end() == name) && node.exists() {
            return Some(node);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vsock_is_a_kind_of_virtio_device() {
        let root = std::env::temp_dir().join(format!("vsock-{}", std::process::id()));
        assert!(!has_vsock(&root));
        for (device, kind, there) in [("virtio0", "0x0003", false), ("virtio1", "0x0013", true)] {
            std::fs::create_dir_all(root.join(device)).unwrap();
            std::fs::write(root.join(device).join("device"), format!("{kind}\n")).unwrap();
            assert_eq!(has_vsock(&root), there, "{device}");
        }
        std::fs::remove_dir_all(root).unwrap();
    }

    #[test]
    fn a_line_changes_no_byte() {
        let pty = nix::pty::openpty(None, None).unwrap();
        let path = nix::unistd::ttyname(&pty.slave).unwrap();
        let Port::Line(fd) = line(path.to_str().unwrap()).unwrap() else { panic!("not a line") };
        let bytes: Vec<u8> = (0..=255).collect();
        let mut got = [0; 256];
        // Bytes pass in both directions, and the other end gets no echo.
        assert_eq!(nix::unistd::write(&pty.master, &bytes), Ok(256));
        assert_eq!(nix::unistd::read(&fd, &mut got), Ok(256));
        assert_eq!(got[..], bytes);
        assert_eq!(nix::unistd::write(&fd, &bytes), Ok(256));
        assert_eq!(nix::unistd::read(&pty.master, &mut got), Ok(256));
        assert_eq!(got[..], bytes);
        let settings = tcgetattr(&fd).unwrap();
        let flags = ControlFlags::CLOCAL | ControlFlags::CREAD | ControlFlags::CRTSCTS;
        assert!(settings.control_flags.contains(flags), "{settings:?}");
        assert_eq!((settings.control_flags & ControlFlags::CBAUD).bits(), nix::libc::B115200);
    }

    #[test]
    fn a_port_is_found_by_its_name() {
        let root = std::env::temp_dir().join(format!("ports-{}", std::process::id()));
        let (ports, dev) = (root.join("ports"), root.join("dev"));
        for (port, name) in [("vport1p1", "org.qemu.agent"), ("vport1p2", CONTROL), ("vport1p3", STREAM)] {
            std::fs::create_dir_all(ports.join(port)).unwrap();
            std::fs::write(ports.join(port).join("name"), format!("{name}\n")).unwrap();
        }
        std::fs::create_dir_all(&dev).unwrap();
        std::fs::write(dev.join("vport1p2"), "").unwrap();
        assert_eq!(find(&ports, &dev, CONTROL), Some(dev.join("vport1p2")));
        assert_eq!(find(&ports, &dev, STREAM), None, "its node is not there yet");
        assert_eq!(find(&root.join("nothing"), &dev, STREAM), None);
        std::fs::remove_dir_all(root).unwrap();
    }
}

//! The two channels to the host, found or made at boot: later PID 1 can open nothing.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open as open_fd};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use nix::sys::stat::Mode;

use super::settings::Settings;
use crate::fault::{Fault, OrFault};

/// How long the host may take to plug the ports; a guest without them is of no use to it.
const PLUG_TIMEOUT: Duration = Duration::from_secs(30);
/// Where the kernel lists virtio-serial ports, each with a `name`.
const VIRTIO_PORTS: &str = "/sys/class/virtio-ports";
const CONTROL: &str = "sh.hyper.channel.0";
const STREAM: &str = "sh.hyper.channel.1";

/// One end towards the host.
pub enum Port {
    /// An open device: it stays, the host comes and goes.
    Device(OwnedFd),
    /// A listening socket: the host connects, once at a time.
    Listener(OwnedFd),
}

impl Port {
    /// The descriptor's number.
    pub fn number(&self) -> RawFd {
        match self {
            Port::Device(fd) | Port::Listener(fd) => fd.as_raw_fd(),
        }
    }
}

/// Both channels.
pub struct Ports {
    /// Commands and replies, for PID 1.
    pub control: Port,
    /// The processes' bytes, for streamd.
    pub stream: Port,
}

/// Opens both channels by the transport that the settings or the devices name.
pub fn open(settings: &Settings) -> Result<Ports, Fault> {
    if let Some(local) = &settings.local {
        return Ok(Ports { control: listen(&local.ctl)?, stream: listen(&local.stream)? });
    }
    let (control, stream) = wait_for_virtio()?;
    Ok(Ports { control: device(&control)?, stream: device(&stream)? })
}

fn listen(path: &Path) -> Result<Port, Fault> {
    // What an earlier guest left behind: a socket that nobody listens on.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).fault("listening on", path.display())?;
    listener.set_nonblocking(true).fault("listening on", path.display())?;
    Ok(Port::Listener(OwnedFd::from(listener)))
}

fn device(path: &Path) -> Result<Port, Fault> {
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    Ok(Port::Device(open_fd(path, flags, Mode::empty()).fault("opening", path.display())?))
}

/// Looks the ports up by name; between two looks it sleeps until the kernel announces a device.
fn wait_for_virtio() -> Result<(PathBuf, PathBuf), Fault> {
    let events = uevents()?;
    let deadline = Instant::now() + PLUG_TIMEOUT;
    loop {
        let found = |name| find(Path::new(VIRTIO_PORTS), Path::new("/dev"), name);
        if let (Some(control), Some(stream)) = (found(CONTROL), found(STREAM)) {
            return Ok((control, stream));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let why = format!("no virtio-serial port of that name in {VIRTIO_PORTS}");
            return Err(Fault::new("waiting for", format!("{CONTROL} and {STREAM}"), why));
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        let mut poll_fd = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        poll(&mut poll_fd, timeout).fault("waiting for", "a device")?;
        drain(&events);
    }
}

/// The kernel's announcements of devices (netlink(7), NETLINK_KOBJECT_UEVENT); their text is not read.
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
            // ENOBUFS: announcements were dropped; the next look sees what they said.
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

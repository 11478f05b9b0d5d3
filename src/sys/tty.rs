//! Terminals: the ioctls of ptys (ioctl_tty(2), pts(4)).

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// Unlocks the other end of a pty master and opens it by descriptor, so that no path in a container is looked
/// up.
pub fn open_peer(master: impl AsFd) -> Result<OwnedFd, Errno> {
    let master = master.as_fd().as_raw_fd();
    let unlock: libc::c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int, which outlives the call.
    Errno::result(unsafe { libc::ioctl(master, libc::TIOCSPTLCK, &raw const unlock) })?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes flags by value.
    let number: RawFd = Errno::result(unsafe { libc::ioctl(master, libc::TIOCGPTPEER, flags) })?;
    // SAFETY: the kernel has just made this descriptor, and nothing else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Makes the tty the controlling terminal of the calling session's leader.
pub fn make_controlling(tty: impl AsFd) -> Result<(), Errno> {
    // SAFETY: TIOCSCTTY takes a flag by value.
    Errno::result(unsafe { libc::ioctl(tty.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// The terminal's size in characters: rows, columns. ENOTTY if it is not a terminal.
pub fn size(tty: impl AsFd) -> Result<(u16, u16), Errno> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ writes one winsize, which outlives the call.
    Errno::result(unsafe { libc::ioctl(tty.as_fd().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) })?;
    Ok((size.ws_row, size.ws_col))
}

/// Sets the size in characters; the foreground process group gets SIGWINCH.
pub fn set_size(tty: impl AsFd, rows: u16, columns: u16) -> Result<(), Errno> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which outlives the call.
    Errno::result(unsafe { libc::ioctl(tty.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) })
        .map(drop)
}

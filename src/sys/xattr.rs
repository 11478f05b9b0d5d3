//! Extended attributes by descriptor (xattr(7)); nix does not wrap them.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd};
use std::ptr;

use nix::errno::Errno;

/// The kernel's maximum in bytes, for the list of names and for a value (linux/limits.h: XATTR_LIST_MAX,
/// XATTR_SIZE_MAX).
const MAX: usize = 64 << 10;

/// The names of a file's attributes.
pub fn list(file: impl AsFd) -> Result<Vec<CString>, Errno> {
    let mut bytes = vec![0u8; MAX];
    // SAFETY: the kernel writes at most as many bytes as it is told that `bytes` has.
    let size = unsafe { libc::flistxattr(file.as_fd().as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
    bytes.truncate(length(size)?);
    let names = bytes.split(|&byte| byte == 0).filter(|name| !name.is_empty());
    Ok(names.filter_map(|name| CString::new(name).ok()).collect())
}

/// An attribute's value.
pub fn get(file: impl AsFd, name: &CStr) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0u8; MAX];
    // SAFETY: `name` is a string; the kernel writes at most as many bytes as it is told that `bytes` has.
    let size = unsafe {
        libc::fgetxattr(file.as_fd().as_raw_fd(), name.as_ptr(), bytes.as_mut_ptr().cast(), bytes.len())
    };
    bytes.truncate(length(size)?);
    Ok(bytes)
}

/// Sets an attribute.
pub fn set(file: impl AsFd, name: &CStr, value: &[u8]) -> Result<(), Errno> {
    let value_at = if value.is_empty() { ptr::null() } else { value.as_ptr().cast() };
    // SAFETY: `name` is a string, and `value` has the bytes that the kernel is told to read.
    let result =
        unsafe { libc::fsetxattr(file.as_fd().as_raw_fd(), name.as_ptr(), value_at, value.len(), 0) };
    Errno::result(result).map(drop)
}

fn length(size: isize) -> Result<usize, Errno> {
    usize::try_from(size).map_err(|_| Errno::last())
}

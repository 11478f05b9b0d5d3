//! One page of a file, shared with every process that maps it: numbers that outlive a process.

use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The size of the mapping in bytes; the kernel's page may be larger.
pub const PAGE: usize = 4096;
/// How many numbers the page holds.
pub const SLOTS: usize = PAGE / size_of::<u64>();

/// A mapping of the first page of a file.
pub struct Page {
    at: NonNull<[AtomicU64; SLOTS]>,
}

impl Page {
    /// Maps the page. The file must be a memfd of at least one page that is never made shorter: access to a
    /// number beyond its end would kill the process with SIGBUS.
    pub fn map(file: impl AsFd) -> Result<Page, Errno> {
        let length = NonZeroUsize::new(PAGE).ok_or(Errno::EINVAL)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of this program.
        let at = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Page { at: at.cast() })
    }

    /// The number in a slot; 0 in a new file, and for a slot that does not exist.
    pub fn get(&self, slot: usize) -> u64 {
        self.slots().get(slot).map_or(0, |slot| slot.load(Ordering::Acquire))
    }

    /// Sets the number in a slot. A process that reads it also sees everything that was set before.
    pub fn set(&self, slot: usize, value: u64) {
        if let Some(slot) = self.slots().get(slot) {
            slot.store(value, Ordering::Release);
        }
    }

    fn slots(&self) -> &[AtomicU64; SLOTS] {
        // SAFETY: the mapping is PAGE bytes, page-aligned, and lives as long as `self`; atomics may be shared
        // with other processes, and every bit pattern is a valid number.
        unsafe { self.at.as_ref() }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: `at` is this mapping's start, and no reference into it outlives `self`.
        let _ = unsafe { munmap(self.at.cast(), PAGE) };
    }
}

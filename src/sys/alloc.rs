//! PID 1's allocator: a helper's lie about a size must not make PID 1 ask for it.
//!
//! ipc-channel allocates what a packet's header says (up to 2^64) before a byte of it has come, and Rust aborts when an
//! allocation fails. So a thread that reads from a helper is marked, and a marked thread that asks for more than any
//! honest message needs is never answered: it sleeps for good, its helper misses its deadline, and init ends the helper.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// More than ipc-channel needs for any honest reply: one packet of the socket's send buffer (208 kB by default) and
/// the values decoded from it.
pub const READER_MAX: usize = 4 << 20;

thread_local! {
    static READER: Cell<bool> = const { Cell::new(false) };
}

/// Marks the calling thread as one that reads from a helper: from now on no allocation of it passes [`READER_MAX`].
pub fn mark_reader() {
    READER.with(|reader| reader.set(true));
}

/// The system's allocator with the cap for marked threads.
pub struct Capped;

impl Capped {
    /// Does not return when a marked thread asks for too much.
    fn check(size: usize) {
        if size > READER_MAX && READER.try_with(Cell::get).unwrap_or(false) {
            loop {
                // SAFETY: no descriptor is named, so nothing is read or written; it sleeps until a signal.
                unsafe { libc::poll(std::ptr::null_mut(), 0, -1) };
            }
        }
    }
}

// SAFETY: every call goes to `System` with the caller's own arguments; `check` before it neither allocates nor unwinds.
unsafe impl GlobalAlloc for Capped {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Capped::check(layout.size());
        // SAFETY: the caller's contract is passed on unchanged.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Capped::check(layout.size());
        // SAFETY: the caller's contract is passed on unchanged.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: `at` came from `System`, as every allocation of this allocator does.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Capped::check(size);
        // SAFETY: `at` came from `System`, as every allocation of this allocator does.
        unsafe { System.realloc(at, layout, size) }
    }
}

//! Memory for a process of the guest when the kernel has none to give.
//!
//! Rust ends a process whose allocation fails, and PID 1 must not end. The kernel refuses memory where it
//! counts what it has promised (vm.overcommit_memory=2) and a container has taken all of that, and where the
//! address space has a limit. So every process sets a range of addresses aside when it starts, which costs
//! nothing: the kernel does not count it (MAP_NORESERVE), and its pages are there only when they are written
//! to. The C library's allocator is asked first; what it cannot give comes from here.
//!
//! The range cannot be used up by what a process is allowed to hold (docs/limits.md). There is a region for
//! each power of two. A block is rounded up to one, comes from its region and goes back to it, so that
//! nothing is split and nothing has to be put together again, and a region is used up only by so much in
//! blocks of this one size, at one time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous};

/// The smallest block is of 2^4 bytes: it holds the address of the next one, and is aligned as the C
/// library's are.
const LEAST: usize = 4;
/// The largest is of 2^26: a frame of 16 MiB, in a vector that has grown to twice that, and to spare.
const MOST: usize = 26;
/// How many sizes there are.
const SIZES: usize = MOST - LEAST + 1;
/// A region: more than sixteen frames' worth of blocks of one size.
const REGION: usize = 1 << 29;
/// All of them.
const RANGE: usize = SIZES * REGION;
/// The least page of a kernel; nothing is aligned to more.
const PAGE: usize = 4096;
/// The pages of a freed block of at least this size go back to the kernel.
const GIVEN_BACK: usize = 1 << 16;
/// How much stack PID 1 has for good. A test of command.rs parses the deepest of commands with less.
const STACK: usize = 512 << 10;

/// The allocator of a program: `#[global_allocator]`.
pub struct Heap;

/// Where the range begins; 0 while there is none.
static START: AtomicUsize = AtomicUsize::new(0);
static RESERVE: Mutex<Reserve> = Mutex::new(Reserve { start: 0, regions: [EMPTY; SIZES] });

/// Sets the range aside. Fails where the kernel counts it after all: it was told so before this process
/// began.
pub fn reserve() -> Result<(), Errno> {
    // One arena is enough for a thread, and when memory is short there is nothing to make another of. What is
    // large is mapped, and the kernel's again when it is freed: of itself the C library takes one large block
    // for a habit, and keeps up to 64 MiB. Large is what no start of a process needs. On the heap it would
    // stay below small blocks that came later.
    #[cfg(target_env = "gnu")]
    tune(&[
        (libc::M_ARENA_MAX, 1),
        (libc::M_MMAP_THRESHOLD, 24 << 10),
        (libc::M_TRIM_THRESHOLD, 64 << 10),
        (libc::M_TOP_PAD, 32 << 10),
    ]);
    if START.load(Ordering::Relaxed) == 0 {
        let reserve = Reserve::map()?;
        START.store(reserve.start, Ordering::Relaxed);
        *lock() = reserve;
    }
    Ok(())
}

/// For who receives by ipc-channel: it takes 208 KiB for each message (a socket's buffer, wmem_default), and
/// to map and unmap them costs more than the message.
pub fn keep_messages() {
    #[cfg(target_env = "gnu")]
    tune(&[
        (libc::M_MMAP_THRESHOLD, 256 << 10),
        (libc::M_TRIM_THRESHOLD, 512 << 10),
        (libc::M_TOP_PAD, 128 << 10),
    ]);
}

/// Sets numbers of the C library's.
#[cfg(target_env = "gnu")]
fn tune(numbers: &[(libc::c_int, libc::c_int)]) {
    for &(what, value) in numbers {
        // SAFETY: sets a number of the C library's, which may be set at any time.
        unsafe { libc::mallopt(what, value) };
    }
}

/// Has the kernel give this thread the stack that PID 1 may need: later it may refuse to, which is a SIGSEGV.
#[inline(never)]
pub fn deepen_stack() {
    let mut room = [const { MaybeUninit::<u8>::uninit() }; STACK];
    let room = black_box(&mut room);
    // The compiler has touched each page. They need not be kept, only the kernel's promise.
    let start = room.as_mut_ptr();
    let skipped = start.align_offset(PAGE);
    let length = (STACK - skipped) / PAGE * PAGE;
    if let Some(inner) = NonNull::new(start.wrapping_add(skipped)) {
        // SAFETY: whole pages inside of `room`, which has no contents to lose.
        let _ = unsafe { madvise(inner.cast(), length, MmapAdvise::MADV_DONTNEED) };
    }
}

fn lock() -> MutexGuard<'static, Reserve> {
    // Nothing in here panics.
    RESERVE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_reserved(block: *mut u8) -> bool {
    let start = START.load(Ordering::Relaxed);
    start != 0 && block.addr().wrapping_sub(start) < RANGE
}

fn from_reserve(layout: Layout) -> *mut u8 {
    if START.load(Ordering::Relaxed) == 0 { ptr::null_mut() } else { lock().take(layout) }
}

// SAFETY: a block is the C library's or the reserve's; which of them is told by its address, so it goes back
// to where it came from. Both give blocks of at least the layout's size and alignment that nobody else has,
// and neither panics.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is the one that is asked for.
        let block = unsafe { System.alloc(layout) };
        if block.is_null() { from_reserve(layout) } else { block }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is the one that is asked for.
        let block = unsafe { System.alloc_zeroed(layout) };
        if !block.is_null() {
            return block;
        }
        let block = from_reserve(layout);
        if !block.is_null() {
            // SAFETY: the block has that many bytes, and is the caller's.
            unsafe { block.write_bytes(0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if is_reserved(block) {
            return lock().put(block, layout);
        }
        // SAFETY: it did not come from the reserve, so it is the C library's, with this layout.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that the size, rounded up to the alignment, does not overflow.
        let wanted = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        let moved = if !is_reserved(block) {
            // SAFETY: the block is the C library's, with this layout.
            let moved = unsafe { System.realloc(block, layout, size) };
            if !moved.is_null() {
                return moved;
            }
            from_reserve(wanted)
        } else if class(layout) == class(wanted) {
            return block;
        } else {
            // SAFETY: the caller promises that the size is not zero.
            unsafe { self.alloc(wanted) }
        };
        if !moved.is_null() {
            // SAFETY: two blocks, each of at least that many bytes; a new one is no part of the old one. The
            // old one is the caller's, who gives it away.
            unsafe {
                ptr::copy_nonoverlapping(block, moved, layout.size().min(size));
                self.dealloc(block, layout);
            }
        }
        moved
    }
}

/// Which size a block has; none if no region has so large ones.
fn class(layout: Layout) -> Option<usize> {
    let size = layout.size().max(layout.align()).max(1 << LEAST).checked_next_power_of_two()?;
    let exponent = size.trailing_zeros() as usize;
    (layout.align() <= PAGE && exponent <= MOST).then_some(exponent - LEAST)
}

/// The blocks of one size.
#[derive(Clone, Copy)]
struct Region {
    /// The address of one that is free, which begins with the address of the next; 0 at the end.
    free: usize,
    /// How much of the region is in use or free: what is behind has not been touched.
    used: usize,
    /// How many blocks are in use.
    live: usize,
}

/// As it is at first, and again when nothing of it is in use.
const EMPTY: Region = Region { free: 0, used: 0, live: 0 };

/// The range.
struct Reserve {
    start: usize,
    regions: [Region; SIZES],
}

impl Reserve {
    fn map() -> Result<Reserve, Errno> {
        let length = NonZeroUsize::new(RANGE).ok_or(Errno::EINVAL)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of this program.
        let range = unsafe { mmap_anonymous(None, length, access, flags) }?;
        // A page when a page is asked for. Not every kernel has larger ones.
        // SAFETY: the mapping of a line before; nobody has it yet.
        let _ = unsafe { madvise(range, RANGE, MmapAdvise::MADV_NOHUGEPAGE) };
        let start = range.as_ptr().expose_provenance();
        Ok(Reserve { start, regions: [EMPTY; SIZES] })
    }

    /// A block for the layout; null if there is none.
    fn take(&mut self, layout: Layout) -> *mut u8 {
        let Some(class) = class(layout) else { return ptr::null_mut() };
        let Some(region) = self.regions.get_mut(class) else { return ptr::null_mut() };
        if region.free != 0 {
            let block = ptr::with_exposed_provenance_mut::<u8>(region.free);
            // SAFETY: a free block of the range, aligned to its size, that `put` has begun with a word.
            region.free = unsafe { block.cast::<usize>().read() };
            region.live += 1;
            return block;
        }
        let size = 1 << (class + LEAST);
        if region.used + size > REGION {
            return ptr::null_mut();
        }
        let block = self.start + class * REGION + region.used;
        region.used += size;
        region.live += 1;
        ptr::with_exposed_provenance_mut(block)
    }

    /// Takes a block back that [`Reserve::take`] gave for this layout.
    fn put(&mut self, block: *mut u8, layout: Layout) {
        let Some(class) = class(layout) else { return };
        let Some(region) = self.regions.get_mut(class) else { return };
        let size = 1 << (class + LEAST);
        region.live = region.live.saturating_sub(1);
        if region.live == 0 {
            let used = region.used;
            *region = EMPTY;
            return give_back(self.start + class * REGION, used);
        }
        // SAFETY: the block is of at least 16 bytes, aligned to its size, and nobody's any more.
        unsafe { block.cast::<usize>().write(region.free) };
        region.free = block.expose_provenance();
        if size >= GIVEN_BACK {
            // The first page stays, with the word.
            give_back(region.free + PAGE, size - PAGE);
        }
    }
}

/// Gives pages back to the kernel: what is in them is nobody's.
fn give_back(start: usize, length: usize) {
    if let Some(pages) = NonNull::new(ptr::with_exposed_provenance_mut(start)) {
        // SAFETY: only `put` calls this, with pages of the range in which no block is in use, and no word of
        // a free one.
        let _ = unsafe { madvise(pages, length, MmapAdvise::MADV_DONTNEED) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 1).unwrap()
    }

    /// How much of the range is in memory.
    fn resident(reserve: &Reserve) -> usize {
        let mut pages = vec![0u8; RANGE / PAGE];
        let range = ptr::with_exposed_provenance_mut(reserve.start);
        // SAFETY: the range is mapped, and there is a byte for each of its pages.
        assert_eq!(unsafe { libc::mincore(range, RANGE, pages.as_mut_ptr()) }, 0);
        pages.iter().filter(|page| *page & 1 != 0).count() * PAGE
    }

    #[test]
    fn blocks_are_of_their_size_apart_and_used_again() {
        let mut reserve = Reserve::map().unwrap();
        assert_eq!(resident(&reserve), 0, "it costs nothing");
        let mut blocks = Vec::new();
        let mut once = 0;
        for round in 0..3 {
            for size in (1..200).chain([4096, 5000, 1 << 16, 1 << 20, (16 << 20) + 8, 64 << 20]) {
                for align in [1, 8, 64, 4096] {
                    let layout = Layout::from_size_align(size, align).unwrap();
                    let block = reserve.take(layout);
                    assert!(!block.is_null() && block.addr().is_multiple_of(align), "{layout:?}");
                    blocks.push((block, layout));
                }
            }
            let mut ends: Vec<_> = blocks.iter().map(|(at, layout)| (at.addr(), layout.size())).collect();
            ends.sort_unstable();
            assert!(ends.is_sorted_by(|(at, size), (next, _)| at + size <= *next), "they overlap");
            let used: usize = reserve.regions.iter().map(|region| region.used).sum();
            // One of each size stays, so that the others are kept for later.
            if round == 0 {
                let kept = (0..SIZES).map(|class| layout(1 << (class + LEAST)));
                assert!(kept.map(|layout| reserve.take(layout)).all(|block| !block.is_null()));
            }
            blocks.drain(..).for_each(|(block, layout)| reserve.put(block, layout));
            let now: usize = reserve.regions.iter().map(|region| region.used).sum();
            once = if round == 0 { now } else { once };
            assert!(round == 0 || (used, now) == (once, once), "what was freed is not used again");
        }
    }

    #[test]
    fn what_is_freed_is_the_kernels_again() {
        let mut reserve = Reserve::map().unwrap();
        let blocks: Vec<_> = (0..4)
            .map(|_| {
                let block = reserve.take(layout(16 << 20));
                // SAFETY: a block of that size, which nobody else has.
                unsafe { block.write_bytes(7, 16 << 20) };
                block
            })
            .collect();
        assert_eq!(resident(&reserve), 64 << 20);
        blocks[1..].iter().for_each(|block| reserve.put(*block, layout(16 << 20)));
        assert_eq!(resident(&reserve), (16 << 20) + 3 * PAGE);
        reserve.put(blocks[0], layout(16 << 20));
        let small: Vec<_> = (0..10_000).map(|_| reserve.take(layout(50))).collect();
        // SAFETY: blocks of that size, which nobody else has.
        small.iter().for_each(|block| unsafe { block.write_bytes(7, 50) });
        assert!(resident(&reserve) >= 10_000 * 50);
        small.into_iter().for_each(|block| reserve.put(block, layout(50)));
        assert_eq!(resident(&reserve), 0);
    }

    #[test]
    fn a_region_has_an_end_and_so_has_a_block() {
        let mut reserve = Reserve::map().unwrap();
        let blocks: Vec<_> = std::iter::repeat_with(|| reserve.take(layout(1 << MOST)))
            .take_while(|block| !block.is_null())
            .collect();
        assert_eq!(blocks.len(), REGION >> MOST);
        assert!(!reserve.take(layout(1 << 20)).is_null(), "the others are not used up");
        assert!(reserve.take(layout((1 << MOST) + 1)).is_null());
        assert!(reserve.take(Layout::from_size_align(1, 2 * PAGE).unwrap()).is_null());
        reserve.put(blocks[3], layout(1 << MOST));
        assert_eq!(reserve.take(layout(1 << MOST)), blocks[3]);
    }
}

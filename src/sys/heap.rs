//! Memory for a process of the guest when the kernel refuses more.
//!
//! Rust ends a process whose allocation fails, and PID 1 must not end. The kernel refuses memory where it
//! accounts for every promise (vm.overcommit_memory=2) and a container has taken all of it, and where the
//! address space is limited. So every process reserves a range of addresses when it starts. The range costs
//! nothing: the kernel does not account for it (MAP_NORESERVE), and a page exists only after a write to it.
//! Allocations go to the C library first and come from the range only if the C library fails.
//!
//! What a process is allowed to hold (docs/limits.md) cannot exhaust the range. It has a region for each
//! power of two. A block is rounded up to a power of two, comes from that region and returns to it. So blocks
//! are never split or merged, and a region is exhausted only if that many blocks of its size are in use at
//! one time.

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous};

/// The smallest block has 2^4 bytes: enough for the address of the next free block and for the alignment of
/// the C library's blocks.
const LEAST: usize = 4;
/// The largest block has 2^26 bytes. A frame of 16 MiB needs half of that, in a vector that has grown to
/// twice its size.
const MOST: usize = 26;
/// The number of block sizes, and so of regions.
const SIZES: usize = MOST - LEAST + 1;
/// The size of a region in bytes: sixteen blocks of 32 MiB, which is what a vector with a frame grows to.
const REGION: usize = 1 << 29;
/// The size of the whole range in bytes.
const RANGE: usize = SIZES * REGION;
/// The smallest page size of any kernel. No block has a larger alignment.
const PAGE: usize = 4096;
/// When a block of at least this many bytes is freed, its pages go back to the kernel.
const GIVEN_BACK: usize = 1 << 16;
/// How many bytes of stack PID 1 gets for good. A test of command.rs parses the deepest command with less.
const STACK: usize = 512 << 10;

/// The allocator that a program names in `#[global_allocator]`.
pub struct Heap;

/// The start of the range; 0 while there is no range.
static START: AtomicUsize = AtomicUsize::new(0);
static RESERVE: Mutex<Reserve> = Mutex::new(Reserve { start: 0, regions: [EMPTY; SIZES] });

/// Reserves the range. Fails where the kernel does account for it, because it was set up that way before this
/// process started.
pub fn reserve() -> Result<(), Errno> {
    // One arena is enough, and when memory is short there is none for a second. Large blocks are mapped, so
    // they return to the kernel when they are freed. By default the C library raises that threshold after one
    // large block, and keeps up to 64 MiB. "Large" is above anything that a process needs to start. Large
    // blocks on the heap would stay there, held below small blocks that came later.
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

/// Sets the C library up for a process that receives by ipc-channel. Each message takes a buffer of 208 KiB
/// (that of a socket, wmem_default), and mapping and unmapping it would cost more than the message itself.
pub fn keep_messages() {
    #[cfg(target_env = "gnu")]
    tune(&[
        (libc::M_MMAP_THRESHOLD, 256 << 10),
        (libc::M_TRIM_THRESHOLD, 512 << 10),
        (libc::M_TOP_PAD, 128 << 10),
    ]);
}

/// Sets parameters of the C library's allocator.
#[cfg(target_env = "gnu")]
fn tune(numbers: &[(libc::c_int, libc::c_int)]) {
    for &(what, value) in numbers {
        // SAFETY: sets a number in the C library, which may be set at any time.
        unsafe { libc::mallopt(what, value) };
    }
}

/// Makes the kernel give this thread all the stack that PID 1 may need: a later refusal would be a SIGSEGV.
#[inline(never)]
pub fn deepen_stack() {
    let mut room = [const { MaybeUninit::<u8>::uninit() }; STACK];
    let room = black_box(&mut room);
    // The compiler's stack probes have touched each page. The pages themselves are not needed, only the
    // address range that the kernel has granted.
    let start = room.as_mut_ptr();
    let skipped = start.align_offset(PAGE);
    let length = (STACK - skipped) / PAGE * PAGE;
    if let Some(inner) = NonNull::new(start.wrapping_add(skipped)) {
        // SAFETY: whole pages inside `room`, which has no contents to lose.
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

// SAFETY: a block is the C library's or the reserve's; its address tells which, so it goes back to where it
// came from. Both give blocks of at least the layout's size and alignment that are not in use elsewhere, and
// neither panics.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is exactly what `System.alloc` asks for.
        let block = unsafe { System.alloc(layout) };
        if block.is_null() { from_reserve(layout) } else { block }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is exactly what `System.alloc_zeroed` asks for.
        let block = unsafe { System.alloc_zeroed(layout) };
        if !block.is_null() {
            return block;
        }
        let block = from_reserve(layout);
        if !block.is_null() {
            // SAFETY: the block has that many bytes, and belongs to the caller.
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
            // SAFETY: two blocks, each of at least that many bytes; the new one is not part of the old one.
            // The old one belongs to the caller, who gives it up.
            unsafe {
                ptr::copy_nonoverlapping(block, moved, layout.size().min(size));
                self.dealloc(block, layout);
            }
        }
        moved
    }
}

/// The index of a block's size; `None` if no region has such large blocks or such an alignment.
fn class(layout: Layout) -> Option<usize> {
    let size = layout.size().max(layout.align()).max(1 << LEAST).checked_next_power_of_two()?;
    let exponent = size.trailing_zeros() as usize;
    (layout.align() <= PAGE && exponent <= MOST).then_some(exponent - LEAST)
}

/// The blocks of one size.
#[derive(Clone, Copy)]
struct Region {
    /// The address of the first free block, 0 if none. A free block begins with the address of the next one.
    free: usize,
    /// How many bytes of the region have ever been handed out since it was last empty. The rest is untouched.
    used: usize,
    /// How many blocks are in use.
    live: usize,
}

/// A region at first, and again whenever none of its blocks is in use.
const EMPTY: Region = Region { free: 0, used: 0, live: 0 };

/// The reserved range.
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
        // One page per page fault. Not every kernel has larger pages, so an error is ignored.
        // SAFETY: the mapping made above; nothing uses it yet.
        let _ = unsafe { madvise(range, RANGE, MmapAdvise::MADV_NOHUGEPAGE) };
        let start = range.as_ptr().expose_provenance();
        Ok(Reserve { start, regions: [EMPTY; SIZES] })
    }

    /// Takes a block for the layout; null if there is none.
    fn take(&mut self, layout: Layout) -> *mut u8 {
        let Some(class) = class(layout) else { return ptr::null_mut() };
        let Some(region) = self.regions.get_mut(class) else { return ptr::null_mut() };
        if region.free != 0 {
            let block = ptr::with_exposed_provenance_mut::<u8>(region.free);
            // SAFETY: a free block of the range, aligned to its size, whose first word `put` has written.
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

    /// Takes back a block that [`Reserve::take`] returned for this layout.
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
        // SAFETY: the block has at least 16 bytes, is aligned to its size, and is no longer in use.
        unsafe { block.cast::<usize>().write(region.free) };
        region.free = block.expose_provenance();
        if size >= GIVEN_BACK {
            // The first page stays: it holds the address of the next free block.
            give_back(region.free + PAGE, size - PAGE);
        }
    }
}

/// Returns pages to the kernel; their contents are no longer needed.
fn give_back(start: usize, length: usize) {
    if let Some(pages) = NonNull::new(ptr::with_exposed_provenance_mut(start)) {
        // SAFETY: only `put` calls this, with pages of the range that contain no block in use and no first
        // word of a free block.
        let _ = unsafe { madvise(pages, length, MmapAdvise::MADV_DONTNEED) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 1).unwrap()
    }

    /// How many bytes of the range are in memory.
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
            // One block of each size stays in use, so that the regions keep their free blocks for later.
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
                // SAFETY: a block of that size, which no other code uses.
                unsafe { block.write_bytes(7, 16 << 20) };
                block
            })
            .collect();
        assert_eq!(resident(&reserve), 64 << 20);
        blocks[1..].iter().for_each(|block| reserve.put(*block, layout(16 << 20)));
        assert_eq!(resident(&reserve), (16 << 20) + 3 * PAGE);
        reserve.put(blocks[0], layout(16 << 20));
        let small: Vec<_> = (0..10_000).map(|_| reserve.take(layout(50))).collect();
        // SAFETY: blocks of that size, which no other code uses.
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

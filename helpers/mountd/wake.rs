//! Waking up at the start of a pod: the VM may have been paused, saved or cloned before it. So the clock is
//! set from the RTC, which kept running, and the random pool gets input that copies of this guest do not
//! have.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use hyperinit::fault::{Fault, OrFault};
use hyperinit::sys::random::{self, SEED};
use nix::fcntl::OFlag;
use nix::poll::poll;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// The RTC's time in seconds since 1970, UTC. Reading this file needs no ioctl.
const RTC: &str = "/sys/class/rtc/rtc0/since_epoch";
/// The kernel's random pool.
const POOL: &str = "/dev/urandom";
/// The host's randomness, if it provides any (virtio-rng).
const HOST: &str = "/dev/hwrng";
/// How many bytes from [`HOST`] may date from before the guest was copied: the driver and the kernel's
/// hw_random each hold one cache line that the host gave earlier (drivers/char/hw_random: virtio-rng.c,
/// core.c).
const STALE: usize = 128;
/// How long the host may take in all. It is asked for one cache line at a time.
const PATIENCE: Duration = Duration::from_millis(100);
/// The pause between two attempts to read [`HOST`], in milliseconds.
const PAUSE: u8 = 2;
/// How many times the clocks are read for the randomness of their last digits.
const READINGS: usize = 64;

/// Sets the clock and renews the random pool. The pool is renewed even if setting the clock fails; a fault of
/// the pool is returned in preference to one of the clock.
pub fn wake_up() -> Result<(), Fault> {
    let clock = set_clock();
    renew_pool()?;
    clock
}

fn set_clock() -> Result<(), Fault> {
    let rtc = match fs::read_to_string(RTC) {
        Ok(text) => text.trim().parse().map_err(|_| Fault::new("reading", RTC, "it is not a number"))?,
        Err(error) => {
            // There is no RTC, or it was never set: there is no better time than the clock's.
            log::info!("{}", Fault::io("reading", RTC, &error));
            return Ok(());
        }
    };
    let now = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME).fault("reading", "the clock")?);
    let Some(time) = corrected(now, rtc) else { return Ok(()) };
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from(time)).fault("setting", "the clock")?;
    log::info!("the clock said {} s since 1970, the RTC says {rtc} s", now.as_secs());
    Ok(())
}

/// The time to set the clock to; none while it agrees with the RTC, which counts whole seconds.
fn corrected(now: Duration, rtc: u64) -> Option<Duration> {
    // A clock that is less than a second away may be the better one of the two.
    let near = rtc.saturating_sub(1)..=rtc.saturating_add(1);
    // The middle of the second, as the kernel does at boot.
    (!near.contains(&now.as_secs())).then(|| Duration::new(rtc, 500_000_000))
}

fn renew_pool() -> Result<(), Fault> {
    let mut pool = fs::OpenOptions::new().write(true).open(POOL).fault("opening", POOL)?;
    // The readings have little entropy, so none is credited; but they differ between two copies.
    pool.write_all(&readings()).fault("writing to", POOL)?;
    let seed = host_seed();
    if let Some(seed) = &seed {
        random::add_entropy(&pool, seed).fault("adding to", POOL)?;
    }
    random::reseed(&pool).fault("reseeding", POOL)?;
    let host =
        if seed.is_some() { "the host's randomness" } else { "the clocks' alone: the host gives none" };
    log::info!("the random pool is renewed with {host}");
    Ok(())
}

/// Many readings of the clocks, as bytes.
fn readings() -> Vec<u8> {
    let clocks = [ClockId::CLOCK_REALTIME, ClockId::CLOCK_MONOTONIC];
    let mut bytes = Vec::with_capacity(READINGS * clocks.len() * size_of::<u32>());
    for _ in 0..READINGS {
        for clock in clocks {
            let time = clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
            bytes.extend(time.subsec_nanos().to_ne_bytes());
            bytes.extend(time.as_secs().to_ne_bytes());
        }
    }
    bytes
}

/// Fresh randomness of the host, if it arrives within [`PATIENCE`].
fn host_seed() -> Option<[u8; SEED]> {
    let nonblock = OFlag::O_NONBLOCK.bits();
    let mut host = fs::OpenOptions::new().read(true).custom_flags(nonblock).open(HOST).ok()?;
    fresh(&mut host, Instant::now() + PATIENCE)
}

/// The bytes after the first [`STALE`] ones, which may be old. None: the deadline `until` passed or a read
/// failed.
fn fresh(host: &mut impl Read, until: Instant) -> Option<[u8; SEED]> {
    let mut bytes = [0; STALE + SEED];
    let mut filled = 0;
    while let Some(room @ [_, ..]) = bytes.get_mut(filled..) {
        match host.read(room) {
            Ok(0) => return None,
            Ok(count) => filled += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < until => {
                // The device does not implement poll(2) and always counts as ready, so this only pauses.
                let _ = poll(&mut [], PAUSE);
            }
            Err(_) => return None,
        }
    }
    bytes.last_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_agrees_is_left_alone() {
        let at = |seconds: u64, millis: u64| Duration::from_millis(seconds * 1000 + millis);
        for now in [at(99, 1), at(100, 0), at(100, 999), at(101, 999)] {
            assert_eq!(corrected(now, 100), None, "{now:?}");
        }
        for now in [at(0, 0), at(98, 999), at(102, 0), at(1 << 40, 0)] {
            assert_eq!(corrected(now, 100), Some(at(100, 500)), "{now:?}");
        }
        assert_eq!(corrected(at(1, 0), 0), None);
        assert_eq!(corrected(at(5, 0), u64::MAX), Some(Duration::new(u64::MAX, 500_000_000)));
    }

    /// A device that gives `at_once` bytes per read, and reports EAGAIN before each.
    struct Device {
        next: u8,
        reads: usize,
        at_once: usize,
    }

    impl Read for Device {
        fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
            self.reads += 1;
            if self.at_once == 0 || !self.reads.is_multiple_of(2) {
                return Err(ErrorKind::WouldBlock.into());
            }
            let count = bytes.len().min(self.at_once);
            for byte in bytes.iter_mut().take(count) {
                *byte = self.next;
                self.next += 1;
            }
            Ok(count)
        }
    }

    #[test]
    fn what_the_host_gave_before_the_guest_was_copied_is_no_seed() {
        for at_once in [64, 32, 200, 7] {
            let mut host = Device { next: 0, reads: 0, at_once };
            let seed = fresh(&mut host, Instant::now() + Duration::from_secs(60)).unwrap();
            assert_eq!(seed.to_vec(), (128..160).collect::<Vec<u8>>(), "{at_once} at once");
        }
    }

    #[test]
    fn a_host_that_gives_nothing_is_given_up_and_not_asked_all_the_time() {
        let mut host = Device { next: 0, reads: 0, at_once: 0 };
        let begin = Instant::now();
        assert_eq!(fresh(&mut host, begin + PATIENCE), None);
        assert!(begin.elapsed() >= PATIENCE);
        assert!(host.reads <= 60, "{} reads", host.reads);
        assert_eq!(fresh(&mut std::io::empty(), begin), None);
    }

    #[test]
    fn no_two_readings_are_the_same() {
        assert_ne!(readings(), readings());
    }
}

//! The start of a pod may be the end of a long sleep, and the guest a copy: its VM was paused, saved or cloned. So the
//! clock is set from the RTC, which ran on, and the random pool is given what its copies do not have.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use hyperinit::fault::{Fault, OrFault};
use hyperinit::sys::random::{self, SEED};
use nix::fcntl::OFlag;
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime, clock_settime};

/// The RTC in seconds since 1970, UTC. Reading takes no ioctl.
const RTC: &str = "/sys/class/rtc/rtc0/since_epoch";
/// The kernel's random pool.
const POOL: &str = "/dev/urandom";
/// The host's randomness, where it gives any (virtio-rng).
const HOST: &str = "/dev/hwrng";
/// How many times the clocks are read for what their last digits are worth.
const READINGS: usize = 64;

/// Both; the first fault is the answer.
pub fn wake_up() -> Result<(), Fault> {
    let clock = set_clock();
    renew_pool()?;
    clock
}

fn set_clock() -> Result<(), Fault> {
    let rtc = match fs::read_to_string(RTC) {
        Ok(text) => text.trim().parse().map_err(|_| Fault::new("reading", RTC, "it is not a number"))?,
        Err(error) => {
            // No RTC, or one that was never set: the clock is as good as it gets.
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

/// What the clock is to be set to; nothing while it agrees with the RTC, which counts whole seconds.
fn corrected(now: Duration, rtc: u64) -> Option<Duration> {
    // A clock that is less than a second away may be the better one of the two.
    let near = rtc.saturating_sub(1)..=rtc.saturating_add(1);
    // In the middle of the second, as the kernel does it at boot.
    (!near.contains(&now.as_secs())).then(|| Duration::new(rtc, 500_000_000))
}

fn renew_pool() -> Result<(), Fault> {
    let mut pool = fs::OpenOptions::new().write(true).open(POOL).fault("opening", POOL)?;
    // Worth little, so it is not counted; but two copies differ in it.
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

/// The clocks, many times over.
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

/// What the host has ready: it is not waited for.
fn host_seed() -> Option<[u8; SEED]> {
    let nonblock = OFlag::O_NONBLOCK.bits();
    let mut host = fs::OpenOptions::new().read(true).custom_flags(nonblock).open(HOST).ok()?;
    let mut seed = [0; SEED];
    host.read_exact(&mut seed).ok()?;
    Some(seed)
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

    #[test]
    fn no_two_readings_are_the_same() {
        assert_ne!(readings(), readings());
    }
}

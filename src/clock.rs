//! The clock of all deadlines.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// The time since boot, without suspend (CLOCK_MONOTONIC of clock_gettime(2)). Setting the wall clock does
/// not change it.
pub fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

//! Limits how much a device does in a time: a token bucket for bytes and one for operations.
//!
//! A request goes ahead while its buckets aren't empty, and may leave a debt in them that later ones wait for: so
//! a request that is larger than a bucket isn't stuck for ever, and over any time `t` no more passes than the
//! bucket's size, what `t` refills, and one request. Must not know what a request is.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use vmm_sys_util::timerfd::TimerFd;
use walnut_vmm_api::{RateLimit, TokenBucket};

/// A bucket of tokens that fills itself. Pure: it is told the time.
#[derive(Debug)]
struct Bucket {
    size: u64,
    refill: Duration,
    /// Tokens there are; a debt when negative.
    tokens: i128,
    counted_at: Instant,
}

impl Bucket {
    fn new(config: TokenBucket, now: Instant) -> Self {
        Self {
            size: config.size,
            refill: Duration::from_millis(config.refill_ms),
            tokens: config.size.into(),
            counted_at: now,
        }
    }

    /// Adds what has come in since the last time.
    fn fill(&mut self, now: Instant) {
        let refill_nanos = self.refill.as_nanos().max(1);
        let elapsed = now.saturating_duration_since(self.counted_at);
        let gained = elapsed.as_nanos().saturating_mul(self.size.into()) / refill_nanos;
        if gained == 0 {
            return;
        }
        let gained = i128::try_from(gained).unwrap_or(i128::MAX);
        self.tokens = self.tokens.saturating_add(gained).min(self.size.into());
        self.counted_at = now;
    }

    /// How long until there is a token; zero when there is one.
    fn wait(&self) -> Duration {
        let Ok(missing) = u128::try_from(1 - self.tokens) else {
            return Duration::ZERO;
        };
        if missing == 0 {
            return Duration::ZERO;
        }
        let nanos = missing.saturating_mul(self.refill.as_nanos().max(1));
        let nanos = nanos.div_ceil(u128::from(self.size).max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn take(&mut self, tokens: u64) {
        self.tokens = self.tokens.saturating_sub(tokens.into());
    }
}

/// The limits of one device or queue.
#[derive(Debug)]
struct Buckets {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

/// Limits, and the timer that tells one thread when to try again.
#[derive(Debug)]
pub(super) struct RateLimiter {
    buckets: Arc<Mutex<Buckets>>,
    timer: TimerFd,
}

impl RateLimiter {
    /// Full buckets; no configuration is no limit.
    pub(super) fn new(config: Option<RateLimit>) -> io::Result<Self> {
        let now = Instant::now();
        let config = config.unwrap_or_default();
        let buckets = Buckets {
            bytes: config.bytes.map(|bucket| Bucket::new(bucket, now)),
            operations: config.operations.map(|bucket| Bucket::new(bucket, now)),
        };
        Ok(Self {
            buckets: Arc::new(Mutex::new(buckets)),
            timer: TimerFd::new().map_err(io::Error::from)?,
        })
    }

    /// The same limits for another thread: each of them may be one request ahead of what the buckets hold.
    pub(super) fn share(&self) -> io::Result<Self> {
        Ok(Self {
            buckets: self.buckets.clone(),
            timer: TimerFd::new().map_err(io::Error::from)?,
        })
    }

    fn buckets(&self) -> MutexGuard<'_, Buckets> {
        // Nothing panics while it is held.
        self.buckets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether one more request may go ahead now. Where it may not, the timer becomes readable when it may.
    pub(super) fn is_open(&mut self) -> io::Result<bool> {
        let now = Instant::now();
        let mut wait = Duration::ZERO;
        let mut buckets = self.buckets();
        let Buckets { bytes, operations } = &mut *buckets;
        for bucket in [bytes, operations].into_iter().flatten() {
            bucket.fill(now);
            wait = wait.max(bucket.wait());
        }
        drop(buckets);
        if wait.is_zero() {
            return Ok(true);
        }
        self.timer.reset(wait, None).map_err(io::Error::from)?;
        Ok(false)
    }

    /// Accounts for one request of `bytes` that goes ahead.
    pub(super) fn take(&mut self, bytes: u64) {
        let mut buckets = self.buckets();
        if let Some(bucket) = &mut buckets.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut buckets.operations {
            bucket.take(1);
        }
    }

    /// Reads the timer after it was readable, so that it isn't any more.
    pub(super) fn clear_timer(&mut self) -> io::Result<()> {
        self.timer.wait().map(drop).map_err(io::Error::from)
    }
}

impl AsRawFd for RateLimiter {
    /// The timer.
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_limiter_says_when_it_is_open_again() {
        let limit = RateLimit {
            bytes: None,
            operations: Some(TokenBucket {
                size: 1,
                refill_ms: 1,
            }),
        };
        let mut limiter = RateLimiter::new(Some(limit)).unwrap();
        for _ in 0..3 {
            while !limiter.is_open().unwrap() {
                limiter.clear_timer().unwrap();
            }
            limiter.take(u64::MAX);
        }
        let mut shared = limiter.share().unwrap();
        assert!(!shared.is_open().unwrap(), "the debt is the other's too");
        let mut free = RateLimiter::new(None).unwrap();
        free.take(u64::MAX);
        assert!(free.is_open().unwrap());
    }

    proptest! {
        #[test]
        fn no_more_passes_than_size_and_time_allow(
            size in 1_u64..1 << 40,
            refill_ms in 1_u64..100_000,
            requests in proptest::collection::vec((1_u64..1 << 32, 0_u64..1 << 36), 1..100),
        ) {
            let start = Instant::now();
            let mut bucket = Bucket::new(TokenBucket { size, refill_ms }, start);
            let (mut elapsed, mut passed, mut largest) = (Duration::ZERO, 0_u128, 0_u128);
            for (tokens, pause_nanos) in requests {
                elapsed += Duration::from_nanos(pause_nanos);
                bucket.fill(start + elapsed);
                if bucket.wait().is_zero() {
                    bucket.take(tokens);
                    passed += u128::from(tokens);
                    largest = largest.max(tokens.into());
                }
                let refilled = elapsed.as_nanos() * u128::from(size) / (u128::from(refill_ms) * 1_000_000);
                prop_assert!(passed <= u128::from(size) + refilled + largest);
            }
        }

        #[test]
        fn who_waits_as_long_as_told_goes_ahead(
            size in 1_u64..1 << 40, refill_ms in 1_u64..100_000, tokens in 1_u64..1 << 40,
        ) {
            let start = Instant::now();
            let mut bucket = Bucket::new(TokenBucket { size, refill_ms }, start);
            bucket.take(tokens);
            let wait = bucket.wait();
            bucket.fill(start + wait);
            prop_assert!(bucket.wait().is_zero());
        }
    }
}

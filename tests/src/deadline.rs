//! Deadlines, and waiting for what sends no event.
//!
//! Every wait of a test ends: by what it waits for, by the death of who should have caused it, or by its
//! deadline, which is an error that names it. Must not be used to prove that something is fast.

use anyhow::{Result, bail};
use std::time::{Duration, Instant};

/// Until a guest's init answers, or a container runs. A lab without hardware virtualisation boots a guest
/// in 2 to 10 seconds.
pub const BOOT: Duration = Duration::from_secs(120);
/// Until one request is answered, or one process that does little has ended.
pub const REQUEST: Duration = Duration::from_secs(60);
/// Between two looks at something that sends no event.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A point in time that a wait does not pass.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Instant);

impl Deadline {
    /// `duration` from now.
    pub fn after(duration: Duration) -> Self {
        Self(Instant::now() + duration)
    }

    /// What is left of it; zero once it has passed.
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    /// What is left of it as a timeout of `poll(2)`.
    pub fn timespec(self) -> rustix::event::Timespec {
        let left = self.left();
        rustix::event::Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        }
    }
}

/// Looks again and again until `look` finds what it looks for. For state that the kernel announces to
/// nobody: a file's content, a mount table, another program's process.
pub fn until<T>(
    what: &str,
    deadline: Deadline,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    loop {
        if let Some(found) = look()? {
            return Ok(found);
        }
        if deadline.left().is_zero() {
            bail!("waited in vain for {what}");
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_what_it_waits_for_or_with_an_error_that_names_it() {
        let mut looks = 0;
        let third = until("the third look", Deadline::after(REQUEST), || {
            looks += 1;
            Ok((looks == 3).then_some(looks))
        });
        assert_eq!(third.unwrap(), 3);
        let never = until("the impossible", Deadline::after(Duration::ZERO), || {
            Ok(None::<()>)
        });
        assert_eq!(
            never.unwrap_err().to_string(),
            "waited in vain for the impossible"
        );
    }
}

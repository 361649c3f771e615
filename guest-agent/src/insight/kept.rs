//! What costs something while it is there, and goes by itself when nobody has asked for it for long enough.

use super::{InsightError, MAX_KEEP};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::{Instant, sleep_until};

/// A thing that is there while it is asked for.
#[derive(Debug)]
pub(super) struct Kept<T>(Arc<Mutex<Option<Lease<T>>>>);

#[derive(Debug)]
struct Lease<T> {
    thing: T,
    /// Never, if there is none.
    until: Option<Instant>,
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T> Clone for Kept<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T: Send + 'static> Kept<T> {
    /// Asks it something; makes it first if it isn't there. It stays for `keep_ms` milliseconds after this, at
    /// the least.
    pub(super) fn ask<R>(
        &self,
        keep_ms: u32,
        make: impl FnOnce() -> Result<T, InsightError>,
        question: impl FnOnce(&mut T) -> Result<R, InsightError>,
    ) -> Result<R, InsightError> {
        let keep = Duration::from_millis(keep_ms.into());
        if keep.is_zero() || keep > MAX_KEEP {
            return Err(InsightError::Keep(keep_ms));
        }
        let until = Instant::now() + keep;
        let mut slot = self.lock();
        let lease = match slot.take() {
            Some(lease) => lease,
            None => {
                let thing = make()?;
                tokio::spawn(end_in_time(Arc::clone(&self.0)));
                let until = Some(until);
                Lease { thing, until }
            }
        };
        let lease = slot.insert(lease);
        lease.until = lease.until.map(|before| before.max(until));
        question(&mut lease.thing)
    }

    /// Makes it if it isn't there; it stays for good.
    pub(super) fn keep_for_good(
        &self,
        make: impl FnOnce() -> Result<T, InsightError>,
    ) -> Result<(), InsightError> {
        let mut slot = self.lock();
        let thing = match slot.take() {
            Some(lease) => lease.thing,
            None => make()?,
        };
        *slot = Some(Lease { thing, until: None });
        Ok(())
    }

    /// Does something with it if it is there.
    pub(super) fn if_there<R>(&self, action: impl FnOnce(&mut T) -> R) -> Option<R> {
        self.lock().as_mut().map(|lease| action(&mut lease.thing))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Lease<T>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn end_in_time<T>(slot: Arc<Mutex<Option<Lease<T>>>>) {
    loop {
        let until = {
            let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
            match slot.as_ref().map(|lease| lease.until) {
                Some(Some(until)) if until > Instant::now() => until,
                Some(None) => return,
                _ => {
                    *slot = None;
                    return;
                }
            }
        };
        sleep_until(until).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{task::yield_now, time::advance};

    /// Lets virtual time pass, and whoever waits for it act.
    async fn pass(milliseconds: u64) {
        advance(Duration::from_millis(milliseconds)).await;
        yield_now().await;
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_time_that_is_none_is_refused_with_its_value() {
        for keep_ms in [0, 600_001] {
            let error = Kept::default().ask(keep_ms, || Ok(()), |()| Ok(()));
            assert_eq!(
                error.unwrap_err().to_string(),
                format!("keep_ms {keep_ms} must be 1 to 600000")
            );
        }
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn what_nobody_asks_goes_and_what_is_for_good_stays() {
        let kept = Kept::default();
        kept.ask(100, || Ok(7), |_| Ok(())).unwrap();
        // Whoever ends it begins to wait.
        yield_now().await;
        pass(60).await;
        kept.ask(100, || Ok(8), |_| Ok(())).unwrap();
        pass(60).await;
        assert_eq!(kept.if_there(|number| *number), Some(7));
        pass(60).await;
        assert_eq!(kept.if_there(|number| *number), None);
        kept.ask(100, || Ok(8), |_| Ok(())).unwrap();
        yield_now().await;
        kept.keep_for_good(|| Ok(9)).unwrap();
        pass(1000).await;
        assert_eq!(kept.if_there(|number| *number), Some(8));
    }
}

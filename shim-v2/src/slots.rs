//! Things by name, each of which is being made, there, or being removed.
//!
//! Two calls for one name may come at once; the second sees what the first is at, and no lock is held while
//! either waits for the guest.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The state of one name.
#[derive(Debug)]
enum Slot<T> {
    /// `abandoned`: who asked for it has gone, and nobody will ask for its removal.
    Making {
        abandoned: bool,
    },
    There(Arc<T>),
    Removing(Arc<T>),
}

/// Why a name can't be taken or removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SlotError {
    /// Nothing of that name.
    Missing,
    /// Being made by another call.
    Making,
    /// Being removed by another call.
    Removing,
}

/// Things by name.
#[derive(Debug)]
pub(crate) struct Slots<T>(Mutex<BTreeMap<String, Slot<T>>>);

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Slots<T> {
    /// Takes a name, or answers that it is taken.
    pub(crate) fn reserve(&self, name: &str) -> bool {
        let mut slots = self.lock();
        if slots.contains_key(name) {
            return false;
        }
        slots.insert(name.to_owned(), Slot::Making { abandoned: false });
        true
    }

    /// Fills a reserved name.
    pub(crate) fn fill(&self, name: &str, thing: Arc<T>) {
        self.lock().insert(name.to_owned(), Slot::There(thing));
    }

    /// Fills a reserved name, unless it was abandoned meanwhile.
    pub(crate) fn fill_if_wanted(&self, name: &str, thing: Arc<T>) -> bool {
        let mut slots = self.lock();
        if let Some(Slot::Making { abandoned: true }) = slots.get(name) {
            return false;
        }
        slots.insert(name.to_owned(), Slot::There(thing));
        true
    }

    /// Says of a name that is being made that nobody wants it any more.
    pub(crate) fn abandon(&self, name: &str) {
        if let Some(Slot::Making { abandoned }) = self.lock().get_mut(name) {
            *abandoned = true;
        }
    }

    /// Whether nothing is there but what was abandoned while it was being made.
    pub(crate) fn is_abandoned(&self) -> bool {
        self.lock()
            .values()
            .all(|slot| matches!(slot, Slot::Making { abandoned: true }))
    }

    /// The thing of that name, even while it is being removed.
    pub(crate) fn get(&self, name: &str) -> Option<Arc<T>> {
        match self.lock().get(name)? {
            Slot::Making { .. } => None,
            Slot::There(thing) | Slot::Removing(thing) => Some(Arc::clone(thing)),
        }
    }

    /// Begins to remove: until [`Slots::remove`] or [`Slots::keep`], nobody else can.
    pub(crate) fn begin_removal(&self, name: &str) -> Result<Arc<T>, SlotError> {
        let mut slots = self.lock();
        let slot = slots.get_mut(name).ok_or(SlotError::Missing)?;
        let thing = match slot {
            Slot::Making { .. } => return Err(SlotError::Making),
            Slot::Removing(_) => return Err(SlotError::Removing),
            Slot::There(thing) => Arc::clone(thing),
        };
        *slot = Slot::Removing(Arc::clone(&thing));
        Ok(thing)
    }

    /// Gives a removal up.
    pub(crate) fn keep(&self, name: &str, thing: Arc<T>) {
        self.fill(name, thing);
    }

    /// Forgets a name, and answers whether none is left.
    pub(crate) fn remove(&self, name: &str) -> bool {
        let mut slots = self.lock();
        slots.remove(name);
        slots.is_empty()
    }

    /// Whether no other name is taken.
    pub(crate) fn is_only(&self, name: &str) -> bool {
        self.lock().keys().all(|taken| taken == name)
    }

    /// Whether no name is taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Everything that is there or being removed.
    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        let slots = self.lock();
        let things = slots.values().filter_map(|slot| match slot {
            Slot::Making { .. } => None,
            Slot::There(thing) | Slot::Removing(thing) => Some(Arc::clone(thing)),
        });
        things.collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Slot<T>>> {
        // Every change under the lock is one operation of the map: a panic leaves nothing half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_once_and_removed_once() {
        let slots = Slots::default();
        assert!(slots.reserve("a"));
        assert!(!slots.reserve("a"));
        assert_eq!(slots.begin_removal("a").unwrap_err(), SlotError::Making);
        assert!(slots.get("a").is_none());
        slots.fill("a", Arc::new(1));
        let thing = slots.begin_removal("a").unwrap();
        assert_eq!(slots.begin_removal("a").unwrap_err(), SlotError::Removing);
        assert_eq!(slots.get("a").as_deref(), Some(&1));
        slots.keep("a", thing);
        slots.begin_removal("a").unwrap();
        assert!(slots.remove("a"));
        assert_eq!(slots.begin_removal("a").unwrap_err(), SlotError::Missing);
    }

    #[test]
    fn what_was_abandoned_while_it_was_made_is_not_filled() {
        let slots = Slots::default();
        slots.reserve("a");
        slots.reserve("b");
        slots.abandon("a");
        assert!(!slots.is_abandoned());
        assert!(!slots.fill_if_wanted("a", Arc::new(1)));
        assert!(slots.fill_if_wanted("b", Arc::new(2)));
        assert!(slots.get("a").is_none());
        slots.remove("b");
        assert!(slots.is_abandoned() && !slots.is_empty());
    }

    #[test]
    fn the_last_one_is_known() {
        let slots: Slots<u8> = Slots::default();
        slots.reserve("a");
        slots.reserve("b");
        assert!(!slots.is_only("b") && !slots.remove("a"));
        assert!(slots.is_only("b"));
        assert!(slots.remove("b") && slots.is_empty());
    }
}

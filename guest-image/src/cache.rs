//! A folder of build results, each named by the hash of everything that went into it.
//!
//! An entry appears whole or not at all, and two processes that want the same one make it once.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

/// What can go wrong with the cache itself.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A file operation failed.
    #[error("{action} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// The hash of a result's inputs.
#[derive(Debug, Clone, Default)]
pub struct Key(Sha256);

impl Key {
    /// The key of a recipe; the recipe's own version is its first input.
    #[must_use]
    pub fn new(recipe: &str) -> Self {
        Self::default().with("recipe", recipe.as_bytes())
    }

    /// Adds an input. Lengths are hashed too, so that no two lists of inputs look alike.
    #[must_use]
    pub fn with(mut self, name: &str, value: &[u8]) -> Self {
        for part in [name.as_bytes(), value] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// Adds a file's contents.
    pub fn with_file(mut self, name: &str, path: &Path) -> Result<Self, CacheError> {
        let failed = |source| CacheError::Io {
            action: "read",
            path: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(failed)?;
        let mut digest = Sha256::new();
        io::copy(&mut file, &mut digest).map_err(failed)?;
        self = self.with(name, &digest.finalize());
        Ok(self)
    }

    /// The name of the entry.
    #[must_use]
    pub fn name(&self) -> String {
        self.0
            .clone()
            .finalize()
            .iter()
            .take(10)
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }
}

/// Whether an entry was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It was there already.
    Cached,
    /// It was made now.
    Made,
}

/// The folder.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// A cache in `root`, which is created when first needed.
    #[must_use]
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Where entries of one kind lie.
    #[must_use]
    pub fn folder(&self, kind: &str) -> PathBuf {
        self.root.join(kind)
    }

    /// Where the entry lies or would lie.
    #[must_use]
    pub fn path(&self, kind: &str, key: &Key) -> PathBuf {
        self.folder(kind).join(key.name())
    }

    /// The entry's folder, filled by `make` (which gets an empty folder) if it isn't there yet.
    pub fn get_or_make<E: From<CacheError>>(
        &self,
        kind: &str,
        key: &Key,
        make: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<(PathBuf, Origin), E> {
        let entry = self.path(kind, key);
        if entry.is_dir() {
            return Ok((entry, Origin::Cached));
        }
        let folder = self.folder(kind);
        attempt("create", &folder, |path| fs::create_dir_all(path))?;
        let lock_path = folder.join(format!("{}.lock", key.name()));
        let lock = attempt("create", &lock_path, |path| File::create(path))?;
        attempt("lock", &lock_path, |_| lock.lock())?;
        if entry.is_dir() {
            return Ok((entry, Origin::Cached));
        }
        let partial = folder.join(format!("{}.partial", key.name()));
        if partial.exists() {
            attempt("remove", &partial, |path| fs::remove_dir_all(path))?;
        }
        attempt("create", &partial, |path| fs::create_dir(path))?;
        make(&partial)?;
        attempt("rename", &partial, |path| fs::rename(path, &entry))?;
        let _ = fs::remove_file(&lock_path);
        Ok((entry, Origin::Made))
    }
}

fn attempt<T>(
    action: &'static str,
    path: &Path,
    operation: impl FnOnce(&Path) -> io::Result<T>,
) -> Result<T, CacheError> {
    operation(path).map_err(|source| CacheError::Io {
        action,
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().to_owned());
        let key = Key::new("1").with("name", b"value");
        let make = |path: &Path| -> Result<(), CacheError> {
            fs::write(path.join("file"), "x").unwrap();
            Ok(())
        };
        let (path, origin) = cache.get_or_make("kind", &key, make).unwrap();
        assert_eq!(origin, Origin::Made);
        assert!(path.join("file").exists());
        let (_, origin) = cache
            .get_or_make::<CacheError>("kind", &key, |_| panic!("made twice"))
            .unwrap();
        assert_eq!(origin, Origin::Cached);
    }

    #[test]
    fn a_failed_entry_does_not_exist() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(folder.path().to_owned());
        let key = Key::new("1");
        let failed = |path: &Path| {
            Err(CacheError::Io {
                action: "make",
                path: path.to_owned(),
                source: io::ErrorKind::Other.into(),
            })
        };
        assert!(cache.get_or_make("kind", &key, failed).is_err());
        assert!(!cache.path("kind", &key).exists());
        cache
            .get_or_make::<CacheError>("kind", &key, |_| Ok(()))
            .unwrap();
    }

    #[test]
    fn inputs_do_not_run_together() {
        let joined = Key::new("1").with("a", b"bc").name();
        let split = Key::new("1").with("ab", b"c").name();
        assert_ne!(joined, split);
    }
}

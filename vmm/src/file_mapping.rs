#![allow(unsafe_code, reason = "maps files")]
//! A file of the host as memory that the guest sees.
//!
//! This process never touches the mapping: a file that is truncated by somebody else takes its pages away, which
//! stops the vCPU that touches them, and would be a fatal signal here. Must not know who shows it to the guest.

use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap},
};
use std::{
    ffi::c_void,
    fs::File,
    io::{self, Seek, SeekFrom},
    ptr::null_mut,
};

/// What a mapping's size is rounded up to: the guest adds memory in such pieces (`SUBSECTION_SIZE` of Linux).
pub const ALIGNMENT: u64 = 2 << 20;

/// Why a file cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    /// Its size is not known.
    #[error("cannot tell the size of the file")]
    Size(#[source] io::Error),
    /// There is nothing to map, or too much.
    #[error("a file of {0} bytes cannot be memory of a guest")]
    Bytes(u64),
    /// The kernel refuses.
    #[error("cannot map {bytes} bytes of the file")]
    Map {
        /// How much.
        bytes: usize,
        /// Why not.
        source: Errno,
    },
}

/// A shared mapping of a whole file, followed by private zeroes up to a multiple of [`ALIGNMENT`].
#[derive(Debug)]
pub struct FileMapping {
    start: *mut c_void,
    bytes: usize,
    read_only: bool,
}

impl FileMapping {
    /// Maps `file`, which must be open for writing unless `read_only`.
    pub fn new(mut file: &File, read_only: bool) -> Result<Self, MappingError> {
        let size = file.seek(SeekFrom::End(0)).map_err(MappingError::Size)?;
        let rounded = size.checked_next_multiple_of(ALIGNMENT);
        let whole = rounded.filter(|_| size > 0).map(usize::try_from);
        let (Some(Ok(bytes)), Ok(file_bytes)) = (whole, usize::try_from(size)) else {
            return Err(MappingError::Bytes(size));
        };
        let access = match read_only {
            true => ProtFlags::READ,
            false => ProtFlags::READ | ProtFlags::WRITE,
        };
        let failed = |source| MappingError::Map { bytes, source };
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses an address where nothing is.
        let start = unsafe { mmap_anonymous(null_mut(), bytes, access, flags) }.map_err(failed)?;
        let mapping = Self {
            start,
            bytes,
            read_only,
        };
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces a part of the mapping above, which nobody knows yet.
        unsafe { mmap(start, file_bytes, access, flags, file, 0) }.map_err(failed)?;
        Ok(mapping)
    }

    /// Where it starts in this process.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.cast()
    }

    /// Its length, a multiple of [`ALIGNMENT`].
    pub fn bytes(&self) -> u64 {
        self.bytes as u64
    }

    /// Whether it cannot be written.
    pub fn read_only(&self) -> bool {
        self.read_only
    }
}

impl Drop for FileMapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own; whoever was given its address promised not to outlive it.
        let _ = unsafe { munmap(self.start, self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{io::Write, os::unix::fs::FileExt};

    fn file(contents: &[u8]) -> File {
        let fd = rustix::fs::memfd_create("mapped", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(contents).unwrap();
        file
    }

    #[test]
    fn a_mapping_is_the_file_and_then_zeroes() {
        let file = file(&[7; 5000]);
        let mapping = FileMapping::new(&file, false).unwrap();
        assert_eq!((mapping.bytes(), mapping.read_only()), (ALIGNMENT, false));
        let byte = |offset: usize| {
            // SAFETY: within the mapping.
            let at = unsafe { mapping.as_ptr().add(offset) };
            // SAFETY: the mapping is alive and its file is not truncated.
            unsafe { at.read_volatile() }
        };
        let last = usize::try_from(ALIGNMENT).unwrap() - 1;
        assert_eq!([0, 4999, 5000, last].map(byte), [7, 7, 0, 0]);
        // SAFETY: the mapping is alive and writable.
        unsafe { mapping.as_ptr().write_volatile(9) };
        let mut first = [0];
        file.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, [9]);
    }

    #[test]
    fn a_file_without_contents_or_rights_is_refused() {
        let error = FileMapping::new(&file(&[]), true).unwrap_err();
        assert!(matches!(error, MappingError::Bytes(0)), "{error}");
        let path = std::env::current_exe().unwrap();
        let read_only = File::open(path).unwrap();
        let error = FileMapping::new(&read_only, false).unwrap_err();
        assert!(matches!(error, MappingError::Map { .. }), "{error}");
        FileMapping::new(&read_only, true).unwrap();
    }
}

#![allow(unsafe_code, reason = "maps files")]
//! Guest-physical addresses through which a guest reaches files of the host without a copy (DAX).
//!
//! Where nothing is mapped an access of the guest is one that KVM cannot serve, and ends the VM; so does an access
//! beyond the end of a mapped file, which the host can move there by cutting the file. This process never touches
//! the window. Must not open a file.

use crate::{arch::x86_64::layout::PAGE_BYTES, devices::virtio::SharedRegion};
use rustix::{
    io::Errno,
    mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap},
};
use std::{
    os::fd::AsFd,
    ptr::{null_mut, with_exposed_provenance_mut},
};

/// A piece of the window and what it shows.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    /// Where it starts in the window.
    pub at: u64,
    /// How long it is.
    pub bytes: u64,
}

/// A range of this process's addresses that is the guest's window.
#[derive(Debug)]
pub struct Window {
    region: SharedRegion,
    /// An address only: all accesses are the guest's.
    start: usize,
    bytes: usize,
}

impl Window {
    /// A window that shows nothing yet.
    pub fn new(region: SharedRegion) -> Result<Self, Errno> {
        let bytes = usize::try_from(region.bytes).map_err(|_| Errno::NOMEM)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses an address where nothing is.
        let start = unsafe { mmap_anonymous(null_mut(), bytes, ProtFlags::empty(), flags) }?;
        Ok(Self {
            region,
            start: start.expose_provenance(),
            bytes,
        })
    }

    /// Where the guest sees it.
    pub fn region(&self) -> SharedRegion {
        self.region
    }

    /// Where it starts in this process.
    pub fn as_ptr(&self) -> *mut u8 {
        with_exposed_provenance_mut(self.start)
    }

    /// Shows a part of `file`, from `offset` on.
    pub fn map(
        &self,
        piece: Piece,
        file: impl AsFd,
        offset: u64,
        writable: bool,
    ) -> Result<(), Errno> {
        let (start, bytes) = self.place(piece)?;
        let end = offset.checked_add(piece.bytes).ok_or(Errno::INVAL)?;
        if !offset.is_multiple_of(PAGE_BYTES) || i64::try_from(end).is_err() {
            return Err(Errno::INVAL);
        }
        let access = match writable {
            true => ProtFlags::READ | ProtFlags::WRITE,
            false => ProtFlags::READ,
        };
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        let start = with_exposed_provenance_mut(start);
        // SAFETY: replaces a part of the window, in which nothing of this process is.
        unsafe { mmap(start, bytes, access, flags, file, offset) }?;
        Ok(())
    }

    /// Shows nothing there any more.
    pub fn unmap(&self, piece: Piece) -> Result<(), Errno> {
        let (start, bytes) = self.place(piece)?;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        let start = with_exposed_provenance_mut(start);
        // SAFETY: replaces a part of the window, in which nothing of this process is.
        unsafe { mmap_anonymous(start, bytes, ProtFlags::empty(), flags) }?;
        Ok(())
    }

    /// Shows nothing at all.
    pub fn clear(&self) -> Result<(), Errno> {
        self.unmap(Piece {
            at: 0,
            bytes: self.region.bytes,
        })
    }

    /// The addresses of a piece that consists of whole pages and lies in the window.
    fn place(&self, Piece { at, bytes }: Piece) -> Result<(usize, usize), Errno> {
        let end = at.checked_add(bytes).ok_or(Errno::INVAL)?;
        let whole = at.is_multiple_of(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES);
        if bytes == 0 || !whole || end > self.region.bytes {
            return Err(Errno::INVAL);
        }
        let at = usize::try_from(at).map_err(|_| Errno::INVAL)?;
        let bytes = usize::try_from(bytes).map_err(|_| Errno::INVAL)?;
        Ok((self.start + at, bytes))
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own; whoever was given its address promised not to outlive it.
        let _ = unsafe { munmap(with_exposed_provenance_mut(self.start), self.bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::{fs::File, io::Write, sync::LazyLock};
    use vm_memory::GuestAddress;

    const BYTES: u64 = 4 << 20;

    fn window() -> Window {
        let address = GuestAddress(1 << 40);
        let region = SharedRegion {
            address,
            bytes: BYTES,
        };
        Window::new(region).unwrap()
    }

    fn file() -> File {
        let fd = rustix::fs::memfd_create("window", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(&[7; 8192]).unwrap();
        file
    }

    #[test]
    fn what_is_mapped_is_the_file_until_it_is_unmapped() {
        let (window, file) = (window(), file());
        let piece = Piece {
            at: 4096,
            bytes: 4096,
        };
        window.map(piece, &file, 4096, true).unwrap();
        // SAFETY: within the window.
        let at = unsafe { window.as_ptr().add(4096) };
        // SAFETY: the file's second page is mapped there.
        assert_eq!(unsafe { at.read_volatile() }, 7);
        // SAFETY: as above, and writable.
        unsafe { at.write_volatile(9) };
        let mut seen = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut seen, 4096).unwrap();
        assert_eq!(seen, [9]);
        window.unmap(piece).unwrap();
        window.clear().unwrap();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let start = format!("{:x}-", window.as_ptr().addr());
        let line = maps.lines().find(|line| line.starts_with(&start)).unwrap();
        assert!(line.contains("---p"), "{line}");
    }

    proptest! {
        #[test]
        fn nothing_outside_the_window_is_mapped(
            at in prop_oneof![0..BYTES + 8192, any::<u64>()],
            bytes in prop_oneof![0..BYTES + 8192, any::<u64>()],
            offset in prop_oneof![Just(0), any::<u64>()],
        ) {
            static WINDOW: LazyLock<(Window, File)> = LazyLock::new(|| (window(), file()));
            let (window, file) = &*WINDOW;
            let within = at.checked_add(bytes).is_some_and(|end| end <= BYTES)
                && bytes > 0 && at % 4096 == 0 && bytes % 4096 == 0;
            let piece = Piece { at, bytes };
            prop_assert_eq!(window.unmap(piece).is_ok(), within);
            if window.map(piece, file, offset, false).is_ok() {
                prop_assert!(within && offset % 4096 == 0);
            }
        }
    }
}

//! Puts the kernel and the initramfs into guest RAM.

use crate::{
    arch::x86_64::{
        kernel::{Kernel, KernelError},
        layout::{self, PAGE_BYTES},
    },
    memory::{self, Extent, MemoryError},
};
use std::{fs::File, io};
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Why the VM has nothing to boot.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The kernel's headers.
    #[error("cannot boot the kernel")]
    Headers(#[from] KernelError),
    /// The kernel's contents.
    #[error("cannot load the kernel")]
    Kernel(#[source] MemoryError),
    /// The initramfs' size.
    #[error("cannot tell the size of the initramfs")]
    InitramfsSize(#[source] io::Error),
    /// The initramfs' contents.
    #[error("cannot load the initramfs")]
    Initramfs(#[source] MemoryError),
    /// It leaves no room, or there is nothing in it.
    #[error(
        "an initramfs of {bytes} bytes does not fit between the kernel's end at {kernel_end:#x} and the end of RAM at {ram_end:#x}"
    )]
    NoRoom {
        /// Bytes of the initramfs.
        bytes: u64,
        /// First address after the kernel.
        kernel_end: u64,
        /// End of RAM below the hole.
        ram_end: u64,
    },
}

/// What was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Loaded {
    /// Where the boot vCPU starts.
    pub entry: GuestAddress,
    /// Start and length.
    pub initramfs: Option<(GuestAddress, u64)>,
}

/// Loads `kernel` where its headers say, and `initramfs` at the end of the RAM below the hole.
pub fn load(
    memory: &GuestMemoryMmap,
    ram_bytes: u64,
    kernel: &File,
    initramfs: Option<&File>,
) -> Result<Loaded, ImageError> {
    let headers = Kernel::open(kernel)?;
    for segment in &headers.segments {
        memory::read(memory, kernel, *segment).map_err(ImageError::Kernel)?;
    }
    let ram_end = layout::ram_end_below_hole(ram_bytes);
    let initramfs = initramfs
        .map(|file| load_initramfs(memory, file, headers.end, ram_end))
        .transpose()?;
    Ok(Loaded {
        entry: headers.entry,
        initramfs,
    })
}

fn load_initramfs(
    memory: &GuestMemoryMmap,
    file: &File,
    kernel_end: GuestAddress,
    ram_end: GuestAddress,
) -> Result<(GuestAddress, u64), ImageError> {
    let metadata = file.metadata().map_err(ImageError::InitramfsSize)?;
    let bytes = metadata.len();
    let at = place(bytes, kernel_end, ram_end)?;
    let extent = Extent {
        offset: 0,
        at,
        bytes,
    };
    memory::read(memory, file, extent).map_err(ImageError::Initramfs)?;
    Ok((at, bytes))
}

/// The last page-aligned place before `ram_end`.
fn place(
    bytes: u64,
    kernel_end: GuestAddress,
    ram_end: GuestAddress,
) -> Result<GuestAddress, ImageError> {
    ram_end
        .0
        .checked_sub(bytes)
        .map(|start| start - start % PAGE_BYTES)
        .filter(|&start| bytes > 0 && start >= kernel_end.0)
        .map(GuestAddress)
        .ok_or(ImageError::NoRoom {
            bytes,
            kernel_end: kernel_end.0,
            ram_end: ram_end.0,
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_initramfs_lies_between_kernel_and_end() {
        let at = |bytes| place(bytes, GuestAddress(0x5000), GuestAddress(0x10_0000)).ok();
        assert_eq!(at(1), Some(GuestAddress(0xf_f000)));
        assert_eq!(at(4097), Some(GuestAddress(0xf_e000)));
        assert_eq!(at(0xf_b000), Some(GuestAddress(0x5000)));
        for bytes in [0, 0xf_b001, 0x10_0001, u64::MAX] {
            assert_eq!(at(bytes), None, "{bytes:#x}");
        }
    }
}

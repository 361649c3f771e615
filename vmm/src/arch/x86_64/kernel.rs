//! Reads the headers of an ELF kernel: which parts of the file go where, and where the kernel is entered.
//!
//! ELF-64 object files (System V ABI), and the note `XEN_ELFNOTE_PHYS32_ENTRY` of Xen's PVH boot protocol
//! (`docs/misc/pvh.pandoc`, `public/elfnote.h`). [`Headers::parse`] and [`entry_of_notes`] are pure; the kernel is
//! the operator's, but a wrong file must give a clear error. Must not load anything.

use crate::{arch::x86_64::layout, memory::Extent};
use std::{fs::File, io, os::unix::fs::FileExt};
use vm_memory::GuestAddress;

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
/// Program headers at the most: kernels have five.
const MAX_PROGRAM_HEADERS: u16 = 64;
/// Bytes of notes at the most: kernels have about 150.
const MAX_NOTES_BYTES: u64 = 64 * 1024;
const MAGIC: &[u8; 4] = b"\x7fELF";
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const TYPE_LOAD: u32 = 1;
const TYPE_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const NOTE_PVH_ENTRY: u32 = 18;
const NOTE_OWNER: &[u8] = b"Xen\0";

/// Why a file cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file cannot be read.
    #[error("cannot read {bytes} bytes at offset {offset} of the kernel")]
    Read {
        /// Where in the file.
        offset: u64,
        /// How much.
        bytes: usize,
        /// Why not.
        source: io::Error,
    },
    /// Not an ELF file, or for another machine.
    #[error("the kernel is not an uncompressed x86-64 ELF file (vmlinux): {0}")]
    NotElf(&'static str),
    /// The headers contradict themselves.
    #[error("the kernel's ELF headers are wrong: {what} is {value:#x}")]
    Header {
        /// Which part.
        what: &'static str,
        /// What it holds.
        value: u64,
    },
    /// Not built for PVH.
    #[error("the kernel has no PVH entry point (built without CONFIG_PVH)")]
    NoPvh,
}

/// What is loaded and where it is entered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// Parts of the file and their places.
    pub segments: Vec<Extent>,
    /// End of the kernel's memory, its zeroed part included.
    pub end: GuestAddress,
    /// Physical address of the 32-bit entry point.
    pub entry: GuestAddress,
}

/// What the program headers say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Headers {
    segments: Vec<Extent>,
    end: GuestAddress,
    notes: Vec<(u64, u64)>,
}

impl Kernel {
    /// Reads the headers and notes of `file`.
    pub fn open(file: &File) -> Result<Self, KernelError> {
        let header = read(file, 0, HEADER_BYTES)?;
        let (table, entries) = program_header_table(&header)?;
        let bytes = usize::from(entries) * PROGRAM_HEADER_BYTES;
        let headers = Headers::parse(&read(file, table, bytes)?)?;
        for &(offset, bytes) in &headers.notes {
            let length = usize::try_from(bytes.min(MAX_NOTES_BYTES)).unwrap_or(0);
            let notes = read(file, offset, length)?;
            if let Some(entry) = entry_of_notes(&notes) {
                return Ok(Self {
                    segments: headers.segments,
                    end: headers.end,
                    entry: GuestAddress(entry.into()),
                });
            }
        }
        Err(KernelError::NoPvh)
    }
}

fn read(file: &File, offset: u64, bytes: usize) -> Result<Vec<u8>, KernelError> {
    let mut buffer = vec![0; bytes];
    file.read_exact_at(&mut buffer, offset)
        .map_err(|source| KernelError::Read {
            offset,
            bytes,
            source,
        })?;
    Ok(buffer)
}

/// Offset and number of the program headers.
fn program_header_table(header: &[u8]) -> Result<(u64, u16), KernelError> {
    if !header.starts_with(MAGIC) {
        return Err(KernelError::NotElf("it does not begin with \\x7fELF"));
    }
    if header.get(4) != Some(&CLASS_64) || header.get(5) != Some(&LITTLE_ENDIAN) {
        return Err(KernelError::NotElf("it is not 64-bit little-endian"));
    }
    if number::<2>(header, 18).map(u16::from_le_bytes) != Some(MACHINE_X86_64) {
        return Err(KernelError::NotElf("it is for another machine"));
    }
    let short = KernelError::NotElf("its header is cut off");
    let field = |offset| number::<2>(header, offset).map(u16::from_le_bytes);
    let (Some(table), Some(size), Some(entries)) = (
        number::<8>(header, 32).map(u64::from_le_bytes),
        field(54),
        field(56),
    ) else {
        return Err(short);
    };
    if usize::from(size) != PROGRAM_HEADER_BYTES {
        return Err(wrong("the size of a program header", size.into()));
    }
    if entries == 0 || entries > MAX_PROGRAM_HEADERS {
        return Err(wrong("the number of program headers", entries.into()));
    }
    Ok((table, entries))
}

impl Headers {
    /// Reads the table of program headers.
    pub fn parse(table: &[u8]) -> Result<Self, KernelError> {
        let mut headers = Self {
            segments: Vec::new(),
            end: GuestAddress(0),
            notes: Vec::new(),
        };
        for entry in table.chunks_exact(PROGRAM_HEADER_BYTES) {
            let field = |offset| number::<8>(entry, offset).map_or(0, u64::from_le_bytes);
            let (offset, at, in_file, in_memory) = (field(8), field(24), field(32), field(40));
            match number::<4>(entry, 0).map_or(0, u32::from_le_bytes) {
                TYPE_LOAD => headers.add_segment(offset, at, in_file, in_memory)?,
                TYPE_NOTE => headers.notes.push((offset, in_file)),
                _ => {}
            }
        }
        if headers.segments.is_empty() {
            return Err(wrong("the number of loadable segments", 0));
        }
        Ok(headers)
    }

    fn add_segment(
        &mut self,
        offset: u64,
        at: u64,
        in_file: u64,
        in_memory: u64,
    ) -> Result<(), KernelError> {
        if at < layout::HIGH_RAM.0 {
            return Err(wrong("the address of a segment", at));
        }
        if in_memory < in_file {
            return Err(wrong("the size of a segment in memory", in_memory));
        }
        let end = at.checked_add(in_memory);
        let end = end.ok_or_else(|| wrong("the size of a segment in memory", in_memory))?;
        offset
            .checked_add(in_file)
            .ok_or_else(|| wrong("the size of a segment in the file", in_file))?;
        self.end = self.end.max(GuestAddress(end));
        self.segments.push(Extent {
            offset,
            at: GuestAddress(at),
            bytes: in_file,
        });
        Ok(())
    }
}

/// Finds the PVH entry point among ELF notes.
pub fn entry_of_notes(mut notes: &[u8]) -> Option<u32> {
    loop {
        let field = |offset| number::<4>(notes, offset).map(u32::from_le_bytes);
        let owner_bytes = usize::try_from(field(0)?).ok()?;
        let value_bytes = usize::try_from(field(4)?).ok()?;
        let kind = field(8)?;
        let value_at = owner_bytes.checked_next_multiple_of(4)?.checked_add(12)?;
        let next = value_bytes
            .checked_next_multiple_of(4)?
            .checked_add(value_at)?;
        let owner = notes.get(12..12_usize.checked_add(owner_bytes)?)?;
        if kind == NOTE_PVH_ENTRY && owner == NOTE_OWNER && value_bytes >= 4 {
            return number::<4>(notes, value_at).map(u32::from_le_bytes);
        }
        notes = notes.get(next..)?;
    }
}

fn number<const BYTES: usize>(bytes: &[u8], offset: usize) -> Option<[u8; BYTES]> {
    bytes.get(offset..)?.first_chunk().copied()
}

fn wrong(what: &'static str, value: u64) -> KernelError {
    KernelError::Header { what, value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use linux_loader::loader::{Elf, KernelLoader, PvhBootCapability};
    use proptest::prelude::*;
    use std::io::Write;
    use vm_memory::Bytes;

    const TEXT_AT: u64 = 0x10_0000;

    fn program_header(kind: u32, offset: u64, at: u64, in_file: u64, in_memory: u64) -> Vec<u8> {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend(7_u32.to_le_bytes());
        for field in [offset, at, at, in_file, in_memory, 4] {
            bytes.extend(field.to_le_bytes());
        }
        bytes
    }

    fn note(owner: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for field in [owner.len(), value.len()] {
            bytes.extend(u32::try_from(field).unwrap().to_le_bytes());
        }
        bytes.extend(kind.to_le_bytes());
        for part in [owner, value] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    /// An ELF file with one segment of three and a half pages and a PVH note.
    fn image(text: &[u8]) -> Vec<u8> {
        let mut notes = note(b"GNU\0", 3, &[1; 5]);
        notes.extend(note(b"Xen\0", NOTE_PVH_ENTRY, &0x10_0123_u32.to_le_bytes()));
        let mut bytes = MAGIC.to_vec();
        bytes.extend([CLASS_64, LITTLE_ENDIAN, 1, 0]);
        bytes.resize(16, 0);
        bytes.extend(2_u16.to_le_bytes());
        bytes.extend(MACHINE_X86_64.to_le_bytes());
        bytes.extend(1_u32.to_le_bytes());
        bytes.extend(TEXT_AT.to_le_bytes());
        bytes.extend(64_u64.to_le_bytes());
        bytes.extend([0; 12]);
        for field in [64_u16, 56, 2, 0, 0, 0] {
            bytes.extend(field.to_le_bytes());
        }
        let length = u64::try_from(text.len()).unwrap();
        bytes.extend(program_header(
            TYPE_LOAD,
            8192,
            TEXT_AT,
            length,
            length + 100,
        ));
        let notes_length = u64::try_from(notes.len()).unwrap();
        bytes.extend(program_header(
            TYPE_NOTE,
            4096,
            0,
            notes_length,
            notes_length,
        ));
        bytes.resize(4096, 0);
        bytes.extend(notes);
        bytes.resize(8192, 0);
        bytes.extend(text);
        bytes
    }

    fn file(contents: &[u8]) -> File {
        let fd = rustix::fs::memfd_create("kernel", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(contents).unwrap();
        file
    }

    #[test]
    fn a_kernel_is_loaded_as_linux_loader_loads_it() {
        let text: Vec<u8> = (0..14_336_u32).map(|i| i.to_le_bytes()[0]).collect();
        let mut image = file(&image(&text));
        let ours = memory::allocate(&layout::ram(2 << 20)).unwrap();
        let kernel = Kernel::open(&image).unwrap();
        for segment in &kernel.segments {
            memory::read(&ours, &image, *segment).unwrap();
        }
        let theirs = memory::allocate(&layout::ram(2 << 20)).unwrap();
        let loaded = Elf::load(&theirs, None, &mut image, None).unwrap();
        assert_eq!(
            loaded.pvh_boot_cap,
            PvhBootCapability::PvhEntryPresent(kernel.entry)
        );
        let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        ours.read_slice(&mut left, GuestAddress(1 << 20)).unwrap();
        theirs
            .read_slice(&mut right, GuestAddress(1 << 20))
            .unwrap();
        assert!(left == right, "guest RAM differs");
    }

    #[test]
    fn files_that_are_no_kernels_are_refused_by_name() {
        let refused = |contents: &[u8]| Kernel::open(&file(contents)).unwrap_err().to_string();
        assert!(refused(b"hello").contains("cannot read 64 bytes"));
        assert!(refused(&[b'x'; 100]).contains("not an uncompressed x86-64 ELF"));
        let mut arm = image(b"text");
        arm[18] = 183;
        assert!(refused(&arm).contains("another machine"));
        let mut without_note = image(b"text");
        without_note[4096..4200].fill(0);
        assert!(refused(&without_note).contains("no PVH entry point"));
        let mut low = image(b"text");
        low[64 + 24..64 + 32].fill(0);
        assert!(refused(&low).contains("the address of a segment is 0x0"));
    }

    proptest! {
        #[test]
        fn any_bytes_are_headers_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = program_header_table(&bytes);
            let _ = Headers::parse(&bytes);
            let _ = entry_of_notes(&bytes);
        }

        #[test]
        fn any_change_of_a_kernel_is_a_kernel_or_an_error(at in 0_usize..4200, value: u8) {
            let mut changed = image(b"text");
            changed[at] = value;
            let _ = Kernel::open(&file(&changed));
        }
    }
}

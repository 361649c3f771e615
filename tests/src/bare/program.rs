#![allow(
    unsafe_code,
    reason = "the bytes of the guest's program lie between two symbols"
)]
//! The program that executes a script, and the ELF file that holds both.
//!
//! Entered as Xen's PVH protocol says: 32-bit protected mode, no paging. It switches to 64-bit mode, so that it
//! reaches addresses beyond 4 GiB and makes accesses of eight bytes, and then reads operations of [`OPERATION_BYTES`]
//! bytes: kind and count (32 bits), address, value, and what to add to each of the two (64 bits).

use super::{BASE, FAR, FAR_WINDOW, SCRIPT};
use std::{arch::global_asm, slice};

/// Kinds of operations: their positions in the program's jump table. The first four have four widths.
pub(super) const WRITE: u32 = 0;
pub(super) const READ: u32 = 4;
pub(super) const OUTPUT: u32 = 8;
pub(super) const INPUT: u32 = 12;
pub(super) const READ_MSR: u32 = 16;
pub(super) const WRITE_MSR: u32 = 17;
pub(super) const OUTPUT_STRING: u32 = 18;
pub(super) const INPUT_STRING: u32 = 19;
pub(super) const EXECUTE: u32 = 20;
pub(super) const HYPERCALL: u32 = 21;
pub(super) const UNTIL: u32 = 22;
pub(super) const CONTINUE: u32 = 23;
pub(super) const HALT: u32 = 24;
pub(super) const SPIN: u32 = 25;
pub(super) const TRIPLE_FAULT: u32 = 26;
pub(super) const SHOW: u32 = 27;

const OPERATION_BYTES: u64 = 40;
/// Places in the image: descriptor table, pointers to the tables, interrupt table, page tables, the stack's end
/// (with room above it for strings).
const GDT: u64 = BASE + 0x1000;
const GDT_POINTER: u64 = GDT + 0x100;
const IDT_POINTER: u64 = GDT + 0x110;
const NO_IDT_POINTER: u64 = GDT + 0x120;
const IDT: u64 = BASE + 0x2000;
const ROOT: u64 = BASE + 0x3000;
const DIRECTORIES: u64 = BASE + 0x4000;
const TABLES: u64 = BASE + 0x5000;
const STACK: u64 = BASE + 0x1_0000;

/// Present and writable; in a page directory also: a page of 2 MiB.
const WRITABLE: u64 = 3;
const LARGE: u64 = 0x83;

global_asm!(
    ".pushsection .rodata.walnut_bare, \"a\", @progbits",
    // The compiler may put what refers to them into another object than this.
    ".globl walnut_bare_start, walnut_bare_end",
    ".hidden walnut_bare_start, walnut_bare_end",
    "walnut_bare_start:",
    ".code32",
    "mov eax, {root}",
    "mov cr3, eax",
    "mov eax, 0x20", // CR4.PAE
    "mov cr4, eax",
    "mov ecx, 0xc0000080", // EFER.LME
    "rdmsr",
    "or eax, 0x100",
    "wrmsr",
    "lgdt [{gdt_pointer}]",
    "mov eax, 0x80000011", // CR0: paging, protection
    "mov cr0, eax",
    ".byte 0xea", // a far jump
    ".long {base} + (2f - walnut_bare_start)",
    ".word 8",
    ".code64",
    "2:",
    "mov esp, {stack}",
    "lidt [{idt_pointer}]",
    "mov esi, {script}",
    // RSI: operation, R15: how often, RDI: address, RBX: value.
    "next:",
    "mov r15d, dword ptr [rsi + 4]",
    "mov rdi, qword ptr [rsi + 8]",
    "mov rbx, qword ptr [rsi + 16]",
    "again:",
    "test r15d, r15d",
    "jz done",
    "mov eax, dword ptr [rsi]",
    "lea r8, [rip + kinds]",
    "movsxd r9, dword ptr [r8 + rax * 4]",
    "add r9, r8",
    "mov rax, rbx",
    "mov edx, edi",
    "mov ecx, edi",
    "jmp r9",
    // Where every exception continues: the stack is as it was.
    "fault:",
    "mov esp, {stack}",
    "after:",
    "add rdi, qword ptr [rsi + 24]",
    "add rbx, qword ptr [rsi + 32]",
    "dec r15d",
    "jmp again",
    "done:",
    "add rsi, {operation}",
    "jmp next",
    "write8: mov byte ptr [rdi], al; jmp after",
    "write16: mov word ptr [rdi], ax; jmp after",
    "write32: mov dword ptr [rdi], eax; jmp after",
    "write64: mov qword ptr [rdi], rax; jmp after",
    "read8: mov al, byte ptr [rdi]; jmp after",
    "read16: mov ax, word ptr [rdi]; jmp after",
    "read32: mov eax, dword ptr [rdi]; jmp after",
    "read64: mov rax, qword ptr [rdi]; jmp after",
    "out8: out dx, al; jmp after",
    "out16: out dx, ax; jmp after",
    "out32: out dx, eax; jmp after",
    "in8: in al, dx; jmp after",
    "in16: in ax, dx; jmp after",
    "in32: in eax, dx; jmp after",
    "read_msr: rdmsr; jmp after",
    "write_msr: mov rdx, rbx; shr rdx, 32; wrmsr; jmp after",
    "outs: mov r14, rsi; mov esi, {stack}; mov rcx, rbx; rep outsb; mov rsi, r14; jmp after",
    "ins: mov r14, rdi; mov edi, {stack}; mov rcx, rbx; rep insb; mov rdi, r14; jmp after",
    "execute: jmp rdi",
    "hypercall: mov rax, rdi; vmmcall; jmp after",
    "until: pause; cmp word ptr [rdi], bx; jne after; mov r15d, 1; jmp after",
    "continue: mov rsi, rdi; jmp next",
    "halt: cli; hlt; jmp halt",
    "spin: jmp spin",
    "triple: lidt [{no_idt_pointer}]; int3",
    "show: mov al, byte ptr [rdi]; add al, 0x30; mov edx, ebx; out dx, al; jmp after",
    ".balign 4",
    "kinds:",
    ".long write8 - kinds, write16 - kinds, write32 - kinds, write64 - kinds",
    ".long read8 - kinds, read16 - kinds, read32 - kinds, read64 - kinds",
    ".long out8 - kinds, out16 - kinds, out32 - kinds, out32 - kinds",
    ".long in8 - kinds, in16 - kinds, in32 - kinds, in32 - kinds",
    ".long read_msr - kinds, write_msr - kinds, outs - kinds, ins - kinds, execute - kinds",
    ".long hypercall - kinds, until - kinds, continue - kinds, halt - kinds, spin - kinds",
    ".long triple - kinds, show - kinds",
    // Not code: where `fault` is, for the interrupt table.
    "walnut_bare_fault: .long fault - walnut_bare_start",
    "walnut_bare_end:",
    ".popsection",
    root = const ROOT,
    gdt_pointer = const GDT_POINTER,
    idt_pointer = const IDT_POINTER,
    no_idt_pointer = const NO_IDT_POINTER,
    base = const BASE,
    stack = const STACK,
    script = const SCRIPT,
    operation = const OPERATION_BYTES,
);

unsafe extern "C" {
    #[link_name = "walnut_bare_start"]
    static START: u8;
    #[link_name = "walnut_bare_end"]
    static END: u8;
}

fn code() -> &'static [u8] {
    let start = &raw const START;
    let bytes = (&raw const END).addr() - start.addr();
    // SAFETY: the assembler put so many bytes between the two symbols, in a section that is never written.
    unsafe { slice::from_raw_parts(start, bytes) }
}

/// The image's memory, from [`BASE`] on.
struct Memory(Vec<u8>);

impl Memory {
    fn put(&mut self, address: u64, bytes: &[u8]) {
        let at = usize::try_from(address - BASE).unwrap_or(usize::MAX);
        let end = at.saturating_add(bytes.len());
        self.0.resize(self.0.len().max(end), 0);
        self.0[at..end].copy_from_slice(bytes);
    }

    fn put_words(&mut self, address: u64, words: impl IntoIterator<Item = u64>) {
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        self.put(address, &bytes);
    }

    /// What LGDT and LIDT read.
    fn put_pointer(&mut self, at: u64, table: u64, limit: u16) {
        self.put(at, &limit.to_le_bytes());
        self.put(at + 2, &table.to_le_bytes());
    }

    /// Eight GiB where they are, and one at [`FAR_WINDOW`] that shows what is at [`FAR`].
    fn put_page_tables(&mut self) {
        let gibs = FAR_WINDOW >> 30;
        self.put_words(ROOT, [DIRECTORIES | WRITABLE]);
        let directories = (0..=gibs).map(|gib| (TABLES + gib * 0x1000) | WRITABLE);
        self.put_words(DIRECTORIES, directories);
        for gib in 0..=gibs {
            let physical = if gib == gibs { FAR } else { gib << 30 };
            let pages = (0..512).map(|page| (physical + (page << 21)) | LARGE);
            self.put_words(TABLES + gib * 0x1000, pages);
        }
    }

    /// Every vector leads to the program's `fault`, by interrupt gates (Intel SDM, volume 3, figure 6-8).
    fn put_interrupt_table(&mut self, fault: u64) {
        let gate = fault & 0xffff | 8 << 16 | 0x8e00 << 32 | (fault >> 16 & 0xffff) << 48;
        self.put_words(IDT, [gate, fault >> 32].repeat(256));
        self.put_pointer(IDT_POINTER, IDT, 0xfff);
        self.put_pointer(NO_IDT_POINTER, 0, 0);
    }
}

/// An ELF file whose one segment is program, tables and `script`, with the note that names its entry.
pub(super) fn image(script: &[u8]) -> Vec<u8> {
    let code = code();
    let offset = code
        .last_chunk()
        .map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let mut memory = Memory(Vec::new());
    memory.put(BASE, code);
    // Nothing, 64-bit code, data.
    memory.put_words(GDT, [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]);
    memory.put_pointer(GDT_POINTER, GDT, 0x17);
    memory.put_interrupt_table(BASE + u64::from(offset));
    memory.put_page_tables();
    memory.put(SCRIPT, script);
    elf(&memory.0)
}

/// Bytes before the segment in the file.
const HEADERS_BYTES: u64 = 0x1000;
const NOTE_AT: u64 = 0x200;
/// `XEN_ELFNOTE_PHYS32_ENTRY`.
const PVH_ENTRY: u32 = 18;

fn elf(segment: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for field in [4, 4, PVH_ENTRY, u32::from_le_bytes(*b"Xen\0")] {
        note.extend(field.to_le_bytes());
    }
    note.extend(&BASE.to_le_bytes()[..4]);

    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // An executable for x86-64, version 1; entry, program headers at 64, no sections.
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for field in [BASE, 64, 0] {
        file.extend(field.to_le_bytes());
    }
    for field in [0_u16, 0, 64, 56, 2, 0, 0, 0] {
        file.extend(field.to_le_bytes());
    }
    let headers = [
        (1_u32, HEADERS_BYTES, BASE, segment.len() as u64),
        (4, NOTE_AT, 0, note.len() as u64),
    ];
    for (kind, offset, address, bytes) in headers {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for field in [offset, address, address, bytes, bytes, 4] {
            file.extend(field.to_le_bytes());
        }
    }
    file.resize(0x200, 0);
    file.extend(note);
    file.resize(0x1000, 0);
    file.extend(segment);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_fits_its_page_and_every_kind_leads_into_it() {
        let code = code();
        assert!(code.len() < 0x1000, "{}", code.len());
        let kinds = usize::try_from(SHOW).unwrap() + 1;
        let table = code.len() - 4 - kinds * 4;
        for entry in code[table..code.len() - 4].chunks_exact(4) {
            let distance = i32::from_le_bytes(entry.try_into().unwrap());
            let at = i32::try_from(table).unwrap() + distance;
            assert!((0..i32::try_from(table).unwrap()).contains(&at), "{at}");
        }
        let image = image(&[1; 80]);
        assert_eq!(&image[..4], b"\x7fELF");
        assert_eq!(&image[image.len() - 80..], [1; 80]);
        assert_eq!(code[0], 0xb8, "MOV EAX is the first instruction");
    }
}

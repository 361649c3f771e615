//! A guest without a kernel: a PVH image that executes a script of accesses which a test wrote.
//!
//! The image is one page of code (`program`), tables that put the processor into 64-bit mode with memory where it
//! is, and the [`Script`]. So a test says in Rust what a hostile guest does, access by access, and no operating
//! system is in its way.

mod program;
pub mod virtio;

use crate::vmm::VmBuilder;
use anyhow::{Context, Result};
use std::{fs, path::Path};

/// Free RAM for the script's own structures, from here to the end of the guest's RAM.
pub const FREE_RAM: u64 = 0x100_0000;
/// Where [`Script`] can reach guest-physical addresses from [`FAR`] on: one GiB of them.
pub const FAR_WINDOW: u64 = 8 << 30;
/// The last GiB of a 40-bit address space.
pub const FAR: u64 = (1 << 40) - (1 << 30);

const BASE: u64 = 0x10_0000;
const SCRIPT: u64 = BASE + 0x2_0000;
const PORT: u64 = 0x3f8;

/// Bytes of one access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// Eight bits.
    Byte,
    /// Sixteen bits.
    Word,
    /// 32 bits.
    Long,
    /// 64 bits; not for ports.
    Quad,
}

impl Width {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Byte, Self::Word, Self::Long, Self::Quad];
    /// Those that ports have.
    pub const PORTS: [Self; 3] = [Self::Byte, Self::Word, Self::Long];

    fn index(self) -> u32 {
        match self {
            Self::Byte => 0,
            Self::Word => 1,
            Self::Long => 2,
            Self::Quad => 3,
        }
    }
}

/// How often an operation is done, and what is added to its address and its value each time.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// How often.
    pub count: u32,
    /// Added to the address.
    pub step: u64,
    /// Added to the value.
    pub change: u64,
}

/// Once.
pub const ONCE: Times = Times {
    count: 1,
    step: 0,
    change: 0,
};

/// `count` times, at addresses `step` apart.
pub fn steps(count: u32, step: u64) -> Times {
    Times {
        count,
        step,
        change: 0,
    }
}

/// What the guest does, in order. An exception of the processor ends one access, and the next one follows.
#[derive(Debug, Clone, Default)]
pub struct Script {
    operations: Vec<u8>,
}

impl Script {
    fn add(&mut self, kind: u32, address: u64, value: u64, times: Times) -> &mut Self {
        self.operations.extend(kind.to_le_bytes());
        self.operations.extend(times.count.to_le_bytes());
        for field in [address, value, times.step, times.change] {
            self.operations.extend(field.to_le_bytes());
        }
        self
    }

    /// Writes memory or a register.
    pub fn write(&mut self, width: Width, address: u64, value: u64, times: Times) -> &mut Self {
        self.add(program::WRITE + width.index(), address, value, times)
    }

    /// Reads memory or a register.
    pub fn read(&mut self, width: Width, address: u64, times: Times) -> &mut Self {
        self.add(program::READ + width.index(), address, 0, times)
    }

    /// Writes a port.
    pub fn output(&mut self, width: Width, port: u64, value: u64, times: Times) -> &mut Self {
        self.add(program::OUTPUT + width.index(), port, value, times)
    }

    /// Reads a port.
    pub fn input(&mut self, width: Width, port: u64, times: Times) -> &mut Self {
        self.add(program::INPUT + width.index(), port, 0, times)
    }

    /// Moves `bytes` between memory and a port with one instruction, out and in.
    pub fn strings(&mut self, port: u64, bytes: u64, times: Times) -> &mut Self {
        self.add(program::OUTPUT_STRING, port, bytes, times).add(
            program::INPUT_STRING,
            port,
            bytes,
            times,
        )
    }

    /// Reads a model-specific register and writes `value` to it.
    pub fn msr(&mut self, index: u64, value: u64, times: Times) -> &mut Self {
        self.add(program::READ_MSR, index, 0, times)
            .add(program::WRITE_MSR, index, value, times)
    }

    /// Calls the hypervisor.
    pub fn hypercall(&mut self, number: u64, argument: u64, times: Times) -> &mut Self {
        self.add(program::HYPERCALL, number, argument, times)
    }

    /// Waits until the 16-bit word at `address` is `value`, looking `looks` times at the most.
    pub fn until(&mut self, address: u64, value: u16, looks: u32) -> &mut Self {
        self.add(program::UNTIL, address, value.into(), steps(looks, 0))
    }

    /// Executes what is at `address`.
    pub fn execute(&mut self, address: u64) -> &mut Self {
        self.add(program::EXECUTE, address, 0, ONCE)
    }

    /// Starts over, for ever.
    pub fn start_over(&mut self) -> &mut Self {
        self.add(program::CONTINUE, SCRIPT, 0, ONCE)
    }

    /// Stops the processor, with interrupts off.
    pub fn halt(&mut self) -> &mut Self {
        self.add(program::HALT, 0, 0, ONCE)
    }

    /// Uses the processor for ever, with interrupts off.
    pub fn spin(&mut self) -> &mut Self {
        self.add(program::SPIN, 0, 0, ONCE)
    }

    /// Takes an exception without a table of handlers.
    pub fn triple_fault(&mut self) -> &mut Self {
        self.add(program::TRIPLE_FAULT, 0, 0, ONCE)
    }

    /// Writes a line to the console, whatever was done to its port before.
    pub fn say(&mut self, text: &str) -> &mut Self {
        // Eight data bits and no divisor latch, no interrupts, no loopback.
        for (register, value) in [(3, 3), (1, 0), (4, 8)] {
            self.output(Width::Byte, PORT + register, value, ONCE);
        }
        for byte in text.bytes().chain([b'\n']) {
            self.output(Width::Byte, PORT, byte.into(), ONCE);
        }
        self
    }

    /// Writes `name`, an equals sign and the digit that the byte at `address` holds to the console.
    pub fn show(&mut self, name: &str, address: u64) -> &mut Self {
        for byte in name.bytes().chain([b'=']) {
            self.output(Width::Byte, PORT, byte.into(), ONCE);
        }
        self.add(program::SHOW, address, PORT, ONCE)
            .output(Width::Byte, PORT, b'\n'.into(), ONCE)
    }

    /// The image that executes the script, and then halts.
    pub fn image(&self) -> Vec<u8> {
        let mut script = self.clone();
        script.halt();
        program::image(&script.operations)
    }

    /// A VM whose kernel is this script; the image is put into `directory`.
    pub fn boot_with(&self, builder: VmBuilder, directory: &Path) -> Result<VmBuilder> {
        let path = directory.join("script");
        fs::write(&path, self.image())
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(builder.kernel(&path))
    }
}

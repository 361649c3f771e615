//! Makes small guests for tests: an initramfs in the newc format (the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Must not resemble the product's guest image: a test's guest is a static busybox and one script.

use anyhow::{Context, Result};
use std::{fs, path::Path};

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Every script starts so: the shell finds busybox's applets by their names.
const PROLOGUE: &str = "#!/bin/busybox sh\nexport PATH=/bin\n/bin/busybox --install -s /bin\n";

/// An archive that grows entry by entry.
#[derive(Debug, Default)]
pub struct Initramfs {
    archive: Vec<u8>,
    entries: u32,
}

impl Initramfs {
    /// A guest whose init is this shell script. The console is its standard input and output.
    pub fn script(busybox: &Path, script: &str) -> Result<Vec<u8>> {
        let mut initramfs = Self::with_busybox(busybox)?;
        let text = format!("{PROLOGUE}{script}\n");
        initramfs.entry("init", EXECUTABLE, (0, 0), text.as_bytes())?;
        initramfs.finish()
    }

    /// A guest without an init: the kernel panics once it looks for one.
    pub fn without_init(busybox: &Path) -> Result<Vec<u8>> {
        Self::with_busybox(busybox)?.finish()
    }

    fn with_busybox(busybox: &Path) -> Result<Self> {
        let program =
            fs::read(busybox).with_context(|| format!("cannot read {}", busybox.display()))?;
        let mut initramfs = Self::default();
        for directory in ["bin", "dev", "proc", "sys"] {
            initramfs.entry(directory, DIRECTORY, (0, 0), &[])?;
        }
        // The kernel opens it for init before anything is mounted.
        initramfs.entry("dev/console", CHARACTER_DEVICE, (5, 1), &[])?;
        initramfs.entry("bin/busybox", EXECUTABLE, (0, 0), &program)?;
        Ok(initramfs)
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(data.len()).context("the archive's format ends at 4 GiB")?;
        let name_size = u32::try_from(name.len() + 1).context("a name of 4 GiB")?;
        let links = 1;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            device.0,
            device.1,
            name_size,
            0,
        ];
        self.archive.extend(b"070701");
        for field in fields {
            self.archive.extend(format!("{field:08X}").bytes());
        }
        self.archive.extend(name.bytes());
        self.archive.push(0);
        self.pad();
        self.archive.extend(data);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        let aligned = self.archive.len().next_multiple_of(4);
        self.archive.resize(aligned, 0);
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, (0, 0), &[])?;
        Ok(self.archive)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_entry_starts_at_a_multiple_of_four_bytes() {
        let mut initramfs = Initramfs::default();
        initramfs
            .entry("init", EXECUTABLE, (0, 0), b"12345")
            .unwrap();
        let second = initramfs.archive.len();
        let archive = initramfs.finish().unwrap();
        assert_eq!(second % 4, 0);
        assert_eq!(&archive[second..second + 6], b"070701");
        assert_eq!(&archive[54..62], b"00000005");
    }
}

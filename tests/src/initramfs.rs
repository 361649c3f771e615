//! Makes small guests for tests: an initramfs in the newc format (the kernel's
//! Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Must not resemble the product's guest image: a test's guest is a static busybox and one script.

use anyhow::{Context, Result, ensure};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Every script starts so: the shell finds busybox's applets by their names.
const PROLOGUE: &str =
    "#!/bin/busybox sh\nexport PATH=/usr/sbin:/usr/bin:/bin\n/bin/busybox --install -s /bin\n";

/// Where programs of this machine are.
const PROGRAM_FOLDERS: [&str; 2] = ["/usr/sbin", "/usr/bin"];

/// An archive that grows entry by entry.
#[derive(Debug, Default)]
pub struct Initramfs {
    archive: Vec<u8>,
    entries: u32,
}

impl Initramfs {
    /// A guest whose init is this shell script. The console is its standard input and output.
    pub fn script(busybox: &Path, script: &str) -> Result<Vec<u8>> {
        Self::script_with(busybox, &[], script)
    }

    /// As [`Initramfs::script`], with these programs of this machine beside busybox: `fio`, `mkfs.ext4`, …, each
    /// at its place here, and the libraries that they load.
    pub fn script_with(busybox: &Path, programs: &[&str], script: &str) -> Result<Vec<u8>> {
        let mut initramfs = Self::with_busybox(busybox)?;
        let mut files = BTreeSet::new();
        for name in programs {
            let path = find_program(name)?;
            files.extend(libraries(&path)?);
            files.insert(path);
        }
        let folders: BTreeSet<&Path> = files
            .iter()
            .flat_map(|file| file.ancestors().skip(1))
            .filter(|folder| *folder != Path::new("/"))
            .collect();
        for folder in folders {
            initramfs.entry(in_archive(folder)?, DIRECTORY, (0, 0), &[])?;
        }
        for file in &files {
            let bytes =
                fs::read(file).with_context(|| format!("cannot read {}", file.display()))?;
            initramfs.entry(in_archive(file)?, EXECUTABLE, (0, 0), &bytes)?;
        }
        let text = format!("{PROLOGUE}{script}\n");
        initramfs.entry("init", EXECUTABLE, (0, 0), text.as_bytes())?;
        initramfs.finish()
    }

    /// The agent's guest (`initramfs`), in which this script, `/script`, is the first program (`rdinit=`): it is to
    /// execute `/init`, the agent.
    pub fn before(busybox: &Path, initramfs: &Path, script: &str) -> Result<Vec<u8>> {
        let mut first = Self::with_busybox(busybox)?;
        let text = format!("{PROLOGUE}{script}\n");
        first.entry("script", EXECUTABLE, (0, 0), text.as_bytes())?;
        let mut archives = first.finish()?;
        let agents = fs::read(initramfs);
        archives.extend(agents.with_context(|| format!("cannot read {}", initramfs.display()))?);
        Ok(archives)
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

fn find_program(name: &str) -> Result<PathBuf> {
    let places = PROGRAM_FOLDERS.map(|folder| Path::new(folder).join(name));
    let found = places.into_iter().find(|path| path.is_file());
    found.with_context(|| format!("no {name} in {PROGRAM_FOLDERS:?}"))
}

/// The shared libraries and the loader of a program, by `ldd`; none of a static one.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output();
    let output = output.context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let is_static = String::from_utf8_lossy(&output.stderr).contains("not a dynamic executable");
    ensure!(output.status.success() || is_static, "ldd: {output:?}");
    let words = text.split_whitespace();
    let paths = words.filter(|word| word.starts_with('/') && word.contains(".so"));
    Ok(paths.map(PathBuf::from).collect())
}

fn in_archive(path: &Path) -> Result<&str> {
    let text = path.to_str().context("a path that is not text")?;
    Ok(text.trim_start_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_come_with_their_libraries() {
        let found = libraries(&find_program("sh").unwrap()).unwrap();
        assert!(found.iter().any(|path| path.ends_with("libc.so.6")));
        assert!(find_program("no-such-program").is_err());
    }

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

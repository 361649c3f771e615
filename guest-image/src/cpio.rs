//! Writes the archive format of an initramfs: "newc" of cpio(5), as in Linux's
//! Documentation/driver-api/early-userspace/buffer-format.rst.
//!
//! Owners are root and times zero, so that the same files give the same bytes.

use std::io::{self, Write};

/// What an entry is.
#[derive(Debug, Clone, Copy)]
pub enum Node<'a> {
    /// A directory.
    Directory,
    /// A regular file and its contents.
    File(&'a [u8]),
    /// A character device.
    CharacterDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// Writes one archive.
#[derive(Debug)]
pub struct Archive<W> {
    to: W,
    inode: u32,
}

impl<W: Write> Archive<W> {
    /// An archive that is written to `to`.
    pub fn new(to: W) -> Self {
        Self { to, inode: 0 }
    }

    /// Adds an entry. Parents come before what they hold; names have no leading slash.
    pub fn add(&mut self, name: &str, permissions: u32, node: Node<'_>) -> io::Result<()> {
        let (kind, contents, device): (u32, &[u8], (u32, u32)) = match node {
            Node::Directory => (0o040_000, &[], (0, 0)),
            Node::File(contents) => (0o100_000, contents, (0, 0)),
            Node::CharacterDevice { major, minor } => (0o020_000, &[], (major, minor)),
        };
        self.inode += 1;
        self.record(name, kind | permissions, contents, device)
    }

    /// Ends the archive.
    pub fn finish(mut self) -> io::Result<()> {
        self.inode = 0;
        self.record("TRAILER!!!", 0, &[], (0, 0))?;
        self.to.flush()
    }

    fn record(
        &mut self,
        name: &str,
        mode: u32,
        contents: &[u8],
        (major, minor): (u32, u32),
    ) -> io::Result<()> {
        let (inode, links, name_bytes) = (self.inode, 1, name.len() + 1);
        let length = u32::try_from(contents.len()).map_err(io::Error::other)?;
        write!(
            self.to,
            "070701{inode:08x}{mode:08x}{0:08x}{0:08x}{links:08x}{0:08x}",
            0
        )?;
        write!(
            self.to,
            "{length:08x}{0:08x}{0:08x}{major:08x}{minor:08x}",
            0
        )?;
        write!(self.to, "{name_bytes:08x}{:08x}{name}\0", 0)?;
        self.pad(110 + name_bytes)?;
        self.to.write_all(contents)?;
        self.pad(contents.len())
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        self.to
            .write_all(&[0; 3][..written.next_multiple_of(4) - written])
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn sample() -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.add("dev", 0o755, Node::Directory).unwrap();
        archive
            .add(
                "dev/console",
                0o600,
                Node::CharacterDevice { major: 5, minor: 1 },
            )
            .unwrap();
        archive.add("init", 0o755, Node::File(b"hello")).unwrap();
        archive.finish().unwrap();
        bytes
    }

    #[test]
    fn records_are_aligned_and_repeatable() {
        let bytes = sample();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701"));
        assert_eq!(bytes, sample());
    }

    #[test]
    fn cpio_lists_it() {
        let Ok(mut cpio) = Command::new("cpio")
            .args(["--list", "--verbose", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            eprintln!("skipped: no cpio on this machine");
            return;
        };
        cpio.stdin.take().unwrap().write_all(&sample()).unwrap();
        let output = cpio.wait_with_output().unwrap();
        let list = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success());
        assert!(list.contains("crw-------") && list.contains("5,   1") && list.contains("init"));
    }
}

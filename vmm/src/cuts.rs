//! Files that the guest has as memory, which the host may cut short.
//!
//! A vCPU that touches what was cut off neither goes on nor comes back: to KVM the page might only be late. So
//! the VM ends as soon as one of these files is shorter than what the guest was shown. Must not touch the
//! mappings.

use rustix::{
    fs::{
        fstat,
        inotify::{CreateFlags, WatchFlags, add_watch, init},
    },
    io::{Errno, read},
};
use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
};

/// Events are not looked at one by one: that something happened is enough.
const EVENT_BYTES: usize = 4096;

/// Why cuts could not be seen.
#[derive(Debug, thiserror::Error)]
pub enum CutError {
    /// The host gives no more inotify instances or watches to this user.
    #[error("cannot watch the size of the file of persistent memory {index}")]
    Watch {
        /// Which.
        index: usize,
        /// Why not.
        source: io::Error,
    },
}

/// The files, watched.
#[derive(Debug, Default)]
pub struct Cuts {
    inotify: Option<OwnedFd>,
    files: Vec<(File, i64)>,
}

impl Cuts {
    /// Watches one more file, as it is now. Needs `/proc`.
    pub fn watch(&mut self, file: &File) -> Result<(), CutError> {
        let index = self.files.len();
        self.add(file)
            .map_err(|source| CutError::Watch { index, source })
    }

    fn add(&mut self, file: &File) -> io::Result<()> {
        let file = file.try_clone()?;
        let bytes = fstat(&file)?.st_size;
        let inotify = match &self.inotify {
            Some(inotify) => inotify,
            None => self
                .inotify
                .insert(init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?),
        };
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        // A cut is a change of data to inotify; what the guest stores in its memory is none.
        add_watch(inotify, link, WatchFlags::MODIFY)?;
        self.files.push((file, bytes));
        Ok(())
    }

    /// Readable when a file was changed; none where no file is watched.
    pub fn changed(&self) -> Option<&OwnedFd> {
        self.inotify.as_ref()
    }

    /// What there is to say about a file that was cut. Clears the event.
    pub fn find(&self) -> Option<String> {
        let inotify = self.inotify.as_ref()?;
        while !matches!(
            read(inotify, &mut [0u8; EVENT_BYTES][..]),
            Err(Errno::AGAIN) | Ok(0)
        ) {}
        let mut files = self.files.iter().enumerate();
        files.find_map(|(index, (file, bytes))| {
            let now = fstat(file).ok()?.st_size;
            (now < *bytes).then(|| {
                format!(
                    "the host cut the file of persistent memory {index} from {bytes} to {now} bytes"
                )
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::io::Write;

    fn is_readable(cuts: &Cuts) -> bool {
        let mut wanted = [PollFd::new(cuts.changed().unwrap(), PollFlags::IN)];
        let now = Timespec::default();
        poll(&mut wanted, Some(&now)).unwrap() == 1
    }

    #[test]
    fn a_file_that_was_cut_is_named_and_others_are_not() {
        let mut cuts = Cuts::default();
        assert!(cuts.changed().is_none() && cuts.find().is_none());
        let mut files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        for file in &mut files {
            file.write_all(&[1; 5000]).unwrap();
            cuts.watch(file).unwrap();
        }
        assert!(!is_readable(&cuts));
        files[0].write_all(b"longer").unwrap();
        assert!(is_readable(&cuts));
        assert_eq!(cuts.find(), None);
        assert!(!is_readable(&cuts));
        files[1].set_len(4096).unwrap();
        assert!(is_readable(&cuts));
        let said = "the host cut the file of persistent memory 1 from 5000 to 4096 bytes";
        assert_eq!(cuts.find().as_deref(), Some(said));
    }
}

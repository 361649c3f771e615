//! The file system device: a directory of the host in the guest.
//!
//! virtio 1.3, section 5.11. FUSE itself is in `server`; here are the queues, one thread for each, so
//! that what the guest forgets or interrupts (the high-priority queue) does not wait behind a slow
//! request. The device must not open a path.

mod server;

pub use self::server::{FsError, PendingShare, ShareServer};

use super::{ActivateError, Activation, DeviceType, VirtioDevice, queue};
use crate::{
    event_loop::{Threads, Worker},
    seccomp::Kind,
};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// Sizes of the high-priority queue and of the request queue. A request of 1 MiB takes 256 pages, and
/// Linux sends no request with more pages than the queue has descriptors.
const QUEUE_SIZES: [u16; 2] = [128, 512];
/// Names of the threads that serve them.
const THREADS: [&str; 2] = ["fs-hiprio", "fs-request"];
/// Bytes of the tag in the configuration space.
const TAG_BYTES: usize = 36;
/// Tag and `num_request_queues` (section 5.11.4).
const CONFIG_BYTES: usize = TAG_BYTES + 4;

/// The file system device.
pub struct FileSystem {
    config: [u8; CONFIG_BYTES],
    server: Arc<ShareServer>,
    threads: Vec<Worker>,
    source: Option<Threads>,
}

impl FileSystem {
    /// A device that the guest mounts by `tag`, at most 36 bytes.
    pub fn new(tag: &str, server: ShareServer) -> Self {
        let mut config = [0; CONFIG_BYTES];
        for (byte, character) in config.iter_mut().take(TAG_BYTES).zip(tag.bytes()) {
            *byte = character;
        }
        config[TAG_BYTES..].copy_from_slice(&1u32.to_le_bytes());
        Self {
            config,
            server: Arc::new(server),
            threads: Vec::new(),
            source: None,
        }
    }
}

impl VirtioDevice for FileSystem {
    fn device_type(&self) -> DeviceType {
        DeviceType::FileSystem
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.source = Some(activation.threads.clone());
        let mut queues = activation.queues.into_iter();
        for (index, name) in THREADS.into_iter().enumerate() {
            let active = queues
                .next()
                .flatten()
                .ok_or(ActivateError::MissingQueue { index })?;
            let (memory, server) = (activation.memory.clone(), self.server.clone());
            let interrupt = activation.interrupt.clone();
            let serve = move |stop: EventFd| {
                queue::serve(active, &memory, &interrupt, &stop, |chain| {
                    server.answer(&memory, chain)
                });
            };
            let threads = &activation.threads;
            let thread = threads
                .spawn(Kind::Share, name, serve)
                .map_err(ActivateError::Thread)?;
            self.threads.push(thread);
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.threads.clear();
        // Forgetting opens the root again, which the calling vCPU may not.
        if let Some(source) = self.source.take() {
            let server = self.server.clone();
            let forget = move |_| server.forget_all();
            // Waited for, as the worker is dropped at once. Without it the server keeps what the guest knew.
            let _ = source.spawn(Kind::Share, "fs-forget", forget);
        }
    }
}

#[cfg(test)]
mod tests;

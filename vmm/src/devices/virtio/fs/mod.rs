//! The file system device: a directory of the host in the guest.
//!
//! virtio 1.3, section 5.11. FUSE's messages are in `server` and its files in `files`; here are the queues, one
//! thread for each, so that what the guest forgets or interrupts (the high-priority queue) does not wait behind
//! a slow request. The device must not open a path.

mod announce;
mod attributes;
mod files;
mod identity;
mod server;
mod table;
mod tree;

pub use self::server::{FsError, PendingShare, ShareServer};

use super::{ActivateError, Activation, DeviceType, SharedRegion, VirtioDevice, queue};
use crate::{
    event_loop::{Threads, Worker},
    seccomp::Kind,
};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// Request queues at the most: more threads of the host than a Pod's files keep busy.
const MAX_REQUEST_QUEUES: u8 = 4;
/// Size of the high-priority queue.
const HIGH_PRIORITY_SIZE: u16 = 128;
/// Size of a request queue. A request of 1 MiB takes 256 pages, and Linux sends no request with more pages than
/// the queue has descriptors.
const REQUEST_SIZE: u16 = 512;
/// Bytes of the tag in the configuration space.
const TAG_BYTES: usize = 36;
/// The shared memory region that is the DAX window (section 5.11.6.4).
const WINDOW_ID: u32 = 0;
/// Tag and `num_request_queues` (section 5.11.4).
const CONFIG_BYTES: usize = TAG_BYTES + 4;

/// The file system device.
pub struct FileSystem {
    config: [u8; CONFIG_BYTES],
    queue_sizes: Vec<u16>,
    server: Arc<ShareServer>,
    threads: Vec<Worker>,
    source: Option<Threads>,
}

impl FileSystem {
    /// A device that the guest mounts by `tag`, at most 36 bytes, with a request queue for each vCPU, within
    /// reason.
    pub fn new(tag: &str, server: ShareServer, vcpus: u8) -> Self {
        let request_queues = vcpus.clamp(1, MAX_REQUEST_QUEUES);
        let mut config = [0; CONFIG_BYTES];
        for (byte, character) in config.iter_mut().take(TAG_BYTES).zip(tag.bytes()) {
            *byte = character;
        }
        config[TAG_BYTES..].copy_from_slice(&u32::from(request_queues).to_le_bytes());
        let mut queue_sizes = vec![HIGH_PRIORITY_SIZE];
        queue_sizes.resize(1 + usize::from(request_queues), REQUEST_SIZE);
        Self {
            config,
            queue_sizes,
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
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.config, offset, data);
    }

    fn shared_region(&self, id: u32) -> Option<SharedRegion> {
        let window = self.server.window().filter(|_| id == WINDOW_ID);
        window.map(|window| window.region())
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.source = Some(activation.threads.clone());
        for (index, active) in activation.queues.into_iter().enumerate() {
            // A driver with fewer processors than there are queues leaves the last ones out.
            let Some(active) = active else {
                if index < 2 {
                    return Err(ActivateError::MissingQueue { index });
                }
                continue;
            };
            let (memory, server) = (activation.memory.clone(), self.server.clone());
            let interrupt = activation.interrupt.clone();
            let serve = move |stop: EventFd| match server.enter_thread() {
                Ok(session) => queue::serve(active, &memory, &interrupt, &stop, |chain| {
                    session.answer(&memory, chain)
                }),
                Err(_) => interrupt.signal_needs_reset(),
            };
            let name = if index == 0 {
                "fs-hiprio"
            } else {
                "fs-request"
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

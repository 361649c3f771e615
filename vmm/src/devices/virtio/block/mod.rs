//! Block device (virtio 1.3, section 5.2): a file or block device of the host as a disk.
//!
//! `request` says what the driver wants, `disk` what that comes to on the file; `ring` does it by io_uring, or
//! `disk` by plain system calls; `worker` serves a queue, each on a thread of its own. The cache mode cannot be
//! changed (no VIRTIO_BLK_F_CONFIG_WCE): a driver without VIRTIO_BLK_F_FLUSH gets writes that are durable.

mod disk;
pub mod request;
mod ring;
mod worker;

pub use self::disk::BlockError;

use self::{
    disk::{Disk, Durability, MAX_RANGE_SECTORS, MAX_SEGMENT_BYTES, MAX_SEGMENTS, SECTOR_BYTES},
    request::{MAX_DESCRIPTORS, MAX_RANGES},
    ring::Ring,
    worker::{Lane, QueueWorker},
};
use super::{ActivateError, Activation, DeviceType, VirtioDevice, rate_limit::RateLimiter};
use crate::{event_loop::Worker, seccomp::Kind};
use std::{
    fs::File,
    sync::{Arc, Mutex, PoisonError},
};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};
use walnut_vmm_api::DiskConfig;

const QUEUE_SIZE: u16 = 256;
const _: () = assert!(QUEUE_SIZE as usize == MAX_DESCRIPTORS);

/// The block device.
pub struct Block {
    disk: Arc<Disk>,
    queue_sizes: Vec<u16>,
    /// By queue; taken away while the queue is served.
    lanes: Vec<Arc<Mutex<Option<Lane>>>>,
    workers: Vec<Worker>,
}

impl Block {
    /// A device that is not started, for the disk in `file`.
    pub fn new(file: File, config: &DiskConfig) -> Result<Self, BlockError> {
        Self::joined(file, Vec::new(), config)
    }

    /// As [`Block::new`], for a disk that goes on in `others`.
    pub fn joined(file: File, others: Vec<File>, config: &DiskConfig) -> Result<Self, BlockError> {
        let disk = Disk::joined(file, others, config)?;
        let refused = |source| BlockError::Rate {
            serial: config.serial.clone(),
            source,
        };
        let limits = config.rate.map(|rate| RateLimiter::new(Some(rate)));
        let limits = limits.transpose().map_err(refused)?;
        let mut lanes = Vec::new();
        for _ in 0..config.queues.max(1) {
            let limiter = limits.as_ref().map(RateLimiter::share);
            let lane = Lane {
                // Of several files, old, switched off (kernel.io_uring_disabled) or filtered away: there is a way without it.
                ring: disk.file().and_then(|file| Ring::new(file).ok()),
                limiter: limiter.transpose().map_err(refused)?,
            };
            lanes.push(Arc::new(Mutex::new(Some(lane))));
        }
        Ok(Self {
            disk: Arc::new(disk),
            queue_sizes: vec![QUEUE_SIZE; lanes.len()],
            lanes,
            workers: Vec::new(),
        })
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> DeviceType {
        DeviceType::Block
    }

    fn features(&self) -> u64 {
        let always = 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY;
        let sometimes = [
            (VIRTIO_BLK_F_RO, self.disk.read_only),
            (VIRTIO_BLK_F_MQ, self.lanes.len() > 1),
            (VIRTIO_BLK_F_DISCARD, self.disk.discard.is_some()),
            (VIRTIO_BLK_F_WRITE_ZEROES, self.disk.zeroes),
        ];
        let offered = sometimes.iter().filter(|(_, offered)| *offered);
        offered.fold(always, |features, (bit, _)| features | 1 << bit)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// `struct virtio_blk_config` (section 5.2.4); what wasn't offered is zero, or not looked at.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let disk = &self.disk;
        let (logical, physical) = (disk.logical_block_bytes, disk.physical_block_bytes);
        let blocks = physical.checked_div(logical).unwrap_or(1).max(1);
        let exponent = u8::try_from(blocks.ilog2()).unwrap_or(0);
        let queues = u16::try_from(self.lanes.len()).unwrap_or(1);
        let ranges = u32::try_from(MAX_RANGES).unwrap_or(1).to_le_bytes();
        let range_sectors = MAX_RANGE_SECTORS.to_le_bytes();
        let alignment = u64::from(disk.discard_bytes()) / SECTOR_BYTES;
        let fields = [
            &(disk.capacity_bytes / SECTOR_BYTES).to_le_bytes()[..],
            &MAX_SEGMENT_BYTES.to_le_bytes(),
            &MAX_SEGMENTS.to_le_bytes(),
            // Geometry.
            &[0; 4],
            &logical.to_le_bytes(),
            // Physical blocks, the first of which starts with the disk; the least and the best size of a request.
            &[exponent, 0],
            &u16::try_from(blocks).unwrap_or(1).to_le_bytes(),
            &[0; 4],
            // Cache mode, and a byte that is not used.
            &[0; 2],
            &queues.to_le_bytes(),
            // Discard: sectors and ranges at the most, alignment in sectors.
            &range_sectors,
            &ranges,
            &u32::try_from(alignment).unwrap_or(1).to_le_bytes(),
            // Write-zeroes: sectors and ranges at the most, and that it may discard.
            &range_sectors,
            &ranges,
            &[1, 0, 0, 0],
        ];
        super::read_config_space(&fields.concat(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let memory = Arc::new(activation.memory);
        let durability = match activation.features & 1 << VIRTIO_BLK_F_FLUSH {
            0 => Durability::Durable,
            _ => Durability::Cached,
        };
        for (active, parked) in activation.queues.into_iter().zip(&self.lanes) {
            let (Some(active), parked) = (active, parked.clone()) else {
                continue;
            };
            let (memory, disk) = (memory.clone(), self.disk.clone());
            let interrupt = activation.interrupt.clone();
            let worker = activation.threads.spawn(Kind::Block, "block", move |stop| {
                let Some(lane) = exchange(&parked, None) else {
                    return interrupt.signal_needs_reset();
                };
                let worker = QueueWorker {
                    active,
                    memory,
                    interrupt,
                    disk,
                    durability,
                    lane,
                };
                exchange(&parked, Some(worker.serve(&stop)));
            });
            self.workers.push(worker.map_err(ActivateError::Thread)?);
        }
        match self.workers.is_empty() {
            true => Err(ActivateError::MissingQueue { index: 0 }),
            false => Ok(()),
        }
    }

    /// A queue has at most 48 MiB of data, or as many as three discards or write-zeroes instead of a part of it, and
    /// flushes in the kernel: a vCPU waits until the host has done these. Nothing of the guest can make it more.
    fn reset(&mut self) {
        self.workers.clear();
    }
}

fn exchange(parked: &Mutex<Option<Lane>>, lane: Option<Lane>) -> Option<Lane> {
    let mut parked = parked.lock().unwrap_or_else(PoisonError::into_inner);
    std::mem::replace(&mut parked, lane)
}

#[cfg(test)]
mod tests;

//! Memory device (virtio 1.3, section 5.15): RAM that the guest gets and gives back while it runs.
//!
//! The region is part of the VM's memory from the start, mapped but empty, and no RAM of the guest's memory map:
//! see docs/decisions/0012-virtio-mem.md, also for what a guest gains by touching what isn't plugged. The
//! driver plugs and unplugs blocks by requests until it has what the host wants.

mod blocks;
mod request;

use self::{
    blocks::{BLOCK_BYTES, Blocks},
    request::{REQUEST_BYTES, Request, Response},
};
use super::{ActivateError, Activation, DeviceType, Interrupt, SharedRegion, VirtioDevice, queue};
use crate::{event_loop::Worker, memory};
use std::{
    io::{Read, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const QUEUE_SIZES: [u16; 1] = [64];
/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (section 5.15.3): the driver does not even read what isn't plugged.
const FEATURE_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Why the guest's memory does not change.
#[derive(Debug, thiserror::Error)]
pub enum MemoryControlError {
    /// Less than it booted with, or more than its configuration allows.
    #[error("the guest's memory cannot be {asked} MiB: it may have {least} to {most}")]
    OutOfRange {
        /// MiB that were asked for.
        asked: u32,
        /// MiB that it booted with.
        least: u32,
        /// MiB that its configuration allows.
        most: u64,
    },
    /// Part of a block.
    #[error(
        "the guest's memory cannot be {asked} MiB: it differs from the {boot} MiB at boot by multiples of 2"
    )]
    PartOfBlock {
        /// MiB that were asked for.
        asked: u32,
        /// MiB that it booted with.
        boot: u32,
    },
}

#[derive(Debug)]
struct State {
    blocks: Blocks,
    /// The way to the driver while there is one.
    interrupt: Option<Interrupt>,
}

/// The host's hand on the size of the guest's memory.
#[derive(Debug, Clone)]
pub struct MemoryControl {
    state: Arc<Mutex<State>>,
    boot_mib: u32,
}

impl MemoryControl {
    /// Wishes that the guest has `mib` in all. It follows as it can, if it has a driver.
    pub fn set_size(&self, mib: u32) -> Result<(), MemoryControlError> {
        let boot_mib = self.boot_mib;
        let mut state = self.state();
        let growth_bytes = mib.checked_sub(boot_mib).map(|more| u64::from(more) << 20);
        let region_bytes = state.blocks.region_bytes();
        let bytes = growth_bytes.filter(|&bytes| bytes <= region_bytes).ok_or(
            MemoryControlError::OutOfRange {
                asked: mib,
                least: boot_mib,
                most: u64::from(boot_mib) + (region_bytes >> 20),
            },
        )?;
        if !bytes.is_multiple_of(BLOCK_BYTES) {
            let (asked, boot) = (mib, boot_mib);
            return Err(MemoryControlError::PartOfBlock { asked, boot });
        }
        state.blocks.request(bytes);
        if let Some(interrupt) = &state.interrupt {
            interrupt.signal_config_change();
        }
        Ok(())
    }

    /// Bytes that the guest has beyond those that it booted with.
    pub fn plugged_bytes(&self) -> u64 {
        self.state().blocks.plugged_bytes()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The memory device.
#[derive(Debug)]
pub struct MemoryDevice {
    control: MemoryControl,
    worker: Option<Worker>,
}

impl MemoryDevice {
    /// A device for `region`, whole blocks of guest memory that are empty, of a guest that boots with `boot_mib`.
    pub fn new(region: SharedRegion, boot_mib: u32) -> Self {
        let state = State {
            blocks: Blocks::new(region.address.0, region.bytes),
            interrupt: None,
        };
        let control = MemoryControl {
            state: Arc::new(Mutex::new(state)),
            boot_mib,
        };
        let worker = None;
        Self { control, worker }
    }

    /// What the host holds it by.
    pub fn control(&self) -> MemoryControl {
        self.control.clone()
    }
}

impl VirtioDevice for MemoryDevice {
    fn device_type(&self) -> DeviceType {
        DeviceType::Memory
    }

    fn features(&self) -> u64 {
        FEATURE_UNPLUGGED_INACCESSIBLE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_mem_config`: block size, node (none), address, region, usable region (all of it), plugged and
    /// requested size.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.control.state();
        let blocks = &state.blocks;
        let fields = [
            BLOCK_BYTES,
            0,
            blocks.start(),
            blocks.region_bytes(),
            blocks.region_bytes(),
            blocks.plugged_bytes(),
            blocks.requested_bytes(),
        ];
        super::read_config_space(&fields.map(u64::to_le_bytes).concat(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let (control, interrupt) = (self.control.clone(), activation.interrupt.clone());
        let worker = queue::spawn("mem", 0, activation, move |memory, chain| {
            answer(memory, chain, &control)
        });
        self.worker = Some(worker?);
        self.control.state().interrupt = Some(interrupt);
        Ok(())
    }

    /// What is plugged stays so (section 5.15.5): the next driver finds it, or unplugs all.
    fn reset(&mut self) {
        self.worker = None;
        self.control.state().interrupt = None;
    }
}

/// Answers one request, and gives the bytes that were written; none where the buffer has no room for an answer.
fn answer(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    control: &MemoryControl,
) -> u32 {
    let request = read(memory, chain.clone());
    let Ok(mut writer) = chain.writer(memory) else {
        return 0;
    };
    let response = request.map_or(Response::Error, |request| {
        let discard = |at, bytes| memory::discard(memory, GuestAddress(at), bytes).is_ok();
        control.state().blocks.execute(request, discard)
    });
    let bytes = response.bytes();
    match writer.write_all(&bytes) {
        Ok(()) => u32::try_from(bytes.len()).unwrap_or(0),
        Err(_) => 0,
    }
}

fn read(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> Option<Request> {
    let mut bytes = [0; REQUEST_BYTES];
    chain.reader(memory).ok()?.read_exact(&mut bytes).ok()?;
    Request::parse(&bytes)
}

#[cfg(test)]
mod tests {
    use super::super::mock_driver::{DEADLINE, Driver, FIRST_BUFFER};
    use super::*;
    use std::time::Instant;
    use vm_memory::Bytes;

    /// The second half of the mock driver's memory.
    const REGION: SharedRegion = SharedRegion {
        address: GuestAddress(8 << 20),
        bytes: 8 << 20,
    };

    fn ask(driver: &mut Driver, kind: u8, address: u64, blocks: u16) -> [u8; 2] {
        let mut request = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        request.extend(address.to_le_bytes());
        request.extend(blocks.to_le_bytes());
        request.extend([0; 6]);
        let [at, response] = [FIRST_BUFFER, FIRST_BUFFER + 0x1000];
        driver
            .memory
            .write_slice(&request, GuestAddress(at))
            .unwrap();
        driver.queues[0].offer(&[(at, 24)], &[(response, 10)]);
        assert_eq!(driver.wait_used(0).1, 10);
        let mut seen = [0xee; 10];
        driver
            .memory
            .read_slice(&mut seen, GuestAddress(response))
            .unwrap();
        [seen[0], seen[8]]
    }

    #[test]
    fn the_guest_grows_and_shrinks_as_the_host_asks() {
        let mut device = MemoryDevice::new(REGION, 128);
        let control = device.control();
        let (mut driver, activation) = Driver::new(&QUEUE_SIZES, false);
        device.activate(activation).unwrap();
        let start = REGION.address.0;
        assert_eq!(ask(&mut driver, 0, start, 1), [1, 0], "nothing is wanted");
        control.set_size(132).unwrap();
        driver.wait_interrupt(Instant::now() + DEADLINE);
        let mut config = [0; 56];
        device.read_config(0, &mut config);
        let fields: Vec<u64> = config
            .chunks(8)
            .map(|field| u64::from_le_bytes(field.try_into().unwrap()))
            .collect();
        let size = REGION.bytes;
        assert_eq!(fields, [2 << 20, 0, start, size, size, 0, 4 << 20]);

        assert_eq!(ask(&mut driver, 0, start, 2), [0, 0]);
        assert_eq!(ask(&mut driver, 3, start, 3), [0, 2], "mixed");
        assert_eq!(control.plugged_bytes(), 4 << 20);
        let page = GuestAddress(start + 4096);
        driver.memory.write_slice(&[7; 4096], page).unwrap();
        device.reset();
        assert_eq!(control.plugged_bytes(), 4 << 20, "a reset keeps it");

        let (mut driver, mut activation) = Driver::new(&QUEUE_SIZES, false);
        driver.memory.write_slice(&[7; 4096], page).unwrap();
        activation.memory = driver.memory.clone();
        device.activate(activation).unwrap();
        control.set_size(128).unwrap();
        assert_eq!(ask(&mut driver, 1, start, 2), [0, 0]);
        let mut seen = [1; 4096];
        driver.memory.read_slice(&mut seen, page).unwrap();
        assert_eq!(seen, [0; 4096]);
        assert_eq!(ask(&mut driver, 2, 0, 0), [0, 0]);
        assert_eq!(ask(&mut driver, 9, start, 1), [3, 0]);
        device.reset();
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        let control = MemoryDevice::new(REGION, 128).control();
        for (mib, message) in [
            (
                127,
                "the guest's memory cannot be 127 MiB: it may have 128 to 136",
            ),
            (
                138,
                "the guest's memory cannot be 138 MiB: it may have 128 to 136",
            ),
            (129, "the guest's memory cannot be 129 MiB: it differs"),
        ] {
            let error = control.set_size(mib).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        control.set_size(136).unwrap();
    }

    #[test]
    fn a_request_that_is_too_short_or_has_no_room_for_an_answer_is_survived() {
        let mut device = MemoryDevice::new(REGION, 128);
        let (mut driver, activation) = Driver::new(&QUEUE_SIZES, false);
        device.activate(activation).unwrap();
        driver.queues[0].offer(&[(FIRST_BUFFER, 4)], &[(FIRST_BUFFER + 0x1000, 10)]);
        assert_eq!(driver.wait_used(0).1, 10, "too short: an error");
        driver.queues[0].offer(&[(FIRST_BUFFER, 24)], &[]);
        assert_eq!(driver.wait_used(0).1, 0);
        driver.queues[0].offer(&[(u64::MAX - 4, 24)], &[(FIRST_BUFFER, 10)]);
        driver.wait_used(0);
        device.reset();
    }
}

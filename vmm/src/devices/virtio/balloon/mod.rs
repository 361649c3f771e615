//! Memory balloon (virtio 1.3, section 5.5): the guest gives up pages that the host asks for (the balloon's
//! target size) or that it does not use (free page reporting), says how its memory is used, and takes pages
//! back when it would otherwise kill a process.
//!
//! A Pod that is idle after a burst so costs what it holds, not what it once held. What the guest says about
//! itself is passed on and never relied on.

mod pages;
mod statistics;
mod worker;

use self::worker::{Role, Served, Sides};
use super::{ActivateError, Activation, DeviceType, Interrupt, VirtioDevice};
use crate::{arch::x86_64::layout::PAGE_BYTES, event_loop::Worker};
use std::{
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use walnut_vmm_api::GuestMemory;

/// Inflate, deflate, statistics and reporting. There are no hints, so that reporting comes fourth, and third for
/// a driver without statistics (section 5.5.2).
const QUEUE_SIZES: [u16; 4] = [16, 16, 2, 32];
/// VIRTIO_BALLOON_F_STATS_VQ (section 5.5.3).
const FEATURE_STATISTICS: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM.
const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_REPORTING.
const FEATURE_REPORTING: u64 = 1 << 5;
/// Where `actual` is in the configuration space, the one field that the driver writes.
const ACTUAL_OFFSET: u64 = 4;
/// Pages of a balloon in one MiB.
const PAGES_PER_MIB: u32 = 256;
const _: () = assert!(PAGE_BYTES * PAGES_PER_MIB as u64 == 1 << 20);

/// Why the balloon does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    /// There is not so much memory.
    #[error("a balloon of {asked} MiB is larger than the {most} MiB that the guest booted with")]
    TooLarge {
        /// MiB that were asked for.
        asked: u32,
        /// MiB of RAM at boot.
        most: u32,
    },
    /// An event file descriptor.
    #[error("cannot make an event file descriptor for the balloon")]
    Event(#[source] io::Error),
}

/// What host and guest tell each other.
#[derive(Debug, Default)]
struct State {
    target_pages: u32,
    actual_pages: u32,
    guest: Option<GuestMemory>,
    /// The way to the driver while there is one.
    interrupt: Option<Interrupt>,
}

/// The host's hand on the balloon.
#[derive(Debug, Clone)]
pub struct BalloonControl {
    state: Arc<Mutex<State>>,
    /// Readable when the host wants to know how the guest's memory is used.
    asked: Arc<EventFd>,
    ram_mib: u32,
}

impl BalloonControl {
    /// Wishes that the balloon holds `mib`. The guest follows as it can, if it has a driver.
    pub fn set_target(&self, mib: u32) -> Result<(), BalloonError> {
        let most = self.ram_mib;
        let pages = mib.checked_mul(PAGES_PER_MIB).filter(|_| mib <= most);
        let mut state = self.state();
        state.target_pages = pages.ok_or(BalloonError::TooLarge { asked: mib, most })?;
        if let Some(interrupt) = &state.interrupt {
            interrupt.signal_config_change();
        }
        Ok(())
    }

    /// Bytes that the guest says the balloon holds.
    pub fn actual_bytes(&self) -> u64 {
        u64::from(self.state().actual_pages) * PAGE_BYTES
    }

    /// What the guest said last about its memory; asks it to say it again.
    pub fn guest_memory(&self) -> Option<GuestMemory> {
        // Fails only when the counter is full, and then the question stands.
        let _ = self.asked.write(1);
        self.state().guest
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The balloon device.
#[derive(Debug)]
pub struct Balloon {
    control: BalloonControl,
    worker: Option<Worker>,
}

impl Balloon {
    /// An empty balloon for a guest that boots with `ram_mib`.
    pub fn new(ram_mib: u32) -> Result<Self, BalloonError> {
        let asked = EventFd::new(EFD_NONBLOCK).map_err(BalloonError::Event)?;
        let control = BalloonControl {
            state: Arc::default(),
            asked: Arc::new(asked),
            ram_mib,
        };
        let worker = None;
        Ok(Self { control, worker })
    }

    /// What the host holds it by.
    pub fn control(&self) -> BalloonControl {
        self.control.clone()
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        FEATURE_STATISTICS | FEATURE_DEFLATE_ON_OOM | FEATURE_REPORTING
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_balloon_config`: pages wanted and pages had.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let state = self.control.state();
        let fields = [state.target_pages, state.actual_pages];
        super::read_config_space(&fields.map(u32::to_le_bytes).concat(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL_OFFSET, Ok(bytes)) = (offset, data.try_into()) {
            self.control.state().actual_pages = u32::from_le_bytes(bytes);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut roles = vec![Role::Inflate, Role::Deflate];
        if activation.features & FEATURE_STATISTICS != 0 {
            roles.push(Role::Statistics);
        }
        roles.push(Role::Reporting);
        // What the driver did not enable it does not use.
        let queues = roles.into_iter().zip(activation.queues);
        let served: Vec<_> = queues
            .filter_map(|(role, active)| active.map(|active| Served::new(role, active)))
            .collect();
        let interrupt = activation.interrupt.clone();
        let (control, memory) = (self.control.clone(), activation.memory);
        let worker = Worker::spawn("balloon", move |stop| {
            let sides = Sides {
                memory: &memory,
                interrupt: &activation.interrupt,
                control: &control,
            };
            worker::serve(served, &sides, &stop);
        });
        self.worker = Some(worker.map_err(ActivateError::Thread)?);
        self.control.state().interrupt = Some(interrupt);
        Ok(())
    }

    /// The driver's pages are its own again (section 5.5.5); the target stays.
    fn reset(&mut self) {
        self.worker = None;
        let mut state = self.control.state();
        (state.actual_pages, state.guest, state.interrupt) = (0, None, None);
    }
}

#[cfg(test)]
mod tests {
    use super::super::mock_driver::{DEADLINE, Driver, FIRST_BUFFER};
    use super::*;
    use std::time::Instant;
    use vm_memory::{Bytes, GuestAddress};

    fn started(features: u64) -> (Driver, Balloon, BalloonControl) {
        let mut balloon = Balloon::new(16).unwrap();
        let (driver, mut activation) = Driver::new(&QUEUE_SIZES, false);
        activation.features = features;
        balloon.activate(activation).unwrap();
        let control = balloon.control();
        (driver, balloon, control)
    }

    fn config(balloon: &Balloon) -> [u8; 8] {
        let mut config = [0xff; 8];
        balloon.read_config(0, &mut config);
        config
    }

    #[test]
    fn a_target_reaches_the_driver_and_its_answer_the_host() {
        let (driver, mut balloon, control) = started(0);
        assert_eq!(config(&balloon), [0; 8]);
        control.set_target(8).unwrap();
        driver.wait_interrupt(Instant::now() + DEADLINE);
        assert_eq!(config(&balloon)[..4], 2048_u32.to_le_bytes());
        balloon.write_config(0, &7_u32.to_le_bytes());
        balloon.write_config(4, &[1]);
        balloon.write_config(4, &512_u32.to_le_bytes());
        assert_eq!(control.actual_bytes(), 2 << 20);
        assert_eq!(config(&balloon)[..4], 2048_u32.to_le_bytes());
        let error = control.set_target(17).unwrap_err().to_string();
        assert!(error.starts_with("a balloon of 17 MiB"), "{error}");
        assert!(control.set_target(u32::MAX).is_err());
        balloon.reset();
        assert_eq!(control.actual_bytes(), 0);
        assert_eq!(config(&balloon)[..4], 2048_u32.to_le_bytes());
    }

    #[test]
    fn inflated_and_reported_pages_are_zero_and_deflated_ones_stay() {
        // Without statistics, reporting is the third queue.
        for (features, reporting) in [(0, 2), (FEATURE_STATISTICS, 3)] {
            let (mut driver, mut balloon, _) = started(features);
            let data = GuestAddress(FIRST_BUFFER + 0x10_0000);
            driver.memory.write_slice(&[7; 0x4000], data).unwrap();
            let first = u32::try_from(data.0 / PAGE_BYTES).unwrap();
            let list = GuestAddress(FIRST_BUFFER);
            for (index, page) in [(0, first), (1, first + 1)] {
                driver.memory.write_obj(page, list).unwrap();
                driver.queues[index].offer(&[(list.0, 4)], &[]);
                assert_eq!(driver.wait_used(index).1, 0);
            }
            driver.queues[reporting].offer(&[], &[(data.0 + 0x2000, 0x1000)]);
            driver.wait_used(reporting);
            let mut seen = [1; 0x4000];
            driver.memory.read_slice(&mut seen, data).unwrap();
            for (page, expected) in [0, 7, 0, 7].into_iter().enumerate() {
                let page = &seen[page * 0x1000..][..0x1000];
                assert!(page.iter().all(|&byte| byte == expected), "{features}");
            }
            balloon.reset();
        }
    }

    #[test]
    fn statistics_come_when_they_are_asked_for() {
        let (mut driver, mut balloon, control) = started(FEATURE_STATISTICS);
        assert_eq!(control.guest_memory(), None);
        let buffer = GuestAddress(FIRST_BUFFER);
        for total in [4096_u64, 8192] {
            let mut entry = 5_u16.to_le_bytes().to_vec();
            entry.extend(total.to_le_bytes());
            driver.memory.write_slice(&entry, buffer).unwrap();
            driver.queues[2].offer(&[(buffer.0, 10)], &[]);
            // The device keeps the buffer until the host asks; a question may also meet an empty queue.
            let end = Instant::now() + DEADLINE;
            loop {
                let told = control.guest_memory();
                if told.is_some_and(|told| told.total_bytes == total) {
                    break;
                }
                assert!(Instant::now() < end, "{told:?}");
                std::thread::yield_now();
            }
            let _ = control.guest_memory();
            driver.wait_used(2);
        }
        balloon.reset();
        assert_eq!(control.guest_memory(), None);
    }
}

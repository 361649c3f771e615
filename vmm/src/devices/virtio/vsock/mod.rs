//! The socket device: streams between host programs and ports of the guest, in user space.
//!
//! virtio 1.3, section 5.10. Host programs reach the guest through a Unix socket, see
//! `walnut_vmm_api::connect_line`; the guest cannot open connections. Layers, each knowing those below:
//! `worker` (queues and epoll), `muxer` (which socket is which connection), `peer`, `stream` (a connection and
//! its socket) and `handshake`, `connection` (states and credit, no I/O), `packet` (bytes to headers).

mod connection;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod handshake;
mod muxer;
mod packet;
mod peer;
mod stream;
mod worker;

use self::{muxer::Muxer, worker::Worker as Device};
use super::{ActivateError, Activation, ActiveQueue, DeviceType, VirtioDevice};
use crate::event_loop::Worker;
use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixListener},
    sync::Arc,
};
use vmm_sys_util::{epoll::Epoll, eventfd::EventFd};

/// Sizes of the receive, transmit and event queues. Linux fills the first with 4 KiB buffers.
const QUEUE_SIZES: [u16; 3] = [128, 128, 16];
/// VIRTIO_VSOCK_F_STREAM (section 5.10.3).
const FEATURE_STREAM: u64 = 1;

/// Why the device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The listener could not be made non-blocking.
    #[error("cannot prepare the listening socket of the socket device")]
    Listener(#[source] io::Error),
}

/// The socket device of one guest.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    listener: Arc<UnixListener>,
    ready: Arc<EventFd>,
    thread: Option<Worker>,
}

impl Vsock {
    /// A device for the guest with context id `cid`. `listener` is a listening Unix stream socket; `ready`
    /// is written when the guest first tries to reach `walnut_vmm_api::READY_PORT`.
    pub fn new(cid: u64, listener: OwnedFd, ready: EventFd) -> Result<Self, VsockError> {
        let listener = UnixListener::from(listener);
        listener
            .set_nonblocking(true)
            .map_err(VsockError::Listener)?;
        Ok(Self {
            cid,
            listener: Arc::new(listener),
            ready: Arc::new(ready),
            thread: None,
        })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Socket
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = activation.queues.into_iter();
        let mut queue = |index| -> Result<ActiveQueue, ActivateError> {
            queues
                .next()
                .flatten()
                .ok_or(ActivateError::MissingQueue { index })
        };
        let queues = [queue(0)?, queue(1)?, queue(2)?];
        let epoll = Arc::new(Epoll::new().map_err(ActivateError::Thread)?);
        let (listener, ready) = (self.listener.clone(), self.ready.clone());
        let muxer =
            Muxer::new(self.cid, epoll.clone(), listener, ready).map_err(ActivateError::Thread)?;
        let device = Device::new(queues, activation.interrupt, epoll, muxer)
            .map_err(ActivateError::Thread)?;
        let memory = activation.memory;
        let thread = Worker::spawn("vsock", move |stop| device.run(&memory, &stop))
            .map_err(ActivateError::Thread)?;
        self.thread = Some(thread);
        Ok(())
    }

    fn reset(&mut self) {
        self.thread = None;
    }
}

#[cfg(test)]
mod tests;

//! Requests to a VM that runs, each with its answer.
//!
//! Must not know what an answer should be: that is the test's.

use crate::{
    deadline::{self, Deadline},
    vmm::Vm,
};
use anyhow::{Result, bail};
use std::os::fd::OwnedFd;
use walnut_vmm_api::{Message, Request};

impl Vm {
    /// Sends one request with these files, and gives its answer.
    pub fn answer(&mut self, request: &Request, fds: &[OwnedFd]) -> Result<Message> {
        self.send(request, fds)?;
        let deadline = Deadline::after(deadline::REQUEST);
        loop {
            match self.receive(deadline)? {
                Some(Message::Booted | Message::GuestReady) => {}
                Some(message) => return Ok(message),
                None => bail!("the VMM ended instead of an answer to {request:?}"),
            }
        }
    }
}

//! What a running VMM is asked for: size and devices (vmm/api, `Request`).
//!
//! The VMM's answers come from a process that serves a hostile guest: texts are cut and made printable.

use super::{MAX_PLACE_BYTES, REQUEST_DEADLINE, Vm, VmError};
use crate::{blocks::DiskFiles, error::printable, network::Nic, vm_end::MAX_REASON_BYTES};
use std::os::fd::{AsFd as _, OwnedFd};
use tokio::time::timeout;
use walnut_vmm_api::{FailureKind, Message, Request};

impl Vm {
    /// Changes the number of vCPUs, the MiB of memory, or both.
    pub(crate) async fn resize(
        &self,
        vcpus: Option<u8>,
        memory_mib: Option<u32>,
    ) -> Result<(), VmError> {
        let what = "resize the VM";
        let request = Request::Resize { vcpus, memory_mib };
        match self.ask(what, &request, &[]).await? {
            Message::Done => Ok(()),
            other => Err(unexpected(what, &other)),
        }
    }

    /// Attaches a network device; answers the place that the guest finds it at.
    pub(crate) async fn attach_network(&self, nic: Nic) -> Result<String, VmError> {
        let mut files = Vec::new();
        let request = Request::AttachNetwork(nic.hand_over(&mut files));
        match self
            .ask("attach a network device", &request, &files)
            .await?
        {
            Message::Attached { name } => Ok(printable(&name, MAX_PLACE_BYTES)),
            other => Err(unexpected("attach a network device", &other)),
        }
    }

    /// Attaches a disk; answers the place that the guest finds it at.
    pub(crate) async fn attach_disk(&self, disk: &DiskFiles) -> Result<String, VmError> {
        let what = "attach a disk";
        match self.ask(what, &disk.request(), &disk.files).await? {
            Message::Attached { name } => Ok(printable(&name, MAX_PLACE_BYTES)),
            other => Err(unexpected(what, &other)),
        }
    }

    /// Removes a device that the guest's driver has let go of.
    pub(crate) async fn detach(&self, name: &str) -> Result<(), VmError> {
        let request = Request::Detach {
            name: name.to_owned(),
        };
        match self.ask("detach a device", &request, &[]).await? {
            Message::Done => Ok(()),
            other => Err(unexpected("detach a device", &other)),
        }
    }

    /// One request and its answer, racing the VMM's end. A VMM that doesn't answer is ended: what it would say later
    /// would answer something else.
    async fn ask(
        &self,
        what: &'static str,
        request: &Request,
        files: &[OwnedFd],
    ) -> Result<Message, VmError> {
        let _one_at_a_time = self.asking.lock().await;
        let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        let exchange = async {
            self.control.send(request, &files).await?;
            loop {
                match self.control.receive().await? {
                    Message::GuestReady => {}
                    answer => return Ok::<_, VmError>(answer),
                }
            }
        };
        match timeout(REQUEST_DEADLINE, exchange).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.reason_of_end().await.unwrap_or(error)),
            Err(_) => {
                self.kill().await;
                let reason = format!("it did not answer within {} s", REQUEST_DEADLINE.as_secs());
                Err(VmError::Request { what, reason })
            }
        }
    }
}

fn unexpected(what: &'static str, answer: &Message) -> VmError {
    let reason = match answer {
        Message::Failed {
            kind: FailureKind::Full,
            error,
        } => {
            let reason = printable(error, MAX_REASON_BYTES);
            return VmError::Full { what, reason };
        }
        Message::Failed { error, .. } => printable(error, MAX_REASON_BYTES),
        _ => "its answer is to another request".to_owned(),
    };
    VmError::Request { what, reason }
}

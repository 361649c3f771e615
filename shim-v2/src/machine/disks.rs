//! The disks of a machine's containers: attached, handed to the guest, and taken back.
//!
//! Decides nothing about what becomes a disk (`blocks`), nor about what is mounted on the host (`storage`).

use super::{Machine, MachineError};
use crate::{
    blocks::{self, Blocks, Recipe, Writes},
    log,
    storage::{Needs, Root},
    vm::VmError,
};
use std::{
    collections::HashMap,
    sync::{Arc, MutexGuard, PoisonError},
};
use tokio::task::spawn_blocking;
use walnut_agent_api::guest;

impl Machine {
    pub(super) async fn expose_all(&self, needs: Needs) -> Result<Vec<(u32, u32)>, MachineError> {
        let writes = Writes {
            read_only_root: needs.read_only_root,
            guest_bytes: u64::from(self.writable_layer_mib) << 20,
        };
        // Without the table of mounts no layer is an image, and the host mounts what there is.
        let mountinfo = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
        let recipe = blocks::recipe(&needs.rootfs, writes, &mountinfo);
        let (request, first_device) = match self.attach(&needs, recipe.as_ref()).await {
            Err(MachineError::Vm(VmError::Full { .. }))
                if recipe.is_some_and(|recipe| recipe.is_overlay()) =>
            {
                self.release_disks(&needs.container_id).await;
                self.attach(&needs, None).await?
            }
            attached => attached?,
        };
        let root = match request.images.as_slice() {
            [] => Root::OnHost,
            _ => Root::InGuest,
        };
        let share = Arc::clone(&self.host.share);
        spawn_blocking(move || share.expose(&needs, root)).await??;
        if request.disks.is_empty() {
            return Ok(Vec::new());
        }
        let numbers = tokio::select! {
            biased;
            numbers = self.agent.add_storage(&request) => numbers.map_err(MachineError::Disks)?,
            () = self.vm.exited() => return Err(MachineError::Ended(self.describe_end())),
        };
        Ok(numbers.get(first_device..).unwrap_or_default().to_vec())
    }

    /// Attaches the disks of a container; answers what to ask the guest for, and which disk is the first device.
    async fn attach(
        &self,
        needs: &Needs,
        recipe: Option<&Recipe>,
    ) -> Result<(guest::AddStorageRequest, usize), MachineError> {
        let blocks = Blocks::open(recipe, &needs.devices)?;
        let mut disks = Vec::new();
        for disk in &blocks.disks {
            let name = self.vm.attach_disk(disk).await?;
            disks.push(disk.told(&name));
            let mut of_containers = self.disks();
            let names = of_containers.entry(needs.container_id.clone());
            names.or_default().push(name);
        }
        let request = guest::AddStorageRequest {
            container_id: needs.container_id.clone(),
            disks,
            images: blocks.images,
            scratch_bytes: blocks.scratch_bytes,
            ..Default::default()
        };
        Ok((request, blocks.first_device))
    }

    fn disks(&self) -> MutexGuard<'_, HashMap<String, Vec<String>>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the guest let go of a container's disks, and detaches them. A second time does nothing.
    pub(super) async fn release_disks(&self, container_id: &str) {
        let names = self.disks().remove(container_id).unwrap_or_default();
        if names.is_empty() || self.has_exited() {
            return;
        }
        let released = tokio::select! {
            released = self.agent.remove_storage(container_id) => released,
            () = self.vm.exited() => Ok(()),
        };
        if let Err(error) = released {
            log::error("the guest does not let go of a container's disks", &error);
        }
        // What the guest holds on to it loses.
        for name in names {
            if let Err(error) = self.vm.detach(&name).await
                && !self.has_exited()
            {
                log::error("detaching a disk", &error);
            }
        }
    }
}

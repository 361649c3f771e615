//! Events of memory that ran out in the guest.
//!
//! Must not decide anything: containerd and its clients do.

use crate::{events::Events, machine::Machine};
use std::sync::Arc;

/// Tells containerd each time that memory has run out for a container, until it is deleted. The next time is
/// waited for once this one has been told, so that a guest cannot fill the queue.
pub(crate) async fn watch(machine: Arc<Machine>, id: String, events: Events) {
    let mut seen = 0;
    loop {
        match machine.ask(machine.agent().out_of_memory(&id, seen)).await {
            Ok(kills) if kills > seen => seen = kills,
            _ => return,
        }
        events.out_of_memory(&id).settled().await;
    }
}

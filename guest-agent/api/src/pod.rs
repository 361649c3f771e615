//! What the containers of a Pod share in the guest, and how a configuration names it.
//!
//! - `linux.namespaces[].path` is [`namespace_path`]: the namespace of that type of another container's first
//!   process. It is the name of no file; the agent knows it, and refuses every other path.
//! - A bind mount of [`POD_SHM`] is the Pod's one `/dev/shm`.
//! - A Pod that has no container of its own to hold its namespaces has one that runs [`PAUSE_PROGRAM`], which
//!   is [`AGENT_PROGRAM`] by another name, in the empty root [`PAUSE_ROOT`].

use std::path::{Path, PathBuf};

/// The guest's own `/dev/shm`, which no process of the agent uses.
pub const POD_SHM: &str = "/dev/shm";
/// The agent's program in the guest.
pub const AGENT_PROGRAM: &str = "/init";
/// The name by which the agent's program holds namespaces and does nothing else.
pub const PAUSE_PROGRAM: &str = "/walnut-pause";
/// An empty directory of the guest.
pub const PAUSE_ROOT: &str = "/run/walnut/pause";

const CONTAINERS: &str = "/run/walnut/containers";

/// Names the namespace of a container's first process. `kind` is the name of a file in `/proc/PID/ns`.
pub fn namespace_path(container_id: &str, kind: &str) -> PathBuf {
    Path::new(CONTAINERS)
        .join(container_id)
        .join("ns")
        .join(kind)
}

/// The container that [`namespace_path`] has named, if it was that for a namespace of this `kind`.
pub fn namespace_owner<'a>(path: &'a Path, kind: &str) -> Option<&'a str> {
    let mut parts = path.strip_prefix(CONTAINERS).ok()?.iter();
    let id = parts.next()?.to_str()?;
    (parts.next()? == "ns" && parts.next()? == kind && parts.next().is_none()).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_a_namespace_of_its_kind_has_an_owner() {
        let path = namespace_path("pod-1", "ipc");
        assert_eq!(namespace_owner(&path, "ipc"), Some("pod-1"));
        assert_eq!(namespace_owner(&path, "pid"), None);
        for path in [
            "/proc/1/ns/ipc",
            "/run/walnut/containers/a/ns/ipc/x",
            "/run/walnut/containers/a",
        ] {
            assert_eq!(namespace_owner(Path::new(path), "ipc"), None, "{path}");
        }
    }

    proptest! {
        #[test]
        fn any_path_has_an_owner_or_none(path in "\\PC{0,64}", id in "[a-z0-9][a-z0-9._-]{0,20}") {
            let _ = namespace_owner(Path::new(&path), "ipc");
            let path = namespace_path(&id, "uts");
            prop_assert_eq!(namespace_owner(&path, "uts"), Some(id.as_str()));
        }
    }
}

//! What a container's configuration says of its Pod: namespaces of another container, `/dev/shm`.
//!
//! The host's paths lead to namespaces of the host, where every task of a Pod is the VMM. So a path that
//! names a namespace of the VMM means that namespace of the Pod, which its sandbox holds in the guest. Pure.

use crate::spec::SpecError;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Mount, Spec};
use std::path::Path;
use walnut_agent_api::namespace_path;

/// The kinds whose absence from a list asks for the host's namespace.
const NEVER_THE_HOSTS: [LinuxNamespaceType; 3] = [
    LinuxNamespaceType::Pid,
    LinuxNamespaceType::Ipc,
    LinuxNamespaceType::Mount,
];

/// The CRI's annotation of a Pod's own container.
const TYPE_ANNOTATION: &str = "io.kubernetes.cri.container-type";

/// A Pod, as its containers' configurations see it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pod<'a> {
    /// Its id, which is that of the container that holds its namespaces.
    pub(crate) id: &'a str,
    /// The process that stands for its tasks, once it runs.
    pub(crate) pid: Option<u32>,
}

impl Pod<'_> {
    /// Names the Pod's namespaces as the guest's agent knows them.
    pub(crate) fn share(&self, namespaces: &mut Vec<LinuxNamespace>) -> Result<(), SpecError> {
        // The Pod's network isolation is the VM: its containers share the guest's own network namespace.
        namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
        let has = |kind| namespaces.iter().any(|namespace| namespace.typ() == kind);
        if let Some(kind) = NEVER_THE_HOSTS.into_iter().find(|kind| !has(*kind)) {
            return Err(SpecError::SharesHost { kind });
        }
        for namespace in namespaces {
            let kind = namespace.typ();
            let Some(path) = namespace
                .path()
                .clone()
                .filter(|path| path != Path::new(""))
            else {
                continue;
            };
            let own = self
                .pid
                .map(|pid| format!("/proc/{pid}/ns/{kind}"))
                .is_some_and(|own| Path::new(&own) == path);
            if !own {
                return Err(SpecError::HostNamespace { kind, path });
            }
            namespace.set_path(Some(namespace_path(self.id, &kind.to_string())));
        }
        Ok(())
    }

    /// Whether a mount is the Pod's `/dev/shm`: the CRI's bind mount of a tmpfs in its directory of the
    /// sandbox, or, where it made none, the tmpfs of a container in the Pod's IPC namespace (`joins_ipc`).
    pub(crate) fn is_shm(&self, mount: &Mount, joins_ipc: bool) -> bool {
        let of_sandbox = |source: &Path| source.ends_with(Path::new(self.id).join("shm"));
        let made = joins_ipc && mount.typ().as_deref() == Some("tmpfs");
        mount.destination() == Path::new("/dev/shm")
            && (made || mount.source().as_deref().is_some_and(of_sandbox))
    }
}

/// Whether a translated configuration joins the Pod's IPC namespace.
pub(crate) fn joins_ipc(spec: &Spec) -> bool {
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    namespaces.into_iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Ipc
            && namespace
                .path()
                .as_ref()
                .is_some_and(|path| path != Path::new(""))
    })
}

/// Whether the Pod is to end with this container: the CRI's sandbox.
pub(crate) fn is_sandbox(spec: &Spec) -> bool {
    spec.annotations()
        .as_ref()
        .and_then(|annotations| annotations.get(TYPE_ANNOTATION))
        .is_some_and(|kind| kind == "sandbox")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POD: Pod<'_> = Pod {
        id: "pod",
        pid: Some(77),
    };

    fn namespaces(json: &str) -> Vec<LinuxNamespace> {
        serde_json::from_str(json).unwrap()
    }

    fn shared(pod: Pod<'_>, more: &str) -> Result<Vec<LinuxNamespace>, SpecError> {
        let list = format!(r#"[{{"type":"mount"}},{more}]"#);
        let mut namespaces = namespaces(&list);
        pod.share(&mut namespaces).map(|()| namespaces)
    }

    #[test]
    fn the_namespaces_of_the_vmm_are_those_of_the_pod() {
        let list = r#"{"type":"pid","path":""},{"type":"ipc","path":"/proc/77/ns/ipc"},
                      {"type":"uts","path":"/proc/77/ns/uts"},{"type":"network","path":"/proc/77/ns/net"}"#;
        let found = serde_json::to_value(shared(POD, list).unwrap()).unwrap();
        let expected = serde_json::json!([
            {"type": "mount"}, {"type": "pid", "path": ""},
            {"type": "ipc", "path": "/run/walnut/containers/pod/ns/ipc"},
            {"type": "uts", "path": "/run/walnut/containers/pod/ns/uts"},
        ]);
        assert_eq!(found, expected);
    }

    #[test]
    fn other_paths_belong_to_somebody_else() {
        for path in [
            "/proc/1/ns/ipc",
            "/proc/77/ns/pid",
            "/proc/77/ns/../ns/ipc",
            "/run/walnut/containers/pod/ns/ipc",
        ] {
            let list = format!(r#"{{"type":"pid"}},{{"type":"ipc","path":"{path}"}}"#);
            let error = shared(POD, &list).unwrap_err();
            assert!(
                matches!(
                    error,
                    SpecError::HostNamespace {
                        kind: LinuxNamespaceType::Ipc,
                        ..
                    }
                ),
                "{error}"
            );
        }
        // A Pod that doesn't run has no process yet.
        let none = Pod {
            id: "pod",
            pid: None,
        };
        assert!(
            shared(
                none,
                r#"{"type":"ipc"},{"type":"pid","path":"/proc/77/ns/pid"}"#
            )
            .is_err()
        );
    }

    #[test]
    fn the_hosts_processes_and_memory_stay_the_hosts() {
        for (list, kind) in [
            (r#"{"type":"ipc"}"#, LinuxNamespaceType::Pid),
            (r#"{"type":"pid"}"#, LinuxNamespaceType::Ipc),
        ] {
            assert_eq!(
                shared(POD, list).unwrap_err(),
                SpecError::SharesHost { kind }
            );
        }
    }

    #[test]
    fn the_pods_shm_is_known_by_its_place() {
        let is_shm = |destination: &str, kind: &str, source: &str, joins| {
            let mount =
                serde_json::json!({"destination": destination, "type": kind, "source": source});
            POD.is_shm(&serde_json::from_value(mount).unwrap(), joins)
        };
        let place = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes/pod/shm";
        assert!(is_shm("/dev/shm", "bind", place, false));
        assert!(!is_shm("/shm", "bind", place, true));
        assert!(!is_shm("/dev/shm", "bind", "/sandboxes/other/shm", true));
        assert!(!is_shm("/dev/shm", "bind", "/dev/shm", true));
        assert!(is_shm("/dev/shm", "tmpfs", "shm", true));
        assert!(!is_shm("/dev/shm", "tmpfs", "shm", false));
    }

    proptest! {
        #[test]
        fn no_path_but_the_pods_passes(path in "/proc/[0-9]{1,3}/ns/[a-z]{3}") {
            let list = format!(r#"{{"type":"ipc"}},{{"type":"pid","path":"{path}"}}"#);
            prop_assert_eq!(shared(POD, &list).is_ok(), path == "/proc/77/ns/pid");
        }
    }
}

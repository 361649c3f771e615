//! `-info`: what this runtime is, in containerd's type.
//!
//! containerd's CRI plugin decides by it, for one, whether a Pod may have recursive read-only mounts. Must
//! print nothing else, and needs no guest: the specification wants what was built, not what a machine can do.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::{Message as _, MessageField, well_known_types::any::Any};
use serde_json::{Value, json};
use std::io::{self, Write as _};
use walnut_agent_api::features;

const RUNTIME_NAME: &str = "io.containerd.walnut.v2";
const FEATURES_TYPE_URL: &str =
    "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// `-info`. The options on standard input are those of a container; they don't change what this is.
pub(crate) fn print() -> anyhow::Result<()> {
    io::stdout().write_all(&info().write_to_bytes()?)?;
    Ok(())
}

fn info() -> RuntimeInfo {
    RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES_TYPE_URL.to_owned(),
            value: oci_features().to_string().into_bytes(),
            ..Any::default()
        }),
        annotations: [("walnut.isolation".to_owned(), "microvm".to_owned())].into(),
        ..RuntimeInfo::default()
    }
}

/// OCI runtime specification, features.md and features-linux.md.
fn oci_features() -> Value {
    let mut namespaces = features::NAMESPACES.to_vec();
    // The Pod's, which is the VM's.
    namespaces.push("network");
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.1",
        "hooks": features::HOOKS,
        "mountOptions": features::MOUNT_OPTIONS,
        "linux": {
            "namespaces": namespaces,
            // The host's cgroup of the Pod takes systemd's names; the guest's are version 2 alone.
            "cgroup": { "v1": false, "v2": true, "systemd": true, "systemdUser": false, "rdma": false },
            "seccomp": { "enabled": features::SECCOMP },
            "apparmor": { "enabled": features::APPARMOR },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } },
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containerd_can_read_what_the_guest_enforces() {
        let bytes = info().write_to_bytes().unwrap();
        let features = RuntimeInfo::parse_from_bytes(&bytes).unwrap().features;
        assert_eq!(features.type_url, FEATURES_TYPE_URL);
        let typed: oci_spec::runtime::Features = serde_json::from_slice(&features.value).unwrap();
        let options = typed.mount_options().as_ref().unwrap();
        assert!(options.iter().any(|option| option == "rro"));
        assert!(typed.linux().is_some());
    }
}

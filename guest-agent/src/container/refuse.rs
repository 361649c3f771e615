//! Turns the JSON of a request into the types of `spec`, and refuses by name what the guest would
//! otherwise silently not enforce.
//!
//! OCI runtime specification, `config.md`, "Extensibility": properties that nobody knows are ignored. So
//! the list here holds the ones that *are* known and not applied. An empty value asks for nothing and passes.

use super::spec::{Process, Resources, Spec};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A known property that the guest does not apply, and why.
type Unsupported = (&'static str, &'static str);

const ON_THE_HOST: &str = "it runs on the host, so the shim runs it";
const ONE_NODE: &str = "a guest's memory is one NUMA node";
const NO_SELINUX: &str = "the guest's kernel has no SELinux";
const CGROUP_V1: &str = "cgroup v2 has nothing like it";

/// Of the whole configuration.
const UNSUPPORTED: &[Unsupported] = &[
    ("hooks.prestart", ON_THE_HOST),
    ("hooks.createRuntime", ON_THE_HOST),
    ("hooks.poststart", ON_THE_HOST),
    ("hooks.poststop", ON_THE_HOST),
    (
        "vm",
        "the runtime's own configuration chooses kernel and hypervisor",
    ),
    ("linux.mountLabel", NO_SELINUX),
    (
        "linux.intelRdt",
        "a guest's processors have no resctrl file system",
    ),
    (
        "linux.personality.flags",
        "the specification defines none yet",
    ),
    (
        "linux.netDevices",
        "the Pod's network devices are the guest's",
    ),
    ("linux.memoryPolicy", ONE_NODE),
];

/// The same of `process`, and of the process of an exec.
const UNSUPPORTED_OF_PROCESS: &[Unsupported] = &[("selinuxLabel", NO_SELINUX)];

/// The same of `linux.resources`, and of an update.
const UNSUPPORTED_OF_RESOURCES: &[Unsupported] = &[
    ("network", CGROUP_V1),
    ("rdma", "a guest has no RDMA device"),
    ("memory.kernel", CGROUP_V1),
    ("memory.kernelTCP", CGROUP_V1),
    ("memory.swappiness", CGROUP_V1),
    ("memory.disableOOMKiller", CGROUP_V1),
    ("cpu.realtimeRuntime", CGROUP_V1),
    ("cpu.realtimePeriod", CGROUP_V1),
    ("blockIO.leafWeight", CGROUP_V1),
];

/// Namespaces that the guest does not make.
const UNSUPPORTED_NAMESPACES: &[Unsupported] =
    &[("network", "a Pod's network namespace is the guest's own")];

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    /// Not JSON, or not of the specification's types.
    #[error("cannot decode the OCI {what}")]
    Json {
        /// Which document.
        what: &'static str,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A property that would not be enforced.
    #[error("{field} is not supported: {reason}")]
    Unsupported {
        /// Its path in the document.
        field: String,
        /// Why it would not be.
        reason: &'static str,
    },
    /// A property whose value makes no sense.
    #[error("{field} {value:?} {problem}")]
    Invalid {
        /// Its path in the document.
        field: String,
        /// What it holds.
        value: String,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Reads `config.json`.
pub(crate) fn parse_spec(json: &[u8]) -> Result<Spec, SpecError> {
    let what = "configuration";
    let mut value: Value =
        serde_json::from_slice(json).map_err(|source| SpecError::Json { what, source })?;
    strip_nulls(&mut value);
    refuse_all(&value, "", UNSUPPORTED)?;
    if let Some(process) = value.get("process") {
        refuse_all(process, "process.", UNSUPPORTED_OF_PROCESS)?;
    }
    if let Some(resources) = value.pointer("/linux/resources") {
        refuse_all(resources, "linux.resources.", UNSUPPORTED_OF_RESOURCES)?;
    }
    refuse_namespaces(&value)?;
    for device in items(&value, "/linux/resources/blockIO/weightDevice") {
        let prefix = "linux.resources.blockIO.weightDevice[].";
        refuse_all(device, prefix, &[("leafWeight", CGROUP_V1)])?;
    }
    decode(value, what)
}

/// Reads the process of an exec.
pub(crate) fn parse_process(json: &[u8]) -> Result<Process, SpecError> {
    let what = "process";
    let mut value: Value =
        serde_json::from_slice(json).map_err(|source| SpecError::Json { what, source })?;
    strip_nulls(&mut value);
    refuse_all(&value, "process.", UNSUPPORTED_OF_PROCESS)?;
    decode(value, what)
}

/// Reads the resources of an update.
pub(crate) fn parse_resources(json: &[u8]) -> Result<Resources, SpecError> {
    let what = "resources";
    let mut value: Value =
        serde_json::from_slice(json).map_err(|source| SpecError::Json { what, source })?;
    strip_nulls(&mut value);
    refuse_all(&value, "linux.resources.", UNSUPPORTED_OF_RESOURCES)?;
    decode(value, what)
}

fn decode<T: DeserializeOwned>(value: Value, what: &'static str) -> Result<T, SpecError> {
    serde_json::from_value(value).map_err(|source| SpecError::Json { what, source })
}

fn items<'a>(value: &'a Value, pointer: &str) -> impl Iterator<Item = &'a Value> {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

fn refuse_namespaces(value: &Value) -> Result<(), SpecError> {
    for namespace in items(value, "/linux/namespaces") {
        let kind = namespace
            .get("type")
            .and_then(Value::as_str)
            .unwrap_or_default();
        if let Some((_, reason)) = UNSUPPORTED_NAMESPACES
            .iter()
            .find(|(name, _)| *name == kind)
        {
            return Err(SpecError::Unsupported {
                field: format!("linux.namespaces[{kind}]"),
                reason,
            });
        }
    }
    Ok(())
}

fn refuse_all(value: &Value, prefix: &str, list: &[Unsupported]) -> Result<(), SpecError> {
    for (path, reason) in list {
        let pointer = format!("/{}", path.replace('.', "/"));
        if value
            .pointer(&pointer)
            .is_some_and(|found| !is_empty(found))
        {
            return Err(SpecError::Unsupported {
                field: format!("{prefix}{path}"),
                reason,
            });
        }
    }
    Ok(())
}

/// Whether a value asks for nothing. A number always asks: 0 is a swappiness.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) | Value::Number(_) => false,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.values().all(is_empty),
    }
}

/// Go writes an unset slice or pointer as null, which the types here know as absent.
fn strip_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(strip_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(strip_nulls),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn refusal(spec: Value) -> String {
        parse_spec(spec.to_string().as_bytes())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn what_is_not_enforced_is_refused_by_name() {
        let cases = [
            (
                json!({"hooks": {"prestart": [{"path": "/x"}]}}),
                "hooks.prestart is not supported: it runs on the host, so the shim runs it",
            ),
            (
                json!({"process": {"selinuxLabel": "l"}}),
                "process.selinuxLabel is not supported: the guest's kernel has no SELinux",
            ),
            (
                json!({"linux": {"resources": {"memory": {"swappiness": 0}}}}),
                "linux.resources.memory.swappiness is not supported: cgroup v2 has nothing like it",
            ),
            (
                json!({"linux": {"resources": {"blockIO": {"weightDevice": [{"leafWeight": 10}]}}}}),
                "linux.resources.blockIO.weightDevice[].leafWeight is not supported: cgroup v2 has nothing like it",
            ),
            (
                json!({"linux": {"namespaces": [{"type": "network"}]}}),
                "linux.namespaces[network] is not supported: a Pod's network namespace is the guest's own",
            ),
        ];
        for (spec, message) in cases {
            assert_eq!(refusal(spec), message);
        }
    }

    #[test]
    fn every_listed_property_is_refused() {
        for (path, reason) in UNSUPPORTED {
            let nested = path
                .rsplit('.')
                .fold(json!("x"), |inner, key| json!({ key: inner }));
            assert_eq!(
                refusal(nested),
                format!("{path} is not supported: {reason}")
            );
        }
        for (path, reason) in UNSUPPORTED_OF_RESOURCES {
            let nested = path
                .rsplit('.')
                .fold(json!(1), |inner, key| json!({ key: inner }));
            let error = parse_resources(nested.to_string().as_bytes()).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("linux.resources.{path} is not supported: {reason}")
            );
        }
    }

    #[test]
    fn what_the_shim_tells_containerd_is_what_is_understood() {
        use walnut_agent_api::features::{APPARMOR, HOOKS, NAMESPACES, SECCOMP};
        let understood = |spec: Value| parse_spec(spec.to_string().as_bytes()).is_ok();
        for kind in ["cgroup", "ipc", "mount", "pid", "time", "user", "uts"] {
            let spec = json!({"linux": {"namespaces": [{"type": kind}]}});
            assert_eq!(NAMESPACES.contains(&kind), understood(spec), "{kind}");
        }
        for hook in [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        ] {
            let spec = json!({"hooks": {hook: [{"path": "/x"}]}});
            let is_ours = ["createContainer", "startContainer"].contains(&hook);
            assert_eq!(is_ours, understood(spec), "{hook}");
            assert!(HOOKS.contains(&hook), "{hook}");
        }
        let seccomp = json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ALLOW"}}});
        assert_eq!(SECCOMP, understood(seccomp));
        assert_eq!(
            APPARMOR,
            understood(json!({"process": {"apparmorProfile": "p"}}))
        );
    }

    #[test]
    fn empty_values_ask_for_nothing() {
        let spec = json!({
            "hooks": {"prestart": []},
            "process": {"apparmorProfile": "", "selinuxLabel": "", "scheduler": null, "args": null},
            "linux": {"seccomp": null, "mountLabel": "", "uidMappings": [], "intelRdt": {}, "maskedPaths": null},
            "somethingNew": {"in": "a later version"}
        });
        assert_eq!(
            parse_spec(spec.to_string().as_bytes()).unwrap(),
            Spec::default()
        );
    }

    #[test]
    fn containerds_default_is_understood() {
        let spec = parse_spec(include_bytes!("testdata/ctr-run.json")).unwrap();
        assert_eq!(spec.process.args, ["sh"]);
        assert!(spec.process.no_new_privileges);
        assert_eq!(spec.process.rlimits[0].kind, "RLIMIT_NOFILE");
        assert_eq!(spec.linux.namespaces.len(), 5);
        assert_eq!(spec.mounts.len(), 7);
        assert!(!spec.linux.resources.devices[0].allow);
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange_to_refuse(bytes: Vec<u8>) {
            let _ = parse_spec(&bytes);
            let _ = parse_process(&bytes);
            let _ = parse_resources(&bytes);
        }
    }
}

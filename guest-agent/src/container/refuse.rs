//! Turns the JSON of a request into the types of `spec`, and refuses by name what the guest would
//! otherwise silently not enforce.
//!
//! OCI runtime specification, `config.md`, "Extensibility": properties that nobody knows are ignored. So
//! the list here holds the ones that *are* known and not applied. An empty value asks for nothing and passes.

use super::spec::{Process, Resources, Spec};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Known properties that the guest does not apply.
const UNSUPPORTED: &[&str] = &[
    "hooks",
    "linux.uidMappings",
    "linux.gidMappings",
    "linux.seccomp",
    "linux.mountLabel",
    "linux.intelRdt",
    "linux.personality",
    "linux.timeOffsets",
    "linux.netDevices",
    "linux.memoryPolicy",
];

/// The same of `process`, and of the process of an exec.
const UNSUPPORTED_OF_PROCESS: &[&str] = &[
    "apparmorProfile",
    "selinuxLabel",
    "ioPriority",
    "scheduler",
    "execCPUAffinity",
];

/// The same of `linux.resources`, and of an update: cgroup v2 has no such knob.
const UNSUPPORTED_OF_RESOURCES: &[&str] = &[
    "network",
    "rdma",
    "memory.kernel",
    "memory.kernelTCP",
    "memory.swappiness",
    "memory.disableOOMKiller",
    "memory.checkBeforeUpdate",
    "cpu.realtimeRuntime",
    "cpu.realtimePeriod",
    "blockIO.leafWeight",
];

/// Namespaces that the guest does not make.
const UNSUPPORTED_NAMESPACES: &[&str] = &["user", "time", "network"];

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
    #[error("{0} is not supported yet")]
    Unsupported(String),
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
    for (index, mount) in items(&value, "/mounts").enumerate() {
        refuse_all(
            mount,
            &format!("mounts[{index}]."),
            &["uidMappings", "gidMappings"],
        )?;
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
        if UNSUPPORTED_NAMESPACES.contains(&kind) {
            return Err(SpecError::Unsupported(format!("linux.namespaces[{kind}]")));
        }
    }
    Ok(())
}

fn refuse_all(value: &Value, prefix: &str, paths: &[&str]) -> Result<(), SpecError> {
    for path in paths {
        let pointer = format!("/{}", path.replace('.', "/"));
        if value
            .pointer(&pointer)
            .is_some_and(|found| !is_empty(found))
        {
            return Err(SpecError::Unsupported(format!("{prefix}{path}")));
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
            (json!({"hooks": {"prestart": [{"path": "/x"}]}}), "hooks"),
            (
                json!({"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}}}),
                "linux.seccomp",
            ),
            (
                json!({"process": {"apparmorProfile": "p"}}),
                "process.apparmorProfile",
            ),
            (
                json!({"process": {"execCPUAffinity": {"initial": "0"}}}),
                "process.execCPUAffinity",
            ),
            (
                json!({"linux": {"namespaces": [{"type": "user"}]}}),
                "linux.namespaces[user]",
            ),
            (
                json!({"linux": {"namespaces": [{"type": "time"}]}}),
                "linux.namespaces[time]",
            ),
            (
                json!({"linux": {"resources": {"memory": {"swappiness": 0}}}}),
                "linux.resources.memory.swappiness",
            ),
            (
                json!({"linux": {"personality": {"domain": "LINUX32"}}}),
                "linux.personality",
            ),
            (
                json!({"mounts": [{"destination": "/a"}, {"destination": "/b", "uidMappings": [{"hostID": 1}]}]}),
                "mounts[1].uidMappings",
            ),
        ];
        for (spec, name) in cases {
            assert_eq!(refusal(spec), format!("{name} is not supported yet"));
        }
    }

    #[test]
    fn every_listed_property_is_refused() {
        for path in UNSUPPORTED {
            let nested = path
                .rsplit('.')
                .fold(json!("x"), |inner, key| json!({ key: inner }));
            assert_eq!(refusal(nested), format!("{path} is not supported yet"));
        }
        for path in UNSUPPORTED_OF_RESOURCES {
            let nested = path
                .rsplit('.')
                .fold(json!(1), |inner, key| json!({ key: inner }));
            let error = parse_resources(nested.to_string().as_bytes()).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("linux.resources.{path} is not supported yet")
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
            assert_eq!(HOOKS.contains(&hook), understood(spec), "{hook}");
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

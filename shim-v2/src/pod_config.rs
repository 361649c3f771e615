//! The configuration of a Pod that containerd's Sandbox API makes, as that of a pause container.
//!
//! In this mode nobody gives the Pod a container of its own, so it gets one: the agent's `walnut-pause`, under
//! the Pod's id, which holds the Pod's namespaces. What the CRI says of the Pod (`PodSandboxConfig` of
//! `k8s.io/cri-api`, read here by its field numbers) becomes what the CRI would have put into the OCI
//! configuration of its own pause container, and so everything else treats both modes alike. Pure.

use crate::fields::Fields;
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use oci_spec::runtime::Spec;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use std::path::Path;
use walnut_agent_api::{AGENT_PROGRAM, PAUSE_PROGRAM, PAUSE_ROOT};

/// What containerd's CRI plugin gives its own pause container.
const OOM_SCORE_ADJ: i32 = -998;
const NOBODY: u32 = 65535;
/// `NamespaceMode.NODE`.
const NODE: u64 = 2;
/// `LinuxContainerResources`' fields and the CRI's annotations of a sandbox.
const RESOURCES: [(u32, &str); 4] = [
    (1, "io.kubernetes.cri.sandbox-cpu-period"),
    (2, "io.kubernetes.cri.sandbox-cpu-quota"),
    (3, "io.kubernetes.cri.sandbox-cpu-shares"),
    (4, "io.kubernetes.cri.sandbox-memory"),
];

/// Why a Pod can't be configured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodConfigError {
    /// Options of another kind.
    #[error("options of type {0:?} are not the CRI's PodSandboxConfig")]
    Type(String),
    /// Options that are no such message.
    #[error("the options are not a PodSandboxConfig")]
    Message(#[from] protobuf::Error),
    /// What came out of it.
    #[error("the Pod's configuration is not an OCI configuration")]
    Json(#[from] serde_json::Error),
}

/// A Pod, as its containers need it.
#[derive(Debug)]
pub(crate) struct PodConfig {
    /// The configuration of the Pod's own container.
    pub(crate) spec: Spec,
    /// `/etc/resolv.conf`, if it isn't to be the node's.
    pub(crate) resolv: Option<String>,
}

/// Reads what containerd was given for the Pod.
pub(crate) fn configuration(request: &CreateSandboxRequest) -> Result<PodConfig, PodConfigError> {
    let config = sandbox_config(request.options.as_ref())?;
    Ok(PodConfig {
        spec: pause(request, &config)?,
        resolv: resolv(&config)?,
    })
}

/// What containerd gives a Pod with a pause container unless it is told otherwise (`enable_unprivileged_ports`,
/// `enable_unprivileged_icmp`); how it is configured is not told to a shim.
const USUAL_SYSCTLS: [(&str, &str); 2] = [
    ("net.ipv4.ip_unprivileged_port_start", "0"),
    ("net.ipv4.ping_group_range", "0 2147483647"),
];

fn resolv(config: &Fields) -> Result<Option<String>, PodConfigError> {
    if config.all(4).next().is_none() {
        return Ok(None);
    }
    let dns = config.message(4)?;
    let mut lines: Vec<_> = dns
        .texts(1)
        .map(|server| format!("nameserver {server}\n"))
        .collect();
    for (number, word) in [(2, "search"), (3, "options")] {
        let words: Vec<_> = dns.texts(number).collect();
        if !words.is_empty() {
            lines.push(format!("{word} {}\n", words.join(" ")));
        }
    }
    Ok(Some(lines.concat()))
}

fn pause(request: &CreateSandboxRequest, config: &Fields) -> Result<Spec, PodConfigError> {
    let linux = config.message(8)?;
    let modes = linux.message(2)?.message(1)?;
    let resources = linux.message(5)?;
    let mut annotations = config.map(7)?;
    let given = request.annotations.iter();
    annotations.extend(given.map(|(key, value)| (key.clone(), json!(value))));
    for (number, name) in RESOURCES {
        // Two's complement on the wire, as protobuf's int64 is.
        let value = resources.number(number).cast_signed();
        if value != 0 {
            annotations.insert(name.to_owned(), json!(value.to_string()));
        }
    }
    annotations.insert(
        "io.kubernetes.cri.container-type".to_owned(),
        json!("sandbox"),
    );
    annotations.insert(
        "io.kubernetes.cri.sandbox-id".to_owned(),
        json!(request.sandbox_id),
    );
    let mut namespaces = vec![json!({ "type": "mount" }), json!({ "type": "cgroup" })];
    for (number, kind) in [(2, "pid"), (3, "ipc"), (1, "uts")] {
        // A Pod of the host's network has the host's name too, as with the CRI.
        if modes.number(number) != NODE {
            namespaces.push(json!({ "type": kind }));
        }
    }
    // Without a path it is a new one.
    if modes.number(1) != NODE {
        namespaces.push(json!({ "type": "network", "path": request.netns_path }));
    }
    let mut sysctls = linux.map(3)?;
    for (name, value) in USUAL_SYSCTLS {
        sysctls.entry(name).or_insert_with(|| json!(value));
    }
    let spec = json!({
        "ociVersion": "1.2.0",
        "hostname": if modes.number(1) == NODE { String::new() } else { config.text(2) },
        "annotations": annotations,
        "root": { "path": PAUSE_ROOT, "readonly": true },
        "process": {
            "args": [PAUSE_PROGRAM], "cwd": "/", "noNewPrivileges": true,
            "user": { "uid": NOBODY, "gid": NOBODY }, "oomScoreAdj": OOM_SCORE_ADJ,
        },
        "mounts": [{
            "destination": PAUSE_PROGRAM, "type": "bind", "source": AGENT_PROGRAM,
            "options": ["bind", "ro", "nosuid", "nodev"],
        }],
        "linux": {
            "cgroupsPath": cgroups_path(&linux.text(1), &request.sandbox_id),
            "namespaces": namespaces,
            "sysctl": sysctls,
        },
    });
    Ok(serde_json::from_value(spec)?)
}

fn sandbox_config(options: Option<&Any>) -> Result<Fields, PodConfigError> {
    let Some(options) = options.filter(|options| !options.type_url.is_empty()) else {
        return Ok(Fields::default());
    };
    match options.type_url.rsplit(['.', '/']).next() {
        Some("PodSandboxConfig") => Ok(Fields::parse(&options.value)?),
        _ => Err(PodConfigError::Type(options.type_url.clone())),
    }
}

/// The Pod's cgroup below the kubelet's, named as containerd's CRI plugin does for each cgroup driver.
fn cgroups_path(parent: &str, id: &str) -> Option<String> {
    let slice = Path::new(parent)
        .file_name()
        .and_then(|name| name.to_str())
        .filter(|name| name.ends_with(".slice"));
    match (parent, slice) {
        ("", _) => None,
        (_, Some(slice)) => Some(format!("{slice}:cri-containerd:{id}")),
        (parent, None) => Some(format!("{}/{id}", parent.trim_end_matches('/'))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protobuf::MessageField;

    /// A length-delimited field of fewer than 128 bytes.
    fn field(number: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
        bytes.extend(content);
        bytes
    }

    fn request(config: Vec<u8>) -> CreateSandboxRequest {
        CreateSandboxRequest {
            sandbox_id: "pod".into(),
            netns_path: "/var/run/netns/cni-1".into(),
            options: MessageField::some(Any {
                type_url: "runtime.v1.PodSandboxConfig".into(),
                value: config,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_cris_configuration_becomes_that_of_a_pause_container() {
        let sysctl = [field(1, b"net.core.somaxconn"), field(2, b"512")].concat();
        // cpu_quota 50000 and memory_limit_in_bytes 1 MiB.
        let resources = [0x10, 0xd0, 0x86, 0x03, 0x20, 0x80, 0x80, 0x40];
        let linux = [
            field(1, b"/kubepods/pod-1"),
            field(3, &sysctl),
            field(5, &resources),
        ];
        let dns = [
            field(1, b"192.0.2.1"),
            field(2, b"a.test"),
            field(2, b"test"),
        ]
        .concat();
        let config = [
            field(2, b"web-0"),
            field(4, &dns),
            field(8, &linux.concat()),
        ]
        .concat();
        let PodConfig { spec, resolv } = configuration(&request(config)).unwrap();
        assert_eq!(
            resolv.unwrap(),
            "nameserver 192.0.2.1\nsearch a.test test\n"
        );
        let spec = serde_json::to_value(spec).unwrap();
        assert_eq!(spec["hostname"], "web-0");
        assert_eq!(spec["linux"]["cgroupsPath"], "/kubepods/pod-1/pod");
        let sysctls = &spec["linux"]["sysctl"];
        assert_eq!(sysctls["net.core.somaxconn"], "512");
        assert_eq!(sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
        let annotations = &spec["annotations"];
        assert_eq!(annotations["io.kubernetes.cri.sandbox-cpu-quota"], "50000");
        assert_eq!(annotations["io.kubernetes.cri.sandbox-memory"], "1048576");
        assert_eq!(annotations["io.kubernetes.cri.container-type"], "sandbox");
        let network = json!({ "type": "network", "path": "/var/run/netns/cni-1" });
        let namespaces = spec["linux"]["namespaces"].as_array().unwrap();
        assert_eq!(namespaces.len(), 6);
        assert!(namespaces.contains(&network));
    }

    #[test]
    fn namespaces_of_the_node_are_left_out() {
        // network and ipc are NODE.
        let modes = [0x08, 0x02, 0x18, 0x02];
        let config = [field(2, b"ignored"), field(8, &field(2, &field(1, &modes)))];
        let PodConfig { spec, resolv } = configuration(&request(config.concat())).unwrap();
        assert_eq!(resolv, None);
        let spec = serde_json::to_value(spec).unwrap();
        let kinds: Vec<_> = spec["linux"]["namespaces"]
            .as_array()
            .unwrap()
            .iter()
            .map(|namespace| namespace["type"].as_str().unwrap())
            .collect();
        assert_eq!(kinds, ["mount", "cgroup", "pid"]);
        assert_eq!(spec["hostname"], "");
    }

    #[test]
    fn other_options_are_named_and_none_are_needed() {
        let mut request = request(Vec::new());
        request.options.mut_or_insert_default().type_url = "some.Other".into();
        let error = configuration(&request).unwrap_err().to_string();
        assert!(error.contains("some.Other"), "{error}");
        request.options = MessageField::none();
        assert!(configuration(&request).is_ok());
    }

    #[test]
    fn the_cgroup_is_named_as_the_driver_names_it() {
        assert_eq!(cgroups_path("", "p"), None);
        assert_eq!(cgroups_path("/kubepods/x", "p").unwrap(), "/kubepods/x/p");
        let slice = cgroups_path("/kubepods.slice/kubepods-pod1.slice", "p").unwrap();
        assert_eq!(slice, "kubepods-pod1.slice:cri-containerd:p");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_configuration_or_an_error(bytes: Vec<u8>) {
            let _ = configuration(&request(bytes));
        }
    }
}

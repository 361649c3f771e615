//! Checks of a configuration that need nothing but the configuration.
//!
//! OCI runtime specification, `config.md` and `config-linux.md`: what MUST be an error. Must not do I/O.

use super::{
    mount_options::root_propagation,
    refuse::SpecError,
    spec::{IdMapping, NamespaceKind, Process, Spec},
};
use std::{collections::BTreeSet, path::Path};

/// sysctl(2) names that the container's own IPC namespace holds.
const IPC_SYSCTLS: &[&str] = &[
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Clocks that `linux.timeOffsets` can move.
const CLOCKS: &[&str] = &["monotonic", "boottime"];
const NANOSECONDS_PER_SECOND: u32 = 1_000_000_000;

/// Checks the whole configuration of a new container.
pub(crate) fn validate(spec: &Spec) -> Result<(), SpecError> {
    if !spec.oci_version.starts_with("1.") {
        let problem = "is not a version of the specification that is known here, which are 1.x";
        return Err(invalid("ociVersion", &spec.oci_version, problem));
    }
    absolute("root.path", &spec.root.path)?;
    validate_process(&spec.process)?;
    for mount in &spec.mounts {
        absolute("mounts[].destination", &mount.destination)?;
        mappings("mounts[].uidMappings", &mount.uid_mappings)?;
        mappings("mounts[].gidMappings", &mount.gid_mappings)?;
    }
    let hooks = &spec.hooks;
    for hook in hooks.create_container.iter().chain(&hooks.start_container) {
        absolute("hooks.*[].path", &hook.path)?;
        if hook.timeout == Some(0) {
            return Err(invalid("hooks.*[].timeout", "0", "must be above zero"));
        }
    }
    for device in &spec.linux.devices {
        absolute("linux.devices[].path", &device.path)?;
        owner("linux.devices[].uid", device.uid)?;
        owner("linux.devices[].gid", device.gid)?;
    }
    let propagation = &spec.linux.rootfs_propagation;
    if root_propagation(propagation).is_none() {
        return Err(invalid(
            "linux.rootfsPropagation",
            propagation,
            "is not a propagation",
        ));
    }
    validate_namespaces(spec)?;
    validate_ids(spec)?;
    validate_clocks(spec)?;
    for name in spec.linux.sysctl.keys() {
        validate_sysctl(spec, name)?;
    }
    Ok(())
}

/// Checks a process, whether a container's first or a later one.
pub(crate) fn validate_process(process: &Process) -> Result<(), SpecError> {
    absolute("process.cwd", &process.cwd)?;
    if process.args.first().is_none_or(String::is_empty) {
        return Err(invalid("process.args", "", "names no program"));
    }
    for (field, texts) in [
        ("process.args", &process.args),
        ("process.env", &process.env),
    ] {
        if let Some(text) = texts.iter().find(|text| text.contains('\0')) {
            return Err(invalid(field, text, "contains a zero byte"));
        }
    }
    if let Some(entry) = process
        .env
        .iter()
        .find(|entry| entry.find('=').is_none_or(|at| at == 0))
    {
        return Err(invalid("process.env", entry, "is not NAME=VALUE"));
    }
    let user = &process.user;
    owner("process.user.uid", user.uid)?;
    owner("process.user.gid", user.gid)?;
    for gid in &user.additional_gids {
        owner("process.user.additionalGids", *gid)?;
    }
    let mut seen = BTreeSet::new();
    for limit in &process.rlimits {
        if !seen.insert(&limit.kind) {
            return Err(invalid("process.rlimits", &limit.kind, "is there twice"));
        }
        if limit.soft > limit.hard {
            return Err(invalid(
                "process.rlimits",
                &limit.kind,
                "has a soft limit above its hard limit",
            ));
        }
    }
    Ok(())
}

fn validate_namespaces(spec: &Spec) -> Result<(), SpecError> {
    let mut seen = Vec::new();
    for namespace in &spec.linux.namespaces {
        let field = "linux.namespaces";
        if seen.contains(&namespace.kind) {
            return Err(invalid(field, &name(namespace.kind), "is there twice"));
        }
        seen.push(namespace.kind);
        if !namespace.path.as_os_str().is_empty() {
            absolute("linux.namespaces[].path", &namespace.path)?;
            if matches!(namespace.kind, NamespaceKind::Mount | NamespaceKind::Cgroup) {
                let named = format!("linux.namespaces[{}].path", name(namespace.kind));
                return Err(unsupported(
                    named,
                    "a container has one of its own, or none",
                ));
            }
        }
    }
    for needed in [NamespaceKind::Mount, NamespaceKind::Pid] {
        if !seen.contains(&needed) {
            return Err(unsupported(
                format!("linux.namespaces without {}", name(needed)),
                "the container would share the agent's own",
            ));
        }
    }
    let names = !spec.hostname.is_empty() || !spec.domainname.is_empty();
    if names && !seen.contains(&NamespaceKind::Uts) {
        return Err(invalid(
            "hostname",
            &spec.hostname,
            "needs linux.namespaces[uts]",
        ));
    }
    Ok(())
}

/// `config-linux.md`, "User namespace mappings".
fn validate_ids(spec: &Spec) -> Result<(), SpecError> {
    let linux = &spec.linux;
    mappings("linux.uidMappings", &linux.uid_mappings)?;
    mappings("linux.gidMappings", &linux.gid_mappings)?;
    let namespace = spec.namespace(NamespaceKind::User);
    let new = namespace.is_some_and(|namespace| namespace.path.as_os_str().is_empty());
    for (field, list) in [
        ("linux.uidMappings", &linux.uid_mappings),
        ("linux.gidMappings", &linux.gid_mappings),
    ] {
        if namespace.is_none() && !list.is_empty() {
            return Err(invalid(field, "", "needs linux.namespaces[user]"));
        }
        if new && host_id(list, 0).is_none() {
            let problem = "does not map the container's 0, who sets it up";
            return Err(invalid(field, "", problem));
        }
    }
    Ok(())
}

fn validate_clocks(spec: &Spec) -> Result<(), SpecError> {
    let field = "linux.timeOffsets";
    for (clock, offset) in &spec.linux.time_offsets {
        if !CLOCKS.contains(&clock.as_str()) {
            return Err(invalid(field, clock, "is not a clock that can be moved"));
        }
        if offset.nanosecs >= NANOSECONDS_PER_SECOND {
            return Err(invalid(field, clock, "has a whole second in its nanosecs"));
        }
        let namespace = spec.namespace(NamespaceKind::Time);
        if namespace.is_none_or(|namespace| !namespace.path.as_os_str().is_empty()) {
            return Err(invalid(field, clock, "needs a new linux.namespaces[time]"));
        }
    }
    Ok(())
}

/// Who an id of a container is outside of it.
pub(super) fn host_id(mappings: &[IdMapping], id: u32) -> Option<u32> {
    mappings.iter().find_map(|mapping| {
        let at = id.checked_sub(mapping.container_id)?;
        (at < mapping.size).then_some(mapping.host_id.checked_add(at)?)
    })
}

fn mappings(field: &str, mappings: &[IdMapping]) -> Result<(), SpecError> {
    for mapping in mappings {
        let ends = [mapping.container_id, mapping.host_id].map(|id| id.checked_add(mapping.size));
        if mapping.size == 0 || ends.contains(&None) {
            let text = format!("{mapping:?}");
            return Err(invalid(field, &text, "is not a range of ids"));
        }
    }
    Ok(())
}

fn validate_sysctl(spec: &Spec, name: &str) -> Result<(), SpecError> {
    let field = "linux.sysctl";
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte);
    let parts_are_names = name.split(['.', '/']).all(|part| !part.is_empty());
    if !name.bytes().all(plain) || !parts_are_names {
        return Err(invalid(field, name, "is not the name of a sysctl"));
    }
    let dotted = name.replace('/', ".");
    let own = match dotted.as_str() {
        // The network namespace is the Pod's, which is the guest's.
        name if name.starts_with("net.") => true,
        name if name.starts_with("fs.mqueue.") || IPC_SYSCTLS.contains(&name) => {
            spec.has(NamespaceKind::Ipc)
        }
        "kernel.domainname" | "kernel.hostname" => spec.has(NamespaceKind::Uts),
        _ => false,
    };
    if own {
        return Ok(());
    }
    Err(invalid(
        field,
        name,
        "is not in a namespace of the container",
    ))
}

fn absolute(field: &str, path: &Path) -> Result<(), SpecError> {
    if path.is_absolute() && !path.as_os_str().as_encoded_bytes().contains(&0) {
        return Ok(());
    }
    Err(invalid(
        field,
        &path.to_string_lossy(),
        "is not an absolute path",
    ))
}

/// The largest number means "no change" to the kernel.
fn owner(field: &str, id: u32) -> Result<(), SpecError> {
    if id != u32::MAX {
        return Ok(());
    }
    Err(invalid(field, &id.to_string(), "is not an id"))
}

fn invalid(field: &str, value: &str, problem: &'static str) -> SpecError {
    SpecError::Invalid {
        field: field.to_owned(),
        value: value.to_owned(),
        problem,
    }
}

fn unsupported(field: String, reason: &'static str) -> SpecError {
    SpecError::Unsupported { field, reason }
}

fn name(kind: NamespaceKind) -> String {
    format!("{kind:?}").to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::{
        refuse::parse_spec,
        spec::{Namespace, TimeOffset},
    };

    fn valid() -> Spec {
        parse_spec(include_bytes!("testdata/ctr-run.json")).unwrap()
    }

    fn problem(change: impl FnOnce(&mut Spec)) -> String {
        let mut spec = valid();
        change(&mut spec);
        validate(&spec).unwrap_err().to_string()
    }

    #[test]
    fn containerds_default_is_valid() {
        validate(&valid()).unwrap();
    }

    #[test]
    fn a_container_never_shares_the_agents_namespaces() {
        let without = |kind| {
            problem(|spec| {
                spec.linux
                    .namespaces
                    .retain(|namespace| namespace.kind != kind)
            })
        };
        assert_eq!(
            without(NamespaceKind::Pid),
            "linux.namespaces without pid is not supported: the container would share the agent's own"
        );
        assert_eq!(
            without(NamespaceKind::Mount),
            "linux.namespaces without mount is not supported: the container would share the agent's own"
        );
    }

    #[test]
    fn problems_are_named() {
        let twice = Namespace {
            kind: NamespaceKind::Ipc,
            path: "".into(),
        };
        assert!(
            problem(|spec| spec.linux.namespaces.push(twice)).contains("\"ipc\" is there twice")
        );
        assert!(problem(|spec| spec.process.args.clear()).contains("process.args"));
        assert!(problem(|spec| spec.process.cwd = "tmp".into()).contains("process.cwd"));
        assert!(problem(|spec| spec.process.env.push("A\0=b".into())).contains("zero byte"));
        assert!(problem(|spec| spec.process.env.push("=b".into())).contains("NAME=VALUE"));
        assert!(problem(|spec| spec.process.rlimits[0].soft = 2048).contains("soft limit"));
    }

    #[test]
    fn ids_and_clocks_need_their_namespaces() {
        let range = |container_id, size| IdMapping {
            container_id,
            host_id: 100_000,
            size,
        };
        let user = |spec: &mut Spec| {
            spec.linux.namespaces.push(Namespace {
                kind: NamespaceKind::User,
                path: "".into(),
            });
        };
        assert!(
            problem(|spec| spec.linux.uid_mappings = vec![range(0, 1)])
                .contains("needs linux.namespaces[user]")
        );
        assert!(problem(user).contains("does not map the container's 0"));
        let none = |spec: &mut Spec| spec.linux.gid_mappings = vec![range(0, 0)];
        assert!(problem(none).contains("is not a range of ids"));
        let clock = |spec: &mut Spec| {
            let clocks = &mut spec.linux.time_offsets;
            clocks.insert("monotonic".into(), TimeOffset::default());
        };
        assert!(problem(clock).contains("needs a new linux.namespaces[time]"));
        assert_eq!(
            host_id(&[range(0, 10), range(1000, 5)], 1004),
            Some(100_004)
        );
        assert_eq!(host_id(&[range(0, 10)], 10), None);
    }

    #[test]
    fn nobody_can_be_the_id_that_changes_nothing() {
        assert!(problem(|spec| spec.process.user.uid = u32::MAX).contains("process.user.uid"));
        assert!(
            problem(|spec| spec.process.user.additional_gids = vec![u32::MAX])
                .contains("additionalGids")
        );
    }

    #[test]
    fn only_sysctls_of_the_containers_own_pass() {
        let with = |name: &str| {
            let mut spec = valid();
            spec.linux.sysctl.insert(name.into(), "1".into());
            validate(&spec).is_ok()
        };
        assert!(with("net.ipv4.ip_forward"));
        assert!(with("kernel.shmmax"));
        assert!(with("kernel/sem"));
        for other in [
            "kernel.panic",
            "vm.swappiness",
            "net..x",
            "net/../kernel/panic",
            "../x",
            "",
        ] {
            assert!(!with(other), "{other}");
        }
    }
}

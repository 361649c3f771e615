//! From the host's OCI configuration to the guest's, and the list of host files that it needs.
//!
//! Pure: opens nothing. What the guest's agent can't enforce it refuses by name itself; refused here is
//! only what has no meaning beyond the host: its namespaces and its file systems.
//! OCI runtime specification 1.2, config.md and config-linux.md.

use crate::{
    mounts::{Bind, MountOptionsError, parse_options},
    pod::{self, Pod},
    runtime_options::ConfigSource,
    size::{SizeError, Wanted},
};
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, LinuxNamespaceType, Mount, Spec,
};
use std::path::{Path, PathBuf};
use walnut_agent_api::{POD_SHM, SHARE_MOUNT_POINT};

/// File systems that the guest's kernel makes by itself.
const GUEST_FILE_SYSTEMS: [&str; 7] = [
    "proc", "sysfs", "tmpfs", "mqueue", "devpts", "cgroup", "cgroup2",
];

/// A container's configuration for the guest.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Translation {
    /// What the agent gets.
    pub(crate) guest: Spec,
    /// Host files and directories to expose, by their number below the container's `mounts`.
    pub(crate) volumes: Vec<Volume>,
    /// Block devices of the host that the container asks for, in the order of its configuration.
    pub(crate) devices: Vec<BlockDevice>,
}

/// A block device of the host that a container gets as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockDevice {
    /// In the container.
    pub(crate) path: PathBuf,
    /// On the host.
    pub(crate) major: u32,
    /// On the host.
    pub(crate) minor: u32,
    /// Whether the container's device rules let it only read.
    pub(crate) read_only: bool,
}

/// A host file or directory that a container sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Volume {
    /// On the host.
    pub(crate) source: PathBuf,
    /// With the mounts below it.
    pub(crate) recursive: bool,
    /// Not writable by the guest, whatever its kernel does.
    pub(crate) read_only: bool,
}

/// Where a Pod's network is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NetworkNamespace {
    /// Somebody has made it.
    Path(PathBuf),
    /// The Pod's own, empty until somebody looks for it by the Pod's process id.
    New,
}

/// What the host's side of a sandbox takes from the configuration of its first container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostPart {
    /// Where the Pod's cgroup is.
    pub(crate) cgroups_path: Option<PathBuf>,
    /// Host name of the guest.
    pub(crate) hostname: Option<String>,
    /// How readily the host's kernel kills the VM when memory is short.
    pub(crate) oom_score_adj: i32,
    /// How large the VM shall be.
    pub(crate) wanted: Wanted,
    /// Where its network is.
    pub(crate) network: NetworkNamespace,
    /// Which configuration the options name.
    pub(crate) config: ConfigSource,
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum SpecError {
    /// A namespace of the host.
    #[error(
        "linux.namespaces: {} namespace {path:?} is not of this Pod, and a container in a VM can join no other",
        word(*kind)
    )]
    HostNamespace {
        /// Its type.
        kind: LinuxNamespaceType,
        /// Its path.
        path: PathBuf,
    },
    /// No namespace where that means the host's.
    #[error(
        "linux.namespaces has no {} namespace: the host's is out of reach of a container in a VM",
        word(*kind)
    )]
    SharesHost {
        /// The type that is missing.
        kind: LinuxNamespaceType,
    },
    /// A mount that isn't a bind mount and that the guest can't make.
    #[error("mounts[{index}].type {kind:?} at {destination:?} is not supported")]
    MountType {
        /// Position in the list.
        index: usize,
        /// Its type.
        kind: String,
        /// Where it should be.
        destination: PathBuf,
    },
    /// A bind mount without an absolute source.
    #[error("mounts[{index}].source {source_path:?} at {destination:?} must be an absolute path")]
    BindSource {
        /// Position in the list.
        index: usize,
        /// Its source.
        source_path: PathBuf,
        /// Where it should be.
        destination: PathBuf,
    },
    /// Options that can't be honoured.
    #[error("mounts[{index}].options at {destination:?}")]
    MountOptions {
        /// Position in the list.
        index: usize,
        /// Where it should be.
        destination: PathBuf,
        /// Why.
        source: MountOptionsError,
    },
    /// What sizes the VM.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// Without it there is nothing to run.
    #[error("{0} is missing")]
    Missing(&'static str),
}

/// The specification's word for a type; the crate shows the kernel's.
fn word(kind: LinuxNamespaceType) -> String {
    match kind {
        LinuxNamespaceType::Network => "network".to_owned(),
        LinuxNamespaceType::Mount => "mount".to_owned(),
        other => other.to_string(),
    }
}

/// What the sandbox needs from the configuration.
pub(crate) fn host_part(spec: &Spec) -> Result<HostPart, SpecError> {
    let linux = spec.linux().as_ref();
    let mut namespaces = linux
        .iter()
        .flat_map(|linux| linux.namespaces().iter().flatten());
    let network = namespaces
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
        .ok_or(SpecError::SharesHost {
            kind: LinuxNamespaceType::Network,
        })?;
    let path = network.path().clone().filter(|path| path != Path::new(""));
    Ok(HostPart {
        wanted: Wanted::of(spec)?,
        cgroups_path: linux.and_then(|linux| linux.cgroups_path().clone()),
        hostname: spec.hostname().clone(),
        oom_score_adj: spec
            .process()
            .as_ref()
            .and_then(oci_spec::runtime::Process::oom_score_adj)
            .unwrap_or(0),
        network: path.map_or(NetworkNamespace::New, NetworkNamespace::Path),
        config: ConfigSource::Node,
    })
}

/// Where a container's root file system is on the host, unless mounts make it up.
pub(crate) fn host_root(spec: &Spec, bundle: &Path) -> PathBuf {
    let root = spec.root().as_ref().map(|root| root.path().as_path());
    bundle.join(root.unwrap_or(Path::new("rootfs")))
}

/// Rewrites a configuration for the guest.
pub(crate) fn translate(
    mut spec: Spec,
    container_id: &str,
    pod: Pod<'_>,
) -> Result<Translation, SpecError> {
    let base = Path::new(SHARE_MOUNT_POINT).join(container_id);
    let root = spec.root_mut().as_mut().ok_or(SpecError::Missing("root"))?;
    // Changed in place: what the crate builds anew is read-only unless told otherwise.
    root.set_path(base.join("rootfs"));
    translate_linux(&mut spec, container_id, pod)?;
    let mut volumes = translate_mounts(&mut spec, &base.join("mounts"), pod)?;
    translate_hooks(&mut spec, &base.join("mounts"), &mut volumes);
    Ok(Translation {
        devices: block_devices(&spec),
        guest: spec,
        volumes,
    })
}

/// The part of [`translate`] that also holds for a container without files of the host.
pub(crate) fn translate_linux(
    spec: &mut Spec,
    container_id: &str,
    pod: Pod<'_>,
) -> Result<(), SpecError> {
    let Some(linux) = spec.linux_mut() else {
        return Ok(());
    };
    // The host's cgroup holds the VM; this container's own is made by the guest's kernel.
    linux.set_cgroups_path(Some(Path::new("/").join(container_id)));
    // These number the host's CPUs and memory nodes, to which the VMM is bound.
    let resources = linux.resources_mut().as_mut();
    if let Some(cpu) = resources.and_then(|resources| resources.cpu_mut().as_mut()) {
        cpu.set_cpus(None);
        cpu.set_mems(None);
    }
    match linux.namespaces_mut() {
        Some(namespaces) => pod.share(namespaces),
        None => Ok(()),
    }
}

/// Whether the container can't write to its root once it runs.
pub(crate) fn is_root_read_only(spec: &Spec) -> bool {
    let root = spec.root().as_ref();
    root.and_then(oci_spec::runtime::Root::readonly)
        .unwrap_or(false)
}

fn block_devices(spec: &Spec) -> Vec<BlockDevice> {
    let linux = spec.linux().as_ref();
    let devices = linux.and_then(|linux| linux.devices().as_ref());
    let rules = linux
        .and_then(|linux| linux.resources().as_ref())
        .and_then(|resources| resources.devices().as_ref());
    let mut found: Vec<BlockDevice> = Vec::new();
    for device in devices.into_iter().flatten() {
        let (Ok(major), Ok(minor)) = (device.major().try_into(), device.minor().try_into()) else {
            continue;
        };
        let known = found
            .iter()
            .any(|other| (other.major, other.minor) == (major, minor));
        if device.typ() == LinuxDeviceType::B && !known {
            let rules = rules.into_iter().flatten();
            found.push(BlockDevice {
                path: device.path().clone(),
                major,
                minor,
                read_only: !rules.fold(true, |may, rule| may_write(may, rule, device)),
            });
        }
    }
    found
}

/// Whether a device may be written after one more rule: the last that speaks of it counts.
fn may_write(before: bool, rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    let any_type = rule.typ().is_none_or(|kind| kind == LinuxDeviceType::A);
    let of_type = any_type || rule.typ() == Some(LinuxDeviceType::B);
    let is = |number: Option<i64>, of_device| {
        number.is_none_or(|number| number < 0 || number == of_device)
    };
    let of_device = is(rule.major(), device.major()) && is(rule.minor(), device.minor());
    let writes = rule
        .access()
        .as_ref()
        .is_none_or(|access| access.contains('w'));
    if of_type && of_device && writes {
        rule.allow()
    } else {
        before
    }
}

/// Puts the guest's numbers of block devices in place of the host's.
pub(crate) fn renumber(spec: &mut Spec, devices: &[BlockDevice], numbers: &[(u32, u32)]) {
    let Some(linux) = spec.linux_mut() else {
        return;
    };
    let of_guest = |major: i64, minor: i64| {
        let is = |device: &BlockDevice| {
            (i64::from(device.major), i64::from(device.minor)) == (major, minor)
        };
        let index = devices.iter().position(is)?;
        numbers
            .get(index)
            .map(|&(major, minor)| (i64::from(major), i64::from(minor)))
    };
    for device in linux.devices_mut().iter_mut().flatten() {
        if let (LinuxDeviceType::B, Some((major, minor))) =
            (device.typ(), of_guest(device.major(), device.minor()))
        {
            device.set_major(major);
            device.set_minor(minor);
        }
    }
    let resources = linux.resources_mut().as_mut();
    for rule in resources
        .and_then(|resources| resources.devices_mut().as_mut())
        .into_iter()
        .flatten()
    {
        if let (Some(LinuxDeviceType::B), Some(major), Some(minor)) =
            (rule.typ(), rule.major(), rule.minor())
            && let Some((major, minor)) = of_guest(major, minor)
        {
            rule.set_major(Some(major));
            rule.set_minor(Some(minor));
        }
    }
}

fn translate_mounts(
    spec: &mut Spec,
    guest_base: &Path,
    pod: Pod<'_>,
) -> Result<Vec<Volume>, SpecError> {
    let mut volumes = Vec::new();
    let joins_ipc = pod::joins_ipc(spec);
    let mounts = spec
        .mounts_mut()
        .as_mut()
        .map_or(&mut [][..], Vec::as_mut_slice);
    for (index, mount) in mounts.iter_mut().enumerate() {
        let destination = mount.destination().clone();
        let kind = mount.typ().clone().unwrap_or_default();
        let options = mount.options().clone().unwrap_or_default();
        if pod.is_shm(mount, joins_ipc) {
            // Of its options only those of the mount, as a size is the file system's.
            let access = options.iter().filter(|option| *option == "ro");
            let access = access.cloned().chain(["bind".to_owned()]).collect();
            mount.set_typ(Some("bind".to_owned()));
            mount.set_source(Some(POD_SHM.into()));
            mount.set_options(Some(access));
            continue;
        }
        let is_bind = |option: &String| option == "bind" || option == "rbind";
        if kind == "bind" || options.iter().any(is_bind) {
            let volume = volume(index, mount, &options)?;
            mount.set_typ(Some("bind".to_owned()));
            mount.set_source(Some(guest_base.join(volumes.len().to_string())));
            volumes.push(volume);
        } else if !GUEST_FILE_SYSTEMS.contains(&kind.as_str()) {
            return Err(SpecError::MountType {
                index,
                kind,
                destination,
            });
        }
    }
    Ok(volumes)
}

/// The program of a `createContainer` hook is one of the host; it runs in the guest, which is shown that file.
fn translate_hooks(spec: &mut Spec, guest_base: &Path, volumes: &mut Vec<Volume>) {
    let Some(mut hooks) = spec.hooks().clone() else {
        return;
    };
    let mut moved = hooks.create_container().clone();
    for hook in moved.iter_mut().flatten() {
        let volume = Volume {
            source: hook.path().clone(),
            recursive: false,
            read_only: true,
        };
        hook.set_path(guest_base.join(volumes.len().to_string()));
        volumes.push(volume);
    }
    hooks.set_create_container(moved);
    spec.set_hooks(Some(hooks));
}

fn volume(index: usize, mount: &Mount, options: &[String]) -> Result<Volume, SpecError> {
    let destination = mount.destination().clone();
    let source_path = mount.source().clone().unwrap_or_default();
    if !source_path.is_absolute() {
        return Err(SpecError::BindSource {
            index,
            source_path,
            destination,
        });
    }
    let parsed = parse_options(options).map_err(|source| SpecError::MountOptions {
        index,
        destination,
        source,
    })?;
    let read_only = options
        .iter()
        .any(|option| option == "ro" || option == "rro");
    Ok(Volume {
        source: source_path,
        recursive: parsed.bind == Bind::Recursive,
        read_only,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const POD: Pod<'_> = Pod {
        id: "pod",
        pid: Some(77),
    };

    fn spec(json: &str) -> Spec {
        serde_json::from_str(json).unwrap()
    }

    fn with_mounts(mounts: &str) -> Spec {
        spec(&format!(
            r#"{{"ociVersion":"1.2.0","root":{{"path":"rootfs","readonly":true}},"mounts":{mounts}}}"#
        ))
    }

    #[test]
    fn the_root_is_in_the_share_and_stays_read_only() {
        let guest = translate(with_mounts("[]"), "c1", POD).unwrap().guest;
        let root = guest.root().as_ref().unwrap();
        assert_eq!(root.path(), Path::new("/run/walnut/share/c1/rootfs"));
        assert_eq!(root.readonly(), Some(true));
    }

    #[test]
    fn a_root_that_says_nothing_stays_writable() {
        let json = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"}}"#;
        let guest = translate(spec(json), "c1", POD).unwrap().guest;
        let root = serde_json::to_value(guest.root()).unwrap();
        assert_ne!(root["readonly"], true);
    }

    #[test]
    fn bind_mounts_become_volumes_and_others_stay() {
        let translation = translate(
            with_mounts(
                r#"[{"destination":"/proc","type":"proc","source":"proc"},
                    {"destination":"/etc/hosts","type":"bind","source":"/h/hosts","options":["rbind","ro"]},
                    {"destination":"/data","type":"none","source":"/h/data","options":["bind"]}]"#,
            ),
            "c1",
            POD,
        )
        .unwrap();
        let mounts = translation.guest.mounts().as_ref().unwrap();
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("proc")));
        assert_eq!(
            mounts[1].source().as_deref(),
            Some(Path::new("/run/walnut/share/c1/mounts/0"))
        );
        assert_eq!(mounts[2].typ().as_deref(), Some("bind"));
        assert_eq!(
            translation.volumes,
            [
                Volume {
                    source: "/h/hosts".into(),
                    recursive: true,
                    read_only: true
                },
                Volume {
                    source: "/h/data".into(),
                    recursive: false,
                    read_only: false
                },
            ]
        );
    }

    #[test]
    fn the_program_of_a_hook_in_the_guest_is_shown_to_it() {
        let json = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},"hooks":{
            "createContainer":[{"path":"/usr/bin/hook"}],"startContainer":[{"path":"/bin/own"}]}}"#;
        let translation = translate(spec(json), "c1", POD).unwrap();
        assert_eq!(translation.volumes[0].source, Path::new("/usr/bin/hook"));
        assert!(translation.volumes[0].read_only);
        let hooks = translation.guest.hooks().clone().unwrap();
        let path = |hooks: &Option<Vec<oci_spec::runtime::Hook>>| {
            hooks.as_ref().unwrap()[0].path().clone()
        };
        let guest = path(hooks.create_container());
        assert_eq!(guest, Path::new("/run/walnut/share/c1/mounts/0"));
        assert_eq!(path(hooks.start_container()), Path::new("/bin/own"));
    }

    #[test]
    fn mounts_that_need_the_host_are_named() {
        for (mounts, expected) in [
            (
                r#"[{"destination":"/d","type":"ext4","source":"/dev/sda"}]"#,
                "mounts[0].type \"ext4\" at \"/d\" is not supported",
            ),
            (
                r#"[{"destination":"/d","type":"bind","source":"relative"}]"#,
                "mounts[0].source \"relative\" at \"/d\" must be an absolute path",
            ),
        ] {
            let error = translate(with_mounts(mounts), "c1", POD).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn the_cgroup_and_the_shm_are_the_guests() {
        let json = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},
            "mounts":[{"destination":"/dev/shm","type":"bind","source":"/s/pod/shm","options":["rbind","ro"]},
                      {"destination":"/data","type":"bind","source":"/h","options":["rbind"]}],
            "linux":{"cgroupsPath":"/default/c1","namespaces":[{"type":"pid"},{"type":"ipc"},{"type":"mount"}]}}"#;
        let Translation { guest, volumes, .. } = translate(spec(json), "c1", POD).unwrap();
        let linux = guest.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/c1")));
        let mounts = guest.mounts().as_ref().unwrap();
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new(POD_SHM)));
        assert_eq!(mounts[0].options().as_deref().unwrap(), ["ro", "bind"]);
        assert_eq!(volumes.len(), 1);
        assert!(mounts[1].source().as_ref().unwrap().ends_with("mounts/0"));
    }

    #[test]
    fn a_pods_network_is_at_a_path_or_new_but_never_the_hosts() {
        let part = |namespaces: &str| {
            host_part(&spec(&format!(
                r#"{{"ociVersion":"1.2.0","root":{{"path":"rootfs"}},"linux":{{"namespaces":[{namespaces}]}}}}"#
            )))
        };
        let path = NetworkNamespace::Path("/run/netns/x".into());
        for (namespaces, expected) in [
            (r#"{"type":"network","path":"/run/netns/x"}"#, path),
            (r#"{"type":"network","path":""}"#, NetworkNamespace::New),
            (
                r#"{"type":"pid"},{"type":"network"}"#,
                NetworkNamespace::New,
            ),
        ] {
            assert_eq!(part(namespaces).unwrap().network, expected);
        }
        assert_eq!(
            part(r#"{"type":"pid"}"#),
            Err(SpecError::SharesHost {
                kind: LinuxNamespaceType::Network
            })
        );
    }

    #[test]
    fn block_devices_get_the_guests_numbers_and_the_rules_say_who_writes() {
        let mut spec = spec(
            r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},"linux":{
                "devices":[
                    {"path":"/dev/data","type":"b","major":253,"minor":1},
                    {"path":"/dev/fuse","type":"c","major":253,"minor":1},
                    {"path":"/dev/seen","type":"b","major":253,"minor":2}],
                "resources":{"devices":[
                    {"allow":false,"access":"rwm"},
                    {"allow":true,"type":"b","major":253,"minor":1,"access":"rwm"},
                    {"allow":true,"type":"b","major":253,"minor":2,"access":"rm"}]}}}"#,
        );
        let devices = block_devices(&spec);
        let found: Vec<_> = devices
            .iter()
            .map(|device| (device.minor, device.read_only))
            .collect();
        assert_eq!(found, [(1, false), (2, true)]);
        renumber(&mut spec, &devices, &[(254, 16), (254, 32)]);
        let linux = spec.linux().as_ref().unwrap();
        let numbers: Vec<_> = linux
            .devices()
            .as_ref()
            .unwrap()
            .iter()
            .map(|device| (device.major(), device.minor()))
            .collect();
        assert_eq!(numbers, [(254, 16), (253, 1), (254, 32)]);
        let rules = linux
            .resources()
            .as_ref()
            .unwrap()
            .devices()
            .clone()
            .unwrap();
        assert_eq!(rules[1].minor(), Some(16));
        assert_eq!(rules[2].major(), Some(254));
        assert_eq!(rules[0].major(), None);
    }

    #[test]
    fn a_spec_without_a_root_is_refused() {
        let error = translate(spec(r#"{"ociVersion":"1.2.0"}"#), "c1", POD).unwrap_err();
        assert_eq!(error, SpecError::Missing("root"));
    }

    proptest! {
        #[test]
        fn every_bind_source_of_the_guest_is_in_its_share(
            sources in proptest::collection::vec("/[a-z./]{0,20}", 0..8),
        ) {
            let mounts: Vec<_> = sources
                .iter()
                .map(|source| serde_json::json!({
                    "destination": "/d", "type": "bind", "source": source, "options": ["rbind"],
                }))
                .collect();
            let json = serde_json::to_string(&mounts).unwrap();
            let translation = translate(with_mounts(&json), "c1", POD).unwrap();
            prop_assert_eq!(translation.volumes.len(), sources.len());
            for mount in translation.guest.mounts().iter().flatten() {
                let source = mount.source().clone().unwrap();
                prop_assert!(source.starts_with("/run/walnut/share/c1/mounts"));
            }
        }
    }
}

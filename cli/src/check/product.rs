//! What is installed: Walnut's files, and what containerd is told of them.

use super::{Finding, Root, Subject};
use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};
use toml::{Table, Value};
use walnut_shim_api::{CONFIG, INITRAMFS, KERNEL, STATE_ROOT, VMM};

const SHIM: &str = "containerd-shim-walnut-v2";
const SHIM_FOLDERS: [&str; 4] = ["/usr/local/bin", "/usr/local/sbin", "/usr/bin", "/usr/sbin"];
const RUNTIME_TYPE: &str = "io.containerd.walnut.v2";
const CONTAINERD_CONFIG: &str = "/etc/containerd/config.toml";
const CONTAINERD_FOLDER: &str = "/etc/containerd/conf.d";
/// containerd's plugin for the CRI: of 2.x, and of 1.x.
const CRI_PLUGINS: [&str; 2] = ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"];
/// Bits of a mode by which others than the owner may write.
const OTHERS_WRITE: u32 = 0o022;

const PROGRAMS: Subject = Subject {
    id: "programs",
    why: "a Pod needs its shim, its VMM, a kernel and an initramfs",
};
const CONTAINERD: Subject = Subject {
    id: "containerd",
    why: "Kubernetes asks for Walnut by a runtime handler of containerd's configuration (ctr needs none)",
};
const MODES: Subject = Subject {
    id: "file-modes",
    why: "who can write these files is root on this machine with the next Pod",
};
const HOST_DEVICES: Subject = Subject {
    id: "host-devices",
    why: "without it, a privileged Pod asks for every block device of the node",
};
const ANNOTATIONS: Subject = Subject {
    id: "annotations",
    why: "annotations that are let through are in the hands of who writes the Pod",
};

/// Where Walnut's files are.
#[derive(Debug)]
pub(super) struct Paths {
    vmm: PathBuf,
    pub(super) kernel: PathBuf,
    initramfs: PathBuf,
}

impl Paths {
    /// As the shim takes them: those of its configuration, else its defaults.
    pub(super) fn read(root: &Root) -> Self {
        let config = table(root, CONFIG).unwrap_or_default();
        let path = |key: &str, default: &str| {
            let value = config.get(key).and_then(Value::as_str);
            PathBuf::from(value.unwrap_or(default))
        };
        Self {
            vmm: path("vmm", VMM),
            kernel: path("kernel", KERNEL),
            initramfs: path("initramfs", INITRAMFS),
        }
    }
}

fn table(root: &Root, path: &str) -> Option<Table> {
    root.text(path)?.parse().ok()
}

fn shim(root: &Root) -> Option<PathBuf> {
    let places = SHIM_FOLDERS
        .iter()
        .map(|folder| Path::new(folder).join(SHIM));
    places.into_iter().find(|path| root.has(path))
}

pub(super) fn look(root: &Root) -> Vec<Finding> {
    vec![programs(root), containerd(root)]
}

/// How safely it is installed.
pub(super) fn hardening(root: &Root) -> Vec<Finding> {
    let handlers = handlers(root);
    let mut findings = vec![modes(root)];
    if !handlers.is_empty() {
        findings.push(host_devices(&handlers));
        findings.push(annotations(&handlers));
    }
    findings
}

fn programs(root: &Root) -> Finding {
    let Paths {
        vmm,
        kernel,
        initramfs,
    } = Paths::read(root);
    let files = [vmm, kernel, initramfs];
    let missing = files.iter().filter(|path| !root.has(path));
    let mut missing: Vec<String> = missing.map(|path| path.display().to_string()).collect();
    if shim(root).is_none() {
        missing.insert(0, format!("{SHIM} (in {})", SHIM_FOLDERS.join(", ")));
    }
    match missing.is_empty() {
        true => PROGRAMS.pass("shim, VMM, kernel and initramfs are there"),
        false => PROGRAMS.fail(
            format!("missing: {}", missing.join(", ")),
            format!("install them, or name others in {CONFIG}"),
        ),
    }
}

/// A runtime handler of containerd's that is Walnut.
struct Handler {
    name: String,
    table: Table,
}

/// Those of containerd's own file and of those beside it that it takes in by default.
fn handlers(root: &Root) -> Vec<Handler> {
    let beside = root.names(CONTAINERD_FOLDER).into_iter();
    let beside = beside
        .filter(|name| name.ends_with(".toml"))
        .map(|name| format!("{CONTAINERD_FOLDER}/{name}"));
    let files = std::iter::once(CONTAINERD_CONFIG.to_owned()).chain(beside);
    let mut found = Vec::new();
    for config in files.filter_map(|path| table(root, &path)) {
        for plugin in CRI_PLUGINS {
            let runtimes = ["plugins", plugin, "containerd", "runtimes"];
            let runtimes = runtimes.iter().try_fold(&config, |table, key| {
                table.get(*key).and_then(Value::as_table)
            });
            for (name, value) in runtimes.into_iter().flatten() {
                let Some(table) = value.as_table() else {
                    continue;
                };
                let kind = table.get("runtime_type").and_then(Value::as_str);
                if kind == Some(RUNTIME_TYPE) {
                    found.push(Handler {
                        name: name.clone(),
                        table: table.clone(),
                    });
                }
            }
        }
    }
    found
}

fn names<'a>(handlers: impl IntoIterator<Item = &'a Handler>) -> String {
    let names: Vec<&str> = handlers.into_iter().map(|one| one.name.as_str()).collect();
    names.join(", ")
}

fn containerd(root: &Root) -> Finding {
    let handlers = handlers(root);
    match handlers.is_empty() {
        true => CONTAINERD.warn(
            format!("no runtime of {CONTAINERD_CONFIG} and {CONTAINERD_FOLDER} is {RUNTIME_TYPE}"),
            "add the table that docs/operations.md shows, and a RuntimeClass",
        ),
        false => CONTAINERD.pass(format!("runtime handlers: {}", names(&handlers))),
    }
}

fn host_devices(handlers: &[Handler]) -> Finding {
    let key = "privileged_without_host_devices";
    let is_set = |handler: &Handler| handler.table.get(key).and_then(Value::as_bool) == Some(true);
    let open: Vec<&Handler> = handlers.iter().filter(|one| !is_set(one)).collect();
    match open.is_empty() {
        true => HOST_DEVICES.pass(format!("{key} is set for {}", names(handlers))),
        false => HOST_DEVICES.warn(
            format!("{key} is not set for {}", names(open)),
            format!("set {key} = true for the handler"),
        ),
    }
}

fn annotations(handlers: &[Handler]) -> Finding {
    let passed = |handler: &Handler| {
        let keys = ["pod_annotations", "container_annotations"];
        let lists = keys
            .iter()
            .filter_map(|key| handler.table.get(*key)?.as_array());
        let texts = lists.flatten().filter_map(Value::as_str);
        texts.map(str::to_owned).collect::<Vec<_>>()
    };
    let all: Vec<String> = handlers.iter().flat_map(passed).collect();
    match all.as_slice() {
        [] => ANNOTATIONS.pass("none are let through"),
        all if all.iter().any(|one| one == "*") => ANNOTATIONS.warn(
            "all are let through",
            "name those that are meant; Walnut knows walnut.record alone",
        ),
        all => ANNOTATIONS.pass(format!("let through: {}", all.join(", "))),
    }
}

fn modes(root: &Root) -> Finding {
    let paths = Paths::read(root);
    let mut files = vec![paths.vmm, paths.kernel, paths.initramfs];
    files.extend([CONFIG, CONTAINERD_CONFIG, STATE_ROOT].map(PathBuf::from));
    files.extend(shim(root));
    let mut faults: Vec<String> = Vec::new();
    let all = files.iter().flat_map(|file| file.ancestors());
    for path in all.filter(|path| *path != Path::new("/")) {
        // What isn't there has been told already, or needn't be.
        let Ok(metadata) = fs::metadata(root.at(path)) else {
            continue;
        };
        let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
        if mode & OTHERS_WRITE != 0 {
            faults.push(format!("{} has mode {mode:04o}", path.display()));
        }
        if owner != root.owner {
            faults.push(format!("{} is of user {owner}", path.display()));
        }
    }
    faults.sort();
    faults.dedup();
    match faults.is_empty() {
        true => MODES.pass("nobody but root can write Walnut's files and their directories"),
        false => MODES.fail(faults.join("; "), "chown root and chmod go-w what is named"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Grade,
        tests::{grade, machine},
    };
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    const FILES: [(&str, &str); 4] = [
        ("usr/local/bin/containerd-shim-walnut-v2", ""),
        ("usr/libexec/walnut/walnut-vmm", ""),
        ("usr/share/walnut/vmlinux", ""),
        ("usr/share/walnut/initramfs.cpio", ""),
    ];

    const RUNTIMES: &str = r#"
version = 3
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.walnut]
  runtime_type = "io.containerd.walnut.v2"
"#;

    fn with(more: &[(&str, &str)]) -> (tempfile::TempDir, Root) {
        machine(&[&FILES, more].concat())
    }

    #[test]
    fn what_is_installed_well_passes() {
        let walnut = format!(
            "{RUNTIMES}privileged_without_host_devices = true\npod_annotations = [\"walnut.*\"]\n"
        );
        let (_folder, root) = with(&[("etc/containerd/config.toml", &walnut)]);
        for finding in look(&root).into_iter().chain(hardening(&root)) {
            assert_eq!(finding.result, Grade::Pass, "{finding:?}");
        }
        assert_eq!(containerd(&root).what, "runtime handlers: walnut");
    }

    #[test]
    fn files_that_are_missing_or_elsewhere_are_known() {
        let (_folder, root) = machine(&[FILES[0], FILES[2], FILES[3]]);
        let finding = programs(&root);
        assert_eq!(finding.result, Grade::Fail);
        assert_eq!(finding.what, "missing: /usr/libexec/walnut/walnut-vmm");
        let (_folder, root) = machine(&[
            FILES[0],
            FILES[2],
            FILES[3],
            ("etc/walnut/config.toml", "vmm = \"/opt/vmm\"\n"),
            ("opt/vmm", ""),
        ]);
        assert_eq!(programs(&root).result, Grade::Pass);
    }

    #[test]
    fn who_may_write_a_program_is_told() {
        let (_folder, root) = with(&[]);
        let vmm = root.at(FILES[1].0);
        fs::set_permissions(&vmm, fs::Permissions::from_mode(0o775)).unwrap();
        let folder = root.at("/usr/share/walnut");
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap();
        let finding = modes(&root);
        assert_eq!(finding.result, Grade::Fail);
        let words = "/usr/libexec/walnut/walnut-vmm has mode 0775; /usr/share/walnut has mode 0777";
        assert_eq!(finding.what, words);
        let owner = root.owner + 1;
        assert!(modes(&Root { owner, ..root }).what.contains("is of user"));
    }

    #[test]
    fn handlers_of_each_version_and_file_are_found() {
        let old = RUNTIMES.replace("io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri");
        let all = format!("{old}container_annotations = [\"*\"]\n");
        let (_folder, root) = with(&[("etc/containerd/conf.d/walnut.toml", &all)]);
        let findings = hardening(&root);
        assert_eq!(grade(&findings, "annotations"), Grade::Warn);
        assert_eq!(grade(&findings, "host-devices"), Grade::Warn);
        let (_folder, root) = with(&[("etc/containerd/config.toml", "not toml [")]);
        assert_eq!(containerd(&root).result, Grade::Warn);
    }
}

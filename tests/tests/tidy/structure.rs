//! Rules about how the parts of the project depend on each other, and about its documents.

use crate::{
    Violation,
    source::{File, words},
};
use std::collections::BTreeSet;

/// Lines of Rust in the complete product at the most, without its tests.
const BUDGET_LINES: usize = 50_000;
/// What is delivered: the three programs and the guest image. Tests and the developer's commands are not.
const PRODUCT: [&str; 6] = [
    "bpf/",
    "cli/",
    "guest-agent/",
    "guest-image/",
    "shim-v2/",
    "vmm/",
];

/// Which of our packages each package may use.
const EDGES: &[(&str, &[&str])] = &[
    ("bpf", &[]),
    ("cli", &["walnut-shim-api"]),
    ("guest-agent", &["walnut-agent-api", "walnut-bpf"]),
    ("guest-agent/api", &[]),
    ("guest-image", &[]),
    (
        "shim-v2",
        &[
            "walnut-agent-api",
            "walnut-bpf",
            "walnut-shim-api",
            "walnut-vmm-api",
        ],
    ),
    ("shim-v2/api", &[]),
    ("tests", &["walnut-agent-api", "walnut-vmm-api"]),
    ("vmm", &["walnut-vmm-api"]),
    ("vmm/api", &[]),
    ("guest-agent/fuzz", &["walnut-agent"]),
    ("vmm/fuzz", &["walnut-vmm"]),
    ("xtask", &["walnut-guest-image", "walnut-lab-init"]),
    ("xtask/lab-init", &[]),
];
/// Who drives KVM: the VMM, and the probes of the machine, the user's and the developer's.
const KVM_USERS: [&str; 3] = ["cli", "vmm", "xtask"];
/// Packages that drive KVM or touch guest memory.
const NEEDS_KVM: [&str; 8] = [
    "acpi_tables",
    "fuse-backend-rs",
    "kvm-bindings",
    "kvm-ioctls",
    "linux-loader",
    "virtio-queue",
    "vm-memory",
    "vm-superio",
];
/// What does I/O in the standard library and outside it.
const IO: [&str; 10] = [
    "fs",
    "net",
    "process",
    "File",
    "TcpStream",
    "UnixStream",
    "tokio",
    "libc",
    "nix",
    "rustix",
];
/// What opens a path.
const OPENERS: [&str; 5] = [
    "File::open",
    "File::create",
    "OpenOptions",
    "fs::read",
    "fs::write",
];

fn below<'a>(files: &'a [File], folder: &'static str) -> impl Iterator<Item = &'a File> {
    files
        .iter()
        .filter(move |file| file.is_rust() && file.path.starts_with(folder))
}

fn names_any(line: &str, names: &[&str]) -> Option<String> {
    words(line)
        .find(|word| names.contains(word))
        .map(str::to_owned)
}

/// Devices know the bus and the memory they are given, not the machine they are part of.
pub(crate) fn device_imports(files: &[File]) -> Vec<Violation> {
    let machine = ["vm", "vcpu", "boot"];
    let mut found = Vec::new();
    for file in below(files, "vmm/src/devices/") {
        for (index, line) in file.code().iter().enumerate() {
            // `crate::x` or `super::super::x`, alone or in braces.
            let Some((_, path)) = line
                .split_once("crate::")
                .or_else(|| line.rsplit_once("super::"))
            else {
                continue;
            };
            let named = match path.strip_prefix('{') {
                Some(list) => list
                    .split([',', '}'])
                    .find_map(|item| names_any(first_segment(item), &machine)),
                None => names_any(first_segment(path), &machine),
            };
            if let Some(name) = named {
                found.push(Violation::new(
                    file,
                    index + 1,
                    format!("a device uses {name}"),
                ));
            }
        }
    }
    found
}

fn first_segment(path: &str) -> &str {
    words(path).next().unwrap_or_default()
}

/// The machine and its processors know no device.
pub(crate) fn device_knowledge(files: &[File]) -> Vec<Violation> {
    let mut found = Vec::new();
    for name in ["vm", "vcpu"] {
        let (file, folder) = (format!("vmm/src/{name}.rs"), format!("vmm/src/{name}/"));
        let of_it = |path: &str| path == file || path.starts_with(&folder);
        for file in files.iter().filter(|file| of_it(&file.path)) {
            for (index, line) in file.product_code().iter().enumerate() {
                if names_any(line, &["devices"]).is_some() {
                    found.push(Violation::new(
                        file,
                        index + 1,
                        format!("{name} knows a device"),
                    ));
                }
            }
        }
    }
    found
}

/// The VMM opens nothing: what it needs arrives as file descriptors.
pub(crate) fn opens_paths(files: &[File]) -> Vec<Violation> {
    let mut found = Vec::new();
    for file in below(files, "vmm/src/") {
        for (index, line) in file.product_code().iter().enumerate() {
            if let Some(opener) = OPENERS.iter().find(|opener| line.contains(*opener)) {
                found.push(Violation::new(
                    file,
                    index + 1,
                    format!("{opener} opens a path"),
                ));
            }
        }
    }
    found
}

/// The contracts are plain data.
pub(crate) fn api_io(files: &[File]) -> Vec<Violation> {
    let mut found = Vec::new();
    for folder in ["vmm/api/src/", "guest-agent/api/src/"] {
        for file in below(files, folder) {
            for (index, line) in file.product_code().iter().enumerate() {
                if let Some(name) = names_any(line, &IO) {
                    found.push(Violation::new(file, index + 1, format!("{name} does I/O")));
                }
            }
        }
    }
    found
}

/// A package's manifest, without the workspace's.
fn manifests(files: &[File]) -> impl Iterator<Item = (&File, &str, toml::Table)> {
    files.iter().filter_map(|file| {
        let folder = file.path.strip_suffix("/Cargo.toml")?;
        Some((file, folder, file.text.parse().unwrap_or_default()))
    })
}

fn dependencies<'a>(
    manifest: &'a toml::Table,
    sections: &'a [&str],
) -> impl Iterator<Item = (&'a String, &'a toml::Value)> {
    sections
        .iter()
        .filter_map(|section| manifest.get(*section)?.as_table())
        .flatten()
}

/// Who uses whom, as the design draws it.
pub(crate) fn edges(files: &[File]) -> Vec<Violation> {
    let mut found = Vec::new();
    for (file, folder, manifest) in manifests(files) {
        let Some((_, allowed)) = EDGES.iter().find(|(name, _)| *name == folder) else {
            found.push(Violation::new(
                file,
                1,
                "a package that the design does not have",
            ));
            continue;
        };
        for (name, _) in dependencies(&manifest, &["dependencies", "build-dependencies"]) {
            let ours = name.starts_with("walnut-") || name.starts_with("containerd-shim-walnut");
            let name = name.as_str();
            if ours && !allowed.contains(&name) {
                found.push(Violation::new(file, 1, format!("must not use {name}")));
            }
            if !KVM_USERS.contains(&folder) && NEEDS_KVM.contains(&name) {
                found.push(Violation::new(
                    file,
                    1,
                    format!("must not drive KVM by {name}"),
                ));
            }
        }
    }
    found
}

/// One list of versions and one list of lints for the workspace.
pub(crate) fn manifest(files: &[File]) -> Vec<Violation> {
    let mut found = Vec::new();
    for (file, _, manifest) in manifests(files) {
        let inherits = |value: &toml::Value| {
            let flag = value.as_table().and_then(|table| table.get("workspace"));
            flag.and_then(toml::Value::as_bool) == Some(true)
        };
        if !manifest.get("lints").is_some_and(inherits) {
            found.push(Violation::new(
                file,
                1,
                "does not take the workspace's lints",
            ));
        }
        let sections = ["dependencies", "dev-dependencies", "build-dependencies"];
        for (name, value) in dependencies(&manifest, &sections) {
            if !inherits(value) {
                found.push(Violation::new(
                    file,
                    1,
                    format!("names a version of {name}"),
                ));
            }
        }
    }
    found
}

/// Decisions are numbered from 0001 on, without a gap.
pub(crate) fn decisions(files: &[File]) -> Vec<Violation> {
    let mut found = Vec::new();
    let records = files
        .iter()
        .filter_map(|file| Some((file, file.path.strip_prefix("docs/decisions/")?)));
    for (expected, (file, name)) in (1_u32..).zip(records) {
        let number = name.split_once('-').map(|(number, _)| number);
        if number != Some(format!("{expected:04}").as_str()) {
            found.push(Violation::new(
                file,
                1,
                format!("expected number {expected:04}"),
            ));
        }
    }
    found
}

/// A document's links to other files of the project lead somewhere.
pub(crate) fn links(files: &[File]) -> Vec<Violation> {
    let mut known: BTreeSet<String> = BTreeSet::new();
    for file in files {
        // A file and every folder that it is in.
        let mut path = file.path.as_str();
        known.insert(path.to_owned());
        while let Some((folder, _)) = path.rsplit_once('/') {
            known.insert(folder.to_owned());
            path = folder;
        }
    }
    let mut found = Vec::new();
    for file in files.iter().filter(|file| file.path.ends_with(".md")) {
        for (index, line) in file.text.lines().enumerate() {
            for target in line.split("](").skip(1) {
                let target = target.split([')', '#', ' ']).next().unwrap_or_default();
                if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                    continue;
                }
                if !known.contains(&resolve(&file.path, target)) {
                    found.push(Violation::new(
                        file,
                        index + 1,
                        format!("{target} leads nowhere"),
                    ));
                }
            }
        }
    }
    found
}

/// A link's target from the project's root.
fn resolve(document: &str, target: &str) -> String {
    let mut parts: Vec<&str> = document.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            other => parts.push(other),
        }
    }
    parts.join("/")
}

/// One person can hold all of it in their head.
pub(crate) fn budget(files: &[File]) -> Vec<Violation> {
    let of_product =
        |file: &&File| file.is_rust() && PRODUCT.iter().any(|folder| file.path.starts_with(folder));
    let product: Vec<&File> = files.iter().filter(of_product).collect();
    let lines: usize = product.iter().map(|file| file.lines_before_tests()).sum();
    let over = product.first().filter(|_| lines > BUDGET_LINES);
    over.map(|file| Violation::new(file, 1, format!("the product has {lines} lines")))
        .into_iter()
        .collect()
}

//! One case of a property: a change to a usual configuration, a script, and what it must print.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{fs, os::unix::fs::symlink, path::Path};
use walnut_tests::bundle::{Spec, busybox_rootfs, process};

const PROPERTIES: [(&str, &str); 5] = [
    ("process", include_str!("../../oci/process.json")),
    ("namespaces", include_str!("../../oci/namespaces.json")),
    ("filesystem", include_str!("../../oci/filesystem.json")),
    ("hooks", include_str!("../../oci/hooks.json")),
    ("resources", include_str!("../../oci/resources.json")),
];

/// A case, as its file has it.
pub(crate) struct Case {
    property: &'static str,
    value: Value,
}

/// What must come of a case.
pub(crate) enum Expected<'a> {
    /// The script prints this.
    Prints(&'a str),
    /// It is refused, in these words.
    Refused(String),
}

/// All cases.
pub(crate) fn all() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (property, json) in PROPERTIES {
        let values: Vec<Value> = serde_json::from_str(json).context(property)?;
        cases.extend(values.into_iter().map(|value| Case { property, value }));
    }
    Ok(cases)
}

impl Case {
    fn text(&self, key: &str) -> Option<&str> {
        self.value[key].as_str()
    }

    /// Its property and its own name.
    pub(crate) fn name(&self) -> String {
        let name = self.text("name").unwrap_or("without a name");
        format!("{}: {name}", self.property)
    }

    /// Why runc does otherwise, where it does.
    pub(crate) fn not_runc(&self) -> Option<&str> {
        self.text("runc")
    }

    /// What must come of it, with the root file system where it is.
    pub(crate) fn expected(&self, root: &str) -> Result<Expected<'_>> {
        match (self.text("prints"), self.text("refused")) {
            (Some(text), None) => Ok(Expected::Prints(text)),
            (None, Some(words)) => Ok(Expected::Refused(resolve(words, root))),
            _ => anyhow::bail!("a case prints something, or is refused"),
        }
    }

    /// Makes a root file system for it.
    pub(crate) fn make_root(&self, busybox: &Path, root: &Path) -> Result<()> {
        fs::create_dir_all(root)?;
        busybox_rootfs(busybox, root)?;
        for (path, content) in self.value["files"].as_object().into_iter().flatten() {
            let path = root.join(path);
            fs::create_dir_all(path.parent().context("a file at no place")?)?;
            fs::write(path, content.as_str().unwrap_or_default())?;
        }
        for (path, target) in self.value["links"].as_object().into_iter().flatten() {
            symlink(target.as_str().unwrap_or_default(), root.join(path))?;
        }
        Ok(())
    }

    fn script(&self) -> [&str; 3] {
        ["sh", "-c", self.text("script").unwrap_or("true")]
    }

    /// The configuration, for a root file system that the runtime finds at `root`.
    pub(crate) fn spec(&self, id: &str, root: &str) -> Result<Value> {
        let args = match self.value.get("exec") {
            Some(_) => ["sleep", "100000"].as_slice(),
            None => &self.script(),
        };
        let mut spec: Value = serde_json::from_slice(&Spec::new(root, args).to_json())?;
        spec["linux"]["cgroupsPath"] = json!(format!("/{id}"));
        if let Some(hostname) = self.value.get("hostname") {
            spec["hostname"] = hostname.clone();
        }
        for (list, change) in [
            ("/linux/namespaces", namespaces(&self.value["namespaces"])),
            ("/mounts", self.value["mounts"].clone()),
        ] {
            let list = spec.pointer_mut(list).and_then(Value::as_array_mut);
            let items = change.as_array().cloned().unwrap_or_default();
            list.context("no such list")?.extend(items);
        }
        for (pointer, value) in self.value["set"].as_object().into_iter().flatten() {
            let (parent, key) = pointer.rsplit_once('/').context("not a pointer")?;
            let parent = spec.pointer_mut(parent).context("no such parent")?;
            parent[key] = value.clone();
        }
        ensure!(spec["root"]["path"] == root, "a case moves its root");
        Ok(serde_json::from_str(&resolve(&spec.to_string(), root))?)
    }

    /// The process of the exec that runs the script, if it is not the container's own that does.
    pub(crate) fn exec(&self) -> Option<Value> {
        let changes = self.value.get("exec")?.as_object()?;
        let mut process = process(&self.script());
        for (key, value) in changes {
            process[key] = value.clone();
        }
        Some(process)
    }
}

fn namespaces(kinds: &Value) -> Value {
    let kinds = kinds.as_array().into_iter().flatten();
    kinds.map(|kind| json!({ "type": kind })).collect()
}

fn resolve(text: &str, root: &str) -> String {
    let busybox = format!("{root}/bin/busybox");
    text.replace("$ROOT", root).replace("$BUSYBOX", &busybox)
}

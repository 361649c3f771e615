//! `/etc/hostname`, `hosts` and `resolv.conf` of a Pod of the Sandbox API.
//!
//! With a pause container the CRI makes them and mounts them into each container. Without one it leaves them to
//! the runtime, which makes the same: the node's own where the Pod's configuration says nothing.

use oci_spec::runtime::{Mount, Spec};
use std::{fs, io, path::Path};

const FILES: [&str; 3] = ["hostname", "hosts", "resolv.conf"];

/// Makes the files in `directory`.
pub(crate) fn write(directory: &Path, hostname: &str, resolv: Option<&str>) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    fs::write(directory.join("hostname"), format!("{hostname}\n"))?;
    copy_or_empty("/etc/hosts", &directory.join("hosts"))?;
    match resolv {
        Some(text) => fs::write(directory.join("resolv.conf"), text),
        None => copy_or_empty("/etc/resolv.conf", &directory.join("resolv.conf")),
    }
}

fn copy_or_empty(from: &str, to: &Path) -> io::Result<()> {
    let text = match fs::read(from) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        other => other?,
    };
    fs::write(to, text)
}

/// Mounts them into a container, but for those in whose place it has a mount already.
pub(crate) fn mount(spec: &mut Spec, directory: &Path) {
    let read_only = spec.root().as_ref().and_then(|root| root.readonly()) == Some(true);
    let access = if read_only { "ro" } else { "rw" };
    let mounts = spec.mounts_mut().get_or_insert_default();
    for name in FILES {
        let destination = Path::new("/etc").join(name);
        if mounts
            .iter()
            .any(|mount| *mount.destination() == destination)
        {
            continue;
        }
        let mut mount = Mount::default();
        mount
            .set_destination(destination)
            .set_typ(Some("bind".to_owned()))
            .set_source(Some(directory.join(name)))
            .set_options(Some(
                ["rbind", "rprivate", access].map(str::to_owned).to_vec(),
            ));
        mounts.push(mount);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_gets_the_pods_files_but_for_its_own() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), "web-0", Some("nameserver 192.0.2.1\n")).unwrap();
        let read = |name| fs::read_to_string(directory.path().join(name)).unwrap();
        assert_eq!(read("hostname"), "web-0\n");
        assert_eq!(read("resolv.conf"), "nameserver 192.0.2.1\n");
        let mut spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.2.0","root":{"path":"r","readonly":true},
                "mounts":[{"destination":"/etc/hosts","type":"bind","source":"/own"}]}"#,
        )
        .unwrap();
        mount(&mut spec, directory.path());
        let mounts = spec.mounts().as_ref().unwrap();
        assert_eq!(mounts.len(), 3);
        assert_eq!(mounts[0].source().as_deref(), Some(Path::new("/own")));
        for mount in &mounts[1..] {
            assert!(mount.source().as_ref().unwrap().exists());
            assert!(mount.options().as_ref().unwrap().contains(&"ro".to_owned()));
        }
    }
}

//! Writes container images of one layer as one archive: the OCI image layout (image-spec,
//! image-layout.md) in a tar file, the layer compressed by zstd: unpacking that costs an emulated lab
//! less than copying what it saves.
//!
//! Nothing in it depends on when or where it was made.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What a container of the image runs if nothing else is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Config<'a> {
    /// Its full name, with a tag.
    pub(crate) reference: &'a str,
    /// The command.
    pub(crate) command: &'a [&'a str],
}

/// The search path of every image.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A blob's place in the layout.
struct Blob {
    digest: String,
    bytes: u64,
}

impl Blob {
    fn of(mut contents: impl Read) -> io::Result<Self> {
        let mut hash = Sha256::new();
        let bytes = io::copy(&mut contents, &mut hash)?;
        let digest = hash
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        Ok(Self { digest, bytes })
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.digest)
    }

    fn descriptor(&self, media_type: &str) -> Value {
        json!({
            "mediaType": format!("application/vnd.oci.image.{media_type}"),
            "digest": format!("sha256:{}", self.digest),
            "size": self.bytes,
        })
    }
}

/// A layer, under the two names that it has.
struct Layer {
    /// The archive as it is stored.
    stored: Blob,
    /// The digest of what is in it.
    contents: Blob,
}

/// Writes images to `archive` that differ in their configuration, and have one layer, a tar archive.
pub(crate) fn write(archive: &Path, layer: &Path, configs: &[Config<'_>]) -> Result<()> {
    let compressed = compress(layer)?;
    let open = |path: &Path| File::open(path).with_context(|| format!("open {}", path.display()));
    let blob =
        |path: &Path| Blob::of(open(path)?).with_context(|| format!("read {}", path.display()));
    let blobs = Layer {
        stored: blob(&compressed)?,
        contents: blob(layer)?,
    };
    let file = File::create(archive).with_context(|| format!("create {}", archive.display()))?;
    let mut layout = tar::Builder::new(BufWriter::with_capacity(1 << 20, file));
    write_layout(&mut layout, &blobs, open(&compressed)?, configs)
        .and_then(|()| layout.into_inner()?.flush())
        .with_context(|| format!("write {}", archive.display()))?;
    fs::remove_file(&compressed).with_context(|| format!("remove {}", compressed.display()))
}

fn compress(layer: &Path) -> Result<PathBuf> {
    let compressed = layer.with_extension("zst");
    let output = Command::new("zstd")
        .args(["--quiet", "--force", "-9", "-o"])
        .arg(&compressed)
        .arg(layer)
        .output()
        .context("run zstd")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "zstd {}: {}",
        layer.display(),
        errors.trim()
    );
    Ok(compressed)
}

fn write_layout(
    layout: &mut tar::Builder<impl Write>,
    layer: &Layer,
    stored: impl Read,
    configs: &[Config<'_>],
) -> io::Result<()> {
    add(layout, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let manifests = configs
        .iter()
        .map(|config| write_image(layout, layer, *config))
        .collect::<io::Result<Vec<Value>>>()?;
    let index = json!({ "schemaVersion": 2, "manifests": manifests }).to_string();
    add(layout, "index.json", index.as_bytes())?;
    append(layout, &layer.stored.path(), layer.stored.bytes, stored)
}

/// Writes what an image has besides its layer; returns its entry in the index.
fn write_image(
    layout: &mut tar::Builder<impl Write>,
    layer: &Layer,
    config: Config<'_>,
) -> io::Result<Value> {
    let image = json!({
        "created": "1970-01-01T00:00:00Z",
        "architecture": "amd64",
        "os": "linux",
        "config": { "Env": [PATH], "Cmd": config.command, "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", layer.contents.digest)] },
    })
    .to_string();
    let image_blob = Blob::of(image.as_bytes())?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": image_blob.descriptor("config.v1+json"),
        "layers": [layer.stored.descriptor("layer.v1.tar+zstd")],
    })
    .to_string();
    let manifest_blob = Blob::of(manifest.as_bytes())?;
    let mut entry = manifest_blob.descriptor("manifest.v1+json");
    let tag = config
        .reference
        .rsplit_once(':')
        .map_or("latest", |(_, tag)| tag);
    entry["annotations"] = json!({
        "io.containerd.image.name": config.reference,
        "org.opencontainers.image.ref.name": tag,
    });
    add(layout, &manifest_blob.path(), manifest.as_bytes())?;
    add(layout, &image_blob.path(), image.as_bytes())?;
    Ok(entry)
}

fn add(layout: &mut tar::Builder<impl Write>, path: &str, contents: &[u8]) -> io::Result<()> {
    append(layout, path, contents.len() as u64, contents)
}

fn append(
    layout: &mut tar::Builder<impl Write>,
    path: &str,
    bytes: u64,
    contents: impl Read,
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_size(bytes);
    header.set_mode(0o644);
    header.set_cksum();
    layout.append_data(&mut header, path, contents)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn written() -> BTreeMap<String, Vec<u8>> {
        let folder = tempfile::tempdir().unwrap();
        let (layer, archive) = (folder.path().join("layer"), folder.path().join("archive"));
        std::fs::write(&layer, "layer").unwrap();
        let configs = [("walnut.local/x:1", &["sh"]), ("walnut.local/y:1", &["no"])];
        let configs = configs.map(|(reference, command)| Config { reference, command });
        write(&archive, &layer, &configs).unwrap();
        let mut files = BTreeMap::new();
        for entry in tar::Archive::new(File::open(&archive).unwrap())
            .entries()
            .unwrap()
        {
            let mut entry = entry.unwrap();
            let mut contents = Vec::new();
            entry.read_to_end(&mut contents).unwrap();
            files.insert(entry.path().unwrap().display().to_string(), contents);
        }
        files
    }

    #[test]
    fn every_descriptor_leads_to_its_blob() {
        let files = written();
        let blob = |descriptor: &Value| {
            let digest = descriptor["digest"]
                .as_str()
                .unwrap()
                .replace("sha256:", "");
            let contents = files[&format!("blobs/sha256/{digest}")].clone();
            assert_eq!(Blob::of(contents.as_slice()).unwrap().digest, digest);
            assert_eq!(descriptor["size"], contents.len());
            contents
        };
        let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
        for (number, name, command) in
            [(0, "walnut.local/x:1", "sh"), (1, "walnut.local/y:1", "no")]
        {
            let entry = &index["manifests"][number];
            assert_eq!(entry["annotations"]["io.containerd.image.name"], name);
            let manifest: Value = serde_json::from_slice(&blob(entry)).unwrap();
            let image: Value = serde_json::from_slice(&blob(&manifest["config"])).unwrap();
            assert_eq!(image["config"]["Cmd"][0], command);
            let contents = Blob::of(b"layer".as_slice()).unwrap().digest;
            assert_eq!(image["rootfs"]["diff_ids"][0], format!("sha256:{contents}"));
            let magic = 0xfd2f_b528_u32.to_le_bytes();
            assert!(
                blob(&manifest["layers"][0]).starts_with(&magic),
                "not a zstd frame"
            );
        }
    }

    #[test]
    fn the_same_layer_gives_the_same_image() {
        assert_eq!(written(), written());
    }
}

//! The container images that the lab has, made of Debian's packages without any registry.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use walnut_guest_image::cache::Key;

use crate::debian::{self, Format, RootFileSystem};
use crate::lab::template::Image;
use crate::oci_image::{self, Config};
use crate::progress::Progress;
use crate::project::Project;

/// The smallest image that has a shell.
pub(crate) const BUSYBOX: &str = "walnut.local/busybox:latest";

/// What holds a Pod's namespaces in Kubernetes: the same layer, and a shell that reaps what is left to
/// it and ends when it is told to.
const PAUSE: Config<'_> = Config {
    reference: "walnut.local/pause:latest",
    command: &[
        "sh",
        "-c",
        "trap 'exit 0' TERM INT; while :; do sleep 2147483647 & wait; done",
    ],
};

/// An image with a real server and a language in it.
pub(crate) const DEBIAN: &str = "walnut.local/debian:latest";

/// What the Debian image has beyond the smallest set.
const DEBIAN_PACKAGES: [&str; 2] = ["redis-server", "python3-minimal"];

/// The release of the Debian image.
const DEBIAN_SUITE: &str = "trixie";

/// Makes the images, or finds them in the cache.
pub(crate) fn get(project: &Project, progress: Progress) -> Result<Vec<Image>> {
    let busybox = Key::new("busybox 3").with("release", debian::codename()?.as_bytes());
    let mut debian = Key::new("debian 2").with("suite", DEBIAN_SUITE.as_bytes());
    for package in DEBIAN_PACKAGES {
        debian = debian.with("package", package.as_bytes());
    }
    let shell = Config {
        reference: BUSYBOX,
        command: &["sh"],
    };
    let with_bash = Config {
        reference: DEBIAN,
        command: &["bash"],
    };
    // Kubernetes' namespace gets what is small: each namespace unpacks an image anew.
    Ok(vec![
        Image {
            namespaces: &["default", "k8s.io"],
            ..image(project, &busybox, &[shell, PAUSE], progress, |layer| {
                busybox_layer(project, layer, progress)
            })?
        },
        image(project, &debian, &[with_bash], progress, |layer| {
            let recipe = RootFileSystem {
                suite: DEBIAN_SUITE,
                packages: &DEBIAN_PACKAGES,
            };
            let log = project.logs().join("debian-image.log");
            recipe.make(layer, Format::Tar, "images", &log, progress)
        })?,
    ])
}

fn image(
    project: &Project,
    key: &Key,
    configs: &[Config<'static>],
    progress: Progress,
    make_layer: impl FnOnce(&Path) -> Result<()>,
) -> Result<Image> {
    let names: Vec<_> = configs.iter().map(|config| config.reference).collect();
    let names = names.join(", ");
    let (folder, _) = project
        .cache
        .get_or_make("container-image", key, |folder| {
            progress.step("images", &format!("{names} from Debian packages"), || {
                let layer = folder.join("layer.tar");
                make_layer(&layer)?;
                oci_image::write(&folder.join("image.tar"), &layer, configs)?;
                fs::remove_file(&layer).with_context(|| format!("remove {}", layer.display()))
            })
        })?;
    Ok(Image {
        names,
        namespaces: &["default"],
        archive: folder.join("image.tar"),
        key: key.name(),
    })
}

/// One program under all its names.
fn busybox_layer(project: &Project, layer: &Path, progress: Progress) -> Result<()> {
    let folder = layer.with_extension("package");
    fs::create_dir(&folder).with_context(|| format!("create {}", folder.display()))?;
    let busybox = download_busybox(project, &folder, progress)?;
    let listed = Command::new(&busybox)
        .arg("--list")
        .output()
        .context("run busybox")?;
    ensure!(listed.status.success(), "busybox --list: {}", listed.status);
    let names = String::from_utf8_lossy(&listed.stdout);
    File::create(layer)
        .and_then(|file| write_busybox_layer(BufWriter::new(file), &busybox, &names))
        .with_context(|| format!("write {}", layer.display()))?;
    fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))
}

/// The program out of its package: installing that could replace the machine's own busybox.
fn download_busybox(project: &Project, folder: &Path, progress: Progress) -> Result<PathBuf> {
    let log = project.logs().join("busybox-image.log");
    let mut download = Command::new("apt-get");
    download
        .current_dir(folder)
        .args(["download", "--quiet", "busybox-static"]);
    download.args(["-o", "APT::Sandbox::User=root"]);
    progress.run("images", &mut download, &log)?;
    let mut files = fs::read_dir(folder)
        .context("list the downloaded package")?
        .flatten();
    let package = files.next().context("apt-get downloaded nothing")?.path();
    let mut unpack = Command::new("dpkg-deb");
    unpack.arg("-x").arg(&package).arg(folder.join("root"));
    progress.run("images", &mut unpack, &log)?;
    let candidates = ["root/bin/busybox", "root/usr/bin/busybox"];
    let found = candidates
        .iter()
        .map(|name| folder.join(name))
        .find(|path| path.is_file());
    found.context("package busybox-static has no busybox")
}

fn write_busybox_layer(to: impl Write, busybox: &Path, names: &str) -> io::Result<()> {
    let mut layer = tar::Builder::new(to);
    let folders = [
        ("bin", 0o755),
        ("dev", 0o755),
        ("etc", 0o755),
        ("proc", 0o755),
        ("root", 0o700),
        ("run", 0o755),
        ("sys", 0o755),
        ("tmp", 0o1777),
        ("usr", 0o755),
        ("usr/bin", 0o755),
        ("var", 0o755),
    ];
    for (name, mode) in folders {
        let mut header = header(tar::EntryType::Directory, mode, 0);
        layer.append_data(&mut header, format!("{name}/"), io::empty())?;
    }
    let program = fs::read(busybox)?;
    let files: [(&str, u32, &[u8]); 4] = [
        ("bin/busybox", 0o755, &program),
        ("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n"),
        ("etc/group", 0o644, b"root:x:0:\n"),
        (
            "etc/os-release",
            0o644,
            b"NAME=\"Walnut's busybox\"\nID=walnut-busybox\n",
        ),
    ];
    for (name, mode, contents) in files {
        let mut header = header(tar::EntryType::Regular, mode, contents.len() as u64);
        layer.append_data(&mut header, name, contents)?;
    }
    for name in names.lines().filter(|name| *name != "busybox") {
        let mut header = header(tar::EntryType::Symlink, 0o777, 0);
        layer.append_link(&mut header, format!("bin/{name}"), "busybox")?;
    }
    layer.into_inner()?.flush()
}

fn header(kind: tar::EntryType, mode: u32, bytes: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(bytes);
    header
}

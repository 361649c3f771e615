//! The lab's initramfs: its PID 1, the modules that reach the node image, and the token that the
//! command server asks for.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use walnut_guest_image::cpio::{Archive, Node};

use crate::lab::node_image::NodeImage;
use crate::programs;
use crate::progress::Progress;
use crate::project::Project;

/// Builds the lab's PID 1.
pub(crate) fn build_init(project: &Project, progress: Progress) -> Result<PathBuf> {
    let target = project.tools_root.join("target/guest");
    let mut cargo = Command::new("cargo");
    cargo.current_dir(&project.tools_root);
    programs::static_build(&mut cargo, "walnut-lab-init", &target);
    progress.run("lab", &mut cargo, &project.logs().join("lab-init.log"))?;
    Ok(programs::static_program(&target, "walnut-lab-init"))
}

/// Writes the initramfs.
pub(crate) fn write(path: &Path, init: &Path, image: &NodeImage, token: &str) -> Result<()> {
    let file = File::create(path).with_context(|| format!("create {}", path.display()))?;
    let mut archive = Archive::new(BufWriter::new(file));
    for folder in ["dev", "proc", "sys", "modules"] {
        archive.add(folder, 0o755, Node::Directory)?;
    }
    archive.add(
        "dev/console",
        0o600,
        Node::CharacterDevice { major: 5, minor: 1 },
    )?;
    archive.add("init", 0o755, Node::File(&read(init)?))?;
    archive.add("token", 0o400, Node::File(token.as_bytes()))?;
    let mut order = String::new();
    for (name, path) in image.early_modules() {
        archive.add(&format!("modules/{name}"), 0o644, Node::File(&read(&path)?))?;
        order.push_str(&name);
        order.push('\n');
    }
    archive.add("modules/order", 0o644, Node::File(order.as_bytes()))?;
    archive
        .finish()
        .with_context(|| format!("write {}", path.display()))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

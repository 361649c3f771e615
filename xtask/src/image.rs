//! The guest image of this checkout: `target/guest-image/{vmlinux,initramfs.cpio}`, links into the
//! cache.

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use walnut_guest_image::apparmor;
use walnut_guest_image::cache::Origin;
use walnut_guest_image::initramfs;
use walnut_guest_image::kernel::{self, Stage};

use crate::progress::Progress;
use crate::project::Project;

/// Builds the kernel, unless it is cached.
pub(crate) fn kernel(project: &Project, progress: Progress) -> Result<()> {
    let begun = Instant::now();
    let fragment = project.root.join("guest-image/kernel.fragment");
    let say = |stage| match stage {
        Stage::Unpacking => progress.say("kernel", "unpacking Debian's source"),
        Stage::Configuring => progress.say("kernel", "configuring"),
        Stage::Compiling { objects, elapsed } => {
            let minutes = elapsed.as_secs_f64() / 60.0;
            progress.say(
                "kernel",
                &format!("… {objects} objects after {minutes:.1} min"),
            );
        }
    };
    let (path, origin) = kernel::build(&project.cache, &fragment, &say)?;
    publish(project, &path, "vmlinux")?;
    report("kernel", &path, origin, begun, progress)
}

/// Packs the agent, unless that is cached.
pub(crate) fn initramfs(project: &Project, agent: &Path, progress: Progress) -> Result<()> {
    let begun = Instant::now();
    let policies = apparmor::compile(&project.root.join("guest-image/apparmor"))?;
    let (path, origin) = initramfs::build(&project.cache, agent, &policies)?;
    publish(project, &path, "initramfs.cpio")?;
    report("initramfs", &path, origin, begun, progress)
}

fn report(
    step: &str,
    path: &Path,
    origin: Origin,
    begun: Instant,
    progress: Progress,
) -> Result<()> {
    let bytes = path
        .metadata()
        .with_context(|| format!("read {}", path.display()))?
        .len();
    let size = format!("{}.{} MB", bytes / 1_000_000, bytes / 100_000 % 10);
    let how = match origin {
        Origin::Cached => "cached".to_owned(),
        Origin::Made => format!("built in {:.1} s", begun.elapsed().as_secs_f64()),
    };
    progress.say(step, &format!("{size}, {how}"));
    Ok(())
}

/// Replaces the link in one step, so that a running delivery sees the old file or the new one.
fn publish(project: &Project, path: &Path, name: &str) -> Result<()> {
    let link = project.guest_image(name);
    let partial = project.guest_image(&format!(".{name}.partial"));
    let folder = link.parent().unwrap_or(&link);
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let _ = fs::remove_file(&partial);
    let path = path
        .canonicalize()
        .with_context(|| format!("find {}", path.display()))?;
    std::os::unix::fs::symlink(&path, &partial)
        .and_then(|()| fs::rename(&partial, &link))
        .with_context(|| format!("link {}", link.display()))
}

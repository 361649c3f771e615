//! Everything that must be there before the lab runs this checkout's programs.

use anyhow::Result;

use crate::lab::{Freshness, Lab, NodeImage};
use crate::programs::Targets;
use crate::progress::Progress;
use crate::project::Project;
use crate::{check, container_images, image, lab, packages, programs};

/// Installs packages and builds the guest image and the programs.
///
/// The kernel keeps every processor busy for long; meanwhile the rest waits for downloads.
pub(crate) fn build(project: &Project, targets: Targets, progress: Progress) -> Result<()> {
    packages::install(project, progress)?;
    std::thread::scope(|scope| {
        let kernel = scope.spawn(|| image::kernel(project, progress));
        let rest = build_rest(project, targets, progress);
        if rest.is_err() && !kernel.is_finished() {
            progress.say(
                "build",
                "failed; the kernel is finished first, as the next run needs it",
            );
        }
        let kernel = kernel
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        rest.and(kernel)
    })
}

fn build_rest(project: &Project, targets: Targets, progress: Progress) -> Result<()> {
    programs_and_initramfs(project, targets, progress)?;
    NodeImage::get(project, progress)?;
    container_images::get(project, progress).map(drop)
}

/// Builds the programs and packs the agent.
pub(crate) fn programs_and_initramfs(
    project: &Project,
    targets: Targets,
    progress: Progress,
) -> Result<()> {
    let agent = programs::build(project, targets, progress)?;
    image::initramfs(project, &agent, progress)
}

/// Starts a lab anew, with everything that [`build`] built.
pub(crate) fn fresh_lab(project: &Project, progress: Progress) -> Result<Lab> {
    let mut lab = Lab::up(project, check::accelerator()?, Freshness::Fresh, progress)?;
    lab.deliver(&lab::installed_files(project), progress)?;
    Ok(lab)
}

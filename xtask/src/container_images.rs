//! The container images that the lab has.

use anyhow::Result;

use crate::lab::template::Image;
use crate::progress::Progress;
use crate::project::Project;

/// Makes the images, or finds them in the cache.
pub(crate) fn get(_project: &Project, _progress: Progress) -> Result<Vec<Image>> {
    Ok(Vec::new())
}

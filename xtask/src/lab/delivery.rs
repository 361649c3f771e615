//! Brings files from the host into the running lab: those that changed since the last time, as one
//! tar archive on the outbox disk.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use walnut_lab_init::wire::Request;

use crate::lab::client::Client;
use crate::lab::qemu::OUTBOX_BYTES;

/// Emulated, a lab unpacks some tens of megabytes a second.
const LIMIT: Duration = Duration::from_secs(300);

/// A file's identity on the host: when this is unchanged, so are its contents.
pub(crate) type Fingerprint = (u64, u64, i64, i64);

/// A file to bring.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    /// On the host.
    pub(crate) source: PathBuf,
    /// In the lab, from `/`.
    pub(crate) destination: String,
    /// Whether it is a program.
    pub(crate) executable: bool,
}

/// What a lab already has, by destination.
pub(crate) type Delivered = BTreeMap<String, Fingerprint>;

/// Brings what isn't there yet; returns how many files that was.
pub(crate) fn deliver(
    client: &Client,
    outbox: &Path,
    deliveries: &[Delivery],
    delivered: &mut Delivered,
) -> Result<usize> {
    let mut changed = Vec::new();
    for delivery in deliveries {
        let new = fingerprint(&delivery.source)?;
        if delivered.get(&delivery.destination) != Some(&new) {
            changed.push((delivery, new));
        }
    }
    if changed.is_empty() {
        return Ok(0);
    }
    let bytes = write_archive(outbox, changed.iter().map(|(delivery, _)| *delivery))
        .with_context(|| format!("write {}", outbox.display()))?;
    if bytes > OUTBOX_BYTES {
        bail!("{bytes} bytes of build output don't fit the outbox");
    }
    client.request(Request::Unpack { bytes }, LIMIT)?;
    let count = changed.len();
    for (delivery, new) in changed {
        delivered.insert(delivery.destination.clone(), new);
    }
    Ok(count)
}

fn fingerprint(path: &Path) -> Result<Fingerprint> {
    let data = path
        .metadata()
        .with_context(|| format!("read {}", path.display()))?;
    Ok((data.ino(), data.len(), data.mtime(), data.mtime_nsec()))
}

fn write_archive<'a>(
    outbox: &Path,
    deliveries: impl Iterator<Item = &'a Delivery>,
) -> io::Result<u64> {
    let file = OpenOptions::new().write(true).open(outbox)?;
    let mut archive = tar::Builder::new(BufWriter::with_capacity(1 << 20, file));
    for delivery in deliveries {
        let mut source = File::open(&delivery.source)?;
        let mut header = tar::Header::new_gnu();
        header.set_size(source.metadata()?.len());
        header.set_mode(if delivery.executable { 0o755 } else { 0o644 });
        header.set_cksum();
        let name = delivery.destination.trim_start_matches('/');
        archive.append_data(&mut header, name, &mut source)?;
    }
    let mut file = archive.into_inner()?;
    file.flush()?;
    file.get_mut().stream_position()
}

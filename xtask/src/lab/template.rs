//! The lab's template: a node that has booted, whose containerd serves and has the images, saved
//! as a RAM file and QEMU's state. A lab is a copy-on-write restore of it.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use walnut_guest_image::cache::Key;
use walnut_lab_init::wire::Request;

use crate::lab::client::Client;
use crate::lab::delivery::{self, Delivered, Delivery};
use crate::lab::initramfs;
use crate::lab::node_image::NodeImage;
use crate::lab::qemu::{self, Accelerator, Machine, Memory, Started};
use crate::lab::state::write_private;
use crate::progress::{Progress, tail};
use crate::project::Project;

/// Counts changes of this recipe.
const RECIPE: &str = "template 2";

/// A cold start takes about ten seconds on a quiet machine.
const BOOT_LIMIT: Duration = Duration::from_secs(180);

/// Unpacking an image in an emulated lab is slow.
const IMPORT_LIMIT: Duration = Duration::from_secs(300);

/// How many templates stay when a new one is made.
const TEMPLATES_KEPT: usize = 2;

/// An archive of container images to import.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    /// Their names, for people.
    pub(crate) names: String,
    /// The namespaces of containerd that get them.
    pub(crate) namespaces: &'static [&'static str],
    /// The archive on the host.
    pub(crate) archive: PathBuf,
    /// The hash of what it is made of.
    pub(crate) key: String,
}

/// A saved lab.
#[derive(Debug, Clone)]
pub(crate) struct Template {
    folder: PathBuf,
    image: NodeImage,
    accelerator: Accelerator,
}

impl Template {
    /// Makes the template, or finds it in the cache.
    pub(crate) fn get(
        project: &Project,
        accelerator: Accelerator,
        images: &[Image],
        progress: Progress,
    ) -> Result<Self> {
        let image = NodeImage::get(project, progress)?;
        let init = initramfs::build_init(project, progress)?;
        let key = key(accelerator, &init, images)?;
        let (folder, _) = project.cache.get_or_make("lab-template", &key, |folder| {
            forget_old(&project.cache.folder("lab-template"));
            progress.step(
                "lab",
                "booting the node once, to save it as a template",
                || make(folder, &init, &image, accelerator, images, progress),
            )
        })?;
        Ok(Self {
            folder,
            image,
            accelerator,
        })
    }

    /// The template's name.
    pub(crate) fn name(&self) -> String {
        self.folder
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// What executes the lab.
    pub(crate) fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// Starts a lab from it in `folder`; returns its process and how to reach it.
    pub(crate) fn restore(&self, folder: &Path) -> Result<(Started, Client)> {
        let machine = Machine {
            accelerator: self.accelerator,
            kernel: self.image.kernel(),
            initramfs: self.folder.join("initramfs.cpio"),
            disk: self.image.disk(),
            memory: (self.folder.join("memory"), Memory::CopyOnWrite),
            folder,
        };
        let mut started = machine.start()?;
        let token = fs::read_to_string(self.folder.join("token")).context("read the token")?;
        let client = Client {
            port: started.port,
            token,
        };
        let outcome = started
            .qmp
            .load(&self.folder.join("state"))
            .and_then(|()| started.qmp.resume())
            .and_then(|()| client.set_clock(BOOT_LIMIT));
        match outcome {
            Ok(()) => Ok((started, client)),
            Err(error) => {
                let _ = started.child.kill();
                let _ = started.child.wait();
                Err(error)
            }
        }
    }
}

fn key(accelerator: Accelerator, init: &Path, images: &[Image]) -> Result<Key> {
    let mut key = Key::new(RECIPE)
        .with("node image", NodeImage::key().name().as_bytes())
        .with("machine", qemu::shape(accelerator).as_bytes())
        .with("qemu", qemu::version()?.1.as_bytes())
        .with_file("init", init)?;
    for image in images {
        key = key.with("image", image.key.as_bytes());
        for namespace in image.namespaces {
            key = key.with("namespace", namespace.as_bytes());
        }
    }
    Ok(key)
}

fn make(
    folder: &Path,
    init: &Path,
    image: &NodeImage,
    accelerator: Accelerator,
    images: &[Image],
    progress: Progress,
) -> Result<()> {
    let token = new_token()?;
    // The saved RAM holds the token, and all that the node knows.
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
        .with_context(|| format!("close {}", folder.display()))?;
    write_private(&folder.join("token"), token.as_bytes())?;
    let initramfs = folder.join("initramfs.cpio");
    write_private(&initramfs, &[])?;
    initramfs::write(&initramfs, init, image, &token)?;
    let machine = Machine {
        accelerator,
        kernel: image.kernel(),
        initramfs,
        disk: image.disk(),
        memory: (folder.join("memory"), Memory::Saved),
        folder,
    };
    let mut started = machine.start()?;
    let client = Client {
        port: started.port,
        token,
    };
    let outcome = boot(&mut started, &client, folder, images, progress);
    if outcome.is_ok() {
        let _ = started.qmp.quit();
    } else {
        let _ = started.child.kill();
    }
    let _ = started.child.wait();
    outcome.with_context(|| {
        format!(
            "the lab's console ends with:\n{}",
            tail(&folder.join("console.log"), 15)
        )
    })?;
    fs::remove_file(folder.join("outbox")).context("remove the template's outbox")
}

fn boot(
    started: &mut Started,
    client: &Client,
    folder: &Path,
    images: &[Image],
    progress: Progress,
) -> Result<()> {
    let begun = Instant::now();
    started.qmp.resume()?;
    client.set_clock(BOOT_LIMIT)?;
    progress.say(
        "lab",
        &format!("node up in {:.1} s", begun.elapsed().as_secs_f64()),
    );
    client.request(Request::AwaitContainerd, BOOT_LIMIT)?;
    progress.say(
        "lab",
        &format!(
            "containerd serves in {:.1} s",
            begun.elapsed().as_secs_f64()
        ),
    );
    for image in images {
        import(client, folder, image, progress)?;
    }
    // What only the page cache holds would be saved too.
    client.must("sync; echo 3 > /proc/sys/vm/drop_caches", BOOT_LIMIT)?;
    started.qmp.save(&folder.join("state"))
}

fn import(client: &Client, folder: &Path, image: &Image, progress: Progress) -> Result<()> {
    let begun = Instant::now();
    let destination = "/run/image.tar";
    let delivery = Delivery {
        source: image.archive.clone(),
        destination: destination.to_owned(),
        executable: false,
    };
    let outbox = folder.join("outbox");
    delivery::deliver(client, &outbox, &[delivery], &mut Delivered::new())?;
    // Without --local, ctr and containerd hand each other small pieces, at twice the cost.
    for namespace in image.namespaces {
        let script = format!("ctr --namespace {namespace} image import --local {destination}");
        client.must(&script, IMPORT_LIMIT)?;
    }
    client.must(&format!("rm {destination}"), IMPORT_LIMIT)?;
    let seconds = begun.elapsed().as_secs_f64();
    let names = &image.names;
    progress.say("lab", &format!("imported {names} in {seconds:.1} s"));
    Ok(())
}

/// A template takes about a gigabyte. The youngest stay; a lab that runs keeps what it uses open.
fn forget_old(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    let mut templates: Vec<(SystemTime, PathBuf)> = entries
        .flatten()
        .filter(|entry| entry.path().join("state").is_file())
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    templates.sort();
    templates.truncate(templates.len().saturating_sub(TEMPLATES_KEPT));
    for (_, template) in templates {
        let _ = fs::remove_dir_all(template);
    }
}

fn new_token() -> Result<String> {
    let mut bytes = [0u8; 16];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("read /dev/urandom")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

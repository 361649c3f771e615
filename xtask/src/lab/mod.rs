//! The lab: a virtual machine that has what a node has, with this checkout's programs installed.

pub(crate) mod client;
pub(crate) mod delivery;
mod initramfs;
mod node_image;
pub(crate) mod qemu;
mod qmp;
mod shell;
mod state;
pub(crate) mod template;

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};
use walnut_lab_init::wire::Exec;

use crate::container_images;
use crate::lab::client::{Client, Sink};
use crate::lab::delivery::Delivery;
pub(crate) use crate::lab::node_image::NodeImage;
use crate::lab::qemu::Accelerator;
use crate::lab::state::Running;
use crate::lab::template::Template;
use crate::programs;
use crate::progress::{Progress, tail};
use crate::project::Project;

/// How long a running lab may take to answer a connection.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// How long QEMU may take to die.
const DEATH_LIMIT: Duration = Duration::from_secs(10);

/// Whether a lab that runs already will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// One that runs is good enough.
    Warm,
    /// Start anew from the template.
    Fresh,
}

/// This checkout's lab, running.
#[derive(Debug)]
pub(crate) struct Lab {
    folder: PathBuf,
    running: Running,
    _lock: File,
}

impl Lab {
    /// Brings the lab up. Idempotent.
    pub(crate) fn up(
        project: &Project,
        accelerator: Accelerator,
        freshness: Freshness,
        progress: Progress,
    ) -> Result<Self> {
        let folder = project.lab();
        let lock = lock(&folder)?;
        let images = container_images::get(project, progress)?;
        let template = Template::get(project, accelerator, &images, progress)?;
        if let Some(running) = Running::load(&folder) {
            let answers = running.client().connect(ANSWER_LIMIT).is_ok();
            if answers && running.template == template.name() && freshness == Freshness::Warm {
                return Ok(Self {
                    folder,
                    running,
                    _lock: lock,
                });
            }
            stop(&running)?;
        }
        Running::forget(&folder);
        let begun = Instant::now();
        for log in ["console.log", "qemu.log"] {
            let _ = fs::remove_file(folder.join(log));
        }
        let (started, client) = template.restore(&folder).with_context(|| {
            format!(
                "restore the lab; QEMU says: {}",
                tail(&folder.join("qemu.log"), 5)
            )
        })?;
        let pid = i32::try_from(started.child.id()).context("QEMU's process number")?;
        let running = Running {
            pid,
            start_ticks: state::start_ticks(pid).context("QEMU ended at once")?,
            port: started.port,
            token: client.token,
            template: template.name(),
            delivered: delivery::Delivered::new(),
        };
        running.save(&folder)?;
        let how = match template.accelerator() {
            Accelerator::Kvm => "accelerated by KVM",
            Accelerator::Tcg => "emulated",
        };
        let seconds = begun.elapsed().as_secs_f64();
        progress.say("lab", &format!("restored in {seconds:.1} s ({how})"));
        Ok(Self {
            folder,
            running,
            _lock: lock,
        })
    }

    /// Brings the current build output into the lab.
    pub(crate) fn deliver(&mut self, deliveries: &[Delivery], progress: Progress) -> Result<()> {
        let begun = Instant::now();
        let outbox = self.folder.join("outbox");
        let client = self.running.client();
        let count = delivery::deliver(&client, &outbox, deliveries, &mut self.running.delivered)?;
        if count > 0 {
            self.running.save(&self.folder)?;
            let seconds = begun.elapsed().as_secs_f64();
            progress.say(
                "lab",
                &format!("{count} changed files installed in {seconds:.1} s"),
            );
        }
        Ok(())
    }

    /// How to talk to it. What follows may run beside other commands: the lock is given back.
    pub(crate) fn client(self) -> Client {
        self.running.client()
    }
}

/// Stops this checkout's lab; says whether there was one.
pub(crate) fn down(project: &Project) -> Result<bool> {
    let folder = project.lab();
    let _lock = lock(&folder)?;
    let running = Running::load(&folder);
    if let Some(running) = &running {
        stop(running)?;
    }
    Running::forget(&folder);
    let _ = fs::remove_file(folder.join("outbox"));
    Ok(running.is_some())
}

/// Runs a program in the lab and passes its input and output through; returns its status.
pub(crate) fn exec(client: &Client, argv: Vec<String>) -> Result<i32> {
    let exec = match argv.as_slice() {
        [script] => client::shell(script),
        _ => Exec {
            argv,
            environment: Vec::new(),
            terminal: None,
        },
    };
    shell::run_with_input(client, exec)
}

/// Opens a terminal in the lab.
pub(crate) fn shell(client: &Client) -> Result<i32> {
    shell::interactive(client)
}

/// Prints containerd's log and the console.
pub(crate) fn logs(project: &Project) -> Result<()> {
    let folder = project.lab();
    println!("==> console ({})", folder.join("console.log").display());
    println!("{}", tail(&folder.join("console.log"), 200));
    println!("==> qemu ({})", folder.join("qemu.log").display());
    println!("{}", tail(&folder.join("qemu.log"), 50));
    println!("==> containerd (/var/log/containerd.log in the lab)");
    let running = Running::load(&folder).context("the lab isn't running: cargo xtask lab up")?;
    let script = client::shell("cat /var/log/containerd.log; dmesg | tail -n 50");
    let sink: &mut dyn Sink = &mut client::Inherit;
    running.client().run(script, sink, ANSWER_LIMIT).map(drop)
}

/// What every lab gets, as far as it is built.
pub(crate) fn installed_files(project: &Project) -> Vec<Delivery> {
    let mut files = Vec::new();
    for program in programs::HOST_PROGRAMS {
        let destination = match program {
            "walnut-vmm" => "/usr/libexec/walnut/walnut-vmm".to_owned(),
            program => format!("/usr/local/bin/{program}"),
        };
        files.push(Delivery {
            source: project.program(program),
            destination,
            executable: true,
        });
    }
    for part in ["vmlinux", "initramfs.cpio"] {
        files.push(Delivery {
            source: project.guest_image(part),
            destination: format!("/usr/share/walnut/{part}"),
            executable: false,
        });
    }
    files.retain(|file| file.source.exists());
    files
}

fn lock(folder: &std::path::Path) -> Result<File> {
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let path = folder.join("lock");
    let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
    file.lock()
        .with_context(|| format!("lock {}", path.display()))?;
    Ok(file)
}

fn stop(running: &Running) -> Result<()> {
    let Some(pid) = Pid::from_raw(running.pid) else {
        return Ok(());
    };
    let _ = rustix::process::kill_process(pid, Signal::KILL);
    let deadline = Instant::now() + DEATH_LIMIT;
    while state::start_ticks(running.pid) == Some(running.start_ticks) {
        anyhow::ensure!(
            Instant::now() < deadline,
            "process {} doesn't die",
            running.pid
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

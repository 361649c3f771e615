//! What the agent costs: containers in a Pod that runs, beside runc's; system calls under a filter; its own memory, and
//! the time until it listens.
//!
//! Containers are made on the shims' own sockets, past containerd and its client. What `pod` measures, as an exec, is
//! not measured here.

use crate::{
    console::Console,
    pod::{BOTH, fifo, milliseconds, output_to},
    progress,
    report::{Better, Report, Row, Samples},
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{
    fs,
    io::pipe,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    thread,
    time::Instant,
};
use walnut_agent_api::containerd::api::CreateTaskRequest;
use walnut_tests::{
    bundle::{Spec, busybox_rootfs},
    ctr::{BUSYBOX, Container, Runtime},
    guest::{Guest, SIGKILL},
    initramfs::Initramfs,
    programs::Programs,
    task::{Stdio, Tasks},
    vmm::VmBuilder,
};

/// What `ctr run --seccomp` writes.
const FILTER: &str =
    include_str!("../../../../guest-agent/src/container/testdata/seccomp-containerd.json");
/// Containers that are in one Pod at once.
const CONTAINERS: u32 = 100;
/// Containers that are made one after another in each run.
const SAMPLES: usize = 5;
/// Bytes that are copied one by one, by a call to read and one to write.
const BYTES: u32 = 1_000_000;

/// Says the agent's size and memory again and again, beside it: in the first root, which the agent leaves, and so with
/// a `/proc` of its own. A shell that leaves something behind wants a `/dev/null`.
const WATCH: &str = "
    mknod /dev/null c 1 3
    mkdir /watch; mount -t proc proc /watch
    (
        while sleep 1; do
            echo agent-is $(stat -c %s /init) $(awk '/^Rss/ { print $2 } /^Pss:/ { print $2 }' /watch/1/smaps_rollup)
        done
    ) &
    exec /init";

/// What is measured of both runtimes, in the order of the table.
const FIGURES: [(&str, &str, Option<f64>); 5] = [
    ("container, create to started", "ms", Some(1.0)),
    ("system call without a filter", "ns", None),
    ("system call, containerd's filter", "ns", None),
    ("100 containers, each, to started", "ms", Some(1.0)),
    ("100 containers, each, memory", "KiB", None),
];

/// Everything.
pub(crate) fn measure(report: &mut Report, programs: &Programs, runs: usize) -> Result<()> {
    agent_itself(report, programs, runs)?;
    let mut samples: [Vec<Vec<f64>>; 2] = Default::default();
    for (samples, runtime) in samples.iter_mut().zip(BOTH) {
        *samples = vec![Vec::new(); FIGURES.len()];
        // Whatever is read for the first time is read now.
        Pod::start(runtime, programs)?.add(&["true"], None, &Stdio::default())?;
    }
    for run in 1..=runs {
        for (samples, runtime) in samples.iter_mut().zip(BOTH) {
            progress(&format!(
                "{runtime:?}, containers and calls, {run} of {runs}"
            ));
            times(samples, runtime, programs).with_context(|| format!("{runtime:?}"))?;
        }
    }
    for (samples, runtime) in samples.iter_mut().zip(BOTH) {
        progress(&format!("{runtime:?}, {CONTAINERS} containers"));
        many(samples, runtime, programs).with_context(|| format!("{runtime:?}"))?;
    }
    let [walnut, runc] = samples;
    for (((what, unit, aim_ratio), walnut), runc) in FIGURES.into_iter().zip(walnut).zip(runc) {
        report.add(Row {
            what,
            unit,
            walnut: Samples::of(walnut),
            other: Some(("runc", Samples::of(runc))),
            better: Better::Less,
            aim_ratio,
            aim_most: None,
        });
    }
    Ok(())
}

/// Of one idle agent in a VM of the benchmark's own: MiB of its program and of its memory, ms until it listened.
fn agent_itself(report: &mut Report, programs: &Programs, runs: usize) -> Result<()> {
    let directory = tempfile::tempdir().context("a directory")?;
    let initramfs = directory.path().join("initramfs");
    let archive = Initramfs::before(&programs.busybox, &programs.initramfs, WATCH)?;
    fs::write(&initramfs, archive).context("cannot write an initramfs")?;
    let mut figures: [Vec<f64>; 4] = Default::default();
    for run in 1..=runs {
        progress(&format!("the agent itself, {run} of {runs}"));
        for (figures, figure) in figures.iter_mut().zip(idle_agent(programs, &initramfs)?) {
            figures.push(figure);
        }
    }
    let rows = [
        ("agent's program", "MiB", Some(8.0)),
        ("agent, idle, RSS", "MiB", Some(8.0)),
        ("agent, idle, PSS", "MiB", None),
        ("agent's start until it listens", "ms", None),
    ];
    for ((what, unit, aim_most), figures) in rows.into_iter().zip(figures) {
        report.add(Row {
            what,
            unit,
            walnut: Samples::of(figures),
            other: None,
            better: Better::Less,
            aim_ratio: None,
            aim_most,
        });
    }
    Ok(())
}

fn idle_agent(programs: &Programs, initramfs: &Path) -> Result<[f64; 4]> {
    let (reader, writer) = pipe().context("cannot make a pipe")?;
    let console = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let vm = VmBuilder::agent(programs)
        .initramfs(initramfs)
        .word("rdinit=/script")
        .console(console.as_ref());
    let mut guest = Guest::of(programs, &vm)?;
    drop(writer);
    let console = Console::new(reader);
    let boot_ns = guest.agent.setup()?.boot_ns;
    let container = guest.stay()?;
    let idle = Instant::now();
    let words = loop {
        let (at, words) = console.wait_for("agent-is ")?;
        if at > idle {
            break words;
        }
    };
    guest.remove(&container)?;
    guest.agent.shutdown().context("shutdown")?;
    guest.vm.wait()?;
    let numbers: Result<Vec<f64>, _> = words.split_whitespace().map(str::parse).collect();
    let numbers = numbers.with_context(|| format!("no numbers: {words}"))?;
    let [bytes, rss_kib, pss_kib] = numbers[..] else {
        anyhow::bail!("not three numbers: {words}");
    };
    let boot_us = u32::try_from(boot_ns / 1000).context("an hour")?;
    Ok([
        bytes / 1024.0 / 1024.0,
        rss_kib / 1024.0,
        pss_kib / 1024.0,
        f64::from(boot_us) / 1000.0,
    ])
}

/// A Pod whose shim is asked for containers. They share one root file system of busybox.
struct Pod {
    first: Container,
    tasks: Tasks,
    directory: tempfile::TempDir,
    made: Vec<String>,
    names: u32,
}

impl Pod {
    fn start(runtime: Runtime, programs: &Programs) -> Result<Self> {
        let first = runtime
            .run(BUSYBOX)
            .command(&["sleep", "100000"])
            .detach()?;
        let tasks = first.tasks()?;
        let directory = tempfile::tempdir().context("a directory")?;
        let root = directory.path().join("rootfs");
        fs::create_dir(&root).context("cannot make a directory")?;
        busybox_rootfs(&programs.busybox, &root)?;
        Ok(Self {
            first,
            tasks,
            directory,
            made: Vec::new(),
            names: 0,
        })
    }

    /// A container more, and how many ms it took until it was started; its bundle is there before.
    fn add(
        &mut self,
        args: &[&str],
        filter: Option<&Value>,
        stdio: &Stdio,
    ) -> Result<(String, f64)> {
        self.names += 1;
        let id = format!("{}-{}", self.first.id(), self.names);
        let bundle = self.bundle(&id, args, filter)?;
        let request = CreateTaskRequest {
            id: id.clone(),
            bundle: bundle.display().to_string(),
            stdin: stdio.stdin.clone(),
            stdout: stdio.stdout.clone(),
            stderr: stdio.stderr.clone(),
            ..Default::default()
        };
        let since = Instant::now();
        self.tasks.create(&request).context("create")?;
        self.made.push(id.clone());
        self.tasks.start(&id, "").context("start")?;
        Ok((id, milliseconds(since)))
    }

    fn bundle(&self, id: &str, args: &[&str], filter: Option<&Value>) -> Result<PathBuf> {
        let root = self.directory.path().join("rootfs");
        let mut spec = Spec::new(&root.display().to_string(), args)
            .networked()
            .with("/linux/cgroupsPath", json!(format!("/{id}")));
        if let Some(filter) = filter {
            spec = spec.with("/linux/seccomp", filter.clone());
        }
        let bundle = self.directory.path().join(id);
        fs::create_dir(&bundle).context("cannot make a bundle")?;
        fs::write(bundle.join("config.json"), spec.to_json()).context("cannot write a bundle")?;
        Ok(bundle)
    }

    /// What a process of the first container, or a container of its own, writes to this FIFO.
    fn said(&self, name: &str) -> Result<(String, thread::JoinHandle<std::io::Result<String>>)> {
        let path = fifo(self.directory.path(), name)?;
        let from = path.clone();
        Ok((path, thread::spawn(move || fs::read_to_string(from))))
    }

    /// KiB that are left of the memory of the kernel that runs the containers, which is this machine's with runc.
    fn available_kib(&mut self, runtime: Runtime) -> Result<f64> {
        let said = match runtime {
            Runtime::Runc => fs::read_to_string("/proc/meminfo")?,
            Runtime::Walnut => self
                .first
                .exec(&["cat", "/proc/meminfo"])?
                .success()?
                .text(),
        };
        let line = said.lines().find(|line| line.starts_with("MemAvailable:"));
        let number = line.and_then(|line| line.split_whitespace().nth(1));
        number
            .with_context(|| format!("no MemAvailable in {said:?}"))?
            .parse()
            .context("no number")
    }

    /// Nanoseconds of a system call that does next to nothing, by a program that makes many.
    fn call_ns(&mut self, filter: Option<&Value>) -> Result<f64> {
        let name = format!("calls-{}", self.names);
        let (stdout, said) = self.said(&name)?;
        let stdio = output_to(stdout);
        let dd = format!("busybox time -p dd if=/dev/zero of=/dev/null bs=1 count={BYTES} 2>&1");
        let (id, _) = self.add(&["sh", "-c", &dd], filter, &stdio)?;
        ensure!(self.tasks.wait(&id, "")? == 0, "dd failed");
        let said = said.join().ok().context("a reader panicked")??;
        let (_, after) = said.split_once("real ").context("no time")?;
        let seconds = after.split_whitespace().next().context("no seconds")?;
        let seconds: f64 = seconds.parse().with_context(|| format!("in {said:?}"))?;
        Ok(seconds * 1e9 / f64::from(2 * BYTES))
    }

    /// Ends and removes all that was added.
    fn clear(&mut self) -> Result<()> {
        for id in self.made.drain(..) {
            // One that has ended cannot be killed.
            let _ = self.tasks.kill(&id, "", SIGKILL, false);
            self.tasks.wait(&id, "").context("wait")?;
            self.tasks.delete(&id, "").context("delete")?;
        }
        Ok(())
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = self.clear();
    }
}

fn times(samples: &mut [Vec<f64>], runtime: Runtime, programs: &Programs) -> Result<()> {
    let filter: Value = serde_json::from_str(FILTER).context("the filter")?;
    let mut pod = Pod::start(runtime, programs)?;
    for _ in 0..SAMPLES {
        let (_, ms) = pod.add(&["sleep", "100000"], Some(&filter), &Stdio::default())?;
        samples[0].push(ms);
    }
    pod.clear()?;
    samples[1].push(pod.call_ns(None)?);
    samples[2].push(pod.call_ns(Some(&filter))?);
    pod.clear()
}

fn many(samples: &mut [Vec<f64>], runtime: Runtime, programs: &Programs) -> Result<()> {
    let mut pod = Pod::start(runtime, programs)?;
    let before = pod.available_kib(runtime)?;
    let mut total_ms = 0.0;
    for number in 1..=CONTAINERS {
        let (_, ms) = pod
            .add(&["sleep", "100000"], None, &Stdio::default())
            .with_context(|| format!("container {number}"))?;
        total_ms += ms;
    }
    let after = pod.available_kib(runtime)?;
    samples[3].push(total_ms / f64::from(CONTAINERS));
    samples[4].push((before - after) / f64::from(CONTAINERS));
    pod.clear()
}

//! What containerd's calls on a Pod cost, beside runc: start, exec, streams, removal, and the shim's memory.
//!
//! Exec and streams are measured on the shim's own socket, past containerd and its client, whose time would
//! hide the runtime's. The two runtimes take turns.

use crate::{
    progress,
    report::{Better, Report, Row, Samples},
};
use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, Mode, mkfifoat};
use std::{
    fs::File,
    io::{Read as _, Write as _},
    path::Path,
    thread,
    time::Instant,
};
use walnut_tests::{
    bundle::process,
    ctr::{BUSYBOX, Container, Runtime},
    memory,
    task::{Stdio, Tasks},
};

pub(crate) const BOTH: [Runtime; 2] = [Runtime::Walnut, Runtime::Runc];
/// Pods that start at once.
const PARALLEL: usize = 4;
const CONTAINERS: usize = 10;
const STREAM_MIB: u32 = 16;
const ROUND_TRIPS: usize = 100;
/// Processes that come and go between two looks at the shim's memory.
const EXECS: usize = 100;

/// Standard output and error to one FIFO: runc's shim takes none without the other.
pub(crate) fn output_to(path: String) -> Stdio {
    Stdio {
        stderr: path.clone(),
        stdout: path,
        ..Stdio::default()
    }
}

/// One Pod of one runtime, and what has been measured of it.
struct Pod {
    runtime: Runtime,
    first: Container,
    tasks: Tasks,
    execs: usize,
    ready_ms: f64,
}

pub(crate) fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

impl Pod {
    fn start(runtime: Runtime) -> Result<Self> {
        let since = Instant::now();
        let first = runtime
            .run(BUSYBOX)
            .command(&["sleep", "100000"])
            .detach()?;
        let ready_ms = milliseconds(since);
        let tasks = first.tasks()?;
        Ok(Self {
            runtime,
            first,
            tasks,
            execs: 0,
            ready_ms,
        })
    }

    /// One more container in the Pod, and how long it took.
    fn add(&self) -> Result<(Container, f64)> {
        let since = Instant::now();
        let sandbox = self.first.id();
        let container = self
            .runtime
            .run(BUSYBOX)
            .flag("--annotation=io.kubernetes.cri.container-type=container")
            .flag(&format!(
                "--annotation=io.kubernetes.cri.sandbox-id={sandbox}"
            ))
            .command(&["sleep", "100000"])
            .detach()?;
        Ok((container, milliseconds(since)))
    }

    /// Runs a process to its end and forgets it.
    fn exec(&mut self, args: &[&str], stdio: &Stdio) -> Result<()> {
        let id = self.first.id();
        self.execs += 1;
        let exec = format!("bench-{}", self.execs);
        self.tasks.exec(id, &exec, &process(args), stdio)?;
        self.tasks.start(id, &exec)?;
        ensure!(self.tasks.wait(id, &exec)? == 0, "{args:?} failed");
        self.tasks.delete(id, &exec)?;
        Ok(())
    }

    fn exec_ms(&mut self) -> Result<f64> {
        let since = Instant::now();
        self.exec(&["true"], &Stdio::default())?;
        Ok(milliseconds(since))
    }

    /// MiB a second from a process to a reader of its FIFO.
    fn throughput(&mut self, directory: &Path) -> Result<f64> {
        let stdio = output_to(fifo(directory, &format!("out-{}", self.execs))?);
        let path = stdio.stdout.clone();
        let reader =
            thread::spawn(move || std::io::copy(&mut File::open(path)?, &mut std::io::sink()));
        let since = Instant::now();
        let bytes = STREAM_MIB * 1024 * 1024;
        self.exec(&["head", "-c", &bytes.to_string(), "/dev/zero"], &stdio)?;
        let read = reader.join().ok().context("a reader panicked")??;
        ensure!(read == u64::from(bytes), "{read} of {bytes} bytes");
        Ok(f64::from(STREAM_MIB) * 1000.0 / milliseconds(since))
    }

    /// Milliseconds for a byte to a process and back.
    fn round_trip(&mut self, directory: &Path) -> Result<f64> {
        let id = self.first.id().to_owned();
        self.execs += 1;
        let exec = format!("bench-{}", self.execs);
        let stdio = Stdio {
            stdin: fifo(directory, &format!("{exec}-in"))?,
            ..output_to(fifo(directory, &format!("{exec}-out"))?)
        };
        self.tasks.exec(&id, &exec, &process(&["cat"]), &stdio)?;
        // Opening waits for the shim, and the shim for the start.
        let (stdin, stdout) = (stdio.stdin.clone(), stdio.stdout.clone());
        let trips = thread::spawn(move || -> std::io::Result<f64> {
            let mut output = File::open(stdout)?;
            let mut input = File::options().write(true).open(stdin)?;
            let mut byte = [7];
            // The first one waits for the process.
            input.write_all(&byte)?;
            output.read_exact(&mut byte)?;
            let since = Instant::now();
            for _ in 0..ROUND_TRIPS {
                input.write_all(&byte)?;
                output.read_exact(&mut byte)?;
            }
            Ok(milliseconds(since))
        });
        self.tasks.start(&id, &exec)?;
        let total = trips.join().ok().context("a client panicked")??;
        self.tasks.close_stdin(&id, &exec)?;
        self.tasks.wait(&id, &exec)?;
        self.tasks.delete(&id, &exec)?;
        let trips = u32::try_from(ROUND_TRIPS).context("trips")?;
        Ok(total / f64::from(trips))
    }

    fn shim_mib(&self) -> Result<f64> {
        let kib = memory::of_process(self.first.shim()?.pid)?.overhead_pss_kib;
        Ok(f64::from(u32::try_from(kib).context("terabytes")?) / 1024.0)
    }

    fn remove(self) -> f64 {
        let since = Instant::now();
        drop(self.first);
        milliseconds(since)
    }
}

pub(crate) fn fifo(directory: &Path, name: &str) -> Result<String> {
    let path = directory.join(name);
    mkfifoat(CWD, &path, Mode::RWXU).context("cannot make a FIFO")?;
    Ok(path.display().to_string())
}

/// What is measured of each runtime, in the order of the table.
const FIGURES: [(&str, &str, Better, Option<f64>); 12] = [
    ("Pod, first container to running", "ms", Better::Less, None),
    ("container more, create and start", "ms", Better::Less, None),
    ("exec, start to deleted", "ms", Better::Less, Some(1.0)),
    ("stdout of an exec", "MiB/s", Better::More, None),
    ("stdin to stdout, round trip", "ms", Better::Less, None),
    ("Pod removed", "ms", Better::Less, None),
    ("Pods at once, all running", "ms", Better::Less, None),
    ("shim PSS, 1 container", "MiB", Better::Less, None),
    ("shim PSS, 10 containers", "MiB", Better::Less, None),
    ("shim PSS after 100 execs", "MiB", Better::Less, None),
    ("shim PSS after 200 execs", "MiB", Better::Less, None),
    ("shim PSS after 300 execs", "MiB", Better::Less, None),
];

/// Everything.
pub(crate) fn measure(report: &mut Report, runs: usize) -> Result<()> {
    let mut samples: [Vec<Vec<f64>>; 2] = Default::default();
    for (samples, runtime) in samples.iter_mut().zip(BOTH) {
        *samples = vec![Vec::new(); FIGURES.len()];
        // Whatever is read for the first time is read now.
        Pod::start(runtime)?.exec_ms()?;
    }
    for run in 1..=runs {
        for (samples, runtime) in samples.iter_mut().zip(BOTH) {
            progress(&format!("{runtime:?}, times of a Pod, {run} of {runs}"));
            times(samples, runtime).with_context(|| format!("{runtime:?}"))?;
        }
    }
    for (samples, runtime) in samples.iter_mut().zip(BOTH) {
        progress(&format!("{runtime:?}, memory of a shim"));
        shim_memory(samples, runtime).with_context(|| format!("{runtime:?}"))?;
    }
    let [walnut, runc] = samples;
    for (((what, unit, better, aim_ratio), walnut), runc) in
        FIGURES.into_iter().zip(walnut).zip(runc)
    {
        report.add(Row {
            what,
            unit,
            walnut: Samples::of(walnut),
            other: Some(("runc", Samples::of(runc))),
            better,
            aim_ratio,
            aim_most: None,
        });
    }
    Ok(())
}

fn times(samples: &mut [Vec<f64>], runtime: Runtime) -> Result<()> {
    let directory = tempfile::tempdir().context("a directory")?;
    let mut pod = Pod::start(runtime)?;
    samples[0].push(pod.ready_ms);
    let (container, ms) = pod.add()?;
    samples[1].push(ms);
    for _ in 0..10 {
        samples[2].push(pod.exec_ms()?);
    }
    samples[3].push(pod.throughput(directory.path())?);
    samples[4].push(pod.round_trip(directory.path())?);
    drop(container);
    samples[5].push(pod.remove());
    let since = Instant::now();
    let pods: Vec<_> = (0..PARALLEL)
        .map(|_| thread::spawn(move || Pod::start(runtime)))
        .collect();
    let pods: Result<Vec<Pod>> = pods
        .into_iter()
        .map(|pod| pod.join().ok().context("a thread panicked")?)
        .collect();
    samples[6].push(milliseconds(since));
    pods.map(drop)
}

fn shim_memory(samples: &mut [Vec<f64>], runtime: Runtime) -> Result<()> {
    let mut pod = Pod::start(runtime)?;
    samples[7].push(pod.shim_mib()?);
    let more: Result<Vec<_>> = (1..CONTAINERS).map(|_| pod.add()).collect();
    samples[8].push(pod.shim_mib()?);
    drop(more?);
    for figure in &mut samples[9..12] {
        for _ in 0..EXECS {
            pod.exec_ms()?;
        }
        figure.push(pod.shim_mib()?);
    }
    Ok(())
}

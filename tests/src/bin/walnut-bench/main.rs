//! The benchmark: Walnut against runc, and against QEMU's microvm machine with the same kernel and
//! initramfs, on one machine in one run.
//!
//! Runs as root on a node with containerd. Progress and a table go to standard error, the same figures as
//! JSON to standard output. A measurement that fails is an error, never a zero. Times taken on an emulated
//! machine mean nothing by themselves: read the ratios.

mod boot;
mod console;
mod exits;
mod idle;
mod pod;
mod qemu;
mod report;
mod vmm;

use anyhow::{Context, Result, bail, ensure};
use report::{Better, Report, Row, Samples};
use std::time::Instant;
use walnut_tests::{
    ctr::{BUSYBOX, Runtime},
    programs::Programs,
};

/// How often each time is taken, unless `--runs` says otherwise.
const RUNS: usize = 5;

fn main() -> Result<()> {
    let (scope, runs) = arguments()?;
    let programs = Programs::find()?;
    let mut report = Report::new(runs);
    if scope != Scope::Pod {
        start_times(&mut report, &programs, runs)?;
        exit_counts(&mut report, &programs)?;
    }
    match scope {
        Scope::Pod => pod::measure(&mut report, runs)?,
        Scope::Product => {
            run_times(&mut report, runs)?;
            idle_memory(&mut report, &programs)?;
        }
        Scope::Vmm => vmm::measure(&mut report, &programs, runs)?,
    }
    eprint!("{}", report.table());
    println!("{}", report.json());
    Ok(())
}

/// How often a guest is begun before its figure is given up: an emulated machine loses one now and then, of either VMM.
const ATTEMPTS: usize = 3;

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// Containers and idle Pods.
    Product,
    /// The calls that containerd makes on a Pod.
    Pod,
    /// The VMM's devices.
    Vmm,
}

fn arguments() -> Result<(Scope, usize)> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut words: Vec<&str> = words.iter().map(String::as_str).collect();
    let scope = match words.first() {
        Some(&"vmm") => Scope::Vmm,
        Some(&"pod") => Scope::Pod,
        _ => Scope::Product,
    };
    if scope != Scope::Product {
        words.remove(0);
    }
    match words[..] {
        [] => Ok((scope, RUNS)),
        ["--runs", number] => {
            let runs = number.parse().context("--runs wants a number")?;
            ensure!(runs > 0, "--runs wants a number above 0");
            Ok((scope, runs))
        }
        _ => bail!("usage: walnut-bench [vmm|pod] [--runs N]"),
    }
}

/// Measures, and again where that failed, which is said.
fn persist<T>(mut measure: impl FnMut() -> Result<T>) -> Result<T> {
    for attempt in 1..ATTEMPTS {
        match measure() {
            Ok(figure) => return Ok(figure),
            Err(error) => progress(&format!(
                "attempt {attempt} of {ATTEMPTS} failed: {error:#}"
            )),
        }
    }
    measure()
}

fn progress(what: &str) {
    eprintln!("bench: {what}");
}

fn start_times(report: &mut Report, programs: &Programs, runs: usize) -> Result<()> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for run in 1..=runs {
        progress(&format!("VMM start to init, {run} of {runs}"));
        ours.push(persist(|| boot::walnut(programs))?);
        theirs.push(persist(|| boot::qemu(programs))?);
    }
    type Figure = fn(&boot::Boot) -> f64;
    let rows: [(&str, Figure, Option<f64>); 3] = [
        ("VMM start to init", |boot| boot.to_init_ms, Some(1.0)),
        ("VMM start to end", |boot| boot.to_end_ms, None),
        ("guest's own clock at init", |boot| boot.uptime_ms, None),
    ];
    for (what, figure, aim) in rows {
        report.add(Row {
            what,
            unit: "ms",
            walnut: Samples::of(ours.iter().map(figure)),
            other: Some(("QEMU microvm", Samples::of(theirs.iter().map(figure)))),
            better: Better::Less,
            aim_ratio: aim,
            aim_most: None,
        });
    }
    Ok(())
}

fn exit_counts(report: &mut Report, programs: &Programs) -> Result<()> {
    progress("VM exits from VMM start to end");
    let ours = exits::during(|| boot::walnut(programs).map(drop))?;
    let theirs = exits::during(|| boot::qemu(programs).map(drop))?;
    report.add(Row {
        what: "VM exits, start to end",
        unit: "exits",
        walnut: Samples::of([ours]),
        other: Some(("QEMU microvm", Samples::of([theirs]))),
        better: Better::Less,
        aim_ratio: None,
        aim_most: None,
    });
    let (all, served) = exits::until_agent_answers(programs)?;
    for (what, exits) in [
        ("VM exits until the agent answers", all),
        ("of these, served by the VMM", served),
    ] {
        report.add(Row {
            what,
            unit: "exits",
            walnut: Samples::of([exits]),
            other: None,
            better: Better::Less,
            aim_ratio: None,
            aim_most: None,
        });
    }
    Ok(())
}

fn run_times(report: &mut Report, runs: usize) -> Result<()> {
    let once = |runtime: Runtime| {
        let started = Instant::now();
        runtime
            .run(BUSYBOX)
            .command(&["true"])
            .finish()?
            .success()?;
        anyhow::Ok(started.elapsed().as_secs_f64() * 1000.0)
    };
    progress("ctr run, once each to warm up");
    once(Runtime::Walnut)?;
    once(Runtime::Runc)?;
    let (mut walnut, mut runc) = (Vec::new(), Vec::new());
    for run in 1..=runs {
        progress(&format!("ctr run, {run} of {runs}"));
        walnut.push(once(Runtime::Walnut)?);
        runc.push(once(Runtime::Runc)?);
    }
    report.add(Row {
        what: "ctr run --rm, wall time",
        unit: "ms",
        walnut: Samples::of(walnut),
        other: Some(("runc", Samples::of(runc))),
        better: Better::Less,
        aim_ratio: None,
        aim_most: None,
    });
    Ok(())
}

fn idle_memory(report: &mut Report, programs: &Programs) -> Result<()> {
    progress("memory of idle Pods");
    let walnut = idle::walnut()?;
    let runc_shim = idle::runc_shim()?;
    let qemu = idle::qemu(programs)?;
    let rows = [
        (
            "shim, PSS",
            walnut.shim,
            Some(("runc's shim", runc_shim)),
            Some(10.0),
        ),
        (
            "VMM without guest RAM, PSS",
            walnut.vmm,
            Some(("QEMU microvm", qemu.vmm)),
            Some(5.0),
        ),
        (
            "guest RAM touched by an idle Pod",
            walnut.guest,
            Some(("QEMU, init only", qemu.guest)),
            None,
        ),
        (
            "idle Pod in all",
            walnut.shim + walnut.vmm + walnut.guest,
            None,
            Some(60.0),
        ),
    ];
    for (what, ours, other, aim_most) in rows {
        report.add(Row {
            what,
            unit: "MiB",
            walnut: Samples::of([ours]),
            other: other.map(|(name, figure)| (name, Samples::of([figure]))),
            better: Better::Less,
            aim_ratio: None,
            aim_most,
        });
    }
    Ok(())
}

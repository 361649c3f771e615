//! `walnut-bench vmm`: the VMM alone against QEMU's microvm machine, with the same kernel, guest, devices and
//! sizes, alternating.
//!
//! The guest measures itself and says each figure on its console; what only the host can see (memory, the far
//! side of a socket) the host measures. A figure that one of the two does not give is an error.

mod guest;
pub(crate) mod memory;
mod sockets;

use crate::{
    persist, progress,
    report::{Better, Report, Row, Samples},
};
use anyhow::{Context, Result};
use guest::{Peer, Story};
use std::collections::BTreeMap;
use walnut_tests::programs::Programs;

/// QEMU with the back ends that it is usually run with on a node.
const OTHER: &str = "QEMU microvm";

/// What is measured in a guest, or of it, and what it means.
const FIGURES: [(&str, &str, &str, Better); 20] = [
    (
        "block.randread",
        "block, 4 KiB random read",
        "IOPS",
        Better::More,
    ),
    (
        "block.randwrite",
        "block, 4 KiB random write",
        "IOPS",
        Better::More,
    ),
    (
        "block.read",
        "block, 1 MiB sequential read",
        "KiB/s",
        Better::More,
    ),
    (
        "block.write",
        "block, 1 MiB sequential write",
        "KiB/s",
        Better::More,
    ),
    (
        "fs.find.cold",
        "fs, stat 1000 files, cold",
        "ms",
        Better::Less,
    ),
    (
        "fs.find.warm",
        "fs, stat 1000 files, warm",
        "ms",
        Better::Less,
    ),
    (
        "fs.read.cold",
        "fs, read 1000 small files, cold",
        "ms",
        Better::Less,
    ),
    (
        "fs.read.warm",
        "fs, read 1000 small files, warm",
        "ms",
        Better::Less,
    ),
    (
        "fs.untar",
        "fs, unpack 1000 small files",
        "ms",
        Better::Less,
    ),
    (
        "fs.seqread.cold",
        "fs, 1 MiB sequential read, cold",
        "KiB/s",
        Better::More,
    ),
    (
        "fs.seqread.warm",
        "fs, 1 MiB sequential read, warm",
        "KiB/s",
        Better::More,
    ),
    (
        "fs.seqwrite",
        "fs, 1 MiB sequential write",
        "KiB/s",
        Better::More,
    ),
    ("net.send", "TCP, guest to host", "kbit/s", Better::More),
    ("net.receive", "TCP, host to guest", "kbit/s", Better::More),
    ("net.ping", "ICMP round trip", "ms", Better::Less),
    ("vsock.send", "vsock, guest to host", "KiB/s", Better::More),
    (
        "vsock.receive",
        "vsock, host to guest",
        "KiB/s",
        Better::More,
    ),
    ("vsock.rtt", "vsock round trip", "ms", Better::Less),
    (
        "memory.1",
        "VMM without guest RAM, 1 vCPU, PSS",
        "MiB",
        Better::Less,
    ),
    (
        "memory.8",
        "VMM without guest RAM, 8 vCPUs, PSS",
        "MiB",
        Better::Less,
    ),
];

/// All samples of one VMM, by figure.
type Figures = BTreeMap<String, Vec<f64>>;

/// Adds all rows.
pub(crate) fn measure(report: &mut Report, programs: &Programs, runs: usize) -> Result<()> {
    let story = Story::prepare(programs)?;
    let (mut ours, mut theirs) = (Figures::new(), Figures::new());
    memory::given_back(report, programs)?;
    for run in 1..=runs {
        for (peer, figures) in [(Peer::Walnut, &mut ours), (Peer::Qemu, &mut theirs)] {
            progress(&format!("memory of {}, {run} of {runs}", peer.name()));
            for vcpus in [1, 8] {
                let mib = persist(|| memory::overhead_mib(programs, peer, vcpus))?;
                let name = format!("memory.{vcpus}");
                figures.entry(name).or_default().push(mib);
            }
        }
    }
    for run in 1..=runs {
        for (peer, figures) in [(Peer::Walnut, &mut ours), (Peer::Qemu, &mut theirs)] {
            progress(&format!("devices of {}, {run} of {runs}", peer.name()));
            for (name, value) in persist(|| story.tell(programs, peer))? {
                figures.entry(name).or_default().push(value);
            }
        }
    }
    for (name, what, unit, better) in FIGURES {
        let samples = |figures: &Figures, peer: Peer| {
            let samples = figures.get(name).cloned();
            samples.with_context(|| format!("{} gave no figure {name}", peer.name()))
        };
        let aim = if name.starts_with("memory") {
            1.0 / 1.2
        } else {
            1.0
        };
        report.add(Row {
            what,
            unit,
            walnut: Samples::of(samples(&ours, Peer::Walnut)?),
            other: Some((OTHER, Samples::of(samples(&theirs, Peer::Qemu)?))),
            better,
            aim_ratio: Some(aim),
            aim_most: None,
        });
    }
    Ok(())
}

//! A container's use of resources, in containerd's message for cgroup v2.
//!
//! Numbers of files that the kernel does not have stay 0. Must not fail: what cannot be read is not shown.

use super::Cgroup;
use std::collections::HashMap;
use walnut_agent_api::containerd::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats,
    PidsStat,
};

/// containerd's type URL for [`Metrics`].
pub(crate) const METRICS_TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Reads everything that there is to know.
pub(crate) fn metrics(cgroup: &Cgroup) -> Metrics {
    let read = |file: &str| cgroup.read(file).unwrap_or_default();
    let number = |file: &str| number(&read(file));
    let mut metrics = Metrics::new();
    metrics.pids = Some(PidsStat {
        current: number("pids.current"),
        limit: number("pids.max"),
        ..PidsStat::default()
    })
    .into();
    let mut cpu = cpu(&table(&read("cpu.stat")));
    cpu.psi = pressure(&read("cpu.pressure")).into();
    metrics.cpu = Some(cpu).into();
    let mut memory = memory(&table(&read("memory.stat")));
    memory.usage = number("memory.current");
    memory.usage_limit = number("memory.max");
    memory.max_usage = number("memory.peak");
    memory.swap_usage = number("memory.swap.current");
    memory.swap_limit = number("memory.swap.max");
    memory.swap_max_usage = number("memory.swap.peak");
    memory.psi = pressure(&read("memory.pressure")).into();
    metrics.memory = Some(memory).into();
    metrics.memory_events = Some(events(&table(&read("memory.events")))).into();
    metrics.io = Some(IOStat {
        usage: read("io.stat").lines().filter_map(io_entry).collect(),
        psi: pressure(&read("io.pressure")).into(),
        ..IOStat::default()
    })
    .into();
    metrics.hugetlb = cgroup
        .files()
        .iter()
        .filter_map(|file| file.strip_prefix("hugetlb.")?.strip_suffix(".current"))
        .filter(|size| !size.contains('.'))
        .map(|size| HugeTlbStat {
            current: number(&format!("hugetlb.{size}.current")),
            max: number(&format!("hugetlb.{size}.max")),
            pagesize: size.to_owned(),
            failcnt: table(&read(&format!("hugetlb.{size}.events")))
                .get("max")
                .copied()
                .unwrap_or_default(),
            ..HugeTlbStat::default()
        })
        .collect();
    metrics
}

type Table<'a> = HashMap<&'a str, u64>;

/// A number alone in a file; `max` is the largest.
fn number(text: &str) -> u64 {
    match text.trim() {
        "max" => u64::MAX,
        digits => digits.parse().unwrap_or_default(),
    }
}

/// A flat keyed file: a key and a number on each line.
fn table(text: &str) -> Table<'_> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key, value.parse().ok()?))
        })
        .collect()
}

fn cpu(table: &Table<'_>) -> CPUStat {
    let get = |key| table.get(key).copied().unwrap_or_default();
    CPUStat {
        usage_usec: get("usage_usec"),
        user_usec: get("user_usec"),
        system_usec: get("system_usec"),
        nr_periods: get("nr_periods"),
        nr_throttled: get("nr_throttled"),
        throttled_usec: get("throttled_usec"),
        nr_bursts: get("nr_bursts"),
        burst_usec: get("burst_usec"),
        ..CPUStat::default()
    }
}

fn memory(table: &Table<'_>) -> MemoryStat {
    let get = |key: &str| table.get(key).copied().unwrap_or_default();
    // Kernels count the two kinds apart since 5.9.
    let both = |key| get(&format!("{key}_anon")) + get(&format!("{key}_file"));
    MemoryStat {
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        workingset_refault: both("workingset_refault"),
        workingset_activate: both("workingset_activate"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        ..MemoryStat::default()
    }
}

fn events(table: &Table<'_>) -> MemoryEvents {
    let get = |key| table.get(key).copied().unwrap_or_default();
    MemoryEvents {
        low: get("low"),
        high: get("high"),
        max: get("max"),
        oom: get("oom"),
        oom_kill: get("oom_kill"),
        oom_group_kill: get("oom_group_kill"),
        ..MemoryEvents::default()
    }
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and the same of `full`.
fn pressure(text: &str) -> Option<PSIStats> {
    let of = |kind: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
        let mut data = PSIData::default();
        for (key, value) in line
            .split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
        {
            match key {
                "avg10" => data.avg10 = value.parse().ok()?,
                "avg60" => data.avg60 = value.parse().ok()?,
                "avg300" => data.avg300 = value.parse().ok()?,
                "total" => data.total = value.parse().ok()?,
                _ => {}
            }
        }
        Some(data)
    };
    let some = of("some ")?;
    Some(PSIStats {
        some: Some(some).into(),
        full: of("full ").into(),
        ..PSIStats::default()
    })
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`
fn io_entry(line: &str) -> Option<IOEntry> {
    let mut words = line.split_ascii_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let mut entry = IOEntry {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        ..IOEntry::default()
    };
    for (key, value) in words.filter_map(|word| word.split_once('=')) {
        let value = value.parse().unwrap_or_default();
        match key {
            "rbytes" => entry.rbytes = value,
            "wbytes" => entry.wbytes = value,
            "rios" => entry.rios = value,
            "wios" => entry.wios = value,
            _ => {}
        }
    }
    Some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_kernel_are_understood() {
        assert_eq!(number("max\n"), u64::MAX);
        assert_eq!(number("42\n"), 42);
        assert_eq!(
            cpu(&table("usage_usec 7\nuser_usec 3\nodd\n")).usage_usec,
            7
        );
        let entry = io_entry("254:0 rbytes=5 wbytes=6 rios=7 wios=8 dbytes=9").unwrap();
        assert_eq!((entry.major, entry.rbytes, entry.wios), (254, 5, 8));
        assert!(io_entry("").is_none());
        let text = "some avg10=1.50 avg60=0.00 avg300=0.25 total=77\nfull avg10=0.00 total=5\n";
        let pressure = pressure(text).unwrap();
        assert_eq!((pressure.some.avg10, pressure.some.avg300), (1.5, 0.25));
        assert_eq!((pressure.some.total, pressure.full.total), (77, 5));
        assert!(super::pressure("").is_none());
        let stat = table("workingset_refault_anon 2\nworkingset_refault_file 3\n");
        assert_eq!(memory(&stat).workingset_refault, 5);
    }
}

//! What a Pod costs the host: the counters of its cgroup, in containerd's type.
//!
//! cgroup v2 (Linux, Documentation/admin-guide/cgroup-v2.rst). A file that isn't there counts as nothing: its
//! controller is off.

use containerd_shim_protos::cgroups_v2::metrics::{CPUStat, MemoryStat, Metrics, PidsStat};
use protobuf::{Message as _, MessageField, well_known_types::any::Any};
use std::{fs, path::Path};

const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// Reads the counters of a cgroup.
pub(crate) fn read(cgroup: &Path) -> Any {
    let text = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap_or_default();
    // "max" is no limit, which the type knows as the largest number.
    let number = |file: &str| text(file).trim().parse().unwrap_or(u64::MAX);
    let cpu = text("cpu.stat");
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: text("pids.current").trim().parse().unwrap_or(0),
            limit: number("pids.max"),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: keyed(&cpu, "usage_usec"),
            user_usec: keyed(&cpu, "user_usec"),
            system_usec: keyed(&cpu, "system_usec"),
            nr_periods: keyed(&cpu, "nr_periods"),
            nr_throttled: keyed(&cpu, "nr_throttled"),
            throttled_usec: keyed(&cpu, "throttled_usec"),
            ..CPUStat::default()
        }),
        memory: MessageField::some(MemoryStat {
            usage: text("memory.current").trim().parse().unwrap_or(0),
            usage_limit: number("memory.max"),
            inactive_file: keyed(&text("memory.stat"), "inactive_file"),
            ..MemoryStat::default()
        }),
        ..Metrics::default()
    };
    Any {
        type_url: TYPE_URL.to_owned(),
        // Numbers alone: encoding them has nothing to fail on.
        value: metrics.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

/// The number behind a name in a file of such lines.
fn keyed(text: &str, name: &str) -> u64 {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(key, _)| *key == name)
        .and_then(|(_, value)| value.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_and_what_is_not_there_is_nothing() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(
            directory.path().join("cpu.stat"),
            "usage_usec 7\nuser_usec 5\n",
        )
        .unwrap();
        fs::write(directory.path().join("memory.current"), "4096\n").unwrap();
        fs::write(directory.path().join("memory.max"), "max\n").unwrap();
        let read = read(directory.path());
        assert_eq!(read.type_url, TYPE_URL);
        let metrics = Metrics::parse_from_bytes(&read.value).unwrap();
        assert_eq!((metrics.cpu.usage_usec, metrics.cpu.user_usec), (7, 5));
        assert_eq!(
            (metrics.memory.usage, metrics.memory.usage_limit),
            (4096, u64::MAX)
        );
        assert_eq!(metrics.pids.current, 0);
    }
}

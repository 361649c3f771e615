//! From the OCI configuration's resources to cgroup v2 files: pure.
//!
//! OCI runtime specification, `config-linux.md`, "Control groups", written for cgroup v1; the conversions
//! are those that runc documents for v2. A value of 0 changes nothing, -1 is no limit.

use crate::container::spec::{BlockIo, Cpu, Memory, Resources, ThrottleDevice};

/// Period of a CPU quota when only the quota is given, in microseconds: the kernel's default.
const DEFAULT_PERIOD_US: u64 = 100_000;

/// A value for a file of a cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Setting {
    /// File in the cgroup's directory.
    pub(crate) file: String,
    /// What to write.
    pub(crate) value: String,
}

/// Why resources are refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{field} {value} {problem}")]
pub(crate) struct ResourceError {
    field: &'static str,
    value: String,
    problem: &'static str,
}

/// What to write, in order.
pub(crate) fn settings(resources: &Resources) -> Result<Vec<Setting>, ResourceError> {
    let mut settings = Vec::new();
    memory(&resources.memory, &mut settings)?;
    cpu(&resources.cpu, &mut settings)?;
    if resources.pids.limit != 0 {
        set(&mut settings, "pids.max", limit(resources.pids.limit));
    }
    block_io(&resources.block_io, &mut settings)?;
    for huge in &resources.hugepage_limits {
        let named = !huge.page_size.is_empty()
            && huge
                .page_size
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric());
        if !named {
            return Err(ResourceError {
                field: "linux.resources.hugepageLimits[].pageSize",
                value: huge.page_size.clone(),
                problem: "is not a page size",
            });
        }
        // What is reserved counts as well: a mapping that could not be filled would end its process.
        for file in ["rsvd.max", "max"] {
            let file = format!("hugetlb.{}.{file}", huge.page_size);
            set(&mut settings, &file, huge.limit.to_string());
        }
    }
    for (file, value) in &resources.unified {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._".contains(&byte);
        // The files of the hierarchy itself are the agent's: `cgroup.procs` could call processes in.
        let of_controller = file.bytes().all(plain)
            && file.contains('.')
            && !file.starts_with('.')
            && !file.starts_with("cgroup.");
        if !of_controller {
            return Err(ResourceError {
                field: "linux.resources.unified",
                value: file.clone(),
                problem: "is not a file of a controller",
            });
        }
        set(&mut settings, file, value.clone());
    }
    Ok(settings)
}

fn set(settings: &mut Vec<Setting>, file: &str, value: String) {
    settings.push(Setting {
        file: file.to_owned(),
        value,
    });
}

fn limit(number: i64) -> String {
    if number < 0 {
        return "max".to_owned();
    }
    number.to_string()
}

fn memory(memory: &Memory, settings: &mut Vec<Setting>) -> Result<(), ResourceError> {
    if memory.limit != 0 {
        set(settings, "memory.max", limit(memory.limit));
    }
    if memory.reservation != 0 {
        set(settings, "memory.low", limit(memory.reservation));
    }
    // In v1's terms the swap limit is that of memory and swap together.
    match memory.swap {
        0 if memory.limit < 0 => set(settings, "memory.swap.max", limit(-1)),
        0 => {}
        swap if swap < 0 => set(settings, "memory.swap.max", limit(-1)),
        swap => {
            let alone = swap.checked_sub(memory.limit).filter(|_| memory.limit > 0);
            let Some(alone) = alone.filter(|alone| *alone >= 0) else {
                return Err(ResourceError {
                    field: "linux.resources.memory.swap",
                    value: swap.to_string(),
                    problem: "is of memory and swap together and must not be below memory.limit",
                });
            };
            set(settings, "memory.swap.max", alone.to_string());
        }
    }
    Ok(())
}

fn cpu(cpu: &Cpu, settings: &mut Vec<Setting>) -> Result<(), ResourceError> {
    if cpu.shares != 0 {
        set(
            settings,
            "cpu.weight",
            weight_of_shares(cpu.shares).to_string(),
        );
    }
    if let Some(idle) = cpu.idle {
        set(settings, "cpu.idle", idle.to_string());
    }
    let burst = cpu.burst.map(|burst| Setting {
        file: "cpu.max.burst".to_owned(),
        value: burst.to_string(),
    });
    if cpu.quota != 0 || cpu.period != 0 {
        let quota = if cpu.quota > 0 {
            limit(cpu.quota)
        } else {
            limit(-1)
        };
        let period = if cpu.period == 0 {
            DEFAULT_PERIOD_US
        } else {
            cpu.period
        };
        set(settings, "cpu.max", format!("{quota} {period}"));
    }
    settings.extend(burst);
    for (file, field, list) in [
        ("cpuset.cpus", "linux.resources.cpu.cpus", &cpu.cpus),
        ("cpuset.mems", "linux.resources.cpu.mems", &cpu.mems),
    ] {
        if list.is_empty() {
            continue;
        }
        if !list
            .bytes()
            .all(|byte| byte.is_ascii_digit() || b"-,".contains(&byte))
        {
            return Err(ResourceError {
                field,
                value: list.clone(),
                problem: "is not a list of numbers",
            });
        }
        set(settings, file, list.clone());
    }
    Ok(())
}

/// Shares are 2 to 262144 with 1024 for an ordinary container, weights 1 to 10000: mapped linearly.
fn weight_of_shares(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9_999 / 262_142
}

fn block_io(io: &BlockIo, settings: &mut Vec<Setting>) -> Result<(), ResourceError> {
    if io.weight != 0 {
        let weight = weight_of_blkio("linux.resources.blockIO.weight", io.weight)?;
        set(settings, "io.weight", format!("default {weight}"));
    }
    for device in &io.weight_device {
        let weight = weight_of_blkio("linux.resources.blockIO.weightDevice", device.weight)?;
        set(
            settings,
            "io.weight",
            format!("{}:{} {weight}", device.major, device.minor),
        );
    }
    for (key, devices) in [
        ("rbps", &io.throttle_read_bps_device),
        ("wbps", &io.throttle_write_bps_device),
        ("riops", &io.throttle_read_iops_device),
        ("wiops", &io.throttle_write_iops_device),
    ] {
        for ThrottleDevice { major, minor, rate } in devices {
            let rate = if *rate == 0 {
                limit(-1)
            } else {
                rate.to_string()
            };
            set(settings, "io.max", format!("{major}:{minor} {key}={rate}"));
        }
    }
    Ok(())
}

/// v1's weights are 10 to 1000, v2's 1 to 10000.
fn weight_of_blkio(field: &'static str, weight: u16) -> Result<u64, ResourceError> {
    if (10..=1000).contains(&weight) {
        return Ok(1 + (u64::from(weight) - 10) * 9_999 / 990);
    }
    Err(ResourceError {
        field,
        value: weight.to_string(),
        problem: "is not between 10 and 1000",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(json: &str) -> Result<Vec<String>, String> {
        let resources: Resources = serde_json::from_str(json).unwrap();
        settings(&resources)
            .map(|settings| {
                settings
                    .into_iter()
                    .map(|setting| format!("{}={}", setting.file, setting.value))
                    .collect()
            })
            .map_err(|error| error.to_string())
    }

    #[test]
    fn limits_become_files() {
        let cases = [
            (
                r#"{"memory":{"limit":1048576,"swap":2097152,"reservation":4096}}"#,
                vec![
                    "memory.max=1048576",
                    "memory.low=4096",
                    "memory.swap.max=1048576",
                ],
            ),
            (
                r#"{"memory":{"limit":-1}}"#,
                vec!["memory.max=max", "memory.swap.max=max"],
            ),
            (
                r#"{"memory":{"limit":4096,"swap":-1}}"#,
                vec!["memory.max=4096", "memory.swap.max=max"],
            ),
            (
                r#"{"cpu":{"shares":1024,"quota":50000}}"#,
                vec!["cpu.weight=39", "cpu.max=50000 100000"],
            ),
            (
                r#"{"cpu":{"quota":-1,"period":20000,"cpus":"0-1,3"}}"#,
                vec!["cpu.max=max 20000", "cpuset.cpus=0-1,3"],
            ),
            (r#"{"pids":{"limit":20}}"#, vec!["pids.max=20"]),
            (r#"{"pids":{"limit":-1}}"#, vec!["pids.max=max"]),
            (r#"{"pids":{"limit":0}}"#, vec![]),
            (
                r#"{"hugepageLimits":[{"pageSize":"2MB","limit":0}]}"#,
                vec!["hugetlb.2MB.rsvd.max=0", "hugetlb.2MB.max=0"],
            ),
            (
                r#"{"blockIO":{"weight":1000,"throttleReadIOPSDevice":[{"major":8,"minor":0,"rate":5}]}}"#,
                vec!["io.weight=default 10000", "io.max=8:0 riops=5"],
            ),
            (r#"{"unified":{"memory.high":"5"}}"#, vec!["memory.high=5"]),
        ];
        for (json, files) in cases {
            assert_eq!(written(json).unwrap(), files, "{json}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for json in [
            r#"{"memory":{"limit":4096,"swap":1024}}"#,
            r#"{"memory":{"swap":1024}}"#,
            r#"{"blockIO":{"weight":5}}"#,
            r#"{"unified":{"../memory.max":"5"}}"#,
            r#"{"unified":{"cgroup.procs":"1"}}"#,
            r#"{"hugepageLimits":[{"pageSize":"../x","limit":0}]}"#,
            r#"{"cpu":{"cpus":"0\n1"}}"#,
        ] {
            assert!(written(json).is_err(), "{json}");
        }
    }

    proptest! {
        #[test]
        fn every_share_is_a_weight(shares: u64) {
            prop_assert!((1..=10_000).contains(&weight_of_shares(shares)));
        }

        #[test]
        fn no_number_overflows(memory: i64, swap: i64, quota: i64, period: u64) {
            let resources = Resources {
                memory: Memory { limit: memory, swap, reservation: memory, check_before_update: false },
                cpu: Cpu { quota, period, shares: period, ..Cpu::default() },
                ..Resources::default()
            };
            let _ = settings(&resources);
        }
    }
}

//! How the kernel schedules a process: `process.scheduler`, `process.ioPriority`, `process.execCPUAffinity`.
//!
//! sched_setattr(2), ioprio_set(2), sched_setaffinity(2). Done from outside of the process, by one that has the
//! guest's privileges, as a container with users of its own has none. Must not know limits of a cgroup.

use super::{
    SetupError,
    spec::{IoPriority, Process, Scheduler},
};
use crate::syscall::{self, SchedulerAttributes};
use rustix::thread::{CpuSet, sched_setaffinity};

/// Sets everything but the affinity before the cgroup is entered.
pub(super) fn apply(pid: i32, process: &Process, is_exec: bool) -> Result<(), SetupError> {
    if let Some(scheduler) = &process.scheduler {
        let attributes = attributes(scheduler)?;
        syscall::set_scheduler(pid, &attributes).map_err(SetupError::named(format!(
            "cannot set process.scheduler to {}",
            scheduler.policy
        )))?;
    }
    if let Some(priority) = &process.io_priority {
        syscall::set_io_priority(pid, io_priority(priority)?).map_err(SetupError::named(
            format!(
                "cannot set process.ioPriority to {} {}",
                priority.class, priority.priority
            ),
        ))?;
    }
    if is_exec {
        let cpus = &process.exec_cpu_affinity.last;
        return set_affinity("process.execCPUAffinity.final", Some(pid), cpus);
    }
    Ok(())
}

/// Sets where this process runs until it is moved to the container's cgroup.
pub(super) fn set_initial_affinity(process: &Process) -> Result<(), SetupError> {
    let cpus = &process.exec_cpu_affinity.initial;
    set_affinity("process.execCPUAffinity.initial", None, cpus)
}

fn set_affinity(field: &str, pid: Option<i32>, list: &str) -> Result<(), SetupError> {
    if list.is_empty() {
        return Ok(());
    }
    let unknown = || SetupError::Request(format!("{field} {list:?} is not a list of CPUs"));
    let set = cpus(list).ok_or_else(unknown)?;
    let pid = pid.and_then(rustix::process::Pid::from_raw);
    sched_setaffinity(pid, &set)
        .map_err(SetupError::named(format!("cannot set {field} to {list:?}")))
}

/// "0-3,7", as cpuset(7) has it.
fn cpus(list: &str) -> Option<CpuSet> {
    let mut set = CpuSet::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        if first > last || last >= CpuSet::MAX_CPU {
            return None;
        }
        (first..=last).for_each(|cpu| set.set(cpu));
    }
    Some(set)
}

fn attributes(scheduler: &Scheduler) -> Result<SchedulerAttributes, SetupError> {
    let unknown = |what: &str, value: &str| {
        SetupError::Request(format!("process.scheduler.{what} {value:?} is not known"))
    };
    let policy = match scheduler.policy.as_str() {
        "SCHED_OTHER" => 0,
        "SCHED_FIFO" => 1,
        "SCHED_RR" => 2,
        "SCHED_BATCH" => 3,
        // Linux has the number, and nothing behind it: the call says so.
        "SCHED_ISO" => 4,
        "SCHED_IDLE" => 5,
        "SCHED_DEADLINE" => 6,
        other => return Err(unknown("policy", other)),
    };
    let mut flags = 0;
    for flag in &scheduler.flags {
        flags |= match flag.as_str() {
            "SCHED_FLAG_RESET_ON_FORK" => 0x01,
            "SCHED_FLAG_RECLAIM" => 0x02,
            "SCHED_FLAG_DL_OVERRUN" => 0x04,
            "SCHED_FLAG_KEEP_POLICY" => 0x08,
            "SCHED_FLAG_KEEP_PARAMS" => 0x10,
            "SCHED_FLAG_UTIL_CLAMP_MIN" => 0x20,
            "SCHED_FLAG_UTIL_CLAMP_MAX" => 0x40,
            other => return Err(unknown("flags", other)),
        };
    }
    Ok(SchedulerAttributes {
        policy,
        flags,
        nice: scheduler.nice,
        priority: u32::try_from(scheduler.priority)
            .map_err(|_| unknown("priority", &scheduler.priority.to_string()))?,
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
        ..SchedulerAttributes::default()
    })
}

/// `IOPRIO_PRIO_VALUE`: the class above thirteen bits of priority.
fn io_priority(priority: &IoPriority) -> Result<i32, SetupError> {
    let class = match priority.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        other => {
            let message = format!("process.ioPriority.class {other:?} is not known");
            return Err(SetupError::Request(message));
        }
    };
    if !(0..=7).contains(&priority.priority) {
        let level = priority.priority;
        let message = format!("process.ioPriority.priority {level} is not between 0 and 7");
        return Err(SetupError::Request(message));
    }
    Ok(class << 13 | priority.priority)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_those_of_the_kernel() {
        let set = cpus("0-2,5").unwrap();
        let found: Vec<_> = (0..8).filter(|cpu| set.is_set(*cpu)).collect();
        assert_eq!(found, [0, 1, 2, 5]);
        for odd in ["", "x", "3-1", "1-", "100000", "-1"] {
            assert!(cpus(odd).is_none(), "{odd}");
        }
    }

    #[test]
    fn what_is_not_known_is_named() {
        let scheduler = |policy: &str| Scheduler {
            policy: policy.into(),
            ..Scheduler::default()
        };
        let error = attributes(&scheduler("SCHED_MAGIC"))
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "process.scheduler.policy \"SCHED_MAGIC\" is not known"
        );
        let flagged = Scheduler {
            flags: vec!["SCHED_FLAG_X".into()],
            ..scheduler("SCHED_OTHER")
        };
        assert!(attributes(&flagged).is_err());
        let high = IoPriority {
            class: "IOPRIO_CLASS_BE".into(),
            priority: 8,
        };
        assert!(io_priority(&high).is_err());
    }
}

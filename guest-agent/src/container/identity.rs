//! Who a process is: user, groups, capabilities, limits.
//!
//! capabilities(7), "Effect of user ID changes on capabilities", sets the order: the bounding set falls
//! while CAP_SETPCAP is there, the user changes with the capabilities kept, then each set is as named. What
//! the security modules hold the process to belongs here too.

use super::{
    SetupError,
    seccomp::Filter,
    spec::{Capabilities, Process, Rlimit},
};
use rustix::{
    fs::{Gid, Mode, OFlags, Uid, fchown, fstat, makedev, openat},
    io::Errno,
    process::{Resource, Rlimit as Limit, getrlimit, prlimit, setrlimit},
    stdio,
    thread::{
        CapabilitySet, CapabilitySets, clear_ambient_capability_set,
        configure_capability_in_ambient_set, remove_capability_from_bounding_set, set_capabilities,
        set_keep_capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};
use std::{fs::File, io::Write, os::fd::BorrowedFd};

/// Soft limit of open files, as the kernel gives it to its first process.
const USUAL_FILES: u64 = 1024;

/// What installing a filter needs without no-new-privileges.
const TO_FILTER: CapabilitySet = CapabilitySet::SYS_ADMIN;

/// Everything that takes privilege away, in the order that needs it. With `filtered`, [`install_filter`]
/// follows, and what that needs can be had back until then.
pub(super) fn assume(process: &Process, filtered: bool) -> Result<(), SetupError> {
    let sets = Sets::from(&process.capabilities);
    drop_bounding(sets.bounding)?;
    let uid = process.user.uid;
    for stream in [stdio::stdin(), stdio::stdout(), stdio::stderr()] {
        give_stream(stream, uid)?;
    }
    set_user(process)?;
    let none = CapabilitySet::empty();
    let kept = filtered && !process.no_new_privileges;
    sets.apply(none, if kept { TO_FILTER } else { none })?;
    set_ambient(sets.ambient)
}

/// Puts the process under its filter, as late as can be: after it, capset(2) without no-new-privileges and
/// execve(2) are all that is called, so that a profile need not allow what only the set-up does. Only a
/// `startContainer` hook needs more: what runs a program and waits for it.
pub(super) fn install_filter(filter: &Filter, process: &Process) -> Result<(), SetupError> {
    let install = || {
        let attempted = SetupError::step("cannot install the filter of linux.seccomp");
        filter.install().map_err(attempted)
    };
    if process.no_new_privileges {
        return install();
    }
    let sets = Sets::from(&process.capabilities);
    sets.apply(TO_FILTER, TO_FILTER)?;
    install()?;
    sets.apply(CapabilitySet::empty(), CapabilitySet::empty())
}

/// Has AppArmor hold whatever this process executes next to a profile.
pub(super) fn confine_from_exec(procfs: BorrowedFd<'_>, profile: &str) -> Result<(), SetupError> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    // The kernel takes the command by one write alone.
    let command = format!("exec {profile}");
    openat(procfs, "self/attr/apparmor/exec", flags, Mode::empty())
        .map_err(std::io::Error::from)
        .and_then(|file| File::from(file).write_all(command.as_bytes()))
        .map_err(SetupError::named(format!(
            "cannot apply process.apparmorProfile {profile:?}"
        )))
}

/// The agent holds many files; a program that was given no limit finds the usual one, which it may raise.
pub(super) fn set_usual_limits() -> Result<(), SetupError> {
    let files = getrlimit(Resource::Nofile);
    let usual = Limit {
        current: Some(
            files
                .maximum
                .map_or(USUAL_FILES, |most| most.min(USUAL_FILES)),
        ),
        maximum: files.maximum,
    };
    setrlimit(Resource::Nofile, usual).map_err(SetupError::step("cannot set the usual limits"))
}

/// Lets a process set its `process.rlimits`: raising one needs a privilege that a container with users of
/// its own does not have.
pub(super) fn raise_limits(pid: i32, limits: &[Rlimit]) -> Result<(), SetupError> {
    for limit in limits {
        let attempted = || SetupError::named(format!("cannot set {}", limit.kind));
        let (resource, wanted) = understand(limit)?;
        let now = getrlimit(resource);
        // No limit is above every number.
        let is_raise = now
            .maximum
            .is_some_and(|now| wanted.maximum.is_none_or(|most| most > now));
        if is_raise {
            let raised = Limit {
                current: now.current,
                maximum: wanted.maximum,
            };
            prlimit(rustix::process::Pid::from_raw(pid), resource, raised).map_err(attempted())?;
        }
    }
    Ok(())
}

/// Sets `process.rlimits`; earlier than [`assume`], as raising one needs privilege.
pub(super) fn set_limits(limits: &[Rlimit]) -> Result<(), SetupError> {
    for limit in limits {
        let (resource, wanted) = understand(limit)?;
        setrlimit(resource, wanted)
            .map_err(SetupError::named(format!("cannot set {}", limit.kind)))?;
    }
    Ok(())
}

fn understand(limit: &Rlimit) -> Result<(Resource, Limit), SetupError> {
    let resource = resource(&limit.kind).ok_or_else(|| {
        SetupError::Request(format!("process.rlimits: {:?} is not a limit", limit.kind))
    })?;
    // The largest number is the kernel's own word for "none".
    let value = |number: u64| (number != u64::MAX).then_some(number);
    let wanted = Limit {
        current: value(limit.soft),
        maximum: value(limit.hard),
    };
    Ok((resource, wanted))
}

struct Sets {
    bounding: CapabilitySet,
    effective: CapabilitySet,
    inheritable: CapabilitySet,
    permitted: CapabilitySet,
    ambient: CapabilitySet,
}

impl From<&Capabilities> for Sets {
    fn from(names: &Capabilities) -> Self {
        Self {
            bounding: set_of(&names.bounding),
            effective: set_of(&names.effective),
            inheritable: set_of(&names.inheritable),
            permitted: set_of(&names.permitted),
            ambient: set_of(&names.ambient),
        }
    }
}

/// OCI runtime specification, `config.md`, "capabilities": a name that maps to nothing is not granted and
/// not an error.
fn set_of(names: &[String]) -> CapabilitySet {
    names
        .iter()
        .filter_map(|name| CapabilitySet::from_name(name.strip_prefix("CAP_")?))
        .collect()
}

impl Sets {
    /// Sets all but the ambient and the bounding one, with some more capabilities.
    fn apply(&self, effective: CapabilitySet, permitted: CapabilitySet) -> Result<(), SetupError> {
        let sets = CapabilitySets {
            effective: self.effective | effective,
            permitted: self.permitted | permitted,
            inheritable: self.inheritable,
        };
        set_capabilities(None, sets).map_err(SetupError::named("cannot set process.capabilities"))
    }
}

fn each() -> impl Iterator<Item = CapabilitySet> {
    (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit))
}

fn drop_bounding(keep: CapabilitySet) -> Result<(), SetupError> {
    for capability in each().filter(|capability| !keep.contains(*capability)) {
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // Past the last one that this kernel knows.
            Err(Errno::INVAL) => break,
            Err(error) => {
                return Err(SetupError::step("cannot reduce the bounding set")(error));
            }
        }
    }
    Ok(())
}

fn set_ambient(set: CapabilitySet) -> Result<(), SetupError> {
    let attempted = || SetupError::named("cannot set process.capabilities.ambient");
    clear_ambient_capability_set().map_err(attempted())?;
    for capability in each().filter(|capability| set.contains(*capability)) {
        configure_capability_in_ambient_set(capability, true).map_err(attempted())?;
    }
    Ok(())
}

/// A process that is not root must be able to open its own pipes again, as `/dev/stdout`.
pub(super) fn give_stream(stream: BorrowedFd<'_>, uid: u32) -> Result<(), SetupError> {
    let stat = fstat(stream).map_err(SetupError::step("cannot look at a standard stream"))?;
    if stat.st_rdev != makedev(1, 3) && stat.st_uid != uid {
        fchown(stream, Some(Uid::from_raw(uid)), None).map_err(SetupError::step(
            "cannot give a standard stream to the user",
        ))?;
    }
    Ok(())
}

fn set_user(process: &Process) -> Result<(), SetupError> {
    let user = &process.user;
    let attempted = || {
        SetupError::named(format!(
            "cannot become user {} of group {}",
            user.uid, user.gid
        ))
    };
    let groups: Vec<_> = user
        .additional_gids
        .iter()
        .copied()
        .map(Gid::from_raw)
        .collect();
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    set_keep_capabilities(true).map_err(attempted())?;
    set_thread_groups(&groups).map_err(attempted())?;
    set_thread_res_gid(gid, gid, gid).map_err(attempted())?;
    set_thread_res_uid(uid, uid, uid).map_err(attempted())?;
    set_keep_capabilities(false).map_err(attempted())?;
    if let Some(umask) = user.umask {
        rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
    }
    Ok(())
}

/// Sets how the kernel picks this process when memory runs out; without a wish, as any process.
pub(super) fn set_oom_score(adjustment: Option<i32>) -> Result<(), SetupError> {
    let text = adjustment.unwrap_or(0).to_string();
    std::fs::OpenOptions::new()
        .write(true)
        .open("/proc/self/oom_score_adj")
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .map_err(SetupError::named(format!(
            "cannot set process.oomScoreAdj to {text}"
        )))
}

fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_STACK" => Resource::Stack,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_known_by_their_names() {
        let names = [
            "CAP_CHOWN",
            "CAP_CHECKPOINT_RESTORE",
            "CAP_OF_THE_FUTURE",
            "chown",
        ];
        let set = set_of(&names.map(str::to_owned));
        assert_eq!(
            set,
            CapabilitySet::CHOWN | CapabilitySet::CHECKPOINT_RESTORE
        );
    }
}

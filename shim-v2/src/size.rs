//! How large a Pod's VM is: pure, from the limits of the Pod and of its containers.
//!
//! What containers may use they must be able to reach, so the guest's own need comes on top
//! (docs/operations.md, "The size of a Pod"). Limits come from the annotations of containerd's CRI plugin
//! (internal/cri/annotations), from the OCI configuration's resources, and from Update.

use oci_spec::runtime::{LinuxResources, Spec};
use std::{collections::BTreeMap, str::FromStr};
use walnut_vmm_api::{MAX_VCPUS, MEMORY_STEP_MIB, MIN_MEMORY_MIB};

/// What the guest's kernel and agent need beside the containers, and one part in so many of the containers'
/// memory for the kernel's own records of each page.
const GUEST_MIB: u64 = 80;
const GUEST_SHARE: u64 = 64;
/// What the VMM needs on the host beside the guest's RAM, and one part in so many of that RAM for its page
/// tables, twice: the host's and KVM's.
const VMM_MIB: u64 = 32;
const VMM_SHARE: u64 = 256;
const MIB: u64 = 1024 * 1024;
const MAX_MILLI: u64 = MAX_VCPUS as u64 * 1000;
const MILLI: u64 = 1000;
/// Shares of an ordinary container, taken for one CPU by the kubelet.
const SHARES: u64 = 1024;
const DEFAULT_PERIOD_US: u64 = 100_000;
const KIND: &str = "io.kubernetes.cri.container-type";
const POD_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const POD_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const POD_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const POD_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";

/// Why there is no size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum SizeError {
    /// An annotation that isn't what containerd writes.
    #[error("annotation {name} {value:?} is not a whole number")]
    Annotation {
        /// Its name.
        name: &'static str,
        /// Its value.
        value: String,
    },
    /// A list that isn't one.
    #[error("linux.resources.cpu.cpus {0:?} is not a list of the host's CPUs")]
    Cpus(String),
    /// Less than any VM needs.
    #[error(
        "the Pod's cgroup on the host allows {room_mib} MiB of memory, but a VM needs {needed_mib} MiB; \
         raise the Pod's limit, or name the overhead in its RuntimeClass"
    )]
    Room {
        /// What the cgroups above allow.
        room_mib: u64,
        /// What the smallest VM takes.
        needed_mib: u64,
    },
}

/// What a container, or a Pod as a whole, may use; what is `None` has no limit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Limits {
    memory_mib: Option<u64>,
    quota_us: Option<u64>,
    period_us: Option<u64>,
    shares: Option<u64>,
    cpus: Option<String>,
    mems: Option<String>,
}

/// What the configuration of a Pod's first container says of sizes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Of the Pod.
    pub(crate) pod: Limits,
    /// Of the container; none for a Pod's pause container, which uses nothing.
    pub(crate) container: Option<Limits>,
}

/// What the node allows and the configuration wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// vCPUs at the least.
    pub(crate) vcpus: u8,
    /// vCPUs at the most.
    pub(crate) max_vcpus: u8,
    /// RAM in MiB of a Pod that nothing limits.
    pub(crate) memory_mib: u32,
    /// RAM in MiB at the most.
    pub(crate) max_memory_mib: u32,
}

/// The size of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    /// vCPUs.
    pub(crate) vcpus: u8,
    /// RAM in MiB.
    pub(crate) memory_mib: u32,
}

/// What the host's cgroup of a VM is set to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct HostLimits {
    /// Guest RAM and the VMM's own need.
    pub(crate) memory_mib: u64,
    /// Of the containers together.
    pub(crate) shares: u64,
    /// The host's CPUs, if every container names some.
    pub(crate) cpus: String,
    /// The host's memory nodes, likewise.
    pub(crate) mems: String,
}

/// The limits of a Pod and of those of its containers that are there.
#[derive(Debug, Default)]
pub(crate) struct Sizing {
    pod: Limits,
    containers: BTreeMap<String, Limits>,
}

impl Limits {
    /// Of a container or an update.
    pub(crate) fn of(resources: &LinuxResources) -> Result<Self, SizeError> {
        let memory = resources
            .memory()
            .as_ref()
            .and_then(|memory| memory.limit());
        let Some(cpu) = resources.cpu() else {
            return Ok(Self {
                memory_mib: memory.and_then(whole_mib),
                ..Self::default()
            });
        };
        let list = |list: &Option<String>| list.clone().filter(|list| !list.is_empty());
        let limits = Self {
            memory_mib: memory.and_then(whole_mib),
            quota_us: cpu.quota().and_then(positive),
            period_us: cpu.period().filter(|period| *period > 0),
            shares: cpu.shares().filter(|shares| *shares > 0),
            cpus: list(cpu.cpus()),
            mems: list(cpu.mems()),
        };
        match &limits.cpus {
            Some(cpus) if count_of(cpus).is_none() => Err(SizeError::Cpus(cpus.clone())),
            _ => Ok(limits),
        }
    }

    fn of_pod(annotations: &std::collections::HashMap<String, String>) -> Result<Self, SizeError> {
        Ok(Self {
            memory_mib: number::<i64>(annotations, POD_MEMORY)?.and_then(whole_mib),
            quota_us: number::<i64>(annotations, POD_QUOTA)?.and_then(positive),
            period_us: number::<u64>(annotations, POD_PERIOD)?.filter(|period| *period > 0),
            shares: number::<u64>(annotations, POD_SHARES)?.filter(|shares| *shares > 0),
            ..Self::default()
        })
    }

    /// These limits after an update, in which what isn't named stays; -1 takes a limit away.
    pub(crate) fn updated(&self, update: &LinuxResources) -> Result<Self, SizeError> {
        let new = Self::of(update)?;
        let memory = update.memory().as_ref().and_then(|memory| memory.limit());
        let quota = update.cpu().as_ref().and_then(|cpu| cpu.quota());
        let unless = |gone: bool, limit: Option<u64>| limit.filter(|_| !gone);
        let is_gone = |value: Option<i64>| value.is_some_and(|value| value < 0);
        Ok(Self {
            memory_mib: new.memory_mib.or(unless(is_gone(memory), self.memory_mib)),
            quota_us: new.quota_us.or(unless(is_gone(quota), self.quota_us)),
            period_us: new.period_us.or(self.period_us),
            shares: new.shares.or(self.shares),
            cpus: new.cpus.or_else(|| self.cpus.clone()),
            mems: new.mems.or_else(|| self.mems.clone()),
        })
    }

    /// Thousandths of a CPU: by quota, else by the number of CPUs, else by shares, which are what was asked for.
    fn cpu_milli(&self) -> u64 {
        let by_quota = self.quota_us.map(|quota| {
            let period = self.period_us.unwrap_or(DEFAULT_PERIOD_US);
            quota.saturating_mul(MILLI).div_ceil(period)
        });
        let by_list = || {
            let count = self.cpus.as_deref().and_then(count_of)?;
            Some(count.saturating_mul(MILLI))
        };
        let by_shares = || {
            let shares = self.shares?;
            Some(shares.saturating_mul(MILLI) / SHARES)
        };
        let milli = by_quota.or_else(by_list).or_else(by_shares);
        milli.unwrap_or(0).min(MAX_MILLI)
    }
}

impl Wanted {
    /// Reads what the configuration of a container says.
    pub(crate) fn of(spec: &Spec) -> Result<Self, SizeError> {
        let none = std::collections::HashMap::new();
        let annotations = spec.annotations().as_ref().unwrap_or(&none);
        let is_pause = annotations.get(KIND).is_some_and(|kind| kind == "sandbox");
        let resources = spec
            .linux()
            .as_ref()
            .and_then(|linux| linux.resources().as_ref());
        let container = resources.map_or(Ok(Limits::default()), Limits::of)?;
        Ok(Self {
            pod: Limits::of_pod(annotations)?,
            container: (!is_pause).then_some(container),
        })
    }
}

impl Sizing {
    /// A Pod with its first container.
    pub(crate) fn new(pod: Limits) -> Self {
        Self {
            pod,
            containers: BTreeMap::new(),
        }
    }

    /// A container's limits from now on; answers what they were.
    pub(crate) fn set(&mut self, id: &str, limits: Limits) -> Option<Limits> {
        self.containers.insert(id.to_owned(), limits)
    }

    /// Forgets a container.
    pub(crate) fn forget(&mut self, id: &str) {
        self.containers.remove(id);
    }

    /// The limits after an update of a container, or of the Pod by its pause container.
    pub(crate) fn updated(&self, id: &str, update: &LinuxResources) -> Result<Limits, SizeError> {
        self.containers.get(id).unwrap_or(&self.pod).updated(update)
    }

    /// Takes over what [`Sizing::updated`] answered; answers what it was.
    pub(crate) fn replace(&mut self, id: &str, limits: Limits) -> Limits {
        let place = self.containers.get_mut(id).unwrap_or(&mut self.pod);
        std::mem::replace(place, limits)
    }

    /// The size that the limits ask for, within the bounds and within `room_mib` of the host's cgroups.
    pub(crate) fn size(&self, bounds: &Bounds, room_mib: Option<u64>) -> Result<Size, SizeError> {
        let milli = self.sum(|limits| Some(limits.cpu_milli()));
        let vcpus = u8::try_from(milli.div_ceil(MILLI)).unwrap_or(MAX_VCPUS);
        let most = u64::from(bounds.max_memory_mib);
        let mut mib = self.wanted_mib(bounds).min(most);
        if let Some(room_mib) = room_mib {
            let room = room_mib.saturating_sub(VMM_MIB);
            let fits = room - room.div_ceil(VMM_SHARE + 1);
            if fits < u64::from(MIN_MEMORY_MIB) {
                let needed_mib = host_mib(MIN_MEMORY_MIB.into());
                return Err(SizeError::Room {
                    room_mib,
                    needed_mib,
                });
            }
            mib = mib.min(fits);
        }
        // RAM comes in pieces of two MiB.
        let mib = u32::try_from(mib & !1).unwrap_or(bounds.max_memory_mib);
        Ok(Size {
            vcpus: vcpus.max(bounds.vcpus).min(bounds.max_vcpus),
            memory_mib: mib.max(MIN_MEMORY_MIB),
        })
    }

    fn wanted_mib(&self, bounds: &Bounds) -> u64 {
        let limited = self.sum(|limits| limits.memory_mib);
        let unlimited = |limits: &Limits| limits.memory_mib.is_none();
        let for_others = match self.containers.values().any(unlimited) {
            // A Pod that declares its memory has containers to come; one that has neither is its pause container.
            false if limited > 0 => 0,
            _ => u64::from(bounds.memory_mib),
        };
        match limited {
            0 => for_others,
            // A multiple of two.
            _ => (GUEST_MIB + limited + limited / GUEST_SHARE + for_others + 1) & !1,
        }
    }

    /// The containers' sum, or what the Pod says if that is more.
    fn sum(&self, figure: impl Fn(&Limits) -> Option<u64>) -> u64 {
        let each = self.containers.values().filter_map(&figure);
        let sum = each.fold(0u64, u64::saturating_add);
        sum.max(figure(&self.pod).unwrap_or(0))
    }

    /// What the host's cgroup shall be set to for a VM of that size.
    pub(crate) fn host(&self, size: Size) -> HostLimits {
        let all = |list: fn(&Limits) -> Option<&String>| {
            let lists: Option<Vec<&str>> = self
                .containers
                .values()
                .map(|limits| list(limits).map(String::as_str))
                .collect();
            // The kernel takes a list in which numbers come twice.
            lists.unwrap_or_default().join(",")
        };
        HostLimits {
            memory_mib: host_mib(size.memory_mib.into()),
            shares: self.sum(|limits| limits.shares),
            cpus: all(|limits| limits.cpus.as_ref()),
            mems: all(|limits| limits.mems.as_ref()),
        }
    }
}

/// RAM to which a VM that boots with `memory_mib` can grow: as near to the bound as the VMM can.
pub(crate) fn reserve_mib(memory_mib: u32, bounds: &Bounds) -> u32 {
    let more = bounds.max_memory_mib.saturating_sub(memory_mib);
    memory_mib + more / MEMORY_STEP_MIB * MEMORY_STEP_MIB
}

/// Guest RAM with what the VMM needs beside it.
fn host_mib(guest_mib: u64) -> u64 {
    guest_mib + VMM_MIB + guest_mib.div_ceil(VMM_SHARE)
}

/// How many CPUs a list like `0-3,8` names.
pub(crate) fn count_of(list: &str) -> Option<u64> {
    list.trim().split(',').try_fold(0u64, |count, part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<u64>().ok()?, last.parse::<u64>().ok()?);
        count.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

fn number<T: FromStr>(
    annotations: &std::collections::HashMap<String, String>,
    name: &'static str,
) -> Result<Option<T>, SizeError> {
    let Some(value) = annotations.get(name) else {
        return Ok(None);
    };
    let wrong = |_| SizeError::Annotation {
        name,
        value: value.clone(),
    };
    value.parse().map(Some).map_err(wrong)
}

/// 0 and -1 are no limit.
fn positive(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

fn whole_mib(bytes: i64) -> Option<u64> {
    positive(bytes).map(|bytes| bytes.div_ceil(MIB))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: Bounds = Bounds {
        vcpus: 1,
        max_vcpus: 8,
        memory_mib: 256,
        max_memory_mib: 16_384,
    };

    fn limits(json: &str) -> Limits {
        Limits::of(&serde_json::from_str(json).unwrap()).unwrap()
    }

    fn wanted(annotations: &str, resources: &str) -> Result<Wanted, SizeError> {
        let spec = format!(
            r#"{{"ociVersion":"1.2.0","annotations":{annotations},"linux":{{"resources":{resources}}}}}"#
        );
        Wanted::of(&serde_json::from_str(&spec).unwrap())
    }

    fn size(pod: Limits, containers: &[Limits]) -> (u8, u32) {
        let mut sizing = Sizing::new(pod);
        for (number, limits) in containers.iter().enumerate() {
            sizing.set(&number.to_string(), limits.clone());
        }
        let size = sizing.size(&BOUNDS, None).unwrap();
        (size.vcpus, size.memory_mib)
    }

    fn gib(number: u64) -> Limits {
        limits(&format!(r#"{{"memory":{{"limit":{}}}}}"#, number << 30))
    }

    #[test]
    fn the_guests_need_comes_on_top_of_limits() {
        let none = Limits::default;
        assert_eq!(size(none(), &[none()]), (1, 256));
        assert_eq!(size(none(), &[]), (1, 256), "a pause container alone");
        assert_eq!(size(none(), &[gib(1)]), (1, 1024 + 16 + 80));
        assert_eq!(size(none(), &[gib(1), gib(1)]), (1, 2048 + 32 + 80));
        assert_eq!(size(gib(2), &[gib(1)]), (1, 2048 + 32 + 80));
        assert_eq!(size(gib(1), &[]), (1, 1024 + 16 + 80));
        assert_eq!(size(gib(1), &[gib(1), none()]), (1, 1024 + 16 + 80 + 256));
        assert_eq!(size(none(), &[gib(1000)]), (1, 16_384));
    }

    #[test]
    fn cpus_come_from_quotas_lists_and_shares() {
        for (cpu, vcpus) in [
            (r#"{"quota":50000,"period":100000}"#, 1),
            (r#"{"quota":250000}"#, 3),
            (r#"{"quota":-1,"cpus":"0-1,4"}"#, 3),
            (r#"{"shares":2048}"#, 2),
            (r#"{"shares":2,"quota":0}"#, 1),
            (r#"{"quota":100000000}"#, 8),
        ] {
            let limits = limits(&format!(r#"{{"cpu":{cpu}}}"#));
            assert_eq!(size(Limits::default(), &[limits]).0, vcpus, "{cpu}");
        }
    }

    #[test]
    fn a_pods_annotations_are_read_and_a_wrong_one_is_named() {
        let annotations = r#"{"io.kubernetes.cri.container-type":"sandbox",
            "io.kubernetes.cri.sandbox-memory":"1073741824","io.kubernetes.cri.sandbox-cpu-quota":"200000",
            "io.kubernetes.cri.sandbox-cpu-period":"100000","io.kubernetes.cri.sandbox-cpu-shares":"2"}"#;
        let Wanted { pod, container } = wanted(annotations, "{}").unwrap();
        assert_eq!(container, None);
        assert_eq!(size(pod, &[]), (2, 1024 + 16 + 80));
        let wrong = r#"{"io.kubernetes.cri.sandbox-memory":"1Gi"}"#;
        let error = wanted(wrong, "{}").unwrap_err().to_string();
        assert!(error.contains("sandbox-memory \"1Gi\""), "{error}");
        let error = wanted("{}", r#"{"cpu":{"cpus":"3-1"}}"#).unwrap_err();
        assert_eq!(error, SizeError::Cpus("3-1".into()));
    }

    #[test]
    fn an_update_changes_what_it_names() {
        let mut sizing = Sizing::new(Limits::default());
        sizing.set(
            "c",
            limits(r#"{"memory":{"limit":1073741824},"cpu":{"quota":200000}}"#),
        );
        let mut apply = |id: &str, update: &str| {
            let update = serde_json::from_str(update).unwrap();
            let limits = sizing.updated(id, &update).unwrap();
            sizing.replace(id, limits);
            let size = sizing.size(&BOUNDS, None).unwrap();
            (size.vcpus, size.memory_mib)
        };
        assert_eq!(apply("c", r#"{"cpu":{"shares":2}}"#), (2, 1120));
        assert_eq!(apply("c", r#"{"memory":{"limit":2147483648}}"#), (2, 2160));
        assert_eq!(apply("c", r#"{"memory":{"limit":-1}}"#), (2, 256));
        assert_eq!(apply("pod", r#"{"cpu":{"quota":300000}}"#), (3, 256));
    }

    #[test]
    fn a_vm_fits_into_its_pods_cgroup_or_says_why_not() {
        let mut sizing = Sizing::new(Limits::default());
        sizing.set("c", gib(1));
        let size = sizing.size(&BOUNDS, Some(1024)).unwrap();
        assert!((980..1024).contains(&size.memory_mib), "{size:?}");
        assert!(sizing.host(size).memory_mib <= 1024);
        let error = sizing.size(&BOUNDS, Some(100)).unwrap_err().to_string();
        assert!(
            error.contains("100 MiB") && error.contains("129"),
            "{error}"
        );
    }

    #[test]
    fn the_hosts_cpus_are_bound_when_all_containers_name_some() {
        let mut sizing = Sizing::new(Limits::default());
        sizing.set("a", limits(r#"{"cpu":{"cpus":"0-1","shares":100}}"#));
        sizing.set("b", limits(r#"{"cpu":{"cpus":"3","shares":50}}"#));
        let size = sizing.size(&BOUNDS, None).unwrap();
        let host = sizing.host(size);
        assert_eq!((host.cpus.as_str(), host.shares), ("0-1,3", 150));
        sizing.set("c", Limits::default());
        assert_eq!(sizing.host(size).cpus, "");
        sizing.forget("a");
    }

    proptest! {
        #[test]
        fn every_size_is_one_that_the_vmm_takes(
            memory in any::<i64>(),
            quota in any::<i64>(),
            period in any::<u64>(),
            shares in any::<u64>(),
            room in proptest::option::of(any::<u64>()),
        ) {
            let json = serde_json::json!({
                "memory": { "limit": memory },
                "cpu": { "quota": quota, "period": period, "shares": shares },
            });
            let mut sizing = Sizing::new(Limits::default());
            sizing.set("c", limits(&json.to_string()));
            if let Ok(size) = sizing.size(&BOUNDS, room) {
                prop_assert!((1..=8).contains(&size.vcpus));
                prop_assert!((MIN_MEMORY_MIB..=16_384).contains(&size.memory_mib));
                prop_assert!(size.memory_mib.is_multiple_of(2));
                prop_assert!(room.is_none_or(|room| sizing.host(size).memory_mib <= room));
                let most = reserve_mib(size.memory_mib, &BOUNDS);
                prop_assert!(most <= 16_384 && (most - size.memory_mib).is_multiple_of(MEMORY_STEP_MIB));
            }
        }

        #[test]
        fn any_list_is_counted_or_not(list in "[-0-9,]{0,12}") {
            let _ = count_of(&list);
        }
    }
}

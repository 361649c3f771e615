//! The host's kernel: what it needs to have, and what it should be set to.

use super::{Finding, Root, Subject};

const CGROUP: Subject = Subject {
    id: "cgroup",
    why: "a Pod's limits on the host are those of its cgroup",
};
const VHOST_NET: Subject = Subject {
    id: "vhost-net",
    why: "without it each packet goes through the VMM, which takes more of the processor",
};
const FAVORDYNMODS: Subject = Subject {
    id: "favordynmods",
    why: "without it, joining a cgroup waits for the kernel's readers, some milliseconds of each Pod's start",
};
const VULNERABILITIES: Subject = Subject {
    id: "vulnerabilities",
    why: "where the processor leaks, a guest can read what the host or another Pod left in it",
};
const SMT: Subject = Subject {
    id: "smt",
    why: "two threads of a core share caches and buffers: Pods on them can spy on each other",
};
const NESTED: Subject = Subject {
    id: "nested",
    why: "guests are not told of it, but its code is in the way of an attack and has had faults of its own",
};
const NX_HUGE_PAGES: Subject = Subject {
    id: "nx-huge-pages",
    why: "on some processors a guest that executes huge pages can stop the host (CVE-2018-12207)",
};
const KSM: Subject = Subject {
    id: "ksm",
    why: "pages that are merged tell by their timing what another Pod has in memory (no VMM of Walnut asks for it)",
};
const SWAP: Subject = Subject {
    id: "swap",
    why: "a guest's memory, keys included, is written to a disk and stays there",
};

/// What Pods need.
pub(super) fn look(root: &Root) -> Vec<Finding> {
    let cgroup = match root.has("/sys/fs/cgroup/cgroup.controllers") {
        true => CGROUP.pass("cgroup v2 is mounted at /sys/fs/cgroup"),
        false => CGROUP.warn(
            "no cgroup v2 at /sys/fs/cgroup",
            "boot with systemd.unified_cgroup_hierarchy=1; with v1, VMMs are limited in each hierarchy",
        ),
    };
    let vhost = match root.has("/dev/vhost-net") {
        true => VHOST_NET.pass("/dev/vhost-net is there"),
        false => VHOST_NET.warn("there is no /dev/vhost-net", "modprobe vhost_net"),
    };
    vec![cgroup, vhost]
}

/// What it should be set to.
pub(super) fn hardening(root: &Root) -> Vec<Finding> {
    vec![
        vulnerabilities(root),
        smt(root),
        nested(root),
        nx_huge_pages(root),
        ksm(root),
        swap(root),
        favordynmods(root),
    ]
}

fn vulnerabilities(root: &Root) -> Finding {
    let folder = "/sys/devices/system/cpu/vulnerabilities";
    let names = root.names(folder);
    if names.is_empty() {
        return VULNERABILITIES.warn(
            format!("the kernel tells nothing in {folder}"),
            "use a kernel that knows its processor's faults",
        );
    }
    let (mut open, mut partly) = (Vec::new(), Vec::new());
    for name in &names {
        let text = root.text(format!("{folder}/{name}")).unwrap_or_default();
        // `Mitigation: …; SMT vulnerable` leaves a part open; `SMT Host state unknown` is of a virtual host.
        if text.starts_with("Vulnerable") || text.starts_with("KVM: Vulnerable") {
            open.push(format!("{name} ({text})"));
        } else if text.is_empty() || text.starts_with("Unknown") || text.contains("ulnerable") {
            partly.push(format!("{name} ({text})"));
        }
    }
    if !open.is_empty() {
        return VULNERABILITIES.fail(
            format!("open: {}", open.join("; ")),
            "update the kernel and the processor's microcode, and boot without mitigations=off",
        );
    }
    if !partly.is_empty() {
        return VULNERABILITIES.warn(
            format!("in part open: {}", partly.join("; ")),
            "update the processor's microcode; where SMT is named, boot with nosmt",
        );
    }
    VULNERABILITIES.pass(format!("none of {} known ones is open", names.len()))
}

fn smt(root: &Root) -> Finding {
    let folder = "/sys/devices/system/cpu/smt";
    match root.text(format!("{folder}/active")).as_deref() {
        Some("0") | None => SMT.pass("no two threads share a core"),
        Some(_) => SMT.warn(
            "threads share cores",
            format!(
                "boot with nosmt, or echo off > {folder}/control; or give each Pod whole cores"
            ),
        ),
    }
}

fn nested(root: &Root) -> Finding {
    let modules = ["kvm_intel", "kvm_amd"];
    let found = modules.iter().find_map(|module| {
        let value = root.text(format!("/sys/module/{module}/parameters/nested"))?;
        Some((module, value))
    });
    match found {
        Some((module, value)) if value == "Y" || value == "1" => NESTED.warn(
            format!("guests' own guests are switched on in {module}"),
            format!("modprobe {module} with nested=0, unless other machines here need it"),
        ),
        Some((module, _)) => NESTED.pass(format!("switched off in {module}")),
        None => NESTED.pass("KVM has no such setting here"),
    }
}

fn nx_huge_pages(root: &Root) -> Finding {
    let file = "/sys/module/kvm/parameters/nx_huge_pages";
    let fault = root.text("/sys/devices/system/cpu/vulnerabilities/itlb_multihit");
    let is_safe = fault.as_deref() == Some("Not affected");
    match root.text(file).as_deref() {
        Some("Y" | "1") => NX_HUGE_PAGES.pass("huge pages of guests are not executable"),
        _ if is_safe => NX_HUGE_PAGES.pass("this processor is not affected"),
        Some(value) => NX_HUGE_PAGES.fail(
            format!("{file} is {value}, and this processor may be affected"),
            "boot with kvm.nx_huge_pages=force",
        ),
        None => NX_HUGE_PAGES.warn(
            format!("{file} cannot be read"),
            "modprobe kvm; boot with kvm.nx_huge_pages=force",
        ),
    }
}

fn ksm(root: &Root) -> Finding {
    match root.text("/sys/kernel/mm/ksm/run").as_deref() {
        Some("1") => KSM.warn("equal pages are merged", "echo 2 > /sys/kernel/mm/ksm/run"),
        _ => KSM.pass("no pages are merged"),
    }
}

fn swap(root: &Root) -> Finding {
    let swaps = root.text("/proc/swaps").unwrap_or_default();
    // Below a heading; memory that is compressed in place is none.
    let names = swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next());
    let names: Vec<&str> = names
        .filter(|name| !name.starts_with("/dev/zram"))
        .collect();
    match names.is_empty() {
        true => SWAP.pass("no memory goes to a disk"),
        false => SWAP.warn(
            format!("memory goes to {}", names.join(", ")),
            "swapoff -a, encrypt it, or set memory.swap.max of the Pods' cgroup to 0",
        ),
    }
}

fn favordynmods(root: &Root) -> Finding {
    let mounts = root.text("/proc/mounts").unwrap_or_default();
    let options = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (place, kind) = (words.next()?, words.next()?);
        (place == "/sys/fs/cgroup" && kind == "cgroup2").then(|| words.next())?
    });
    let is_on = options.is_some_and(|options| options.split(',').any(|one| one == "favordynmods"));
    match (options, is_on) {
        (Some(_), false) => FAVORDYNMODS.warn(
            "/sys/fs/cgroup is mounted without favordynmods",
            "mount -o remount,favordynmods /sys/fs/cgroup, or cgroup_favordynmods on the kernel's command line",
        ),
        (Some(_), true) => FAVORDYNMODS.pass("/sys/fs/cgroup is mounted with favordynmods"),
        (None, _) => FAVORDYNMODS.pass("only cgroup v2 has it"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Grade,
        tests::{grade, machine},
    };
    use super::*;

    const V: &str = "sys/devices/system/cpu/vulnerabilities";

    #[test]
    fn a_machine_that_is_set_up_badly_is_told_each_thing() {
        let (_folder, root) = machine(&[
            (
                &format!("{V}/mds"),
                "Mitigation: Clear CPU buffers; SMT vulnerable\n",
            ),
            (&format!("{V}/itlb_multihit"), "KVM: Vulnerable\n"),
            ("sys/devices/system/cpu/smt/active", "1\n"),
            ("sys/module/kvm_intel/parameters/nested", "Y\n"),
            ("sys/module/kvm/parameters/nx_huge_pages", "N\n"),
            ("sys/kernel/mm/ksm/run", "1\n"),
            (
                "proc/swaps",
                "Filename Type Size\n/dev/sda2 partition 100\n/dev/zram0 partition 5\n",
            ),
            (
                "proc/mounts",
                "cgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n",
            ),
        ]);
        let findings = hardening(&root);
        for (id, expected) in [
            ("vulnerabilities", Grade::Fail),
            ("smt", Grade::Warn),
            ("nested", Grade::Warn),
            ("nx-huge-pages", Grade::Fail),
            ("ksm", Grade::Warn),
            ("swap", Grade::Warn),
            ("favordynmods", Grade::Warn),
        ] {
            assert_eq!(grade(&findings, id), expected, "{id}");
        }
        assert!(swap(&root).what.ends_with("/dev/sda2"));
        let what = vulnerabilities(&root).what;
        assert_eq!(what, "open: itlb_multihit (KVM: Vulnerable)");
    }

    #[test]
    fn a_machine_that_is_set_up_well_passes() {
        let (_folder, root) = machine(&[
            (
                &format!("{V}/mds"),
                "Mitigation: Clear CPU buffers; SMT disabled\n",
            ),
            (&format!("{V}/itlb_multihit"), "Not affected\n"),
            ("sys/devices/system/cpu/smt/active", "0\n"),
            ("sys/module/kvm_amd/parameters/nested", "0\n"),
            ("sys/module/kvm/parameters/nx_huge_pages", "N\n"),
            ("sys/kernel/mm/ksm/run", "0\n"),
            ("proc/swaps", "Filename Type Size\n"),
            (
                "proc/mounts",
                "cgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate,favordynmods 0 0\n",
            ),
            ("sys/fs/cgroup/cgroup.controllers", "cpu memory\n"),
            ("dev/vhost-net", ""),
        ]);
        for finding in look(&root).into_iter().chain(hardening(&root)) {
            assert_eq!(finding.result, Grade::Pass, "{finding:?}");
        }
    }

    #[test]
    fn what_is_open_in_part_is_no_failure() {
        let text = "Mitigation: Clear CPU buffers; SMT vulnerable\n";
        let (_folder, root) = machine(&[(&format!("{V}/mds"), text)]);
        assert_eq!(vulnerabilities(&root).result, Grade::Warn);
    }
}

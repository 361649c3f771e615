//! VMMs that run: that each of their threads is confined, as the kernel says. proc(5).

use super::{Finding, Root, Subject};

const NAME: &str = "walnut-vmm";
/// docs/threat-model.md: the capabilities of a VMM with a share, all over files of that share.
const MOST_CAPABILITIES: u64 = 0x8800_00df;
/// The kernel's own threads in a VMM, which run none of its code.
const OF_KERNEL: [&str; 2] = ["kvm-nx-lpage-re", "iou-wrk-"];

const SUBJECT: Subject = Subject {
    id: "vmms",
    why: "a guest that takes its VMM over finds itself in a jail: without it, on the host",
};

pub(super) fn look(root: &Root) -> Finding {
    let processes = root.names("/proc").into_iter();
    let processes = processes.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    let vmms = processes.filter(|pid| {
        let name = root.text(format!("/proc/{pid}/comm"));
        name.is_some_and(|name| name == NAME)
    });
    let vmms: Vec<String> = vmms.collect();
    let faults = vmms.iter().flat_map(|pid| faults(root, pid));
    let faults: Vec<String> = faults.collect();
    if !faults.is_empty() {
        return SUBJECT.fail(
            faults.join("; "),
            "a shim confines its VMM before the guest runs: see who started these, and end them",
        );
    }
    match vmms.len() {
        0 => SUBJECT.pass("none runs"),
        count => SUBJECT.pass(format!(
            "{count} run, each thread under a filter, without new privileges, with no more capabilities than a share needs"
        )),
    }
}

fn faults(root: &Root, pid: &str) -> Vec<String> {
    let tasks = format!("/proc/{pid}/task");
    let threads = root.names(&tasks).into_iter();
    let faults = threads.filter_map(|thread| {
        // A thread that has ended meanwhile has no status.
        let status = root.text(format!("{tasks}/{thread}/status"))?;
        fault(&status).map(|fault| format!("{NAME} {pid}, thread {thread} {fault}"))
    });
    faults.collect()
}

/// What is wrong with a thread of that status.
fn fault(status: &str) -> Option<String> {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.strip_prefix(':'))
            .map_or("", str::trim)
    };
    let name = field("Name");
    if OF_KERNEL.iter().any(|kernel| name.starts_with(kernel)) {
        return None;
    }
    let capabilities = u64::from_str_radix(field("CapPrm"), 16).unwrap_or(u64::MAX);
    match (field("Seccomp"), field("NoNewPrivs")) {
        ("2", "1") if capabilities & !MOST_CAPABILITIES == 0 => None,
        ("2", "1") => Some(format!("({name}) has capabilities {capabilities:016x}")),
        ("2", _) => Some(format!("({name}) can gain privileges")),
        (mode, _) => Some(format!("({name}) has no filter: Seccomp is {mode:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Grade, tests::machine};
    use super::*;

    fn status(name: &str, seccomp: &str, privileges: &str, capabilities: &str) -> String {
        format!(
            "Name:\t{name}\nCapPrm:\t{capabilities}\nNoNewPrivs:\t{privileges}\nSeccomp:\t{seccomp}\n"
        )
    }

    #[test]
    fn each_thread_of_each_vmm_is_looked_at() {
        let good = status("vcpu0", "2", "1", "00000000880000df");
        let kernel = status("iou-wrk-7", "0", "0", "0000000000000000");
        let bad = status("vcpu1", "0", "1", "0000000000000000");
        let (_folder, root) = machine(&[
            ("proc/7/comm", "walnut-vmm\n"),
            ("proc/7/task/7/status", &good),
            ("proc/7/task/8/status", &kernel),
            ("proc/9/comm", "sh\n"),
        ]);
        assert_eq!(look(&root).result, Grade::Pass);
        let (_folder, root) = machine(&[
            ("proc/7/comm", "walnut-vmm\n"),
            ("proc/7/task/7/status", &good),
            ("proc/7/task/8/status", &bad),
        ]);
        let finding = look(&root);
        assert_eq!(finding.result, Grade::Fail);
        let words = "walnut-vmm 7, thread 8 (vcpu1) has no filter: Seccomp is \"0\"";
        assert_eq!(finding.what, words);
    }

    #[test]
    fn a_thread_must_have_every_confinement() {
        assert_eq!(fault(&status("a", "2", "1", "0000000000000000")), None);
        for status in [
            status("a", "1", "1", "0"),
            status("a", "2", "0", "0"),
            status("a", "2", "1", "000001ffffffffff"),
            String::new(),
        ] {
            assert!(fault(&status).is_some(), "{status}");
        }
    }
}

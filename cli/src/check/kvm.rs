//! Whether KVM can be used, found out by using it. Must not trust that its device exists.

use super::{Finding, Root, Subject};
use kvm_ioctls::{Cap, Kvm};
use std::{ffi::CString, io};

const DEVICE: &str = "/dev/kvm";
const VERSION: i32 = 12;

/// What `walnut-vmm` asks for when it starts.
const EXTENSIONS: [(Cap, &str); 6] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
];

const KVM: Subject = Subject {
    id: "kvm",
    why: "every Pod is a virtual machine of KVM's",
};

pub(super) fn look(root: &Root) -> Finding {
    let path = root.at(DEVICE);
    let opened =
        CString::new(path.to_string_lossy().as_bytes()).map(|path| Kvm::new_with_path(&path));
    let kvm = match opened {
        Ok(Ok(kvm)) => kvm,
        Ok(Err(error)) => {
            let kind = io::Error::from_raw_os_error(error.errno()).kind();
            let remedy = match kind {
                io::ErrorKind::NotFound => {
                    "modprobe kvm-intel or kvm-amd; switch virtualization on in the firmware, or nested \
                     virtualization for this machine if it is itself virtual"
                }
                _ => "run this as root",
            };
            return KVM.fail(format!("{DEVICE} cannot be opened: {error}"), remedy);
        }
        Err(_) => return KVM.fail("the root has a zero byte in its name", "name another one"),
    };
    let version = kvm.get_api_version();
    if version != VERSION {
        let what = format!("KVM_GET_API_VERSION answers {version} instead of {VERSION}");
        return KVM.fail(what, "use the kernel's own KVM");
    }
    let missing = EXTENSIONS
        .iter()
        .filter(|(cap, _)| !kvm.check_extension(*cap));
    let missing: Vec<&str> = missing.map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        let what = format!("KVM has no {}", missing.join(", "));
        return KVM.fail(what, "use a kernel with all of KVM for x86-64");
    }
    match run(&kvm) {
        Ok(()) => KVM.pass("a virtual processor runs; KVM has all that the VMM needs"),
        Err((step, error)) => KVM.fail(
            format!("cannot {step}: {error}"),
            "look into the kernel's log; where this machine is itself virtual, its host must offer nested virtualization",
        ),
    }
}

/// Lets a processor run that has no memory at all: it comes back at once, but it has been there.
fn run(kvm: &Kvm) -> Result<(), (&'static str, kvm_ioctls::Error)> {
    let vm = kvm
        .create_vm()
        .map_err(|error| ("make a virtual machine", error))?;
    let vcpu = vm.create_vcpu(0);
    let mut vcpu = vcpu.map_err(|error| ("make a virtual processor", error))?;
    vcpu.run()
        .map_err(|error| ("run a virtual processor", error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::{Grade, tests::machine};
    use super::*;

    #[test]
    fn a_device_that_is_a_file_is_not_kvm() {
        let (_folder, root) = machine(&[("dev/kvm", "")]);
        let finding = look(&root);
        assert_eq!(finding.result, Grade::Fail, "{finding:?}");
        let (_folder, root) = machine(&[]);
        assert!(look(&root).what.starts_with("/dev/kvm cannot be opened"));
    }

    /// The two can't share it: the command doesn't know the VMM, and their contracts don't know KVM.
    #[test]
    fn the_vmm_asks_for_the_same() {
        let vmm = include_str!("../../../vmm/src/vm.rs");
        for (_, name) in EXTENSIONS {
            assert!(vmm.contains(&format!("\"{name}\"")), "{name}");
        }
        assert_eq!(vmm.matches("\"KVM_CAP_").count(), EXTENSIONS.len());
    }
}

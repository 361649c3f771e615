//! How `walnut-vmm` ends, as its parent sees it.
//!
//! Must not hold what a guest said: the console's tail goes to standard error, bounded.

/// Bytes of the console that the VMM keeps and writes to its standard error when the guest fails.
pub const CONSOLE_TAIL_BYTES: usize = 4096;

/// The VMM's exit statuses. A status that is not listed, or a signal, is a fault of the VMM itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum VmmExit {
    /// The guest powered off (ACPI S5), or [`crate::Request::Stop`] was obeyed.
    Ended = 0,
    /// The arguments or the inherited socket are not as this contract says.
    Usage = 64,
    /// The configuration was refused or the VM could not be built from it.
    Setup = 65,
    /// The guest asked for a reset (i8042 or the ACPI reset register). The guest kernel is booted with
    /// `panic=-1`, and the agent never resets: this is a kernel panic.
    GuestReset = 66,
    /// The guest's processor gave up (triple fault, `KVM_EXIT_SHUTDOWN`).
    TripleFault = 67,
    /// KVM could not run the guest (`KVM_EXIT_INTERNAL_ERROR`, `KVM_EXIT_FAIL_ENTRY`, or an unexpected exit).
    Vcpu = 68,
    /// A device thread or the control socket failed.
    Device = 69,
}

impl VmmExit {
    /// The process exit status.
    pub fn code(self) -> u8 {
        match self {
            Self::Ended => 0,
            Self::Usage => 64,
            Self::Setup => 65,
            Self::GuestReset => 66,
            Self::TripleFault => 67,
            Self::Vcpu => 68,
            Self::Device => 69,
        }
    }

    /// What a process exit status means; `None` when the VMM never ends so by itself.
    pub fn from_code(code: i32) -> Option<Self> {
        [
            Self::Ended,
            Self::Usage,
            Self::Setup,
            Self::GuestReset,
            Self::TripleFault,
            Self::Vcpu,
            Self::Device,
        ]
        .into_iter()
        .find(|exit| i32::from(exit.code()) == code)
    }

    /// One line for people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Ended => "the guest powered off",
            Self::Usage => "walnut-vmm was started wrongly",
            Self::Setup => "the VM could not be built",
            Self::GuestReset => "the guest kernel panicked",
            Self::TripleFault => "the guest's processor shut down (triple fault)",
            Self::Vcpu => "KVM could not run the guest",
            Self::Device => "a device of the VMM failed",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_survives_the_way_through_the_process_exit_code() {
        for code in 0..=255 {
            if let Some(exit) = VmmExit::from_code(code) {
                assert_eq!(i32::from(exit.code()), code);
            }
        }
        assert_eq!(VmmExit::from_code(66), Some(VmmExit::GuestReset));
        assert_eq!(VmmExit::from_code(1), None);
    }
}

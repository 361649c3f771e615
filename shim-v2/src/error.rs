//! The one table from errors to ttrpc codes, and how an error becomes one line of text.
//!
//! containerd maps the codes to its own errors (its `errdefs` package); its clients print the message.

use crate::{
    agent::AgentError, blocks::BlocksError, config::ConfigError, hooks::HookError, io::IoError,
    machine::MachineError, network::NetworkError, pod_config::PodConfigError,
    runtime_options::OptionsError, size::SizeError, spec::SpecError, storage::StorageError,
    vm::VmError,
};
use std::{error::Error, path::PathBuf};
use ttrpc::Code;
use walnut_vmm_api::FailureKind;

/// Longest message of a call's error.
const MAX_MESSAGE_BYTES: usize = 4 * 1024;

/// Why a call fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShimError {
    /// No such container.
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    /// No such process.
    #[error("process {exec_id:?} of container {id:?} does not exist")]
    NoProcess {
        /// The container.
        id: String,
        /// The process.
        exec_id: String,
    },
    /// No such sandbox, or none of the Sandbox API.
    #[error("sandbox {0:?} does not exist")]
    NoSandbox(String),
    /// A container, process or sandbox of that name is there.
    #[error("{what} {id:?} already exists")]
    Exists {
        /// Which of them.
        what: &'static str,
        /// Its name.
        id: String,
    },
    /// Not possible in the present state.
    #[error("cannot {action} {id:?}: it is {state}")]
    State {
        /// What was asked.
        action: &'static str,
        /// The container or process.
        id: String,
        /// How it is.
        state: &'static str,
    },
    /// A signal to a process that has ended.
    #[error("process already finished")]
    Finished,
    /// Not built.
    #[error("{0} is not supported by Walnut")]
    Unsupported(&'static str),
    /// A request's field.
    #[error("{field} {value:?} of the request is not a name")]
    Name {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// A bundle's or a request's JSON.
    #[error("{what} {path:?} cannot be read")]
    Json {
        /// What it is.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The bundle's file.
    #[error("{path:?} cannot be read")]
    Bundle {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file of the Pod's.
    #[error("{what} {path:?} failed")]
    File {
        /// What was attempted.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The VM has ended.
    #[error("the VM has ended: {0}")]
    VmEnded(String),
    /// The container's configuration.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A hook.
    #[error(transparent)]
    Hook(#[from] HookError),
    /// The Pod's configuration.
    #[error(transparent)]
    PodConfig(#[from] PodConfigError),
    /// Options of the runtime.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// Stdio.
    #[error(transparent)]
    Io(#[from] IoError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The machine.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A task of the shim itself.
    #[error("a task of the shim failed")]
    Task(#[from] tokio::task::JoinError),
}

impl ShimError {
    /// Whether the guest's side of a connection went away, which the VM's end would explain.
    pub(crate) fn is_broken_connection(&self) -> bool {
        matches!(
            self,
            Self::Agent(AgentError::Broken { .. } | AgentError::Connect { .. })
                | Self::Io(IoError::Stream { .. })
        )
    }

    /// Whether what was asked for isn't there.
    pub(crate) fn is_not_found(&self) -> bool {
        self.code() == Code::NOT_FOUND
    }

    /// The table.
    fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::NoSandbox(_) | Self::Finished => {
                Code::NOT_FOUND
            }
            Self::Exists { .. } => Code::ALREADY_EXISTS,
            Self::State { .. } => Code::FAILED_PRECONDITION,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::Name { .. }
            | Self::Json { .. }
            | Self::Spec(_)
            | Self::PodConfig(_)
            | Self::Options(_) => Code::INVALID_ARGUMENT,
            Self::Bundle { .. } => Code::NOT_FOUND,
            Self::VmEnded(_) => Code::UNAVAILABLE,
            Self::Hook(HookError::Task(_)) => Code::INTERNAL,
            Self::Hook(_) => Code::FAILED_PRECONDITION,
            Self::Io(IoError::Scheme { .. }) => Code::UNIMPLEMENTED,
            Self::Io(IoError::Open { .. } | IoError::LogBinary(_)) => Code::INVALID_ARGUMENT,
            Self::Io(IoError::Stream { source, .. }) | Self::Agent(source) => agent_code(source),
            Self::Machine(error) => machine_code(error),
            Self::File { .. } | Self::Task(_) => Code::INTERNAL,
        }
    }
}

fn agent_code(error: &AgentError) -> Code {
    match error {
        AgentError::Refused { code, .. } => match code {
            // The codes that containerd and its clients act on; a guest can't invent others.
            Code::NOT_FOUND
            | Code::ALREADY_EXISTS
            | Code::INVALID_ARGUMENT
            | Code::FAILED_PRECONDITION
            | Code::UNIMPLEMENTED
            | Code::PERMISSION_DENIED
            | Code::RESOURCE_EXHAUSTED => *code,
            _ => Code::INTERNAL,
        },
        AgentError::Deadline { .. } => Code::DEADLINE_EXCEEDED,
        AgentError::Broken { .. } | AgentError::Connect { .. } => Code::UNAVAILABLE,
        AgentError::Handshake { .. } | AgentError::Answer { .. } => Code::INTERNAL,
    }
}

fn machine_code(error: &MachineError) -> Code {
    match error {
        MachineError::Config(ConfigError::Read { .. }) => Code::FAILED_PRECONDITION,
        MachineError::Config(_) => Code::INVALID_ARGUMENT,
        MachineError::Cgroup(crate::cgroup::CgroupError::Path(_)) => Code::INVALID_ARGUMENT,
        MachineError::Cgroup(crate::cgroup::CgroupError::NoHierarchy) => Code::FAILED_PRECONDITION,
        MachineError::Network(error) => match error {
            NetworkError::HostNetwork(_) => Code::INVALID_ARGUMENT,
            NetworkError::Unmirrorable { .. } => Code::UNIMPLEMENTED,
            NetworkError::Namespace { .. } | NetworkError::Redirected(_) => {
                Code::FAILED_PRECONDITION
            }
            NetworkError::Operation { .. }
            | NetworkError::News(_)
            | NetworkError::Record { .. } => Code::INTERNAL,
        },
        MachineError::Storage(error) => match error {
            StorageError::NoVolume(_) => Code::NOT_FOUND,
            StorageError::HugePages(_)
            | StorageError::VolumeKind { .. }
            | StorageError::Options { .. } => Code::UNIMPLEMENTED,
            StorageError::Target(_) => Code::INVALID_ARGUMENT,
            StorageError::Path { .. } | StorageError::Rootfs { .. } => Code::INTERNAL,
        },
        MachineError::Vm(VmError::Image { .. } | VmError::Unbootable { .. } | VmError::Kvm(_)) => {
            Code::FAILED_PRECONDITION
        }
        MachineError::Vm(VmError::Full { .. }) => Code::RESOURCE_EXHAUSTED,
        MachineError::Vm(VmError::Refused { kind, .. }) => match kind {
            FailureKind::Image | FailureKind::Kvm | FailureKind::State => Code::FAILED_PRECONDITION,
            FailureKind::Config => Code::INVALID_ARGUMENT,
            FailureKind::NotFound => Code::NOT_FOUND,
            FailureKind::Unsupported => Code::UNIMPLEMENTED,
            FailureKind::Full => Code::RESOURCE_EXHAUSTED,
            FailureKind::Internal => Code::INTERNAL,
        },
        MachineError::Vm(VmError::Deadline { .. }) => Code::DEADLINE_EXCEEDED,
        MachineError::Agent(error) | MachineError::Disks(error) => agent_code(error),
        MachineError::Vm(_) | MachineError::Ended(_) => Code::UNAVAILABLE,
        MachineError::Blocks(BlocksError::NoDevice { .. }) => Code::NOT_FOUND,
        MachineError::Size(SizeError::Room { .. }) => Code::FAILED_PRECONDITION,
        MachineError::Size(_) => Code::INVALID_ARGUMENT,
        MachineError::Blocks(_)
        | MachineError::Cgroup(_)
        | MachineError::Host(_)
        | MachineError::Task(_) => Code::INTERNAL,
    }
}

impl From<StorageError> for ShimError {
    fn from(error: StorageError) -> Self {
        Self::Machine(error.into())
    }
}

impl From<ShimError> for ttrpc::Error {
    fn from(error: ShimError) -> Self {
        let message = printable(&one_line(&error), MAX_MESSAGE_BYTES);
        Self::RpcStatus(ttrpc::get_status(error.code(), message))
    }
}

/// An error and its sources, joined by colons.
pub(crate) fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        // A transparent error repeats its source's text.
        if !text.ends_with(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        source = error.source();
    }
    text
}

/// Text for people, at most about `limit` bytes of it (its end, where the news is), without control
/// characters: a terminal may show it.
pub(crate) fn printable(text: &str, limit: usize) -> String {
    let mut start = text.len().saturating_sub(limit);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    let mut kept = String::with_capacity(limit.min(text.len()));
    if start > 0 {
        kept.push('…');
    }
    let mut space = false;
    for character in text.get(start..).unwrap_or_default().chars() {
        if character.is_control() {
            space = true;
            continue;
        }
        if space && !kept.is_empty() {
            kept.push(' ');
        }
        space = false;
        kept.push(character);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_error_is_one_line_with_its_causes() {
        let io = std::io::Error::from(std::io::ErrorKind::NotFound);
        let error = ShimError::Machine(MachineError::Vm(VmError::Kvm(io)));
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else {
            panic!("not a status");
        };
        assert_eq!(status.code.enum_value(), Ok(Code::FAILED_PRECONDITION));
        assert!(
            status.message.starts_with("/dev/kvm cannot be opened"),
            "{}",
            status.message
        );
        assert!(
            status.message.ends_with("entity not found"),
            "{}",
            status.message
        );
    }

    #[test]
    fn a_guest_cannot_invent_codes() {
        let refused = |code| AgentError::Refused {
            code,
            message: String::new(),
        };
        assert_eq!(agent_code(&refused(Code::NOT_FOUND)), Code::NOT_FOUND);
        assert_eq!(agent_code(&refused(Code::OK)), Code::INTERNAL);
        assert_eq!(agent_code(&refused(Code::UNAUTHENTICATED)), Code::INTERNAL);
    }

    proptest! {
        #[test]
        fn printable_text_is_bounded(text in "\\PC{0,64}|.{0,64}", limit in 0_usize..64) {
            let kept = printable(&text, limit);
            prop_assert!(kept.len() <= limit + '…'.len_utf8());
            prop_assert!(!kept.chars().any(char::is_control));
        }
    }
}

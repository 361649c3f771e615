//! The one table from errors to ttrpc codes.
//!
//! containerd turns a code into its own error of that name, by which clients decide. Must not log.

use crate::{
    apparmor::AppArmorError,
    cgroup::CgroupError,
    container::refuse::SpecError,
    guest::{GuestError, changes::ChangeError, dial::DialError, network::NetworkError},
    insight::InsightError,
    stdio::StdioError,
    storage::StorageError,
    task::TaskError,
};
use std::error::Error;
use ttrpc::{Code, get_status};

/// What a request is answered when it fails: the error and its causes on one line.
pub(crate) fn status(error: &(dyn Error + 'static), code: Code) -> ttrpc::Error {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message.push_str(&format!(": {error}"));
        cause = error.source();
    }
    ttrpc::Error::RpcStatus(get_status(code, message))
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> Self {
        let code = match &error {
            TaskError::NotFound { .. } | TaskError::Finished => Code::NOT_FOUND,
            TaskError::Exists { .. } => Code::ALREADY_EXISTS,
            TaskError::State { .. } | TaskError::Paused { .. } => Code::FAILED_PRECONDITION,
            TaskError::Unsupported(_) | TaskError::Spec(SpecError::Unsupported { .. }) => {
                Code::UNIMPLEMENTED
            }
            TaskError::Insight(error) => insight_code(error),
            TaskError::Id { .. }
            | TaskError::Signal(_)
            | TaskError::Size { .. }
            | TaskError::Namespace { .. }
            | TaskError::Contradiction(_)
            | TaskError::Spec(_)
            | TaskError::AppArmor(AppArmorError::Unknown { .. } | AppArmorError::Policy { .. })
            | TaskError::Resources(_)
            | TaskError::DeviceRules(_)
            | TaskError::Stdio(StdioError::Name { .. }) => Code::INVALID_ARGUMENT,
            TaskError::Stdio(StdioError::Missing { .. })
            | TaskError::Cgroup(CgroupError::InUse { .. }) => Code::FAILED_PRECONDITION,
            TaskError::Launch(launch) if launch.is_of_request() => Code::INVALID_ARGUMENT,
            TaskError::Stdio(StdioError::System { .. })
            | TaskError::Launch(_)
            | TaskError::AppArmor(AppArmorError::System { .. })
            | TaskError::Cgroup(_)
            | TaskError::System { .. } => Code::INTERNAL,
        };
        status(&error, code)
    }
}

impl From<GuestError> for ttrpc::Error {
    fn from(error: GuestError) -> Self {
        let code = match &error {
            GuestError::SetUpAlready | GuestError::NotSetUp => Code::FAILED_PRECONDITION,
            GuestError::Network(NetworkError::Interface(..) | NetworkError::Message(_)) => {
                Code::INVALID_ARGUMENT
            }
            GuestError::Hostname(_)
            | GuestError::Clock(_)
            | GuestError::Tag(_)
            | GuestError::Vcpus(_) => Code::INVALID_ARGUMENT,
            GuestError::System { .. } | GuestError::Network(_) => Code::INTERNAL,
        };
        status(&error, code)
    }
}

impl From<StorageError> for ttrpc::Error {
    fn from(error: StorageError) -> Self {
        let code = match &error {
            StorageError::Exists(_) => Code::ALREADY_EXISTS,
            StorageError::Request(_) => Code::INVALID_ARGUMENT,
            StorageError::NoDisk(_) | StorageError::System { .. } => Code::INTERNAL,
        };
        status(&error, code)
    }
}

impl From<ChangeError> for ttrpc::Error {
    fn from(error: ChangeError) -> Self {
        let code = match &error {
            ChangeError::TooMany(..) | ChangeError::Container(_) => Code::INVALID_ARGUMENT,
            ChangeError::Busy => Code::RESOURCE_EXHAUSTED,
            ChangeError::Volume { .. } | ChangeError::Announcer(_) => Code::INTERNAL,
        };
        status(&error, code)
    }
}

impl From<DialError> for ttrpc::Error {
    fn from(error: DialError) -> Self {
        let code = match &error {
            DialError::NobodyListens(_) => Code::UNAVAILABLE,
            DialError::Address(_)
            | DialError::NoStream
            | DialError::Stream(StdioError::Name { .. }) => Code::INVALID_ARGUMENT,
            DialError::Stream(StdioError::Missing { .. }) => Code::FAILED_PRECONDITION,
            DialError::Stream(StdioError::System { .. }) | DialError::Connect { .. } => {
                Code::INTERNAL
            }
        };
        status(&error, code)
    }
}

impl From<InsightError> for ttrpc::Error {
    fn from(error: InsightError) -> Self {
        status(&error, insight_code(&error))
    }
}

fn insight_code(error: &InsightError) -> Code {
    match error {
        InsightError::Keep(_) | InsightError::Annotation { .. } => Code::INVALID_ARGUMENT,
        InsightError::Container(_) => Code::NOT_FOUND,
        InsightError::Kernel { .. } | InsightError::Cgroup(_) => Code::INTERNAL,
    }
}

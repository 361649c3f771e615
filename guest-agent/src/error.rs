//! The one table from errors to ttrpc codes.
//!
//! containerd turns a code into its own error of that name, by which clients decide. Must not log.

use crate::{
    container::refuse::SpecError,
    guest::{GuestError, network::NetworkError},
    insight::InsightError,
    stdio::StdioError,
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
            TaskError::Unsupported(_) | TaskError::Spec(SpecError::Unsupported(_)) => {
                Code::UNIMPLEMENTED
            }
            TaskError::Id { .. }
            | TaskError::Signal(_)
            | TaskError::Size { .. }
            | TaskError::Namespace { .. }
            | TaskError::Contradiction(_)
            | TaskError::Spec(_)
            | TaskError::Resources(_)
            | TaskError::DeviceRules(_)
            | TaskError::Stdio(StdioError::Name { .. }) => Code::INVALID_ARGUMENT,
            TaskError::Stdio(StdioError::Missing { .. }) => Code::FAILED_PRECONDITION,
            TaskError::Launch(launch) if launch.is_of_request() => Code::INVALID_ARGUMENT,
            TaskError::Stdio(StdioError::System { .. })
            | TaskError::Launch(_)
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
            GuestError::Hostname(_) | GuestError::Clock(_) | GuestError::Tag(_) => {
                Code::INVALID_ARGUMENT
            }
            GuestError::System { .. } | GuestError::Network(_) => Code::INTERNAL,
        };
        status(&error, code)
    }
}

impl From<InsightError> for ttrpc::Error {
    fn from(error: InsightError) -> Self {
        let code = match &error {
            InsightError::Keep(_) => Code::INVALID_ARGUMENT,
            InsightError::Kernel { .. } | InsightError::Cgroup(_) => Code::INTERNAL,
        };
        status(&error, code)
    }
}

//! Namespaces that a container shares with another one of its Pod.

use super::{TaskError, Tasks};
use crate::container::spec::Namespace;
use std::{fs::File, os::fd::AsRawFd as _};
use walnut_agent_api::namespace_owner;

impl Tasks {
    /// Turns the names of namespaces into paths that lead there as long as the answer is held.
    pub(super) fn open_namespaces(
        &self,
        namespaces: &mut [Namespace],
    ) -> Result<Vec<File>, TaskError> {
        let named = namespaces
            .iter_mut()
            .filter(|namespace| !namespace.path.as_os_str().is_empty());
        named
            .map(|namespace| self.open_namespace(namespace))
            .collect()
    }

    fn open_namespace(&self, namespace: &mut Namespace) -> Result<File, TaskError> {
        let kind = format!("{:?}", namespace.kind).to_lowercase();
        let wrong = |problem| TaskError::Namespace {
            kind: kind.clone(),
            path: namespace.path.clone(),
            problem,
        };
        let owner = namespace_owner(&namespace.path, &kind)
            .ok_or_else(|| wrong("is not a namespace of a container of this guest"))?;
        let first = self.process(owner, "")?;
        let attempted = "open a namespace of another container";
        let file = File::open(format!("/proc/{}/ns/{kind}", first.pid()))
            .map_err(|source| TaskError::System { attempted, source });
        // Until it has been reaped, nobody else has its number: what was opened is its own.
        if first.check_alive().is_err() {
            return Err(wrong("belongs to a container that has ended"));
        }
        let file = file?;
        namespace.path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into();
        Ok(file)
    }
}

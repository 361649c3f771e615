//! Finds Pods by their directories, and connects to their shims.
//!
//! Must not change anything below the state's root.

use std::{fs, io, path::PathBuf, time::Duration};
use tokio::{net::UnixStream, time::timeout};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context::{Context, with_timeout},
};
use walnut_shim_api::{ADDRESS_FILE, STATE_ROOT, pod, pod_ttrpc::PodClient};

/// For a shim to answer what it knows by itself.
const SHIM_DEADLINE: Duration = Duration::from_secs(10);
/// For a shim to answer what it must ask its guest, which may be emulated.
const GUEST_DEADLINE: Duration = Duration::from_secs(60);

/// Why a Pod can't be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodError {
    /// The state's directory can't be read.
    #[error("cannot list the Pods below {}", path.display())]
    List {
        /// Which directory.
        path: PathBuf,
        /// Why; for who isn't root, usually this.
        source: io::Error,
    },
    /// Nobody has this name.
    #[error("no Pod {name:?}: there are {known}")]
    Missing {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// More than one begins so.
    #[error("Pod {name:?} may be {candidates}: say more of its id")]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// Which begin so.
        candidates: String,
    },
    /// The shim isn't there, as after it died and before containerd cleaned up.
    #[error("the shim of Pod {pod} cannot be reached")]
    Connect {
        /// Which.
        pod: String,
        /// Why.
        source: io::Error,
    },
    /// The shim refuses.
    #[error("Pod {pod}: {message}")]
    Refused {
        /// Which.
        pod: String,
        /// The shim's words.
        message: String,
    },
}

/// The Pods of a machine.
#[derive(Debug)]
pub(crate) struct Pods {
    root: PathBuf,
}

/// One Pod's place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Pod {
    /// containerd's.
    pub(crate) namespace: String,
    /// Of the sandbox, or of the only container.
    pub(crate) id: String,
    directory: PathBuf,
}

impl Pods {
    /// Those of this machine.
    pub(crate) fn of_this_machine() -> Self {
        Self {
            root: STATE_ROOT.into(),
        }
    }

    /// All, sorted by namespace and id.
    pub(crate) fn all(&self) -> Result<Vec<Pod>, PodError> {
        let mut pods = Vec::new();
        for (namespace, folder) in directories(&self.root)? {
            for (id, directory) in directories(&folder)? {
                pods.push(Pod {
                    namespace: namespace.clone(),
                    id,
                    directory,
                });
            }
        }
        pods.sort();
        Ok(pods)
    }

    /// The one whose id is, or alone begins with, `name`.
    pub(crate) fn find(&self, name: &str) -> Result<Pod, PodError> {
        let all = self.all()?;
        let exact: Vec<&Pod> = all.iter().filter(|pod| pod.id == name).collect();
        let begin = || all.iter().filter(|pod| pod.id.starts_with(name)).collect();
        let found: Vec<&Pod> = if exact.is_empty() { begin() } else { exact };
        match found[..] {
            [pod] => Ok(pod.clone()),
            [] => Err(PodError::Missing {
                name: name.to_owned(),
                known: match &all[..] {
                    [] => "none".to_owned(),
                    all => names(all),
                },
            }),
            _ => Err(PodError::Ambiguous {
                name: name.to_owned(),
                candidates: names(found),
            }),
        }
    }
}

fn names<'a>(pods: impl IntoIterator<Item = &'a Pod>) -> String {
    let names: Vec<String> = pods.into_iter().map(Pod::name).collect();
    names.join(", ")
}

/// Names and paths of the directories in a directory; one that isn't there has none.
fn directories(path: &PathBuf) -> Result<Vec<(String, PathBuf)>, PodError> {
    let failed = |source| PodError::List {
        path: path.clone(),
        source,
    };
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let name = entry.file_name().to_string_lossy().into_owned();
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

impl Pod {
    /// For messages.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.namespace, self.id)
    }

    /// Connects to its shim.
    pub(crate) async fn connect(&self) -> Result<Shim, PodError> {
        let failed = |source| PodError::Connect {
            pod: self.name(),
            source,
        };
        let address = fs::read_to_string(self.directory.join(ADDRESS_FILE)).map_err(failed)?;
        let connected = timeout(SHIM_DEADLINE, UnixStream::connect(address)).await;
        let stream = connected
            .map_err(|_| failed(io::ErrorKind::TimedOut.into()))?
            .map_err(failed)?;
        Ok(Shim {
            pod: self.name(),
            client: PodClient::new(Client::new(Socket::new(stream))),
        })
    }
}

/// The shim of a Pod.
pub(crate) struct Shim {
    pod: String,
    client: PodClient,
}

impl Shim {
    /// What the Pod is.
    pub(crate) async fn describe(&self) -> Result<pod::DescribeResponse, PodError> {
        let request = pod::DescribeRequest::new();
        let answer = self.client.describe(within(SHIM_DEADLINE), &request);
        answer.await.map_err(|error| self.refused(&error))
    }

    /// What its containers have called.
    pub(crate) async fn syscalls(
        &self,
        request: &pod::SyscallsRequest,
    ) -> Result<pod::SyscallsResponse, PodError> {
        let answer = self.client.syscalls(within(GUEST_DEADLINE), request);
        answer.await.map_err(|error| self.refused(&error))
    }

    /// What one of them has called, for a profile.
    pub(crate) async fn record(
        &self,
        request: &pod::RecordRequest,
    ) -> Result<pod::RecordResponse, PodError> {
        let answer = self.client.record(within(GUEST_DEADLINE), request);
        answer.await.map_err(|error| self.refused(&error))
    }

    fn refused(&self, error: &ttrpc::Error) -> PodError {
        let message = match error {
            ttrpc::Error::RpcStatus(status) => status.message.clone(),
            other => other.to_string(),
        };
        PodError::Refused {
            pod: self.pod.clone(),
            message,
        }
    }
}

fn within(deadline: Duration) -> Context {
    with_timeout(i64::try_from(deadline.as_nanos()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pods(ids: &[&str]) -> (tempfile::TempDir, Pods) {
        let folder = tempfile::tempdir().unwrap();
        for id in ids {
            fs::create_dir_all(folder.path().join(id)).unwrap();
        }
        let root = folder.path().to_owned();
        (folder, Pods { root })
    }

    #[test]
    fn a_pod_is_found_by_its_id_or_a_beginning_that_names_no_other() {
        let (_folder, pods) = pods(&["default/web-1", "default/web", "k8s.io/abcdef"]);
        assert_eq!(pods.find("web").unwrap().name(), "default/web");
        assert_eq!(pods.find("abc").unwrap().name(), "k8s.io/abcdef");
        let ambiguous = pods.find("we").unwrap_err().to_string();
        assert!(
            ambiguous.contains("default/web, default/web-1"),
            "{ambiguous}"
        );
        let missing = pods.find("db").unwrap_err().to_string();
        assert!(
            missing.starts_with("no Pod \"db\": there are default/web"),
            "{missing}"
        );
    }

    #[test]
    fn a_machine_without_pods_says_so() {
        let (_folder, pods) = pods(&[]);
        assert_eq!(pods.all().unwrap(), []);
        let error = pods.find("x").unwrap_err().to_string();
        assert_eq!(error, "no Pod \"x\": there are none");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_pod_whose_shim_died_is_named() {
        let (_folder, pods) = pods(&["default/web"]);
        let pod = pods.find("web").unwrap();
        let error = pod.connect().await.err().unwrap().to_string();
        assert_eq!(error, "the shim of Pod default/web cannot be reached");
    }
}

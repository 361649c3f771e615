//! The guest as a whole: what `Guest.Setup` makes of it and how it ends.
//!
//! Must not know containers.

pub(crate) mod boot;
pub(crate) mod changes;
pub(crate) mod dial;
pub(crate) mod mounts;
pub(crate) mod network;
pub(crate) mod online;
pub(crate) mod power;

use self::network::{Network, NetworkError};
use rustix::{
    mount::{MountFlags, mount},
    time::{ClockId, Timespec, clock_settime},
};
use std::{
    fs, io,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::task::spawn_blocking;
use walnut_agent_api::{
    SHARE_MOUNT_POINT,
    guest::{Network as WantedNetwork, SetupRequest},
};

/// Longest host name that Linux keeps.
const MAX_HOSTNAME_BYTES: usize = 64;
/// virtio 1.3, section 5.11.4.
const MAX_TAG_BYTES: usize = 36;
const NS_PER_S: u64 = 1_000_000_000;

/// Why the guest could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    /// It has been.
    #[error("the guest has been set up already")]
    SetUpAlready,
    /// It has not been.
    #[error("the guest has not been set up")]
    NotSetUp,
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A host name that cannot be one.
    #[error("hostname {0:?} must be 1 to {MAX_HOSTNAME_BYTES} letters, digits, dots and dashes")]
    Hostname(String),
    /// A time that the clock cannot show.
    #[error("realtime_ns {0} is not a time of the clock")]
    Clock(u64),
    /// A tag that no file system can have.
    #[error("share_tag {0:?} must be at most {MAX_TAG_BYTES} printable ASCII characters")]
    Tag(String),
    /// A number of vCPUs that no guest has.
    #[error("vcpus {0} must be 1 to 254")]
    Vcpus(u32),
    /// The system refused.
    #[error("cannot {attempted}")]
    System {
        /// What was attempted.
        attempted: String,
        /// What the system said.
        source: io::Error,
    },
}

impl GuestError {
    fn system<E: Into<io::Error>>(attempted: impl Into<String>) -> impl FnOnce(E) -> Self {
        let attempted = attempted.into();
        move |error| Self::System {
            attempted,
            source: error.into(),
        }
    }
}

/// What the guest has been told so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    #[default]
    Booted,
    SetUp,
}

/// The guest.
#[derive(Debug, Default)]
pub(crate) struct Guest {
    phase: Mutex<Phase>,
    network: Arc<Mutex<Network>>,
}

impl Guest {
    /// Applies what the host knows; answers the kernel's release. Once.
    pub(crate) fn set_up(&self, request: &SetupRequest) -> Result<String, GuestError> {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        if *phase == Phase::SetUp {
            return Err(GuestError::SetUpAlready);
        }
        let SetupRequest {
            hostname,
            realtime_ns,
            share_tag,
            ..
        } = request;
        check_hostname(hostname)?;
        check_tag(share_tag)?;
        let time = timespec(*realtime_ns)?;
        rustix::system::sethostname(hostname.as_bytes())
            .map_err(GuestError::system(format!("set hostname {hostname:?}")))?;
        clock_settime(ClockId::Realtime, time).map_err(GuestError::system(format!(
            "set the clock to {realtime_ns} ns"
        )))?;
        if !share_tag.is_empty() {
            mount_share(share_tag)?;
        }
        if let Some(wanted) = request.network.as_ref() {
            apply(&self.network, wanted)?;
        }
        *phase = Phase::SetUp;
        Ok(kernel_release())
    }

    /// Makes the network what the host wants now, beside everything else: a device may be long in coming.
    pub(crate) async fn update_network(&self, wanted: WantedNetwork) -> Result<(), GuestError> {
        if *self.phase.lock().unwrap_or_else(PoisonError::into_inner) == Phase::Booted {
            return Err(GuestError::NotSetUp);
        }
        let network = Arc::clone(&self.network);
        spawn_blocking(move || apply(&network, &wanted))
            .await
            .map_err(|error| GuestError::system("update the network")(io::Error::other(error)))?
    }
}

fn apply(network: &Mutex<Network>, wanted: &WantedNetwork) -> Result<(), GuestError> {
    let mut network = network.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(network.apply(wanted)?)
}

/// `uname -r`.
pub(crate) fn kernel_release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

fn mount_share(tag: &str) -> Result<(), GuestError> {
    let attempted = || GuestError::system(format!("mount {tag:?} on {SHARE_MOUNT_POINT}"));
    fs::create_dir_all(SHARE_MOUNT_POINT).map_err(attempted())?;
    mount(
        tag,
        SHARE_MOUNT_POINT,
        "virtiofs",
        MountFlags::empty(),
        None,
    )
    .map_err(|error| attempted()(io::Error::from(error)))
}

fn check_hostname(name: &str) -> Result<(), GuestError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if (1..=MAX_HOSTNAME_BYTES).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    Err(GuestError::Hostname(name.to_owned()))
}

fn check_tag(tag: &str) -> Result<(), GuestError> {
    if tag.len() <= MAX_TAG_BYTES && tag.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(());
    }
    Err(GuestError::Tag(tag.to_owned()))
}

fn timespec(ns: u64) -> Result<Timespec, GuestError> {
    let seconds = i64::try_from(ns / NS_PER_S).map_err(|_| GuestError::Clock(ns))?;
    let nanoseconds = i64::try_from(ns % NS_PER_S).map_err(|_| GuestError::Clock(ns))?;
    Ok(Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_are_refused() {
        for name in ["", "a b", "a\n", &"x".repeat(65)] {
            assert!(check_hostname(name).is_err(), "{name:?}");
        }
        check_hostname("web-1.example").unwrap();
        for tag in ["a b", "ä", &"x".repeat(37)] {
            assert!(check_tag(tag).is_err(), "{tag:?}");
        }
    }

    #[test]
    fn nanoseconds_become_seconds() {
        let time = timespec(1_500_000_000).unwrap();
        assert_eq!((time.tv_sec, time.tv_nsec), (1, 500_000_000));
    }
}

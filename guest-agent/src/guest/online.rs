//! vCPUs that come while the guest runs: the kernel finds them, and leaves them offline until someone says
//! that they are to be used. Memory needs nothing of the kind: the kernel brings it online itself.
//!
//! Linux, `Documentation/core-api/cpu_hotplug.rst`. Must not know who asked for them.

use super::GuestError;
use crate::kernel_events::KernelEvents;
use std::{fs, io, path::Path, time::Duration};
use tokio::time::timeout;

const CPUS: &str = "/sys/devices/system/cpu";
/// vCPUs of a guest at the most, by the ids that interrupt controllers have.
const MAX_VCPUS: u32 = 254;
/// From the machine's telling that a vCPU is there to the kernel's.
const COMING_DEADLINE: Duration = Duration::from_secs(30);

/// Waits until `count` vCPUs are there, and brings each of them online.
pub(crate) async fn vcpus(count: u32) -> Result<(), GuestError> {
    if !(1..=MAX_VCPUS).contains(&count) {
        return Err(GuestError::Vcpus(count));
    }
    let failed = || GuestError::system("follow the kernel's events");
    // Listening comes before looking: what comes in between is heard.
    let events = KernelEvents::listen().map_err(failed())?;
    let all = async {
        for number in 0..count {
            while !bring_online(Path::new(CPUS), number)? {
                events.next().await.map_err(failed())?;
            }
        }
        Ok(())
    };
    let late = || io::Error::from(io::ErrorKind::TimedOut);
    timeout(COMING_DEADLINE, all)
        .await
        .unwrap_or_else(|_| Err(GuestError::system(format!("find {count} vCPUs"))(late())))
}

/// Whether the vCPU is there; brings it online if it isn't.
fn bring_online(cpus: &Path, number: u32) -> Result<bool, GuestError> {
    let cpu = cpus.join(format!("cpu{number}"));
    if !cpu.exists() {
        return Ok(false);
    }
    let file = cpu.join("online");
    match fs::read_to_string(&file) {
        Ok(state) if state.trim() == "1" => Ok(true),
        // The first one can't be taken offline, so it has no such file.
        Err(error) if error.kind() == io::ErrorKind::NotFound && number == 0 => Ok(true),
        // A directory is there a moment before its files.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        _ => fs::write(&file, "1")
            .map(|()| true)
            .map_err(GuestError::system(format!("bring vCPU {number} online"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_is_absent_then_offline_then_online() {
        let cpus = tempfile::tempdir().unwrap();
        let online = || bring_online(cpus.path(), 1).unwrap();
        assert!(!online());
        fs::create_dir(cpus.path().join("cpu1")).unwrap();
        assert!(!online(), "its files are still to come");
        let file = cpus.path().join("cpu1/online");
        fs::write(&file, "0\n").unwrap();
        assert!(online() && online());
        assert_eq!(fs::read_to_string(file).unwrap(), "1");
        fs::create_dir(cpus.path().join("cpu0")).unwrap();
        assert!(bring_online(cpus.path(), 0).unwrap());
    }

    #[tokio::test]
    async fn a_number_that_no_guest_has_is_refused() {
        for count in [0, 255, u32::MAX] {
            let error = vcpus(count).await.unwrap_err().to_string();
            assert!(error.contains(&count.to_string()), "{error}");
        }
        vcpus(1).await.unwrap();
    }
}

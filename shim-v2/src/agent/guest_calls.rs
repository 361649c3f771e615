//! Calls of the `Guest` service (guest-agent/api): what a Pod needs of its guest beside containerd's Task service.
//!
//! As everywhere in `agent`: each has a deadline, and an answer that the contract doesn't allow is an error.

use super::{Agent, AgentError, CALL_DEADLINE, SHUTDOWN_DEADLINE, call};
use protobuf::MessageField;
use std::{
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};
use tokio::net::UnixStream;
use walnut_agent_api::guest;

impl Agent {
    /// `Guest.Setup`.
    pub(crate) async fn setup(
        &self,
        hostname: &str,
        share_tag: &str,
        network: &guest::Network,
    ) -> Result<(), AgentError> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let request = guest::SetupRequest {
            hostname: hostname.to_owned(),
            realtime_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            share_tag: share_tag.to_owned(),
            network: MessageField::some(network.clone()),
            ..Default::default()
        };
        call("Setup", CALL_DEADLINE, |context| {
            self.guest.setup(context, &request)
        })
        .await?;
        Ok(())
    }

    /// `Guest.LoadProfile`.
    pub(crate) async fn load_profile(
        &self,
        name: String,
        policy: Vec<u8>,
    ) -> Result<(), AgentError> {
        let request = guest::LoadProfileRequest {
            name,
            policy,
            ..Default::default()
        };
        call("LoadProfile", CALL_DEADLINE, |context| {
            self.guest.load_profile(context, &request)
        })
        .await?;
        Ok(())
    }

    /// `Guest.Shutdown`.
    pub(crate) async fn shutdown(&self) -> Result<(), AgentError> {
        let request = guest::ShutdownRequest::default();
        call("Shutdown", SHUTDOWN_DEADLINE, |context| {
            self.guest.shutdown(context, &request)
        })
        .await?;
        Ok(())
    }

    /// `Guest.Syscalls`.
    pub(crate) async fn syscalls(
        &self,
        keep_ms: u32,
    ) -> Result<guest::SyscallsResponse, AgentError> {
        let request = guest::SyscallsRequest {
            keep_ms,
            ..Default::default()
        };
        call("Syscalls", CALL_DEADLINE, |context| {
            self.guest.syscalls(context, &request)
        })
        .await
    }

    /// `Guest.Record`.
    pub(crate) async fn record(
        &self,
        request: &guest::RecordRequest,
    ) -> Result<guest::RecordResponse, AgentError> {
        call("Record", CALL_DEADLINE, |context| {
            self.guest.record(context, request)
        })
        .await
    }

    /// `Guest.AddStorage`: answers the guest's numbers of the disks, as many as there are.
    pub(crate) async fn add_storage(
        &self,
        request: &guest::AddStorageRequest,
    ) -> Result<Vec<(u32, u32)>, AgentError> {
        let answer = call("AddStorage", CALL_DEADLINE, |context| {
            self.guest.add_storage(context, request)
        });
        let numbers = answer.await?.numbers;
        if numbers.len() == request.disks.len() {
            return Ok(numbers
                .iter()
                .map(|number| (number.major, number.minor))
                .collect());
        }
        Err(AgentError::Answer {
            call: "AddStorage",
            what: "numbers of other disks",
        })
    }

    /// `Guest.RemoveStorage`.
    pub(crate) async fn remove_storage(&self, container_id: &str) -> Result<(), AgentError> {
        let request = guest::RemoveStorageRequest {
            container_id: container_id.to_owned(),
            ..Default::default()
        };
        call("RemoveStorage", CALL_DEADLINE, |context| {
            self.guest.remove_storage(context, &request)
        })
        .await?;
        Ok(())
    }

    /// `Guest.UpdateNetwork`.
    pub(crate) async fn update_network(&self, network: &guest::Network) -> Result<(), AgentError> {
        let request = guest::UpdateNetworkRequest {
            network: MessageField::some(network.clone()),
            ..Default::default()
        };
        call("UpdateNetwork", CALL_DEADLINE, |context| {
            self.guest.update_network(context, &request)
        })
        .await?;
        Ok(())
    }

    /// `Guest.Online`.
    pub(crate) async fn online(&self, vcpus: u8) -> Result<(), AgentError> {
        let request = guest::OnlineRequest {
            vcpus: vcpus.into(),
            ..Default::default()
        };
        call("Online", CALL_DEADLINE, |context| {
            self.guest.online(context, &request)
        })
        .await?;
        Ok(())
    }

    /// `Guest.Dial`: a connection to what listens on an address of the guest's loopback; a refusal of code
    /// `UNAVAILABLE` if nobody does.
    pub(crate) async fn dial(&self, address: SocketAddr) -> Result<UnixStream, AgentError> {
        let (stream, connection) = self.open_stream().await?;
        let request = guest::DialRequest {
            stream,
            address: address.to_string(),
            ..Default::default()
        };
        call("Dial", CALL_DEADLINE, |context| {
            self.guest.dial(context, &request)
        })
        .await?;
        Ok(connection)
    }

    /// `Guest.WatchVolumes`, before the container is created.
    pub(crate) async fn watch_volumes(&self, id: &str, volumes: &[u32]) -> Result<(), AgentError> {
        let request = guest::WatchVolumesRequest {
            container_id: id.to_owned(),
            volumes: volumes.to_owned(),
            ..Default::default()
        };
        call("WatchVolumes", CALL_DEADLINE, |context| {
            self.guest.watch_volumes(context, &request)
        })
        .await?;
        Ok(())
    }

    /// `Guest.AnnounceChanges`.
    pub(crate) async fn announce_changes(
        &self,
        changes: Vec<guest::Change>,
    ) -> Result<(), AgentError> {
        let request = guest::AnnounceChangesRequest {
            changes,
            ..Default::default()
        };
        call("AnnounceChanges", CALL_DEADLINE, |context| {
            self.guest.announce_changes(context, &request)
        })
        .await?;
        Ok(())
    }
}

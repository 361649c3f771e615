//! The Pod's network, between the namespace on the host (`crate::network`), the VMM and the guest.

use super::{HostResources, Machine, MachineError};
use crate::{
    log,
    network::{Loopback, NetworkError, Nic},
};
use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};
use std::{io, os::fd::AsFd as _, sync::Arc};
use tokio::{io::Interest, net::UnixDatagram, task::spawn_blocking};
use walnut_agent_api::guest;

impl Machine {
    /// Gives the guest what has come to the Pod's network since the last look, and takes what has gone.
    pub(crate) async fn refresh_network(&self) -> Result<(), MachineError> {
        let mut network = Arc::clone(&self.host.network).lock_owned().await;
        let (mut network, (wanted, nics)) = spawn_blocking(move || {
            let looked = network.look()?;
            Ok::<_, NetworkError>((network, looked))
        })
        .await??;
        for nic in nics {
            let index = nic.index;
            match self.vm.attach_network(nic).await {
                Ok(device) => network.placed(index, device),
                Err(error) => {
                    spawn_blocking(move || network.give_up(index)).await?;
                    return Err(error.into());
                }
            }
        }
        if let Some(wanted) = network.to_tell(wanted) {
            self.agent.update_network(&wanted).await?;
            for device in network.told(wanted) {
                self.vm.detach(&device).await?;
            }
        }
        Ok(())
    }

    /// Refreshes the network whenever something changes in the Pod's namespace, until the VM ends.
    pub(crate) async fn follow_network(self: Arc<Self>) {
        let news = self.host.network.lock().await.news();
        let followed = async {
            let Some(news) = news? else { return Ok(()) };
            // The type is tokio's for any socket of datagrams.
            let news = UnixDatagram::from_std(news.into()).map_err(NetworkError::News)?;
            loop {
                drain(&news).await.map_err(NetworkError::News)?;
                if let Err(error) = self.refresh_network().await
                    && !self.has_exited()
                {
                    log::error("following a change of the Pod's network", &error);
                }
            }
        };
        let followed: Result<(), NetworkError> = tokio::select! {
            followed = followed => followed,
            () = self.exited() => return,
        };
        if let Err(error) = followed {
            log::error("following the Pod's network", &error);
        }
    }
}

impl HostResources {
    /// What stands in the Pod's namespace, and devices for what is new in it.
    pub(super) async fn look_at_network(&self) -> Result<(guest::Network, Vec<Nic>), MachineError> {
        let mut network = Arc::clone(&self.network).lock_owned().await;
        Ok(spawn_blocking(move || network.look()).await??)
    }

    /// What takes the connections to the loopback addresses of the Pod's namespace. A Pod runs without that, too.
    pub(super) async fn take_loopback(&self) -> Option<Loopback> {
        let network = Arc::clone(&self.network).lock_owned().await;
        let taken = spawn_blocking(move || network.loopback().map_err(MachineError::from));
        let taken = taken.await.map_err(MachineError::from).flatten();
        taken.unwrap_or_else(|error| {
            log::error("ports cannot be forwarded to the Pod", &error);
            None
        })
    }
}

/// Waits until a socket has something, and reads all of it.
async fn drain(news: &UnixDatagram) -> io::Result<()> {
    news.readable().await?;
    let receive = || {
        let mut datagram = [0; 64];
        match recv(news.as_fd(), datagram.as_mut_slice(), RecvFlags::empty()) {
            // Some were lost, which is news too.
            Ok(_) | Err(Errno::NOBUFS) => Ok(()),
            Err(error) => Err(io::Error::from(error)),
        }
    };
    loop {
        match news.try_io(Interest::READABLE, receive) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

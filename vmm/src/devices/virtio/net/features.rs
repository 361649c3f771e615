//! What is offered to the driver, and what an agreement means for the host's tap (virtio 1.3, sections 5.1.3 and
//! 5.1.4). Pure: no I/O.
//!
//! Not offered: fragmentation of UDP (`HOST_UFO`, `GUEST_UFO`), of which Linux' stack makes no use since 4.14, as USO
//! cuts a large send into datagrams instead; and ECN, whose packets a guest segments itself.

use super::packet;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use walnut_vmm_api::NetworkConfig;

/// Bits of Linux' `TUNSETOFFLOAD`: what the reader of a tap can deal with.
pub(super) const TUN_CSUM: u32 = 0x01;
const TUN_TSO4: u32 = 0x02;
const TUN_TSO6: u32 = 0x04;
/// Both kinds of UDP segmentation, of which Linux takes none or both.
pub(super) const TUN_USO: u32 = 0x20 | 0x40;

/// What every host offers.
const ALWAYS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
/// What hosts offer whose tap segments UDP: Linux 6.2 and later.
const WITH_USO: u64 =
    1 << VIRTIO_NET_F_HOST_USO | 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
/// Packets of the host that are larger than the link's.
const LARGE: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6;
/// What the driver may switch while it runs.
const SWITCHED: u64 = LARGE | 1 << VIRTIO_NET_F_GUEST_CSUM;

/// Whether both sides agreed on this bit.
pub(super) fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

/// What a device with so many pairs of queues offers.
pub(super) fn offered(pairs: usize, uso: bool) -> u64 {
    let mut features = ALWAYS;
    if uso {
        features |= WITH_USO;
    }
    if pairs > 1 {
        features |= 1 << VIRTIO_NET_F_MQ;
    }
    features
}

/// What the tap may hand over, given what the driver accepted.
pub(super) fn tap_offloads(features: u64) -> u32 {
    // Without checksums the rest makes no sense (section 5.1.3.1), and Linux refuses it.
    if !has(features, VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut offloads = TUN_CSUM;
    for (bit, flag) in [
        (VIRTIO_NET_F_GUEST_TSO4, TUN_TSO4),
        (VIRTIO_NET_F_GUEST_TSO6, TUN_TSO6),
    ] {
        if has(features, bit) {
            offloads |= flag;
        }
    }
    if has(features, VIRTIO_NET_F_GUEST_USO4) && has(features, VIRTIO_NET_F_GUEST_USO6) {
        offloads |= TUN_USO;
    }
    offloads
}

/// As [`tap_offloads`], for what the driver switches on while it runs; `None` for what it didn't agree on before.
pub(super) fn switched_offloads(features: u64, wanted: u64) -> Option<u32> {
    (wanted & !(features & SWITCHED) == 0).then(|| tap_offloads(wanted))
}

/// Bytes of the largest packet of the host, with its headers.
pub(super) fn largest_packet(features: u64, mtu: u16) -> usize {
    if features & LARGE != 0 {
        return packet::MAX_BYTES;
    }
    packet::OVERHEAD_BYTES + usize::from(mtu)
}

/// `struct virtio_net_config` as far as it is offered: mac, status, max_virtqueue_pairs, mtu.
pub(super) fn config_space(config: &NetworkConfig, pairs: u16, link_up: bool) -> Vec<u8> {
    let status = if link_up { VIRTIO_NET_S_LINK_UP } else { 0 };
    let status = u16::try_from(status).unwrap_or(0);
    let words = [status, pairs, config.mtu];
    let words = words.into_iter().flat_map(u16::to_le_bytes);
    config.mac.into_iter().chain(words).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn several_queues_and_udp_segmentation_are_offered_where_they_are() {
        assert!(!has(offered(1, true), VIRTIO_NET_F_MQ));
        assert!(has(offered(2, true), VIRTIO_NET_F_MQ));
        assert!(has(offered(1, true), VIRTIO_NET_F_HOST_USO));
        assert_eq!(offered(1, false) & WITH_USO, 0);
    }

    #[test]
    fn the_tap_hands_over_what_the_driver_accepted() {
        let csum = 1 << VIRTIO_NET_F_GUEST_CSUM;
        let tso = 1 << VIRTIO_NET_F_GUEST_TSO4;
        assert_eq!(tap_offloads(tso), 0, "no segments without checksums");
        assert_eq!(tap_offloads(csum | tso), TUN_CSUM | TUN_TSO4);
        let half = csum | 1 << VIRTIO_NET_F_GUEST_USO4;
        assert_eq!(tap_offloads(half), TUN_CSUM, "one USO is none");
        let all = offered(1, true);
        assert_eq!(tap_offloads(all), TUN_CSUM | TUN_TSO4 | TUN_TSO6 | TUN_USO);
        assert_eq!(switched_offloads(csum | tso, csum), Some(TUN_CSUM));
        assert_eq!(switched_offloads(csum | tso, 0), Some(0));
        assert_eq!(switched_offloads(csum, csum | tso), None);
        assert_eq!(switched_offloads(u64::MAX, 1), None, "CSUM is the driver's");
    }

    proptest! {
        #[test]
        fn whatever_was_accepted_linux_takes(features: u64) {
            let offloads = tap_offloads(features);
            prop_assert!(offloads == 0 || offloads & TUN_CSUM != 0);
            prop_assert!(offloads & TUN_USO == 0 || offloads & TUN_USO == TUN_USO);
        }
    }
}

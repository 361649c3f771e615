//! A disk of several files.

use super::*;

#[test]
fn a_disk_of_several_files_is_read_but_never_across_them() {
    let part = |byte: u8, bytes: usize| {
        let fd = rustix::fs::memfd_create("part", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(&vec![byte; bytes]).unwrap();
        file
    };
    let others = || vec![part(2, 8192), part(3, 1536)];
    let block = Block::joined(part(1, 4096), others(), &read_only()).unwrap();
    assert_eq!(block.disk.capacity_bytes, 4096 + 8192 + 1536);
    assert!(
        block.lanes[0]
            .lock()
            .unwrap()
            .as_ref()
            .unwrap()
            .ring
            .is_none()
    );
    let mut rig = Rig::of(block, part(0, 0), Way::Direct);
    for (sector, bytes, expected) in [
        (0, 4096, Some(1)),
        (8, 8192, Some(2)),
        (23, 512, Some(2)),
        (24, 1536, Some(3)),
        (7, 1024, None),
        (23, 1024, None),
        (0, 16384, None),
        (26, 1024, None),
    ] {
        let (_, at) = rig.offer(0, VIRTIO_BLK_T_IN, sector, &[bytes]);
        let (_, status, _) = rig.wait(0);
        match expected {
            Some(byte) => {
                assert_eq!(status, VIRTIO_BLK_S_OK, "sector {sector}");
                let length = usize::try_from(bytes).unwrap();
                assert_eq!(rig.seen(at, length), vec![byte; length]);
            }
            None => assert_eq!(status, VIRTIO_BLK_S_IOERR, "sector {sector}"),
        }
    }
    rig.offer(0, VIRTIO_BLK_T_OUT, 0, &[512]);
    assert_eq!(rig.wait(0).1, VIRTIO_BLK_S_IOERR);
    let refused = Block::joined(part(1, 4095), others(), &read_only());
    let text = refused.err().unwrap().to_string();
    assert!(text.contains("3584 bytes"), "{text}");
}

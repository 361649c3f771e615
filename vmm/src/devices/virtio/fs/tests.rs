//! The device against a driver that plays the guest's FUSE client.

mod announced;
mod client;

use self::client::{Client, HIPRIO, IN, OUT, REQUEST, ROOT, take};
use super::{FileSystem, ShareServer};
use crate::devices::virtio::{
    VirtioDevice,
    mock_driver::{DEADLINE, Driver},
};
use fuse_backend_rs::abi::fuse_abi::{
    Dirent, EntryOut, ForgetIn, FsOptions, InHeader, Opcode, OpenOut, ReadIn, WriteIn,
};
use proptest::{option, prelude::*, test_runner::TestRunner};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::{
    cell::RefCell,
    fs,
    os::unix::fs::{MetadataExt, symlink},
    time::Instant,
};
use vm_memory::{ByteValued, Bytes, GuestAddress};

#[test]
fn a_file_is_read_and_written() {
    for event_idx in [false, true] {
        let mut client = Client::start(event_idx);
        fs::create_dir(client.share.path().join("etc")).unwrap();
        let content: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
        fs::write(client.share.path().join("etc/motd"), &content).unwrap();
        let options = client.init();
        assert!(options.max_write >= 1 << 20, "{options:?}");
        let enabled = FsOptions::from_bits_truncate(options.flags.into());
        let refused = FsOptions::WRITEBACK_CACHE | FsOptions::ZERO_MESSAGE_OPEN;
        assert!(!enabled.intersects(refused), "{enabled:?}");

        let directory = client.lookup(ROOT, "etc").unwrap();
        let file = client.lookup(directory.nodeid, "motd").unwrap();
        assert_eq!((file.attr.size, file.entry_valid), (400_000, 1));
        let handle = client.open(file.nodeid, libc::O_RDWR).unwrap();
        let read = ReadIn {
            fh: handle,
            offset: 4000,
            size: 0x2_0000,
            flags: u32::try_from(libc::O_RDWR).unwrap(),
            ..ReadIn::default()
        };
        let (error, body) = client.call(Opcode::Read, file.nodeid, read.as_slice(), &[]);
        assert_eq!(error, 0);
        assert!(body == content[4000..4000 + 0x2_0000]);

        let write = WriteIn {
            fh: handle,
            size: 5,
            flags: read.flags,
            ..WriteIn::default()
        };
        let (error, _) = client.call(Opcode::Write, file.nodeid, write.as_slice(), b"hello");
        assert_eq!(error, 0);
        let written = fs::read(client.share.path().join("etc/motd")).unwrap();
        assert_eq!(&written[..5], b"hello");
    }
}

#[test]
fn nothing_outside_the_share_is_reached() {
    let mut client = Client::start(true);
    client.init();
    symlink("/etc", client.share.path().join("link")).unwrap();
    for name in ["", ".", "..", "../etc", "/etc", "link/passwd"] {
        assert_eq!(
            client.lookup(ROOT, name).unwrap_err(),
            libc::EINVAL,
            "{name}"
        );
    }
    let link = client.lookup(ROOT, "link").unwrap();
    assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
    assert!(client.lookup(link.nodeid, "passwd").is_err());
    assert!(client.open(link.nodeid, libc::O_RDONLY).is_err());
}

#[test]
fn special_files_are_shown_and_not_opened() {
    let mut client = Client::start(true);
    client.init();
    let fifo = client.share.path().join("fifo");
    mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let node = client.lookup(ROOT, "fifo").unwrap();
    assert_eq!(node.attr.mode & libc::S_IFMT, libc::S_IFIFO);
    // Opening it would block the thread until the deadline of the test.
    assert_eq!(client.open(node.nodeid, libc::O_RDONLY), Err(libc::EBADF));
}

#[test]
fn what_the_guest_forgets_is_unknown_afterwards() {
    let mut client = Client::start(true);
    client.init();
    fs::write(client.share.path().join("file"), b"x").unwrap();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    let forget = ForgetIn { nlookup: 1 };
    let header = Client::header(Opcode::Forget, node, size_of::<ForgetIn>());
    let memory = &client.driver.memory;
    memory.write_obj(header, GuestAddress(IN)).unwrap();
    let size = u64::try_from(size_of::<InHeader>()).unwrap();
    memory
        .write_slice(forget.as_slice(), GuestAddress(IN + size))
        .unwrap();
    client.driver.queues[HIPRIO].offer(&[(IN, 48)], &[]);
    let (_, written) = client.driver.wait_used(HIPRIO);
    assert_eq!(written, 0);
    assert!(client.open(node, libc::O_RDONLY).is_err());
}

#[test]
fn the_device_starts_again_after_a_reset() {
    let mut client = Client::start(true);
    client.init();
    fs::write(client.share.path().join("file"), b"x").unwrap();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    client.device.reset();
    let (driver, activation) = Driver::new(&[128, 512], true);
    client.driver = driver;
    client.device.activate(activation).unwrap();
    client.init();
    assert!(client.open(node, libc::O_RDONLY).is_err());
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    client.open(node, libc::O_RDONLY).unwrap();
}

#[test]
fn a_corrupt_queue_asks_for_a_reset_of_the_device() {
    let mut client = Client::start(true);
    client.driver.queues[REQUEST].publish(1000);
    client.driver.wait_interrupt(Instant::now() + DEADLINE);
    client.device.reset();
}

#[test]
fn the_configuration_is_the_tag_and_a_queue_for_each_processor() {
    let client = Client::start(true);
    let mut config = [1; 44];
    client.device.read_config(0, &mut config);
    assert_eq!(&config[..8], b"walnut\0\0");
    assert_eq!(&config[32..], &[0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let many = ShareServer::before_jail("/")
        .unwrap()
        .after_jail(false, None);
    let many = FileSystem::new("many", many.unwrap(), 64);
    assert_eq!(many.queue_max_sizes(), [128, 512, 512, 512, 512]);
    assert_eq!(many.shared_region(0), None);
    assert_eq!(client.device.shared_region(0), Some(client.window.region()));
    assert_eq!(client.device.shared_region(1), None);
}

#[test]
fn names_stay_in_their_directory() {
    let mut client = Client::start(true);
    client.init();
    let long = "x".repeat(256);
    for (name, error) in [
        ("..", libc::EINVAL),
        (".", libc::EINVAL),
        ("", libc::EINVAL),
        ("a/b", libc::EINVAL),
        ("/absolute", libc::EINVAL),
        (&long, libc::ENAMETOOLONG),
    ] {
        let name = format!("{name}\0");
        let (bytes, root) = (name.as_bytes(), ROOT);
        let two = [bytes, b"fine\0"].concat();
        for (opcode, words, data) in [
            (Opcode::Mkdir, vec![0o755], bytes),
            (Opcode::Mknod, vec![0o100_644, 0], bytes),
            (Opcode::Create, vec![0, 0], bytes),
            (Opcode::Unlink, vec![], bytes),
            (Opcode::Rmdir, vec![], bytes),
            (Opcode::Symlink, vec![], &two[..]),
            (Opcode::Rename, vec![root], &two[..]),
        ] {
            let result = client.raw(opcode as u32, root, &words, data);
            assert_eq!(result, Err(error), "{opcode:?} of {name:?}");
        }
    }
    let left: Vec<_> = fs::read_dir(client.share.path()).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn extended_attributes_are_those_of_the_very_file() {
    let mut client = Client::start(true);
    client.init();
    fs::write(client.share.path().join("file"), b"x").unwrap();
    symlink("file", client.share.path().join("link")).unwrap();
    let (file, link) = ["file", "link"]
        .map(|name| client.lookup(ROOT, name).unwrap().nodeid)
        .into();
    let set = |size: u64, data: &'static [u8]| (vec![size], data);
    let (words, data) = set(4, b"user.name\0blue");
    client
        .raw(Opcode::Setxattr as u32, file, &words, data)
        .unwrap();
    let get = |client: &mut Client, node, size: u64| {
        client.raw(Opcode::Getxattr as u32, node, &[size], b"user.name\0")
    };
    assert_eq!(get(&mut client, file, 100), Ok(b"blue".to_vec()));
    assert_eq!(get(&mut client, file, 0), Ok(vec![4, 0, 0, 0, 0, 0, 0, 0]));
    assert_eq!(get(&mut client, file, 3), Err(libc::ERANGE));
    assert_eq!(
        get(&mut client, file, u32::MAX.into()),
        Ok(b"blue".to_vec())
    );
    assert_eq!(get(&mut client, link, 100), Err(libc::ENODATA));
    assert_eq!(get(&mut client, 12345, 100), Err(libc::ESTALE));
    let list = client.raw(Opcode::Listxattr as u32, file, &[100], &[]);
    assert!(list.unwrap().windows(10).any(|name| name == b"user.name\0"));
    let long = [&[b'u'; 300][..], b"\0"].concat();
    let removed = client.raw(Opcode::Removexattr as u32, file, &[], &long);
    assert!(removed.is_err());
    client
        .raw(Opcode::Removexattr as u32, file, &[], b"user.name\0")
        .unwrap();
    assert_eq!(get(&mut client, file, 100), Err(libc::ENODATA));
}

#[test]
fn a_directory_lists_itself_and_hides_its_parent() {
    let mut client = Client::start(true);
    client.init();
    fs::write(client.share.path().join("file"), b"x").unwrap();
    let own = fs::metadata(client.share.path()).unwrap().ino();
    let opened = client.raw(Opcode::Opendir as u32, ROOT, &[0], &[]).unwrap();
    let handle: OpenOut = take(&opened);
    let mut names = Vec::new();
    let mut entries = &client
        .raw(
            Opcode::Readdir as u32,
            ROOT,
            &[handle.fh, 0, 4096, 0, 0],
            &[],
        )
        .unwrap()[..];
    while !entries.is_empty() {
        let entry: Dirent = take(entries);
        let name = &entries[24..24 + usize::try_from(entry.namelen).unwrap()];
        names.push((String::from_utf8(name.to_vec()).unwrap(), entry.ino == own));
        entries = &entries[(24 + name.len()).next_multiple_of(8)..];
    }
    names.sort();
    let expected = [(".", true), ("..", true), ("file", false)];
    assert_eq!(names, expected.map(|(name, own)| (name.to_owned(), own)));
}

#[test]
fn a_handle_is_good_for_its_own_file() {
    let mut client = Client::start(true);
    client.init();
    for name in ["one", "two"] {
        fs::write(client.share.path().join(name), name).unwrap();
    }
    let (one, two) = ["one", "two"]
        .map(|name| client.lookup(ROOT, name).unwrap().nodeid)
        .into();
    let handle = client.open(one, libc::O_RDWR).unwrap();
    let read = |handle, node| (Opcode::Read as u32, node, [handle, 0, 16, 0, 0]);
    for (handle, node, result) in [
        (handle, one, Ok(b"one".to_vec())),
        (handle, two, Err(libc::EBADF)),
        (handle + 1, one, Err(libc::EBADF)),
    ] {
        let (opcode, node, words) = read(handle, node);
        assert_eq!(client.raw(opcode, node, &words, &[]), result);
    }
    // COPY_FILE_RANGE, to the end of itself; then to a handle that isn't there, and with a flag that isn't.
    assert_eq!(
        client.raw(47, one, &[handle, 0, one, handle, 3, u64::MAX, 0], &[]),
        Ok(vec![3, 0, 0, 0, 0, 0, 0, 0])
    );
    assert_eq!(
        fs::read(client.share.path().join("one")).unwrap(),
        b"oneone"
    );
    assert_eq!(
        client.raw(47, one, &[handle, 0, two, handle, 0, 1, 0], &[]),
        Err(libc::EBADF)
    );
    assert_eq!(
        client.raw(47, one, &[handle, 0, one, handle, 0, 1, 1], &[]),
        Err(libc::EINVAL)
    );
    // TMPFILE in a directory, and in what is none.
    let flags = u64::from(libc::O_RDWR.unsigned_abs()) | 0o600 << 32;
    let made = client.raw(51, ROOT, &[flags, 0], b"name\0").unwrap();
    assert_eq!(take::<EntryOut>(&made).attr.nlink, 0);
    assert_eq!(
        client.raw(51, one, &[flags, 0], b"name\0"),
        Err(libc::ENOTDIR)
    );
}

/// Whether a file of the share is mapped in this process.
fn mapped(client: &Client) -> bool {
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    maps.contains(client.share.path().to_str().unwrap())
}

#[test]
fn files_are_mapped_within_the_window_until_a_reset() {
    let mut client = Client::start(true);
    client.init();
    fs::write(client.share.path().join("file"), [7; 8192]).unwrap();
    mknodat(
        CWD,
        client.share.path().join("fifo"),
        FileType::Fifo,
        Mode::RUSR,
        0,
    )
    .unwrap();
    let (file, fifo) = ["file", "fifo"]
        .map(|name| client.lookup(ROOT, name).unwrap().nodeid)
        .into();
    let (setup, remove) = (Opcode::SetupMapping as u32, Opcode::RemoveMapping as u32);
    let bad = [
        (0, 4096, 4 << 20),
        (0, 8192, (4 << 20) - 4096),
        (1, 4096, 0),
        (0, u64::MAX, 4096),
    ];
    for (offset, bytes, at) in bad {
        assert_eq!(
            client.raw(setup, file, &[0, offset, bytes, 3, at], &[]),
            Err(libc::EINVAL)
        );
    }
    assert_eq!(
        client.raw(setup, fifo, &[0, 0, 4096, 3, 0], &[]),
        Err(libc::EBADF)
    );
    assert!(!mapped(&client));
    client
        .raw(setup, file, &[0, 0, 8192, 3, 4096], &[])
        .unwrap();
    assert!(mapped(&client));
    let one = |at: u64, bytes: u64| {
        [
            &1u32.to_le_bytes()[..],
            &at.to_le_bytes(),
            &bytes.to_le_bytes(),
        ]
        .concat()
    };
    assert_eq!(
        client.raw(remove, file, &[], &one(4 << 20, 4096)),
        Err(libc::EINVAL)
    );
    client.raw(remove, file, &[], &one(4096, 4096)).unwrap();
    assert!(mapped(&client));
    client.raw(remove, file, &[], &one(0, u64::MAX)).unwrap();
    assert!(!mapped(&client));
    client
        .raw(setup, file, &[0, 4096, 4096, 2, 0], &[])
        .unwrap();
    client.device.reset();
    assert!(!mapped(&client));
}

#[test]
fn what_would_take_all_descriptors_is_refused() {
    let inodes = super::table::Inodes::new(256 + 4);
    let open = |path: &str| {
        let path = rustix::fs::open(path, rustix::fs::OFlags::PATH, Mode::empty()).unwrap();
        let status = super::table::status(&path).unwrap();
        (path, status)
    };
    inodes.start(open("/").0).unwrap();
    let (path, status) = open("/proc");
    let node = inodes.look_up(path, &status, 0).unwrap();
    let (path, status) = open("/sys");
    assert_eq!(
        inodes.look_up(path, &status, 0),
        Err(rustix::io::Errno::NFILE)
    );
    inodes.forget(node, u64::MAX);
    let (path, status) = open("/sys");
    assert_eq!(inodes.look_up(path, &status, 0), Ok(node + 1));
}

/// A piece of a chain: an address and a length, whatever they say.
fn piece() -> impl Strategy<Value = (u64, u32)> {
    prop_oneof![
        Just((0, 40)),
        (0u64..0x100_0100, 0u32..0x2000),
        (any::<u64>(), any::<u32>())
    ]
}

/// Any chain is used in the end, and the device still answers afterwards.
#[test]
fn any_request_is_survived() {
    let mut client = Client::start(true);
    client.init();
    fs::write(client.share.path().join("file"), b"content").unwrap();
    fs::create_dir(client.share.path().join("directory")).unwrap();
    let file = client.lookup(ROOT, "file").unwrap().nodeid;
    let directory = client.lookup(ROOT, "directory").unwrap().nodeid;
    let request = (
        0u32..60,
        prop_oneof![Just(ROOT), Just(file), Just(directory), any::<u64>()],
        option::weighted(0.3, prop_oneof![0u32..200, any::<u32>()]),
        proptest::collection::vec(any::<u8>(), 0..200),
        proptest::collection::vec(piece(), 0..4),
        proptest::collection::vec(piece(), 0..4),
    );
    let client = RefCell::new(client);
    TestRunner::new(ProptestConfig {
        cases: 2000,
        // The device lives on from case to case.
        max_shrink_iters: 0,
        ..ProptestConfig::default()
    })
    .run(&request, |(opcode, node, length, body, more, writable)| {
        let mut client = client.borrow_mut();
        let honest = Client::header(Opcode::Lookup, node, body.len());
        let header = InHeader {
            opcode,
            len: length.unwrap_or(honest.len),
            ..honest
        };
        let memory = &client.driver.memory;
        memory.write_obj(header, GuestAddress(IN)).unwrap();
        memory.write_slice(&body, GuestAddress(IN + 40)).unwrap();
        let mut readable = vec![(IN, 40 + u32::try_from(body.len()).unwrap())];
        readable.extend(more);
        // The rings stay as they are, or the test could not go on.
        let outside_rings = |(at, size): (u64, u32)| (at.saturating_add(OUT), size);
        let writable: Vec<_> = writable.into_iter().map(outside_rings).collect();
        let head = client.driver.queues[REQUEST].offer(&readable, &writable);
        prop_assert_eq!(client.driver.wait_used(REQUEST).0, head);
        Ok(())
    })
    .unwrap();
    client.into_inner().lookup(ROOT, "file").unwrap();
}

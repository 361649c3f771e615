//! What the announcer of a guest is answered, and nobody else.

use super::client::{Client, ROOT, take};
use fuse_backend_rs::abi::fuse_abi::{EntryOut, InHeader, Opcode};
use std::{fs, os::unix::fs::symlink};

const THREAD: u32 = 4711;
const NO_NAME: u32 = 0x7761_6c30;
const FILES: u32 = NO_NAME + 1;
const DIRECTORIES: u32 = NO_NAME + 2;

/// A client that is the announcer.
fn announcer() -> Client {
    let mut client = Client::start(true);
    client.init();
    let name = b"trusted.walnut.announcer\0";
    let body = [&0u64.to_le_bytes(), &name[..]].concat();
    let header = header(Opcode::Getxattr, ROOT, 0, body.len());
    assert_eq!(client.send(&header, &body, &[]).0, 0);
    client
}

fn header(opcode: Opcode, node: u64, gid: u32, bytes: usize) -> InHeader {
    InHeader {
        pid: THREAD,
        gid,
        ..Client::header(opcode, node, bytes)
    }
}

/// A request of the announcer.
fn announce(
    client: &mut Client,
    opcode: Opcode,
    node: u64,
    gid: u32,
    body: &[u8],
) -> Result<Vec<u8>, i32> {
    let header = header(opcode, node, gid, body.len());
    match client.send(&header, body, &[]) {
        (0, body) => Ok(body),
        (error, _) => Err(error),
    }
}

fn listed(client: &Client) -> Vec<String> {
    let entries = fs::read_dir(client.share.path()).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_replaced_link_is_the_old_one_to_the_announcer_and_the_new_one_to_all_others() {
    let mut client = announcer();
    let share = client.share.path().to_owned();
    symlink("one", share.join("..data")).unwrap();
    let old = client.lookup(ROOT, "..data").unwrap().nodeid;
    symlink("two", share.join("..data_tmp")).unwrap();
    fs::rename(share.join("..data_tmp"), share.join("..data")).unwrap();
    // In the order of the guest's kernel: both names, then the rename.
    let moved = announce(&mut client, Opcode::Lookup, ROOT, FILES, b"..data_tmp\0").unwrap();
    let moved: EntryOut = take(&moved);
    assert_eq!(moved.entry_valid, 0);
    assert_eq!(client.open(moved.nodeid, libc::O_RDONLY), Err(libc::ESTALE));
    let target = announce(&mut client, Opcode::Lookup, ROOT, FILES, b"..data\0").unwrap();
    let target: EntryOut = take(&target);
    assert_eq!((target.nodeid, target.attr.nlink), (old, 0));
    let body = [&ROOT.to_le_bytes()[..], b"..data_tmp\0..data\0"].concat();
    announce(&mut client, Opcode::Rename, ROOT, FILES, &body).unwrap();
    let new = client.lookup(ROOT, "..data").unwrap().nodeid;
    assert!(new != old && new != moved.nodeid);
    // What the guest knows and the host still has is not taken from it.
    let again = announce(&mut client, Opcode::Lookup, ROOT, FILES, b"..data\0").unwrap();
    assert_ne!(take::<EntryOut>(&again).nodeid, new);
    assert_eq!(
        fs::read_link(share.join("..data")).unwrap().to_str(),
        Some("two")
    );
}

#[test]
fn nothing_that_is_announced_happens_on_the_host() {
    let mut client = announcer();
    fs::write(client.share.path().join("file"), b"x").unwrap();
    fs::create_dir(client.share.path().join("directory")).unwrap();
    let before = fs::metadata(client.share.path().join("file")).unwrap();
    let node = client.lookup(ROOT, "file").unwrap().nodeid;
    let regular = (libc::S_IFREG | 0o644).to_le_bytes();
    let made = [&regular[..], &[0; 12], b"new\0"].concat();
    let absent = announce(&mut client, Opcode::Lookup, ROOT, NO_NAME, b"file\0");
    assert_eq!(absent, Err(libc::ENOENT));
    let made = announce(&mut client, Opcode::Mknod, ROOT, NO_NAME, &made).unwrap();
    assert_eq!(take::<EntryOut>(&made).attr.mode, libc::S_IFREG);
    let body = [&[0; 8][..], b"new\0"].concat();
    let made = announce(&mut client, Opcode::Mkdir, ROOT, NO_NAME, &body).unwrap();
    assert_eq!(take::<EntryOut>(&made).attr.mode, libc::S_IFDIR);
    announce(&mut client, Opcode::Unlink, ROOT, FILES, b"file\0").unwrap();
    announce(
        &mut client,
        Opcode::Rmdir,
        ROOT,
        DIRECTORIES,
        b"directory\0",
    )
    .unwrap();
    // FATTR_SIZE and FATTR_MTIME: to nothing, at the beginning of time.
    let mut change = [0; 88];
    change[0] = (1 << 3) | (1 << 5);
    announce(&mut client, Opcode::Setattr, node, FILES, &change).unwrap();
    let flags = (libc::O_WRONLY | libc::O_TRUNC).to_le_bytes();
    let flags = [&flags[..], &[0; 4]].concat();
    announce(&mut client, Opcode::Open, node, FILES, &flags).unwrap();
    assert_eq!(listed(&client), ["directory", "file"]);
    let after = fs::metadata(client.share.path().join("file")).unwrap();
    assert_eq!(after.modified().unwrap(), before.modified().unwrap());
    assert_eq!(after.len(), 1);
}

#[test]
fn only_the_announcer_announces() {
    let mut client = announcer();
    fs::write(client.share.path().join("file"), b"x").unwrap();
    let absent = InHeader {
        pid: THREAD + 1,
        ..header(Opcode::Lookup, ROOT, NO_NAME, 5)
    };
    assert_eq!(client.send(&absent, b"file\0", &[]).0, 0, "another thread");
    let plain = announce(&mut client, Opcode::Lookup, ROOT, NO_NAME + 3, b"file\0");
    assert!(plain.is_ok(), "another group");
    client.init();
    let late = announce(&mut client, Opcode::Lookup, ROOT, NO_NAME, b"file\0");
    assert!(late.is_ok(), "a guest that has begun anew");
}

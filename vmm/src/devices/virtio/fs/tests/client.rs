//! A guest's FUSE client, as far as tests need one.

use super::super::{FileSystem, ShareServer};
use crate::{
    devices::virtio::{
        SharedRegion, VirtioDevice,
        mock_driver::{Driver, FIRST_BUFFER},
    },
    window::Window,
};
use fuse_backend_rs::abi::fuse_abi::{
    EntryOut, InHeader, InitIn, InitOut, Opcode, OpenIn, OpenOut, OutHeader,
};
use std::sync::Arc;
use tempfile::TempDir;
use vm_memory::{ByteValued, Bytes, GuestAddress};

pub(super) const HIPRIO: usize = 0;
pub(super) const REQUEST: usize = 1;
pub(super) const ROOT: u64 = 1;
pub(super) const IN: u64 = FIRST_BUFFER;
pub(super) const OUT: u64 = FIRST_BUFFER + 0x20_0000;

pub(super) struct Client {
    pub(super) driver: Driver,
    pub(super) device: FileSystem,
    pub(super) share: TempDir,
    pub(super) window: Arc<Window>,
}

impl Client {
    pub(super) fn start(event_idx: bool) -> Self {
        let share = TempDir::new().unwrap();
        let pending = ShareServer::before_jail(share.path().to_str().unwrap()).unwrap();
        let region = SharedRegion {
            address: GuestAddress(1 << 40),
            bytes: 4 << 20,
        };
        let window = Arc::new(Window::new(region).unwrap());
        let server = pending.after_jail(false, Some(window.clone())).unwrap();
        let mut device = FileSystem::new("walnut", server, 2);
        let (driver, mut activation) = Driver::new(&[128, 512, 512], event_idx);
        // A guest with one processor.
        activation.queues[2] = None;
        device.activate(activation).unwrap();
        Self {
            driver,
            device,
            share,
            window,
        }
    }

    /// Sends header, arguments and data in descriptors of their own; gives errno and what follows the
    /// header of the answer.
    pub(super) fn call(
        &mut self,
        opcode: Opcode,
        node: u64,
        args: &[u8],
        data: &[u8],
    ) -> (i32, Vec<u8>) {
        let header = Self::header(opcode, node, args.len() + data.len());
        self.send(&header, args, data)
    }

    pub(super) fn send(&mut self, header: &InHeader, args: &[u8], data: &[u8]) -> (i32, Vec<u8>) {
        let mut at = IN;
        let mut readable = Vec::new();
        for part in [header.as_slice(), args, data] {
            if !part.is_empty() {
                self.driver
                    .memory
                    .write_slice(part, GuestAddress(at))
                    .unwrap();
                readable.push((at, u32::try_from(part.len()).unwrap()));
                at += u64::try_from(part.len()).unwrap();
            }
        }
        let writable = [(OUT, 16), (OUT + 16, 0x1_0000), (OUT + 0x1_0010, 0x1_0000)];
        let head = self.driver.queues[REQUEST].offer(&readable, &writable);
        let (used, length) = self.driver.wait_used(REQUEST);
        assert_eq!(used, head);
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        self.driver
            .memory
            .read_slice(&mut bytes, GuestAddress(OUT))
            .unwrap();
        let answer: OutHeader = take(&bytes);
        assert_eq!((answer.len, answer.unique), (length, 7));
        (-answer.error, bytes.split_off(size_of::<OutHeader>()))
    }

    pub(super) fn header(opcode: Opcode, node: u64, payload: usize) -> InHeader {
        InHeader {
            len: u32::try_from(size_of::<InHeader>() + payload).unwrap(),
            opcode: opcode as u32,
            unique: 7,
            nodeid: node,
            ..InHeader::default()
        }
    }

    pub(super) fn init(&mut self) -> InitOut {
        let init = InitIn {
            major: 7,
            minor: 31,
            max_readahead: 1 << 17,
            flags: !(1 << 30),
        };
        let (error, body) = self.call(Opcode::Init, 0, init.as_slice(), &[]);
        assert_eq!(error, 0);
        take(&body)
    }

    pub(super) fn lookup(&mut self, parent: u64, name: &str) -> Result<EntryOut, i32> {
        let name = format!("{name}\0");
        match self.call(Opcode::Lookup, parent, &[], name.as_bytes()) {
            (0, body) => Ok(take(&body)),
            (error, _) => Err(error),
        }
    }

    /// Calls with any opcode and a body of these words and this data.
    pub(super) fn raw(
        &mut self,
        opcode: u32,
        node: u64,
        words: &[u64],
        data: &[u8],
    ) -> Result<Vec<u8>, i32> {
        let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        body.extend(data);
        let header = InHeader {
            opcode,
            ..Self::header(Opcode::Lookup, node, body.len())
        };
        match self.send(&header, &body, &[]) {
            (0, body) => Ok(body),
            (error, _) => Err(error),
        }
    }

    pub(super) fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let open = OpenIn {
            flags: u32::try_from(flags).unwrap(),
            ..OpenIn::default()
        };
        match self.call(Opcode::Open, node, open.as_slice(), &[]) {
            (0, body) => Ok(take::<OpenOut>(&body).fh),
            (error, _) => Err(error),
        }
    }
}

pub(super) fn take<T: ByteValued>(bytes: &[u8]) -> T {
    let mut value = T::zeroed();
    value
        .as_mut_slice()
        .copy_from_slice(&bytes[..size_of::<T>()]);
    value
}

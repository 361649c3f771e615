//! A guest's socket driver, and its end of a connection.

use crate::devices::virtio::{
    VirtioDevice,
    mock_driver::{DEADLINE, Driver, FIRST_BUFFER},
    vsock::{
        Vsock,
        packet::{Credit, HEADER_BYTES, HOST_CID, Header, TYPE_STREAM},
    },
};
use std::{
    collections::HashMap,
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use walnut_vmm_api::{connect_line, parse_ok};

pub(super) const CID: u64 = 42;
pub(super) const RX: usize = 0;
pub(super) const TX: usize = 1;
pub(super) const REQUEST: u16 = 1;
pub(super) const RESPONSE: u16 = 2;
pub(super) const RESET: u16 = 3;
pub(super) const SHUTDOWN: u16 = 4;
pub(super) const DATA: u16 = 5;
pub(super) const CREDIT_UPDATE: u16 = 6;
pub(super) const CREDIT_REQUEST: u16 = 7;
pub(super) const PORT: u32 = 1024;
/// Bytes of each receive buffer: small, so that payload is spread.
pub(super) const RX_BYTES: u32 = 700;
pub(super) const TX_BYTES: u32 = 64 * 1024;

pub(super) struct Guest {
    pub(super) driver: Driver,
    pub(super) rx: HashMap<u16, u64>,
    pub(super) device: Vsock,
    pub(super) ready: EventFd,
    directory: TempDir,
    /// Where the guest's payload lies; reused once a packet is taken.
    tx_slots: Vec<u64>,
    pub(super) tx: HashMap<u16, u64>,
}

impl Guest {
    pub(super) fn start(event_idx: bool, rx_buffers: u16) -> Self {
        let directory = TempDir::new().unwrap();
        let listener = UnixListener::bind(directory.path().join("s")).unwrap();
        let ready = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut device = Vsock::new(CID, listener.into(), ready.try_clone().unwrap()).unwrap();
        let (driver, activation) = Driver::new(&[128, 128, 16], event_idx);
        device.activate(activation).unwrap();
        let tx_slots = (0..32).map(|slot| FIRST_BUFFER + (1 << 20) + slot * 0x2_0000);
        let mut guest = Self {
            driver,
            rx: HashMap::new(),
            device,
            ready,
            directory,
            tx_slots: tx_slots.collect(),
            tx: HashMap::new(),
        };
        for slot in 0..u64::from(rx_buffers) {
            guest.offer_rx(FIRST_BUFFER + slot * 0x1000);
        }
        guest
    }

    pub(super) fn socket_path(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    pub(super) fn offer_rx(&mut self, address: u64) {
        let head = self.driver.queues[RX].offer(&[], &[(address, RX_BYTES)]);
        self.rx.insert(head, address);
    }

    /// The next packet that the host sent.
    pub(super) fn receive(&mut self) -> (Header, Vec<u8>) {
        let (head, length) = self.driver.wait_used(RX);
        self.read_packet(head, length)
    }

    pub(super) fn read_packet(&mut self, head: u16, length: u32) -> (Header, Vec<u8>) {
        let address = self.rx.remove(&head).unwrap();
        let mut bytes = vec![0; usize::try_from(length).unwrap()];
        self.driver
            .memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        self.offer_rx(address);
        let header = Header::from_bytes(bytes[..HEADER_BYTES].try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        assert_eq!(
            usize::try_from(header.len).unwrap(),
            bytes.len() - HEADER_BYTES
        );
        (header, bytes.split_off(HEADER_BYTES))
    }

    pub(super) fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    pub(super) fn send(&mut self, header: Header, payload: &[u8]) {
        while let Some((head, _)) = self.driver.queues[TX].poll_used() {
            self.tx_slots.push(self.tx.remove(&head).unwrap());
        }
        if self.tx_slots.is_empty() {
            let (head, _) = self.driver.wait_used(TX);
            self.tx_slots.push(self.tx.remove(&head).unwrap());
        }
        let address = self.tx_slots.pop().unwrap();
        let memory = &self.driver.memory;
        memory
            .write_slice(&header.to_bytes(), GuestAddress(address))
            .unwrap();
        let data = address + 0x1000;
        memory.write_slice(payload, GuestAddress(data)).unwrap();
        let head_bytes = u32::try_from(HEADER_BYTES).unwrap();
        let mut readable = vec![(address, head_bytes)];
        // In two pieces, as Linux does with large packets.
        let half = payload.len() / 2;
        for (at, piece) in [(0, &payload[..half]), (half, &payload[half..])] {
            if !piece.is_empty() {
                let at = data + u64::try_from(at).unwrap();
                readable.push((at, u32::try_from(piece.len()).unwrap()));
            }
        }
        let head = self.driver.queues[TX].offer(&readable, &[]);
        self.tx.insert(head, address);
    }

    /// Sends a header from a place of its own, whether or not earlier ones were taken.
    pub(super) fn raw(&mut self, header: &Header) -> u16 {
        let address = FIRST_BUFFER + (8 << 20) + 64 * u64::try_from(self.tx.len()).unwrap();
        let memory = &self.driver.memory;
        memory
            .write_slice(&header.to_bytes(), GuestAddress(address))
            .unwrap();
        let bytes = u32::try_from(HEADER_BYTES).unwrap();
        self.driver.queues[TX].offer(&[(address, bytes)], &[])
    }

    /// A host program that asks for [`PORT`]; the guest has accepted when this returns.
    /// Packets for other connections are skipped.
    pub(super) fn connect(&mut self, buf_alloc: u32) -> (BufReader<UnixStream>, Peer) {
        let mut program = dial(&self.socket_path());
        let request = loop {
            let (header, _) = self.receive();
            if header.op == REQUEST {
                break header;
            }
        };
        assert_eq!(request.dst_port, PORT);
        let peer = Peer::new(&request, buf_alloc);
        let response = peer.header(RESPONSE);
        self.send(response, &[]);
        let mut line = Vec::new();
        program.read_until(b'\n', &mut line).unwrap();
        assert_eq!(parse_ok(&line), Ok(request.src_port));
        (program, peer)
    }
}

pub(super) fn dial(path: &Path) -> BufReader<UnixStream> {
    let mut program = UnixStream::connect(path).unwrap();
    program.set_read_timeout(Some(DEADLINE)).unwrap();
    program.set_write_timeout(Some(DEADLINE)).unwrap();
    program.write_all(connect_line(PORT).as_bytes()).unwrap();
    BufReader::new(program)
}

/// The guest's end of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer {
    pub(super) host_port: u32,
    buf_alloc: u32,
    pub(super) forwarded: u32,
    sent: u32,
    pub(super) host: Credit,
}

impl Peer {
    pub(super) fn new(request: &Header, buf_alloc: u32) -> Self {
        Self {
            host_port: request.src_port,
            buf_alloc,
            forwarded: 0,
            sent: 0,
            host: request.credit,
        }
    }

    pub(super) fn header(&self, op: u16) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: PORT,
            dst_port: self.host_port,
            socket_type: TYPE_STREAM,
            op,
            credit: Credit {
                buf_alloc: self.buf_alloc,
                fwd_cnt: self.forwarded,
            },
            ..Header::default()
        }
    }

    pub(super) fn credit(&self) -> u32 {
        self.host.buf_alloc - self.sent.wrapping_sub(self.host.fwd_cnt)
    }

    pub(super) fn data(&mut self, payload: &[u8]) -> Header {
        let len = u32::try_from(payload.len()).unwrap();
        self.sent = self.sent.wrapping_add(len);
        Header {
            len,
            ..self.header(DATA)
        }
    }

    pub(super) fn shutdown(&self, flags: u32) -> Header {
        Header {
            flags,
            ..self.header(SHUTDOWN)
        }
    }
}

//! bpf(2), and perf_event_open(2) where a program is attached by it, each use as one safe function.
//!
//! Linux, `include/uapi/linux/bpf.h`, `include/uapi/linux/perf_event.h`. Must not hold policy.
#![allow(
    unsafe_code,
    reason = "bpf(2) and perf_event_open(2) have no safe wrapper"
)]

use std::{
    io,
    mem::size_of,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const BPF_LINK_CREATE: libc::c_int = 28;

const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_SK_LOOKUP: u32 = 36;
const BPF_F_ALLOW_MULTI: u32 = 2;

const PERF_TYPE_TRACEPOINT: u32 = 2;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
const PERF_EVENT_IOC_ENABLE: libc::Ioctl = 0x2400;
const PERF_EVENT_IOC_SET_BPF: libc::Ioctl = 0x4004_2408;

/// The kernel's verifier gives up with EAGAIN when a signal comes, such as that of a child's end; the signal
/// has been handled when the call returns, so each attempt can only be disturbed by a further one.
const LOAD_ATTEMPTS: u32 = 100;

/// Kinds of programs (`enum bpf_prog_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgramKind {
    /// Called at a trace event with its fields.
    Tracepoint = 5,
    /// Asked whether a process of a cgroup may use a device.
    CgroupDevice = 15,
    /// Called at a tracepoint with its arguments as they are.
    RawTracepoint = 17,
    /// Asked which socket of a network namespace takes a connection (Linux 5.9).
    SocketLookup = 30,
}

/// Kinds of maps (`enum bpf_map_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    /// One value for each key.
    Hash = 1,
    /// One value for each key and processor.
    PerProcessorHash = 5,
    /// One value for each index and processor.
    PerProcessorArray = 6,
    /// The entry that was used longest ago makes room.
    LeastRecentlyUsedHash = 9,
    /// Sockets by index. One that is closed is taken out.
    Sockets = 15,
}

/// The shape of a map.
#[derive(Debug, Clone, Copy)]
pub struct MapShape {
    /// Its kind.
    pub kind: MapKind,
    /// Bytes of a key.
    pub key: u32,
    /// Bytes of a value, of one processor.
    pub value: u32,
    /// Entries at the most.
    pub entries: u32,
    /// `BPF_F_*`.
    pub flags: u32,
}

/// Memory is taken entry by entry (`BPF_F_NO_PREALLOC`).
pub const NO_PREALLOCATION: u32 = 1;

/// `bpf_attr` of `BPF_MAP_CREATE`, up to the last field that is used.
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// `bpf_attr` of `BPF_MAP_*_ELEM` and `BPF_MAP_GET_NEXT_KEY`.
#[repr(C)]
struct MapElement {
    map_fd: u32,
    unused: u32,
    key: u64,
    /// Or the next key.
    value: u64,
    flags: u64,
}

/// `bpf_attr` of `BPF_PROG_LOAD`, up to the last field that is used.
#[repr(C)]
struct ProgramLoad {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface_index: u32,
    expected_attach_type: u32,
}

/// `bpf_attr` of `BPF_PROG_ATTACH`.
#[repr(C)]
struct ProgramAttach {
    target_fd: u32,
    program_fd: u32,
    kind: u32,
    flags: u32,
}

/// `perf_event_attr`, as far as its first version goes.
#[repr(C)]
#[derive(Default)]
struct PerfEvent {
    kind: u32,
    size: u32,
    config: u64,
    /// Nothing is sampled, nothing read, no flag set.
    rest: [u64; 6],
}

/// `bpf_attr` of `BPF_LINK_CREATE`, up to the last field that is used.
#[repr(C)]
struct LinkCreate {
    program_fd: u32,
    target_fd: u32,
    kind: u32,
    flags: u32,
}

/// `bpf_attr` of `BPF_RAW_TRACEPOINT_OPEN`.
#[repr(C)]
struct TracepointOpen {
    name: u64,
    program_fd: u32,
    unused: u32,
}

fn number(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// bpf(2). The attributes must be those of the command; what they point to must be of the size that the
/// command reads or writes.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: `attributes` outlives the call and its size is the one passed; the callers in this file see to
    // the memory that its addresses name.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    match RawFd::try_from(result) {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

fn owned(descriptor: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made this file descriptor and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

/// Loads a program of encoded instructions. `name` is for who lists programs: at most 15 letters and `_`.
pub fn load(kind: ProgramKind, name: &'static str, instructions: &[u64]) -> io::Result<OwnedFd> {
    let mut padded = [0; 16];
    for (to, from) in padded.iter_mut().take(15).zip(name.bytes()) {
        *to = from;
    }
    let attributes = ProgramLoad {
        kind: kind as u32,
        instruction_count: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        instructions: instructions.as_ptr().addr() as u64,
        license: c"Apache".as_ptr().addr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        flags: 0,
        name: padded,
        interface_index: 0,
        expected_attach_type: match kind {
            ProgramKind::CgroupDevice => BPF_CGROUP_DEVICE,
            ProgramKind::Tracepoint | ProgramKind::RawTracepoint => 0,
            ProgramKind::SocketLookup => BPF_SK_LOOKUP,
        },
    };
    let load = || bpf(BPF_PROG_LOAD, &attributes);
    (1..LOAD_ATTEMPTS)
        .find_map(|_| match load() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            other => Some(other),
        })
        .unwrap_or_else(load)
        .map(owned)
}

/// Attaches a device program to a cgroup directory; it joins those of the parents, each of which can refuse.
pub fn attach_to_cgroup(cgroup: &impl AsFd, program: &impl AsFd) -> io::Result<()> {
    let attributes = ProgramAttach {
        target_fd: number(cgroup.as_fd()),
        program_fd: number(program.as_fd()),
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attributes).map(drop)
}

/// Calls a program at a tracepoint as long as the result lives.
pub fn attach_to_tracepoint(
    name: &'static std::ffi::CStr,
    program: &impl AsFd,
) -> io::Result<OwnedFd> {
    let attributes = TracepointOpen {
        name: name.as_ptr().addr() as u64,
        program_fd: number(program.as_fd()),
        unused: 0,
    };
    bpf(BPF_RAW_TRACEPOINT_OPEN, &attributes).map(owned)
}

/// Calls a program at the trace event of this number, on every processor, as long as the result lives.
pub fn attach_to_trace_event(event: u64, program: &impl AsFd) -> io::Result<OwnedFd> {
    let attributes = PerfEvent {
        kind: PERF_TYPE_TRACEPOINT,
        size: u32::try_from(size_of::<PerfEvent>()).map_err(io::Error::other)?,
        config: event,
        ..PerfEvent::default()
    };
    let (every_process, processor, no_group) = (-1_i32, 0_i32, -1_i32);
    // SAFETY: the kernel reads `attributes`, which outlives the call and is as large as it says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_perf_event_open,
            &raw const attributes,
            every_process,
            processor,
            no_group,
            PERF_FLAG_FD_CLOEXEC,
        )
    };
    let link = match RawFd::try_from(result) {
        Ok(value) if value >= 0 => owned(value),
        _ => return Err(io::Error::last_os_error()),
    };
    let program = program.as_fd().as_raw_fd();
    for (request, argument) in [
        (PERF_EVENT_IOC_SET_BPF, program),
        (PERF_EVENT_IOC_ENABLE, 0),
    ] {
        // SAFETY: both requests take a number; the kernel takes its own reference to the program.
        let result = unsafe { libc::ioctl(link.as_raw_fd(), request, argument) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(link)
}

/// Asks a program for the sockets of a network namespace as long as the result lives; the namespace may end before.
pub fn attach_to_network(namespace: &impl AsFd, program: &impl AsFd) -> io::Result<OwnedFd> {
    let attributes = LinkCreate {
        program_fd: number(program.as_fd()),
        target_fd: number(namespace.as_fd()),
        kind: BPF_SK_LOOKUP,
        flags: 0,
    };
    bpf(BPF_LINK_CREATE, &attributes).map(owned)
}

/// A map.
#[derive(Debug)]
pub struct Map {
    descriptor: OwnedFd,
    shape: MapShape,
}

impl Map {
    /// Makes a map.
    pub fn create(shape: MapShape) -> io::Result<Self> {
        let attributes = MapCreate {
            kind: shape.kind as u32,
            key_size: shape.key,
            value_size: shape.value,
            max_entries: shape.entries,
            flags: shape.flags,
        };
        let descriptor = owned(bpf(BPF_MAP_CREATE, &attributes)?);
        Ok(Self { descriptor, shape })
    }

    /// The number by which a program names it.
    pub fn descriptor(&self) -> RawFd {
        self.descriptor.as_raw_fd()
    }

    /// Puts a socket that listens into a map of sockets of 8 bytes, with indices for keys.
    pub fn put_socket(&self, index: u32, socket: &impl AsFd) -> io::Result<()> {
        if (self.shape.key, self.shape.value) != (4, 8) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let value = u64::from(number(socket.as_fd()));
        let attributes = MapElement {
            map_fd: number(self.descriptor.as_fd()),
            unused: 0,
            key: std::ptr::from_ref(&index).addr() as u64,
            value: std::ptr::from_ref(&value).addr() as u64,
            flags: 0,
        };
        bpf(BPF_MAP_UPDATE_ELEM, &attributes).map(drop)
    }

    /// The keys that it has; of those that come and go meanwhile some may be missed, or come twice.
    pub fn keys(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut keys: Vec<Vec<u8>> = Vec::new();
        // A key that goes while it is read lets the kernel begin again: no more steps than entries.
        for _ in 0..self.shape.entries {
            match self.next_key(keys.last().map(Vec::as_slice))? {
                Some(next) => keys.push(next),
                None => break,
            }
        }
        Ok(keys)
    }

    /// The key that comes after `key`, or the first.
    fn next_key(&self, key: Option<&[u8]>) -> io::Result<Option<Vec<u8>>> {
        let mut next = vec![0; size(self.shape.key)?];
        if key.is_some_and(|key| key.len() != next.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let attributes = MapElement {
            map_fd: number(self.descriptor.as_fd()),
            unused: 0,
            key: key.map_or(0, |key| key.as_ptr().addr() as u64),
            value: next.as_mut_ptr().expose_provenance() as u64,
            flags: 0,
        };
        match bpf(BPF_MAP_GET_NEXT_KEY, &attributes) {
            Ok(_) => Ok(Some(next)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes a key; removing what is gone succeeds.
    pub fn remove(&self, key: &[u8]) -> io::Result<()> {
        if key.len() != size(self.shape.key)? {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let attributes = MapElement {
            map_fd: number(self.descriptor.as_fd()),
            unused: 0,
            key: key.as_ptr().addr() as u64,
            value: 0,
            flags: 0,
        };
        match bpf(BPF_MAP_DELETE_ELEM, &attributes) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// The value of each of `processors` (all that the kernel might ever have), one after the other, each
    /// padded to 8 bytes.
    pub fn values(&self, key: &[u8], processors: usize) -> io::Result<Option<Vec<u8>>> {
        let each = size(self.shape.value)?.next_multiple_of(8);
        if key.len() != size(self.shape.key)? {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut values = vec![0; each * processors];
        let attributes = MapElement {
            map_fd: number(self.descriptor.as_fd()),
            unused: 0,
            key: key.as_ptr().addr() as u64,
            value: values.as_mut_ptr().expose_provenance() as u64,
            flags: 0,
        };
        match bpf(BPF_MAP_LOOKUP_ELEM, &attributes) {
            Ok(_) => Ok(Some(values)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn size(bytes: u32) -> io::Result<usize> {
    usize::try_from(bytes).map_err(io::Error::other)
}

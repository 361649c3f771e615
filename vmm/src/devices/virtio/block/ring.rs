#![allow(
    unsafe_code,
    reason = "hands guest memory to the kernel, which reads and writes it after the call"
)]
//! Work on a disk's file by io_uring: many jobs at once, done in any order.
//!
//! The ring is made, and bound to the one file and the few operations that it is for, before the guest runs: who
//! takes over the thread that uses it can do no more with it. Must not know queues.

use super::{
    disk::{Durability, Erase, Job, MAX_REQUEST_BYTES, is_unsupported},
    request::Piece,
};
use io_uring::{
    IoUring, opcode,
    register::Restriction,
    squeue::{self, Flags},
    types::{Fixed, FsyncFlags},
};
use std::{
    collections::VecDeque,
    fs::File,
    io,
    os::fd::{AsRawFd, RawFd},
    sync::Arc,
};
use vm_memory::{GuestMemory, GuestMemoryMmap};

/// Jobs at once at the most, and entries of the ring: each job has one entry at a time.
const JOBS: u32 = 256;
/// Bytes of all jobs at once, after which no other one is begun: what bounds the time until all are done.
const MAX_BYTES: u64 = 2 * MAX_REQUEST_BYTES;
/// Threads of the kernel that do what would block, of which files take the first kind.
const MAX_THREADS: [u32; 2] = [8, 1];
/// The disk's file, by its place in the ring's table.
const FILE: Fixed = Fixed(0);

/// A ring for one file.
pub(super) struct Ring<T> {
    uring: IoUring,
    /// Jobs that the kernel has, by the number that it gives back.
    flights: Vec<Option<Flight<T>>>,
    free: Vec<usize>,
    bytes: u64,
}

/// A job that the kernel has. Lives until the kernel is done with it.
#[derive(Debug)]
struct Flight<T> {
    ticket: T,
    work: Work,
    weight: u64,
    /// What the work's buffers are part of.
    _memory: Arc<GuestMemoryMmap>,
}

// SAFETY: the pointers in it lead to memory that the flight itself keeps, and nothing is bound to a thread.
unsafe impl<T: Send> Send for Flight<T> {}

#[derive(Debug)]
enum Work {
    Read(Transfer),
    Write(Transfer, Durability),
    Flush,
    Erase(VecDeque<Erase>),
}

/// What is left of a read or write.
#[derive(Debug)]
struct Transfer {
    position: u64,
    buffers: VecDeque<libc::iovec>,
}

impl Transfer {
    fn new(memory: &GuestMemoryMmap, position: u64, pieces: &[Piece]) -> io::Result<Self> {
        let mut buffers = VecDeque::with_capacity(pieces.len());
        for piece in pieces {
            let bytes = usize::try_from(piece.bytes).map_err(io::Error::other)?;
            for slice in memory.get_slices(piece.address, bytes) {
                let slice = slice.map_err(io::Error::other)?;
                buffers.push_back(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        buffers.make_contiguous();
        Ok(Self { position, buffers })
    }

    /// Buffers for the kernel. Contiguous: elements are only ever taken off the front.
    fn buffers(&self) -> (*const libc::iovec, u32) {
        let buffers = self.buffers.as_slices().0;
        (buffers.as_ptr(), u32::try_from(buffers.len()).unwrap_or(0))
    }

    /// Accounts for bytes that were moved; true when none are left.
    fn advance(&mut self, mut moved: usize) -> bool {
        self.position = self.position.saturating_add(moved as u64);
        while let Some(buffer) = self.buffers.front_mut() {
            if moved < buffer.iov_len {
                buffer.iov_base = buffer.iov_base.wrapping_byte_add(moved);
                buffer.iov_len -= moved;
                return false;
            }
            moved -= buffer.iov_len;
            self.buffers.pop_front();
        }
        true
    }
}

impl Work {
    fn new(memory: &GuestMemoryMmap, job: Job, durability: Durability) -> io::Result<Self> {
        Ok(match job {
            Job::Read(position, pieces) => Self::Read(Transfer::new(memory, position, &pieces)?),
            Job::Write(position, pieces) => {
                Self::Write(Transfer::new(memory, position, &pieces)?, durability)
            }
            Job::Flush => Self::Flush,
            Job::Erase(erases) => Self::Erase(erases),
        })
    }

    /// The next step, for the kernel.
    fn entry(&self) -> squeue::Entry {
        match self {
            Self::Read(transfer) => {
                let (buffers, count) = transfer.buffers();
                let entry = opcode::Readv::new(FILE, buffers, count);
                entry.offset(transfer.position).build()
            }
            Self::Write(transfer, durability) => {
                let (buffers, count) = transfer.buffers();
                let flags = match durability {
                    Durability::Cached => 0,
                    Durability::Durable => libc::RWF_DSYNC,
                };
                let entry = opcode::Writev::new(FILE, buffers, count).rw_flags(flags);
                entry.offset(transfer.position).build()
            }
            Self::Flush => {
                let entry = opcode::Fsync::new(FILE);
                entry.flags(FsyncFlags::DATASYNC).build()
            }
            Self::Erase(erases) => {
                let first = erases.front();
                let (position, bytes) = first.map_or((0, 0), |erase| (erase.position, erase.bytes));
                let mode = first.map_or(0, |erase| erase.how.mode().bits());
                let entry = opcode::Fallocate::new(FILE, bytes).offset(position);
                entry.mode(mode.cast_signed()).build()
            }
        }
    }

    /// Takes the outcome of a step; `None` when another one is to follow.
    fn advance(&mut self, result: i32) -> Option<io::Result<()>> {
        let Ok(moved) = usize::try_from(result) else {
            let error = io::Error::from_raw_os_error(result.saturating_neg());
            return self.recover(error).map(Err);
        };
        let done = match self {
            Self::Read(_) | Self::Write(..) if moved == 0 => {
                return Some(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            Self::Read(transfer) | Self::Write(transfer, _) => transfer.advance(moved),
            Self::Flush => true,
            Self::Erase(erases) => {
                erases.pop_front();
                erases.is_empty()
            }
        };
        done.then_some(Ok(()))
    }

    /// Gives the error back, unless the step can be tried again, or in another way.
    fn recover(&mut self, error: io::Error) -> Option<io::Error> {
        if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
            return None;
        }
        let Self::Erase(erases) = self else {
            return Some(error);
        };
        let otherwise = erases.front().and_then(|erase| erase.how.otherwise());
        match (erases.front_mut(), otherwise) {
            (Some(erase), Some(otherwise)) if is_unsupported(&error) => {
                erase.how = otherwise;
                None
            }
            _ => Some(error),
        }
    }
}

impl<T> Ring<T> {
    /// A ring that can read, write, sync and erase `file`, and nothing else.
    pub(super) fn new(file: &File) -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_r_disabled()
            .setup_submit_all()
            .build(JOBS)?;
        let submitter = uring.submitter();
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_iowq_max_workers(&mut MAX_THREADS.clone())?;
        let operations = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        let operations = operations.map(Restriction::sqe_op);
        let on_the_file = Restriction::sqe_flags_required(Flags::FIXED_FILE.bits());
        let mut restrictions: Vec<_> = operations.into_iter().chain([on_the_file]).collect();
        submitter.register_restrictions(&mut restrictions)?;
        submitter.register_enable_rings()?;
        let jobs = usize::try_from(JOBS).map_err(io::Error::other)?;
        Ok(Self {
            uring,
            flights: (0..jobs).map(|_| None).collect(),
            free: (0..jobs).collect(),
            bytes: 0,
        })
    }

    /// Whether another job may be begun.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty() && self.bytes < MAX_BYTES
    }

    /// Begins a job, with the next [`Ring::submit`]. There must be room for it.
    pub(super) fn begin(
        &mut self,
        memory: &Arc<GuestMemoryMmap>,
        job: Job,
        durability: Durability,
        ticket: T,
    ) -> Result<(), (T, io::Error)> {
        let weight = job.weight();
        let work = match Work::new(memory, job, durability) {
            Ok(work) => work,
            Err(error) => return Err((ticket, error)),
        };
        let Some(slot) = self.free.pop() else {
            return Err((ticket, io::ErrorKind::ResourceBusy.into()));
        };
        let flight = self.flights[slot].insert(Flight {
            ticket,
            work,
            weight,
            _memory: memory.clone(),
        });
        let entry = flight.work.entry().user_data(slot as u64);
        self.bytes += weight;
        self.push(&entry);
        Ok(())
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the buffers that the entry names, and the guest memory that these name, are kept by its flight,
        // which is only dropped once the kernel has reported the entry's end.
        let pushed = unsafe { self.uring.submission().push(entry) };
        pushed.expect("a ring has an entry for each job, and a job has one at a time");
    }

    /// Tells the kernel of the jobs that were begun.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        while !self.uring.submission().is_empty() {
            self.enter(0)?;
        }
        Ok(())
    }

    fn enter(&mut self, completions: usize) -> io::Result<()> {
        match self.uring.submit_and_wait(completions) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    /// A job that is done, and what it came to. Jobs that are not done yet go on with the next [`Ring::submit`].
    pub(super) fn finished(&mut self) -> Option<(T, io::Result<()>)> {
        loop {
            let completion = self.uring.completion().next()?;
            let slot = usize::try_from(completion.user_data()).ok()?;
            let flight = self.flights.get_mut(slot)?.as_mut()?;
            match flight.work.advance(completion.result()) {
                None => {
                    let entry = flight.work.entry().user_data(slot as u64);
                    self.push(&entry);
                }
                Some(result) => {
                    let flight = self.flights[slot].take()?;
                    self.free.push(slot);
                    self.bytes -= flight.weight;
                    return Some((flight.ticket, result));
                }
            }
        }
    }

    /// Waits until the kernel has no job any more, and forgets them. Then no guest memory is written any more.
    pub(super) fn drain(&mut self) -> io::Result<()> {
        while self.free.len() < self.flights.len() {
            self.enter(1)?;
            while self.finished().is_some() {}
        }
        Ok(())
    }
}

impl<T> AsRawFd for Ring<T> {
    /// Readable when a job is done.
    fn as_raw_fd(&self) -> RawFd {
        self.uring.as_raw_fd()
    }
}

impl<T> Drop for Ring<T> {
    fn drop(&mut self) {
        if self.drain().is_err() {
            // The kernel may still use what they keep.
            std::mem::forget(std::mem::take(&mut self.flights));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use vm_memory::GuestAddress;

    fn file(bytes: u64) -> File {
        let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(bytes).unwrap();
        file
    }

    fn memory() -> Arc<GuestMemoryMmap> {
        // Two ranges that touch, as where memory was added.
        let ranges = [
            (GuestAddress(0), 0x1_0000),
            (GuestAddress(0x1_0000), 0x1_0000),
        ];
        Arc::new(crate::memory::allocate(&ranges).unwrap())
    }

    fn piece(address: u64, bytes: u32) -> Piece {
        Piece {
            address: GuestAddress(address),
            bytes,
        }
    }

    fn wait(ring: &mut Ring<u32>) -> (u32, io::Result<()>) {
        loop {
            if let Some(finished) = ring.finished() {
                return finished;
            }
            ring.enter(1).unwrap();
        }
    }

    #[test]
    fn a_ring_does_nothing_but_what_it_is_for() {
        let Ok(mut ring) = Ring::<u32>::new(&file(4096)) else {
            return;
        };
        for entry in [
            opcode::Nop::new().build().flags(Flags::FIXED_FILE),
            opcode::Fsync::new(io_uring::types::Fd(0)).build(),
            opcode::Fsync::new(Fixed(1)).build(),
        ] {
            ring.push(&entry.user_data(u64::MAX));
            ring.enter(1).unwrap();
            let completion = ring.uring.completion().next().unwrap();
            let refused = [-libc::EACCES, -libc::EBADF];
            assert!(refused.contains(&completion.result()), "{completion:?}");
        }
        let refused = ring.uring.submitter().register_files(&[0]).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn a_file_that_ends_early_fails_the_read_and_pieces_may_cross_ranges() {
        let Ok(mut ring) = Ring::new(&file(6000)) else {
            return;
        };
        let memory = memory();
        let crossing = vec![piece(0xf000, 0x1800)];
        for (ticket, position, fails) in [(1, 0, true), (2, 4096, true), (3, 0, true)] {
            let job = Job::Read(position, crossing.clone());
            ring.begin(&memory, job, Durability::Cached, ticket)
                .unwrap();
            ring.submit().unwrap();
            let (finished, result) = wait(&mut ring);
            assert_eq!((finished, result.is_err()), (ticket, fails));
        }
        let job = Job::Write(0, crossing.clone());
        ring.begin(&memory, job, Durability::Durable, 4).unwrap();
        ring.submit().unwrap();
        assert!(wait(&mut ring).1.is_ok());
        let job = Job::Read(0, crossing);
        ring.begin(&memory, job, Durability::Cached, 5).unwrap();
        ring.submit().unwrap();
        assert!(wait(&mut ring).1.is_ok(), "the write made the file longer");
    }

    #[test]
    fn room_is_bounded_by_bytes_and_draining_makes_it_again() {
        let Ok(mut ring) = Ring::new(&file(1 << 20)) else {
            return;
        };
        let memory = memory();
        let mut begun = 0_u32;
        while ring.has_room() {
            let pieces = vec![piece(0, 0x2_0000); 4];
            ring.begin(&memory, Job::Read(0, pieces), Durability::Cached, begun)
                .unwrap();
            begun += 1;
        }
        assert_eq!(u64::from(begun), MAX_BYTES.div_ceil(0x8_0000));
        ring.drain().unwrap();
        assert!(ring.has_room() && ring.bytes == 0);
    }

    proptest! {
        #[test]
        fn a_transfer_ends_when_all_of_it_was_moved(
            lengths in proptest::collection::vec(1_u32..0x1000, 1..9),
            steps in proptest::collection::vec(1_usize..0x3000, 1..50),
        ) {
            let memory = memory();
            let pieces: Vec<_> = lengths.iter().map(|&bytes| piece(0xf800, bytes)).collect();
            let mut transfer = Transfer::new(&memory, 100, &pieces).unwrap();
            let total: usize = transfer.buffers.iter().map(|buffer| buffer.iov_len).sum();
            let mut moved = 0;
            for step in steps {
                let step = step.min(total - moved);
                moved += step;
                let left: usize = total - moved;
                prop_assert_eq!(transfer.advance(step), left == 0);
                let (_, count) = transfer.buffers();
                prop_assert_eq!(count as usize, transfer.buffers.len());
                prop_assert_eq!(transfer.buffers.iter().map(|buffer| buffer.iov_len).sum::<usize>(), left);
                prop_assert_eq!(transfer.position, 100 + moved as u64);
                if left == 0 {
                    break;
                }
            }
        }
    }
}

//! Threads that wait on file descriptors, for the devices.
//!
//! A [`Worker`] is one thread with a small stack and an event that asks it to end; a [`Poll`] is what it
//! waits on; [`Threads`] makes workers. Must not know what a device is.

use crate::seccomp::{Filter, Kind};
use std::{
    collections::{BTreeMap, btree_map::Entry},
    io,
    os::fd::AsRawFd,
    sync::mpsc::{Receiver, Sender, channel},
    thread::{Builder, JoinHandle},
};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

/// Stack of a thread. Only touched pages cost memory.
const STACK_BYTES: usize = 256 * 1024;
/// Events taken from the kernel at once.
const BATCH: usize = 16;
/// Blocks without a limit: a device has nothing to do until something happens.
const FOREVER: i32 = -1;

/// An epoll instance. Interest is level-triggered unless the flags say otherwise.
#[derive(Debug)]
pub struct Poll {
    epoll: Epoll,
    events: Vec<EpollEvent>,
}

impl Poll {
    /// An instance that waits for nothing yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            events: vec![EpollEvent::default(); BATCH],
        })
    }

    /// Waits for `fd` too; its events carry `token`. The owner of `fd` removes it before closing it when
    /// the file has other descriptors.
    pub fn add(&self, fd: &impl AsRawFd, token: u64, interest: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Add, fd, token, interest)
    }

    /// Changes what `fd` is waited for.
    pub fn modify(&self, fd: &impl AsRawFd, token: u64, interest: EventSet) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd, token, interest)
    }

    /// No longer waits for `fd`.
    pub fn remove(&self, fd: &impl AsRawFd) -> io::Result<()> {
        self.control(ControlOperation::Delete, fd, 0, EventSet::empty())
    }

    /// Blocks until something is ready, and gives token and flags of each.
    pub fn wait(&mut self) -> io::Result<Vec<(u64, EventSet)>> {
        let count = loop {
            match self.epoll.wait(FOREVER, &mut self.events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => break result?,
            }
        };
        let ready = self.events.iter().take(count);
        Ok(ready
            .map(|event| (event.data(), event.event_set()))
            .collect())
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: &impl AsRawFd,
        token: u64,
        interest: EventSet,
    ) -> io::Result<()> {
        let event = EpollEvent::new(interest, token);
        self.epoll.ctl(operation, fd.as_raw_fd(), event)
    }
}

/// A device's thread. Dropping it asks it to end and waits for that.
#[derive(Debug)]
pub struct Worker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

/// What a worker does, and how it is confined.
struct Job {
    kind: Kind,
    name: String,
    run: Box<dyn FnOnce() + Send>,
    started: Sender<io::Result<JoinHandle<()>>>,
}

/// Where workers come from. The default is threads as free as the one that asks for them, for what runs outside
/// the jail.
#[derive(Debug, Clone, Default)]
pub struct Threads {
    spawner: Option<Sender<Job>>,
}

impl Threads {
    /// Workers that are started by a thread of its own, and confined to what their kind may do.
    pub fn confined() -> io::Result<Self> {
        let filter = Filter::of(Kind::Spawner).map_err(io::Error::other)?;
        let (spawner, jobs) = channel();
        start_confined(filter, "spawner", move || serve_jobs(&jobs))?;
        Ok(Self {
            spawner: Some(spawner),
        })
    }

    /// Starts `run` on a thread of its own. `run` must return soon after the event that it is given becomes
    /// readable.
    pub fn spawn(
        &self,
        kind: Kind,
        name: &str,
        run: impl FnOnce(EventFd) + Send + 'static,
    ) -> io::Result<Worker> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let seen_by_thread = stop.try_clone()?;
        let thread = self.start(kind, name, move || run(seen_by_thread))?;
        Ok(Worker {
            stop,
            thread: Some(thread),
        })
    }

    /// Starts `run` on a thread of its own, which ends as `run` does.
    pub fn start(
        &self,
        kind: Kind,
        name: &str,
        run: impl FnOnce() + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let Some(spawner) = &self.spawner else {
            return start(name, run);
        };
        let (started, answer) = channel();
        let job = Job {
            kind,
            name: name.to_owned(),
            run: Box::new(run),
            started,
        };
        let gone = |_| io::Error::other("the spawner has gone");
        spawner.send(job).map_err(gone)?;
        answer.recv().map_err(io::Error::other)?
    }
}

/// The spawner's life: until nobody can ask any more.
fn serve_jobs(jobs: &Receiver<Job>) {
    let mut filters = BTreeMap::new();
    for job in jobs {
        let filter = match filters.entry(job.kind) {
            Entry::Occupied(known) => Ok(&*known.into_mut()),
            Entry::Vacant(unknown) => Filter::of(job.kind).map(|filter| &*unknown.insert(filter)),
        };
        let filter = filter.cloned().map_err(io::Error::other);
        let thread = filter.and_then(|filter| start_confined(filter, &job.name, job.run));
        // One who asked waits for the answer.
        let _ = job.started.send(thread);
    }
}

fn start(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let builder = Builder::new().name(name.to_owned());
    builder.stack_size(STACK_BYTES).spawn(run)
}

/// Starts a thread and waits until it is confined; one that can't be does nothing.
fn start_confined(
    filter: Filter,
    name: &str,
    run: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (sender, confined) = channel();
    let thread = start(name, move || {
        let entered = filter.enter();
        let may_run = entered.is_ok();
        // The starter waits for it.
        let _ = sender.send(entered);
        drop(sender);
        if may_run {
            run();
        }
    })?;
    let entered = confined.recv().map_err(io::Error::other)?;
    entered.map_err(io::Error::other).map(|()| thread)
}

impl Drop for Worker {
    fn drop(&mut self) {
        // An eventfd's counter overflows only after 2^64 - 2 writes: this one cannot fail.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic of the thread is reported by the panic hook, which ends the process.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_worker_hears_its_events_until_it_is_dropped() {
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let heard = kick.try_clone().unwrap();
        let (sender, receiver) = mpsc::channel();
        let threads = Threads::default();
        let run = move |stop: EventFd| {
            let mut poll = Poll::new().unwrap();
            poll.add(&stop, 0, EventSet::IN).unwrap();
            poll.add(&heard, 7, EventSet::IN).unwrap();
            loop {
                for (token, _) in poll.wait().unwrap() {
                    if token == 0 {
                        return;
                    }
                    heard.read().unwrap();
                    sender.send(token).unwrap();
                }
            }
        };
        let worker = threads.spawn(Kind::Entropy, "test", run).unwrap();
        kick.write(1).unwrap();
        assert_eq!(receiver.recv().unwrap(), 7);
        drop(worker);
        assert!(receiver.recv().is_err(), "the thread has ended");
    }
}

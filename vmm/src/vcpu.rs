#![allow(
    unsafe_code,
    reason = "a signal handler sets KVM's immediate_exit; a union of KVM's is read"
)]
//! vCPU threads.
//!
//! A vCPU is paused, runs, and ends; [`State`] says which. Commands reach it through a channel, and a signal
//! makes it look: the handler sets `immediate_exit` of its own `kvm_run`, so that a signal which arrives just
//! before KVM_RUN is not lost. A vCPU that left KVM_RUN so has no access of the guest half done. Must not know
//! any device.

use crate::{
    arch::x86_64::registers,
    bus::{Bus, Effect},
    event_loop::Threads,
    seccomp::Kind,
};
use kvm_bindings::{Msrs, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use std::{
    cell::Cell,
    convert::Infallible,
    io,
    ptr::null_mut,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};
use vm_memory::GuestAddress;
use vmm_sys_util::{
    errno,
    eventfd::{EFD_NONBLOCK, EventFd},
    signal::{Killable, SIGRTMIN, register_signal_handler},
};
use walnut_vmm_api::Exits;

/// Why a vCPU cannot be made ready.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// An ioctl failed.
    #[error("{call} failed on vCPU {id}")]
    Call {
        /// Which.
        call: &'static str,
        /// On which vCPU.
        id: u8,
        /// How.
        source: kvm_ioctls::Error,
    },
    /// A register does not exist on this host.
    #[error("KVM has no MTRRs for vCPU {0}")]
    Registers(u8),
    /// The signal's handler cannot be set.
    #[error("cannot handle the signal that stops vCPUs")]
    Signal(#[source] errno::Error),
    /// The thread cannot be started.
    #[error("cannot start the thread of vCPU {id}")]
    Thread {
        /// Of which vCPU.
        id: u8,
        /// Why not.
        source: io::Error,
    },
    /// The event that reports ends cannot be made.
    #[error("cannot make an event file descriptor for the vCPUs")]
    Event(#[source] io::Error),
}

/// How a vCPU ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest switched the machine off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The processor shut down.
    TripleFault,
    /// KVM could not go on; the text says why.
    Failed(String),
    /// It was told to.
    Stopped,
}

/// What a vCPU can be told.
#[derive(Debug, Clone)]
enum Command {
    Run,
    /// Nothing is ever sent: that the sender goes is the answer.
    Pause(Sender<Infallible>),
    Stop,
}

/// Where a vCPU is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Waits for a command, as it does at first.
    Paused,
    /// Executes the guest.
    Running,
    /// For good.
    Ended(End),
}

impl State {
    fn after(command: Command) -> Self {
        match command {
            Command::Run => Self::Running,
            Command::Pause(running) => {
                drop(running);
                Self::Paused
            }
            Command::Stop => Self::Ended(End::Stopped),
        }
    }
}

/// How often a vCPU came back from KVM_RUN.
#[derive(Debug, Default)]
struct Counters {
    io: AtomicU64,
    mmio: AtomicU64,
    other: AtomicU64,
}

impl Counters {
    fn exits(&self) -> Exits {
        Exits {
            io: self.io.load(Ordering::Relaxed),
            mmio: self.mmio.load(Ordering::Relaxed),
            other: self.other.load(Ordering::Relaxed),
        }
    }
}

thread_local! {
    /// `kvm_run` of the vCPU that this thread runs, for the signal handler, which gets no other argument.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(null_mut()) };
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = KVM_RUN.get();
    if run.is_null() {
        return;
    }
    // SAFETY: the pointer is set only while this thread's vCPU, and so its mapping of `kvm_run`, exists.
    let immediate_exit = unsafe { &raw mut (*run).immediate_exit };
    // SAFETY: as above; a byte is written at once, and the thread itself writes it only by the same means.
    unsafe { immediate_exit.write_volatile(1) };
}

struct Vcpu {
    id: u8,
    fd: VcpuFd,
    bus: Arc<Bus>,
    counters: Arc<Counters>,
    commands: Receiver<Command>,
}

impl Vcpu {
    fn live(mut self) -> End {
        KVM_RUN.set(self.fd.get_kvm_run());
        let mut state = State::Paused;
        let end = loop {
            state = match state {
                State::Paused => self.wait(),
                State::Running => self.run(),
                State::Ended(end) => break end,
            };
        };
        KVM_RUN.set(null_mut());
        end
    }

    fn wait(&self) -> State {
        // The sender is gone: so is whoever could want this vCPU to run.
        self.commands
            .recv()
            .map_or(State::Ended(End::Stopped), |command| self.obey(command))
    }

    fn obey(&self, command: Command) -> State {
        if let Command::Pause(_) = command {
            // The guest's watchdogs then forgive the gap. Refused where it doesn't use kvm-clock.
            let _ = self.fd.kvmclock_ctrl();
        }
        State::after(command)
    }

    /// One trip into the guest and back.
    fn run(&mut self) -> State {
        let effect = match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                self.counters.io.fetch_add(1, Ordering::Relaxed);
                self.bus.write_port(port, data)
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.counters.io.fetch_add(1, Ordering::Relaxed);
                self.bus.read_port(port, data);
                Effect::None
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.counters.mmio.fetch_add(1, Ordering::Relaxed);
                self.bus.write_memory(address, data)
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                self.counters.mmio.fetch_add(1, Ordering::Relaxed);
                self.bus.read_memory(address, data);
                Effect::None
            }
            Ok(VcpuExit::Shutdown) => return State::Ended(End::TripleFault),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                let text = format!("KVM cannot enter the guest (hardware reason {reason:#x})");
                return State::Ended(End::Failed(text));
            }
            Ok(VcpuExit::InternalError) => return self.internal_error(),
            Ok(exit) => {
                let text = format!("KVM_RUN came back with {exit:?}");
                return State::Ended(End::Failed(text));
            }
            Err(error) => return self.interrupted(error),
        };
        match effect {
            Effect::None => State::Running,
            Effect::Reset => State::Ended(End::Reset),
            Effect::PowerOff => State::Ended(End::PowerOff),
        }
    }

    fn interrupted(&mut self, error: kvm_ioctls::Error) -> State {
        self.counters.other.fetch_add(1, Ordering::Relaxed);
        match error.errno() {
            libc::EINTR => {
                // First allow the next entry, then look: a command that comes in between brings its signal.
                self.fd.set_kvm_immediate_exit(0);
                match self.commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(TryRecvError::Empty) => State::Running,
                    Err(TryRecvError::Disconnected) => State::Ended(End::Stopped),
                }
            }
            libc::EAGAIN => State::Running,
            _ => State::Ended(End::Failed(format!(
                "KVM_RUN on vCPU {} failed: {error}",
                self.id
            ))),
        }
    }

    fn internal_error(&mut self) -> State {
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says that KVM filled this member of the union; it is plain data.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        let rip = self.fd.get_regs().map_or(0, |registers| registers.rip);
        let what = match suberror {
            1 => "it cannot emulate an instruction",
            2 => "an event came at the same time as another",
            3 => "an event could not be delivered",
            4 => "an exit had a reason it does not know",
            _ => "of a reason it does not name",
        };
        State::Ended(End::Failed(format!(
            "KVM gave up because {what} (suberror {suberror}, rip {rip:#x})"
        )))
    }
}

/// Sets registers that every vCPU needs before it runs.
pub fn prepare(fd: &VcpuFd, id: u8) -> Result<(), VcpuError> {
    let wanted = [registers::mtrr_default()];
    let msrs = Msrs::from_entries(&wanted).map_err(|_| VcpuError::Registers(id))?;
    let set = fd.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS", id))?;
    if set != wanted.len() {
        return Err(VcpuError::Registers(id));
    }
    // A lone vCPU that is added later doesn't come up without this: KVM drops interrupts to an APIC that its map lacks,
    // the first INIT included, and setting an APIC's state remakes the map (by KVM's source; seen is that it helps).
    let apic = fd.get_lapic().map_err(failed("KVM_GET_LAPIC", id))?;
    fd.set_lapic(&apic).map_err(failed("KVM_SET_LAPIC", id))
}

/// Lets vCPU 0 start at the kernel's `entry`. The others wait for its word.
pub fn enter(fd: &VcpuFd, entry: GuestAddress) -> Result<(), VcpuError> {
    let system = fd.get_sregs().map_err(failed("KVM_GET_SREGS", 0))?;
    fd.set_sregs(&registers::system(system))
        .map_err(failed("KVM_SET_SREGS", 0))?;
    fd.set_regs(&registers::general(entry))
        .map_err(failed("KVM_SET_REGS", 0))
}

fn failed(call: &'static str, id: u8) -> impl FnOnce(kvm_ioctls::Error) -> VcpuError {
    move |source| VcpuError::Call { call, id, source }
}

struct Handle {
    commands: Sender<Command>,
    thread: JoinHandle<()>,
    counters: Arc<Counters>,
}

/// All vCPU threads of the VM.
pub struct Vcpus {
    bus: Arc<Bus>,
    threads: Threads,
    handles: Vec<Handle>,
    reports: Sender<End>,
    ends: Receiver<End>,
    ended: EventFd,
}

impl Vcpus {
    /// None yet; those to come reach devices by `bus` and get their threads from `threads`.
    pub fn new(bus: Arc<Bus>, threads: Threads) -> Result<Self, VcpuError> {
        register_signal_handler(SIGRTMIN(), on_signal).map_err(VcpuError::Signal)?;
        let (reports, ends) = channel();
        Ok(Self {
            bus,
            threads,
            handles: Vec::new(),
            reports,
            ends,
            ended: EventFd::new(EFD_NONBLOCK).map_err(VcpuError::Event)?,
        })
    }

    /// Starts the thread of vCPU `id`, which waits for [`Vcpus::run`].
    pub fn add(&mut self, id: u8, fd: VcpuFd) -> Result<(), VcpuError> {
        let (commands, receiver) = channel();
        let counters = Arc::<Counters>::default();
        let vcpu = Vcpu {
            id,
            fd,
            bus: self.bus.clone(),
            counters: counters.clone(),
            commands: receiver,
        };
        let reports = self.reports.clone();
        let ended = self.ended.try_clone().map_err(VcpuError::Event)?;
        let live = move || {
            let end = vcpu.live();
            // Nobody listens any more only when the process ends.
            let _ = reports.send(end);
            let _ = ended.write(1);
        };
        let name = format!("vcpu{id}");
        let thread = self.threads.start(Kind::Vcpu, &name, live);
        let thread = thread.map_err(|source| VcpuError::Thread { id, source })?;
        self.handles.push(Handle {
            commands,
            thread,
            counters,
        });
        Ok(())
    }

    /// Lets all of them execute the guest, whether they do already or not.
    pub fn run(&self) {
        self.command(Command::Run);
    }

    /// Lets none of them execute the guest. When one still does after `deadline`, all go on and the answer is
    /// false.
    pub fn pause(&self, deadline: Duration) -> bool {
        let (running, paused) = channel();
        self.command(Command::Pause(running));
        let all = matches!(
            paused.recv_timeout(deadline),
            Err(RecvTimeoutError::Disconnected)
        );
        if !all {
            self.run();
        }
        all
    }

    /// Stops all of them; false when one does not answer within `deadline`.
    pub fn stop(&self, mut still_running: usize, deadline: Duration) -> bool {
        self.command(Command::Stop);
        let start = Instant::now();
        while still_running > 0 {
            let left = deadline.saturating_sub(start.elapsed());
            if self.ends.recv_timeout(left).is_err() {
                return false;
            }
            still_running -= 1;
        }
        true
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.handles.len()
    }

    /// Readable when one has ended.
    pub fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// How one of them ended, if one did.
    pub fn end(&self) -> Option<End> {
        self.ends.try_recv().ok()
    }

    /// How often each came back from KVM_RUN.
    pub fn exits(&self) -> Vec<Exits> {
        let counters = self.handles.iter().map(|handle| &handle.counters);
        counters.map(|counters| counters.exits()).collect()
    }

    fn command(&self, command: Command) {
        for handle in &self.handles {
            // Fails only when that thread has ended, and then there is nothing to tell it.
            if handle.commands.send(command.clone()).is_ok() {
                let _ = handle.thread.kill(SIGRTMIN());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_asks_the_thread_that_gets_it_to_leave_the_guest() {
        on_signal(0, null_mut(), null_mut());
        let mut run = kvm_run::default();
        KVM_RUN.set(&raw mut run);
        on_signal(0, null_mut(), null_mut());
        KVM_RUN.set(null_mut());
        assert_eq!(run.immediate_exit, 1);
    }

    #[test]
    fn commands_lead_to_states() {
        let (running, paused) = channel();
        assert_eq!(State::after(Command::Run), State::Running);
        assert_eq!(State::after(Command::Stop), State::Ended(End::Stopped));
        assert_eq!(State::after(Command::Pause(running)), State::Paused);
        let answer = paused.try_recv();
        assert_eq!(answer, Err(TryRecvError::Disconnected), "it has answered");
    }
}

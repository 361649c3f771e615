//! A guest that does all that a processor can do to a VMM. After each attack the VMM answers, has not grown and
//! stops when it is told to; or it ended with a status of the contract. It never panics, hangs or dies of a signal.

mod devices;
mod machine;

use anyhow::{Context, Result, bail, ensure};
use std::{fs, path::PathBuf};
use tempfile::TempDir;
use walnut_tests::{
    bare::{ONCE, Script, Width, virtio::WINDOW},
    command::End,
    deadline::{self, Deadline},
    memory, processes,
    programs::Programs,
    requirement,
    story::{self, Chapter},
    vmm::{Ended, Vm, VmBuilder},
};
use walnut_vmm_api::{Message, Request, VmmExit};

const MEMORY_MIB: u32 = 128;
/// What an attacked VMM may have more than one whose guest does nothing.
const FDS_MORE: usize = 64;
const OVERHEAD_MORE_KIB: u64 = 16 * 1024;
/// The last word of every attack.
const OVER: &str = "attack-is-over";
const I8042: u64 = 0x64;
const POWER: u64 = 0x600;
/// Values at which counters and addresses turn.
const BOUNDARIES: [u64; 9] = [
    0,
    1,
    2,
    0x7fff_ffff,
    0x8000_0000,
    0xffff,
    0xffff_ffff,
    0x1000,
    WINDOW,
];

/// What a VMM holds.
#[derive(Debug, Clone, Copy)]
struct Holding {
    fds: usize,
    overhead_kib: u64,
}

impl Holding {
    fn of(vm: &Vm) -> Result<Self> {
        let pid = vm.pid()?;
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).context("no list of descriptors")?;
        Ok(Self {
            fds: fds.count(),
            overhead_kib: memory::of_vmm(pid, MEMORY_MIB)?.overhead_pss_kib,
        })
    }
}

/// Where attacks take place: a VM with every device, and what such a VM holds when its guest does nothing.
struct Arena {
    programs: Programs,
    directory: TempDir,
    quiet: Holding,
}

impl Arena {
    fn new(programs: Programs) -> Result<Self> {
        let mut arena = Self {
            programs,
            directory: TempDir::new()?,
            quiet: Holding {
                fds: 0,
                overhead_kib: 0,
            },
        };
        for disk in ["read-only", "writable"] {
            fs::write(arena.directory.path().join(disk), vec![7; 1 << 20])?;
        }
        let mut vm = arena.start(Script::default().say(OVER))?;
        vm.wait_for_console(OVER)?;
        arena.quiet = Holding::of(&vm)?;
        println!("a quiet VMM holds {:?}", arena.quiet);
        stop(vm)?;
        Ok(arena)
    }

    fn disk(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn start(&self, script: &Script) -> Result<Vm> {
        let builder = VmBuilder::agent(&self.programs)
            .memory_mib(MEMORY_MIB)
            .vcpus(2)
            .read_only_disk(&self.disk("read-only"))
            .writable_disk(&self.disk("writable"));
        let booting = script.boot_with(builder, self.directory.path())?;
        booting.start()
    }

    /// The VMM is as alive after the attack as before. Gives the console.
    fn survives(&self, script: &mut Script) -> Result<String> {
        let mut vm = self.start(script.say(OVER))?;
        vm.wait_for_console(OVER)?;
        answers(&mut vm)?;
        let holding = Holding::of(&vm)?;
        println!("  afterwards: {holding:?}");
        ensure!(
            holding.fds <= self.quiet.fds + FDS_MORE
                && holding.overhead_kib <= self.quiet.overhead_kib + OVERHEAD_MORE_KIB,
            "grown from {:?} to {holding:?}",
            self.quiet
        );
        Ok(stop(vm)?.console)
    }

    /// The VMM ended as the contract says, without a signal, or stands the attack.
    fn is_contained(&self, script: &mut Script) -> Result<()> {
        let mut vm = self.start(script.say(OVER))?;
        let stands = deadline::until("its end", Deadline::after(deadline::BOOT), || {
            // A request that cannot be sent, and an answer that does not come: the VMM has ended.
            let asked = vm.ask(&Request::Statistics).is_ok();
            let answer = vm.receive(Deadline::after(deadline::REQUEST))?;
            let is_over = vm.console().contains(OVER);
            Ok((is_over || !asked || answer.is_none()).then_some(is_over))
        })?;
        if stands {
            return stop(vm).map(drop);
        }
        let ended = vm.wait()?;
        println!("  it ended: {:?}", ended.status);
        let guests = [VmmExit::GuestReset, VmmExit::TripleFault, VmmExit::Vcpu];
        ensure!(
            ended.status.is_some_and(|status| guests.contains(&status)),
            "{ended:?}"
        );
        Ok(())
    }

    fn ends(&self, script: &Script, expected: VmmExit) -> Result<()> {
        self.start(script)?.wait()?.ends_with(expected)?;
        Ok(())
    }
}

/// The VMM answers a request.
fn answers(vm: &mut Vm) -> Result<()> {
    vm.ask(&Request::Statistics)?;
    loop {
        match vm.receive(Deadline::after(deadline::REQUEST))? {
            Some(Message::Statistics(_)) => return Ok(()),
            Some(Message::Booted | Message::GuestReady) => {}
            other => bail!("no statistics, but {other:?}"),
        }
    }
}

/// The VMM stops when it is told to, silently, and its process is gone.
fn stop(mut vm: Vm) -> Result<Ended> {
    let pid = vm.pid()?;
    vm.ask(&Request::Stop)?;
    let ended = vm.wait()?;
    ended.ends_with(VmmExit::Ended)?.says_at_most(0)?;
    let left = processes::list()?
        .into_iter()
        .any(|process| process.pid == pid);
    ensure!(!left, "the VMM's process is still there");
    Ok(ended)
}

fn tell(chapters: &[Chapter<Arena>]) -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    story::tell(&mut Arena::new(programs)?, chapters)
}

#[test]
fn attacks_on_the_machine_are_survived() -> Result<()> {
    tell(&[
        ("every port is read and written", machine::every_port),
        ("strings go to ports", machine::strings),
        (
            "every byte of the devices' window is accessed",
            machine::device_window,
        ),
        ("addresses without anybody are accessed", machine::holes),
        (
            "the interrupt controllers are scribbled over",
            machine::interrupt_controllers,
        ),
        (
            "model-specific registers are swept",
            machine::model_specific_registers,
        ),
        ("hypercalls are made up", machine::hypercalls),
    ])
}

#[test]
fn attacks_on_devices_are_survived() -> Result<()> {
    tell(&[
        (
            "every register gets every boundary",
            devices::every_register,
        ),
        ("states are skipped", devices::skipped_states),
        ("queues lie where they can't", devices::misplaced_queues),
        ("queues change while they are used", devices::changed_queues),
        ("rings break the rules", devices::hostile_rings),
        ("everything is kicked for ever", devices::kicked_for_ever),
    ])
}

#[test]
fn a_guest_that_ends_or_does_nothing_ends_the_vmm_as_the_contract_says() -> Result<()> {
    tell(&[
        ("ports that end the machine", ports_that_end_the_machine),
        ("a triple fault", |arena| {
            arena.ends(Script::default().triple_fault(), VmmExit::TripleFault)
        }),
        ("device registers are executed", |arena| {
            arena.ends(Script::default().execute(WINDOW), VmmExit::Vcpu)
        }),
        ("a processor that spins or stands still", deaf_processors),
    ])
}

fn ports_that_end_the_machine(arena: &mut Arena) -> Result<()> {
    for (port, value, expected) in [
        (I8042, 0xfe, VmmExit::GuestReset),
        (POWER, 5 << 2 | 1 << 5, VmmExit::Ended),
        (POWER + 2, 1, VmmExit::GuestReset),
    ] {
        let mut script = Script::default();
        script.output(Width::Byte, port, value, ONCE).spin();
        arena.ends(&script, expected)?;
    }
    Ok(())
}

fn deaf_processors(arena: &mut Arena) -> Result<()> {
    for script in [
        Script::default().say(OVER).spin(),
        Script::default().say(OVER).halt(),
    ] {
        let mut vm = arena.start(script)?;
        vm.wait_for_console(OVER)?;
        answers(&mut vm)?;
        stop(vm)?;

        let mut orphan = arena.start(script)?;
        orphan.wait_for_console(OVER)?;
        orphan.abandon();
        let ended = orphan.wait()?;
        ensure!(ended.end == End::Exited(0), "{ended:?}");
    }
    Ok(())
}

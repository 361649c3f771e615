//! A guest that does all that a processor can do to a VMM. After each attack the VMM answers, has not grown and
//! stops when it is told to; or it ended with a status of the contract. It never panics, hangs or dies of a signal.

use anyhow::{Context, Result, bail, ensure};
use std::{fs, path::PathBuf};
use tempfile::TempDir;
use walnut_tests::{
    bare::{
        FAR_WINDOW, FREE_RAM, ONCE, Script, Width, steps,
        virtio::{DEVICES, HOSTILE_RINGS, Places, WINDOW, WINDOW_BYTES, page, registers},
    },
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
        ("every port is read and written", every_port),
        ("strings go to ports", strings),
        (
            "every byte of the devices' window is accessed",
            device_window,
        ),
        ("addresses without anybody are accessed", holes),
        (
            "the interrupt controllers are scribbled over",
            interrupt_controllers,
        ),
        (
            "model-specific registers are swept",
            model_specific_registers,
        ),
        ("hypercalls are made up", hypercalls),
    ])
}

#[test]
fn attacks_on_devices_are_survived() -> Result<()> {
    tell(&[
        ("every register gets every boundary", every_register),
        ("states are skipped", skipped_states),
        ("queues lie where they can't", misplaced_queues),
        ("queues change while they are used", changed_queues),
        ("rings break the rules", hostile_rings),
        ("everything is kicked for ever", kicked_for_ever),
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

fn every_port(arena: &mut Arena) -> Result<()> {
    // The values that end the machine have a chapter of their own.
    for (value, width) in [(0x5a, Width::Byte), (0xffff, Width::Word), (0, Width::Long)] {
        let mut script = Script::default();
        script.output(width, 0, value, steps(0x1_0000, 1));
        script.input(width, 0, steps(0x1_0000, 1));
        arena.survives(&mut script)?;
    }
    Ok(())
}

fn strings(arena: &mut Arena) -> Result<()> {
    let mut script = Script::default();
    for bytes in [0, 1, 2, 4, 8, 0x1000, 0x1_0000] {
        script
            .strings(0x3f8, bytes, ONCE)
            .strings(0x80, bytes, ONCE);
        script
            .strings(0x600, bytes, steps(4, 1))
            .strings(0x20, bytes, ONCE);
    }
    arena.survives(&mut script).map(drop)
}

fn device_window(arena: &mut Arena) -> Result<()> {
    let mut script = Script::default();
    for width in Width::ALL {
        for device in 0..DEVICES {
            script.read(width, page(device), steps(0x200, 1));
            script.write(width, page(device), u64::MAX, steps(0x200, 1));
            script.reset(page(device));
            script.read(width, page(device) + 0xff0, steps(0x20, 1));
            script.write(width, page(device) + 0xff0, 0, steps(0x20, 1));
        }
        let times = steps(u32::try_from(WINDOW_BYTES / 0x3ff)?, 0x3ff);
        script
            .read(width, WINDOW, times)
            .write(width, WINDOW, 0, times);
    }
    arena.survives(&mut script).map(drop)
}

fn holes(arena: &mut Arena) -> Result<()> {
    let mut script = Script::default();
    for width in Width::ALL {
        // From the end of RAM on to the interrupt controllers, and past them.
        for (from, to) in [
            (0x800_0000, 0xfec0_0000),
            (0xfef0_0000, 1 << 32),
            (1 << 32, 8 << 30),
        ] {
            let times = steps(512, (to - from) / 512);
            for unaligned in [0, 1, 0xfff] {
                script.read(width, from + unaligned, times);
                script.write(width, from + unaligned, u64::MAX, times);
            }
        }
        let times = steps(64, 0xff_ffff);
        script
            .read(width, FAR_WINDOW, times)
            .write(width, FAR_WINDOW, 0, times);
        // Across the end of RAM, and the last bytes below 4 GiB.
        for edge in [0x800_0000_u64, WINDOW, WINDOW + WINDOW_BYTES, 1 << 32] {
            script.read(width, edge - 8, steps(16, 1));
            script.write(width, edge - 8, 0, steps(16, 1));
        }
    }
    arena.survives(&mut script).map(drop)
}

fn interrupt_controllers(arena: &mut Arena) -> Result<()> {
    for value in [0, u64::MAX, 0x000c_4500, 0x5a5a_5a5a] {
        let mut script = Script::default();
        for controller in [0xfec0_0000, 0xfee0_0000] {
            script.write(Width::Long, controller, value, steps(0x100, 0x10));
            script.write(Width::Byte, controller, value, steps(0x400, 1));
            script.read(Width::Quad, controller, steps(0x400, 1));
        }
        arena.is_contained(&mut script)?;
    }
    Ok(())
}

fn model_specific_registers(arena: &mut Arena) -> Result<()> {
    for value in [0, FREE_RAM | 1, u64::MAX] {
        let mut script = Script::default();
        for first in [
            0,
            0x4000_0000,
            0x4b56_4d00,
            0xc000_0000,
            0xc001_0000,
            0xffff_ff00,
        ] {
            script.msr(first, value, steps(0x100, 1));
        }
        script.msr(0x100, value, steps(0x1000, 1));
        arena.is_contained(&mut script)?;
    }
    Ok(())
}

fn hypercalls(arena: &mut Arena) -> Result<()> {
    let mut script = Script::default();
    for argument in BOUNDARIES {
        script.hypercall(0, argument, steps(32, 1));
        script.hypercall(u64::MAX - 16, argument, steps(32, 1));
    }
    arena.survives(&mut script).map(drop)
}

fn every_register(arena: &mut Arena) -> Result<()> {
    let mut script = Script::default();
    for device in (0..DEVICES).map(page) {
        for register in registers() {
            script.reset(device);
            for value in BOUNDARIES {
                script.register(device, register, value);
            }
            // The same of a device that has agreed, and of one that runs.
            script.agree(device).register(device, register, 0xffff_ffff);
            script.start(device, Places::of_queue);
            script.register(device, register, 0xffff_ffff);
            script.read(Width::Long, device, steps(0x60, 4));
        }
        script.reset(device);
    }
    arena.survives(&mut script).map(drop)
}

fn skipped_states(arena: &mut Arena) -> Result<()> {
    let mut script = Script::default();
    for device in (0..DEVICES).map(page) {
        script.kick(device);
        for status in 0..256 {
            script
                .reset(device)
                .register(device, 0x70, status)
                .kick(device);
        }
        for status in [15, 8, 4, 1, 15, 128, 15, 0, 4, 0, 64] {
            script.register(device, 0x70, status).kick(device);
        }
        // Started twice, failed while it runs, queues of a size of which there are none.
        script
            .start(device, Places::of_queue)
            .register(device, 0x70, 15);
        script
            .register(device, 0x70, 128)
            .kick(device)
            .agree(device);
        for size in [0, 3, 0x8000, 0x1_0000, 0xffff_ffff] {
            script.queue(device, 0, size, Places::of_queue(0));
        }
        script.register(device, 0x70, 15).kick(device).reset(device);
    }
    arena.survives(&mut script).map(drop)
}

fn misplaced_queues(arena: &mut Arena) -> Result<()> {
    let good = Places::of_queue(0);
    let mut script = Script::default();
    for device in (0..DEVICES).map(page) {
        for address in [
            WINDOW,
            0,
            1,
            0x7ff_fff0,
            0x7ff_ffff,
            0x800_0000,
            1 << 32,
            1 << 40,
            u64::MAX,
            u64::MAX - 15,
            good.used + 1,
            FREE_RAM,
        ] {
            let everywhere = [
                Places {
                    descriptors: address,
                    ..good
                },
                Places {
                    available: address,
                    ..good
                },
                Places {
                    used: address,
                    ..good
                },
                Places {
                    descriptors: address,
                    available: address,
                    used: address,
                },
            ];
            for places in everywhere {
                script.start(device, |_| places).kick(device);
                script.read(Width::Long, device + 0x70, ONCE);
            }
        }
        script.reset(device);
    }
    // The used rings were written over the boot structures at most: the program is above them.
    arena.survives(&mut script).map(drop)
}

fn changed_queues(arena: &mut Arena) -> Result<()> {
    let mut script = Script::default();
    let rings = &HOSTILE_RINGS[0];
    for device in (0..DEVICES).map(page) {
        script.attack(device, rings).start(device, Places::of_queue);
        for queue in 0..4 {
            let elsewhere = Places {
                used: WINDOW,
                ..Places::of_queue(queue)
            };
            script
                .queue(device, queue, 8, elsewhere)
                .register(device, 0x44, 0);
        }
        script.kick(device).register(device, 0x20, 0xffff_ffff);
        // Rings that are written while the device reads them.
        let places = Places::of_queue(0);
        script
            .kick(device)
            .write(Width::Word, places.available + 2, 0, steps(1, 0));
        script
            .kick(device)
            .write(Width::Quad, places.descriptors, u64::MAX, steps(512, 8));
        script.kick(device).reset(device);
    }
    arena.survives(&mut script).map(drop)
}

fn hostile_rings(arena: &mut Arena) -> Result<()> {
    let mut script = Script::default();
    for rings in HOSTILE_RINGS {
        for device in (0..DEVICES).map(page) {
            script.attack(device, rings);
        }
        script.say(rings.name);
    }
    // The first device is the entropy device: it still serves a good driver.
    script
        .ask(page(0))
        .show("answered", Places::of_queue(0).used + 2);
    let console = arena.survives(&mut script)?;
    ensure!(console.contains("answered=1"), "{console}");
    let kept = fs::read(arena.disk("read-only"))?;
    ensure!(kept == vec![7; 1 << 20], "a read-only disk was written");
    Ok(())
}

fn kicked_for_ever(arena: &mut Arena) -> Result<()> {
    let mut forever = Script::default();
    for rings in HOSTILE_RINGS {
        for device in (0..DEVICES).map(page) {
            forever.start(device, Places::of_queue);
            forever.attack(device, rings);
        }
        forever.say(OVER);
    }
    forever.start_over();
    let mut vm = arena.start(&forever)?;
    vm.wait_for_console(OVER)?;
    for _ in 0..5 {
        answers(&mut vm)?;
    }
    stop(vm).map(drop)
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

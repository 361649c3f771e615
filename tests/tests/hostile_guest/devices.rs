//! What a driver can do to virtio devices: registers, states, queues, rings.

use super::{Arena, BOUNDARIES, OVER, answers, stop};
use anyhow::{Result, ensure};
use std::fs;
use walnut_tests::bare::{
    FREE_RAM, ONCE, Script, Width, steps,
    virtio::{DEVICES, HOSTILE_RINGS, Places, WINDOW, page, registers},
};

pub(super) fn every_register(arena: &mut Arena) -> Result<()> {
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

pub(super) fn skipped_states(arena: &mut Arena) -> Result<()> {
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

pub(super) fn misplaced_queues(arena: &mut Arena) -> Result<()> {
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

pub(super) fn changed_queues(arena: &mut Arena) -> Result<()> {
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

pub(super) fn hostile_rings(arena: &mut Arena) -> Result<()> {
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

pub(super) fn kicked_for_ever(arena: &mut Arena) -> Result<()> {
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

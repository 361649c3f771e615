//! What a processor can do to the machine: ports, addresses, model-specific registers, hypercalls.

use super::{Arena, BOUNDARIES};
use anyhow::Result;
use walnut_tests::bare::{
    FAR_WINDOW, FREE_RAM, ONCE, Script, Width, steps,
    virtio::{DEVICES, WINDOW, WINDOW_BYTES, page},
};

pub(super) fn every_port(arena: &mut Arena) -> Result<()> {
    // The values that end the machine have a chapter of their own.
    for (value, width) in [(0x5a, Width::Byte), (0xffff, Width::Word), (0, Width::Long)] {
        let mut script = Script::default();
        script.output(width, 0, value, steps(0x1_0000, 1));
        script.input(width, 0, steps(0x1_0000, 1));
        arena.survives(&mut script)?;
    }
    Ok(())
}

pub(super) fn strings(arena: &mut Arena) -> Result<()> {
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

pub(super) fn device_window(arena: &mut Arena) -> Result<()> {
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

pub(super) fn holes(arena: &mut Arena) -> Result<()> {
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

pub(super) fn interrupt_controllers(arena: &mut Arena) -> Result<()> {
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

pub(super) fn model_specific_registers(arena: &mut Arena) -> Result<()> {
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

pub(super) fn hypercalls(arena: &mut Arena) -> Result<()> {
    let mut script = Script::default();
    for argument in BOUNDARIES {
        script.hypercall(0, argument, steps(32, 1));
        script.hypercall(u64::MAX - 16, argument, steps(32, 1));
    }
    arena.survives(&mut script).map(drop)
}

//! ACPI of what happens to a running machine: its power button, and processors and devices that come later.
//!
//! A generic event device (ACPI 6.5, section 5.6.9) interrupts; its method reads what happened and notifies. The
//! processors and virtio devices that may come stand in one module device (section 9.12): told to look again
//! (section 5.6.6), the guest finds those whose `_STA` changed. Linux knows no such event for `LNRO0005` itself. Must
//! not touch memory: gives AML.

use super::acpi::{AcpiError, Raw, bytes_of, virtio_resources};
use crate::{arch::x86_64::layout, bus::Allocation};
use acpi_tables::{
    Aml,
    aml::{
        And, BufferData, Device, EISAName, Field, FieldAccessType, FieldEntry, FieldLockRule,
        FieldUpdateRule, If, Interrupt, LessThan, Local, Method, Name, Notify, OpRegion,
        OpRegionSpace, Package, Path, ResourceTemplate, Return, Scope, Store, ZERO,
    },
    madt::{EnabledStatus, ProcessorLocalApic},
};

/// Offsets from [`layout::EVENT_PORT`]: what happened since the last read, a set of the bits below.
pub const EVENTS_OFFSET: u8 = 0;
/// How many vCPUs there are: those with a lower number.
pub const VCPUS_OFFSET: u8 = 1;
/// In which places for devices one stands, a set of bits.
pub const DEVICES_OFFSET: u8 = 2;
/// Ports from [`layout::EVENT_PORT`] on.
pub const EVENT_PORTS: u8 = 3;
/// Event: the power button was pressed.
pub const POWER_BUTTON: u8 = 1;
/// Event: a vCPU or a device came or went.
pub const CONTENTS: u8 = 2;
/// Places for devices at the most, by the width of the register.
pub const MAX_PLACES: usize = 8;

/// `_STA` of a device that is there and works.
const PRESENT: u8 = 0xf;
/// Notification of a container (section 5.6.6): look at what is below.
const BUS_CHECK: u8 = 0;
/// Notification of a button: pressed (section 4.8.2.2.1.2).
const PRESSED: u8 = 0x80;

/// Name of the device at this place in the guest's namespace, and on the control socket.
pub fn place_name(index: usize) -> String {
    format!("H{index:03}")
}

/// Everything in `\_SB_`: the event device, the button, the generation id, and the container with processors `vcpus`
/// and a device at each of `places`.
pub(super) fn scope(
    vcpus: std::ops::Range<u8>,
    places: &[Allocation],
) -> Result<Vec<u8>, AcpiError> {
    let mut contents: Vec<Raw> = vcpus.map(processor).collect();
    for (index, place) in places.iter().enumerate() {
        contents.push(device(index, place)?);
    }
    let mut container: Vec<&dyn Aml> = Vec::new();
    let id = Name::new(Path::new("_HID"), &"ACPI0004");
    let unique = Name::new(Path::new("_UID"), &ZERO);
    container.extend([&id as &dyn Aml, &unique]);
    container.extend(contents.iter().map(|raw| raw as &dyn Aml));
    Ok(bytes_of(&Scope::new(
        Path::new("_SB_"),
        vec![
            &event_device(),
            &button(),
            &generation_id(),
            &Device::new(Path::new("HOTP"), container),
        ],
    )))
}

fn event_device() -> Raw {
    let interrupt = Interrupt::new(true, true, false, false, layout::EVENT_INTERRUPT);
    let registers = Field::new(
        Path::new("REGS"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        vec![
            FieldEntry::Named(*b"EVNT", 8),
            FieldEntry::Named(*b"VCPU", 8),
            FieldEntry::Named(*b"DEVS", 8),
        ],
    );
    let space = OpRegionSpace::SystemIO;
    let happened = |event: u8, object: &str, value: u8| {
        Raw(bytes_of(&If::new(
            &And::new(&ZERO, &Local(0), &event),
            vec![&Notify::new(&Path::new(object), &value)],
        )))
    };
    Raw(bytes_of(&Device::new(
        Path::new("EVTS"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
            &OpRegion::new(Path::new("REGS"), space, &layout::EVENT_PORT, &EVENT_PORTS),
            &registers,
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![
                    &Store::new(&Local(0), &Path::new("EVNT")),
                    &happened(POWER_BUTTON, "\\_SB_.PWRB", PRESSED),
                    &happened(CONTENTS, "\\_SB_.HOTP", BUS_CHECK),
                ],
            ),
        ],
    )))
}

fn button() -> Raw {
    Raw(bytes_of(&Device::new(
        Path::new("PWRB"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C")),
            &Name::new(Path::new("_UID"), &ZERO),
        ],
    )))
}

/// Microsoft's "Virtual Machine Generation ID".
fn generation_id() -> Raw {
    Raw(bytes_of(&Device::new(
        Path::new("VGEN"),
        vec![
            &Name::new(Path::new("_HID"), &"VMGENCTR"),
            &Name::new(Path::new("_CID"), &"VM_Gen_Counter"),
            &Name::new(
                Path::new("ADDR"),
                &Package::new(vec![&layout::GENERATION_ID.0, &ZERO]),
            ),
        ],
    )))
}

/// `_STA`: present if `condition` holds.
fn status(condition: &dyn Aml) -> Raw {
    Raw(bytes_of(&Method::new(
        Path::new("_STA"),
        0,
        false,
        vec![
            &If::new(condition, vec![&Return::new(&PRESENT)]),
            &Return::new(&ZERO),
        ],
    )))
}

fn processor(id: u8) -> Raw {
    let count = Path::new("\\_SB_.EVTS.VCPU");
    let entry = bytes_of(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    Raw(bytes_of(&Device::new(
        Path::new(&format!("C{id:03}")),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0007"),
            &Name::new(Path::new("_UID"), &id),
            &Name::new(Path::new("_MAT"), &BufferData::new(entry)),
            &status(&LessThan::new(&id, &count)),
        ],
    )))
}

fn device(index: usize, place: &Allocation) -> Result<Raw, AcpiError> {
    let (there, bit) = (Path::new("\\_SB_.EVTS.DEVS"), 1_u64 << index);
    // Devices that are there from the start count from 0.
    let unique = u64::from(u8::MAX) + index as u64;
    Ok(Raw(bytes_of(&Device::new(
        Path::new(&place_name(index)),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &unique),
            &Name::new(Path::new("_CRS"), &Raw(virtio_resources(place)?)),
            &status(&And::new(&ZERO, &there, &bit)),
        ],
    ))))
}

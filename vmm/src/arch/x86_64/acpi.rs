//! The ACPI tables: what processors, interrupts and devices the guest has (ACPI 6.5, chapter 5).
//!
//! Hardware-reduced ACPI (section 4.1): no PM timer, no SCI, no fixed events; power-off and reset are
//! registers of their own (sections 4.8.3.6 and 4.8.3.7). virtio-mmio devices are `LNRO0005`. Must not
//! know which devices there are: it is told.

use crate::{
    arch::x86_64::{hotplug, layout},
    bus::Allocation,
};
use acpi_tables::{
    Aml, AmlSink,
    aml::{
        Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate,
        Scope, ZERO,
    },
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};
use vm_memory::{Bytes, GuestMemoryError, GuestMemoryMmap};

const OEM: [u8; 6] = *b"WALNUT";
const TABLE: [u8; 8] = *b"WALNUTVM";
const REVISION: u32 = 1;
/// Value of SLP_TYPx that means S5, by our own choice.
pub const SLEEP_TYPE_S5: u8 = 5;
/// What the guest writes to the reset register, by our own choice.
pub const RESET_VALUE: u8 = 1;
/// Offsets from [`layout::POWER_PORT`].
pub const SLEEP_CONTROL_OFFSET: u16 = 0;
/// The guest clears and polls the wake status here.
pub const SLEEP_STATUS_OFFSET: u16 = 1;
/// See [`RESET_VALUE`].
pub const RESET_OFFSET: u16 = 2;
/// Bytes of an RSDP, rounded up so that the tables are aligned.
const RSDP_BYTES: u64 = 64;

/// Why the tables cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They need more room than there is.
    #[error("ACPI tables of {0} bytes do not fit below 1 MiB")]
    TooLarge(usize),
    /// A device lies above 4 GiB.
    #[error("device at {0:#x} cannot be described: it is above 4 GiB")]
    Address(u64),
    /// They cannot be written.
    #[error("cannot write ACPI tables to guest RAM")]
    Write(#[source] GuestMemoryError),
}

/// What the tables describe.
#[derive(Debug, Clone, Copy)]
pub struct Contents<'a> {
    /// Processors that are there.
    pub vcpus: u8,
    /// Processors that there may be.
    pub max_vcpus: u8,
    /// virtio devices that are there.
    pub virtio: &'a [Allocation],
    /// Where virtio devices may be later.
    pub places: &'a [Allocation],
}

/// Writes the tables at [`layout::ACPI`], and the VM's generation id to where they say it is.
pub fn write(
    memory: &GuestMemoryMmap,
    contents: &Contents<'_>,
    generation_id: [u8; 16],
) -> Result<(), AcpiError> {
    let image = build(contents)?;
    let room = layout::ACPI_END.0 - layout::ACPI.0;
    if u64::try_from(image.len()).map_or(true, |bytes| bytes > room) {
        return Err(AcpiError::TooLarge(image.len()));
    }
    memory
        .write_slice(&image, layout::ACPI)
        .and_then(|()| memory.write_slice(&generation_id, layout::GENERATION_ID))
        .map_err(AcpiError::Write)
}

/// RSDP and tables, as they lie in memory from [`layout::ACPI`] on.
fn build(contents: &Contents<'_>) -> Result<Vec<u8>, AcpiError> {
    let mut tables = Tables {
        bytes: Vec::new(),
        base: layout::ACPI.0 + RSDP_BYTES,
    };
    let dsdt = tables.add(&dsdt(contents)?);
    let mut xsdt = XSDT::new(OEM, TABLE, REVISION);
    xsdt.add_entry(tables.add(&fadt(dsdt)));
    xsdt.add_entry(tables.add(&madt(contents)));
    let xsdt = tables.add(&xsdt);

    let mut image = bytes_of(&Rsdp::new(OEM, xsdt));
    image.resize(usize::try_from(RSDP_BYTES).unwrap_or(0), 0);
    image.extend(tables.bytes);
    Ok(image)
}

/// Tables one after the other.
struct Tables {
    bytes: Vec<u8>,
    base: u64,
}

impl Tables {
    /// Appends a table and gives its guest address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let address = self.base + self.bytes.len() as u64;
        self.bytes.extend(bytes_of(table));
        address
    }
}

/// AML that is there already.
pub(super) struct Raw(pub(super) Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

pub(super) fn bytes_of(aml: &dyn Aml) -> Vec<u8> {
    struct Sink(Vec<u8>);
    impl AmlSink for Sink {
        fn byte(&mut self, byte: u8) {
            self.0.push(byte);
        }
    }
    let mut sink = Sink(Vec::new());
    aml.to_aml_bytes(&mut sink);
    sink.0
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = |offset: u16| {
        let port = u64::from(layout::POWER_PORT + offset);
        GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port)
    };
    let mut fadt = FADTBuilder::new(OEM, TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Buttons, if any, are devices, not fixed registers.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.reset_reg = register(RESET_OFFSET);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = register(SLEEP_CONTROL_OFFSET);
    fadt.sleep_status_reg = register(SLEEP_STATUS_OFFSET);
    fadt.finalize()
}

fn madt(contents: &Contents<'_>) -> MADT {
    let controller = LocalInterruptController::Address(layout::LAPIC);
    let mut madt = MADT::new(OEM, TABLE, REVISION, controller);
    for id in 0..contents.max_vcpus {
        let status = if id < contents.vcpus {
            EnabledStatus::Enabled
        } else {
            EnabledStatus::DisabledOnlineCapable
        };
        madt.add_structure(ProcessorLocalApic::new(id, id, status));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn dsdt(contents: &Contents<'_>) -> Result<Sdt, AcpiError> {
    let mut aml = bytes_of(&Name::new(
        Path::new("_S5_"),
        &Package::new(vec![&SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]),
    ));
    aml.extend(serial());
    for (number, device) in (0_u8..).zip(contents.virtio) {
        aml.extend(virtio_mmio(number, device)?);
    }
    let later = contents.vcpus..contents.max_vcpus;
    aml.extend(hotplug::scope(later, contents.places)?);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, REVISION);
    dsdt.append_slice(&aml);
    Ok(dsdt)
}

fn serial() -> Vec<u8> {
    let port = layout::SERIAL_PORT;
    let ports = IO::new(port, port, 1, layout::SERIAL_PORTS);
    let interrupt = Interrupt::new(true, true, false, false, layout::SERIAL_INTERRUPT);
    let resources = ResourceTemplate::new(vec![&ports, &interrupt]);
    bytes_of(&Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new("COM1"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &ZERO),
                &Name::new(Path::new("_CRS"), &resources),
            ],
        )],
    ))
}

/// Registers and interrupt of a virtio-mmio device, a `_CRS`.
pub(super) fn virtio_resources(device: &Allocation) -> Result<Vec<u8>, AcpiError> {
    let above = |_| AcpiError::Address(device.base);
    let base = u32::try_from(device.base).map_err(above)?;
    let bytes = u32::try_from(device.bytes).map_err(above)?;
    let registers = Memory32Fixed::new(true, base, bytes);
    let interrupt = Interrupt::new(true, true, false, false, device.interrupt);
    let resources = ResourceTemplate::new(vec![&registers, &interrupt]);
    Ok(bytes_of(&resources))
}

fn virtio_mmio(number: u8, device: &Allocation) -> Result<Vec<u8>, AcpiError> {
    let resources = Raw(virtio_resources(device)?);
    let name = format!("V{number:03}");
    Ok(bytes_of(&Scope::new(
        Path::new("_SB_"),
        vec![&Device::new(
            Path::new(&name),
            vec![
                &Name::new(Path::new("_HID"), &"LNRO0005"),
                &Name::new(Path::new("_UID"), &number),
                &Name::new(Path::new("_CRS"), &resources),
            ],
        )],
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use vm_memory::GuestAddress;

    fn devices(count: u32) -> Vec<Allocation> {
        (0..count)
            .map(|i| Allocation {
                base: layout::VIRTIO_MMIO.0 + u64::from(i) * 0x1000,
                bytes: 0x1000,
                interrupt: layout::FIRST_INTERRUPT + i,
            })
            .collect()
    }

    fn read(memory: &GuestMemoryMmap, at: u64, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        memory.read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }

    fn table(memory: &GuestMemoryMmap, at: u64) -> Vec<u8> {
        let length: u32 = memory.read_obj(GuestAddress(at + 4)).unwrap();
        let bytes = read(memory, at, length.try_into().unwrap());
        let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0, "checksum of {:?}", &bytes[..4]);
        bytes
    }

    fn address(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_sums_to_zero() {
        let memory = memory::allocate(&layout::ram(2 << 20)).unwrap();
        let contents = Contents {
            vcpus: 1,
            max_vcpus: 254,
            virtio: &devices(9),
            places: &devices(8),
        };
        write(&memory, &contents, [7; 16]).unwrap();
        let id = read(&memory, layout::GENERATION_ID.0, 16);
        assert_eq!(id, [7; 16]);
        let root = read(&memory, layout::ACPI.0, 36);
        assert_eq!(&root[..8], b"RSD PTR ");
        for part in [&root[..20], &root[..]] {
            assert_eq!(
                part.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)),
                0
            );
        }
        let xsdt = table(&memory, address(&root, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table(&memory, address(&xsdt, 36));
        assert_eq!(&fadt[..4], b"FACP");
        let madt = table(&memory, address(&xsdt, 44));
        assert_eq!(&madt[..4], b"APIC");
        assert_eq!(madt.len(), 44 + 254 * 8 + 12);
        // Flags: the first is enabled, the others may come online.
        assert_eq!((madt[48], madt[56], madt[44 + 253 * 8 + 4]), (1, 2, 2));
        let dsdt = table(&memory, address(&fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        for name in [
            "COM1", "V000", "V008", "_S5_", "PWRB", "C001", "C253", "H000", "H007",
        ] {
            let found = dsdt.windows(4).any(|window| window == name.as_bytes());
            assert!(found, "{name}");
        }
    }

    #[test]
    fn a_device_above_4_gib_is_refused() {
        let mut far = devices(1);
        far[0].base = 1 << 32;
        for (virtio, places) in [(&far[..], &[][..]), (&[], &far)] {
            let contents = Contents {
                vcpus: 1,
                max_vcpus: 1,
                virtio,
                places,
            };
            assert!(matches!(build(&contents), Err(AcpiError::Address(_))));
        }
    }
}

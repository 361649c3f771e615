//! What a hostile guest does to virtio-mmio devices (virtio 1.3, sections 2.7 and 4.2), as pieces of a [`Script`].

use super::{FREE_RAM, ONCE, Script, Width, steps};

/// Where the devices' registers begin, one page each.
pub const WINDOW: u64 = 0xc000_0000;
/// Bytes of the window.
pub const WINDOW_BYTES: u64 = 0x10_0000;
/// Pages of the window that are attacked: more than there are devices.
pub const DEVICES: u64 = 10;

/// Registers that attacks name.
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECTED: u64 = 0x24;
const QUEUE_SELECTED: u64 = 0x30;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
const DESCRIPTORS: u64 = 0x80;
const AVAILABLE: u64 = 0x90;
const USED: u64 = 0xa0;

/// Queues that are set up, more than most devices have; a device ignores those that it has not.
const QUEUES: u32 = 4;
const QUEUE_ENTRIES: u64 = 16;
/// Indirect descriptors and event index, which every device of Walnut offers.
const RING_FEATURES: u64 = 1 << 28 | 1 << 29;
const NEXT: u64 = 1;
const WRITE: u64 = 2;
const INDIRECT: u64 = 4;

/// Where a device's page is.
pub fn page(device: u64) -> u64 {
    WINDOW + device * 0x1000
}

/// Where the three parts of each queue are.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
}

impl Places {
    /// Parts in free RAM, for the queue with this index.
    pub fn of_queue(queue: u32) -> Self {
        let base = FREE_RAM + u64::from(queue) * 0x1_0000;
        Self {
            descriptors: base,
            available: base + 0x4000,
            used: base + 0x8000,
        }
    }

    /// Where an indirect table of the queue is.
    fn table(self) -> u64 {
        self.used + 0x4000
    }
}

/// One descriptor: address, length, flags, next.
type Descriptor = (u64, u64, u64, u64);

/// What a driver puts into a queue.
#[derive(Debug, Clone, Copy)]
pub struct Rings {
    /// What is wrong with it.
    pub name: &'static str,
    descriptors: &'static [Descriptor],
    /// Descriptors at [`TABLE`].
    table: &'static [Descriptor],
    head: u64,
    index: u64,
}

const fn rings(name: &'static str, descriptors: &'static [Descriptor]) -> Rings {
    Rings {
        name,
        descriptors,
        table: &[],
        head: 0,
        index: 1,
    }
}

/// Stands for the address of the queue's indirect table.
const TABLE: u64 = 0x7ab1e;
const BUFFER: u64 = FREE_RAM + 0x10_0000;
const LAST_BYTES: u64 = u64::MAX - 15;
const ALL: u64 = 0xffff_ffff;

/// Rings that break the rules of section 2.7, or use them to ask for too much.
pub const HOSTILE_RINGS: &[Rings] = &[
    rings(
        "a chain that is a loop",
        &[(BUFFER, 16, NEXT, 1), (BUFFER, 16, NEXT, 0)],
    ),
    rings(
        "a chain that leads to itself",
        &[(BUFFER, 16, NEXT | WRITE, 0)],
    ),
    rings(
        "a chain that leaves the table",
        &[(BUFFER, 16, NEXT, 0xffff)],
    ),
    rings(
        "buffers in device registers",
        &[(WINDOW, 64, NEXT, 1), (WINDOW + 0x50, 0x1000, WRITE, 0)],
    ),
    rings(
        "buffers that wrap around",
        &[(LAST_BYTES, 64, NEXT, 1), (LAST_BYTES, 64, WRITE, 0)],
    ),
    rings(
        "buffers past the end of RAM",
        &[
            (0x7ff_ff00, 0x1000, NEXT, 1),
            (0x7ff_ff00, 0x1000, WRITE, 0),
        ],
    ),
    rings(
        "buffers beyond 4 GiB",
        &[(1 << 32, 64, NEXT, 1), (1 << 52, 64, WRITE, 0)],
    ),
    rings(
        "buffers of 4 GiB",
        &[
            (0, ALL, NEXT, 1),
            (0, ALL, WRITE | NEXT, 2),
            (0, ALL, WRITE, 0),
        ],
    ),
    rings(
        "buffers of no bytes",
        &[
            (BUFFER, 0, NEXT, 1),
            (BUFFER, 0, NEXT | WRITE, 2),
            (0, 0, WRITE, 0),
        ],
    ),
    rings(
        "the queue's own memory",
        &[
            (FREE_RAM, 0x4_0000, NEXT, 1),
            (FREE_RAM, 0x4_0000, WRITE, 0),
        ],
    ),
    rings(
        "writable before readable",
        &[(BUFFER, 64, NEXT | WRITE, 1), (BUFFER, 64, 0, 0)],
    ),
    rings(
        "an indirect table of no entries",
        &[(TABLE, 0, INDIRECT, 0)],
    ),
    rings("an indirect table cut off", &[(TABLE, 17, INDIRECT, 0)]),
    rings(
        "an indirect table outside RAM",
        &[(WINDOW, 64, INDIRECT, 0)],
    ),
    rings("an indirect table of 4 GiB", &[(0, ALL & !15, INDIRECT, 0)]),
    Rings {
        table: &[(TABLE, 16, INDIRECT, 0)],
        ..rings("an indirect table in itself", &[(TABLE, 16, INDIRECT, 0)])
    },
    Rings {
        table: &[(BUFFER, 16, NEXT, 0), (BUFFER, 16, NEXT, 0)],
        ..rings(
            "an indirect table with a loop",
            &[(TABLE, 32, INDIRECT | NEXT, 0)],
        )
    },
    Rings {
        head: 0xffff,
        ..rings("a head outside the table", &[])
    },
    Rings {
        index: 0x8000,
        ..rings("an index that jumps", &[(BUFFER, 64, WRITE, 0)])
    },
    Rings {
        index: QUEUE_ENTRIES,
        ..rings(
            "one buffer in every place",
            &[(BUFFER, 0x1000, NEXT, 1), (BUFFER, 0x1000, WRITE, 0)],
        )
    },
];

/// What a driver does to a device, by its page.
impl Script {
    /// Writes a register.
    pub fn register(&mut self, page: u64, register: u64, value: u64) -> &mut Self {
        self.write(Width::Long, page + register, value, ONCE)
    }

    /// Resets the device, which waits for the end of its threads.
    pub fn reset(&mut self, page: u64) -> &mut Self {
        self.register(page, STATUS, 0)
    }

    /// Resets the device and agrees on the ring's features.
    pub fn agree(&mut self, page: u64) -> &mut Self {
        for status in [0, 1, 3] {
            self.register(page, STATUS, status);
        }
        for (selected, features) in [(0, RING_FEATURES), (1, 1)] {
            self.register(page, DRIVER_FEATURES_SELECTED, selected);
            self.register(page, DRIVER_FEATURES, features);
        }
        self.register(page, STATUS, 11)
    }

    /// Writes everything that the registers say of a queue.
    pub fn queue(&mut self, page: u64, queue: u32, size: u64, places: Places) -> &mut Self {
        self.register(page, QUEUE_SELECTED, queue.into());
        self.register(page, QUEUE_SIZE, size);
        for (register, address) in [
            (DESCRIPTORS, places.descriptors),
            (AVAILABLE, places.available),
            (USED, places.used),
        ] {
            self.register(page, register, address & ALL);
            self.register(page, register + 4, address >> 32);
        }
        self.register(page, QUEUE_READY, 1)
    }

    /// As [`Script::agree`], and starts the device with all queues at `places`.
    pub fn start(&mut self, page: u64, places: impl Fn(u32) -> Places) -> &mut Self {
        self.agree(page);
        for queue in 0..QUEUES {
            self.queue(page, queue, QUEUE_ENTRIES, places(queue));
        }
        self.register(page, STATUS, 15)
    }

    /// Says that every queue has something.
    pub fn kick(&mut self, page: u64) -> &mut Self {
        for queue in 0..QUEUES {
            self.register(page, QUEUE_NOTIFY, queue.into());
        }
        self
    }

    /// Starts the device with `rings` in every queue, kicks, gives it time, and resets it.
    pub fn attack(&mut self, page: u64, rings: &Rings) -> &mut Self {
        for queue in 0..QUEUES {
            self.fill(Places::of_queue(queue), rings);
        }
        self.start(page, Places::of_queue).kick(page);
        self.until(Places::of_queue(0).used + 2, 1, 2000);
        self.read(Width::Long, page + STATUS, ONCE).reset(page)
    }

    fn fill(&mut self, places: Places, rings: &Rings) {
        let quads = u32::try_from(0xd000 / 8).unwrap_or(0);
        self.write(Width::Quad, places.descriptors, 0, steps(quads, 8));
        for (base, descriptors) in [
            (places.descriptors, rings.descriptors),
            (places.table(), rings.table),
        ] {
            for ((address, length, flags, next), at) in descriptors.iter().zip((base..).step_by(16))
            {
                let address = if *address == TABLE {
                    places.table()
                } else {
                    *address
                };
                self.write(Width::Quad, at, address, ONCE);
                let rest = length | flags << 32 | next << 48;
                self.write(Width::Quad, at + 8, rest, ONCE);
            }
        }
        let entries = steps(u32::try_from(QUEUE_ENTRIES).unwrap_or(0), 2);
        self.write(Width::Word, places.available + 4, rings.head, entries);
        self.write(Width::Word, places.available + 2, rings.index, ONCE);
    }

    /// Offers one writable buffer to the device's first queue, as a good driver does.
    pub fn ask(&mut self, page: u64) -> &mut Self {
        let places = Places::of_queue(0);
        self.fill(places, &rings("a good buffer", &[(BUFFER, 64, WRITE, 0)]));
        self.start(page, Places::of_queue).kick(page);
        self.until(places.used + 2, 1, 200_000_000)
    }
}

/// Registers at which nothing bad may happen whatever is written: all, and the beginning of the configuration.
pub fn registers() -> impl Iterator<Item = u64> {
    (0..0x180).step_by(4)
}

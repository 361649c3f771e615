//! What a process costs, by `/proc/<pid>/smaps` (the kernel's Documentation/filesystems/proc.rst).

use anyhow::{Context, Result, ensure};
use std::fs;

/// One process' memory in KiB, split into the guest's RAM and all else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footprint {
    /// Proportional set size of all mappings but the guest's RAM.
    pub overhead_pss_kib: u64,
    /// Guest RAM that is resident; zero for a process that holds none.
    pub guest_rss_kib: u64,
}

/// Measures a process that holds no guest's RAM.
pub fn of_process(pid: i32) -> Result<Footprint> {
    split(&smaps(pid)?, None)
}

/// Measures a process that maps a guest's RAM of this size: one mapping of at least that size, or neighbours that
/// together are, where advice about huge pages has split it. RAM that was added later is advised in the same way.
pub fn of_vmm(pid: i32, guest_mib: u32) -> Result<Footprint> {
    split(&smaps(pid)?, Some(u64::from(guest_mib) * 1024)).with_context(|| format!("process {pid}"))
}

fn smaps(pid: i32) -> Result<String> {
    fs::read_to_string(format!("/proc/{pid}/smaps"))
        .with_context(|| format!("cannot read the mappings of process {pid}"))
}

#[derive(Debug, Default, Clone, Copy)]
struct Mapping {
    start: u64,
    end: u64,
    size_kib: u64,
    rss_kib: u64,
    pss_kib: u64,
    advised: bool,
}

impl Mapping {
    fn at(line: &str) -> Option<Self> {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some(Self {
            start: u64::from_str_radix(start, 16).ok()?,
            end: u64::from_str_radix(end, 16).ok()?,
            ..Self::default()
        })
    }

    fn read(&mut self, key: &str, value: &str) {
        // `hg` and `nh`: huge pages have been asked for, or refused.
        if key == "VmFlags" {
            self.advised = value
                .split_whitespace()
                .any(|flag| flag == "hg" || flag == "nh");
        }
        let kib = value.trim().strip_suffix(" kB").map(str::parse::<u64>);
        let Some(Ok(kib)) = kib else { return };
        match key {
            "Size" => self.size_kib = kib,
            "Rss" => self.rss_kib = kib,
            "Pss" => self.pss_kib = kib,
            _ => {}
        }
    }

    /// Takes in the next mapping, if it is another part of the same memory.
    fn absorb(&mut self, next: &Self) -> bool {
        let same = self.advised && next.advised && self.end == next.start;
        if same {
            self.end = next.end;
            self.size_kib += next.size_kib;
            self.rss_kib += next.rss_kib;
            self.pss_kib += next.pss_kib;
        }
        same
    }
}

fn mappings(smaps: &str) -> Vec<Mapping> {
    let mut separate: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        if let Some(mapping) = Mapping::at(line) {
            separate.push(mapping);
        } else if let (Some(mapping), Some((key, value))) =
            (separate.last_mut(), line.split_once(':'))
        {
            mapping.read(key, value);
        }
    }
    let mut whole: Vec<Mapping> = Vec::new();
    for mapping in separate {
        if !whole.last_mut().is_some_and(|last| last.absorb(&mapping)) {
            whole.push(mapping);
        }
    }
    whole
}

fn split(smaps: &str, guest_kib: Option<u64>) -> Result<Footprint> {
    let mappings = mappings(smaps);
    ensure!(!mappings.is_empty(), "no mappings: the process has ended");
    let (guest, rest): (Vec<Mapping>, Vec<Mapping>) = mappings.into_iter().partition(|mapping| {
        guest_kib.is_some_and(|kib| mapping.advised || mapping.size_kib >= kib)
    });
    if let Some(kib) = guest_kib {
        let found = guest.iter().any(|mapping| mapping.size_kib >= kib);
        ensure!(found, "no mapping of {kib} KiB or more");
    }
    Ok(Footprint {
        overhead_pss_kib: rest.iter().map(|mapping| mapping.pss_kib).sum(),
        guest_rss_kib: guest.iter().map(|mapping| mapping.rss_kib).sum(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0008000000 rw-s 00000000 00:01 7 /memfd:ram (deleted)
Size:             131072 kB
Rss:               40000 kB
Pss:               40000 kB
VmFlags: rd wr sh
7f0009000000-7f0009001000 r-xp 00000000 00:01 8 /usr/bin/thing
Size:                  4 kB
Rss:                   4 kB
Pss:                   2 kB
";

    #[test]
    fn guest_ram_is_told_from_the_rest_by_its_size() {
        let expected = Footprint {
            overhead_pss_kib: 2,
            guest_rss_kib: 40000,
        };
        assert_eq!(split(SMAPS, Some(131_072)).unwrap(), expected);
        assert_eq!(split(SMAPS, None).unwrap().overhead_pss_kib, 40002);
    }

    #[test]
    fn guest_ram_that_advice_has_split_is_one() {
        let parts = "\
10000000-14000000 rw-p 00000000 00:00 0
Size:              65536 kB
Rss:                 100 kB
Pss:                 100 kB
VmFlags: rd wr hg
14000000-18000000 rw-p 00000000 00:00 0
Size:              65536 kB
Rss:                  10 kB
Pss:                  10 kB
VmFlags: rd wr nh
18000000-18001000 rw-p 00000000 00:00 0
Size:                  4 kB
Rss:                   4 kB
Pss:                   3 kB
VmFlags: rd wr
";
        let expected = Footprint {
            overhead_pss_kib: 3,
            guest_rss_kib: 110,
        };
        assert_eq!(split(parts, Some(131_072)).unwrap(), expected);
    }

    #[test]
    fn a_measurement_that_fails_is_an_error_and_not_a_zero() {
        assert!(split(SMAPS, Some(262_144)).is_err());
        assert!(split("", None).is_err());
    }
}

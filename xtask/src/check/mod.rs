//! What this machine can do, found out by doing it: a probe guest is booted and timed. That
//! /dev/kvm exists proves nothing.

pub(crate) mod guest;

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::check::guest::{LOOP_INSTRUCTIONS, Milestone};
use crate::lab::qemu::{self, Accelerator};

/// The hidden command that runs the probe guest in a process of its own.
pub(crate) const PROBE_COMMAND: &str = "probe-guest";

/// Hardware needs milliseconds.
const PROBE_LIMIT: Duration = Duration::from_secs(15);

/// Slower than this, an ordinary kernel takes minutes to boot. Real processors do billions, a
/// processor that QEMU emulates some hundred million.
const USABLE_SPEED: u64 = 50_000_000;

/// What KVM on this machine is worth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kvm {
    /// It can't be opened.
    Absent { reason: String },
    /// A guest stops at something that every kernel does.
    Broken {
        step: &'static str,
        how: String,
        speed: Option<u64>,
    },
    /// Guests run, but far too slowly.
    Slow { speed: Option<u64> },
    /// Guests run as they should.
    Usable { speed: u64 },
}

/// Whether a guest of this machine can have guests of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Nesting {
    /// It can.
    On,
    /// It can't.
    Off { reason: String },
}

/// What is known about this machine.
#[derive(Debug)]
pub(crate) struct Verdict {
    /// KVM itself.
    pub(crate) kvm: Kvm,
    /// Its nesting.
    pub(crate) nesting: Nesting,
}

impl Verdict {
    /// What the lab runs on here.
    pub(crate) fn accelerator(&self) -> Accelerator {
        match (&self.kvm, &self.nesting) {
            (Kvm::Usable { .. }, Nesting::On) => Accelerator::Kvm,
            _ => Accelerator::Tcg,
        }
    }
}

impl fmt::Display for Kvm {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent { reason } => write!(to, "unusable: {reason}"),
            Self::Broken { step, how, speed } => {
                write!(to, "unusable: the probe guest fails at {step} ({how})")?;
                speed.map_or(Ok(()), |speed| write!(to, ", after {}", Speed(speed)))
            }
            Self::Slow { speed: Some(speed) } => write!(to, "too slow: {}", Speed(*speed)),
            Self::Slow { speed: None } => {
                let millions = f64::from(LOOP_INSTRUCTIONS) / 1e6;
                write!(
                    to,
                    "too slow: {millions} M instructions take over {PROBE_LIMIT:?}"
                )
            }
            Self::Usable { speed } => write!(to, "accelerated: {}", Speed(*speed)),
        }
    }
}

struct Speed(u64);

impl fmt::Display for Speed {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            to,
            "{}.{} M instructions/s",
            self.0 / 1_000_000,
            self.0 / 100_000 % 10
        )
    }
}

impl fmt::Display for Nesting {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On => write!(to, "on"),
            Self::Off { reason } => write!(to, "off: {reason}"),
        }
    }
}

/// What the lab runs on here. Asks the cheap question first.
pub(crate) fn accelerator() -> Result<Accelerator> {
    match nesting() {
        Nesting::Off { .. } => Ok(Accelerator::Tcg),
        nesting @ Nesting::On => Ok(Verdict {
            kvm: probe()?,
            nesting,
        }
        .accelerator()),
    }
}

/// Finds everything out and prints it.
pub(crate) fn run() -> Result<()> {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    println!("processors      {processors}, {}", processor_name());
    println!("memory          {}", memory());
    let qemu = qemu::version().map_or_else(|error| format!("{error:#}"), |(_, version)| version);
    println!("QEMU            {qemu}");
    let verdict = Verdict {
        kvm: probe()?,
        nesting: nesting(),
    };
    println!("KVM             {}", verdict.kvm);
    println!("nesting         {}", verdict.nesting);
    let (containers, lab) = match (&verdict.kvm, verdict.accelerator()) {
        (Kvm::Usable { .. }, Accelerator::Kvm) => ("runs", "accelerated by KVM"),
        (Kvm::Usable { .. }, Accelerator::Tcg) => (
            "runs",
            "emulated by QEMU: this machine's guests can't have guests",
        ),
        _ => (
            "does not run: it needs a usable KVM",
            "emulated by QEMU: real KVM semantics, about a tenth of the speed",
        ),
    };
    println!("Walnut here     {containers}");
    println!("lab             {lab}");
    println!("demo, test      work, in the lab");
    Ok(())
}

/// Boots the probe guest in a child process and watches it.
fn probe() -> Result<Kvm> {
    if let Err(error) = guest::open() {
        return Ok(Kvm::Absent {
            reason: error.to_string(),
        });
    }
    let program = std::env::current_exe().context("find this program")?;
    let mut child = Command::new(program)
        .arg(PROBE_COMMAND)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start the probe guest")?;
    let output = child.stdout.take().context("read the probe guest")?;
    let (line_sent, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).lines().map_while(Result::ok) {
            if line_sent.send(line).is_err() {
                return;
            }
        }
    });
    let observation = observe(&lines, Instant::now() + PROBE_LIMIT);
    let _ = child.kill();
    let ended = child
        .wait_with_output()
        .context("wait for the probe guest")?;
    let errors = String::from_utf8_lossy(&ended.stderr).trim().to_owned();
    Ok(judge(&observation, &errors))
}

/// What was heard of the probe guest.
#[derive(Debug, Default)]
struct Observation {
    milestones: Vec<(Milestone, u64)>,
    end: Option<String>,
    late: bool,
}

fn observe(lines: &mpsc::Receiver<String>, deadline: Instant) -> Observation {
    let mut observation = Observation::default();
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => match (guest::parse(&line), line.strip_prefix("end ")) {
                (Some(milestone), _) => observation.milestones.push(milestone),
                (None, end) => observation.end = Some(end.unwrap_or(&line).to_owned()),
            },
            Err(mpsc::RecvTimeoutError::Timeout) => {
                observation.late = true;
                return observation;
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return observation,
        }
    }
}

fn judge(observation: &Observation, errors: &str) -> Kvm {
    let at = |wanted| {
        let found = observation
            .milestones
            .iter()
            .find(|(milestone, _)| *milestone == wanted);
        found.map(|(_, micros)| *micros)
    };
    let speed = at(Milestone::Cpuid)
        .zip(at(Milestone::Loop))
        .map(|(start, end)| {
            u64::from(LOOP_INSTRUCTIONS) * 1_000_000 / end.saturating_sub(start).max(1)
        });
    let last = observation
        .milestones
        .last()
        .map_or(Milestone::Nothing, |(last, _)| *last);
    match (last.failed_step(), speed) {
        (None, Some(speed)) if speed >= USABLE_SPEED => Kvm::Usable { speed },
        (None, speed) => Kvm::Slow { speed },
        (Some(_), _) if observation.late && last == Milestone::Cpuid => Kvm::Slow { speed: None },
        (Some(step), speed) => {
            let how = match &observation.end {
                Some(end) => end.clone(),
                None if observation.late => format!("no answer in {PROBE_LIMIT:?}"),
                None if errors.is_empty() => "the process died".to_owned(),
                None => errors.to_owned(),
            };
            Kvm::Broken { step, how, speed }
        }
    }
}

fn nesting() -> Nesting {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| {
        let mut flags = processor.lines().filter(|line| line.starts_with("flags"));
        flags
            .next()
            .is_some_and(|line| line.split_whitespace().any(|word| word == flag))
    };
    let module = match (has("svm"), has("vmx")) {
        (true, _) => "kvm_amd",
        (_, true) => "kvm_intel",
        _ => {
            let reason = "the processor shows neither svm nor vmx".to_owned();
            return Nesting::Off { reason };
        }
    };
    let parameter = format!("/sys/module/{module}/parameters/nested");
    match fs::read_to_string(&parameter).unwrap_or_default().trim() {
        "1" | "Y" => Nesting::On,
        "" => Nesting::Off {
            reason: format!("no {parameter}: is the module loaded?"),
        },
        value => Nesting::Off {
            reason: format!("{parameter} is {value}"),
        },
    }
}

fn processor_name() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    name.map_or("unknown", |(_, name)| name).to_owned()
}

fn memory() -> String {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next());
    let kib: u64 = kib.and_then(|kib| kib.parse().ok()).unwrap_or(0);
    format!(
        "{} MiB (the lab may touch up to {})",
        kib / 1024,
        qemu::MEMORY_MIB
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(milestones: &[(Milestone, u64)], end: Option<&str>, late: bool) -> Observation {
        Observation {
            milestones: milestones.to_vec(),
            end: end.map(str::to_owned),
            late,
        }
    }

    #[test]
    fn a_fast_guest_is_usable() {
        let all = [
            (Milestone::LongMode, 1),
            (Milestone::Cpuid, 2),
            (Milestone::Loop, 2_002),
            (Milestone::Cmpxchg16b, 2_003),
        ];
        let verdict = judge(&observed(&all, Some("halted"), false), "");
        assert_eq!(
            verdict,
            Kvm::Usable {
                speed: 2_500_000_000
            }
        );
    }

    #[test]
    fn an_interpreter_is_too_slow() {
        let all = [
            (Milestone::Cpuid, 0),
            (Milestone::Loop, 5_000_000),
            (Milestone::Cmpxchg16b, 5_000_001),
        ];
        let verdict = judge(&observed(&all, Some("halted"), false), "");
        assert_eq!(
            verdict,
            Kvm::Slow {
                speed: Some(1_000_000)
            }
        );
        let hung = [(Milestone::LongMode, 0), (Milestone::Cpuid, 1)];
        assert_eq!(
            judge(&observed(&hung, None, true), ""),
            Kvm::Slow { speed: None }
        );
    }

    #[test]
    fn a_missing_instruction_is_named() {
        let some = [(Milestone::Cpuid, 0), (Milestone::Loop, 5_000)];
        let text = judge(&observed(&some, Some("InternalError"), false), "").to_string();
        assert!(
            text.contains("lock cmpxchg16b") && text.contains("InternalError"),
            "{text}"
        );
        let text = judge(&observed(&[], None, false), "error: KVM_CREATE_VM").to_string();
        assert!(
            text.contains("long mode") && text.contains("KVM_CREATE_VM"),
            "{text}"
        );
    }
}

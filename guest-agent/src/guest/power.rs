//! How the guest ends.
//!
//! Powering off is an orderly end. The end of PID 1 is a kernel panic, which the host tells apart: that is
//! what must become of a fault of the agent.

use rustix::system::{RebootCommand, reboot};
use std::{error::Error, process};

/// Status of PID 1 when it gives up; the kernel prints it as it panics.
const GAVE_UP: i32 = 101;

/// Writes everything to its place and powers off.
pub(crate) fn off() -> ! {
    rustix::fs::sync();
    match reboot(RebootCommand::PowerOff) {
        Ok(()) => give_up("the guest is still on after it was powered off"),
        Err(error) => give_up(&format!("cannot power off: {error}")),
    }
}

/// Says why and ends PID 1.
pub(crate) fn give_up(reason: &str) -> ! {
    eprintln!("walnut-agent: {reason}");
    process::exit(GAVE_UP)
}

/// An error and its causes on one line.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(&format!(": {error}"));
        cause = error.source();
    }
    line
}

/// Makes a panic on any thread the end of the guest: a runtime would go on without the part that failed.
pub(crate) fn panics_are_fatal() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        process::exit(GAVE_UP);
    }));
}

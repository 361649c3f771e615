//! `walnut-vmm`: one VM, built from what the parent sends on the inherited control socket.
//!
//! Standard error carries at most one line, and the console's tail when the guest failed.

use std::{error::Error, io::Write, process::exit};
use walnut_vmm::{
    boot::{self, BootError},
    control::{Control, ControlError, chain, failure},
    session::{self, Outcome},
};
use walnut_vmm_api::{FailureKind, VmmExit};

fn main() {
    std::panic::set_hook(Box::new(|panic| {
        say(&format!("internal error: {panic}"));
        exit(VmmExit::Device.code().into());
    }));
    exit(run().code().into())
}

fn run() -> VmmExit {
    let control = match arguments().and_then(|()| Control::inherited()) {
        Ok(control) => control,
        Err(error) => return fail(VmmExit::Usage, &error),
    };
    let (config, mut files) = match control.receive_boot() {
        Ok(received) => received,
        Err(error) => return refuse(&control, FailureKind::Config, &error),
    };
    let mut booted = match boot::boot(&config, &mut files) {
        Ok(booted) => booted,
        Err(error) => return refuse(&control, BootError::kind(&error), &error),
    };
    drop(files);
    let outcome = session::run(&control, &mut booted);
    let tail = booted.console.finish();
    match outcome {
        Ok(outcome) => report(&outcome, &tail),
        Err(error) => fail(VmmExit::Device, &error),
    }
}

fn arguments() -> Result<(), ControlError> {
    match std::env::args_os().len() {
        0 | 1 => Ok(()),
        _ => Err(ControlError::NotASocket),
    }
}

/// Tells the parent, which asked for the VM, and standard error.
fn refuse(control: &Control, kind: FailureKind, error: &dyn Error) -> VmmExit {
    // A parent that is gone needs no answer.
    let _ = control.send(&failure(kind, error));
    fail(VmmExit::Setup, error)
}

fn report(outcome: &Outcome, tail: &str) -> VmmExit {
    if outcome.exit == VmmExit::Ended {
        return VmmExit::Ended;
    }
    let detail = outcome.detail.as_deref().unwrap_or("its last output:");
    say(&format!("{}; {detail}\n{tail}", outcome.exit.describe()));
    outcome.exit
}

fn fail(exit: VmmExit, error: &dyn Error) -> VmmExit {
    say(&chain(error));
    exit
}

/// Writes to standard error; a closed one must not make this process panic.
fn say(text: &str) {
    let line = format!("walnut-vmm: {text}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

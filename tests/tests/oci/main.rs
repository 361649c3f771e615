//! The OCI runtime specification, property by property: the agent in a VM, and runc as the oracle, are given the
//! same configurations (`tests/oci`) and must make the same of them.

mod agent;
mod case;
mod hooks;
mod runc;

use anyhow::{Result, bail};
use case::Case;
use walnut_tests::{guest::Guest, requirement};

#[test]
fn the_agent_does_what_the_specification_says() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let mut guest = Guest::boot(&programs)?;
    guest.agent.setup()?;
    each(|case| agent::try_case(&mut guest, &programs, case))
}

#[test]
fn runc_does_the_same() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    each(|case| match case.not_runc() {
        Some(_) => Ok(()),
        None => runc::try_case(&programs, case),
    })
}

/// Shows every case, and fails with all that failed.
fn each(mut show: impl FnMut(&Case) -> Result<()>) -> Result<()> {
    let mut failures = Vec::new();
    for case in case::all()? {
        let outcome = show(&case);
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("case {} ... {word}", case.name());
        if let Err(error) = outcome {
            failures.push(format!("{}: {error:#}", case.name()));
        }
    }
    if !failures.is_empty() {
        bail!("{}", failures.join("\n"));
    }
    Ok(())
}

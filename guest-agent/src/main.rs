//! PID 1 of the guest, and, when it is run as `walnut-init`, the first steps of a container's process.

use std::process::ExitCode;

fn main() -> ExitCode {
    walnut_agent::run()
}

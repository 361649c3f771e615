//! PID 1 of the lab.
//!
//! The kernel starts this program as `/init` of the initramfs. It mounts the node image read-only
//! with a RAM overlay, so that each boot is a clean node, sets the node up, starts itself again as
//! the command server and then only reaps orphans. When the server ends, the lab powers off.

mod containerd;
mod exec;
mod node;
mod server;

use std::process::{Command, ExitCode};

use rustix::process::WaitOptions;
use rustix::system::RebootCommand;

/// The argument that makes this program the command server.
const SERVE: &str = "serve";

fn main() -> ExitCode {
    let outcome = if std::env::args().nth(1).as_deref() == Some(SERVE) {
        server::serve().map_err(|error| error.to_string())
    } else {
        run_as_pid_1()
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("lab-init: {message}");
            if rustix::process::getpid().is_init() {
                let _ = rustix::system::reboot(RebootCommand::PowerOff);
            }
            ExitCode::FAILURE
        }
    }
}

fn run_as_pid_1() -> Result<(), String> {
    let token = node::set_up().map_err(|error| error.to_string())?;
    // The link still names the file in the initramfs, which no path reaches any more.
    let server = Command::new("/proc/self/exe")
        .arg(SERVE)
        .env_clear()
        .envs(node::ENVIRONMENT)
        .env(server::TOKEN_VARIABLE, token)
        .spawn()
        .map_err(|error| format!("start the command server: {error}"))?;
    let server = rustix::process::Pid::from_child(&server);
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == server => {
                return Err(format!("the command server ended: {status:?}"));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(format!("wait for children: {error}")),
        }
    }
}

//! How a process's end is noticed, waited out and told: reaped or killed, its output through, containerd told,
//! then `Wait` answered.
//!
//! Must not decide what follows from an end; `sandbox` does.

use crate::{
    agent::AgentError,
    container::{Exit, KILLED, Process},
    error::ShimError,
    events::Events,
    log,
    machine::Machine,
};
use std::sync::Arc;

/// What a process that could not be started reports.
const START_FAILED: u32 = 255;

/// Marks a process that could not be started as ended; for a container's first one, whoever watches it tells
/// containerd.
pub(crate) fn start_failed(process: &Process) {
    process.stopped(Exit::now(START_FAILED));
    if !process.is_init() {
        // It never started, so there is no exit to tell.
        process.drop_streams();
        process.reported();
    }
}

/// Waits for a process's end, then for its output, and tells containerd; then Wait is answered.
pub(crate) async fn watch_process(machine: Arc<Machine>, process: Arc<Process>, events: Events) {
    let exit = tokio::select! {
        biased;
        status = wait_in_guest(&machine, &process) => Exit::now(status),
        () = machine.exited() => Exit::now(KILLED),
        exit = process.marked_stopped() => exit,
    };
    if process.is_init() && machine.was_out_of_memory() {
        events.out_of_memory(process.container_id());
    }
    process.settled().await;
    process.finish_streams().await;
    process.stopped(exit);
    // What counts, and is told, is the first end that was noticed.
    let exit = process.state().exit().unwrap_or(exit);
    events.exited(&process, exit).settled().await;
    process.reported();
}

async fn wait_in_guest(machine: &Machine, process: &Process) -> u32 {
    let waiting = machine
        .agent()
        .wait(process.container_id(), process.exec_id());
    match machine.ask(waiting).await {
        Ok(status) => status,
        Err(ShimError::VmEnded(_)) => KILLED,
        // The agent lives and doesn't know the process, as after a start that failed.
        Err(error @ ShimError::Agent(AgentError::Refused { .. })) => {
            log::error("the guest's agent refuses to wait for a process", &error);
            START_FAILED
        }
        Err(error) => {
            log::error("waiting for a process failed, ending its VM", &error);
            machine.kill().await;
            KILLED
        }
    }
}

//! `walnut-init`: the order of steps from a job to a running program.
//!
//! It is the agent's own program, executed again: one thread, so it may fork. Its standard input is the
//! socket of `wire`. The first stage joins namespaces and forks; the second is the container's process, a
//! child of the agent (`CLONE_PARENT`), in its cgroup from birth. Must not hold any step itself.

use super::{
    OsError, SetupError, identity,
    program::{self, Program},
    rootfs,
    seccomp::Filter,
    spec::{NamespaceKind, Process, Spec},
    terminal,
    wire::{self, Blame, Failure, GO, Job, JobFds, Report},
};
use crate::{
    apparmor,
    syscall::{self, Side, SingleThread},
};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
};
use std::{
    error::Error,
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
};

/// Exit status of a process that never became its program.
const FAILED: u8 = 127;

/// What an exec joins in its first stage. Not the cgroup namespace: it hides the cgroup that this process
/// still is in, and so forbids to leave it.
const JOINED_BEFORE_FORK: CloneFlags = CloneFlags::CLONE_NEWPID
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWNS);

/// Runs the job that waits on standard input.
pub(crate) fn run() -> ExitCode {
    // Standard input becomes the program's; the socket must not.
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3);
    let Ok(socket) = socket else {
        return ExitCode::from(FAILED);
    };
    let result = wire::receive_job(&socket)
        .map_err(SetupError::step("cannot receive a job"))
        .and_then(|(job, filter, fds)| first_stage(&socket, &job, filter.as_ref(), fds));
    let Err(error) = result else {
        return ExitCode::SUCCESS;
    };
    // If the agent is gone, nobody is left to be told.
    let _ = wire::send_report(&socket, &Report::Failed(describe(&error)), None);
    ExitCode::from(FAILED)
}

/// An error and its causes in one line, as `unable to start container process: …`.
fn describe(error: &SetupError) -> Failure {
    let blame = match error {
        SetupError::System { .. } => Blame::Guest,
        SetupError::Request(_) | SetupError::Refused { .. } => Blame::Request,
    };
    let mut message = format!("unable to start container process: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        message.push_str(&format!(": {error}"));
        cause = error.source();
    }
    wire::failure(blame, &message)
}

fn first_stage(
    socket: &OwnedFd,
    job: &Job,
    filter: Option<&Filter>,
    fds: JobFds,
) -> Result<(), SetupError> {
    // Processes of the container must not look into this one while it still is the agent's program.
    let alone = SingleThread::check().map_err(SetupError::step("cannot fork"))?;
    nix::sys::prctl::set_dumpable(false).map_err(SetupError::step("cannot become undumpable"))?;
    identity::set_usual_limits()?;
    identity::set_oom_score(job.process().oom_score_adj)?;
    let procfs = open_procfs(job.process())?;
    let flags = match job {
        Job::Create(spec) => new_namespaces(spec)?,
        Job::Exec(_) => {
            join(&fds.container, JOINED_BEFORE_FORK)?;
            CloneFlags::empty()
        }
    };
    let flags = u64::from(flags.bits().unsigned_abs());
    let side = syscall::fork_into(alone, flags, Some(fds.cgroup.as_fd())).map_err(
        SetupError::step("cannot start a process in the container's cgroup"),
    )?;
    match side {
        Side::Parent(pid) => wire::send_report(socket, &Report::Process(pid), None)
            .map_err(SetupError::step("cannot report the process")),
        Side::Child => second_stage(socket, job, filter, procfs, fds),
    }
}

/// The agent's `/proc`, if a profile of AppArmor is to be told to it: the container's may be anything.
fn open_procfs(process: &Process) -> Result<Option<OwnedFd>, SetupError> {
    if !apparmor::confines(&process.apparmor_profile) {
        return Ok(None);
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, "/proc", flags, Mode::empty())
        .map(Some)
        .map_err(SetupError::step("cannot open /proc"))
}

/// Joins the namespaces that have a path, and answers the ones to make.
fn new_namespaces(spec: &Spec) -> Result<CloneFlags, SetupError> {
    let mut flags = CloneFlags::empty();
    for namespace in &spec.linux.namespaces {
        let flag = match namespace.kind {
            NamespaceKind::Pid => CloneFlags::CLONE_NEWPID,
            NamespaceKind::Ipc => CloneFlags::CLONE_NEWIPC,
            NamespaceKind::Uts => CloneFlags::CLONE_NEWUTS,
            NamespaceKind::Mount => CloneFlags::CLONE_NEWNS,
            // Made later: its root is the cgroup of the process that makes it.
            NamespaceKind::Cgroup => continue,
        };
        if namespace.path.as_os_str().is_empty() {
            flags |= flag;
            continue;
        }
        let attempted = format!("cannot join namespace {}", namespace.path.display());
        std::fs::File::open(&namespace.path)
            .map_err(OsError::from)
            .and_then(|file| setns(file, flag).map_err(OsError::from))
            .map_err(SetupError::named(attempted))?;
    }
    Ok(flags)
}

/// Joins namespaces of a container, by its first process.
fn join(container: &Option<OwnedFd>, flags: CloneFlags) -> Result<(), SetupError> {
    let Some(container) = container else {
        return Err(SetupError::Request("an exec without a container".into()));
    };
    setns(container, flags).map_err(SetupError::step("cannot join the container's namespaces"))
}

/// The container's process: everything up to its program. Never returns to the first stage's caller
/// but to exit.
fn second_stage(
    socket: &OwnedFd,
    job: &Job,
    filter: Option<&Filter>,
    procfs: Option<OwnedFd>,
    fds: JobFds,
) -> Result<(), SetupError> {
    rustix::process::setsid().map_err(SetupError::step("cannot start a session"))?;
    if let Some(procfs) = procfs {
        identity::confine_from_exec(procfs.as_fd(), &job.process().apparmor_profile)?;
    }
    match (job, &fds.container) {
        (Job::Create(spec), _) => enter_container(spec, &fds)?,
        (Job::Exec(_), container) => join(container, CloneFlags::CLONE_NEWCGROUP)?,
    }
    let process = job.process();
    let terminal = connect_stdio(job, process, fds)?;
    let program = become_user(process, filter.is_some())?;
    wire::send_report(socket, &Report::Ready, terminal.as_ref().map(AsFd::as_fd))
        .map_err(SetupError::step("cannot report that all is ready"))?;
    drop(terminal);
    wait_for_go(socket);
    if let Some(filter) = filter {
        identity::install_filter(filter, process)?;
    }
    Err(program.execute())
}

fn enter_container(spec: &Spec, fds: &JobFds) -> Result<(), SetupError> {
    let has = |kind| {
        spec.linux
            .namespaces
            .iter()
            .any(|namespace| namespace.kind == kind)
    };
    if has(NamespaceKind::Cgroup) {
        unshare(CloneFlags::CLONE_NEWCGROUP)
            .map_err(SetupError::step("cannot make a cgroup namespace"))?;
    }
    if !spec.hostname.is_empty() {
        rustix::system::sethostname(spec.hostname.as_bytes()).map_err(SetupError::named(
            format!("cannot set hostname {:?}", spec.hostname),
        ))?;
    }
    if !spec.domainname.is_empty() {
        rustix::system::setdomainname(spec.domainname.as_bytes()).map_err(SetupError::named(
            format!("cannot set domainname {:?}", spec.domainname),
        ))?;
    }
    rootfs::enter(spec, fds.cgroup.as_fd())
}

/// Puts the standard streams in place; answers the master side of a terminal.
fn connect_stdio(job: &Job, process: &Process, fds: JobFds) -> Result<Option<OwnedFd>, SetupError> {
    let Some([stdin, stdout, stderr]) = fds.stdio else {
        let console = matches!(job, Job::Create(_));
        return terminal::open_terminal(process.console_size, console).map(Some);
    };
    let attempted = || SetupError::step("cannot connect a standard stream");
    rustix::stdio::dup2_stdin(&stdin).map_err(attempted())?;
    rustix::stdio::dup2_stdout(&stdout).map_err(attempted())?;
    rustix::stdio::dup2_stderr(&stderr).map_err(attempted())?;
    Ok(None)
}

/// Becomes who the process is to be, where it is to be, and finds its program there.
fn become_user(process: &Process, filtered: bool) -> Result<Program, SetupError> {
    let go = || rustix::process::chdir(&process.cwd);
    // The directory may be open to the user alone, or to root alone.
    let before = go();
    identity::set_limits(&process.rlimits)?;
    identity::assume(process, filtered)?;
    before
        .or_else(|_: Errno| go())
        .map_err(SetupError::named(format!(
            "chdir to cwd ({:?}) set in config.json failed",
            process.cwd
        )))?;
    if process.no_new_privileges {
        rustix::thread::set_no_new_privs(true)
            .map_err(SetupError::step("cannot set process.noNewPrivileges"))?;
    }
    syscall::restore_sigpipe().map_err(SetupError::step("cannot restore SIGPIPE"))?;
    syscall::close_on_exec_above_stdio().map_err(SetupError::step(
        "cannot mark file descriptors to be closed",
    ))?;
    program::find(process)
}

/// Waits until the container is started. Without the agent it never will be.
fn wait_for_go(socket: &OwnedFd) {
    match wire::receive(socket) {
        Ok((packet, _)) if packet == GO => {}
        _ => std::process::exit(FAILED.into()),
    }
}

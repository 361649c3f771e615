//! `walnut-init`: the order of steps from a job to a running program.
//!
//! It is the agent's own program, executed again: one thread, so it may fork. Its standard input is the
//! socket of `wire`. The first stage opens what needs the guest's privileges, joins namespaces and forks; the
//! second is the container's process, a child of the agent (`CLONE_PARENT`), in its cgroup from birth. It
//! waits until the first has done to it what only the guest's root may do. Must not hold any step itself.

use super::{
    OsError, SetupError, hooks, identity,
    program::{self, Program},
    rootfs, schedule,
    seccomp::Filter,
    sources::{self, Sources},
    spec::{Domain, Inherited, NamespaceKind, Process, Spec},
    terminal, user_namespace,
    validate::host_id,
    wire::{self, Blame, Failure, GO, Identity, Job, JobFds, Report},
};
use crate::{
    apparmor,
    insight::SETUP_NAME,
    syscall::{self, Side, SingleThread},
};
use nix::sched::{CloneFlags, setns, unshare};
use rustix::{
    fs::{CWD, Mode, OFlags, openat},
    io::Errno,
    net::{AddressFamily, SocketFlags, SocketType, socketpair},
};
use std::{
    error::Error,
    os::fd::{AsFd, OwnedFd},
    process::ExitCode,
};

/// Exit status of a process that never became its program.
const FAILED: u8 = 127;

/// personality(2); libc does not know it.
const PER_LINUX32: i32 = 0x0008;

/// nix does not know it.
const CLONE_NEWTIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// What an exec joins in its first stage. Not the cgroup namespace: it hides the cgroup that this process
/// still is in, and so forbids to leave it. Nor the user namespace, which takes the guest's privileges.
const JOINED_BEFORE_FORK: CloneFlags = CloneFlags::CLONE_NEWPID
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWNS)
    .union(CLONE_NEWTIME);

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
    nix::sys::prctl::set_name(SETUP_NAME).map_err(SetupError::step("cannot set a name"))?;
    let process = job.process();
    identity::set_usual_limits()?;
    identity::set_oom_score(process.oom_score_adj)?;
    give_stdio(job, &fds)?;
    let procfs = open_procfs(process)?;
    let (flags, sources) = match job {
        Job::Create(spec, _) => {
            rootfs::write_network_sysctls(spec)?;
            let flags = new_namespaces(spec)?;
            let sources = sources::open(&alone, spec, fds.cgroup.as_fd())?;
            join_by_path(spec, |kind| kind == NamespaceKind::User)?;
            (flags, Some(sources))
        }
        Job::Exec(..) => {
            schedule::set_initial_affinity(process)?;
            join(&fds.container, JOINED_BEFORE_FORK)?;
            (CloneFlags::empty(), None)
        }
    };
    let flags = u64::from(flags.bits().unsigned_abs());
    let (privileged, waits) = pair()?;
    let side = syscall::fork_into(&alone, flags, fds.cgroup.as_fd()).map_err(SetupError::step(
        "cannot start a process in the container's cgroup",
    ))?;
    match side {
        Side::Parent(pid) => {
            drop(waits);
            wire::send_report(socket, &Report::Process(pid), None)
                .map_err(SetupError::step("cannot report the process"))?;
            act_on(pid, job)?;
            // If it is gone, it has said why.
            let _ = rustix::io::write(&privileged, GO);
            Ok(())
        }
        Side::Child => {
            drop(privileged);
            wait_for_go(&waits);
            drop(waits);
            second_stage(socket, job, filter, procfs, fds, sources)
        }
    }
}

/// What only the guest's root may do to the container's process.
fn act_on(pid: i32, job: &Job) -> Result<(), SetupError> {
    let process = job.process();
    if let Job::Create(spec, _) = job
        && has_new_users(spec)
    {
        let linux = &spec.linux;
        user_namespace::write_mappings(pid, &linux.uid_mappings, &linux.gid_mappings).map_err(
            SetupError::named("cannot set linux.uidMappings and linux.gidMappings"),
        )?;
    }
    identity::raise_limits(pid, &process.rlimits)?;
    schedule::apply(pid, process, matches!(job, Job::Exec(..)))
}

fn pair() -> Result<(OwnedFd, OwnedFd), SetupError> {
    let flags = SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(SetupError::step("cannot make a pair of sockets"))
}

fn has_new_users(spec: &Spec) -> bool {
    let namespace = spec.namespace(NamespaceKind::User);
    namespace.is_some_and(|namespace| namespace.path.as_os_str().is_empty())
}

/// Gives the pipes to the container's user, as the guest knows it.
fn give_stdio(job: &Job, fds: &JobFds) -> Result<(), SetupError> {
    let inherited = match job {
        Job::Create(spec, _) => Inherited::from(&**spec),
        Job::Exec(_, inherited) => inherited.clone(),
    };
    let uid = job.process().user.uid;
    let uid = if inherited.uid_mappings.is_empty() {
        uid
    } else {
        host_id(&inherited.uid_mappings, uid).ok_or_else(|| {
            SetupError::Request(format!(
                "process.user.uid {uid} is not in linux.uidMappings"
            ))
        })?
    };
    let streams = fds.stdio.iter().flatten();
    streams
        .map(AsFd::as_fd)
        .try_for_each(|stream| identity::give_stream(stream, uid))
}

fn flag(kind: NamespaceKind) -> CloneFlags {
    match kind {
        NamespaceKind::Pid => CloneFlags::CLONE_NEWPID,
        NamespaceKind::Ipc => CloneFlags::CLONE_NEWIPC,
        NamespaceKind::Uts => CloneFlags::CLONE_NEWUTS,
        NamespaceKind::Mount => CloneFlags::CLONE_NEWNS,
        NamespaceKind::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        NamespaceKind::User => CloneFlags::CLONE_NEWUSER,
        NamespaceKind::Time => CLONE_NEWTIME,
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

/// Joins the namespaces that have a path, but for users, and answers the ones to make.
fn new_namespaces(spec: &Spec) -> Result<CloneFlags, SetupError> {
    join_by_path(spec, |kind| kind != NamespaceKind::User)?;
    let mut flags = CloneFlags::empty();
    for namespace in &spec.linux.namespaces {
        match namespace.kind {
            _ if !namespace.path.as_os_str().is_empty() => {}
            // Made later: its root is the cgroup of the process that makes it.
            NamespaceKind::Cgroup => {}
            // Made at once: its clocks can only be set while nobody is in it.
            NamespaceKind::Time => move_clocks(spec)?,
            kind => flags |= flag(kind),
        }
    }
    Ok(flags)
}

fn join_by_path(spec: &Spec, is_meant: fn(NamespaceKind) -> bool) -> Result<(), SetupError> {
    let meant = spec
        .linux
        .namespaces
        .iter()
        .filter(|namespace| is_meant(namespace.kind) && !namespace.path.as_os_str().is_empty());
    for namespace in meant {
        let attempted = format!("cannot join namespace {}", namespace.path.display());
        std::fs::File::open(&namespace.path)
            .map_err(OsError::from)
            .and_then(|file| setns(file, flag(namespace.kind)).map_err(OsError::from))
            .map_err(SetupError::named(attempted))?;
    }
    Ok(())
}

/// time_namespaces(7): this process makes one, and its children will live in it.
fn move_clocks(spec: &Spec) -> Result<(), SetupError> {
    unshare(CLONE_NEWTIME).map_err(SetupError::step("cannot make a time namespace"))?;
    for (clock, offset) in &spec.linux.time_offsets {
        let line = format!("{clock} {} {}\n", offset.secs, offset.nanosecs);
        std::fs::write("/proc/self/timens_offsets", &line).map_err(SetupError::named(format!(
            "cannot set linux.timeOffsets to {}",
            line.trim()
        )))?;
    }
    Ok(())
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
    sources: Option<Sources>,
) -> Result<(), SetupError> {
    rustix::process::setsid().map_err(SetupError::step("cannot start a session"))?;
    if let Some(procfs) = procfs {
        identity::confine_from_exec(procfs.as_fd(), &job.process().apparmor_profile)?;
    }
    let inherited = match (job, sources) {
        (Job::Create(spec, identity), Some(sources)) => {
            enter_container(spec, identity, sources)?;
            Inherited::from(&**spec)
        }
        (Job::Exec(_, inherited), _) => {
            if inherited.user_namespace {
                join(&fds.container, CloneFlags::CLONE_NEWUSER)?;
                user_namespace::become_root()?;
            }
            join(&fds.container, CloneFlags::CLONE_NEWCGROUP)?;
            inherited.clone()
        }
        (Job::Create(..), None) => {
            return Err(SetupError::Request("a container without sources".into()));
        }
    };
    let process = job.process();
    let terminal = connect_stdio(job, process, fds)?;
    set_personality(&inherited)?;
    let program = become_user(process, filter.is_some())?;
    wire::send_report(socket, &Report::Ready, terminal.as_ref().map(AsFd::as_fd))
        .map_err(SetupError::step("cannot report that all is ready"))?;
    drop(terminal);
    wait_for_go(socket);
    if let Some(filter) = filter {
        identity::install_filter(filter, process)?;
    }
    // They are the container's programs, and held to its filter as runc holds them.
    if let Job::Create(spec, identity) = job {
        let hooks = &spec.hooks.start_container;
        hooks::run("startContainer", hooks, spec, identity, "created")?;
    }
    Err(program.execute())
}

fn enter_container(spec: &Spec, identity: &Identity, sources: Sources) -> Result<(), SetupError> {
    if spec.has(NamespaceKind::User) {
        user_namespace::become_root()?;
    }
    if spec.has(NamespaceKind::Cgroup) {
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
    rootfs::enter(spec, identity, sources)
}

fn set_personality(inherited: &Inherited) -> Result<(), SetupError> {
    let Some(personality) = &inherited.personality else {
        return Ok(());
    };
    let domain = match personality.domain {
        Domain::Linux => 0,
        Domain::Linux32 => PER_LINUX32,
    };
    nix::sys::personality::set(nix::sys::personality::Persona::from_bits_retain(domain))
        .map(drop)
        .map_err(SetupError::named("cannot set linux.personality"))
}

/// Puts the standard streams in place; answers the master side of a terminal.
fn connect_stdio(job: &Job, process: &Process, fds: JobFds) -> Result<Option<OwnedFd>, SetupError> {
    let Some([stdin, stdout, stderr]) = fds.stdio else {
        let console = matches!(job, Job::Create(..));
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

//! A Pod: the state machine that owns its machine and its containers.
//!
//! ```text
//!            first Create              ready
//!    Idle ----------------> Booting -----------> Running
//!     ^ ^                      | failed             | last container deleted, or a first Create failed
//!     | +----------------------+                    v
//!     +------------------------------------------ Stopping
//! ```
//!
//! In a Pod of the Sandbox API (`sandbox_api`) that API, and not the first Create and the last Delete, boots and
//! stops the machine. A Pod whose own container, the CRI's sandbox, ends has its VM ended.
//! A machine whose VM has ended stays `Running` until its last container is deleted: its containers have
//! exited with 137, and State, Kill and Delete answer. No lock is held while the guest or containerd is
//! waited for.

use crate::{
    args::is_name,
    cgroup,
    container::{Container, Exit, Process},
    error::ShimError,
    events::Events,
    exits::watch_process,
    hooks::HostHooks,
    io::{Stdio, Streams},
    log,
    machine::{Machine, MachineError},
    out_of_memory,
    pod::{self, Pod},
    pod_files,
    runtime_options::{ConfigSource, RuntimeOptions},
    sandbox_api::Stage,
    slots::{SlotError, Slots},
    spec::{self, HostPart, Translation},
    state_dir::StateDir,
    storage::{Needs, check_volumes},
};
use containerd_shim_protos::api;
use oci_spec::runtime::Spec;
use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::sync::watch;

/// Where the machine is in its life.
#[derive(Clone)]
enum Phase {
    Idle,
    Booting,
    Running(Arc<Machine>),
    Stopping,
}

/// A Pod.
pub(crate) struct Sandbox {
    pub(crate) id: String,
    /// Where it is in a life of its own, if it has one.
    pub(crate) stage: watch::Sender<Stage>,
    pub(crate) state: StateDir,
    fallback_cgroup: PathBuf,
    phase: watch::Sender<Phase>,
    pub(crate) containers: Slots<Container>,
    pub(crate) events: Events,
    asked_to_leave: watch::Sender<bool>,
    finished: watch::Sender<bool>,
}

impl Sandbox {
    /// A Pod without a machine.
    pub(crate) fn new(namespace: &str, id: &str, state: StateDir, events: Events) -> Self {
        Self {
            id: id.to_owned(),
            stage: watch::Sender::new(Stage::Absent),
            state,
            fallback_cgroup: Path::new("/walnut").join(namespace).join(id),
            phase: watch::Sender::new(Phase::Idle),
            containers: Slots::default(),
            events,
            asked_to_leave: watch::Sender::new(false),
            finished: watch::Sender::new(false),
        }
    }

    /// Create: boots the machine for the first container, then makes the container.
    pub(crate) async fn create(
        self: Arc<Self>,
        request: api::CreateTaskRequest,
    ) -> Result<u32, ShimError> {
        let id = request.id.clone();
        if !is_name(&id) {
            return Err(ShimError::Name {
                field: "id",
                value: id,
            });
        }
        if !request.checkpoint.is_empty() {
            return Err(ShimError::Unsupported("restoring a checkpoint"));
        }
        // In the guest a Pod of the Sandbox API has a container of its own, by its id.
        let is_pods = id == self.id && !self.stage.borrow().is_absent();
        if is_pods || !self.containers.reserve(&id) {
            return Err(ShimError::Exists {
                what: "container",
                id,
            });
        }
        match self.create_reserved(&request).await {
            Ok((machine, container, is_sandbox)) => {
                let container = Arc::new(container);
                let init = Arc::clone(&container.init);
                let hooks = Arc::clone(&container.hooks);
                if !self.containers.fill_if_wanted(&id, container) {
                    discard(&machine, &id).await;
                    hooks.stopped().await;
                    self.forget(&id).await;
                    return Err(state_error("create", &id, "given up by who asked for it"));
                }
                let pid = init.pid();
                self.events.created(&request, pid);
                let memory = out_of_memory::watch(Arc::clone(&machine), id, self.events.clone());
                tokio::spawn(memory);
                let told = watch_process(Arc::clone(&machine), init, self.events.clone());
                tokio::spawn(async move {
                    told.await;
                    if is_sandbox {
                        machine.end().await;
                    }
                });
                Ok(pid)
            }
            Err(error) => {
                self.forget(&id).await;
                Err(error)
            }
        }
    }

    async fn create_reserved(
        &self,
        request: &api::CreateTaskRequest,
    ) -> Result<(Arc<Machine>, Container, bool), ShimError> {
        let bundle = PathBuf::from(&request.bundle);
        let mut host_spec = read_spec(&bundle.join("config.json"))?;
        match &*self.stage.borrow() {
            Stage::Absent => {}
            Stage::Ready { .. } => pod_files::mount(&mut host_spec, &self.state.etc()),
            stage => return Err(state_error("use sandbox", &self.id, stage.name())),
        }
        let hooks = HostHooks::take(&mut host_spec, &request.id, &bundle);
        let mut part = spec::host_part(&host_spec)?;
        part.config = self.take_options(request)?;
        let root = spec::host_root(&host_spec, &bundle);
        let is_sandbox = pod::is_sandbox(&host_spec);
        let pod = Pod {
            id: &self.id,
            pid: self.running().map(|machine| machine.pid()),
        };
        let Translation {
            mut guest,
            volumes,
            devices,
        } = spec::translate(host_spec, &request.id, pod)?;
        check_volumes(&volumes)?;
        let machine = self.machine(&part).await?;
        let needs = Needs {
            container_id: request.id.clone(),
            rootfs: request.rootfs.clone(),
            read_only_root: spec::is_root_read_only(&guest),
            root,
            volumes,
            devices: devices.clone(),
        };
        if let Some(limits) = part.wanted.container {
            machine.admit(&request.id, limits).await?;
        }
        let numbers = machine.expose(needs).await?;
        spec::renumber(&mut guest, &devices, &numbers);
        let created = async {
            hooks.creating(machine.pid()).await?;
            create_in_guest(&machine, request, &guest, self.stdio(request)).await
        };
        match created.await {
            Ok(init) => {
                let container = Container {
                    bundle,
                    hooks,
                    init: Arc::new(init),
                    execs: Slots::default(),
                };
                Ok((machine, container, is_sandbox))
            }
            Err(error) => {
                if let Err(undo) = machine.withdraw(&request.id).await {
                    log::error("undoing a failed Create", &undo);
                }
                hooks.stopped().await;
                Err(error)
            }
        }
    }

    /// The configuration that the runtime's options name; before there is a machine, enters the cgroup that they name.
    fn take_options(&self, request: &api::CreateTaskRequest) -> Result<ConfigSource, ShimError> {
        let options = RuntimeOptions::read(request.options.as_ref())?;
        if let (Some(path), None) = (&options.shim_cgroup, self.running()) {
            cgroup::enter(path).map_err(MachineError::from)?;
        }
        Ok(options.config)
    }

    fn stdio(&self, request: &api::CreateTaskRequest) -> Stdio {
        Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
            owner: (self.events.namespace(), request.id.clone()),
        }
    }

    /// The running machine; boots it when there is none, or waits for the call that does.
    pub(crate) async fn machine(&self, part: &HostPart) -> Result<Arc<Machine>, ShimError> {
        let mut phases = self.phase.subscribe();
        loop {
            let phase = phases.borrow_and_update().clone();
            match phase {
                Phase::Running(machine) if machine.has_exited() => {
                    return Err(ShimError::VmEnded(machine.describe_end()));
                }
                Phase::Running(machine) => {
                    machine.refresh_network().await?;
                    return Ok(machine);
                }
                Phase::Idle if !self.may_boot() => {
                    let stage = self.stage.borrow();
                    return Err(state_error("use sandbox", &self.id, stage.name()));
                }
                Phase::Idle if self.enter(Phase::Booting, |now| matches!(now, Phase::Idle)) => {
                    return self.boot(part).await;
                }
                // Boot and stop have deadlines of their own, so this ends.
                Phase::Idle | Phase::Booting | Phase::Stopping => {
                    if phases.changed().await.is_err() {
                        return Err(ShimError::VmEnded("the sandbox is gone".to_owned()));
                    }
                }
            }
        }
    }

    fn may_boot(&self) -> bool {
        matches!(*self.stage.borrow(), Stage::Absent | Stage::Starting)
    }

    async fn boot(&self, part: &HostPart) -> Result<Arc<Machine>, ShimError> {
        match Machine::boot(&self.state, &self.fallback_cgroup, part).await {
            Ok(machine) => {
                let machine = Arc::new(machine);
                self.phase
                    .send_replace(Phase::Running(Arc::clone(&machine)));
                tokio::spawn(log_unexpected_end(machine.exited(), self.phase.subscribe()));
                tokio::spawn(Arc::clone(&machine).follow_network());
                Ok(machine)
            }
            Err(error) => {
                self.phase.send_replace(Phase::Idle);
                Err(error.into())
            }
        }
    }

    fn enter(&self, next: Phase, allowed: impl FnOnce(&Phase) -> bool) -> bool {
        self.phase.send_if_modified(|phase| {
            let may = allowed(phase);
            if may {
                *phase = next;
            }
            may
        })
    }

    /// The machine, if there is one.
    pub(crate) fn running(&self) -> Option<Arc<Machine>> {
        match &*self.phase.borrow() {
            Phase::Running(machine) => Some(Arc::clone(machine)),
            Phase::Idle | Phase::Booting | Phase::Stopping => None,
        }
    }

    /// Where the machine is in its life, in a word.
    pub(crate) fn phase_name(&self) -> &'static str {
        match &*self.phase.borrow() {
            Phase::Idle => "idle",
            Phase::Booting => "booting",
            Phase::Running(machine) if machine.has_exited() => "ended",
            Phase::Running(_) => "running",
            Phase::Stopping => "stopping",
        }
    }

    /// Delete of a container: the guest's part, the host's part, the event, and, for the last one, the machine.
    pub(crate) async fn delete_container(
        self: Arc<Self>,
        id: String,
    ) -> Result<(u32, Exit), ShimError> {
        let container = self
            .containers
            .begin_removal(&id)
            .map_err(|error| match error {
                SlotError::Missing => ShimError::NoContainer(id.clone()),
                SlotError::Making => {
                    // containerd's client has gone, and this is its only attempt to clean up.
                    self.containers.abandon(&id);
                    state_error("delete", &id, "being created")
                }
                SlotError::Removing => state_error("delete", &id, "being deleted"),
            })?;
        match self.release_container(&id, &container).await {
            Ok(exit) => {
                container.hooks.stopped().await;
                self.events.deleted(&container.init, exit);
                self.forget(&id).await;
                Ok((container.init.pid(), exit))
            }
            Err(error) => {
                self.containers.keep(&id, container);
                Err(error)
            }
        }
    }

    async fn release_container(&self, id: &str, container: &Container) -> Result<Exit, ShimError> {
        let state = container.init.state();
        let exit = state
            .exit()
            .ok_or_else(|| state_error("delete", id, state.name()))?;
        let Some(machine) = self.running() else {
            return Ok(exit);
        };
        if !machine.has_exited() {
            delete_in_guest(&machine, id, "").await?;
        }
        // Whoever reads may have come back, and takes what is left.
        container.init.finish_streams().await;
        container.init.drop_streams();
        for exec in container.execs.all() {
            exec.drop_streams();
        }
        machine.withdraw(id).await?;
        Ok(exit)
    }

    /// Forgets a container; without containers there is no machine, unless the Pod has a life of its own.
    async fn forget(&self, id: &str) {
        let stays = !self.stage.borrow().is_absent() || !self.containers.is_only(id);
        if let Some(machine) = self.running().filter(|_| stays) {
            machine.dismiss(id).await;
        }
        if !self.containers.remove(id) {
            return;
        }
        if self.stage.borrow().is_absent() {
            self.close_machine().await;
        }
        self.leave_if_asked();
    }

    /// Stops the machine, if there is one.
    pub(crate) async fn close_machine(&self) {
        let Some(machine) = self.running() else {
            return;
        };
        // Nothing waits between the removal and this: a Create that comes next finds `Stopping` and waits.
        if self.enter(Phase::Stopping, |phase| matches!(phase, Phase::Running(_))) {
            machine.stop().await;
            self.phase.send_replace(Phase::Idle);
        }
    }

    /// Shutdown: ends the server, unless there are containers. containerd does not ask again, so that
    /// containers which are being made for nobody only put it off. A Pod of the Sandbox API has its own Shutdown.
    pub(crate) fn shutdown(&self) {
        if self.stage.borrow().is_absent() && self.containers.is_abandoned() {
            self.asked_to_leave.send_replace(true);
            self.leave_if_asked();
        }
    }

    fn leave_if_asked(&self) {
        if *self.asked_to_leave.borrow() && self.containers.is_empty() {
            self.finish();
        }
    }

    /// Ends the server.
    pub(crate) fn finish(&self) {
        self.finished.send_replace(true);
    }

    /// Waits for a Shutdown that was obeyed.
    pub(crate) async fn finished(&self) {
        let mut finished = self.finished.subscribe();
        // The sender is `self`.
        let _ = finished.wait_for(|finished| *finished).await;
    }

    /// Ends everything because the server was told to end; nothing is left behind. containerd notices the
    /// server's end and tells the exits itself, so they are not told here: an exit is told once.
    pub(crate) async fn terminate(&self) {
        self.events.close();
        if let Some(machine) = self.running() {
            machine.kill().await;
            machine.stop().await;
        }
    }
}

/// Says in the log why a VM ended that nobody had asked to.
async fn log_unexpected_end(ended: impl Future<Output = ()>, phase: watch::Receiver<Phase>) {
    ended.await;
    if let Phase::Running(machine) = &*phase.borrow() {
        log::line(&format!("the VM has ended: {}", machine.describe_end()));
    }
}

async fn create_in_guest(
    machine: &Machine,
    request: &api::CreateTaskRequest,
    guest: &Spec,
    stdio: Stdio,
) -> Result<Process, ShimError> {
    let id = request.id.as_str();
    let spec = serde_json::to_vec(guest).map_err(|source| ShimError::Json {
        what: "the guest's configuration",
        path: PathBuf::from(&request.bundle),
        source,
    })?;
    let (streams, names) = machine.ask(Streams::open(machine.agent(), &stdio)).await?;
    machine
        .ask(machine.agent().create(id, spec, stdio.terminal, &names))
        .await?;
    Ok(Process::new(id, "", machine.pid(), stdio, streams))
}

/// Deletes a process or a container in the guest. What the guest doesn't know is gone, and so is a guest
/// whose VM ends meanwhile.
pub(crate) async fn delete_in_guest(
    machine: &Machine,
    id: &str,
    exec_id: &str,
) -> Result<(), ShimError> {
    match machine.ask(machine.agent().delete(id, exec_id)).await {
        Err(error) if error.is_not_found() || machine.has_exited() => Ok(()),
        other => other,
    }
}

/// Removes a container that was made for nobody, as far as the guest goes along.
async fn discard(machine: &Machine, id: &str) {
    let removed = async {
        machine.ask(machine.agent().kill_now(id)).await?;
        machine.ask(machine.agent().wait(id, "")).await?;
        delete_in_guest(machine, id, "").await?;
        Ok::<(), ShimError>(machine.withdraw(id).await?)
    };
    if let Err(error) = removed.await {
        log::error("removing a container that nobody wants", &error);
    }
}

pub(crate) fn state_error(action: &'static str, id: &str, state: &'static str) -> ShimError {
    ShimError::State {
        action,
        id: id.to_owned(),
        state,
    }
}

fn read_spec(path: &Path) -> Result<Spec, ShimError> {
    let failed = |source| ShimError::Bundle {
        path: path.to_owned(),
        source,
    };
    let bytes = std::fs::read(path).map_err(failed)?;
    serde_json::from_slice(&bytes).map_err(|source| ShimError::Json {
        what: "the container's configuration",
        path: path.to_owned(),
        source,
    })
}

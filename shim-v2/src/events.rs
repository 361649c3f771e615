//! Events for containerd, in the order in which they were published.
//!
//! containerd's document (core/runtime/v2/README.md) asks that a task's events keep their order and that its
//! exit is published. Publishing never waits: one worker forwards the events over
//! `containerd.services.events.ttrpc.v1.Events`. While containerd is gone they wait, up to a bound, and are
//! delivered when it is back; one that it refuses is given up after some attempts. One whose answer was lost
//! comes twice.

use crate::container::{Exit, Process};
use containerd_shim_protos::{
    api::{CreateTaskRequest, ForwardRequest},
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM,
        TaskPaused, TaskResumed, TaskStart,
    },
    shim::event::Envelope,
    shim_async::EventsClient,
    topics,
};
use protobuf::{Message, MessageField, well_known_types::any::Any};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::timeout,
};
use ttrpc::r#async::{Client, transport::Socket};

const ATTEMPTS: u32 = 5;
const ATTEMPT_DEADLINE: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Who waits for an event's delivery goes on after this: containerd is gone, and nobody asks.
const SETTLE_DEADLINE: Duration = Duration::from_secs(5);
/// Events that wait at the most; a Pod makes four for each container and four for each exec.
const MAX_WAITING: usize = 8192;
/// containerd reads the namespace of a ttrpc call from this key.
const NAMESPACE_KEY: &str = "containerd-namespace-ttrpc";

/// The queue of events.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    queue: mpsc::UnboundedSender<Queued>,
    waiting: watch::Sender<usize>,
    namespace: Arc<str>,
    closed: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Queued {
    topic: &'static str,
    event: Any,
    at: SystemTime,
    settled: oneshot::Sender<()>,
}

/// Tells when an event has been delivered or given up.
#[derive(Debug)]
pub(crate) struct Delivery(oneshot::Receiver<()>);

/// Where events go.
#[derive(Debug)]
struct Forwarder {
    address: String,
    namespace: String,
    waiting: watch::Sender<usize>,
}

#[derive(Debug, thiserror::Error)]
enum EventsError {
    #[error("connecting to containerd's event service {address:?} failed")]
    Connect {
        address: String,
        source: std::io::Error,
    },
    #[error("containerd refused the event")]
    Forward(#[source] ttrpc::Error),
    #[error("containerd did not take the event in time")]
    Deadline,
}

impl EventsError {
    /// Whether containerd is there and doesn't want the event, which another attempt hardly changes.
    fn is_refusal(&self) -> bool {
        let Self::Forward(ttrpc::Error::RpcStatus(status)) = self else {
            return false;
        };
        use ttrpc::Code::{CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE};
        ![CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE].contains(&status.code())
    }
}

impl Events {
    /// Starts the worker. An empty address, as when the shim is run by hand, drops events.
    pub(crate) fn start(address: String, namespace: String) -> Self {
        let (queue, receiver) = mpsc::unbounded_channel();
        let waiting = watch::Sender::new(0);
        let forwarder = Forwarder {
            address,
            namespace: namespace.clone(),
            waiting: waiting.clone(),
        };
        tokio::spawn(forwarder.run(receiver));
        Self {
            queue,
            waiting,
            namespace: namespace.into(),
            closed: Arc::default(),
        }
    }

    /// containerd's namespace of the Pod.
    pub(crate) fn namespace(&self) -> Arc<str> {
        Arc::clone(&self.namespace)
    }

    /// Waits until every event is delivered, as the server is about to end.
    pub(crate) async fn flush(&self) {
        let mut waiting = self.waiting.subscribe();
        let none = waiting.wait_for(|waiting| *waiting == 0);
        if timeout(SETTLE_DEADLINE, none).await.is_err() {
            crate::log::line("containerd did not take the last events");
        }
    }

    /// Drops every event from now on: containerd is about to tell the rest itself.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// A container exists.
    pub(crate) fn created(&self, request: &CreateTaskRequest, pid: u32) {
        let event = TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            io: MessageField::some(TaskIO {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
                ..TaskIO::default()
            }),
            pid,
            ..TaskCreate::default()
        };
        self.publish(
            topics::TASK_CREATE_EVENT_TOPIC,
            "containerd.events.TaskCreate",
            &event,
        );
    }

    /// A process was added to a container.
    pub(crate) fn exec_added(&self, container_id: &str, exec_id: &str) {
        let event = TaskExecAdded {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..TaskExecAdded::default()
        };
        self.publish(
            topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            "containerd.events.TaskExecAdded",
            &event,
        );
    }

    /// A process runs.
    pub(crate) fn started(&self, process: &Process) {
        let container_id = process.container_id().to_owned();
        if process.is_init() {
            let event = TaskStart {
                container_id,
                pid: process.pid(),
                ..TaskStart::default()
            };
            self.publish(
                topics::TASK_START_EVENT_TOPIC,
                "containerd.events.TaskStart",
                &event,
            );
            return;
        }
        let event = TaskExecStarted {
            container_id,
            exec_id: process.exec_id().to_owned(),
            pid: process.pid(),
            ..TaskExecStarted::default()
        };
        self.publish(
            topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            "containerd.events.TaskExecStarted",
            &event,
        );
    }

    /// A container was frozen.
    pub(crate) fn paused(&self, container_id: &str) {
        let event = TaskPaused {
            container_id: container_id.to_owned(),
            ..TaskPaused::default()
        };
        self.publish(
            topics::TASK_PAUSED_EVENT_TOPIC,
            "containerd.events.TaskPaused",
            &event,
        );
    }

    /// A container was thawed.
    pub(crate) fn resumed(&self, container_id: &str) {
        let event = TaskResumed {
            container_id: container_id.to_owned(),
            ..TaskResumed::default()
        };
        self.publish(
            topics::TASK_RESUMED_EVENT_TOPIC,
            "containerd.events.TaskResumed",
            &event,
        );
    }

    /// A container's memory, or that of its whole Pod, was used up.
    pub(crate) fn out_of_memory(&self, container_id: &str) -> Delivery {
        let event = TaskOOM {
            container_id: container_id.to_owned(),
            ..TaskOOM::default()
        };
        self.publish(
            topics::TASK_OOM_EVENT_TOPIC,
            "containerd.events.TaskOOM",
            &event,
        )
    }

    /// A process has ended.
    pub(crate) fn exited(&self, process: &Process, exit: Exit) -> Delivery {
        let event = TaskExit {
            container_id: process.container_id().to_owned(),
            // The init process's id is that of its container.
            id: process.event_id().to_owned(),
            pid: process.pid(),
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..TaskExit::default()
        };
        self.publish(
            topics::TASK_EXIT_EVENT_TOPIC,
            "containerd.events.TaskExit",
            &event,
        )
    }

    /// A container is gone.
    pub(crate) fn deleted(&self, process: &Process, exit: Exit) {
        let event = TaskDelete {
            container_id: process.container_id().to_owned(),
            id: process.event_id().to_owned(),
            pid: process.pid(),
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..TaskDelete::default()
        };
        self.publish(
            topics::TASK_DELETE_EVENT_TOPIC,
            "containerd.events.TaskDelete",
            &event,
        );
    }

    /// Queues an event. `name` is the message's full name, which containerd uses as the type URL.
    fn publish(&self, topic: &'static str, name: &'static str, message: &impl Message) -> Delivery {
        let (settled, receiver) = oneshot::channel();
        let event = Any {
            type_url: name.to_owned(),
            // A message that was built here has no required field that could be missing.
            value: message.write_to_bytes().unwrap_or_default(),
            ..Any::default()
        };
        // Dropping `settled` settles the delivery.
        if self.closed.load(Ordering::Relaxed) {
            return Delivery(receiver);
        }
        if *self.waiting.borrow() >= MAX_WAITING {
            crate::log::line(&format!(
                "event {topic} is lost: {MAX_WAITING} wait already"
            ));
            return Delivery(receiver);
        }
        self.waiting.send_modify(|waiting| *waiting += 1);
        // The worker only ends with the runtime; then nobody waits for the delivery either.
        let _ = self.queue.send(Queued {
            topic,
            event,
            at: SystemTime::now(),
            settled,
        });
        Delivery(receiver)
    }
}

impl Delivery {
    /// Waits until the event is delivered or given up, or until waiting for it makes no sense any more.
    pub(crate) async fn settled(self) {
        // An error means that the worker has gone, so there is nothing to wait for.
        let _ = timeout(SETTLE_DEADLINE, self.0).await;
    }
}

impl Forwarder {
    async fn run(self, mut queue: mpsc::UnboundedReceiver<Queued>) {
        let mut client = None;
        while let Some(queued) = queue.recv().await {
            if !self.address.is_empty() {
                self.deliver(&mut client, &queued).await;
            }
            self.waiting.send_modify(|waiting| *waiting -= 1);
            // Nobody has to wait for it.
            let _ = queued.settled.send(());
        }
    }

    async fn deliver(&self, client: &mut Option<EventsClient>, queued: &Queued) {
        let request = self.request(queued);
        let (mut pause, mut refusals) = (FIRST_PAUSE, 0);
        loop {
            let forward = self.forward(client, &request);
            let result = timeout(ATTEMPT_DEADLINE, forward)
                .await
                .unwrap_or(Err(EventsError::Deadline));
            let Err(error) = result else {
                return;
            };
            *client = None;
            if pause == FIRST_PAUSE || error.is_refusal() {
                crate::log::error(&format!("publishing event {}", queued.topic), &error);
            }
            refusals += u32::from(error.is_refusal());
            // Who waits for the event to be settled must not wait for a pause that no attempt follows.
            if refusals == ATTEMPTS {
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn forward(
        &self,
        client: &mut Option<EventsClient>,
        request: &ForwardRequest,
    ) -> Result<(), EventsError> {
        let connected = match client.take() {
            Some(connected) => connected,
            None => self.connect().await?,
        };
        let mut context = ttrpc::context::with_duration(ATTEMPT_DEADLINE);
        context.add(NAMESPACE_KEY.to_owned(), self.namespace.clone());
        connected
            .forward(context, request)
            .await
            .map_err(EventsError::Forward)?;
        *client = Some(connected);
        Ok(())
    }

    async fn connect(&self) -> Result<EventsClient, EventsError> {
        let path = self
            .address
            .strip_prefix("unix://")
            .unwrap_or(&self.address);
        let stream = tokio::net::UnixStream::connect(path)
            .await
            .map_err(|source| EventsError::Connect {
                address: self.address.clone(),
                source,
            })?;
        Ok(EventsClient::new(Client::new(Socket::new(stream))))
    }

    fn request(&self, queued: &Queued) -> ForwardRequest {
        ForwardRequest {
            envelope: MessageField::some(Envelope {
                timestamp: MessageField::some(queued.at.into()),
                namespace: self.namespace.clone(),
                topic: queued.topic.to_owned(),
                event: MessageField::some(queued.event.clone()),
                ..Envelope::default()
            }),
            ..ForwardRequest::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::shim_async::{Events as EventsService, create_events};
    use std::sync::Mutex;

    struct Recorder(Mutex<Vec<(String, String)>>);

    #[async_trait::async_trait]
    impl EventsService for Recorder {
        async fn forward(
            &self,
            _: &ttrpc::r#async::TtrpcContext,
            request: ForwardRequest,
        ) -> ttrpc::Result<containerd_shim_protos::api::Empty> {
            let envelope = request.envelope.unwrap();
            self.0
                .lock()
                .unwrap()
                .push((envelope.topic, envelope.namespace));
            Ok(containerd_shim_protos::api::Empty::default())
        }
    }

    #[tokio::test]
    async fn events_wait_for_containerd_and_keep_their_order() {
        let directory = tempfile::tempdir().unwrap();
        let address = format!("unix://{}/events.sock", directory.path().display());
        let events = Events::start(address.clone(), "ns".into());
        let message = TaskStart::default();
        let first = events.publish("/1", "containerd.events.TaskStart", &message);
        // As long as containerd takes to start; more than some attempts.
        let gone = tokio::time::Instant::now();
        tokio::time::pause();
        first.settled().await;
        assert!(gone.elapsed() >= SETTLE_DEADLINE, "who waits goes on");
        tokio::time::resume();
        let recorder = Arc::new(Recorder(Mutex::new(Vec::new())));
        let mut server = ttrpc::r#async::Server::new()
            .bind(&address)
            .unwrap()
            .register_service(create_events(recorder.clone()));
        server.start().await.unwrap();
        let second = events.publish("/2", "containerd.events.TaskStart", &message);
        second.settled().await;
        events.flush().await;
        let seen = recorder.0.lock().unwrap().clone();
        assert_eq!(
            seen,
            [("/1".into(), "ns".into()), ("/2".into(), "ns".into())]
        );
    }
}

//! Containers that share namespaces with another one of their Pod, and those that don't.

use crate::fixture::{Agent, Outcome, agent, refusal, unique};
use serde_json::{Value, json};
use ttrpc::Code;
use walnut_agent_api::{PAUSE_PROGRAM, namespace_path};

/// A container whose only process is the agent's own `walnut-pause`.
async fn pod(agent: &Agent) -> String {
    let id = unique("pod");
    let mut spec = agent.spec(&id, "");
    let program = std::env::var("WALNUT_AGENT")
        .unwrap_or_else(|_| env!("CARGO_BIN_EXE_walnut-agent").to_owned());
    spec["process"]["args"] = json!([PAUSE_PROGRAM]);
    spec["hostname"] = json!("the-pod");
    spec["mounts"].as_array_mut().unwrap().push(
        json!({"destination": PAUSE_PROGRAM, "type": "bind", "source": program, "options": ["bind", "ro"]}),
    );
    agent.create(&id, &spec, None).await.unwrap();
    agent.start(&id, "").await.unwrap();
    id
}

/// Joins namespaces of `pod`.
fn share(spec: &mut Value, pod: &str, kinds: &[&str]) {
    spec["hostname"] = json!("");
    for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
        let kind = namespace["type"].as_str().unwrap().to_owned();
        if kinds.contains(&kind.as_str()) {
            namespace["path"] = json!(namespace_path(pod, &kind));
        }
    }
}

const LOOK: &str = "readlink /proc/self/ns/ipc /proc/self/ns/uts /proc/self/ns/pid; \
                    hostname; echo $$; tr '\\0' ' ' < /proc/1/cmdline";

async fn look(agent: &Agent, pod: &str, kinds: &[&str]) -> Vec<String> {
    let Outcome {
        status,
        stdout,
        stderr,
    } = agent.run(LOOK, |spec, _| share(spec, pod, kinds)).await;
    assert_eq!((status, stderr.as_str()), (0, ""), "{stdout}");
    stdout.lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn containers_share_what_is_asked_for_and_nothing_else() {
    let Some(agent) = agent().await else { return };
    let pod = pod(&agent).await;
    let one = look(&agent, &pod, &["ipc", "uts", "pid"]).await;
    let two = look(&agent, &pod, &["ipc", "uts", "pid"]).await;
    let alone = look(&agent, &pod, &["ipc", "uts"]).await;
    assert_eq!(one[..3], two[..3]);
    assert_eq!(one[3], "the-pod");
    assert_ne!(one[4], "1", "process 1 is the Pod's");
    assert!(one[5].starts_with(PAUSE_PROGRAM), "{one:?}");
    assert_eq!((&alone[..2], &alone[3]), (&one[..2], &one[3]));
    assert_ne!(alone[2], one[2]);
    assert_eq!(alone[4], "1");
    agent.end(&pod).await;
}

#[tokio::test]
async fn who_is_left_behind_in_a_shared_pid_namespace_is_reaped() {
    let Some(agent) = agent().await else { return };
    let pod = pod(&agent).await;
    // Its child ends after its parent, so that the Pod's process 1 inherits it.
    let command = "(sh -c 'sleep 0.1' &); for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.2; \
                   grep -qs 'State:.Z' /proc/[0-9]*/status || exit 0; done; exit 1";
    let outcome = agent
        .run(command, |spec, _| share(spec, &pod, &["pid"]))
        .await;
    assert_eq!(outcome.status, 0, "{outcome:?}");
    // A container's end takes its own processes and leaves the Pod's.
    let left = agent
        .run("sleep 1000 & exit 3", |spec, _| share(spec, &pod, &["pid"]))
        .await;
    assert_eq!(left.status, 3);
    let seen = agent
        .run("grep -l sleep /proc/[0-9]*/comm", |spec, _| {
            share(spec, &pod, &["pid"])
        })
        .await;
    assert_eq!(seen.stdout, "", "{seen:?}");
    agent.end(&pod).await;
}

#[tokio::test]
async fn only_a_living_container_can_be_joined() {
    let Some(agent) = agent().await else { return };
    let pod = pod(&agent).await;
    for (path, code) in [
        ("/proc/1/ns/ipc".into(), Code::INVALID_ARGUMENT),
        (namespace_path(&pod, "uts"), Code::INVALID_ARGUMENT),
        (namespace_path("nobody", "ipc"), Code::NOT_FOUND),
    ] {
        let id = unique("refused");
        let mut spec = agent.spec(&id, "true");
        spec["linux"]["namespaces"] =
            json!([{"type": "pid"}, {"type": "mount"}, {"type": "ipc", "path": path}]);
        spec["hostname"] = json!("");
        let (found, message) = refusal(agent.create(&id, &spec, None).await);
        assert_eq!(found, code, "{path:?}: {message}");
        agent.remove_root(&id);
    }
    agent.kill(&pod, "", libc::SIGKILL, false).await.unwrap();
    agent.wait(&pod, "").await;
    let id = unique("late");
    let mut spec = agent.spec(&id, "true");
    share(&mut spec, &pod, &["ipc"]);
    let (_, message) = refusal(agent.create(&id, &spec, None).await);
    assert!(message.contains("has ended"), "{message}");
    agent.remove_root(&id);
    agent.end(&pod).await;
}

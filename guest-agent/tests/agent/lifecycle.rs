//! From creation to deletion, in every order that a shim may ask for.

use crate::fixture::{Agent, agent, any, deadline, refusal, unique};
use serde_json::{Value, json};
use ttrpc::Code;
use walnut_agent_api::containerd::api::{
    PauseRequest, PidsRequest, ResumeRequest, StatsRequest, Status, UpdateTaskRequest,
};

async fn running(agent: &Agent, command: &str) -> (String, Value) {
    let id = unique("life");
    let spec = agent.spec(&id, command);
    agent.create(&id, &spec, None).await.unwrap();
    agent.start(&id, "").await.unwrap();
    (id, spec)
}

async fn status(agent: &Agent, id: &str) -> Status {
    agent.state(id, "").await.unwrap().status.unwrap()
}

#[tokio::test]
async fn exit_statuses_are_exact() {
    let Some(agent) = agent().await else { return };
    assert_eq!(agent.run("exit 42", |_, _| {}).await.status, 42);
    assert_eq!(agent.run("exit 255", |_, _| {}).await.status, 255);
    let (id, _) = running(&agent, "sleep 1000").await;
    agent.kill(&id, "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(agent.wait(&id, "").await.exit_status, 128 + 9);
    agent.end(&id).await;
}

#[tokio::test]
async fn states_follow_one_another() {
    let Some(agent) = agent().await else { return };
    let id = unique("states");
    let spec = agent.spec(&id, "sleep 1000");
    let pid = agent.create(&id, &spec, None).await.unwrap();
    assert_eq!(status(&agent, &id).await, Status::CREATED);
    assert_eq!(
        refusal(agent.create(&id, &spec, None).await).0,
        Code::ALREADY_EXISTS
    );
    assert_eq!(agent.start(&id, "").await.unwrap(), pid);
    assert_eq!(status(&agent, &id).await, Status::RUNNING);
    assert_eq!(
        refusal(agent.start(&id, "").await).0,
        Code::FAILED_PRECONDITION
    );
    assert_eq!(
        refusal(agent.delete(&id, "").await).0,
        Code::FAILED_PRECONDITION
    );
    agent.kill(&id, "", libc::SIGKILL, true).await.unwrap();
    agent.wait(&id, "").await;
    assert_eq!(status(&agent, &id).await, Status::STOPPED);
    let (code, message) = refusal(agent.kill(&id, "", libc::SIGTERM, false).await);
    assert_eq!(
        (code, message.as_str()),
        (Code::NOT_FOUND, "process already finished")
    );
    assert_eq!(agent.delete(&id, "").await.unwrap(), 137);
    let (code, message) = refusal(agent.state(&id, "").await);
    assert_eq!(code, Code::NOT_FOUND);
    assert_eq!(message, format!("container {id:?} not found"));
    agent.remove_root(&id);
}

#[tokio::test]
async fn what_was_never_started_can_be_killed_or_deleted() {
    let Some(agent) = agent().await else { return };
    let killed = unique("killed");
    agent
        .create(&killed, &agent.spec(&killed, "true"), None)
        .await
        .unwrap();
    agent.kill(&killed, "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(agent.wait(&killed, "").await.exit_status, 137);
    agent.end(&killed).await;
    let deleted = unique("deleted");
    agent
        .create(&deleted, &agent.spec(&deleted, "true"), None)
        .await
        .unwrap();
    assert_eq!(agent.delete(&deleted, "").await.unwrap(), 137);
    assert!(!agent.cgroup(&deleted).exists());
    agent.remove_root(&deleted);
}

#[tokio::test]
async fn everybody_who_waits_is_told_the_same() {
    let Some(agent) = agent().await else { return };
    let id = unique("waiters");
    agent
        .create(&id, &agent.spec(&id, "exit 7"), None)
        .await
        .unwrap();
    let early = tokio::join!(
        agent.wait(&id, ""),
        agent.wait(&id, ""),
        agent.start(&id, ""),
    );
    // Long after the end, too.
    let late = agent.wait(&id, "").await;
    assert_eq!(early.0.exit_status, 7);
    assert_eq!(early.0, early.1);
    assert_eq!(early.0, late);
    agent.end(&id).await;
}

#[tokio::test]
async fn a_process_joins_a_container() {
    let Some(agent) = agent().await else { return };
    let (id, spec) = running(&agent, "exec sleep 1000").await;
    let mut process = spec["process"].clone();
    process["args"] = json!([
        "/bin/sh",
        "-c",
        "ps -e -o comm= | head -1; readlink /proc/self/ns/* | md5sum; readlink /proc/1/ns/* | md5sum; cat /proc/self/cgroup; exit 3"
    ]);
    let outcome = agent.run_exec(&id, &process).await;
    assert_eq!(outcome.status, 3, "{outcome:?}");
    let lines: Vec<_> = outcome.stdout.lines().collect();
    assert_eq!(lines[0], "sleep", "{outcome:?}");
    assert_eq!(lines[1], lines[2], "{outcome:?}");
    assert!(lines.contains(&"0::/"), "{outcome:?}");
    process["cwd"] = json!("/nosuch");
    let (exec_id, streams) = (unique("exec"), agent.streams().await);
    agent.exec(&id, &exec_id, &process, &streams).await.unwrap();
    let (_, message) = refusal(agent.start(&id, &exec_id).await);
    assert_eq!(
        message,
        "unable to start container process: chdir to cwd (\"/nosuch\") set in config.json failed: no such file or directory"
    );
    agent.delete(&id, &exec_id).await.unwrap();
    agent.end(&id).await;
    let streams = agent.streams().await;
    assert_eq!(
        refusal(agent.exec(&id, "late", &process, &streams).await).0,
        Code::NOT_FOUND
    );
}

#[tokio::test]
async fn a_wait_may_come_before_the_start_of_an_exec() {
    let Some(agent) = agent().await else { return };
    let (id, spec) = running(&agent, "sleep 1000").await;
    let mut process = spec["process"].clone();
    process["args"] = json!(["/bin/sh", "-c", "exit 9"]);
    let (exec_id, streams) = (unique("exec"), agent.streams().await);
    agent.exec(&id, &exec_id, &process, &streams).await.unwrap();
    let others = agent.streams().await;
    assert_eq!(
        refusal(agent.exec(&id, &exec_id, &process, &others).await).0,
        Code::ALREADY_EXISTS
    );
    let (exit, started) = tokio::join!(agent.wait(&id, &exec_id), agent.start(&id, &exec_id));
    started.unwrap();
    assert_eq!(exit.exit_status, 9);
    agent.end(&id).await;
}

#[tokio::test]
async fn the_end_of_the_first_process_is_the_end_of_all() {
    let Some(agent) = agent().await else { return };
    let (id, spec) = running(&agent, "sleep 1000").await;
    let mut process = spec["process"].clone();
    process["args"] = json!(["/bin/sh", "-c", "sleep 1000"]);
    let (exec_id, streams) = (unique("exec"), agent.streams().await);
    agent.exec(&id, &exec_id, &process, &streams).await.unwrap();
    agent.start(&id, &exec_id).await.unwrap();
    agent.kill(&id, "", libc::SIGKILL, false).await.unwrap();
    assert_eq!(agent.wait(&id, &exec_id).await.exit_status, 137);
    agent.end(&id).await;
}

#[tokio::test]
async fn processes_can_be_paused_listed_and_measured() {
    let Some(agent) = agent().await else { return };
    let (id, _) = running(&agent, "sleep 1000 & wait").await;
    let pause = PauseRequest {
        id: id.clone(),
        ..PauseRequest::default()
    };
    agent.tasks.pause(deadline(), &pause).await.unwrap();
    assert_eq!(status(&agent, &id).await, Status::PAUSED);
    let resume = ResumeRequest {
        id: id.clone(),
        ..ResumeRequest::default()
    };
    agent.tasks.resume(deadline(), &resume).await.unwrap();
    assert_eq!(status(&agent, &id).await, Status::RUNNING);
    assert_eq!(
        refusal(agent.tasks.resume(deadline(), &resume).await).0,
        Code::FAILED_PRECONDITION
    );
    let pids = PidsRequest {
        id: id.clone(),
        ..PidsRequest::default()
    };
    let listed = agent.tasks.pids(deadline(), &pids).await.unwrap().processes;
    assert!((1..=2).contains(&listed.len()), "{listed:?}");
    assert_eq!(listed[0].pid, agent.state(&id, "").await.unwrap().pid);
    let stats = StatsRequest {
        id: id.clone(),
        ..StatsRequest::default()
    };
    let stats = agent
        .tasks
        .stats(deadline(), &stats)
        .await
        .unwrap()
        .stats
        .unwrap();
    assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
    let update = UpdateTaskRequest {
        id: id.clone(),
        resources: any("", &json!({"devices": [{"allow": true}]})),
        ..UpdateTaskRequest::default()
    };
    let (code, message) = refusal(agent.tasks.update(deadline(), &update).await);
    assert_eq!(code, Code::UNIMPLEMENTED, "{message}");
    agent.end(&id).await;
}

#[tokio::test]
async fn ids_that_could_be_paths_are_refused() {
    let Some(agent) = agent().await else { return };
    for id in ["..", "a/b", "", "."] {
        let spec = json!({});
        assert_eq!(
            refusal(agent.create(id, &spec, None).await).0,
            Code::INVALID_ARGUMENT,
            "{id:?}"
        );
    }
}

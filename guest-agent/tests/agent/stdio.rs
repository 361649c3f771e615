//! Every byte, and every end.

use crate::fixture::{DEADLINE, agent, deadline, unique};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use walnut_agent_api::containerd::api::ResizePtyRequest;

const MIB: u32 = 1024 * 1024;

#[tokio::test]
async fn twenty_mebibytes_go_in_and_come_out() {
    let Some(agent) = agent().await else { return };
    let id = unique("cat");
    let mut streams = agent.streams().await;
    agent
        .create(&id, &agent.spec(&id, "cat"), Some(&streams))
        .await
        .unwrap();
    agent.start(&id, "").await.unwrap();
    let sent: Vec<u8> = (0..20 * MIB)
        .map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect();
    let mut received = Vec::with_capacity(sent.len());
    let write = async {
        streams.stdin.write_all(&sent).await?;
        streams.stdin.shutdown().await
    };
    let both = async { tokio::try_join!(write, streams.stdout.read_to_end(&mut received)) };
    timeout(DEADLINE, both).await.unwrap().unwrap();
    assert!(
        sent == received,
        "{} of {} bytes",
        received.len(),
        sent.len()
    );
    assert_eq!(agent.wait(&id, "").await.exit_status, 0);
    agent.end(&id).await;
}

#[tokio::test]
async fn what_is_written_before_a_sudden_end_arrives() {
    let Some(agent) = agent().await else { return };
    let outcome = agent
        .run(
            "head -c 8388608 /dev/zero | tr '\\0' x; kill -9 $$",
            |_, _| {},
        )
        .await;
    assert_eq!(u32::try_from(outcome.stdout.len()), Ok(8 * MIB));
}

#[tokio::test]
async fn a_child_that_is_left_holds_the_stream_open() {
    let Some(agent) = agent().await else { return };
    let id = unique("child");
    let spec = agent.spec(&id, "sleep 1000");
    agent.create(&id, &spec, None).await.unwrap();
    agent.start(&id, "").await.unwrap();
    let mut process = spec["process"].clone();
    process["args"] = json!(["/bin/sh", "-c", "sleep 1000 & echo early"]);
    let mut streams = agent.streams().await;
    agent.exec(&id, "parent", &process, &streams).await.unwrap();
    agent.start(&id, "parent").await.unwrap();
    assert_eq!(agent.wait(&id, "parent").await.exit_status, 0);
    let mut early = [0; 6];
    streams.stdout.read_exact(&mut early).await.unwrap();
    assert_eq!(&early, b"early\n");
    agent.kill(&id, "", libc::SIGKILL, true).await.unwrap();
    let mut rest = Vec::new();
    timeout(DEADLINE, streams.stdout.read_to_end(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert!(rest.is_empty());
    agent.end(&id).await;
}

#[tokio::test]
async fn the_streams_of_a_refused_request_are_closed() {
    let Some(agent) = agent().await else { return };
    let id = unique("refused");
    let mut streams = agent.streams().await;
    agent
        .create(&id, &json!({}), Some(&streams))
        .await
        .unwrap_err();
    let mut nothing = Vec::new();
    for stream in [&mut streams.stdout, &mut streams.stderr] {
        let end = timeout(DEADLINE, stream.read_to_end(&mut nothing)).await;
        assert_eq!(end.unwrap().unwrap(), 0);
    }
}

#[tokio::test]
async fn without_streams_there_is_dev_null() {
    let Some(agent) = agent().await else { return };
    let id = unique("null");
    let command = "cat; echo lost; test \"$(readlink /proc/self/fd/0)\" = /dev/null";
    agent
        .create(&id, &agent.spec(&id, command), None)
        .await
        .unwrap();
    agent.start(&id, "").await.unwrap();
    assert_eq!(agent.wait(&id, "").await.exit_status, 0);
    agent.end(&id).await;
}

#[tokio::test]
async fn a_terminal_is_the_containers_own() {
    let Some(agent) = agent().await else { return };
    let id = unique("terminal");
    let mut spec = agent.spec(
        &id,
        "tty; stty size; ls -l /dev/console | cut -c1; echo > /dev/tty; \
         trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.1; done",
    );
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"height": 24, "width": 80});
    let mut streams = agent.streams().await;
    agent.create(&id, &spec, Some(&streams)).await.unwrap();
    agent.start(&id, "").await.unwrap();
    let mut seen = String::new();
    let mut buffer = [0; 4096];
    while !seen.contains("ready") {
        let count = timeout(DEADLINE, streams.stdout.read(&mut buffer))
            .await
            .unwrap()
            .unwrap();
        assert_ne!(count, 0, "{seen:?}");
        seen.push_str(std::str::from_utf8(&buffer[..count]).unwrap());
    }
    assert!(seen.starts_with("/dev/pts/0\r\n24 80\r\nc\r\n"), "{seen:?}");
    let resize = ResizePtyRequest {
        id: id.clone(),
        width: 100,
        height: 30,
        ..ResizePtyRequest::default()
    };
    agent.tasks.resize_pty(deadline(), &resize).await.unwrap();
    let mut rest = String::new();
    timeout(DEADLINE, streams.stdout.read_to_string(&mut rest))
        .await
        .unwrap()
        .unwrap();
    assert!(rest.ends_with("30 100\r\n"), "{rest:?}");
    assert_eq!(agent.wait(&id, "").await.exit_status, 5);
    agent.end(&id).await;
}

#[tokio::test]
async fn an_exec_may_have_a_terminal_too() {
    let Some(agent) = agent().await else { return };
    let id = unique("exec-terminal");
    let spec = agent.spec(&id, "sleep 1000");
    agent.create(&id, &spec, None).await.unwrap();
    agent.start(&id, "").await.unwrap();
    let mut process = spec["process"].clone();
    process["terminal"] = json!(true);
    process["args"] = json!(["/bin/sh", "-c", "read line; echo got $line; tty"]);
    let mut streams = agent.streams().await;
    agent.exec(&id, "tty", &process, &streams).await.unwrap();
    agent.start(&id, "tty").await.unwrap();
    streams.stdin.write_all(b"word\n").await.unwrap();
    let mut all = String::new();
    timeout(DEADLINE, streams.stdout.read_to_string(&mut all))
        .await
        .unwrap()
        .unwrap();
    assert!(all.ends_with("got word\r\n/dev/pts/0\r\n"), "{all:?}");
    agent.end(&id).await;
}

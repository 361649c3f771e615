//! How containers live and end, in a Pod that stays.

use crate::pod::{MIB, SERVE, tell};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use std::fs;
use walnut_tests::{
    cri::{Cri, Pod, Tag, number, says},
    deadline::{self, Deadline},
};

pub(crate) fn how_containers_live_and_end(cri: &Cri) -> Result<()> {
    tell(
        cri.pod(json!({}))?,
        &[
            ("ExecSync", exec_sync),
            ("how containers end", ends),
            ("a container that cannot start", missing),
            ("logs", logs),
            ("a container is made again", again),
        ],
    )
}

pub(crate) fn exec_sync(pod: &mut Pod<'_>) -> Result<()> {
    let container = pod.shell("exec", SERVE, json!({}))?;
    let result = container.exec("echo out; echo err >&2; exit 42")?;
    ensure!(
        result.code == 42 && result.stdout == "out" && result.stderr == "err",
        "{result:?}"
    );
    let much = container.output("seq 100000 | md5sum")?;
    let all = container.output("seq 100000")?;
    ensure!(
        all.lines().count() == 100_000 && all.ends_with("100000"),
        "{} bytes",
        all.len()
    );
    ensure!(much.len() > 32, "{much}");
    let killed = container.exec("kill -9 $$")?;
    ensure!(killed.code == 137, "{killed:?}");
    // A limit of time ends it, and it alone.
    let late = json!({ "container_id": container.id, "cmd": ["sleep", "999"], "timeout": 1 });
    let late = pod.cri().refused("ExecSync", late)?;
    ensure!(late.code == 4, "{late:?}");
    deadline::until(
        "the end of the late process",
        Deadline::after(deadline::REQUEST),
        || {
            let there = container.exec("ps | grep '[s]leep 999'")?;
            Ok((there.code == 1).then_some(()))
        },
    )?;
    let missing = json!({ "container_id": container.id, "cmd": ["/no/such"] });
    let missing = pod.cri().refused("ExecSync", missing)?;
    says(&missing.message, &["/no/such", "no such file or directory"])?;
    container.stop(0)?;
    container.remove()
}

fn ends(pod: &mut Pod<'_>) -> Result<()> {
    let mut endings = vec![
        ("zero", "exit 0".to_owned(), json!({}), 0, "Completed"),
        ("three", "exit 3".to_owned(), json!({}), 3, "Error"),
        (
            "signal",
            "sh -c 'kill -TERM $$'; exit $?".to_owned(),
            json!({}),
            143,
            "Error",
        ),
    ];
    let limit = json!({ "linux": { "resources": {
        "memory_limit_in_bytes": 32 * MIB, "memory_swap_limit_in_bytes": 32 * MIB,
    } } });
    let eat = "exec tail -c 100m /dev/zero".to_owned();
    endings.push(("memory", eat, limit, 137, "OOMKilled"));
    for (name, script, over, code, reason) in endings {
        let container = pod.shell(name, &script, over)?;
        let ended = container.ended()?;
        ensure!(ended == (code, reason.to_owned()), "{name}: {ended:?}");
        let status = container.status()?;
        let times = ["created_at", "started_at", "finished_at"].map(|name| number(&status[name]));
        let [created, started, finished] = times;
        let (created, started, finished) = (created?, started?, finished?);
        // containerd takes the time of the start after it, so that a short life may end before.
        ensure!(created <= started && created <= finished, "{status}");
        container.remove()?;
    }
    // Who doesn't hear SIGTERM is killed after its time.
    let deaf = pod.shell("deaf", "trap '' TERM; while :; do sleep 1; done", json!({}))?;
    deaf.stop(1)?;
    ensure!(deaf.ended()?.0 == 137, "{:?}", deaf.status()?);
    // Twice is as good as once.
    deaf.stop(1)?;
    deaf.remove()?;
    deaf.remove()
}

fn missing(pod: &mut Pod<'_>) -> Result<()> {
    let container = pod.create_program("missing", &["/no/such"], json!({}))?;
    let refused = container.start().err().context("it started")?;
    says(
        &format!("{refused:#}"),
        &["/no/such", "no such file or directory"],
    )?;
    let ended = container.ended()?;
    ensure!(ended == (128, "StartError".to_owned()), "{ended:?}");
    container.remove()
}

fn logs(pod: &mut Pod<'_>) -> Result<()> {
    let script = "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; \
        echo complaint >&2; head -c 40000 /dev/zero | tr '\\0' x; echo; printf 'no newline'";
    let container = pod.shell("logs", script, json!({}))?;
    ensure!(container.ended()?.0 == 0, "it failed");
    let log = container.log()?;
    let (errors, lines): (Vec<_>, Vec<_>) = log.iter().partition(|line| line.stream == "stderr");
    ensure!(
        errors.len() == 1 && errors[0].text == "complaint",
        "{errors:?}"
    );
    for (number, line) in lines.iter().take(2000).enumerate() {
        ensure!(
            line.text == format!("line {number}") && line.tag == Tag::Full,
            "{number}: {line:?}"
        );
    }
    let rest = lines.get(2000..).context("lines are missing")?;
    let (last, long) = rest.split_last().context("the long line is missing")?;
    let tags: Vec<_> = long.iter().map(|line| line.tag).collect();
    ensure!(tags == [Tag::Partial, Tag::Partial, Tag::Full], "{tags:?}");
    let length: usize = long.iter().map(|line| line.text.len()).sum();
    ensure!(length == 40_000, "{length} bytes");
    ensure!(last.text == "no newline", "{last:?}");
    container.remove()?;
    // The kubelet renames a log that is too long, and asks for a new one.
    let container = pod.shell(
        "rotated",
        "while :; do echo tick; sleep 0.2; done",
        json!({}),
    )?;
    let ticks = |what: &str| {
        deadline::until(what, Deadline::after(deadline::REQUEST), || {
            let log = container.log();
            Ok(log.is_ok_and(|lines| lines.len() > 2).then_some(()))
        })
    };
    ticks("the log")?;
    let log = pod.directory().join("logs/rotated.log");
    fs::rename(&log, log.with_extension("old"))?;
    container.ask("ReopenContainerLog", json!({}))?;
    ticks("the new log")?;
    container.stop(0)?;
    container.remove()
}

fn again(pod: &mut Pod<'_>) -> Result<()> {
    for attempt in 0..3 {
        let over = json!({ "metadata": { "attempt": attempt } });
        let container = pod.shell("again", "touch /mark && [ $(ls /mark* | wc -l) = 1 ]", over)?;
        ensure!(
            container.ended()?.0 == 0,
            "attempt {attempt} has what another left"
        );
        container.remove()?;
    }
    ensure!(
        pod.status()?["state"] == "SANDBOX_READY",
        "the Pod has gone"
    );
    Ok(())
}

//! Hooks that run on the host, with Walnut and with runc.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{fs, process::Command};
use walnut_tests::{
    bundle::{Spec, busybox_rootfs},
    command,
    ctr::Runtime,
    deadline::{self, Deadline},
    leak::Leak,
    requirement,
};

/// What hooks told: their list, the state's status, and whether they knew a process.
type Told = Vec<(String, String, bool)>;

#[test]
fn hooks_of_the_host_run_there_in_order() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let leak = Leak::watch()?;
    let mut all = Vec::new();
    for runtime in [Runtime::Walnut, Runtime::Runc] {
        let (told, output) = run(runtime, &programs.busybox, "exit 0", "echo ran; ls /tmp")?;
        ensure!(
            output.text() == "ran\nof-the-guest",
            "{runtime:?}: {output:?}"
        );
        all.push(told);
    }
    let lists: Vec<_> = all[0].iter().map(|(list, ..)| list.as_str()).collect();
    ensure!(
        lists == ["prestart", "createRuntime", "poststart", "poststop"],
        "{all:?}"
    );
    ensure!(all[0] == all[1], "walnut {:?}, runc {:?}", all[0], all[1]);
    leak.nothing_left()
}

#[test]
fn a_hook_that_fails_stops_the_container() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let leak = Leak::watch()?;
    let mut all = Vec::new();
    for runtime in [Runtime::Walnut, Runtime::Runc] {
        let failing = "echo no such luck >&2; exit 7";
        let (told, output) = run(runtime, &programs.busybox, failing, "echo ran")?;
        ensure!(output.text() != "ran", "{runtime:?}: {output:?}");
        ensure!(
            output.stderr.contains("no such luck"),
            "{runtime:?}: {output:?}"
        );
        all.push(told);
    }
    let lists: Vec<_> = all[0].iter().map(|(list, ..)| list.as_str()).collect();
    ensure!(
        lists == ["prestart", "createRuntime", "poststop"],
        "{all:?}"
    );
    leak.nothing_left()
}

/// Runs a container whose hooks tell what they know; `createRuntime` ends with a command of its own.
fn run(
    runtime: Runtime,
    busybox: &std::path::Path,
    create_runtime: &str,
    script: &str,
) -> Result<(Told, command::Output)> {
    let directory = tempfile::tempdir()?;
    let root = directory.path().join("rootfs");
    fs::create_dir(&root)?;
    busybox_rootfs(busybox, &root)?;
    let told = directory.path().join("told");
    let hook = |list: &str, end: &str| {
        let script = format!(
            "(echo {list}; cat; echo) >> {}; {end}",
            told.to_string_lossy()
        );
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"] }])
    };
    let of_guest = json!([{
        "path": root.join("bin/busybox"), "args": ["touch", "tmp/of-the-guest"],
    }]);
    let spec = Spec::new(&root.to_string_lossy(), &["sh", "-c", script])
        .with(
            "/hooks",
            json!({
                "prestart": hook("prestart", "exit 0"),
                "createRuntime": hook("createRuntime", create_runtime),
                "createContainer": of_guest,
                "poststart": hook("poststart", "exit 0"),
                "poststop": hook("poststop", "exit 0"),
            }),
        )
        .networked()
        .with(
            "/linux/cgroupsPath",
            json!(format!("/hooked-{}", std::process::id())),
        );
    let file = directory.path().join("config.json");
    fs::write(&file, spec.to_json())?;
    let id = format!("hooked-{}", std::process::id());
    let mut ctr = Command::new("ctr");
    ctr.args(["run", "--rm", "--runtime", runtime.name(), "--config"])
        .arg(&file)
        .arg(&id);
    let output = command::run(&mut ctr, Vec::new(), Deadline::after(deadline::BOOT))?;
    let _ = walnut_tests::ctr::ctr(&["container", "rm", &id]);
    let text = fs::read_to_string(&told).context("no hook has run")?;
    let lines: Vec<_> = text.lines().collect();
    let told = lines
        .chunks_exact(2)
        .map(|pair| {
            let state: Value = serde_json::from_str(pair[1])?;
            ensure!(state["id"] == id, "{state}");
            let mut status = state["status"].as_str().unwrap_or_default();
            // runc still says so of a container whose program runs.
            if pair[0] == "poststart" && status == "created" {
                status = "running";
            }
            let knows_process = state["pid"].as_u64().unwrap_or(0) != 0;
            Ok((pair[0].to_owned(), status.to_owned(), knows_process))
        })
        .collect::<Result<_>>()?;
    Ok((told, output))
}

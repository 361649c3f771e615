//! The cases of `tests/oci`, which the lab shows to the agent in a VM and to runc, shown to the agent here.

use crate::fixture::{Agent, agent, refusal, unique};
use serde_json::{Value, json};
use std::{fs, os::unix::fs::symlink, path::Path};

const PROPERTIES: [(&str, &str); 5] = [
    ("process", include_str!("../../../tests/oci/process.json")),
    (
        "namespaces",
        include_str!("../../../tests/oci/namespaces.json"),
    ),
    (
        "filesystem",
        include_str!("../../../tests/oci/filesystem.json"),
    ),
    ("hooks", include_str!("../../../tests/oci/hooks.json")),
    (
        "resources",
        include_str!("../../../tests/oci/resources.json"),
    ),
];

#[tokio::test]
async fn each_property_is_as_the_specification_has_it() {
    let Some(agent) = agent().await else { return };
    let mut failures = Vec::new();
    for (property, json) in PROPERTIES {
        let cases: Vec<Value> = serde_json::from_str(json).unwrap();
        for case in &cases {
            if let Err(failure) = try_case(&agent, case).await {
                failures.push(format!("{property}: {}: {failure}", case["name"]));
            }
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

async fn try_case(agent: &Agent, case: &Value) -> Result<(), String> {
    if case["needs"] == "controllers" && !agent.has_controller("memory") {
        return Ok(());
    }
    let id = unique("case");
    let script = case["script"].as_str().unwrap_or("true");
    let exec = case["exec"].as_object();
    let first = if exec.is_some() {
        "exec sleep 1000"
    } else {
        script
    };
    let mut spec = agent.spec(&id, first);
    let root = spec["root"]["path"].as_str().unwrap().to_owned();
    prepare(Path::new(&root), case);
    apply(&mut spec, case, &root);
    let outcome = if let Some(message) = case["refused"].as_str() {
        let message = message.replace("$BUSYBOX", "/bin/sh");
        refused(agent, &id, &spec, &message).await
    } else {
        let mut process = spec["process"].clone();
        let streams = agent.streams().await;
        let created = async {
            agent.create(&id, &spec, Some(&streams)).await?;
            agent.start(&id, "").await
        };
        match created.await {
            Err(error) => Err(refusal::<()>(Err(error)).1),
            Ok(_) => {
                let outcome = match exec {
                    None => agent.finish(&id, "", streams).await,
                    Some(changes) => {
                        process["args"] = json!(["/bin/sh", "-c", script]);
                        for (key, value) in changes {
                            process[key] = value.clone();
                        }
                        agent.run_exec(&id, &process).await
                    }
                };
                agent.end(&id).await;
                let expected = case["prints"].as_str().unwrap();
                match outcome.stdout == expected {
                    true => Ok(()),
                    false => Err(format!("{outcome:?}, expected {expected:?}")),
                }
            }
        }
    };
    agent.remove_root(&id);
    outcome
}

fn prepare(root: &Path, case: &Value) {
    for (path, content) in case["files"].as_object().into_iter().flatten() {
        fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
        fs::write(root.join(path), content.as_str().unwrap()).unwrap();
    }
    for (path, target) in case["links"].as_object().into_iter().flatten() {
        symlink(target.as_str().unwrap(), root.join(path)).unwrap();
    }
}

/// Changes a configuration as a case says.
fn apply(spec: &mut Value, case: &Value, root: &str) {
    if let Some(hostname) = case.get("hostname") {
        spec["hostname"] = hostname.clone();
    }
    for kind in case["namespaces"].as_array().into_iter().flatten() {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        let namespace = json!({ "type": kind });
        if !namespaces.contains(&namespace) {
            namespaces.push(namespace);
        }
    }
    for mount in case["mounts"].as_array().into_iter().flatten() {
        spec["mounts"].as_array_mut().unwrap().push(mount.clone());
    }
    for (pointer, value) in case["set"].as_object().into_iter().flatten() {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[key] = value.clone();
    }
    let text = spec.to_string();
    *spec =
        serde_json::from_str(&text.replace("$ROOT", root).replace("$BUSYBOX", "/bin/sh")).unwrap();
}

async fn refused(agent: &Agent, id: &str, spec: &Value, message: &str) -> Result<(), String> {
    let created = async {
        agent.create(id, spec, None).await?;
        agent.start(id, "").await
    };
    let answer = created.await;
    // One that could be created and not started is there to be deleted.
    if agent.state(id, "").await.is_ok() {
        agent.end(id).await;
    }
    if answer.is_ok() {
        return Err("not refused".to_owned());
    }
    let (_, words) = refusal(answer);
    match words.contains(message) {
        true => Ok(()),
        false => Err(format!("refused with {words}, expected {message}")),
    }
}

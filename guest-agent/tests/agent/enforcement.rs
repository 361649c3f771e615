//! What a container may not do, it cannot.

use crate::fixture::{agent, unique};
use serde_json::json;

#[tokio::test]
async fn devices_are_refused_by_the_kernel() {
    let Some(agent) = agent().await else { return };
    // CAP_MKNOD is among the defaults, and any node may be made: opening is what is refused.
    let command = "mknod /run/other c 240 0 && mknod /run/zero c 1 5; head -c1 /run/zero | wc -c; \
                   head -c1 /run/other";
    let outcome = agent.run(command, |_, _| {}).await;
    assert_eq!(outcome.stdout, "1\n", "{outcome:?}");
    assert!(
        outcome.stderr.contains("Operation not permitted"),
        "{outcome:?}"
    );
    // Nothing is behind this number: being told so is the sign of having been let through.
    let outcome = agent
        .run("head -c1 /dev/one", |spec, _| {
            let device = json!({"path": "/dev/one", "type": "c", "major": 240, "minor": 0});
            spec["linux"]["devices"] = json!([device]);
            let rule = json!({"allow": true, "type": "c", "major": 240, "minor": 0, "access": "r"});
            let rules = &mut spec["linux"]["resources"]["devices"];
            rules.as_array_mut().unwrap().push(rule);
        })
        .await;
    assert!(outcome.stderr.contains("No such device"), "{outcome:?}");
}

#[tokio::test]
async fn privileges_cannot_be_had_back() {
    let Some(agent) = agent().await else { return };
    let outcome = agent
        .run(
            "mount -t tmpfs none /tmp || hostname other || echo held",
            |_, _| {},
        )
        .await;
    assert!(outcome.stdout.ends_with("held\n"), "{outcome:?}");
}

#[tokio::test]
async fn a_filter_holds_every_process_of_the_container() {
    let Some(agent) = agent().await else { return };
    let profile = include_str!("../../src/container/testdata/seccomp-containerd.json");
    let profile: serde_json::Value = serde_json::from_str(profile).unwrap();
    let command = "grep Seccomp: /proc/self/status; unshare -r true 2>&1";
    for no_new_privileges in [true, false] {
        let outcome = agent
            .run(command, |spec, _| {
                spec["linux"]["seccomp"] = profile.clone();
                spec["process"]["noNewPrivileges"] = json!(no_new_privileges);
            })
            .await;
        let expected = "Seccomp:\t2\nunshare: unshare failed: Operation not permitted\n";
        assert_eq!(outcome.stdout, expected, "{outcome:?}");
    }
    let id = unique("filtered");
    let mut spec = agent.spec(&id, "exec sleep 1000");
    spec["linux"]["seccomp"] = profile;
    agent.create(&id, &spec, None).await.unwrap();
    agent.start(&id, "").await.unwrap();
    let mut process = spec["process"].clone();
    process["args"] = json!(["grep", "Seccomp:", "/proc/self/status"]);
    assert_eq!(agent.run_exec(&id, &process).await.stdout, "Seccomp:\t2\n");
    agent.end(&id).await;
}

#[tokio::test]
async fn the_number_of_processes_is_limited() {
    let Some(agent) = agent().await else { return };
    if !agent.has_controller("pids") {
        return println!("skipped: no pids controller in the cgroup v2 hierarchy");
    }
    let outcome = agent
        .run("cat /sys/fs/cgroup/pids.max; for i in 1 2 3 4 5 6 7 8; do sleep 9 & done", |spec, _| {
            spec["linux"]["resources"]["pids"] = json!({"limit": 4});
            spec["mounts"].as_array_mut().unwrap().push(
                json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "noexec", "nodev"]}),
            );
        })
        .await;
    assert_eq!(outcome.stdout, "4\n", "{outcome:?}");
    assert!(
        outcome.stderr.to_lowercase().contains("fork"),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn memory_is_limited() {
    let Some(agent) = agent().await else { return };
    if !agent.has_controller("memory") {
        return println!("skipped: no memory controller in the cgroup v2 hierarchy");
    }
    let outcome = agent
        .run("head -c 60000000 /dev/zero | tail", |spec, _| {
            spec["linux"]["resources"]["memory"] = json!({"limit": 32 << 20, "swap": 32 << 20});
        })
        .await;
    assert_eq!(outcome.status, 137, "{outcome:?}");
}

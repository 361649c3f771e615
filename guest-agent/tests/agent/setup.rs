//! What a process finds when it starts.

use crate::fixture::{agent, refusal, unique};
use serde_json::json;
use std::{fs, os::unix::fs::symlink};
use ttrpc::Code;

#[tokio::test]
async fn a_container_has_a_world_of_its_own() {
    let Some(agent) = agent().await else { return };
    let command = "echo $$; hostname; ls /proc | grep -c '^[0-9]'; cut -d: -f3 /proc/self/cgroup; \
                   cut -d' ' -f5 /proc/self/mountinfo; ls -1 /dev";
    let outcome = agent
        .run(command, |spec, _| spec["hostname"] = json!("mine"))
        .await;
    assert_eq!(outcome.status, 0, "{outcome:?}");
    let lines: Vec<_> = outcome.stdout.lines().collect();
    assert_eq!(lines[..2], ["1", "mine"]);
    // The shell, and the two of the pipeline.
    assert!(lines[2].parse::<u32>().unwrap() <= 3, "{outcome:?}");
    assert!(lines.contains(&"/"), "{outcome:?}");
    for present in [
        "/proc",
        "/dev/pts",
        "/dev/shm",
        "/dev/mqueue",
        "/proc/keys",
        "/proc/sys",
        "null",
        "tty",
        "ptmx",
        "stdin",
    ] {
        assert!(lines.contains(&present), "{present}: {outcome:?}");
    }
    assert!(!outcome.stdout.contains("walnut"), "{outcome:?}");
}

#[tokio::test]
async fn protected_paths_are_protected() {
    let Some(agent) = agent().await else { return };
    let command = "wc -c < /proc/keys; ls /sys/firmware | wc -l; \
                   echo 1 > /proc/sys/kernel/panic; touch /sys/x; touch /y; touch /run/z && echo run; \
                   touch /usr/w";
    let outcome = agent
        .run(command, |spec, _| spec["root"]["readonly"] = json!(true))
        .await;
    assert_eq!(outcome.stdout, "0\n0\nrun\n", "{outcome:?}");
    assert_eq!(
        outcome.stderr.matches("Read-only file system").count(),
        4,
        "{outcome:?}"
    );
}

#[tokio::test]
async fn a_process_is_who_it_is_to_be() {
    let Some(agent) = agent().await else { return };
    let command = "id -u; id -G; umask; ulimit -n; pwd; echo $HOME; cat /proc/self/oom_score_adj; \
                   grep -E '^(Cap|NoNewPrivs|SigBlk)' /proc/self/status";
    let outcome = agent
        .run(command, |spec, root| {
            fs::create_dir(root.join("srv")).unwrap();
            let process = &mut spec["process"];
            process["user"] =
                json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 0o27});
            process["cwd"] = json!("/srv/made/below");
            process["oomScoreAdj"] = json!(123);
            process["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]);
            process["capabilities"] = json!({
                "bounding": ["CAP_KILL", "CAP_NET_RAW"],
                "permitted": ["CAP_KILL"],
                "effective": ["CAP_KILL"],
                "inheritable": ["CAP_KILL"],
                "ambient": ["CAP_KILL"],
            });
        })
        .await;
    let kill = "0000000000000020";
    let expected = format!(
        "1000\n1001 5 7\n0027\n77\n/srv/made/below\n/home/user\n123\n\
         SigBlk:\t0000000000000000\n\
         CapInh:\t{kill}\nCapPrm:\t{kill}\nCapEff:\t{kill}\nCapBnd:\t0000000000002020\nCapAmb:\t{kill}\n\
         NoNewPrivs:\t1\n"
    );
    assert_eq!(outcome.stdout, expected, "{outcome:?}");
}

#[tokio::test]
async fn a_broken_pipe_ends_a_process() {
    let Some(agent) = agent().await else { return };
    let outcome = agent
        .run("(yes; echo $? >&2) | head -1; kill -PIPE $$", |_, _| {})
        .await;
    assert_eq!(outcome.stdout, "y\n");
    assert_eq!(outcome.stderr, "141\n", "{outcome:?}");
}

#[tokio::test]
async fn a_user_without_privileges_can_open_its_streams_again() {
    let Some(agent) = agent().await else { return };
    let outcome = agent
        .run(
            "echo out > /dev/stdout; echo err > /proc/self/fd/2",
            |spec, _| {
                spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
            },
        )
        .await;
    assert_eq!(
        (outcome.stdout.as_str(), outcome.stderr.as_str()),
        ("out\n", "err\n")
    );
}

#[tokio::test]
async fn only_standard_streams_are_open() {
    let Some(agent) = agent().await else { return };
    let outcome = agent.run("ls /proc/$$/fd", |_, _| {}).await;
    assert_eq!(outcome.stdout, "0\n1\n2\n", "{outcome:?}");
}

#[tokio::test]
async fn links_of_an_image_do_not_lead_out() {
    let Some(agent) = agent().await else { return };
    let outside = tempfile::tempdir().unwrap();
    let source = outside.path().join("resolv.conf");
    fs::write(&source, "nameserver 192.0.2.1\n").unwrap();
    let outcome = agent
        .run("cat /etc/resolv.conf; ls /escape", |spec, root| {
            symlink("../run2/resolve.conf", root.join("etc/resolv.conf")).unwrap();
            symlink(outside.path(), root.join("escape")).unwrap();
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.push(json!({"destination": "/etc/resolv.conf", "type": "bind", "source": source, "options": ["bind", "ro"]}));
            mounts.push(json!({"destination": "/escape/made", "type": "tmpfs", "source": "tmpfs"}));
        })
        .await;
    assert_eq!(
        outcome.stdout, "nameserver 192.0.2.1\nmade\n",
        "{outcome:?}"
    );
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn a_place_for_proc_must_be_itself() {
    let Some(agent) = agent().await else { return };
    let id = unique("proc");
    let spec = agent.spec(&id, "true");
    let root = std::path::PathBuf::from(spec["root"]["path"].as_str().unwrap());
    fs::remove_dir(root.join("proc")).unwrap();
    symlink("tmp", root.join("proc")).unwrap();
    let (code, message) = refusal(agent.create(&id, &spec, None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        message.contains("must be mounted on ordinary directory"),
        "{message}"
    );
    agent.remove_root(&id);
}

#[tokio::test]
async fn what_cannot_run_is_told_in_known_words_and_leaves_nothing() {
    let Some(agent) = agent().await else { return };
    let cases = [
        (
            json!({"args": ["nosuch"]}),
            "exec: \"nosuch\": executable file not found in $PATH",
        ),
        (
            json!({"args": ["/no/such"]}),
            "exec: \"/no/such\": stat /no/such: no such file or directory",
        ),
        (json!({"args": ["/etc"]}), "exec: \"/etc\": is a directory"),
        (
            json!({"args": ["/etc/passwd"]}),
            "exec: \"/etc/passwd\": permission denied",
        ),
    ];
    for (change, words) in cases {
        let id = unique("refused");
        let mut spec = agent.spec(&id, "");
        spec["process"]["args"] = change["args"].clone();
        let (code, message) = refusal(agent.create(&id, &spec, None).await);
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert_eq!(
            message,
            format!("unable to start container process: {words}")
        );
        assert!(!agent.cgroup(&id).exists());
        assert_eq!(refusal(agent.state(&id, "").await).0, Code::NOT_FOUND);
        agent.remove_root(&id);
    }
}

#[tokio::test]
async fn what_is_not_a_program_fails_the_start() {
    let Some(agent) = agent().await else { return };
    let id = unique("noexec");
    let mut spec = agent.spec(&id, "");
    let root = std::path::PathBuf::from(spec["root"]["path"].as_str().unwrap());
    fs::write(root.join("odd"), "\0\x01 not a program").unwrap();
    fs::set_permissions(
        root.join("odd"),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    spec["process"]["args"] = json!(["/odd"]);
    agent.create(&id, &spec, None).await.unwrap();
    let (code, message) = refusal(agent.start(&id, "").await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        message.ends_with("exec /odd: exec format error"),
        "{message}"
    );
    assert_eq!(agent.wait(&id, "").await.exit_status, 127);
    agent.end(&id).await;
}

#[tokio::test]
async fn what_is_not_enforced_is_refused() {
    let Some(agent) = agent().await else { return };
    let id = unique("refused");
    let mut spec = agent.spec(&id, "true");
    spec["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0");
    let (code, message) = refusal(agent.create(&id, &spec, None).await);
    assert_eq!(code, Code::UNIMPLEMENTED);
    assert!(
        message.starts_with("linux.mountLabel is not supported: "),
        "{message}"
    );
    spec["linux"]["mountLabel"] = json!(null);
    spec["mounts"][0]["type"] = json!("nfs");
    let (code, message) = refusal(agent.create(&id, &spec, None).await);
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert!(
        message.ends_with("mounts[0].type \"nfs\" is not supported"),
        "{message}"
    );
    agent.remove_root(&id);
}

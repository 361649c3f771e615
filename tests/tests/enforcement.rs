//! What a container may not do, the guest's kernel forbids: filters of system calls, AppArmor, limits; and
//! nothing that a container does to itself takes the agent from the others.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use walnut_agent_api::containerd::ttrpc::Code;
use walnut_tests::{
    bundle::{Spec, process},
    guest::Guest,
    requirement,
    story::tell,
    task::{Stdio, refused},
};
use walnut_vmm_api::VmmExit;

/// What `ctr run --seccomp` writes.
const CONTAINERDS: &str =
    include_str!("../../guest-agent/src/container/testdata/seccomp-containerd.json");
/// A process that a signal ended.
const SIGNALLED: u32 = 128;
const SIGSYS: u32 = 31;

#[test]
fn a_container_is_held_to_what_it_was_given() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let mut guest = Guest::boot(&programs)?;
    guest.agent.setup()?;
    tell(
        &mut guest,
        &[
            ("containerd's filter is in force", containerds_filter),
            ("each action is what it says", actions),
            ("added processes live under the filter", added_processes),
            ("what a filter cannot have is named", refused_filters),
            ("AppArmor holds root", apparmor),
            ("unknown profiles of AppArmor are named", unknown_profiles),
            ("root has no power over the guest", isolation),
            ("memory runs out for who uses it", memory),
            ("processes and tmpfs run out for who uses them", exhaustion),
        ],
    )?;
    guest.agent.shutdown().context("shutdown")?;
    guest.vm.wait()?.ends_with(VmmExit::Ended)?;
    Ok(())
}

fn containerds_profile() -> Value {
    serde_json::from_str(CONTAINERDS).unwrap_or_default()
}

fn expect(
    guest: &mut Guest,
    spec: impl FnOnce(Spec) -> Spec,
    script: &str,
    text: &str,
) -> Result<()> {
    let outcome = guest.run(spec, script, b"")?;
    ensure!(
        outcome.text() == text,
        "{:?} {}",
        outcome.text(),
        outcome.stderr
    );
    Ok(())
}

fn containerds_filter(guest: &mut Guest) -> Result<()> {
    let script = "grep -E '^Seccomp|NoNewPrivs|CapPrm' /proc/self/status
        busybox unshare -r true 2>/dev/null; echo $?
        busybox unshare -r true 2>&1 | grep -o 'not permitted'; ls / > /dev/null && echo works";
    for (user, no_new_privileges, capabilities) in
        [(0, true, "eb"), (0, false, "eb"), (1000, false, "00")]
    {
        let confined = |spec: Spec| {
            spec.with("/linux/seccomp", containerds_profile())
                .with("/process/user/uid", json!(user))
                .with("/process/noNewPrivileges", json!(no_new_privileges))
        };
        let text = format!(
            "CapPrm:\t00000000000000{capabilities}\nNoNewPrivs:\t{}\nSeccomp:\t2\nSeccomp_filters:\t1\n1\nnot permitted\nworks\n",
            u8::from(no_new_privileges)
        );
        expect(guest, confined, script, &text).with_context(|| format!("as {user}"))?;
    }
    Ok(())
}

fn forbidding(name: &str, action: &str) -> impl FnOnce(Spec) -> Spec {
    let rule = json!({ "names": [name, "no_such_call"], "action": action });
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [rule],
    });
    |spec: Spec| spec.with("/linux/seccomp", profile)
}

fn actions(guest: &mut Guest) -> Result<()> {
    for (action, status) in [
        ("SCMP_ACT_ALLOW", 0),
        ("SCMP_ACT_LOG", 0),
        ("SCMP_ACT_ERRNO", 1),
        // Nobody traces it.
        ("SCMP_ACT_TRACE", 1),
        ("SCMP_ACT_TRAP", SIGNALLED + SIGSYS),
        ("SCMP_ACT_KILL", SIGNALLED + SIGSYS),
        ("SCMP_ACT_KILL_PROCESS", SIGNALLED + SIGSYS),
    ] {
        let script = "exec busybox mkdir /dev/shm/made";
        let outcome = guest.run(forbidding("mkdir", action), script, b"")?;
        ensure!(outcome.status == status, "{action}: {outcome:?}");
    }
    // The program of a container is its first call under the filter.
    let id = guest.name();
    let spec = forbidding("execve", "SCMP_ACT_ERRNO")(guest.spec(&id, &["true"]));
    guest.agent.create(&id, spec.to_json(), &Stdio::default())?;
    let started = guest.agent.tasks.start(&id, "");
    refused(
        started,
        Code::INVALID_ARGUMENT,
        &["operation not permitted"],
    )?;
    guest.agent.tasks.delete(&id, "")?;
    Ok(())
}

fn added_processes(guest: &mut Guest) -> Result<()> {
    let id = guest.name();
    let spec = guest
        .spec(&id, &["sleep", "100000"])
        .with("/linux/seccomp", containerds_profile())
        .with("/process/apparmorProfile", json!("docker-default"));
    guest.agent.create(&id, spec.to_json(), &Stdio::default())?;
    guest.agent.tasks.start(&id, "")?;
    let (name, stream) = guest.agent.open_stream()?;
    let stdio = Stdio {
        stdout: name,
        ..Stdio::default()
    };
    let script = "grep Seccomp: /proc/self/status; cat /proc/self/attr/apparmor/current";
    let added = process(&["busybox", "sh", "-c", script]);
    let tasks = &guest.agent.tasks;
    tasks.exec(&id, "added", &added, &stdio)?;
    tasks.start(&id, "added")?;
    ensure!(tasks.wait(&id, "added")? == 0);
    let text = stream.read_text()?;
    ensure!(
        text == "Seccomp:\t2\ndocker-default (enforce)\n",
        "{text:?}"
    );
    ensure!(guest.remove(&id)? == 137, "no 137");
    Ok(())
}

fn refused_filters(guest: &mut Guest) -> Result<()> {
    let notify = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "listenerPath": "/run/listener.sock",
        "syscalls": [{ "names": ["mount"], "action": "SCMP_ACT_NOTIFY" }],
    });
    let unknown = json!({ "defaultAction": "SCMP_ACT_PERHAPS" });
    for (profile, code, words) in [
        (notify, Code::UNIMPLEMENTED, "/run/listener.sock"),
        (unknown, Code::INVALID_ARGUMENT, "SCMP_ACT_PERHAPS"),
    ] {
        let id = guest.name();
        let spec = guest.spec(&id, &["true"]).with("/linux/seccomp", profile);
        let answer = guest.agent.create(&id, spec.to_json(), &Stdio::default());
        refused(answer, code, &[words])?;
    }
    Ok(())
}

fn apparmor(guest: &mut Guest) -> Result<()> {
    expect(
        guest,
        |spec| spec.with("/process/apparmorProfile", json!("unconfined")),
        "cat /proc/self/attr/apparmor/current",
        "unconfined\n",
    )?;
    let powerful = json!(["CAP_SYS_ADMIN", "CAP_KILL", "CAP_DAC_OVERRIDE"]);
    let confined = |spec: Spec| {
        let mut capabilities = json!({});
        for set in ["bounding", "effective", "permitted"] {
            capabilities[set] = powerful.clone();
        }
        spec.with(
            "/process/apparmorProfile",
            json!("cri-containerd.apparmor.d"),
        )
        .with("/process/capabilities", capabilities)
    };
    let script = "cat /proc/self/attr/apparmor/current
        busybox mount -t tmpfs none /tmp 2>&1 | grep -o 'Permission denied'
        echo b > /proc/sysrq-trigger 2>/dev/null || echo held
        head -c1 /proc/kcore 2>/dev/null | wc -c
        sleep 1000 & kill $!; wait $!; echo $?
        echo file > /tmp/file && cat /tmp/file && rm /tmp/file 2>/dev/null; busybox rm -f /tmp/file";
    expect(
        guest,
        confined,
        script,
        "cri-containerd.apparmor.d (enforce)\nPermission denied\nheld\n0\n143\nfile\n",
    )
}

fn unknown_profiles(guest: &mut Guest) -> Result<()> {
    let id = guest.name();
    let spec = guest
        .spec(&id, &["true"])
        .with("/process/apparmorProfile", json!("my-own"));
    let answer = guest.agent.create(&id, spec.to_json(), &Stdio::default());
    let words = ["apparmorProfile", "my-own", "docker-default"];
    refused(answer, Code::INVALID_ARGUMENT, &words)
}

/// Each line that a container without extra capabilities must not get to print.
fn isolation(guest: &mut Guest) -> Result<()> {
    let neighbour = guest.stay()?;
    let script = "busybox mount -t tmpfs none /tmp 2>/dev/null && echo mounted
        busybox reboot -f 2>/dev/null && echo rebooted
        busybox insmod /bin/busybox 2>/dev/null && echo loaded
        busybox mknod /tmp/mem c 1 1 2>/dev/null && head -c1 /tmp/mem && echo memory
        echo 1 > /proc/sys/kernel/panic && echo sysctl
        grep -l walnut /proc/[0-9]*/cmdline; ls -d /init /apparmor /run/walnut 2>/dev/null
        cat /proc/1/cmdline | head -c2; echo; grep -c . /proc/net/unix";
    let outcome = guest.run(|spec| spec, &format!("({script}) 2>/dev/null"), b"")?;
    // The first process is the container's own; the one line of /proc/net/unix is its heading.
    ensure!(outcome.text() == "sh\n1\n", "{outcome:?}");
    guest.remove(&neighbour)?;
    Ok(())
}

fn memory(guest: &mut Guest) -> Result<()> {
    let neighbour = guest.stay()?;
    // No limit of its own.
    let outcome = guest.run(
        |spec| spec,
        "exec head -c 2000000000 /dev/zero | tail -n1",
        b"",
    )?;
    ensure!(outcome.status == 137, "{outcome:?}");
    expect(guest, |spec| spec, "echo well", "well\n")?;
    ensure!(guest.remove(&neighbour)? == 137);
    Ok(())
}

fn exhaustion(guest: &mut Guest) -> Result<()> {
    let limits = json!({ "pids": { "limit": 40 }, "memory": { "limit": 64 << 20 } });
    let limited = |spec: Spec| spec.with("/linux/resources", limits.clone());
    let bomb = "f() { f | f & }; f; exec sleep 1";
    guest.run(limited, bomb, b"")?;
    expect(guest, |spec| spec, "echo well", "well\n")?;
    let fill = "dd if=/dev/zero of=/dev/shm/full bs=1M count=200 2>/dev/null; echo $?";
    let outcome = guest.run(limited, fill, b"")?;
    ensure!(outcome.text() != "0\n", "{outcome:?}");
    expect(guest, |spec| spec, "echo well", "well\n")
}

//! What a container may not do, the guest's kernel forbids: filters of system calls, AppArmor, limits; and
//! nothing that a container does to itself takes the agent from the others.

mod exhaustion;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{fs, path::Path, process::Command};
use walnut_agent_api::{containerd::ttrpc::Code, features::APPARMOR_PROFILES};
use walnut_tests::{
    bundle::{Spec, process},
    command::{self, End},
    ctr::{BUSYBOX, DEBIAN, Runtime},
    deadline::{self, Deadline},
    guest::Guest,
    leak::Leak,
    requirement,
    story::tell,
    task::{Stdio, refused},
};
use walnut_vmm_api::VmmExit;

/// What `ctr run --seccomp` writes.
const CONTAINERDS: &str =
    include_str!("../../../guest-agent/src/container/testdata/seccomp-containerd.json");
/// A profile that the guest's image does not have, compiled; its text is beside it.
const POLICY: &[u8] = include_bytes!("../../apparmor/walnut-deny-write");
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
            ("the host gives profiles of its own", own_profiles),
            ("root has no power over the guest", isolation),
            ("programs end as they say", ends),
            ("memory runs out for who uses it", exhaustion::memory),
            (
                "processes and tmpfs run out for who uses them",
                exhaustion::processes,
            ),
            ("files run out for who opens them", exhaustion::files),
        ],
    )?;
    guest.agent.shutdown().context("shutdown")?;
    guest.vm.wait()?.ends_with(VmmExit::Ended)?;
    Ok(())
}

fn containerds_profile() -> Value {
    serde_json::from_str(CONTAINERDS).unwrap_or_default()
}

fn prints(
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
        prints(guest, confined, script, &text).with_context(|| format!("as {user}"))?;
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
    prints(
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
    prints(
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
    // What the contract says the image has, it has.
    let known = format!("{APPARMOR_PROFILES:?}");
    let words = ["apparmorProfile", "my-own", &known];
    refused(answer, Code::INVALID_ARGUMENT, &words)
}

/// Prints its profile, and whether `/tmp/kept` can be written.
const CONFINED: &str = "cat /proc/self/attr/apparmor/current
    echo kept > /tmp/kept || echo held; echo other > /tmp/other && cat /tmp/other";

fn own_profiles(guest: &mut Guest) -> Result<()> {
    for (name, policy, words) in [
        ("docker-default", POLICY, "walnut-deny-write"),
        ("walnut-deny-write", &POLICY[..100], "kernel takes"),
        ("nothing", b"nothing".as_slice(), "holds the profiles []"),
    ] {
        let answer = guest.agent.load_profile(name, policy);
        refused(answer, Code::INVALID_ARGUMENT, &[name, words])?;
    }
    // A second time is as good as the first.
    guest.agent.load_profile("walnut-deny-write", POLICY)?;
    guest.agent.load_profile("walnut-deny-write", POLICY)?;
    let text = "walnut-deny-write (enforce)\nheld\nother\n";
    let confined = |spec: Spec| spec.with("/process/apparmorProfile", json!("walnut-deny-write"));
    prints(guest, confined, &format!("({CONFINED}) 2>/dev/null"), text)
}

/// Each line that a container without extra capabilities must not get to print.
fn isolation(guest: &mut Guest) -> Result<()> {
    let neighbour = guest.stay()?;
    let script = "busybox mount -t tmpfs none /tmp && echo mounted
        busybox reboot -f && echo rebooted
        busybox insmod /bin/busybox && echo loaded
        busybox mknod /tmp/mem c 1 1 && head -c1 /tmp/mem && echo memory
        echo 1 > /proc/sys/kernel/panic && echo sysctl
        kill -9 -1
        ls -d /init /apparmor /run/walnut /proc/1/root/init
        grep -E '[/@]' /proc/net/unix | grep -v Path
        tr '\\0' '\\n' < /proc/1/cmdline | head -n1; ls /proc | grep -cE '^[0-9]'";
    let confined = |spec: Spec| spec.with("/linux/readonlyPaths", json!(["/proc/sys"]));
    let outcome = guest.run(confined, &format!("({script}) 2>/dev/null"), b"")?;
    // Its own first process, and few more that are its own.
    let text = outcome.text();
    let own: Vec<&str> = text.lines().collect();
    ensure!(
        matches!(own[..], ["sh", count] if count.len() == 1),
        "{own:?} {}",
        outcome.stderr
    );
    ensure!(guest.remove(&neighbour)? == 137, "the neighbour was gone");
    Ok(())
}

/// What runc's users know of programs that are none, and of first processes that leave others behind.
fn ends(guest: &mut Guest) -> Result<()> {
    let script = "printf 'echo no interpreter\\n' > /bin/plain; busybox chmod 755 /bin/plain";
    prints(guest, |spec| spec, script, "")?;
    let id = guest.name();
    let spec = guest.spec(&id, &["/bin/plain"]);
    guest.agent.create(&id, spec.to_json(), &Stdio::default())?;
    let started = guest.agent.tasks.start(&id, "");
    refused(
        started,
        Code::INVALID_ARGUMENT,
        &["/bin/plain", "exec format error"],
    )?;
    guest.agent.tasks.delete(&id, "")?;
    // The daemon holds nothing of the container's streams, and ends with its first process.
    let daemon = "busybox setsid sleep 100000 > /dev/null 2>&1 < /dev/null & exit 7";
    let outcome = guest.run(|spec| spec, daemon, b"")?;
    ensure!(outcome.status == 7, "{outcome:?}");
    let outcome = guest.run(|spec| spec, "kill -SEGV $$; exec busybox kill -SEGV 1", b"")?;
    // PID 1 of a namespace is spared.
    ensure!(outcome.status == 0, "{outcome:?}");
    Ok(())
}

/// What a container with containerd's filter may do, and then that it has little memory.
const FILTERED: &str = r#"
$| = 1;
open F, "/proc/self/status"; print grep /^Seccomp/, <F>;
sub call { syscall(shift, map { 0 + $_ } @_) >= 0 ? "made" : 0 + $! }
# unshare, mount, reboot, one of the future, clone3; personality and socket with two arguments each; then whether the
# program may make a domain of Landlock's, by asking for its version.
print join(" ", call(272, 0x10000000), call(165, (0) x 5), call(169, (0) x 4), call(9999), call(435, 0, 0)), "\n";
print join(" ", call(135, 8), call(135, 9), call(41, 1, 1, 0), call(41, 40, 1, 0), call(444, 0, 0, 1)), "\n";
system q{head -c 200000000 /dev/zero | tail -c 200000000 > /dev/null; echo $?};
"#;

#[test]
fn containerds_filter_and_limits_are_as_under_runc() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let mut found = Vec::new();
    for runtime in [Runtime::Walnut, Runtime::Runc] {
        let events = command::start(Command::new("ctr").arg("events"), Vec::new())?;
        let run = runtime
            .run(DEBIAN)
            .flag("--seccomp")
            .flag("--memory-limit=67108864")
            .command(&["perl", "-e", FILTERED]);
        let id = run.id().to_owned();
        let output = run
            .finish()?
            .success()
            .with_context(|| format!("{runtime:?}"))?;
        events.signal(Signal::TERM)?;
        let told = events.wait(Deadline::after(deadline::REQUEST))?.text();
        let is_told = told
            .lines()
            .any(|line| line.contains("/tasks/oom") && line.contains(&id));
        ensure!(is_told, "{runtime:?} publishes no /tasks/oom: {told}");
        found.push(output.text());
    }
    let runc = &found[1];
    ensure!(
        runc.ends_with("\n1 1 1 38 38\nmade 1 made 1 made\n137"),
        "{runc}"
    );
    ensure!(runc.starts_with("Seccomp:\t2\n"), "{runc}");
    ensure!(found[0] == *runc, "walnut: {}\nrunc: {runc}", found[0]);
    leak.nothing_left()
}

#[test]
fn a_profile_of_the_node_confines_a_container() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let run = |name: &str| {
        let run = Runtime::Walnut.run(BUSYBOX);
        run.flag(&format!("--apparmor-profile={name}"))
    };
    let output = run("nobodys").shell(CONFINED).finish()?;
    let words = "\"nobodys\" is neither one of the guest's own";
    ensure!(output.end != End::Exited(0), "{output:?}");
    ensure!(output.stderr.contains(words), "{output:?}");
    let folder = Path::new("/etc/walnut/apparmor.d");
    ensure!(
        output.stderr.contains("/etc/walnut/apparmor.d"),
        "{output:?}"
    );

    fs::create_dir_all(folder)?;
    fs::write(folder.join("walnut-deny-write"), POLICY)?;
    let output = run("walnut-deny-write").shell(CONFINED).finish();
    fs::remove_dir_all(folder)?;
    let output = output?;
    let text = "walnut-deny-write (enforce)\nheld\nother";
    ensure!(output.text() == text, "{output:?}");
    leak.nothing_left()
}

/// The agent's ports and one of the host's, by every id that could lead there: nobody answers.
const SOCKETS: &str = "
import socket
def answers(cid, port):
    try:
        s = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        s.settimeout(10)
        s.connect((cid, port))
        s.send(bytes(8))
        return len(s.recv(1)) > 0
    except TimeoutError:
        return True
    except OSError:
        return False
print([(cid, port) for cid in (1, 2, 3) for port in (22, 1023, 1024, 1025) if answers(cid, port)])
";

#[test]
fn no_socket_leads_to_the_agent_or_the_host() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let run = Runtime::Walnut.run(DEBIAN);
    let output = run.command(&["python3", "-c", SOCKETS]).finish()?;
    ensure!(
        output.end == End::Exited(0) && output.text() == "[]",
        "{output:?}"
    );
    Ok(())
}

//! The agent in a VM, without containerd: containers, processes, streams, and what it refuses.

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use walnut_agent_api::containerd::{api::Status, ttrpc};
use walnut_tests::{
    bundle::{Spec, process},
    guest::{Guest, SIGKILL},
    requirement,
    story::tell,
    task::{Stdio, refusal, refused},
};
use walnut_vmm_api::VmmExit;

const MIB: usize = 1 << 20;
const SIGTERM: u32 = 15;

#[test]
fn containers_run_in_one_guest() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let mut guest = Guest::boot(&programs)?;
    tell(
        &mut guest,
        &[
            ("before setup nothing is served", before_setup),
            ("setup happens once", setup),
            ("output and status arrive", output_and_status),
            ("the process is as configured", configured),
            ("input arrives", input),
            (
                "8 MiB of a process that ends at once arrive",
                output_at_exit,
            ),
            ("states follow each other", states),
            ("signals end a process", signals),
            ("processes are added", added_processes),
            ("limits are set", limits),
            ("a terminal is one", terminal),
            ("what is not supported is named", unsupported),
            ("what cannot be run is named", not_runnable),
            ("unknown names are not found", not_found),
        ],
    )?;
    // Containers that still run don't hold the guest up.
    guest.stay()?;
    guest.agent.shutdown().context("shutdown")?;
    guest.vm.wait()?.ends_with(VmmExit::Ended)?;
    Ok(())
}

fn before_setup(guest: &mut Guest) -> Result<()> {
    let spec = guest.spec("early", &["true"]).to_json();
    let early = guest.agent.create("early", spec, &Stdio::default());
    ensure!(early.is_err(), "a container without a share was created");
    Ok(())
}

fn setup(guest: &mut Guest) -> Result<()> {
    let release = guest.agent.setup()?.kernel_release;
    ensure!(!release.is_empty(), "no kernel release");
    let second = guest.agent.setup();
    refused(second, ttrpc::Code::FAILED_PRECONDITION, &[])?;
    let outcome = guest.run(|spec| spec, "uname -r", b"")?;
    ensure!(outcome.text().trim() == release, "setup says {release}");
    Ok(())
}

fn output_and_status(guest: &mut Guest) -> Result<()> {
    let outcome = guest.run(|spec| spec, "echo out; echo err >&2; exit 42", b"")?;
    ensure!(outcome.status == 42, "{}", outcome.status);
    ensure!(outcome.stdout == b"out\n" && outcome.stderr == "err\n");
    Ok(())
}

fn configured(guest: &mut Guest) -> Result<()> {
    let user = json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o27 });
    let limits = json!([{ "type": "RLIMIT_NOFILE", "soft": 100, "hard": 200 }]);
    let change = |spec: Spec| {
        spec.with("/process/user", user)
            .with("/process/cwd", json!("/tmp"))
            .with("/process/rlimits", limits)
            .with("/hostname", json!("chosen"))
    };
    let script = "pwd; id -u; id -g; id -G; hostname; echo $GREETING; echo $$; umask
        ulimit -Sn; ulimit -Hn; cat /proc/self/oom_score_adj
        grep -E 'CapEff|CapBnd|NoNewPrivs' /proc/self/status; ls -A /dev/pts; mount | grep -c ' /proc '";
    let outcome = guest.run(change, script, b"")?;
    let text = outcome.text();
    let found: Vec<&str> = text.lines().map(str::trim).collect();
    // A process that is no longer root has no effective capability, and still a bounding set.
    let expected = [
        "/tmp",
        "1000",
        "1001",
        "1001 5 6",
        "chosen",
        "hello",
        "1",
        "0027",
        "100",
        "200",
        "0",
        "CapEff:\t0000000000000000",
        "CapBnd:\t00000000000000eb",
        "NoNewPrivs:\t1",
        "ptmx",
        "1",
    ];
    ensure!(
        found == expected,
        "found {found:?}, expected {expected:?}, {}",
        outcome.stderr
    );
    Ok(())
}

fn input(guest: &mut Guest) -> Result<()> {
    let bytes: Vec<u8> = (0..MIB)
        .map(|at| u8::try_from(at % 251).unwrap_or(0))
        .collect();
    let outcome = guest.run(|spec| spec, "cat", &bytes)?;
    ensure!(
        outcome.stdout == bytes,
        "{} of {MIB} bytes came back",
        outcome.stdout.len()
    );
    Ok(())
}

fn output_at_exit(guest: &mut Guest) -> Result<()> {
    let length = 8 * MIB;
    let outcome = guest.run(
        |spec| spec,
        &format!("exec head -c {length} /dev/zero"),
        b"",
    )?;
    ensure!(
        outcome.stdout.len() == length,
        "{} of {length} bytes",
        outcome.stdout.len()
    );
    Ok(())
}

fn states(guest: &mut Guest) -> Result<()> {
    let id = guest.name();
    let spec = guest.spec(&id, &["sleep", "100000"]).to_json();
    let pid = guest.agent.create(&id, spec.clone(), &Stdio::default())?;
    let tasks = &guest.agent.tasks;
    let status = || anyhow::Ok(tasks.state(&id, "")?.status.enum_value_or_default());
    ensure!(status()? == Status::CREATED, "{:?}", status()?);
    refused(
        guest.agent.create(&id, spec, &Stdio::default()),
        ttrpc::Code::ALREADY_EXISTS,
        &[&id],
    )?;
    ensure!(tasks.start(&id, "")? == pid, "another pid at start");
    ensure!(status()? == Status::RUNNING, "{:?}", status()?);
    ensure!(tasks.start(&id, "").is_err(), "started twice");
    ensure!(tasks.delete(&id, "").is_err(), "deleted while it ran");
    tasks.kill(&id, "", SIGKILL, false)?;
    ensure!(tasks.wait(&id, "")? == 137, "no 137");
    let stopped = tasks.state(&id, "")?;
    ensure!(
        stopped.status.enum_value_or_default() == Status::STOPPED,
        "{stopped}"
    );
    ensure!(
        stopped.exit_status == 137 && stopped.exited_at.is_some(),
        "{stopped}"
    );
    tasks.delete(&id, "")?;
    refused(tasks.state(&id, ""), ttrpc::Code::NOT_FOUND, &[&id])
}

fn signals(guest: &mut Guest) -> Result<()> {
    let id = guest.stay()?;
    let tasks = &guest.agent.tasks;
    // PID 1 of a namespace is spared signals that it has no handler for; an added process is not.
    tasks.exec(
        &id,
        "victim",
        &process(&["sleep", "100000"]),
        &Stdio::default(),
    )?;
    tasks.start(&id, "victim")?;
    tasks.kill(&id, "victim", SIGTERM, false)?;
    ensure!(tasks.wait(&id, "victim")? == 143, "no 143");
    tasks.delete(&id, "victim")?;
    ensure!(guest.remove(&id)? == 137, "no 137");
    Ok(())
}

fn added_processes(guest: &mut Guest) -> Result<()> {
    let id = guest.stay()?;
    let (name, stream) = guest.agent.open_stream()?;
    let stdio = Stdio {
        stdout: name,
        ..Stdio::default()
    };
    let script = "tr '\\0' ' ' < /proc/1/cmdline; hostname; exit 5";
    let tasks = &guest.agent.tasks;
    tasks.exec(
        &id,
        "added",
        &process(&["busybox", "sh", "-c", script]),
        &stdio,
    )?;
    refused(
        tasks.exec(&id, "added", &process(&["true"]), &Stdio::default()),
        ttrpc::Code::ALREADY_EXISTS,
        &["added"],
    )?;
    tasks.start(&id, "added")?;
    ensure!(tasks.wait(&id, "added")? == 5, "no 5");
    let text = stream.read_text()?;
    ensure!(text == "sleep 100000 tested\n", "{text:?}");
    ensure!(tasks.delete(&id, "added")? == 5, "no 5");
    guest.remove(&id)?;
    Ok(())
}

fn limits(guest: &mut Guest) -> Result<()> {
    let resources = json!({
        "memory": { "limit": 64 << 20 },
        "pids": { "limit": 17 },
        "cpu": { "quota": 50_000, "period": 100_000, "shares": 512 },
    });
    let change = |spec: Spec| {
        spec.with("/linux/resources", resources).with(
            "/mounts",
            json!([
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] },
                { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] },
            ]),
        )
        .with(
            "/linux/namespaces",
            json!([{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" }]),
        )
    };
    let script = "cd /sys/fs/cgroup; cat memory.max pids.max cpu.max; cat /proc/self/cgroup";
    let outcome = guest.run(change, script, b"")?;
    let expected = "67108864\n17\n50000 100000\n0::/\n";
    ensure!(
        outcome.text() == expected,
        "{:?} {}",
        outcome.text(),
        outcome.stderr
    );
    Ok(())
}

fn terminal(guest: &mut Guest) -> Result<()> {
    let id = guest.name();
    let mut terminal_process = process(&[
        "sh",
        "-c",
        "stty size; read line; echo got $line; test -t 2",
    ]);
    terminal_process["terminal"] = json!(true);
    terminal_process["consoleSize"] = json!({ "height": 33, "width": 77 });
    let spec = guest.spec(&id, &[]).with("/process", terminal_process);
    let (input, mut keyboard) = guest.agent.open_stream()?;
    let (output, screen) = guest.agent.open_stream()?;
    let stdio = Stdio {
        stdin: input,
        stdout: output,
        terminal: true,
        ..Stdio::default()
    };
    guest.agent.create(&id, spec.to_json(), &stdio)?;
    let tasks = &guest.agent.tasks;
    tasks.start(&id, "")?;
    keyboard.write(b"typed\n")?;
    ensure!(tasks.wait(&id, "")? == 0, "standard error is no terminal");
    let shown = screen.read_text()?;
    tasks.delete(&id, "")?;
    ensure!(shown.contains("33 77"), "no size: {shown:?}");
    ensure!(shown.contains("got typed"), "no input: {shown:?}");
    Ok(())
}

fn unsupported(guest: &mut Guest) -> Result<()> {
    let cases: [(&str, Value, &str); 4] = [
        (
            "/hooks",
            json!({ "prestart": [{ "path": "/bin/true" }] }),
            "hooks.prestart",
        ),
        (
            "/process/selinuxLabel",
            json!("label"),
            "process.selinuxLabel",
        ),
        (
            "/linux/intelRdt",
            json!({ "closID": "x" }),
            "linux.intelRdt",
        ),
        (
            "/linux/namespaces",
            json!([{ "type": "mount" }, { "type": "network" }]),
            "linux.namespaces[network]",
        ),
    ];
    for (pointer, value, named) in cases {
        let id = guest.name();
        let spec = guest.spec(&id, &["true"]).with(pointer, value).to_json();
        let answer = guest.agent.create(&id, spec, &Stdio::default());
        refused(answer, ttrpc::Code::UNIMPLEMENTED, &[named])
            .with_context(|| format!("for {pointer}"))?;
    }
    let id = guest.name();
    let garbage = guest.agent.create(&id, b"{".to_vec(), &Stdio::default());
    refused(garbage, ttrpc::Code::INVALID_ARGUMENT, &[])
}

fn not_runnable(guest: &mut Guest) -> Result<()> {
    for (program, reason) in [
        ("/etc/plain", "ermission"),
        ("nosuchprogram", "nosuchprogram"),
    ] {
        let id = guest.name();
        let spec = guest.spec(&id, &[program]).to_json();
        let tasks = &guest.agent.tasks;
        let answer = guest
            .agent
            .create(&id, spec, &Stdio::default())
            .and_then(|_| tasks.start(&id, ""));
        let Err(error) = answer else {
            bail!("{program} was started");
        };
        let (code, message) = refusal(&error)?;
        ensure!(
            message.contains(program) && message.contains(reason),
            "{code:?}: {message}"
        );
        // A container that could not start leaves its name free, at the latest once it is deleted.
        let _ = tasks.delete(&id, "");
        refused(tasks.state(&id, ""), ttrpc::Code::NOT_FOUND, &[])?;
    }
    Ok(())
}

fn not_found(guest: &mut Guest) -> Result<()> {
    let tasks = &guest.agent.tasks;
    let code = ttrpc::Code::NOT_FOUND;
    refused(tasks.start("ghost", ""), code, &["ghost"])?;
    refused(tasks.wait("ghost", ""), code, &["ghost"])?;
    refused(tasks.kill("ghost", "", SIGKILL, false), code, &["ghost"])?;
    refused(tasks.delete("ghost", ""), code, &["ghost"])?;
    refused(
        tasks.exec("ghost", "one", &process(&["true"]), &Stdio::default()),
        code,
        &["ghost"],
    )?;
    let id = guest.stay()?;
    refused(guest.agent.tasks.start(&id, "ghost"), code, &["ghost"])?;
    guest.remove(&id)?;
    Ok(())
}

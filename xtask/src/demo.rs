//! `cargo xtask demo`: containers in microVMs, shown step by step. A step that doesn't show what it
//! should ends it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::container_images::{BUSYBOX, DEBIAN};
use crate::lab::client::{Capture, Client};
use crate::prepare;
use crate::programs::Targets;
use crate::progress::Progress;
use crate::project::Project;

/// The runtime that this project is.
const WALNUT: &str = "io.containerd.walnut.v2";

/// The runtime that it is compared with.
const RUNC: &str = "io.containerd.runc.v2";

/// An emulated lab takes some seconds for a container.
const STEP_LIMIT: Duration = Duration::from_secs(240);

/// Shows everything.
pub(crate) fn run(project: &Project, progress: Progress) -> Result<()> {
    prepare::build(project, Targets::Programs, progress)?;
    let client = prepare::fresh_lab(project, progress)?.client();
    let demo = Demo { client };
    println!();
    demo.kernels()?;
    demo.programs()?;
    demo.exec_into_running()?;
    demo.server()?;
    demo.nothing_left()?;
    println!("\nEvery container above ran on a kernel of its own.");
    println!("Try it: cargo xtask lab shell, then");
    println!("  ctr run --rm -t --runtime {WALNUT} {DEBIAN} mine bash");
    Ok(())
}

struct Demo {
    client: Client,
}

impl Demo {
    /// Each microVM has its own kernel, whatever the image; runc has the node's.
    fn kernels(&self) -> Result<()> {
        let machine = std::fs::read_to_string("/proc/sys/kernel/osrelease")
            .context("read this machine's kernel release")?;
        println!(
            "{:>9}  {:<44} {}",
            "",
            "kernel of this machine",
            machine.trim()
        );
        let node = self.show("kernel of the node (the lab)", "uname -r")?;
        let runc = self.show(
            "kernel that a runc container sees",
            &once(RUNC, BUSYBOX, "uname -r"),
        )?;
        ensure!(runc == node, "runc's containers must see the node's kernel");
        let ours = self.show(
            "kernel that a walnut container sees",
            &once(WALNUT, BUSYBOX, "uname -r"),
        )?;
        ensure!(
            ours != node,
            "walnut's container sees the node's kernel {node}"
        );
        let debian = once(WALNUT, DEBIAN, "uname -r");
        let debian = self.show("the same, of a Debian image", &debian)?;
        ensure!(debian == ours, "the kernel depends on the image");
        Ok(())
    }

    /// Files of the image, pipelines, exit codes.
    fn programs(&self) -> Result<()> {
        let release = once(WALNUT, DEBIAN, "cat /etc/os-release");
        let release = self.show_line("cat /etc/os-release", &release, "PRETTY_NAME")?;
        ensure!(
            release.contains("Debian"),
            "this is not Debian's /etc/os-release: {release}"
        );
        let pipeline = "sh -c 'seq 1 1000 | grep 7 | sort -r | wc -l'";
        let count = self.show(
            "seq 1 1000 | grep 7 | sort -r | wc -l",
            &once(WALNUT, BUSYBOX, pipeline),
        )?;
        ensure!(count == "271", "the pipeline counts {count}, not 271");
        let python = "python3 -c 'import os; print(sum(range(101)), os.getpid())'";
        let sum = self.show(
            "python3: sum(range(101)), os.getpid()",
            &once(WALNUT, DEBIAN, python),
        )?;
        ensure!(sum == "5050 1", "python prints {sum}");
        let begun = Instant::now();
        let exit = once(WALNUT, BUSYBOX, "sh -c 'exit 42'");
        let (status, output) = self.client.script(&exit, STEP_LIMIT)?;
        ensure!(
            status == 42,
            "exit 42 arrives as {status}: {}",
            error_of(&output)
        );
        line(begun, "exit status of sh -c 'exit 42'", &status.to_string());
        Ok(())
    }

    /// A second process in a container that runs.
    fn exec_into_running(&self) -> Result<()> {
        let start = format!("ctr run --detach --runtime {WALNUT} {BUSYBOX} sleeper sleep 3600");
        self.show("start a container in the background", &start)?;
        let exec = "ctr task exec --exec-id second sleeper sh -c 'uname -r; ps | grep -c [s]leep'";
        let seen = self.show("ctr task exec into it: uname -r, its sleepers", exec)?;
        ensure!(
            seen.ends_with(" 1"),
            "the second process doesn't see the first: {seen}"
        );
        self.show("kill and delete it", &stop("sleeper", "SIGKILL"))?;
        Ok(())
    }

    /// A real server, asked by its own client.
    fn server(&self) -> Result<()> {
        let start = format!(
            "ctr run --detach --runtime {WALNUT} {DEBIAN} redis \
             redis-server --save '' --appendonly no --dir /tmp"
        );
        self.show("start redis-server of the Debian image", &start)?;
        let ask = "ctr task exec --exec-id ask redis sh -c 'for i in $(seq 300); do \
            redis-cli ping >/dev/null 2>&1 && break; sleep 0.1; done; \
            redis-cli set walnut 42 && redis-cli incr walnut && redis-cli info server | \
            grep -a ^os: | tr -d \"\\r\"'";
        let answer = self.show("redis-cli: set, incr, info", ask)?;
        ensure!(
            answer.starts_with("OK 43 os:Linux "),
            "redis answers {answer}"
        );
        self.show("stop it with SIGTERM", &stop("redis", "SIGTERM"))?;
        Ok(())
    }

    /// No process, mount or directory outlives its container.
    fn nothing_left(&self) -> Result<()> {
        let look = "pgrep -af '[w]alnut-vmm|[s]him-walnut' ; ctr task ls -q; ctr container ls -q; \
            findmnt -rno TARGET | grep -a walnut; find /run/walnut -mindepth 2 2>/dev/null; true";
        let left = self.show("left behind on the node", look)?;
        ensure!(left.is_empty(), "something was left behind: {left}");
        Ok(())
    }

    /// Runs a script in the lab and prints its output beside what it shows.
    fn show(&self, what: &str, script: &str) -> Result<String> {
        self.show_line(what, script, "")
    }

    /// As [`Self::show`], but only the first line that starts with `prefix`, if one is given.
    fn show_line(&self, what: &str, script: &str, prefix: &str) -> Result<String> {
        let begun = Instant::now();
        let (status, output) = self.client.script(script, STEP_LIMIT)?;
        if status != 0 {
            bail!("{what}: {script}: status {status}: {}", error_of(&output));
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let text = match text.lines().find(|line| line.starts_with(prefix)) {
            Some(line) if !prefix.is_empty() => line.to_owned(),
            _ => text.split_whitespace().collect::<Vec<_>>().join(" "),
        };
        line(begun, what, if text.is_empty() { "-" } else { &text });
        Ok(text)
    }
}

/// Runs a command in a container that is gone afterwards.
fn once(runtime: &str, image: &str, command: &str) -> String {
    format!("ctr run --rm --runtime {runtime} {image} demo-$RANDOM {command}")
}

/// Ends a container's process, waits for that, and removes the container.
fn stop(name: &str, signal: &str) -> String {
    format!(
        "ctr task kill --signal {signal} {name} && \
         timeout 120 sh -c 'until ctr task ls | grep -q \"^{name} .*STOPPED\"; do sleep 0.1; done' && \
         ctr task rm {name} >/dev/null; ctr container rm {name}"
    )
}

fn line(begun: Instant, what: &str, shown: &str) {
    println!(
        "{:>7.1} s  {what:<44} {shown}",
        begun.elapsed().as_secs_f64()
    );
}

fn error_of(output: &Capture) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    text.trim()
        .lines()
        .last()
        .unwrap_or("no message")
        .to_owned()
}

//! Root file systems and volumes: what is on disks, what is shared, and that both behave as with runc.

mod disks;

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};
use tempfile::TempDir;
use walnut_tests::{
    command,
    ctr::{BUSYBOX, DEBIAN, Runtime},
    deadline::{self, Deadline},
    leak::Leak,
    requirement,
};

const BOTH: [Runtime; 2] = [Runtime::Walnut, Runtime::Runc];
/// Operations at random.
const ROUNDS: &str = "600";

fn bind(source: &Path, target: &str, options: &str) -> String {
    format!(
        "--mount=type=bind,src={},dst={target},options={options}",
        source.display()
    )
}

/// Runs a program of the lab.
fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let mut command = std::process::Command::new(program);
    let deadline = Deadline::after(deadline::BOOT);
    command::run(command.args(arguments), Vec::new(), deadline)?
        .success()
        .with_context(|| format!("{program} {arguments:?}"))?;
    Ok(())
}

/// A file system in memory, of a size, until this value goes.
struct Small(TempDir);

impl Small {
    fn new(bytes: &str) -> Result<Self> {
        let directory = TempDir::with_prefix("walnut-small-")?;
        let options = format!("size={bytes}");
        run(
            "mount",
            &[
                "-t",
                "tmpfs",
                "-o",
                &options,
                "small",
                &directory.path().display().to_string(),
            ],
        )?;
        Ok(Self(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = run("umount", &["--lazy", &self.0.path().display().to_string()]);
    }
}

#[test]
fn a_volume_and_the_root_behave_as_with_runc() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let script = TempDir::with_prefix("walnut-script-")?;
    fs::write(script.path().join("posix.py"), include_str!("posix.py"))?;
    let mut found = Vec::new();
    for runtime in BOTH {
        let volume = TempDir::with_prefix("walnut-volume-")?;
        let both = format!(
            "mkdir /own; for place in /volume /own; do python3 /script/posix.py $place {ROUNDS}; done"
        );
        let output = runtime
            .run(DEBIAN)
            .flag(&bind(script.path(), "/script", "rbind:ro"))
            .flag(&bind(volume.path(), "/volume", "rbind:rw"))
            .command(&["sh", "-c", &both])
            .finish()?
            .success()
            .with_context(|| format!("{runtime:?}"))?;
        // The host sees what was made.
        ensure!(
            fs::read(volume.path().join("b"))? == b"one two",
            "{runtime:?}"
        );
        found.push(output.text());
    }
    let differ: Vec<_> = found[0]
        .lines()
        .zip(found[1].lines())
        .filter(|(ours, theirs)| ours != theirs)
        .collect();
    ensure!(
        found[0] == found[1],
        "walnut and runc differ: {differ:#?}\n{}",
        found[0]
    );
    ensure!(found[0].matches("random True").count() == 2, "{}", found[0]);
    leak.nothing_left()
}

/// What a container sees of volumes that are small, single files, read-only, in parts, or about to go.
const VOLUMES: &str = "
    dd if=/dev/zero of=/small/big bs=64k count=64 2>&1 | grep -o 'No space left on device'
    echo still > /root-file && cat /root-file; rm /small/big; echo fits > /small/fits && cat /small/fits
    cat /file; echo appended >> /file; ls -A /dir-of-file 2>&1 | wc -l
    touch /ro/x 2>&1 | grep -o 'Read-only file system'; touch /ro/below/x 2>&1 | grep -o 'Read-only file system'
    cat /sub/inside; ls -A /sub
    df -k /memory | awk 'END {print $2}'
    echo ready > /small/ready
    until [ -e /small/replaced ]; do sleep 0.2; done; cat /file
    until [ -e /small/swapped ]; do sleep 0.2; done; cat /config/current/key
    until [ -e /small/gone ]; do sleep 0.2; done; cat /vanishing/dir/file 2>&1 | grep -o 'No such file or directory'
    echo alive";

/// What the host has before the container is there.
fn lay_out(host: &Path, below: &Path) -> Result<()> {
    let at = |name: &str| host.join(name);
    for directory in [
        "ro/below",
        "parent/sub",
        "config/one",
        "config/two",
        "vanishing/dir",
    ] {
        fs::create_dir_all(at(directory))?;
    }
    fs::write(at("file"), "original\n")?;
    fs::write(at("parent/sub/inside"), "inside\n")?;
    fs::write(at("vanishing/dir/file"), "there\n")?;
    for (version, text) in [("one", "first\n"), ("two", "second\n")] {
        fs::write(at("config").join(version).join("key"), text)?;
    }
    std::os::unix::fs::symlink("one", at("config/current"))?;
    run(
        "mount",
        &[
            "--bind",
            &below.display().to_string(),
            &at("ro/below").display().to_string(),
        ],
    )?;
    Ok(())
}

/// What the host does while the container looks.
fn change(host: &Path, small: &Path) -> Result<()> {
    let at = |name: &str| host.join(name);
    let here = |name: &str| small.join(name);
    // A file that is a volume is that file, whatever later has its name.
    fs::write(at("new"), "replaced\n")?;
    fs::rename(at("new"), at("file"))?;
    fs::write(here("replaced"), "")?;
    // As the kubelet updates a ConfigMap.
    std::os::unix::fs::symlink("two", at("config/next"))?;
    fs::rename(at("config/next"), at("config/current"))?;
    fs::write(here("swapped"), "")?;
    fs::remove_dir_all(at("vanishing/dir"))?;
    fs::write(here("gone"), "")?;
    Ok(())
}

#[test]
fn volumes_of_every_kind_are_as_with_runc() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let mut found = Vec::new();
    for runtime in BOTH {
        let small = Small::new("1m")?;
        let below = Small::new("1m")?;
        let host = TempDir::with_prefix("walnut-volumes-")?;
        lay_out(host.path(), below.path())?;
        let at = |name: &str| host.path().join(name);
        let (container, running) = runtime
            .run(BUSYBOX)
            .flag(&bind(small.path(), "/small", "rbind:rw"))
            .flag(&bind(&at("file"), "/file", "bind:rw"))
            .flag(&bind(&at("ro"), "/ro", "rbind:rro"))
            .flag(&bind(&at("parent/sub"), "/sub", "rbind:rw"))
            .flag(&bind(&at("config"), "/config", "rbind:ro"))
            .flag(&bind(&at("vanishing"), "/vanishing", "rbind:rw"))
            .flag("--mount=type=tmpfs,src=tmpfs,dst=/memory,options=size=512k")
            .shell(VOLUMES)
            .start()?;
        let here = |name: &str| small.path().join(name);
        deadline::until("the container", Deadline::after(deadline::BOOT), || {
            Ok(here("ready").exists().then_some(()))
        })?;
        change(host.path(), small.path())?;
        let output = running.wait(Deadline::after(deadline::BOOT))?;
        run("umount", &["--lazy", &at("ro/below").display().to_string()])?;
        found.push(
            output
                .success()
                .with_context(|| format!("{runtime:?}"))?
                .text(),
        );
        drop(container);
    }
    ensure!(
        found[0] == found[1],
        "walnut {}\n\nrunc {}",
        found[0],
        found[1]
    );
    for expected in [
        "No space left",
        "original\nappended",
        "second",
        "alive",
        "512",
    ] {
        ensure!(
            found[0].contains(expected),
            "{expected:?} is not in {}",
            found[0]
        );
    }
    leak.nothing_left()
}

/// Walks a path of which the host swaps a directory for a link to the outside, and reads what is there.
const WALKS: &str = "
    touch /volume/started; i=0; while [ $i -lt 40 ]; do
        for path in dir/secret dir/../../secret link/secret dir/secret swap/secret; do
            read -r line 2>/dev/null < /volume/$path && [ \"$line\" = outside ] && echo ESCAPED
        done
        i=$((i + 1))
    done; cat /volume/fifo-of-host /volume/null-of-host < /dev/null | head -c 1 | wc -c; echo walked";

#[test]
fn no_path_of_a_volume_leads_out_of_it() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let host = TempDir::with_prefix("walnut-race-")?;
    let at = |name: &str| host.path().join(name);
    for directory in ["volume/dir", "outside"] {
        fs::create_dir_all(at(directory))?;
    }
    fs::write(at("outside/secret"), "outside\n")?;
    fs::write(at("secret"), "outside\n")?;
    std::os::unix::fs::symlink("../outside", at("volume/link"))?;
    std::os::unix::fs::symlink(at("outside"), at("volume/swap"))?;
    run(
        "mknod",
        &[
            &at("volume/null-of-host").display().to_string(),
            "c",
            "1",
            "3",
        ],
    )?;
    let (container, running) = Runtime::Walnut
        .run(BUSYBOX)
        .flag(&bind(&at("volume"), "/volume", "rbind:rw"))
        .shell(&WALKS.replace("/volume/fifo-of-host ", ""))
        .start()?;
    deadline::until("the container", Deadline::after(deadline::BOOT), || {
        Ok(at("volume/started").exists().then_some(()))
    })?;
    let done = AtomicBool::new(false);
    let output = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                // The directory, a link to the outside, the directory again: each for a moment.
                let _ = rustix::fs::renameat_with(
                    rustix::fs::CWD,
                    at("volume/dir"),
                    rustix::fs::CWD,
                    at("volume/swap"),
                    rustix::fs::RenameFlags::EXCHANGE,
                );
            }
        });
        let output = running.wait(Deadline::after(deadline::BOOT));
        done.store(true, Ordering::Relaxed);
        output
    })?
    .success()?;
    ensure!(output.text() == "0\nwalked", "{output:?}");
    drop(container);
    leak.nothing_left()
}

/// Where the root comes from, and that all of it is there.
const ROOT: &str = "
    awk '$2 == \"/\" {print \"root:\", $1, $3}' /proc/mounts
    find / -xdev -type f | sort | xargs sha256sum | sha256sum; ls /own-mount
    touch /written 2>&1 | grep -o 'Read-only file system'; stat -c '%a %u:%g' /";

#[test]
fn layers_that_are_images_come_as_disks() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let volume = TempDir::with_prefix("walnut-volume-")?;
    let see = |runtime: Runtime, flags: &[&str]| {
        let run = runtime.run(BUSYBOX).flag("--snapshotter=erofs");
        let run = run.flag(&bind(volume.path(), "/own-mount", "rbind:rw"));
        let run = flags.iter().fold(run, |run, flag| run.flag(flag));
        anyhow::Ok(run.shell(ROOT).finish()?.success()?.text())
    };
    let [walnut, runc] = BOTH.map(|runtime| see(runtime, &["--read-only"]));
    let (walnut, runc) = (walnut?, runc?);
    ensure!(walnut == runc, "walnut {walnut}\n\nrunc {runc}");
    ensure!(walnut.contains("root: overlay overlay"), "{walnut}");
    // What is written is to be kept by the host's snapshot, so that the host assembles it.
    let kept = see(Runtime::Walnut, &[])?;
    ensure!(
        kept.contains("root: none virtiofs") || kept.contains("virtiofs"),
        "{kept}"
    );
    leak.nothing_left()
}

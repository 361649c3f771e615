//! Mounts as the snapshotters give them that the lab's containerd isn't set up for, handed to a shim as containerd would.

use super::run;
use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use std::{
    fs,
    io::{Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::{fs::MetadataExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
};
use tempfile::TempDir;
use walnut_agent_api::containerd::{
    api::CreateTaskRequest, api::Mount, api::ShutdownRequest, shim_async::TaskClient,
};
use walnut_tests::{
    bundle::{Spec, busybox_rootfs},
    command::{self, Output},
    deadline::{self, Deadline},
    leak::Leak,
    processes,
    programs::Programs,
    requirement::{self, CONTAINERD_SOCKET},
    task::{Tasks, refusal},
};

/// More than fit on one disk.
const LAYERS: usize = 100;

/// One container of a shim of its own.
struct Pod<'a> {
    programs: &'a Programs,
    bundle: TempDir,
    id: String,
}

impl<'a> Pod<'a> {
    fn new(programs: &'a Programs, name: &str, spec: &Spec) -> Result<Self> {
        let bundle = TempDir::with_prefix("walnut-disks-")?;
        fs::create_dir(bundle.path().join("rootfs"))?;
        fs::write(bundle.path().join("config.json"), spec.to_json())?;
        let id = format!("test-{name}-{}", std::process::id());
        Ok(Self {
            programs,
            bundle,
            id,
        })
    }

    fn shim(&self, word: &str) -> Result<Output> {
        let mut shim = Command::new(&self.programs.shim);
        shim.args([
            "-namespace",
            "walnut-tests",
            "-id",
            &self.id,
            "-address",
            CONTAINERD_SOCKET,
        ])
        .args(["-publish-binary", "/usr/bin/containerd", word])
        .current_dir(self.bundle.path())
        .env("TTRPC_ADDRESS", format!("{CONTAINERD_SOCKET}.ttrpc"))
        .env("MAX_SHIM_VERSION", "3");
        command::run(&mut shim, Vec::new(), Deadline::after(deadline::REQUEST))
    }

    /// Runs it on these mounts to its end; gives its status, or why there is none.
    fn run(&self, rootfs: Vec<Mount>) -> Result<Result<u32, String>> {
        let reply = self.shim("start")?.success()?;
        let reply: Value = serde_json::from_slice(&reply.stdout).context("no reply")?;
        let address = reply["address"].as_str().unwrap_or_default();
        let path = address.strip_prefix("unix://").context("no address")?;
        let tasks = Tasks::over(UnixStream::connect(path)?)?;
        let request = CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.path().display().to_string(),
            rootfs,
            ..Default::default()
        };
        let outcome = match tasks.create(&request) {
            Ok(_) => {
                tasks.start(&self.id, "")?;
                let status = tasks.wait(&self.id, "")?;
                tasks.delete(&self.id, "")?;
                Ok(status)
            }
            Err(error) => Err(refusal(&error)?.1),
        };
        let request = ShutdownRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        // The server may be gone before its answer is out.
        let _ = tasks.call(|client, context| async move {
            TaskClient::new(client).shutdown(context, &request).await
        });
        self.shim("delete")?.success()?;
        Ok(outcome)
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        for process in processes::list().unwrap_or_default() {
            if process.runs("containerd-shim-walnut-v2") && process.command.contains(&self.id) {
                let _ = process.kill(Signal::KILL);
            }
        }
    }
}

fn mount(kind: &str, source: &Path, options: &[String]) -> Mount {
    Mount {
        type_: kind.into(),
        source: source.display().to_string(),
        options: options.to_vec(),
        ..Default::default()
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn shell(script: &str) -> Spec {
    Spec::new("rootfs", &["sh", "-c", script]).networked()
}

/// A loop device over a file, until this value goes.
struct Loop(String);

impl Loop {
    fn over(file: &Path) -> Result<Self> {
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show"]).arg(file);
        let output = command::run(&mut losetup, Vec::new(), Deadline::after(deadline::REQUEST))?;
        Ok(Self(output.success()?.text()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = run("losetup", &["--detach", &self.0]);
    }
}

/// A directory with a busybox, and an image of it.
fn image(directory: &Path, programs: &Programs, kind: &str) -> Result<PathBuf> {
    let tree = directory.join("tree");
    if !tree.exists() {
        fs::create_dir(&tree)?;
        busybox_rootfs(&programs.busybox, &tree)?;
        for applet in ["grep", "rm", "touch"] {
            std::os::unix::fs::symlink("busybox", tree.join("bin").join(applet))?;
        }
    }
    let (image, tree) = (
        directory.join(format!("image.{kind}")),
        tree.display().to_string(),
    );
    let path = image.display().to_string();
    match kind {
        "erofs" => run("mkfs.erofs", &["--quiet", &path, &tree])?,
        _ => run("mke2fs", &["-q", "-t", kind, "-d", &tree, &path, "16M"])?,
    }
    Ok(image)
}

#[test]
fn an_image_is_written_by_the_guest_and_read_by_the_host() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let leak = Leak::watch()?;
    let directory = TempDir::with_prefix("walnut-image-")?;
    let image = image(directory.path(), &programs, "ext4")?;
    // As blockfile gives it; the second time it is a device, as of devmapper.
    let script = "grep -q '^/dev/vda / ext4 rw' /proc/mounts || exit 3
        echo $(cat /kept 2>/dev/null)more > /kept
        dd if=/dev/zero of=/fills bs=1M 2>&1 | grep -q 'No space left' || exit 4
        rm /fills && echo after > /after";
    let pod = Pod::new(&programs, "blockfile", &shell(script))?;
    let status = pod.run(vec![mount("ext4", &image, &words(&["loop", "rw"]))])?;
    ensure!(status == Ok(0), "{status:?}");
    {
        let device = Loop::over(&image)?;
        let status = pod.run(vec![mount(
            "ext4",
            Path::new(&device.0),
            &words(&["rw", "noatime"]),
        )])?;
        ensure!(status == Ok(0), "{status:?}");
    }
    let read_only = "touch /x; test $? = 1 && exec grep -q '/dev/vda / ext4 ro' /proc/mounts";
    let pod = Pod::new(&programs, "view", &shell(read_only))?;
    let status = pod.run(vec![mount("ext4", &image, &words(&["loop", "ro"]))])?;
    ensure!(status == Ok(0), "{status:?}");
    run("e2fsck", &["-fn", &image.display().to_string()])?;
    let place = directory.path().join("mounted");
    fs::create_dir(&place)?;
    run(
        "mount",
        &[
            "-o",
            "loop,ro",
            &image.display().to_string(),
            &place.display().to_string(),
        ],
    )?;
    let kept = fs::read_to_string(place.join("kept"));
    run("umount", &[&place.display().to_string()])?;
    ensure!(kept? == "moremore\n", "what the guest wrote is not there");
    leak.nothing_left()
}

#[test]
fn a_hundred_layers_need_no_hundred_disks() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let leak = Leak::watch()?;
    let directory = TempDir::with_prefix("walnut-layers-")?;
    let base = image(directory.path(), &programs, "erofs")?;
    let mut lower = Vec::new();
    for number in 0..LAYERS {
        let file = match number {
            0 => base.clone(),
            _ => {
                let tree = directory.path().join(format!("layer-{number}"));
                fs::create_dir_all(tree.join("layers"))?;
                fs::write(
                    tree.join("layers").join(number.to_string()),
                    number.to_string(),
                )?;
                fs::write(tree.join("topmost"), number.to_string())?;
                let file = directory.path().join(format!("{number}.erofs"));
                run(
                    "mkfs.erofs",
                    &[
                        "--quiet",
                        &file.display().to_string(),
                        &tree.display().to_string(),
                    ],
                )?;
                file
            }
        };
        let place = directory.path().join(format!("mounted-{number}"));
        fs::create_dir(&place)?;
        run(
            "mount",
            &[
                "-t",
                "erofs",
                "-o",
                "loop",
                &file.display().to_string(),
                &place.display().to_string(),
            ],
        )?;
        lower.insert(0, place.display().to_string());
    }
    let script = format!(
        "test $(ls /layers | wc -l) = {} || exit 3; test $(cat /topmost) = {} || exit 4
        test $(ls /sys/block | wc -l) = 2 || exit 5; cat /layers/* > /dev/null || exit 6
        touch /x; test $? = 1 || exit 7",
        LAYERS - 1,
        LAYERS - 1
    );
    let pod = Pod::new(&programs, "layers", &shell(&script))?;
    let status = pod.run(vec![mount(
        "overlay",
        Path::new("overlay"),
        &[format!("lowerdir={}", lower.join(":"))],
    )]);
    for place in &lower {
        run("umount", &[place])?;
    }
    let status = status?;
    ensure!(status == Ok(0), "{status:?}");
    leak.nothing_left()
}

#[test]
fn block_devices_are_the_containers_own() -> Result<()> {
    let Some(programs) = requirement::containerd()? else {
        return Ok(());
    };
    let leak = Leak::watch()?;
    let directory = TempDir::with_prefix("walnut-devices-")?;
    let root = image(directory.path(), &programs, "erofs")?;
    let data = directory.path().join("data");
    fs::write(&data, b"what the host wrote".repeat(1 << 12))?;
    let device = Loop::over(&data)?;
    let number = fs::metadata(&device.0)?.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let spec = |script: &str, access: &str| {
        shell(script)
            .with("/linux/devices", json!([{ "path": "/dev/data", "type": "b", "major": major, "minor": minor,
                "fileMode": 0o640, "uid": 7, "gid": 8 }]))
            .with("/linux/resources", json!({ "devices": [
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "b", "major": major, "minor": minor, "access": access }] }))
    };
    let rootfs = || vec![mount("erofs", &root, &words(&["loop", "ro"]))];
    let writes = "test \"$(head -c 19 /dev/data)\" = 'what the host wrote' || exit 3
        ls -ln /dev/data | grep -q '^brw-r----- .* 7 .* 8 ' || exit 4
        echo -n 'the guest' | dd of=/dev/data conv=notrunc,fsync 2> /dev/null";
    let status = Pod::new(&programs, "device", &spec(writes, "rwm"))?.run(rootfs())?;
    ensure!(status == Ok(0), "{status:?}");
    let mut start = [0; 19];
    let mut file = fs::File::options().read(true).write(true).open(&device.0)?;
    file.read_exact(&mut start)?;
    ensure!(
        &start == b"the guesthost wrote",
        "{:?}",
        String::from_utf8_lossy(&start)
    );
    file.seek(SeekFrom::Start(0))?;
    file.write_all(b"untouched")?;
    file.sync_all()?;
    let reads = "head -c 9 /dev/data | grep -q untouched || exit 3
        echo x > /dev/data && exit 4; test $(cat /sys/block/vdb/ro) = 1";
    let status = Pod::new(&programs, "reads", &spec(reads, "rm"))?.run(rootfs())?;
    ensure!(status == Ok(0), "{status:?}");
    drop(file);
    drop(device);
    let gone = Pod::new(
        &programs,
        "gone",
        &shell("true").with(
            "/linux/devices",
            json!([{ "path": "/dev/data", "type": "b", "major": 4000, "minor": 1 }]),
        ),
    )?;
    let refused = gone.run(rootfs())?;
    ensure!(
        refused.as_ref().is_err_and(|why| why.contains("4000:1")),
        "{refused:?}"
    );
    leak.nothing_left()
}

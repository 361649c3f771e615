//! What the host changes in a container's read-only volumes: inotify in the container tells of it as with runc,
//! the oracle, and who hears of a change sees it.

use anyhow::{Context, Result, ensure};
use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    os::unix::fs::symlink,
    path::Path,
    time::SystemTime,
};
use walnut_tests::{
    ctr::{DEBIAN, Runtime},
    deadline::{self, Deadline},
    leak::Leak,
    requirement,
};

/// Writes each event of a volume, of the file that a link in it leads to, and of a single file, to a file of its
/// own, with what the volume's key and the file hold then.
const WATCHER: &str = r#"
import ctypes, os, struct
names = {2: "MODIFY", 4: "ATTRIB", 8: "CLOSE_WRITE", 0x40: "MOVED_FROM", 0x80: "MOVED_TO", 0x100: "CREATE",
    0x200: "DELETE", 0x400: "DELETE_SELF", 0x8000: "IGNORED", 0x40000000: "ISDIR"}
libc = ctypes.CDLL(None)
inotify = libc.inotify_init1(0)
watches = {libc.inotify_add_watch(inotify, path.encode(), 0x7ce): path for path in ("/vol", "/vol/key", "/file")}
assert min(watches) > 0
number = 0
def read(path):
    try:
        return open(path).read()
    except OSError as error:
        return os.strerror(error.errno)
def say(line):
    global number
    with open("/out/new", "w") as out:
        out.write(line)
    os.rename("/out/new", "/out/%03d" % number)
    number += 1
say("ready " + read("/vol/key") + read("/file"))
last = name = None
while name != "end":
    data = os.read(inotify, 65536)
    while data:
        watch, mask, cookie, length = struct.unpack_from("iIII", data)
        name = data[16:16 + length].rstrip(b"\0").decode()
        data = data[16 + length:]
        kinds = "|".join(text for bit, text in sorted(names.items()) if mask & bit)
        line = "%s %s %s: %s%s" % (watches[watch], kinds, name, read("/vol/key"), read("/file"))
        if line != last:
            say(line)
        last = line
"#;

/// A ConfigMap as kubelet lays it out.
fn config_map(volume: &Path) -> Result<()> {
    fs::create_dir_all(volume.join("..one"))?;
    fs::write(volume.join("..one/key"), "1")?;
    symlink("..one", volume.join("..data"))?;
    symlink("..data/key", volume.join("key"))?;
    Ok(())
}

/// Its update as kubelet does it; gives when it became visible.
fn update(volume: &Path) -> Result<SystemTime> {
    fs::create_dir(volume.join("..two"))?;
    fs::write(volume.join("..two/key"), "2")?;
    symlink("..two", volume.join("..data_tmp"))?;
    let at = SystemTime::now();
    fs::rename(volume.join("..data_tmp"), volume.join("..data"))?;
    fs::remove_file(volume.join("..one/key"))?;
    fs::remove_dir(volume.join("..one"))?;
    Ok(at)
}

/// The events with what they brought, once there is one that `last` names.
fn events(out: &Path, last: &str) -> Result<Vec<(String, SystemTime)>> {
    let deadline = Deadline::after(deadline::BOOT);
    let mut told = Vec::new();
    let waited = deadline::until(last, deadline, || {
        told.clear();
        for number in 0.. {
            let file = out.join(format!("{number:03}"));
            let Ok(line) = fs::read_to_string(&file) else {
                break;
            };
            told.push((line, fs::metadata(&file)?.modified()?));
        }
        Ok(told.iter().any(|(line, _)| line.contains(last)).then_some(()))
    });
    waited.with_context(|| format!("told were {told:#?}"))?;
    Ok(told)
}

/// Tells one runtime's story; gives what the container heard.
fn hear(runtime: Runtime) -> Result<Vec<String>> {
    let directory = tempfile::tempdir()?;
    let [volume, out, file] = ["volume", "out", "file"].map(|name| directory.path().join(name));
    config_map(&volume)?;
    fs::create_dir(&out)?;
    fs::write(&file, "a")?;
    let mount = |source: &Path, target, mode| {
        let source = source.display();
        format!("--mount=type=bind,src={source},dst={target},options=rbind:{mode}")
    };
    let (_container, running) = runtime
        .run(DEBIAN)
        .flag(&mount(&volume, "/vol", "ro"))
        .flag(&mount(&file, "/file", "ro"))
        .flag(&mount(&out, "/out", "rw"))
        .command(&["python3", "-c", WATCHER])
        .start()?;
    events(&out, "ready 1a")?;
    let renamed = update(&volume)?;
    let told = events(&out, "/vol DELETE|ISDIR ..one")?;
    let heard = told.iter().find(|(line, _)| line.contains("MOVED_TO ..data"));
    let (_, heard) = heard.context("no MOVED_TO of ..data")?;
    eprintln!("{runtime:?}: rename to event: {:?}", heard.duration_since(renamed));
    // As long as what it holds already, and within the second for which the guest's caches hold.
    fs::write(&file, "b")?;
    events(&out, "/file CLOSE_WRITE : 2b")?;
    OpenOptions::new().append(true).open(&file)?.write_all(b"c")?;
    events(&out, "/file CLOSE_WRITE : 2bc")?;
    fs::write(volume.join("end"), "")?;
    running
        .wait(Deadline::after(deadline::BOOT))?
        .success()?;
    let told = events(&out, "CREATE end")?;
    Ok(told.into_iter().map(|(line, _)| line).collect())
}

#[test]
fn a_container_hears_what_the_host_changes_in_its_volumes() -> Result<()> {
    if requirement::containerd()?.is_none() {
        return Ok(());
    }
    let leak = Leak::watch()?;
    let runc = hear(Runtime::Runc)?;
    let walnut = hear(Runtime::Walnut)?;
    eprintln!("runc: {runc:#?}\nwalnut: {walnut:#?}");
    // What a file holds when the first of several events is read is a matter of time.
    let kinds = |lines: &[String]| {
        let kinds = lines.iter().filter_map(|line| line.split_once(": "));
        let mut kinds: Vec<_> = kinds.map(|(kind, _)| kind.to_owned()).collect();
        kinds.dedup();
        kinds
    };
    ensure!(kinds(&walnut) == kinds(&runc));
    leak.nothing_left()
}

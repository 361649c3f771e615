//! What the host changes in a container's read-only volumes: inotify in the container tells of it as with runc,
//! the oracle, and who hears of a change sees it.

use anyhow::{Context, Result, ensure};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    mem::MaybeUninit,
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

/// Makes this program the one that watches, in a container.
const WATCHER: &str = "WALNUT_TEST_WATCHER";
const WATCHED: [&str; 3] = ["/vol", "/vol/key", "/file"];
const KINDS: [(ReadFlags, &str); 10] = [
    (ReadFlags::MODIFY, "MODIFY"),
    (ReadFlags::ATTRIB, "ATTRIB"),
    (ReadFlags::CLOSE_WRITE, "CLOSE_WRITE"),
    (ReadFlags::MOVED_FROM, "MOVED_FROM"),
    (ReadFlags::MOVED_TO, "MOVED_TO"),
    (ReadFlags::CREATE, "CREATE"),
    (ReadFlags::DELETE, "DELETE"),
    (ReadFlags::DELETE_SELF, "DELETE_SELF"),
    (ReadFlags::IGNORED, "IGNORED"),
    (ReadFlags::ISDIR, "ISDIR"),
];

/// Not a test of its own, but what a container of the test below runs: writes each event of a volume, of the file
/// that a link in it leads to, and of a single file, to a file of its own, with what key and file hold then.
#[test]
fn watcher() -> Result<()> {
    if std::env::var_os(WATCHER).is_none() {
        return Ok(());
    }
    let inotify = inotify::init(CreateFlags::CLOEXEC)?;
    let kinds = KINDS
        .iter()
        .map(|(flag, _)| flag.bits())
        .fold(0, |all, one| all | one);
    let wanted = WatchFlags::from_bits_truncate(kinds);
    let mut watches = Vec::new();
    for path in WATCHED {
        watches.push((inotify::add_watch(&inotify, path, wanted)?, path));
    }
    let seen = || {
        let read = |path| fs::read_to_string(path).unwrap_or_else(|error| error.to_string());
        format!("{}{}", read("/vol/key"), read("/file"))
    };
    let mut number = 0;
    let mut say = |line: &str| -> Result<()> {
        fs::write("/out/new", line)?;
        fs::rename("/out/new", format!("/out/{number:03}"))?;
        number += 1;
        Ok(())
    };
    say(&format!("ready {}", seen()))?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = inotify::Reader::new(&inotify, &mut buffer);
    let mut last = String::new();
    loop {
        let event = reader.next()?;
        let path = watches.iter().find(|(watch, _)| *watch == event.wd());
        let (_, path) = path.context("an event of no watch")?;
        let kinds = KINDS
            .iter()
            .filter(|(flag, _)| event.events().contains(*flag));
        let kinds: Vec<_> = kinds.map(|(_, text)| *text).collect();
        let name = event.file_name().map(|name| name.to_string_lossy());
        let name = name.unwrap_or_default();
        let line = format!("{path} {} {name}: {}", kinds.join("|"), seen());
        if line != last {
            say(&line)?;
        }
        if name == "end" {
            return Ok(());
        }
        last = line;
    }
}

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
        Ok(told
            .iter()
            .any(|(line, _)| line.contains(last))
            .then_some(()))
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
        .flag(&mount(&std::env::current_exe()?, "/watcher", "ro"))
        .flag(&format!("--env={WATCHER}=1"))
        .command(&["/watcher", "--exact", "watcher", "--nocapture"])
        .start()?;
    events(&out, "ready 1a")?;
    let renamed = update(&volume)?;
    let told = events(&out, "/vol DELETE|ISDIR ..one")?;
    let heard = told
        .iter()
        .find(|(line, _)| line.contains("MOVED_TO ..data"));
    let (_, heard) = heard.context("no MOVED_TO of ..data")?;
    eprintln!(
        "{runtime:?}: rename to event: {:?}",
        heard.duration_since(renamed)
    );
    // As long as what it holds already, and within the second for which the guest's caches hold.
    fs::write(&file, "b")?;
    events(&out, "/file CLOSE_WRITE : 2b")?;
    OpenOptions::new()
        .append(true)
        .open(&file)?
        .write_all(b"c")?;
    events(&out, "/file CLOSE_WRITE : 2bc")?;
    fs::write(volume.join("end"), "")?;
    running.wait(Deadline::after(deadline::BOOT))?.success()?;
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
    // What a file holds when the first of several events is read is a matter of time. Who watches a file of a
    // directory that the host removes is not told with Walnut (decision 10).
    let kinds = |lines: &[String]| {
        let lines = lines.iter().filter(|line| !line.starts_with("/vol/key "));
        let kinds = lines.filter_map(|line| line.split_once(": "));
        let mut kinds: Vec<_> = kinds.map(|(kind, _)| kind.to_owned()).collect();
        kinds.dedup();
        kinds
    };
    ensure!(kinds(&walnut) == kinds(&runc));
    leak.nothing_left()
}

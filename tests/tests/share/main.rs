//! The shared directory, by the guest kernel's own client: what a file system must do, on both sides of it.
//!
//! The guest takes scripts from the share that it tests. The host is root, and so is the guest.

mod pair;

use self::pair::{Pair, equal, md5, run};
use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{
    CWD, FileType, FlockOperation, Mode, OFlags, flock, major, minor, mkfifoat, open,
};
use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs::{self, File},
    io::Read,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, symlink},
        net::UnixListener,
    },
    time::Instant,
};
use tempfile::TempDir;
use walnut_tests::{
    deadline::{self, Deadline},
    mounts::BindMount,
    requirement, story,
    vmm::SHARE_TAG,
};
use walnut_vmm_api::{ShareConfig, VmmExit};

fn directories_list_themselves_and_inodes_are_the_hosts(pair: &mut Pair) -> Result<()> {
    fs::create_dir(pair.host("listed"))?;
    fs::write(pair.host("listed/file"), "x")?;
    equal(&pair.guest("ls -a listed | tr '\\n' ' '")?, ". .. file")?;
    let inodes = pair.guest("stat -c %i listed/file; ls -ai listed | awk '{print $1}'")?;
    let number = |name| Ok::<_, anyhow::Error>(fs::metadata(pair.host(name))?.ino().to_string());
    let (file, own, parent) = (number("listed/file")?, number("listed")?, number(".")?);
    equal(&inodes, &format!("{file}\n{own}\n{parent}\n{file}"))
}

fn data_crosses_both_ways(pair: &mut Pair) -> Result<()> {
    let mut random = vec![0; 32 << 20];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    fs::write(pair.host("from-host"), &random)?;
    let seen = pair.guest("md5sum < from-host | cut -d' ' -f1")?;
    equal(&seen, &md5(&pair.host("from-host"))?)?;
    let said = pair.guest(
        "dd if=/dev/urandom of=from-guest bs=1M count=32 2>/dev/null; cp from-guest copied
         echo 3 > /proc/sys/vm/drop_caches; md5sum < copied | cut -d' ' -f1; rm copied",
    )?;
    equal(&said, &md5(&pair.host("from-guest"))?)
}

fn attributes_and_lists_of_rights_are_kept(pair: &mut Pair) -> Result<()> {
    let said = pair.guest(
        "touch x; /usr/bin/setfattr -n user.color -v blue x; /usr/bin/setfattr -n user.gone -v x x
         /usr/bin/setfattr -x user.gone x; /usr/bin/getfattr --absolute-names -d x | grep =
         /usr/bin/setfattr -n user.big -v $(head -c 1500 /dev/zero | tr '\\0' b) x
         /usr/bin/getfattr --only-values -n user.big x | wc -c
         /usr/bin/setfattr -x user.color y 2>/dev/null || echo no such file
         ln -s x symlink; /usr/bin/getfattr -h -n user.color symlink 2>/dev/null || echo none",
    )?;
    equal(&said, "user.color=\"blue\"\n1500\nno such file\nnone")?;
    let path = pair.host("x");
    let host = run(
        "getfattr",
        &["--only-values", "-n", "user.color"]
            .map(OsStr::new)
            .into_iter()
            .chain([path.as_os_str()])
            .collect::<Vec<_>>(),
    )?;
    equal(&host, "blue")?;
    let said = pair.guest(
        "setfacl -m u:1234:rw x; getfacl -n x 2>/dev/null | grep 1234
         mkdir listed-rights; setfacl -d -m u:1235:rwx listed-rights
         (umask 077; touch listed-rights/new; mkdir listed-rights/folder)
         getfacl -n listed-rights/new 2>/dev/null | grep -e 1235 -e ^mask | tr -s '\\t'
         getfacl -n listed-rights/folder 2>/dev/null | grep default:user:1235
         (umask 027; touch masked; stat -c %a masked)",
    )?;
    let expected =
        "user:1234:rw-\nuser:1235:rwx\t#effective:rw-\nmask::rw-\ndefault:user:1235:rwx\n640";
    equal(&said, expected)?;
    ensure!(
        fs::metadata(&path)?.mode() & 0o777 == 0o664,
        "the host sees the mask"
    );
    let said =
        pair.guest("setcap cap_net_raw+ep x; getcap x; echo more >> x; getcap x; echo written")?;
    equal(&said, "x cap_net_raw=ep\nwritten")
}

fn any_name_is_a_name(pair: &mut Pair) -> Result<()> {
    fs::create_dir(pair.host("names"))?;
    let longest: Vec<u8> = (1..=255)
        .map(|byte| if byte == b'/' { b'-' } else { byte })
        .collect();
    fs::write(
        pair.host("names").join(OsStr::from_bytes(&longest)),
        "longest",
    )?;
    pair.python(
        "name, = os.listdir(b'names')
assert name == bytes(range(1, 256)).replace(b'/', b'-'), name
assert open(b'names/' + name).read() == 'longest'
open(b'names/' + name[::-1], 'w').write('backwards')
try: open(b'names/' + name + b'x', 'w'); assert False
except OSError as error: assert error.errno == 36, error",
    )?;
    let backwards: Vec<u8> = longest.into_iter().rev().collect();
    let path = pair.host("names").join(OsStr::from_bytes(&backwards));
    equal(&fs::read_to_string(path)?, "backwards")
}

fn a_thousand_files_are_listed_once(pair: &mut Pair) -> Result<()> {
    fs::create_dir(pair.host("many"))?;
    for number in 0..1000 {
        fs::write(
            pair.host(&format!("many/file-{number}")),
            number.to_string(),
        )?;
    }
    let said = pair.guest("ls many; ls -l many | wc -l; cat many/file-99*; rm many/file-99*")?;
    let lines: BTreeSet<&str> = said
        .lines()
        .filter(|line| line.starts_with("file-"))
        .collect();
    ensure!(
        lines.len() == 1000 && said.lines().count() == 1002,
        "{said}"
    );
    let last = "99990991992993994995996997998999";
    ensure!(said.ends_with(&format!("1001\n{last}")), "{said}");
    let left = fs::read_dir(pair.host("many"))?.count();
    ensure!(left == 989, "{left} files are left");
    fs::remove_dir_all(pair.host("many"))?;
    pair.until("ls -d many 2>/dev/null || echo gone", "gone")
}

fn names_are_linked_and_moved(pair: &mut Pair) -> Result<()> {
    let said = pair.guest(
        "echo one > one; ln one other; stat -c %h one; [ one -ef other ]; echo two > two; mv two one
         cat one other; ln -s ../../../etc/passwd escape; readlink escape; ln escape hard-symlink
         readlink hard-symlink; mkdir -p a/b; mv a/b c; rmdir a; rmdir c; rm one other
         ls one 2>/dev/null || echo gone",
    )?;
    let link = "../../../etc/passwd";
    equal(&said, &format!("2\ntwo\none\n{link}\n{link}\ngone"))
}

fn holes_stay_holes(pair: &mut Pair) -> Result<()> {
    pair.python(
        "file = os.open('sparse', os.O_CREAT | os.O_RDWR)
os.pwrite(file, b'end', 16 << 20)
os.fsync(file)  # Linux asks where data is without writing what it keeps.
assert os.lseek(file, 0, os.SEEK_DATA) == 16 << 20
assert os.lseek(file, 0, os.SEEK_HOLE) == 0
os.posix_fallocate(file, 0, 1 << 20)
assert os.stat('sparse').st_blocks >= 2048
os.pwrite(file, b'start', 0)
to = os.open('ranged', os.O_CREAT | os.O_RDWR)
assert os.copy_file_range(file, to, 5, 0, 2) == 5
assert os.pread(to, 10, 0) == b'\\0\\0start'
os.ftruncate(file, 3)
assert os.pread(file, 10, 0) == b'sta'
assert os.statvfs('.').f_blocks > 0",
    )?;
    equal(&fs::read_to_string(pair.host("sparse"))?, "sta")?;
    equal(&fs::read_to_string(pair.host("ranged"))?, "\0\0start")
}

fn mappings_reach_the_host(pair: &mut Pair) -> Result<()> {
    fs::write(pair.host("mapped"), vec![b'.'; 3 << 20])?;
    pair.python(
        "import mmap
file = os.open('mapped', os.O_RDWR)
memory = mmap.mmap(file, 0)
memory[5:10] = b'hello'
memory[(3 << 20) - 3:] = b'end'
memory.flush()
assert os.pread(file, 5, 5) == b'hello'
os.pwrite(file, b'written', 1 << 20)
assert memory[1 << 20:(1 << 20) + 7] == b'written'",
    )?;
    let seen = fs::read(pair.host("mapped"))?;
    ensure!(
        &seen[5..10] == b"hello" && seen.ends_with(b".end"),
        "a mapping did not arrive"
    );
    ensure!(
        &seen[1 << 20..(1 << 20) + 7] == b"written",
        "a write did not arrive"
    );
    Ok(())
}

fn files_without_a_name_get_one_later(pair: &mut Pair) -> Result<()> {
    pair.python(
        "file = os.open('.', os.O_TMPFILE | os.O_RDWR, 0o640)
os.write(file, b'unnamed')
assert os.fstat(file).st_nlink == 0
os.link(f'/proc/self/fd/{file}', 'named', follow_symlinks=True)
appended = os.open('named', os.O_WRONLY | os.O_APPEND)
os.write(appended, b' and more')
deleted = os.open('deleted', os.O_CREAT | os.O_RDWR)
os.unlink('deleted')
os.write(deleted, b'still')
assert os.pread(deleted, 5, 0) == b'still' and os.fstat(deleted).st_size == 5",
    )?;
    equal(&fs::read_to_string(pair.host("named"))?, "unnamed and more")?;
    ensure!(!pair.host("deleted").exists(), "a deleted file has a name");
    Ok(())
}

/// What both append to, neither loses, unless the guest keeps what it writes to itself.
fn appends_of_both_sides_are_kept(pair: &mut Pair) -> Result<()> {
    fs::write(pair.host("log"), "")?;
    for round in 0..3 {
        let mut log = File::options().append(true).open(pair.host("log"))?;
        std::io::Write::write_all(&mut log, format!("host {round}\n").as_bytes())?;
        pair.guest(&format!("echo guest {round} >> log"))?;
    }
    let log = fs::read_to_string(pair.host("log"))?;
    equal(&log, "host 0\nguest 0\nhost 1\nguest 1\nhost 2\nguest 2\n")
}

fn locks_are_the_guests_own(pair: &mut Pair) -> Result<()> {
    let said = pair.guest(
        "flock -x lock sleep 100000 &
         while flock -n lock true; do sleep 0.1; done; echo locked",
    )?;
    equal(&said, "locked")?;
    flock(
        File::open(pair.host("lock"))?,
        FlockOperation::NonBlockingLockExclusive,
    )
    .context("the host doesn't see the guest's lock")?;
    pair.guest("kill $(pidof sleep); flock -x lock echo free")?;
    Ok(())
}

/// Several users at once, as each thread of the server is one of them for a moment.
fn what_a_user_makes_is_theirs(pair: &mut Pair) -> Result<()> {
    pair.python(
        "os.mkdir('users'); os.chmod('users', 0o777); children = []
for user in range(2000, 2004):
    child = os.fork()
    if child == 0:
        os.setgroups([3000]); os.setgid(user + 100); os.setuid(user)
        for number in range(25):
            open(f'users/{user}-{number}', 'w').write('x')
            os.mkdir(f'users/{user}-{number}-folder')
        os._exit(0)
    children.append(child)
for child in children: assert os.waitpid(child, 0)[1] == 0
os.mkdir('root-only'); os.mkdir('group'); os.chown('group', 0, 3000); os.chmod('group', 0o2775)
child = os.fork()
if child == 0:
    os.setgroups([3000]); os.setgid(2100); os.setuid(2000)
    open('group/file', 'w')
    try: open('root-only/file', 'w'); os._exit(1)
    except OSError: os._exit(0)
assert os.waitpid(child, 0)[1] == 0
os.chown('users/2000-0', 7, 8); os.chmod('users/2000-1', 0o4711)",
    )?;
    let mut seen = 0;
    for entry in fs::read_dir(pair.host("users"))? {
        let (entry, name) = entry.map(|entry| (entry.metadata(), entry.file_name()))?;
        let (entry, name) = (entry?, name.to_string_lossy().into_owned());
        let expected: u32 = name.split('-').next().context("no user")?.parse()?;
        let owner = if name == "2000-0" {
            (7, 8)
        } else {
            (expected, expected + 100)
        };
        ensure!((entry.uid(), entry.gid()) == owner, "{name}: {entry:?}");
        seen += 1;
    }
    ensure!(seen == 200, "{seen} of 200");
    ensure!(fs::metadata(pair.host("users/2000-1"))?.mode() & 0o7777 == 0o4711);
    let group = fs::metadata(pair.host("group/file"))?;
    ensure!((group.uid(), group.gid()) == (2000, 3000), "{group:?}");
    Ok(())
}

fn special_files_do_not_reach_the_host(pair: &mut Pair) -> Result<()> {
    mkfifoat(CWD, pair.host("fifo"), Mode::from_raw_mode(0o666))?;
    let listener = UnixListener::bind(pair.host("socket"))?;
    listener.set_nonblocking(true)?;
    let reader = open(
        pair.host("fifo"),
        OFlags::RDONLY | OFlags::NONBLOCK,
        Mode::empty(),
    )?;
    let said = pair.guest(
        "(echo through the guest > fifo &) ; cat fifo; mkfifo own; mknod null c 1 3; mknod disk b 8 0
         echo lost > null; cat null; head -c 1 disk 2>/dev/null || echo no such disk",
    )?;
    equal(&said, "through the guest\nno such disk")?;
    pair.python(
        "import _socket
try: _socket.socket(1, 1).connect('socket'); assert False
except ConnectionRefusedError: pass",
    )?;
    ensure!(
        listener.accept().is_err(),
        "a guest reached a host's socket"
    );
    let mut nothing = [0];
    let read = File::from(reader).read(&mut nothing);
    ensure!(
        matches!(read, Ok(0)),
        "a guest reached a host's FIFO: {read:?}"
    );
    let null = fs::metadata(pair.host("null"))?;
    let device = (major(null.rdev()), minor(null.rdev()));
    ensure!(
        null.file_type().is_char_device() && device == (1, 3),
        "{null:?}"
    );
    let own = fs::metadata(pair.host("own"))?.file_type();
    ensure!(FileType::from_raw_mode(0o010000) == FileType::Fifo && own.is_fifo());
    Ok(())
}

/// As Kubernetes does with a ConfigMap: a new directory, and a symbolic link that is renamed over the old one.
fn changes_of_the_host_are_seen(pair: &mut Pair) -> Result<()> {
    for (version, value) in [("v1", "first"), ("v2", "other")] {
        fs::create_dir_all(pair.host(&format!("config/{version}")))?;
        fs::write(pair.host(&format!("config/{version}/key")), value)?;
    }
    symlink("v1", pair.host("config/data"))?;
    symlink("data/key", pair.host("config/key"))?;
    pair.until("cat config/key", "first")?;
    // The guest looks all the time, so that it has names and attributes in its caches.
    pair.guest(
        "(until [ $(cat config/key) = other ]; do :; done; touch seen) > /dev/null 2>&1 &
         inotifyd - config:cdmny config/v1:cdmnwy > /tmp/events 2>&1 &
         until grep -qs 'inotify wd:2' /proc/$(pidof inotifyd)/fdinfo/*; do :; done",
    )?;
    symlink("v2", pair.host("config/new"))?;
    fs::rename(pair.host("config/new"), pair.host("config/data"))?;
    let (renamed, seen) = (Instant::now(), pair.host("seen"));
    deadline::until(
        "what the host renamed",
        Deadline::after(deadline::REQUEST),
        || Ok(seen.exists().then_some(())),
    )?;
    println!(
        "the guest saw a renamed link after {} ms",
        renamed.elapsed().as_millis()
    );
    // The guest's watches see what the guest does, and nothing of the host's.
    let events = pair.guest("touch config/own; kill $(pidof inotifyd); cat /tmp/events")?;
    equal(&events, "n\tconfig\town")?;
    fs::remove_file(pair.host("config/v2/key"))?;
    pair.until("cat config/key 2>/dev/null || echo none", "none")
}

/// Not where the guest keeps writes: then its kernel knows size and contents better than the host.
fn what_the_host_writes_is_read(pair: &mut Pair) -> Result<()> {
    for contents in ["short", "a longer text", "same length!!"] {
        fs::write(pair.host("rewritten"), contents)?;
        pair.until("cat rewritten", contents)?;
    }
    Ok(())
}

fn mounts_of_the_host_appear_and_go(pair: &mut Pair) -> Result<()> {
    let source = TempDir::new()?;
    fs::write(source.path().join("inside"), "volume")?;
    fs::create_dir(pair.host("volume"))?;
    pair.until("ls volume | wc -l", "0")?;
    let mount = BindMount::new(source.path(), &pair.host("volume"))?;
    pair.until("cat volume/inside 2>/dev/null || true", "volume")?;
    let said = pair.guest(
        "[ $(stat -c %d volume) != $(stat -c %d .) ]; echo written > volume/by-guest
         mv volume/by-guest . 2>/dev/null; cat by-guest; grep -c ' /share/volume ' /proc/mounts
         stat -c %d node/bin > /dev/null",
    )?;
    equal(&said, "written\n1")?;
    drop(mount);
    pair.until("ls volume | wc -l", "0")?;
    pair.guest("rmdir volume; mkdir volume; touch volume/again")?;
    ensure!(pair.host("volume/again").exists());
    Ok(())
}

fn the_driver_comes_and_goes(pair: &mut Pair) -> Result<()> {
    let options = pair.options;
    let said = pair.guest(&format!(
        "echo kept > kept; cd /; umount /share
         drivers=/sys/bus/virtio/drivers/virtiofs; device=$(ls $drivers | grep virtio)
         echo $device > $drivers/unbind; echo $device > $drivers/bind
         mount -t virtiofs {options} {SHARE_TAG} /share; cat /share/kept"
    ))?;
    equal(&said, "kept")
}

const CHAPTERS: &[story::Chapter<Pair>] = &[
    ("list", directories_list_themselves_and_inodes_are_the_hosts),
    ("data", data_crosses_both_ways),
    ("attributes", attributes_and_lists_of_rights_are_kept),
    ("names", any_name_is_a_name),
    ("many", a_thousand_files_are_listed_once),
    ("links", names_are_linked_and_moved),
    ("holes", holes_stay_holes),
    ("mappings", mappings_reach_the_host),
    ("unnamed", files_without_a_name_get_one_later),
    ("locks", locks_are_the_guests_own),
    ("users", what_a_user_makes_is_theirs),
    ("special files", special_files_do_not_reach_the_host),
    ("changes", changes_of_the_host_are_seen),
    ("mounts", mounts_of_the_host_appear_and_go),
    ("driver", the_driver_comes_and_goes),
    ("data again", data_crosses_both_ways),
];

fn tell(
    options: &'static str,
    change: fn(&mut ShareConfig),
    more: &[story::Chapter<Pair>],
) -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let mut pair = Pair::boot(&programs, options, change)?;
    let mut told = story::tell(&mut pair, &[CHAPTERS, more].concat());
    if !pair.guest("cat /proc/mounts")?.contains("dax") && options.contains("dax") {
        told = told.and(Err(anyhow::anyhow!("the share is not mounted with DAX")));
    }
    told.with_context(|| pair.vm.console())?;
    pair.guest("(sleep 1; poweroff -f) > /dev/null 2>&1 &")?;
    let ended = pair.vm.wait()?;
    ended.ends_with(VmmExit::Ended)?.says_at_most(0)?;
    if ended.console.contains("Call Trace") {
        bail!("{}", ended.console);
    }
    Ok(())
}

/// What holds where the guest keeps nothing back.
const SHARED: &[story::Chapter<Pair>] = &[
    ("appends", appends_of_both_sides_are_kept),
    ("rewrites", what_the_host_writes_is_read),
];

#[test]
fn a_share_is_a_file_system() -> Result<()> {
    tell("", |_| {}, SHARED)
}

#[test]
fn a_share_that_is_mapped_is_a_file_system() -> Result<()> {
    tell("-o dax=always", |share| share.window_mib = 64, SHARED)
}

#[test]
fn a_share_whose_writes_the_guest_keeps_is_a_file_system() -> Result<()> {
    tell("", |share| share.writeback = true, &[])
}

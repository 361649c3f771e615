//! The socket device between programs of the host and a server in the guest: thousands of streams at once, half-closes
//! both ways, a program that reads nothing, much data, and a driver that goes and comes back.

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::Path,
    thread,
};
use tempfile::TempDir;
use walnut_tests::{
    deadline,
    initramfs::Initramfs,
    memory, requirement,
    story::{self, Chapter},
    vmm::{Vm, VmBuilder},
};
use walnut_vmm_api::{VmmExit, connect_line, parse_ok};

/// Answers with what it is sent, and ends when it has answered everything.
const ECHO: u32 = 5000;
/// Says hello, ends its half, and says on the console how much it was sent then.
const COUNT: u32 = 5001;
/// Takes the driver from the device and gives it back.
const REBIND: u32 = 5002;
const STREAMS: usize = 2000;
const MEMORY_MIB: u32 = 512;

/// The server: one process, one `epoll`, only modules that are part of the interpreter.
const SERVER: &str = r#"
import _socket, select, posix
poll, listeners, peers = select.epoll(), {}, {}
for port in (5000, 5001, 5002):
    s = _socket.socket(40, 1)
    s.bind((0xffffffff, port)); s.listen(4096); s.setblocking(False)
    listeners[s.fileno()] = (s, port); poll.register(s.fileno(), 1)
def rebind():
    folder = "/sys/bus/virtio/drivers/vmw_vsock_virtio_transport/"
    name = [n for n in posix.listdir(folder) if n.startswith("virtio")][0]
    for file in ("unbind", "bind"):
        f = posix.open(folder + file, 1); posix.write(f, name.encode()); posix.close(f)
    posix.write(1, b"driver-is-back\n")
def forget(fd):
    poll.unregister(fd); peers.pop(fd)[0].close()
def serve(fd):
    peer = peers[fd]
    s, port, pending, seen, over = peer
    try:
        if not over and len(pending) < 1 << 18:
            data = s.recv(1 << 16)
            peer[3] += len(data)
            if port == 5000: pending += data
            if not data: peer[4] = over = True
    except BlockingIOError: pass
    except OSError: return forget(fd)
    try:
        if pending: del pending[:s.send(pending)]
    except BlockingIOError: pass
    except OSError: return forget(fd)
    if over and not pending:
        if port == 5001: posix.write(1, b"counted %d\n" % peer[3])
        return forget(fd)
    poll.modify(fd, (0 if over or len(pending) >= 1 << 18 else 1) | (4 if pending else 0))
posix.write(1, b"server-is-up\n")
while True:
    for fd, events in poll.poll():
        if fd not in listeners:
            if fd in peers: serve(fd)
            continue
        listener, port = listeners[fd]
        try: new, address = listener._accept()
        except OSError: continue
        s = _socket.socket(40, 1, 0, new)
        if port == 5002:
            s.close(); rebind(); continue
        s.setblocking(False)
        if port == 5001: s.send(b"hello"); s.shutdown(1)
        peers[new] = [s, port, bytearray(), 0, False]
        poll.register(new, 1)
"#;

struct Fixture {
    vm: Vm,
}

impl Fixture {
    /// A stream whose handshake line is written; the guest's answer is still to come.
    fn dial(&self, port: u32) -> Result<BufReader<UnixStream>> {
        let mut stream = UnixStream::connect(self.vm.socket_path())?;
        stream.set_read_timeout(Some(deadline::REQUEST))?;
        stream.set_write_timeout(Some(deadline::REQUEST))?;
        stream.write_all(connect_line(port).as_bytes())?;
        Ok(BufReader::new(stream))
    }

    fn connect(&self, port: u32) -> Result<BufReader<UnixStream>> {
        let mut stream = self.dial(port)?;
        accepted(&mut stream)?;
        Ok(stream)
    }
}

fn accepted(stream: &mut BufReader<UnixStream>) -> Result<()> {
    let mut line = Vec::new();
    stream.read_until(b'\n', &mut line).context("no answer")?;
    parse_ok(&line).context("the guest refused")?;
    Ok(())
}

#[test]
fn programs_of_the_host_talk_to_servers_of_the_guest() -> Result<()> {
    let Some(programs) = requirement::kvm()? else {
        return Ok(());
    };
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    )?;
    let directory = TempDir::new()?;
    let script = format!(
        "mount -t sysfs sysfs /sys; mount -t proc proc /proc; ulimit -n 65536
        cat > /server.py <<'END'\n{SERVER}\nEND\nexec python3 -I -S /server.py"
    );
    let modules = encodings()?;
    let files: Vec<&str> = ["python3"]
        .into_iter()
        .chain(modules.iter().map(String::as_str))
        .collect();
    let initramfs = directory.path().join("initramfs");
    fs::write(
        &initramfs,
        Initramfs::script_with(&programs.busybox, &files, &script)?,
    )?;
    let mut vm = VmBuilder::with_initramfs(&programs, &initramfs)
        .memory_mib(MEMORY_MIB)
        .socket()
        .start()?;
    vm.wait_for_console("server-is-up")?;
    let mut fixture = Fixture { vm };
    let chapters: [Chapter<Fixture>; 4] = [
        ("thousands of streams carry data at once", thousands),
        ("half-closes pass in both directions", half_closes),
        ("64 MiB pass unharmed both ways", much_data),
        ("a driver that comes back is served", rebound),
    ];
    story::tell(&mut fixture, &chapters)?;
    fixture.vm.ask(&walnut_vmm_api::Request::Stop)?;
    fixture
        .vm
        .wait()?
        .ends_with(VmmExit::Ended)?
        .says_at_most(0)?;
    Ok(())
}

/// What the interpreter needs besides itself.
fn encodings() -> Result<Vec<String>> {
    let mut libraries = fs::read_dir("/usr/lib")?.flatten();
    let library = libraries.find(|entry| entry.path().join("encodings/utf_8.py").is_file());
    let library = library.context("no python3 on this machine")?.path();
    let files = ["__init__", "aliases", "utf_8", "latin_1", "ascii"];
    let paths = files.map(|name| library.join(format!("encodings/{name}.py")));
    paths
        .iter()
        .map(|path: &std::path::PathBuf| text(path))
        .collect()
}

fn text(path: &Path) -> Result<String> {
    Ok(path.to_str().context("a path that is not text")?.to_owned())
}

fn thousands(fixture: &mut Fixture) -> Result<()> {
    // One program sends for ever and reads nothing, as far as the buffers go.
    let slow = fixture.connect(ECHO)?;
    slow.get_ref()
        .set_write_timeout(Some(std::time::Duration::from_secs(1)))?;
    while slow.get_ref().write_all(&[7; 1 << 16]).is_ok() {}

    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        streams.push(fixture.dial(ECHO)?);
    }
    for stream in &mut streams {
        accepted(stream)?;
    }
    for (index, stream) in streams.iter_mut().enumerate() {
        stream
            .get_mut()
            .write_all(&index.to_le_bytes().repeat(100))?;
    }
    for (index, stream) in streams.iter_mut().enumerate() {
        let mut answer = [0; 800];
        stream
            .read_exact(&mut answer)
            .with_context(|| format!("stream {index}"))?;
        ensure!(
            answer == index.to_le_bytes().repeat(100)[..],
            "stream {index} got another's data"
        );
        stream.get_ref().shutdown(Shutdown::Write)?;
    }
    let footprint = memory::of_vmm(fixture.vm.pid()?, MEMORY_MIB)?;
    println!("with {STREAMS} streams the VMM holds {footprint:?}");
    ensure!(footprint.overhead_pss_kib < 64 * 1024, "{footprint:?}");
    for stream in &mut streams {
        ensure!(stream.read(&mut [0])? == 0, "more than was sent came back");
    }
    Ok(())
}

fn half_closes(fixture: &mut Fixture) -> Result<()> {
    // The host's end first: what was sent before it still comes back.
    let mut stream = fixture.connect(ECHO)?;
    stream.get_mut().write_all(b"before the end")?;
    stream.get_ref().shutdown(Shutdown::Write)?;
    let mut all = String::new();
    stream.read_to_string(&mut all)?;
    ensure!(all == "before the end", "{all:?}");

    // The guest's end first: the host can still send.
    let mut stream = fixture.connect(COUNT)?;
    let mut all = String::new();
    stream.read_to_string(&mut all)?;
    ensure!(all == "hello", "{all:?}");
    stream.get_mut().write_all(&[7; 100_003])?;
    stream.get_ref().shutdown(Shutdown::Write)?;
    fixture.vm.wait_for_console("counted 100003")
}

fn much_data(fixture: &mut Fixture) -> Result<()> {
    let mut stream = fixture.connect(ECHO)?;
    let mut writer = stream.get_ref().try_clone()?;
    let block = |number: u32| -> Vec<u8> {
        let words = (0..1 << 14).map(|word: u32| (number << 14 | word).wrapping_mul(2_654_435_761));
        words.flat_map(u32::to_le_bytes).collect()
    };
    let writing = thread::spawn(move || -> Result<()> {
        for number in 0..1024 {
            writer.write_all(&block(number))?;
        }
        Ok(writer.shutdown(Shutdown::Write)?)
    });
    let mut seen = vec![0; 1 << 16];
    for number in 0..1024 {
        stream
            .read_exact(&mut seen)
            .with_context(|| format!("after {number} blocks"))?;
        ensure!(seen == block(number), "block {number} was changed");
    }
    ensure!(stream.read(&mut [0])? == 0, "more than was sent came back");
    writing.join().ok().context("the writer panicked")?
}

fn rebound(fixture: &mut Fixture) -> Result<()> {
    let mut lost = fixture.connect(ECHO)?;
    fixture.dial(REBIND)?.read_to_end(&mut Vec::new())?;
    fixture.vm.wait_for_console("driver-is-back")?;
    ensure!(lost.read(&mut [0])? == 0, "a stream outlived its device");
    half_closes(fixture)
}

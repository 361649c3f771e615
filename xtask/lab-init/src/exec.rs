//! Runs one program for a client and ends it when the client goes away.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;
use walnut_lab_init::wire::{self, Exec, Kind, TerminalSize};

/// How long a program's output is awaited after its end: a daemon that it left behind may hold the
/// pipe open for ever.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

/// Where a program's input comes from.
enum Input {
    Pipe(Option<ChildStdin>),
    Terminal(File),
}

/// Runs the program, and answers with its exit status as a shell counts it.
pub(crate) fn run(stream: &TcpStream, exec: &Exec) -> io::Result<()> {
    let to_client = Arc::new(Mutex::new(stream.try_clone()?));
    let (drained, drains) = mpsc::channel();
    let (mut child, input, outputs) = match exec.terminal {
        None => start_with_pipes(exec)?,
        Some(size) => start_on_terminal(exec, size)?,
    };
    let output_count = outputs.len();
    for (kind, output) in outputs {
        let (to_client, drained) = (to_client.clone(), drained.clone());
        std::thread::spawn(move || {
            forward_output(output, kind, &to_client);
            let _ = drained.send(());
        });
    }
    let group = Pid::from_child(&child);
    let from_client = stream.try_clone()?;
    std::thread::spawn(move || {
        forward_input(&from_client, input);
        // The client is gone, or closes the connection as it has its answer: then the group too.
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    });
    let status = child.wait()?;
    let deadline = Instant::now() + DRAIN_LIMIT;
    for _ in 0..output_count {
        if drains
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            .is_err()
        {
            break;
        }
    }
    // Nothing may follow the answer: threads that still hold output stay locked out.
    let locked = to_client.lock().unwrap_or_else(PoisonError::into_inner);
    wire::send(&*locked, Kind::Exit, &exit_code(status).to_le_bytes())?;
    locked.shutdown(std::net::Shutdown::Both)
}

type Outputs = Vec<(Kind, Box<dyn Read + Send>)>;

fn command(exec: &Exec) -> io::Result<Command> {
    let (program, arguments) = exec
        .argv
        .split_first()
        .ok_or_else(|| io::Error::other("no program named"))?;
    let mut command = Command::new(program);
    command.args(arguments);
    Ok(command)
}

fn start(mut command: Command, exec: &Exec) -> io::Result<Child> {
    command
        .env_remove(crate::server::TOKEN_VARIABLE)
        .envs(exec.environment.iter().cloned());
    command.current_dir("/root");
    command.spawn().map_err(|error| {
        io::Error::other(format!(
            "run {}: {error}",
            exec.argv.first().map_or("", |name| name)
        ))
    })
}

fn start_with_pipes(exec: &Exec) -> io::Result<(Child, Input, Outputs)> {
    let mut command = command(exec)?;
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut child = start(command, exec)?;
    let mut outputs: Outputs = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        outputs.push((Kind::Stdout, Box::new(stdout)));
    }
    if let Some(stderr) = child.stderr.take() {
        outputs.push((Kind::Stderr, Box::new(stderr)));
    }
    let stdin = child.stdin.take();
    Ok((child, Input::Pipe(stdin), outputs))
}

fn start_on_terminal(exec: &Exec, size: TerminalSize) -> io::Result<(Child, Input, Outputs)> {
    let controller = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY)?;
    rustix::pty::grantpt(&controller)?;
    rustix::pty::unlockpt(&controller)?;
    let name = rustix::pty::ptsname(&controller, Vec::new())?;
    let name = name.to_str().map_err(io::Error::other)?;
    let terminal = File::options().read(true).write(true).open(name)?;
    rustix::termios::tcsetwinsize(&terminal, window(size))?;
    // setsid(1) makes the terminal the session's own, which takes code between fork and exec.
    let mut command = Command::new("setsid");
    command
        .args(["--ctty", "--wait"])
        .args(&exec.argv)
        .env("TERM", "xterm");
    command
        .stdin(terminal.try_clone()?)
        .stdout(terminal.try_clone()?)
        .stderr(terminal);
    let child = start(command, exec)?;
    let controller = File::from(controller);
    let output: Box<dyn Read + Send> = Box::new(controller.try_clone()?);
    Ok((
        child,
        Input::Terminal(controller),
        vec![(Kind::Stdout, output)],
    ))
}

fn window(size: TerminalSize) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn forward_output(mut output: impl Read, kind: Kind, to_client: &Mutex<TcpStream>) {
    let mut buffer = vec![0u8; 64 << 10];
    while let Ok(length) = output.read(&mut buffer) {
        let stream = to_client.lock().unwrap_or_else(PoisonError::into_inner);
        if length == 0 || wire::send(&*stream, kind, &buffer[..length]).is_err() {
            return;
        }
    }
}

/// Returns when the client's side of the connection ends.
fn forward_input(from_client: &TcpStream, mut input: Input) {
    while let Ok(Some((kind, payload))) = wire::receive(from_client) {
        match (&mut input, kind) {
            // A program that doesn't read its input isn't an error.
            (Input::Pipe(Some(pipe)), Kind::Stdin) => drop(pipe.write_all(&payload)),
            (Input::Pipe(pipe), Kind::StdinEnd) => *pipe = None,
            (Input::Terminal(terminal), Kind::Stdin) => drop(terminal.write_all(&payload)),
            (Input::Terminal(terminal), Kind::Resize) => {
                if let Ok(size) = serde_json::from_slice::<TerminalSize>(&payload) {
                    let _ = rustix::termios::tcsetwinsize(terminal.as_fd(), window(size));
                }
            }
            _ => {}
        }
    }
}

fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| status.signal().map_or(255, |signal| 128 + signal))
}

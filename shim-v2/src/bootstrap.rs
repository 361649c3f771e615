//! The commands that containerd runs before there is a connection: `start` and `-v`.
//!
//! `start` leaves a server behind and prints how to reach it, in the dialect of its caller:
//!
//! | caller | reply |
//! | --- | --- |
//! | containerd 1.6 | the bare address |
//! | 1.7 to 2.2 (sets `MAX_SHIM_VERSION`) | JSON |
//! | 2.3 on (sends `BootstrapParams` on standard input) | `BootstrapResult` as protobuf |
//!
//! The server's socket listens before it is spawned and is handed to it as standard input, so that a
//! connection succeeds at once. Its standard output tells when it serves, or why it can't.

use crate::{
    args::Args,
    bundle::{BundleError, Membership},
    config::{PATH_VARIABLE, TEXT_VARIABLE},
    runtime_options::{ConfigSource, OptionsError, RuntimeOptions},
    state_dir::socket_path,
};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use protobuf::{Message as _, well_known_types::any::Any};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::{
    fs::{self, File},
    io::{self, IsTerminal as _, Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{DirBuilderExt as _, OpenOptionsExt as _},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

/// What the server writes when it serves; anything else is the reason why it can't.
pub(crate) const READY: u8 = b'+';
const READY_DEADLINE_SECONDS: i64 = 30;
const MAX_INPUT_BYTES: u64 = 4 << 20;
const MAX_REASON_BYTES: u64 = 4096;
/// Set by containerd from 1.7 on.
const VERSION_VARIABLE: &str = "MAX_SHIM_VERSION";
/// The Task API of a reply that every containerd takes: 1.7 refuses 3 in JSON, and 2.x speaks 2 as well.
const COMMON_VERSION: i32 = 2;
const PROTOCOL: &str = "ttrpc";

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootstrapError {
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The Pod that a container joins.
    #[error("sandbox {0:?} of this container has no running shim")]
    NoSandbox(String),
    /// A file, a socket or a process.
    #[error("{what} {path:?} failed")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The options of the runtime.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The server.
    #[error("the shim's server did not start: {0}")]
    Server(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Dialect {
    Bare,
    Json,
    Protobuf,
}

/// `start`.
pub(crate) fn start(args: &Args) -> anyhow::Result<()> {
    let input = read_stdin()?;
    let max_version = std::env::var_os(VERSION_VARIABLE).is_some();
    let dialect = dialect(&input, args, max_version);
    let options = options(dialect, &input).map_err(BootstrapError::from)?;
    let bundle = bundle_of(args)?;
    let membership = Membership::read(&bundle, &args.id).map_err(BootstrapError::from)?;
    let socket = socket_path(
        &args.address,
        &args.namespace,
        membership.sandbox_id(&args.id),
    );
    let address = format!("unix://{}", socket.display());
    let answers = UnixStream::connect(&socket).is_ok();
    match membership {
        Membership::Joins(sandbox) if !answers => {
            return Err(BootstrapError::NoSandbox(sandbox).into());
        }
        Membership::Own if !answers => start_server(args, &bundle, &socket, &options.config)?,
        Membership::Own | Membership::Joins(_) => {}
    }
    let path = bundle.join("address");
    fs::write(&path, &address).map_err(host("writing", &path))?;
    io::stdout().write_all(&reply(dialect, &address))?;
    Ok(())
}

/// The options that standard input holds; with the parameters of containerd 2.3 they come with `Create` alone.
fn options(dialect: Dialect, input: &[u8]) -> Result<RuntimeOptions, OptionsError> {
    let options = (dialect != Dialect::Protobuf).then(|| Any::parse_from_bytes(input));
    // What is no `Any` is nothing that this program knows of.
    RuntimeOptions::read(options.and_then(Result::ok).as_ref())
}

/// `-v`.
pub(crate) fn version() -> anyhow::Result<()> {
    let (name, version) = (env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
    writeln!(io::stdout(), "{name} {version}")?;
    Ok(())
}

/// The bundle that a command is about: named, or the working directory.
pub(crate) fn bundle_of(args: &Args) -> io::Result<PathBuf> {
    args.bundle.clone().map_or_else(std::env::current_dir, Ok)
}

fn read_stdin() -> io::Result<Vec<u8>> {
    let mut input = Vec::new();
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        stdin.lock().take(MAX_INPUT_BYTES).read_to_end(&mut input)?;
    }
    Ok(input)
}

/// An older containerd sends a container's options, an `Any`, whose bytes decode as bootstrap parameters too:
/// its type is where they have the container's id, its value where they have the namespace.
fn dialect(input: &[u8], args: &Args, max_version: bool) -> Dialect {
    let names_it = BootstrapParams::parse_from_bytes(input).is_ok_and(|parameters| {
        parameters.instance_id == args.id && parameters.namespace == args.namespace
    });
    match (names_it, max_version) {
        (true, _) => Dialect::Protobuf,
        (false, true) => Dialect::Json,
        (false, false) => Dialect::Bare,
    }
}

fn reply(dialect: Dialect, address: &str) -> Vec<u8> {
    match dialect {
        Dialect::Bare => address.as_bytes().to_vec(),
        Dialect::Json => serde_json::json!({
            "version": COMMON_VERSION, "address": address, "protocol": PROTOCOL,
        })
        .to_string()
        .into_bytes(),
        Dialect::Protobuf => {
            let result = BootstrapResult {
                version: containerd_shim_protos::TASK_API_VERSION,
                address: address.to_owned(),
                protocol: PROTOCOL.to_owned(),
                ..BootstrapResult::default()
            };
            // Three scalar fields that are all set: encoding them has nothing to fail on.
            result.write_to_bytes().unwrap_or_default()
        }
    }
}

fn start_server(
    args: &Args,
    bundle: &Path,
    socket: &Path,
    config: &ConfigSource,
) -> Result<(), BootstrapError> {
    let listener = listen(socket)?;
    let started = spawn(args, bundle, listener, config).and_then(|mut child| {
        let ready = wait_ready(&mut child).and_then(|()| {
            let path = bundle.join("shim.pid");
            fs::write(&path, child.id().to_string()).map_err(host("writing", &path))
        });
        if ready.is_err() {
            // It may have ended by itself; either way it is gone and reaped.
            let _ = child.kill();
            let _ = child.wait();
        }
        ready
    });
    if started.is_err() {
        // The first error is the one to tell.
        let _ = fs::remove_file(socket);
    }
    started
}

fn listen(socket: &Path) -> Result<UnixListener, BootstrapError> {
    if let Some(directory) = socket.parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(directory)
            .map_err(host("creating directory", directory))?;
    }
    // Nobody answered on it: a server that died left it.
    match fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(host("removing stale socket", socket)(error));
        }
        _ => {}
    }
    UnixListener::bind(socket).map_err(host("listening on", socket))
}

fn spawn(
    args: &Args,
    bundle: &Path,
    listener: UnixListener,
    config: &ConfigSource,
) -> Result<Child, BootstrapError> {
    // By its own name, as a person who looks for it will.
    let program = std::env::current_exe().map_err(host("finding", Path::new("/proc/self/exe")))?;
    let mut command = Command::new(&program);
    command
        .args([
            "-namespace",
            &args.namespace,
            "-id",
            &args.id,
            "-address",
            &args.address,
        ])
        .current_dir(bundle)
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::piped())
        .stderr(log_of(bundle));
    if args.debug {
        command.arg("-debug");
    }
    match config {
        ConfigSource::Node => {}
        ConfigSource::File(path) => {
            command.env(PATH_VARIABLE, path);
        }
        ConfigSource::Text(text) => {
            command.env(TEXT_VARIABLE, text);
        }
    }
    let child = command.spawn().map_err(host("starting", &program))?;
    protect(child.id());
    Ok(child)
}

/// containerd reads the bundle's `log` FIFO; without a reader there is nobody to tell.
fn log_of(bundle: &Path) -> Stdio {
    File::options()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(bundle.join("log"))
        .map_or_else(|_| Stdio::null(), Stdio::from)
}

/// The server is a little more killable than containerd, as all shims are, and less than its Pod.
fn protect(pid: u32) {
    let parent = rustix::process::getppid().map_or(1, |parent| parent.as_raw_nonzero().get());
    let score = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))
        .ok()
        .and_then(|score| score.trim().parse::<i32>().ok());
    if let Some(score) = score {
        // An unprivileged or nested containerd may not lower it: then the server keeps its parent's.
        let _ = fs::write(
            format!("/proc/{pid}/oom_score_adj"),
            (score + 1).min(1000).to_string(),
        );
    }
}

fn wait_ready(child: &mut Child) -> Result<(), BootstrapError> {
    let failed = |error: io::Error| BootstrapError::Server(error.to_string());
    let Some(mut stdout) = child.stdout.take() else {
        return Err(failed(io::ErrorKind::BrokenPipe.into()));
    };
    let deadline = Timespec {
        tv_sec: READY_DEADLINE_SECONDS,
        tv_nsec: 0,
    };
    let readable = poll(&mut [PollFd::new(&stdout, PollFlags::IN)], Some(&deadline))
        .map_err(|error| failed(error.into()))?;
    if readable == 0 {
        return Err(BootstrapError::Server(format!(
            "silent for {READY_DEADLINE_SECONDS} s"
        )));
    }
    let mut first = [0];
    match stdout.read(&mut first).map_err(failed)? {
        1 if first == [READY] => Ok(()),
        0 => Err(BootstrapError::Server("it ended without a word".to_owned())),
        _ => {
            let mut reason = first.to_vec();
            stdout
                .take(MAX_REASON_BYTES)
                .read_to_end(&mut reason)
                .map_err(failed)?;
            Err(BootstrapError::Server(
                String::from_utf8_lossy(&reason).into_owned(),
            ))
        }
    }
}

fn host(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BootstrapError {
    let path = path.to_owned();
    move |source| BootstrapError::Host { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn args(id: &str) -> Args {
        let line =
            format!("-namespace k8s.io -id {id} -address /run/containerd/containerd.sock start");
        Args::parse(line.split(' ').map(Into::into)).unwrap()
    }

    /// What containerd 1.7 to 2.2 write to standard input for a runtime with options: the `Any` of
    /// `containerd.runc.v1.Options{SystemdCgroup: true}`.
    const OPTIONS: &[u8] = b"\x0a\x1acontainerd.runc.v1.Options\x12\x02\x48\x01";
    /// What 2.3 writes: id, namespace, log level debug (-4), version, both addresses, its binary.
    const PARAMETERS: &[u8] = b"\x0a\x02c1\x12\x06k8s.io\x18\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x01\
        \x22\x06v2.3.0\x2a\x25/run/containerd/containerd.sock.ttrpc\x32\x1f/run/containerd/containerd.sock\
        \x3a\x13/usr/bin/containerd";

    #[test]
    fn each_containerd_is_answered_in_its_dialect() {
        let c1 = args("c1");
        for (input, max_version, expected) in [
            (&b""[..], false, Dialect::Bare),
            (OPTIONS, false, Dialect::Bare),
            (b"", true, Dialect::Json),
            (OPTIONS, true, Dialect::Json),
            (PARAMETERS, true, Dialect::Protobuf),
            // Of another container: whatever it is, it isn't for this one.
            (&PARAMETERS[..PARAMETERS.len() - 1], true, Dialect::Json),
        ] {
            assert_eq!(dialect(input, &c1, max_version), expected, "{input:?}");
        }
        assert_eq!(dialect(PARAMETERS, &args("c2"), true), Dialect::Json);
    }

    #[test]
    fn options_that_decode_as_parameters_are_known_by_what_they_name() {
        let decoded = BootstrapParams::parse_from_bytes(OPTIONS).unwrap();
        assert_eq!(decoded.instance_id, "containerd.runc.v1.Options");
        // Even for a container of that name.
        let named = args("containerd.runc.v1.Options");
        assert_eq!(dialect(OPTIONS, &named, true), Dialect::Json);
    }

    #[test]
    fn replies_are_byte_for_byte_what_each_containerd_reads() {
        let address = "unix:///run/containerd/s/x";
        assert_eq!(reply(Dialect::Bare, address), address.as_bytes());
        let json = r#"{"address":"unix:///run/containerd/s/x","protocol":"ttrpc","version":2}"#;
        assert_eq!(reply(Dialect::Json, address), json.as_bytes());
        let protobuf = b"\x08\x03\x12\x1aunix:///run/containerd/s/x\x1a\x05ttrpc";
        assert_eq!(reply(Dialect::Protobuf, address), protobuf);
        // 2.3 tries protobuf first, and must not find it in an older dialect.
        for dialect in [Dialect::Bare, Dialect::Json] {
            assert!(BootstrapResult::parse_from_bytes(&reply(dialect, address)).is_err());
        }
    }

    proptest! {
        #[test]
        fn any_input_has_a_dialect(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let _ = dialect(&bytes, &args("c1"), true);
        }
    }
}

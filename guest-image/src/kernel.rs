//! The guest's kernel: `vmlinux` from Debian's source package and our `kernel.fragment`.
//!
//! Steps: unpack, `allnoconfig` over the fragment, check that the fragment was taken as written,
//! compile, strip. Sources and objects stay where they are, so that a changed fragment compiles
//! only what it changes.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use crate::cache::{Cache, CacheError, Key, Origin};

/// Counts changes of this recipe.
const RECIPE: &str = "kernel 1";

/// The source package, and where it puts the source.
pub const SOURCE_PACKAGE: &str = "linux-source-6.12";
const SOURCE_ARCHIVE: &str = "/usr/src/linux-source-6.12.tar.xz";

/// Everything that would differ between two builds of the same source (Linux's
/// Documentation/kbuild/reproducible-builds.rst).
const REPRODUCIBLE: [(&str, &str); 6] = [
    ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970"),
    ("KBUILD_BUILD_USER", "walnut"),
    ("KBUILD_BUILD_HOST", "walnut"),
    ("KBUILD_BUILD_VERSION", "1"),
    ("SOURCE_DATE_EPOCH", "0"),
    ("LC_ALL", "C"),
];

/// How often a long step says how far it is.
const TICK: Duration = Duration::from_secs(15);

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A file operation failed.
    #[error("{action} {}", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A program can't be started.
    #[error("run {program} (is its package installed?)")]
    Spawn {
        /// Its name.
        program: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} failed ({status}); its last lines:\n{tail}\nall of them: {}", log.display())]
    Failed {
        /// Its name.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of its output.
        tail: String,
        /// Where all output is.
        log: PathBuf,
    },
    /// The source package isn't installed.
    #[error("package {SOURCE_PACKAGE} is not installed")]
    NoSource,
    /// Kconfig did not take the fragment as written.
    #[error("the kernel's configuration does not follow kernel.fragment: {}", lines.join(", "))]
    Unresolved {
        /// What was asked and what came out.
        lines: Vec<String>,
    },
}

/// How far a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Unpacking the source.
    Unpacking,
    /// Making the configuration.
    Configuring,
    /// Compiling.
    Compiling {
        /// How many files are compiled.
        objects: usize,
        /// Since when.
        elapsed: Duration,
    },
}

/// Makes the kernel, or finds it in the cache. `observe` hears of each stage, and every few
/// seconds of a long one.
pub fn build(
    cache: &Cache,
    fragment: &Path,
    observe: &dyn Fn(Stage),
) -> Result<(PathBuf, Origin), KernelError> {
    let key = key(fragment)?;
    let (entry, origin) = cache.get_or_make("guest-image", &key, |folder| {
        let tree = Tree::new(cache)?;
        tree.build(fragment, folder, observe)
    })?;
    Ok((entry.join("vmlinux"), origin))
}

/// The hash of everything that the kernel is made of.
pub fn key(fragment: &Path) -> Result<Key, KernelError> {
    let source = first_line("dpkg-query", &["-W", "-f", "${Version}", SOURCE_PACKAGE])?;
    if source.is_empty() {
        return Err(KernelError::NoSource);
    }
    let compiler = first_line("gcc", &["--version"])?;
    let linker = first_line("ld", &["--version"])?;
    Ok(Key::new(RECIPE)
        .with("source", source.as_bytes())
        .with("compiler", compiler.as_bytes())
        .with("linker", linker.as_bytes())
        .with_file("fragment", fragment)?)
}

/// The unpacked source and the objects made of it.
struct Tree {
    source: PathBuf,
    objects: PathBuf,
    stamp: PathBuf,
    logs: PathBuf,
    _lock: File,
}

impl Tree {
    fn new(cache: &Cache) -> Result<Self, KernelError> {
        let root = cache.folder("guest-image").join("kernel-tree");
        attempt("create", &root, |path| fs::create_dir_all(path))?;
        let lock = attempt("create", &root.join("lock"), |path| File::create(path))?;
        attempt("lock", &root.join("lock"), |_| lock.lock())?;
        Ok(Self {
            source: root.join("source"),
            objects: root.join("objects"),
            stamp: root.join("unpacked"),
            logs: root,
            _lock: lock,
        })
    }

    fn build(
        &self,
        fragment: &Path,
        result: &Path,
        observe: &dyn Fn(Stage),
    ) -> Result<(), KernelError> {
        self.unpack(observe)?;
        observe(Stage::Configuring);
        let mut setting = std::ffi::OsString::from("KCONFIG_ALLCONFIG=");
        setting.push(fragment);
        let log = self.logs.join("configure.log");
        run(self.make().arg(setting).arg("allnoconfig"), &log, &|_| {})?;
        self.check_configuration(fragment)?;
        let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let log = self.logs.join("compile.log");
        let tick = |elapsed| {
            observe(Stage::Compiling {
                objects: count_objects(&log),
                elapsed,
            })
        };
        run(
            self.make().arg(format!("-j{jobs}")).arg("vmlinux"),
            &log,
            &tick,
        )?;
        let mut strip = Command::new("strip");
        strip
            .arg("-s")
            .arg("-o")
            .arg(result.join("vmlinux"))
            .arg(self.objects.join("vmlinux"));
        run(&mut strip, &self.logs.join("strip.log"), &|_| {})?;
        let configuration = result.join("config");
        attempt("copy the configuration to", &configuration, |path| {
            fs::copy(self.objects.join(".config"), path).map(drop)
        })
    }

    fn unpack(&self, observe: &dyn Fn(Stage)) -> Result<(), KernelError> {
        let version = first_line("dpkg-query", &["-W", "-f", "${Version}", SOURCE_PACKAGE])?;
        if fs::read_to_string(&self.stamp).is_ok_and(|stamp| stamp == version) {
            return Ok(());
        }
        observe(Stage::Unpacking);
        for folder in [&self.source, &self.objects] {
            if folder.exists() {
                attempt("remove", folder, |path| fs::remove_dir_all(path))?;
            }
            attempt("create", folder, |path| fs::create_dir_all(path))?;
        }
        let mut tar = Command::new("tar");
        tar.arg("-C")
            .arg(&self.source)
            .args(["--strip-components=1", "-xf", SOURCE_ARCHIVE]);
        run(&mut tar, &self.logs.join("unpack.log"), &|_| {})?;
        attempt("write", &self.stamp, |path| fs::write(path, &version))
    }

    fn make(&self) -> Command {
        let mut make = Command::new("make");
        // What the surrounding make or cargo sets is not for this one.
        make.env_remove("MAKEFLAGS")
            .env_remove("MFLAGS")
            .env_remove("CARGO_MAKEFLAGS");
        make.envs(REPRODUCIBLE).arg("-C").arg(&self.source);
        let mut output = std::ffi::OsString::from("O=");
        output.push(&self.objects);
        make.arg(output);
        make
    }

    fn check_configuration(&self, fragment: &Path) -> Result<(), KernelError> {
        let asked = attempt("read", fragment, |path| fs::read_to_string(path))?;
        let path = self.objects.join(".config");
        let resolved = attempt("read", &path, |path| fs::read_to_string(path))?;
        let lines = unresolved(&asked, &resolved);
        if lines.is_empty() {
            Ok(())
        } else {
            Err(KernelError::Unresolved { lines })
        }
    }
}

/// The settings of the fragment that the configuration doesn't have.
fn unresolved(asked: &str, resolved: &str) -> Vec<String> {
    let resolved: Vec<&str> = resolved.lines().map(str::trim).collect();
    let setting = |line: &str| line.split_once('=').map(|(name, _)| name.to_owned());
    let mut lines = Vec::new();
    for line in asked
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("CONFIG_"))
    {
        let Some(name) = setting(line) else { continue };
        let found = resolved
            .iter()
            .find(|other| setting(other).as_deref() == Some(&name));
        match (line.ends_with("=n"), found) {
            (true, None) => {}
            (false, Some(found)) if *found == line => {}
            (_, Some(found)) => lines.push(format!("{line} (is {found})")),
            (_, None) => lines.push(format!("{line} (is not set)")),
        }
    }
    lines
}

/// Kbuild prints one line for each file that it makes.
fn count_objects(log: &Path) -> usize {
    let Ok(file) = File::open(log) else { return 0 };
    let made = ["  CC ", "  AS ", "  AR "];
    let lines = BufReader::new(file).lines().map_while(Result::ok);
    lines
        .filter(|line| made.iter().any(|kind| line.starts_with(kind)))
        .count()
}

/// Runs a program with its output in a log, and calls `tick` every now and then.
fn run(command: &mut Command, log: &Path, tick: &dyn Fn(Duration)) -> Result<(), KernelError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = attempt("create", log, |path| File::create(path))?;
    let errors = attempt("open", log, |_| output.try_clone())?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .map_err(|source| KernelError::Spawn {
            program: program.clone(),
            source,
        })?;
    let started = Instant::now();
    let (ended, end) = mpsc::channel();
    let waiter = std::thread::spawn(move || {
        let status = child.wait();
        let _ = ended.send(());
        status
    });
    while matches!(end.recv_timeout(TICK), Err(RecvTimeoutError::Timeout)) {
        tick(started.elapsed());
    }
    let status = waiter
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the waiting thread panicked")))
        .map_err(|source| KernelError::Spawn {
            program: program.clone(),
            source,
        })?;
    if status.success() {
        return Ok(());
    }
    let text = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(15)..].join("\n");
    Err(KernelError::Failed {
        program,
        status,
        tail,
        log: log.to_owned(),
    })
}

fn first_line(program: &str, arguments: &[&str]) -> Result<String, KernelError> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .map_err(|source| KernelError::Spawn {
            program: program.to_owned(),
            source,
        })?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

fn attempt<T>(
    action: &'static str,
    path: &Path,
    operation: impl FnOnce(&Path) -> io::Result<T>,
) -> Result<T, KernelError> {
    operation(path).map_err(|source| KernelError::Io {
        action,
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fragment_that_was_taken_is_silent() {
        let asked = "# comment\nCONFIG_A=y\nCONFIG_B=n\nCONFIG_C=\"text\"\n";
        let resolved = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"text\"\n";
        assert!(unresolved(asked, resolved).is_empty());
    }

    #[test]
    fn what_kconfig_dropped_is_listed() {
        let asked = "CONFIG_A=y\nCONFIG_B=n\nCONFIG_C=64\n";
        let resolved = "# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C=32\n";
        assert_eq!(
            unresolved(asked, resolved),
            [
                "CONFIG_A=y (is not set)",
                "CONFIG_B=n (is CONFIG_B=y)",
                "CONFIG_C=64 (is CONFIG_C=32)"
            ]
        );
    }

    #[test]
    fn objects_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        fs::write(
            &log,
            "  CC      a.o\n  HOSTCC  b\n  AS      c.o\nmake[1]: x\n",
        )
        .unwrap();
        assert_eq!(count_objects(&log), 2);
    }

    #[test]
    fn a_failed_program_shows_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut command = Command::new("sh");
        command.args(["-c", "echo reason; exit 3"]);
        let error = run(&mut command, &log, &|_| {}).unwrap_err().to_string();
        assert!(
            error.contains("reason") && error.contains("exit status: 3"),
            "{error}"
        );
    }
}

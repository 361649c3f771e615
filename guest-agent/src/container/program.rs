//! Finds the program of a process inside the container, and becomes it.
//!
//! Errors are in the words that users of runc know, as they are matched by people and programs. Must not
//! change who the process is: the search is made as the user.

use super::{OsError, SetupError, spec::Process};
use rustix::{
    fs::{Access, FileType, access, stat},
    io::Errno,
};
use std::{
    ffi::{CString, OsStr, OsString},
    fs::File,
    io::{BufRead, BufReader, Read},
    os::unix::ffi::{OsStrExt, OsStringExt},
    path::{Path, PathBuf},
};

/// `/etc/passwd` is an image's: read no more of it than this.
const MAX_PASSWD_BYTES: u64 = 1024 * 1024;

/// A program that was found, ready to be executed.
#[derive(Debug)]
pub(super) struct Program {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

/// Finds the program of `process`. The root is the container's, and the user the process's.
pub(super) fn find(process: &Process) -> Result<Program, SetupError> {
    let name = process.args.first().map_or("", String::as_str);
    let path = look_up(name, variable(&process.env, "PATH"))?;
    let mut env = process.env.clone();
    if variable(&env, "HOME").is_none_or(str::is_empty) {
        env.retain(|entry| !entry.starts_with("HOME="));
        let home = home_of(process.user.uid);
        env.push(format!("HOME={}", home.to_string_lossy()));
    }
    let text = |bytes: &[u8]| {
        CString::new(bytes).map_err(|_| SetupError::Request(format!("exec: {name:?}: zero byte")))
    };
    Ok(Program {
        path: text(path.as_os_str().as_bytes())?,
        args: process
            .args
            .iter()
            .map(|arg| text(arg.as_bytes()))
            .collect::<Result<_, _>>()?,
        env: env
            .iter()
            .map(|entry| text(entry.as_bytes()))
            .collect::<Result<_, _>>()?,
    })
}

impl Program {
    /// Replaces this process by the program; returns only if that failed.
    pub(super) fn execute(&self) -> SetupError {
        match nix::unistd::execve(&self.path, &self.args, &self.env) {
            Ok(never) => match never {},
            Err(error) => SetupError::named(format!("exec {}", self.path.to_string_lossy()))(error),
        }
    }
}

/// The value of a variable; of two, the last counts.
fn variable<'a>(env: &'a [String], name: &str) -> Option<&'a str> {
    env.iter()
        .rev()
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
}

fn look_up(name: &str, path: Option<&str>) -> Result<PathBuf, SetupError> {
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(error @ (Errno::NOENT | Errno::NOTDIR | Errno::LOOP)) => Err(SetupError::Request(
                format!("exec: {name:?}: stat {name}: {}", OsError::from(error)),
            )),
            Err(error) => Err(SetupError::Request(format!(
                "exec: {name:?}: {}",
                OsError::from(error)
            ))),
        };
    }
    path.unwrap_or_default()
        .split(':')
        // An empty part would be the directory that the process starts in: no place to look for programs.
        .filter(|directory| !directory.is_empty())
        .map(|directory| Path::new(directory).join(name))
        .find(|candidate| executable(candidate).is_ok())
        .ok_or_else(|| {
            SetupError::Request(format!(
                "exec: {name:?}: executable file not found in $PATH"
            ))
        })
}

fn executable(path: &Path) -> Result<(), Errno> {
    match FileType::from_raw_mode(stat(path)?.st_mode) {
        FileType::Directory => Err(Errno::ISDIR),
        _ => access(path, Access::EXEC_OK),
    }
}

/// Home of a user by the container's `/etc/passwd`, else the root.
fn home_of(uid: u32) -> OsString {
    File::open("/etc/passwd")
        .ok()
        .and_then(|file| home_in(BufReader::new(file.take(MAX_PASSWD_BYTES)), uid))
        .unwrap_or_else(|| "/".into())
}

/// passwd(5): name, password, uid, gid, comment, home, shell.
fn home_in(passwd: impl BufRead, uid: u32) -> Option<OsString> {
    let uid = uid.to_string();
    passwd.split(b'\n').map_while(Result::ok).find_map(|line| {
        let mut fields = line.split(|byte| *byte == b':').skip(2);
        (fields.next()? == uid.as_bytes()).then_some(())?;
        let home = fields.nth(2)?;
        (!home.is_empty()).then(|| OsString::from_vec(OsStr::from_bytes(home).as_bytes().to_vec()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(name: &str, path: &str) -> String {
        look_up(name, Some(path)).unwrap_err().to_string()
    }

    #[test]
    fn what_cannot_run_is_told_as_by_runc() {
        assert_eq!(
            words("nosuch", "/bin:/usr/bin"),
            "exec: \"nosuch\": executable file not found in $PATH"
        );
        assert_eq!(
            words("/no/such", ""),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        assert_eq!(words("/etc", ""), "exec: \"/etc\": is a directory");
        assert_eq!(
            words("/etc/passwd", ""),
            "exec: \"/etc/passwd\": permission denied"
        );
    }

    #[test]
    fn the_first_directory_with_the_program_wins() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("sh")).unwrap();
        let path = format!(":{}:/bin", directory.path().display());
        assert_eq!(look_up("sh", Some(&path)).unwrap(), Path::new("/bin/sh"));
    }

    #[test]
    fn home_is_that_of_the_user() {
        let passwd =
            &b"root:x:0:0:root:/root:/bin/sh\nshort:x\n\nweb:x:33:33::/var/www:\nnone:x:34:34::"[..];
        assert_eq!(home_in(passwd, 33), Some("/var/www".into()));
        assert_eq!(home_in(passwd, 34), None);
        assert_eq!(home_in(passwd, 3), None);
    }

    proptest! {
        #[test]
        fn no_passwd_is_too_strange(bytes: Vec<u8>, uid: u32) {
            let _ = home_in(&bytes[..], uid);
        }
    }
}

//! The command line that containerd gives to a shim.
//!
//! The grammar is that of Go's `flag` package: `-name value`, `-name=value`, one or two dashes, switches
//! without a value, then at most one command. Must not do I/O.

use std::{ffi::OsString, path::PathBuf};

/// What the program is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    /// Find or start the server of a Pod and print its address.
    Start,
    /// Remove what a dead server left behind.
    Delete,
    /// Print what this runtime is.
    Info,
    /// Print the version.
    Version,
    /// Be the server.
    Serve,
}

/// The command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Args {
    /// What to do.
    pub(crate) command: Command,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// The container, or for the server the sandbox.
    pub(crate) id: String,
    /// containerd's gRPC socket; its ttrpc socket is named after it.
    pub(crate) address: String,
    /// The bundle, when it isn't the working directory.
    pub(crate) bundle: Option<PathBuf>,
    /// Whether containerd itself runs with debug messages.
    pub(crate) debug: bool,
}

/// Why a command line is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ArgsError {
    /// Not UTF-8.
    #[error("argument {0:?} is not UTF-8")]
    NotText(OsString),
    /// Not a flag of the shim contract.
    #[error("flag {0:?} is unknown")]
    UnknownFlag(String),
    /// A flag at the end of the line that needs a value.
    #[error("flag -{0} needs a value")]
    NoValue(String),
    /// Not a command of the shim contract.
    #[error("command {0:?} is unknown; containerd uses \"start\" and \"delete\"")]
    UnknownCommand(String),
    /// A name that would be used as part of a path.
    #[error(
        "{flag} {value:?} must be 1 to 128 letters, digits, '_', '-' or '.', opening with a letter or digit"
    )]
    Name {
        /// The flag.
        flag: &'static str,
        /// What was given.
        value: String,
    },
}

impl Args {
    /// Reads the arguments that follow the program's name.
    pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, ArgsError> {
        let mut args = Self {
            command: Command::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: None,
            debug: false,
        };
        let mut words = arguments.into_iter();
        while let Some(word) = words.next() {
            let word = word.into_string().map_err(ArgsError::NotText)?;
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                args.command = match word.as_str() {
                    "start" => Command::Start,
                    "delete" => Command::Delete,
                    _ => return Err(ArgsError::UnknownCommand(word)),
                };
                continue;
            };
            match flag {
                "info" => args.command = Command::Info,
                "v" => args.command = Command::Version,
                "debug" => args.debug = true,
                _ => args.take_value(flag, &mut words)?,
            }
        }
        if !matches!(args.command, Command::Info | Command::Version) {
            check_name("-namespace", &args.namespace)?;
            check_name("-id", &args.id)?;
        }
        Ok(args)
    }

    fn take_value(
        &mut self,
        flag: &str,
        words: &mut impl Iterator<Item = OsString>,
    ) -> Result<(), ArgsError> {
        let (name, joined) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let known = [
            "namespace",
            "id",
            "address",
            "bundle",
            "publish-binary",
            "socket",
        ];
        if !known.contains(&name) {
            return Err(ArgsError::UnknownFlag(format!("-{flag}")));
        }
        let value = match joined {
            Some(value) => value,
            None => words
                .next()
                .ok_or_else(|| ArgsError::NoValue(name.to_owned()))?
                .into_string()
                .map_err(ArgsError::NotText)?,
        };
        match name {
            "namespace" => self.namespace = value,
            "id" => self.id = value,
            "address" => self.address = value,
            "bundle" => self.bundle = Some(PathBuf::from(value)).filter(|path| path != ""),
            // Events go through containerd's ttrpc socket, so its binary is not run; and the server's
            // socket is inherited, not named.
            _ => {}
        }
        Ok(())
    }
}

/// Checks a name that becomes part of a path. containerd's own rule (its `identifiers` package) is
/// narrower; this one only keeps the name a single, ordinary path component.
fn check_name(flag: &'static str, value: &str) -> Result<(), ArgsError> {
    let ordinary = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    let good = value.len() <= 128
        && value
            .bytes()
            .next()
            .is_some_and(|byte| byte.is_ascii_alphanumeric())
        && value.bytes().all(ordinary);
    if good {
        return Ok(());
    }
    Err(ArgsError::Name {
        flag,
        value: value.to_owned(),
    })
}

/// Whether a container's or process's id, as it comes in a request, may become part of a path.
pub(crate) fn is_name(value: &str) -> bool {
    check_name("id", value).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn containerds_own_command_lines_are_understood() {
        let start = parse(
            "-namespace default -address /run/containerd/containerd.sock \
             -publish-binary /usr/bin/containerd -id c1 -debug start",
        )
        .unwrap();
        assert_eq!(start.command, Command::Start);
        assert_eq!(
            (start.namespace.as_str(), start.id.as_str()),
            ("default", "c1")
        );
        assert!(start.debug && start.bundle.is_none());
        let delete = parse("--namespace=k8s.io -id=c1 -bundle /b delete").unwrap();
        assert_eq!(delete.command, Command::Delete);
        assert_eq!(delete.bundle, Some(PathBuf::from("/b")));
        assert_eq!(parse("-info").unwrap().command, Command::Info);
        assert_eq!(parse("-v").unwrap().command, Command::Version);
    }

    #[test]
    fn names_that_could_leave_their_directory_are_refused() {
        for id in ["..", "a/b", ".hidden", "-x", "a%b"] {
            let error = parse(&format!("-namespace default -id {id} start")).unwrap_err();
            assert!(
                matches!(error, ArgsError::Name { flag: "-id", .. }),
                "{id}: {error}"
            );
        }
        assert!(parse("-id c1 start").is_err(), "no namespace");
    }

    #[test]
    fn what_is_unknown_is_named() {
        assert_eq!(
            parse("-turbo x"),
            Err(ArgsError::UnknownFlag("-turbo".into()))
        );
        assert_eq!(parse("stop"), Err(ArgsError::UnknownCommand("stop".into())));
        assert_eq!(parse("-id"), Err(ArgsError::NoValue("id".into())));
    }

    proptest! {
        #[test]
        fn any_line_is_arguments_or_an_error(line in "[-a-z= /.]{0,64}") {
            let _ = parse(&line);
        }
    }
}

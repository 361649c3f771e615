//! What containerd is told about the runtime itself, beside a container's specification: an `Any` with `Create`, and on
//! standard input of `start`.
//!
//! `runtimeoptions.v1.Options` comes from a handler's configuration and from `ctr run --runtime-config-path`;
//! `containerd.runc.v1.Options` from containerd's own clients, some of which send it to any runtime. What has no meaning
//! here is refused by its name, so that nobody believes that it is in effect. Pure.

use crate::fields::Fields;
use protobuf::well_known_types::any::Any;
use std::path::PathBuf;

/// Where a configuration is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) enum ConfigSource {
    /// The node's.
    #[default]
    Node,
    /// A file.
    File(PathBuf),
    /// The text itself.
    Text(String),
}

/// Options that are understood.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct RuntimeOptions {
    /// The configuration of this Pod.
    pub(crate) config: ConfigSource,
    /// A cgroup of the host that the shim shall be in.
    pub(crate) shim_cgroup: Option<PathBuf>,
}

/// Why they are refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OptionsError {
    /// Of a kind that nobody here knows.
    #[error("runtime options of type {0:?} are not known to Walnut")]
    Type(String),
    /// Not what the type says.
    #[error("the runtime options are no {kind}")]
    Message {
        /// The type.
        kind: &'static str,
        /// Why not.
        source: protobuf::Error,
    },
    /// A knob of runc's.
    #[error("the runtime option {0} is runc's alone")]
    OfRunc(&'static str),
    /// Two configurations.
    #[error("the runtime options have a config_path, {0:?}, and a config_body: only one can hold")]
    TwoConfigs(PathBuf),
    /// A text that is none.
    #[error("config_body of the runtime options is no UTF-8")]
    Text(#[from] std::string::FromUtf8Error),
}

const GENERIC: &str = "runtimeoptions.v1.Options";
const RUNC: &str = "containerd.runc.v1.Options";
/// Fields of runc's options that ask for something of runc's program or of its way to make a container. Of the others,
/// `systemd_cgroup` (9) says how `cgroupsPath` is written, which is seen in the path itself, and where the Task API is
/// (12, 13) containerd says for its own use.
const OF_RUNC: [(u32, &str); 8] = [
    (1, "no_pivot_root"),
    (2, "no_new_keyring"),
    (4, "io_uid"),
    (5, "io_gid"),
    (6, "binary_name"),
    (7, "root"),
    (10, "criu_image_path"),
    (11, "criu_work_path"),
];

impl RuntimeOptions {
    /// Reads options; none are as good as empty ones.
    pub(crate) fn read(options: Option<&Any>) -> Result<Self, OptionsError> {
        let Some(options) = options.filter(|options| !options.type_url.is_empty()) else {
            return Ok(Self::default());
        };
        let parse = |kind| {
            let message = |source| OptionsError::Message { kind, source };
            Fields::parse(&options.value).map_err(message)
        };
        let name = options.type_url.rsplit('/').next().unwrap_or_default();
        match name {
            GENERIC => Self::generic(&parse(GENERIC)?),
            RUNC => Self::of_runc(&parse(RUNC)?),
            _ => Err(OptionsError::Type(options.type_url.clone())),
        }
    }

    fn generic(fields: &Fields) -> Result<Self, OptionsError> {
        let (path, body) = (fields.text(2), fields.bytes(3));
        let config = match (path.is_empty(), body.is_empty()) {
            (true, true) => ConfigSource::Node,
            (false, true) => ConfigSource::File(path.into()),
            (true, false) => ConfigSource::Text(String::from_utf8(body.to_vec())?),
            (false, false) => return Err(OptionsError::TwoConfigs(path.into())),
        };
        Ok(Self {
            config,
            shim_cgroup: None,
        })
    }

    fn of_runc(fields: &Fields) -> Result<Self, OptionsError> {
        let asked = |number| fields.number(number) != 0 || !fields.bytes(number).is_empty();
        if let Some((_, name)) = OF_RUNC.into_iter().find(|(number, _)| asked(*number)) {
            return Err(OptionsError::OfRunc(name));
        }
        let path = fields.text(3);
        Ok(Self {
            config: ConfigSource::Node,
            shim_cgroup: (!path.is_empty()).then(|| path.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(kind: &str, value: &[u8]) -> Result<RuntimeOptions, OptionsError> {
        RuntimeOptions::read(Some(&Any {
            type_url: kind.to_owned(),
            value: value.to_vec(),
            ..Any::default()
        }))
    }

    #[test]
    fn no_options_and_empty_ones_are_the_same() {
        let none = RuntimeOptions::default();
        assert_eq!(RuntimeOptions::read(None).unwrap(), none);
        for kind in [
            "",
            GENERIC,
            RUNC,
            "types.containerd.io/runtimeoptions.v1.Options",
        ] {
            assert_eq!(read(kind, b"").unwrap(), none, "{kind}");
        }
    }

    #[test]
    fn a_configuration_is_a_file_or_a_text() {
        let file = read(GENERIC, b"\x0a\x01t\x12\x02/c").unwrap();
        assert_eq!(file.config, ConfigSource::File("/c".into()));
        let text = read(GENERIC, b"\x1a\x09vcpus = 2").unwrap();
        assert_eq!(text.config, ConfigSource::Text("vcpus = 2".to_owned()));
        let both = read(GENERIC, b"\x12\x02/c\x1a\x01x").unwrap_err();
        assert!(both.to_string().contains("\"/c\""), "{both}");
        assert!(read(GENERIC, b"\x1a\x01\xff").is_err());
    }

    #[test]
    fn what_is_of_runc_is_refused_by_its_name_and_the_rest_is_taken() {
        let options = read(RUNC, b"\x1a\x02/s\x48\x01\x62\x01a\x68\x03").unwrap();
        assert_eq!(options.shim_cgroup, Some("/s".into()));
        for (value, name) in [
            (&b"\x08\x01"[..], "no_pivot_root"),
            (b"\x20\x05", "io_uid"),
            (b"\x32\x04runc", "binary_name"),
            (b"\x5a\x01w", "criu_work_path"),
        ] {
            let error = read(RUNC, value).unwrap_err().to_string();
            assert_eq!(error, format!("the runtime option {name} is runc's alone"));
        }
        let error = read("other.Options", b"").unwrap_err().to_string();
        assert!(error.contains("other.Options"), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_options_or_an_error(kind in "(runtimeoptions|containerd.runc).v1.Options", value: Vec<u8>) {
            let _ = read(&kind, &value);
        }
    }
}

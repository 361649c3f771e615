//! The configuration file, `/etc/walnut/config.toml`.
//!
//! Absent means the defaults; an unknown key is an error. Must not look at the files that it names: `vm`
//! opens them, and says which one is missing.

use crate::runtime_options::ConfigSource;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use walnut_shim_api::{CONFIG, INITRAMFS, KERNEL, VMM};
use walnut_vmm_api::{MAX_MEMORY_MIB, MAX_VCPUS, MIN_MEMORY_MIB};

/// Names another file; used by tests and by nodes with several configurations.
pub(crate) const PATH_VARIABLE: &str = "WALNUT_CONFIG";
/// Holds a configuration.
pub(crate) const TEXT_VARIABLE: &str = "WALNUT_CONFIG_BODY";

/// What may differ between nodes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Config {
    /// The VMM's program.
    pub(crate) vmm: PathBuf,
    /// The guest's kernel.
    pub(crate) kernel: PathBuf,
    /// The guest's initramfs.
    pub(crate) initramfs: PathBuf,
    /// vCPUs of a Pod.
    pub(crate) vcpus: u8,
    /// Guest RAM of a Pod that nothing limits.
    pub(crate) memory_mib: u32,
    /// MiB of guest RAM for what a container writes over an image's layers that are disks; 0: it goes to the host's
    /// snapshot.
    pub(crate) writable_layer_mib: u32,
    /// vCPUs of a Pod at the most; as many as the host has where absent. Each costs guest memory, used or not.
    pub(crate) max_vcpus: Option<u8>,
    /// Guest RAM of a Pod at the most; as much as the host has where absent.
    pub(crate) max_memory_mib: Option<u32>,
}

/// Why the configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// It can't be read.
    #[error("configuration {path:?} cannot be read")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It isn't TOML, or has keys or types that don't exist.
    #[error("configuration {path:?} is wrong: {message}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Line, column and reason on one line.
        message: String,
    },
    /// A number outside its range.
    #[error("configuration {path:?}: {key} is {value}, but must be between {min} and {max}")]
    Range {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Its value.
        value: u32,
        /// The least that is allowed.
        min: u32,
        /// The most that is allowed.
        max: u32,
    },
}

impl Default for Config {
    fn default() -> Self {
        Self {
            vmm: VMM.into(),
            kernel: KERNEL.into(),
            initramfs: INITRAMFS.into(),
            vcpus: 1,
            memory_mib: 256,
            writable_layer_mib: 0,
            max_vcpus: None,
            max_memory_mib: None,
        }
    }
}

impl Config {
    /// Reads what the options of a container name, else what they had when the shim was started, else the default file,
    /// else takes the defaults.
    pub(crate) fn load(source: &ConfigSource) -> Result<Self, ConfigError> {
        let named = match source {
            ConfigSource::Text(text) => return Self::parse(text, Path::new("config_body")),
            ConfigSource::File(path) => Some(path.clone()),
            ConfigSource::Node => {
                if let Ok(text) = std::env::var(TEXT_VARIABLE) {
                    return Self::parse(&text, Path::new("config_body"));
                }
                std::env::var_os(PATH_VARIABLE).map(PathBuf::from)
            }
        };
        let path = named.clone().unwrap_or_else(|| CONFIG.into());
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text, &path),
            Err(error) if named.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::default())
            }
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Parse {
            path: path.to_owned(),
            message: describe(text, &error),
        })?;
        let (vcpus, memory) = (config.vcpus.into(), config.memory_mib);
        let max_vcpus = config.max_vcpus.map_or(vcpus, u32::from);
        let max_memory = config.max_memory_mib.unwrap_or(memory);
        let ranges = [
            ("vcpus", vcpus, 1, MAX_VCPUS.into()),
            ("memory_mib", memory, MIN_MEMORY_MIB, MAX_MEMORY_MIB),
            ("max_vcpus", max_vcpus, vcpus, MAX_VCPUS.into()),
            ("max_memory_mib", max_memory, memory, MAX_MEMORY_MIB),
        ];
        for (key, value, min, max) in ranges {
            if !(min..=max).contains(&value) {
                return Err(ConfigError::Range {
                    path: path.to_owned(),
                    key,
                    value,
                    min,
                    max,
                });
            }
        }
        Ok(config)
    }
}

/// The toml crate's own text is several lines with a drawing; containerd's clients show one line.
fn describe(text: &str, error: &toml::de::Error) -> String {
    let before = error.span().and_then(|span| text.get(..span.start));
    let message = error.message().replace('\n', ", ");
    match before {
        Some(before) => format!("line {}: {message}", before.matches('\n').count() + 1),
        None => message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("/c"))
    }

    #[test]
    fn keys_left_out_have_their_defaults() {
        assert_eq!(parse("").unwrap(), Config::default());
        let config = parse("kernel = \"/k\"\nmemory_mib = 512").unwrap();
        assert_eq!(config.kernel, PathBuf::from("/k"));
        assert_eq!((config.memory_mib, config.vcpus), (512, 1));
    }

    #[test]
    fn a_wrong_file_is_one_line_with_its_place() {
        for (text, expected) in [
            ("vcpus = 1\nturbo = true", "line 2: unknown field `turbo`"),
            ("vcpus = \"one\"", "line 1: invalid type"),
            ("vcpus = ", "line 1:"),
            ("vcpus = 0", "vcpus is 0"),
            ("memory_mib = 1", "memory_mib is 1"),
            ("vcpus = 2\nmax_vcpus = 1", "max_vcpus is 1"),
            ("max_memory_mib = 100", "max_memory_mib is 100"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_configuration_or_an_error(text in "\\PC{0,128}") {
            let _ = parse(&text);
        }
    }
}

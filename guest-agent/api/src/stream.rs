//! Names for stdio streams.
//!
//! The shim chooses a number that is unique in the VM's life, connects to [`crate::STDIO_PORT`], sends
//! [`StreamId::to_bytes`] and reads one byte, [`STREAM_ACCEPTED`]. Then it names the stream in the
//! request that creates the process. stdin flows to the guest, stdout and stderr flow to the shim; each
//! ends by a half-close. Must not do I/O.

use std::{fmt, str::FromStr};

/// The byte that the agent answers once it holds a stream.
pub const STREAM_ACCEPTED: u8 = 1;

const PREFIX: &str = "stream:";

/// Name of a stdio stream between shim and agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StreamId(pub u64);

/// Why a text is not a [`StreamId`].
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not \"stream:\" and a number")]
pub struct StreamIdError(String);

impl StreamId {
    /// What opens a connection to [`crate::STDIO_PORT`].
    pub fn to_bytes(self) -> [u8; 8] {
        self.0.to_le_bytes()
    }

    /// The reverse of [`StreamId::to_bytes`]; every value is a name.
    pub fn from_bytes(bytes: [u8; 8]) -> Self {
        Self(u64::from_le_bytes(bytes))
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{PREFIX}{}", self.0)
    }
}

impl FromStr for StreamId {
    type Err = StreamIdError;

    fn from_str(text: &str) -> Result<Self, StreamIdError> {
        text.strip_prefix(PREFIX)
            .filter(|digits| digits.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|digits| digits.parse().ok())
            .map(Self)
            .ok_or_else(|| StreamIdError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn other_texts_are_refused() {
        for text in [
            "",
            "stream:",
            "stream:-1",
            "stream:+1",
            "stream:1x",
            "fifo:1",
            "stream:18446744073709551616",
        ] {
            assert_eq!(
                text.parse::<StreamId>(),
                Err(StreamIdError(text.to_owned()))
            );
        }
    }

    proptest! {
        #[test]
        fn names_survive_both_encodings(number: u64) {
            let id = StreamId(number);
            prop_assert_eq!(id.to_string().parse(), Ok(id));
            prop_assert_eq!(StreamId::from_bytes(id.to_bytes()), id);
        }
    }
}

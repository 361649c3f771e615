//! The command server's protocol: one TCP connection carries one request.
//!
//! The server speaks first ([`BANNER`]), so that a connection that a user-mode network accepts
//! before the lab listens is told apart from one that is served. Then both sides send frames:
//! one byte of kind, four bytes of length (little endian), the payload. The client's first frame
//! is a [`Call`]; the server's last one is [`Kind::Exit`] or [`Kind::Refused`].

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// What the server sends on every new connection.
pub const BANNER: &[u8; 13] = b"walnut-lab 1\n";

/// The port that the command server listens on, inside the lab.
pub const PORT: u16 = 1023;

/// The longest payload that is accepted.
pub const MAX_PAYLOAD_BYTES: usize = 1 << 20;

/// The first frame of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The secret that only the lab's owner can read.
    pub token: String,
    /// What is asked for.
    pub request: Request,
}

/// What can be asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Request {
    /// Set the lab's clock; a restored lab wakes up in the past.
    SetClock {
        /// Time since the Unix epoch.
        unix_nanos: u64,
    },
    /// Answer as soon as containerd serves.
    AwaitContainerd,
    /// Unpack the tar archive that lies at the start of the outbox disk, over `/`.
    Unpack {
        /// The archive's length.
        bytes: u64,
    },
    /// Run a program.
    Exec(Exec),
}

/// A program to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Added to the lab's own environment.
    pub environment: Vec<(String, String)>,
    /// Run it on a terminal of this size; without one, its standard input is what the client sends.
    pub terminal: Option<TerminalSize>,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A [`Call`] in JSON.
    Call,
    /// Bytes for the program's standard input.
    Stdin,
    /// The end of standard input.
    StdinEnd,
    /// A [`TerminalSize`] in JSON.
    Resize,
    /// Bytes from the program's standard output.
    Stdout,
    /// Bytes from the program's standard error.
    Stderr,
    /// The exit status, as a shell counts it, in four bytes (little endian).
    Exit,
    /// Why the request could not be carried out, as text.
    Refused,
}

impl Kind {
    const ALL: [Self; 8] = [
        Self::Call,
        Self::Stdin,
        Self::StdinEnd,
        Self::Resize,
        Self::Stdout,
        Self::Stderr,
        Self::Exit,
        Self::Refused,
    ];

    fn code(self) -> u8 {
        match self {
            Self::Call => 0,
            Self::Stdin => 1,
            Self::StdinEnd => 2,
            Self::Resize => 3,
            Self::Stdout => 4,
            Self::Stderr => 5,
            Self::Exit => 6,
            Self::Refused => 7,
        }
    }

    fn from_code(code: u8) -> io::Result<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.code() == code)
            .ok_or_else(|| invalid(format!("frame of unknown kind {code}")))
    }
}

/// Sends one frame in one write.
pub fn send(mut to: impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    if payload.len() > MAX_PAYLOAD_BYTES {
        return Err(invalid(format!("payload of {} bytes", payload.len())));
    }
    let length = u32::try_from(payload.len()).map_err(|error| invalid(error.to_string()))?;
    let mut frame = Vec::with_capacity(payload.len() + 5);
    frame.push(kind.code());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame)
}

/// Receives one frame; `None` at the end of the stream.
pub fn receive(mut from: impl Read) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let mut kind = [0u8; 1];
    if from.read(&mut kind)? == 0 {
        return Ok(None);
    }
    let kind = Kind::from_code(kind[0])?;
    let mut length = [0u8; 4];
    from.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_le_bytes(length))
        .ok()
        .filter(|length| *length <= MAX_PAYLOAD_BYTES)
        .ok_or_else(|| invalid("frame longer than allowed".to_owned()))?;
    let mut payload = vec![0u8; length];
    from.read_exact(&mut payload)?;
    Ok(Some((kind, payload)))
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_arrive_as_sent() {
        let mut stream = Vec::new();
        for kind in Kind::ALL {
            send(&mut stream, kind, b"payload").unwrap();
        }
        let mut stream = stream.as_slice();
        for kind in Kind::ALL {
            assert_eq!(
                receive(&mut stream).unwrap(),
                Some((kind, b"payload".to_vec()))
            );
        }
        assert_eq!(receive(&mut stream).unwrap(), None);
    }

    #[test]
    fn broken_frames_are_errors() {
        assert!(receive([200u8, 0, 0, 0, 0].as_slice()).is_err());
        assert!(receive([4u8, 255, 255, 255, 255].as_slice()).is_err());
        assert!(receive([4u8, 2, 0, 0, 0, 1].as_slice()).is_err());
        assert!(send(Vec::new(), Kind::Stdout, &vec![0; MAX_PAYLOAD_BYTES + 1]).is_err());
    }

    #[test]
    fn calls_survive_json() {
        let call = Call {
            token: "secret".to_owned(),
            request: Request::Exec(Exec {
                argv: vec!["true".to_owned()],
                environment: vec![("A".to_owned(), "b".to_owned())],
                terminal: Some(TerminalSize {
                    rows: 24,
                    columns: 80,
                }),
            }),
        };
        let text = serde_json::to_vec(&call).unwrap();
        assert_eq!(serde_json::from_slice::<Call>(&text).unwrap(), call);
    }
}

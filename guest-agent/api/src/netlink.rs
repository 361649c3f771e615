//! netlink(7) and rtnetlink(7), as far as the shim and the agent look into their messages.
//!
//! Most of a message is passed on as the kernel wrote it, so nothing here models what it says. Must not do I/O.

/// Bytes to which messages and attributes are aligned.
const ALIGNMENT: usize = 4;
/// struct nlmsghdr.
const HEADER_BYTES: usize = 16;
/// struct nlattr.
const ATTRIBUTE_HEADER_BYTES: usize = 4;
/// The upper two bits of an attribute's type say how it is encoded.
const TYPE_MASK: u16 = 0x3fff;
/// The attribute holds attributes.
const NESTED: u16 = 0x8000;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const EXCLUSIVE: u16 = 0x200;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const INTERRUPTED: u16 = 0x10;

/// What a request does with what is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Changes or removes it.
    Change,
    /// Makes it; there must be none.
    Create,
    /// Lists all there is.
    Dump,
}

/// One message of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer<'a> {
    /// Something that was asked for.
    Message {
        /// Its type, `RTM_…`.
        kind: u16,
        /// The family's header and its attributes.
        body: &'a [u8],
        /// Whether what is listed changed meanwhile.
        interrupted: bool,
    },
    /// The end of the answer: 0, or an error's number.
    End(i32),
}

/// A request, complete with its header.
pub fn request(kind: u16, mode: Mode, body: &[u8]) -> Vec<u8> {
    let flags = REQUEST
        | match mode {
            Mode::Change => ACKNOWLEDGE,
            Mode::Create => ACKNOWLEDGE | CREATE | EXCLUSIVE,
            Mode::Dump => DUMP,
        };
    let length = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
    let mut message = Vec::with_capacity(HEADER_BYTES + body.len());
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence and port: each socket has one request at a time, and the kernel fills the port.
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// The messages of a datagram; what is cut off is left out.
pub fn answers(datagram: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(rest, 0)?).ok()?;
        let body = rest.get(HEADER_BYTES..length)?;
        let (kind, flags) = (u16_at(rest, 4)?, u16_at(rest, 6)?);
        rest = rest
            .get(length.next_multiple_of(ALIGNMENT)..)
            .unwrap_or(&[]);
        Some(match kind {
            NLMSG_ERROR | NLMSG_DONE => {
                let code = u32_at(body, 0).map_or(0, u32::cast_signed);
                Answer::End(code.saturating_neg())
            }
            _ => Answer::Message {
                kind,
                body,
                interrupted: flags & INTERRUPTED != 0,
            },
        })
    })
}

/// The attributes after the first `header` bytes of a message, or of an attribute that holds others: their types and
/// values. What is cut off is left out.
pub fn attributes(message: &[u8], header: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = message.get(header..).unwrap_or(&[]);
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & TYPE_MASK;
        let value = rest.get(ATTRIBUTE_HEADER_BYTES..length)?;
        rest = rest
            .get(length.next_multiple_of(ALIGNMENT)..)
            .unwrap_or(&[]);
        Some((kind, value))
    })
}

/// The first attribute of a type.
pub fn attribute(message: &[u8], header: usize, wanted: u16) -> Option<&[u8]> {
    attributes(message, header).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// Appends an attribute. Its value has less than 64 KiB, which no value of rtnetlink's comes near.
pub fn push(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_HEADER_BYTES + value.len()).unwrap_or(u16::MAX);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(ALIGNMENT), 0);
}

/// Appends an attribute that holds others.
pub fn push_nested(message: &mut Vec<u8>, kind: u16, attributes: &[u8]) {
    push(message, kind | NESTED, attributes);
}

/// The number at a place of a header.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..at.checked_add(4)?)?
        .try_into()
        .ok()
        .map(u32::from_ne_bytes)
}

/// As [`u32_at`], of 16 bits.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes
        .get(at..at.checked_add(2)?)?
        .try_into()
        .ok()
        .map(u16::from_ne_bytes)
}

/// Overwrites a number of a header that is there.
pub fn set_u32(bytes: &mut [u8], at: usize, value: u32) {
    if let Some(place) = at.checked_add(4).and_then(|end| bytes.get_mut(at..end)) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_answer_is_a_message_or_an_end() {
        let mut datagram = request(16, Mode::Dump, b"body!");
        datagram.resize(24, 0);
        datagram.extend(request(NLMSG_ERROR, Mode::Change, &(-17i32).to_ne_bytes()));
        let found: Vec<_> = answers(&datagram).collect();
        let message = Answer::Message {
            kind: 16,
            body: b"body!",
            interrupted: false,
        };
        assert_eq!(found, [message, Answer::End(17)]);
    }

    proptest! {
        #[test]
        fn attributes_are_read_as_they_were_written(
            values in proptest::collection::vec((0..TYPE_MASK, any::<Vec<u8>>()), 0..8),
        ) {
            let mut message = vec![0; 8];
            for (kind, value) in &values {
                push(&mut message, *kind, value);
            }
            let read: Vec<_> = attributes(&message, 8).map(|(kind, value)| (kind, value.to_vec())).collect();
            prop_assert_eq!(read, values);
        }

        #[test]
        fn any_bytes_have_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..128)) {
            let _ = answers(&bytes).count();
            let _ = attributes(&bytes, 4).count();
        }
    }
}

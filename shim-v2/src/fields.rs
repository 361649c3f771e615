//! Messages of protobuf whose definitions this project doesn't have, read by the numbers of their fields.
//!
//! protobuf.dev/programming-guides/encoding. Pure; must not know what a message means.

use protobuf::{Message as _, UnknownValueRef, well_known_types::empty::Empty};
use serde_json::{Map, Value};

/// A message whose fields have numbers and no names.
#[derive(Debug, Default)]
pub(crate) struct Fields(Empty);

impl Fields {
    pub(crate) fn parse(bytes: &[u8]) -> protobuf::Result<Self> {
        Ok(Self(Empty::parse_from_bytes(bytes)?))
    }

    /// The values of a field, in order.
    pub(crate) fn all(&self, number: u32) -> impl Iterator<Item = UnknownValueRef<'_>> {
        let fields = self.0.special_fields.unknown_fields().iter();
        fields.filter_map(move |(found, value)| (found == number).then_some(value))
    }

    pub(crate) fn number(&self, number: u32) -> u64 {
        match self.all(number).last() {
            Some(UnknownValueRef::Varint(value)) => value,
            _ => 0,
        }
    }

    pub(crate) fn texts(&self, number: u32) -> impl Iterator<Item = String> {
        self.all(number).filter_map(|value| match value {
            UnknownValueRef::LengthDelimited(bytes) => {
                Some(String::from_utf8_lossy(bytes).into_owned())
            }
            _ => None,
        })
    }

    /// The last value of a field, if it is one of bytes.
    pub(crate) fn bytes(&self, number: u32) -> &[u8] {
        match self.all(number).last() {
            Some(UnknownValueRef::LengthDelimited(bytes)) => bytes,
            _ => &[],
        }
    }

    pub(crate) fn text(&self, number: u32) -> String {
        self.texts(number).last().unwrap_or_default()
    }

    pub(crate) fn message(&self, number: u32) -> protobuf::Result<Self> {
        match self.all(number).last() {
            Some(UnknownValueRef::LengthDelimited(bytes)) => Self::parse(bytes),
            _ => Ok(Self::default()),
        }
    }

    pub(crate) fn map(&self, number: u32) -> protobuf::Result<Map<String, Value>> {
        let mut map = Map::new();
        for entry in self.all(number) {
            if let UnknownValueRef::LengthDelimited(bytes) = entry {
                let entry = Self::parse(bytes)?;
                map.insert(entry.text(1), Value::String(entry.text(2)));
            }
        }
        Ok(map)
    }
}

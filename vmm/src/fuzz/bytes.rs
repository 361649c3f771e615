//! The fuzzer's bytes as numbers. Must not end: past the last byte everything is zero.

/// Bytes that are taken from the front.
pub(super) struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take<const COUNT: usize>(&mut self) -> [u8; COUNT] {
        let mut taken = [0; COUNT];
        for byte in &mut taken {
            *byte = self.byte();
        }
        taken
    }

    pub(super) fn byte(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    pub(super) fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(super) fn long(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    pub(super) fn quad(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    /// At most `limit` of them.
    pub(super) fn some(&mut self, limit: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(limit.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// All that are left.
    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }
}

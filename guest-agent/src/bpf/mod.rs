//! eBPF programs: an assembler for the few that the agent loads.
//!
//! Linux, `Documentation/bpf/standardization/instruction-set.rst`. Must not call the kernel: `kernel` does.

pub(crate) mod kernel;

/// Operation codes: class, size or operation, and where the second operand is.
pub(crate) mod code {
    pub(crate) const LOAD_WORD: u8 = 0x61;
    pub(crate) const LOAD_DOUBLE: u8 = 0x79;
    pub(crate) const LOAD_WIDE_IMMEDIATE: u8 = 0x18;
    pub(crate) const STORE_DOUBLE: u8 = 0x7b;
    pub(crate) const STORE_WORD_IMMEDIATE: u8 = 0x62;
    pub(crate) const STORE_DOUBLE_IMMEDIATE: u8 = 0x7a;
    pub(crate) const MOVE: u8 = 0xb7;
    pub(crate) const MOVE_REGISTER: u8 = 0xbf;
    pub(crate) const ADD: u8 = 0x07;
    pub(crate) const ADD_REGISTER: u8 = 0x0f;
    pub(crate) const SUBTRACT_REGISTER: u8 = 0x1f;
    pub(crate) const AND: u8 = 0x57;
    pub(crate) const OR_REGISTER: u8 = 0x4f;
    pub(crate) const SHIFT_LEFT: u8 = 0x67;
    pub(crate) const SHIFT_RIGHT: u8 = 0x77;
    pub(crate) const JUMP: u8 = 0x05;
    pub(crate) const JUMP_EQUAL: u8 = 0x15;
    pub(crate) const JUMP_EQUAL_REGISTER: u8 = 0x1d;
    pub(crate) const JUMP_MORE: u8 = 0x25;
    pub(crate) const JUMP_NOT_EQUAL: u8 = 0x55;
    pub(crate) const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5d;
    pub(crate) const JUMP_LESS: u8 = 0xa5;
    pub(crate) const JUMP_NOT_MORE_REGISTER: u8 = 0xbd;
    pub(crate) const CALL: u8 = 0x85;
    pub(crate) const EXIT: u8 = 0x95;
}

/// The kernel's argument at the start, and each helper's result.
pub(crate) const RESULT: u8 = 0;
/// The first argument of the program and of each helper.
pub(crate) const CONTEXT: u8 = 1;
/// End of the program's 512 bytes of stack, which grow downwards from here.
pub(crate) const STACK: u8 = 10;

/// `BPF_PSEUDO_MAP_FD`: the immediate is a map's file descriptor.
const MAP_DESCRIPTOR: u8 = 1;

/// One instruction, as it lies in memory of a little-endian machine.
pub(crate) fn instruction(
    code: u8,
    destination: u8,
    source: u8,
    offset: i16,
    immediate: i32,
) -> u64 {
    let [o0, o1] = offset.to_le_bytes();
    let [i0, i1, i2, i3] = immediate.to_le_bytes();
    u64::from_le_bytes([code, source << 4 | destination, o0, o1, i0, i1, i2, i3])
}

/// A program whose jumps name where they go: only forwards, as the kernel's verifier likes it.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    instructions: Vec<u64>,
    jumps: Vec<(usize, &'static str)>,
}

impl Assembler {
    /// Appends an instruction.
    pub(crate) fn add(
        &mut self,
        code: u8,
        destination: u8,
        source: u8,
        offset: i16,
        immediate: i32,
    ) -> &mut Self {
        let encoded = instruction(code, destination, source, offset, immediate);
        self.instructions.push(encoded);
        self
    }

    /// Calls a helper of the kernel by its number (`enum bpf_func_id`).
    pub(crate) fn call(&mut self, helper: i32) -> &mut Self {
        self.add(code::CALL, 0, 0, 0, helper)
    }

    /// Puts a number of 64 bits into a register; takes two instructions.
    pub(crate) fn wide(&mut self, register: u8, number: u64) -> &mut Self {
        let [l0, l1, l2, l3, h0, h1, h2, h3] = number.to_le_bytes();
        let low = i32::from_le_bytes([l0, l1, l2, l3]);
        let high = i32::from_le_bytes([h0, h1, h2, h3]);
        self.add(code::LOAD_WIDE_IMMEDIATE, register, 0, 0, low)
            .add(0, 0, 0, 0, high)
    }

    /// Puts a map into a register; takes two instructions.
    pub(crate) fn map(&mut self, register: u8, descriptor: i32) -> &mut Self {
        self.add(
            code::LOAD_WIDE_IMMEDIATE,
            register,
            MAP_DESCRIPTOR,
            0,
            descriptor,
        )
        .add(0, 0, 0, 0, 0)
    }

    /// Puts the address of a part of the stack into a register.
    pub(crate) fn stack(&mut self, register: u8, offset: i32) -> &mut Self {
        self.add(code::MOVE_REGISTER, register, STACK, 0, 0)
            .add(code::ADD, register, 0, 0, offset)
    }

    /// Jumps to a place that [`Assembler::place`] names later.
    pub(crate) fn jump(
        &mut self,
        code: u8,
        left: u8,
        right: u8,
        immediate: i32,
        to: &'static str,
    ) -> &mut Self {
        self.jumps.push((self.instructions.len(), to));
        self.add(code, left, right, 0, immediate)
    }

    /// Names the place that comes next, and ends here the jumps that wait for it.
    pub(crate) fn place(&mut self, name: &'static str) -> &mut Self {
        let here = self.instructions.len();
        let (ends, waits) = self.jumps.drain(..).partition(|(_, to)| *to == name);
        self.jumps = waits;
        let ends: Vec<(usize, &'static str)> = ends;
        for (from, _) in ends {
            let over = i16::try_from(here - from - 1).expect("programs here are short");
            let [low, high] = over.to_le_bytes();
            self.instructions[from] |= u64::from_le_bytes([0, 0, low, high, 0, 0, 0, 0]);
        }
        self
    }

    /// The program.
    pub(crate) fn finish(self) -> Vec<u64> {
        assert!(self.jumps.is_empty(), "jumps to nowhere: {:?}", self.jumps);
        self.instructions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_lead_to_the_places_they_name() {
        let mut program = Assembler::default();
        program.jump(code::JUMP_EQUAL, 1, 0, 7, "end");
        program.jump(code::JUMP, 0, 0, 0, "next").place("next");
        program.add(code::MOVE, 0, 0, 0, 1).place("end");
        program.add(code::EXIT, 0, 0, 0, 0);
        let offsets: Vec<u64> = program
            .finish()
            .iter()
            .map(|instruction| instruction >> 16 & 0xffff)
            .collect();
        assert_eq!(offsets, [2, 0, 0, 0]);
    }

    #[test]
    #[should_panic(expected = "nowhere")]
    fn a_jump_to_nowhere_is_a_fault_of_ours() {
        let mut program = Assembler::default();
        program.jump(code::JUMP, 0, 0, 0, "missing");
        program.finish();
    }
}

//! eBPF programs: an assembler for the few that the agent and the shim load.
//!
//! Linux, `Documentation/bpf/standardization/instruction-set.rst`. Must not call the kernel: [`kernel`] does.
//! Must not know what a program is for.

pub mod kernel;

/// Operation codes: class, size or operation, and where the second operand is.
pub mod code {
    /// 4 bytes of memory.
    pub const LOAD_WORD: u8 = 0x61;
    /// 8 bytes of memory.
    pub const LOAD_DOUBLE: u8 = 0x79;
    /// 64 bits that follow; two instructions.
    pub const LOAD_WIDE_IMMEDIATE: u8 = 0x18;
    /// 8 bytes of a register to memory.
    pub const STORE_DOUBLE: u8 = 0x7b;
    /// 4 bytes to memory.
    pub const STORE_WORD_IMMEDIATE: u8 = 0x62;
    /// 8 bytes to memory.
    pub const STORE_DOUBLE_IMMEDIATE: u8 = 0x7a;
    /// A number to a register.
    pub const MOVE: u8 = 0xb7;
    /// A register to a register.
    pub const MOVE_REGISTER: u8 = 0xbf;
    /// Plus a number.
    pub const ADD: u8 = 0x07;
    /// Plus a register.
    pub const ADD_REGISTER: u8 = 0x0f;
    /// Minus a register.
    pub const SUBTRACT_REGISTER: u8 = 0x1f;
    /// The bits of a number alone.
    pub const AND: u8 = 0x57;
    /// The bits of a register too.
    pub const OR_REGISTER: u8 = 0x4f;
    /// Up by so many bits.
    pub const SHIFT_LEFT: u8 = 0x67;
    /// Down by so many bits.
    pub const SHIFT_RIGHT: u8 = 0x77;
    /// Always.
    pub const JUMP: u8 = 0x05;
    /// If equal to a number.
    pub const JUMP_EQUAL: u8 = 0x15;
    /// If equal to a register.
    pub const JUMP_EQUAL_REGISTER: u8 = 0x1d;
    /// If more than a number, without signs.
    pub const JUMP_MORE: u8 = 0x25;
    /// If not equal to a number.
    pub const JUMP_NOT_EQUAL: u8 = 0x55;
    /// If not equal to a register.
    pub const JUMP_NOT_EQUAL_REGISTER: u8 = 0x5d;
    /// If less than a number, without signs.
    pub const JUMP_LESS: u8 = 0xa5;
    /// If not more than a register, without signs.
    pub const JUMP_NOT_MORE_REGISTER: u8 = 0xbd;
    /// Calls a helper.
    pub const CALL: u8 = 0x85;
    /// Ends the program.
    pub const EXIT: u8 = 0x95;
}

/// The kernel's argument at the start, and each helper's result.
pub const RESULT: u8 = 0;
/// The first argument of the program and of each helper.
pub const CONTEXT: u8 = 1;
/// End of the program's 512 bytes of stack, which grow downwards from here.
pub const STACK: u8 = 10;

/// Functions of the kernel for programs, by number (`enum bpf_func_id`).
pub mod function {
    /// `bpf_map_lookup_elem(map, key)`.
    pub const MAP_LOOKUP: i32 = 1;
    /// `bpf_map_update_elem(map, key, value, flags)`.
    pub const MAP_UPDATE: i32 = 2;
    /// `bpf_map_delete_elem(map, key)`.
    pub const MAP_DELETE: i32 = 3;
    /// `bpf_ktime_get_ns()`.
    pub const TIME_NS: i32 = 5;
    /// `bpf_get_current_pid_tgid()`.
    pub const THREAD_ID: i32 = 14;
    /// `bpf_get_current_comm(buffer, bytes)`.
    pub const CURRENT_NAME: i32 = 16;
    /// `bpf_sk_release(socket)`.
    pub const RELEASE_SOCKET: i32 = 86;
    /// `bpf_get_current_ancestor_cgroup_id(level)`.
    pub const ANCESTOR_CGROUP_ID: i32 = 123;
    /// `bpf_sk_assign(context, socket, flags)`.
    pub const ASSIGN_SOCKET: i32 = 124;
}

/// `BPF_PSEUDO_MAP_FD`: the immediate is a map's file descriptor.
const MAP_DESCRIPTOR: u8 = 1;

/// One instruction, as it lies in memory of a little-endian machine.
pub fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> u64 {
    let [o0, o1] = offset.to_le_bytes();
    let [i0, i1, i2, i3] = immediate.to_le_bytes();
    u64::from_le_bytes([code, source << 4 | destination, o0, o1, i0, i1, i2, i3])
}

/// A program whose jumps name where they go: only forwards, as the kernel's verifier likes it.
#[derive(Debug, Default)]
pub struct Assembler {
    instructions: Vec<u64>,
    jumps: Vec<(usize, &'static str)>,
}

impl Assembler {
    /// Appends an instruction.
    pub fn add(
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

    /// Calls a helper of the kernel, see [`function`].
    pub fn call(&mut self, helper: i32) -> &mut Self {
        self.add(code::CALL, 0, 0, 0, helper)
    }

    /// Puts a number of 64 bits into a register; takes two instructions.
    pub fn wide(&mut self, register: u8, number: u64) -> &mut Self {
        let [l0, l1, l2, l3, h0, h1, h2, h3] = number.to_le_bytes();
        let low = i32::from_le_bytes([l0, l1, l2, l3]);
        let high = i32::from_le_bytes([h0, h1, h2, h3]);
        self.add(code::LOAD_WIDE_IMMEDIATE, register, 0, 0, low)
            .add(0, 0, 0, 0, high)
    }

    /// Puts a map into a register; takes two instructions.
    pub fn map(&mut self, register: u8, descriptor: i32) -> &mut Self {
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
    pub fn stack(&mut self, register: u8, offset: i32) -> &mut Self {
        self.add(code::MOVE_REGISTER, register, STACK, 0, 0)
            .add(code::ADD, register, 0, 0, offset)
    }

    /// Jumps to a place that [`Assembler::place`] names later.
    pub fn jump(
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
    pub fn place(&mut self, name: &'static str) -> &mut Self {
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
    pub fn finish(self) -> Vec<u64> {
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

//! The two programs that count system calls, by container and number.
//!
//! Linux's tracepoints `sys_enter(regs, id)` and `sys_exit(regs, ret)`, `include/trace/events/syscalls.h`:
//! both run with preemption off, so that the values of one processor need no lock. A call is counted when
//! it returns; the two that never do, when they begin. Must not load a program.

use walnut_bpf::{
    Assembler, CONTEXT, RESULT, STACK, code,
    function::{ANCESTOR_CGROUP_ID, MAP_DELETE, MAP_LOOKUP, MAP_UPDATE, THREAD_ID, TIME_NS},
};

/// Depth of a container's cgroup below the root of the hierarchy.
const CONTAINER_LEVEL: i32 = 2;

/// `BPF_NOEXIST`.
const IF_ABSENT: i32 = 1;

/// Calls that do not return (x86-64's `exit` and `exit_group`).
const EXIT_CALLS: [i32; 2] = [60, 231];

/// `MAX_ERRNO`: results from its negative on are errors.
const MAX_ERRNO: i32 = 4095;

/// Bytes of a thread's entry: when its call began, and which it is.
pub(crate) const BEGUN_BYTES: u32 = 16;
/// Bytes of a key of the counts: id of the container's cgroup, number of the call.
pub(crate) const KEY_BYTES: u32 = 16;
/// Bytes of a count: calls, errors, total and longest time in nanoseconds.
pub(crate) const COUNT_BYTES: u32 = 32;

/// Registers that helpers leave alone.
const ARGUMENTS: u8 = 6;
const BEGAN: u8 = 7;
const NUMBER: u8 = 8;
const TOOK: u8 = 9;

/// Places on the stack, as offsets from its end: a thread's id, then its entry; and later key and count.
const THREAD: i16 = -8;
const ENTRY: i16 = -24;
const KEY: i16 = -24;
const KEY_NUMBER: i16 = -16;
const INDEX: i16 = -4;
const COUNT: i16 = -56;

/// File descriptors of the maps.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Maps {
    /// Thread to the call that it is in.
    pub(crate) begun: i32,
    /// What is counted.
    pub(crate) counts: i32,
    /// Calls that were seen and could not be counted.
    pub(crate) missed: i32,
}

/// At `sys_enter`: remembers what the thread calls, and when.
pub(crate) fn enter(maps: Maps) -> Vec<u64> {
    let mut program = Assembler::default();
    program
        .add(code::MOVE_REGISTER, ARGUMENTS, CONTEXT, 0, 0)
        .add(code::LOAD_DOUBLE, NUMBER, ARGUMENTS, 8, 0)
        .add(code::MOVE, TOOK, 0, 0, 0);
    for call in EXIT_CALLS {
        program.jump(code::JUMP_EQUAL, NUMBER, 0, call, "count");
    }
    program
        .call(THREAD_ID)
        .add(code::STORE_DOUBLE, STACK, RESULT, THREAD, 0)
        .call(TIME_NS)
        .add(code::STORE_DOUBLE, STACK, RESULT, ENTRY, 0)
        .add(code::STORE_DOUBLE, STACK, NUMBER, ENTRY + 8, 0)
        .map(1, maps.begun)
        .stack(2, THREAD.into())
        .stack(3, ENTRY.into())
        .add(code::MOVE, 4, 0, 0, 0)
        .call(MAP_UPDATE)
        .jump(code::JUMP, 0, 0, 0, "end");
    program
        .place("count")
        // Register 6 holds the arguments at sys_exit, whose second is the result; here it must not be an error.
        .add(code::MOVE, ARGUMENTS, 0, 0, 0);
    count(&mut program, maps, Result::None);
    program.finish()
}

/// At `sys_exit`: counts the call that the thread was in.
pub(crate) fn exit(maps: Maps) -> Vec<u64> {
    let mut program = Assembler::default();
    program
        .add(code::MOVE_REGISTER, ARGUMENTS, CONTEXT, 0, 0)
        .call(THREAD_ID)
        .add(code::STORE_DOUBLE, STACK, RESULT, THREAD, 0)
        .map(1, maps.begun)
        .stack(2, THREAD.into())
        .call(MAP_LOOKUP)
        // A call that began before the programs were there.
        .jump(code::JUMP_EQUAL, RESULT, 0, 0, "end")
        .add(code::LOAD_DOUBLE, BEGAN, RESULT, 0, 0)
        .add(code::LOAD_DOUBLE, NUMBER, RESULT, 8, 0)
        .map(1, maps.begun)
        .stack(2, THREAD.into())
        .call(MAP_DELETE)
        .call(TIME_NS)
        .add(code::MOVE_REGISTER, TOOK, RESULT, 0, 0)
        .add(code::SUBTRACT_REGISTER, TOOK, BEGAN, 0, 0);
    count(&mut program, maps, Result::SecondArgument);
    program.finish()
}

/// Where a call's result is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Result {
    None,
    SecondArgument,
}

/// Puts the id of the caller's container into this place of the stack; ends where there is none.
pub(super) fn put_container(program: &mut Assembler, place: i16) {
    program
        .add(code::MOVE, 1, 0, 0, CONTAINER_LEVEL)
        .call(ANCESTOR_CGROUP_ID)
        .jump(code::JUMP_EQUAL, RESULT, 0, 0, "end")
        .add(code::STORE_DOUBLE, STACK, RESULT, place, 0);
}

/// Counts a call that no room was left for, by this place of the stack, and ends the program.
pub(super) fn miss(program: &mut Assembler, missed: i32, index: i16) {
    program
        .add(code::STORE_WORD_IMMEDIATE, STACK, 0, index, 0)
        .map(1, missed)
        .stack(2, index.into())
        .call(MAP_LOOKUP)
        .jump(code::JUMP_EQUAL, RESULT, 0, 0, "end");
    increment(program, 0);
    program
        .place("end")
        .add(code::MOVE, RESULT, 0, 0, 0)
        .add(code::EXIT, 0, 0, 0, 0);
}

/// Adds the call of `NUMBER` that took `TOOK` to the container's count, and ends the program.
fn count(program: &mut Assembler, maps: Maps, result: Result) {
    put_container(program, KEY);
    program
        .add(code::STORE_DOUBLE, STACK, NUMBER, KEY_NUMBER, 0)
        .map(1, maps.counts)
        .stack(2, KEY.into())
        .call(MAP_LOOKUP)
        .jump(code::JUMP_NOT_EQUAL, RESULT, 0, 0, "known");
    for offset in [0, 8, 16, 24] {
        program.add(code::STORE_DOUBLE_IMMEDIATE, STACK, 0, COUNT + offset, 0);
    }
    program
        .map(1, maps.counts)
        .stack(2, KEY.into())
        .stack(3, COUNT.into())
        .add(code::MOVE, 4, 0, 0, IF_ABSENT)
        .call(MAP_UPDATE)
        .map(1, maps.counts)
        .stack(2, KEY.into())
        .call(MAP_LOOKUP)
        .jump(code::JUMP_EQUAL, RESULT, 0, 0, "missed")
        .place("known");
    increment(program, 0);
    if result == Result::SecondArgument {
        program
            .add(code::LOAD_DOUBLE, 1, ARGUMENTS, 8, 0)
            // Compared without a sign: errors are the highest numbers.
            .jump(code::JUMP_LESS, 1, 0, -MAX_ERRNO, "succeeded");
        increment(program, 8);
        program.place("succeeded");
    }
    program
        .add(code::LOAD_DOUBLE, 1, RESULT, 16, 0)
        .add(code::ADD_REGISTER, 1, TOOK, 0, 0)
        .add(code::STORE_DOUBLE, RESULT, 1, 16, 0)
        .add(code::LOAD_DOUBLE, 1, RESULT, 24, 0)
        .jump(code::JUMP_NOT_MORE_REGISTER, TOOK, 1, 0, "end")
        .add(code::STORE_DOUBLE, RESULT, TOOK, 24, 0)
        .jump(code::JUMP, 0, 0, 0, "end")
        .place("missed");
    miss(program, maps.missed, INDEX);
}

/// Adds 1 to the number at an offset of what the result points to.
fn increment(program: &mut Assembler, offset: i16) {
    program
        .add(code::LOAD_DOUBLE, 1, RESULT, offset, 0)
        .add(code::ADD, 1, 0, 0, 1)
        .add(code::STORE_DOUBLE, RESULT, 1, offset, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every jump lands inside the program, and its last instruction ends it. That the kernel takes both
    /// programs and what they count is shown in a guest.
    #[test]
    fn programs_end_by_themselves() {
        let maps = Maps {
            begun: 3,
            counts: 4,
            missed: 5,
        };
        for program in [enter(maps), exit(maps)] {
            let [last_code, ..] = program.last().unwrap().to_le_bytes();
            assert_eq!(last_code, code::EXIT);
            for (index, instruction) in program.iter().enumerate() {
                let [operation, _, low, high, ..] = instruction.to_le_bytes();
                let class = operation & 7;
                if class == 5 && operation != code::CALL && operation != code::EXIT {
                    let target = index + 1 + usize::from(u16::from_le_bytes([low, high]));
                    assert!(target < program.len(), "jump of {index} to {target}");
                }
            }
        }
    }
}

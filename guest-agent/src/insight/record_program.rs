//! The program that notes which system calls each container makes, for a profile that allows them.
//!
//! Linux's trace event `raw_syscalls/sys_enter`, whose fields are the call's number and arguments. A call is
//! noted when it begins, as many a server is in one that never ends. What the runtime does in a container
//! before it becomes the container's program is left out: until execve(2) such a process is called
//! [`SETUP_NAME`]. A program that takes this name hides its calls, and is then refused more, never less. Must
//! not load a program.

use super::program::{miss, put_container};
use walnut_bpf::{
    Assembler, CONTEXT, RESULT, STACK, code,
    function::{CURRENT_NAME, MAP_LOOKUP, MAP_UPDATE},
};

/// What `walnut-init` calls itself (`PR_SET_NAME`) until it is the container's program.
pub(crate) const SETUP_NAME: &std::ffi::CStr = c"walnut-init";

/// Bytes of a key: id of the container's cgroup; number of the call and class of its argument.
pub(super) const KEY_BYTES: u32 = 16;
/// Bytes of a value, which says nothing.
pub(super) const VALUE_BYTES: u32 = 8;

/// Above every number that this kernel knows.
const MAX_NUMBER: i32 = 1023;
const CLONE: i32 = 56;
const SOCKET: i32 = 41;
const PERSONALITY: i32 = 135;

/// `clone`'s flags that make namespaces (`CLONE_NEW*`).
const NAMESPACE_FLAGS: i32 = 0x7e02_0000;
/// Class of a `clone` with any of them.
const WITH_NAMESPACES: i32 = 1;
/// Below the kernel's `AF_MAX`.
const HIGHEST_FAMILY: i32 = 45;
/// Personalities that are classes of their own: those that profiles usually name. A program could ask for any.
const PERSONALITIES: [u32; 5] = [0, 0x0008, 0x2_0000, 0x2_0008, u32::MAX];
/// Class of the others.
const OTHER_PERSONALITY: u32 = 0xffff_fffe;

/// `TASK_COMM_LEN`.
const NAME_BYTES: i32 = 16;

/// Offsets of the event's fields.
const FIELD_NUMBER: i16 = 8;
const FIELD_FIRST_ARGUMENT: i16 = 16;

/// Registers that helpers leave alone.
const FIELDS: u8 = 6;
const NUMBER: u8 = 8;
const CLASS: u8 = 9;

/// Places on the stack, as offsets from its end.
const KEY: i16 = -16;
const KEY_CALL: i16 = -8;
const VALUE: i16 = -24;
const NAME: i16 = -40;
const INDEX: i16 = -44;

/// At `sys_enter`; `seen` is the set of calls, `missed` the number of those that found no room in it.
pub(super) fn enter(seen: i32, missed: i32) -> Vec<u64> {
    let mut program = Assembler::default();
    program
        .add(code::MOVE_REGISTER, FIELDS, CONTEXT, 0, 0)
        .add(code::LOAD_DOUBLE, NUMBER, FIELDS, FIELD_NUMBER, 0)
        .jump(code::JUMP_MORE, NUMBER, 0, MAX_NUMBER, "end");
    leave_out_setup(&mut program);
    put_container(&mut program, KEY);
    classify(&mut program);
    program
        .add(code::SHIFT_LEFT, CLASS, 0, 0, 32)
        .add(code::OR_REGISTER, CLASS, NUMBER, 0, 0)
        .add(code::STORE_DOUBLE, STACK, CLASS, KEY_CALL, 0)
        .map(1, seen)
        .stack(2, KEY.into())
        .call(MAP_LOOKUP)
        .jump(code::JUMP_NOT_EQUAL, RESULT, 0, 0, "end")
        .add(code::STORE_DOUBLE_IMMEDIATE, STACK, 0, VALUE, 1)
        .map(1, seen)
        .stack(2, KEY.into())
        .stack(3, VALUE.into())
        .add(code::MOVE, 4, 0, 0, 0)
        .call(MAP_UPDATE)
        .jump(code::JUMP_EQUAL, RESULT, 0, 0, "end");
    miss(&mut program, missed, INDEX);
    program.finish()
}

fn leave_out_setup(program: &mut Assembler) {
    let mut name = [0; 16];
    for (to, from) in name.iter_mut().zip(SETUP_NAME.to_bytes()) {
        *to = *from;
    }
    let name = u128::from_le_bytes(name);
    let low = u64::try_from(name & u128::from(u64::MAX)).unwrap_or_default();
    let high = u64::try_from(name >> 64).unwrap_or_default();
    program
        .stack(1, NAME.into())
        .add(code::MOVE, 2, 0, 0, NAME_BYTES)
        .call(CURRENT_NAME)
        .add(code::LOAD_DOUBLE, 1, STACK, NAME, 0)
        .wide(2, low)
        .jump(code::JUMP_NOT_EQUAL_REGISTER, 1, 2, 0, "program")
        .add(code::LOAD_DOUBLE, 1, STACK, NAME + 8, 0)
        .wide(2, high)
        .jump(code::JUMP_EQUAL_REGISTER, 1, 2, 0, "end")
        .place("program");
}

/// Puts into `CLASS` what a profile could tell a call apart by.
fn classify(program: &mut Assembler) {
    let first = |program: &mut Assembler| {
        program.add(code::LOAD_DOUBLE, CLASS, FIELDS, FIELD_FIRST_ARGUMENT, 0);
    };
    program
        .add(code::MOVE, CLASS, 0, 0, 0)
        .jump(code::JUMP_EQUAL, NUMBER, 0, CLONE, "clone")
        .jump(code::JUMP_EQUAL, NUMBER, 0, SOCKET, "socket")
        .jump(code::JUMP_NOT_EQUAL, NUMBER, 0, PERSONALITY, "note");
    first(program);
    for personality in PERSONALITIES {
        program.wide(1, personality.into());
        program.jump(code::JUMP_EQUAL_REGISTER, CLASS, 1, 0, "note");
    }
    program
        .wide(CLASS, OTHER_PERSONALITY.into())
        .jump(code::JUMP, 0, 0, 0, "note")
        .place("clone");
    first(program);
    program
        .add(code::AND, CLASS, 0, 0, NAMESPACE_FLAGS)
        .jump(code::JUMP_EQUAL, CLASS, 0, 0, "note")
        .add(code::MOVE, CLASS, 0, 0, WITH_NAMESPACES)
        .jump(code::JUMP, 0, 0, 0, "note")
        .place("socket");
    first(program);
    // The kernel refuses what is higher, with or without a profile.
    program
        .jump(code::JUMP_MORE, CLASS, 0, HIGHEST_FAMILY, "end")
        .place("note");
}

#[cfg(test)]
mod tests {
    use super::*;

    /// That the kernel takes it, and what it notes, is shown in a guest.
    #[test]
    fn the_program_ends_by_itself() {
        let program = enter(3, 4);
        let [last, ..] = program.last().unwrap().to_le_bytes();
        assert_eq!(last, code::EXIT);
        assert!(program.len() < 120, "{}", program.len());
    }

    #[test]
    fn the_name_of_the_setup_is_one_that_the_kernel_keeps_whole() {
        assert!(SETUP_NAME.to_bytes().len() < 16);
        assert_eq!(
            SETUP_NAME.to_bytes(),
            crate::container::launch::INIT_NAME.as_bytes()
        );
    }
}

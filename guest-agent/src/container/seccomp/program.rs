//! Code of a filter: classic BPF as seccomp(2) takes it, from small pieces that each end in a verdict.
//!
//! Only instructions that the kernel can run in its mind are used before arguments are looked at, so that it
//! never runs the filter for calls that are allowed whatever their arguments are (`SECCOMP_ARCH_NATIVE`'s
//! action cache). Must not know profiles.

use super::profile::{Argument, Operator};
use serde::{Deserialize, Serialize};

/// Longest program that the kernel takes.
pub(super) const MAX_INSTRUCTIONS: usize = 4096;

const LOAD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const IF_EQUAL: u16 = 0x15;
const IF_GREATER: u16 = 0x25;
const IF_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Where `struct seccomp_data` has the number of the call, the way it came and its arguments.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// Arguments of a system call.
pub(super) const MAX_ARGUMENTS: u32 = 6;

/// `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Instruction {
    pub(crate) code: u16,
    pub(crate) if_true: u8,
    pub(crate) if_false: u8,
    pub(crate) value: u32,
}

/// A piece of a program that answers in every case.
pub(super) type Code = Vec<Instruction>;

fn plain(code: u16, value: u32) -> Instruction {
    Instruction {
        code,
        if_true: 0,
        if_false: 0,
        value,
    }
}

/// Answers `verdict`, a `SECCOMP_RET_` value.
pub(super) fn answer(verdict: u32) -> Code {
    vec![plain(RETURN, verdict)]
}

/// One piece for calls that came this way, another for the others.
pub(super) fn if_architecture(audit: u32, then: Code, otherwise: Code) -> Code {
    let mut code = vec![plain(LOAD, ARCHITECTURE)];
    code.extend(choose(IF_EQUAL, audit, then, otherwise));
    code
}

/// The piece of the last part that starts at or below the call's number. The first part starts at 0.
pub(super) fn by_number(parts: &[(u32, Code)]) -> Code {
    let mut code = vec![plain(LOAD, NUMBER)];
    code.extend(search(parts));
    code
}

fn search(parts: &[(u32, Code)]) -> Code {
    match parts {
        [] => Code::new(),
        [(_, code)] => code.clone(),
        _ => {
            let (low, high) = parts.split_at(parts.len() / 2);
            let start = high.first().map_or(0, |part| part.0);
            choose(IF_GREATER_OR_EQUAL, start, search(high), search(low))
        }
    }
}

fn choose(condition: u16, value: u32, then: Code, otherwise: Code) -> Code {
    let mut code = Code::new();
    let jump = plain(condition, value);
    match u8::try_from(otherwise.len()) {
        Ok(if_true) => code.push(Instruction { if_true, ..jump }),
        // Conditional jumps do not reach that far, others do.
        Err(_) => {
            let far = u32::try_from(otherwise.len()).unwrap_or(u32::MAX);
            code.extend([
                Instruction {
                    if_false: 1,
                    ..jump
                },
                plain(JUMP, far),
            ]);
        }
    }
    code.extend(otherwise);
    code.extend(then);
    code
}

/// Answers `verdict` if all conditions are met; else goes on behind itself. `wide`: all 64 bits count.
pub(super) fn if_all(conditions: &[Argument], wide: bool, verdict: u32) -> Code {
    let tests: Vec<Vec<Step>> = conditions.iter().map(|each| steps(each, wide)).collect();
    let end = tests.iter().map(Vec::len).sum::<usize>() + 1;
    let mut code = Code::new();
    for test in tests {
        let met = code.len() + test.len();
        for step in test {
            let next = code.len() + 1;
            // At most six conditions of at most five steps: it fits.
            let distance = |to: To| {
                let place = match to {
                    To::Next => next,
                    To::Met => met,
                    To::Unmet => end,
                };
                u8::try_from(place - next).unwrap_or(u8::MAX)
            };
            code.push(Instruction {
                if_true: distance(step.if_true),
                if_false: distance(step.if_false),
                ..step.instruction
            });
        }
    }
    code.extend(answer(verdict));
    code
}

/// Where a step of a condition goes.
#[derive(Clone, Copy)]
enum To {
    Next,
    /// The condition is met.
    Met,
    /// It is not.
    Unmet,
}

struct Step {
    instruction: Instruction,
    if_true: To,
    if_false: To,
}

fn step(code: u16, value: u32) -> Step {
    jump(code, value, To::Next, To::Next)
}

fn jump(code: u16, value: u32, if_true: To, if_false: To) -> Step {
    Step {
        instruction: plain(code, value),
        if_true,
        if_false,
    }
}

/// Tests the high half, which often decides alone, then the low one.
fn steps(argument: &Argument, wide: bool) -> Vec<Step> {
    use To::{Met, Next, Unmet};
    let (high, low) = halves(argument.value);
    let place = ARGUMENTS + argument.index * 8;
    let mut steps = Vec::new();
    if wide {
        steps.push(step(LOAD, place + 4));
        match argument.op {
            Operator::Equal => steps.push(jump(IF_EQUAL, high, Next, Unmet)),
            Operator::NotEqual => steps.push(jump(IF_EQUAL, high, Next, Met)),
            Operator::Greater | Operator::GreaterOrEqual => steps.extend([
                jump(IF_GREATER, high, Met, Next),
                jump(IF_EQUAL, high, Next, Unmet),
            ]),
            Operator::Less | Operator::LessOrEqual => steps.extend([
                jump(IF_GREATER, high, Unmet, Next),
                jump(IF_EQUAL, high, Next, Met),
            ]),
            Operator::MaskedEqual => {
                let wanted = halves(argument.value_two).0 & high;
                steps.extend([step(AND, high), jump(IF_EQUAL, wanted, Next, Unmet)]);
            }
        }
    }
    steps.push(step(LOAD, place));
    match argument.op {
        Operator::Equal => steps.push(jump(IF_EQUAL, low, Next, Unmet)),
        Operator::NotEqual => steps.push(jump(IF_EQUAL, low, Unmet, Next)),
        Operator::Greater => steps.push(jump(IF_GREATER, low, Next, Unmet)),
        Operator::GreaterOrEqual => steps.push(jump(IF_GREATER_OR_EQUAL, low, Next, Unmet)),
        Operator::Less => steps.push(jump(IF_GREATER_OR_EQUAL, low, Unmet, Next)),
        Operator::LessOrEqual => steps.push(jump(IF_GREATER, low, Unmet, Next)),
        Operator::MaskedEqual => {
            let wanted = halves(argument.value_two).1 & low;
            steps.extend([step(AND, low), jump(IF_EQUAL, wanted, Next, Unmet)]);
        }
    }
    steps
}

/// High and low 32 bits.
fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_be_bytes();
    (
        u32::from_be_bytes([a, b, c, d]),
        u32::from_be_bytes([e, f, g, h]),
    )
}

/// The kernel's side, for tests: what a program answers to a call.
#[cfg(test)]
pub(super) fn run(program: &[Instruction], audit: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = [number, audit, 0, 0].to_vec();
    for arg in args {
        let (high, low) = halves(arg);
        data.extend([low, high]);
    }
    let (mut accumulator, mut at) = (0, 0);
    // Jumps only go forward, so a program ends.
    loop {
        let Instruction {
            code,
            if_true,
            if_false,
            value,
        } = program[at];
        at += 1;
        let branch = |taken| usize::from(if taken { if_true } else { if_false });
        at += match code {
            LOAD => {
                accumulator = data[usize::try_from(value).unwrap() / 4];
                0
            }
            AND => {
                accumulator &= value;
                0
            }
            JUMP => usize::try_from(value).unwrap(),
            IF_EQUAL => branch(accumulator == value),
            IF_GREATER => branch(accumulator > value),
            IF_GREATER_OR_EQUAL => branch(accumulator >= value),
            RETURN => return value,
            other => panic!("instruction {other:#x}"),
        };
    }
}

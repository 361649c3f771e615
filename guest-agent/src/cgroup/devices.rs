//! Device rules as a BPF program.
//!
//! Linux, `Documentation/admin-guide/cgroup-v2.rst`, "Device controller". The program is asked with the kind of device,
//! its numbers, and what is to be done with it (make, read, write). For each of these three, the last rule
//! that speaks of it decides, and what no rule speaks of is refused. Must not load a program.

use crate::container::spec::{DeviceRule, DeviceRuleKind};
use walnut_bpf::{
    CONTEXT, RESULT,
    code::{AND, EXIT, JUMP_EQUAL, JUMP_NOT_EQUAL, LOAD_WORD, MOVE, MOVE_REGISTER, SHIFT_RIGHT},
    instruction,
};

/// Rules at the most, so that a program stays far below the kernel's limits.
const MAX_RULES: usize = 1024;

/// `BPF_DEVCG_DEV_*`.
const KIND_BLOCK: i32 = 1;
const KIND_CHARACTER: i32 = 2;
/// `BPF_DEVCG_ACC_*`.
const MAKE: i32 = 1;
const READ: i32 = 2;
const WRITE: i32 = 4;

/// Registers of ours.
const KIND: u8 = 2;
const ASKED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const SCRATCH: u8 = 6;

/// Why rules cannot be a program.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum DeviceRuleError {
    /// A letter that is no access.
    #[error("linux.resources.devices[].access {0:?} is not of the letters r, w and m")]
    Access(String),
    /// A number that no device has.
    #[error("linux.resources.devices names device number {0}, which no device can have")]
    Number(i64),
    /// A program would become too long.
    #[error("linux.resources.devices has {0} rules, more than {MAX_RULES}")]
    TooMany(usize),
}

#[derive(Debug, Clone, Copy)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
}

/// What every container may do, as its devices are made for it: any node may be made, the default ones and
/// terminals may be used. Rules of the configuration come before, so they cannot take these away.
const DEFAULTS: &[Rule] = &[
    default(KIND_CHARACTER, None, None, MAKE),
    default(KIND_BLOCK, None, None, MAKE),
    default(KIND_CHARACTER, Some(1), Some(3), MAKE | READ | WRITE),
    default(KIND_CHARACTER, Some(1), Some(5), MAKE | READ | WRITE),
    default(KIND_CHARACTER, Some(1), Some(7), MAKE | READ | WRITE),
    default(KIND_CHARACTER, Some(1), Some(8), MAKE | READ | WRITE),
    default(KIND_CHARACTER, Some(1), Some(9), MAKE | READ | WRITE),
    default(KIND_CHARACTER, Some(5), Some(0), MAKE | READ | WRITE),
    default(KIND_CHARACTER, Some(5), Some(2), MAKE | READ | WRITE),
    default(KIND_CHARACTER, Some(136), None, MAKE | READ | WRITE),
];

const fn default(kind: i32, major: Option<i32>, minor: Option<i32>, access: i32) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    }
}

/// A `BPF_PROG_TYPE_CGROUP_DEVICE` program for the configuration's rules and the defaults.
pub(crate) fn program(rules: &[DeviceRule]) -> Result<Vec<u64>, DeviceRuleError> {
    if rules.len() > MAX_RULES {
        return Err(DeviceRuleError::TooMany(rules.len()));
    }
    let mut all = rules
        .iter()
        .map(understand)
        .collect::<Result<Vec<_>, _>>()?;
    all.extend_from_slice(DEFAULTS);
    let mut program = vec![
        // struct bpf_cgroup_dev_ctx: the access in the upper half of the first word, the kind in the lower.
        instruction(LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(MOVE_REGISTER, ASKED, KIND, 0, 0),
        instruction(AND, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ASKED, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    // `ASKED` holds what no rule has decided yet, seen from the last rule to the first.
    for rule in all.iter().rev() {
        assemble(rule, &mut program);
    }
    program.push(instruction(MOVE, RESULT, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    Ok(program)
}

fn understand(rule: &DeviceRule) -> Result<Rule, DeviceRuleError> {
    let mut access = 0;
    for letter in rule.access.chars() {
        access |= match letter {
            'm' => MAKE,
            'r' => READ,
            'w' => WRITE,
            _ => return Err(DeviceRuleError::Access(rule.access.clone())),
        };
    }
    let number = |number: Option<i64>| match number {
        Some(number) if number >= 0 => i32::try_from(number)
            .map(Some)
            .map_err(|_| DeviceRuleError::Number(number)),
        _ => Ok(None),
    };
    let any_kind = rule.kind == DeviceRuleKind::All;
    Ok(Rule {
        allow: rule.allow,
        kind: match rule.kind {
            DeviceRuleKind::All => None,
            DeviceRuleKind::Character => Some(KIND_CHARACTER),
            DeviceRuleKind::Block => Some(KIND_BLOCK),
        },
        // "a" has always meant every device, whatever numbers are beside it.
        major: if any_kind { None } else { number(rule.major)? },
        minor: if any_kind { None } else { number(rule.minor)? },
        // No letters: the rule is of everything, as containerd's own deny-all is sometimes written.
        access: if access == 0 {
            MAKE | READ | WRITE
        } else {
            access
        },
    })
}

fn assemble(rule: &Rule, program: &mut Vec<u64>) {
    let mut body = Vec::new();
    if rule.allow {
        // The allowed part is decided; nothing left means yes.
        body.push(instruction(AND, ASKED, 0, 0, !rule.access));
        body.push(instruction(JUMP_NOT_EQUAL, ASKED, 0, 2, 0));
        body.push(instruction(MOVE, RESULT, 0, 0, 1));
    } else {
        // Any part that is asked and denied means no.
        body.push(instruction(MOVE_REGISTER, SCRATCH, ASKED, 0, 0));
        body.push(instruction(AND, SCRATCH, 0, 0, rule.access));
        body.push(instruction(JUMP_EQUAL, SCRATCH, 0, 2, 0));
        body.push(instruction(MOVE, RESULT, 0, 0, 0));
    }
    body.push(instruction(EXIT, 0, 0, 0, 0));
    let conditions = [(KIND, rule.kind), (MAJOR, rule.major), (MINOR, rule.minor)];
    let present: Vec<_> = conditions
        .iter()
        .filter_map(|(register, value)| value.map(|value| (*register, value)))
        .collect();
    for (index, (register, value)) in present.iter().enumerate() {
        let over = present.len() - index - 1 + body.len();
        let over = i16::try_from(over).expect("a rule is at most eight instructions");
        program.push(instruction(JUMP_NOT_EQUAL, *register, 0, over, *value));
    }
    program.extend(body);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Runs a program as the kernel would.
    fn run(program: &[u64], kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0i64; 11];
        let mut at = 0usize;
        loop {
            let [code, operands, o0, o1, i0, i1, i2, i3] = program[at].to_le_bytes();
            let (destination, source) = (usize::from(operands & 15), usize::from(operands >> 4));
            let offset = i16::from_le_bytes([o0, o1]);
            let immediate = i64::from(i32::from_le_bytes([i0, i1, i2, i3]));
            at += 1;
            let mut jump = |condition: bool| {
                if condition {
                    at += usize::try_from(offset).unwrap();
                }
            };
            match code {
                LOAD_WORD => {
                    registers[destination] = context[usize::try_from(offset / 4).unwrap()].into();
                }
                MOVE => registers[destination] = immediate,
                MOVE_REGISTER => registers[destination] = registers[source],
                AND => registers[destination] &= immediate,
                SHIFT_RIGHT => registers[destination] >>= immediate,
                JUMP_EQUAL => jump(registers[destination] == immediate),
                JUMP_NOT_EQUAL => jump(registers[destination] != immediate),
                EXIT => return registers[0] == 1,
                other => panic!("operation {other:#x}"),
            }
        }
    }

    fn rule(allow: bool, kind: DeviceRuleKind, major: i64, minor: i64, access: &str) -> DeviceRule {
        DeviceRule {
            allow,
            kind,
            major: Some(major),
            minor: Some(minor),
            access: access.to_owned(),
        }
    }

    fn deny_all() -> DeviceRule {
        rule(false, DeviceRuleKind::All, -1, -1, "rwm")
    }

    #[test]
    fn the_defaults_survive_a_denial_of_everything() {
        let program = program(&[deny_all()]).unwrap();
        assert!(run(&program, KIND_CHARACTER, READ | WRITE, 1, 3));
        assert!(run(&program, KIND_CHARACTER, READ | WRITE, 136, 7));
        assert!(run(&program, KIND_BLOCK, MAKE, 8, 0));
        assert!(!run(&program, KIND_BLOCK, READ, 8, 0));
        assert!(!run(&program, KIND_CHARACTER, READ, 10, 232));
    }

    #[test]
    fn no_rules_refuse_what_is_not_a_default() {
        assert!(!run(&program(&[]).unwrap(), KIND_BLOCK, READ, 8, 0));
    }

    #[test]
    fn parts_of_an_access_are_decided_one_by_one() {
        use DeviceRuleKind::{Block, Character};
        let rules = [
            rule(true, Block, 8, -1, "rw"),
            rule(false, Block, 8, 1, "w"),
            rule(true, Character, 10, 200, "rwm"),
        ];
        let program = program(&rules).unwrap();
        assert!(run(&program, KIND_BLOCK, READ | WRITE, 8, 0));
        assert!(run(&program, KIND_BLOCK, READ, 8, 1));
        assert!(!run(&program, KIND_BLOCK, READ | WRITE, 8, 1));
        assert!(run(&program, KIND_CHARACTER, READ | WRITE | MAKE, 10, 200));
        assert!(!run(&program, KIND_CHARACTER, READ, 10, 201));
    }

    #[test]
    fn rules_that_cannot_be_understood_are_refused() {
        let odd = rule(true, DeviceRuleKind::Block, 8, 0, "rx");
        assert_eq!(program(&[odd]), Err(DeviceRuleError::Access("rx".into())));
        let large = rule(true, DeviceRuleKind::Block, 1 << 40, 0, "r");
        assert_eq!(program(&[large]), Err(DeviceRuleError::Number(1 << 40)));
        assert!(program(&vec![deny_all(); MAX_RULES + 1]).is_err());
    }

    fn rules() -> impl Strategy<Value = Vec<DeviceRule>> {
        let kind = prop_oneof![
            Just(DeviceRuleKind::All),
            Just(DeviceRuleKind::Block),
            Just(DeviceRuleKind::Character)
        ];
        let one = (any::<bool>(), kind, -1i64..3, -1i64..3, "[rwm]{1,3}").prop_map(
            |(allow, kind, major, minor, access)| rule(allow, kind, major, minor, &access),
        );
        proptest::collection::vec(one, 0..8)
    }

    proptest! {
        /// The program against the sentence in this module's head, read literally.
        #[test]
        fn the_last_rule_that_speaks_of_a_part_decides_it(
            rules in rules(), kind in 1i32..=2, access in 1i32..8, major in 0i32..3, minor in 0i32..3
        ) {
            let mut all: Vec<_> = rules.iter().map(|rule| understand(rule).unwrap()).collect();
            all.extend_from_slice(DEFAULTS);
            let fits = |wanted: Option<i32>, found| wanted.is_none_or(|wanted| wanted == found);
            let expected = [MAKE, READ, WRITE].into_iter().filter(|part| access & part != 0).all(|part| {
                all.iter()
                    .rev()
                    .find(|rule| {
                        rule.access & part != 0
                            && fits(rule.kind, kind)
                            && fits(rule.major, major)
                            && fits(rule.minor, minor)
                    })
                    .is_some_and(|rule| rule.allow)
            });
            prop_assert_eq!(run(&program(&rules).unwrap(), kind, access, major, minor), expected);
        }
    }
}

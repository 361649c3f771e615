//! `linux.seccomp`: from a profile to the filter that a container's processes live under.
//!
//! The profile means what it means to runc 1.3 with libseccomp 2.5, which its authors have tried it with:
//! - a rule for a call that this table does not know is passed over, as is one that says what is the default;
//! - of a call's rules one without conditions decides, the first of several; else the first whose conditions
//!   are met, and the default if there is none;
//! - conditions of a rule must all be met, unless two are of the same argument: then one is enough;
//! - 32-bit programs have 32-bit arguments; a way into the kernel that the profile does not name is the end
//!   of the thread;
//! - where the default forbids, a call with a higher number than every one that the profile names fails with
//!   ENOSYS: its author could not know it, and C libraries then fall back to an older one.
//!
//! Decision record 18. Must not do I/O but [`Filter::install`].

pub(crate) mod profile;
mod program;
mod table;

pub(crate) use program::Instruction;

use super::refuse::SpecError;
use crate::syscall;
use profile::{Action, Architecture, Argument, Flag, Operator, Profile, Rule};
use program::{Code, MAX_ARGUMENTS, MAX_INSTRUCTIONS};
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, io};

/// `AUDIT_ARCH_X86_64` and `AUDIT_ARCH_I386` of linux/audit.h.
const AUDIT_X86_64: u32 = 0xc000_003e;
const AUDIT_X86: u32 = 0x4000_0003;

/// What a call gets whose way into the kernel the profile does not name, as libseccomp has it.
const FOREIGN: u32 = libc::SECCOMP_RET_KILL_THREAD;
const NOT_IMPLEMENTED: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs();

/// A compiled profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Filter {
    flags: libc::c_ulong,
    program: Vec<Instruction>,
}

impl Filter {
    /// Puts the calling thread under the filter, for ever. Needs no-new-privileges or CAP_SYS_ADMIN.
    pub(super) fn install(&self) -> io::Result<()> {
        syscall::install_filter(self.flags, &self.program)
    }
}

/// Compiles a profile.
pub(crate) fn compile(profile: &Profile) -> Result<Filter, SpecError> {
    let default = verdict(profile, profile.default_action, profile.default_errno_ret)?;
    let rules: Vec<_> = profile
        .syscalls
        .iter()
        .map(|rule| resolve(profile, rule, default))
        .collect::<Result<_, _>>()?;
    let newer = match profile.default_action {
        Action::Allow | Action::Log | Action::Trace => default,
        _ => NOT_IMPLEMENTED,
    };
    let parts = |way: &Way| way.parts(&rules, default, newer);
    let has = |architecture| profile.architectures.contains(&architecture);
    // The processor's own way is always there: without it nothing could run.
    let mut native = parts(&NATIVE);
    if has(Architecture::X32) {
        native.extend(parts(&X32));
    } else {
        native.push((table::X32_BIT, program::answer(FOREIGN)));
    }
    // -1 is what a tracer makes of a call that is not to be made: seccomp(2), "SECCOMP_RET_TRACE".
    native.push((u32::MAX, program::answer(default)));
    let other = if has(Architecture::X86) {
        program::by_number(&parts(&X86))
    } else {
        program::answer(FOREIGN)
    };
    let foreign = program::if_architecture(AUDIT_X86, other, program::answer(FOREIGN));
    let native = program::by_number(&native);
    let program = program::if_architecture(AUDIT_X86_64, native, foreign);
    if program.len() > MAX_INSTRUCTIONS {
        let problem = "instructions are more than the kernel takes";
        return Err(invalid("linux.seccomp.syscalls", program.len(), problem));
    }
    Ok(Filter {
        flags: flags(profile),
        program,
    })
}

fn flags(profile: &Profile) -> libc::c_ulong {
    let given = profile.flags.as_deref().unwrap_or(&[Flag::SpecAllow]);
    given.iter().fold(0, |all, flag| {
        all | match flag {
            Flag::Log => libc::SECCOMP_FILTER_FLAG_LOG,
            Flag::SpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
            Flag::Tsync | Flag::WaitKillableRecv => 0,
        }
    })
}

/// What the kernel is to be told of an action.
fn verdict(profile: &Profile, action: Action, errno: Option<u32>) -> Result<u32, SpecError> {
    let data = || {
        let number = errno.unwrap_or(libc::EPERM.unsigned_abs());
        let too_large = |_| invalid("linux.seccomp errnoRet", number, "is no errno");
        u16::try_from(number).map(u32::from).map_err(too_large)
    };
    let plain = match action {
        Action::Errno => return Ok(libc::SECCOMP_RET_ERRNO | data()?),
        Action::Trace => return Ok(libc::SECCOMP_RET_TRACE | data()?),
        Action::Notify => {
            return Err(SpecError::Unsupported {
                field: format!(
                    "linux.seccomp with SCMP_ACT_NOTIFY (listenerPath {:?})",
                    profile.listener_path
                ),
                reason: "who listens there is on the host",
            });
        }
        Action::KillThread => libc::SECCOMP_RET_KILL_THREAD,
        Action::KillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        Action::Trap => libc::SECCOMP_RET_TRAP,
        Action::Log => libc::SECCOMP_RET_LOG,
        Action::Allow => libc::SECCOMP_RET_ALLOW,
    };
    match errno {
        // "When the action doesn't support an errno, the runtime MUST print and error and fail."
        Some(errno) => Err(invalid(
            "linux.seccomp errnoRet",
            errno,
            "is of an action that returns none",
        )),
        None => Ok(plain),
    }
}

/// A rule that has been checked.
struct Resolved<'a> {
    names: &'a [String],
    verdict: u32,
    /// Matches when all of one are met; without any, always.
    alternatives: Vec<&'a [Argument]>,
    is_default: bool,
}

fn resolve<'a>(profile: &Profile, rule: &'a Rule, default: u32) -> Result<Resolved<'a>, SpecError> {
    let Rule {
        names,
        action,
        errno_ret,
        args,
    } = rule;
    if names.is_empty() || names.iter().any(String::is_empty) {
        let problem = "does not name its system calls";
        return Err(invalid("linux.seccomp.syscalls[].names", "", problem));
    }
    let mut indices: Vec<_> = args.iter().map(|argument| argument.index).collect();
    if let Some(index) = indices.iter().find(|index| **index >= MAX_ARGUMENTS) {
        let field = "linux.seccomp.syscalls[].args[].index";
        return Err(invalid(field, index, "is no argument of a system call"));
    }
    indices.sort_unstable();
    indices.dedup();
    let alternatives = match indices.len() {
        0 => Vec::new(),
        distinct if distinct == args.len() => vec![args.as_slice()],
        _ => args.chunks(1).collect(),
    };
    let verdict = verdict(profile, *action, *errno_ret)?;
    Ok(Resolved {
        names,
        verdict,
        alternatives,
        is_default: verdict == default,
    })
}

/// A way into the kernel.
struct Way {
    /// Its numbers, by name.
    number: fn(&str) -> Option<u32>,
    /// Another call by which this one can be made, and that one's first argument.
    multiplexed: fn(&str) -> Option<(u32, u64)>,
    /// The lowest number that is its.
    first: u32,
    /// Whether its arguments have 64 bits.
    wide: bool,
}

const NATIVE: Way = Way {
    number: table::x86_64,
    multiplexed: |_| None,
    first: 0,
    wide: true,
};

const X32: Way = Way {
    number: table::x32,
    first: table::X32_BIT,
    wide: false,
    ..NATIVE
};

const X86: Way = Way {
    number: table::x86,
    multiplexed: table::x86_multiplexed,
    wide: false,
    ..NATIVE
};

/// What rules say of one call.
#[derive(Default)]
struct Call {
    always: Option<u32>,
    sometimes: Vec<(Vec<Argument>, u32)>,
}

impl Way {
    /// What each number gets, as parts that start with a number and end before the next part's.
    fn parts(&self, rules: &[Resolved<'_>], default: u32, newer: u32) -> Vec<(u32, Code)> {
        let mut calls = BTreeMap::<u32, Call>::new();
        let mut last = None;
        for (rule, name) in rules
            .iter()
            .flat_map(|rule| rule.names.iter().map(move |name| (rule, name)))
        {
            let number = (self.number)(name);
            last = last.max(number);
            if rule.is_default {
                continue;
            }
            if let Some(number) = number {
                calls.entry(number).or_default().add(rule);
            }
            if rule.alternatives.is_empty()
                && let Some((number, first)) = (self.multiplexed)(name)
            {
                let condition = Argument {
                    index: 0,
                    value: first,
                    value_two: 0,
                    op: Operator::Equal,
                };
                let call = calls.entry(number).or_default();
                call.sometimes.push((vec![condition], rule.verdict));
            }
        }
        let mut parts = vec![(self.first, program::answer(default))];
        for (number, call) in calls {
            // Of two parts that start alike, the later one is meant.
            parts.pop_if(|part| part.0 == number);
            parts.push((number, call.code(self.wide, default)));
            parts.push((number + 1, program::answer(default)));
        }
        if let Some(last) = last {
            parts.retain(|part| part.0 <= last);
            parts.push((last + 1, program::answer(newer)));
        }
        parts.dedup_by(|later, earlier| later.1 == earlier.1);
        parts
    }
}

impl Call {
    fn add(&mut self, rule: &Resolved<'_>) {
        if rule.alternatives.is_empty() {
            self.always.get_or_insert(rule.verdict);
        }
        for conditions in &rule.alternatives {
            self.sometimes.push((conditions.to_vec(), rule.verdict));
        }
    }

    fn code(&self, wide: bool, default: u32) -> Code {
        if let Some(verdict) = self.always {
            return program::answer(verdict);
        }
        self.sometimes
            .iter()
            .flat_map(|(conditions, verdict)| program::if_all(conditions, wide, *verdict))
            .chain(program::answer(default))
            .collect()
    }
}

fn invalid(field: &str, value: impl ToString, problem: &'static str) -> SpecError {
    SpecError::Invalid {
        field: field.to_owned(),
        value: value.to_string(),
        problem,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const CONTAINERD: &str = include_str!("../testdata/seccomp-containerd.json");
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | 1;
    const KILL: u32 = libc::SECCOMP_RET_KILL_THREAD;

    fn profile(json: serde_json::Value) -> Profile {
        serde_json::from_value(json).unwrap()
    }

    fn native(profile: &Profile, name: &str, args: [u64; 6]) -> u32 {
        let program = compile(profile).unwrap().program;
        program::run(&program, AUDIT_X86_64, table::x86_64(name).unwrap(), args)
    }

    fn refusal(json: serde_json::Value) -> String {
        compile(&profile(json)).unwrap_err().to_string()
    }

    #[test]
    fn containerds_default_is_as_it_says() {
        let profile: Profile = serde_json::from_str(CONTAINERD).unwrap();
        let filter = compile(&profile).unwrap();
        assert!(filter.program.len() < 700, "{}", filter.program.len());
        assert_eq!(filter.flags, libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
        let none = [0; 6];
        for (name, first, expected) in [
            ("read", 0, ALLOW),
            ("execve", 0, ALLOW),
            ("mount", 0, EPERM),
            ("reboot", 0, EPERM),
            ("init_module", 0, EPERM),
            ("socket", 1, ALLOW),
            // AF_VSOCK
            ("socket", 40, EPERM),
            ("personality", 8, ALLOW),
            ("personality", 9, EPERM),
            ("clone", 0x11, ALLOW),
            ("clone", 0x1000_0000, EPERM),
            ("clone3", 0, libc::SECCOMP_RET_ERRNO | 38),
        ] {
            let args = [first, 0, 0, 0, 0, 0];
            assert_eq!(native(&profile, name, args), expected, "{name} {first:#x}");
        }
        let run = |audit, number| program::run(&filter.program, audit, number, none);
        assert_eq!(run(AUDIT_X86_64, 0x3000), NOT_IMPLEMENTED);
        assert_eq!(run(AUDIT_X86_64, u32::MAX), EPERM);
        assert_eq!(run(AUDIT_X86, 4), ALLOW);
        assert_eq!(run(AUDIT_X86, 21), EPERM);
        assert_eq!(run(AUDIT_X86_64, table::X32_BIT | 520), ALLOW);
        assert_eq!(run(0xc000_00b7, 0), KILL);
    }

    #[test]
    fn a_way_that_is_not_named_is_the_end() {
        let profile = profile(json!({"defaultAction": "SCMP_ACT_ALLOW"}));
        let program = compile(&profile).unwrap().program;
        let run = |audit, number| program::run(&program, audit, number, [0; 6]);
        assert_eq!(run(AUDIT_X86_64, 0), ALLOW);
        assert_eq!(run(AUDIT_X86_64, 100_000), ALLOW);
        assert_eq!(run(AUDIT_X86_64, table::X32_BIT), KILL);
        assert_eq!(run(AUDIT_X86, 1), KILL);
    }

    #[test]
    fn calls_of_32_bit_programs_through_others_are_the_same_calls() {
        let profile = profile(json!({
            "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86"],
            "syscalls": [{"names": ["accept", "no_such_call"], "action": "SCMP_ACT_ALLOW"}]
        }));
        let program = compile(&profile).unwrap().program;
        let run = |first| program::run(&program, AUDIT_X86, 102, [first, 0, 0, 0, 0, 0]);
        assert_eq!((run(5), run(1)), (ALLOW, EPERM));
    }

    #[test]
    fn what_cannot_be_is_named() {
        let notify = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/x.sock",
            "syscalls": [{"names": ["mount"], "action": "SCMP_ACT_NOTIFY"}]});
        assert_eq!(
            refusal(notify),
            "linux.seccomp with SCMP_ACT_NOTIFY (listenerPath \"/run/x.sock\") is not supported: who listens there is on the host"
        );
        let rule = |rule| refusal(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [rule]}));
        let index = json!({"index": 6, "value": 0, "op": "SCMP_CMP_EQ"});
        assert!(
            rule(json!({"names": ["a"], "action": "SCMP_ACT_ERRNO", "args": [index]}))
                .contains("args[].index \"6\" is no argument")
        );
        assert!(
            rule(json!({"names": ["a"], "action": "SCMP_ACT_KILL", "errnoRet": 1}))
                .contains("errnoRet \"1\" is of an action that returns none")
        );
        assert!(rule(json!({"names": [], "action": "SCMP_ACT_KILL"})).contains("names"));
        assert!(
            rule(json!({"names": ["a"], "action": "SCMP_ACT_ERRNO", "errnoRet": 70_000}))
                .contains("is no errno")
        );
        for unknown in [
            json!({"defaultAction": "SCMP_ACT_PERHAPS"}),
            json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_NEW"]}),
            json!({"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_VAX"]}),
        ] {
            serde_json::from_value::<Profile>(unknown).unwrap_err();
        }
    }

    #[test]
    fn a_program_that_is_too_long_is_refused() {
        let condition = json!({"index": 0, "value": 1, "op": "SCMP_CMP_GE"});
        let rules: Vec<_> = (0..800)
            .map(|errno| {
                json!({"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": [condition]})
            })
            .collect();
        assert!(
            refusal(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules}))
                .contains("more than the kernel takes")
        );
    }

    /// What a profile says of a call, told anew: rule by rule, number by number.
    fn told(profile: &Profile, audit: u32, number: u32, args: [u64; 6]) -> u32 {
        let ret = |action, errno| verdict(profile, action, errno).unwrap();
        let default = ret(profile.default_action, profile.default_errno_ret);
        let has = |way| profile.architectures.contains(&way);
        let is_x32 = number >= table::X32_BIT;
        let (way, mask) = match audit {
            AUDIT_X86_64 if number == u32::MAX => return default,
            AUDIT_X86_64 if !is_x32 => (&NATIVE, u64::MAX),
            AUDIT_X86_64 if has(Architecture::X32) => (&X32, u64::from(u32::MAX)),
            AUDIT_X86 if has(Architecture::X86) => (&X86, u64::from(u32::MAX)),
            _ => return FOREIGN,
        };
        let names = || profile.syscalls.iter().flat_map(|rule| &rule.names);
        let last = names().filter_map(|name| (way.number)(name)).max();
        let permissive = [Action::Allow, Action::Log, Action::Trace];
        if last.is_some_and(|last| number > last) && !permissive.contains(&profile.default_action) {
            return NOT_IMPLEMENTED;
        }
        let met = |argument: &Argument| {
            let given = args[usize::try_from(argument.index).unwrap()] & mask;
            let value = argument.value & mask;
            match argument.op {
                Operator::NotEqual => given != value,
                Operator::Less => given < value,
                Operator::LessOrEqual => given <= value,
                Operator::Equal => given == value,
                Operator::GreaterOrEqual => given >= value,
                Operator::Greater => given > value,
                Operator::MaskedEqual => given & value == argument.value_two & value,
            }
        };
        let mut sometimes = None;
        for rule in &profile.syscalls {
            let answer = ret(rule.action, rule.errno_ret);
            let repeated = rule
                .args
                .iter()
                .enumerate()
                .any(|(at, one)| rule.args[..at].iter().any(|two| two.index == one.index));
            let matches = match repeated {
                true => rule.args.iter().any(met),
                false => rule.args.iter().all(met),
            };
            for name in &rule.names {
                if answer == default {
                    continue;
                }
                if (way.number)(name) == Some(number) && rule.args.is_empty() {
                    return answer;
                }
                let direct = (way.number)(name) == Some(number) && matches;
                let through = rule.args.is_empty()
                    && (way.multiplexed)(name) == Some((number, args[0] & mask));
                if direct || through {
                    sometimes.get_or_insert(answer);
                }
            }
        }
        sometimes.unwrap_or(default)
    }

    fn any_action() -> impl Strategy<Value = (Action, Option<u32>)> {
        prop_oneof![
            Just((Action::Allow, None)),
            Just((Action::KillProcess, None)),
            Just((Action::Trap, None)),
            Just((Action::Log, None)),
            (Just(Action::Errno), prop::option::of(1..40_u32)),
            (Just(Action::Trace), prop::option::of(1..40_u32)),
        ]
    }

    /// Few values, so that comparisons meet their borders, in both halves.
    fn any_value() -> impl Strategy<Value = u64> {
        let half = || prop::sample::select(vec![0, 1, 2, 0x7fff_ffff, 0xffff_fffe, 0xffff_ffff]);
        (half(), half()).prop_map(|(high, low): (u64, u64)| high << 32 | low)
    }

    fn any_argument() -> impl Strategy<Value = Argument> {
        use Operator::*;
        let all = [
            NotEqual,
            Less,
            LessOrEqual,
            Equal,
            GreaterOrEqual,
            Greater,
            MaskedEqual,
        ];
        let op = prop::sample::select(all.to_vec());
        (0..3_u32, any_value(), any_value(), op).prop_map(|(index, value, value_two, op)| {
            Argument {
                index,
                value,
                value_two,
                op,
            }
        })
    }

    const NAMES: &[&str] = &[
        "read",
        "write",
        "open",
        "socket",
        "accept",
        "shmctl",
        "ioctl",
        "socketcall",
        "ipc",
        "execveat",
        "clone3",
        "landlock_add_rule",
        "unheard_of",
    ];

    fn any_profile() -> impl Strategy<Value = Profile> {
        let names = prop::collection::vec(prop::sample::select(NAMES.to_vec()), 1..4);
        let args = prop::collection::vec(any_argument(), 0..4);
        let rule =
            (names, any_action(), args).prop_map(|(names, (action, errno_ret), args)| Rule {
                names: names.into_iter().map(str::to_owned).collect(),
                action,
                errno_ret,
                args,
            });
        let ways = prop::sample::subsequence(vec![Architecture::X86, Architecture::X32], 0..=2);
        let rules = prop::collection::vec(rule, 0..12);
        (any_action(), ways, rules).prop_map(
            |((default_action, errno), architectures, syscalls)| Profile {
                default_action,
                default_errno_ret: errno,
                architectures,
                flags: None,
                listener_path: String::new(),
                syscalls,
            },
        )
    }

    fn any_number() -> impl Strategy<Value = u32> {
        let named = prop::sample::select(NAMES.to_vec()).prop_map(|name| {
            let numbers = [table::x86_64(name), table::x32(name), table::x86(name)];
            numbers.into_iter().flatten().collect::<Vec<_>>()
        });
        prop_oneof![
            named.prop_filter_map("unknown", |all| all.first().copied()),
            named_last(),
            0..600_u32,
            any::<u32>(),
            Just(u32::MAX),
        ]
    }

    fn named_last() -> impl Strategy<Value = u32> {
        let name = prop::sample::select(NAMES.to_vec());
        (name, any::<bool>()).prop_filter_map("unknown", |(name, x32)| {
            if x32 {
                table::x32(name)
            } else {
                table::x86(name)
            }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]
        #[test]
        fn the_program_answers_what_the_profile_says(
            profile in any_profile(),
            calls in prop::collection::vec((any::<bool>(), any_number(), prop::array::uniform6(any_value())), 1..40),
        ) {
            let program = compile(&profile).unwrap().program;
            for (is_native, number, args) in calls {
                let audit = if is_native { AUDIT_X86_64 } else { AUDIT_X86 };
                prop_assert_eq!(
                    program::run(&program, audit, number, args),
                    told(&profile, audit, number, args),
                    "{:#x} {:#x} {:x?}", audit, number, args
                );
            }
        }
    }
}

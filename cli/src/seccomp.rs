//! Seccomp profiles: `linux.seccomp` of an OCI configuration, as `ctr` and the CRI read it from a file, with the
//! comments that Docker's form has. Must not do I/O.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use syscalls::x86_64::Sysno;

/// `clone`'s flags that make namespaces (`CLONE_NEW*`), which a recorded use has or has not.
const NAMESPACE_FLAGS: u64 = 0x7e02_0000;
/// A recorded personality that has no class of its own.
const OTHER_PERSONALITY: u32 = 0xffff_fffe;
/// What a call that is to be made in an older way instead is answered (ENOSYS).
const NOT_IMPLEMENTED: u32 = 38;

const ARCHITECTURE: &str = "SCMP_ARCH_X86_64";
const REFUSE: &str = "SCMP_ACT_ERRNO";
const ALLOW: &str = "SCMP_ACT_ALLOW";
const LOG: &str = "SCMP_ACT_LOG";
const EQUAL: &str = "SCMP_CMP_EQ";
const MASKED_EQUAL: &str = "SCMP_CMP_MASKED_EQ";

/// x86-64's `clone`, when it makes no namespaces.
const PLAIN_CLONE: Use = Use {
    number: 56,
    class: 0,
};

/// The condition that it is one.
const PLAIN: (&str, u64, u64) = (MASKED_EQUAL, NAMESPACE_FLAGS, 0);

/// What a runtime calls between the filter and the program.
const OF_RUNTIME: [&str; 2] = ["capset", "execve"];
/// How a thread ends, and goes on after a signal: may have stayed out of a recording by chance.
const OF_EVERYBODY: [&str; 4] = ["exit", "exit_group", "restart_syscall", "rt_sigreturn"];

/// Why a profile can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ProfileError {
    /// It isn't one.
    #[error("not a seccomp profile")]
    Json(#[from] serde_json::Error),
    /// It can't be merged.
    #[error(
        "syscalls[{index}] has {action}: only what profiles of `walnut profile record` have can be merged, {ALLOW} and {REFUSE}"
    )]
    Action {
        /// Which rule.
        index: usize,
        /// Its action.
        action: String,
    },
    /// It allows what it doesn't name.
    #[error("defaultAction is {0}: only profiles that refuse by default ({REFUSE}) can be merged")]
    Default(String),
}

/// A profile.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(crate) struct Profile {
    default_action: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    default_errno_ret: Option<u32>,
    #[serde(default)]
    architectures: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    flags: Vec<String>,
    #[serde(default)]
    syscalls: Vec<Rule>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Rule {
    names: Vec<String>,
    action: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    errno_ret: Option<u32>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    args: Vec<Condition>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    comment: Option<String>,
}

/// A condition on an argument.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Condition {
    index: u32,
    value: u64,
    #[serde(default, skip_serializing_if = "is_zero")]
    value_two: u64,
    op: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(value: &u64) -> bool {
    *value == 0
}

/// What is allowed of one call; of two, the later one includes the earlier.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Permission {
    /// Nothing: it fails with this.
    Refused(u32),
    /// It, when all conditions of one are met.
    Sometimes(BTreeSet<Vec<Condition>>),
    /// It.
    Always,
}

impl Permission {
    fn with(self, other: Self) -> Self {
        match (self, other) {
            (Self::Always, _) | (_, Self::Always) => Self::Always,
            (Self::Sometimes(one), Self::Sometimes(two)) => {
                Self::Sometimes(one.into_iter().chain(two).collect())
            }
            (Self::Sometimes(one), Self::Refused(_)) | (Self::Refused(_), Self::Sometimes(one)) => {
                Self::Sometimes(one)
            }
            (Self::Refused(errno), Self::Refused(_)) => Self::Refused(errno),
        }
    }
}

/// What is allowed of each call, by its name.
#[derive(Debug, Default)]
struct Calls(BTreeMap<String, Permission>);

impl Calls {
    fn add(&mut self, name: &str, permission: Permission) {
        let merged = match self.0.remove(name) {
            Some(before) => before.with(permission),
            None => permission,
        };
        self.0.insert(name.to_owned(), merged);
    }
}

/// A recorded use: number of a call and class of its argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Use {
    /// On x86-64.
    pub(crate) number: u32,
    /// As `SyscallUse` of the Pod service says.
    pub(crate) class: u32,
}

impl Use {
    /// The call's name, if it has one.
    pub(crate) fn name(self) -> Option<&'static str> {
        let number = usize::try_from(self.number).ok()?;
        Sysno::new(number).map(|call| call.name())
    }

    /// What else is known of it, in words.
    pub(crate) fn detail(self) -> String {
        match (self.name(), self.class) {
            (Some("socket"), family) => family_name(family),
            (Some("clone"), 1) => "with new namespaces".to_owned(),
            (Some("personality"), OTHER_PERSONALITY) => "an unusual one".to_owned(),
            (Some("personality"), value) => format!("{value:#x}"),
            _ => String::new(),
        }
    }

    /// The first argument, as far as it is known: the bits that are, and their values.
    fn known(self) -> (u64, u64) {
        match (self.name(), self.class) {
            (Some("socket"), family) => (u64::MAX, family.into()),
            (Some("personality"), value) if value != OTHER_PERSONALITY => (u64::MAX, value.into()),
            (Some("clone"), 0) => (NAMESPACE_FLAGS, 0),
            _ => (0, 0),
        }
    }
}

fn family_name(family: u32) -> String {
    let name = match family {
        0 => "AF_UNSPEC",
        1 => "AF_UNIX",
        2 => "AF_INET",
        10 => "AF_INET6",
        16 => "AF_NETLINK",
        17 => "AF_PACKET",
        38 => "AF_ALG",
        40 => "AF_VSOCK",
        44 => "AF_XDP",
        other => return format!("address family {other}"),
    };
    name.to_owned()
}

/// What a profile does to a use.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    /// Nothing.
    Allowed,
    /// It depends on arguments that aren't recorded.
    Unknown,
    /// This action.
    Denied(String),
}

impl Profile {
    /// Reads one.
    pub(crate) fn parse(json: &[u8]) -> Result<Self, ProfileError> {
        Ok(serde_json::from_slice(json)?)
    }

    /// One that allows what was seen and no more, and what runtimes need for every program.
    pub(crate) fn of(uses: &[Use], comment: &str) -> Self {
        let mut calls = Calls::default();
        for name in OF_RUNTIME.into_iter().chain(OF_EVERYBODY) {
            calls.add(name, Permission::Always);
        }
        for one in uses {
            let Some(name) = one.name() else { continue };
            match name {
                // Its flags are in memory, where no filter can read them: C libraries then use clone.
                "clone3" => {
                    calls.add(name, Permission::Refused(NOT_IMPLEMENTED));
                    calls.add("clone", PLAIN_CLONE.permission());
                }
                _ => calls.add(name, one.permission()),
            }
        }
        Self::with(&calls, vec![ARCHITECTURE.to_owned()], comment)
    }

    /// One that allows what one of several allows.
    pub(crate) fn merge(profiles: &[Self], comment: &str) -> Result<Self, ProfileError> {
        let mut calls = Calls::default();
        let mut architectures = BTreeSet::new();
        for profile in profiles {
            architectures.extend(profile.architectures.iter().cloned());
            profile.add_to(&mut calls)?;
        }
        let architectures = architectures.into_iter().collect();
        Ok(Self::with(&calls, architectures, comment))
    }

    fn add_to(&self, calls: &mut Calls) -> Result<(), ProfileError> {
        if self.default_action != REFUSE {
            return Err(ProfileError::Default(self.default_action.clone()));
        }
        for (index, rule) in self.syscalls.iter().enumerate() {
            let permission = match (rule.action.as_str(), rule.args.is_empty()) {
                (ALLOW, true) => Permission::Always,
                (ALLOW, false) => Permission::Sometimes([rule.args.clone()].into()),
                (REFUSE, true) => Permission::Refused(rule.errno_ret.unwrap_or(1)),
                _ => {
                    let action = rule.action.clone();
                    return Err(ProfileError::Action { index, action });
                }
            };
            for name in &rule.names {
                calls.add(name, permission.clone());
            }
        }
        Ok(())
    }

    fn with(Calls(calls): &Calls, architectures: Vec<String>, comment: &str) -> Self {
        let of = |wanted: &Permission| {
            let calls = calls.iter().filter(|(_, permission)| *permission == wanted);
            calls.map(|(name, _)| name.clone()).collect::<Vec<_>>()
        };
        let mut syscalls = vec![Rule::allow(
            of(&Permission::Always),
            Vec::new(),
            comment.to_owned(),
        )];
        for (name, permission) in calls {
            match permission {
                Permission::Always => {}
                Permission::Sometimes(alternatives) => {
                    syscalls.extend(alternatives.iter().map(|args| {
                        let comment = describe(name, args);
                        Rule::allow(vec![name.clone()], args.clone(), comment)
                    }));
                }
                Permission::Refused(errno) => syscalls.push(Rule {
                    names: vec![name.clone()],
                    action: REFUSE.to_owned(),
                    errno_ret: Some(*errno),
                    args: Vec::new(),
                    comment: Some("C libraries then use clone, whose flags can be seen".to_owned()),
                }),
            }
        }
        Self {
            default_action: REFUSE.to_owned(),
            default_errno_ret: Some(1),
            architectures,
            flags: Vec::new(),
            syscalls,
        }
    }

    /// What it would do to a use, in libseccomp's order: of a call's rules one without conditions decides, else the first
    /// whose conditions are met; a rule that says what is the default doesn't count.
    pub(crate) fn verdict(&self, one: Use) -> Verdict {
        let name = one.name();
        let default = (&self.default_action, self.default_errno_ret);
        let rules = self.syscalls.iter().filter(|rule| {
            let named = rule.names.iter().any(|known| Some(known.as_str()) == name);
            named && (&rule.action, rule.errno_ret) != default
        });
        let rules: Vec<&Rule> = rules.collect();
        let always = rules.iter().find(|rule| rule.args.is_empty());
        if let Some(rule) = always {
            // Who is told that there is no clone3 uses clone.
            if name == Some("clone3") && rule.errno_ret == Some(NOT_IMPLEMENTED) {
                return self.verdict(PLAIN_CLONE);
            }
            return of_action(&rule.action);
        }
        for rule in rules {
            match rule.met_by(one) {
                Some(true) => return of_action(&rule.action),
                Some(false) => {}
                None => return Verdict::Unknown,
            }
        }
        of_action(&self.default_action)
    }

    /// As a file.
    pub(crate) fn json(&self) -> Result<String, ProfileError> {
        Ok(format!("{}\n", serde_json::to_string_pretty(self)?))
    }
}

fn of_action(action: &str) -> Verdict {
    match action {
        ALLOW | LOG => Verdict::Allowed,
        other => Verdict::Denied(other.to_owned()),
    }
}

impl Use {
    fn permission(self) -> Permission {
        let (op, value, value_two) = match (self.name(), self.class) {
            (Some("socket"), family) => (EQUAL, family.into(), 0),
            (Some("clone"), 0) => PLAIN,
            (Some("personality"), value) if value != OTHER_PERSONALITY => (EQUAL, value.into(), 0),
            _ => return Permission::Always,
        };
        let condition = Condition {
            index: 0,
            value,
            value_two,
            op: op.to_owned(),
        };
        Permission::Sometimes([vec![condition]].into())
    }
}

fn describe(name: &str, args: &[Condition]) -> String {
    match (name, args) {
        ("socket", [family]) if family.op == EQUAL => {
            family_name(u32::try_from(family.value).unwrap_or(u32::MAX))
        }
        ("clone", [flags]) if flags.op == MASKED_EQUAL => "without new namespaces".to_owned(),
        ("personality", [value]) => format!("{:#x}", value.value),
        _ => String::new(),
    }
}

impl Rule {
    fn allow(names: Vec<String>, args: Vec<Condition>, comment: String) -> Self {
        Self {
            names,
            action: ALLOW.to_owned(),
            errno_ret: None,
            args,
            comment: (!comment.is_empty()).then_some(comment),
        }
    }

    /// Whether its conditions are met by a use, as far as that is known.
    fn met_by(&self, one: Use) -> Option<bool> {
        let met = self.args.iter().map(|condition| condition.met_by(one));
        // All must be met; of several for the same argument, libseccomp takes one to be enough.
        let indices: BTreeSet<u32> = self.args.iter().map(|one| one.index).collect();
        let decides = indices.len() != self.args.len();
        let met: Vec<_> = met.collect();
        if met.contains(&Some(decides)) {
            return Some(decides);
        }
        if met.contains(&None) {
            return None;
        }
        Some(!decides)
    }
}

impl Condition {
    fn met_by(&self, one: Use) -> Option<bool> {
        let (bits, value) = one.known();
        let is_plain = (self.op.as_str(), self.value, self.value_two) == PLAIN;
        if is_plain && one.number == PLAIN_CLONE.number {
            return Some(one.class == PLAIN_CLONE.class);
        }
        if self.index != 0 || (self.op != MASKED_EQUAL && bits != u64::MAX) {
            return None;
        }
        match self.op.as_str() {
            MASKED_EQUAL if self.value & !bits != 0 => None,
            MASKED_EQUAL => Some(value & self.value == self.value_two & self.value),
            EQUAL => Some(value == self.value),
            "SCMP_CMP_NE" => Some(value != self.value),
            "SCMP_CMP_LT" => Some(value < self.value),
            "SCMP_CMP_LE" => Some(value <= self.value),
            "SCMP_CMP_GE" => Some(value >= self.value),
            "SCMP_CMP_GT" => Some(value > self.value),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn used(name: &str, class: u32) -> Use {
        let number = name.parse::<Sysno>().unwrap().id().unsigned_abs();
        Use { number, class }
    }

    fn seen() -> Vec<Use> {
        vec![
            used("read", 0),
            used("socket", 2),
            used("socket", 1),
            used("clone3", 0),
            used("personality", 0xffff_ffff),
            Use {
                number: 1000,
                class: 0,
            },
        ]
    }

    #[test]
    fn a_profile_allows_what_was_seen_and_no_more() {
        let profile = Profile::of(&seen(), "of a test");
        let json: serde_json::Value = serde_json::from_str(&profile.json().unwrap()).unwrap();
        let always = json!([
            "capset",
            "execve",
            "exit",
            "exit_group",
            "read",
            "restart_syscall",
            "rt_sigreturn"
        ]);
        assert_eq!(json["syscalls"][0]["names"], always);
        assert_eq!(json["syscalls"][0]["comment"], "of a test");
        assert_eq!(json["architectures"], json!(["SCMP_ARCH_X86_64"]));
        assert_eq!(
            json["syscalls"][1],
            json!({"names": ["clone"], "action": "SCMP_ACT_ALLOW", "comment": "without new namespaces",
                "args": [{"index": 0, "value": 0x7e02_0000, "op": "SCMP_CMP_MASKED_EQ"}]})
        );
        assert_eq!(json["syscalls"][2]["errnoRet"], 38);
        let refused = Verdict::Denied(REFUSE.to_owned());
        for (one, expected) in [
            (used("read", 0), Verdict::Allowed),
            (used("write", 0), refused.clone()),
            (used("socket", 1), Verdict::Allowed),
            (used("socket", 10), refused.clone()),
            (used("clone", 0), Verdict::Allowed),
            (used("clone", 1), refused.clone()),
            (used("clone3", 0), Verdict::Allowed),
            (used("personality", 0xffff_ffff), Verdict::Allowed),
            (used("personality", 8), refused),
        ] {
            assert_eq!(profile.verdict(one), expected, "{one:?}");
        }
    }

    #[test]
    fn several_profiles_merge_to_what_one_of_them_allows() {
        let one = Profile::of(&[used("read", 0), used("socket", 1), used("clone3", 0)], "");
        let two = Profile::of(&[used("write", 0), used("socket", 2), used("clone", 1)], "");
        let merged = Profile::merge(&[one.clone(), two.clone()], "of two").unwrap();
        for one in [
            used("read", 0),
            used("write", 0),
            used("socket", 1),
            used("socket", 2),
            used("clone", 0),
            used("clone", 1),
        ] {
            assert_eq!(merged.verdict(one), Verdict::Allowed, "{one:?}");
        }
        assert_eq!(Profile::merge(&[two, one], "of two").unwrap(), merged);
        assert_eq!(
            Profile::merge(std::slice::from_ref(&merged), "of two").unwrap(),
            merged
        );
        assert_eq!(
            Profile::parse(merged.json().unwrap().as_bytes()).unwrap(),
            merged
        );
    }

    #[test]
    fn what_cannot_be_merged_is_named() {
        let merge = |json: serde_json::Value| {
            let profile = Profile::parse(json.to_string().as_bytes()).unwrap();
            Profile::merge(&[profile], "").unwrap_err().to_string()
        };
        let open = merge(json!({"defaultAction": "SCMP_ACT_ALLOW"}));
        assert!(
            open.starts_with("defaultAction is SCMP_ACT_ALLOW"),
            "{open}"
        );
        let trap = json!({"names": ["read"], "action": "SCMP_ACT_TRAP"});
        let trap = merge(json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [trap]}));
        assert!(trap.starts_with("syscalls[0] has SCMP_ACT_TRAP"), "{trap}");
        let docker = br#"{"defaultAction": "SCMP_ACT_ERRNO", "archMap": []}"#;
        assert!(Profile::parse(docker).is_err());
    }

    #[test]
    fn what_a_condition_says_of_unknown_arguments_is_unknown() {
        let rule = json!({"names": ["read", "socket"], "action": "SCMP_ACT_ALLOW", "args": [
            {"index": 0, "value": 3, "op": "SCMP_CMP_LT"}, {"index": 1, "value": 3, "op": "SCMP_CMP_EQ"}]});
        let profile = json!({"defaultAction": "SCMP_ACT_KILL", "syscalls": [rule]});
        let profile = Profile::parse(profile.to_string().as_bytes()).unwrap();
        assert_eq!(profile.verdict(used("read", 0)), Verdict::Unknown);
        assert_eq!(profile.verdict(used("socket", 1)), Verdict::Unknown);
        let killed = Verdict::Denied("SCMP_ACT_KILL".to_owned());
        assert_eq!(profile.verdict(used("socket", 5)), killed);
    }
}

//! What fuzzers run: one function for each parser of bytes that come from the host.
//!
//! Only built for tests and by the fuzzers of `guest-agent/fuzz`. Any bytes must be survived: refused, or
//! understood as far as nothing but the bytes is needed.

use crate::{
    apparmor,
    cgroup::{devices, resources},
    container::{
        refuse::{parse_process, parse_resources, parse_spec},
        seccomp, validate, validate_process,
    },
};
use protobuf::Message;
use walnut_agent_api::{
    containerd::api::{
        CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, ResizePtyRequest,
        UpdateTaskRequest, WaitRequest,
    },
    guest::{LoadProfileRequest, SetupRequest, WaitOutOfMemoryRequest},
};

/// A name, and what is done with the fuzzer's bytes.
pub type Target = (&'static str, fn(&[u8]));

/// All targets, each named as its file in `guest-agent/fuzz/fuzz_targets`.
pub const TARGETS: &[Target] = &[
    ("request", request),
    ("configuration", configuration),
    ("changed_configuration", changed_configuration),
    ("seccomp_profile", seccomp_profile),
];

const DEFAULT: &str = include_str!("container/testdata/ctr-run.json");
const FILTERED: &str = include_str!("container/testdata/seccomp-containerd.json");
/// What a filter's rule may be made of: numbers, and words of the specification.
const WORDS: [&str; 12] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_KILL",
    "SCMP_CMP_EQ",
    "SCMP_CMP_MASKED_EQ",
    "SCMP_CMP_GT",
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X32",
    "read",
    "socketcall",
];

/// Messages of the shim, and the documents in them.
pub fn request(data: &[u8]) {
    if let Ok(request) = CreateTaskRequest::parse_from_bytes(data) {
        configuration(&request.options.value);
    }
    if let Ok(request) = ExecProcessRequest::parse_from_bytes(data) {
        configuration(&request.spec.value);
    }
    if let Ok(request) = UpdateTaskRequest::parse_from_bytes(data) {
        configuration(&request.resources.value);
    }
    if let Ok(request) = LoadProfileRequest::parse_from_bytes(data) {
        let _ = apparmor::check_policy(&request.name, &request.policy);
    }
    let _ = DeleteRequest::parse_from_bytes(data);
    let _ = KillRequest::parse_from_bytes(data);
    let _ = ResizePtyRequest::parse_from_bytes(data);
    let _ = WaitRequest::parse_from_bytes(data);
    let _ = SetupRequest::parse_from_bytes(data);
    let _ = WaitOutOfMemoryRequest::parse_from_bytes(data);
}

/// A configuration, a process or resources, up to what the kernel would be told.
pub fn configuration(data: &[u8]) {
    if let Ok(spec) = parse_spec(data) {
        let _ = validate(&spec);
        let _ = resources::settings(&spec.linux.resources);
        let _ = devices::program(&spec.linux.resources.devices);
        let _ = spec.linux.seccomp.as_ref().map(seccomp::compile);
    }
    if let Ok(process) = parse_process(data) {
        let _ = validate_process(&process);
    }
    if let Ok(resources) = parse_resources(data) {
        let _ = resources::settings(&resources);
        let _ = devices::program(&resources.devices);
    }
}

/// containerd's default, with bytes of the fuzzer's in some places: of each three, two say where.
pub fn changed_configuration(data: &[u8]) {
    let filter = format!("\"linux\":{{\"seccomp\":{FILTERED},");
    let mut text = DEFAULT.replacen("\"linux\":{", &filter, 1).into_bytes();
    for change in data.as_chunks().0 {
        let [high, low, byte] = *change;
        let place = usize::from(u16::from_be_bytes([high, low])) % text.len();
        text[place] = byte;
    }
    configuration(&text);
}

/// A profile of the fuzzer's numbers and of the specification's words.
pub fn seccomp_profile(data: &[u8]) {
    let mut bytes = data.iter().copied();
    let mut next = || usize::from(bytes.next().unwrap_or_default());
    let mut rules = Vec::new();
    for _ in 0..next() % 32 {
        let value = u64::MAX >> (next() % 64);
        rules.push(format!(
            "{{\"names\":[{:?}],\"action\":{:?},\"args\":[{{\"index\":{},\"value\":{value},\"op\":{:?}}}]}}",
            WORDS[next() % WORDS.len()],
            WORDS[next() % WORDS.len()],
            next() % 8,
            WORDS[next() % WORDS.len()],
        ));
    }
    let profile = format!(
        "{{\"defaultAction\":{:?},\"architectures\":[{:?}],\"syscalls\":[{}]}}",
        WORDS[next() % 5],
        WORDS[8 + next() % 2],
        rules.join(",")
    );
    configuration(format!("{{\"linux\":{{\"seccomp\":{profile}}}}}").as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that are the same each time (xorshift).
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }

        fn bytes(&mut self) -> Vec<u8> {
            let length = self.next() % 200;
            (0..length).map(|_| self.next().to_le_bytes()[3]).collect()
        }
    }

    #[test]
    fn any_bytes_are_survived() {
        for (_, target) in TARGETS {
            target(&[]);
            let mut random = Random(0x9e37_79b9_7f4a_7c15);
            for _ in 0..200 {
                target(&random.bytes());
            }
        }
    }

    #[test]
    fn the_document_that_is_changed_is_one() {
        assert!(DEFAULT.contains("\"linux\":{"));
        let filter: seccomp::profile::Profile = serde_json::from_str(FILTERED).unwrap();
        seccomp::compile(&filter).unwrap();
    }
}

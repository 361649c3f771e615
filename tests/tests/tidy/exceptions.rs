//! Where a rule does not hold, and why. `tidy` also fails when an exception excuses nothing.

/// The rule, the file, and why the rule does not hold in it.
pub(crate) type Exception = (&'static str, &'static str, &'static str);

/// All of them.
pub(crate) const EXCEPTIONS: &[Exception] = &[
    (
        "sleep",
        "tests/src/deadline.rs",
        "looks again at state that the kernel announces to nobody, up to a deadline",
    ),
    (
        "global-state",
        "tests/src/requirement.rs",
        "a probe guest is booted once for all tests of a process, which the test runner starts",
    ),
    (
        "global-state",
        "tests/src/ctr.rs",
        "numbers the names of containers, so that no two tests of a process share one",
    ),
    (
        "sleep",
        "shim-v2/src/events.rs",
        "pauses between attempts to reach containerd, which announces its return to nobody",
    ),
    (
        "sleep",
        "xtask/lab-init/src/containerd.rs",
        "paces the restarts of a containerd that ends at once",
    ),
    (
        "sleep",
        "xtask/src/lab/client.rs",
        "tries again to connect to a machine that boots, up to a deadline",
    ),
    (
        "sleep",
        "xtask/src/lab/mod.rs",
        "looks again for the end of a process that is not a child, up to a deadline",
    ),
    (
        "sleep",
        "guest-agent/src/insight/kept.rs",
        "ends what nobody has asked for until then",
    ),
    (
        "unsafe",
        "bpf/src/kernel.rs",
        "bpf(2) and perf_event_open(2), which no safe wrapper of ours offers, each use behind a safe function",
    ),
    (
        "unsafe",
        "guest-agent/src/syscall.rs",
        "system calls that no safe wrapper has, each behind a safe function",
    ),
    (
        "unsafe",
        "shim-v2/src/changes.rs",
        "lets the runtime wait for an inotify instance, which has no safe wrapper",
    ),
    (
        "unsafe",
        "shim-v2/src/network/tap.rs",
        "asks the kernel for a tap, which no safe wrapper does",
    ),
    (
        "unsafe",
        "shim-v2/src/vm.rs",
        "what a child does between fork and exec: joins its cgroup, places its socket; the PID namespace before that",
    ),
    (
        "unsafe",
        "shim-v2/src/log_binary.rs",
        "what a log program expects as its descriptors is placed between fork and exec",
    ),
    (
        "unsafe",
        "tests/src/vmm.rs",
        "makes the PID namespace that the VMM's contract asks for",
    ),
    (
        "opens-paths",
        "vmm/src/fuzz/devices.rs",
        "not in the product: makes the share and the socket of a device that is fuzzed",
    ),
    (
        "manifest",
        "guest-agent/fuzz/Cargo.toml",
        "a workspace of its own, so that no build but the fuzzers' needs libFuzzer",
    ),
    (
        "manifest",
        "vmm/fuzz/Cargo.toml",
        "a workspace of its own, so that no build but the fuzzers' needs libFuzzer",
    ),
    (
        "unsafe",
        "tests/src/bare/program.rs",
        "test code: reads what the assembler put between two symbols",
    ),
    (
        "unsafe",
        "tests/src/network.rs",
        "asks the kernel for a tap, which no safe wrapper does",
    ),
    (
        "unsafe",
        "vmm/src/control.rs",
        "adopts file descriptor 3, as the contract with the shim says",
    ),
    (
        "opens-paths",
        "vmm/src/devices/virtio/fs/files.rs",
        "names FUSE's answer to an open, which opens nothing",
    ),
    (
        "opens-paths",
        "vmm/src/devices/virtio/fs/announce.rs",
        "names FUSE's answer to an open, which opens nothing",
    ),
    (
        "opens-paths",
        "vmm/src/devices/virtio/fs/tests/announced.rs",
        "not in the product: the host's side of a test",
    ),
    (
        "opens-paths",
        "vmm/src/devices/virtio/fs/server.rs",
        "names FUSE's answer to an open, and opens /proc/self/fd and the share's root before the guest runs",
    ),
    (
        "unsafe",
        "vmm/src/devices/virtio/fs/identity.rs",
        "gives a thread a working directory of its own, and lends descriptors",
    ),
    (
        "unsafe",
        "vmm/src/devices/virtio/block/disk.rs",
        "tells a block device of the host to discard, which no safe wrapper does",
    ),
    (
        "unsafe",
        "vmm/src/devices/virtio/block/ring.rs",
        "hands guest memory to io_uring, and keeps it until the kernel is done with it",
    ),
    (
        "unsafe",
        "vmm/src/devices/virtio/mock_driver.rs",
        "test code: borrows the descriptor of an EventFd",
    ),
    (
        "unsafe",
        "vmm/src/file_mapping.rs",
        "maps files of the host, which only the guest touches",
    ),
    (
        "unsafe",
        "vmm/src/devices/virtio/net/tap.rs",
        "reads and writes packets in guest memory, and sets taps up",
    ),
    (
        "unsafe",
        "vmm/src/devices/virtio/net/vhost.rs",
        "hands queues and guest memory to the host's kernel",
    ),
    (
        "unsafe",
        "vmm/src/jail.rs",
        "makes namespaces, which is only safe while there is one thread, and joins an empty keyring",
    ),
    (
        "unsafe",
        "vmm/tests/jail.rs",
        "test code: asks the kernel by number for what is forbidden",
    ),
    (
        "unsafe",
        "vmm/src/memory.rs",
        "tells the kernel how to back guest memory",
    ),
    (
        "unsafe",
        "vmm/src/vcpu.rs",
        "reaches kvm_run from a signal handler",
    ),
    (
        "unsafe",
        "vmm/src/vm.rs",
        "adopts a file descriptor and gives memory to KVM",
    ),
    (
        "unsafe",
        "xtask/src/check/guest.rs",
        "gives memory to the KVM that it probes",
    ),
    (
        "unsafe",
        "vmm/src/window.rs",
        "maps files where the guest sees them",
    ),
    (
        "global-state",
        "vmm/src/vcpu.rs",
        "a signal handler gets no argument: it finds its thread's vCPU here",
    ),
    (
        "anyhow",
        "shim-v2/src/bootstrap.rs",
        "a command of the program, as main is: its error is printed, nobody acts on it",
    ),
    (
        "anyhow",
        "shim-v2/src/cleanup.rs",
        "a command of the program, as main is: its error is printed, nobody acts on it",
    ),
    (
        "anyhow",
        "shim-v2/src/server.rs",
        "a command of the program, as main is: its error is printed, nobody acts on it",
    ),
];

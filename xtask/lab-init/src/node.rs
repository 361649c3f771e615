//! Makes a node of the bare kernel: root file system, mounts, cgroups, kernel modules, network.
//!
//! The initramfs holds `/modules` (kernel modules to load first, one path a line in
//! `/modules/order`) and `/token`. Everything after that comes from the node image, `/dev/vda`.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Resource, Rlimit};

/// The environment of everything that runs in the lab.
pub(crate) const ENVIRONMENT: [(&str, &str); 4] = [
    (
        "PATH",
        "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ),
    ("HOME", "/root"),
    ("LANG", "C.UTF-8"),
    ("WALNUT_REQUIRE_KVM", "1"),
];

/// Modules that a node of Kubernetes or Docker has loaded, and those that the tests need. One that
/// this kernel doesn't have is left out: what needs it then says so.
const MODULES: [&str; 14] = [
    "virtio_net",
    "virtio-rng",
    "kvm-amd",
    "kvm-intel",
    "tun",
    "veth",
    "bridge",
    "br_netfilter",
    "loop",
    "vhost_net",
    "vhost_vsock",
    "erofs",
    "act_mirred",
    "cls_u32",
];

/// `finit_module` flag MODULE_INIT_COMPRESSED_FILE (Linux's include/uapi/linux/module.h).
const COMPRESSED_MODULE: i32 = 4;

#[derive(Debug, thiserror::Error)]
pub(crate) enum NodeError {
    #[error("{action} {target}: {source}")]
    Io {
        action: &'static str,
        target: String,
        source: io::Error,
    },
}

/// Sets up the node and returns the command server's token.
pub(crate) fn set_up() -> Result<String, NodeError> {
    mount("devtmpfs", "/dev", "devtmpfs", MountFlags::empty(), "")?;
    mount("proc", "/proc", "proc", MountFlags::empty(), "")?;
    mount("sysfs", "/sys", "sysfs", MountFlags::empty(), "")?;
    load_early_modules()?;
    let token = read("/token")?.trim().to_owned();
    enter_node_image()?;
    mount_rest()?;
    set_up_cgroups()?;
    load_modules();
    set_up_limits()?;
    set_up_network()?;
    set_up_containerd()?;
    Ok(token)
}

fn load_early_modules() -> Result<(), NodeError> {
    for name in read("/modules/order")?.lines() {
        let path = format!("/modules/{name}");
        let file = fs::File::open(&path).map_err(|source| failed("open", &path, source))?;
        let flags = if name.ends_with(".xz") {
            COMPRESSED_MODULE
        } else {
            0
        };
        rustix::system::finit_module(file.as_fd(), c"", flags)
            .map_err(|error| failed("load", &path, error.into()))?;
    }
    Ok(())
}

/// Replaces the initramfs by the node image under an overlay in RAM.
fn enter_node_image() -> Result<(), NodeError> {
    for directory in ["/image", "/ram", "/node"] {
        create_directory(directory)?;
    }
    mount("/dev/vda", "/image", "ext4", MountFlags::RDONLY, "")?;
    mount(
        "tmpfs",
        "/ram",
        "tmpfs",
        MountFlags::empty(),
        "size=75%,mode=755",
    )?;
    create_directory("/ram/upper")?;
    create_directory("/ram/work")?;
    let layers = "lowerdir=/image,upperdir=/ram/upper,workdir=/ram/work";
    mount("overlay", "/node", "overlay", MountFlags::empty(), layers)?;
    for name in ["dev", "proc", "sys"] {
        let (from, to) = (format!("/{name}"), format!("/node/{name}"));
        rustix::mount::mount_move(&from, &to)
            .map_err(|error| failed("move mount", &from, error.into()))?;
    }
    // An initramfs can't be left by pivot_root(2): its mount has no parent.
    rustix::process::chdir("/node").map_err(|error| failed("enter", "/node", error.into()))?;
    rustix::mount::mount_move(".", "/")
        .map_err(|error| failed("move mount", "/node", error.into()))?;
    rustix::process::chroot(".").map_err(|error| failed("chroot to", "/node", error.into()))?;
    rustix::process::chdir("/").map_err(|error| failed("enter", "/", error.into()))
}

fn mount_rest() -> Result<(), NodeError> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    for directory in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        create_directory(directory)?;
    }
    mount(
        "devpts",
        "/dev/pts",
        "devpts",
        MountFlags::empty(),
        "ptmxmode=0666,mode=0620,gid=5",
    )?;
    mount("tmpfs", "/dev/shm", "tmpfs", safe, "mode=1777")?;
    mount("mqueue", "/dev/mqueue", "mqueue", safe, "")?;
    mount("tmpfs", "/run", "tmpfs", safe, "mode=755")?;
    mount("tmpfs", "/tmp", "tmpfs", safe, "mode=1777")?;
    mount(
        "cgroup2",
        "/sys/fs/cgroup",
        "cgroup2",
        MountFlags::empty(),
        "nsdelegate",
    )?;
    mount(
        "debugfs",
        "/sys/kernel/debug",
        "debugfs",
        MountFlags::empty(),
        "",
    )?;
    mount(
        "tracefs",
        "/sys/kernel/tracing",
        "tracefs",
        MountFlags::empty(),
        "",
    )?;
    mount(
        "securityfs",
        "/sys/kernel/security",
        "securityfs",
        MountFlags::empty(),
        "",
    )?;
    // Overlay on overlay fails: containerd's snapshots need a file system of their own.
    create_directory("/var/lib/containerd")?;
    mount(
        "tmpfs",
        "/var/lib/containerd",
        "tmpfs",
        MountFlags::empty(),
        "size=75%,mode=711",
    )?;
    // A node's root is shared, as systemd makes it; the kernel's default is private.
    let shared = MountPropagationFlags::SHARED | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", shared)
        .map_err(|error| failed("share mounts below", "/", error.into()))
}

/// Processes may live only in leaves of the hierarchy once controllers are enabled.
fn set_up_cgroups() -> Result<(), NodeError> {
    create_directory("/sys/fs/cgroup/init")?;
    write("/sys/fs/cgroup/init/cgroup.procs", "1")?;
    let controllers = read("/sys/fs/cgroup/cgroup.controllers")?;
    for controller in controllers.split_whitespace() {
        write(
            "/sys/fs/cgroup/cgroup.subtree_control",
            &format!("+{controller}"),
        )?;
    }
    Ok(())
}

fn load_modules() {
    let mut modprobe = Command::new("/usr/sbin/modprobe");
    modprobe
        .envs(ENVIRONMENT)
        .args(["--all", "--quiet"])
        .args(MODULES);
    // The module of the other maker's processor always fails.
    let _ = modprobe.status();
}

fn set_up_limits() -> Result<(), NodeError> {
    let files = Some(1 << 20);
    rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit {
            current: files,
            maximum: files,
        },
    )
    .map_err(|error| failed("raise the limit of", "open files", error.into()))?;
    for (resource, name) in [
        (Resource::Nproc, "processes"),
        (Resource::Memlock, "locked memory"),
    ] {
        rustix::process::setrlimit(
            resource,
            Rlimit {
                current: None,
                maximum: None,
            },
        )
        .map_err(|error| failed("raise the limit of", name, error.into()))?;
    }
    write("/proc/sys/net/ipv4/ip_forward", "1")?;
    write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?;
    write("/proc/sys/kernel/printk", "4")
}

/// The addresses of QEMU's user-mode network.
fn set_up_network() -> Result<(), NodeError> {
    rustix::system::sethostname(b"lab").map_err(|error| failed("set", "hostname", error.into()))?;
    write("/etc/hosts", "127.0.0.1 localhost lab\n::1 localhost\n")?;
    let script = "set -e; ip link set lo up; \
        nic=$(basename $(dirname $(ls -d /sys/class/net/*/device | head -n 1))); \
        ip address add 10.0.2.15/24 dev $nic; ip link set $nic up; \
        ip route add default via 10.0.2.2";
    let status = Command::new("/bin/sh")
        .envs(ENVIRONMENT)
        .args(["-c", script])
        .status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(failed(
            "set up",
            "network",
            io::Error::other(status.to_string()),
        )),
        Err(source) => Err(failed("set up", "network", source)),
    }
}

/// containerd's configuration, and that of the Pods' network.
fn set_up_containerd() -> Result<(), NodeError> {
    create_directory("/etc/containerd")?;
    create_directory("/etc/cni/net.d")?;
    let files = [
        (
            "/etc/containerd/config.toml",
            include_str!("../node/containerd.toml"),
        ),
        (
            "/etc/cni/net.d/10-pods.conflist",
            include_str!("../node/pods.conflist"),
        ),
    ];
    files.iter().try_for_each(|(path, text)| write(path, text))
}

fn mount(
    source: &str,
    target: &str,
    kind: &str,
    flags: MountFlags,
    data: &str,
) -> Result<(), NodeError> {
    let data = std::ffi::CString::new(data)
        .map_err(|error| failed("mount", target, io::Error::other(error)))?;
    rustix::mount::mount(source, target, kind, flags, data.as_c_str())
        .map_err(|error| failed("mount", target, error.into()))
}

fn create_directory(path: &str) -> Result<(), NodeError> {
    fs::create_dir_all(path).map_err(|source| failed("create", path, source))
}

fn read(path: &str) -> Result<String, NodeError> {
    fs::read_to_string(path).map_err(|source| failed("read", path, source))
}

fn write(path: impl AsRef<Path>, text: &str) -> Result<(), NodeError> {
    fs::write(&path, text)
        .map_err(|source| failed("write", &path.as_ref().display().to_string(), source))
}

fn failed(action: &'static str, target: &str, source: io::Error) -> NodeError {
    NodeError::Io {
        action,
        target: target.to_owned(),
        source,
    }
}

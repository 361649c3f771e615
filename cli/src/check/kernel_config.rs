//! The guest kernel's own hardening, by the configuration that is built into it (`CONFIG_IKCONFIG`). Must not take
//! anybody's word for it but the kernel's file.

use super::{Finding, Root, Subject};
use miniz_oxide::inflate::decompress_to_vec_with_limit;
use std::{
    collections::BTreeSet,
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

/// Linux, `kernel/configs.c`: what stands around the compressed configuration.
const BEGIN: &[u8] = b"IKCFG_ST";
const END: &[u8] = b"IKCFG_ED";
const MAX_KERNEL_BYTES: u64 = 256 << 20;
const MAX_CONFIG_BYTES: usize = 4 << 20;
/// RFC 1952: gzip, by deflate, with none of the optional fields.
const GZIP: &[u8] = &[0x1f, 0x8b, 8, 0];
const GZIP_HEADER_BYTES: usize = 10;

/// Options that make an attack on the guest's kernel harder, by the name behind `CONFIG_`.
const WANTED: &str = "\
    BPF_JIT_ALWAYS_ON BPF_UNPRIV_DEFAULT_OFF BUG_ON_DATA_CORRUPTION CPU_MITIGATIONS FORTIFY_SOURCE \
    HARDENED_USERCOPY INIT_ON_ALLOC_DEFAULT_ON LEGACY_VSYSCALL_NONE LIST_HARDENED \
    MITIGATION_PAGE_TABLE_ISOLATION MITIGATION_RETPOLINE MITIGATION_SPECTRE_V1 MITIGATION_SPECTRE_V2 \
    MITIGATION_SSB RANDOMIZE_KSTACK_OFFSET_DEFAULT SECCOMP_FILTER SECURITY_APPARMOR \
    SECURITY_DMESG_RESTRICT SLAB_FREELIST_HARDENED SLAB_FREELIST_RANDOM STACKPROTECTOR_STRONG \
    STRICT_KERNEL_RWX VMAP_STACK";
/// Options that open a way into it.
const UNWANTED: &str = "\
    DEBUG_FS DEVMEM HIBERNATION KEXEC KEXEC_FILE MAGIC_SYSRQ MODULES PROC_KCORE";

const SUBJECT: Subject = Subject {
    id: "guest-kernel",
    why: "containers of one Pod are kept apart by the guest's kernel alone",
};

#[derive(Debug, thiserror::Error)]
enum ConfigError {
    #[error("{} cannot be read", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} has no configuration built in", .0.display())]
    Absent(PathBuf),
}

pub(super) fn look(root: &Root, kernel: &Path) -> Finding {
    let config = match read(&root.at(kernel), kernel) {
        Ok(config) => config,
        Err(error) => {
            let remedy = "use Walnut's own kernel, or one with CONFIG_IKCONFIG";
            return SUBJECT.warn(crate::with_causes(&error), remedy);
        }
    };
    let on: BTreeSet<&str> = config
        .lines()
        .filter_map(|line| line.strip_prefix("CONFIG_")?.strip_suffix("=y"))
        .collect();
    let (wanted, unwanted) = (WANTED.split(' '), UNWANTED.split(' '));
    let missing = wanted.filter(|name| !on.contains(name));
    let open = unwanted.filter(|name| on.contains(name));
    let (missing, open): (Vec<_>, Vec<_>) = (missing.collect(), open.collect());
    let words = |what: &str, names: &[&str]| match names {
        [] => String::new(),
        names => format!(" {what} {}", names.join(", ")),
    };
    if missing.is_empty() && open.is_empty() {
        return SUBJECT.pass(format!(
            "{} is built with what makes it harder to attack",
            kernel.display()
        ));
    }
    SUBJECT.warn(
        format!(
            "{} is built{}{}",
            kernel.display(),
            words("without", &missing),
            words("with", &open)
        ),
        "use Walnut's own kernel, or set these options of yours",
    )
}

fn read(path: &Path, name: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read {
        path: name.to_owned(),
        source,
    };
    let absent = || ConfigError::Absent(name.to_owned());
    let file = fs::File::open(path).map_err(failed)?;
    let mut kernel = Vec::new();
    let mut whole = file.take(MAX_KERNEL_BYTES);
    whole.read_to_end(&mut kernel).map_err(failed)?;
    // The mark may also be an instruction's operand: the right one is followed by gzip's.
    let mark = [BEGIN, GZIP].concat();
    let begin = find(&kernel, &mark).ok_or_else(absent)? + BEGIN.len() + GZIP_HEADER_BYTES;
    let rest = kernel.get(begin..).unwrap_or_default();
    let end = find(rest, END).ok_or_else(absent)?;
    let compressed = rest.get(..end).unwrap_or_default();
    let config = decompress_to_vec_with_limit(compressed, MAX_CONFIG_BYTES);
    Ok(String::from_utf8_lossy(&config.map_err(|_| absent())?).into_owned())
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes
        .windows(wanted.len())
        .position(|window| window == wanted)
}

#[cfg(test)]
mod tests {
    use super::super::{Grade, tests::machine};
    use super::*;
    use miniz_oxide::deflate::compress_to_vec;

    fn kernel(config: &str) -> (tempfile::TempDir, Root) {
        let (folder, root) = machine(&[]);
        let header = [GZIP, &[0; GZIP_HEADER_BYTES - 4]].concat();
        let config = [header, compress_to_vec(config.as_bytes(), 1)].concat();
        let parts = [b"ELF IKCFG_ST code ", BEGIN, &config, END, b"more"];
        fs::write(root.at("/vmlinux"), parts.concat()).unwrap();
        (folder, root)
    }

    fn config(without: &str, with: &str) -> String {
        let names = WANTED.split(' ').filter(|name| *name != without);
        let lines = names.map(|name| format!("CONFIG_{name}=y\n"));
        format!(
            "{}# CONFIG_KEXEC is not set\n{with}",
            lines.collect::<String>()
        )
    }

    #[test]
    fn a_kernel_tells_how_it_was_built() {
        let path = Path::new("/vmlinux");
        let (_folder, root) = kernel(&config("", ""));
        assert_eq!(look(&root, path).result, Grade::Pass);
        let (_folder, root) = kernel(&config("VMAP_STACK", "CONFIG_MODULES=y\n"));
        let finding = look(&root, path);
        assert_eq!(finding.result, Grade::Warn);
        assert_eq!(
            finding.what,
            "/vmlinux is built without VMAP_STACK with MODULES"
        );
    }

    #[test]
    fn a_kernel_that_does_not_tell_is_doubtful() {
        let (_folder, root) = machine(&[("vmlinux", "ELF IKCFG_ST IKCFG_ED")]);
        let finding = look(&root, Path::new("/vmlinux"));
        assert_eq!(finding.what, "/vmlinux has no configuration built in");
        assert_eq!(finding.result, Grade::Warn);
    }
}

//! What the options of one mount mean: pure text to plan.
//!
//! OCI runtime specification, `config-linux.md` and `config.md`, "Mounts". Options that are neither
//! attributes of a mount nor propagation are the file system's own and pass to it as they are.

use rustix::mount::MountAttrFlags;

/// Attributes to set and to clear, in the terms of mount_setattr(2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) set: u64,
    pub(super) clear: u64,
}

impl Attributes {
    fn apply(&mut self, (set, clear): (u64, u64)) {
        self.set = (self.set & !clear) | set;
        self.clear = (self.clear & !set) | clear;
    }

    pub(super) fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// Whether a mount is a file system of its own or shows another place of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bind {
    No,
    One,
    Tree,
}

/// The options of one mount, understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MountOptions {
    pub(super) bind: Bind,
    /// For the mount itself.
    pub(super) attributes: Attributes,
    /// For the mount and all below it.
    pub(super) tree_attributes: Attributes,
    /// Propagation type (`MS_*`) and whether it is meant for the whole tree, in the order given.
    pub(super) propagation: Vec<(u64, bool)>,
    /// The file system's own options.
    pub(super) data: Vec<(String, Option<String>)>,
}

/// An option that is known and not applied.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct UnsupportedOption(pub(super) String);

/// Understands the options of one mount.
pub(super) fn parse(kind: &str, options: &[String]) -> Result<MountOptions, UnsupportedOption> {
    let mut parsed = MountOptions {
        bind: if kind == "bind" { Bind::One } else { Bind::No },
        attributes: Attributes::default(),
        tree_attributes: Attributes::default(),
        propagation: Vec::new(),
        data: Vec::new(),
    };
    for option in options {
        let name = option.as_str();
        if let Some(change) = attribute(name) {
            parsed.attributes.apply(change);
        } else if let Some(change) = name.strip_prefix('r').and_then(attribute) {
            parsed.tree_attributes.apply(change);
        } else if let Some(propagation) = propagation(name) {
            parsed.propagation.push(propagation);
        } else {
            match name {
                "defaults" | "" => {}
                "bind" => parsed.bind = Bind::One,
                "rbind" => parsed.bind = Bind::Tree,
                // Of the mount table's text, or of kernels long gone: no effect to enforce.
                "async" | "nomand" | "silent" | "loud" | "norelatime" | "nostrictatime" => {}
                "tmpcopyup" | "idmap" | "ridmap" | "remount" | "mand" => {
                    return Err(UnsupportedOption(option.clone()));
                }
                _ if parsed.bind != Bind::No => return Err(UnsupportedOption(option.clone())),
                _ => parsed.data.push(match option.split_once('=') {
                    Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
                    None => (option.clone(), None),
                }),
            }
        }
    }
    if parsed.bind != Bind::No && !parsed.data.is_empty() {
        let (key, _) = parsed.data.swap_remove(0);
        return Err(UnsupportedOption(key));
    }
    Ok(parsed)
}

/// What an option sets and clears.
fn attribute(name: &str) -> Option<(u64, u64)> {
    let bits = |flags: MountAttrFlags| u64::from(flags.bits());
    let access_time = bits(MountAttrFlags::MOUNT_ATTR__ATIME);
    Some(match name {
        "ro" => (bits(MountAttrFlags::MOUNT_ATTR_RDONLY), 0),
        "rw" => (0, bits(MountAttrFlags::MOUNT_ATTR_RDONLY)),
        "nosuid" => (bits(MountAttrFlags::MOUNT_ATTR_NOSUID), 0),
        "suid" => (0, bits(MountAttrFlags::MOUNT_ATTR_NOSUID)),
        "nodev" => (bits(MountAttrFlags::MOUNT_ATTR_NODEV), 0),
        "dev" => (0, bits(MountAttrFlags::MOUNT_ATTR_NODEV)),
        "noexec" => (bits(MountAttrFlags::MOUNT_ATTR_NOEXEC), 0),
        "exec" => (0, bits(MountAttrFlags::MOUNT_ATTR_NOEXEC)),
        "nodiratime" => (bits(MountAttrFlags::MOUNT_ATTR_NODIRATIME), 0),
        "diratime" => (0, bits(MountAttrFlags::MOUNT_ATTR_NODIRATIME)),
        "nosymfollow" => (bits(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW), 0),
        "symfollow" => (0, bits(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW)),
        "noatime" => (bits(MountAttrFlags::MOUNT_ATTR_NOATIME), access_time),
        "strictatime" => (bits(MountAttrFlags::MOUNT_ATTR_STRICTATIME), access_time),
        // Relative access times are the kernel's own choice, with the value 0.
        "relatime" | "atime" => (0, access_time),
        _ => return None,
    })
}

/// What a propagation option means.
fn propagation(name: &str) -> Option<(u64, bool)> {
    Some(match name {
        "private" => (libc::MS_PRIVATE, false),
        "rprivate" => (libc::MS_PRIVATE, true),
        "shared" => (libc::MS_SHARED, false),
        "rshared" => (libc::MS_SHARED, true),
        "slave" => (libc::MS_SLAVE, false),
        "rslave" => (libc::MS_SLAVE, true),
        "unbindable" => (libc::MS_UNBINDABLE, false),
        "runbindable" => (libc::MS_UNBINDABLE, true),
        _ => return None,
    })
}

/// What `linux.rootfsPropagation` means; empty is private.
pub(super) fn root_propagation(name: &str) -> Option<(u64, bool)> {
    propagation(if name.is_empty() { "rprivate" } else { name })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn options(kind: &str, text: &str) -> Result<MountOptions, UnsupportedOption> {
        let list: Vec<_> = text.split(',').map(str::to_owned).collect();
        parse(kind, &list)
    }

    #[test]
    fn what_the_shim_tells_containerd_is_understood() {
        for option in walnut_agent_api::features::MOUNT_OPTIONS {
            let parsed = options("bind", option);
            assert!(
                parsed.is_ok_and(|parsed| parsed.data.is_empty()),
                "{option}"
            );
        }
    }

    #[test]
    fn the_last_of_two_opposites_wins() {
        let parsed = options("tmpfs", "ro,nosuid,rw,suid,nosuid").unwrap();
        assert_eq!(parsed.attributes, Attributes { set: 2, clear: 1 });
    }

    #[test]
    fn an_access_time_policy_replaces_the_one_before() {
        let mask = u64::from(MountAttrFlags::MOUNT_ATTR__ATIME.bits());
        let strict = u64::from(MountAttrFlags::MOUNT_ATTR_STRICTATIME.bits());
        let parsed = options("tmpfs", "noatime,strictatime").unwrap().attributes;
        assert_eq!(parsed.set, strict);
        // mount_setattr(2) takes the mask whole or not at all.
        assert_eq!(parsed.clear & mask, mask);
    }

    #[test]
    fn attributes_with_r_are_meant_for_the_tree() {
        let parsed = options("bind", "rbind,rro,rprivate").unwrap();
        assert_eq!(parsed.bind, Bind::Tree);
        assert_eq!(parsed.tree_attributes.set, 1);
        assert!(parsed.attributes.is_empty());
        assert_eq!(parsed.propagation, [(libc::MS_PRIVATE, true)]);
    }

    #[test]
    fn the_file_system_gets_its_own_options() {
        let parsed = options("tmpfs", "nosuid,mode=1777,size=65536k,noswap").unwrap();
        let own = |key: &str, value: Option<&str>| (key.to_owned(), value.map(str::to_owned));
        assert_eq!(
            parsed.data,
            [
                own("mode", Some("1777")),
                own("size", Some("65536k")),
                own("noswap", None)
            ]
        );
    }

    #[test]
    fn what_would_not_be_applied_is_refused() {
        for (kind, text, named) in [
            ("tmpfs", "tmpcopyup", "tmpcopyup"),
            ("bind", "rbind,idmap", "idmap"),
            ("bind", "rbind,size=5", "size=5"),
            ("none", "size=5,bind", "size"),
        ] {
            assert_eq!(
                options(kind, text),
                Err(UnsupportedOption(named.to_owned()))
            );
        }
    }

    proptest! {
        #[test]
        fn no_bit_is_both_set_and_cleared_but_access_times(text in "(ro|rw|nosuid|suid|nodev|dev|noexec|exec|noatime|relatime|strictatime)(,(ro|rw|suid|nosuid|noatime|strictatime|relatime)){0,5}") {
            let attributes = options("tmpfs", &text).unwrap().attributes;
            let access_time = u64::from(MountAttrFlags::MOUNT_ATTR__ATIME.bits());
            prop_assert_eq!(attributes.set & attributes.clear & !access_time, 0);
        }
    }
}

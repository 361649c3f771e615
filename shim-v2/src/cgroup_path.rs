//! Where a cgroup lies, by `linux.cgroupsPath`: a plain path, or systemd's form. Pure.

use std::path::{Component, Path, PathBuf};

/// The path below the hierarchy's root. systemd's form is `slice:prefix:name`, where the slice `a-b.slice`
/// is in `a.slice` (systemd.slice(5)).
pub(crate) fn relative(path: &Path) -> Option<PathBuf> {
    let text = path.to_str()?;
    let parts: Vec<&str> = text.split(':').collect();
    let relative = match parts.as_slice() {
        [slice, prefix, name] if !text.contains('/') => {
            let slice = if slice.is_empty() {
                "system.slice"
            } else {
                slice
            };
            let unit = match (name.ends_with(".slice"), prefix.is_empty()) {
                (true, _) => (*name).to_owned(),
                (false, true) => format!("{name}.scope"),
                (false, false) => format!("{prefix}-{name}.scope"),
            };
            expand_slice(slice)?.join(unit)
        }
        _ => path
            .components()
            .filter(|part| !matches!(part, Component::RootDir | Component::CurDir))
            .collect(),
    };
    let plain = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    (plain && !relative.as_os_str().is_empty() && !text.contains('\n')).then_some(relative)
}

fn expand_slice(slice: &str) -> Option<PathBuf> {
    let stem = slice.strip_suffix(".slice")?;
    let mut path = PathBuf::new();
    if stem == "-" {
        return Some(path);
    }
    let mut name = String::new();
    for part in stem.split('-') {
        if part.is_empty() {
            return None;
        }
        name.push_str(part);
        path.push(format!("{name}.slice"));
        name.push('-');
    }
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path_of(text: &str) -> Option<String> {
        relative(Path::new(text)).map(|path| path.to_string_lossy().into_owned())
    }

    #[test]
    fn plain_paths_and_systemd_names_are_understood() {
        for (text, expected) in [
            ("/default/c1", "default/c1"),
            ("kubepods/pod1/c1", "kubepods/pod1/c1"),
            (
                "kubepods-besteffort-pod1.slice:cri-containerd:c1",
                "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-c1.scope",
            ),
            ("-.slice::c1", "c1.scope"),
            (":docker:c1", "system.slice/docker-c1.scope"),
            ("user.slice:a:b.slice", "user.slice/b.slice"),
        ] {
            assert_eq!(path_of(text).as_deref(), Some(expected), "{text}");
        }
    }

    #[test]
    fn paths_that_leave_the_hierarchy_are_refused() {
        for text in ["/", "..", "/a/../../b", "a--b.slice:x:y", "noslice:x:y"] {
            assert_eq!(path_of(text), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_path_stays_below_the_root(text in "[-a-z.:/]{0,40}") {
            if let Some(path) = relative(Path::new(&text)) {
                prop_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
            }
        }
    }
}

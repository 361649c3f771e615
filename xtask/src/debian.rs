//! Debian's packages as a source of root file systems, from the mirror that this machine uses.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::progress::Progress;

/// One source of packages, as apt has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    /// The mirror.
    pub(crate) uri: String,
    /// The releases.
    pub(crate) suites: Vec<String>,
    /// The keyring, if the source names one.
    pub(crate) signed_by: Option<String>,
}

/// The code name of the machine's release.
pub(crate) fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("read /etc/os-release")?;
    let name = text
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    name.map(str::to_owned)
        .context("/etc/os-release names no VERSION_CODENAME; is this Debian?")
}

/// The source in use for the machine's own release.
pub(crate) fn own_source() -> Result<Source> {
    let codename = codename()?;
    let mut files = vec![Path::new("/etc/apt/sources.list").to_owned()];
    if let Ok(folder) = fs::read_dir("/etc/apt/sources.list.d") {
        let mut more: Vec<_> = folder.flatten().map(|entry| entry.path()).collect();
        more.sort();
        files.extend(more);
    }
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        let sources = match file.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => parse_deb822(&text),
            Some("list") => parse_one_line(&text),
            _ => continue,
        };
        if let Some(source) = sources
            .into_iter()
            .find(|source| source.suites.contains(&codename))
        {
            return Ok(source);
        }
    }
    bail!("no apt source for Debian {codename} in /etc/apt/sources.list or sources.list.d")
}

/// The format of `*.sources` in sources.list(5).
fn parse_deb822(text: &str) -> Vec<Source> {
    let stanzas = text.split("\n\n").map(|stanza| {
        let field = |name: &str| {
            let lines = stanza.lines().filter(|line| !line.starts_with('#'));
            lines
                .filter_map(|line| line.split_once(':'))
                .find_map(|(key, value)| {
                    key.eq_ignore_ascii_case(name)
                        .then(|| value.trim().to_owned())
                })
        };
        let words = |name| -> Vec<String> {
            field(name)
                .unwrap_or_default()
                .split_whitespace()
                .map(str::to_owned)
                .collect()
        };
        let usable = words("Types").contains(&"deb".to_owned())
            && words("Components").contains(&"main".to_owned())
            && field("Enabled").is_none_or(|value| value != "no");
        let uri = words("URIs").into_iter().next().filter(|_| usable)?;
        // A key may also be written into the file itself; only a path can be passed on.
        let signed_by = field("Signed-By").filter(|value| value.starts_with('/'));
        Some(Source {
            uri,
            suites: words("Suites"),
            signed_by,
        })
    });
    stanzas.flatten().collect()
}

/// The format of `*.list` in sources.list(5).
fn parse_one_line(text: &str) -> Vec<Source> {
    let lines = text.lines().filter_map(|line| {
        let line = line.trim().strip_prefix("deb ")?.trim();
        let (options, rest) = match line.strip_prefix('[') {
            Some(line) => line.split_once(']')?,
            None => ("", line),
        };
        let mut words = rest.split_whitespace();
        let (uri, suite) = (words.next()?, words.next()?);
        let signed_by = options
            .split_whitespace()
            .find_map(|word| word.strip_prefix("signed-by="));
        words.any(|word| word == "main").then(|| Source {
            uri: uri.to_owned(),
            suites: vec![suite.to_owned()],
            signed_by: signed_by.map(str::to_owned),
        })
    });
    lines.collect()
}

/// What a root file system is made as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// A folder.
    Folder,
    /// A tar archive.
    Tar,
}

/// A root file system to make.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RootFileSystem<'a> {
    /// The release.
    pub(crate) suite: &'a str,
    /// Packages beyond the smallest set that can install packages.
    pub(crate) packages: &'a [&'a str],
}

impl RootFileSystem<'_> {
    /// Makes it as `output`, a folder or a tar archive. Documentation and translations stay out.
    pub(crate) fn make(
        &self,
        output: &Path,
        format: Format,
        step: &str,
        log: &Path,
        progress: Progress,
    ) -> Result<()> {
        let source = own_source()?;
        let mut command = Command::new("mmdebstrap");
        // The kernel package needs no initramfs: the lab has its own.
        command
            .env("INITRD", "No")
            .args(["--variant=minbase", "--mode=root"]);
        // The same packages give the same bytes.
        command.env("SOURCE_DATE_EPOCH", "0");
        command.args([
            match format {
                Format::Folder => "--format=directory",
                Format::Tar => "--format=tar",
            },
            "--aptopt=Acquire::Languages \"none\"",
            // A development release's index is often past its date on a mirror's snapshot.
            "--aptopt=Acquire::Check-Valid-Until \"false\"",
            "--dpkgopt=path-exclude=/usr/share/man/*",
            "--dpkgopt=path-exclude=/usr/share/doc/*",
            "--dpkgopt=path-exclude=/usr/share/info/*",
            "--dpkgopt=path-exclude=/usr/share/locale/*",
        ]);
        command.arg(format!("--include={}", self.packages.join(",")));
        command.arg(self.suite).arg(output);
        command.arg(format!("deb {} {} main", source.uri, self.suite));
        progress.run(step, &mut command, log)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deb822_sources_are_read() {
        let text = "Types: deb\n# a comment\nURIs: http://mirror/debian\nSuites: a a-updates\n\
            Components: main contrib\nSigned-By: /usr/share/keyrings/k.gpg\n\n\
            Types: deb-src\nURIs: http://other\nSuites: a\nComponents: main\n";
        assert_eq!(
            parse_deb822(text),
            [Source {
                uri: "http://mirror/debian".to_owned(),
                suites: vec!["a".to_owned(), "a-updates".to_owned()],
                signed_by: Some("/usr/share/keyrings/k.gpg".to_owned()),
            }]
        );
    }

    #[test]
    fn one_line_sources_are_read() {
        let text = "# deb http://no a main\ndeb [arch=amd64 signed-by=/k.gpg] http://m/d a main\n\
            deb http://other b contrib\ndeb http://m/d c main contrib\n";
        let sources = parse_one_line(text);
        assert_eq!(sources.len(), 2);
        assert_eq!(sources[0].signed_by.as_deref(), Some("/k.gpg"));
        assert_eq!(sources[1].suites, ["c"]);
    }
}

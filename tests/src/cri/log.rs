//! The CRI's log files: `<time> <stream> <tag> <text>`, a line each; a long line comes in parts.

use anyhow::{Context, Result, bail, ensure};
use std::{collections::BTreeMap, fs, path::Path};

/// Whether a line of the log ends a line of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// The end of a line, or all of it.
    Full,
    /// A part; more follows.
    Partial,
}

/// A line of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether it ends here.
    pub tag: Tag,
    /// What was written.
    pub text: String,
}

/// Reads a log; times must not go backwards within a stream.
pub(super) fn read(path: &Path) -> Result<Vec<LogLine>> {
    let text = fs::read_to_string(path).with_context(|| format!("no log {}", path.display()))?;
    parse(&text)
}

fn parse(text: &str) -> Result<Vec<LogLine>> {
    let mut latest: BTreeMap<String, String> = BTreeMap::new();
    let mut lines = Vec::new();
    for line in text.lines() {
        let mut fields = line.splitn(4, ' ');
        let mut field = || {
            fields
                .next()
                .with_context(|| format!("not a log: {line:?}"))
        };
        let (time, stream, tag, text) = (field()?, field()?, field()?, field()?);
        let looks_right = time.get(10..11) == Some("T")
            && (time.ends_with('Z') || time.contains('+'))
            && time.starts_with(|digit: char| digit.is_ascii_digit());
        ensure!(looks_right, "not a time: {line:?}");
        // Fractions have nine digits or fewer: cut to seconds, texts compare as times do.
        let second = time.get(..19).unwrap_or(time).to_owned();
        let before = latest.insert(stream.to_owned(), second.clone());
        ensure!(
            before.is_none_or(|before| before <= second),
            "back in time: {line:?}"
        );
        let tag = match tag {
            "F" => Tag::Full,
            "P" => Tag::Partial,
            _ => bail!("not a tag: {line:?}"),
        };
        let (stream, text) = (stream.to_owned(), text.to_owned());
        lines.push(LogLine { stream, tag, text });
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_and_others_refused() {
        let good = "2026-01-02T03:04:05.1Z stdout P a b\n2026-01-02T03:04:05.2Z stdout F \n";
        let lines = parse(good).unwrap();
        assert_eq!(
            (lines[0].tag, lines[0].text.as_str()),
            (Tag::Partial, "a b")
        );
        assert_eq!((lines[1].tag, lines[1].text.as_str()), (Tag::Full, ""));
        for bad in ["x", "2026-01-02T03:04:05Z stdout X a", "now stdout F a"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}

//! The project's files, and Rust code seen without its comments and strings.
//!
//! Not a parser: a scanner that knows where comments, strings and characters begin and end (The Rust
//! Reference, "Tokens"), so that the rules look at code alone or at comments alone.

use anyhow::{Context, Result};
use std::{fs, path::Path};

/// Names of what holds nothing of ours (in a worktree, `.git` is a file).
const SKIPPED: [&str; 2] = ["target", ".git"];

/// A file of the project.
#[derive(Debug, Clone)]
pub(crate) struct File {
    /// Its path from the project's root, with slashes.
    pub(crate) path: String,
    /// What it holds.
    pub(crate) text: String,
}

/// Reads every text file below `root`.
pub(crate) fn read_tree(root: &Path) -> Result<Vec<File>> {
    let mut files = Vec::new();
    visit(root, root, &mut files)?;
    files.sort_by(|one, other| one.path.cmp(&other.path));
    Ok(files)
}

fn visit(root: &Path, directory: &Path, files: &mut Vec<File>) -> Result<()> {
    let listed = || format!("cannot list {}", directory.display());
    for entry in fs::read_dir(directory).with_context(listed)? {
        let entry = entry.with_context(listed)?;
        let path = entry.path();
        let kind = entry.file_type().with_context(listed)?;
        if SKIPPED.iter().any(|&name| entry.file_name() == name) {
            continue;
        }
        if kind.is_dir() {
            visit(root, &path, files)?;
        } else if kind.is_file()
            && let Ok(text) = fs::read_to_string(&path)
        {
            let relative = path.strip_prefix(root).unwrap_or(&path);
            files.push(File {
                path: relative.to_string_lossy().into_owned(),
                text,
            });
        }
    }
    Ok(())
}

impl File {
    pub(crate) fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether all of it is test code.
    pub(crate) fn is_test(&self) -> bool {
        let in_tests = self.path.split('/').rev().skip(1).any(|dir| dir == "tests");
        self.is_unit_tests() || in_tests && !self.path.starts_with("tests/src/")
    }

    /// Whether it is a module's unit tests, which stand in a file of their own.
    fn is_unit_tests(&self) -> bool {
        self.path.ends_with("/tests.rs")
    }

    /// Number of lines before the module of unit tests.
    pub(crate) fn lines_before_tests(&self) -> usize {
        if self.is_unit_tests() {
            return 0;
        }
        let lines: Vec<&str> = self.text.lines().collect();
        let is_tests = |index: usize| {
            lines[index].starts_with("#[cfg(test)]")
                && lines[index + 1..]
                    .iter()
                    .find(|line| !line.starts_with("#["))
                    .is_some_and(|line| line.starts_with("mod ") && line.ends_with('{'))
        };
        (0..lines.len())
            .find(|&index| is_tests(index))
            .unwrap_or(lines.len())
    }

    /// The lines with comments and the contents of strings blanked out.
    pub(crate) fn code(&self) -> Vec<String> {
        self.split().0
    }

    /// The lines with all but comments blanked out.
    pub(crate) fn comments(&self) -> Vec<String> {
        self.split().1
    }

    /// The code that is part of the product: what stands before the unit tests.
    pub(crate) fn product_code(&self) -> Vec<String> {
        let mut code = self.code();
        code.truncate(self.lines_before_tests());
        code
    }

    fn split(&self) -> (Vec<String>, Vec<String>) {
        let text: Vec<char> = self.text.chars().collect();
        let (mut code, mut comments) = (String::new(), String::new());
        let mut at = 0;
        while at < text.len() {
            let (end, kind) = token(&text, at);
            for &character in &text[at..end] {
                let (in_code, in_comments) = match kind {
                    _ if character == '\n' => ('\n', '\n'),
                    Kind::Code => (character, ' '),
                    Kind::Comment => (' ', character),
                    Kind::Literal => (' ', ' '),
                };
                code.push(in_code);
                comments.push(in_comments);
            }
            at = end;
        }
        let lines = |text: String| text.lines().map(str::to_owned).collect();
        (lines(code), lines(comments))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Code,
    Comment,
    Literal,
}

/// Where the token that begins at `at` ends, and what it is.
fn token(text: &[char], at: usize) -> (usize, Kind) {
    let starts = |pattern: &str| {
        pattern
            .chars()
            .eq(text[at..].iter().copied().take(pattern.len()))
    };
    if starts("//") {
        let length = text[at..].iter().position(|&c| c == '\n');
        return (
            length.map_or(text.len(), |length| at + length),
            Kind::Comment,
        );
    }
    if starts("/*") {
        return (block_comment_end(text, at), Kind::Comment);
    }
    let first = text[at];
    if first == '"' {
        return (string_end(text, at + 1), Kind::Literal);
    }
    if first == '\'' {
        return character(text, at);
    }
    if first.is_alphanumeric() || first == '_' {
        let length = text[at..]
            .iter()
            .position(|&c| !(c.is_alphanumeric() || c == '_'));
        let end = length.map_or(text.len(), |length| at + length);
        let word: String = text[at..end].iter().collect();
        if matches!(word.as_str(), "r" | "br" | "cr")
            && let Some(end) = raw_string_end(text, end)
        {
            return (end, Kind::Literal);
        }
        return (end, Kind::Code);
    }
    (at + 1, Kind::Code)
}

fn block_comment_end(text: &[char], start: usize) -> usize {
    let mut depth = 0_usize;
    let mut at = start;
    while at + 1 < text.len() {
        match (text[at], text[at + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

fn string_end(text: &[char], mut at: usize) -> usize {
    while at < text.len() {
        match text[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

/// A raw string's end, if what follows its prefix opens one.
fn raw_string_end(text: &[char], after_prefix: usize) -> Option<usize> {
    let hashes = text[after_prefix..]
        .iter()
        .take_while(|&&c| c == '#')
        .count();
    if text.get(after_prefix + hashes) != Some(&'"') {
        return None;
    }
    let closes = |at: usize| {
        text[at] == '"'
            && text[at + 1..].len() >= hashes
            && text[at + 1..][..hashes].iter().all(|&c| c == '#')
    };
    let end = (after_prefix + hashes + 1..text.len()).find(|&at| closes(at));
    Some(end.map_or(text.len(), |at| at + 1 + hashes))
}

/// A character literal; a lifetime's quote is code.
fn character(text: &[char], at: usize) -> (usize, Kind) {
    match (text.get(at + 1), text.get(at + 2)) {
        (Some('\\'), _) => {
            let close = (at + 3..text.len()).find(|&index| text[index] == '\'');
            (close.map_or(text.len(), |close| close + 1), Kind::Literal)
        }
        (Some(_), Some('\'')) => (at + 3, Kind::Literal),
        _ => (at + 1, Kind::Code),
    }
}

/// The identifiers and keywords of a line of code.
pub(crate) fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_'))
        .filter(|word| !word.is_empty())
}

#[test]
fn comments_and_strings_are_told_from_code() {
    let file = File {
        path: "x.rs".into(),
        text: concat!(
            "let a = \"one // two \\\" three\"; // four\n",
            "let b: &'static str = r#\"five \"six\" seven\"#; /* eight /* nine */ ten */ c('\\'', '\"')\n",
            "/* eleven\ntwelve */ d",
        )
        .into(),
    };
    let code = file.code().join("\n");
    let seen: Vec<&str> = words(&code).collect();
    assert_eq!(
        seen,
        ["let", "a", "let", "b", "static", "str", "c", "d"],
        "{code}"
    );
    assert_eq!(code.lines().count(), 4);
    let comments = file.comments().join(" ");
    let seen: Vec<&str> = words(&comments).collect();
    assert_eq!(seen, ["four", "eight", "nine", "ten", "eleven", "twelve"]);
}

#[test]
fn only_the_module_of_unit_tests_ends_the_product() {
    let file = File {
        path: "x.rs".into(),
        text: "#[cfg(test)]\nuse x;\nfn a() {}\n#[cfg(test)]\nmod tests {\n}\n".into(),
    };
    assert_eq!(file.lines_before_tests(), 3);
}

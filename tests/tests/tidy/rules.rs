//! Rules about one file at a time.

use crate::{
    Violation,
    source::{File, words},
};

const MAX_LINES: usize = 500;
/// What says nothing about a thing's purpose.
const BANNED_NAMES: [&str; 8] = [
    "common", "helper", "helpers", "inner", "manager", "managers", "util", "utils",
];
/// What marks unfinished work in a comment.
const MARKS: [&str; 4] = ["TODO", "FIXME", "XXX", "HACK"];
/// Types that make a static mutable.
const MUTABLE: [&str; 8] = [
    "Mutex", "RwLock", "OnceLock", "OnceCell", "LazyLock", "LazyCell", "RefCell", "Cell",
];
/// Where this check says what it looks for.
const OWN: &str = "tests/tests/tidy/";

fn rust(files: &[File]) -> impl Iterator<Item = &File> {
    files.iter().filter(|file| file.is_rust())
}

/// Each line of `lines` that `breaks` complains about.
fn each_line(
    file: &File,
    lines: &[String],
    breaks: impl Fn(&str) -> Option<String>,
) -> Vec<Violation> {
    let numbered = lines.iter().enumerate();
    numbered
        .filter_map(|(index, line)| Some(Violation::new(file, index + 1, breaks(line)?)))
        .collect()
}

pub(crate) fn size(files: &[File]) -> Vec<Violation> {
    rust(files)
        .filter(|file| file.lines_before_tests() > MAX_LINES)
        .map(|file| {
            let lines = file.lines_before_tests();
            Violation::new(file, lines, format!("{lines} lines before its tests"))
        })
        .collect()
}

pub(crate) fn module_doc(files: &[File]) -> Vec<Violation> {
    rust(files)
        .filter(|file| {
            // What the module allows itself may stand first; the attribute can take several lines.
            let code = file.code();
            let mut lines = file.text.lines().zip(&code);
            let mut in_attribute = false;
            let first = lines.find(|(_, code)| {
                let attribute = in_attribute || code.starts_with("#![");
                in_attribute = attribute && !code.trim_end().ends_with(")]");
                !attribute
            });
            !first.is_some_and(|(line, _)| line.starts_with("//! "))
        })
        .map(|file| Violation::new(file, 1, "does not open with //!"))
        .collect()
}

pub(crate) fn unfinished(files: &[File]) -> Vec<Violation> {
    let mut found = Vec::new();
    for file in rust(files).filter(|file| !file.path.starts_with(OWN)) {
        found.extend(each_line(file, &file.comments(), |line| {
            let mark = words(line).find(|word| MARKS.contains(word))?;
            Some(format!("{mark} in a comment"))
        }));
        found.extend(each_line(file, &file.code(), |line| {
            let stub = ["todo!", "unimplemented!"];
            let stub = stub.iter().find(|stub| line.contains(*stub))?;
            Some(format!("{stub} is no implementation"))
        }));
    }
    found
}

pub(crate) fn ignored_test(files: &[File]) -> Vec<Violation> {
    rust(files)
        .flat_map(|file| {
            each_line(file, &file.code(), |line| {
                let ignored = line.trim_start().starts_with("#[ignore");
                ignored.then(|| "a test that nobody runs".to_owned())
            })
        })
        .collect()
}

pub(crate) fn sleep(files: &[File]) -> Vec<Violation> {
    rust(files)
        .filter(|file| !file.is_test())
        .flat_map(|file| {
            each_line(file, &file.product_code(), |line| {
                let sleeps = words(line).any(|word| matches!(word, "sleep" | "sleep_until"));
                sleeps.then(|| "sleeping synchronises nothing".to_owned())
            })
        })
        .collect()
}

pub(crate) fn unsafe_code(files: &[File]) -> Vec<Violation> {
    rust(files)
        .filter_map(|file| {
            let found = each_line(file, &file.code(), |line| {
                let is_unsafe = words(line).any(|word| word == "unsafe");
                is_unsafe.then(|| "unsafe code in a file that is not listed".to_owned())
            });
            // Once for each file: an exception excuses it whole.
            found.into_iter().next()
        })
        .collect()
}

pub(crate) fn safety_comment(files: &[File]) -> Vec<Violation> {
    let mut found = Vec::new();
    for file in rust(files) {
        let comments = file.comments();
        for (index, line) in file.code().iter().enumerate() {
            let mut words = words(line).skip_while(|&word| word != "unsafe");
            if words.next().is_none() || matches!(words.next(), Some("fn" | "extern" | "trait")) {
                continue;
            }
            let near = &comments[index.saturating_sub(8)..=index];
            if !near.iter().any(|comment| comment.contains("SAFETY:")) {
                found.push(Violation::new(file, index + 1, "no SAFETY comment above"));
            }
        }
    }
    found
}

pub(crate) fn names(files: &[File]) -> Vec<Violation> {
    let mut found = Vec::new();
    for file in files {
        let stems = file.path.split('/').map(|part| match part.split_once('.') {
            Some((stem, _)) => stem,
            None => part,
        });
        for stem in stems {
            if let Some(banned) = banned(stem) {
                found.push(Violation::new(file, 1, format!("{banned:?} in its path")));
            }
        }
        if file.is_rust() {
            found.extend(each_line(file, &file.code(), |line| {
                let mut words = words(line).skip_while(|word| {
                    !matches!(
                        *word,
                        "struct" | "enum" | "trait" | "type" | "union" | "mod"
                    )
                });
                words.next()?;
                let name = words.next()?;
                Some(format!("{:?} in the name {name}", banned(name)?))
            }));
        }
    }
    found
}

/// The banned word in a name, whether it is written with underscores, hyphens or capitals.
fn banned(name: &str) -> Option<&'static str> {
    let mut spaced = String::new();
    for character in name.chars() {
        if character.is_uppercase() || character == '_' || character == '-' {
            spaced.push(' ');
        }
        spaced.extend(character.to_lowercase());
    }
    let mut parts = spaced.split([' ', '_', '-']);
    parts.find_map(|part| BANNED_NAMES.into_iter().find(|banned| *banned == part))
}

pub(crate) fn global_state(files: &[File]) -> Vec<Violation> {
    let mutable =
        |word: &str| word == "mut" || MUTABLE.contains(&word) || word.starts_with("Atomic");
    rust(files)
        .filter(|file| !file.is_test())
        .flat_map(|file| {
            each_line(file, &file.product_code(), |line| {
                let line = line.trim_start();
                let line = line.strip_prefix("pub(crate) ").unwrap_or(line);
                let line = line.strip_prefix("pub ").unwrap_or(line);
                let is_static = line.starts_with("static ") && words(line).any(mutable);
                is_static.then(|| "mutable state that nobody owns".to_owned())
            })
        })
        .collect()
}

pub(crate) fn anyhow(files: &[File]) -> Vec<Violation> {
    rust(files)
        .filter(|file| {
            let top = file.path.split('/').next().unwrap_or_default();
            !matches!(top, "tests" | "xtask") && !file.is_test() && !file.path.ends_with("/main.rs")
        })
        .filter_map(|file| {
            let found = each_line(file, &file.product_code(), |line| {
                let used = words(line).any(|word| word == "anyhow");
                used.then(|| "a module has an error of its own".to_owned())
            });
            found.into_iter().next()
        })
        .collect()
}

pub(crate) fn one_error(files: &[File]) -> Vec<Violation> {
    rust(files)
        .filter(|file| !file.is_test())
        .flat_map(|file| {
            let derives = each_line(file, &file.product_code(), |line| {
                let derives = line.trim_start().starts_with("#[derive(");
                (derives && words(line).any(|word| word == "Error"))
                    .then(|| "a second error in one module".to_owned())
            });
            derives.into_iter().skip(1)
        })
        .collect()
}

pub(crate) fn allow_reason(files: &[File]) -> Vec<Violation> {
    let mut found = Vec::new();
    for file in rust(files) {
        let code = file.code();
        for (index, line) in code.iter().enumerate() {
            let line = line
                .trim_start()
                .trim_start_matches("#![")
                .trim_start_matches("#[");
            if !line.starts_with("allow(") && !line.starts_with("expect(") {
                continue;
            }
            // An attribute that is long is broken over lines, up to its closing bracket.
            let rest = &code[index..];
            let lines = rest.iter().position(|line| line.trim_end().ends_with(")]"));
            let attribute = rest[..=lines.unwrap_or(0)].concat();
            if !words(&attribute).any(|word| word == "reason") {
                found.push(Violation::new(
                    file,
                    index + 1,
                    "a lint is allowed without a reason",
                ));
            }
        }
    }
    found
}

pub(crate) fn machine_path(files: &[File]) -> Vec<Violation> {
    let of_one_machine = [["/wo", "rk/"].concat(), ["/root/", ".cargo"].concat()];
    let mut found = Vec::new();
    for file in files {
        for (index, line) in file.text.lines().enumerate() {
            if let Some(path) = of_one_machine.iter().find(|path| line.contains(*path)) {
                found.push(Violation::new(
                    file,
                    index + 1,
                    format!("{path} is one machine's"),
                ));
            }
        }
    }
    found
}

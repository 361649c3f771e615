//! Many checks on one VM or container, which is slow to come by.
//!
//! Each chapter is told even if one before it failed, and each failure is named. Only a chapter that waited in vain ends
//! the story: who doesn't answer there answers in none.

use crate::deadline;
use anyhow::{Result, bail};
use std::time::Instant;

/// A chapter's name and what it checks.
pub type Chapter<T> = (&'static str, fn(&mut T) -> Result<()>);

/// Tells all chapters, and fails if one did.
pub fn tell<T>(fixture: &mut T, chapters: &[Chapter<T>]) -> Result<()> {
    let mut failures = Vec::new();
    for (name, chapter) in chapters {
        let begun = Instant::now();
        match chapter(fixture) {
            Ok(()) => println!("chapter {name} ... ok"),
            Err(error) => {
                println!("chapter {name} ... FAILED: {error:?}");
                failures.push(format!("{name}: {error:#}"));
                if begun.elapsed() >= deadline::REQUEST {
                    failures.push("the rest is not told".to_owned());
                    break;
                }
            }
        }
    }
    if !failures.is_empty() {
        bail!("{}", failures.join("\n"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_named_and_ends_nothing() {
        let mut told = 0;
        let error = tell(
            &mut told,
            &[
                ("first", |told| {
                    *told += 1;
                    bail!("no")
                }),
                ("second", |told| {
                    *told += 1;
                    Ok(())
                }),
            ],
        );
        assert_eq!(error.unwrap_err().to_string(), "first: no");
        assert_eq!(told, 2);
    }
}

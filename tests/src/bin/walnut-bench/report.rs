//! Figures side by side: a table for people, JSON for programs.

use serde_json::{Value, json};
use std::fmt::Write;

/// What one figure was, each time it was taken; never empty.
#[derive(Debug)]
pub(crate) struct Samples(Vec<f64>);

impl Samples {
    pub(crate) fn of(samples: impl IntoIterator<Item = f64>) -> Self {
        let mut samples: Vec<f64> = samples.into_iter().collect();
        samples.sort_by(f64::total_cmp);
        Self(samples)
    }

    /// The one in the middle.
    fn median(&self) -> f64 {
        self.0[self.0.len() / 2]
    }

    fn json(&self) -> Value {
        json!({ "median": self.median(), "samples": self.0 })
    }
}

/// Which of two figures is the better one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    /// Times, counts, memory.
    Less,
    /// Throughputs.
    More,
}

/// One figure of Walnut's and, where there is one, of another's.
#[derive(Debug)]
pub(crate) struct Row {
    pub(crate) what: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) walnut: Samples,
    pub(crate) other: Option<(&'static str, Samples)>,
    pub(crate) better: Better,
    /// Walnut's figure shall be at most this many times the other's, or at least where more is better.
    pub(crate) aim_ratio: Option<f64>,
    /// Walnut's figure shall be at most this.
    pub(crate) aim_most: Option<f64>,
}

impl Row {
    fn ratio(&self) -> Option<f64> {
        let (_, other) = self.other.as_ref()?;
        Some(self.walnut.median() / other.median())
    }

    /// The aim and whether it was reached.
    fn aim(&self) -> Option<(String, bool)> {
        if let (Some(aim), Some(ratio)) = (self.aim_ratio, self.ratio()) {
            return Some(match self.better {
                Better::Less => (format!("ratio <= {aim:.2}"), ratio <= aim),
                Better::More => (format!("ratio >= {aim:.2}"), ratio >= aim),
            });
        }
        let aim = self.aim_most?;
        Some((
            format!("<= {aim} {}", self.unit),
            self.walnut.median() <= aim,
        ))
    }

    fn json(&self) -> Value {
        let other = self.other.as_ref().map(|(name, samples)| {
            let mut other = samples.json();
            other["name"] = json!(name);
            other
        });
        let aim = self
            .aim()
            .map(|(aim, reached)| json!({ "aim": aim, "reached": reached }));
        json!({
            "what": self.what,
            "unit": self.unit,
            "walnut": self.walnut.json(),
            "other": other,
            "ratio": self.ratio(),
            "aim": aim,
        })
    }
}

/// All figures of one run.
#[derive(Debug)]
pub(crate) struct Report {
    runs: usize,
    rows: Vec<Row>,
}

impl Report {
    pub(crate) fn new(runs: usize) -> Self {
        Self {
            runs,
            rows: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, row: Row) {
        self.rows.push(row);
    }

    pub(crate) fn json(&self) -> Value {
        let rows: Vec<Value> = self.rows.iter().map(Row::json).collect();
        json!({ "runs": self.runs, "rows": rows })
    }

    pub(crate) fn table(&self) -> String {
        let mut table = format!(
            "\n{:<38} {:>14} {:>14} {:>7}  {}\n",
            "median", "walnut", "other", "ratio", ""
        );
        for row in &self.rows {
            let figure = |samples: &Samples| format!("{:.1} {}", samples.median(), row.unit);
            let (name, other) = match &row.other {
                Some((name, samples)) => (format!("other: {name}"), figure(samples)),
                None => (String::new(), String::new()),
            };
            let ratio = row.ratio().map(|ratio| format!("{ratio:.2}"));
            let aim = row.aim().map(|(aim, reached)| {
                let verdict = if reached { "reached" } else { "MISSED" };
                format!("aim {aim}: {verdict}")
            });
            let notes: Vec<String> = [Some(name), aim]
                .into_iter()
                .flatten()
                .filter(|note| !note.is_empty())
                .collect();
            // Writing to a String cannot fail.
            let _ = writeln!(
                table,
                "{:<38} {:>14} {other:>14} {:>7}  {}",
                row.what,
                figure(&row.walnut),
                ratio.unwrap_or_default(),
                notes.join(", ")
            );
        }
        table
    }
}

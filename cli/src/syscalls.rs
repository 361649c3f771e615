//! `walnut syscalls`: what each container calls of its kernel, as `strace -cw` would count it, without a
//! tracer in the container.
//!
//! The shim's numbers add up since counting began; what is shown is since this command began, by the
//! difference. Only the longest time can't be told apart, and may be older.

use crate::{
    CommandError,
    pods::{Pods, Shim},
    table::Table,
};
use clap::ValueEnum;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    io::{IsTerminal as _, Write as _},
    time::Duration,
};
use syscalls::x86_64::Sysno;
use tokio::time::{Instant, interval_at};
use walnut_shim_api::pod::{SyscallsRequest, SyscallsResponse};

/// How much longer than until the next question counting goes on: a slow guest isn't forgotten.
const GRACE: Duration = Duration::from_secs(30);
/// Clears a terminal and goes to its first line (ECMA-48, ED and CUP).
const CLEAR: &str = "\x1b[2J\x1b[H";
const NS_PER_US: u64 = 1_000;

/// How counts are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// One JSON object for each table
    Json,
    /// Prometheus' text format
    Prometheus,
}

/// What is to be shown.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Empty: all.
    pub(crate) container: String,
    /// Between two tables.
    pub(crate) interval: Duration,
    /// How many; 0: until interrupted.
    pub(crate) tables: u32,
    /// How.
    pub(crate) format: Format,
}

/// One container's use of one call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Row {
    container: String,
    syscall: String,
    number: u32,
    calls: u64,
    errors: u64,
    total_ns: u64,
    longest_ns: u64,
}

/// What was counted since this command began.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Report {
    elapsed_ms: u64,
    missed: u64,
    syscalls: Vec<Row>,
}

type Key = (String, u32);

/// What a metric tells of a row.
type Figure = fn(&Row) -> u64;

/// Counts, and shows what was counted once for each interval.
pub(crate) async fn run(pods: &Pods, pod: &str, plan: &Plan) -> Result<(), CommandError> {
    let shim = pods.find(pod)?.connect().await?;
    let first = ask(&shim, plan).await?;
    let mut ticks = interval_at(Instant::now() + plan.interval, plan.interval);
    let mut shown = 0;
    while plan.tables == 0 || shown < plan.tables {
        tokio::select! {
            _ = ticks.tick() => {}
            interrupted = tokio::signal::ctrl_c() => return Ok(interrupted?),
        }
        let report = Report::since(&first, &ask(&shim, plan).await?);
        let mut output = std::io::stdout().lock();
        if plan.format == Format::Table && plan.tables != 1 && output.is_terminal() {
            output.write_all(CLEAR.as_bytes())?;
        }
        output.write_all(report.show(plan.format)?.as_bytes())?;
        output.flush()?;
        shown += 1;
    }
    Ok(())
}

async fn ask(shim: &Shim, plan: &Plan) -> Result<SyscallsResponse, CommandError> {
    let keep = plan.interval + GRACE;
    let request = SyscallsRequest {
        container_id: plan.container.clone(),
        keep_ms: u32::try_from(keep.as_millis()).unwrap_or(u32::MAX),
        ..Default::default()
    };
    Ok(shim.syscalls(&request).await?)
}

impl Report {
    fn since(first: &SyscallsResponse, now: &SyscallsResponse) -> Self {
        let key = |container: &str, number| -> Key { (container.to_owned(), number) };
        let before: BTreeMap<Key, _> = first
            .counts
            .iter()
            .map(|count| (key(&count.container_id, count.number), count))
            .collect();
        let mut syscalls: Vec<Row> = now
            .counts
            .iter()
            .map(|count| {
                let old = before.get(&key(&count.container_id, count.number));
                let less = |now: u64, then: Option<u64>| now.saturating_sub(then.unwrap_or(0));
                Row {
                    container: count.container_id.clone(),
                    syscall: name(count.number),
                    number: count.number,
                    calls: less(count.calls, old.map(|old| old.calls)),
                    errors: less(count.errors, old.map(|old| old.errors)),
                    total_ns: less(count.total_ns, old.map(|old| old.total_ns)),
                    longest_ns: count.longest_ns,
                }
            })
            .filter(|row| row.calls > 0)
            .collect();
        syscalls.sort_by(|a, b| {
            (&a.container, b.total_ns, &a.syscall).cmp(&(&b.container, a.total_ns, &b.syscall))
        });
        let elapsed = now.elapsed_ns.saturating_sub(first.elapsed_ns);
        Self {
            elapsed_ms: elapsed / 1_000_000,
            missed: now.missed.saturating_sub(first.missed),
            syscalls,
        }
    }

    fn show(&self, format: Format) -> Result<String, CommandError> {
        Ok(match format {
            Format::Table => self.table(),
            Format::Json => format!("{}\n", serde_json::to_string(self)?),
            Format::Prometheus => self.prometheus(),
        })
    }

    fn table(&self) -> String {
        let mut table = Table::new(&[
            "CONTAINER",
            ">% TIME",
            ">SECONDS",
            ">USECS/CALL",
            ">LONGEST US",
            ">CALLS",
            ">ERRORS",
            "SYSCALL",
        ]);
        let mut totals: BTreeMap<&str, u64> = BTreeMap::new();
        for row in &self.syscalls {
            let total = totals.entry(&row.container).or_default();
            *total = total.saturating_add(row.total_ns);
        }
        for row in &self.syscalls {
            let total = totals
                .get(row.container.as_str())
                .copied()
                .unwrap_or(0)
                .max(1);
            let permyriad = u128::from(row.total_ns) * 10_000 / u128::from(total);
            let us = row.total_ns / NS_PER_US;
            table.row([
                row.container.clone(),
                format!("{}.{:02}", permyriad / 100, permyriad % 100),
                format!("{}.{:06}", us / 1_000_000, us % 1_000_000),
                (us / row.calls.max(1)).to_string(),
                (row.longest_ns / NS_PER_US).to_string(),
                row.calls.to_string(),
                if row.errors == 0 {
                    String::new()
                } else {
                    row.errors.to_string()
                },
                row.syscall.clone(),
            ]);
        }
        let mut text = table.text();
        if self.missed > 0 {
            text.push_str(&format!(
                "{} calls more had no room to be counted\n",
                self.missed
            ));
        }
        text
    }

    /// Prometheus' text-based exposition format 0.0.4.
    fn prometheus(&self) -> String {
        let mut text = String::new();
        let families: [(&str, &str, Figure); 4] = [
            ("calls_total", "Calls that ended.", |row| row.calls),
            ("errors_total", "Calls that ended with an error.", |row| {
                row.errors
            }),
            ("time_nanoseconds_total", "Time in calls.", |row| {
                row.total_ns
            }),
            ("longest_nanoseconds", "Time in the longest call.", |row| {
                row.longest_ns
            }),
        ];
        for (name, help, value) in families {
            let kind = if name.ends_with("_total") {
                "counter"
            } else {
                "gauge"
            };
            let name = format!("walnut_syscall_{name}");
            text.push_str(&format!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
            for row in &self.syscalls {
                // Ids and names of calls hold nothing that would need an escape.
                let labels = format!(
                    "container=\"{}\",syscall=\"{}\"",
                    row.container, row.syscall
                );
                text.push_str(&format!("{name}{{{labels}}} {}\n", value(row)));
            }
        }
        let missed = "walnut_syscall_missed_total";
        text.push_str(&format!(
            "# TYPE {missed} counter\n{missed} {}\n",
            self.missed
        ));
        text
    }
}

/// The name of a call of x86-64; what has none is shown by its number.
fn name(number: u32) -> String {
    let known = usize::try_from(number).ok().and_then(Sysno::new);
    known.map_or_else(
        || format!("syscall_{number}"),
        |call| call.name().to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use walnut_shim_api::pod::SyscallCount;

    fn count(container: &str, number: u32, calls: u64, total_ns: u64) -> SyscallCount {
        SyscallCount {
            container_id: container.to_owned(),
            number,
            calls,
            errors: calls / 2,
            total_ns,
            longest_ns: total_ns,
            ..Default::default()
        }
    }

    fn response(elapsed_ns: u64, counts: Vec<SyscallCount>) -> SyscallsResponse {
        SyscallsResponse {
            elapsed_ns,
            counts,
            ..Default::default()
        }
    }

    fn report() -> Report {
        let first = response(
            1_000_000,
            vec![count("a", 0, 4, 1_000_000), count("a", 1, 1, 5)],
        );
        let now = response(
            9_000_000,
            vec![
                count("b", 60, 1, 0),
                count("a", 0, 10, 4_000_000),
                count("a", 1, 1, 5),
                count("a", 5000, 2, 1_000_000),
            ],
        );
        Report::since(&first, &now)
    }

    #[test]
    fn what_was_counted_before_this_command_is_left_out() {
        let report = report();
        let rows: Vec<_> = report
            .syscalls
            .iter()
            .map(|row| {
                (
                    row.container.as_str(),
                    row.syscall.as_str(),
                    row.calls,
                    row.errors,
                )
            })
            .collect();
        let expected = [
            ("a", "read", 6, 3),
            ("a", "syscall_5000", 2, 1),
            ("b", "exit", 1, 0),
        ];
        assert_eq!(rows, expected);
        assert_eq!(report.elapsed_ms, 8);
    }

    #[test]
    fn a_table_has_shares_of_each_container() {
        let text = report().table();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[1].contains("75.00  0.003000"), "{text}");
        assert!(lines[1].ends_with("read"), "{text}");
        assert!(lines[2].contains("25.00  0.001000"), "{text}");
    }

    #[test]
    fn metrics_have_names_types_and_labels() {
        let text = report().prometheus();
        assert!(text.contains("# TYPE walnut_syscall_calls_total counter\n"));
        assert!(text.contains("walnut_syscall_calls_total{container=\"a\",syscall=\"read\"} 6\n"));
        assert!(text.contains("# TYPE walnut_syscall_longest_nanoseconds gauge\n"));
        assert!(text.ends_with("walnut_syscall_missed_total 0\n"));
    }
}

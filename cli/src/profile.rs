//! `walnut profile`: seccomp profiles of what containers call, recorded outside of them, in the guest's kernel.
//!
//! Writes the one file that is named, and nothing else.

use crate::{
    Answer, CommandError,
    pods::{Pods, Shim},
    seccomp::{Profile, Use, Verdict},
    table::Table,
};
use clap::Subcommand;
use std::{
    fs, io,
    io::Write as _,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::{Instant, timeout_at};
use walnut_shim_api::pod::{RecordRequest, RecordResponse};

/// How long one question waits for the container's end.
const STEP: Duration = Duration::from_secs(5);
/// How long recording goes on after a question: a slow guest isn't forgotten.
const KEEP: Duration = Duration::from_secs(60);

/// What to do with profiles.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write a profile of what a container calls from now on, or from its beginning if its annotation walnut.record is
    /// "true", until it ends or Ctrl-C
    Record {
        /// The Pod's id, or as much of its beginning as names no other
        pod: String,
        /// The container
        container: String,
        /// The file to write; "-" is standard output
        #[arg(long, short, value_name = "FILE")]
        output: PathBuf,
        /// End after as long, such as 90s, 5m or 1h
        #[arg(long = "for", value_name = "DURATION", value_parser = duration)]
        duration: Option<Duration>,
    },
    /// Write a profile that allows what one of several allows
    Merge {
        /// Profiles that were recorded or merged
        #[arg(required = true)]
        profiles: Vec<PathBuf>,
        /// The file to write; "-" is standard output
        #[arg(long, short, value_name = "FILE")]
        output: PathBuf,
    },
    /// Tell what a profile would deny a container, without denying it
    Test {
        /// The profile
        profile: PathBuf,
        /// The Pod's id, or as much of its beginning as names no other
        pod: String,
        /// The container
        container: String,
        /// End after as long, such as 90s, 5m or 1h
        #[arg(long = "for", value_name = "DURATION", value_parser = duration)]
        duration: Option<Duration>,
    },
}

/// Does it.
pub(crate) async fn run(pods: &Pods, command: Command) -> Result<Answer, CommandError> {
    match command {
        Command::Record {
            pod,
            container,
            output,
            duration,
        } => {
            let shim = pods.find(&pod)?.connect().await?;
            let record = record(&shim, &container, duration).await?;
            let uses = uses(&record);
            let profile = Profile::of(&uses, &comment(&container, &record, uses.len()));
            write(&output, &profile)?;
            Ok(Answer::Good)
        }
        Command::Merge { profiles, output } => {
            let read: Vec<_> = profiles
                .iter()
                .map(|path| read(path))
                .collect::<Result<_, _>>()?;
            let names: Vec<_> = profiles
                .iter()
                .map(|path| path.display().to_string())
                .collect();
            let comment = format!("merged by walnut profile merge of {}", names.join(", "));
            write(&output, &Profile::merge(&read, &comment)?)?;
            Ok(Answer::Good)
        }
        Command::Test {
            profile,
            pod,
            container,
            duration,
        } => {
            let profile = read(&profile)?;
            let shim = pods.find(&pod)?.connect().await?;
            let record = record(&shim, &container, duration).await?;
            report(&profile, &record)
        }
    }
}

/// Asks until the container's end, an interrupt, or as long as is wanted.
async fn record(
    shim: &Shim,
    container: &str,
    wanted: Option<Duration>,
) -> Result<RecordResponse, CommandError> {
    let end = wanted.map(|wanted| Instant::now() + wanted);
    let ask = |wait: Duration| {
        let milliseconds = |time: Duration| u32::try_from(time.as_millis()).unwrap_or(u32::MAX);
        let request = RecordRequest {
            container_id: container.to_owned(),
            keep_ms: milliseconds(KEEP),
            wait_ms: milliseconds(wait),
            ..Default::default()
        };
        async move { shim.record(&request).await }
    };
    // Recording has begun when this is answered.
    ask(Duration::ZERO).await?;
    eprintln!("walnut: recording");
    let ended = async {
        loop {
            let answer = ask(STEP).await?;
            if answer.ended {
                return Ok::<_, CommandError>(answer);
            }
        }
    };
    let ended = async {
        match end {
            Some(end) => timeout_at(end, ended).await.ok(),
            None => Some(ended.await),
        }
    };
    tokio::select! {
        answer = ended => if let Some(answer) = answer {
            return answer;
        },
        interrupted = tokio::signal::ctrl_c() => interrupted?,
    }
    Ok(ask(Duration::ZERO).await?)
}

fn uses(record: &RecordResponse) -> Vec<Use> {
    let uses = record.uses.iter().map(|one| Use {
        number: one.number,
        class: one.class,
    });
    uses.collect()
}

fn comment(container: &str, record: &RecordResponse, uses: usize) -> String {
    let seconds = Duration::from_nanos(record.elapsed_ns).as_secs();
    let from = match record.whole {
        true => "from its start",
        false => "not from its start",
    };
    let to = if record.ended {
        "to its end"
    } else {
        "while it ran"
    };
    let mut text = format!(
        "recorded by walnut profile record of container {container}, {from} {to}: {uses} calls in {seconds} s; \
         with what every program needs"
    );
    if record.missed > 0 {
        text.push_str(&format!("; {} CALLS ARE MISSING", record.missed));
    }
    text
}

fn report(profile: &Profile, record: &RecordResponse) -> Result<Answer, CommandError> {
    let mut table = Table::new(&["SYSCALL", "ARGUMENT", "WOULD GET"]);
    let mut worst = Answer::Good;
    for one in uses(record) {
        // What this kernel doesn't know fails with and without a profile.
        let Some(name) = one.name() else { continue };
        let (answer, gets) = match profile.verdict(one) {
            Verdict::Allowed => continue,
            Verdict::Unknown => {
                let gets = "unknown: it depends on arguments that are not recorded";
                (Answer::Doubtful, gets.to_owned())
            }
            Verdict::Denied(action) => (Answer::Bad, action),
        };
        worst = worst.max(answer);
        table.row([name.to_owned(), one.detail(), gets]);
    }
    let mut output = io::stdout().lock();
    if worst == Answer::Good {
        writeln!(
            output,
            "nothing of {} calls would be denied",
            record.uses.len()
        )?;
    } else {
        output.write_all(table.text().as_bytes())?;
    }
    if record.missed > 0 {
        writeln!(
            output,
            "{} calls more had no room to be recorded",
            record.missed
        )?;
        worst = worst.max(Answer::Doubtful);
    }
    Ok(worst)
}

fn read(path: &Path) -> Result<Profile, CommandError> {
    let failed = |source| CommandError::File {
        attempted: "read",
        path: path.to_owned(),
        source,
    };
    let json = fs::read(path).map_err(failed)?;
    Profile::parse(&json).map_err(|source| CommandError::ProfileFile {
        path: path.to_owned(),
        source,
    })
}

fn write(path: &Path, profile: &Profile) -> Result<(), CommandError> {
    let json = profile.json()?;
    if path == Path::new("-") {
        io::stdout().lock().write_all(json.as_bytes())?;
        return Ok(());
    }
    fs::write(path, json).map_err(|source| CommandError::File {
        attempted: "write",
        path: path.to_owned(),
        source,
    })
}

fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|unit: char| unit.is_ascii_alphabetic());
    let seconds = match text.get(digits.len()..) {
        Some("" | "s") => 1,
        Some("m") => 60,
        Some("h") => 3600,
        _ => return Err("a number of s, m or h is wanted, such as 90s".to_owned()),
    };
    let number: u32 = digits.parse().map_err(|_| "no number".to_owned())?;
    Ok(Duration::from_secs(u64::from(number) * seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units() {
        for (text, seconds) in [("90", 90), ("5s", 5), ("2m", 120), ("1h", 3600)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "s", "-1s", "1d", "1.5h", "99999999999"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_comment_says_what_is_missing() {
        let record = RecordResponse {
            elapsed_ns: 35_900_000_000,
            whole: true,
            missed: 3,
            ..Default::default()
        };
        let text = comment("web", &record, 70);
        assert!(
            text.contains("of container web, from its start while it ran: 70 calls in 35 s"),
            "{text}"
        );
        assert!(text.ends_with("3 CALLS ARE MISSING"), "{text}");
    }
}

//! `cargo xtask bench`: runs the benchmark in the lab, prints its table, keeps its figures.

use std::fs;
use std::io;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use walnut_lab_init::wire::Exec;

use crate::lab::client::{Inherit, Sink};
use crate::lab::delivery::Delivery;
use crate::prepare;
use crate::programs::Targets;
use crate::progress::Progress;
use crate::project::Project;

const PROGRAM: &str = "walnut-bench";

/// How long the benchmark may be silent.
const SILENCE_LIMIT: Duration = Duration::from_secs(900);

/// Runs it.
pub(crate) fn run(project: &Project, arguments: &[String], progress: Progress) -> Result<()> {
    prepare::build(project, Targets::Programs, progress)?;
    let mut lab = prepare::fresh_lab(project, progress)?;
    let path = format!("/usr/libexec/walnut/tests/{PROGRAM}");
    let program = Delivery {
        source: project.program(PROGRAM),
        destination: path.clone(),
        executable: true,
    };
    lab.deliver(&[program], progress)?;
    let argv = std::iter::once(path)
        .chain(arguments.iter().cloned())
        .collect();
    let exec = Exec {
        argv,
        environment: Vec::new(),
        terminal: None,
    };
    let mut figures = Figures::default();
    let status = lab.client().run(exec, &mut figures, SILENCE_LIMIT)?;
    ensure!(
        status == 0,
        "the benchmark failed with status {status}; see above"
    );
    let path = project.target.join("bench.json");
    fs::write(&path, &figures.json).with_context(|| format!("write {}", path.display()))?;
    progress.say("bench", &format!("figures are in {}", path.display()));
    Ok(())
}

/// Keeps the figures (standard output) and shows the table (standard error).
#[derive(Debug, Default)]
struct Figures {
    json: Vec<u8>,
}

impl Sink for Figures {
    fn stdout(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.json.extend_from_slice(bytes);
        Ok(())
    }

    fn stderr(&mut self, bytes: &[u8]) -> io::Result<()> {
        Inherit.stderr(bytes)
    }
}

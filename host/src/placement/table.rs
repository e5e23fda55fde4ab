//! The estimates as a person reads them, a column for each placement: all of them, for `host plan`, and those that decided,
//! for a run that begins.

use std::fmt;

use super::memory::{Part, Where};
use super::{Candidate, Choice, Placement, Question, gb};

pub struct Table<'a> {
    pub question: &'a Question<'a>,
    pub choice: &'a Choice,
    /// The same job done in another way.
    pub other: Option<&'a Candidate>,
    /// Where lengths are from.
    pub source: &'a str,
}

const LABEL: usize = 30;
const COLUMN: usize = 14;

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.head(f)?;
        self.memory(f)?;
        self.time(f)?;
        write!(f, "\n{}: {}", self.choice.chosen().placement.describe(), self.choice.verdict())
    }
}

/// Which placement was taken, and by what; one line where there was nothing to choose.
pub struct Summary<'a> {
    pub choice: &'a Choice,
    pub world_size: usize,
}

impl fmt::Display for Summary<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Choice { candidates, have_bytes, .. } = self.choice;
        let chosen = self.choice.chosen();
        let (name, need, have) = (chosen.placement.describe(), gb(chosen.need_bytes), gb(*have_bytes));
        if self.world_size == 1 {
            return writeln!(f, "memory: about {need} of {have}");
        }
        if candidates.len() == 1 {
            return writeln!(f, "placement: {name}, about {need} of {have} a rank");
        }
        let verdict = self.choice.verdict();
        writeln!(f, "placement: {name}, {verdict} in {have} a rank; `host plan` says more")?;
        line(f, "", candidates.iter().map(column))?;
        totals(f, "  memory of a rank, GB", "  of the machine's, GB", candidates)?;
        line(f, "  a step, s", candidates.iter().map(|candidate| figure(candidate.cost.step_seconds)))?;
        if candidates.iter().all(|candidate| candidate.fits) {
            return Ok(());
        }
        line(f, "  fits", candidates.iter().map(|candidate| if candidate.fits { "yes" } else { "no" }.to_owned()))
    }
}

impl Choice {
    fn verdict(&self) -> &'static str {
        match (self.chosen().fits, self.candidates.len()) {
            (true, 1) => "fits",
            (true, _) => "the fastest that fits",
            (false, _) => "does not fit",
        }
    }
}

impl Table<'_> {
    fn head(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (question, hardware) = (self.question, self.question.hardware);
        let job = &question.job;
        let ranks = match (question.ranks.world_size, question.ranks.nodes) {
            (1, _) => "1 rank".to_owned(),
            (ranks, 1) => format!("{ranks} ranks"),
            (ranks, nodes) => format!("{ranks} ranks on {nodes} machines"),
        };
        writeln!(
            f,
            "model:    {}, {} parameters, {} trained, {}",
            job.model.architecture,
            count(job.num_parameters()),
            count(job.num_trained()),
            question.plan.dtype
        )?;
        writeln!(f, "hardware: {}; {ranks}, {} for each", hardware.name, gb(self.choice.have_bytes))?;
        writeln!(
            f,
            "rates:    {} TFLOP/s a {}, {} GB/s between ranks, {} GB/s to the disk",
            hardware.tflops,
            if hardware.is_cpu { "machine" } else { "device" },
            if question.ranks.nodes > 1 { hardware.node_link_gb_s } else { hardware.link_gb_s },
            hardware.disk_gb_s
        )?;
        let rows = question.rows.map_or("unknown; `--rows COUNT` gives hours".to_owned(), |rows| rows.to_string());
        let lengths = &question.lengths;
        writeln!(
            f,
            "data:     rows: {rows}; {:.0} tokens a sample, {:.0} % of them labels ({})",
            lengths.mean,
            100.0 * lengths.label_share,
            self.source
        )?;
        writeln!(f, "          largest micro-batch: {:.0} tokens, {:.0} labels", job.tokens, job.labels)?;
        writeln!(f)
    }

    fn memory(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = &self.choice.candidates;
        line(f, "memory of a rank, GB", columns.iter().map(column))?;
        let mut names: Vec<&str> = vec![];
        for part in columns.iter().flat_map(|candidate| &candidate.memory.parts) {
            if !names.contains(&part.name) {
                names.push(part.name);
            }
        }
        for name in names {
            let cell = |candidate: &Candidate| {
                let part = candidate.memory.parts.iter().find(|part| part.name == name);
                part.map_or("-".to_owned(), |part| cell(candidate, part))
            };
            line(f, &format!("  {name}"), columns.iter().map(cell))?;
        }
        totals(f, "  at most", "  of the machine's", columns)?;
        if columns.iter().any(|candidate| candidate.memory.parts.iter().any(|part| !candidate.memory.is_at_peak(part)))
        {
            writeln!(f, "  (parts in brackets are there when less is taken in all)")?;
        }
        writeln!(f)
    }

    fn time(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns: Vec<&Candidate> = self.choice.candidates.iter().chain(self.other).collect();
        let names = columns.iter().enumerate().map(|(index, candidate)| match index < self.choice.candidates.len() {
            true => column(candidate),
            false => "torchtune".to_owned(),
        });
        line(f, "a step", names)?;
        let mut row =
            |label: &str, value: &dyn Fn(&Candidate) -> String| line(f, label, columns.iter().map(|c| value(c)));
        row("  computing, s", &|c| figure(c.cost.compute_seconds))?;
        row("  received by a rank, GB", &|c| figure(c.cost.bytes_received / 1e9))?;
        row("  communicating, s", &|c| figure(c.cost.communication_seconds))?;
        row("  of that while computing, s", &|c| figure(c.cost.hidden_seconds))?;
        row("  seconds", &|c| figure(c.cost.step_seconds))?;
        row("  real tokens a second", &|c| format!("{:.0}", c.cost.tokens_per_second))?;
        row("start, s", &|c| figure(c.cost.start_seconds))?;
        row("a checkpoint, s", &|c| figure(c.cost.save_seconds))?;
        if self.question.rows.is_some() {
            let of = |c: &Candidate, value: fn(&super::cost::RunCost) -> f64| {
                c.cost.run.as_ref().map_or("-".to_owned(), |run| duration(value(run)))
            };
            row("steps an epoch", &|c| {
                c.cost.run.as_ref().map_or("-".to_owned(), |run| run.steps_per_epoch.to_string())
            })?;
            row("an epoch with its checkpoints", &|c| of(c, |run| run.epoch_seconds))?;
            row("start to end", &|c| of(c, |run| run.seconds))?;
        }
        Ok(())
    }
}

/// The device's and the machine's memory at its busiest.
fn totals(f: &mut fmt::Formatter<'_>, device: &str, host: &str, columns: &[Candidate]) -> fmt::Result {
    line(f, device, columns.iter().map(|candidate| figure(candidate.need_bytes / 1e9)))?;
    if columns.iter().any(|candidate| candidate.host_need_bytes > 0.0) {
        line(f, host, columns.iter().map(|candidate| figure(candidate.host_need_bytes / 1e9)))?;
    }
    Ok(())
}

/// The name of a column.
fn column(candidate: &Candidate) -> String {
    match candidate.placement {
        Placement { is_sharded: false, .. } => "replicate".to_owned(),
        Placement { copies: 1, .. } => "shard".to_owned(),
        Placement { copies, .. } => format!("shard x{copies}"),
    }
}

fn cell(candidate: &Candidate, part: &Part) -> String {
    let text = figure(part.bytes / 1e9);
    let text = if part.place == Where::Host { format!("host {text}") } else { text };
    if candidate.memory.is_at_peak(part) { text } else { format!("({text})") }
}

fn line(f: &mut fmt::Formatter<'_>, label: &str, cells: impl Iterator<Item = String>) -> fmt::Result {
    let cells: String = cells.map(|cell| format!("{cell:>COLUMN$}")).collect();
    writeln!(f, "{label:<LABEL$}{cells}")
}

/// Three digits that count.
fn figure(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value if value >= 1.0 => format!("{value:.2}"),
        value if value >= 0.001 => format!("{value:.3}"),
        value => format!("{value:.1e}"),
    }
}

fn duration(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 120.0 => format!("{seconds:.0} s"),
        seconds if seconds < 7200.0 => format!("{:.1} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}

fn count(number: f64) -> String {
    match number {
        number if number >= 1e9 => format!("{:.2} G", number / 1e9),
        number if number >= 1e6 => format!("{:.1} M", number / 1e6),
        number => format!("{number:.0}"),
    }
}

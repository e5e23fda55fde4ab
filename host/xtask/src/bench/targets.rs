//! What has to hold, `design.md` §7: each a ratio of two programs that took turns, or a share.

use std::fmt;

use super::Runs;
use super::costs::Costs;
use super::measure::{Figures, median};
use crate::shell::{Failure, Result};

#[derive(Debug, serde::Serialize)]
pub struct Target {
    what: String,
    value: f64,
    #[serde(flatten)]
    bound: Bound,
    met: bool,
}

#[derive(Clone, Copy, Debug, serde::Serialize)]
#[serde(rename_all = "snake_case")]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// Two seconds to the end of the first step where PEFT takes eight.
const START: Bound = Bound::AtMost(0.25);

pub fn of(runs: &Runs, costs: &Costs) -> Vec<Target> {
    let ratio = |ours: &str, theirs: &str, pick: fn(&Figures) -> f64| {
        let rounds = runs[ours].iter().zip(&runs[theirs]);
        median(rounds.map(|(ours, theirs)| pick(ours) / pick(theirs)).collect())
    };
    let mut targets = vec![];
    for peer in ["torchtune", "peft"] {
        let speed = ratio("host", peer, |f| f.tokens_per_second);
        targets.push(Target::new(format!("tokens/s, host / {peer}"), speed, Bound::AtLeast(2.0)));
        let memory = ratio("host", peer, |f| f.peak_rss_mb);
        targets.push(Target::new(format!("peak memory, host / {peer}"), memory, Bound::AtMost(1.0)));
    }
    let processes = ratio("host x2", "host", |f| f.tokens_per_second);
    targets.push(Target::new("tokens/s, 2 processes / 1", processes, Bound::AtLeast(0.9)));
    let theirs = ratio("host x2", "torchtune x2", |f| f.tokens_per_second);
    targets.push(Target::new("tokens/s, 2 processes, host / torchtune", theirs, Bound::AtLeast(5.0)));
    let shared = ratio("host full x2", "host full", |f| f.tokens_per_second);
    targets.push(Target::new("tokens/s, all weights, 2 processes that share them / 1", shared, Bound::AtLeast(0.7)));
    let theirs = ratio("host full x2", "torchtune full x2", |f| f.tokens_per_second);
    targets.push(Target::new("tokens/s, all weights, 2 processes, host / torchtune", theirs, Bound::AtLeast(2.0)));
    let start = ratio("host", "peft", |f| f.seconds_to_first_step);
    targets.push(Target::new("start to the end of the first step, host / peft", start, START));
    let [cold, cached] = costs.data_path.ratios();
    targets.push(Target::new("rows/s from a file to packs, host / torchtune", cold, Bound::AtLeast(2.0)));
    targets.push(Target::new("the same again, from the cache", cached, Bound::AtLeast(20.0)));
    for (kind, share) in &costs.script_share {
        targets.push(Target::new(format!("share of a step, {kind} recipe"), *share, Bound::AtMost(0.005)));
    }
    for (kind, share) in &costs.preference_share {
        targets.push(Target::new(
            format!("share of a step of preferences, {kind} recipe"),
            *share,
            Bound::AtMost(0.02),
        ));
    }
    targets
}

/// Fails with those that were missed.
pub fn check(targets: &[Target]) -> Result<()> {
    let missed: Vec<_> = targets.iter().filter(|target| !target.met).collect();
    if missed.is_empty() {
        return Ok(());
    }
    let failure = Failure::new(format!("{} of {} targets are missed", missed.len(), targets.len()));
    Err(missed.iter().fold(failure, |failure, target| failure.cause(target)))
}

impl Target {
    fn new(what: impl Into<String>, value: f64, bound: Bound) -> Self {
        let met = match bound {
            Bound::AtLeast(least) => value >= least,
            Bound::AtMost(most) => value <= most,
        };
        Self { what: what.into(), value, bound, met }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bound = match self.bound {
            Bound::AtLeast(least) => format!("at least {least}"),
            Bound::AtMost(most) => format!("at most {most}"),
        };
        // Three digits that count, for shares and for ratios.
        let digits = if self.value < 0.1 { 5 } else { 2 };
        let verdict = if self.met { "met" } else { "MISSED" };
        write!(f, "{:<48} {:>8.digits$}   {bound:<14} {verdict}", self.what, self.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missed_fails_and_is_named() {
        let met = [Target::new("speed", 2.0, Bound::AtLeast(2.0)), Target::new("memory", 1.0, Bound::AtMost(1.0))];
        assert!(check(&met).is_ok());
        // A run that produced no number has met nothing.
        for (value, bound) in [(1.99, Bound::AtLeast(2.0)), (2.01, Bound::AtMost(2.0)), (f64::NAN, Bound::AtMost(2.0))]
        {
            let failure = check(&[Target::new("speed", value, bound)]).unwrap_err().to_string();
            assert!(failure.contains("1 of 1 targets") && failure.contains("speed"), "{failure}");
        }
    }
}

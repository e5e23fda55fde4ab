//! A recipe runs on every rank, and what it asks for that needs all ranks has to be asked for by all, in the same order. Before
//! each such call the ranks tell each other what they are about to do, so that a recipe that goes another way on one of them
//! ends the run at once, and on all of them with the same words, where a collective would wait for its timeout.

use std::collections::BTreeMap;
use std::fmt;

use host::error::Location;
use host::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::dist::{self, Group};
use crate::train::{Over, Which};

/// What a rank is about to do with the others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Call {
    /// At which learning rate.
    FinishStep { rate: f64 },
    /// So many numbers over all ranks.
    Read { over: Over, numbers: usize },
    /// Work of a model that ranks share.
    Compute { work: Work, which: Which },
    /// The recipe has returned.
    Leave,
}

/// What ranks that share a model do together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Work {
    Loss,
    Logits,
    LogitsPart,
    LogProbs,
    Backward,
}

impl Work {
    const ALL: [Self; 5] = [Self::Loss, Self::Logits, Self::LogitsPart, Self::LogProbs, Self::Backward];
}

/// A rank's call, and what else it has to say each time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Arrival {
    pub call: Call,
    /// Steps done.
    pub step: usize,
    /// Whether the next one is under way.
    pub in_step: bool,
    /// What this rank has to do for the step under way took so long.
    pub seconds: f64,
    /// This rank still writes its piece of the checkpoint under way.
    pub is_saving: bool,
    /// This rank cannot go on, and says why itself.
    pub has_failed: bool,
}

/// Where in a recipe a call stands, as far as the recipe tells.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Place {
    pub location: Option<Location>,
    pub function: Option<String>,
}

/// The calls of all ranks, which are not the same.
pub struct Apart(Vec<Arrival>);

/// What came of telling each other.
pub enum Met {
    Together(Vec<Arrival>),
    Apart(Apart),
}

/// Tells the others what this rank is about to do. Costs one exchange of a few bytes.
pub fn meet(group: &Group, mine: Arrival) -> Result<Met> {
    let all: Vec<Arrival> = group.gather(&mine.numbers())?.iter().map(|numbers| Arrival::read(numbers)).collect();
    let failed = all.iter().position(|rank| rank.has_failed);
    if let Some(rank) = failed.filter(|rank| *rank != group.rank) {
        return Err(dist::stopped(format!("rank {rank} failed")));
    }
    let is_same = |other: &Arrival| (other.call, other.step) == (all[0].call, all[0].step);
    Ok(if all.iter().all(is_same) { Met::Together(all) } else { Met::Apart(Apart(all)) })
}

impl Arrival {
    fn numbers(&self) -> [i64; 7] {
        let (kind, argument) = match self.call {
            Call::FinishStep { rate } => (0, rate.to_bits() as i64),
            Call::Read { over, numbers } => (1 + over as i64, numbers as i64),
            Call::Compute { work, which } => (-2 - work as i64, which as i64),
            Call::Leave => (-1, 0),
        };
        let [in_step, is_saving, has_failed] = [self.in_step, self.is_saving, self.has_failed].map(i64::from);
        [kind, argument, self.step as i64, in_step, self.seconds.to_bits() as i64, is_saving, has_failed]
    }

    fn read(numbers: &[i64]) -> Self {
        let call = match numbers[0] {
            -1 => Call::Leave,
            0 => Call::FinishStep { rate: f64::from_bits(numbers[1] as u64) },
            work if work < 0 => {
                Call::Compute { work: Work::ALL[(-2 - work) as usize], which: Which::ALL[numbers[1] as usize] }
            }
            over => Call::Read { over: Over::ALL[over as usize - 1], numbers: numbers[1] as usize },
        };
        let [in_step, is_saving, has_failed] = [3, 5, 6].map(|at: usize| numbers[at] != 0);
        let (step, seconds) = (numbers[2] as usize, f64::from_bits(numbers[4] as u64));
        Self { call, step, in_step, seconds, is_saving, has_failed }
    }

    fn text(&self, with_rate: bool) -> String {
        let next = self.step + 1;
        let when = if self.in_step { format!("in step {next}") } else { format!("after step {}", self.step) };
        match self.call {
            Call::FinishStep { rate } if with_rate => format!("end of step {next}, at a learning rate of {rate}"),
            Call::FinishStep { .. } => format!("end of step {next}"),
            Call::Read { over, numbers } => {
                let what = if numbers == 1 { "a number".to_owned() } else { format!("{numbers} numbers") };
                format!("reading of {what} over all ranks ({}), {when}", over.name())
            }
            Call::Compute { work, which } => {
                let what = match work {
                    Work::Loss => "loss",
                    Work::Logits => "logits",
                    Work::LogitsPart => "logits_part",
                    Work::LogProbs => "log_probs",
                    Work::Backward => return format!("backward of a sum, {when}"),
                };
                let of = match which {
                    Which::Trained => "model",
                    Which::Reference => "reference",
                    Which::Teacher => "teacher",
                };
                format!("`{what}` of a batch by the {of}, {when}")
            }
            Call::Leave => format!("return from the recipe, {when}"),
        }
    }
}

impl Apart {
    /// The same error on every rank, once each has told where in the recipe it is.
    pub fn error(&self, group: &Group, mine: &Place) -> Error {
        let text = serde_json::to_string(mine).unwrap_or_default();
        // A rank that dies now leaves the others without its line.
        let places = group.texts(&text).unwrap_or_default();
        let places: Vec<Place> = places.iter().map(|text| serde_json::from_str(text).unwrap_or_default()).collect();
        self.describe(&places)
    }

    fn describe(&self, places: &[Place]) -> Error {
        let Self(arrivals) = self;
        let mut rates = arrivals.iter().filter_map(|rank| match rank.call {
            Call::FinishStep { rate } => Some(rate),
            _ => None,
        });
        let first_rate = rates.next();
        let with_rate = rates.any(|rate| Some(rate) != first_rate);
        // Of many ranks most do the same.
        let mut groups: Vec<(String, Place, Vec<usize>)> = vec![];
        for (rank, arrival) in arrivals.iter().enumerate() {
            let (text, place) = (arrival.text(with_rate), places.get(rank).cloned().unwrap_or_default());
            match groups.iter_mut().find(|(known, at, _)| *known == text && *at == place) {
                Some((_, _, ranks)) => ranks.push(rank),
                None => groups.push((text, place, vec![rank])),
            }
        }
        let mut error = Error::run("the recipe did not do the same on all ranks");
        let mut lines = BTreeMap::new();
        for (text, place, ranks) in groups {
            let noun = if ranks.len() == 1 { "rank" } else { "ranks" };
            let ranks = ranks.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
            let at = match (&place.location, &place.function) {
                (Some(at), _) => format!(", at {at}"),
                (None, Some(function)) => format!(", in `{function}`"),
                (None, None) => String::new(),
            };
            if let Some(at) = place.location {
                lines.insert((at.line, at.column), at);
            }
            error = error.cause(format!("{noun} {ranks}: {text}{at}"));
        }
        error.locations = lines.into_values().collect();
        error
            .hint("batches differ from rank to rank: decide by what is the same on all, such as a number read with `item(\"sum\")`")
    }
}

/// Time that ranks lose because another one has more to do for a step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Waiting {
    /// Of a rank, on average.
    lost: f64,
    /// Of the slowest rank in each step.
    total: f64,
}

impl Waiting {
    /// Adds a step, for which the ranks needed so many seconds.
    pub fn add(&mut self, seconds: impl ExactSizeIterator<Item = f64> + Clone) {
        let slowest = seconds.clone().fold(0.0, f64::max);
        self.lost += slowest - seconds.clone().sum::<f64>() / seconds.len() as f64;
        self.total += slowest;
    }
}

impl fmt::Display for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { lost, total } = self;
        let share = if *total > 0.0 { 100.0 * lost / total } else { 0.0 };
        write!(f, "a rank waited {lost:.2} s of {total:.2} s ({share:.1}%) for the slowest one, on average")
    }
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use super::*;

    fn finish(step: usize, rate: f64) -> Arrival {
        Arrival {
            call: Call::FinishStep { rate },
            step,
            in_step: true,
            seconds: 0.5,
            is_saving: false,
            has_failed: false,
        }
    }

    fn at(line: usize) -> Place {
        Place { location: Some(Location { file: "own.rhai".into(), line: Some(line), column: None }), function: None }
    }

    #[test]
    fn what_is_told_is_what_is_heard() {
        for call in [
            Call::FinishStep { rate: 3e-4 },
            Call::Read { over: Over::Mean, numbers: 7 },
            Call::Read { over: Over::Max, numbers: 0 },
            Call::Compute { work: Work::Loss, which: Which::Teacher },
            Call::Compute { work: Work::Backward, which: Which::Trained },
            Call::Leave,
        ] {
            let arrival = Arrival { call, step: 41, in_step: false, seconds: 0.25, is_saving: true, has_failed: false };
            assert_eq!(Arrival::read(&arrival.numbers()), arrival);
        }
    }

    #[test]
    fn what_is_lost_is_up_to_the_slowest() {
        let mut waiting = Waiting::default();
        waiting.add([1.0, 3.0].into_iter());
        waiting.add([2.0, 2.0].into_iter());
        assert_snapshot!(waiting, @"a rank waited 1.00 s of 5.00 s (20.0%) for the slowest one, on average");
    }

    #[test]
    fn ranks_that_do_the_same_share_a_line() {
        let read = Arrival { call: Call::Read { over: Over::Sum, numbers: 1 }, ..finish(2, 0.1) };
        let apart = Apart(vec![finish(2, 0.1), read, finish(2, 0.1)]);
        assert_snapshot!(apart.describe(&[at(9), at(7), at(9)]), @r#"
        error: the recipe did not do the same on all ranks
          --> own.rhai:7
          --> own.rhai:9
        cause: ranks 0, 2: end of step 3, at own.rhai:9
        cause: rank 1: reading of a number over all ranks (sum), in step 3, at own.rhai:7
        hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
        "#);
    }

    #[test]
    fn another_rate_is_told() {
        assert_snapshot!(Apart(vec![finish(2, 0.1), finish(2, 0.2)]).describe(&[]), @r#"
        error: the recipe did not do the same on all ranks
        cause: rank 0: end of step 3, at a learning rate of 0.1
        cause: rank 1: end of step 3, at a learning rate of 0.2
        hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
        "#);
    }

    #[test]
    fn another_step_is_told() {
        let leave = Arrival { call: Call::Leave, in_step: false, ..finish(3, 0.0) };
        let named = Place { location: None, function: Some("main".into()) };
        assert_snapshot!(Apart(vec![leave, finish(2, 0.1)]).describe(&[Place::default(), named]), @r#"
        error: the recipe did not do the same on all ranks
        cause: rank 0: return from the recipe, after step 3
        cause: rank 1: end of step 3, in `main`
        hint: batches differ from rank to rank: decide by what is the same on all, such as a number read with `item("sum")`
        "#);
    }
}

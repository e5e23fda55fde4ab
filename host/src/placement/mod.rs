//! What each rank holds of the model: all of it, or a shard, and what of a forward it keeps.
//!
//! Pure: a [`Job`] is the sizes of a run, [`Memory`] what a rank takes, [`Cost`] how long a step takes, [`choose`] the
//! cheapest placement that fits. `host plan` prints what it goes by.

mod at_hand;
mod choice;
pub mod cost;
mod job;
pub mod memory;

pub use at_hand::at_hand;
pub use choice::{Candidate, Choice, Question, choose, gb};
pub use cost::{Cost, Ranks, Way};
pub use job::{Job, Lengths};
pub use memory::Memory;

use crate::config::plan::{Parallel, PlacementPlan};
use crate::{Error, Result};

#[cfg(test)]
mod tests;

/// What was decided; the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Placement {
    pub is_sharded: bool,
    /// Shards: a block is freed after its forward, and gathered again for backward.
    pub reshard_after_forward: bool,
    /// Shards are kept in the machine's memory.
    pub cpu_offload: bool,
    /// Every n-th block's activations are computed again in backward; none: all are kept.
    pub checkpoint_every: Option<usize>,
}

impl Placement {
    /// What a plan says, `sharded` where it leaves that open.
    pub fn new(plan: &PlacementPlan, is_sharded: bool) -> Self {
        Self {
            is_sharded,
            reshard_after_forward: is_sharded && plan.reshard_after_forward,
            cpu_offload: is_sharded && plan.cpu_offload,
            checkpoint_every: plan.checkpoint_every,
        }
    }

    /// Those that a plan leaves open, for a number of ranks; the plainest first.
    pub fn open_to(plan: &PlacementPlan, world_size: usize) -> Result<Vec<Self>> {
        if let Some(ranks) = plan.shard_ranks
            && ranks != world_size
        {
            let what = format!("`data_parallel_shard_dim` is {ranks}, and there are {world_size} ranks");
            return Err(Error::config(what).hint(
                "set it to -1, which is as many as there are: several copies that are sharded each are not available",
            ));
        }
        let sharded: &[bool] = match plan.parallel {
            Parallel::Replicate => &[false],
            Parallel::Shard => &[true],
            Parallel::Auto if world_size == 1 => &[false],
            Parallel::Auto => &[false, true],
        };
        Ok(sharded.iter().map(|is_sharded| Self::new(plan, *is_sharded)).collect())
    }

    /// As a person says it: `shard, resharded after forward, …`.
    pub fn describe(&self) -> String {
        let mut words = vec![if self.is_sharded { "shard" } else { "replicate" }.to_owned()];
        if self.is_sharded && !self.reshard_after_forward {
            words.push("kept gathered".to_owned());
        }
        if self.cpu_offload {
            words.push("in CPU memory".to_owned());
        }
        words.extend(self.checkpoint_every.map(|every| match every {
            1 => "activations recomputed".to_owned(),
            _ => format!("activations of every {every}th block recomputed"),
        }));
        words.join(", ")
    }
}

//! What each rank holds of the model: all of it, or a shard, and what of a forward it keeps.
//!
//! Pure: a [`Job`] is the sizes of a run, [`Memory`] what a rank takes, [`Cost`] how long a step takes, [`choose`] the
//! cheapest placement that fits. `host plan` prints what it goes by.

mod at_hand;
mod choice;
pub mod cost;
mod job;
pub mod memory;
mod table;

pub use at_hand::at_hand;
pub use choice::{Candidate, Choice, Question, choose, gb};
pub use cost::{Cost, Ranks, Way};
pub use job::{Job, Lengths};
pub use memory::Memory;
pub use table::{Summary, Table};

use crate::config::plan::{Parallel, PlacementPlan};
use crate::{Error, Result};

#[cfg(test)]
mod tests;

/// What was decided; the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Placement {
    pub is_sharded: bool,
    /// Shards: how many copies of the model there are, each over as many ranks; 1 where ranks have it whole.
    pub copies: usize,
    /// Shards: a block is freed after its forward, and gathered again for backward.
    pub reshard_after_forward: bool,
    /// Shards are kept in the machine's memory.
    pub cpu_offload: bool,
    /// Every n-th block's activations are computed again in backward; none: all are kept.
    pub checkpoint_every: Option<usize>,
}

impl Placement {
    /// What a plan says, with ranks that have the whole model, or sharded as so many copies.
    pub fn new(plan: &PlacementPlan, copies: Option<usize>) -> Self {
        let is_sharded = copies.is_some();
        Self {
            is_sharded,
            copies: copies.unwrap_or(1),
            reshard_after_forward: is_sharded && plan.reshard_after_forward,
            cpu_offload: is_sharded && plan.cpu_offload,
            checkpoint_every: plan.checkpoint_every,
        }
    }

    /// Those that a plan leaves open; the plainest first.
    pub fn open_to(plan: &PlacementPlan, ranks: Ranks) -> Result<Vec<Self>> {
        let world_size = ranks.world_size;
        let mut sharded = vec![copies(plan, world_size)?];
        // A copy on each machine: what is gathered stays on the faster links.
        let is_open = plan.copies.is_none() && plan.shard_ranks.is_none();
        if plan.parallel == Parallel::Auto && is_open && ranks.nodes > 1 && world_size > ranks.nodes {
            sharded.extend(world_size.is_multiple_of(ranks.nodes).then_some(ranks.nodes));
        }
        let all_whole = plan.copies.is_some_and(|copies| copies > 1 && copies == world_size);
        if all_whole && plan.cpu_offload {
            let what = format!(
                "`data_parallel_replicate_dim` is {world_size}, as many as there are ranks, so that each has the model whole, and `fsdp_cpu_offload` is for shards"
            );
            return Err(Error::config(what).hint("leave one of them out, or have fewer copies"));
        }
        let open = match plan.parallel {
            Parallel::Replicate => vec![None],
            _ if all_whole => vec![None],
            Parallel::Shard => sharded.into_iter().map(Some).collect(),
            Parallel::Auto if world_size == 1 => vec![None],
            Parallel::Auto => std::iter::once(None).chain(sharded.into_iter().map(Some)).collect(),
        };
        Ok(open.into_iter().map(|copies| Self::new(plan, copies)).collect())
    }

    /// Ranks that share a copy.
    pub fn shard_ranks(&self, world_size: usize) -> usize {
        if self.is_sharded { world_size / self.copies } else { 1 }
    }

    /// As a person says it: `shard, resharded after forward, …`.
    pub fn describe(&self) -> String {
        let mut words = vec![if self.is_sharded { "shard" } else { "replicate" }.to_owned()];
        if self.copies > 1 {
            words.push(format!("{} copies", self.copies));
        }
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

/// As how many copies `world_size` ranks share a model by the plan's keys.
fn copies(plan: &PlacementPlan, world_size: usize) -> Result<usize> {
    let copies = plan.copies.unwrap_or(1);
    if copies * plan.shard_ranks.unwrap_or(world_size / copies) == world_size {
        return Ok(copies);
    }
    let what = match plan.shard_ranks {
        Some(ranks) => format!(
            "`data_parallel_shard_dim` is {ranks}, `data_parallel_replicate_dim` {copies}, and there are {world_size} ranks"
        ),
        None => format!("`data_parallel_replicate_dim` is {copies}, and there are {world_size} ranks"),
    };
    Err(Error::config(what).hint(
        "`data_parallel_replicate_dim` × `data_parallel_shard_dim` has to be the number of ranks; the latter as -1 is what is left",
    ))
}

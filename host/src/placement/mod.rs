//! What each rank holds of the model: all of it, or a shard, and what of a forward it keeps.

use crate::config::plan::{Parallel, PlacementPlan};
use crate::{Error, Result};

/// What was decided; the same on every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Decides for a number of ranks.
    pub fn decide(plan: &PlacementPlan, world_size: usize) -> Result<Self> {
        if let Some(ranks) = plan.shard_ranks
            && ranks != world_size
        {
            let what = format!("`data_parallel_shard_dim` is {ranks}, and there are {world_size} ranks");
            return Err(Error::config(what).hint(
                "set it to -1, which is as many as there are: several copies that are sharded each are not available",
            ));
        }
        let is_sharded = plan.parallel == Parallel::Shard;
        Ok(Self {
            is_sharded,
            reshard_after_forward: is_sharded && plan.reshard_after_forward,
            cpu_offload: is_sharded && plan.cpu_offload,
            checkpoint_every: plan.checkpoint_every,
        })
    }
}

//! The keys that say what each rank holds of the model: ours, and torchtune's for FSDP and activation checkpointing.

use super::super::Notice;
use super::super::plan::{Parallel, PlacementPlan};
use super::super::section::{Found, Section};

pub fn placement(root: &Section<'_>, notices: &mut Vec<Notice>) -> Found<PlacementPlan> {
    let checkpoint_every = checkpoint_every(root);
    let shard_ranks = shard_ranks(root);
    let wanted = match root.get::<String>("parallel")?.as_str() {
        "shard" => Parallel::Shard,
        "replicate" => Parallel::Replicate,
        _ => Parallel::Auto,
    };
    let cpu_offload: bool = root.get("fsdp_cpu_offload")?;
    let reshard_after_forward: bool = root.get("fsdp_reshard_after_forward")?;
    let (shard_ranks, copies) = (shard_ranks?, root.get::<Option<usize>>("data_parallel_replicate_dim")?);
    let has_copies = copies.is_some_and(|copies| copies > 1);
    let parallel = match (wanted, shard_ranks) {
        (Parallel::Shard, Some(1)) => {
            let what = "`parallel: shard`, and `data_parallel_shard_dim: 1` gives each rank a copy of the model";
            return Err(root.fail("data_parallel_shard_dim", what, "leave one of them out"));
        }
        // Who says how many ranks share a copy wants it shared.
        (Parallel::Auto, Some(ranks)) => {
            if ranks > 1 {
                Parallel::Shard
            } else {
                Parallel::Replicate
            }
        }
        (Parallel::Auto, None) if cpu_offload || has_copies => Parallel::Shard,
        (wanted, _) => wanted,
    };
    if parallel == Parallel::Replicate {
        let of_shards = [
            ("fsdp_cpu_offload", cpu_offload),
            ("fsdp_reshard_after_forward", !reshard_after_forward),
            ("data_parallel_shard_dim", shard_ranks.is_some_and(|ranks| ranks > 1)),
            ("data_parallel_replicate_dim", has_copies && shard_ranks != Some(1)),
        ];
        notices.extend(of_shards.into_iter().filter(|(_, is_given)| *is_given).map(|(key, _)| Notice {
            message: format!("`{key}` changes nothing here: `parallel: replicate` gives every rank the whole model"),
            location: root.reader.config.locate(key),
        }));
    }
    Ok(PlacementPlan {
        parallel,
        reshard_after_forward,
        cpu_offload,
        checkpoint_every: checkpoint_every?,
        shard_ranks: shard_ranks.filter(|_| parallel == Parallel::Shard),
        copies: copies.filter(|_| parallel != Parallel::Replicate),
    })
}

/// None where as many ranks share a copy as there are.
fn shard_ranks(root: &Section<'_>) -> Found<Option<usize>> {
    let ranks: f64 = root.get("data_parallel_shard_dim")?;
    match ranks {
        -1.0 => Ok(None),
        _ if ranks >= 1.0 && ranks.fract() == 0.0 => Ok(Some(ranks as usize)),
        _ => {
            let what = format!("`data_parallel_shard_dim` must be -1 or a whole number, at least 1, found {ranks}");
            Err(root.fail("data_parallel_shard_dim", what, "-1 shards over all ranks"))
        }
    }
}

fn checkpoint_every(root: &Section<'_>) -> Found<Option<usize>> {
    let all: bool = root.get("enable_activation_checkpointing")?;
    let mode: Option<String> = root.get("ac_mode")?;
    let option = root.node("ac_option")?;
    if all && mode.is_some() {
        // With which torchtune would keep everything, and say nothing.
        let what = "`enable_activation_checkpointing` and `ac_mode` both say what is computed again";
        return Err(root.fail("ac_mode", what, "leave one of them out"));
    }
    match mode.as_deref() {
        Some("full") => Ok(Some(1)),
        Some("selective") => match option.and_then(|node| node.to_value().as_u64()) {
            Some(every @ 1..) => Ok(Some(every as usize)),
            _ => {
                let found = option.map_or("nothing".to_owned(), |node| node.describe());
                let what = format!("`ac_mode: selective` needs a number of blocks as `ac_option`, found {found}");
                Err(root.fail("ac_option", what, "`ac_option: 2` computes every second block again"))
            }
        },
        _ => Ok(all.then_some(1)),
    }
}

//! The keys that say what each rank holds of the model.

use super::super::super::plan::{Parallel, PlacementPlan};
use super::{check_mistake, notices, plan};

fn placement(overrides: &[&str]) -> PlacementPlan {
    plan(overrides).placement
}

#[test]
fn torchtunes_keys_of_sharding_are_ours() {
    let plain = PlacementPlan {
        parallel: Parallel::Auto,
        reshard_after_forward: true,
        cpu_offload: false,
        checkpoint_every: None,
        shard_ranks: None,
        copies: None,
    };
    assert_eq!(placement(&[]), plain);
    let parallel = |overrides: &[&str]| placement(overrides).parallel;
    assert_eq!(parallel(&["parallel=shard"]), Parallel::Shard);
    assert_eq!(parallel(&["fsdp_cpu_offload=True"]), Parallel::Shard);
    assert_eq!(parallel(&["data_parallel_shard_dim=1"]), Parallel::Replicate);
    assert_eq!(parallel(&["data_parallel_shard_dim=1", "data_parallel_replicate_dim=4"]), Parallel::Replicate);
    let four = PlacementPlan { parallel: Parallel::Shard, shard_ranks: Some(4), ..plain.clone() };
    assert_eq!(placement(&["data_parallel_shard_dim=4"]), four);
    let kept = PlacementPlan { reshard_after_forward: false, ..plain.clone() };
    assert_eq!(placement(&["fsdp_reshard_after_forward=False"]), kept);

    let two = PlacementPlan { parallel: Parallel::Shard, copies: Some(2), ..plain.clone() };
    assert_eq!(placement(&["data_parallel_replicate_dim=2"]), two);
    assert_eq!(
        placement(&["data_parallel_replicate_dim=2", "data_parallel_shard_dim=4"]),
        PlacementPlan { shard_ranks: Some(4), ..two }
    );
    check_mistake(&["data_parallel_replicate_dim=0"], "`data_parallel_replicate_dim`");
    check_mistake(&["parallel=shard", "data_parallel_shard_dim=1"], "`data_parallel_shard_dim: 1` gives each rank");
    check_mistake(&["data_parallel_shard_dim=1.5"], "`data_parallel_shard_dim` must be -1 or a whole number");
}

#[test]
fn replicated_ranks_have_nothing_to_shard() {
    let quiet: [&[&str]; 2] = [&["parallel=replicate"], &["parallel=shard", "fsdp_cpu_offload=True"]];
    assert!(quiet.iter().all(|overrides| notices(overrides).is_empty()));
    let told = notices(&["parallel=replicate", "fsdp_cpu_offload=True", "data_parallel_shard_dim=2"]);
    assert_eq!(
        told,
        ["fsdp_cpu_offload", "data_parallel_shard_dim"]
            .map(|key| format!("`{key}` changes nothing here: `parallel: replicate` gives every rank the whole model"))
    );
}

#[test]
fn activations_are_computed_again_as_torchtune_says() {
    let every = |overrides: &[&str]| placement(overrides).checkpoint_every;
    assert_eq!(every(&["enable_activation_checkpointing=True"]), Some(1));
    assert_eq!(every(&["ac_mode=full"]), Some(1));
    assert_eq!(every(&["ac_mode=selective", "ac_option=2"]), Some(2));
    assert_eq!(every(&["ac_mode=none", "ac_option=2"]), None);
    check_mistake(
        &["ac_mode=selective"],
        "`ac_mode: selective` needs a number of blocks as `ac_option`, found nothing",
    );
    check_mistake(&["ac_mode=selective", "ac_option=op"], "found the text `op`");
    check_mistake(&["ac_mode=full", "enable_activation_checkpointing=True"], "both say what is computed again");
}

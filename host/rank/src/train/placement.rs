//! What each rank is to hold of the model: decided by rank 0, from the data as it is and the memory that is free, for all.

use host::config::plan::{Parallel, TrainPlan};
use host::data::Tokenized;
use host::placement::{self, Choice, Job, Lengths, Placement, Question, Ranks, Summary};
use host::worker::WorkerEnv;
use host::{Error, Result};

use crate::dist::Group;

pub fn decide(plan: &TrainPlan, data: &Tokenized, env: &WorkerEnv, group: &Group) -> Result<Placement> {
    let decided = group.is_main().then(|| on_main(plan, data, env));
    let text = match group.after_main("place the model", decided)? {
        Some(placement) => {
            serde_json::to_vec(&placement).map_err(|error| Error::bug("a placement is JSON").cause(error))?
        }
        None => vec![],
    };
    let text = group.from_main(&text)?;
    serde_json::from_slice(&text).map_err(|error| Error::bug("rank 0 sent no placement").cause(error))
}

fn on_main(plan: &TrainPlan, data: &Tokenized, env: &WorkerEnv) -> Result<Placement> {
    let ranks = Ranks { world_size: env.world_size, nodes: env.world_size.div_ceil(env.local_world_size.max(1)) };
    let open = Placement::open_to(&plan.placement, ranks)?;
    // How much a GPU has is not known everywhere.
    let Ok(hardware) = placement::at_hand(plan.device, plan.dtype) else { return Ok(open[0]) };
    let lengths = Lengths::of(data);
    let question = Question {
        job: Job::of(plan, &lengths)?,
        plan,
        hardware: &hardware,
        ranks,
        lengths,
        rows: Some(data.len() as f64),
    };
    let choice = placement::choose(&question)?;
    choice.check(&question)?;
    say(&choice, plan, env.world_size);
    Ok(choice.chosen().placement)
}

/// What it was decided by. A run whose config decides says it only where it may not fit.
fn say(choice: &Choice, plan: &TrainPlan, world_size: usize) {
    let summary = Summary { choice, world_size }.to_string();
    let summary = summary.trim_end();
    if !choice.chosen().fits {
        tracing::warn!("the run may not fit\n{summary}");
    } else if plan.placement.parallel == Parallel::Auto {
        tracing::info!("{summary}");
    } else {
        tracing::debug!("{summary}");
    }
}

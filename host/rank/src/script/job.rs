//! A training plan from its guests to the end of its run.

use host::config::plan::{DatasetPlan, GuestLimits, GuestRef, TokenizerPlan, TrainPlan};
use host::data::template::Templates;
use host::worker::{StopFlag, WorkerEnv};
use host::{Error, Result};

use super::loss::LossGuest;
use super::{Recipe, open_template};
use crate::train::{Inputs, Run};

/// Loads the guests, opens the run and lets the recipe drive it. The guests come first: a mistake in them costs no model.
pub fn train(plan: TrainPlan, env: &WorkerEnv, stop: StopFlag) -> Result<()> {
    let recipe = Recipe::load(&plan.recipe, &plan.limits)?;
    let loss = plan.loss.guest.as_ref().map(|guest| LossGuest::load(guest, &plan.limits)).transpose()?;
    let digest = std::iter::once(recipe.digest()).chain(loss.as_ref().map(LossGuest::digest)).collect();
    let loss = loss.map(|loss| loss.open()).transpose()?;
    let inputs = Inputs {
        env: env.clone(),
        templates: templates(&plan.dataset, &plan.tokenizer, &plan.limits)?,
        templates_val: templates(&plan.dataset_val, &plan.tokenizer, &plan.limits)?,
        stop: stop.clone(),
        recipe_digest: digest,
        loss,
    };
    let run = Run::open(plan, inputs)?;
    let interruption = run.interruption();
    recipe.run(Box::new(run), stop)?;
    match interruption.get() {
        None => Ok(()),
        Some(step) => Err(Error::interrupted(format!("stopped after step {step}; the checkpoint is saved"))
            .hint("go on with `resume_from_checkpoint=True`")),
    }
}

/// The templates of each data set: its own, and the tokenizer section's.
pub fn templates(datasets: &[DatasetPlan], tokenizer: &TokenizerPlan, limits: &GuestLimits) -> Result<Vec<Templates>> {
    let open = |guest: &GuestRef| open_template(guest, limits);
    let of = |dataset: &DatasetPlan| {
        let own = dataset.rows.template().map(|own| open(&own.guest)).transpose()?;
        Ok(Templates { own, prompt: tokenizer.prompt_template.as_ref().map(open).transpose()? })
    };
    datasets.iter().map(of).collect()
}

//! Loops over a run: iterators, and the macro that makes a function a recipe.

use crate::{Batch, CallError, Error, Result, Run, Step, Value};

/// The steps of a run; see [`Run::steps`].
pub struct Steps<'a> {
    run: &'a Run,
    ended: bool,
}

/// The micro-batches of a step on this rank; see [`Step::batches`].
pub struct Batches<'a> {
    step: &'a Step,
    ended: bool,
}

impl Run {
    /// The steps that are left, until the run is complete or was asked to stop. After an error there are no more.
    pub fn steps(&self) -> Steps<'_> {
        Steps { run: self, ended: false }
    }

    /// A number of the config by dotted path, such as `loss.beta`.
    ///
    /// # Errors
    /// There is no such key, or it holds something else.
    pub fn number(&self, key: &str) -> Result<f64> {
        match self.config(key)? {
            Value::Int(value) => Ok(value as f64),
            Value::Num(value) => Ok(value),
            _ => Err(Error::new(format!("`{key}` must be a number"))),
        }
    }
}

impl Step {
    /// The micro-batches of this step on this rank. After an error there are no more.
    pub fn batches(&self) -> Batches<'_> {
        Batches { step: self, ended: false }
    }
}

impl Iterator for Steps<'_> {
    type Item = Result<Step, CallError>;

    fn next(&mut self) -> Option<Self::Item> {
        pull(&mut self.ended, || self.run.next_step())
    }
}

impl Iterator for Batches<'_> {
    type Item = Result<Batch, CallError>;

    fn next(&mut self) -> Option<Self::Item> {
        pull(&mut self.ended, || self.step.next_batch())
    }
}

fn pull<T, E>(ended: &mut bool, next: impl FnOnce() -> Result<Option<T>, E>) -> Option<Result<T, E>> {
    if *ended {
        return None;
    }
    let item = next().transpose();
    *ended = !matches!(item, Some(Ok(_)));
    item
}

/// Makes a function `fn() -> host_sdk::Result<()>` the recipe of this crate.
#[macro_export]
macro_rules! recipe {
    ($main:path) => {
        struct HostSdkRecipe;

        impl $crate::bindings::Guest for HostSdkRecipe {
            fn main() -> ::std::result::Result<(), $crate::bindings::host::sdk::types::Failure> {
                $main().map_err($crate::export::into_failure)
            }
        }

        $crate::bindings::export_recipe!(HostSdkRecipe with_types_in $crate::bindings);
    };
}

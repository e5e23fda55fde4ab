//! Losses: a trait, and the macro that makes a type the loss of a crate.

use std::cell::RefCell;

use crate::bindings::host::sdk::types::{Failure, Setting};
use crate::error::into_failure;
use crate::{Error, Result, Settings, Tensor, WeightedLoss};

/// How far a model's scores are from what they should be.
///
/// ```ignore
/// use host_sdk::prelude::*;
///
/// struct Squared;
///
/// impl Loss for Squared {
///     fn configure(_settings: &Settings) -> Result<Self> {
///         Ok(Squared)
///     }
///
///     fn compute(&self, logits: &Tensor, labels: &Tensor) -> Result<WeightedLoss> {
///         let wrong = logits.softmax(-1)?.gather(-1, &labels.unsqueeze(-1)?)?.neg()?.add_scalar(1.0)?;
///         Ok(WeightedLoss { sum: wrong.mul(&wrong)?.sum()?, weight: labels.shape()[0] as f64 })
///     }
/// }
///
/// host_sdk::loss!(Squared);
/// ```
pub trait Loss: Sized {
    /// Called once, before any batch, with the other keys of the config's `loss` section.
    fn configure(settings: &Settings) -> Result<Self>;

    /// The loss of a micro-batch, from scores (32-bit floats `[L, vocabulary]`) and the target token of each (integers
    /// `[L]`), `L` above 0: a sum over label tokens with gradient, and what it will be divided by. Tensors die with the call.
    fn compute(&self, logits: &Tensor, labels: &Tensor) -> Result<WeightedLoss>;
}

/// The loss of a crate, once configured.
#[doc(hidden)]
pub struct Scoring<T>(RefCell<Option<T>>);

impl<T: Loss> Scoring<T> {
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self(RefCell::new(None))
    }

    pub fn configure(&self, settings: Vec<Setting>) -> Result<(), Failure> {
        *self.0.borrow_mut() = Some(T::configure(&Settings::new(settings)).map_err(into_failure)?);
        Ok(())
    }

    pub fn compute(&self, logits: &Tensor, labels: &Tensor) -> Result<WeightedLoss, Failure> {
        match &*self.0.borrow() {
            Some(loss) => loss.compute(logits, labels).map_err(into_failure),
            None => Err(into_failure(Error::new("`compute` was called before `configure`"))),
        }
    }
}

/// Makes a type that implements [`Loss`] the loss of this crate.
#[macro_export]
macro_rules! loss {
    ($loss:ty) => {
        struct HostSdkLoss;

        ::std::thread_local! {
            static HOST_SDK_SCORING: $crate::export::Scoring<$loss> = const { $crate::export::Scoring::new() };
        }

        impl $crate::bindings::loss::exports::host::sdk::scoring::Guest for HostSdkLoss {
            fn configure(
                settings: ::std::vec::Vec<$crate::bindings::host::sdk::types::Setting>,
            ) -> ::std::result::Result<(), $crate::bindings::host::sdk::types::Failure> {
                HOST_SDK_SCORING.with(|scoring| scoring.configure(settings))
            }

            fn compute(
                logits: &$crate::Tensor,
                labels: &$crate::Tensor,
            ) -> ::std::result::Result<$crate::WeightedLoss, $crate::bindings::host::sdk::types::Failure> {
                HOST_SDK_SCORING.with(|scoring| scoring.compute(logits, labels))
            }
        }

        $crate::bindings::loss::export_loss!(HostSdkLoss with_types_in $crate::bindings::loss);
    };
}

//! Operators on tensors, by reference: `(&a - &b)?`. Each is another spelling of the method it calls.

use std::ops::{Add, Div, Mul, Neg, Sub};

use crate::{Result, Tensor, set_grad_enabled};

/// What `work` computes has no gradient.
pub fn no_grad<T>(work: impl FnOnce() -> T) -> T {
    let before = set_grad_enabled(false);
    let made = work();
    set_grad_enabled(before);
    made
}

macro_rules! operator {
    ($operator:ident, $method:ident, $scalar:ident) => {
        operator!($operator, $method);

        impl $operator<f64> for &Tensor {
            type Output = Result<Tensor>;

            #[track_caller]
            fn $method(self, value: f64) -> Self::Output {
                Ok(self.$scalar(value)?)
            }
        }
    };
    ($operator:ident, $method:ident) => {
        impl $operator<&Tensor> for &Tensor {
            type Output = Result<Tensor>;

            #[track_caller]
            fn $method(self, other: &Tensor) -> Self::Output {
                Ok(Tensor::$method(self, other)?)
            }
        }
    };
}

operator!(Add, add, add_scalar);
operator!(Sub, sub, sub_scalar);
operator!(Mul, mul, mul_scalar);
operator!(Div, div, div_scalar);

impl Neg for &Tensor {
    type Output = Result<Tensor>;

    #[track_caller]
    fn neg(self) -> Self::Output {
        Ok(Tensor::neg(self)?)
    }
}

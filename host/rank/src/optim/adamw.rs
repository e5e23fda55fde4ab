//! AdamW (Loshchilov and Hutter, 2019) with PyTorch's order of operations.

use host::Result;
use host::config::plan::OptimizerPlan;
use tch::Tensor;

use crate::torch::TorchContext;

pub struct AdamW {
    plan: OptimizerPlan,
    /// First and second moments, as the parameters lie.
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
    /// Updates made.
    pub updates: usize,
}

impl AdamW {
    pub fn new(plan: &OptimizerPlan, parameters: &Tensor) -> Self {
        let zeros = || parameters.zeros_like().set_requires_grad(false);
        Self { plan: plan.clone(), exp_avg: zeros(), exp_avg_sq: zeros(), updates: 0 }
    }

    /// One update of `parameters` in place at learning rate `lr`.
    pub fn step(&mut self, parameters: &Tensor, gradients: &Tensor, lr: f64) -> Result<()> {
        self.updates += 1;
        let settings = host_ffi::optim::AdamW {
            lr,
            beta1: self.plan.betas.0,
            beta2: self.plan.betas.1,
            eps: self.plan.eps,
            weight_decay: self.plan.weight_decay,
        };
        host_ffi::optim::fused_adamw(
            parameters,
            gradients,
            &self.exp_avg,
            &self.exp_avg_sq,
            self.updates as u64,
            settings,
        )
        .torch("update the parameters")
    }
}

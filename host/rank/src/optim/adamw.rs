//! AdamW (Loshchilov and Hutter, 2019) with PyTorch's order of operations.

use std::ops::Range;

use host::Result;
use host::config::plan::{OptimizerPlan, Updates};
use tch::{Kind, Tensor};

use crate::flat::{Flat, PIECE};
use crate::torch::TorchContext;

pub struct AdamW {
    plan: OptimizerPlan,
    /// First and second moments, as the parameters lie.
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
    /// The parameters in fp32, where those that the model computes with are rounded from them.
    pub master: Option<Tensor>,
    /// What random rounding is keyed by, besides the update and the number.
    pub seed: u64,
    /// Updates made.
    pub updates: usize,
}

impl AdamW {
    /// For parameters that have their first numbers already.
    pub fn new(plan: &OptimizerPlan, parameters: &Tensor, seed: u64) -> Self {
        let mut plan = plan.clone();
        // Weights of fp32 lose nothing.
        if parameters.kind() == Kind::Float {
            plan.updates = Updates::Nearest;
        }
        let kind = if plan.updates == Updates::Nearest { parameters.kind() } else { Kind::Float };
        let zeros = || Tensor::zeros(parameters.size(), (kind, parameters.device()));
        let master = (plan.updates == Updates::Master).then(|| parameters.detach().to_kind(Kind::Float));
        Self { plan, exp_avg: zeros(), exp_avg_sq: zeros(), master, seed, updates: 0 }
    }

    /// One update of the parameters in place at learning rate `lr`. `places` are where pieces of them begin, and which numbers
    /// of the model each is: random rounding is keyed by those, whoever has them.
    pub fn step(&mut self, flat: &Flat, places: &[(i64, Range<i64>)], lr: f64) -> Result<()> {
        self.updates += 1;
        match (self.plan.updates, &self.master) {
            (Updates::Master, Some(master)) => self.each_piece(flat, 0..flat.size(), |numbers, grad, moments, at| {
                let master = master.narrow(0, at, numbers.size()[0]);
                self.update(&master, &grad.to_kind(Kind::Float), moments, lr)?;
                numbers.shallow_clone().copy_(&master);
                Ok(())
            }),
            (Updates::Stochastic, _) => {
                let key = host_ffi::rng::absorb(self.seed as i64, self.updates as i64);
                places.iter().try_for_each(|(begin, which)| {
                    let range = *begin..begin + which.end - which.start;
                    self.each_piece(flat, range, |numbers, grad, moments, at| {
                        let wide = numbers.to_kind(Kind::Float);
                        self.update(&wide, &grad.to_kind(Kind::Float), moments, lr)?;
                        let first = which.start + at - begin;
                        host_ffi::rng::round_stochastic(&wide, numbers, key, first).torch("round the parameters")
                    })
                })
            }
            _ => self.update(&flat.numbers, &flat.grad, [&self.exp_avg, &self.exp_avg_sq], lr),
        }
    }

    /// Pieces small enough for copies in fp32, with where they begin.
    fn each_piece(
        &self,
        flat: &Flat,
        range: Range<i64>,
        work: impl Fn(&Tensor, &Tensor, [&Tensor; 2], i64) -> Result<()>,
    ) -> Result<()> {
        for at in range.clone().step_by(PIECE as usize) {
            let piece = |tensor: &Tensor| tensor.narrow(0, at, PIECE.min(range.end - at));
            let moments = [&piece(&self.exp_avg), &piece(&self.exp_avg_sq)];
            work(&piece(&flat.numbers), &piece(&flat.grad), moments, at)?;
        }
        Ok(())
    }

    fn update(&self, parameters: &Tensor, gradients: &Tensor, moments: [&Tensor; 2], lr: f64) -> Result<()> {
        let settings = host_ffi::optim::AdamW {
            lr,
            beta1: self.plan.betas.0,
            beta2: self.plan.betas.1,
            eps: self.plan.eps,
            weight_decay: self.plan.weight_decay,
        };
        host_ffi::optim::fused_adamw(parameters, gradients, moments[0], moments[1], self.updates as u64, settings)
            .torch("update the parameters")
    }
}

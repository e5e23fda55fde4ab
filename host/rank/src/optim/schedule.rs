//! Learning rate over optimizer steps.

use host::config::plan::SchedulePlan;

#[derive(Clone, Debug)]
pub struct Schedule {
    plan: SchedulePlan,
    base: f64,
    total_steps: usize,
}

impl Schedule {
    pub fn new(plan: &SchedulePlan, base: f64, total_steps: usize) -> Self {
        Self { plan: plan.clone(), base, total_steps }
    }

    /// The rate of the step after `done` steps. Cosine: `done/warmup` up to the warm-up's end, then
    /// `max(0, ½(1 + cos(2π · cycles · progress)))`; the first step of a warm-up runs at 0, as in torchtune and transformers.
    pub fn at(&self, done: usize) -> f64 {
        let factor = match &self.plan {
            SchedulePlan::Constant => 1.0,
            SchedulePlan::Cosine { num_warmup_steps: warmup, .. } if done < *warmup => done as f64 / *warmup as f64,
            SchedulePlan::Cosine { num_warmup_steps: warmup, num_cycles } => {
                let span = self.total_steps.saturating_sub(*warmup).max(1);
                let progress = (done - warmup) as f64 / span as f64;
                (0.5 * (1.0 + (std::f64::consts::PI * num_cycles * 2.0 * progress).cos())).max(0.0)
            }
        };
        self.base * factor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_with_warmup() {
        let schedule = Schedule::new(&SchedulePlan::Cosine { num_warmup_steps: 5, num_cycles: 0.5 }, 3e-4, 30);
        // From the golden runs: the rates after steps 1 and 2, the peak, and the end.
        let expected = [(0, 0.0), (1, 5.9999999999999995e-05), (2, 0.00011999999999999999), (5, 3e-4), (30, 0.0)];
        for (done, rate) in expected {
            assert!((schedule.at(done) - rate).abs() < 1e-12, "after {done}: {}", schedule.at(done));
        }
        assert_eq!(Schedule::new(&SchedulePlan::Constant, 1e-3, 10).at(7), 1e-3);
    }
}

//! Guest time and stopping: one policy for Wasm and Rhai.
//!
//! Only time in the guest counts. The clock starts anew at each turn of the recipe's loop (a step begun, a micro-batch
//! handed out, a step finished): those are bounded by the run itself, whereas a budget restarted by any host call would
//! never stop a loop around a cheap one. Time inside host calls is taken off.

use std::time::{Duration, Instant};

use host::worker::StopFlag;

use super::api::{Failure, types};

/// How long a guest may compute on after the run was asked to stop.
const GRACE: Duration = Duration::from_secs(5);

/// How long the guest has worked since the loop last turned.
pub struct Clock {
    turn: Instant,
    in_host: Duration,
    budget: Duration,
    stop: StopFlag,
}

impl Clock {
    pub fn new(seconds: f64, stop: StopFlag) -> Self {
        let budget = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        Self { turn: Instant::now(), in_host: Duration::ZERO, budget, stop }
    }

    pub fn restart(&mut self) {
        self.turn = Instant::now();
        self.in_host = Duration::ZERO;
    }

    /// Takes the time since `entered` off the guest's bill.
    pub fn leave_host(&mut self, entered: Instant) {
        self.in_host += entered.elapsed();
    }

    /// Called between a guest's own instructions.
    ///
    /// A stop is answered by the run, at the next turn of the loop; a guest that does not come back is ended.
    pub fn check(&self) -> Result<(), Failure> {
        let computed = self.turn.elapsed().saturating_sub(self.in_host);
        if self.stop.is_set() && computed > self.budget.min(GRACE) {
            let error = host::Error::interrupted("stopped, but the guest did not come back to its loop")
                .hint("the newest checkpoint is the last one that was saved before");
            return Err(Failure::Run(error));
        }
        if computed <= self.budget {
            return Ok(());
        }
        let seconds = self.budget.as_secs_f64();
        Err(Failure::Guest(types::Error {
            code: types::Code::Limit,
            message: format!("the guest computed for more than {seconds} s without a turn of its loop"),
            hint: Some("look for a loop that does not end; work on many numbers belongs into tensor operations".into()),
        }))
    }
}

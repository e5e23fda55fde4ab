//! Guest time and stopping, one policy for Wasm and Rhai; and the memory of a script, which Rhai does not count.
//!
//! Only time in the guest counts. The clock starts anew at each turn of the recipe's loop (a step begun, a micro-batch
//! handed out, a step finished): those are bounded by the run itself, whereas a budget restarted by any host call would
//! never stop a loop around a cheap one. Time inside host calls is taken off.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use host::config::limits::GuestLimits;
use host::worker::StopFlag;
use host_ffi::alloc::held_by_thread;

use super::api::{Failure, types};

/// How long a guest may compute on after the run was asked to stop.
const GRACE: Duration = Duration::from_secs(5);

/// The most that guests of this process have used of each limit; `host test` tells their author.
#[derive(Debug, Default)]
pub struct Peaks {
    /// Bytes of a component's memory. A script's values are bounded one by one, and have no sum.
    pub memory: AtomicU64,
    /// Bytes of tensors.
    pub tensors: AtomicU64,
    pub handles: AtomicU64,
    /// Of a script, to the nearest 64.
    pub operations: AtomicU64,
    pub micros: AtomicU64,
}

pub static PEAKS: Peaks = Peaks {
    memory: AtomicU64::new(0),
    tensors: AtomicU64::new(0),
    handles: AtomicU64::new(0),
    operations: AtomicU64::new(0),
    micros: AtomicU64::new(0),
};

impl Peaks {
    pub fn raise(peak: &AtomicU64, used: u64) {
        peak.fetch_max(used, Relaxed);
    }

    pub fn raise_time(&self, computed: Duration) {
        Self::raise(&self.micros, computed.as_micros() as u64);
    }
}

/// How long the guest has worked since the loop last turned.
pub struct Clock {
    turn: Instant,
    /// How often the loop has turned.
    turns: u64,
    in_host: Duration,
    budget: Duration,
    stop: StopFlag,
    /// When the guest first called for work, and when the last such call returned.
    loop_time: Option<(Instant, Instant)>,
    /// Time inside those calls.
    worked: Duration,
}

impl Clock {
    pub fn new(seconds: f64, stop: StopFlag) -> Self {
        let budget = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        Self {
            turn: Instant::now(),
            turns: 0,
            in_host: Duration::ZERO,
            budget,
            stop,
            loop_time: None,
            worked: Duration::ZERO,
        }
    }

    pub fn turns(&self) -> u64 {
        self.turns
    }

    pub fn restart(&mut self) {
        self.turns += 1;
        self.turn = Instant::now();
        self.in_host = Duration::ZERO;
    }

    /// Takes the time since `entered` off the guest's bill.
    pub fn leave_host(&mut self, entered: Instant) {
        let left = Instant::now();
        PEAKS.raise_time(entered.saturating_duration_since(self.turn).saturating_sub(self.in_host));
        self.in_host += left - entered;
        self.worked += left - entered;
        self.loop_time = Some((self.loop_time.map_or(entered, |(first, _)| first), left));
    }

    /// Logs how much of its loop the guest took for itself: its own instructions, crossing the boundary, handles.
    pub fn log_share(&self) {
        let Some((first, last)) = self.loop_time else { return };
        let total = last - first;
        let own = total.saturating_sub(self.worked);
        tracing::debug!("the recipe took {:.6} s of {:.6} s for itself", own.as_secs_f64(), total.as_secs_f64());
    }

    /// Called between a guest's own instructions.
    ///
    /// A stop is answered by the run, at the next turn of the loop; a guest that does not come back is ended.
    pub fn check(&self) -> Result<(), Failure> {
        let computed = self.turn.elapsed().saturating_sub(self.in_host);
        PEAKS.raise_time(computed);
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

/// What a script holds, by what its thread has allocated since it began; a component has its memory alone.
pub struct ScriptMemory {
    begun: isize,
    most: usize,
    limit_mb: usize,
}

impl ScriptMemory {
    pub fn new(limits: &GuestLimits) -> Self {
        Self { begun: held_by_thread(), most: limits.script_bytes(), limit_mb: limits.memory_mb }
    }

    /// Begins a call that keeps nothing of the calls before.
    pub fn restart(&mut self) {
        self.begun = held_by_thread();
    }

    /// Takes what the host has kept since its thread held `entered` off the script's bill.
    pub fn leave_host(&mut self, entered: isize) {
        self.begun += held_by_thread() - entered;
    }

    /// Called between a script's operations.
    pub fn check(&self) -> Result<(), Failure> {
        let held = held_by_thread() - self.begun;
        if held <= self.most as isize {
            return Ok(());
        }
        let (held, most, limit) = (held as usize >> 20, self.most >> 20, self.limit_mb);
        Err(Failure::Guest(types::Error {
            code: types::Code::Limit,
            message: format!("the script holds {held} MiB, and may hold {most} MiB, half of its memory of {limit} MiB"),
            hint: Some("let go of what is no longer needed; `limits.memory_mb` raises the limit".into()),
        }))
    }
}

//! A training run of a linear model, and how the tests run guests on it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Once};

use host::config::plan::{GuestLimits, GuestRef};
use host::worker::StopFlag;
use host_rank::script::{BatchInfo, Recipe, Training, on_big_stack};
use host_rank::train::{Over, Place, Which};
use serde_json::{Value, json};
use tch::{Kind, Reduction, Tensor};

const STEPS: usize = 5;
const BATCHES: u64 = 3;
const FEATURES: i64 = 8;
const VOCABULARY: i64 = 11;

/// What a run recorded: `sum / weight` of each backward, and the weights it ended with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Record {
    pub losses: Vec<f64>,
    pub weights: Vec<f32>,
    /// Metrics: name, sum and weight of each call.
    pub metrics: Vec<(String, f64, f64)>,
}

/// Cross-entropy of a linear layer on made-up numbers; three batches of different sizes a step, plain gradient descent.
pub struct Linear {
    layer: Tensor,
    step: usize,
    next: u64,
    weight: f64,
    config: Value,
    pub record: Arc<Mutex<Record>>,
    /// Keys that were asked for and are not there.
    pub missed: Arc<Mutex<Vec<String>>>,
    /// The step whose end fails, as if another rank had died.
    pub fails_at: Option<usize>,
    /// Asks the run to stop when a batch is taken, as a signal at that moment would.
    pub stops_itself: bool,
    stop: StopFlag,
}

impl Linear {
    pub fn new(config: Value) -> Self {
        let layer = first_layer().set_requires_grad(true);
        Self {
            layer,
            step: 0,
            next: 0,
            weight: 0.0,
            config,
            record: Arc::default(),
            missed: Arc::default(),
            fails_at: None,
            stops_itself: false,
            stop: StopFlag::default(),
        }
    }

    pub fn record(&self) -> Record {
        self.record.lock().unwrap().clone()
    }

    fn labels_of(&self, batch: u64) -> i64 {
        4 + 3 * batch as i64
    }
}

/// What the layer is before training.
fn first_layer() -> Tensor {
    waves(FEATURES * VOCABULARY, 0.7).view([FEATURES, VOCABULARY])
}

/// Numbers that look random and are the same everywhere: torch's generator is shared by the tests' threads.
fn waves(len: i64, pitch: f64) -> Tensor {
    (Tensor::arange(len, (Kind::Double, tch::Device::Cpu)) * (pitch * 12.9898)).sin().to_kind(Kind::Float)
}

impl Training for Linear {
    fn device(&self) -> tch::Device {
        tch::Device::Cpu
    }

    fn next_step(&mut self) -> host::Result<bool> {
        if self.step == STEPS || self.stop.is_set() {
            return Ok(false);
        }
        self.step += 1;
        self.next = 0;
        self.weight = 0.0;
        Ok(true)
    }

    fn next_batch(&mut self) -> host::Result<Option<BatchInfo>> {
        if self.next == BATCHES {
            return Ok(None);
        }
        if self.stops_itself {
            self.stop.set();
        }
        self.next += 1;
        let num_labels = self.labels_of(self.next);
        Ok(Some(BatchInfo { index: self.next, num_labels, num_tokens: 2 * num_labels, num_samples: 4 }))
    }

    fn labels(&mut self, batch: u64) -> host::Result<Tensor> {
        Ok((Tensor::arange(self.labels_of(batch), (Kind::Int64, tch::Device::Cpu)) * 7 + batch as i64)
            .remainder(VOCABULARY))
    }

    fn segments(&mut self, batch: u64) -> host::Result<Tensor> {
        Ok(Tensor::arange(self.labels_of(batch), (Kind::Int64, tch::Device::Cpu)).remainder(4))
    }

    fn num_pairs(&mut self, _batch: u64) -> host::Result<i64> {
        Ok(2)
    }

    fn has(&mut self, which: Which) -> bool {
        which != Which::Teacher || self.config.get("teacher_model").is_some()
    }

    fn loss(&mut self, batch: u64, which: Which) -> host::Result<(Tensor, f64)> {
        let (logits, labels) = (self.logits(batch, which)?, self.labels(batch)?);
        let sum = logits.cross_entropy_loss::<Tensor>(&labels, None, Reduction::Sum, -100, 0.0);
        Ok((sum, self.labels_of(batch) as f64))
    }

    fn logits(&mut self, batch: u64, which: Which) -> host::Result<Tensor> {
        self.logits_part(batch, which, 0, self.labels_of(batch))
    }

    fn logits_part(&mut self, batch: u64, which: Which, start: i64, length: i64) -> host::Result<Tensor> {
        let rows = self.labels_of(batch);
        let inputs = waves(rows * FEATURES, 0.3 + batch as f64).view([rows, FEATURES]).narrow(0, start, length);
        Ok(match which {
            Which::Trained => inputs.matmul(&self.layer),
            Which::Reference => inputs.matmul(&first_layer()),
            Which::Teacher => inputs.matmul(&(first_layer() * 2.0)),
        })
    }

    fn log_probs(&mut self, batch: u64, which: Which) -> host::Result<Tensor> {
        let scores = self.logits(batch, which)?.log_softmax(-1, Kind::Float);
        Ok(scores.gather(1, &self.labels(batch)?.unsqueeze(1), false).squeeze_dim(1))
    }

    fn record_metric(&mut self, name: &str, sum: &Tensor, weight: f64) -> host::Result<()> {
        self.record.lock().unwrap().metrics.push((name.to_owned(), sum.double_value(&[]), weight));
        Ok(())
    }

    /// As if there were three ranks with the same numbers.
    fn over_ranks(&mut self, values: &[f64], over: Over) -> host::Result<Vec<f64>> {
        let factor = if over == Over::Sum { 3.0 } else { 1.0 };
        Ok(values.iter().map(|value| value * factor).collect())
    }

    fn leave(&mut self) -> host::Result<()> {
        Ok(())
    }

    fn explain(&mut self, error: host::Error, _place: &Place) -> host::Error {
        error
    }

    fn backward(&mut self, sum: &Tensor, weight: f64) -> host::Result<()> {
        self.record.lock().unwrap().losses.push(sum.double_value(&[]) / weight);
        self.weight += weight;
        let failed = |error: tch::TchError| {
            let text = error.to_string();
            host::Error::run("cannot compute gradients").cause(text.lines().next().unwrap_or_default())
        };
        sum.f_backward().map_err(failed)
    }

    fn finish_step(&mut self) -> host::Result<()> {
        if self.fails_at == Some(self.step) {
            return Err(host::Error::run("rank 3 is gone").cause("its connection was closed"));
        }
        if !self.layer.grad().defined() {
            return Ok(());
        }
        tch::no_grad(|| {
            let update = self.layer.grad() * (-1.0 / self.weight);
            let _ = self.layer.g_add_(&update);
        });
        self.layer.zero_grad();
        self.record.lock().unwrap().weights = Vec::try_from(self.layer.detach().view([-1])).unwrap();
        Ok(())
    }

    fn config(&self, key: &str) -> Option<Value> {
        let found = key.split('.').try_fold(&self.config, |section, name| section.get(name)).cloned();
        if found.is_none() {
            self.missed.lock().unwrap().push(key.to_owned());
        }
        found
    }

    fn current_step(&self) -> usize {
        self.step
    }
}

/// The repository's root, made the working directory so that messages show paths as a user types them.
pub fn root() -> PathBuf {
    static ONCE: Once = Once::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap();
    ONCE.call_once(|| std::env::set_current_dir(&root).unwrap());
    root
}

pub fn guest(path: impl Into<PathBuf>) -> GuestRef {
    let path = path.into();
    if !root().join(&path).exists() && path.starts_with("target/guests") {
        panic!("`{}` is not built: run `cargo xtask build`", path.display());
    }
    GuestRef { path, settings: json!({}) }
}

/// Limits that the hostile guests reach soon.
pub fn tight() -> GuestLimits {
    GuestLimits { memory_mb: 64, tensors_mb: 64, handles: 2000, seconds: 0.4, ..GuestLimits::default() }
}

pub fn run_with(path: &str, limits: &GuestLimits, training: Linear, stop: StopFlag) -> host::Result<Record> {
    let mut training = training;
    training.stop = stop.clone();
    let record = training.record.clone();
    let recipe = Recipe::load(&guest(path), limits)?;
    on_big_stack(move || recipe.run(Box::new(training), stop))??;
    let record = record.lock().unwrap().clone();
    Ok(record)
}

/// Runs a recipe with default limits.
pub fn run(path: &str) -> host::Result<Record> {
    run_with(path, &GuestLimits::default(), Linear::new(json!({})), StopFlag::default())
}

/// Writes a script and runs it with tight limits; the error as a user sees it.
pub fn script_error(text: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("recipe.rhai");
    std::fs::write(&path, text).unwrap();
    let outcome =
        run_with(path.to_str().unwrap(), &tight(), Linear::new(json!({"optimizer": {"lr": 0.5}})), StopFlag::default());
    match outcome {
        Ok(_) => "no error".into(),
        Err(error) => error.to_string().replace(dir.path().to_str().unwrap(), "[DIR]"),
    }
}

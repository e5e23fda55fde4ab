//! Checkpoints written while training goes on, from a copy of the numbers that are trained: by a thread of rank 0, and of a
//! model that ranks share by a thread of each, which writes that rank's piece. One checkpoint is under way at most: the next
//! waits for it. What rank 0 has of it lives on its thread meanwhile and comes back with the outcome.
//!
//! Rank 0's thread makes the checkpoint of the pieces once it is told that all are written, which the ranks tell each other
//! with each call of the recipe. It does not look for files: a folder on a network shows those of other machines late, and
//! never those of a rank that is gone.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host::{Error, Result};

use crate::checkpoint::shards::Piece;
use crate::checkpoint::{ResumeState, Saver};
use crate::metrics::Curve;
use crate::model::Weights;
use crate::trained::Snapshot;

/// What one checkpoint is of.
pub struct Job {
    pub name: String,
    pub trained: Snapshot,
    pub state: ResumeState,
    pub curve: Curve,
    /// How long training was held for it.
    pub held: Duration,
}

/// A checkpoint that is whole.
pub struct Written {
    pub folder: PathBuf,
    pub held: Duration,
    pub took: Duration,
}

/// Writes the checkpoints of a run, or a rank's part of them, one after the other.
#[derive(Default)]
pub struct Writer {
    /// What rank 0 writes with; away while a checkpoint is written.
    main: Option<Main>,
    under_way: Option<JoinHandle<Outcome>>,
    /// Where rank 0's thread hears that all pieces are written. Without this it gives up.
    pieces_written: Option<Sender<()>>,
}

/// What comes back from a thread; a piece is no checkpoint.
type Outcome = (Option<Main>, Result<Option<Written>>);

struct Main {
    saver: Saver,
    base: Arc<Weights>,
    /// The run's picture of its losses.
    picture: PathBuf,
}

impl Writer {
    /// Of rank 0; the others' has nothing but their pieces.
    pub fn main(saver: Saver, base: Arc<Weights>, picture: PathBuf) -> Self {
        Self { main: Some(Main { saver, base, picture }), under_way: None, pieces_written: None }
    }

    /// Begins to write a checkpoint, with rank 0's `piece` of a model that ranks share; the one before has to be waited for.
    pub fn start(&mut self, job: Job, piece: Option<Piece>) -> Result<()> {
        let mut main = self.main.take().ok_or_else(two_at_once)?;
        let shared = piece.map(|piece| {
            let (sender, written) = channel();
            self.pieces_written = Some(sender);
            (piece, written)
        });
        self.spawn(move || {
            let written = main.write(job, shared);
            (Some(main), written.map(Some))
        })
    }

    /// Begins to write a piece, on a rank other than 0.
    pub fn start_piece(&mut self, piece: Piece) -> Result<()> {
        self.spawn(move || (None, piece.write().map(|()| None)))
    }

    fn spawn(&mut self, work: impl FnOnce() -> Outcome + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(work);
        self.under_way = Some(thread.map_err(|error| Error::run("cannot start the checkpoint's thread").cause(error))?);
        Ok(())
    }

    /// Makes the folder of a checkpoint that every rank writes to; rank 0 does, before any rank begins.
    pub fn prepare(&self, name: &str) -> Result<PathBuf> {
        self.main.as_ref().ok_or_else(two_at_once)?.saver.prepare(name)
    }

    pub fn is_under_way(&self) -> bool {
        self.under_way.is_some()
    }

    /// Lets rank 0's thread go on: every other rank has written its piece.
    pub fn all_pieces_written(&mut self) {
        if let Some(sender) = self.pieces_written.take() {
            // A thread that has failed hears nothing.
            let _ = sender.send(());
        }
    }

    /// What became of what is under way, if that is known by now: of a checkpoint, or of a piece of one.
    pub fn poll(&mut self) -> Option<Result<Option<Written>>> {
        if self.under_way.as_ref().is_some_and(JoinHandle::is_finished) { self.wait() } else { None }
    }

    /// Waits for what is under way, if there is something; not for pieces that are not known to be written.
    pub fn wait(&mut self) -> Option<Result<Option<Written>>> {
        self.pieces_written = None;
        match self.under_way.take()?.join() {
            Ok((main, written)) => {
                self.main = main;
                Some(written)
            }
            Err(_) => Some(Err(Error::bug("writing a checkpoint panicked"))),
        }
    }
}

/// A run that fails leaves the checkpoint it has begun whole, where every rank is known to have written its part.
impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.wait() {
            tracing::warn!("the checkpoint under way was not written\n{error}");
        }
    }
}

fn two_at_once() -> Error {
    Error::bug("two checkpoints are written at once")
}

impl Main {
    fn write(&mut self, job: Job, shared: Option<(Piece, Receiver<()>)>) -> Result<Written> {
        let started = Instant::now();
        let Job { name, trained, state, curve, held } = job;
        let folder = self.saver.save(&name, &self.base, &trained, &state, &curve, shared)?;
        if let Err(error) = curve.draw(&self.picture) {
            tracing::warn!("the picture of the losses is not up to date\n{error}");
        }
        Ok(Written { folder, held, took: started.elapsed() })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use host::config::plan::{CheckpointPlan, ModelPlan};
    use host::hf::{ModelConfig, WeightIndex};
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::shard::Shards;

    const RANKS: usize = 2;

    /// A model that two ranks share, each with zeros for its piece, and the writers of both.
    struct Shared {
        output: tempfile::TempDir,
        shards: Shards,
        writers: [Writer; RANKS],
    }

    impl Shared {
        fn new() -> Self {
            let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama");
            let output = tempfile::tempdir().unwrap();
            let plan = CheckpointPlan {
                output_dir: output.path().into(),
                save_every_n_steps: None,
                keep_last_n: None,
                adapter_only: false,
                resume: false,
                resume_from: None,
            };
            let config = std::fs::read_to_string(model.join("config.json")).unwrap();
            let shards = Shards::new(&ModelConfig::parse(&config).unwrap(), RANKS);
            let base = Arc::new(Weights::open(WeightIndex::open(&model, &[]).unwrap()).unwrap());
            let model = ModelPlan { checkpoint_dir: model, checkpoint_files: vec![], lora: None, adapter: None };
            let saver = Saver::new(&plan, &model, Kind::Float, serde_json::Value::Null, "").unwrap();
            let picture = output.path().join("loss.svg");
            Self { output, shards, writers: [Writer::main(saver, base, picture), Writer::default()] }
        }

        fn piece(&self, rank: usize, dir: PathBuf) -> Piece {
            let zeros = || Tensor::zeros([self.shards.size()], (Kind::Float, Device::Cpu));
            let (parameters, exp_avg, exp_avg_sq) = (zeros(), zeros(), zeros());
            Piece { dir, rank, ranks: RANKS, saved_at: 1, parameters, exp_avg, exp_avg_sq, master: None }
        }

        /// Begins a checkpoint on both ranks.
        fn start(&mut self) {
            let dir = self.writers[0].prepare("step_1").unwrap();
            let [first, second] = [0, 1].map(|rank| self.piece(rank, dir.clone()));
            let position = serde_json::from_value(serde_json::json!({
                "step": 1, "epoch": 0, "step_in_epoch": 1, "seed": 1, "samples_per_step": 1, "host_version": "",
                "saved_at": 1, "shards": RANKS,
                "identity": {"base_model": "", "lora": null, "num_parameters": self.shards.total(), "dtype": "fp32",
                    "compat_torchtune": false, "shuffle": false, "num_rows": 1, "data_digest": ""},
            }));
            let nothing = || Tensor::zeros([0], (Kind::Float, Device::Cpu));
            let job = Job {
                name: "step_1".into(),
                trained: Snapshot::Shared { shards: self.shards.clone(), is_tied: false },
                state: ResumeState {
                    position: position.unwrap(),
                    adapter: None,
                    exp_avg: nothing(),
                    exp_avg_sq: nothing(),
                    master: None,
                },
                curve: Curve::default(),
                held: Duration::ZERO,
            };
            self.writers[0].start(job, Some(first)).unwrap();
            self.writers[1].start_piece(second).unwrap();
        }

        fn folders(&self) -> Vec<String> {
            let entries = std::fs::read_dir(self.output.path()).unwrap().map(|entry| entry.unwrap());
            let folders = entries.filter(|entry| entry.path().is_dir());
            folders.map(|entry| entry.file_name().into_string().unwrap()).collect()
        }
    }

    /// It has no name before all pieces are known to be written, and a run that ends before waits for nobody.
    #[test]
    fn a_checkpoint_is_made_of_all_pieces_or_none() {
        let mut shared = Shared::new();
        shared.start();
        assert!(matches!(shared.writers[1].wait(), Some(Ok(None))));
        // However long rank 0's thread had, it waits for the word.
        assert!(shared.writers[0].poll().is_none());
        assert_eq!(shared.folders(), [".step_1.partial"]);
        shared.writers[0].all_pieces_written();
        let written = shared.writers[0].wait().unwrap().unwrap().unwrap();
        assert_eq!(shared.folders(), ["step_1"]);
        let weights = Weights::open(WeightIndex::open(&written.folder, &[]).unwrap()).unwrap();
        let head = weights.load_any("lm_head.weight", Kind::Float, Device::Cpu).unwrap();
        assert_eq!(head.abs().max().double_value(&[]), 0.0);

        std::fs::remove_dir_all(&written.folder).unwrap();
        shared.start();
        let error = shared.writers[0].wait().unwrap().err().unwrap();
        assert_eq!(error.message, "the run ended before every rank had written its part");
        assert!(shared.writers[1].wait().is_some() && shared.folders().is_empty(), "{:?}", shared.folders());
        // What came of the last does not hinder the next.
        shared.start();
        drop(shared.writers);
    }
}

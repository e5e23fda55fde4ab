//! Checkpoints written while training goes on, from a copy of the numbers that are trained. One is under way at most: the
//! next waits for it. What rank 0 has of it lives on its thread meanwhile and comes back with the outcome.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host::{Error, Result};

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

/// Writes the checkpoints of a run, one after the other.
pub struct Writer {
    base: Arc<Weights>,
    /// The run's picture of its losses.
    picture: PathBuf,
    /// Away while a checkpoint is written.
    saver: Option<Saver>,
    under_way: Option<JoinHandle<(Saver, Result<Written>)>>,
}

impl Writer {
    pub fn new(saver: Saver, base: Arc<Weights>, picture: PathBuf) -> Self {
        Self { base, picture, saver: Some(saver), under_way: None }
    }

    /// Begins to write a checkpoint; the one before has to be waited for.
    pub fn start(&mut self, job: Job) -> Result<()> {
        let saver = self.saver.take().ok_or_else(|| Error::bug("two checkpoints are written at once"))?;
        let (base, picture) = (Arc::clone(&self.base), self.picture.clone());
        let write = move || {
            let mut saver = saver;
            let written = write(&mut saver, &base, &picture, job);
            (saver, written)
        };
        let thread = std::thread::Builder::new().name("checkpoint".into()).spawn(write);
        self.under_way = Some(thread.map_err(|error| Error::run("cannot start the checkpoint's thread").cause(error))?);
        Ok(())
    }

    /// Makes the folder of a checkpoint that every rank writes to before the rest of it is begun.
    pub fn prepare(&self, name: &str) -> Result<PathBuf> {
        self.saver.as_ref().ok_or_else(|| Error::bug("two checkpoints are written at once"))?.prepare(name)
    }

    /// What became of the checkpoint under way, if that is known by now.
    pub fn poll(&mut self) -> Option<Result<Written>> {
        if self.under_way.as_ref().is_some_and(JoinHandle::is_finished) { self.wait() } else { None }
    }

    /// Waits for the checkpoint under way, if there is one.
    pub fn wait(&mut self) -> Option<Result<Written>> {
        match self.under_way.take()?.join() {
            Ok((saver, written)) => {
                self.saver = Some(saver);
                Some(written)
            }
            Err(_) => Some(Err(Error::bug("writing a checkpoint panicked"))),
        }
    }
}

/// A run that fails leaves the checkpoint it has begun whole.
impl Drop for Writer {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.wait() {
            tracing::warn!("the checkpoint under way was not written\n{error}");
        }
    }
}

fn write(saver: &mut Saver, base: &Weights, picture: &std::path::Path, job: Job) -> Result<Written> {
    let started = Instant::now();
    let Job { name, trained, state, curve, held } = job;
    let folder = saver.save(&name, base, &trained, &state, &curve)?;
    if let Err(error) = curve.draw(picture) {
        tracing::warn!("the picture of the losses is not up to date\n{error}");
    }
    Ok(Written { folder, held, took: started.elapsed() })
}

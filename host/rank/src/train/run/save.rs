//! When a run saves, and what it hears of it. The writing is [`Writer`]'s; here the ranks agree on what is to be written, and
//! that it was.
//!
//! [`Writer`]: crate::checkpoint::Writer

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use host::{Error, Result};
use tch::Tensor;

use crate::checkpoint::shards::Piece;
use crate::checkpoint::{Job, Position, ResumeState, Written, folder};
use crate::dist;
use crate::flat::to_host;
use crate::metrics;
use crate::shard::Spread;
use crate::train::run::Run;

impl Run {
    /// Begins to write a checkpoint, once the one before is written.
    pub(super) fn save(&mut self, name: &str) -> Result<()> {
        let started = Instant::now();
        self.finish_save()?;
        let piece = self.begin_piece(name)?;
        let parts = &mut self.parts;
        if !parts.group.is_main() {
            return piece.map_or(Ok(()), |piece| parts.writer.start_piece(piece));
        }
        // The others hear of a failure at the next call.
        if self.failure.is_some() {
            return Ok(());
        }
        let trained = parts.trained.snapshot();
        // Of a model that ranks share the pieces have them.
        let keep = |moment: &Tensor| if piece.is_some() { moment.shallow_clone() } else { to_host(moment) };
        let (saved_at, shards) = piece.as_ref().map_or_else(|| (now(), 0), |piece| (piece.saved_at, piece.ranks));
        let state = ResumeState {
            position: Position { saved_at, shards, ..parts.position.clone() },
            adapter: trained.lora().map(|adapter| adapter.flat.numbers.shallow_clone()),
            exp_avg: keep(&parts.optimizer.exp_avg),
            exp_avg_sq: keep(&parts.optimizer.exp_avg_sq),
            master: parts.optimizer.master.as_ref().map(keep),
        };
        let (name, curve) = (name.to_owned(), parts.curve.clone());
        parts.writer.start(Job { name, trained, state, curve, held: started.elapsed() }, piece)
    }

    /// What this rank has of a model that ranks share, as it is now. Rank 0 makes the folder that it is to be written to, and
    /// says when: the save is known by that.
    fn begin_piece(&mut self, name: &str) -> Result<Option<Piece>> {
        let (parts, failure) = (&self.parts, &mut self.failure);
        let Some(sharding) = parts.trained.sharding() else { return Ok(None) };
        let group = &parts.group;
        let prepare = || failure.take().map_or_else(|| parts.writer.prepare(name), Err);
        group.after_main("write the checkpoint", group.is_main().then(prepare))?;
        let saved_at = group.from_main(&now().to_le_bytes())?;
        let saved_at = saved_at.try_into().map(u128::from_le_bytes).map_err(|_| Error::bug("a time has 16 bytes"))?;
        let Spread { group: sharing, copies, .. } = &sharding.spread;
        // The other copies have the same pieces.
        if !copies.is_main() {
            return Ok(None);
        }
        let optimizer = &parts.optimizer;
        Ok(Some(Piece {
            dir: folder::partial(&parts.plan.checkpoint.output_dir, name),
            rank: sharing.rank,
            ranks: sharing.world_size,
            saved_at,
            parameters: to_host(&parts.trained.flat().numbers),
            exp_avg: to_host(&optimizer.exp_avg),
            exp_avg_sq: to_host(&optimizer.exp_avg_sq),
            master: optimizer.master.as_ref().map(to_host),
        }))
    }

    /// Waits for the checkpoint under way, if there is one. Of a model that ranks share the others' pieces come first: rank 0
    /// makes the checkpoint of them.
    fn finish_save(&mut self) -> Result<()> {
        if self.parts.trained.sharding().is_some() {
            if !self.parts.group.is_main() {
                let written = self.parts.writer.wait();
                self.hear(written);
            }
            let failed = self.parts.group.which(self.failure.is_some())?;
            match (self.failure.take(), failed.first()) {
                (Some(failure), _) => return Err(failure),
                (None, Some(rank)) => {
                    return Err(dist::stopped(format!("rank {rank} could not write its part of the checkpoint")));
                }
                (None, None) => self.parts.writer.all_pieces_written(),
            }
        }
        let written = self.parts.writer.wait();
        self.hear(written);
        Ok(())
    }

    /// Takes note of what became of a checkpoint, or of a piece of one.
    pub(super) fn hear(&mut self, written: Option<Result<Option<Written>>>) {
        match written {
            None | Some(Ok(None)) => {}
            Some(Err(error)) => drop(self.failure.get_or_insert(error)),
            Some(Ok(Some(Written { folder, held, took }))) => {
                let (held, took) = (held.as_secs_f64(), took.as_secs_f64());
                let line = format!("training was held for {held:.3} s; saved {} in {took:.2} s", folder.display());
                metrics::say(self.progress.as_ref(), &line);
            }
        }
    }

    /// Waits until the checkpoint under way is whole; where it is not, that is an error on every rank.
    pub(super) fn settle_save(&mut self) -> Result<()> {
        self.finish_save()?;
        let group = &self.parts.group;
        let outcome = group.is_main().then(|| self.failure.take().map_or(Ok(()), Err));
        group.after_main("write the checkpoint", outcome).map(drop)
    }

    /// The last thing that a run does.
    pub(super) fn end(&mut self) -> Result<()> {
        self.settle_save()?;
        self.end_progress();
        let group = &self.parts.group;
        if group.is_main() && group.world_size > 1 {
            tracing::info!("{}", self.waiting);
        }
        Ok(())
    }
}

/// In nanoseconds of Unix time.
fn now() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()
}

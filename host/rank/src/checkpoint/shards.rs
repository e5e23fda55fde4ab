//! The resume state of a model that ranks share: a file for each rank, which any number of ranks can go on from.

use std::path::{Path, PathBuf};

use host::hf::WeightIndex;
use host::{Error, Result};
use tch::{Kind, Tensor};

use crate::checkpoint::files;
use crate::model::Weights;
use crate::shard::Shards;

/// A rank's file that is to be written, and its numbers in memory of their own: vectors of [`Shards::size`].
pub struct Piece {
    /// The checkpoint's folder.
    pub dir: PathBuf,
    pub rank: usize,
    pub ranks: usize,
    pub saved_at: u128,
    pub parameters: Tensor,
    pub exp_avg: Tensor,
    pub exp_avg_sq: Tensor,
    /// The parameters in fp32, where an optimizer keeps them so.
    pub master: Option<Tensor>,
}

fn file(rank: i64, ranks: i64) -> String {
    format!("resume-{:05}-of-{ranks:05}.safetensors", rank + 1)
}

/// A name that no file of another save has.
fn name(field: &str, rank: i64, saved_at: u128) -> String {
    format!("{field}.{rank}.{saved_at}")
}

impl Piece {
    /// Writes the file, and gives the memory back.
    pub fn write(self) -> Result<()> {
        let Self { dir, rank, ranks, saved_at, parameters, exp_avg, exp_avg_sq, master } = self;
        if !dir.is_dir() {
            let what = format!("the folder `{}`, which rank 0 made, is not here", dir.display());
            return Err(
                Error::config(what).hint("on several machines `output_dir` has to be on a disk that all of them see")
            );
        }
        let (rank, ranks) = (rank as i64, ranks as i64);
        let fields = [("parameters", parameters), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)];
        let fields = fields.into_iter().chain(master.map(|master| ("master", master)));
        let tensors = fields.map(|(field, tensor)| (name(field, rank, saved_at), tensor)).collect();
        files::write_tensors(&dir.join(file(rank, ranks)), tensors)
    }
}

/// The files of all ranks, mapped.
pub struct ShardFiles {
    weights: Weights,
    stored: Shards,
    saved_at: u128,
}

impl ShardFiles {
    /// Opens those of the save `saved_at`; `stored` says how its ranks shared the model.
    pub fn open(dir: &Path, stored: Shards, saved_at: u128) -> Result<Self> {
        let names: Vec<_> = (0..stored.ranks).map(|rank| file(rank, stored.ranks)).collect();
        let damaged = |name: &str, what: &str| {
            Error::config(format!("the checkpoint `{}` is not whole: {what}", dir.display()))
                .at_file(dir.join(name))
                .hint("each rank wrote one such file: bring all of them to one folder, or name another checkpoint with `resume_from`")
        };
        if let Some(missing) = names.iter().find(|name| !dir.join(name).is_file()) {
            return Err(damaged(missing, "a rank's file is missing"));
        }
        let weights = Weights::open(WeightIndex::open(dir, &names)?)?;
        for (rank, name_of_file) in names.iter().enumerate() {
            if !weights.index.tensors.contains_key(&name("exp_avg", rank as i64, saved_at)) {
                return Err(damaged(name_of_file, "a rank's file is of another save"));
            }
        }
        Ok(Self { weights, stored, saved_at })
    }

    /// The type of `field`, where there is such a one.
    pub fn kind(&self, field: &str) -> Option<Kind> {
        let entry = self.weights.index.tensors.get(&name(field, 0, self.saved_at))?;
        Some(if entry.dtype == safetensors::Dtype::BF16 { Kind::BFloat16 } else { Kind::Float })
    }

    /// The piece that `rank` keeps of `field`, as `wanted` says, whoever had it before.
    pub fn piece(&self, field: &str, wanted: &Shards, rank: usize, kind: Kind) -> Result<Tensor> {
        let piece = Tensor::zeros([wanted.size()], (kind, tch::Device::Cpu));
        for stored_rank in 0..self.stored.ranks {
            for ((begin, kept), (stored_begin, stored)) in
                wanted.of_rank(rank as i64).zip(self.stored.of_rank(stored_rank))
            {
                let (from, to) = (kept.start.max(stored.start), kept.end.min(stored.end));
                if from < to {
                    let first = stored_begin + from - stored.start;
                    let read = self.read(field, stored_rank, first, to - from, kind)?;
                    piece.narrow(0, begin + from - kept.start, to - from).copy_(&read);
                }
            }
        }
        Ok(piece)
    }

    /// The tensor of the model called `tensor`, whole, as `parameters` has it; none of that name.
    pub fn tensor(&self, tensor: &str, kind: Kind) -> Option<Result<Tensor>> {
        let (_, shape, start) = self.stored.tensors.iter().find(|(name, ..)| name == tensor)?;
        Some(self.whole(shape, *start, kind))
    }

    fn whole(&self, shape: &[i64], start: i64, kind: Kind) -> Result<Tensor> {
        let end = start + shape.iter().product::<i64>();
        let whole = Tensor::zeros([end - start], (kind, tch::Device::Cpu));
        for rank in 0..self.stored.ranks {
            for (begin, kept) in self.stored.of_rank(rank) {
                let (from, to) = (kept.start.max(start), kept.end.min(end));
                if from < to {
                    let read = self.read("parameters", rank, begin + from - kept.start, to - from, kind)?;
                    whole.narrow(0, from - start, to - from).copy_(&read);
                }
            }
        }
        Ok(whole.view(shape))
    }

    fn read(&self, field: &str, rank: i64, first: i64, count: i64, kind: Kind) -> Result<Tensor> {
        self.weights.load_range(&name(field, rank, self.saved_at), &[self.stored.size()], first..first + count, kind)
    }
}

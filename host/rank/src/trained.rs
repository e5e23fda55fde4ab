//! What a run trains: the factors of an adapter, or every weight of the model. Where the numbers live, what they are called
//! and what the checkpoint's tensors have become by them; the rest of training sees one vector.

use std::collections::BTreeMap;
use std::rc::Rc;

use host::Result;
use host::hf::ModelConfig;
use tch::{Device, Kind, Tensor};

use crate::adapter::LoraAdapter;
use crate::flat::Flat;
use crate::model::Weights;
use crate::shard::{Pieces, Sharding, Shards, Spread};

pub enum Trained {
    Lora(LoraAdapter),
    Whole(WholeModel),
}

impl Trained {
    pub fn flat(&self) -> &Flat {
        match self {
            Self::Lora(adapter) => &adapter.flat,
            Self::Whole(model) => &model.flat,
        }
    }

    pub fn lora(&self) -> Option<&LoraAdapter> {
        match self {
            Self::Lora(adapter) => Some(adapter),
            Self::Whole(_) => None,
        }
    }

    /// Of weights that ranks share.
    pub fn sharding(&self) -> Option<&Rc<Sharding>> {
        match self {
            Self::Lora(_) => None,
            Self::Whole(model) => model.sharding.as_ref(),
        }
    }

    /// How many numbers are trained, on all ranks.
    pub fn num_parameters(&self) -> i64 {
        self.sharding().map_or_else(|| self.flat().size(), |sharding| sharding.shards.total())
    }

    /// All of it as it is now, in memory of its own: what a checkpoint is written from while training goes on.
    pub fn snapshot(&self) -> Snapshot {
        match self {
            Self::Lora(adapter) => Snapshot::Lora(adapter.snapshot()),
            Self::Whole(model) => model.snapshot(),
        }
    }

    /// Every parameter by name, in the order of the vector.
    pub fn parameters(&self) -> Vec<(String, &Tensor)> {
        match self {
            Self::Lora(adapter) => adapter
                .factors()
                .flat_map(|(layer, a, b)| {
                    [(format!("{layer}.lora_A.weight"), a), (format!("{layer}.lora_B.weight"), b)]
                })
                .collect(),
            Self::Whole(model) => model.names.iter().map(|name| (name.clone(), &model.tensors[name])).collect(),
        }
    }
}

/// What is trained, in memory of its own: what a checkpoint is written from while training goes on.
pub enum Snapshot {
    Lora(LoraAdapter),
    Whole {
        tensors: BTreeMap<String, Tensor>,
        is_tied: bool,
    },
    /// Of a model that ranks share each has written its piece to the checkpoint's folder.
    Shared {
        shards: Shards,
        is_tied: bool,
    },
}

impl Snapshot {
    pub fn lora(&self) -> Option<&LoraAdapter> {
        match self {
            Self::Lora(adapter) => Some(adapter),
            _ => None,
        }
    }

    /// How ranks share the weights, where they do.
    pub fn shards(&self) -> Option<&Shards> {
        match self {
            Self::Shared { shards, .. } => Some(shards),
            _ => None,
        }
    }

    /// The tensor of the model that the checkpoint's `name` is: a tied head is the embedding.
    pub fn name_of<'a>(&self, name: &'a str) -> &'a str {
        match self {
            Self::Lora(_) => name,
            Self::Whole { is_tied, .. } | Self::Shared { is_tied, .. } => name_of(name, *is_tied),
        }
    }

    /// What the checkpoint's tensor `name` has become; `before` reads what it was.
    pub fn now(&self, name: &str, before: impl FnOnce() -> Tensor) -> Tensor {
        match self {
            Self::Lora(adapter) => {
                let weight = before();
                adapter.merge(name.strip_suffix(".weight").unwrap_or(name), &weight).unwrap_or(weight)
            }
            Self::Whole { tensors, .. } => tensors.get(self.name_of(name)).map_or_else(before, Tensor::shallow_clone),
            Self::Shared { .. } => before(),
        }
    }
}

fn name_of(name: &str, is_tied: bool) -> &str {
    if is_tied && name == "lm_head.weight" { "model.embed_tokens.weight" } else { name }
}

/// Every weight of a model, in the type that it computes in.
pub struct WholeModel {
    pub flat: Flat,
    names: Vec<String>,
    tensors: BTreeMap<String, Tensor>,
    /// A checkpoint may hold a copy of an embedding that is the head as well.
    is_tied: bool,
    /// Where ranks share the weights: `flat` is this rank's piece, and `tensors` are there while they are needed.
    pub sharding: Option<Rc<Sharding>>,
}

impl WholeModel {
    pub fn new(weights: &Weights, config: &ModelConfig, kind: Kind, device: Device) -> Result<Self> {
        let specs = config.tensors();
        let size = specs.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
        let mut flat = Flat::new(size, kind, device);
        let (mut names, mut tensors) = (vec![], BTreeMap::new());
        for (name, shape) in specs {
            tensors.insert(name.clone(), flat.leaf(&shape)?);
            names.push(name);
        }
        let model = Self { flat, names, tensors, is_tied: config.tie_word_embeddings, sharding: None };
        model.read(weights)?;
        Ok(model)
    }

    /// Of which every rank of `spread` holds a piece.
    pub fn sharded(
        weights: &Weights,
        config: &ModelConfig,
        spread: &Spread,
        kind: Kind,
        device: Device,
    ) -> Result<Self> {
        let size = Shards::new(config, spread.group.world_size).size();
        let kept_on = if spread.placement.cpu_offload { Device::Cpu } else { device };
        let flat = Flat::new(size, kind, kept_on);
        let sharding = Sharding::new(config, weights, spread, Pieces::Trained(&flat), (kind, device))?;
        let tensors: BTreeMap<_, _> =
            sharding.tensors().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect();
        let names = config.tensors().into_iter().map(|(name, _)| name).collect();
        Ok(Self { flat, names, tensors, is_tied: config.tie_word_embeddings, sharding: Some(sharding) })
    }

    /// Takes the numbers of a checkpoint, one tensor at a time.
    pub fn read(&self, weights: &Weights) -> Result<()> {
        if let Some(sharding) = &self.sharding {
            return sharding.read(weights);
        }
        for (name, tensor) in &self.tensors {
            let read = weights.load(name, &tensor.size(), tensor.kind(), Device::Cpu)?;
            tch::no_grad(|| tensor.shallow_clone().copy_(&read));
        }
        Ok(())
    }

    fn snapshot(&self) -> Snapshot {
        let is_tied = self.is_tied;
        if let Some(sharding) = &self.sharding {
            return Snapshot::Shared { shards: sharding.shards.clone(), is_tied };
        }
        let mut flat = self.flat.snapshot();
        let tensors = self.names.iter().map(|name| (name.clone(), flat.next(&self.tensors[name].size()))).collect();
        Snapshot::Whole { tensors, is_tied }
    }

    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name_of(name, self.is_tied))
    }
}

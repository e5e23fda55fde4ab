//! LoRA: `y = W x + (α/r) B A dropout(x)` on the layers the config names.
//!
//! All factors are views of one vector.

use host::config::plan::LoraPlan;
use host::{Error, Result};
use tch::{Device, Kind, Tensor};

use crate::flat::Flat;
use crate::torch::TorchContext;
use host::hf::LinearSpec;

/// The adapter of one linear layer.
pub struct LoraPair {
    pub a: Tensor, // [rank, in]
    pub b: Tensor, // [out, rank]
    pub scale: f64,
    pub dropout: f64,
    /// Keeps the dropout masks of different layers apart.
    layer_key: i64,
}

impl LoraPair {
    /// `x` `[T, in]` with elements zeroed by (key of its row, layer, column), the rest scaled up.
    pub fn drop(&self, x: &Tensor, keys: &Tensor) -> Result<Tensor> {
        let keys = keys.bitwise_xor(self.layer_key);
        let kept = 1.0 - self.dropout;
        let mask = host_ffi::rng::dropout_mask(&keys, x.size()[1], kept, x.kind()).torch("draw a dropout mask")?;
        Ok(x * mask)
    }
}

/// Every pair of a model.
pub struct LoraAdapter {
    pub plan: LoraPlan,
    entries: Vec<Entry>,
    /// A then B of each layer.
    pub flat: Flat,
}

struct Entry {
    spec: LinearSpec,
    a: Tensor,
    b: Tensor,
}

impl LoraAdapter {
    /// Chooses the layers among `linears` and allocates their factors, in `kind`. A starts Kaiming-uniform (`a = √5`,
    /// so `U(-1/√in, 1/√in)`), the same on every rank; B starts at zero.
    pub fn new(plan: &LoraPlan, linears: &[LinearSpec], seed: u64, kind: Kind, device: Device) -> Result<Self> {
        let specs = matching(plan, linears)?;
        let rank = plan.rank as i64;
        let total: i64 = specs.iter().map(|spec| rank * (spec.inputs + spec.outputs)).sum();
        let mut flat = Flat::new(total, kind, device);
        let mut entries = Vec::with_capacity(specs.len());
        for spec in specs {
            let (a, b) = (flat.leaf(&[rank, spec.inputs])?, flat.leaf(&[spec.outputs, rank])?);
            entries.push(Entry { spec, a, b });
        }
        let adapter = Self { plan: plan.clone(), entries, flat };
        adapter.initialise(seed);
        Ok(adapter)
    }

    /// The adapter as it is now, in memory of its own: what a checkpoint is written from while training goes on.
    pub fn snapshot(&self) -> Self {
        let mut flat = self.flat.snapshot();
        let copy = |entry: &Entry| {
            let (a, b) = (flat.next(&entry.a.size()), flat.next(&entry.b.size()));
            Entry { spec: entry.spec.clone(), a, b }
        };
        Self { plan: self.plan.clone(), entries: self.entries.iter().map(copy).collect(), flat }
    }

    fn initialise(&self, seed: u64) {
        tch::no_grad(|| {
            for (index, entry) in self.entries.iter().enumerate() {
                let bound = 1.0 / (entry.spec.inputs as f64).sqrt();
                let values: Vec<f32> = uniform(seed, index as u64)
                    .take((self.plan.rank as i64 * entry.spec.inputs) as usize)
                    .map(|unit| ((2.0 * unit - 1.0) * bound) as f32)
                    .collect();
                let values = Tensor::from_slice(&values).view_as(&entry.a);
                entry.a.shallow_clone().copy_(&values);
            }
        });
    }

    /// The pair of the layer called `name`, if it has one.
    pub fn pair(&self, name: &str) -> Option<LoraPair> {
        let (index, entry) = self.entries.iter().enumerate().find(|(_, entry)| entry.spec.name == name)?;
        Some(LoraPair {
            a: entry.a.shallow_clone(),
            b: entry.b.shallow_clone(),
            scale: self.scale(),
            dropout: self.plan.dropout,
            layer_key: splitmix(index as u64 + 1) as i64,
        })
    }

    pub fn scale(&self) -> f64 {
        self.plan.alpha / self.plan.rank as f64
    }

    /// Factors by layer name, in order: `(layer, A, B)`.
    pub fn factors(&self) -> impl Iterator<Item = (&str, &Tensor, &Tensor)> {
        self.entries.iter().map(|entry| (entry.spec.name.as_str(), &entry.a, &entry.b))
    }

    /// `weight + (α/r) B A` for the layer called `name`, in f32; `None` when that layer has no adapter.
    pub fn merge(&self, name: &str, weight: &Tensor) -> Option<Tensor> {
        let entry = self.entries.iter().find(|entry| entry.spec.name == name)?;
        let merged = tch::no_grad(|| {
            let (a, b) = (entry.a.to_kind(Kind::Float), entry.b.to_kind(Kind::Float));
            weight.to_kind(Kind::Float) + b.matmul(&a).to_device(weight.device()) * self.scale()
        });
        Some(merged)
    }
}

/// The layers a plan's targets name; a target that names none is an error.
fn matching(plan: &LoraPlan, linears: &[LinearSpec]) -> Result<Vec<LinearSpec>> {
    let ends_with = |spec: &LinearSpec, target: &str| spec.name.rsplit('.').next() == Some(target);
    for target in &plan.targets {
        if !linears.iter().any(|spec| ends_with(spec, target)) {
            let mut names: Vec<&str> = linears.iter().filter_map(|spec| spec.name.rsplit('.').next()).collect();
            names.sort_unstable();
            names.dedup();
            return Err(Error::config(format!("adapter target `{target}` matches no linear layer of this model"))
                .hint(format!("layer names here end in: {}", names.join(", "))));
        }
    }
    let wanted = |spec: &&LinearSpec| plan.targets.iter().any(|target| ends_with(spec, target));
    Ok(linears.iter().filter(wanted).cloned().collect())
}

/// A stream of numbers in `[0, 1)` that depends on nothing but `seed` and `stream` (SplitMix64).
fn uniform(seed: u64, stream: u64) -> impl Iterator<Item = f64> {
    let start = splitmix(seed ^ splitmix(stream));
    (0u64..).map(move |index| (splitmix(start.wrapping_add(index)) >> 11) as f64 / (1u64 << 53) as f64)
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood 2014) after one step of its counter.
pub fn splitmix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_names_no_layer_is_an_error() {
        let spec = |name: &str| LinearSpec { name: name.to_owned(), inputs: 4, outputs: 4, has_bias: false };
        let linears = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "lm_head"].map(spec);
        let plan = |targets: &[&str]| LoraPlan {
            rank: 2,
            alpha: 4.0,
            dropout: 0.0,
            targets: targets.iter().map(|target| (*target).to_owned()).collect(),
        };
        let found = matching(&plan(&["up_proj", "lm_head"]), &linears).unwrap();
        assert_eq!(found, [linears[1].clone(), linears[2].clone()]);
        let error = matching(&plan(&["q_proj", "v_proj"]), &linears).unwrap_err();
        assert_eq!(
            error.to_string(),
            "error: adapter target `v_proj` matches no linear layer of this model\n\
             hint: layer names here end in: lm_head, q_proj, up_proj"
        );
    }
}

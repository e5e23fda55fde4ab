//! The model as it is now: the base's tensors, trained or with the adapter folded in, streamed one at a time into shards with
//! an index.

use std::path::Path;

use host::Result;
use serde_json::json;
use tch::{Device, Kind, Tensor};

use crate::checkpoint::files::{self, LazyTensor};
use crate::model::Weights;

/// Hugging Face's own limit for one shard.
pub const MAX_SHARD_BYTES: usize = 5_000_000_000;

/// What the checkpoint's tensor of a name has become; the function given reads what it was.
pub type Now<'a> = dyn Fn(&str, &dyn Fn() -> Tensor) -> Tensor + 'a;

/// Writes every tensor of `base` as it is `now`, as `kind` into `dir`: `model-0000i-of-0000N.safetensors` and index.
pub fn write(base: &Weights, now: &Now, kind: Kind, max_shard_bytes: usize, dir: &Path) -> Result<()> {
    let dtype = files::dtype(kind)?;
    let mut shards: Vec<Vec<(&str, Vec<usize>)>> = vec![vec![]];
    let (mut shard_bytes, mut total_bytes) = (0, 0);
    for (name, entry) in &base.index.tensors {
        let bytes = entry.shape.iter().product::<usize>() * dtype.bitsize() / 8;
        if shard_bytes + bytes > max_shard_bytes && shard_bytes > 0 {
            shards.push(vec![]);
            shard_bytes = 0;
        }
        shard_bytes += bytes;
        total_bytes += bytes;
        shards.last_mut().expect("there is a first shard").push((name.as_str(), entry.shape.clone()));
    }
    let mut weight_map = serde_json::Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        let mut tensors = Vec::with_capacity(shard.len());
        for (name, shape) in shard {
            weight_map.insert((*name).to_owned(), json!(file));
            // Everything that can fail about a base tensor failed when the model was loaded from it.
            let name = *name;
            let produce = Box::new(move || {
                let before = || base.load_any(name, Kind::Float, Device::Cpu).expect("the base was loaded before");
                now(name, &before).to_kind(kind)
            });
            tensors.push((name.to_owned(), LazyTensor { dtype, shape: shape.clone(), produce }));
        }
        files::write_lazy(&dir.join(&file), tensors)?;
    }
    let index = json!({"metadata": {"total_size": total_bytes}, "weight_map": weight_map});
    files::write_json(&dir.join("model.safetensors.index.json"), &index)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use host::hf::WeightIndex;

    use super::*;

    /// No shard above the limit, an index that says where each tensor is, and the same numbers when it is loaded again.
    #[test]
    fn several_shards_load_again() {
        const LIMIT: usize = 600_000;
        let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny-llama");
        let base = Weights::open(WeightIndex::open(&base, &[]).unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        write(&base, &|_, before| before(), Kind::BFloat16, LIMIT, dir.path()).unwrap();

        let index: serde_json::Value =
            serde_json::from_slice(&std::fs::read(dir.path().join("model.safetensors.index.json")).unwrap()).unwrap();
        let map = index["weight_map"].as_object().unwrap();
        let files: BTreeSet<&str> = map.values().map(|file| file.as_str().unwrap()).collect();
        let count = files.len();
        assert!(count > 3, "{files:?}");
        for (file, number) in files.iter().zip(1..) {
            assert_eq!(*file, format!("model-{number:05}-of-{count:05}.safetensors"));
            let bytes = std::fs::read(dir.path().join(file)).unwrap();
            let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let names: BTreeSet<&str> = tensors.iter().map(|(name, _)| name).collect();
            let listed: BTreeSet<&str> = map.iter().filter(|(_, at)| *at == file).map(|(name, _)| &**name).collect();
            assert_eq!(names, listed);
            let data: usize = tensors.iter().map(|(_, view)| view.data().len()).sum();
            assert!(data <= LIMIT || names.len() == 1, "{file} has {data} bytes");
        }

        let merged = Weights::open(WeightIndex::open(dir.path(), &[]).unwrap()).unwrap();
        assert_eq!(merged.index.tensors.len(), base.index.tensors.len());
        for name in base.index.tensors.keys() {
            let load = |weights: &Weights| weights.load_any(name, Kind::Float, Device::Cpu).unwrap();
            assert!(load(&merged).equal(&load(&base)), "{name}");
        }
        let total: usize = merged.index.tensors.values().map(|entry| entry.end - entry.start).sum();
        assert_eq!(index["metadata"]["total_size"], total);
    }
}

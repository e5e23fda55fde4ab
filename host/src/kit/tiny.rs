//! A run so small that a recipe can be tried in a moment: a made-up Llama of 258 tokens (a byte each, begin and end), twelve
//! rows, three steps.

use std::path::Path;

use serde_json::json;

use crate::config::Config;
use crate::config::plan::TrainPlan;
use crate::config::resolve::{self, FileKind, Surroundings};
use crate::error::{Error, IoContext, Result};
use crate::guest;
use crate::hf::ModelConfig;

/// Steps of the run.
pub const STEPS: usize = 3;
/// The log's file, in the folder of the run.
pub const LOG: &str = "out/logs/log.jsonl";

const SEED: u32 = 1;
const BOS: usize = 256;
const EOS: usize = 257;

const MODEL: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258, "rms_norm_eps": 1e-5,
"rope_theta": 10000.0, "max_position_embeddings": 512, "tie_word_embeddings": true, "hidden_act": "silu"}"#;

/// What a recipe's test runs with; `[folder]` is where the rest of it lies.
const CONFIG: &str = "\
output_dir: [folder]/out
model:
  _component_: lora_llama
  lora_attn_modules: [q_proj, v_proj]
checkpointer:
  _component_: FullModelHFCheckpointer
  checkpoint_dir: [folder]/model
tokenizer:
  _component_: hf_tokenizer
  path: ${checkpointer.checkpoint_dir}/tokenizer.json
  max_seq_len: 128
dataset:
  _component_: instruct_dataset
  source: json
  data_files: [folder]/data.jsonl
cache_dir: [folder]/cache
seed: 1
batch_size: 2
gradient_accumulation_steps: 2
epochs: 1
optimizer:
  _component_: AdamW
  lr: 1e-2
loss:
  _component_: cross_entropy
metric_logger:
  _component_: DiskLogger
  log_dir: ${output_dir}/logs
  output_fmt: jsonl
  filename: log.jsonl
save_adapter_weights_only: True
device: cpu
dtype: fp32
";

/// Lays model and rows into `folder`, and plans a run of the recipe over them.
pub fn plan(recipe: &Path, folder: &Path, overrides: &[String]) -> Result<TrainPlan> {
    let write = |name: &str, content: &[u8]| {
        let path = folder.join(name);
        std::fs::write(&path, content).path_context("write", path)
    };
    let model = folder.join("model");
    std::fs::create_dir_all(&model).path_context("make the folder", &model)?;
    write("model/config.json", MODEL.as_bytes())?;
    write("model/tokenizer.json", tokenizer().to_string().as_bytes())?;
    write("model/tokenizer_config.json", br#"{"bos_token": "<bos>", "eos_token": "<eos>"}"#)?;
    write("model/model.safetensors", &weights()?)?;
    write("data.jsonl", include_bytes!("files/data.jsonl"))?;
    let text = CONFIG.replace("[folder]", &folder.display().to_string());
    let config = Config::parse(&text, Path::new("the config of the test"), overrides)?;
    let around = Surroundings {
        seed: SEED,
        cwd: folder.to_owned(),
        shipped: vec![],
        cache_dir: None,
        kind: &|path| {
            let metadata = std::fs::metadata(path).ok()?;
            Some(if metadata.is_dir() { FileKind::Folder } else { FileKind::File })
        },
        files_below: &|_| vec![],
        metadata: &guest::metadata,
    };
    Ok(resolve::train(&config, recipe, &around)?.plan)
}

/// A token for each byte, in the letters that byte-level vocabularies write bytes with.
fn tokenizer() -> serde_json::Value {
    let mut letters: Vec<char> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    letters.sort_unstable();
    let vocabulary: serde_json::Map<_, _> =
        letters.iter().enumerate().map(|(id, letter)| (letter.to_string(), json!(id))).collect();
    let special = |id: usize, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [special(BOS, "<bos>"), special(EOS, "<eos>")],
        "pre_tokenizer": bytes, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocabulary, "merges": []},
    })
}

/// Weights that look random and are the same everywhere.
fn weights() -> Result<Vec<u8>> {
    let mut state = u64::from(SEED);
    let mut draw = || {
        // A linear congruential generator (D. Knuth, MMIX); its upper bits are good enough for a start.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let tensors = ModelConfig::parse(MODEL)?.tensors().into_iter().map(|(name, shape)| {
        let shape: Vec<usize> = shape.into_iter().map(|size| size as usize).collect();
        let is_norm = name.ends_with("norm.weight");
        let numbers = (0..shape.iter().product()).map(|_| if is_norm { 1.0 } else { 0.2 * draw() });
        (name, shape, numbers.flat_map(f32::to_le_bytes).collect::<Vec<u8>>())
    });
    let tensors: Vec<_> = tensors.collect();
    let bug = |error: safetensors::SafeTensorError| Error::bug("cannot make the tiny model").cause(error);
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, shape, bytes)| {
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
            view.map(|view| (name.as_str(), view))
        })
        .collect::<std::result::Result<_, _>>()
        .map_err(bug)?;
    safetensors::serialize(views, None).map_err(bug)
}

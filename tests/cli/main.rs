//! The command line as a person sees it: arguments, exit code, stdout, stderr, in a folder of its own.
//!
//! One snapshot a verb, and one for each mistake that is found before a worker starts.

mod config;
#[path = "../support/config.rs"]
mod config_world;
mod damage;
mod dependencies;
mod files;
mod guests;
mod hub;
mod plan;
mod properties;
#[path = "../support/hub.rs"]
mod support_hub;
mod verbs;

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// A folder with a model, data, guests and a config that is fine.
struct Case {
    dir: TempDir,
}

const CONFIG: &str = "\
output_dir: out
model:
  _component_: lora_llama
  lora_attn_modules: [q_proj, v_proj]
checkpointer:
  _component_: FullModelHFCheckpointer
  checkpoint_dir: model
tokenizer:
  _component_: hf_tokenizer
  path: ${checkpointer.checkpoint_dir}
  max_seq_len: 64
  prompt_template: SummarizeTemplate
dataset:
  _component_: instruct_dataset
  source: data
  split: train[:2]
optimizer:
  _component_: AdamW
  lr: 3e-4
lr_scheduler:
  _component_: cosine
  num_warmup_steps: 1
loss:
  _component_: cross_entropy
device: cpu
";

const GENERATE: &str = "\
model: {_component_: llama}
checkpointer: {_component_: FullModelHFCheckpointer, checkpoint_dir: model}
tokenizer: {_component_: hf_tokenizer, path: model}
prompt: {user: hello}
device: cpu
";

const MODEL_CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16,
"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 32, "rms_norm_eps": 1e-5,
"rope_theta": 10000.0, "max_position_embeddings": 64, "tie_word_embeddings": true, "hidden_act": "silu"}"#;

const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";
const CORE_MODULE: &[u8] = b"\0asm\x01\0\0\0";

/// A whole weight file of zeros.
fn weights(config: &str) -> Vec<u8> {
    let tensors = host::hf::ModelConfig::parse(config).unwrap().tensors();
    let sized = tensors.into_iter().map(|(name, shape)| {
        let shape: Vec<usize> = shape.into_iter().map(|size| size as usize).collect();
        (name, vec![0u8; 2 * shape.iter().product::<usize>()], shape)
    });
    let sized: Vec<_> = sized.collect();
    let views = sized.iter().map(|(name, bytes, shape)| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::BF16, shape.clone(), bytes);
        (name.as_str(), view.unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

impl Case {
    fn new() -> Self {
        let case = Self { dir: tempfile::tempdir().unwrap() };
        case.write("c.yaml", CONFIG);
        case.write("model/config.json", MODEL_CONFIG);
        case.write("model/model.safetensors", weights(MODEL_CONFIG));
        case.write("model/tokenizer.json", "{}");
        case.write("data/train.jsonl", "{\"input\": \"a\", \"output\": \"b\"}\n");
        case.write("templates/summarize.wasm", COMPONENT);
        case.write("recipes/lora_distributed.wasm", COMPONENT);
        case
    }

    /// A case whose config is `text`.
    fn with(text: &str) -> Self {
        let case = Self::new();
        case.write("c.yaml", text);
        case
    }

    /// A case whose config has each `from` replaced by its `to`.
    fn edited(edits: &[(&str, &str)]) -> Self {
        Self::with(&edits.iter().fold(CONFIG.to_owned(), |text, (from, to)| {
            assert!(text.contains(from), "the config has no `{from}`");
            text.replacen(from, to, 1)
        }))
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// Runs `host` here and returns what came of it.
    fn host(&self, arguments: &[&str]) -> String {
        self.outcome(Command::new(env!("CARGO_BIN_EXE_host")).args(arguments))
    }

    /// Runs a `host` here in an environment that says nothing, and returns what came of it.
    fn outcome(&self, command: &mut Command) -> String {
        let vars: Vec<_> =
            command.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))).collect();
        let output = command.current_dir(self.path()).env_clear().env("HOME", self.path()).envs(vars).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        let mut out = format!("exit {}", output.status.code().map_or("by a signal".into(), |code| code.to_string()));
        for (name, bytes) in [("stdout", &output.stdout), ("stderr", &output.stderr)] {
            if !bytes.is_empty() {
                out += &format!("\n--- {name}\n{}", text(bytes));
            }
        }
        assert!(!self.path().join("out").exists(), "nothing is written before a run starts");
        out
    }

    fn validate(&self, overrides: &[&str]) -> String {
        self.host(&[&["validate", "c.yaml"], overrides].concat())
    }
}

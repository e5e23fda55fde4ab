//! The reference job as its users typed it, from `ls` to `generate`, against a hub on loopback.
//!
//! The model is small and drawn, with Llama 3.1's architecture, file names and size of vocabulary. What differs from the
//! command lines of the job: where the model's folder is, the device, and how much of the data is seen.

use std::path::Path;

use base64::Engine as _;
use host::hf::ModelConfig;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::case::{Case, Ended, root};
use crate::support_hub::{Access, Hub, TOKEN, add_xsum};

const REPO: &str = "meta-llama/Meta-Llama-3.1-8B-Instruct";
const VOCABULARY: usize = 128_256;

/// 128,000 ranks: those of the fixture, then byte strings that no text has.
fn vocabulary() -> Vec<u8> {
    let fixture = root().join("tests/fixtures/tokenizers/llama3.model");
    let mut text = std::fs::read_to_string(fixture).unwrap();
    for rank in text.lines().count()..128_000 {
        let bytes = [0xff, 0xfe, (rank >> 16) as u8, (rank >> 8) as u8, rank as u8];
        text.push_str(&format!("{} {rank}\n", base64::engine::general_purpose::STANDARD.encode(bytes)));
    }
    text.into_bytes()
}

/// The files of the gated repository, its weights in four shards.
fn add_model(hub: &Hub) {
    let config = root().join("tests/fixtures/families/llama3_1/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(config).unwrap()).unwrap();
    config["vocab_size"] = VOCABULARY.into();
    config["max_position_embeddings"] = 4096.into();
    let config = config.to_string();
    let mut drawn = 7u32;
    let mut draw = |name: &str, shape: &[i64]| -> Vec<u8> {
        let number = |_| {
            drawn = drawn.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let spread = if name.contains("norm") { 1.0 } else { (drawn >> 8) as f32 / (1 << 24) as f32 * 0.1 - 0.05 };
            half::bf16::from_f32(spread).to_le_bytes()
        };
        (0..shape.iter().product()).flat_map(number).collect()
    };
    let tensors = ModelConfig::parse(&config).unwrap().tensors();
    let tensors: Vec<_> = tensors.into_iter().map(|(name, shape)| (draw(&name, &shape), name, shape)).collect();
    let mut files = vec![
        ("config.json".to_owned(), config.into_bytes()),
        ("generation_config.json".to_owned(), br#"{"eos_token_id": [128001, 128008, 128009]}"#.to_vec()),
        ("original/tokenizer.model".to_owned(), vocabulary()),
        ("original/params.json".to_owned(), b"{}".to_vec()),
        ("original/consolidated.00.pth".to_owned(), vec![1; 4000]),
    ];
    let mut map = serde_json::Map::new();
    for (index, part) in tensors.chunks(tensors.len().div_ceil(4)).enumerate() {
        let file = format!("model-{:05}-of-00004.safetensors", index + 1);
        let views = part.iter().map(|(bytes, name, shape)| {
            let shape = shape.iter().map(|size| *size as usize).collect();
            (name.as_str(), TensorView::new(safetensors::Dtype::BF16, shape, bytes).unwrap())
        });
        map.extend(part.iter().map(|(_, name, _)| (name.clone(), Value::from(file.as_str()))));
        files.push((file, safetensors::serialize(views, None).unwrap()));
    }
    let index = json!({"metadata": {}, "weight_map": map}).to_string();
    files.push(("model.safetensors.index.json".to_owned(), index.into_bytes()));
    hub.add(
        &format!("models/{REPO}"),
        Access::Gated,
        "main",
        files.iter().map(|(path, bytes)| (path.as_str(), bytes.clone())),
    );
}

fn add_alpaca(hub: &Hub) {
    let row = |i: usize| json!({"instruction": format!("Say {i}."), "input": "", "output": format!("{i}")});
    let rows = Value::from((0..140).map(row).collect::<Vec<_>>()).to_string();
    let files = [("alpaca_data_cleaned.json", rows.into_bytes())];
    hub.add("datasets/yahma/alpaca-cleaned", Access::Public, "main", files);
}

#[test]
fn the_reference_job_from_ls_to_generate() {
    let (case, hub) = (Case::new(), Hub::start());
    add_model(&hub);
    add_alpaca(&hub);
    add_xsum(&hub);
    std::os::unix::fs::symlink(root().join("configs"), case.path("configs")).unwrap();
    let host = |arguments: &[&str]| {
        let mut command = case.host(arguments);
        command.env("HF_ENDPOINT", &hub.address).env("HF_HOME", case.path("hf")).env_remove("HF_TOKEN");
        let ended = Ended::of(&mut command);
        assert_eq!(ended.code, 0, "{arguments:?}: {}", ended.stderr);
        ended
    };
    assert!(host(&["ls"]).stdout.contains("llama3_1/8B_lora\n"));

    let folder = case.path("Meta-Llama-3.1-8B-Instruct");
    let folder = folder.to_str().unwrap();
    let ignored = "original/consolidated.00.pth";
    host(&["download", REPO, "--output-dir", folder, "--ignore-patterns", ignored, "--hf-token", TOKEN]);
    assert!(Path::new(folder).join("original/tokenizer.model").exists() && !Path::new(folder).join(ignored).exists());
    let model = case.contents("Meta-Llama-3.1-8B-Instruct");

    // What is this machine's and not the job's.
    let dir = format!("checkpointer.checkpoint_dir={folder}/");
    let out = format!("checkpointer.output_dir={folder}/");
    let tokenizer = format!("tokenizer.path={folder}/original/tokenizer.model");
    let here =
        [dir.as_str(), &tokenizer, "device=cpu", "cache_dir=tokens", "epochs=1", "lr_scheduler.num_warmup_steps=1"];

    host(&["cp", "llama3_1/8B_lora", "my_llama3_1_custom_config.yaml"]);
    let of_two = ["run", "--nproc_per_node", "2", "lora_finetune_distributed", "--config"];
    let copied = [&of_two[..], &["my_llama3_1_custom_config.yaml"], &here, &["output_dir=alpaca"]].concat();
    let ran = host(&copied);
    assert!(ran.stderr.contains("saved alpaca/epoch_0 in"), "{}", ran.stderr);

    // The job's own config, written into the copy; it sends checkpoints into the model's folder.
    let own = include_str!("../fixtures/seed/my_llama3_1_custom_config.yaml");
    case.write("my_llama3_1_custom_config.yaml", own);
    let rows = ["dataset.split=train[:128]", out.as_str(), "output_dir=own"];
    let ran = host(&[&of_two[..], &["my_llama3_1_custom_config.yaml"], &here, &rows].concat());
    assert!(ran.stderr.contains("checkpoints go to `own`"), "{}", ran.stderr);
    assert_eq!(ran.stderr.matches("no code of a data set is ever run").count(), 1, "{}", ran.stderr);

    // The same by the command line alone.
    let overrides = [
        "dataset=torchtune.datasets.instruct_dataset",
        "dataset.source=EdinburghNLP/xsum",
        "dataset.split=train[:2000]",
        "dataset.max_seq_len=2048",
        "dataset.template=torchtune.data.SummarizeTemplate",
        "dataset.column_map.dialogue=document",
        "dataset.column_map.output=summary",
        "dataset.trust_remote_code=True",
        "dataset.packed=False",
        "dataset.train_on_input=False",
        "epochs=1",
    ];
    let ran = [&of_two[..], &["llama3_1/8B_lora"], &overrides, &here, &rows[..1], &["output_dir=overridden"]].concat();
    host(&ran);
    let losses = |output: &str| {
        let losses: Value =
            serde_json::from_slice(&case.contents(&format!("{output}/epoch_0"))["losses.json"]).unwrap();
        losses["training"].clone()
    };
    assert_eq!(losses("own").as_array().unwrap().len(), 1, "128 samples are one step of 2 x 32 on two ranks");
    assert_eq!(case.contents("Meta-Llama-3.1-8B-Instruct"), model, "the model's folder was written to");

    host(&["cp", "generation", "./my_llama3_1_custom_generation_config.yaml"]);
    let own = include_str!("../fixtures/seed/my_llama3_1_custom_generation_config.yaml");
    case.write("my_llama3_1_custom_generation_config.yaml", own);
    let generate = ["run", "generate", "--config", "./my_llama3_1_custom_generation_config.yaml"];
    let tuned = ["checkpointer.checkpoint_dir=own/epoch_0", "checkpointer.checkpoint_files=null", &tokenizer];
    let said = host(&[&generate[..], &tuned, &["device=cpu", "max_new_tokens=8"]].concat());
    assert!(said.stdout.contains("Summarize this dialogue: The crash happened about 07:20 GMT"), "{}", said.stdout);
}

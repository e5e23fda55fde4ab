//! Mistakes in a config.

use std::collections::BTreeSet;

use insta::assert_snapshot;
use serde_json::Value;

use super::{Case, GENERATE};

#[test]
fn a_config_that_is_not_there() {
    assert_snapshot!(Case::new().host(&["validate", "absent.yaml"]), @"
    exit 2
    --- stderr
    error: cannot read the config `absent.yaml`
    cause: No such file or directory (os error 2)
    hint: `host ls` lists the configs that come with it; `--config` takes a path or such a name
    ");
}

#[test]
fn a_config_with_a_slip_in_its_name() {
    let case = Case::new();
    case.write("configs/smollm2/135M_lora_summarize.yaml", "");
    for name in
        ["smollm2/135M_lora_sumarize", "135M_lora_sumarize", "elsewhere/configs/smollm2/135M_lora_summarize.yaml"]
    {
        for arguments in [&["validate", name][..], &["run", "lora_distributed", "--config", name]] {
            insta::allow_duplicates! { assert_snapshot!(case.host(arguments).replace(name, "NAME"), @"
            exit 2
            --- stderr
            error: there is no config `NAME`
            hint: did you mean `smollm2/135M_lora_summarize`?
            ") };
        }
    }
}

#[test]
fn not_yaml() {
    assert_snapshot!(Case::with("output_dir: [out\nmodel: x\n").validate(&[]), @"
    exit 2
    --- stderr
    error: the config is not YAML
      --> c.yaml:2:6
    cause: illegal placement of ':' indicator
    ");
    assert_snapshot!(Case::with("output_dir: out\n\tmodel: x\n").validate(&[]), @"
    exit 2
    --- stderr
    error: the config is not YAML
      --> c.yaml:2:1
    cause: found a tab in the indentation
    hint: indent with spaces
    ");
}

#[test]
fn not_text() {
    let case = Case::new();
    case.write("c.yaml", b"output_dir: \xff\xfe");
    assert_snapshot!(case.validate(&[]), @"
    exit 2
    --- stderr
    error: cannot read the config `c.yaml`
    cause: byte 12 is not UTF-8, so it is not a text file
    ");
}

#[test]
fn nccl_on_a_cpu() {
    let case = Case::new();
    assert_snapshot!(case.validate(&["distributed_backend=nccl"]), @"
    exit 2
    --- stderr
    error: `distributed_backend: nccl` moves the memory of GPUs, and `device` is cpu
      --> command line
    hint: leave it out: on a CPU it is gloo, on a GPU nccl
    ");
}

#[test]
fn a_list() {
    assert_snapshot!(Case::with("- output_dir: out\n- epochs: 1\n").validate(&[]), @"
    exit 2
    --- stderr
    error: a config is a mapping of keys to values, found a list
      --> c.yaml:1:1
    hint: start from one of the files `host ls` lists
    ");
}

#[test]
fn nothing() {
    assert_snapshot!(Case::with("# only a comment\n").validate(&[]), @"
    exit 2
    --- stderr
    error: a config is a mapping of keys to values, found nothing
      --> c.yaml:1:1
    hint: start from one of the files `host ls` lists
    ");
}

#[test]
fn a_key_twice() {
    assert_snapshot!(Case::edited(&[("device: cpu", "device: cpu\noutput_dir: other")]).validate(&[]), @"
    exit 2
    --- stderr
    error: the key `output_dir` stands twice in the same section
      --> c.yaml:26:1
      --> c.yaml:1:1
    hint: keep one of the two
    ");
}

#[test]
fn an_unknown_key() {
    assert_snapshot!(Case::edited(&[("  lr: 3e-4", "  learning_rate: 3e-4")]).validate(&[]), @"
    exit 2
    --- stderr
    error: unknown key `optimizer.learning_rate`
      --> c.yaml:19:3
    hint: keys of `optimizer`: lr, betas, eps, weight_decay, fp32_master_weights, bf16_stochastic_round
    ");
    assert_snapshot!(Case::edited(&[("  max_seq_len", "  max_seqlen")]).validate(&[]), @"
    exit 2
    --- stderr
    error: unknown key `tokenizer.max_seqlen`
      --> c.yaml:11:3
    hint: did you mean `tokenizer.max_seq_len`?
    ");
    assert_snapshot!(Case::edited(&[("device: cpu", "devise: cpu")]).validate(&[]), @"
    exit 2
    --- stderr
    error: unknown key `devise`
      --> c.yaml:25:1
    hint: did you mean `device`?
    ");
}

#[test]
fn an_unknown_component() {
    let case = Case::edited(&[("_component_: lora_llama", "_component_: torchtune.models.smollm2.lora_smolm2_135m")]);
    assert_snapshot!(case.validate(&[]), @"
    exit 2
    --- stderr
    error: unknown model `torchtune.models.smollm2.lora_smolm2_135m` in `model._component_`
      --> c.yaml:3:16
    hint: did you mean `torchtune.models.smollm2.lora_smollm2_135m`?
    ");
    assert_snapshot!(Case::edited(&[("_component_: AdamW", "_component_: os.system")]).validate(&[]), @"
    exit 2
    --- stderr
    error: unknown optimizer `os.system` in `optimizer._component_`
      --> c.yaml:18:16
    hint: there is: AdamW
    ");
}

#[test]
fn a_component_in_the_wrong_place() {
    assert_snapshot!(Case::edited(&[("_component_: AdamW", "_component_: lora_llama")]).validate(&[]), @"
    exit 2
    --- stderr
    error: `lora_llama` is a model, and `optimizer` needs an optimizer
      --> c.yaml:18:16
    hint: `optimizer._component_: AdamW`
    ");
}

#[test]
fn a_section_without_a_component() {
    assert_snapshot!(Case::edited(&[("  _component_: AdamW\n", "")]).validate(&[]), @"
    exit 2
    --- stderr
    error: `optimizer` has no `_component_`, which names the optimizer
      --> c.yaml:18:3
    hint: `optimizer._component_: AdamW`
    ");
    assert_snapshot!(Case::edited(&[("optimizer:\n  _component_: AdamW\n  lr: 3e-4\n", "optimizer: AdamW\n")]).validate(&[]), @"
    exit 2
    --- stderr
    error: `optimizer` must be a section of keys, found the text `AdamW`
      --> c.yaml:17:12
    hint: `optimizer: {_component_: AdamW}`
    ");
}

#[test]
fn a_component_we_do_not_have() {
    let case = Case::edited(&[("_component_: hf_tokenizer", "_component_: torchtune.models.phi3.phi3_mini_tokenizer")]);
    assert_snapshot!(case.validate(&[]), @"
    exit 2
    --- stderr
    error: the tokenizer `phi3_mini_tokenizer` is not supported: models of the Phi family are not built yet
      --> c.yaml:9:16
    hint: there is: hf_tokenizer, llama3_tokenizer, llama2_tokenizer, mistral_tokenizer, qwen2_tokenizer, qwen2_5_tokenizer, qwen3_tokenizer, HuggingFaceModelTokenizer
    ");
}

#[test]
fn a_value_of_the_wrong_type() {
    assert_snapshot!(Case::edited(&[("  lr: 3e-4", "  lr: fast")]).validate(&[]), @"
    exit 2
    --- stderr
    error: `optimizer.lr` must be a number, at least 0, found the text `fast`
      --> c.yaml:19:7
    ");
    assert_snapshot!(Case::edited(&[("device: cpu", "device: gpu")]).validate(&[]), @"
    exit 2
    --- stderr
    error: `device` must be one of `cpu`, `cuda`, found the text `gpu`
      --> c.yaml:25:9
    ");
}

#[test]
fn missing_sections() {
    assert_snapshot!(Case::with("output_dir: out\n").validate(&[]), @"
    exit 2
    --- stderr
    error: the key `tokenizer` is missing
      --> c.yaml:1:1
    hint: `tokenizer: {_component_: hf_tokenizer}`: how text becomes tokens

    error: the key `dataset` is missing
      --> c.yaml:1:1
    hint: `dataset: {_component_: instruct_dataset}`: what to train on; of several the rows follow each other

    error: the key `model` is missing
      --> c.yaml:1:1
    hint: `model: {_component_: lora_llama}`: what to train: the adapters of a `lora_` model, all weights of another

    error: the key `checkpointer` is missing
      --> c.yaml:1:1
    hint: `checkpointer: {_component_: FullModelHFCheckpointer}`: where weights come from and go to

    error: the key `optimizer` is missing
      --> c.yaml:1:1
    hint: `optimizer: {_component_: AdamW}`: how gradients change weights

    error: the key `loss` is missing
      --> c.yaml:1:1
    hint: `loss: {_component_: cross_entropy}`: what is made small; also the path of a loss guest, whose settings the other keys are
    ");
}

#[test]
fn a_refused_key() {
    assert_snapshot!(Case::new().validate(&["optimizer_in_bwd=True"]), @"
    exit 2
    --- stderr
    error: `optimizer_in_bwd` can only be `False`: it gives up clipping and accumulation
      --> command line
    hint: set it to `False` or leave it out
    ");
    // v0.2.1's key, whose input column has the template's own name.
    assert_snapshot!(Case::new().validate(&["dataset.template=torchtune.data.SummarizeTemplate"]), @"
    exit 2
    --- stderr
    error: the data has no column `dialogue`
      --> c.yaml:14:3
      --> data/train.jsonl
    hint: its columns are `input`, `output`; `column_map` says which to take
    ");
}

#[test]
fn several_mistakes_at_once() {
    let case = Case::edited(&[
        ("output_dir: out", "output_dir: ${root}/out"),
        ("[q_proj, v_proj]", "[q_prj, v_proj]"),
        ("  lr: 3e-4", "  lr: 3e-4\n  beta: 0.9"),
        ("train[:2]", "trian[:2]"),
        ("  num_warmup_steps: 1", "  num_warmup_steps: -1"),
        ("device: cpu", "device: cpu\nclip_grad_norm: -1"),
    ]);
    assert_snapshot!(case.validate(&["epochs=0", "nonsense"]), @"
    exit 2
    --- stderr
    error: the override `nonsense` has no `=`
      --> command line: nonsense
    hint: `key=value` sets a key, `~key` deletes one

    error: `epochs` must be a whole number, at least 1, found the number `0`
      --> command line

    error: `${root}` names a key that is not in the config
      --> c.yaml:1:13

    error: `model.lora_attn_modules` cannot hold the text `q_prj`
      --> c.yaml:4:23
    hint: did you mean `q_proj`?

    error: `dataset.split` names the split `trian`, which has no file
      --> c.yaml:16:10
    hint: the data has: train

    error: unknown key `optimizer.beta`
      --> c.yaml:20:3
    hint: did you mean `optimizer.betas`?

    error: `lr_scheduler.num_warmup_steps` must be a whole number, at least 0, found the number `-1`
      --> c.yaml:23:21

    error: `clip_grad_norm` must be a number above 0, `inf` or null, found the number `-1`
      --> c.yaml:27:17
    hint: `clip_grad_norm: 1.0`; `inf` logs the norm and clips nothing
    ");
}

#[test]
fn overrides_that_cannot_be() {
    assert_snapshot!(Case::new().validate(&["epochs"]), @"
    exit 2
    --- stderr
    error: the override `epochs` has no `=`
      --> command line: epochs
    hint: `key=value` sets a key, `~key` deletes one
    ");
    assert_snapshot!(Case::new().validate(&["~optimizer.lrr"]), @"
    exit 2
    --- stderr
    error: `optimizer.lrr` is not in the config, so it cannot be deleted
      --> command line: ~optimizer.lrr
    hint: did you mean `~optimizer.lr`?
    ");
    assert_snapshot!(Case::new().validate(&["epochs=[1"]), @r#"
    exit 2
    --- stderr
    error: the value of `epochs` is not YAML
      --> command line: epochs=[1
    cause: while parsing a flow sequence, expected ',' or ']'
    hint: quote it for YAML: "key='[text'"
    "#);
    assert_snapshot!(Case::new().validate(&["optimizer.lr=fast"]), @"
    exit 2
    --- stderr
    error: `optimizer.lr` must be a number, at least 0, found the text `fast`
      --> command line
    ");
    assert_snapshot!(Case::new().validate(&["optimizr.lr=1"]), @"
    exit 2
    --- stderr
    error: unknown key `optimizr`
      --> command line
    hint: did you mean `optimizer`?
    ");
}

#[test]
fn interpolations_that_lead_nowhere() {
    assert_snapshot!(Case::edited(&[("${checkpointer.checkpoint_dir}", "${checkpointer.checkpont_dir}")]).validate(&[]), @"
    exit 2
    --- stderr
    error: `${checkpointer.checkpont_dir}` names a key that is not in the config
      --> c.yaml:10:9
    hint: did you mean `${checkpointer.checkpoint_dir}`?
    ");
    assert_snapshot!(Case::new().validate(&["output_dir=${checkpointer.checkpoint_dir}", "checkpointer.checkpoint_dir=${output_dir}"]), @"
    exit 2
    --- stderr
    error: `${checkpointer.checkpoint_dir}` leads back to itself: `checkpointer.checkpoint_dir` → `output_dir` → `checkpointer.checkpoint_dir`
      --> command line
    hint: give one of them a value of its own

    error: `${output_dir}` leads back to itself: `output_dir` → `checkpointer.checkpoint_dir` → `output_dir`
      --> command line
    hint: give one of them a value of its own
    ");
    assert_snapshot!(Case::new().validate(&["output_dir=${oc.env:HOME}"]), @"
    exit 2
    --- stderr
    error: `${oc.env:HOME}` calls a resolver, and a config cannot run anything
      --> command line
    hint: write the path from the top of the config: `${section.key}`
    ");
}

#[test]
fn a_prompt_of_nothing() {
    let case = Case::with(GENERATE);
    for empty in ["prompt.user=", "prompt.user=' '"] {
        insta::allow_duplicates! { assert_snapshot!(case.validate(&[empty]), @"
        exit 2
        --- stderr
        error: `prompt.user` is empty, so there is nothing to continue
          --> command line
        hint: `prompt.user='Some text'`
        ") };
    }
    assert_snapshot!(case.validate(&["prompt="]), @"
    exit 2
    --- stderr
    error: `prompt` is empty, so there is nothing to continue
      --> command line
    hint: `prompt='Some text'`
    ");
}

#[test]
fn a_hub_data_set() {
    assert_snapshot!(Case::new().validate(&["dataset.source=EdinburghNLP/xsum"]), @"
    exit 0
    --- stdout
    Config is well-formed!
    --- stderr
    notice: `EdinburghNLP/xsum` is not in the cache; a run fetches it from the hub (command line)
    ");
}

#[test]
fn the_output_in_the_models_folder() {
    assert_snapshot!(Case::new().validate(&["output_dir=model/tuned"]), @"
    exit 2
    --- stderr
    error: `output_dir` is the model's folder `model` or inside it, which is never written to
      --> command line
    hint: give the run a folder of its own
    ");
}

#[test]
fn a_split_that_is_not_one() {
    assert_snapshot!(Case::new().validate(&["dataset.split=train[:2000"]), @"
    exit 2
    --- stderr
    error: split `train[:2000`: `train[:2000` has `[` without `]` at its end
      --> command line
    hint: write it like `train`, `train[:2000]`, `train[-10%:]` or `train[10%:20%]+test`
    ");
    assert_snapshot!(Case::new().validate(&["dataset.split=train[:200%]"]), @"
    exit 2
    --- stderr
    error: split `train[:200%]`: `200%` is not between -100% and 100%
      --> command line
    hint: write it like `train`, `train[:2000]`, `train[-10%:]` or `train[10%:20%]+test`
    ");
}

/// Each key and component that the registry refuses, tried: its reason is what a user reads.
#[test]
fn whatever_is_refused_says_why() {
    let listed = Case::new().host(&["keys", "--json"]);
    let parts: Value = serde_json::from_str(listed.strip_prefix("exit 0\n--- stdout\n").unwrap()).unwrap();
    let cases = [Case::new(), Case::with(GENERATE)];
    let mut said = BTreeSet::new();
    let mut try_all = |case: &Case, tried: &str, overrides: &[&str]| {
        let found = case.validate(overrides);
        assert!(found.starts_with("exit 2"), "{overrides:?}: {found}");
        let is_it = |error: &&str| error.contains(&format!("`{tried}`"));
        let report = found.split("error: ").find(is_it).unwrap_or_else(|| panic!("{overrides:?}: {found}"));
        assert!(report.contains("--> command line") && report.contains("hint: "), "{report}");
        said.insert(report.lines().next().unwrap().to_owned());
    };
    for part in parts.as_array().unwrap() {
        let name = part["name"].as_str().unwrap();
        let section = match part["role"].as_str() {
            None if name == "Models" => "model",
            None => "",
            Some("data set") => "dataset",
            Some("metric logger") => "metric_logger",
            Some("distillation loss") => "kd_loss",
            Some(role) => role,
        };
        let choice = format!("{section}._component_={name}");
        if part["refused"].is_string() {
            try_all(&cases[0], name, &[&choice]);
        }
        for key in part["keys"].as_array().unwrap() {
            let value = match (key["class"].as_str().unwrap(), key["default"].as_str(), key["value"].as_str().unwrap())
            {
                ("refused", ..) => "other",
                ("only_default", Some("False"), _) => "True",
                ("only_default", Some("True"), _) => "False",
                ("only_default", _, "one of `mean`, `sum`, `none`") => "sum",
                ("only_default", _, value) if value.starts_with("a number from 0") => "0.5",
                ("only_default", ..) => "2",
                _ => continue,
            };
            let key = key["name"].as_str().unwrap();
            let path = if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
            let setting = format!("{path}={value}");
            let case = &cases[usize::from(name == "Generation")];
            let settings = if part["role"].is_null() { vec![&*setting] } else { vec![&*choice, &*setting] };
            try_all(case, &path, &settings);
        }
    }
    assert_snapshot!(said.into_iter().collect::<Vec<_>>().join("\n"), @"
    `chat_format` is not supported: it is `tokenizer.prompt_template` now
    `checkpointer.enable_dcp` can only be `False`: checkpoints are safetensors
    `checkpointer.recipe_checkpoint` is not supported: torchtune's optimizer state is not read; `adapter_checkpoint` alone starts a run from its adapter
    `checkpointer.resume_from_checkpoint` can only be `False`: `resume_from_checkpoint` belongs to the top level
    `checkpointer.safe_serialization` can only be `True`: weights are always written as safetensors
    `checkpointer.should_load_recipe_state` can only be `False`: `resume_from_checkpoint` says whether to resume
    `context_parallel_dim` can only be `1`: every rank takes whole sequences
    `cudnn_deterministic_mode` is not supported: deterministic kernels cannot be demanded yet
    `dataset.column_map` is not supported: give `conversation_column`
    `dataset.data_dir` is not supported: give `data_files`
    `dataset.filter_fn` is not supported: a config cannot name code; let the template skip rows
    `enable_fp8_training` can only be `False`: not available yet
    `fp8_recipe_name` is not supported: not available yet
    `instruct_template` is not supported: it is `tokenizer.prompt_template` now
    `kd_loss.ignore_index` can only be `-100`: labels without loss are -100
    `loss.ignore_index` can only be `-100`: labels without loss are -100
    `loss.label_smoothing` can only be `0.0`: not available yet
    `loss.reduction` can only be `mean`: the loss is the mean over the label tokens of a step
    `loss.weight` is not supported: not available yet
    `model.quantize_base` can only be `False`: a quantised base is not available yet
    `model.use_dora` can only be `False`: DoRA is not available yet
    `optimizer.amsgrad` can only be `False`: not available yet
    `optimizer.differentiable` can only be `False`: updates have no gradient
    `optimizer.maximize` can only be `False`: a loss is made small
    `optimizer_in_bwd` can only be `False`: it gives up clipping and accumulation
    `profiler.enabled` can only be `False`: there is no profiler yet
    `quantizer` is not supported: not available yet
    `resize_token_embeddings` can only be `False`: the vocabulary is the checkpoint's
    `tensor_parallel_dim` can only be `1`: every rank has the whole model; start more ranks instead
    `tensor_parallel_plan` is not supported: every rank has the whole model
    `tokenizer.merges_file` is not supported: the vocabulary file has its merges
    `tokenizer.special_tokens_path` is not supported: the vocabulary file has its special tokens
    the data set `multimodal_chat_dataset` is not supported: images are not read yet
    the loss `RSOLoss` is not supported: `DPOLoss` with `loss_type: hinge` is it, `beta` its `gamma`
    the metric logger `CometLogger` is not supported: Comet is reached by its own client alone; `TensorBoardLogger` writes files that it imports
    the metric logger `MLFlowLogger` is not supported: MLflow is reached by its own client alone; use `TensorBoardLogger`, or `DiskLogger` with `output_fmt: jsonl`
    the metric logger `WandBLogger` is not supported: W&B is reached by its own client alone; `wandb sync FOLDER` uploads what `TensorBoardLogger` writes
    the optimizer `Adam` is not supported: only `AdamW` is there yet
    the optimizer `PagedAdamW8bit` is not supported: only `AdamW` is there yet
    the optimizer `SGD` is not supported: only `AdamW` is there yet
    the tokenizer `gemma_tokenizer` is not supported: models of the Gemma family are not built yet
    the tokenizer `phi3_mini_tokenizer` is not supported: models of the Phi family are not built yet
    the tokenizer `phi4_tokenizer` is not supported: models of the Phi family are not built yet
    ");
}

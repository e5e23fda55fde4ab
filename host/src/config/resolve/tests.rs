//! Configs to plans, with a made-up disk.

mod placement;

use std::collections::BTreeSet;
use std::path::Path;

use super::super::plan::{
    ChatStyle, ClipPlan, DataFormat, DatasetPlan, DiskFormat, Layout, MetricSink, PackingPlan, RowsPlan, SchedulePlan,
    TrainPlan,
};
use super::super::registry::{Class, Role, components, keys};
use super::*;

const TRAIN: &str = include_str!("../../../../configs/smollm2/135M_lora_summarize.yaml");
const GENERATE: &str = include_str!("../../../../configs/smollm2/135M_generate.yaml");

/// Folders end in `/`.
const DISK: &[&str] = &[
    "templates/summarize.wasm",
    "scripts/templates/alpaca.rhai",
    "scripts/templates/chatml.rhai",
    "scripts/templates/llama2_chat.rhai",
    "scripts/templates/mistral_chat.rhai",
    ".demo/data/",
    ".demo/data/train.jsonl",
    ".demo/data/validation.jsonl",
    "model/",
];

fn surroundings() -> Surroundings<'static> {
    Surroundings {
        seed: 7,
        cwd: "/home/me".into(),
        shipped: vec!["/home/me".into(), "/opt/host".into()],
        cache_dir: Some("/cache".into()),
        kind: &|path| {
            let name = path.to_str()?.trim_end_matches('/');
            if DISK.contains(&name) {
                return Some(FileKind::File);
            }
            DISK.contains(&format!("{name}/").as_str()).then_some(FileKind::Folder)
        },
        files_below: &|folder| {
            let inside = |name: &&str| Some(Path::new(name).strip_prefix(folder).ok()?.to_str()?.to_owned());
            DISK.iter().filter(|name| !name.ends_with('/')).filter_map(inside).collect()
        },
        metadata: &|_| Ok(Default::default()),
    }
}

fn try_train(text: &str, overrides: &[&str]) -> Result<Resolved<TrainPlan>> {
    let overrides: Vec<String> = overrides.iter().map(|argument| argument.to_string()).collect();
    let config = Config::parse(text, Path::new("c.yaml"), &overrides)?;
    train(&config, Path::new("r.wasm"), &surroundings())
}

fn plan(overrides: &[&str]) -> TrainPlan {
    match try_train(TRAIN, overrides) {
        Ok(resolved) => resolved.plan,
        Err(error) => panic!("{error}"),
    }
}

/// The one data set of a plan.
fn dataset(overrides: &[&str]) -> DatasetPlan {
    let mut datasets = plan(overrides).dataset;
    assert_eq!(datasets.len(), 1);
    datasets.remove(0)
}

/// Of rows that are columns, the name and the column of each.
fn columns(dataset: &DatasetPlan) -> Vec<(&str, &str)> {
    let RowsPlan::Columns { columns, .. } = &dataset.rows else { panic!("{:?}", dataset.rows) };
    columns.iter().map(|column| (column.name.as_str(), column.column.as_str())).collect()
}

fn mistakes(overrides: &[&str]) -> String {
    try_train(TRAIN, overrides).expect_err("the config should be refused").to_string()
}

#[track_caller]
fn check_mistake(overrides: &[&str], expected: &str) {
    let found = mistakes(overrides);
    assert!(found.contains(expected), "expected `{expected}` in:\n{found}");
}

fn notices(overrides: &[&str]) -> Vec<String> {
    try_train(TRAIN, overrides).unwrap().notices.into_iter().map(|notice| notice.message).collect()
}

#[test]
fn the_shipped_config_says_what_it_should() {
    let plan = plan(&[]);
    let lora = plan.model.lora.as_ref().unwrap();
    assert_eq!((lora.rank, lora.alpha, &lora.targets[..]), (8, 16.0, &["q_proj".to_owned(), "v_proj".to_owned()][..]));
    assert_eq!(plan.tokenizer.path, Path::new(".demo/SmolLM2-135M-Instruct/tokenizer.json"));
    assert_eq!(plan.tokenizer.prompt_template.as_ref().unwrap().path, Path::new("templates/summarize.wasm"));
    assert_eq!(plan.tokens_per_microbatch, 1024);
    let ([dataset], [measured]) = (&plan.dataset[..], &plan.dataset_val[..]) else { panic!("one of each") };
    assert_eq!((dataset.files.len(), dataset.cache_dir.as_path()), (2, Path::new("/cache")));
    assert_eq!((measured.split.as_str(), &measured.rows), ("validation[:200]", &dataset.rows));
    assert_eq!(plan.schedule, SchedulePlan::Cosine { num_warmup_steps: 6, num_cycles: 0.5 });
    assert_eq!((plan.optimizer.lr, plan.optimizer.betas, plan.optimizer.eps), (3e-4, (0.9, 0.999), 1e-8));
    assert_eq!(plan.checkpoint.output_dir, plan.output_dir);
    assert!(plan.resolved_yaml.contains("path: .demo/SmolLM2-135M-Instruct/tokenizer.json"));
    assert!(notices(&[]).is_empty());
}

#[test]
fn the_shipped_generation_config_resolves() {
    let config = Config::parse(GENERATE, Path::new("g.yaml"), &[]).unwrap();
    assert!(config.is_generation());
    let resolved = generate(&config, &surroundings()).unwrap();
    assert!(resolved.notices.is_empty());
    assert_eq!((resolved.plan.top_k, resolved.plan.seed, resolved.plan.max_new_tokens), (Some(1), 1234, 48));
}

#[test]
fn a_plan_survives_json() {
    let before = serde_json::to_value(plan(&["clip_grad_norm=inf", "limits.seconds=1.5"])).unwrap();
    let read: TrainPlan = serde_json::from_value(before.clone()).unwrap();
    assert_eq!(before, serde_json::to_value(read).unwrap());
}

#[test]
fn values_land_where_they_belong() {
    assert_eq!(plan(&["seed=null"]).seed, 7);
    assert_eq!(plan(&["clip_grad_norm=inf"]).clip_grad_norm, Some(ClipPlan::LogOnly));
    assert_eq!(plan(&["clip_grad_norm=.inf"]).clip_grad_norm, Some(ClipPlan::LogOnly));
    assert_eq!(plan(&["clip_grad_norm=1"]).clip_grad_norm, Some(ClipPlan::MaxNorm(1.0)));
    assert_eq!(plan(&["layout=padded"]).layout, Layout::Padded);
    assert_eq!(plan(&["tokens_per_microbatch=99"]).tokens_per_microbatch, 99);
    assert_eq!(plan(&["tokenizer.max_seq_len=null"]).tokens_per_microbatch, 4096);
    assert_eq!(plan(&["~lr_scheduler"]).schedule, SchedulePlan::Constant);
    assert_eq!(plan(&["optimizer.betas=[0.8, 0.95]"]).optimizer.betas, (0.8, 0.95));
    assert_eq!(plan(&["metric_logger=StdoutLogger", "~metric_logger.log_dir"]).metrics.sink, MetricSink::Stdout);
    let board = MetricSink::TensorBoard { log_dir: ".demo/out/logs".into(), organize_logs: true };
    assert_eq!(plan(&["metric_logger=TensorBoardLogger"]).metrics.sink, board);
    check_mistake(&["metric_logger=WandBLogger"], "`wandb sync FOLDER` uploads what `TensorBoardLogger` writes");
    let disk = MetricSink::Disk { log_dir: ".demo/out/logs".into(), format: DiskFormat::Jsonl, filename: None };
    assert_eq!(plan(&["metric_logger.output_fmt=jsonl", "~metric_logger.log_dir"]).metrics.sink, disk);
    assert_eq!(plan(&["recipe.beta=0.1"]).recipe.settings, serde_json::json!({"beta": 0.1}));
    assert_eq!(plan(&["resume_from=a/step_3"]).checkpoint.resume_from.as_deref(), Some(Path::new("a/step_3")));
    assert!(plan(&["resume_from=a/step_3"]).checkpoint.resume);
    assert!(plan(&["compat=torchtune"]).compat_torchtune);
    for (level, expected) in [("WARNING", "WARN"), ("info", "INFO"), ("CRITICAL", "ERROR")] {
        assert_eq!(plan(&[&format!("log_level={level}")]).metrics.log_level, expected);
    }
}

/// A model without adapters is trained as a whole. The adapters' keys go with them.
#[test]
fn a_model_without_adapters_is_trained_as_a_whole() {
    assert_eq!(plan(&["model=llama2_7b"]).model.lora, None);
    check_mistake(
        &["model=llama2_7b", "save_adapter_weights_only=True"],
        "`save_adapter_weights_only: True`, and `llama2_7b` has no adapter: all its weights are trained",
    );
    let preferences = ["model=llama2_7b", "loss=DPOLoss", "~dataset_val", "~run_val_every_n_steps"];
    check_mistake(&preferences, "`DPOLoss` compares with a reference, which without adapters is a second model");
    let reference = "ref_checkpointer={_component_: FullModelHFCheckpointer, checkpoint_dir: model}";
    let plan = plan(&[&preferences[..], &[reference]].concat());
    assert_eq!(plan.reference.unwrap().checkpoint_dir, Path::new("model"));
}

/// Both forms of the reference job, word for word, and its generation.
#[test]
fn the_reference_jobs_own_configs_resolve() {
    const OWN: &str = include_str!("../../../../tests/fixtures/seed/my_llama3_1_custom_config.yaml");
    const OWN_GENERATION: &str =
        include_str!("../../../../tests/fixtures/seed/my_llama3_1_custom_generation_config.yaml");
    const SHIPPED: &str = include_str!("../../../../configs/llama3_1/8B_lora.yaml");
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
    let own = try_train(OWN, &[]).unwrap_or_else(|error| panic!("{error}"));
    let shipped = try_train(SHIPPED, &overrides).unwrap_or_else(|error| panic!("{error}"));
    for (resolved, epochs) in [(&own, 10), (&shipped, 1)] {
        let plan = &resolved.plan;
        assert_eq!((plan.epochs, plan.batch_size, plan.gradient_accumulation_steps), (epochs, 2, 32));
        assert_eq!(plan.model.lora.as_ref().unwrap().targets, ["q_proj", "v_proj"]);
        let dataset = &plan.dataset[0];
        assert_eq!((plan.tokenizer.max_seq_len, dataset.split.as_str()), (Some(2048), "train[:2000]"));
        assert!(dataset.rows.template().unwrap().joined && !dataset.train_on_input);
        assert_eq!(columns(dataset), [("input", "document"), ("output", "summary")]);
        assert_eq!(dataset.hub.as_ref().unwrap().repo, "EdinburghNLP/xsum");
        assert_eq!(plan.checkpoint.output_dir, Path::new("/tmp/lora_finetune_output"), "never the model's folder");
        let told = |what: &str| resolved.notices.iter().filter(|notice| notice.message.contains(what)).count();
        assert_eq!(told("no code of a data set is ever run"), 1);
    }
    let config = Config::parse(OWN_GENERATION, Path::new("g.yaml"), &[]).unwrap();
    let asked = generate(&config, &surroundings()).unwrap_or_else(|error| panic!("{error}")).plan;
    assert_eq!(asked.model.checkpoint_files.len(), 4);
    assert_eq!((asked.enable_kv_cache, asked.top_k, asked.max_new_tokens), (false, Some(300), 300));
}

/// torchtune v0.2.1: the template on the data set, its input under the template's own name, one string.
#[test]
fn the_old_dataset_section_resolves() {
    let old = [
        "~tokenizer.prompt_template",
        "~tokenizer.max_seq_len",
        "dataset.max_seq_len=2048",
        "dataset.template=torchtune.data.SummarizeTemplate",
        "dataset.column_map={dialogue: document, output: summary}",
        "~dataset_val",
        "~run_val_every_n_steps",
    ];
    assert_eq!(plan(&old).tokenizer.max_seq_len, Some(2048));
    let found = dataset(&old);
    let template = found.rows.template().unwrap();
    assert!(template.joined && template.guest.path == Path::new("templates/summarize.wasm"));
    assert_eq!(columns(&found), [("input", "document"), ("output", "summary")]);
    let plain: Vec<&str> = old.iter().copied().chain(["~dataset.column_map"]).collect();
    assert_eq!(columns(&dataset(&plain))[0], ("input", "dialogue"));
    let partly: Vec<&str> = plain.iter().copied().chain(["dataset.column_map.output=summary"]).collect();
    assert_eq!(columns(&dataset(&partly)), [("input", "dialogue"), ("output", "summary")]);
    let twice: Vec<&str> = old.iter().copied().chain(["dataset.column_map.input=document"]).collect();
    check_mistake(&twice, "`dataset.column_map` gives `input` twice, also as `dialogue`");
    // Alpaca's has columns of its own, of which one need not be there.
    let alpaca = [&plain[..], &["dataset.template=torchtune.data.AlpacaInstructTemplate"]].concat();
    assert_eq!(columns(&dataset(&alpaca)), [("instruction", "instruction"), ("input", "input"), ("output", "output")]);
    // It stands alone, also where the tokenizer has one of its family.
    let llama2 = "tokenizer={_component_: torchtune.models.llama2.llama2_tokenizer, path: a/tokenizer.model}";
    assert_eq!(plan(&[&old[1..], &[llama2]].concat()).tokenizer.prompt_template, None);
    check_mistake(&["dataset.max_seq_len=99"], "`dataset.max_seq_len` is 99, and another is 512");
    check_mistake(&["dataset.column_map.dialogue=document"], "maps `dialogue`");
}

#[test]
fn alpaca_brings_its_template_and_source() {
    let alpaca = ["dataset=torchtune.datasets.alpaca_dataset", "dataset.source=.demo/data", "~dataset.train_on_input"];
    let found = dataset(&[&alpaca[..], &["~dataset.column_map", "~dataset_val", "~run_val_every_n_steps"]].concat());
    assert!(found.train_on_input, "torchtune's default");
    let partial = ["~dataset_val", "~run_val_every_n_steps", "dataset.column_map={instruction: a, output: b}"];
    let partial = dataset(&[&alpaca[..], &partial].concat());
    assert_eq!(columns(&partial), [("instruction", "a"), ("input", "input"), ("output", "b")]);
    let RowsPlan::Columns { columns, template } = found.rows else { panic!("{:?}", found.rows) };
    let names: Vec<_> = columns.iter().map(|column| (column.name.as_str(), column.optional)).collect();
    assert_eq!(names, [("instruction", false), ("input", true), ("output", false)]);
    assert!(!template.unwrap().joined);
}

/// torchtune's other builders, with what they bring along.
#[test]
fn every_builder_says_what_a_row_is() {
    let of = |text: &str| {
        let argument = format!("dataset={text}");
        dataset(&[&argument, "dataset_val=null", "~run_val_every_n_steps"])
    };
    let source = |dataset: &DatasetPlan| {
        let hub = dataset.hub.as_ref().unwrap();
        (hub.repo.clone(), hub.name.clone().unwrap_or_default())
    };
    let samsum = of("{_component_: torchtune.datasets.samsum_dataset, new_system_prompt: Be brief.}");
    assert_eq!(source(&samsum), ("Samsung/samsum".to_owned(), String::new()));
    assert_eq!(columns(&samsum), [("input", "dialogue"), ("output", "summary")]);
    assert_eq!(samsum.new_system_prompt.as_deref(), Some("Be brief."));
    let grammar = of("{_component_: torchtune.datasets.grammar_dataset}");
    assert_eq!((columns(&grammar)[0], source(&grammar).0.as_str()), (("input", "input"), "liweili/c4_200m"));

    let chat = |text: &str| match of(text).rows {
        RowsPlan::Chat { column, style, template } => (column, style, template.is_some_and(|template| template.joined)),
        other => panic!("{other:?}"),
    };
    let chat_of = |rest: &str| {
        chat(&format!("{{_component_: torchtune.datasets.chat_dataset, source: a/b, conversation_style: {rest}}}"))
    };
    assert_eq!(chat_of("openai"), ("messages".to_owned(), ChatStyle::OpenAi, false));
    assert_eq!(chat_of("sharegpt"), ("conversations".to_owned(), ChatStyle::ShareGpt, false));
    assert_eq!(chat_of("openai, conversation_column: talk"), ("talk".to_owned(), ChatStyle::OpenAi, false));
    assert!(chat_of("sharegpt, chat_format: torchtune.data.ChatMLFormat, max_seq_len: 512").2, "v0.2.1");
    let slimorca = "{_component_: torchtune.datasets.slimorca_dataset, column_map: {conversations: turns}}";
    assert_eq!(chat(slimorca), ("turns".to_owned(), ChatStyle::ShareGpt, false));

    let text = |text: &str| {
        let dataset = of(text);
        let RowsPlan::Text { column, add_eos } = &dataset.rows else { panic!("{:?}", dataset.rows) };
        (column.clone(), *add_eos, dataset.packing.clone())
    };
    let completion = "{_component_: torchtune.datasets.text_completion_dataset, source: a/b";
    assert_eq!(text(&format!("{completion}}}")), ("text".to_owned(), true, None));
    let packed = text(&format!("{completion}, column: page, add_eos: False, packed: True}}"));
    let packing = PackingPlan { max_seq_len: 512, split_across_pack: true };
    assert_eq!(packed, ("page".to_owned(), false, Some(packing.clone())));
    let whole = text(&format!("{completion}, packed: True, split_across_pack: False}}"));
    assert_eq!(whole.2, Some(PackingPlan { split_across_pack: false, ..packing }));
    let wikitext = of("{_component_: torchtune.datasets.wikitext_dataset}");
    let expected = ("EleutherAI/wikitext_document_level".to_owned(), "wikitext-103-v1".to_owned());
    assert_eq!(source(&wikitext), expected);
    let news = "{_component_: torchtune.datasets.cnn_dailymail_articles_dataset}";
    assert_eq!((text(news).0, source(&of(news)).1), ("article".to_owned(), "3.0.0".to_owned()));

    let told = notices(&[
        "dataset={_component_: samsum_dataset}",
        "tokenizer.prompt_template=null",
        "dataset_val=null",
        "~run_val_every_n_steps",
    ]);
    assert!(told[0].contains("v0.2.1 took SummarizeTemplate"), "{told:?}");
    let mistake = |text: &str, expected: &str| check_mistake(&[&format!("dataset={text}")], expected);
    mistake("{_component_: chat_dataset, source: a/b}", "the key `dataset.conversation_style` is missing");
    mistake(
        "{_component_: chat_dataset, source: a/b, conversation_style: chatml}",
        "must be one of `sharegpt`, `openai`",
    );
    mistake("{_component_: slimorca_dataset, column_map: {messages: a}}", "this data set has `conversations`");
    let pairs = |text: &str| match of(text).rows {
        RowsPlan::Pairs { prompt, chosen, rejected, .. } => (prompt, chosen, rejected),
        rows => panic!("{rows:?}"),
    };
    let names = |prompt: Option<&str>, chosen: &str, rejected: &str| {
        (prompt.map(str::to_owned), chosen.to_owned(), rejected.to_owned())
    };
    let preference = "{_component_: torchtune.datasets.preference_dataset, source: a/b";
    assert_eq!(pairs(&format!("{preference}}}")), names(None, "chosen", "rejected"));
    let mapped = format!("{preference}, column_map: {{prompt: p, chosen: c, rejected: r}}}}");
    assert_eq!(pairs(&mapped), names(Some("p"), "c", "r"));
    let stack = "{_component_: torchtune.datasets.stack_exchanged_paired_dataset}";
    assert_eq!(pairs(stack), names(Some("question"), "response_j", "response_k"));
    let told = notices(&[
        &format!("dataset={stack}"),
        "tokenizer.prompt_template=null",
        "dataset_val=null",
        "~run_val_every_n_steps",
    ]);
    assert!(told[0].contains("v0.2.1 took QuestionAnswerTemplate"), "{told:?}");
    mistake(&format!("{preference}, packed: True}}"), "pairs stay together");
    check_mistake(&[&format!("dataset_val={preference}}}")], "`dataset_val` has pairs");
    check_mistake(
        &["tokenizer.max_seq_len=null", "dataset.packed=True"],
        "`dataset.packed` needs `tokenizer.max_seq_len`",
    );
}

/// Each with its own section; what is wrong with any of them is found in the same pass.
#[test]
fn data_sets_come_in_lists() {
    let one = "{_component_: instruct_dataset, source: .demo/data}";
    let two = "{_component_: alpaca_dataset, source: .demo/data, split: validation}";
    let argument = format!("dataset=[{one}, {two}]");
    let alone = ["dataset_val=null", "~run_val_every_n_steps"];
    let found = plan(&[&[argument.as_str()], &alone[..]].concat()).dataset;
    assert_eq!(found.iter().map(|dataset| dataset.split.as_str()).collect::<Vec<_>>(), ["train", "validation"]);
    let found = plan(&[&[argument.as_str(), "dataset.1.split=train[:5]"], &alone[..]].concat()).dataset;
    assert_eq!(found[1].split, "train[:5]");

    let wrong =
        "dataset=[{_component_: instruct_dataset, source: no_folder}, {_component_: instruct_datset, source: x}, 3]";
    let found = mistakes(&[&[wrong], &alone[..]].concat());
    for expected in
        ["unknown data set `instruct_datset` in `dataset.1._component_`", "`dataset.2` must be a section of keys"]
    {
        assert!(found.contains(expected), "{found}");
    }
    check_mistake(&["dataset=[]"], "`dataset` is an empty list");
    let packed = format!("dataset=[{one}, {{_component_: instruct_dataset, source: .demo/data, packed: True}}]");
    check_mistake(&[&packed], "some data sets of `dataset` are packed and some are not");
}

#[test]
fn torchtunes_names_mean_the_same() {
    let overrides = [
        "model=torchtune.models.llama3_1.lora_llama3_1_8b",
        "optimizer=torch.optim.AdamW",
        "lr_scheduler=torchtune.modules.get_cosine_schedule_with_warmup",
        "checkpointer=torchtune.utils.FullModelHFCheckpointer",
        "dataset=torchtune.datasets.instruct_dataset",
        "tokenizer.prompt_template=torchtune.data.SummarizeTemplate",
        "loss=torchtune.modules.loss.CEWithChunkedOutputLoss",
        "metric_logger=torchtune.training.metric_logging.DiskLogger",
    ];
    let (ours, theirs) = (plan(&[]), plan(&overrides));
    assert_eq!((ours.optimizer, ours.schedule, ours.loss), (theirs.optimizer, theirs.schedule, theirs.loss));
    assert_eq!(ours.tokenizer.prompt_template, theirs.tokenizer.prompt_template);
    assert_eq!(plan(&["loss=torch.nn.CrossEntropyLoss"]).loss.num_output_chunks, 8);
}

/// torchtune's adapter file lies in the model's folder; rank and alpha are the config's.
#[test]
fn an_adapter_is_where_a_run_starts() {
    let dir = "checkpointer.checkpoint_dir=.demo/data";
    let file = "checkpointer.adapter_checkpoint=train.jsonl";
    assert_eq!(plan(&[dir, file]).model.adapter.unwrap(), Path::new(".demo/data/train.jsonl"));
    let elsewhere = "checkpointer.adapter_checkpoint=adapter";
    assert_eq!(plan(&[dir, elsewhere]).model.adapter.unwrap(), Path::new("adapter"));
    check_mistake(&[file, "model=llama"], "`checkpointer.adapter_checkpoint` needs a model with adapters");
    check_mistake(&[file, "resume_from_checkpoint=True"], "this one is to go on from a checkpoint");
    check_mistake(&["checkpointer.recipe_checkpoint=recipe_state.pt"], "torchtune's optimizer state is not read");
    let both = [file, "adapter_dir=a"].map(str::to_owned);
    let config = Config::parse(GENERATE, Path::new("g.yaml"), &both).unwrap();
    let error = generate(&config, &surroundings()).unwrap_err().to_string();
    assert!(error.contains("and `adapter_dir` both name an adapter"), "{error}");
}

#[test]
fn adapters_are_named_as_in_the_checkpoint() {
    let overrides = [
        "model.lora_attn_modules=[q_proj,output_proj,q_proj]",
        "model.apply_lora_to_mlp=True",
        "model.apply_lora_to_output=true",
    ];
    let targets = plan(&overrides).model.lora.unwrap().targets;
    assert_eq!(targets, ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]);
    check_mistake(
        &["model.lora_attn_modules=[q_prj]"],
        "cannot hold the text `q_prj`\n  --> command line\nhint: did you mean `q_proj`?",
    );
    check_mistake(&["model.lora_attn_modules=[]"], "nothing would be trained");
}

#[test]
fn data_files_come_in_three_forms() {
    let files = |value: &str| {
        let data_files = format!("dataset.data_files={value}");
        let dataset = dataset(&["dataset.source=json", &data_files, "dataset_val.source=.demo/data"]);
        assert_eq!(dataset.format, DataFormat::Jsonl);
        dataset.files.iter().map(|file| format!("{}:{}", file.split, file.path.display())).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(files("a.jsonl"), "train:a.jsonl");
    assert_eq!(files("[a.jsonl, b.jsonl]"), "train:a.jsonl train:b.jsonl");
    assert_eq!(files("{train: a.jsonl, test: [b.jsonl, c.jsonl]}"), "train:a.jsonl test:b.jsonl test:c.jsonl");
    assert_eq!(files(".demo/data/tr*.jsonl"), "train:.demo/data/train.jsonl");
    assert_eq!(files("{train: '.demo/**/*.jsonl'}"), "train:.demo/data/train.jsonl train:.demo/data/validation.jsonl");
    check_mistake(&["dataset.source=json", "dataset.data_files=.demo/*.jsonl"], "no file matches `.demo/*.jsonl`");
    check_mistake(&["dataset.source=json"], "needs `dataset.data_files`");
    check_mistake(&["dataset.source=json", "dataset.data_files=3"], "found the number `3`");
    check_mistake(&["dataset.source=json", "dataset.data_files=https://x/y.jsonl"], "is an address");
    check_mistake(&["dataset.source=csv"], "`source: csv` needs `dataset.data_files`");
    check_mistake(&["dataset.source=parquet", "dataset.field=rows"], "`dataset.field` belongs to `source: json`");
    check_mistake(&["dataset.revision=main"], "`dataset.revision` belongs to data sets of the hub");
    check_mistake(&["dataset.source=./data"], "the data folder `./data` is not there");
    check_mistake(&["dataset.source=imdb"], "the data folder `imdb` is not there");
    check_mistake(&["dataset.source=model"], "the folder `model` has no data file");
    check_mistake(
        &["dataset.source=.demo/data/train.jsonl"],
        "`source: json` with `data_files: .demo/data/train.jsonl`",
    );
    check_mistake(&["dataset.split=trian[:5]"], "names the split `trian`");
    check_mistake(&["dataset.split=train+test"], "the data has: train, validation");
}

#[test]
fn formats_and_hub_data_sets_are_told_by_the_source() {
    let dataset = |overrides: &[&str]| dataset(&[&["dataset_val=null", "~run_val_every_n_steps"], overrides].concat());
    for (source, format) in [
        ("csv", DataFormat::Csv),
        ("text", DataFormat::Text),
        ("parquet", DataFormat::Parquet),
        ("json", DataFormat::Jsonl),
    ] {
        assert_eq!(
            dataset(&[&format!("dataset.source={source}"), "dataset.data_files=f", "dataset.split=train"]).format,
            format
        );
    }
    let field = dataset(&["dataset.source=json", "dataset.data_files=f", "dataset.field=rows"]);
    assert_eq!(field.format, DataFormat::JsonField("rows".into()));

    let found = dataset(&["dataset.source=org/rows", "dataset.name=en", "dataset.revision=v1", "dataset.split=any"]);
    let hub = found.hub.unwrap();
    assert_eq!((hub.repo.as_str(), hub.name.as_deref(), hub.revision.as_deref()), ("org/rows", Some("en"), Some("v1")));
    assert!(found.files.is_empty() && hub.pinned.is_none());
    // A folder of that name is nearer, and a path is not a name.
    assert_eq!(dataset(&["dataset.source=.demo/data"]).hub, None);
    check_mistake(&["dataset.source=rows/train.csv"], "the data folder `rows/train.csv` is not there");
}

#[test]
fn column_maps_are_whole() {
    check_mistake(&["~dataset.column_map.input"], "must give a column for `input`");
    check_mistake(&["dataset.column_map.dialogue=document"], "maps `dialogue`");
    check_mistake(&["dataset.column_map=[a,b]"], "found a list");
    let mapped = dataset(&["~dataset.column_map", "dataset_val.column_map=null"]);
    assert_eq!(columns(&mapped), [("input", "input"), ("output", "output")]);
}

#[test]
fn templates_are_names_or_files() {
    let template = |value: &str| {
        let argument = format!("tokenizer.prompt_template={value}");
        plan(&[&argument]).tokenizer.prompt_template
    };
    assert_eq!(template("null"), None);
    assert_eq!(template("./mine.rhai").unwrap().path, Path::new("./mine.rhai"));
    let with_settings = template("{_component_: mine.wasm, shout: true}").unwrap();
    assert_eq!((with_settings.path, with_settings.settings), ("mine.wasm".into(), serde_json::json!({"shout": true})));
    check_mistake(&["tokenizer.prompt_template=SumarizeTemplate"], "did you mean `SummarizeTemplate`?");
    check_mistake(
        &["tokenizer.prompt_template=torchtune.data.SumarizeTemplate"],
        "did you mean `torchtune.data.SummarizeTemplate`?",
    );
    let mut bare = surroundings();
    bare.kind = &|_| None;
    let config = Config::parse(TRAIN, Path::new("c.yaml"), &[]).unwrap();
    let error = train(&config, Path::new(""), &bare).unwrap_err().to_string();
    assert!(error.contains("no `templates/summarize.wasm` here or beside the program"), "{error}");
}

#[test]
fn tokenizers_have_templates_of_their_own_or_of_the_config() {
    let texts = |arguments: &[&str]| {
        let plan = plan(arguments).tokenizer;
        let template = plan.prompt_template.map(|guest| guest.path.display().to_string());
        (plan.turn_texts, template.unwrap_or_default())
    };
    use crate::data::template::Role as Speaker;
    const LLAMA2: &str = "tokenizer={_component_: torchtune.models.llama2.llama2_tokenizer, path: a/tokenizer.model}";
    assert_eq!(texts(&[LLAMA2]), (vec![], "scripts/templates/llama2_chat.rhai".to_owned()));
    assert_eq!(texts(&[LLAMA2, "tokenizer.prompt_template=null"]), (vec![], String::new()));
    let other = texts(&[LLAMA2, "tokenizer.prompt_template=SummarizeTemplate"]);
    assert_eq!(other, (vec![], "templates/summarize.wasm".to_owned()));
    for (name, file) in [
        ("torchtune.models.mistral.MistralChatTemplate", "mistral_chat"),
        ("torchtune.data.Llama2ChatFormat", "llama2_chat"),
        ("torchtune.data.ChatMLTemplate", "chatml"),
    ] {
        let found = texts(&[&format!("tokenizer.prompt_template={name}")]);
        assert_eq!(found.1, format!("scripts/templates/{file}.rhai"));
    }
    let roles = texts(&[r#"tokenizer.prompt_template={user: ["Q: ", "\nA: "], ipython: [null, ""]}"#]).0;
    let expected =
        [(Speaker::User, ["Q: ".to_owned(), "\nA: ".to_owned()]), (Speaker::Tool, [String::new(), String::new()])];
    assert_eq!(roles, expected);
    check_mistake(
        &["tokenizer.prompt_template={human: [a, b]}"],
        "`tokenizer.prompt_template.human` is not a role with the texts before and after it",
    );
    check_mistake(&["tokenizer.prompt_template={user: [a]}"], "`tokenizer.prompt_template.user` is not a role");
    check_mistake(
        &["tokenizer=qwen2_tokenizer", "tokenizer.prompt_template=torchtune.data.ChatMLTemplate"],
        "`qwen2_tokenizer` writes ChatML's tokens itself",
    );
}

#[test]
fn guests_are_found_here_then_beside_the_program() {
    let mut around = surroundings();
    around.kind = &|path| (path == Path::new("/opt/host/scripts/templates/summarize.rhai")).then_some(FileKind::File);
    assert_eq!(
        around.find_guest("templates", "summarize").unwrap(),
        Path::new("/opt/host/scripts/templates/summarize.rhai")
    );
}

#[test]
fn the_models_folder_is_never_an_output() {
    let model = "checkpointer.checkpoint_dir=model";
    let redirected = plan(&[model, "checkpointer.output_dir=./model/../model/out"]);
    assert_eq!(redirected.checkpoint.output_dir, redirected.output_dir);
    assert!(
        notices(&[model, "checkpointer.output_dir=/home/me/model/"])[0].starts_with("checkpoints go to `.demo/out`")
    );
    assert!(notices(&[model, "checkpointer.output_dir=model2"]).is_empty());
    check_mistake(&[model, "output_dir=model/out"], "never written to");
    check_mistake(&[model, "metric_logger.log_dir=model"], "`metric_logger.log_dir` is the model's folder");
    check_mistake(&["metric_logger.filename=../config.json"], "is the name of a file in `log_dir`");
}

#[test]
fn what_changes_nothing_is_said_once() {
    assert_eq!(
        notices(&["compile=True", "optimizer.fused=True", "dataset.trust_remote_code=true", "low_cpu_ram=False"]).len(),
        3
    );
    assert!(notices(&["compile=False", "dataset.packed=False"]).is_empty());
    check_mistake(&["optimizer_in_bwd=True"], "`optimizer_in_bwd` can only be `False`");
    check_mistake(&["model.use_dora=True"], "DoRA is not available yet");
    check_mistake(&["dataset.filter_fn=os.system"], "a config cannot name code");
}

#[test]
fn keys_that_need_each_other() {
    check_mistake(&["~dataset_val"], "`run_val_every_n_steps` needs a `dataset_val`");
    check_mistake(&["optimizer.betas=[0.9]"], "must be two numbers");
    check_mistake(&["clip_grad_norm=-1"], "must be a number above 0");
    check_mistake(&["model.lora_dropout=1.0"], "leaves nothing");
    check_mistake(&["batch_size=2305843009213693952"], "`batch_size` must be at most 2147483647, found the number");
    check_mistake(&["seed=4294967296"], "must be at most 4294967295");
    check_mistake(&["checkpointer.checkpoint_files=[a.gguf]"], "is neither safetensors nor");
}

#[test]
fn file_patterns_expand() {
    let pattern =
        r#"checkpointer.checkpoint_files={filename_format: "model-{}-of-{}.safetensors", max_filename: "00002"}"#;
    let files = plan(&[pattern]).model.checkpoint_files;
    assert_eq!(files, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
    check_mistake(
        &["checkpointer.checkpoint_files={filename_format: a, max_filename: \"2\"}"],
        "a pattern of checkpoint files",
    );
}

/// Accepted means honoured: each row of the tables that claims it is read by a resolver, and none twice by two names.
#[test]
fn every_honoured_key_is_read() {
    let mut read = BTreeSet::new();
    let train_overrides: &[&[&str]] = &[
        &[],
        &["loss=torch.nn.CrossEntropyLoss", "metric_logger=StdoutLogger", "~metric_logger.log_dir"],
        &["metric_logger=TensorBoardLogger"],
        &["profiler={_component_: setup_torch_profiler, enabled: False}"],
        &["checkpointer=FullModelMetaCheckpointer"],
        &["checkpointer=FullModelTorchTuneCheckpointer"],
        &["tokenizer=llama3_tokenizer"],
        &["tokenizer=llama2_tokenizer"],
        &["tokenizer=mistral_tokenizer"],
        &["tokenizer=qwen2_tokenizer"],
        &["tokenizer=qwen2_5_tokenizer"],
        &["tokenizer=qwen3_tokenizer"],
        &["tokenizer={_component_: HuggingFaceModelTokenizer, tokenizer_json_path: a/tokenizer.json}"],
    ];
    let dataset = |component: &str| {
        let alone = ["dataset_val=null", "~run_val_every_n_steps"].map(str::to_owned);
        [vec![format!("dataset={{_component_: {component}}}")], alone.to_vec()].concat()
    };
    let datasets = [
        "alpaca_dataset",
        "alpaca_cleaned_dataset",
        "samsum_dataset",
        "grammar_dataset",
        "chat_dataset, source: a/b, conversation_style: openai",
        "slimorca_dataset",
        "preference_dataset, source: a/b",
        "hh_rlhf_helpful_dataset",
        "stack_exchange_paired_dataset",
        "text_completion_dataset, source: a/b, packed: True",
        "wikitext_dataset, packed: True",
        "cnn_dailymail_articles_dataset, packed: True",
    ];
    let train_overrides =
        train_overrides.iter().map(|overrides| overrides.iter().map(|text| text.to_string()).collect());
    for overrides in train_overrides.chain(datasets.map(dataset)) {
        let overrides: Vec<String> = overrides;
        let config = Config::parse(TRAIN, Path::new("c.yaml"), &overrides).unwrap();
        let reader = Reader::new(&config);
        train::build(&reader, Path::new(""), &surroundings(), &mut vec![]).unwrap();
        read.extend(reader.read.into_inner());
    }
    let config = Config::parse(GENERATE, Path::new("g.yaml"), &[]).unwrap();
    let reader = Reader::new(&config);
    generate::build(&reader, &surroundings()).unwrap();
    read.extend(reader.read.into_inner());
    // Every shipped description, too.
    for text in [
        include_str!("../../../../configs/hardware/mi210x8.yaml"),
        include_str!("../../../../configs/hardware/h100x8.yaml"),
    ] {
        let config = Config::parse(text, Path::new("h.yaml"), &[]).unwrap();
        let reader = Reader::new(&config);
        super::hardware::build(&reader).unwrap();
        read.extend(reader.read.into_inner());
    }

    let sections =
        [("train", keys::TRAIN), ("generate", keys::GENERATE), ("limits", keys::LIMITS), ("hardware", keys::HARDWARE)];
    let components =
        components::ALL.iter().flat_map(|component| component.keys.iter().map(|keys| (component.name, *keys)));
    // One model with adapters stands for all: they share their keys.
    let components = components.filter(|(name, _)| !name.starts_with("lora_") || *name == "lora_smollm2_135m");
    for (section, keys) in sections.into_iter().chain(components) {
        for key in keys.iter().filter(|key| matches!(key.class, Class::Honoured)) {
            assert!(read.contains(&(section, key.name)), "`{section}.{}` is honoured but never read", key.name);
        }
    }
}

#[test]
fn the_tables_are_sound() {
    let mut names = BTreeSet::new();
    for component in components::ALL.iter() {
        for name in std::iter::once(&component.name).chain(component.aliases) {
            assert!(names.insert(*name), "`{name}` names two components");
        }
        let mut keys = BTreeSet::new();
        assert!(
            component.keys.iter().flat_map(|group| group.iter()).all(|key| keys.insert(key.name)),
            "{}",
            component.name
        );
        assert!(component.role != Role::Model || component.keys.len() <= 1);
    }
    for keys in [keys::TRAIN, keys::GENERATE] {
        let mut names = BTreeSet::new();
        assert!(keys.iter().all(|key| names.insert(key.name)));
    }
}

proptest::proptest! {
    /// Whatever a slip of the hand makes of a config: a plan or an error with a place, never a panic, never a bug.
    #[test]
    fn a_damaged_config_is_a_plan_or_an_error(at in 0usize..TRAIN.len(), length in 0usize..40, text in "([a-z0-9.:$&*{}\\[\\]~ \n'\"-]|\\PC){0,12}") {
        let start = (0..=at).rev().find(|index| TRAIN.is_char_boundary(*index)).unwrap();
        let end = (start + length..=TRAIN.len()).find(|index| TRAIN.is_char_boundary(*index)).unwrap_or(TRAIN.len());
        let damaged = format!("{}{text}{}", &TRAIN[..start], &TRAIN[end..]);
        if let Err(error) = try_train(&damaged, &[]) {
            assert_eq!(error.kind, crate::error::Kind::Config, "{error}\n{damaged}");
            assert!(!error.locations.is_empty(), "{error}");
        }
    }
}

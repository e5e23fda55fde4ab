//! Preferences and distillation, started as a user starts them.

use insta::assert_snapshot;
use serde_json::{Value, json};

use crate::case::{Case, Running, root};

const WASM: &str = "recipes/lora_dpo_distributed.wasm";
const RHAI: &str = "scripts/recipes/lora_dpo_distributed.rhai";
const DPO: &[&str] =
    &["loss={_component_: DPOLoss}", "dataset={_component_: preference_dataset, source: pairs}", "~dataset_val"];

/// A case with pairs of answers: the better is short, the worse repeats itself.
fn with_pairs() -> Case {
    let case = Case::new();
    let turn = |role: &str, text: &str| json!({ "role": role, "content": text });
    let row = |i: usize| {
        let asked = turn("user", &format!("The parser reads text files, number {i}."));
        let (good, bad) = (format!("parser {i}"), format!("a parser, a parser, number {}", i % 7).repeat(1 + i % 3));
        let row = json!({
            "chosen": [asked, turn("assistant", &good)], "rejected": [asked, turn("assistant", &bad)],
            "asked": format!("number {i}"), "good": good, "bad": bad,
        });
        format!("{row}\n")
    };
    case.write("pairs/train.jsonl", (0..64).map(row).collect::<String>());
    case
}

fn metric(case: &Case, name: &str, key: &str) -> Vec<f64> {
    let log = String::from_utf8(std::fs::read(case.path(&format!("{name}/logs/log.jsonl"))).unwrap()).unwrap();
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| line[key].as_f64()).collect()
}

/// The same losses bit for bit from the script and from the component, on 1 and on 2 ranks, and the better answers win.
#[test]
fn preferences_are_learnt_the_same_by_script_and_component() {
    let case = with_pairs();
    let mut of_ranks = vec![];
    for (ranks, accumulation) in [("1", "4"), ("2", "2")] {
        let accumulation = format!("gradient_accumulation_steps={accumulation}");
        let more = [&["--nproc", ranks, "epochs=2", "optimizer.lr=2e-2", &accumulation], DPO].concat();
        let [wasm, rhai] = [(WASM, "wasm"), (RHAI, "rhai")].map(|(recipe, name)| {
            let name = format!("{name}{ranks}");
            let losses = case.losses(recipe, &name, &more);
            let metrics: Vec<_> = ["rewards/margins", "rewards/accuracies", "log_probs/chosen"]
                .map(|key| metric(&case, &name, key))
                .into();
            (losses, metrics, case.contents(&format!("{name}/epoch_1/adapter"))["adapter_model.safetensors"].clone())
        });
        assert!(wasm == rhai, "{:?} {:?}", wasm.0, rhai.0);
        let accuracies = &wasm.1[1];
        assert!(
            (wasm.0[0] - 2f64.ln()).abs() < 1e-6 && *accuracies.last().unwrap() > 0.8,
            "{:?} {accuracies:?}",
            wasm.0
        );
        of_ranks.push(wasm);
    }
    for (one, two) in of_ranks[0].0.iter().zip(&of_ranks[1].0) {
        assert!((one - two).abs() < 1e-5, "{:?} {:?}", of_ranks[0].0, of_ranks[1].0);
    }
}

/// Full DPO by torchtune's name: script and component, 1 and 2 ranks, and the reference is the model before training.
#[test]
fn preferences_are_learnt_by_all_weights() {
    let case = with_pairs();
    let whole = ["model=llama", "ref_checkpointer={_component_: FullModelHFCheckpointer, checkpoint_dir: model}"];
    let more = [DPO, &whole, &["optimizer.lr=1e-4"]].concat();
    let one = case.losses("full_dpo_distributed", "one", &more);
    assert_eq!(case.losses(RHAI, "rhai", &more), one);
    let two = case.losses(
        "full_dpo_distributed",
        "two",
        &[&["--nproc", "2", "gradient_accumulation_steps=2"], &more[..]].concat(),
    );
    assert!(one.iter().zip(&two).all(|(one, two)| (one - two).abs() < 1e-5), "{one:?} {two:?}");
    assert!((one[0] - 2f64.ln()).abs() < 1e-6 && *one.last().unwrap() < 0.3, "{one:?}");
}

/// A prompt and two answers are the same pairs as two conversations; a template may make them; a checkpoint may be the reference.
#[test]
fn pairs_come_in_many_ways() {
    let case = with_pairs();
    let run = |name: &str, dataset: &str, more: &[&str]| {
        let dataset = format!("dataset={dataset}");
        case.losses(
            RHAI,
            name,
            &[&["loss={_component_: DPOLoss}", &dataset, "~dataset_val", "optimizer.lr=1e-2"], more].concat(),
        )
    };
    case.write(
        "pairs.rhai",
        "fn render(row) {
    let asked = user(row.prompt);
    pair([asked, assistant(row.chosen)], [asked, assistant(row.rejected)])
}",
    );
    let map = "source: pairs, column_map: {prompt: asked, chosen: good, rejected: bad}";
    let columns = run("columns", &format!("{{_component_: preference_dataset, {map}}}"), &[]);
    let template = run("template", &format!("{{_component_: preference_dataset, {map}, template: pairs.rhai}}"), &[]);
    assert_eq!(columns, template);
    let reference = "ref_checkpointer={_component_: FullModelHFCheckpointer, checkpoint_dir: model}";
    let second = run("second", &format!("{{_component_: preference_dataset, {map}}}"), &[reference]);
    assert_eq!(columns, second);

    let arguments = [&["preview", "--config", "train.yaml", "--rows", "1"], DPO].concat();
    let ended = Running::start(&mut case.host(&arguments)).wait();
    assert!(ended.stdout.contains("chosen") && ended.stdout.contains("rejected"), "{}{}", ended.stdout, ended.stderr);
}

#[test]
fn a_student_learns_of_a_teacher() {
    let case = Case::new();
    let teacher = root().join("tests/fixtures/teacher");
    let checkpointer =
        format!("teacher_checkpointer={{_component_: FullModelHFCheckpointer, checkpoint_dir: {}}}", teacher.display());
    let distil =
        ["teacher_model={_component_: llama}", &checkpointer, "kd_loss={_component_: ForwardKLLoss}", "~dataset_val"];
    const RECIPE: &str = "knowledge_distillation_distributed";
    let losses = case.losses(RECIPE, "one", &distil);
    let two = case.losses(RECIPE, "two", &[&["--nproc", "2", "gradient_accumulation_steps=2"], &distil[..]].concat());
    assert!(losses.iter().zip(&two).all(|(one, two)| (one - two).abs() < 1e-5), "{losses:?} {two:?}");
    let (class, taught) = (metric(&case, "one", "class_loss"), metric(&case, "one", "kd_loss"));
    for (loss, (class, taught)) in losses.iter().zip(class.iter().zip(&taught)) {
        assert!((loss - (class + taught) / 2.0).abs() < 1e-4, "{loss} {class} {taught}");
    }
    assert!(taught.last().unwrap() < &taught[0], "{taught:?}");
}

#[test]
fn methods_that_do_not_fit() {
    let case = with_pairs();
    let fails = |recipe: &str, arguments: &[&str]| {
        let ended = Running::start(&mut case.run(recipe, arguments)).wait();
        ended.report()
    };
    assert_snapshot!(fails(RHAI, &["loss={_component_: DPOLoss}", "~dataset_val"]), @"
    exit 2
    error: the recipe trains on preferences, and the data set has none
    hint: take `dataset._component_: preference_dataset`, or another recipe
    ");
    assert_snapshot!(fails("lora_distributed", DPO), @"
    exit 2
    error: the recipe asks for the loss of the config, and `DPOLoss` is none of a model
    hint: take a recipe that computes it, such as `lora_dpo_distributed`, or another `loss`
    ");
    assert_snapshot!(fails("lora_distributed", &DPO[1..]), @"
    exit 2
    error: the recipe learns every answer, and the data set has pairs of a better and a worse one
    hint: take a recipe for preferences, such as `lora_dpo_distributed`, or another data set
    ");
    assert_snapshot!(fails("lora_distributed", &["kd_ratio=0.3"]), @"
    exit 2
    error: the recipe `recipes/lora_distributed.wasm` never asked for `kd_ratio`
      --> train.yaml
    hint: that belongs to another method: leave it out, or run its recipe
    ");
    assert_snapshot!(fails("knowledge_distillation_distributed", &[]), @"
    exit 1
    error: recipe `scripts/recipes/knowledge_distillation_distributed.rhai` failed before the first step
      --> scripts/recipes/knowledge_distillation_distributed.rhai:5:19
    cause: the config names no model to learn from
    hint: give `teacher_model` and `teacher_checkpointer`
    ");
    // A loss of the recipe's own, which the config says nothing of.
    case.write("own.rhai", "let reference = host::open().reference();");
    assert_snapshot!(fails("own.rhai", &["model=llama", DPO[1], "~dataset_val"]), @"
    exit 1
    error: recipe `own.rhai` failed before the first step
      --> own.rhai:1:30
    cause: the config names no reference to compare with
    hint: give `ref_checkpointer`: without adapters to leave out, the reference is a second model
    ");
    assert_snapshot!(fails("full_dpo_distributed", &[&["model=llama"], DPO].concat()), @"
    exit 2
    error: `DPOLoss` compares with a reference, which without adapters is a second model
      --> command line
    hint: add `ref_checkpointer: {_component_: FullModelHFCheckpointer, checkpoint_dir: FOLDER}`, with the folder of `checkpointer`
    ");
    assert_snapshot!(fails("full_finetune_distributed", &[]), @"
    exit 2
    error: the recipe `full_finetune_distributed` trains all weights, and the model `lora_llama` has adapters
      --> train.yaml:3:16
    hint: take the recipe `lora_distributed`, or the model `llama`
    ");
    assert_snapshot!(fails("lora_finetune_fsdp2", &["model=llama"]), @"
    exit 2
    error: the recipe `lora_finetune_fsdp2` trains adapters, and the model `llama` has none
      --> command line
    hint: take the recipe `full_finetune_distributed`, or the model `lora_llama`
    ");
    assert_snapshot!(fails("full_finetune_single_device", &["model=llama", "save_adapter_weights_only=True"]), @"
    exit 2
    error: `save_adapter_weights_only: True`, and `llama` has no adapter: all its weights are trained
      --> command line
    hint: set it to False, or take `lora_llama`
    ");
    let measured = "dataset_val={_component_: instruct_dataset, source: data, split: validation}";
    assert_snapshot!(fails(RHAI, &["loss={_component_: DPOLoss}", DPO[1], measured]), @"
    exit 2
    error: `dataset_val` is measured by a loss of the model's, and `DPOLoss` is a recipe's
      --> command line
    hint: leave `dataset_val` out: `~dataset_val`
    ");
}

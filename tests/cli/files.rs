//! Mistakes in the files a config names.

use std::process::Command;

use insta::assert_snapshot;

use super::{CORE_MODULE, Case, GENERATE};

fn remove(case: &Case, name: &str) {
    std::fs::remove_file(case.path().join(name)).unwrap();
}

fn run(case: &Case, recipe: &str) -> String {
    case.host(&["run", recipe, "--config", "c.yaml"])
}

#[test]
fn an_unknown_recipe() {
    assert_snapshot!(run(&Case::new(), "lora_distribted"), @"
    exit 2
    --- stderr
    error: there is no recipe `lora_distribted`
    hint: did you mean `lora_distributed`?
    ");
    // Half of a name, and of a path.
    for name in ["lora_dpo", "recipes/lora_dpo.wasm"] {
        let said = run(&Case::new(), name);
        assert!(said.contains("did you mean `lora_dpo_distributed`?"), "{said}");
    }
    // A path that leads nowhere from this folder.
    assert_snapshot!(run(&Case::new(), "elsewhere/lora_distributed.wasm"), @"
    exit 2
    --- stderr
    error: there is no recipe `elsewhere/lora_distributed.wasm`
    hint: did you mean `lora_distributed`?
    ");
    assert_snapshot!(run(&Case::new(), "mine.wasm"), @"
    exit 2
    --- stderr
    error: there is no recipe `mine.wasm`
    hint: give the path of a .wasm or .rhai file, or a name that `host ls` lists
    ");
}

#[test]
fn a_recipe_that_is_text() {
    let case = Case::new();
    case.write("notes.txt", "for step in steps");
    assert_snapshot!(run(&case, "notes.txt"), @"
    exit 2
    --- stderr
    error: the recipe `notes.txt` is neither a Wasm component nor a Rhai script
    hint: a script's name ends in .rhai; a component is built for `wasm32-wasip2`
    ");
    case.write("notes.wasm", "for step in steps");
    assert_snapshot!(run(&case, "notes.wasm"), @"
    exit 2
    --- stderr
    error: the recipe `notes.wasm` is neither a Wasm component nor a Rhai script
    hint: a script's name ends in .rhai; a component is built for `wasm32-wasip2`
    ");
    case.write("empty.wasm", "");
    assert_snapshot!(run(&case, "empty.wasm"), @"
    exit 2
    --- stderr
    error: the recipe `empty.wasm` is empty
    ");
}

#[test]
fn a_recipe_that_is_a_core_module() {
    let case = Case::new();
    case.write("core.wasm", CORE_MODULE);
    assert_snapshot!(run(&case, "core.wasm"), @"
    exit 2
    --- stderr
    error: the recipe `core.wasm` is a core Wasm module, and a recipe is a component
    hint: build the guest for `wasm32-wasip2`
    ");
}

#[test]
fn a_template_that_is_not_one() {
    let case = Case::new();
    case.write("templates/summarize.wasm", CORE_MODULE);
    assert_snapshot!(case.validate(&[]), @"
    exit 2
    --- stderr
    error: the template `templates/summarize.wasm` is a core Wasm module, and a template is a component
      --> c.yaml:12:20
    hint: build the guest for `wasm32-wasip2`
    ");
}

#[test]
fn a_loss_that_is_not_one() {
    let case = Case::new();
    case.write("core.wasm", CORE_MODULE);
    case.write("fine.rhai", "fn loss(logits, labels) { #{ sum: logits.sum(), weight: 1 } }");
    assert_eq!(
        case.validate(&["loss={_component_: fine.rhai, gamma: 2}"]),
        "exit 0\n--- stdout\nConfig is well-formed!"
    );
    assert_snapshot!(case.validate(&["loss={_component_: absent.rhai}"]), @"
    exit 2
    --- stderr
    error: cannot read the loss `absent.rhai`
      --> command line
    cause: No such file or directory (os error 2)
    hint: paths count from the folder `host` is started in
    ");
    assert_snapshot!(case.validate(&["loss={_component_: core.wasm}"]), @"
    exit 2
    --- stderr
    error: the loss `core.wasm` is a core Wasm module, and a loss is a component
      --> command line
    hint: build the guest for `wasm32-wasip2`
    ");
    assert_snapshot!(case.validate(&["loss={_component_: fine.rhai, gamma: [1, 2]}"]), @"
    exit 2
    --- stderr
    error: `loss.gamma` must be a text, a flag or a finite number, found a list
      --> command line
    hint: a guest's settings are single values
    ");
    assert_snapshot!(case.validate(&["recipe={a: [1, .inf], b: .nan}"]), @"
    exit 2
    --- stderr
    error: `recipe.a.1` must be a finite number, found the number `.inf`
      --> command line
    hint: a recipe can be given a text in its place

    error: `recipe.b` must be a finite number, found the number `.nan`
      --> command line
    hint: a recipe can be given a text in its place
    ");
    assert_snapshot!(case.validate(&["loss={_component_: focal}"]), @"
    exit 2
    --- stderr
    error: unknown loss `focal` in `loss._component_`
      --> command line
    hint: there is: cross_entropy, CrossEntropyLoss, DPOLoss
    ");
}

#[test]
fn a_template_that_is_not_there() {
    assert_snapshot!(Case::new().validate(&["tokenizer.prompt_template=absent.rhai"]), @"
    exit 2
    --- stderr
    error: cannot read the template `absent.rhai`
      --> command line
    cause: No such file or directory (os error 2)
    hint: paths count from the folder `host` is started in
    ");
    assert_snapshot!(Case::new().validate(&["tokenizer.prompt_template=elsewhere/sumarize.wasm"]), @"
    exit 2
    --- stderr
    error: cannot read the template `elsewhere/sumarize.wasm`
      --> command line
    cause: No such file or directory (os error 2)
    hint: did you mean `summarize`?
    ");
    assert_snapshot!(Case::new().validate(&["tokenizer.prompt_template=SumarizeTemplate"]), @"
    exit 2
    --- stderr
    error: unknown template `SumarizeTemplate` in `tokenizer.prompt_template`
      --> command line
    hint: did you mean `SummarizeTemplate`?
    ");
}

#[test]
fn a_model_folder_that_is_not_there() {
    assert_snapshot!(Case::new().validate(&["checkpointer.checkpoint_dir=absent"]), @"
    exit 2
    --- stderr
    error: the model folder `absent` is not there
      --> command line
    hint: it is a Hugging Face folder: config.json, tokenizer files, weights; `host import` makes one from a GGUF file

    error: the tokenizer `absent` is not there
      --> c.yaml:10:9
    hint: give the model's tokenizer.json or tokenizer.model, or its folder
    ");
}

#[test]
fn a_model_folder_without_config_json() {
    let case = Case::new();
    remove(&case, "model/config.json");
    assert_snapshot!(case.validate(&[]), @"
    exit 2
    --- stderr
    error: cannot read `config.json` of the model folder `model`
      --> c.yaml:7:19
    cause: No such file or directory (os error 2)
    hint: `checkpointer.checkpoint_dir` must be a Hugging Face model folder: config.json, tokenizer files, weights
    ");
}

#[test]
fn an_architecture_we_do_not_build() {
    let case = Case::new();
    case.write("model/config.json", r#"{"architectures": ["MambaForCausalLM"]}"#);
    assert_snapshot!(case.validate(&[]), @"
    exit 2
    --- stderr
    error: the architecture `MambaForCausalLM` is not one that `host` builds
      --> c.yaml:7:19
      --> model/config.json
    hint: architectures built so far: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM
    ");
}

#[test]
fn weights_that_are_not_there() {
    let case = Case::new();
    remove(&case, "model/model.safetensors");
    assert_snapshot!(case.validate(&[]), @"
    exit 2
    --- stderr
    error: no weights in the model folder `model`
      --> c.yaml:7:19
    hint: it needs `model.safetensors`, or `model.safetensors.index.json` and the files that names; files under other names are listed in `checkpointer.checkpoint_files`
    ");
    assert_snapshot!(case.validate(&["checkpointer.checkpoint_files=[model-1.safetensors]"]), @"
    exit 2
    --- stderr
    error: cannot open the weight file `model/model-1.safetensors`
      --> command line
    cause: No such file or directory (os error 2)
    ");
}

#[test]
fn weights_cut_short() {
    let case = Case::new();
    case.write("model/model.safetensors", b"\xff\0\0\0\0\0\0\0{}");
    assert_snapshot!(case.validate(&[]), @"
    exit 2
    --- stderr
    error: `model/model.safetensors` is not a whole safetensors file
      --> c.yaml:7:19
    cause: its header claims 255 bytes of a file of 10
    hint: copy or download the file again
    ");
    let header = r#"{"lm_head.weight":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#;
    let len = (header.len() as u64).to_le_bytes();
    case.write("model/model.safetensors", [&len, header.as_bytes(), &[0; 8]].concat());
    assert_snapshot!(case.validate(&[]), @"
    exit 2
    --- stderr
    error: `model/model.safetensors` is not a whole safetensors file
      --> c.yaml:7:19
    cause: its header describes 92 bytes, the file has 84
    hint: copy or download the file again
    ");
}

#[test]
fn weights_of_another_format() {
    let case = Case::new();
    case.write("model/model.safetensors", "PK\u{3}\u{4} what torch.save writes, renamed");
    assert_snapshot!(case.validate(&[]), @"
    exit 2
    --- stderr
    error: `model/model.safetensors` is not a weight file that can be read
      --> c.yaml:7:19
    cause: invalid Zip archive: Could not find EOCD
    hint: take the model's safetensors files, or save a plain dictionary of tensors with `torch.save`
    ");
}

#[test]
fn a_tokenizer_that_is_not_there() {
    let case = Case::new();
    remove(&case, "model/tokenizer.json");
    assert_snapshot!(case.validate(&[]), @"
    exit 2
    --- stderr
    error: the tokenizer `model/tokenizer.json` is not there
      --> c.yaml:10:9
    hint: give the model's tokenizer.json or tokenizer.model, or its folder
    ");
}

#[test]
fn a_tokenizer_that_is_none() {
    let case = Case::new();
    for (content, hint) in
        [("", "is empty"), ("version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS")]
    {
        case.write("model/tokenizer.json", content);
        let found = case.validate(&[]);
        assert!(found.contains(&format!("error: `model/tokenizer.json` {hint}")), "{found}");
    }
    case.write("model/tokenizer.json", "<!DOCTYPE html>");
    assert_snapshot!(case.validate(&["tokenizer=qwen2_tokenizer", "tokenizer.merges_file=merges.txt"]), @"
    exit 2
    --- stderr
    error: `model/tokenizer.json` is not a tokenizer this version reads
      --> c.yaml:10:9
    hint: read are tokenizer.json, Llama 3's and SentencePiece's tokenizer.model, and vocab.json with `merges_file`

    error: the file `merges.txt` is not there
      --> command line
    hint: paths count from the folder `host` is started in
    ");
}

#[test]
fn a_tokenizer_of_another_model() {
    let case = Case::with(GENERATE);
    case.write("other/tokenizer.json", r#"{"model": {}}"#);
    assert_snapshot!(case.validate(&["tokenizer.path=other"]), @"
    exit 0
    --- stdout
    Config is well-formed!
    --- stderr
    notice: the tokenizer `other/tokenizer.json` is not the one in the model's folder `model`: the model may have learned other tokens (command line)
    ");
}

#[test]
fn data_that_is_not_there() {
    let case = Case::new();
    assert_snapshot!(case.validate(&["dataset.source=json", "dataset.data_files=absent.jsonl"]), @"
    exit 2
    --- stderr
    error: cannot read the data file `absent.jsonl`
      --> command line
    cause: No such file or directory (os error 2)
    hint: paths count from the folder `host` is started in
    ");
    assert_snapshot!(case.validate(&["dataset.source=model"]), @"
    exit 2
    --- stderr
    error: the folder `model` has no data file
      --> command line
    hint: data files end in .jsonl, .json, .csv, .parquet or .txt; name them `train.jsonl`, `validation.jsonl`
    ");
}

#[test]
fn data_without_rows() {
    let case = Case::new();
    for nothing in ["", "\n \n"] {
        case.write("data/train.jsonl", nothing);
        insta::allow_duplicates! { assert_snapshot!(case.validate(&[]), @"
        exit 2
        --- stderr
        error: the data file `data/train.jsonl` has no rows
          --> c.yaml:15:11
        ") };
    }
}

#[test]
fn data_of_another_format() {
    let case = Case::new();
    case.write("data/train.jsonl", "{\"input\": 1, \"output\"\n");
    assert_snapshot!(case.validate(&[]), @r#"
    exit 2
    --- stderr
    error: `data/train.jsonl` is not a jsonl file: none of its first rows is a JSON object
      --> c.yaml:15:11
    hint: each line has to be one object, such as {"document": "…", "summary": "…"}
    "#);
    assert_snapshot!(case.validate(&["dataset.source=parquet", "dataset.data_files=data/train.jsonl"]), @"
    exit 2
    --- stderr
    error: cannot read `data/train.jsonl` as parquet
      --> command line
    cause: Parquet error: Invalid Parquet file. Corrupt footer
    ");
}

#[test]
fn a_column_that_is_not_there() {
    let case = Case::new();
    let column_map = "dataset.column_map={input: inputs, output: output}";
    assert_snapshot!(case.validate(&[column_map]), @"
    exit 2
    --- stderr
    error: the data has no column `inputs`
      --> command line
      --> data/train.jsonl
    hint: did you mean `input`?
    hint: its columns are `input`, `output`; `column_map` says which to take
    ");
    case.write("data/train.jsonl", "{\"document\": \"a\", \"summary\": \"b\"}\n");
    assert_snapshot!(case.validate(&[]), @"
    exit 2
    --- stderr
    error: the data has no column `input`
      --> c.yaml:14:3
      --> data/train.jsonl
    hint: its columns are `document`, `summary`; `column_map` says which to take
    ");
}

#[test]
fn an_output_that_is_a_file() {
    let case = Case::new();
    case.write("taken", "");
    assert_snapshot!(case.validate(&["output_dir=taken/run"]), @"
    exit 2
    --- stderr
    error: the output folder `taken/run` cannot be made: `taken` is a file
      --> command line
    ");
}

#[test]
fn an_output_that_cannot_be_written() {
    // Not even root makes a folder there.
    let found = Case::new().validate(&["output_dir=/proc/run"]);
    assert!(found.starts_with("exit 2"), "{found}");
    assert!(
        found.contains(
            "error: the output folder `/proc/run` cannot be written to\n  --> command line\ncause: `/proc`: "
        ),
        "{found}"
    );
}

#[test]
fn an_output_behind_a_link_into_the_model() {
    let case = Case::new();
    std::os::unix::fs::symlink("model", case.path().join("link")).unwrap();
    assert_snapshot!(case.validate(&["output_dir=link/run"]), @"
    exit 2
    --- stderr
    error: the output folder `link/run` leads into the model's folder, which is never written to
      --> command line
    hint: give another with `output_dir=FOLDER`
    ");
}

#[test]
fn logs_in_the_models_folder() {
    let run = ["run", "lora_distributed", "--config", "c.yaml", "--log-dir", "model/logs"];
    assert_snapshot!(Case::new().host(&run), @"
    exit 2
    --- stderr
    error: the output folder `model/logs` leads into the model's folder, which is never written to
    hint: give another with `--log-dir FOLDER`
    ");
}

#[test]
fn an_adapter_that_is_not_there() {
    let generate = ["run", "generate", "--config", "c.yaml", "adapter_dir=absent"];
    assert_snapshot!(Case::with(GENERATE).host(&generate), @"
    exit 2
    --- stderr
    error: the adapter `absent` is not there
      --> command line
    hint: give a folder that PEFT or `host` wrote, or the `adapter_model.pt` that torchtune wrote
    ");
}

/// A `host` away from its build, where no libtorch is: nothing names one, no set-up has been there, no Python has torch.
#[test]
fn no_libtorch() {
    let case = Case::new();
    let program = case.path().join("bin/host");
    case.write("bin/host-rank", "");
    // By another process: a program this one has open for writing is busy for the children of its other threads.
    assert!(Command::new("cp").arg(env!("CARGO_BIN_EXE_host")).arg(&program).status().unwrap().success());
    let host = |arguments: &[&str], libtorch: &str| {
        let mut command = Command::new(&program);
        command.args(arguments).env("PATH", case.path());
        let found = case.outcome(command.env("LIBTORCH", libtorch));
        found.replace(case.path().to_str().unwrap(), "DIR")
    };
    let run = |libtorch: &str| host(&["run", "lora_distributed", "--config", "c.yaml"], libtorch);
    assert_snapshot!(run(""), @"
    exit 2
    --- stderr
    error: no libtorch found
    cause: `LIBTORCH` is not set, there is no `.libtorch/view` above this program, and `python3` has no torch
    hint: run `cargo xtask setup`, or set `LIBTORCH` to a libtorch 2.11 or `torch` folder
    ");
    std::fs::create_dir(case.path().join("empty")).unwrap();
    assert_snapshot!(run("empty"), @"
    exit 2
    --- stderr
    error: not a libtorch folder (from `LIBTORCH`): it has no `lib/libtorch_cpu.so`
      --> DIR/empty
    hint: set `LIBTORCH` to a libtorch 2.11 or `torch` folder, or unset it
    ");
    // What needs none works all the same.
    assert_snapshot!(host(&["validate", "c.yaml"], ""), @"
    exit 0
    --- stdout
    Config is well-formed!
    ");
    assert!(host(&["ls"], "").starts_with("exit 0\n--- stdout\nRECIPE"));
    let doctor = host(&["doctor"], "");
    let of_machine = ["processor", "memory", "GPU"];
    let rest = doctor.lines().filter(|line| !of_machine.iter().any(|name| line.starts_with(name)));
    assert_eq!(doctor.lines().filter(|line| line.starts_with("processor") || line.starts_with("memory")).count(), 2);
    assert_snapshot!(rest.collect::<Vec<_>>().join("\n"), @"
    exit 1
    --- stdout
    host       0.1.0, DIR/bin/host
    host-rank  version unknown, DIR/bin/host-rank
    limits     limits.guest_mb=10 limits.memory_mb=256 limits.tensors_mb=32768 limits.handles=20000
               limits.hostcall_mb=32 limits.compile_mb=2048 limits.compile_seconds=60.0 limits.log_lines=10000
               limits.memories=4 limits.instances=64 limits.tables=32 limits.table_elements=100000
               limits.operations=10000000000 limits.seconds=30.0
               components: 512 KiB of stack, 32 in each other, log lines of 1024 bytes
               scripts: 1024 KiB long, strings of memory_mb / 256, arrays of 65536, maps of 4096, 32 calls and 64 expressions deep (32 in functions), 256 variables, 256 functions
    libtorch   not usable

    error: no libtorch found
    cause: `LIBTORCH` is not set, there is no `.libtorch/view` above this program, and `python3` has no torch
    hint: run `cargo xtask setup`, or set `LIBTORCH` to a libtorch 2.11 or `torch` folder
    --- stderr
    error: `host run` cannot work here yet
    hint: see the errors in the diagnosis, each with its hint
    ");
}

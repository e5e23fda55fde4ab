//! Each verb's success, its help, and mistakes on the command line.

use std::path::Path;

use insta::assert_snapshot;

use super::{Case, GENERATE};

#[test]
fn without_a_verb_it_helps() {
    assert_snapshot!(Case::new().host(&[]), @"
    exit 0
    --- stdout
    Fine-tunes language models: configs in YAML, recipes and templates as sandboxed guests

    Usage: host [COMMAND]

    Commands:
      run          Runs a recipe with a config
      validate     Checks a config and the files it names
      ls           Lists the recipes, configs and templates that come with it, and those that are not
                   there yet
      cp           Copies a recipe, a template or a config, to change it
      cat          Prints a config
      keys         Says what a config may contain: every key with its default, and what becomes of it
      plan         Says how much memory and time a run would take, without starting it
      preview      Shows what rows become: text, tokens, and which of them carry loss
      new          Makes a folder with a new recipe, template or loss
      check        Looks at a recipe, a template or a loss without running it
      test         Holds a guest against what its author expects, and shows how much of each limit it
                   used
      inspect      Shows what a recipe, a template or a loss says of itself, what it uses, its size and
                   its digest
      download     Fetches a model or a data set from the Hugging Face hub
      import       Turns a GGUF model into a Hugging Face folder
      doctor       Shows what this machine has for a run, and what is wrong with it
      completions  Prints a shell's completions for `host`

    Options:
      -h, --help     Print help
      -V, --version  Print version

    Examples:
      host ls                                             what comes with it
      host cp smollm2/135M_lora_summarize my.yaml
      host download meta-llama/Llama-3.2-1B-Instruct --output-dir model
      host validate configs/smollm2/135M_lora_summarize.yaml
      host new template my_template                       a folder that builds, tests and runs
      host check my_template.rhai                         a guest, without running it
      host inspect downloaded.wasm                        what it says of itself, and what it uses
      host plan --config my.yaml --nproc 2                what memory and time a run takes
      host preview --config my.yaml                       what rows become, and what carries loss
      host run lora_distributed --nproc 2 --config smollm2/135M_lora_summarize
      host run lora_distributed --config my.yaml epochs=3 optimizer.lr=1e-4 '~lr_scheduler'
      host run generate --config smollm2/135M_generate prompt.user='Some text'
      host doctor                                         what this machine has, and what is wrong

    Exit codes: 0 done, 1 the run failed, 2 command line or config, 101 a bug, 130 interrupted.
    ");
}

#[test]
fn run_helps() {
    assert_snapshot!(Case::new().host(&["run", "--help"]), @"
    exit 0
    --- stdout
    Runs a recipe with a config

    Usage: host run [OPTIONS] --config <FILE> <RECIPE> [OVERRIDE]...

    Arguments:
      <RECIPE>
              A recipe's file (.wasm or .rhai), a name that `host ls` lists, or `generate`

      [OVERRIDE]...
              Changes to the config: `key=value`, `~key`

    Options:
          --config <FILE>
              The config's file, or a name that `host ls` lists

          --nproc <N>
              Workers to start on this machine: a number, `gpu`, `cpu` (one each), or `auto` (GPUs, else
              CPUs)
              
              [default: 1]

          --master-addr <HOST>
              Where the workers of one machine meet

          --master-port <PORT>
              The port where the workers meet; any free one by default

          --nnodes <N>
              Machines of the run, each with its own `host run`
              
              [default: 1]

          --node-rank <R>
              Which of the machines this is, from 0; ranks count on from there

          --rdzv-endpoint <HOST:PORT>
              Where the machines meet: a name or address of node 0, and a free port there (29400 if not
              given)

          --rdzv-id <ID>
              A name of the run, the same on all machines, that keeps others out

          --rdzv-timeout <SECONDS>
              How long machines and ranks wait for each other to come; 300 if not given

          --max-restarts <K>
              How often all ranks are started again, from the newest checkpoint, after one of them or a
              machine was lost

      -h, --help
              Print help (see a summary with '-h')

    Flags of torchrun:
          --log-dir <DIR>
              Writes what each worker prints to `DIR/rank_N/stdout.log` and `stderr.log` too

      -r, --redirects <STREAMS>
              What goes to the files of `--log-dir` alone: 1 stdout, 2 stderr, 3 both; `0:3,1:2` by
              worker

      -t, --tee <STREAMS>
              What goes to the files of `--log-dir` and to the terminal

          --local-ranks-filter <RANKS>
              Shows only these workers' output, such as `0,2`

          --standalone
              Ignores `--rdzv-endpoint`

          --rdzv-conf <VALUE>
              Of `timeout=SECONDS`: what `--rdzv-timeout` says

          --rdzv-backend <VALUE>
              Only c10d: machines meet at node 0, and need no server besides

          --local-addr <VALUE>
              Changes nothing: a machine is known by the address it reaches node 0 from

          --monitor-interval <VALUE>
              Changes nothing: a worker's end is seen at once

          --start-method <VALUE>
              Changes nothing: a worker is a process

          --role <VALUE>
              Changes nothing: all workers have the same role

          --event-log-handler <VALUE>
              Changes nothing: the end of a run is told on the terminal

          --signals-to-handle <VALUE>
              Changes nothing: SIGINT and SIGTERM reach every worker

          --numa-binding <VALUE>
              Refused: workers are not bound to CPUs; `numactl` does it for all of them

          --virtual-local-rank
              Refused: each worker takes the GPU of its local rank

          --duplicate-stdout-filters <VALUE>
              Refused: the workers' output is not filtered; `grep` the files of `--log-dir`

          --duplicate-stderr-filters <VALUE>
              Refused: the workers' output is not filtered; `grep` the files of `--log-dir`

          --logs-specs <VALUE>
              Refused: `--log-dir`, `--redirects` and `--tee` say where output goes

      -m, --module
              Refused: a recipe is a .wasm or .rhai file, not Python

          --no-python
              Refused: a recipe is a .wasm or .rhai file, not Python

          --run-path
              Refused: a recipe is a .wasm or .rhai file, not Python

    Examples:
      host run recipes/lora_distributed.wasm --nproc 2 --config configs/smollm2/135M_lora_summarize.yaml
      host run lora_distributed --config my.yaml epochs=3 'dataset.split=train[:1000]'
      host run my_recipe.rhai --config my.yaml optimizer=AdamW '~lr_scheduler'
      host run generate --config smollm2/135M_generate prompt.user='Some text'

    Overrides: `key=value` sets a key (typed as in YAML; lists as `[a,b]`), `~key` deletes one.
    `HOST_LOG` sets the log (such as `debug`).
    ");
}

#[test]
fn validate_helps() {
    assert_snapshot!(Case::new().host(&["validate", "--help"]), @"
    exit 0
    --- stdout
    Checks a config and the files it names

    Usage: host validate [OPTIONS] <CONFIG> [OVERRIDE]...

    Arguments:
      <CONFIG>       The config's file, or a name that `host ls` lists
      [OVERRIDE]...  Changes to the config: `key=value`, `~key`

    Options:
          --recipe <RECIPE>  The recipe it is for, which may have keys of its own: a file, or a name
                             that `host ls` lists
          --json             Print the verdict, the resolved plan, notices and mistakes as JSON
      -h, --help             Print help

    Examples:
      host validate my.yaml
      host validate my.yaml epochs=3 model.lora_rank=16
      host validate my.yaml --recipe my_recipe.rhai
      host validate --json my.yaml | jq .plan.train.optimizer

    All mistakes are shown at once, each with its line and column. When there are none, the files are
    looked at too: model folder, weights, tokenizer, data, guests, output folder. Of a data
    set on the hub only what is cached is seen: nothing is fetched.
    ");
}

#[test]
fn an_unknown_verb() {
    assert_snapshot!(Case::new().host(&["validat"]), @"
    exit 2
    --- stderr
    error: unrecognized subcommand 'validat'

      tip: a similar subcommand exists: 'validate'

    Usage: host [COMMAND]

    For more information, try '--help'.
    ");
}

#[test]
fn ls_lists_what_is_there() {
    let case = Case::new();
    for name in ["llama3_1/8B_lora", "smollm2/135M_lora_summarize", "generation", "smollm2/135M_generate"] {
        case.write(&format!("configs/{name}.yaml"), "");
    }
    assert_snapshot!(case.host(&["ls"]), @"
    exit 0
    --- stdout
    RECIPE                                  CONFIG
    lora_distributed                        llama2/7B_lora
                                            llama2/7B_lora_single_device
                                            llama2/13B_lora
                                            llama2/70B_lora
                                            code_llama2/7B_lora_single_device
                                            llama3/8B_lora
                                            llama3/8B_lora_single_device
                                            llama3/70B_lora
                                            llama3_1/8B_lora
                                            llama3_1/8B_lora_single_device
                                            llama3_1/70B_lora
                                            llama3_2/1B_lora
                                            llama3_2/1B_lora_single_device
                                            llama3_2/3B_lora
                                            llama3_2/3B_lora_single_device
                                            llama3_3/70B_lora
                                            mistral/7B_lora
                                            mistral/7B_lora_single_device
                                            qwen2/0.5B_lora
                                            qwen2/0.5B_lora_single_device
                                            qwen2/1.5B_lora
                                            qwen2/1.5B_lora_single_device
                                            qwen2/7B_lora
                                            qwen2/7B_lora_single_device
                                            qwen2_5/0.5B_lora
                                            qwen2_5/0.5B_lora_single_device
                                            qwen2_5/1.5B_lora
                                            qwen2_5/1.5B_lora_single_device
                                            qwen2_5/3B_lora
                                            qwen2_5/3B_lora_single_device
                                            qwen2_5/7B_lora
                                            qwen2_5/7B_lora_single_device
                                            qwen2_5/14B_lora_single_device
                                            qwen2_5/32B_lora
                                            qwen2_5/72B_lora
                                            qwen3/0.6B_lora
                                            qwen3/0.6B_lora_single_device
                                            qwen3/1.7B_lora
                                            qwen3/1.7B_lora_single_device
                                            qwen3/4B_lora
                                            qwen3/4B_lora_single_device
                                            qwen3/8B_lora
                                            qwen3/8B_lora_single_device
                                            qwen3/14B_lora_single_device
                                            qwen3/32B_lora
                                            smollm2/135M_lora_summarize
    full_finetune_distributed               llama2/7B_full
                                            llama3/8B_full
                                            llama3_1/8B_full
                                            llama3_1/8B_full_single_device
                                            llama3_2/1B_full
                                            llama3_2/1B_full_single_device
                                            llama3_2/3B_full
                                            llama3_2/3B_full_single_device
                                            mistral/7B_full
                                            qwen2/0.5B_full
                                            qwen2/0.5B_full_single_device
                                            qwen2/1.5B_full
                                            qwen2/1.5B_full_single_device
                                            qwen2/7B_full
                                            qwen2/7B_full_single_device
                                            qwen2_5/0.5B_full
                                            qwen2_5/0.5B_full_single_device
                                            qwen2_5/1.5B_full
                                            qwen2_5/1.5B_full_single_device
                                            qwen2_5/3B_full
                                            qwen2_5/3B_full_single_device
                                            qwen2_5/7B_full
                                            qwen2_5/7B_full_single_device
                                            qwen3/0.6B_full
                                            qwen3/0.6B_full_single_device
                                            qwen3/1.7B_full
                                            qwen3/1.7B_full_single_device
                                            qwen3/4B_full
                                            qwen3/4B_full_single_device
                                            qwen3/8B_full
                                            qwen3/8B_full_single_device
                                            smollm2/135M_full_summarize
    lora_dpo_distributed                    llama2/7B_lora_dpo
                                            llama2/7B_lora_dpo_single_device
                                            llama3_1/8B_lora_dpo
                                            llama3_1/8B_lora_dpo_single_device
    full_dpo_distributed                    llama3_1/8B_full_dpo
    knowledge_distillation_distributed      llama3_2/8B_to_1B_KD_lora_distributed
                                            llama3_2/8B_to_1B_KD_lora_single_device
                                            qwen2/1.5_to_0.5B_KD_lora_distributed
                                            qwen2/1.5_to_0.5B_KD_lora_single_device
                                            qwen3/14B_to_8B_KD_lora_single_device
    generate                                generation
                                            smollm2/135M_generate

    NAME                                    ABOUT
    full_finetune_distributed (recipe)      Full fine-tuning, on any number of ranks: all weights of the model are trained
    lora_dpo_distributed (recipe)           Direct preference optimisation (DPO), on any number of ranks: the better of two answers becomes more likely
    full_dpo_distributed (recipe)           DPO of all weights, on any number of ranks; the reference is a second, frozen model
    knowledge_distillation_distributed (recipe) Knowledge distillation, on any number of ranks: the model learns its data and, token by token, what a larger one would say
    generate (recipe)                       writes a continuation of one prompt
    alpaca (template)                       An instruction, perhaps with an input, and its answer, in Alpaca's words (torchtune's `AlpacaInstructTemplate`)
    grammar (template)                      A sentence to be corrected, as torchtune's `GrammarErrorCorrectionTemplate` words it
    question_answer (template)              A question and the place for its answer, as torchtune's `QuestionAnswerTemplate` words it
    chatml (template)                       ChatML, as torchtune's `ChatMLTemplate` writes it: `<|im_start|>role`, the text, `<|im_end|>`
    llama2_chat (template)                  Llama 2's chat, as torchtune's `Llama2ChatTemplate` writes it: `[INST]` around what the user says
    mistral_chat (template)                 Mistral's chat, as torchtune's `MistralChatTemplate` writes it: `[INST]` around what the user says

    NOT YET                                 CONFIG                                  ROAD
    full_finetune_single_device             llama2/7B_full_low_memory               breadth: optimizers that page or keep 8 bits
                                            code_llama2/7B_full_low_memory
                                            llama3/8B_full_single_device
                                            mistral/7B_full_low_memory
                                            phi3/mini_full_low_memory               breadth: the Phi family
    full_finetune_distributed               llama2/13B_full                         distribution: sharded models
                                            llama3/70B_full
                                            llama3_1/70B_full
                                            gemma/2B_full                           breadth: the Gemma family
                                            gemma/7B_full
                                            phi3/mini_full                          breadth: the Phi family
    lora_finetune_single_device             llama2/7B_qlora_single_device           breadth: a 4-bit base (QLoRA)
                                            code_llama2/7B_qlora_single_device
                                            llama3/8B_qlora_single_device
                                            llama3_1/8B_qlora_single_device
                                            llama2/13B_qlora_single_device
                                            mistral/7B_qlora_single_device
                                            gemma/2B_lora_single_device             breadth: the Gemma family
                                            gemma/2B_qlora_single_device
                                            gemma/7B_lora_single_device
                                            gemma/7B_qlora_single_device
                                            phi3/mini_lora_single_device            breadth: the Phi family
                                            phi3/mini_qlora_single_device
    lora_finetune_distributed               gemma/2B_lora                           breadth: the Gemma family
                                            gemma/7B_lora
                                            phi3/mini_lora                          breadth: the Phi family
                                            llama3_1/405B_qlora                     breadth: a 4-bit base (QLoRA)
    lora_finetune_fsdp2                     llama2/7B_qlora                         breadth: a 4-bit base (QLoRA)
                                            llama2/70B_qlora
    ppo_full_finetune_single_device         mistral/7B_full_ppo_low_memory          breadth: training by rewards
    dev/grpo_full_finetune_distributed      dev/3B_full_grpo                        breadth: training by rewards
    dev/async_grpo_full_finetune_distributed dev/qwen3B_async_grpo                   breadth: training by rewards
    qat_single_device                       qwen2_5/1.5B_qat_single_device          breadth: quantisation-aware training
    qat_distributed                         llama2/7B_qat_full                      breadth: quantisation-aware training
                                            llama3/8B_qat_full
    qat_lora_finetune_distributed           llama3/8B_qat_lora                      breadth: quantisation-aware training
    dev/early_exit_finetune_distributed     llama2/7B_full_early_exit               breadth: early exit
    dev/lora_finetune_distributed_multi_dataset dev/11B_lora_multi_dataset              breadth: images
    dev/generate_v2                         llama3_2_vision/11B_generation_v2       breadth: images
    dev/generate_v2_distributed             llama3/70B_generation_distributed       distribution: sharded models
    eleuther_eval                           eleuther_evaluation                     breadth: evaluation
    quantize                                quantization                            breadth: quantisation
    ");
    let listed = case.host(&["ls", "--json"]);
    let listed: serde_json::Value = serde_json::from_str(listed.strip_prefix("exit 0\n--- stdout\n").unwrap()).unwrap();
    let rows = listed.as_array().unwrap();
    assert_eq!(rows[0]["configs"][0]["name"], "llama2/7B_lora");
    assert!(rows.iter().any(|row| row["recipe"] == "quantize" && row["not_yet"] == "breadth: quantisation"));
    assert_snapshot!(case.host(&["ls", "--json", "generate"]), @r#"
    exit 0
    --- stdout
    [
      {
        "recipe": "generate",
        "about": "writes a continuation of one prompt",
        "aliases": [],
        "path": null,
        "configs": [
          {
            "name": "generation",
            "path": "configs/generation.yaml"
          },
          {
            "name": "smollm2/135M_generate",
            "path": "configs/smollm2/135M_generate.yaml"
          }
        ]
      }
    ]
    "#);
}

#[test]
fn validate_says_well_formed() {
    assert_snapshot!(Case::new().validate(&[]), @"
    exit 0
    --- stdout
    Config is well-formed!
    ");
}

#[test]
fn validate_prints_notices_once() {
    let case = Case::edited(&[("  lr: 3e-4", "  lr: 3e-4\n  fused: True")]);
    assert_snapshot!(case.validate(&["compile=True", "checkpointer.output_dir=model"]), @"
    exit 0
    --- stdout
    Config is well-formed!
    --- stderr
    notice: `optimizer.fused` changes nothing here: the host picks the kernel (c.yaml:20:3)
    notice: `compile` changes nothing here: nothing is compiled at run time: the first step is as fast as the last (command line)
    notice: checkpoints go to `out`: `checkpointer.output_dir` is the model's folder or inside it, which is never written to (command line)
    ");
}

#[test]
fn validate_gives_json() {
    let case = Case::edited(&[("device: cpu", "device: cpu\nepoch: 3")]);
    assert_snapshot!(case.validate(&["--json"]), @r#"
    exit 2
    --- stdout
    {
      "config": "c.yaml",
      "valid": false,
      "plan": null,
      "notices": [],
      "errors": [
        {
          "message": "unknown key `epoch`",
          "locations": [
            {
              "file": "c.yaml",
              "line": 26,
              "column": 1
            }
          ],
          "causes": [],
          "hints": [
            "did you mean `epochs`?"
          ]
        }
      ]
    }
    --- stderr
    error: unknown key `epoch`
      --> c.yaml:26:1
    hint: did you mean `epochs`?
    "#);
    let good = Case::new().validate(&["--json", "seed=3"]);
    let value: serde_json::Value = serde_json::from_str(good.strip_prefix("exit 0\n--- stdout\n").unwrap()).unwrap();
    assert_eq!(value["valid"], true);
    assert_eq!(value["plan"]["train"]["seed"], 3);
}

#[test]
fn overrides_change_the_plan() {
    let overrides =
        ["--json", "optimizer.lr=1e-3", "model.lora_attn_modules=[k_proj]", "~lr_scheduler", "dataset.split=train[:1]"];
    let found = Case::new().validate(&overrides);
    let value: serde_json::Value = serde_json::from_str(found.strip_prefix("exit 0\n--- stdout\n").unwrap()).unwrap();
    let plan = &value["plan"]["train"];
    assert_eq!(plan["optimizer"]["lr"], 1e-3);
    assert_eq!(plan["model"]["lora"]["targets"][0], "k_proj");
    assert_eq!(plan["schedule"], "constant");
    assert_eq!(plan["dataset"][0]["split"], "train[:1]");
    assert_eq!(plan["overrides"][0], "optimizer.lr=1e-3");
}

#[test]
fn run_needs_a_config() {
    assert_snapshot!(Case::new().host(&["run", "lora_distributed"]), @"
    exit 2
    --- stderr
    error: the following required arguments were not provided:
      --config <FILE>

    Usage: host run --config <FILE> <RECIPE> [OVERRIDE]...

    For more information, try '--help'.
    ");
}

#[test]
fn flags_stand_before_or_after_the_recipe() {
    let case = Case::new();
    let after = case.host(&["run", "lora_distributed", "--config", "absent.yaml", "--nproc", "2", "epochs=2"]);
    assert!(after.starts_with("exit 2\n--- stderr\nerror: cannot read the config `absent.yaml`"), "{after}");
    for flag in ["--nproc", "--nproc_per_node", "--nproc-per-node", "--master-port", "--master_port"] {
        assert_eq!(
            case.host(&["run", flag, "2", "lora_finetune_distributed", "--config", "absent.yaml", "epochs=2"]),
            after
        );
    }
}

/// Every flag of torchrun is obeyed, said to change nothing, or refused with a reason.
#[test]
fn torchruns_flags() {
    let case = Case::new();
    let run = |flags: &[&str]| {
        case.host(
            &[&["run"], flags, &["lora_finetune_distributed", "--config", "c.yaml", "output_dir=c.yaml"]].concat(),
        )
    };
    let flags = ["--nnodes", "1", "--rdzv_backend=c10d", "--rdzv-id", "7", "--max_restarts", "0", "--standalone"];
    assert_snapshot!(run(&flags), @"
    exit 2
    --- stderr
    error: the output folder `c.yaml` cannot be made: `c.yaml` is a file
      --> command line
    ");
    assert_snapshot!(run(&["-m", "--numa_binding", "node"]), @"
    exit 2
    --- stderr
    error: `--numa-binding node` cannot be obeyed: workers are not bound to CPUs; `numactl` does it for all of them
    hint: leave it out

    error: `--module` cannot be obeyed: a recipe is a .wasm or .rhai file, not Python
    hint: leave it out
    ");
    // Where there are several machines, each has to know which it is and where they meet.
    assert_snapshot!(run(&["--nnodes", "2", "--node_rank", "1"]), @"
    exit 2
    --- stderr
    error: `--nnodes 2` needs to know where the machines meet
    hint: `--rdzv-endpoint HOST:PORT`: a name or address of node 0 and a free port there
    ");
    assert_snapshot!(run(&["--nnodes", "2", "--rdzv_endpoint", "node0"]), @"
    exit 2
    --- stderr
    error: `--nnodes 2` needs to know which of them this is
    hint: `--node-rank`, from 0 at the rendezvous endpoint to 1
    ");
    assert_snapshot!(run(&["--nnodes", "2", "--rdzv_endpoint", "node0:port", "--node-rank=0"]), @"
    exit 2
    --- stderr
    error: `--rdzv-endpoint node0:port` is not HOST or HOST:PORT
    hint: `localhost:29500`
    ");
    assert_snapshot!(run(&["--nnodes", "2:2", "--master_addr", "node0", "--node-rank=2"]), @"
    exit 2
    --- stderr
    error: there is no node 2 of `--nnodes 2`
    hint: `--node-rank` counts from 0 to 1
    ");
    assert_snapshot!(run(&["--node-rank=1"]), @"
    exit 2
    --- stderr
    error: `--node-rank 1` of one machine
    hint: `--nnodes` says how many there are
    ");
    assert_snapshot!(run(&["--nnodes", "1:4"]), @"
    exit 2
    --- stderr
    error: invalid value '1:4' for '--nnodes <N>': a run does not grow or shrink: give one number

    For more information, try '--help'.
    ");
    assert_snapshot!(run(&["--rdzv-backend", "etcd"]), @"
    exit 2
    --- stderr
    error: `--rdzv-backend etcd` cannot be obeyed: machines meet at node 0, and need no server besides
    hint: leave it out
    ");
    assert_snapshot!(run(&["--rdzv-conf", "timeout=soon"]), @"
    exit 2
    --- stderr
    error: `--rdzv-conf timeout=soon` has no seconds
    hint: `--rdzv-conf timeout=300`
    ");
    assert_snapshot!(run(&["--rdzv-timeout", "0"]), @"
    exit 2
    --- stderr
    error: invalid value '0' for '--rdzv-timeout <SECONDS>': 0 is not in 1..=86400

    For more information, try '--help'.
    ");
    assert_snapshot!(run(&["--tee", "3"]), @"
    exit 2
    --- stderr
    error: the following required arguments were not provided:
      --log-dir <DIR>

    Usage: host run --config <FILE> --log-dir <DIR> --tee <STREAMS> <RECIPE> <OVERRIDE>...

    For more information, try '--help'.
    ");
    assert_snapshot!(run(&["--log-dir", "logs", "--redirects", "7"]), @"
    exit 2
    --- stderr
    error: invalid value '7' for '--redirects <STREAMS>': 0 to 3 is needed (1 stdout, 2 stderr, 3 both), or `RANK:STREAMS,…`

    For more information, try '--help'.
    ");
    let torchrun = [
        "nnodes",
        "nproc-per-node",
        "rdzv-backend",
        "rdzv-endpoint",
        "rdzv-id",
        "rdzv-conf",
        "standalone",
        "max-restarts",
        "monitor-interval",
        "start-method",
        "event-log-handler",
        "role",
        "module",
        "no-python",
        "run-path",
        "log-dir",
        "redirects",
        "tee",
        "local-ranks-filter",
        "duplicate-stdout-filters",
        "duplicate-stderr-filters",
        "node-rank",
        "master-addr",
        "master-port",
        "local-addr",
        "logs-specs",
        "numa-binding",
        "signals-to-handle",
        "virtual-local-rank",
        // Ours alone.
        "rdzv-timeout",
    ];
    for flag in torchrun {
        let both = [format!("--{flag}"), format!("--{}", flag.replace('-', "_"))];
        for flag in &both {
            let answer = case.host(&["run", flag]);
            assert!(!answer.contains("unexpected argument"), "{flag}: {answer}");
        }
    }
}

#[test]
fn no_process_is_not_a_number_of_processes() {
    assert_snapshot!(Case::new().host(&["run", "lora_distributed", "--nproc", "0", "--config", "c.yaml"]), @"
    exit 2
    --- stderr
    error: invalid value '0' for '--nproc <N>': a number from 1 to 1024, `auto`, `cpu` or `gpu` is needed

    For more information, try '--help'.
    ");
}

#[test]
fn generate_runs_in_one_process() {
    let case = Case::with(GENERATE);
    assert_snapshot!(case.validate(&[]), @"
    exit 0
    --- stdout
    Config is well-formed!
    ");
    assert_snapshot!(case.host(&["run", "generate", "--nproc", "2", "--config", "c.yaml"]), @"
    exit 2
    --- stderr
    error: `generate` runs in one process, and 2 were asked for
    hint: leave `--nproc` and `--nnodes` out
    ");
}

#[test]
fn a_config_of_the_wrong_kind() {
    let case = Case::new();
    assert_snapshot!(case.host(&["run", "generate", "--config", "c.yaml"]), @"
    exit 2
    --- stderr
    error: this config is for training
      --> c.yaml
    hint: `generate` needs a `prompt`, see `smollm2/135M_generate`
    ");
    case.write("g.yaml", "prompt: hello\n");
    assert_snapshot!(case.host(&["run", "lora_distributed", "--config", "g.yaml"]), @"
    exit 2
    --- stderr
    error: this config is for `generate`
      --> g.yaml
    hint: `host run generate --config …`
    ");
}

#[test]
fn import_needs_a_model_and_a_folder() {
    assert_snapshot!(Case::new().host(&["import", "absent.gguf", "--output-dir", "new"]), @"
    exit 2
    --- stderr
    error: cannot open the model file `absent.gguf`
    cause: No such file or directory (os error 2)
    ");
    assert_snapshot!(Case::new().host(&["import", "absent.gguf"]), @"
    exit 2
    --- stderr
    error: the following required arguments were not provided:
      --output-dir <FOLDER>

    Usage: host import --output-dir <FOLDER> <INPUT>

    For more information, try '--help'.
    ");
}

/// A GGUF header and one tensor of type `kind`, with nothing behind it.
fn gguf(kind: u32) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let mut file = b"GGUF".to_vec();
    file.extend(3u32.to_le_bytes());
    file.extend(1u64.to_le_bytes()); // tensors
    file.extend(1u64.to_le_bytes()); // keys
    file.extend([text("general.architecture"), 8u32.to_le_bytes().to_vec(), text("llama")].concat());
    file.extend(text("token_embd.weight"));
    file.extend(2u32.to_le_bytes());
    file.extend([256u64, 4].map(u64::to_le_bytes).concat());
    file.extend(kind.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file
}

#[test]
fn a_gguf_that_is_cut_short_or_of_an_unread_kind_leaves_nothing() {
    let case = Case::new();
    const F16: u32 = 1;
    const IQ2_XXS: u32 = 16;
    case.write("cut.gguf", &gguf(F16)[..40]);
    case.write("short.gguf", gguf(F16));
    case.write("kind.gguf", gguf(IQ2_XXS));
    case.write("foreign.gguf", "PK\u{3}\u{4} not a model at all");
    assert_snapshot!(case.host(&["import", "cut.gguf", "--output-dir", "new"]), @"
    exit 2
    --- stderr
    error: `cut.gguf` is damaged or cut short
    cause: it declares 1 tensors, with 16 bytes left
    hint: get the file again and compare its size and checksum with the source's
    ");
    assert_snapshot!(case.host(&["import", "short.gguf", "--output-dir", "new"]), @"
    exit 2
    --- stderr
    error: `short.gguf` is damaged or cut short
    cause: tensor `token_embd.weight` ends at byte 2176, the file has 126 bytes
    hint: get the file again and compare its size and checksum with the source's
    ");
    assert_snapshot!(case.host(&["import", "kind.gguf", "--output-dir", "new"]), @"
    exit 2
    --- stderr
    error: tensor `token_embd.weight` of `kind.gguf` is quantised as IQ2_XXS
    cause: these are read: F32, F16, BF16, Q8_0, Q4_1, Q4_0
    hint: take a Q8_0, Q4_1, F16 or BF16 file of the same model, or requantise with `llama-quantize --allow-requantize`
    ");
    assert_snapshot!(case.host(&["import", "foreign.gguf", "--output-dir", "new"]), @"
    exit 2
    --- stderr
    error: `foreign.gguf` is not a GGUF file: it has 23 bytes
    hint: `host import` reads llama.cpp's `.gguf` files; a Hugging Face folder needs no import
    ");
    assert!(!case.path().join("new").exists());
}

#[test]
fn cp_copies_scripts_and_configs() {
    let case = Case::new();
    let copied = |name: &str| std::fs::read_to_string(case.path().join(name)).unwrap();
    let shipped =
        |name: &str| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(name)).unwrap();
    assert_eq!(
        case.host(&["cp", "lora_finetune_distributed", "mine.py"]),
        "exit 0\n--- stdout\nCopied file to mine.rhai"
    );
    assert_eq!(copied("mine.rhai"), shipped("scripts/recipes/lora_distributed.rhai"));
    assert_eq!(
        case.host(&["cp", "smollm2/135M_lora_summarize", "a/b/mine", "--make-parents"]),
        "exit 0\n--- stdout\nCopied file to a/b/mine.yaml"
    );
    assert_eq!(copied("a/b/mine.yaml"), shipped("configs/smollm2/135M_lora_summarize.yaml"));
    assert_eq!(case.host(&["cp", "SummarizeTemplate", "a"]), "exit 0\n--- stdout\nCopied file to a/summarize.rhai");

    case.write("mine.rhai", "changed");
    let again = case.host(&["cp", "-n", "lora_distributed", "mine.rhai"]);
    assert!(again.starts_with("exit 0\n--- stdout\nFile already exists at /"), "{again}");
    assert!(again.ends_with("/mine.rhai, not overwriting."), "{again}");
    assert_eq!(copied("mine.rhai"), "changed");

    assert_snapshot!(case.host(&["cp", "lora_distributed", "x/y/z"]), @"
    exit 2
    --- stderr
    error: the folder `x/y` is not there
    hint: `--make-parents` creates it
    ");
    assert_snapshot!(case.host(&["cp", "lora_distribted", "x"]), @"
    exit 2
    --- stderr
    error: there is no recipe, config or template `lora_distribted`
    hint: did you mean `lora_distributed`?
    ");
}

#[test]
fn cat_prints_what_is_read() {
    let case = Case::with("b: ${a.x}\na: {x: 1, y: None}\n");
    assert_snapshot!(case.host(&["cat", "c.yaml"]), @"
    exit 0
    --- stdout
    b: ${a.x}
    a:
      x: 1
      y: null
    ");
    assert_snapshot!(case.host(&["cat", "c.yaml", "--sort", "--resolved", "a.x=7"]), @"
    exit 0
    --- stdout
    a:
      x: 7
      y: null
    b: 7
    ");
    assert_snapshot!(case.host(&["cat", "c.yaml", "--resolved", "a={}"]), @"
    exit 2
    --- stderr
    error: `${a.x}` names a key that is not in the config
      --> c.yaml:1:4
    ");
    assert_snapshot!(case.host(&["cat", "lora_distributed"]), @"
    exit 0
    --- stdout
    'lora_distributed' is a recipe, not a config. `host cp lora_distributed lora_distributed.rhai` copies its script, `host ls lora_distributed` lists its configs.
    ");
    assert_snapshot!(case.host(&["cat", "c.txt"]), @"
    exit 2
    --- stderr
    error: `c.txt` is neither a .yaml file nor a config's name
    hint: `host ls` lists the names
    ");
}

/// What is not built yet is told by name, with the road it is on.
#[test]
fn what_is_not_there_yet_says_so() {
    let case = Case::new();
    assert_snapshot!(case.host(&["run", "qat_distributed", "--config", "llama2/13B_full"]), @"
    exit 2
    --- stderr
    error: the recipe `qat_distributed` of torchtune is not there yet
    cause: on the road: breadth: quantisation-aware training
    hint: `host ls` lists what is there

    error: the config `llama2/13B_full` of torchtune is not there yet
    cause: on the road: distribution: sharded models
    hint: `host ls` lists what is there
    ");
    assert_snapshot!(case.host(&["cp", "llama2/7B_qlora_single_device", "my.yaml"]), @"
    exit 2
    --- stderr
    error: the recipe or config `llama2/7B_qlora_single_device` of torchtune is not there yet
    cause: on the road: breadth: a 4-bit base (QLoRA)
    hint: `host ls` lists what is there
    ");
    assert_snapshot!(case.host(&["cat", "gemma/2B_lora"]), @"
    exit 2
    --- stderr
    error: the config `gemma/2B_lora` of torchtune is not there yet
    cause: on the road: breadth: the Gemma family
    hint: `host ls` lists what is there
    ");
    assert_snapshot!(case.host(&["validate", "eleuther_evaluation"]), @"
    exit 2
    --- stderr
    error: the config `eleuther_evaluation` of torchtune is not there yet
    cause: on the road: breadth: evaluation
    hint: `host ls` lists what is there
    ");
    assert_snapshot!(case.host(&["ls", "full_finetune_distributed"]), @"
    exit 0
    --- stdout
    RECIPE                                  CONFIG
    full_finetune_distributed               llama2/7B_full
                                            llama3/8B_full
                                            llama3_1/8B_full
                                            llama3_1/8B_full_single_device
                                            llama3_2/1B_full
                                            llama3_2/1B_full_single_device
                                            llama3_2/3B_full
                                            llama3_2/3B_full_single_device
                                            mistral/7B_full
                                            qwen2/0.5B_full
                                            qwen2/0.5B_full_single_device
                                            qwen2/1.5B_full
                                            qwen2/1.5B_full_single_device
                                            qwen2/7B_full
                                            qwen2/7B_full_single_device
                                            qwen2_5/0.5B_full
                                            qwen2_5/0.5B_full_single_device
                                            qwen2_5/1.5B_full
                                            qwen2_5/1.5B_full_single_device
                                            qwen2_5/3B_full
                                            qwen2_5/3B_full_single_device
                                            qwen2_5/7B_full
                                            qwen2_5/7B_full_single_device
                                            qwen3/0.6B_full
                                            qwen3/0.6B_full_single_device
                                            qwen3/1.7B_full
                                            qwen3/1.7B_full_single_device
                                            qwen3/4B_full
                                            qwen3/4B_full_single_device
                                            qwen3/8B_full
                                            qwen3/8B_full_single_device
                                            smollm2/135M_full_summarize

    NAME                                    ABOUT
    full_finetune_distributed (recipe)      Full fine-tuning, on any number of ranks: all weights of the model are trained

    NOT YET                                 CONFIG                                  ROAD
    full_finetune_distributed               llama2/13B_full                         distribution: sharded models
                                            llama3/70B_full
                                            llama3_1/70B_full
                                            gemma/2B_full                           breadth: the Gemma family
                                            gemma/7B_full
                                            phi3/mini_full                          breadth: the Phi family
    ");
}

#[test]
fn the_page_of_keys_is_current() {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/REFERENCE.md")).unwrap();
    let printed = Case::new().host(&["keys"]);
    assert_eq!(printed.strip_prefix("exit 0\n--- stdout\n").unwrap().trim_end(), page.trim_end());
}

#[test]
fn keys_are_told_by_name() {
    let case = Case::new();
    assert_snapshot!(case.host(&["keys", "torch.optim.AdamW"]), @"
    exit 0
    --- stdout
    ## `AdamW`, an optimizer

    Adam with decoupled weight decay.

    Also `adamw`, `torch.optim.AdamW`.

    | key | value | default | |
    | --- | --- | --- | --- |
    | `lr` | a number, at least 0 | `1e-3` | Learning rate, before the schedule. |
    | `betas` | a value | `[0.9, 0.999]` | Decay of the two moments. |
    | `eps` | a number, at least 0 | `1e-8` | Keeps the division finite. |
    | `weight_decay` | a number, at least 0 | `0.01` | Decoupled weight decay. |
    | `fp32_master_weights` | `True` or `False` | `False` | Update fp32 copies of bf16 weights, with fp32 moments: nothing is lost, for 8 to 12 bytes a weight more. |
    | `bf16_stochastic_round` | `True` or `False` | `False` | Round updates of bf16 weights up or down at random: small ones count on average, with fp32 moments. |
    | `fused` | `True` or `False` | `null` | One kernel for all weights. Changes nothing: the host picks the kernel. |
    | `foreach` | `True` or `False` | `null` | One call for many weights. Changes nothing: the host picks the kernel. |
    | `capturable` | `True` or `False` | `False` | For CUDA graphs. Changes nothing: the host picks the kernel. |
    | `amsgrad` | `True` or `False` | `False` | Largest second moment. Only `False`: not available yet. |
    | `maximize` | `True` or `False` | `False` | Climb instead. Only `False`: a loss is made small. |
    | `differentiable` | `True` or `False` | `False` | Gradients through the update. Only `False`: updates have no gradient. |
    ");
    assert_snapshot!(case.host(&["keys", "epochs"]), @"
    exit 0
    --- stdout
    ## Training

    Top-level keys of a config for a recipe.

    | key | value | default | |
    | --- | --- | --- | --- |
    | `epochs` | a whole number, at least 1 | `1` | How often the data is seen. |
    ");
    assert_snapshot!(case.host(&["keys", "epoch"]), @"
    exit 2
    --- stderr
    error: there is no component and no key `epoch`
    hint: did you mean `epochs`?
    ");
    assert_snapshot!(case.host(&["keys", "WandBLogger"]), @"
    exit 0
    --- stdout
    ## `WandBLogger`, a metric logger

    Refused: W&B is reached by its own client alone; `wandb sync FOLDER` uploads what `TensorBoardLogger` writes.

    Also `torchtune.training.metric_logging.WandBLogger`, `torchtune.utils.metric_logging.WandBLogger`.
    ");
}

#[test]
fn shells_complete_it() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = Case::new().host(&["completions", shell]);
        assert!(script.starts_with("exit 0") && script.contains("nproc") && script.contains("doctor"), "{script}");
    }
}

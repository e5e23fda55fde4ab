//! `host plan`: what a run would take, and whether it fits.

use insta::assert_snapshot;
use serde_json::Value;

use super::Case;

const SEED: &str = include_str!("../fixtures/seed/my_llama3_1_custom_config.yaml");
const MI210: &str = include_str!("../../configs/hardware/mi210x8.yaml");
const H100: &str = include_str!("../../configs/hardware/h100x8.yaml");

/// Llama 3.1 8B.
const LLAMA_8B: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rms_norm_eps": 1e-5,
"rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": false, "hidden_act": "silu"}"#;

/// The reference job, its model's `config.json`, and the shipped hardware.
fn reference_job() -> Case {
    let case = Case::with(SEED);
    case.write("8b/config.json", LLAMA_8B);
    case.write("configs/hardware/mi210x8.yaml", MI210);
    case.write("configs/hardware/h100x8.yaml", H100);
    case
}

const PLAN: [&str; 4] = ["plan", "--config", "c.yaml", "checkpointer.checkpoint_dir=8b"];

fn plan(case: &Case, arguments: &[&str]) -> String {
    case.host(&[&PLAN, arguments].concat())
}

fn json(case: &Case, arguments: &[&str]) -> Value {
    let out = plan(case, &[&["--json"], arguments].concat());
    let stdout = out.split("--- stdout\n").nth(1).unwrap_or_else(|| panic!("{out}"));
    serde_json::from_str(stdout.split("\n--- stderr").next().unwrap()).unwrap()
}

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {value}"))
}

/// The wall times that were published for torchtune on this machine: one epoch on 2, 4, 6 and 8 GPUs, ten on 8.
#[test]
fn published_times_of_torchtune_are_reproduced() {
    let case = reference_job();
    let runs = [("2", "1", 1216.0), ("4", "1", 792.0), ("6", "1", 662.0), ("8", "1", 527.0), ("8", "10", 4844.0)];
    for (ranks, epochs, published) in runs {
        let epochs = format!("epochs={epochs}");
        let plan = json(&case, &["--hardware", "mi210x8", "--as", "torchtune", "--nproc", ranks, &epochs]);
        let theirs = number(&plan, "/other/cost/run/seconds");
        let ours = number(&plan, "/chosen/cost/run/seconds");
        println!("{ranks} GPUs, {epochs}: {theirs:.0} s, published {published} s; host {ours:.0} s");
        assert!((theirs / published - 1.0).abs() < 0.15, "{ranks} GPUs, {epochs}: {theirs} s");
        assert_eq!(plan["chosen"]["placement"]["is_sharded"], false, "a frozen base that fits is replicated");
        assert!(ours < theirs / 3.0, "{ours} s");
    }
    // 32 micro-batches gather the blocks twice and the rest once, 7/8 of it from others; an adapter is summed once.
    let plan = json(&case, &["--hardware", "mi210x8", "--as", "torchtune"]);
    let (blocks, around) = (32.0 * 218_112_000.0 * 2.0, (2.0 * 128_256.0 * 4096.0 + 4096.0) * 2.0);
    let gathered = 32.0 * 7.0 / 8.0 * (2.0 * blocks + around);
    assert!((number(&plan, "/other/cost/bytes_received") / gathered - 1.0).abs() < 0.01);
    let adapter = 32.0 * 8.0 * (2.0 * 4096.0 + 4096.0 + 1024.0);
    assert_eq!(number(&plan, "/trained"), adapter);
    assert_eq!(number(&plan, "/chosen/cost/bytes_received"), 2.0 * 7.0 / 8.0 * 4.0 * adapter);
}

#[test]
fn the_table_compares_placements() {
    let case = reference_job();
    assert_snapshot!(plan(&case, &["--hardware", "mi210x8", "--as", "torchtune", "tokenizer.path=x"]), @"
    exit 0
    --- stdout
    model:    LlamaForCausalLM, 8.03 G parameters, 3.4 M trained, bf16
    hardware: 8x MI210; 8 ranks, 64.0 GB for each
    rates:    69 TFLOP/s a device, 9.7 GB/s between ranks, 0.3 GB/s to the disk
    data:     rows: 2000; 500 tokens a sample, 5 % of them labels (assumed: set `--tokens-per-sample` and `--label-share`)
              largest micro-batch: 4000 tokens, 200 labels

    memory of a rank, GB               replicate         shard
      weights                               16.1          2.02
      gradients                            0.014         0.014
      optimizer                            0.027         0.027
      copy for a checkpoint           host 0.041    host 0.041
      activations                           12.9          12.9
      in computation                       0.442         0.442
      allocator                             1.33          1.33
      reduce and update                  (0.027)       (0.027)
      write a checkpoint               host 4.20     host 4.20
      the GPU's own                        0.600         0.600
      gathered blocks                          -          2.97
      at most                               31.3          20.3
      of the machine's                      4.24          4.24
      (parts in brackets are there when less is taken in all)

    a step                             replicate         shard     torchtune
      computing, s                          13.2          13.2          20.1
      received by a rank, GB               0.024           210           841
      communicating, s                     0.002          21.7          86.7
      of that while computing, s               0          13.2             0
      seconds                               13.2          21.7           107
      real tokens a second                 19364         11816          2398
    start, s                                53.5          53.5          53.5
    a checkpoint, s                         53.6          53.6          53.6
    steps an epoch                             3             3             3
    an epoch with its checkpoints           93 s         119 s       7.8 min
    start to end                        16.4 min      20.7 min      79.3 min

    replicate: the fastest that fits
    --- stderr
    notice: `checkpointer.model_type` changes nothing here: the family comes from the checkpoint's config.json (c.yaml:24:3)
    notice: `dataset.trust_remote_code` changes nothing here: no code of a data set is ever run (c.yaml:37:3)
    ");
}

/// All weights of 8B fit no MI210, and fit eight of them.
#[test]
fn what_does_not_fit_whole_is_sharded() {
    let case = reference_job();
    let full = [
        "model=llama3_1_8b",
        "~model.lora_attn_modules",
        "~model.apply_lora_to_mlp",
        "~model.apply_lora_to_output",
        "~model.lora_rank",
        "~model.lora_alpha",
        "parallel=auto",
    ];
    let eight = json(&case, &[&["--hardware", "mi210x8"], &full[..]].concat());
    assert_eq!(eight["chosen"]["placement"]["is_sharded"], true);
    assert_eq!(eight["candidates"][0]["fits"], false);
    assert_eq!(eight["chosen"]["fits"], true);
    // The weights, their gradients and both moments.
    assert!(number(&eight, "/candidates/0/need_bytes") > 4.0 * 16.06e9);
    assert_snapshot!(plan(&case, &[&["--hardware", "mi210x8", "--nproc", "1", "--json"], &full[..]].concat()).split("--- stderr").nth(1).unwrap(), @"
    notice: `checkpointer.model_type` changes nothing here: the family comes from the checkpoint's config.json (c.yaml:24:3)
    notice: `dataset.trust_remote_code` changes nothing here: no code of a data set is ever run (c.yaml:37:3)
    error: the run needs about 86.4 GB (replicate) and has 64.0 GB: 22.4 GB too much
    cause: most of it: optimizer 32.1 GB, activations 17.5 GB, weights 16.1 GB
    hint: `fsdp_cpu_offload=True` would fit, and take longer
    hint: `parallel=shard` over 2 such ranks would fit
    ");
    assert_snapshot!(plan(&case, &[&["--hardware", "mi210x8", "--nproc", "2", "--json", "parallel=replicate"], &full[..6]].concat()).split("--- stderr").nth(1).unwrap(), @"
    notice: `checkpointer.model_type` changes nothing here: the family comes from the checkpoint's config.json (c.yaml:24:3)
    notice: `dataset.trust_remote_code` changes nothing here: no code of a data set is ever run (c.yaml:37:3)
    error: each of 2 ranks needs about 86.4 GB (replicate) and has 64.0 GB: 22.4 GB too much
    cause: most of it: optimizer 32.1 GB, activations 17.5 GB, weights 16.1 GB
    hint: `parallel=shard fsdp_reshard_after_forward=True` would fit
    hint: `fsdp_cpu_offload=True` would fit, and take longer
    hint: `parallel=shard` over 4 such ranks would fit
    ");
}

#[test]
fn a_plan_on_this_machine_says_what_it_assumes() {
    let case = Case::new();
    let table = case.host(&["plan", "--config", "c.yaml", "--nproc", "2"]);
    assert!(table.contains("hardware: this machine, ") && table.contains("2 ranks, "), "{table}");
    assert!(table.contains("64 tokens a sample, 5 % of them labels (assumed: set "), "{table}");
    assert!(table.contains("replicate: the fastest that fits"), "{table}");
    assert_snapshot!(case.host(&["plan", "--config", "c.yaml", "device=cuda"]), @"
    exit 2
    --- stderr
    error: `device: cuda`, and this machine has no GPU
    hint: describe it in a file: `--hardware FILE`, or take one that is shipped, such as `--hardware h100x8`
    ");
}

#[test]
fn mistakes_in_a_description_of_hardware_have_their_line() {
    let case = Case::new();
    case.write("configs/hardware/mi210x8.yaml", MI210);
    let with = |text: &str| {
        case.write("mine.yaml", text);
        case.host(&["plan", "--config", "c.yaml", "device=cuda", "--hardware", "mine.yaml"])
    };
    assert_snapshot!(with("name: mine\ndevices_per_node: 4\nmemory: 24\ntflops: fast\nlink_gb_s: 0\n"), @"
    exit 2
    --- stderr
    error: the key `memory_gb` is missing
      --> mine.yaml:1:1
    hint: `memory_gb` is a number, at least 0.001: memory of a device, in GB (10^9 bytes); of the machine where that is the device

    error: unknown key `memory`
      --> mine.yaml:3:1
    hint: keys of the config: name, device, devices_per_node, memory_gb, host_memory_gb, tflops, link_gb_s, node_link_gb_s, disk_gb_s

    error: `tflops` must be a number, at least 0.001, found the text `fast`
      --> mine.yaml:4:9

    error: `link_gb_s` must be a number, at least 0.001, found the number `0`
      --> mine.yaml:5:12
    ");
    assert_snapshot!(with("name: mine\ndevice: cpu\ndevices_per_node: 1\nmemory_gb: 24\ntflops: 1\nlink_gb_s: 1\n"), @"
    exit 2
    --- stderr
    error: `mine` has devices of the kind `cpu`, and the config says `device: cuda`
      --> mine.yaml
    hint: plan with `device=cpu`
    ");
    assert_snapshot!(case.host(&["plan", "--config", "c.yaml", "device=cuda", "--hardware", "mi300x8"]), @"
    exit 2
    --- stderr
    error: there is no hardware `mi300x8`
    hint: give the path of a file, or one of `h100x8`, `mi210x8`
    ");
    assert_snapshot!(case.host(&["plan", "--config", "c.yaml", "device=cuda", "--hardware", "mi210x8", "--nproc", "9"]), @"
    exit 2
    --- stderr
    error: 9 ranks a machine, and `8x MI210` has 8 devices
    ");
    assert_snapshot!(case.host(&["plan", "--config", "c.yaml", "data_parallel_shard_dim=4", "--nproc", "2"]), @"
    exit 2
    --- stderr
    error: `data_parallel_shard_dim` is 4, `data_parallel_replicate_dim` 1, and there are 2 ranks
    hint: `data_parallel_replicate_dim` × `data_parallel_shard_dim` has to be the number of ranks; the latter as -1 is what is left
    ");
}

#[test]
fn its_help_teaches() {
    assert_snapshot!(Case::new().host(&["plan", "--help"]), @"
    exit 0
    --- stdout
    Says how much memory and time a run would take, without starting it

    Usage: host plan [OPTIONS] --config <FILE> [OVERRIDE]...

    Arguments:
      [OVERRIDE]...
              Changes to the config: `key=value`, `~key`

    Options:
          --config <FILE>
              The config's file, or a name that `host ls` lists

          --hardware <FILE>
              Machines to plan for: a file, or a name in configs/hardware; by default this one

          --nproc <COUNT>
              Ranks of each machine; by default one for each device of `--hardware`, else one

          --nnodes <COUNT>
              Machines
              
              [default: 1]

          --tokens-per-sample <COUNT>
              Tokens of a sample, on average

          --label-share <SHARE>
              The share of them that carries loss

          --rows <COUNT>
              Rows of the data set, where neither `split` nor its files say

          --as <WAY>
              Also how long another program would take

              Possible values:
              - torchtune: 0.2.1, on several devices

          --json
              Print JSON

      -h, --help
              Print help (see a summary with '-h')

    Examples:
      host plan --config my.yaml                          on this machine, one rank
      host plan --config my.yaml --nproc 2 parallel=shard
      host plan --config llama3_1/8B_lora --hardware mi210x8 --rows 2000
      host plan --config llama3_1/8B_full --hardware h100x8 --nnodes 2 ac_mode=full
      host plan --config my.yaml --hardware my_cluster.yaml --json | jq .chosen

    Of the model only config.json has to be there. `host keys` describes the files of --hardware.
    Memory is what the busiest moment takes, good to 20 % on a CPU. Seconds come from a rate and a
    bandwidth: good enough to compare, and to tell hours from days. Validation is not counted.
    ");
}

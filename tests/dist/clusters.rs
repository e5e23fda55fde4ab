//! The commands of `examples/multinode`, `slurm` and `docker`, on network namespaces in place of machines.

use std::os::unix::fs::PermissionsExt;

use host_ffi::dist::Store;
use insta::assert_snapshot;

use crate::case::{Case, Ended, Running, STEPS, WASM, free_port, root};
use crate::nodes::with_nodes;

/// The commands of a page, which stand four columns in.
fn commands(page: &str) -> Vec<String> {
    let text = std::fs::read_to_string(root().join(page)).unwrap();
    let lines = text.lines().filter_map(|line| line.strip_prefix("    ")).collect::<Vec<_>>().join("\n");
    lines.replace("\\\n", " ").lines().map(str::to_owned).collect()
}

fn program(case: &Case, name: &str, text: &str) {
    case.write(&format!("bin/{name}"), text);
    std::fs::set_permissions(case.path(&format!("bin/{name}")), std::fs::Permissions::from_mode(0o755)).unwrap();
}

/// Runs `script` on two machines, with `host` on the path, and holds its losses against those of one process. Four ranks
/// with the config's 4 micro-batches each make steps of 32 samples.
#[track_caller]
fn trains_as_one_process(case: &Case, script: &str) {
    let script = script.replace("node0", "10.77.0.1");
    let script = format!("PATH=\"$PWD/bin:${{HOST%/*}}:$PATH\"\n{script}");
    let Some(mut nodes) = with_nodes(case, 2, &script) else { return };
    let ended = Ended::of(&mut nodes);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let (four, one) = (case.log("out"), case.losses(WASM, "one", &["gradient_accumulation_steps=16"]));
    assert_eq!((four.len(), one.len()), (2, 2), "{}", ended.stderr);
    for (four, one) in four.iter().zip(&one) {
        assert!(((four - one) / one).abs() < 1e-6, "{four} is not {one}");
    }
    assert!(case.checkpoints("out").contains(&"epoch_0".to_owned()));
}

/// The commands of both machines beside each other; both have to end well.
fn on_both(commands: &[String]) -> String {
    let [first, second] = commands else { panic!("not two commands: {commands:?}") };
    format!("node 1 {second} & other=$!; node 0 {first}; wait $other")
}

/// Those of `examples/multinode` that start with this program.
fn by(program: &str) -> String {
    let mut commands = commands("examples/multinode/README.md");
    commands.retain(|command| command.starts_with(program));
    on_both(&commands)
}

#[test]
fn by_hand() {
    trains_as_one_process(&Case::new(), &by("host "));
}

/// With torchrun itself where `cargo xtask bench` has fetched it, else with a shell script that sets what it sets.
#[test]
fn under_torchrun() {
    const STAND_IN: &str = r#"#!/bin/sh
while :; do
    case $1 in
    --no-python) shift ;;
    --nproc-per-node) nproc=$2; shift 2 ;;
    --nnodes) nnodes=$2; shift 2 ;;
    --node-rank) node=$2; shift 2 ;;
    --master-addr) export MASTER_ADDR=$2; shift 2 ;;
    --master-port) export MASTER_PORT=$2; shift 2 ;;
    *) break ;;
    esac
done
export WORLD_SIZE=$((nnodes * nproc)) LOCAL_WORLD_SIZE=$nproc TORCHELASTIC_RUN_ID=none TORCHELASTIC_RESTART_COUNT=0
LOCAL_RANK=0
while [ $LOCAL_RANK -lt $nproc ]; do
    LOCAL_RANK=$LOCAL_RANK RANK=$((node * nproc + LOCAL_RANK)) "$@" &
    LOCAL_RANK=$((LOCAL_RANK + 1))
    all="$all $!"
done
for rank in $all; do wait $rank || exit 1; done
"#;
    let case = Case::new();
    let torchrun = root().join("target/peers/bin/torchrun");
    if torchrun.exists() {
        program(&case, "torchrun", &format!("#!/bin/sh\nexec '{}' \"$@\"\n", torchrun.display()));
    } else {
        println!("without torchrun itself: `cargo xtask bench` fetches it");
        program(&case, "torchrun", STAND_IN);
    }
    trains_as_one_process(&case, &by("torchrun "));
}

/// torchrun keeps the store itself, over restarts: ranks of the second attempt must not find what the first has left there.
#[test]
fn ranks_join_the_store_of_whoever_started_them() {
    let case = Case::new();
    let store = Store::serve("127.0.0.1", 0, 2, std::time::Duration::from_secs(60)).unwrap();
    for attempt in ["0", "1"] {
        let output_dir = format!("output_dir=out{attempt}");
        let ranks = [0, 1].map(|rank| {
            let mut command = case.join(rank, store.port(), &[&output_dir]);
            command.env("TORCHELASTIC_USE_AGENT_STORE", "True").env("TORCHELASTIC_RESTART_COUNT", attempt);
            Running::start(&mut command)
        });
        for ended in ranks.map(Running::wait) {
            assert_eq!(ended.code, 0, "{}", ended.stderr);
        }
        assert_eq!(case.log(&format!("out{attempt}")).len(), STEPS);
    }
}

#[test]
fn under_slurm() {
    let case = Case::new();
    program(
        &case,
        "scontrol",
        "#!/bin/sh\n[ \"$*\" = 'show hostnames 10.77.0.[1-2]' ] && printf '10.77.0.1\\n10.77.0.2\\n'\n",
    );
    program(
        &case,
        "srun",
        r#"#!/bin/sh
[ "$1" = --kill-on-bad-exit=1 ] && shift
SLURM_NODEID=1 nsenter -t $pid1 -n "$@" &
SLURM_NODEID=0 nsenter -t $pid0 -n "$@" && wait $!
"#,
    );
    let [command] = &commands("examples/slurm/README.md")[..] else { panic!("not one command") };
    // What `sbatch` would do with it, but for the job's size.
    let (_, batch) = command.split_once("examples/").unwrap();
    trains_as_one_process(
        &case,
        &format!(
            "export SLURM_JOB_NODELIST='10.77.0.[1-2]' SLURM_NNODES=2 SLURM_JOB_ID=7 SLURM_GPUS_ON_NODE=2
             bash examples/{batch}"
        ),
    );
}

#[test]
fn in_containers() {
    let read = |name: &str| std::fs::read_to_string(root().join(name)).unwrap();
    let compose: serde_yaml::Value = serde_yaml::from_str(&read("examples/docker/compose.yaml")).unwrap();
    let build = &compose["x-host"]["build"];
    assert_eq!(build["context"], "../..");
    let dockerfile = read(build["dockerfile"].as_str().unwrap());
    let after = |text: &str, word: &str| text.split_once(word).unwrap().1.split_whitespace().next().unwrap().to_owned();
    let rust = after(&read("Cargo.toml"), "rust-version = ").replace('"', "");
    assert_eq!(after(&dockerfile, "--default-toolchain "), rust);
    assert!(root().join("host/xtask/src/build.rs").exists() && dockerfile.contains("cargo xtask build"));
    // The ignored folders are those that git ignores: nothing that is committed is kept from the image.
    let ignored = read(".gitignore");
    for line in read("examples/docker/Dockerfile.dockerignore").lines().filter(|line| *line != ".git") {
        assert!(ignored.contains(line.trim_start_matches("**/")), "{line}");
    }
    let command = |node: &str| format!("host {}", compose["services"][node]["command"].as_str().unwrap());
    trains_as_one_process(&Case::new(), &on_both(&[command("node0"), command("node1")]));
    assert_eq!(compose["services"]["rocm"]["command"], "run lora_distributed --config train.yaml --nproc gpu");
}

/// srun starts each of its tasks alike; without flags that say otherwise each is a run of its own.
#[test]
fn tasks_of_slurm_that_are_no_run_together_are_told_so() {
    let case = Case::new();
    let notices = |tasks: &str, task: &str, rank: Option<&str>| {
        let mut command = case.run(WASM, &["max_steps_per_epoch=1", "~dataset_val"]);
        command.env("SLURM_STEP_NUM_TASKS", tasks).env("SLURM_PROCID", task);
        if let Some(rank) = rank {
            let group =
                [("LOCAL_RANK", rank), ("WORLD_SIZE", "1"), ("LOCAL_WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")];
            command.env("RANK", rank).envs(group).env("MASTER_PORT", free_port().to_string());
        }
        let ended = Ended::of(&mut command);
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        ended.stderr.lines().filter(|line| line.starts_with("notice:")).collect::<Vec<_>>().join("\n")
    };
    assert_snapshot!(notices("4", "0", None), @r#"notice: srun starts this command 4 times, each a run of its own, and all write to one `output_dir`; for one run start it once a node (`--ntasks-per-node=1`) with `--nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --rdzv-endpoint FIRST_NODE:29500`, as examples/slurm does (command line)"#);
    for (tasks, task, rank) in [("4", "1", None), ("1", "0", None), ("4", "0", Some("0"))] {
        assert_eq!(notices(tasks, task, rank), "", "task {task} of {tasks}");
    }
}

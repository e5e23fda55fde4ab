//! A run on several machines: as network namespaces with an address each where the kernel gives them to us, else as
//! launchers on this one.

use std::process::Command;

use insta::{allow_duplicates, assert_snapshot};
use rustix::process::{Pid, Signal, kill_process};

use crate::case::{Case, Ended, LONG, RHAI, Running, WASM, free_port, lives, workers_with};

const SCRIPT: &str = include_str!("nodes.sh");
/// Two nodes of two ranks form the steps of one process.
const FOUR: &str = "gradient_accumulation_steps=1";

/// Runs `script` with `count` machines: its `node N COMMAND…` runs a command on one of them, and `train N …` is `host run`
/// there, of `$recipe`, behind `$limit`. `None` where this machine gives nobody namespaces.
pub fn with_nodes(case: &Case, count: usize, script: &str) -> Option<Command> {
    let shell = |flags: &str, script: &str| {
        let mut command = Command::new("unshare");
        case.prepare(&mut command);
        command.args([flags, "sh", "-c", SCRIPT, "nodes.sh", &count.to_string(), script]);
        command.env("HOST", case.host(&[]).get_program()).env("OMP_NUM_THREADS", "1");
        command
    };
    let works = |flags: &&str| shell(flags, "true").output().is_ok_and(|output| output.status.success());
    let Some(flags) = ["-Urn", "-n"].into_iter().find(works) else {
        println!("skipped: this machine gives nobody network namespaces, or has no `ip`");
        return None;
    };
    let train = format!(
        "recipe={WASM}; limit=
         train() {{ n=$1; shift; node $n $limit \"$HOST\" run $recipe --config train.yaml --nnodes {count} --node-rank $n \\
             --rdzv-endpoint 10.77.0.1:29500 \"$@\"; }}"
    );
    Some(shell(flags, &format!("{train}\n{script}")))
}

/// The script that trains on two nodes of two ranks each, and says how both ended.
fn two_by_two(arguments: &[&str]) -> String {
    let arguments = arguments.join(" ");
    format!(
        "train 1 --nproc 2 {arguments} 2>log1 & one=$!
         train 0 --nproc 2 {arguments} 2>log0 && echo node 0 done || echo node 0 $?
         wait $one && echo node 1 done || echo node 1 $?"
    )
}

fn adapter(case: &Case, output_dir: &str) -> Vec<u8> {
    case.contents(&format!("{output_dir}/epoch_0/adapter")).remove("adapter_model.safetensors").unwrap()
}

#[track_caller]
fn assert_both_done(ended: &Ended, case: &Case) {
    let log = |name| std::fs::read_to_string(case.path(name)).unwrap_or_default();
    assert_eq!(ended.stdout, "node 0 done\nnode 1 done\n", "{}\n{}\n{}", ended.stderr, log("log0"), log("log1"));
}

fn restarts(case: &Case, log: &str) -> Vec<String> {
    let text = std::fs::read_to_string(case.path(log)).unwrap();
    text.lines().filter(|line| line.starts_with("restart ")).map(str::to_owned).collect()
}

#[test]
fn two_nodes_of_two_ranks_train_as_one_process() {
    let case = Case::new();
    let Some(mut nodes) = with_nodes(&case, 2, &two_by_two(&[FOUR, "output_dir=nodes"])) else { return };
    assert_both_done(&Ended::of(&mut nodes), &case);
    let (one, four) = (case.losses(WASM, "one", &[]), case.log("nodes"));
    assert_eq!(one.len(), four.len());
    let worst = one.iter().zip(&four).map(|(one, four)| ((one - four) / one).abs()).fold(0.0, f64::max);
    println!("2 nodes x 2 ranks and one process: losses differ by {worst:.1e}");
    assert!(worst < 1e-6, "{worst:e}");
}

/// Whichever rank it is, the run goes on from the newest checkpoint and ends where an undisturbed one does, to the last bit.
#[test]
fn a_killed_rank_of_any_node_is_started_again() {
    let case = Case::new();
    let arguments = [LONG, &["save_every_n_steps=5", "--max-restarts", "1"]].concat();
    let start = |output_dir: &str| {
        let output_dir = format!("output_dir={output_dir}");
        with_nodes(&case, 2, &two_by_two(&[&arguments[..], &[&output_dir]].concat()))
    };
    let Some(mut straight) = start("straight") else { return };
    assert_both_done(&Ended::of(&mut straight), &case);
    assert_eq!(restarts(&case, "log0"), [""; 0]);

    for (rank, output_dir) in [(0, "first"), (3, "last")] {
        let mut run = Running::start(&mut start(output_dir).unwrap());
        run.wait_for_steps(&case, output_dir, 12);
        let saved = case.path(output_dir).join("step_10");
        while !saved.exists() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        let workers = workers_with(&case);
        assert_eq!(workers.iter().map(|(rank, _)| *rank).collect::<Vec<_>>(), [0, 1, 2, 3]);
        kill_process(workers[rank].1, Signal::KILL).unwrap();
        assert_both_done(&run.wait(), &case);
        assert!(!workers.iter().any(|(_, pid)| lives(*pid)), "a worker is left");
        let [line] = &restarts(&case, "log0")[..] else { panic!("{:?}", restarts(&case, "log0")) };
        assert_eq!(&restarts(&case, "log1")[..], std::slice::from_ref(line));
        let step = line.split(' ').nth(6).unwrap().to_owned();
        assert!(step.parse::<usize>().unwrap() >= 10, "{line}");
        allow_duplicates! { assert_snapshot!(line.replace(&step, "N").replace(&format!("rank {rank}"), "rank R").replace(&format!("step_{step}"), "step_N"), @"restart 1 of 1, from step N (`step_N`): the worker was killed by signal 9 (SIGKILL) (rank R)") };
        assert!(adapter(&case, output_dir) == adapter(&case, "straight"), "other weights");
    }
}

/// One of the launchers of a run on this machine.
fn node(case: &Case, recipe: &str, num_nodes: usize, rank: usize, port: u16, arguments: &[&str]) -> Command {
    let (num_nodes, rank) = (num_nodes.to_string(), rank.to_string());
    let endpoint = format!("127.0.0.1:{port}");
    let place = ["--nnodes", &num_nodes, "--node-rank", &rank, "--rdzv-endpoint", &endpoint];
    let mut command = case.run(recipe, &[&place[..], arguments].concat());
    command.env("OMP_NUM_THREADS", "1");
    command
}

fn report(ended: &Ended, port: u16) -> String {
    ended.report().replace(&port.to_string(), "PORT")
}

/// A machine that is lost and comes back; here its launcher is killed, and started again by hand.
#[test]
fn a_lost_node_may_come_back() {
    let case = Case::new();
    let arguments = [LONG, &["gradient_accumulation_steps=2", "save_every_n_steps=5", "--max-restarts", "1"]].concat();
    let two = |output_dir: &str| {
        let (port, output_dir) = (free_port(), format!("output_dir={output_dir}"));
        let start = |rank| node(&case, WASM, 2, rank, port, &[&arguments[..], &[&output_dir]].concat());
        [start(0), start(1), start(1)]
    };
    let [mut first, mut second, _] = two("straight");
    let (first, second) = (Running::start(&mut first), Running::start(&mut second));
    assert_eq!((first.wait().code, second.wait().code), (0, 0));

    let [mut first, mut second, mut again] = two("out");
    let mut first = Running::start(&mut first);
    let lost = Running::start(&mut second);
    first.wait_for_steps(&case, "out", 8);
    drop(lost);
    let again = Running::start(&mut again).wait();
    let first = first.wait();
    assert_eq!((first.code, again.code), (0, 0), "{}\n{}", first.stderr, again.stderr);
    assert!(first.stderr.contains("restart 1 of 1, from step "), "{}", first.stderr);
    assert!(first.stderr.contains("node 1 went away, with rank 1\n"), "{}", first.stderr);
    assert!(adapter(&case, "out") == adapter(&case, "straight"), "other weights");
}

/// Either side waits for the other as long as the config says, then ends by itself and says whom it has lost.
#[test]
fn a_cut_network_ends_both_sides() {
    let case = Case::new();
    let arguments = [LONG, &["epochs=20", "collective_timeout_seconds=4"]].concat().join(" ");
    let script = format!(
        "train 1 {arguments} 2>log1 & one=$!
         train 0 {arguments} 2>log0 & zero=$!
         while [ \"$(cat out/logs/log.jsonl 2>/dev/null | wc -l)\" -lt 3 ]; do sleep 0.05; done
         ip link set port1 down
         wait $zero || echo node 0 $?
         wait $one || echo node 1 $?"
    );
    let Some(mut nodes) = with_nodes(&case, 2, &script) else { return };
    let ended = Ended::of(&mut nodes);
    assert_eq!(ended.stdout, "node 0 1\nnode 1 1\n", "{}", ended.stderr);
    assert_eq!(workers_with(&case), []);
    for (log, other) in [("log0", 1), ("log1", 0)] {
        let text = std::fs::read_to_string(case.path(log)).unwrap();
        let (_, error) = text.split_once("error: ").unwrap();
        assert!(error.starts_with(&format!("no word from rank {other} for 4 s, in step ")), "{log}: {error}");
        assert!(error.contains("or its machine out of memory or cut off"), "{log}: {error}");
    }
}

/// By Ctrl-C at either of them: both stop, the checkpoint is saved, and nobody starts again.
#[test]
fn a_stop_at_one_node_stops_all() {
    for stopped in [0, 1] {
        let (case, port) = (Case::new(), free_port());
        let arguments = [LONG, &["epochs=20", "--nproc", "2", "--max-restarts", "3"]].concat();
        let mut nodes = [0, 1].map(|rank| Running::start(&mut node(&case, WASM, 2, rank, port, &arguments)));
        nodes[0].wait_for_steps(&case, "out", 3);
        nodes[stopped].signal(Signal::INT);
        for ended in nodes.map(Running::wait) {
            let step = case.log("out").len();
            let report = report(&ended, port).replace(&format!("step {step}"), "step N");
            allow_duplicates! { assert_snapshot!(report, @"
            exit 130
            error: stopped after step N; the checkpoint is saved
            hint: go on with `resume_from_checkpoint=True`
            ") };
        }
        assert_eq!(workers_with(&case), []);
    }
}

/// Which rank of which node it is makes no difference: both say the same, once, and end.
#[test]
fn without_restarts_all_nodes_report_the_rank_that_was_lost() {
    let (case, port) = (Case::new(), free_port());
    let arguments = [LONG, &["epochs=20"]].concat();
    let mut nodes = [0, 1].map(|rank| Running::start(&mut node(&case, WASM, 2, rank, port, &arguments)));
    nodes[0].wait_for_steps(&case, "out", 3);
    kill_process(workers_with(&case)[1].1, Signal::KILL).unwrap();
    for ended in nodes.map(Running::wait) {
        allow_duplicates! { assert_snapshot!(report(&ended, port), @"
        exit 1
        error: the worker was killed by signal 9 (SIGKILL) (rank 1)
        cause: nobody here sent it; the kernel does when memory runs out (`dmesg` then shows `Out of memory`)
        hint: use less memory: a smaller `batch_size`, a smaller `tokenizer.max_seq_len`, or fewer ranks
        ") };
    }
    assert_eq!(workers_with(&case), []);
}

#[test]
fn nodes_that_never_come_are_named() {
    let (case, port) = (Case::new(), free_port());
    let soon = ["--rdzv-timeout", "6"];
    let nodes = [0, 2].map(|rank| Running::start(&mut node(&case, WASM, 4, rank, port, &soon)));
    for ended in nodes.map(Running::wait) {
        allow_duplicates! { assert_snapshot!(report(&ended, port), @"
        exit 1
        error: nodes 1, 3 of 4 did not come to `127.0.0.1:PORT` within 6 s
        hint: `--node-rank` counts from 0 to 3 and `--rdzv-endpoint 127.0.0.1:PORT` is the same on every node; `--rdzv-timeout` is how long they wait
        ") };
    }
    let alone = Ended::of(&mut node(&case, WASM, 2, 1, port, &["--rdzv-conf", "timeout=1"]));
    assert_snapshot!(report(&alone, port), @"
    exit 1
    error: node 0 could not be reached at `127.0.0.1:PORT` within 1 s
    cause: Connection refused (os error 111)
    hint: start it with `--node-rank 0`, and see that nothing between the two closes the port
    hint: `--rdzv-timeout` is how long they wait
    ");
    let mut unknown = case.run(WASM, &["--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "node0.invalid"]);
    let ended = Ended::of(unknown.args(["--rdzv-timeout", "1"]));
    let report = report(&ended, port);
    let cause = report.lines().find(|line| line.starts_with("cause: ")).unwrap();
    assert!(cause.starts_with("cause: failed to lookup address information"), "{cause}");
    assert_snapshot!(report.replace(cause, "cause: RESOLVER"), @"
    exit 1
    error: node 0 could not be reached at `node0.invalid:29400` within 1 s
    cause: RESOLVER
    hint: start it with `--node-rank 0`, and see that nothing between the two closes the port
    hint: `--rdzv-timeout` is how long they wait
    ");
    assert!(!case.path("out").exists());
}

/// Waits until the launcher of node 0 listens, and so hears signals too.
fn wait_for_node_0(port: u16) {
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}

#[test]
fn a_stop_while_it_waits_is_no_failure() {
    let (case, port) = (Case::new(), free_port());
    let waiting = Running::start(&mut node(&case, WASM, 3, 0, port, &["--max-restarts", "2"]));
    wait_for_node_0(port);
    waiting.signal(Signal::TERM);
    assert_snapshot!(report(&waiting.wait(), port), @"
    exit 130
    error: stopped before all nodes had met
    ");
}

#[test]
fn nodes_that_do_not_fit_together() {
    let case = Case::new();
    let two = |num_nodes: [usize; 2], ranks: [usize; 2], arguments: [&[&str]; 2]| {
        let port = free_port();
        let mut first =
            node(&case, WASM, num_nodes[0], ranks[0], port, &[arguments[0], &["--rdzv-timeout", "4"]].concat());
        let first = Running::start(&mut first);
        wait_for_node_0(port);
        let second = Ended::of(&mut node(&case, WASM, num_nodes[1], ranks[1], port, arguments[1]));
        [first.wait(), second].map(|ended| report(&ended, port))
    };
    let [first, second] = two([2, 2], [0, 1], [&[], &["--nproc", "2"]]);
    assert_eq!(first, second);
    assert_snapshot!(first, @"
    exit 2
    error: node 1 was started with `--nproc 2`, node 0 with `--nproc 1`
    hint: start every node with the same command, up to `--node-rank`
    ");
    let [first, second] = two([2, 3], [0, 1], [&[], &[]]);
    assert_eq!(first, second);
    assert_snapshot!(first, @"
    exit 2
    error: node 1 was started with `--nnodes 3`, node 0 with `--nnodes 2`
    hint: start every node with the same command, up to `--node-rank`
    ");
    let [first, second] = two([2, 2], [0, 1], [&["--rdzv-id", "mine"], &["--rdzv-id", "yours"]]);
    assert_snapshot!(second, @"
    exit 2
    error: node 1 belongs to the run `yours`, node 0 to `mine` (`--rdzv-id`)
    hint: each run meets at a port of its own, and has one `--rdzv-id` on all nodes
    ");
    assert_snapshot!(first, @"
    exit 1
    error: node 1 of 2 did not come to `127.0.0.1:PORT` within 4 s
    cause: `127.0.0.1` was turned away: node 1 belongs to the run `yours`, node 0 to `mine` (`--rdzv-id`)
    hint: `--node-rank` counts from 0 to 1 and `--rdzv-endpoint 127.0.0.1:PORT` is the same on every node; `--rdzv-timeout` is how long they wait
    ");
    let [_, second] = two([2, 2], [0, 0], [&[], &[]]);
    assert_snapshot!(second, @"
    exit 2
    error: port PORT is in use, and the nodes meet there (`--rdzv-endpoint`)
    cause: Address already in use (os error 98)
    hint: name another on every node; or is a second node started with `--node-rank 0` here?
    ");
    assert!(!case.path("out").exists());
}

#[test]
fn a_node_rank_that_is_taken() {
    let (case, port) = (Case::new(), free_port());
    let soon = ["--rdzv-timeout", "5"];
    let nodes = [0, 1].map(|rank| Running::start(&mut node(&case, WASM, 3, rank, port, &soon)));
    // Of two that come at once, either is the first.
    let third = Running::start(&mut node(&case, WASM, 3, 1, port, &soon));
    let [first, second] = nodes.map(Running::wait);
    let reports = [report(&second, port), report(&third.wait(), port)];
    let taken = reports.iter().find(|report| report.starts_with("exit 2")).unwrap();
    assert_snapshot!(taken, @"
    exit 2
    error: node rank 1 is taken, by `127.0.0.1`
    hint: each node has a `--node-rank` of its own, from 0 to 2
    ");
    assert_snapshot!(report(&first, port), @"
    exit 1
    error: node 2 of 3 did not come to `127.0.0.1:PORT` within 5 s
    cause: `127.0.0.1` was turned away: node rank 1 is taken, by `127.0.0.1`
    hint: `--node-rank` counts from 0 to 2 and `--rdzv-endpoint 127.0.0.1:PORT` is the same on every node; `--rdzv-timeout` is how long they wait
    ");
    assert!(reports.contains(&report(&first, port)));

    let mut elsewhere = case.run(WASM, &["--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "192.0.2.7:29500"]);
    assert_snapshot!(Ended::of(&mut elsewhere).report(), @"
    exit 2
    error: `--node-rank 0`, but the rendezvous endpoint `192.0.2.7:29500` is another machine
    hint: node 0 is the one at the endpoint; each node has a `--node-rank` of its own
    ");
    let mut unknown = case.run(WASM, &["--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "node0.invalid"]);
    let report = Ended::of(&mut unknown).report();
    assert!(
        report.starts_with("exit 2\nerror: the rendezvous endpoint `node0.invalid:29400` cannot be resolved\n"),
        "{report}"
    );
}

#[test]
fn nodes_of_other_configs_or_guests_are_named() {
    let case = Case::new();
    let two = |recipe: &str, arguments: &[&str]| {
        let port = free_port();
        let both = ["--nproc", "2", "--max-restarts", "2"];
        let first = Running::start(&mut node(&case, WASM, 2, 0, port, &both));
        let second = Ended::of(&mut node(&case, recipe, 2, 1, port, &[&both[..], arguments].concat()));
        let (first, second) = (report(&first.wait(), port), report(&second, port));
        assert_eq!(first, second);
        let mut parts = first.split("of digest ");
        let before = parts.next().unwrap().to_owned();
        parts.fold(before, |text, part| text + "of digest D" + part.trim_start_matches(|c: char| c.is_ascii_hexdigit()))
    };
    // Without rows to measure on, this node would take part in fewer collectives.
    assert_snapshot!(two(WASM, &["optimizer.lr=2e-2", "~dataset_val"]), @"
    exit 2
    error: ranks 2, 3 opened something else than rank 0 (rank 2)
    cause: `dataset_val`: a section on rank 0, null here
    cause: `optimizer.lr`: 0.01 on rank 0, 0.02 here
    cause: the template of `dataset_val`: of digest D on rank 0, of digest D here
    hint: start every rank with the same config and overrides, over the same files, with the same build of `host`
    ");
    assert_snapshot!(two(RHAI, &[]), @"
    exit 2
    error: ranks 2, 3 opened something else than rank 0 (rank 2)
    cause: the recipe, with its loss: of digest D on rank 0, of digest D here
    hint: start every rank with the same config and overrides, over the same files, with the same build of `host`
    ");
    assert_eq!(workers_with(&case), []);
}

/// Under torchrun, Slurm or Kubernetes: ranks that are started one by one, by their environment.
#[test]
fn ranks_that_never_come_are_named() {
    let case = Case::new();
    let join = |rank: usize, world_size: usize, port: u16| {
        let mut command = case.join(rank, port, &["--rdzv-timeout", "6"]);
        command.env("WORLD_SIZE", world_size.to_string());
        Running::start(&mut command)
    };
    let port = free_port();
    let ranks = [0, 1].map(|rank| join(rank, 4, port)).map(Running::wait);
    assert_snapshot!(report(&ranks[0], port), @"
    exit 1
    error: ranks 2, 3 of 4 did not come within 6 s (rank 0)
    hint: see why they were not started, or cannot reach `MASTER_ADDR`; `--rdzv-timeout` is how long ranks wait
    ");
    assert_snapshot!(report(&ranks[1], port), @"
    exit 1
    error: stopped because ranks 2, 3 of 4 did not come within 6 s (rank 1)
    ");
    let alone = join(1, 2, port).wait();
    let text = report(&alone, port);
    assert_snapshot!(text.split_once("cause: ").unwrap().0, @"
    exit 1
    error: rank 0 could not be reached at `127.0.0.1:PORT` within 6 s (rank 1)
    ");
    let ranks = [(0, 2), (1, 3)].map(|(rank, world_size)| join(rank, world_size, port)).map(Running::wait);
    assert_snapshot!(report(&ranks[0], port), @"
    exit 2
    error: the ranks disagree on their number: rank 0 says 2 (rank 0)
    cause: rank 1 says 3
    hint: start every rank with the same `WORLD_SIZE`
    ");
    let ranks = [0, 1, 1].map(|rank| join(rank, 3, port)).map(Running::wait);
    let twice = ranks.iter().map(|ended| report(ended, port)).find(|report| report.contains("twice")).unwrap();
    assert_snapshot!(twice, @"
    exit 2
    error: rank 1 was started twice (rank 1)
    hint: each process of a group needs a `RANK` of its own, from 0 to `WORLD_SIZE` - 1
    ");
    assert_eq!(workers_with(&case), [] as [(usize, Pid); 0]);
}

//! Runs that are killed, stopped or cannot meet.

use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant};

use insta::assert_snapshot;
use rustix::process::{Signal, kill_process};

use crate::case::{Case, Ended, LONG, Running, STEPS, WASM, free_port, lives, workers_with};

const TWO_LONG: &[&str] = &["--nproc", "2"];
const RANKS: [usize; 2] = [0, 1];

#[test]
fn a_killed_rank_ends_the_run_and_is_named() {
    for rank in RANKS {
        let case = Case::new();
        let mut run = Running::start(&mut case.run(WASM, &[LONG, TWO_LONG, &["epochs=20"]].concat()));
        run.wait_for_steps(&case, "out", 3);
        let workers = run.workers();
        assert_eq!(workers.iter().map(|(rank, _)| *rank).collect::<Vec<_>>(), RANKS);

        let killed = Instant::now();
        kill_process(workers[rank].1, Signal::KILL).unwrap();
        let ended = run.wait();
        let took = killed.elapsed();
        println!("rank {rank} killed: over in {took:.2?}");
        assert!(took < Duration::from_secs(10), "{took:?}");
        assert_eq!(ended.report().matches("error: ").count(), 1, "{}", ended.stderr);
        let report = ended.report().replace(&format!("rank {rank}"), "rank R");
        insta::allow_duplicates! { assert_snapshot!(report, @"
        exit 1
        error: the worker was killed by signal 9 (SIGKILL) (rank R)
        cause: nobody here sent it; the kernel does when memory runs out (`dmesg` then shows `Out of memory`)
        hint: use less memory: a smaller `batch_size`, a smaller `tokenizer.max_seq_len`, or fewer ranks
        ") };
        assert!(!workers.iter().any(|(_, pid)| lives(*pid)), "a worker is left");
        assert_eq!(case.checkpoints("out"), [""; 0]);
    }
}

/// Nobody tells that it stands still: the others wait for it as long as the config says, and name it.
#[test]
fn a_frozen_rank_ends_the_run_and_is_named() {
    let three: &[&str] = &["--nproc", "3"];
    let sharing = &["--nproc", "3", "parallel=shard"];
    let copies = &["--nproc", "4", "data_parallel_replicate_dim=2", "gradient_accumulation_steps=1"];
    for (rank, ranks) in [(0, three), (2, three), (1, sharing), (2, copies)] {
        let case = Case::new();
        let settings = [LONG, ranks, &["epochs=20", "collective_timeout_seconds=4"]].concat();
        let mut run = Running::start(&mut case.run(WASM, &settings));
        run.wait_for_steps(&case, "out", 3);
        let workers = run.workers();
        kill_process(workers[rank].1, Signal::STOP).unwrap();
        let ended = run.wait();
        assert!(!workers.iter().any(|(_, pid)| lives(*pid)), "a worker is left");
        assert_eq!(ended.code, 1, "{}", ended.stderr);
        let report = ended.report();
        assert!(report.contains(&format!("error: no word from rank {rank} for 4 s, in step ")), "{report}");
        assert_eq!(report.matches("error: ").count(), 1, "{report}");
        assert_eq!(case.checkpoints("out"), [""; 0]);
    }
}

/// Makes rank 1 of the first attempt stand still as it ends, when no rank has to do with another any more.
const FREEZE: &str = r#"
#include <signal.h>
#include <stdlib.h>
#include <string.h>
static int is(const char *name, const char *value) { return getenv(name) && strcmp(getenv(name), value) == 0; }
__attribute__((destructor)) static void freeze(void) {
    if (getenv("HOST_REPORT") && is("RANK", "1") && is("TORCHELASTIC_RESTART_COUNT", "0")) raise(SIGSTOP);
}
"#;

/// Nobody waits for it then but the launcher, and what it has done is not lost.
#[test]
fn a_rank_that_is_frozen_at_its_end_is_named() {
    let case = Case::new();
    case.write("freeze.c", FREEZE);
    let mut compiler = Command::new("c++");
    compiler.current_dir(case.path("")).args(["-x", "c", "-shared", "-fPIC", "-o", "freeze.so", "freeze.c"]);
    assert!(compiler.status().unwrap().success());
    let arguments = ["--nproc", "2", "collective_timeout_seconds=3"];
    let straight = case.losses(WASM, "straight", &arguments);
    let frozen = |more: &[&str]| {
        let mut command = case.run(WASM, &[&arguments, more].concat());
        Ended::of(command.env("LD_PRELOAD", case.path("freeze.so")))
    };
    let adapter = |run: &str| case.contents(&format!("{run}/epoch_0/adapter")).remove("adapter_model.safetensors");
    let ended = frozen(&[]);
    assert_eq!(workers_with(&case), []);
    assert_snapshot!(ended.report(), @"
    exit 1
    error: the worker had not ended 3 s after others had (rank 1)
    cause: its process was stopped, as SIGSTOP does
    hint: what the run has saved is whole: ranks end only once it is
    hint: `collective_timeout_seconds` is how long ranks wait for each other
    ");
    assert_eq!(case.log("out"), straight);
    assert!(adapter("out") == adapter("straight"), "other weights");

    let ended = frozen(&["--max-restarts", "1", "output_dir=again"]);
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stderr.contains("restart 1 of 1, from step 5 (`epoch_0`): "), "{}", ended.stderr);
    assert!(adapter("again") == adapter("straight"), "other weights");
}

/// Nor where it never comes to the ranks' meeting.
#[test]
fn a_rank_that_never_comes_is_named() {
    let case = Case::new();
    let port = free_port();
    let ended = Ended::of(&mut case.join(0, port, &["--rdzv-timeout", "1"]));
    let report = ended.report().replace(&port.to_string(), "PORT");
    let first: Vec<&str> = report.lines().take(2).collect();
    assert_snapshot!(first.join("\n"), @"
    exit 1
    error: rank 1 of 2 did not come within 1 s (rank 0)
    ");
    let ended = Ended::of(&mut case.join(1, port, &["--rdzv-timeout", "1"]));
    let report = ended.report().replace(&port.to_string(), "PORT");
    let first: Vec<&str> = report.lines().take(2).collect();
    assert_snapshot!(first.join("\n"), @"
    exit 1
    error: rank 0 could not be reached at `127.0.0.1:PORT` within 1 s (rank 1)
    ");
}

/// A store that takes connections and never answers is what a rank 0 that was frozen as it started looks like.
#[test]
fn a_rank_0_that_never_answers_is_named() {
    let case = Case::new();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let ended = Ended::of(&mut case.join(1, port, &["--rdzv-timeout", "1"]));
    assert_eq!(ended.code, 1);
    let report = ended.report().replace(&port.to_string(), "PORT");
    assert!(
        report.contains("error: no word from rank 0 for 12 s") || report.contains("could not be reached"),
        "{report}"
    );
}

/// By Ctrl-C and by a scheduler's SIGTERM: saved at a step, and gone on with as if nothing had happened.
#[test]
fn a_stopped_run_saves_and_resumes_bit_for_bit() {
    let case = Case::new();
    let arguments = [LONG, TWO_LONG].concat();
    let straight = case.losses(WASM, "straight", &arguments);
    assert_eq!(straight.len(), 120);
    for (signal, output_dir) in [(Signal::INT, "int"), (Signal::TERM, "term")] {
        let output_dir_key = format!("output_dir={output_dir}");
        let arguments = [&arguments[..], &[&output_dir_key]].concat();
        let mut run = Running::start(&mut case.run(WASM, &arguments));
        run.wait_for_steps(&case, output_dir, 3);
        let workers = run.workers();
        run.signal(signal);
        let ended = run.wait();
        assert!(!workers.iter().any(|(_, pid)| lives(*pid)), "a worker is left");
        let done = case.log(output_dir);
        assert!((3..120).contains(&done.len()), "{}", done.len());
        assert_eq!(case.checkpoints(output_dir), [format!("step_{}", done.len())]);
        let report = ended.report().replace(&format!("step {}", done.len()), "step N");
        insta::allow_duplicates! { assert_snapshot!(report, @"
        exit 130
        error: stopped after step N; the checkpoint is saved
        hint: go on with `resume_from_checkpoint=True`
        ") };

        assert_eq!(
            case.losses(WASM, output_dir, &[&arguments[..], &["resume_from_checkpoint=True"]].concat()),
            straight
        );
        assert_eq!(
            case.contents(&format!("{output_dir}/epoch_0/adapter"))["adapter_model.safetensors"],
            case.contents("straight/epoch_0/adapter")["adapter_model.safetensors"]
        );
    }
}

#[test]
fn generation_stops_on_request() {
    let case = Case::new();
    // Most seeds draw the end of the text before long; this one goes on for 2.5 s.
    let endless =
        ["seed=36", "max_new_tokens=400", "temperature=1.0", "top_k=null", "enable_kv_cache=False", "echo_prompt=True"];
    let mut run =
        Running::start(&mut case.host(&[&["run", "generate", "--config", "generate.yaml"], &endless[..]].concat()));
    run.wait_for_output();
    run.signal(Signal::INT);
    let ended = run.wait();
    assert_snapshot!(ended.report(), @"
    exit 130
    error: generation was stopped
    ");
}

#[test]
fn a_port_that_is_taken_is_named() {
    let case = Case::new();
    let taken = TcpListener::bind("[::]:0").or_else(|_| TcpListener::bind("0.0.0.0:0")).unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let ended = Ended::of(&mut case.run(WASM, &["--nproc", "2", "--master-port", &port]));
    assert_snapshot!(ended.report().replace(&port, "PORT"), @"
    exit 2
    error: port PORT is in use, and rank 0 needs it for the ranks to meet (`--master-port`)
    cause: Address already in use (os error 98)
    hint: leave `--master-port` out to take a free one, or name another
    ");
    assert!(!case.path("out").exists());
}

/// `host run … | head`: whoever reads the lines may leave, and the run goes on.
#[test]
fn a_reader_that_leaves_does_not_end_the_run() {
    let case = Case::new();
    let stdout = ["metric_logger=StdoutLogger", "~metric_logger.log_dir", "~metric_logger.output_fmt"];
    let arguments = [&stdout[..], &["~metric_logger.filename"]].concat();
    let read = Ended::of(&mut case.run(WASM, &[&arguments[..], &["output_dir=read"]].concat()));
    assert_eq!(read.code, 0, "{}", read.stderr);
    let lines: Vec<&str> = read.stdout.lines().filter(|line| line.contains("| loss:")).collect();
    assert_eq!(lines.len(), STEPS);
    assert!(lines[0].starts_with("Step 1 | loss:") && lines[0].ends_with(' '), "{lines:?}");

    for closes_stderr in [false, true] {
        let mut run = Running::start(&mut case.run(WASM, &arguments));
        run.close_stdout();
        if closes_stderr {
            run.close_stderr();
        }
        let ended = run.wait();
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        assert_eq!(ended.stderr.matches("nobody reads standard output").count(), usize::from(!closes_stderr));
        assert_eq!(case.checkpoints("out"), ["epoch_0"]);
        std::fs::remove_dir_all(case.path("out")).unwrap();
    }
}

//! Checkpoints are written while training goes on. A write is held here by a lease on a file that it copies: the kernel keeps
//! whoever opens it waiting until the lease is given back.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Signal, kill_process};

use insta::assert_snapshot;

use crate::case::{Case, Ended, LONG, Running, WASM, free_port};
use crate::faults::mounted;

const HELD: &str = "model/notes.txt";
const REPLICATED: &[&str] = &["--nproc", "2", "save_every_n_steps=10"];
/// All weights, of which each rank writes its half.
const PIECES: &[&str] =
    &["--nproc", "2", "save_every_n_steps=10", "model={_component_: llama}", "optimizer.lr=1e-4", "parallel=shard"];
const LEASE: &str = "
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
file = os.open(sys.argv[1], os.O_RDWR)
fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print('held', flush=True)
sys.stdin.read()
";

/// Held until it is dropped.
struct Lease(Child);

impl Lease {
    /// `None` where there is no Python to ask for it, the file system has none, or the file is open.
    fn hold(path: &Path) -> Option<Self> {
        let mut command = Command::new("python3");
        command.args(["-c", LEASE]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut holder = Self(command.spawn().ok()?);
        let mut line = String::new();
        BufReader::new(holder.0.stdout.take()?).read_line(&mut line).ok()?;
        (line == "held\n").then_some(holder)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The numbers in a checkpoint: of all its weights and what resuming needs, without their names, which differ from save to save.
fn numbers(case: &Case, checkpoint: &str) -> Vec<(String, Vec<u8>)> {
    let of = |(name, bytes): (String, Vec<u8>)| {
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        (name, bytes[8 + header..].to_vec())
    };
    let files = case.contents(checkpoint).into_iter().chain(case.contents(&format!("{checkpoint}/adapter")));
    let numbers: Vec<_> = files.filter(|(name, _)| name.ends_with(".safetensors")).map(of).collect();
    assert!(numbers.len() >= 3, "{checkpoint} has {numbers:?}");
    numbers
}

#[test]
fn training_goes_on_while_a_checkpoint_is_written() {
    training_goes_on(REPLICATED);
}

/// Rank 0 is held before it writes its piece.
#[test]
fn training_goes_on_while_pieces_are_written() {
    training_goes_on(PIECES);
}

fn training_goes_on(settings: &[&str]) {
    let case = Case::new();
    case.write(HELD, "copied beside each checkpoint");
    let straight = case.losses(WASM, "straight", &[LONG, settings].concat());
    let Some(lease) = Lease::hold(&case.path(HELD)) else {
        println!("not tested: no lease on a file");
        return;
    };
    let mut run = Running::start(&mut case.run(WASM, &[LONG, settings].concat()));
    run.wait_for_steps(&case, "out", 16);
    assert_eq!(case.checkpoints("out"), [".step_10.partial"]);
    assert!(!case.path("out/.step_10.partial/resume-00001-of-00002.safetensors").exists());
    drop(lease);
    let ended = run.wait();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stderr.contains("s; saved out/step_10 in "), "{}", ended.stderr);
    assert_eq!(case.log("out"), straight);
    assert_eq!(case.checkpoints("out"), case.checkpoints("straight"));
    // Of the step whose name it has, whatever was trained meanwhile.
    for checkpoint in ["step_10", "step_20", "epoch_0"] {
        let [ours, theirs] = ["out", "straight"].map(|run| numbers(&case, &format!("{run}/{checkpoint}")));
        assert!(ours == theirs, "{checkpoint} is of other numbers");
    }
}

/// What a crash costs is the checkpoint under way; the one before is whole, and where the run goes on from.
#[test]
fn a_crash_costs_the_checkpoint_under_way() {
    a_crash_costs_one(REPLICATED, 0);
}

/// Whether it is the rank whose piece is not written yet, or the other one.
#[test]
fn a_crash_costs_the_pieces_under_way() {
    for rank in [0, 1] {
        a_crash_costs_one(PIECES, rank);
    }
}

fn a_crash_costs_one(settings: &[&str], rank: usize) {
    let case = Case::new();
    case.write(HELD, "copied beside each checkpoint");
    let straight = case.losses(WASM, "straight", &[LONG, settings].concat());
    let mut run = Running::start(&mut case.run(WASM, &[LONG, settings].concat()));
    run.wait_for_steps(&case, "out", 12);
    let whole = || case.checkpoints("out").into_iter().filter(|name| !name.starts_with('.')).collect::<Vec<_>>();
    while whole().is_empty() {
        assert!(lives(&run), "ended before the first checkpoint");
        sleep(Duration::from_millis(2));
    }
    let mut lease = None;
    for _ in 0..100 {
        lease = Lease::hold(&case.path(HELD));
        if lease.is_some() {
            break;
        }
        sleep(Duration::from_millis(5));
    }
    if lease.is_none() {
        println!("not tested: no lease on a file");
        return;
    }
    // One that has its copy of the file is not held.
    let is_held = |name: &String| name.ends_with(".partial") && !case.path(&format!("out/{name}/notes.txt")).exists();
    while !case.checkpoints("out").iter().any(is_held) {
        assert!(lives(&run), "ended before the next checkpoint");
        sleep(Duration::from_millis(2));
    }
    let before = whole();
    kill_process(run.workers()[rank].1, Signal::KILL).unwrap();
    assert_eq!(run.wait().code, 1);
    assert_eq!(whole(), before);
    drop(lease);
    let resumed = Running::start(&mut case.run(WASM, &[LONG, settings, &["resume_from_checkpoint=True"]].concat()));
    let ended = resumed.wait();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stderr.contains("resuming from `out/step_"), "{}", ended.stderr);
    assert!(case.checkpoints("out").iter().all(|name| !name.starts_with('.')), "{:?}", case.checkpoints("out"));
    assert!(numbers(&case, "out/epoch_0") == numbers(&case, "straight/epoch_0"), "other numbers");
    assert_eq!(straight.len(), 120);
}

fn lives(run: &Running) -> bool {
    !run.workers().is_empty()
}

/// Ranks on machines whose output folders are not one: the rank that cannot write its piece says so, and all end.
#[test]
fn a_rank_that_cannot_write_its_piece_ends_the_run() {
    let case = Case::new();
    let arguments = format!("{} {}", LONG.join(" "), PIECES[2..].join(" ").replace("{_component_: llama}", "llama"));
    let script = format!(
        "export WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={port} OMP_NUM_THREADS=1
        RANK=0 LOCAL_RANK=0 train {arguments} 2>first & first=$!
        export RANK=1 LOCAL_RANK=1
        unshare --mount sh -c 'mount -t tmpfs none out; \"$HOST\" run {WASM} --config train.yaml {arguments}' || second=$?
        wait $first || echo first $?, second $second; ls -A out",
        port = free_port()
    );
    let Some(ended) = mounted(&case, WASM, &script) else { return };
    assert_eq!(ended.stdout, "first 1, second 2\nlogs\n", "{}", ended.stderr);
    assert_snapshot!(ended.report(), @"
    exit 0
    error: the folder `out/.step_10.partial`, which rank 0 made, is not here (rank 1)
    hint: on several machines `output_dir` has to be on a disk that all of them see
    ");
    let first = std::fs::read_to_string(case.path("first")).unwrap();
    assert_snapshot!(&first[first.find("the checkpoint under way").unwrap_or(0)..], @"
    the checkpoint under way was not written
    error: the run ended before every rank had written its part
    error: stopped because rank 1 failed (rank 0)
    ");
}

/// Whichever rank meets it first: what the others then miss is no cause, and the newest checkpoint stays.
#[test]
fn a_disk_that_fills_with_pieces_is_named() {
    let case = Case::new();
    let settings = ["gradient_accumulation_steps=2", "save_every_n_steps=4", "model=llama", "parallel=shard"];
    let straight = [&["--nproc", "2", "output_dir=straight"], &settings[..]].concat();
    assert_eq!(Ended::of(&mut case.run(WASM, &straight)).code, 0);
    let checkpoint = case.size("straight/epoch_0");
    for (disk, whole) in [(0.2, ""), (0.6, ""), (1.3, " step_4"), (1.7, " step_4")] {
        let bytes = (disk * checkpoint as f64) as u64;
        let script = format!(
            "mount -t tmpfs -o size={bytes} none out
            code=0; train --nproc 2 {} || code=$?
            echo exit $code $(ls out | grep -v -e logs -e svg)",
            settings.join(" ")
        );
        let Some(ended) = mounted(&case, WASM, &script) else { return };
        assert_eq!(ended.stdout.lines().last(), Some(format!("exit 1{whole}").as_str()), "{disk}: {}", ended.stderr);
        let report = ended.report();
        assert!(report.contains("No space left on device"), "{disk}: {report}");
    }
}

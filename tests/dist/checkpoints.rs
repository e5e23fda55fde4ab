//! Checkpoints are written while training goes on. A write is held here by a lease on a file that it copies: the kernel keeps
//! whoever opens it waiting until the lease is given back.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use rustix::process::{Signal, kill_process};

use crate::case::{Case, LONG, Running, WASM};

const HELD: &str = "model/notes.txt";
const SETTINGS: &[&str] = &["--nproc", "2", "save_every_n_steps=10"];
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

fn adapter(case: &Case, checkpoint: &str) -> Vec<u8> {
    std::fs::read(case.path(checkpoint).join("adapter/adapter_model.safetensors")).unwrap()
}

#[test]
fn training_goes_on_while_a_checkpoint_is_written() {
    let case = Case::new();
    case.write(HELD, "copied beside each checkpoint");
    let straight = case.losses(WASM, "straight", &[LONG, SETTINGS].concat());
    let Some(lease) = Lease::hold(&case.path(HELD)) else {
        println!("not tested: no lease on a file");
        return;
    };
    let mut run = Running::start(&mut case.run(WASM, &[LONG, SETTINGS].concat()));
    run.wait_for_steps(&case, "out", 16);
    assert_eq!(case.checkpoints("out"), [".step_10.partial"]);
    drop(lease);
    let ended = run.wait();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stderr.contains("s; saved out/step_10 in "), "{}", ended.stderr);
    assert_eq!(case.log("out"), straight);
    assert_eq!(case.checkpoints("out"), case.checkpoints("straight"));
    // Of the step whose name it has, whatever was trained meanwhile.
    for checkpoint in ["step_10", "step_20", "epoch_0"] {
        let [ours, theirs] = ["out", "straight"].map(|run| adapter(&case, &format!("{run}/{checkpoint}")));
        assert!(ours == theirs, "{checkpoint} is of other numbers");
    }
}

/// What a crash costs is the checkpoint under way; the one before is whole, and where the run goes on from.
#[test]
fn a_crash_costs_the_checkpoint_under_way() {
    let case = Case::new();
    case.write(HELD, "copied beside each checkpoint");
    let straight = case.losses(WASM, "straight", &[LONG, SETTINGS].concat());
    let mut run = Running::start(&mut case.run(WASM, &[LONG, SETTINGS].concat()));
    run.wait_for_steps(&case, "out", 12);
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
    while !case.checkpoints("out").iter().any(|name| name.ends_with(".partial")) {
        assert!(lives(&run), "ended before the next checkpoint");
        sleep(Duration::from_millis(2));
    }
    let whole = || case.checkpoints("out").into_iter().filter(|name| !name.starts_with('.')).collect::<Vec<_>>();
    let before = whole();
    assert!(!before.is_empty());
    kill_process(run.workers()[0].1, Signal::KILL).unwrap();
    assert_eq!(run.wait().code, 1);
    assert_eq!(whole(), before);
    drop(lease);
    let resumed = Running::start(&mut case.run(WASM, &[LONG, SETTINGS, &["resume_from_checkpoint=True"]].concat()));
    let ended = resumed.wait();
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    assert!(ended.stderr.contains("resuming from `out/step_"), "{}", ended.stderr);
    assert!(case.checkpoints("out").iter().all(|name| !name.starts_with('.')), "{:?}", case.checkpoints("out"));
    assert!(adapter(&case, "out/epoch_0") == adapter(&case, "straight/epoch_0"), "other numbers");
    assert_eq!(straight.len(), 120);
}

fn lives(run: &Running) -> bool {
    !run.workers().is_empty()
}

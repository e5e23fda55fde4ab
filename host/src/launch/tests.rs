//! Shell scripts take the worker's place: they see the same environment, signals and report file.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::*;
use crate::error::Kind;
use crate::worker::Report;

/// A folder with a worker script; its path is `$DIR` in the script, where workers leave what the test looks at.
struct Stage(tempfile::TempDir);

impl Stage {
    fn new(script: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let worker = folder.path().join("worker");
        // `ready` tells the test that all ranks are up; a script waits with `others` before it fails.
        let text = format!(
            "#!/bin/sh\nDIR='{}'\nready() {{ echo $$ > \"$DIR/.pid$RANK\"; mv \"$DIR/.pid$RANK\" \"$DIR/pid$RANK\"; }}\n\
             others() {{ while [ $(ls \"$DIR\" | grep -c pid) -lt $WORLD_SIZE ]; do sleep 0.01; done; }}\n\
             forever() {{ while :; do sleep 0.02; done; }}\n{script}\n",
            folder.path().display()
        );
        std::fs::write(&worker, text).unwrap();
        std::fs::set_permissions(&worker, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A report as a worker would write it, for the script to copy to `$HOST_REPORT`.
    fn report(&self, name: &str, error: Error, secondary: bool) {
        let report = Report { error, secondary, since_epoch: crate::worker::since_epoch() };
        std::fs::write(self.path(name), serde_json::to_vec(&report).unwrap()).unwrap();
    }

    fn launcher(&self, nproc: usize) -> Launcher {
        self.launcher_with(nproc, &LaunchOptions::default())
    }

    fn launcher_with(&self, nproc: usize, options: &LaunchOptions) -> Launcher {
        let group = Group::resolve(|_| None, nproc, options).unwrap();
        launcher(self.path("worker"), group)
    }

    fn run(&self, nproc: usize) -> Result<()> {
        self.launcher(nproc).run(serde_json::json!({ "steps": 2 }))
    }

    fn error(&self, nproc: usize) -> Error {
        let start = Instant::now();
        let error = self.run(nproc).unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(10), "the run took {:?} to end", start.elapsed());
        self.assert_nobody_left(nproc);
        error
    }

    fn pid(&self, rank: usize) -> Option<Pid> {
        let pid = std::fs::read_to_string(self.path(&format!("pid{rank}"))).ok()?;
        Pid::from_raw(pid.trim().parse().unwrap())
    }

    fn assert_nobody_left(&self, nproc: usize) {
        for rank in 0..nproc {
            let pid = self.pid(rank).unwrap_or_else(|| panic!("rank {rank} never started"));
            assert!(test_kill_process(pid).is_err(), "rank {rank} is still there");
        }
    }

    /// Runs a launcher in a process of its own, for signals to be sent to; see [`a_launcher_by_itself`].
    fn launcher_process(&self, nproc: usize) -> Child {
        self.launcher_process_with(nproc, 0)
    }

    fn launcher_process_with(&self, nproc: usize, max_restarts: usize) -> Child {
        let program = std::env::current_exe().unwrap();
        let child = Command::new(program)
            .args(["--exact", "launch::tests::a_launcher_by_itself", "--ignored", "--nocapture", "--quiet"])
            .env("HOST_TEST_STAGE", self.0.path())
            .env("HOST_TEST_NPROC", nproc.to_string())
            .env("HOST_TEST_MAX_RESTARTS", max_restarts.to_string())
            .process_group(0)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        wait_for("all ranks", || (0..nproc).all(|rank| self.pid(rank).is_some()));
        child
    }
}

fn launcher(worker: PathBuf, group: Group) -> Launcher {
    let libtorch_lib = "/opt/torch/lib".into();
    Launcher { worker, libtorch_lib, group, logs: Logs::default(), say: |line| eprintln!("{line}") }
}

impl Job for serde_json::Value {
    fn output_dir(&self) -> Option<&Path> {
        self["output_dir"].as_str().map(Path::new)
    }

    fn go_on_from(&mut self, checkpoint: PathBuf) {
        self["checkpoint"] = checkpoint.to_str().into();
    }

    fn patience(&self) -> Option<Duration> {
        self["patience"].as_f64().map(Duration::from_secs_f64)
    }
}

/// Waits for a launcher process of two ranks: its exit code and what it printed to stderr. No rank may be left.
fn end_of(launcher: Child, stage: &Stage) -> (Option<i32>, String) {
    let output = launcher.wait_with_output().unwrap();
    stage.assert_nobody_left(2);
    (output.status.code(), String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

fn wait_for(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(20), "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Not a test: the other process of the tests that send signals.
#[test]
#[ignore = "started by other tests"]
fn a_launcher_by_itself() {
    let Some(folder) = std::env::var_os("HOST_TEST_STAGE") else { return };
    let number = |name: &str| std::env::var(name).unwrap().parse().unwrap();
    let options = LaunchOptions { max_restarts: number("HOST_TEST_MAX_RESTARTS"), ..LaunchOptions::default() };
    let group = Group::resolve(|_| None, number("HOST_TEST_NPROC"), &options).unwrap();
    let worker = Path::new(&folder).join("worker");
    let result = launcher(worker, group).run(serde_json::json!({}));
    let code = result.as_ref().err().map_or(0, Error::exit_code);
    if let Err(error) = result {
        eprintln!("{error}");
    }
    std::process::exit(code.into());
}

/// Not a test: a worker made of the worker's side of [`crate::worker`].
#[test]
#[ignore = "started by other tests"]
fn a_worker_by_itself() {
    let Some(stage) = std::env::var_os("HOST_TEST_STAGE").map(PathBuf::from) else { return };
    WorkerEnv::die_with_launcher().unwrap();
    let env = WorkerEnv::read().unwrap();
    env.install_panic_hook();
    let stop = crate::worker::install_signals().unwrap();
    std::fs::write(stage.join(format!("pid{}", env.rank)), std::process::id().to_string()).unwrap();
    let start = Instant::now();
    while !stop.is_set() {
        assert!(start.elapsed() < Duration::from_secs(60), "nobody stopped this worker");
        assert!(env.rank == 0 || !stage.join("panic").exists(), "an odd number of heads");
        std::thread::sleep(Duration::from_millis(10));
    }
    // Long enough for a second delivery of the same Ctrl-C, which must not end it.
    std::thread::sleep(Duration::from_millis(300));
    std::fs::write(stage.join(format!("saved{}", env.rank)), "").unwrap();
    env.report(&Error::interrupted("stopped at step 3, state saved")).unwrap();
    std::process::exit(130);
}

/// A stage on which that one plays.
fn real_workers() -> Stage {
    let program = std::env::current_exe().unwrap();
    Stage::new(&format!(
        "HOST_TEST_STAGE=\"$DIR\" RUST_BACKTRACE=0 exec '{}' --exact launch::tests::a_worker_by_itself --ignored \
         --nocapture --quiet >/dev/null",
        program.display()
    ))
}

#[test]
fn every_worker_sees_its_place() {
    let stage = Stage::new(
        r#"ready; echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $HOST_LIBTORCH" > "$DIR/env$RANK"
           echo "$MASTER_PORT" > "$DIR/port$RANK"; echo "${LD_LIBRARY_PATH%%:*}" > "$DIR/path$RANK"
           test "$OMP_NUM_THREADS" -ge 1 && test "$1" = --plan && cp "$2" "$DIR/plan$RANK""#,
    );
    stage.run(3).unwrap();
    let read = |name: String| std::fs::read_to_string(stage.path(&name)).unwrap().trim().to_owned();
    for rank in 0..3 {
        assert_eq!(read(format!("env{rank}")), format!("{rank} {rank} 3 3 127.0.0.1 /opt/torch/lib"));
        assert_eq!(read(format!("path{rank}")), "/opt/torch/lib");
        assert_eq!(read(format!("plan{rank}")), r#"{"steps":2}"#);
        assert_eq!(read(format!("port{rank}")), read("port0".into()));
    }
    assert_ne!(read("port0".into()).parse::<u16>().unwrap(), 0);
    stage.assert_nobody_left(3);
}

#[test]
fn output_goes_to_the_files_that_were_asked_for() {
    let stage = Stage::new("echo out $RANK; echo err $RANK >&2");
    let mut launcher = stage.launcher(3);
    let streams = |text: &str| text.parse::<Streams>().unwrap();
    let dir = Some(stage.path("logs"));
    launcher.logs = Logs { dir, redirects: streams("0:1"), tee: streams("1:3"), shown: vec![0] };
    launcher.run(serde_json::json!({})).unwrap();
    let read = |name: &str| std::fs::read_to_string(stage.path("logs").join(name)).ok();
    assert_eq!(read("rank_0/stdout.log").as_deref(), Some("out 0\n"));
    assert_eq!(read("rank_1/stdout.log").as_deref(), Some("out 1\n"));
    assert_eq!(read("rank_1/stderr.log").as_deref(), Some("err 1\n"));
    assert_eq!((read("rank_0/stderr.log"), read("rank_2/stdout.log")), (None, None));
    launcher.logs = Logs { dir: Some("/proc/nowhere".into()), tee: Streams::ALL, ..Logs::default() };
    let error = launcher.run(serde_json::json!({})).unwrap_err();
    assert!(error.message.contains("/proc/nowhere/rank_0"), "{error}");
}

#[test]
fn the_rank_that_failed_by_itself_is_named() {
    let stage = Stage::new(
        r#"trap '' TERM; ready; others
           case $RANK in
             0) cp "$DIR/lost" $HOST_REPORT; exit 1 ;;
             1) sleep 0.1; cp "$DIR/bad_row" $HOST_REPORT; exit 2 ;;
             2) trap 'exit 1' TERM; forever ;;
           esac"#,
    );
    stage.report("lost", Error::run("stopped because of rank 1"), true);
    stage.report("bad_row", Error::config("row 7 has no `summary`").at("rows.jsonl", Some(7), None), false);
    let error = stage.error(3);
    assert_eq!(error.to_string(), "error: row 7 has no `summary` (rank 1)\n  --> rows.jsonl:7");
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn a_failure_without_a_report_says_its_exit_code() {
    let error = Stage::new("ready; exit 127").error(1);
    assert_eq!(error.message, "the worker ended with exit code 127 and left no report");
    assert!(error.hints[0].contains("`host doctor`"));
    assert_eq!((error.rank, error.exit_code()), (None, 1));
}

#[test]
fn a_killed_rank_ends_the_run() {
    let stage = Stage::new(
        r#"ready; others
           trap 'cp "$DIR/lost" $HOST_REPORT; exit 1' TERM
           [ $RANK = 1 ] && kill -KILL $$
           forever"#,
    );
    stage.report("lost", Error::run("lost connection to rank 1"), false);
    let start = Instant::now();
    let error = stage.error(2);
    assert_eq!(error.message, "the worker was killed by signal 9 (SIGKILL)");
    assert!(error.causes[0].contains("memory"), "{error}");
    assert!(start.elapsed() < ranks::GRACE, "a worker that ends on SIGTERM is not waited for");
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed() {
    let stage = Stage::new("trap '' TERM; ready; others; [ $RANK = 0 ] && kill -SEGV $$; forever");
    let error = stage.error(2);
    assert_eq!(error.message, "the worker was killed by signal 11 (SIGSEGV)");
    assert_eq!((error.kind, error.exit_code()), (Kind::Bug, 101));
}

/// It is waited for as long as ranks wait for each other, from the end of the first.
#[test]
fn a_rank_that_stands_still_at_the_end_is_named() {
    for agreed in [0, 130] {
        let stage = Stage::new(&format!("ready; others; [ $RANK = 1 ] && kill -STOP $$; exit {agreed}"));
        let error = stage.launcher(3).run(serde_json::json!({ "patience": 0.5 })).unwrap_err();
        stage.assert_nobody_left(3);
        insta::allow_duplicates! { insta::assert_snapshot!(error, @"
        error: the worker had not ended 0.5 s after others had (rank 1)
        cause: its process was stopped, as SIGSTOP does
        hint: what the run has saved is whole: ranks end only once it is
        hint: `collective_timeout_seconds` is how long ranks wait for each other
        ") };
        assert_eq!(error.exit_code(), 1);
    }
    let stage = Stage::new("ready; others; [ $RANK = 1 ] && sleep 0.3; exit 0");
    stage.launcher(2).run(serde_json::json!({ "patience": 60.0 })).unwrap();
}

/// Of another node too, which is told that others have ended.
#[test]
fn a_rank_that_stands_still_at_the_end_is_named_on_all_nodes() {
    for frozen in [0, 1] {
        let stage = Stage::new(&format!("ready; others; [ $RANK = {frozen} ] && kill -STOP $$; exit 0"));
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let endpoint = Endpoint { host: "127.0.0.1".into(), port };
        let node = &|node_rank| {
            let run_id = String::new();
            let nodes = Some(NodesOptions { num_nodes: 2, node_rank, endpoint: endpoint.clone(), run_id });
            let launcher = stage.launcher_with(1, &LaunchOptions { nodes, ..LaunchOptions::default() });
            launcher.run(serde_json::json!({ "patience": 0.5 })).unwrap_err()
        };
        let errors = std::thread::scope(|scope| {
            let nodes = [0, 1].map(|rank| scope.spawn(move || node(rank)));
            nodes.map(|node| node.join().unwrap())
        });
        stage.assert_nobody_left(2);
        for error in errors {
            assert_eq!(error.message, "the worker had not ended 0.5 s after others had");
            assert_eq!(error.rank, Some(frozen));
        }
    }
}

#[test]
fn a_worker_that_cannot_start_takes_the_others_along() {
    let stage = Stage::new("");
    std::fs::remove_file(stage.path("worker")).unwrap();
    let error = stage.run(2).unwrap_err();
    assert!(error.message.starts_with("cannot start the worker of rank 0"), "{error}");
}

#[test]
fn ctrl_c_at_the_launcher_alone_stops_every_rank_once() {
    let stage = Stage::new(
        r#"count=0; trap 'count=$((count+1)); echo $count > "$DIR/stops$RANK"' INT
           ready
           until [ -f "$DIR/stops$RANK" ]; do sleep 0.02; done
           sleep 0.3; cp "$DIR/saved" $HOST_REPORT; exit 130"#,
    );
    stage.report("saved", Error::interrupted("stopped at step 12, state saved"), false);
    let launcher = stage.launcher_process(2);
    let pid = Pid::from_child(&launcher);
    kill_process(pid, Signal::INT).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    // The same keystroke, forwarded by somebody else as well.
    kill_process(pid, Signal::INT).unwrap();
    assert_eq!(end_of(launcher, &stage), (Some(130), "error: stopped at step 12, state saved".into()));
    for rank in 0..2 {
        assert_eq!(std::fs::read_to_string(stage.path(&format!("stops{rank}"))).unwrap().trim(), "1");
    }
}

#[test]
fn a_second_ctrl_c_ends_ranks_that_do_not_stop() {
    let stage = Stage::new("trap '' INT TERM; ready; forever");
    let launcher = stage.launcher_process(2);
    let pid = Pid::from_child(&launcher);
    kill_process(pid, Signal::INT).unwrap();
    std::thread::sleep(Duration::from_millis(1300));
    kill_process(pid, Signal::INT).unwrap();
    assert_eq!(end_of(launcher, &stage), (Some(130), "error: stopped at once, without saving".into()));
}

#[test]
fn sigterm_is_forwarded_as_sigterm() {
    let stage = Stage::new("trap 'exit 130' TERM; trap 'exit 3' INT; ready; forever");
    let launcher = stage.launcher_process(2);
    kill_process(Pid::from_child(&launcher), Signal::TERM).unwrap();
    assert_eq!(end_of(launcher, &stage).0, Some(130));
}

#[test]
fn the_first_rank_keeps_our_output_and_the_others_lines_are_labelled() {
    let stage = Stage::new("ready; echo \"out $RANK\"; printf 'no end of line' >&2");
    let output = stage.launcher_process(2).wait_with_output().unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.lines().any(|line| line == "out 0"), "{stdout}");
    assert!(stdout.lines().any(|line| line == "[rank 1] out 1"), "{stdout}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("[rank 1] no end of line\n"));
}

#[test]
fn ctrl_c_at_a_terminal_reaches_workers_twice_and_counts_once() {
    let stage = real_workers();
    let launcher = stage.launcher_process(2);
    // The launcher leads a group of its own here; the terminal signals the whole group.
    rustix::process::kill_process_group(Pid::from_child(&launcher), Signal::INT).unwrap();
    assert_eq!(end_of(launcher, &stage), (Some(130), "error: stopped at step 3, state saved".into()));
    assert!(stage.path("saved0").exists() && stage.path("saved1").exists());
}

#[test]
fn ctrl_c_before_workers_listen_is_no_failure() {
    let stage = Stage::new("ready; forever");
    let launcher = stage.launcher_process(2);
    rustix::process::kill_process_group(Pid::from_child(&launcher), Signal::INT).unwrap();
    assert_eq!(end_of(launcher, &stage), (Some(130), "error: stopped at once, without saving".into()));
}

#[test]
fn a_panic_is_reported_once_with_its_place() {
    let stage = real_workers();
    let launcher = stage.launcher_process(2);
    std::fs::write(stage.path("panic"), "").unwrap();
    let (code, stderr) = end_of(launcher, &stage);
    assert_eq!(code, Some(101), "{stderr}");
    assert!(stderr.starts_with("error: internal error: an odd number of heads (rank 1)\n  --> "), "{stderr}");
    assert!(stderr.contains("launch/tests.rs:"), "{stderr}");
    assert_eq!(stderr.matches("an odd number of heads").count(), 1, "{stderr}");
}

#[test]
fn workers_die_with_a_killed_launcher() {
    let stage = real_workers();
    let mut launcher = stage.launcher_process(2);
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    for rank in 0..2 {
        let worker = stage.pid(rank).unwrap();
        // Its new parent may be slow to reap it; a zombie runs nothing.
        wait_for("the worker's death", || {
            let state = std::fs::read_to_string(format!("/proc/{}/stat", worker.as_raw_pid()));
            test_kill_process(worker).is_err() || state.is_ok_and(|state| state.contains(") Z "))
        });
    }
}

#[test]
fn a_port_in_use_is_an_error_before_workers_start() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let stage = Stage::new("ready; echo $MASTER_PORT > \"$DIR/port\"");
    let options = LaunchOptions { master_port: Some(port), ..LaunchOptions::default() };
    let run = || stage.launcher_with(1, &options).run(serde_json::json!({}));
    let error = run().unwrap_err();
    assert_eq!(
        error.message,
        format!("port {port} is in use, and rank 0 needs it for the ranks to meet (`--master-port`)")
    );
    assert_eq!(error.exit_code(), 2);
    drop(taken);
    run().unwrap();
    assert_eq!(std::fs::read_to_string(stage.path("port")).unwrap().trim(), port.to_string());
}

#[test]
fn an_environment_with_a_rank_is_joined_by_one_worker() {
    let var = |name: &str| {
        let value = match name {
            "RANK" => "5",
            "LOCAL_RANK" => "1",
            "WORLD_SIZE" => "8",
            "LOCAL_WORLD_SIZE" => "4",
            "MASTER_ADDR" => "node0",
            "MASTER_PORT" => "29500",
            "TORCHELASTIC_RESTART_COUNT" => "2",
            "TORCHELASTIC_USE_AGENT_STORE" => "True",
            _ => return None,
        };
        Some(OsString::from(value))
    };
    let group = Group::resolve(var, 1, &LaunchOptions::default()).unwrap();
    let Group::Joined(vars, rendezvous) = &group else { panic!("{group:?}") };
    assert_eq!((rendezvous.attempt, rendezvous.has_store), (2, true));
    let env = launcher("worker".into(), group.clone()).worker_env(vars, rendezvous, 0, Path::new("reports"));
    assert_eq!((env.rank, env.local_rank, env.world_size, env.local_world_size), (5, 1, 8, 4));
    assert_eq!((env.master_addr.as_str(), env.master_port), ("node0", 29500));

    let refused = |nproc, options| Group::resolve(var, nproc, &options).unwrap_err().message;
    let plain = LaunchOptions::default;
    assert_eq!(refused(2, plain()), "`--nproc 2` contradicts the environment, which says `RANK=5` of `WORLD_SIZE=8`");
    let port = refused(1, LaunchOptions { master_port: Some(1234), ..plain() });
    assert!(port.starts_with("`--master-port 1234` contradicts"), "{port}");
    let restarts = refused(1, LaunchOptions { max_restarts: 3, ..plain() });
    assert!(restarts.starts_with("`--max-restarts 3` contradicts"), "{restarts}");
}

/// A stage where the output folder has a checkpoint of an older run.
fn restart_stage(script: &str) -> Stage {
    let stage = Stage::new(&format!(
        "save() {{ mkdir \"$DIR/out/$1\"; echo \"{{\\\"step\\\": $2, \\\"saved_at\\\": $(date +%s%N)}}\" > \"$DIR/out/$1/resume.json\"; }}
         cp \"$2\" \"$DIR/plan$TORCHELASTIC_RESTART_COUNT\"; echo >> \"$DIR/started\"
         {script}"
    ));
    std::fs::create_dir_all(stage.path("out/step_90")).unwrap();
    std::fs::write(stage.path("out/step_90/resume.json"), r#"{"step": 90, "saved_at": 1}"#).unwrap();
    stage
}

fn run_again(stage: &Stage, max_restarts: usize) -> Result<()> {
    let options = LaunchOptions { max_restarts, ..LaunchOptions::default() };
    stage.launcher_with(2, &options).run(serde_json::json!({ "output_dir": stage.path("out") }))
}

fn checkpoint_of(stage: &Stage, attempt: usize) -> Option<String> {
    let plan = std::fs::read_to_string(stage.path(&format!("plan{attempt}"))).unwrap();
    let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
    let path = PathBuf::from(plan["checkpoint"].as_str()?);
    Some(path.file_name().unwrap().to_str().unwrap().to_owned())
}

#[test]
fn a_lost_rank_is_started_again_with_all_others_from_the_newest_checkpoint_of_the_run() {
    let stage = restart_stage(
        r#"ready; others
           case $RANK$TORCHELASTIC_RESTART_COUNT in
             10) kill -SEGV $$ ;;
             01) save step_3 3; save step_4 4; kill -KILL $$ ;;
             ?2) exit 0 ;;
             *) forever ;;
           esac"#,
    );
    run_again(&stage, 5).unwrap();
    assert_eq!([0, 1, 2].map(|attempt| checkpoint_of(&stage, attempt)), [None, None, Some("step_4".into())]);
    assert_eq!(std::fs::read_to_string(stage.path("started")).unwrap().lines().count(), 6);
    stage.assert_nobody_left(2);
}

#[test]
fn restarts_come_to_an_end() {
    let stage = restart_stage("ready; others; [ $RANK = 1 ] && exit 7; forever");
    let error = run_again(&stage, 2).unwrap_err();
    assert_eq!((error.message.as_str(), error.rank), ("the worker ended with exit code 7 and left no report", Some(1)));
    assert_eq!(std::fs::read_to_string(stage.path("started")).unwrap().lines().count(), 6);
    stage.assert_nobody_left(2);
}

#[test]
fn a_mistake_in_the_config_is_not_tried_again() {
    let stage = restart_stage(r#"ready; others; cp "$DIR/bad_row" $HOST_REPORT; exit 2"#);
    stage.report("bad_row", Error::config("row 7 has no `summary`"), false);
    let error = run_again(&stage, 2).unwrap_err();
    assert_eq!((error.message.as_str(), error.exit_code()), ("row 7 has no `summary`", 2));
    assert_eq!(std::fs::read_to_string(stage.path("started")).unwrap().lines().count(), 2);
}

#[test]
fn a_rank_that_dies_while_the_run_is_stopped_is_not_started_again() {
    let stage = restart_stage("trap 'exit 3' INT; ready; forever");
    let launcher = stage.launcher_process_with(2, 1);
    kill_process(Pid::from_child(&launcher), Signal::INT).unwrap();
    let (code, stderr) = end_of(launcher, &stage);
    assert_eq!(code, Some(1), "{stderr}");
    assert_eq!(std::fs::read_to_string(stage.path("started")).unwrap().lines().count(), 2, "{stderr}");
}

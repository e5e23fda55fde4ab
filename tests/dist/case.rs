//! A folder with all a run needs, the programs started in it, and what came of them.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

pub const WASM: &str = "recipes/lora_distributed.wasm";
pub const RHAI: &str = "scripts/recipes/lora_distributed.rhai";
pub const RHAI_TEMPLATE: &str = "tokenizer.prompt_template=scripts/templates/summarize.rhai";
/// Steps of [`TRAIN`]: 80 rows, 8 samples a step on one rank.
pub const STEPS: usize = 10;
/// Turns [`TRAIN`] into an epoch of 240 steps on one rank: time enough to do something to it.
pub const LONG: &[&str] = &["dataset.split=train", "batch_size=1", "gradient_accumulation_steps=1", "~dataset_val"];

/// Far beyond what any run here needs; a test that gets here fails.
const TOO_LONG: Duration = Duration::from_secs(120);

const TRAIN: &str = "\
output_dir: out
model:
  _component_: lora_llama
  lora_attn_modules: [q_proj, v_proj]
checkpointer:
  _component_: FullModelHFCheckpointer
  checkpoint_dir: model
  output_dir: ${output_dir}
tokenizer:
  _component_: hf_tokenizer
  path: ${checkpointer.checkpoint_dir}/tokenizer.json
  max_seq_len: 128
  prompt_template: templates/summarize.wasm
dataset:
  _component_: instruct_dataset
  source: data
  split: train[:80]
  column_map: {input: document, output: summary}
dataset_val:
  _component_: instruct_dataset
  source: ${dataset.source}
  split: validation
  column_map: ${dataset.column_map}
seed: 42
batch_size: 2
gradient_accumulation_steps: 4
optimizer:
  _component_: AdamW
  lr: 1e-2
lr_scheduler:
  _component_: cosine
  num_warmup_steps: 1
loss:
  _component_: cross_entropy
metric_logger:
  _component_: DiskLogger
  log_dir: ${output_dir}/logs
  output_fmt: jsonl
  filename: log.jsonl
device: cpu
dtype: fp32
";

const GENERATE: &str = "\
model:
  _component_: llama
checkpointer:
  _component_: FullModelHFCheckpointer
  checkpoint_dir: model
tokenizer:
  _component_: hf_tokenizer
  path: ${checkpointer.checkpoint_dir}/tokenizer.json
  max_seq_len: 128
  prompt_template: templates/summarize.wasm
prompt:
  user: The small parser reads text files.
max_new_tokens: 24
temperature: 0.6
top_k: 1
echo_prompt: False
device: cpu
dtype: fp32
";

/// The repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn programs() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_host-rank")).parent().unwrap()
}

/// Documents and summaries of `rows` rows, as JSON lines.
pub fn rows(rows: usize) -> String {
    const NOUNS: [&str; 8] = ["parser", "library", "command", "server", "editor", "format", "compiler", "tool"];
    const VERBS: [&str; 8] = ["reads", "writes", "checks", "sorts", "prints", "counts", "copies", "finds"];
    const KINDS: [&str; 8] = ["small", "fast", "simple", "portable", "free", "old", "new", "common"];
    let row = |i: usize| {
        let (noun, verb, kind) = (NOUNS[i % 8], VERBS[i / 8 % 8], KINDS[(i * 5 + i / 7) % 8]);
        // Of two to five sentences, so that lengths differ.
        let document: Vec<String> =
            (1..3 + i % 4).map(|k| format!("The {kind} {noun} {verb} text files, number {}.", i * k + 1)).collect();
        let summary = format!("{kind} {noun} that {verb} text");
        serde_json::json!({ "document": document.join(" "), "summary": summary }).to_string() + "\n"
    };
    (0..rows).map(row).collect()
}

pub struct Case {
    dir: TempDir,
}

impl Case {
    pub fn new() -> Self {
        let case = Self { dir: tempfile::tempdir().unwrap() };
        case.write("train.yaml", TRAIN);
        case.write("generate.yaml", GENERATE);
        case.write("data/train.jsonl", rows(240));
        case.write("data/validation.jsonl", rows(6));
        let model = root().join("tests/fixtures/tiny-llama");
        for entry in std::fs::read_dir(model).unwrap() {
            let path = entry.unwrap().path();
            let name = format!("model/{}", path.file_name().unwrap().to_str().unwrap());
            case.write(&name, std::fs::read(path).unwrap());
        }
        for folder in ["recipes", "templates", "scripts", "examples"] {
            symlink(root().join(folder), case.path(folder)).unwrap();
        }
        symlink(programs().join("../guests"), case.path("guests")).unwrap();
        case
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// Replaces the first `from` in a file by `to`; for weights, of the same length.
    pub fn edit(&self, name: &str, from: &str, to: &str) {
        let bytes = std::fs::read(self.path(name)).unwrap();
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes());
        let at = at.unwrap_or_else(|| panic!("`{name}` has no `{from}`"));
        self.write(name, [&bytes[..at], to.as_bytes(), &bytes[at + from.len()..]].concat());
    }

    pub fn host(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(programs().join("host"));
        self.prepare(&mut command);
        command.args(arguments);
        command
    }

    /// Gives `command` this case's folder and an environment that says nothing of ranks.
    pub fn prepare(&self, command: &mut Command) {
        command.current_dir(self.dir.path()).env("XDG_CACHE_HOME", self.path("cache")).stdin(Stdio::null());
        let group = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];
        let torchrun = ["TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"];
        let slurm = ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID"];
        for name in
            group.into_iter().chain(torchrun).chain(slurm).chain(["HOST_LOG", "OMP_NUM_THREADS", "RUST_BACKTRACE"])
        {
            command.env_remove(name);
        }
        // Tests run at the same time: threads that wait for work must not keep the cores from those that have some.
        command.env("OMP_WAIT_POLICY", "passive");
    }

    /// `host run RECIPE --config train.yaml …`
    pub fn run(&self, recipe: &str, arguments: &[&str]) -> Command {
        self.host(&[&["run", recipe, "--config", "train.yaml"], arguments].concat())
    }

    /// The same for one rank of two that somebody else starts; they meet at `port`.
    pub fn join(&self, rank: usize, port: u16, arguments: &[&str]) -> Command {
        let mut command = self.run(WASM, &[&["gradient_accumulation_steps=2"], arguments].concat());
        let rank = rank.to_string();
        command.env("RANK", &rank).env("LOCAL_RANK", &rank).env("WORLD_SIZE", "2").env("LOCAL_WORLD_SIZE", "2");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        // As the launcher shares the cores among its workers.
        let cores = std::thread::available_parallelism().unwrap().get();
        command.env("OMP_NUM_THREADS", (cores / 2).max(1).to_string());
        command
    }

    /// Trains to the end into `output_dir` and returns the losses.
    #[track_caller]
    pub fn losses(&self, recipe: &str, output_dir: &str, arguments: &[&str]) -> Vec<f64> {
        let output_dir_key = format!("output_dir={output_dir}");
        let ended = Running::start(&mut self.run(recipe, &[arguments, &[&output_dir_key]].concat())).wait();
        assert_eq!(ended.code, 0, "{}", ended.stderr);
        self.log(output_dir)
    }

    /// The losses in a run's log so far; they must be of the steps 1, 2, 3 and so on.
    pub fn log(&self, output_dir: &str) -> Vec<f64> {
        let text = std::fs::read_to_string(self.path(output_dir).join("logs/log.jsonl")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines = whole.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        let steps: Vec<_> = lines
            .filter_map(|line| Some((line["step"].as_u64().unwrap(), line.get("loss")?.as_f64().unwrap())))
            .collect();
        assert!(steps.iter().zip(1..).all(|((step, _), expected)| *step == expected), "{text}");
        steps.into_iter().map(|(_, loss)| loss).collect()
    }

    /// Names in a folder, sorted; none where there is no folder.
    pub fn names(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path(folder)) else { return vec![] };
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// Checkpoints, whole or not.
    pub fn checkpoints(&self, output_dir: &str) -> Vec<String> {
        self.names(output_dir).into_iter().filter(|name| name.contains("epoch_") || name.contains("step_")).collect()
    }

    /// Bytes in a folder of files, as the disk counts them.
    pub fn size(&self, folder: &str) -> u64 {
        let blocks = |name: String| std::fs::metadata(self.path(folder).join(name)).unwrap().blocks();
        512 * self.names(folder).into_iter().map(blocks).sum::<u64>()
    }

    pub fn contents(&self, folder: &str) -> BTreeMap<String, Vec<u8>> {
        let read = |name: String| {
            let bytes = std::fs::read(self.path(folder).join(&name)).unwrap();
            (name, bytes)
        };
        let is_file = |name: &String| self.path(folder).join(name).is_file();
        self.names(folder).into_iter().filter(is_file).map(read).collect()
    }
}

/// A started program, killed when a test ends without it.
pub struct Running {
    child: Option<Child>,
    pub pid: u32,
}

pub struct Ended {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    pub fn of(command: &mut Command) -> Self {
        Running::start(command).wait()
    }

    /// The exit code, and what stderr says from the first error on.
    pub fn report(&self) -> String {
        let start = self.stderr.find("error: ").unwrap_or(0);
        format!("exit {}\n{}", self.code, self.stderr[start..].trim_end())
    }
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        Self { pid: child.id(), child: Some(child) }
    }

    /// Takes the reader of standard output away.
    pub fn close_stdout(&mut self) {
        drop(self.child.as_mut().unwrap().stdout.take());
    }

    /// Takes the reader of standard error away.
    pub fn close_stderr(&mut self) {
        drop(self.child.as_mut().unwrap().stderr.take());
    }

    /// Waits until the run has logged `steps` steps.
    #[track_caller]
    pub fn wait_for_steps(&mut self, case: &Case, output_dir: &str, steps: usize) {
        let started = Instant::now();
        while case.log(output_dir).len() < steps {
            assert!(started.elapsed() < TOO_LONG, "no step {steps} in time");
            if self.child.as_mut().unwrap().try_wait().unwrap().is_some() {
                panic!("ended before step {steps}: {}", self.take_output().stderr);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits for the first byte of standard output.
    pub fn wait_for_output(&mut self) {
        let mut byte = [0];
        self.child.as_mut().unwrap().stdout.as_mut().unwrap().read_exact(&mut byte).unwrap();
    }

    /// Waits for the end; what it prints here fits a pipe.
    #[track_caller]
    pub fn wait(self) -> Ended {
        self.wait_within(TOO_LONG)
    }

    /// The same of a run that may take so long.
    #[track_caller]
    pub fn wait_within(mut self, limit: Duration) -> Ended {
        let started = Instant::now();
        while self.child.as_mut().unwrap().try_wait().unwrap().is_none() {
            if started.elapsed() > limit {
                self.child.as_mut().unwrap().kill().unwrap();
                let Ended { stdout, stderr, .. } = self.take_output();
                panic!("it does not end within {limit:?}\n{stdout}\n{stderr}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.take_output()
    }

    fn take_output(&mut self) -> Ended {
        let Output { status, stdout, stderr } = self.child.take().unwrap().wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Ended { code: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) }
    }

    /// The workers of this launcher, as rank and process.
    pub fn workers(&self) -> Vec<(usize, Pid)> {
        workers_of(self.pid)
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.pid as i32).unwrap(), signal).unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Workers die with their launcher.
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The living workers of a launcher, which may have ended itself, as rank and process.
pub fn workers_of(launcher_pid: u32) -> Vec<(usize, Pid)> {
    workers(&format!("HOST_LAUNCHER={launcher_pid}"))
}

/// The living workers of all launchers of a case.
pub fn workers_with(case: &Case) -> Vec<(usize, Pid)> {
    workers(&format!("XDG_CACHE_HOME={}", case.path("cache").display()))
}

/// The living workers with this in their environment.
fn workers(variable: &str) -> Vec<(usize, Pid)> {
    let processes =
        std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().into_string().ok());
    let mut workers: Vec<_> = processes
        .filter_map(|pid| {
            let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
            let variables: Vec<&[u8]> = environment.split(|byte| *byte == 0).collect();
            let of = |name: &str| variables.iter().find_map(|variable| variable.strip_prefix(name.as_bytes()));
            let is_ours = variables.contains(&variable.as_bytes()) && of("HOST_REPORT=").is_some();
            let rank = of("RANK=")?;
            is_ours.then(|| {
                let rank = std::str::from_utf8(rank).unwrap().parse().unwrap();
                (rank, Pid::from_raw(pid.parse().unwrap()).unwrap())
            })
        })
        .collect();
    workers.sort_by_key(|(rank, _)| *rank);
    workers
}

/// Whether a process is still there; one that nobody has waited for yet counts.
pub fn lives(pid: Pid) -> bool {
    Path::new(&format!("/proc/{}", pid.as_raw_nonzero())).exists()
}

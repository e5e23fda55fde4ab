//! `host doctor`: what is here, and what is wrong with it, each with one thing to do about it.
//!
//! It gathers facts first and judges them in one pure function, [`examine`]. Nothing it finds broken may break it: the
//! worker, the only part that loads libtorch, is asked in a process of its own and with a time limit.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize, Serializer};

use crate::config::limits;
use crate::error::{Error, IoContext, Result};
use crate::libtorch::{BackEnd, Libtorch};
use crate::machine::{Cpu, DriverNode, Gpu, Memory, Vendor};
use crate::worker::GroupVars;
use crate::{launch, libtorch, machine, worker};

/// Loading libtorch and asking a GPU driver takes a few seconds when it works.
const PROBE_LIMIT: Duration = Duration::from_secs(60);
const LITTLE_MEMORY: u64 = 2 << 30;

/// Prints the diagnosis on stdout. Fails, after printing, when `host run` cannot work here.
pub fn run(json: bool) -> Result<()> {
    let facts = Facts::gather();
    let findings = examine(&facts);
    let needed = findings.iter().filter(|finding| finding.severity == Severity::Error).count();
    let text = if json {
        let (keys, fixed) = limits::told();
        let limits = serde_json::json!({ "keys": keys.into_iter().collect::<BTreeMap<_, _>>(), "fixed": fixed });
        let diagnosis =
            serde_json::json!({ "usable": needed == 0, "facts": facts, "limits": limits, "findings": findings });
        serde_json::to_string_pretty(&diagnosis)
            .map_err(|error| Error::bug("the diagnosis is not JSON").cause(error))?
    } else {
        let findings: String = findings.iter().map(|finding| format!("\n{finding}\n")).collect();
        format!("{facts}{findings}").trim_end().to_owned()
    };
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            return Err(Error::run("cannot print the diagnosis").cause(error));
        }
        _ => {}
    }
    match needed {
        0 => Ok(()),
        _ => {
            Err(Error::run("`host run` cannot work here yet")
                .hint("see the errors in the diagnosis, each with its hint"))
        }
    }
}

#[derive(Debug, Serialize)]
struct Facts {
    version: &'static str,
    program: Option<PathBuf>,
    #[serde(serialize_with = "found")]
    worker: Result<PathBuf>,
    #[serde(serialize_with = "found")]
    libtorch: Result<Libtorch>,
    /// Fails with nothing to say where the worker or libtorch is missing: there was nobody to ask.
    #[serde(serialize_with = "found")]
    probe: Result<Probe, Option<Error>>,
    cpu: Cpu,
    memory: Option<Memory>,
    gpus: Vec<Gpu>,
    amd_driver: DriverNode,
    nvidia_driver: DriverNode,
    omp_num_threads: Option<String>,
    /// The group that the environment says to join.
    #[serde(serialize_with = "found")]
    group: Result<Option<GroupVars>>,
}

/// What was not found is null; why, is among the findings.
fn found<T: Serialize, E, S: Serializer>(fact: &Result<T, E>, serializer: S) -> Result<S::Ok, S::Error> {
    fact.as_ref().ok().serialize(serializer)
}

/// What `host-rank --probe` prints: one line of JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probe {
    /// The worker's own version.
    pub version: Option<String>,
    /// Of the contract that guests are built against.
    pub sdk_version: Option<String>,
    pub libtorch_version: String,
    /// The instruction set that libtorch's kernels chose, such as `AVX512`.
    pub cpu_capability: String,
    pub threads: usize,
    /// What the kernel has to hold a template's process with: `isolate`.
    #[serde(default)]
    pub isolation: Vec<String>,
    /// GPUs; the CPU is always there.
    pub devices: Vec<ProbedDevice>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProbedDevice {
    pub index: usize,
    /// The half of libtorch that reaches it.
    pub library: String,
    pub memory_total: Option<u64>,
}

impl Facts {
    fn gather() -> Self {
        let root = Path::new("/");
        let (worker, libtorch) = (launch::worker_path(), libtorch::find());
        let probe = match (&worker, &libtorch) {
            (Ok(worker), Ok(libtorch)) => probe(worker, &libtorch.lib_dir, PROBE_LIMIT).map_err(Some),
            _ => Err(None),
        };
        Self {
            version: env!("CARGO_PKG_VERSION"),
            program: std::env::current_exe().ok(),
            worker,
            libtorch,
            probe,
            cpu: machine::cpu(root),
            memory: machine::memory(root),
            gpus: machine::gpus(root),
            amd_driver: machine::driver_node(root, Vendor::Amd),
            nvidia_driver: machine::driver_node(root, Vendor::Nvidia),
            omp_num_threads: std::env::var("OMP_NUM_THREADS").ok(),
            group: GroupVars::read(|name| std::env::var_os(name)),
        }
    }
}

/// How many GPUs a run here can use.
pub fn num_gpus() -> Result<usize> {
    let (worker, libtorch) = (launch::worker_path()?, libtorch::find()?);
    Ok(probe(&worker, &libtorch.lib_dir, PROBE_LIMIT)?.devices.len())
}

/// Asks the worker what it sees. Its output goes to files, so that no pipe can fill up while we wait.
fn probe(worker: &Path, libtorch_lib: &Path, limit: Duration) -> Result<Probe> {
    let failed = |what: &str| Error::run(format!("the worker `{}` {what}", worker.display()));
    let (out, err) = (tempfile::NamedTempFile::new(), tempfile::NamedTempFile::new());
    let out = out.path_context("create a file in", std::env::temp_dir())?;
    let err = err.path_context("create a file in", std::env::temp_dir())?;
    let to_files = |file: &tempfile::NamedTempFile| file.reopen().map(Stdio::from);

    let mut command = Command::new(worker);
    command.arg("--probe").env(worker::HOST_LIBTORCH, libtorch_lib).stdin(Stdio::null());
    launch::set_library_path(&mut command, libtorch_lib);
    command.stdout(to_files(&out).path_context("open", out.path())?);
    command.stderr(to_files(&err).path_context("open", err.path())?);
    let mut child = command.spawn().map_err(|error| failed("cannot be started").cause(error))?;
    let start = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if start.elapsed() < limit => std::thread::sleep(Duration::from_millis(5)),
            ended => {
                let _ = child.kill();
                let _ = child.wait();
                let error = failed(&format!("gave no answer to `--probe` in {} s", limit.as_secs_f32()));
                return Err(ended.err().into_iter().fold(error, |error, cause| error.cause(cause)));
            }
        }
    };
    let out = std::fs::read_to_string(out.path()).unwrap_or_default();
    let err = std::fs::read_to_string(err.path()).unwrap_or_default();
    let last_words = err.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it printed no reason").trim();
    if !status.success() {
        return Err(failed(&format!("failed its probe, {status}"))
            .cause(last_words)
            .hint("if a library is missing, run `cargo xtask setup`; otherwise build `host` and `host-rank` again"));
    }
    let line = out.lines().rev().find(|line| line.trim_start().starts_with('{'));
    let line = line.ok_or_else(|| failed("answered its probe with no line of JSON").cause(last_words))?;
    serde_json::from_str(line).map_err(|error| {
        failed("answered its probe with something else than expected")
            .cause(error)
            .hint("`host` and `host-rank` may be of different builds: build both again")
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Severity {
    /// `host run` cannot work.
    Error,
    /// It works, but not as well as this machine could.
    Warning,
}

#[derive(Debug, Serialize)]
struct Finding {
    severity: Severity,
    error: Error,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.error.to_string();
        match (self.severity, text.strip_prefix("error: ")) {
            (Severity::Warning, Some(rest)) => write!(f, "warning: {rest}"),
            _ => f.write_str(&text),
        }
    }
}

/// Judges the facts; errors first.
fn examine(facts: &Facts) -> Vec<Finding> {
    let error = |error: Error| Finding { severity: Severity::Error, error };
    let warning = |error: Error| Finding { severity: Severity::Warning, error };
    let mut findings: Vec<Finding> = broken_parts(facts).into_iter().map(error).collect();
    findings.extend(unused_gpus(facts).into_iter().map(warning));
    findings.extend(slow_machine(facts).into_iter().map(warning));
    if let Ok(Some(GroupVars { rank, world_size, .. })) = facts.group {
        let (rank_name, world_name) = (worker::RANK, worker::WORLD_SIZE);
        let message =
            format!("`host run` here joins a group: `{rank_name}={rank}` of `{world_name}={world_size}` is set");
        let hint = format!("unset `{rank_name}` and `{world_name}` to start workers yourself");
        findings.push(warning(Error::config(message).hint(hint)));
    }
    findings
}

fn broken_parts(facts: &Facts) -> Vec<Error> {
    let mut errors = vec![];
    errors.extend(facts.libtorch.as_ref().err().cloned());
    errors.extend(facts.worker.as_ref().err().cloned());
    errors.extend(facts.probe.as_ref().err().cloned().flatten());
    errors.extend(facts.group.as_ref().err().cloned());
    let (Ok(probe), Ok(libtorch)) = (&facts.probe, &facts.libtorch) else { return errors };
    if let Some(version) = probe.version.as_deref().filter(|version| *version != facts.version) {
        let message = format!("`host` is version {}, but `host-rank` beside it is {version}", facts.version);
        errors.push(Error::config(message).hint("build both again, or copy both from one build"));
    }
    // `2.11.0` and `2.11.0+rocm7.0` are the same release.
    let release = |version: &str| version.split('+').next().unwrap_or_default().to_owned();
    if release(&probe.libtorch_version) != release(&libtorch.version) {
        errors.push(
            Error::config(format!(
                "the worker loaded libtorch {}, not the {} found at `{}`",
                probe.libtorch_version,
                libtorch.version,
                libtorch.lib_dir.display()
            ))
            .hint("look for another libtorch in `LD_PRELOAD` or `/etc/ld.so.conf.d`"),
        );
    }
    errors
}

fn unused_gpus(facts: &Facts) -> Vec<Error> {
    let mut warnings = vec![];
    let vendors = [
        (Vendor::Amd, BackEnd::Rocm, "AMD", "ROCm", &facts.amd_driver),
        (Vendor::Nvidia, BackEnd::Cuda, "NVIDIA", "CUDA", &facts.nvidia_driver),
    ];
    for (vendor, back_end, maker, platform, driver) in vendors {
        let count = facts.gpus.iter().filter(|gpu| gpu.vendor == vendor).count();
        let Ok(libtorch) = &facts.libtorch else { continue };
        if count == 0 {
            continue;
        }
        let unused = Error::run(format!("{count} {maker} GPU(s) here cannot be used"));
        let path = driver.path.display();
        if !libtorch.back_ends.contains(&back_end) {
            let hint =
                format!("set `LIBTORCH` to the `torch` folder of a PyTorch {} for {platform}", libtorch::NEEDED_SERIES);
            warnings.push(unused.cause(format!("this libtorch has no {platform} half")).hint(hint));
        } else if !driver.exists {
            warnings.push(unused.cause(format!("`{path}` does not exist")).hint(format!(
                "load the {maker} driver; for a container, pass the device in (for docker: `--device {path}`)"
            )));
        } else if !driver.accessible {
            let hint = match vendor {
                Vendor::Amd => "add yourself to its group: `sudo usermod -aG render,video $USER`, then log in again",
                Vendor::Nvidia => "give your user read and write access to it",
            };
            warnings.push(unused.cause(format!("`{path}` may not be opened by this user")).hint(hint));
        } else if facts.probe.as_ref().ok().is_some_and(|probe| probe.devices.is_empty()) {
            warnings.push(unused.cause(format!("libtorch's {platform} half found no device")).hint(format!(
                "compare the driver's version with what this libtorch was built for ({}); \
                 look for `CUDA_VISIBLE_DEVICES`, `HIP_VISIBLE_DEVICES` in the environment",
                libtorch.version
            )));
        }
    }
    warnings
}

fn slow_machine(facts: &Facts) -> Vec<Error> {
    let mut warnings = vec![];
    let Cpu { model, cores, features, .. } = &facts.cpu;
    let has = |feature| features.contains(&feature);
    if cfg!(target_arch = "x86_64") && !has("avx2") {
        warnings.push(
            Error::run(format!("the processor, {model}, has no AVX2: arithmetic on it is several times slower"))
                .hint("train on another machine, or on a GPU"),
        );
    } else if cfg!(target_arch = "x86_64") && !has("avx512_bf16") && !has("amx_bf16") {
        warnings.push(
            Error::run(format!("the processor, {model}, has no bf16 instructions: bf16 on it may be slower than fp32"))
                .hint("try `dtype=fp32` for runs with `device: cpu`"),
        );
    }
    if let Some(memory) = facts.memory.as_ref().filter(|memory| memory.available < LITTLE_MEMORY) {
        warnings.push(
            Error::run(format!("only {} of {} memory is free", gib(memory.available), gib(memory.total)))
                .hint("end other programs, or raise the container's limit; weights alone take 2 bytes a parameter"),
        );
    }
    if let (Some(set), Some(probe)) = (&facts.omp_num_threads, facts.probe.as_ref().ok())
        && probe.threads < *cores
    {
        warnings.push(
            Error::run(format!("`OMP_NUM_THREADS={set}` leaves libtorch {} thread(s) on {cores} cores", probe.threads))
                .hint("unset it: `host run` shares the cores among its workers"),
        );
    }
    warnings
}

impl fmt::Display for Facts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let program = self.program.as_deref().map_or("?".into(), Path::to_string_lossy);
        writeln!(f, "host       {}, {program}", self.version)?;
        match &self.worker {
            Ok(path) => {
                let probe = self.probe.as_ref().ok();
                let version = probe.and_then(|probe| probe.version.as_deref()).unwrap_or("version unknown");
                writeln!(f, "host-rank  {version}, {}", path.display())?;
                if let Some(version) = probe.and_then(|probe| probe.sdk_version.as_deref()) {
                    writeln!(f, "guests     host:sdk {version}")?;
                }
            }
            Err(_) => writeln!(f, "host-rank  not found")?,
        }
        let (keys, fixed) = limits::told();
        let keys: Vec<String> = keys.iter().map(|(name, value)| format!("limits.{name}={value}")).collect();
        for (index, line) in keys.chunks(4).map(|keys| keys.join(" ")).chain(fixed).enumerate() {
            writeln!(f, "{:<10} {line}", if index == 0 { "limits" } else { "" })?;
        }
        match &self.libtorch {
            Ok(Libtorch { lib_dir, version, source, back_ends }) => {
                let back_ends: Vec<_> = back_ends.iter().map(BackEnd::to_string).collect();
                writeln!(f, "libtorch   {version} ({source}), {}", lib_dir.display())?;
                writeln!(f, "back ends  {}", back_ends.join(", "))?;
            }
            Err(_) => writeln!(f, "libtorch   not usable")?,
        }
        let Cpu { model, cores, threads, features } = &self.cpu;
        let features = if features.is_empty() { "none that matter".to_owned() } else { features.join(" ") };
        writeln!(f, "processor  {model}, {cores} cores, {threads} threads, {features}")?;
        if let Ok(probe) = &self.probe {
            writeln!(f, "kernels    {}, {} threads", probe.cpu_capability, probe.threads)?;
        }
        if let Ok(probe) = &self.probe {
            let none = "neither seccomp nor landlock".to_owned();
            writeln!(f, "isolation  {}", if probe.isolation.is_empty() { none } else { probe.isolation.join(", ") })?;
        }
        match &self.memory {
            Some(memory) => writeln!(f, "memory     {}, {} free", gib(memory.total), gib(memory.available))?,
            None => writeln!(f, "memory     unknown")?,
        }
        if self.gpus.is_empty() {
            writeln!(f, "GPUs       none seen")?;
        }
        for gpu in &self.gpus {
            writeln!(f, "GPU        {}", named(&gpu.name, gpu.memory_total))?;
        }
        for device in self.probe.as_ref().ok().map(|probe| probe.devices.as_slice()).unwrap_or_default() {
            writeln!(f, "cuda:{:<5} {}", device.index, named(&device.library, device.memory_total))?;
        }
        Ok(())
    }
}

fn named(name: &str, memory: Option<u64>) -> String {
    memory.map_or(name.to_owned(), |memory| format!("{name}, {}", gib(memory)))
}

fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}

#[cfg(test)]
mod tests;

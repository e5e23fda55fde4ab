//! What a run tells about its steps: torchtune's keys, plus speeds and memory that can be compared. Rank 0 writes.

mod curve;
mod tensorboard;

use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use host::config::plan::{DiskFormat, MetricSink, MetricsPlan};
use host::error::IoContext;
use host::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

pub use curve::Curve;
use tensorboard::EventFile;

/// One step's figures, in the order they are printed.
#[derive(Clone, Debug, Default)]
pub struct StepMetrics(Vec<(String, f64)>);

/// What the host measures itself.
pub const OWN: &[&str] = &[
    "step",
    "loss",
    "val_loss",
    "lr",
    "tokens_per_second_per_gpu",
    "tokens_per_second",
    "grad_norm",
    "label_tokens",
    "real_tokens",
    "padded_tokens",
    "bytes_received",
    "seconds",
    "peak_rss_mb",
    "peak_memory_active",
    "peak_memory_alloc",
    "peak_memory_reserved",
];

impl StepMetrics {
    pub fn push(&mut self, key: &str, value: f64) {
        self.0.push((key.to_owned(), value));
    }

    /// torchtune's line, its blank at the end included.
    fn text(&self, step: usize) -> String {
        let pairs: String = self.0.iter().map(|(key, value)| format!("{key}:{value} ")).collect();
        format!("Step {step} | {pairs}\n")
    }

    fn json(&self, step: usize) -> String {
        let mut map = Map::from_iter([("step".to_owned(), Value::from(step))]);
        map.extend(self.0.iter().map(|(key, value)| ((*key).to_owned(), Value::from(*value))));
        format!("{}\n", Value::Object(map))
    }
}

/// Where the figures go.
pub struct Recorder(Sink);

enum Sink {
    Stdout,
    /// Standard output, once its reader has gone.
    Nowhere,
    Disk {
        file: File,
        path: PathBuf,
        format: DiskFormat,
    },
    TensorBoard(EventFile),
}

impl Recorder {
    pub fn open(plan: &MetricsPlan) -> Result<Self> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let (log_dir, format, filename) = match &plan.sink {
            MetricSink::Stdout => return Ok(Self(Sink::Stdout)),
            MetricSink::TensorBoard { log_dir, organize_logs } => {
                let folder = if *organize_logs { log_dir.join(format!("run_0_{seconds}")) } else { log_dir.clone() };
                let events = EventFile::create(&folder)?;
                tracing::info!("Writing logs to {}", events.path().display());
                return Ok(Self(Sink::TensorBoard(events)));
            }
            MetricSink::Disk { log_dir, format, filename } => (log_dir, format, filename),
        };
        std::fs::create_dir_all(log_dir).path_context("create", log_dir)?;
        let ending = if *format == DiskFormat::Jsonl { "jsonl" } else { "txt" };
        let path = log_dir.join(filename.clone().unwrap_or_else(|| format!("log_{seconds}.{ending}")));
        // Appending: a resumed run that names its file goes on in it.
        let file = File::options().read(true).create(true).append(true).open(&path).path_context("create", &path)?;
        end_torn_line(&file).path_context("write", &path)?;
        tracing::info!("Writing logs to {}", path.display());
        Ok(Self(Sink::Disk { file, path, format: *format }))
    }

    /// Writes a line. A reader that leaves (`host run … | head`) ends the lines, not the run.
    pub fn record(&mut self, step: usize, metrics: &StepMetrics) -> Result<()> {
        match &mut self.0 {
            Sink::Nowhere => Ok(()),
            Sink::Stdout => match std::io::stdout().lock().write_all(metrics.text(step).as_bytes()) {
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                    self.0 = Sink::Nowhere;
                    tracing::warn!("nobody reads standard output any more: training goes on without its lines");
                    Ok(())
                }
                written => written.map_err(|error| Error::run("cannot write to standard output").cause(error)),
            },
            Sink::TensorBoard(events) => events.scalars(step, &metrics.0),
            Sink::Disk { file, path, format } => {
                let line = if *format == DiskFormat::Jsonl { metrics.json(step) } else { metrics.text(step) };
                file.write_all(line.as_bytes()).path_context("write", path.as_path())
            }
        }
    }
}

/// A run that was killed, or whose disk was full, may have left the beginning of a line of its log: it goes. What else
/// a file ends with stays, as a line of its own.
fn end_torn_line(mut file: &File) -> std::io::Result<()> {
    let mut bytes = vec![];
    file.read_to_end(&mut bytes)?;
    let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    let rest = &bytes[end..];
    let is_ours = |start: &[u8]| rest.starts_with(start) || start.starts_with(rest);
    match rest {
        [] => Ok(()),
        _ if is_ours(b"{\"step\":") || is_ours(b"Step ") => file.set_len(end as u64),
        _ => file.write_all(b"\n"),
    }
}

/// The bar of one epoch, in torchtune's form: `epoch|step|Loss: x`. Where there is no terminal, a plain line a step.
pub struct Progress {
    bar: ProgressBar,
    plain: bool,
}

impl Progress {
    pub fn epoch(total: usize, done: usize) -> Self {
        let plain = !std::io::stderr().is_terminal();
        let bar = if plain { ProgressBar::hidden() } else { ProgressBar::new(total as u64) };
        let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} [{elapsed}<{eta}, {per_sec}]");
        bar.set_style(style.expect("the template is a constant"));
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        Self { bar, plain }
    }

    pub fn step(&self, epoch: usize, step: usize, loss: f64, took: Duration) {
        let message = format!("{}|{step}|Loss: {loss}", epoch + 1);
        self.bar.inc(1);
        if self.plain {
            let (position, length) = (self.bar.position(), self.bar.length().unwrap_or_default());
            talk(&format!("{message} {position}/{length} [{:.2}s/it]", took.as_secs_f64()));
        }
        self.bar.set_message(message);
    }

    pub fn finish(&self) {
        self.bar.finish();
    }
}

/// Prints `line`, above the bar where there is one.
pub fn say(progress: Option<&Progress>, line: &str) {
    match progress {
        Some(Progress { bar, plain: false }) => bar.println(line),
        _ => talk(line),
    }
}

fn talk(line: &str) {
    // There is nowhere left to say that stderr is closed.
    let _ = std::io::stderr().lock().write_all(format!("{line}\n").as_bytes());
}

/// Most memory this process has held, in MiB.
pub fn peak_rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// torchtune 0.6.1: `msg = f"Step {step} | "`, then `msg += f"{name}:{data} "` for each.
    #[test]
    fn a_line_of_text_is_torchtunes() {
        let mut metrics = StepMetrics::default();
        for (key, value) in [("loss", 2.25), ("lr", 0.0003), ("tokens_per_second_per_gpu", 512.0)] {
            metrics.push(key, value);
        }
        assert_eq!(metrics.text(3), "Step 3 | loss:2.25 lr:0.0003 tokens_per_second_per_gpu:512 \n");
        let json = "{\"step\":3,\"loss\":2.25,\"lr\":0.0003,\"tokens_per_second_per_gpu\":512.0}\n";
        assert_eq!(metrics.json(3), json);
    }
}

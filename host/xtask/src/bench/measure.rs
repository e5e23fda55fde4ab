//! One run of a program, seen from outside: when its steps were reported and how much memory it held.

use std::fmt;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::demo::metric_files;
use crate::shell::{Failure, Result, shown};

/// Where a program reports its steps, one JSON object with `loss` a line.
pub enum StepLog {
    Stdout,
    /// The JSONL files of this folder.
    File(PathBuf),
}

#[derive(Clone, Debug, serde::Serialize)]
pub struct Figures {
    /// Of the steps after the first.
    pub tokens_per_second: f64,
    /// Sum over the process and its children of the most each held, up to the last step.
    pub peak_rss_mb: f64,
    pub seconds_to_first_step: f64,
    pub first_loss: f64,
    pub last_loss: f64,
    /// What the program said besides.
    #[serde(skip)]
    pub stderr: String,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { tokens_per_second, peak_rss_mb, seconds_to_first_step, first_loss, last_loss, .. } = self;
        write!(
            f,
            "{tokens_per_second:.0} tokens/s, {peak_rss_mb:.0} MB, first step after {seconds_to_first_step:.2} s, "
        )?;
        write!(f, "loss {first_loss:.4} to {last_loss:.4}")
    }
}

/// Memory is sampled this often, and a log file looked at.
const INTERVAL: Duration = Duration::from_millis(10);

/// Runs to the end; `step_tokens` are the tokens of each step.
pub fn measure(command: &mut Command, log: &StepLog, step_tokens: &[usize]) -> Result<Figures> {
    let shown = shown(command);
    let failed = |what: &str| Failure::new(format!("`{shown}` {what}"));
    let errors = tempfile_path("bench-stderr");
    let stderr = fs::File::create(&errors).map_err(|error| failed("cannot be logged").cause(error))?;
    let started = Instant::now();
    let child = command.stdout(Stdio::piped()).stderr(stderr).spawn();
    let mut child = child.map_err(|error| failed("cannot be started").cause(error))?;
    let lines = read_lines(&mut child);

    let mut steps: Vec<(Duration, f64)> = vec![];
    let mut peak_rss_mb = 0.0f64;
    let status = loop {
        if steps.len() < step_tokens.len() {
            peak_rss_mb = peak_rss_mb.max(resident_mb(child.id()));
            let losses = match log {
                StepLog::Stdout => lines.try_iter().filter_map(|(at, line)| Some((at, loss(&line)?))).collect(),
                StepLog::File(dir) => {
                    losses_in(dir).into_iter().skip(steps.len()).map(|l| (Instant::now(), l)).collect::<Vec<_>>()
                }
            };
            steps.extend(losses.into_iter().map(|(at, loss)| (at - started, loss)));
        }
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => thread::sleep(INTERVAL),
            Err(error) => return Err(failed("was lost").cause(error)),
        }
    };
    // What came between the last look and the end.
    if steps.len() < step_tokens.len() {
        let rest = lines.iter().filter_map(|(at, line)| Some((at - started, loss(&line)?)));
        steps.extend(rest);
    }
    let stderr = fs::read_to_string(&errors).unwrap_or_default();
    let _ = fs::remove_file(&errors);
    if !status.success() || steps.len() < step_tokens.len() {
        let tail: Vec<_> = stderr.lines().rev().take(12).collect();
        let tail: Vec<_> = tail.into_iter().rev().collect();
        let what = format!("`{shown}` ended ({status}) after {} of {} steps", steps.len(), step_tokens.len());
        return Err(Failure::new(what).cause(tail.join("\n")));
    }
    let (first, last) = (steps[0], steps[step_tokens.len() - 1]);
    let tokens: usize = step_tokens[1..].iter().sum();
    Ok(Figures {
        tokens_per_second: tokens as f64 / (last.0 - first.0).as_secs_f64(),
        peak_rss_mb,
        seconds_to_first_step: first.0.as_secs_f64(),
        first_loss: first.1,
        last_loss: last.1,
        stderr,
    })
}

fn tempfile_path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("{name}-{}", std::process::id()))
}

/// Lines of the child's output with the moment each came, read on a thread so that none waits for our sampling.
fn read_lines(child: &mut Child) -> Receiver<(Instant, String)> {
    let (sender, receiver) = channel();
    if let Some(stdout) = child.stdout.take() {
        thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
                if sender.send((Instant::now(), line)).is_err() {
                    break;
                }
            }
        });
    }
    receiver
}

fn loss(line: &str) -> Option<f64> {
    serde_json::from_str::<serde_json::Value>(line).ok()?["loss"].as_f64()
}

fn losses_in(dir: &std::path::Path) -> Vec<f64> {
    let files = metric_files(dir).unwrap_or_default();
    let text = files.first().and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
    // The last line may be half written; it has no end then.
    text.split_inclusive('\n').filter(|line| line.ends_with('\n')).filter_map(loss).collect()
}

/// Most memory the process and its descendants have held, each on its own, in megabytes.
fn resident_mb(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kilobytes =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    let descendants: f64 = children.split_whitespace().filter_map(|pid| pid.parse().ok()).map(resident_mb).sum();
    kilobytes.unwrap_or(0.0) / 1024.0 + descendants
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_of_the_middle() {
        assert_eq!(median(vec![9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![9.0, 1.0, 2.0, 4.0]), 3.0);
    }

    #[test]
    fn a_run_is_timed_by_its_lines() {
        let script = r#"echo '{"loss": 2.5}'; sleep 0.5; echo talk; echo '{"loss": 1.5}'"#;
        let figures = measure(Command::new("sh").args(["-c", script]), &StepLog::Stdout, &[10, 100]).unwrap();
        assert_eq!((figures.first_loss, figures.last_loss), (2.5, 1.5));
        // 100 tokens in half a second, ten times over: the threads of a busy machine come late.
        assert!(figures.tokens_per_second > 20.0 && figures.tokens_per_second < 2000.0, "{figures}");
        assert!(figures.peak_rss_mb > 0.1);
    }

    #[test]
    fn a_run_that_stops_early_is_a_failure() {
        let script = r#"echo '{"loss": 2.5}'; echo 'out of tea' >&2"#;
        let failure = measure(Command::new("sh").args(["-c", script]), &StepLog::Stdout, &[10, 100]).unwrap_err();
        let failure = failure.to_string();
        assert!(failure.contains("after 1 of 2 steps") && failure.contains("out of tea"), "{failure}");
    }
}

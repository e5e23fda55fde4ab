//! What scripts and files cost: figures that are no race against the peers' training.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use super::DIR;
use super::measure::{Figures, median};
use crate::data::DATA_DIR;
use crate::model::MODEL_DIR;
use crate::peers::Peers;
use crate::shell::{Failure, PathContext, Result, capture, cargo, shown};

#[derive(Debug, serde::Serialize)]
pub struct Costs {
    /// What a recipe keeps of its loop: all that is not the run's own work, its calls' crossings among it.
    pub script_share: BTreeMap<&'static str, f64>,
    /// The same of preferences, one pair a micro-batch.
    pub preference_share: BTreeMap<&'static str, f64>,
    /// Seconds from `host run` to the recipe's first call, compiling it and with it compiled.
    first_call: [f64; 2],
    /// Nanoseconds of what crosses the boundary.
    crossings: Vec<(String, f64)>,
    /// Rows a second on one core, from cells to messages.
    template_rows_per_second: BTreeMap<String, f64>,
    pub data_path: DataPath,
    checkpoint_write: Transfer,
    checkpoint_load: Transfer,
}

/// Rows a second on one core, from a file to packs, at first and from the cache.
#[derive(Debug, serde::Serialize)]
pub struct DataPath {
    host: [f64; 2],
    torchtune: [f64; 2],
}

/// Megabytes a second, ours and of a plain file of as many bytes.
#[derive(Debug, serde::Serialize)]
struct Transfer {
    megabytes: f64,
    ours: f64,
    plain: f64,
}

/// `wasm` are runs with the Wasm recipe; `rhai` ran with the other one and wrote whole checkpoints.
pub fn of(
    root: &Path,
    peers: &Peers,
    wasm: &[Figures],
    rhai: &Figures,
    preferences: &[(&'static str, Figures)],
    first_call: [f64; 2],
) -> Result<Costs> {
    let wasm_share = wasm.iter().map(script_share).collect::<Result<_>>()?;
    let loads = wasm.iter().map(|run| seconds(run, "loaded in ")).collect::<Result<_>>()?;
    Ok(Costs {
        script_share: [("Wasm", median(wasm_share)), ("Rhai", script_share(rhai)?)].into(),
        preference_share: preferences
            .iter()
            .map(|(front, run)| Ok((*front, script_share(run)?)))
            .collect::<Result<_>>()?,
        first_call,
        crossings: crossings(root)?,
        template_rows_per_second: templates(root, peers)?,
        data_path: data_path(root, peers)?,
        checkpoint_write: write(root, rhai)?,
        checkpoint_load: read(&root.join(MODEL_DIR), median(loads))?,
    })
}

/// `the recipe took 0.000123 s of 9.876543 s for itself`, at the end of a run.
fn script_share(run: &Figures) -> Result<f64> {
    let line = said(run, "the recipe took ")?;
    let numbers: Vec<f64> = line.split(' ').filter_map(|word| word.parse().ok()).collect();
    match numbers[..] {
        [own, total] => Ok(own / total),
        _ => Err(Failure::new(format!("`{line}` should hold two times"))),
    }
}

/// `… in 1.23 s`, at the end of the last line that holds `what`.
fn seconds(run: &Figures, what: &str) -> Result<f64> {
    let line = said(run, what)?;
    let time = line.rsplit(" in ").next().unwrap_or_default();
    time.trim_end_matches(" s")
        .parse()
        .map_err(|error| Failure::new(format!("`{line}` should hold a time")).cause(error))
}

fn said<'a>(run: &'a Figures, what: &str) -> Result<&'a str> {
    let line = run.stderr.lines().rfind(|line| line.contains(what));
    line.ok_or_else(|| Failure::new(format!("`host` did not log `{what}…`, which this measurement reads")))
}

/// From `host run` to the recipe's first call, the median of three: with no compiled guest in the cache, and with it.
pub fn first_call(root: &Path, prepare: impl Fn() -> Command) -> Result<[f64; 2]> {
    let cache = root.join(DIR).join("cache");
    let once = |compiled: bool| -> Result<f64> {
        if !compiled {
            let _ = fs::remove_dir_all(cache.join("host/wasm"));
        }
        let mut command = prepare();
        command.env("XDG_CACHE_HOME", &cache).arg("max_steps_per_epoch=1");
        seconds_until(&mut command, "the recipe opens its run")
    };
    // It fills the other caches.
    once(true)?;
    let of = |compiled| (0..3).map(|_| once(compiled)).collect::<Result<Vec<_>>>().map(median);
    Ok([of(false)?, of(true)?])
}

/// From the start of a program to the line of its log that holds `what`; the program is let end.
fn seconds_until(command: &mut Command, what: &str) -> Result<f64> {
    let shown = shown(command);
    let failed = |why: String| Failure::new(format!("`{shown}` did not log `{what}`")).cause(why);
    let started = Instant::now();
    let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
    let mut child = child.map_err(|error| failed(error.to_string()))?;
    let mut at = None;
    let mut said = String::new();
    for line in child.stderr.take().into_iter().flat_map(|stderr| BufReader::new(stderr).lines()).map_while(|l| l.ok())
    {
        if line.contains(what) {
            at.get_or_insert(started.elapsed());
        }
        said = line;
    }
    let status = child.wait().map_err(|error| failed(error.to_string()))?;
    match at {
        Some(at) if status.success() => Ok(at.as_secs_f64()),
        _ => Err(failed(format!("it ended ({status}): {said}"))),
    }
}

/// The lines of a measurement among the tests.
fn measured(root: &Path, name: &str, rows: Option<&Path>) -> Result<String> {
    let mut test = cargo(root);
    test.args("test --release --workspace --quiet --test scripting -- --ignored --nocapture".split(' ')).arg(name);
    test.envs(rows.map(|rows| ("HOST_TEMPLATE_ROWS", rows)));
    capture(&mut test)
}

fn crossings(root: &Path) -> Result<Vec<(String, f64)>> {
    let printed = measured(root, "crossings", None)?;
    // `crossing: a call without work, Wasm: 86 ns`
    let line = |line: &str| {
        let (what, time) = line.split_once("crossing: ")?.1.rsplit_once(": ")?;
        Some((what.to_owned(), time.strip_suffix(" ns")?.parse().ok()?))
    };
    let crossings: Vec<_> = printed.lines().filter_map(line).collect();
    if crossings.is_empty() {
        return Err(Failure::new("no crossing was measured").cause(printed.trim()));
    }
    Ok(crossings)
}

fn templates(root: &Path, peers: &Peers) -> Result<BTreeMap<String, f64>> {
    let rows = format!("{DATA_DIR}/train.jsonl");
    let printed = measured(root, "template_rows", Some(&root.join(&rows)))?;
    // `templates/summarize.wasm: 123456 rows/s of 1137 bytes`
    let ours = printed.lines().filter_map(|line| {
        let (path, rest) = line.split_once(": ")?;
        Some((path.to_owned(), rest.split_once(" rows/s")?.0.parse().ok()?))
    });
    let mut speeds: BTreeMap<_, _> = ours.collect();
    let theirs = capture(peers.torchtune_script(root, "host/xtask/bench/template.py").arg(&rows))?;
    let theirs = theirs.lines().last().and_then(|line| line.trim().parse().ok());
    let (Some(theirs), 3) = (theirs, speeds.len()) else {
        return Err(Failure::new("the templates' speeds were not printed").cause(printed.trim()));
    };
    speeds.insert("torchtune".to_owned(), theirs);
    Ok(speeds)
}

const DATA_ROWS: usize = 50_000;

/// Both take turns on the same rows; the packs they come to must be as many.
fn data_path(root: &Path, peers: &Peers) -> Result<DataPath> {
    let path = root.join(DATA_DIR).join("train.jsonl");
    let text = fs::read_to_string(&path).path_context("read", &path)?;
    let rows = root.join(DIR).join("rows.jsonl");
    let lines: String = text.split_inclusive('\n').cycle().take(DATA_ROWS).collect();
    fs::write(&rows, lines).path_context("write", &rows)?;

    let model = root.join(MODEL_DIR);
    let mut ours = cargo(root);
    ours.args("test --release --workspace --quiet --test scripting -- --ignored --nocapture data_path".split(' '));
    ours.env("HOST_DATA_ROWS", &rows).env("HOST_DATA_MODEL", &model);
    let mut theirs = peers.torchtune_script(root, "host/xtask/bench/data_path.py");
    theirs.arg(&rows).arg(&model);
    let figures = |command: Command| -> Result<[(f64, usize); 2]> {
        let printed = capture(&mut on_one_core(command))?;
        // `packed in SECONDS s: PACKS packs`
        let figures = printed.lines().filter_map(|line| {
            let (_, rest) = line.split_once("packed in ")?;
            let (seconds, packs) = rest.split_once(" s: ")?;
            Some((seconds.parse().ok()?, packs.split(' ').next()?.parse().ok()?))
        });
        figures.collect::<Vec<_>>().try_into().map_err(|_| Failure::new("no packs were made").cause(printed.trim()))
    };
    let (ours, theirs) = (figures(ours)?, figures(theirs)?);
    if ours[0].1 != theirs[0].1 {
        return Err(Failure::new(format!("{} packs of ours, {} of torchtune's", ours[0].1, theirs[0].1)));
    }
    let speed = |of: [(f64, usize); 2]| of.map(|(seconds, _)| DATA_ROWS as f64 / seconds);
    Ok(DataPath { host: speed(ours), torchtune: speed(theirs) })
}

fn on_one_core(command: Command) -> Command {
    let mut bound = Command::new("taskset");
    bound.args(["--cpu-list", "0"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bound.env(name, value),
            None => bound.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        bound.current_dir(dir);
    }
    bound
}

/// The checkpoint that `run` left, against one file of its size, synced like it.
fn write(root: &Path, run: &Figures) -> Result<Transfer> {
    let dir = root.join(DIR).join("host/epoch_0");
    let bytes = size_of(&dir)?;
    let started = Instant::now();
    let path = root.join(DIR).join("plain");
    let chunk = vec![7u8; 8 << 20];
    let write = || {
        let mut file = File::create(&path)?;
        let mut left = bytes as usize;
        while left > 0 {
            let now = left.min(chunk.len());
            file.write_all(&chunk[..now])?;
            left -= now;
        }
        file.sync_all()
    };
    write().path_context("write", &path)?;
    let plain = started.elapsed().as_secs_f64();
    fs::remove_file(&path).path_context("remove", &path)?;
    Ok(Transfer::new(bytes, seconds(run, "saved ")?, plain))
}

/// The base model's weights, against reading their files.
fn read(model: &Path, seconds: f64) -> Result<Transfer> {
    let mut buffer = vec![0u8; 8 << 20];
    let started = Instant::now();
    let mut bytes = 0;
    for entry in fs::read_dir(model).path_context("list", model)?.flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let mut file = File::open(&path).path_context("open", &path)?;
        loop {
            match file.read(&mut buffer).path_context("read", &path)? {
                0 => break,
                read => bytes += read as u64,
            }
        }
    }
    Ok(Transfer::new(bytes, seconds, started.elapsed().as_secs_f64()))
}

fn size_of(dir: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir).path_context("list", dir)?.flatten() {
        let path = entry.path();
        bytes += if path.is_dir() { size_of(&path)? } else { path.metadata().path_context("read", &path)?.len() };
    }
    Ok(bytes)
}

impl DataPath {
    /// How many times torchtune's speed ours is.
    pub fn ratios(&self) -> [f64; 2] {
        [0, 1].map(|pass| self.host[pass] / self.torchtune[pass])
    }
}

impl fmt::Display for DataPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([cold, cached], [their_cold, their_cached]) = (self.host, self.torchtune);
        write!(
            f,
            "file to packs: {cold:.0} rows/s, again {cached:.0}; torchtune {their_cold:.0}, again {their_cached:.0}"
        )
    }
}

impl Transfer {
    fn new(bytes: u64, ours: f64, plain: f64) -> Self {
        let megabytes = bytes as f64 / 1e6;
        Self { megabytes, ours: megabytes / ours, plain: megabytes / plain }
    }
}

impl fmt::Display for Transfer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { megabytes, ours, plain } = self;
        write!(f, "{megabytes:.0} MB at {ours:.0} MB/s, a plain file {plain:.0} MB/s: {:.2}", ours / plain)
    }
}

impl fmt::Display for Costs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let theirs = self.template_rows_per_second["torchtune"];
        let [compiling, compiled] = self.first_call;
        writeln!(
            f,
            "`host run` to the recipe's first call: {compiling:.2} s compiling it, {compiled:.2} s with it compiled"
        )?;
        for (what, nanoseconds) in &self.crossings {
            writeln!(f, "{what}: {nanoseconds:.0} ns")?;
        }
        for (name, speed) in &self.template_rows_per_second {
            writeln!(f, "template {name}: {speed:.0} rows/s, {:.2}x torchtune's", speed / theirs)?;
        }
        writeln!(f, "{}", self.data_path)?;
        writeln!(f, "checkpoint written: {}", self.checkpoint_write)?;
        write!(f, "model loaded: {}", self.checkpoint_load)
    }
}

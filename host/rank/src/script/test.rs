//! `host test`: what a guest makes of rows whose outcome its author wrote down, and how much of each limit that took.
//!
//! A loss is held to what every run asks of it besides: its sum has a gradient, and sum and weight add up over the halves of
//! a batch. A recipe takes the steps of [`host::kit::tiny`], by the path of every run.

use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use host::config::metadata::Metadata;
use host::config::plan::{ChatStyle, GuestLimits, GuestRef, TestPlan};
use host::data::messages::turns_of;
use host::data::template::{Cell, MESSAGES, Message, Outcome, Role, Row, RowTemplate};
use host::error::IoContext;
use host::kit::tiny;
use host::worker::{StopFlag, WorkerEnv};
use host::{Error, Result};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::check::world_of;
use super::guest::{self, World};
use super::limits::PEAKS;
use super::{open_loss, open_template};
use crate::train::Loss;

/// How far numbers may be from those that were written down, of their size or of 1.
const TOLERANCE: f64 = 1e-5;

/// Tests a guest and prints what came of it.
pub fn test(plan: &TestPlan, env: &WorkerEnv, stop: StopFlag) -> Result<()> {
    let path = &plan.guest;
    let bytes = guest::bytes_of(path, "guest", &limits())?;
    let world = world_of(&bytes).unwrap_or(World::Recipe);
    let is_script = !bytes.starts_with(b"\0asm");
    let metadata = host::guest::metadata_of(path, &bytes)?;
    // Also of a recipe, whose own errors come later.
    guest::of_bytes(path, bytes, world)?;
    if world != World::Recipe && !plan.overrides.is_empty() {
        return Err(Error::config(format!("a {} is tested without a config", world.noun()))
            .hint("leave the overrides out; a guest has its settings in `tests/rows.jsonl`"));
    }
    let said = match world {
        World::Template => test_template(plan, &metadata)?,
        World::Loss => test_loss(plan, &metadata)?,
        World::Recipe => test_recipe(plan, env, stop)?,
    };
    let uses = uses(world, is_script);
    let text = if plan.json {
        let limits: Map<_, _> =
            uses.iter().map(|(name, used, limit, _)| ((*name).into(), json!({"peak": used, "limit": limit}))).collect();
        json!({"file": path, "kind": world.noun(), "passed": said, "limits": limits}).to_string()
    } else {
        let head = format!("{}: a {}", path.display(), world.noun());
        let passed = said.iter().map(|line| format!("\nok         {line}"));
        let uses = uses.iter().enumerate().map(|(index, (name, used, limit, unit))| {
            // Operations are looked at once in so many.
            let used = if *name == "operations" && *used == 0.0 { "under 64".to_owned() } else { used.to_string() };
            format!("\n{:<10} {name}: {used} of {limit}{unit}", if index == 0 { "used" } else { "" })
        });
        head + passed.chain(uses).collect::<String>().as_str()
    };
    host::cli::ui::out(&text)
}

/// The limits that count for a guest: the most it used, what it may use, and in what.
fn uses(world: World, is_script: bool) -> Vec<(&'static str, f64, f64, &'static str)> {
    let limits = limits();
    let peak = |used: &std::sync::atomic::AtomicU64| used.load(Relaxed) as f64;
    let mib = |used: &std::sync::atomic::AtomicU64| (peak(used) / f64::from(1 << 20) * 10.0).ceil() / 10.0;
    let mut uses = vec![];
    match is_script {
        true => uses.push(("operations", peak(&PEAKS.operations), limits.operations as f64, "")),
        false => uses.push(("memory", mib(&PEAKS.memory), limits.memory_mb as f64, " MiB")),
    }
    if world != World::Template {
        uses.push(("tensors", mib(&PEAKS.tensors), limits.tensors_mb as f64, " MiB"));
        uses.push(("handles", peak(&PEAKS.handles), limits.handles as f64, ""));
    }
    uses.push(("time", (peak(&PEAKS.micros) / 1e3).ceil() / 1e3, limits.seconds, " s"));
    uses
}

// ---- Rows

/// A config's own, but for the size of the file: a guest may bring its language along.
fn limits() -> GuestLimits {
    GuestLimits { guest_mb: 256, ..GuestLimits::default() }
}

/// A line of the author's file.
struct Line {
    number: usize,
    row: Map<String, Value>,
}

fn read_rows(plan: &TestPlan, world: World) -> Result<(&Path, Vec<Line>)> {
    let noun = world.noun();
    let none = |what: String| {
        Err(Error::config(what).hint("`host test --help` shows what a row is; `--accept` fills in what comes of it"))
    };
    let Some(path) = &plan.rows else {
        return none(format!(
            "the {noun} `{}` has no rows to test it with: no `tests/rows.jsonl`",
            plan.guest.display()
        ));
    };
    let text = std::fs::read_to_string(path).path_context("read", path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let rows = lines.map(|(index, line)| match serde_json::from_str(line) {
        Ok(row) => Ok(Line { number: index + 1, row }),
        Err(error) => Err(Error::config("a row is not an object of JSON")
            .at(path, Some(index + 1), Some(error.column()))
            // Its own line counts within the row's.
            .cause(error.to_string().split(" at line ").next().unwrap_or_default())),
    });
    let rows: Vec<Line> = rows.collect::<Result<_>>()?;
    if rows.is_empty() {
        return none(format!("`{}` has no rows", path.display()));
    }
    Ok((path, rows))
}

/// Writes rows as they are now, whole or not at all.
fn write_rows(path: &Path, rows: &[Line]) -> Result<()> {
    let text: String = rows.iter().map(|line| Value::Object(line.row.clone()).to_string() + "\n").collect();
    let temporary = path.with_extension("jsonl.new");
    std::fs::write(&temporary, text).path_context("write", &temporary)?;
    std::fs::rename(&temporary, path).path_context("write", path)
}

/// What a file of rows comes to: each mistake at its line, or what to say of it.
fn ended(plan: &TestPlan, path: &Path, rows: &[Line], mistakes: Vec<Error>, also: Option<&str>) -> Result<Vec<String>> {
    if let Some(error) = Error::all(mistakes) {
        return Err(error);
    }
    let count = rows.len();
    let rows_are = if count == 1 { "1 row is".to_owned() } else { format!("{count} rows are") };
    let shown = path.display();
    if plan.accept {
        write_rows(path, rows)?;
        return Ok(vec![format!("{rows_are} written to `{shown}`")]);
    }
    Ok(std::iter::once(format!("{rows_are} as `{shown}` says")).chain(also.map(str::to_owned)).collect())
}

// ---- Templates

fn test_template(plan: &TestPlan, metadata: &Metadata) -> Result<Vec<String>> {
    let (path, mut rows) = read_rows(plan, World::Template)?;
    let mut offered: Vec<String> = vec![];
    for line in &rows {
        let columns = line.row.get("row").and_then(Value::as_object);
        let columns = columns.ok_or_else(|| bad_row(path, line, "`row` is not an object of columns"))?;
        for column in columns.keys().filter(|column| *column != MESSAGES) {
            if !offered.contains(column) {
                offered.push(column.clone());
            }
        }
    }
    // As in a run: a row of other columns is no conversation before a template has made one of it.
    if offered.iter().all(|column| column == "input" || column == "output") {
        offered.push(MESSAGES.to_owned());
    }
    let mut mistakes = vec![];
    // The template of the row before, its columns and its settings.
    let mut opened: Option<Configured> = None;
    for (index, line) in rows.iter_mut().enumerate() {
        let settings = settings(path, line, metadata)?;
        let same = opened.take_if(|(.., before)| *before == settings);
        let (template, columns, _) = opened.insert(match same {
            Some(same) => same,
            None => open_configured(plan, path, &offered, settings)?,
        });
        let cells = columns.iter().map(|column| cell(path, line, column)).collect::<Result<_>>()?;
        let begun = Instant::now();
        let outcomes = template.render(vec![Row { id: index as u64, cells }]);
        PEAKS.raise_time(begun.elapsed());
        let outcome = outcomes.map_err(|error| error.at(path, Some(line.number), None))?.into_iter().next();
        let outcome = outcome.ok_or_else(|| Error::run("the template gave nothing for a row"))?;
        let mut row: Map<_, _> = ["row", "settings"]
            .into_iter()
            .filter_map(|name| Some((name.to_owned(), line.row.get(name)?.clone())))
            .collect();
        row.extend(as_json(outcome));
        if plan.accept {
            line.row = row;
        } else if line.row != row {
            mistakes.push(difference(path, line, &row));
        }
    }
    ended(plan, path, &rows, mistakes, None)
}

type Configured = (Box<dyn RowTemplate>, Vec<String>, Value);

fn open_configured(plan: &TestPlan, path: &Path, offered: &[String], settings: Value) -> Result<Configured> {
    let guest = GuestRef { path: plan.guest.clone(), settings: settings.clone() };
    let mut template = open_template(&guest, &limits())?.open()?;
    let columns = template.configure(offered)?;
    if let Some(unknown) = columns.iter().find(|column| !offered.contains(column)) {
        let what = format!("the template `{}` wants a column `{unknown}`, which no row has", plan.guest.display());
        return Err(Error::config(what).at_file(path).cause(format!("there is {}", host::error::quoted(offered))));
    }
    Ok((template, columns, settings))
}

fn bad_row(path: &Path, line: &Line, what: &str) -> Error {
    Error::config(what).at(path, Some(line.number), None).hint("`host test --help` shows what a row is")
}

/// What a template is given of a row.
fn cell(path: &Path, line: &Line, column: &str) -> Result<Cell> {
    let row = &line.row["row"];
    if column != MESSAGES {
        return match row.get(column) {
            None | Some(Value::Null) => Ok(Cell::None),
            Some(Value::String(text)) => Ok(Cell::Text(text.clone())),
            Some(_) => Err(bad_row(path, line, &format!("the column `{column}` is not a text"))),
        };
    }
    if let Some(turns) = row.get(MESSAGES) {
        let wrong = "`messages` of a row is no list of `{\"role\": \"user\", \"content\": \"…\"}`";
        return turns_of(turns, ChatStyle::OpenAi)
            .map(Cell::Messages)
            .map_err(|why| bad_row(path, line, wrong).cause(why));
    }
    let said = [("input", Role::User), ("output", Role::Assistant)].into_iter();
    let said = said.filter_map(|(column, role)| Some(Message::of(role, row.get(column)?.as_str()?)));
    Ok(Cell::Messages(said.collect()))
}

fn as_json(outcome: Outcome) -> Map<String, Value> {
    let message = |message: Message| {
        let mut object = json!({"role": message.role, "parts": message.parts});
        if !message.calls.is_empty() {
            object["calls"] = message.calls.into();
        }
        if let Some(train) = message.train {
            object["train"] = train.into();
        }
        object
    };
    let list = |messages: Vec<Message>| -> Value { messages.into_iter().map(message).collect() };
    let (name, value) = match outcome {
        Outcome::Keep(messages) => (MESSAGES, list(messages)),
        Outcome::Pair([chosen, rejected]) => {
            let sides = [("chosen", list(chosen)), ("rejected", list(rejected))];
            return sides.map(|(name, value)| (name.to_owned(), value)).into_iter().collect();
        }
        Outcome::Skip(reason) => ("skip", Value::from(reason)),
        Outcome::Fail(reason) => ("fail", Value::from(reason)),
    };
    Map::from_iter([(name.to_owned(), value)])
}

/// A row that became something else than was written down, message by message.
fn difference(path: &Path, line: &Line, got: &Map<String, Value>) -> Error {
    let mut error = Error::run("a row becomes something else than is written down").at(path, Some(line.number), None);
    let items = |row: &Map<String, Value>| -> Vec<String> {
        let rest = row.iter().filter(|(name, _)| !["row", "settings"].contains(&name.as_str()));
        rest.flat_map(|(name, value)| match value {
            Value::Array(items) => items.iter().map(Value::to_string).collect(),
            other => vec![format!("{name}: {other}")],
        })
        .collect()
    };
    let (expected, got) = (items(&line.row), items(got));
    for index in 0..expected.len().max(got.len()) {
        let (expected, got) = (expected.get(index), got.get(index));
        if expected != got {
            let shown = |item: Option<&String>| item.map_or("nothing", String::as_str).to_owned();
            error = error.cause(format!("expected {}", shown(expected))).cause(format!("got      {}", shown(got)));
        }
    }
    error.hint("`--accept` writes down what comes of it")
}

// ---- Losses

fn test_loss(plan: &TestPlan, metadata: &Metadata) -> Result<Vec<String>> {
    let (path, mut rows) = read_rows(plan, World::Loss)?;
    let (mut mistakes, mut halved) = (vec![], false);
    for line in &mut rows {
        let (logits, labels) = scores(path, line)?;
        let settings = settings(path, line, metadata)?;
        let guest = GuestRef { path: plan.guest.clone(), settings };
        let mut loss = open_loss(&guest, &limits())?;
        let at = |error: Error| error.at(path, Some(line.number), None);
        let mut compute = |from: i64, length: i64| {
            one(loss.as_mut(), &logits.narrow(0, from, length), &labels.narrow(0, from, length)).map_err(at)
        };
        let length = labels.size()[0];
        let whole = compute(0, length)?;
        let Computed { sum, weight, .. } = whole;
        if length > 1 {
            halved = true;
            let (first, second) = (compute(0, length / 2)?, compute(length / 2, length - length / 2)?);
            let (sums, weights) = (first.sum + second.sum, first.weight + second.weight);
            if !is_near(sums, sum) || !is_near(weights, weight) {
                let what = "the loss depends on how labels are spread over batches";
                mistakes.push(
                    at(Error::run(what))
                        .cause(format!("whole: sum {sum}, weight {weight}; in halves: sum {sums}, weight {weights}"))
                        .hint("give back a sum over the labels and their number, not a mean"),
                );
            }
        }
        if !has_gradient(&logits, &whole.tensor) {
            mistakes.push(
                at(Error::run("the loss has a gradient that is no number"))
                    .hint("look for a division by 0, a logarithm or a square root of 0"),
            );
        }
        if plan.accept {
            line.row.insert("sum".into(), json!(sum));
            line.row.insert("weight".into(), json!(weight));
            continue;
        }
        let expected = |name: &str| line.row.get(name).and_then(Value::as_f64);
        match (expected("sum"), expected("weight")) {
            (Some(a), Some(b)) if is_near(sum, a) && is_near(weight, b) => {}
            (Some(a), Some(b)) => mistakes.push(
                at(Error::run("a loss comes to something else than is written down"))
                    .cause(format!("expected sum {a}, weight {b}"))
                    .cause(format!("got      sum {sum}, weight {weight}"))
                    .hint("`--accept` writes down what comes of it"),
            ),
            _ => mistakes.push(
                at(Error::config("a row says nothing of `sum` and `weight`"))
                    .cause(format!("got sum {sum}, weight {weight}"))
                    .hint("`--accept` writes them down"),
            ),
        }
    }
    if !halved {
        mistakes.push(
            Error::config("no row has two labels, so nothing can be spread over batches").at_file(path).hint("add one"),
        );
    }
    ended(
        plan,
        path,
        &rows,
        mistakes,
        Some("gradients are numbers; sums and weights add up over the halves of a batch"),
    )
}

/// What a loss came to.
struct Computed {
    sum: f64,
    weight: f64,
    /// The sum, with its gradient.
    tensor: Tensor,
}

fn one(loss: &mut dyn Loss, logits: &Tensor, labels: &Tensor) -> Result<Computed> {
    let begun = Instant::now();
    let outcome = loss.compute(logits, labels);
    PEAKS.raise_time(begun.elapsed());
    let (tensor, weight) = outcome?;
    Ok(Computed { sum: tensor.double_value(&[]), weight, tensor })
}

/// Whether the gradient of a loss is one of numbers; a loss that weighs nothing need not have one.
fn has_gradient(logits: &Tensor, sum: &Tensor) -> bool {
    if !sum.requires_grad() {
        return true;
    }
    sum.backward();
    let gradient = logits.grad();
    gradient.defined() && gradient.isfinite().all().int64_value(&[]) == 1
}

fn is_near(a: f64, b: f64) -> bool {
    (a - b).abs() <= TOLERANCE * b.abs().max(1.0)
}

/// The scores `[L, vocabulary]`, with gradient, and the labels `[L]` of a row.
fn scores(path: &Path, line: &Line) -> Result<(Tensor, Tensor)> {
    let numbers = |list: &Value| list.as_array().map(|list| list.iter().map(Value::as_f64).collect::<Option<Vec<_>>>());
    let logits = line.row.get("logits").and_then(Value::as_array);
    let logits = logits.and_then(|rows| rows.iter().map(|row| numbers(row).flatten()).collect::<Option<Vec<_>>>());
    let width = logits.as_ref().and_then(|rows| rows.first()).map_or(0, Vec::len);
    let logits = logits.filter(|rows| width > 0 && rows.iter().all(|row| row.len() == width));
    let logits =
        logits.ok_or_else(|| bad_row(path, line, "`logits` is not a list of lists of numbers, all as long"))?;
    let labels = line.row.get("labels").and_then(Value::as_array);
    let labels = labels.and_then(|labels| labels.iter().map(Value::as_i64).collect::<Option<Vec<_>>>());
    let is_label = |label: &i64| (0..width as i64).contains(label);
    let labels = labels.filter(|labels| labels.len() == logits.len() && labels.iter().all(is_label));
    let labels =
        labels.ok_or_else(|| bad_row(path, line, "`labels` is not a list of tokens, one for each list of `logits`"))?;
    let shape = [logits.len() as i64, width as i64];
    let logits = Tensor::from_slice(&logits.concat()).to_kind(Kind::Float).view(shape).to_device(Device::Cpu);
    Ok((logits.set_requires_grad(true), Tensor::from_slice(&labels)))
}

/// The settings of a row as a run would give them: every key of the guest, by default where the row says nothing.
fn settings(path: &Path, line: &Line, metadata: &Metadata) -> Result<Value> {
    let given = match line.row.get("settings") {
        None => Map::new(),
        Some(Value::Object(given)) => given.clone(),
        Some(_) => return Err(bad_row(path, line, "`settings` is not an object")),
    };
    metadata.settings(&given).map_err(|error| error.at(path, Some(line.number), None))
}

// ---- Recipes

fn test_recipe(plan: &TestPlan, env: &WorkerEnv, stop: StopFlag) -> Result<Vec<String>> {
    let run = tiny::plan(&plan.guest, &plan.scratch, &plan.overrides)?;
    super::train(run, env, stop)?;
    let log = plan.scratch.join(tiny::LOG);
    let text = std::fs::read_to_string(&log).path_context("read", &log)?;
    let losses: Vec<f64> =
        text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()?.get("loss")?.as_f64()).collect();
    if losses.len() != tiny::STEPS {
        let (taken, wanted) = (losses.len(), tiny::STEPS);
        return Err(Error::run(format!("the recipe took {taken} steps of {wanted}")).at_file(&plan.guest));
    }
    let losses = losses.iter().map(|loss| format!("{loss:.4}")).collect::<Vec<_>>().join(", ");
    Ok(vec![format!("{} steps of a tiny model; losses {losses}", tiny::STEPS)])
}

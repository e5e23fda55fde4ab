//! A data set, from its plan to samples: files, split, template, tokens, cache.
//!
//! Batches of rows go to worker threads, each with a template of its own; results come back in row order, so the samples
//! and the first error reported do not depend on the number of threads. Ranks of one machine that start together share
//! the cache: the first one builds it, the others wait and read.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use crate::config::limits::SCRIPT_STACK;
use crate::config::plan::{DatasetPlan, OnBadRow, RowsPlan, TokenizerPlan};
use crate::data::cache::{self, Cache};
use crate::data::encode::{Encoded, Encoder};
use crate::data::messages::Conversations;
use crate::data::samples::{Report, SHOWN_BAD_ROWS, Samples, Tokenized};
use crate::data::source::{Place, Rows, SourceCell, SourceFile, SourceRow, Wanted};
use crate::data::split;
use crate::data::template::{Outcome, Templates};
use crate::error::{Error, Result};
use crate::tokenizer::{Tokenizer, unmarked};

/// Rows that go through a template in one call.
pub const BATCH_ROWS: usize = 256;

/// Data sets, the rows of one after those of the other, each with its templates.
pub fn prepare(
    plans: &[DatasetPlan],
    tokenizer_plan: &TokenizerPlan,
    tokenizer: &Tokenizer,
    templates: &[Templates],
) -> Result<Tokenized> {
    let each = plans.iter().zip(templates).map(|(plan, templates)| one(plan, tokenizer_plan, tokenizer, templates));
    let parts = each.collect::<Result<Vec<_>>>()?;
    Tokenized::concatenated(parts).ok_or_else(|| Error::bug("a run without a data set"))
}

/// A row's sample, or the two of a pair; none where the template leaves the row out; or why the row is bad.
pub type Made = Result<Option<Vec<Encoded>>, String>;

/// What becomes of the first `count` rows of a data set, and where each stands. Nothing is cached.
pub fn preview(
    plan: &DatasetPlan,
    tokenizer_plan: &TokenizerPlan,
    tokenizer: &Tokenizer,
    templates: &Templates,
    count: usize,
) -> Result<Vec<(Place, Made)>> {
    check_length(tokenizer_plan.max_seq_len)?;
    let encoder = Encoder { tokenizer, max_seq_len: tokenizer_plan.max_seq_len, train_on_input: plan.train_on_input };
    let mut rows = Rows::new(select_pieces(plan)?, Wanted::of(&plan.rows));
    Worker::open(plan, encoder, templates)?.outcomes(0, rows.take(count)?)
}

fn check_length(max_seq_len: Option<usize>) -> Result<()> {
    if max_seq_len.is_some_and(|limit| limit < 2) {
        return Err(Error::config("`tokenizer.max_seq_len` is below 2, which leaves nothing to learn"));
    }
    Ok(())
}

/// Reads, templates and tokenises a data set, or takes it from the cache. What takes long shows a bar on stderr.
fn one(
    plan: &DatasetPlan,
    tokenizer_plan: &TokenizerPlan,
    tokenizer: &Tokenizer,
    templates: &Templates,
) -> Result<Tokenized> {
    let max_seq_len = tokenizer_plan.max_seq_len;
    let encoder = Encoder { tokenizer, max_seq_len, train_on_input: plan.train_on_input };
    check_length(max_seq_len)?;
    let pieces = select_pieces(plan)?;
    let cache = Cache::new(&plan.cache_dir, &cache_key(plan, &pieces, &encoder, templates));
    // Held to the end: whoever waits here finds the file written.
    let lock = cache.lock();
    let tokenized = match cache.load() {
        Some(tokenized) => tokenized,
        None => {
            let tokenized = tokenize(plan, pieces, encoder, templates, &mut progress_bar(&plan.split))?;
            check(plan, &tokenized)?;
            if let Err(error) = cache.store(&tokenized) {
                tracing::warn!("the tokenised rows are not cached; the next start tokenises again\n{error}");
            }
            tokenized
        }
    };
    drop(lock);
    // Packing is a pass over the lengths: quicker than to read it from a file.
    Ok(match &plan.packing {
        Some(packing) => tokenized.packed(packing),
        None if matches!(plan.rows, RowsPlan::Pairs { .. }) => tokenized.paired(),
        None => tokenized,
    })
}

/// Scans the files of the splits that are asked for, and says which rows of which file are taken.
pub(super) fn select_pieces(plan: &DatasetPlan) -> Result<Vec<(SourceFile, std::ops::Range<u64>)>> {
    let slices = split::parse(&plan.split)?;
    let needed = Wanted::of(&plan.rows);
    let mut splits: Vec<(String, u64)> = vec![];
    let mut files: Vec<(&str, SourceFile)> = vec![];
    for file in &plan.files {
        if !splits.iter().any(|(name, _)| *name == file.split) {
            splits.push((file.split.clone(), 0));
        }
        // A split that is not asked for need not even be readable.
        if slices.iter().any(|slice| slice.split == file.split) {
            let source = SourceFile::scan(&file.path, &plan.format)?;
            source.require(&needed)?;
            files.push((&file.split, source));
        }
    }
    for (name, num_rows) in &mut splits {
        let of_split = || files.iter().filter(|(split, _)| split == name);
        *num_rows = of_split().map(|(_, file)| file.num_rows).sum();
        if *num_rows == 0 && of_split().next().is_some() {
            let error = Error::config(format!("the data set has no rows in split `{name}`"));
            let empty = plan.files.iter().filter(|file| file.split == *name);
            return Err(empty.fold(error, |error, file| error.at_file(&file.path)));
        }
    }
    let mut pieces = vec![];
    for (name, rows) in split::select(&plan.split, &slices, &splits)? {
        let mut start = 0;
        for (_, file) in files.iter().filter(|(split, _)| *split == name) {
            let end = start + file.num_rows;
            let (from, to) = (rows.start.max(start), rows.end.min(end));
            if from < to {
                pieces.push((file.clone(), from - start..to - start));
            }
            start = end;
        }
    }
    Ok(pieces)
}

fn cache_key(
    plan: &DatasetPlan,
    pieces: &[(SourceFile, std::ops::Range<u64>)],
    encoder: &Encoder,
    templates: &Templates,
) -> String {
    // Without `..`, so that a new key of the section has to be thought of here.
    let DatasetPlan {
        files: _,
        format,
        hub: _,
        split: _,
        rows,
        new_system_prompt,
        train_on_input,
        on_bad_row,
        packing: _,
        cache_dir: _,
    } = plan;
    let read: Vec<_> = pieces.iter().map(|(file, range)| (&file.digest, range)).collect();
    // A template's file may lie anywhere; its content is what counts.
    let rows = match rows {
        RowsPlan::Columns { columns, template } => {
            format!("{columns:?} {}", template.as_ref().is_some_and(|t| t.joined))
        }
        RowsPlan::Chat { column, style, template } => {
            format!("{column} {style:?} {}", template.as_ref().is_some_and(|t| t.joined))
        }
        RowsPlan::Pairs { prompt, chosen, rejected, template } => {
            format!("{prompt:?} {chosen} {rejected} {}", template.is_some())
        }
        RowsPlan::Text { .. } => format!("{rows:?}"),
    };
    cache::key(&[
        &format!("{format:?} {read:?}"),
        &format!("{rows} {new_system_prompt:?} {train_on_input} {on_bad_row:?}"),
        &templates.digest(),
        encoder.tokenizer.digest(),
        &format!("{:?}", encoder.max_seq_len),
    ])
}

fn check(plan: &DatasetPlan, tokenized: &Tokenized) -> Result<()> {
    let report = &tokenized.report;
    let nothing = |why: &str| {
        let error = Error::config(format!("split `{}` of the data set has nothing to learn from: {why}", plan.split));
        report.first_bad_rows.iter().fold(error, |error, row| error.cause(row))
    };
    if tokenized.is_empty() {
        let Report { bad_rows, left_out, .. } = report;
        return Err(nothing(&format!("{bad_rows} bad rows skipped, {left_out} left out by the template, none kept")));
    }
    if report.without_labels == tokenized.len() as u64 {
        return Err(nothing("no sample has a token that carries loss").hint(
            "raise `tokenizer.max_seq_len` if it cuts the answers away; check what the template marks as answer",
        ));
    }
    Ok(())
}

/// Hands out batches of rows, in order, to whichever thread asks.
struct Feed {
    rows: Rows,
    next_batch: usize,
}

fn tokenize(
    plan: &DatasetPlan,
    pieces: Vec<(SourceFile, std::ops::Range<u64>)>,
    encoder: Encoder,
    templates: &Templates,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Tokenized> {
    let total: u64 = pieces.iter().map(|(_, range)| range.end - range.start).sum();
    let feed = Mutex::new(Feed { rows: Rows::new(pieces, Wanted::of(&plan.rows)), next_batch: 0 });
    let stop = AtomicBool::new(false);
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let num_threads = total.div_ceil(BATCH_ROWS as u64).min(cores);
    let (failed, receiver) = mpsc::channel();

    std::thread::scope(|scope| {
        for _ in 0..num_threads {
            let (sender, feed, stop) = (failed.clone(), &feed, &stop);
            let work = move || {
                let mut worker = match Worker::open(plan, encoder, templates) {
                    Ok(worker) => worker,
                    Err(error) => return sender.send(Err(error)).unwrap_or_default(),
                };
                while !stop.load(Ordering::Relaxed) {
                    let (index, rows) = {
                        let mut feed = feed.lock().unwrap_or_else(PoisonError::into_inner);
                        let index = feed.next_batch;
                        feed.next_batch += 1;
                        (index, feed.rows.take(BATCH_ROWS))
                    };
                    let batch = match rows {
                        Ok(rows) if rows.is_empty() => return,
                        Ok(rows) => worker.batch(index, rows),
                        Err(error) => Err(error),
                    };
                    // Sending fails when the other end has seen an error and left.
                    if sender.send(Ok((index, batch))).is_err() {
                        return;
                    }
                }
            };
            // Templates run on it.
            if let Err(error) = std::thread::Builder::new().stack_size(SCRIPT_STACK).spawn_scoped(scope, work) {
                let error = Error::run("cannot start a thread for the data").cause(error);
                failed.send(Err(error)).unwrap_or_default();
            }
        }
        drop(failed);
        let result = collect(receiver, total, progress);
        stop.store(true, Ordering::Relaxed);
        result
    })
}

/// Puts batches back in order; the first error in row order wins.
fn collect(
    receiver: mpsc::Receiver<Result<(usize, Result<Batch>)>>,
    total: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Tokenized> {
    let (mut samples, mut report, mut done) = (Samples::default(), Report::default(), 0);
    let (mut early, mut next) = (BTreeMap::new(), 0);
    for message in receiver {
        let (index, batch) = message?;
        early.insert(index, batch);
        while let Some(batch) = early.remove(&next) {
            let batch = batch?;
            samples.append(&batch.samples);
            report.add(&batch.report);
            done += batch.num_rows;
            next += 1;
            progress(done, total);
        }
    }
    Ok(Tokenized::new(samples, report))
}

struct Worker<'t> {
    maker: Maker<'t>,
    encoder: Encoder<'t>,
    on_bad_row: OnBadRow,
}

/// What makes samples of rows.
enum Maker<'t> {
    Conversations(Conversations<'t>),
    Texts { add_eos: bool },
}

struct Batch {
    samples: Samples,
    report: Report,
    num_rows: u64,
}

impl<'t> Worker<'t> {
    fn open(plan: &'t DatasetPlan, encoder: Encoder<'t>, templates: &Templates) -> Result<Self> {
        let maker = match plan.rows {
            RowsPlan::Text { add_eos, .. } => Maker::Texts { add_eos },
            _ => Maker::Conversations(Conversations::open(plan, templates)?),
        };
        Ok(Self { maker, encoder, on_bad_row: plan.on_bad_row })
    }

    fn batch(&mut self, index: usize, source_rows: Vec<SourceRow>) -> Result<Batch> {
        let mut batch =
            Batch { samples: Samples::default(), report: Report::default(), num_rows: source_rows.len() as u64 };
        for (place, made) in self.outcomes((index * BATCH_ROWS) as u64, source_rows)? {
            match made {
                Ok(Some(samples)) => samples.iter().for_each(|sample| batch.keep(sample)),
                Ok(None) => batch.report.left_out += 1,
                Err(why) => self.bad_row(&mut batch.report, &place, &why)?,
            }
        }
        Ok(batch)
    }

    /// What became of each row, in order.
    fn outcomes(&mut self, first_id: u64, source_rows: Vec<SourceRow>) -> Result<Vec<(Place, Made)>> {
        let (mut places, mut rows) = (vec![], vec![]);
        for row in source_rows {
            let read = row.cells.map(|cells| rows.push(cells));
            places.push((row.place, read));
        }
        let mut made = self.make(first_id, rows)?.into_iter();
        let outcome = |(place, read): (Place, Result<(), String>)| {
            let mut next = || made.next().unwrap_or_else(|| Err("the template said nothing".to_owned()));
            (place, read.and_then(|()| next()))
        };
        Ok(places.into_iter().map(outcome).collect())
    }

    /// A sample for each row; none where the template leaves the row out; or why the row is bad.
    fn make(&mut self, first_id: u64, mut rows: Vec<Vec<SourceCell>>) -> Result<Vec<Made>> {
        let encoder = &self.encoder;
        rows.iter_mut().flatten().for_each(|cell| cell.mark(encoder.tokenizer.special_tokens()));
        Ok(match &mut self.maker {
            Maker::Texts { add_eos } => {
                let text = |cells: Vec<SourceCell>| match cells.first() {
                    Some(SourceCell::Text(text)) => encoder.text(text, *add_eos).map(|text| Some(vec![text])),
                    _ => Err("the row has no text".to_owned()),
                };
                rows.into_iter().map(text).collect()
            }
            Maker::Conversations(conversations) => {
                let sample = |outcome| match outcome {
                    Outcome::Keep(messages) => encoder.sample(&messages).map(|sample| Some(vec![sample])),
                    Outcome::Pair(sides) => {
                        sides.iter().map(|messages| encoder.sample(messages)).collect::<Result<_, _>>().map(Some)
                    }
                    Outcome::Skip(_) => Ok(None),
                    Outcome::Fail(why) => Err(unmarked(&why)),
                };
                conversations.of(first_id, rows)?.into_iter().map(sample).collect()
            }
        })
    }

    fn bad_row(&self, report: &mut Report, place: &Place, why: &str) -> Result<()> {
        match self.on_bad_row {
            OnBadRow::Error => {
                Err(place.bad_row(why).hint("repair the row, or leave such rows out with `dataset.on_bad_row: skip`"))
            }
            OnBadRow::Skip => {
                report.bad_rows += 1;
                if report.first_bad_rows.len() < SHOWN_BAD_ROWS {
                    report.first_bad_rows.push(format!("{place}: {why}"));
                }
                Ok(())
            }
        }
    }
}

impl Batch {
    fn keep(&mut self, encoded: &Encoded) {
        self.samples.push(&encoded.tokens, &encoded.trained);
        self.report.cut += u64::from(encoded.was_cut);
        let has_labels = self.samples.get(self.samples.len() - 1).has_labels();
        self.report.without_labels += u64::from(!has_labels);
    }
}

/// Rows done and rows in all as a bar on stderr, for work that takes more than two seconds.
fn progress_bar(label: &str) -> impl FnMut(u64, u64) {
    let (start, label) = (Instant::now(), label.to_owned());
    let mut bar: Option<indicatif::ProgressBar> = None;
    move |done, total| {
        if done >= total {
            if let Some(bar) = bar.take() {
                bar.finish_and_clear();
            }
        } else if start.elapsed() > Duration::from_secs(2) {
            let bar = bar.get_or_insert_with(|| {
                let style =
                    indicatif::ProgressStyle::with_template("tokenizing {prefix} {wide_bar} {pos}/{len} rows {eta}");
                let bar = indicatif::ProgressBar::new(total).with_prefix(label.clone());
                bar.with_style(style.unwrap_or_else(|_| indicatif::ProgressStyle::default_bar()))
            });
            bar.set_position(done);
        }
    }
}

//! A data set, from its plan to samples: files, split, template, tokens, cache.
//!
//! Batches of rows go to worker threads, each with a template of its own; results come back in row order, so the samples
//! and the first error reported do not depend on the number of threads. Ranks of one machine that start together share
//! the cache: the first one builds it, the others wait and read.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use crate::config::plan::{DatasetPlan, OnBadRow, TokenizerPlan};
use crate::data::cache::{self, Cache};
use crate::data::encode::Encoder;
use crate::data::samples::{Report, Samples, Tokenized};
use crate::data::source::{Place, Rows, SourceFile, SourceRow};
use crate::data::split;
use crate::data::template::{OpenTemplate, Outcome, Row, RowTemplate};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// Rows that go through a template in one call.
const BATCH_ROWS: usize = 256;
/// How many bad rows are kept for the report.
const SHOWN_BAD_ROWS: usize = 5;

/// Reads, templates and tokenises a data set, or takes it from the cache. What takes long shows a bar on stderr.
pub fn prepare(
    plan: &DatasetPlan,
    tokenizer_plan: &TokenizerPlan,
    tokenizer: &Tokenizer,
    template: &dyn OpenTemplate,
) -> Result<Tokenized> {
    let max_seq_len = tokenizer_plan.max_seq_len;
    let encoder = Encoder { tokenizer, max_seq_len, train_on_input: plan.train_on_input };
    if plan.column_map.is_empty() {
        return Err(Error::config("`dataset.column_map` names no column")
            .hint("map what the template expects to columns of the data, such as {input: document, output: summary}"));
    }
    if max_seq_len.is_some_and(|limit| limit < 2) {
        return Err(Error::config("`tokenizer.max_seq_len` is below 2, which leaves nothing to learn"));
    }
    let pieces = select_pieces(plan)?;
    let cache = Cache::new(&plan.cache_dir, &cache_key(plan, &pieces, &encoder, template));
    // Held to the end: whoever waits here finds the file written.
    let _lock = cache.lock();
    if let Some(tokenized) = cache.load() {
        return Ok(tokenized);
    }
    let tokenized = tokenize(plan, pieces, encoder, template, &mut progress_bar(&plan.split))?;
    check(plan, &tokenized)?;
    if let Err(error) = cache.store(&tokenized) {
        tracing::warn!("the tokenised rows are not cached; the next start tokenises again\n{error}");
    }
    Ok(tokenized)
}

/// Scans the files of the splits that are asked for, and says which rows of which file are taken.
fn select_pieces(plan: &DatasetPlan) -> Result<Vec<(SourceFile, std::ops::Range<u64>)>> {
    let slices = split::parse(&plan.split)?;
    let needed: Vec<String> = plan.column_map.iter().map(|(_, column)| column.clone()).collect();
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
    template: &dyn OpenTemplate,
) -> String {
    // Without `..`, so that a new key of the section has to be thought of here.
    let DatasetPlan {
        files: _,
        format,
        hub: _,
        split: _,
        column_map,
        template: _,
        train_on_input,
        on_bad_row,
        cache_dir: _,
    } = plan;
    let rows: Vec<_> = pieces.iter().map(|(file, range)| (&file.digest, range)).collect();
    cache::key(&[
        &format!("{format:?} {rows:?}"),
        &format!("{column_map:?} {train_on_input} {on_bad_row:?}"),
        &template.digest(),
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
    template: &dyn OpenTemplate,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Tokenized> {
    let total: u64 = pieces.iter().map(|(_, range)| range.end - range.start).sum();
    let (names, columns): (Vec<String>, Vec<String>) = plan.column_map.iter().cloned().unzip();
    let feed = Mutex::new(Feed { rows: Rows::new(pieces, columns), next_batch: 0 });
    let stop = AtomicBool::new(false);
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get() as u64);
    let num_threads = total.div_ceil(BATCH_ROWS as u64).min(cores);
    let (sender, receiver) = mpsc::channel();

    std::thread::scope(|scope| {
        for _ in 0..num_threads {
            let (sender, feed, stop, names) = (sender.clone(), &feed, &stop, &names);
            scope.spawn(move || {
                let worker = || -> Result<Worker> {
                    let mut template = template.open()?;
                    template.configure(names)?;
                    Ok(Worker { template, encoder, on_bad_row: plan.on_bad_row })
                };
                let mut worker = match worker() {
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
            });
        }
        drop(sender);
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
    template: Box<dyn RowTemplate>,
    encoder: Encoder<'t>,
    on_bad_row: OnBadRow,
}

struct Batch {
    samples: Samples,
    report: Report,
    num_rows: u64,
}

impl Worker<'_> {
    fn batch(&mut self, index: usize, source_rows: Vec<SourceRow>) -> Result<Batch> {
        let mut batch =
            Batch { samples: Samples::default(), report: Report::default(), num_rows: source_rows.len() as u64 };
        let first_id = (index * BATCH_ROWS) as u64;
        let (mut places, mut rows) = (vec![], vec![]);
        for (id, row) in (first_id..).zip(source_rows) {
            let cells = row.cells.map(|cells| rows.push(Row { id, cells: cells.into_iter().map(Some).collect() }));
            places.push((row.place, cells));
        }
        let mut outcomes = self.render(&rows)?.into_iter();
        for (place, cells) in places {
            let outcome = match cells {
                Ok(()) => outcomes.next().unwrap_or_else(|| Outcome::Fail("the template said nothing".to_owned())),
                Err(why) => Outcome::Fail(why),
            };
            let bad = match outcome {
                Outcome::Keep(messages) => self.encoder.sample(&messages).map(|encoded| batch.keep(&encoded)).err(),
                Outcome::Skip(_) => {
                    batch.report.left_out += 1;
                    None
                }
                Outcome::Fail(why) => Some(why),
            };
            if let Some(why) = bad {
                self.bad_row(&mut batch.report, &place, &why)?;
            }
        }
        Ok(batch)
    }

    fn render(&mut self, rows: &[Row]) -> Result<Vec<Outcome>> {
        if rows.is_empty() {
            return Ok(vec![]);
        }
        let outcomes = self.template.render(rows)?;
        if outcomes.len() != rows.len() {
            let (got, needed) = (outcomes.len(), rows.len());
            return Err(Error::run(format!("the template gave {got} results for {needed} rows; one each is needed")));
        }
        Ok(outcomes)
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
    fn keep(&mut self, encoded: &crate::data::encode::Encoded) {
        self.samples.push(&encoded.tokens, &encoded.trained);
        self.report.cut += u64::from(encoded.was_cut);
        let has_labels = self.samples.get(self.samples.len() - 1).has_labels();
        self.report.without_labels += u64::from(!has_labels);
    }
}

impl Report {
    fn add(&mut self, other: &Report) {
        let Report { bad_rows, first_bad_rows, left_out, cut, without_labels } = other;
        self.bad_rows += bad_rows;
        self.left_out += left_out;
        self.cut += cut;
        self.without_labels += without_labels;
        let room = SHOWN_BAD_ROWS - self.first_bad_rows.len();
        self.first_bad_rows.extend(first_bad_rows.iter().take(room).cloned());
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

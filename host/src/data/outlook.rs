//! How many rows a data set has and how long its samples will be, without templates: what can be told before a run.

use crate::config::plan::{DatasetPlan, RowsPlan};
use crate::data::source::{Rows, SourceCell, SourceRow, Wanted};
use crate::data::tokenize::select_pieces;
use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// Rows that are looked at.
const ROWS: usize = 300;

pub struct Outlook {
    pub rows: u64,
    /// Of the first rows the tokens of their texts, and those of them that an answer has. What templates put around the texts
    /// is not in it.
    pub samples: Vec<(usize, usize)>,
}

/// Looks at the rows that the plan selects; all of their files are read.
pub fn outlook(plan: &DatasetPlan, tokenizer: &Tokenizer) -> Result<Outlook> {
    let pieces = select_pieces(plan)?;
    let rows = pieces.iter().map(|(_, range)| range.end - range.start).sum();
    let first = Rows::new(pieces, Wanted::of(&plan.rows)).take(ROWS)?;
    let samples = first.into_iter().filter_map(|row: SourceRow| sample(plan, tokenizer, &row.cells.ok()?)).collect();
    Ok(Outlook { rows, samples })
}

fn sample(plan: &DatasetPlan, tokenizer: &Tokenizer, cells: &[SourceCell]) -> Option<(usize, usize)> {
    let count = |cell: &SourceCell| match cell {
        SourceCell::None => Some(0),
        SourceCell::Text(text) => Some(tokenizer.encode(text).ok()?.len()),
        // Who says what only a template tells.
        SourceCell::Nested(_) => None,
    };
    let counts = cells.iter().map(count).collect::<Option<Vec<_>>>()?;
    let all: usize = counts.iter().sum();
    let answer = match &plan.rows {
        RowsPlan::Columns { columns, .. } => {
            columns.iter().zip(&counts).find(|(column, _)| column.name == "output").map(|(_, count)| *count)?
        }
        RowsPlan::Pairs { prompt: Some(_), .. } => {
            // Two samples, each with the prompt.
            return Some((all + counts[0], all - counts[0]));
        }
        RowsPlan::Text { .. } => all,
        _ => return None,
    };
    Some((all, if plan.train_on_input { all } else { answer }))
}

//! The split grammar: `train`, `train[:2000]`, `train[-10%:]`, `train[10%:20%]+test`. Pure functions, no files.
//!
//! As in Hugging Face `datasets`: percentages round to the nearest row, ties to even. Two things are stricter, because
//! there they change the data in silence: a count beyond the rows there are is an error (not clamped), and so is mixing
//! a count and a percentage in one slice (there the count becomes a percentage).

use std::ops::Range;

use crate::error::{Error, Result, quoted};

/// `split[from:to]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    pub split: String,
    pub from: Option<Boundary>,
    pub to: Option<Boundary>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Boundary {
    /// Negative counts from the end.
    Rows(i64),
    /// -100 to 100.
    Percent(i64),
}

/// Parses `text` into its `+` terms.
pub fn parse(text: &str) -> Result<Vec<Slice>> {
    text.split('+').map(|term| parse_slice(term.trim(), text)).collect()
}

/// The rows that `slices` select, in order, as ranges of each named split, whose lengths `num_rows` gives.
pub fn select(text: &str, slices: &[Slice], splits: &[(String, u64)]) -> Result<Vec<(String, Range<u64>)>> {
    slices
        .iter()
        .map(|slice| {
            let Some((name, num_rows)) = splits.iter().find(|(name, _)| *name == slice.split) else {
                return Err(Error::config(format!("split `{text}`: the data set has no split `{}`", slice.split))
                    .hint(format!("it has {}", quoted(splits.iter().map(|(name, _)| name)))));
            };
            let from = slice.from.map_or(Ok(0), |from| resolve(text, name, from, *num_rows))?;
            let to = slice.to.map_or(Ok(*num_rows), |to| resolve(text, name, to, *num_rows))?;
            if from >= to {
                return Err(Error::config(format!(
                    "split `{text}` selects no rows: `{name}` has {num_rows} rows, and the slice goes from {from} to {to}"
                )));
            }
            Ok((name.clone(), from..to))
        })
        .collect()
}

fn parse_slice(term: &str, text: &str) -> Result<Slice> {
    let wrong = |why: String| {
        Err(Error::config(format!("split `{text}`: {why}"))
            .hint("write it like `train`, `train[:2000]`, `train[-10%:]` or `train[10%:20%]+test`"))
    };
    let (name, slice) = match term.split_once('[') {
        None => (term, None),
        Some((name, rest)) => match rest.strip_suffix(']') {
            Some(inside) => (name, Some(inside)),
            None => return wrong(format!("`{term}` has `[` without `]` at its end")),
        },
    };
    let is_word = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || c == '_');
    if !name.split('.').all(is_word) {
        return wrong(format!("`{name}` is not the name of a split"));
    }
    let Some(slice) = slice else { return Ok(Slice { split: name.to_owned(), from: None, to: None }) };
    let Some((from, to)) = slice.split_once(':') else {
        return wrong(format!("`[{slice}]` has no `:`"));
    };
    let mut boundaries = [None, None];
    for (boundary, part) in boundaries.iter_mut().zip([from, to]) {
        if part.is_empty() {
            continue;
        }
        let (number, is_percent) = part.strip_suffix('%').map_or((part, false), |number| (number, true));
        let digits = number.strip_prefix('-').unwrap_or(number);
        let plain = digits.starts_with(|c: char| c.is_ascii_digit())
            && digits.ends_with(|c: char| c.is_ascii_digit())
            && !digits.contains("__")
            && digits.chars().all(|c| c.is_ascii_digit() || c == '_');
        let value = plain.then(|| number.replace('_', "").parse::<i64>().ok()).flatten();
        *boundary = match value {
            None => return wrong(format!("`{part}` is neither a number of rows nor a percentage")),
            Some(value) if is_percent && !(-100..=100).contains(&value) => {
                return wrong(format!("`{part}` is not between -100% and 100%"));
            }
            Some(value) if is_percent => Some(Boundary::Percent(value)),
            Some(value) => Some(Boundary::Rows(value)),
        };
    }
    let [from, to] = boundaries;
    if let (Some(Boundary::Rows(_)), Some(Boundary::Percent(_)))
    | (Some(Boundary::Percent(_)), Some(Boundary::Rows(_))) = (from, to)
    {
        return wrong(format!("`[{slice}]` mixes a number of rows and a percentage"));
    }
    let count = |boundary| match boundary {
        Boundary::Rows(count) | Boundary::Percent(count) => count,
    };
    // Of a number from the start and one from the end only the rows can tell.
    let is_empty = match (from.map(count), to.map(count)) {
        (Some(from), Some(to)) => (from < 0) == (to < 0) && from >= to,
        (None, Some(to)) => to == 0,
        _ => false,
    };
    if is_empty {
        return wrong(format!("`[{slice}]` selects no rows"));
    }
    Ok(Slice { split: name.to_owned(), from, to })
}

fn resolve(text: &str, name: &str, boundary: Boundary, num_rows: u64) -> Result<u64> {
    let offset = match boundary {
        Boundary::Rows(rows) => {
            if rows.unsigned_abs() > num_rows {
                return Err(Error::config(format!(
                    "split `{text}`: `{rows}` is out of range, `{name}` has {num_rows} rows"
                ))
                .hint("leave the boundary out to go to the end, or use a percentage"));
            }
            rows
        }
        Boundary::Percent(percent) => percent_of(percent, num_rows),
    };
    Ok(if offset < 0 { num_rows - offset.unsigned_abs() } else { offset as u64 })
}

/// `percent * num_rows / 100`, ties to even, in integers.
fn percent_of(percent: i64, num_rows: u64) -> i64 {
    let product = i128::from(percent) * i128::from(num_rows);
    let (floor, rest) = (product.div_euclid(100), product.rem_euclid(100));
    let rounded = match rest.cmp(&50) {
        std::cmp::Ordering::Less => floor,
        std::cmp::Ordering::Greater => floor + 1,
        std::cmp::Ordering::Equal => floor + floor.rem_euclid(2),
    };
    rounded as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expected: &[(&str, Range<u64>)]) {
        let splits = [("train".to_owned(), 7), ("test".to_owned(), 205), ("big.set_1".to_owned(), 55_747)];
        let found = parse(text).and_then(|slices| select(text, &slices, &splits)).unwrap();
        let expected: Vec<_> = expected.iter().map(|(name, range)| (name.to_string(), range.clone())).collect();
        assert_eq!(found, expected, "{text}");
    }

    fn check_error(text: &str, expected: &str) {
        let splits = [("train".to_owned(), 7), ("test".to_owned(), 205)];
        let error = parse(text).and_then(|slices| select(text, &slices, &splits)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains(expected), "{text}: {error}");
    }

    #[test]
    fn whole_splits_and_slices() {
        check("train", &[("train", 0..7)]);
        check("train[:]", &[("train", 0..7)]);
        check("train[:3]", &[("train", 0..3)]);
        check("train[:7]", &[("train", 0..7)]);
        check("train[-0:3]", &[("train", 0..3)]);
        check("train[-5:-2]", &[("train", 2..5)]);
        check("train[-7:]", &[("train", 0..7)]);
        check("big.set_1[:2_000]", &[("big.set_1", 0..2000)]);
    }

    #[test]
    fn terms_add_up_with_blanks_around_them() {
        check("train[:2]+train[4:]", &[("train", 0..2), ("train", 4..7)]);
        check(" test[10%:20%] + train ", &[("test", 20..41), ("train", 0..7)]);
    }

    /// Expected values as `datasets` 3 and 4 give them for the same row counts.
    #[test]
    fn percentages_round_half_to_even() {
        check("train[:50%]", &[("train", 0..4)]); // 3.5 -> 4
        check("test[:10%]", &[("test", 0..20)]); // 20.5 -> 20
        check("test[:30%]", &[("test", 0..62)]); // 61.5 -> 62
        check("test[-10%:]", &[("test", 185..205)]); // -20.5 -> -20
        check("test[-30%:]", &[("test", 143..205)]); // -61.5 -> -62
        check("train[-10%:]", &[("train", 6..7)]);
        check("train[-30%:100%]", &[("train", 5..7)]);
        check("big.set_1[:1%]", &[("big.set_1", 0..557)]);
        check("train[-100%:]", &[("train", 0..7)]);
    }

    #[test]
    fn mistakes_are_named() {
        check_error("train[:8]", "`8` is out of range, `train` has 7 rows");
        check_error("train[-8:]", "`-8` is out of range");
        check_error("train[:101%]", "`101%` is not between -100% and 100%");
        check_error("train[3:50%]", "mixes a number of rows and a percentage");
        check_error("valid", "has no split `valid`\nhint: it has `train`, `test`");
        check_error("train[7:]", "selects no rows");
        check_error("train[5:3]", "`[5:3]` selects no rows");
        check_error("train[:0]", "`[:0]` selects no rows");
        check_error("train[-2:-2]", "`[-2:-2]` selects no rows");
        check_error("train[5:-3]", "selects no rows: `train` has 7 rows, and the slice goes from 5 to 4");
        check_error("train[]", "`[]` has no `:`");
        check_error("train[1:2", "without `]`");
        check_error("train[a:]", "`a` is neither");
        check_error("train[1_:]", "`1_` is neither");
        check_error("train[99999999999999999999:]", "is neither");
        check_error("", "`` is not the name of a split");
        check_error("train [:2]", "`train ` is not the name of a split");
        check_error("train++test", "`` is not the name of a split");
    }
}

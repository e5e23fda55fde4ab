//! `host preview`: rows as the model will see them, printed.

use std::fmt::Write as _;

use host::Result;
use host::config::plan::{PreviewPlan, PreviewStyle};
use host::data::encode::Encoded;
use host::data::{self, Made, Place};
use host::tokenizer::Tokenizer;
use serde_json::json;

use crate::script;

const GREEN: &str = "\x1b[32m";
const RESET: &str = "\x1b[0m";

pub fn run(plan: &PreviewPlan) -> Result<()> {
    let tokenizer = Tokenizer::of(&plan.tokenizer)?;
    let templates = script::templates(&plan.datasets, &plan.tokenizer, &plan.limits)?;
    for (dataset, templates) in plan.datasets.iter().zip(&templates) {
        for (place, made) in data::preview(dataset, &plan.tokenizer, &tokenizer, templates, plan.rows)? {
            let text = shown(&place, &made, &tokenizer, plan.style)?;
            host::cli::ui::out(&text)?;
        }
    }
    Ok(())
}

/// Tokens that follow each other and all carry loss, or none of them.
fn spans(sample: &Encoded) -> Vec<(&[u32], bool)> {
    let mut spans = vec![];
    let mut start = 0;
    for end in 1..=sample.tokens.len() {
        if end == sample.tokens.len() || sample.trained[end] != sample.trained[start] {
            spans.push((&sample.tokens[start..end], sample.trained[start]));
            start = end;
        }
    }
    spans
}

fn shown(place: &Place, made: &Made, tokenizer: &Tokenizer, style: PreviewStyle) -> Result<String> {
    let samples = match made {
        Ok(Some(samples)) => samples,
        other => {
            let (outcome, why) = match other {
                Err(why) => ("bad", why.as_str()),
                _ => ("left out", "by the template"),
            };
            return Ok(match style {
                PreviewStyle::Json => json!({ "row": place.to_string(), "outcome": outcome, "why": why }).to_string(),
                _ => format!("{place}: {outcome}: {why}"),
            });
        }
    };
    let sides: &[Option<&str>] = if samples.len() == 2 { &[Some("chosen"), Some("rejected")] } else { &[None] };
    let shown = samples.iter().zip(sides).map(|(sample, side)| one(place, *side, sample, tokenizer, style));
    Ok(shown.collect::<Result<Vec<_>>>()?.join("\n"))
}

/// A sample; of a pair, `side` of it.
fn one(
    place: &Place,
    side: Option<&str>,
    sample: &Encoded,
    tokenizer: &Tokenizer,
    style: PreviewStyle,
) -> Result<String> {
    // The first token follows none, so nothing can learn to say it.
    let sample = &Encoded {
        trained: sample.trained.iter().enumerate().map(|(index, trained)| index > 0 && *trained).collect(),
        ..sample.clone()
    };
    let spans: Vec<(&[u32], bool, String)> = spans(sample)
        .into_iter()
        .map(|(tokens, trained)| Ok((tokens, trained, tokenizer.show(tokens)?)))
        .collect::<Result<_>>()?;
    let labels = sample.trained.iter().filter(|trained| **trained).count();
    if style == PreviewStyle::Json {
        let span = |(tokens, trained, text): &(&[u32], bool, String)| json!({ "text": text, "tokens": tokens, "trained": trained });
        return Ok(json!({
            "row": place.to_string(), "outcome": "kept", "side": side, "cut": sample.was_cut, "num_tokens": sample.tokens.len(),
            "num_labels": labels, "spans": spans.iter().map(span).collect::<Vec<_>>(),
        })
        .to_string());
    }
    let cut = if sample.was_cut { ", cut to `max_seq_len`" } else { "" };
    let side = side.map(|side| format!(", {side}")).unwrap_or_default();
    let mut text = format!("{place}{side}: {} tokens, {labels} carry loss{cut}\n", sample.tokens.len());
    for (_, trained, span) in spans {
        // A row is data: what it holds of escape sequences is shown, not obeyed.
        let span: String =
            span.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect();
        let _ = match (trained, style) {
            (false, _) => write!(text, "{span}"),
            (true, PreviewStyle::Colour) => write!(text, "{GREEN}{span}{RESET}"),
            (true, _) => write!(text, "⟦{span}⟧"),
        };
    }
    text.push('\n');
    Ok(text)
}

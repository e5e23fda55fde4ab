//! How the elements of an optimizer step (samples, or packs of them) become micro-batches on each rank. No tensor, no loss.
//!
//! Which elements form a step is decided before, by the order and `batch_size × accumulation × ranks`; the layout decides
//! how they are computed, never which they are. `padded` is torchtune's: rank r takes every `world_size`-th element and pads
//! each micro-batch to its longest. `varlen` packs the elements into micro-batches under a token budget, as documents whose
//! positions restart, and spreads these over the ranks by their tokens. In a step every rank has as many micro-batches:
//! sharded models talk in each.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::config::plan::Layout;
use crate::data::samples::Tokenized;

/// What one forward takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MicroBatch {
    /// Documents one after the other, `[T]`.
    pub tokens: Vec<i64>,
    /// Of each token in its sample: from 0, but where a pack begins in the middle of one, `[T]`.
    pub positions: Vec<i64>,
    /// Document d is `cu_seqlens[d]..cu_seqlens[d + 1]`; under `padded` the last of an element is filled up.
    pub cu_seqlens: Vec<i64>,
    /// Where in `tokens` the next token of the same sample is a label, ascending, `[L]`.
    pub label_positions: Vec<i64>,
    /// That next token, `[L]`.
    pub labels: Vec<i64>,
    /// The sample that each document is, or is a piece of.
    pub sample_ids: Vec<u32>,
    pub num_real_tokens: usize,
    /// `tokens.len()`: what the model computes.
    pub num_padded_tokens: usize,
}

/// How elements are laid out; which they are is decided before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchLayout {
    pub layout: Layout,
    /// `padded`: elements of one micro-batch.
    pub batch_size: usize,
    /// `varlen`: most tokens of one micro-batch; a longer element goes alone.
    pub tokens_per_microbatch: usize,
    /// What `padded` fills up with.
    pub pad: i64,
}

/// The micro-batches of `rank` for `elements`: those of one optimizer step, or all of a validation set. Over all ranks each
/// comes once. With fewer elements than ranks a rank may get none.
pub fn microbatches(
    data: &Tokenized,
    elements: &[u32],
    layout: &BatchLayout,
    rank: usize,
    world_size: usize,
) -> Vec<MicroBatch> {
    let groups: Vec<Vec<u32>> = match layout.layout {
        Layout::Padded => {
            let mine: Vec<u32> = elements.iter().skip(rank).step_by(world_size).copied().collect();
            mine.chunks(layout.batch_size).map(<[u32]>::to_vec).collect()
        }
        Layout::Varlen => {
            spread(data, pack(data, elements, layout.tokens_per_microbatch, world_size), rank, world_size)
        }
    };
    let pad_to = |group: &[u32]| match layout.layout {
        Layout::Padded => group.iter().map(|&element| data.length(element as usize)).max().unwrap_or(0),
        Layout::Varlen => 0,
    };
    groups.iter().map(|group| MicroBatch::new(data, group, pad_to(group), layout.pad)).collect()
}

/// Spreads `rows` over `bins` by tokens: the longest first, each to the bin with the fewest so far; ties go to the row
/// that comes first and to the lowest bin. Every bin gets a row when there are enough. Rows keep their order in a bin.
fn balance(data: &Tokenized, rows: &[u32], bins: usize) -> Vec<Vec<u32>> {
    let length = |place: usize| data.length(rows[place] as usize);
    let mut places: Vec<usize> = (0..rows.len()).collect();
    places.sort_by_key(|&place| (Reverse(length(place)), place));
    // Counting rows after tokens makes an empty bin lighter than any other, even if samples had no tokens.
    let mut loads: BinaryHeap<Reverse<(usize, usize, usize)>> = (0..bins).map(|bin| Reverse((0, 0, bin))).collect();
    let mut placed = vec![vec![]; bins];
    for place in places {
        let Some(Reverse((tokens, count, bin))) = loads.pop() else { break };
        placed[bin].push(place);
        loads.push(Reverse((tokens + length(place), count + 1, bin)));
    }
    let in_order = |mut places: Vec<usize>| {
        places.sort_unstable();
        places.into_iter().map(|place| rows[place]).collect()
    };
    placed.into_iter().map(in_order).collect()
}

/// Packs `rows` into as few micro-batches of at most `budget` tokens as balancing finds; a longer sample goes alone. They
/// are a multiple of `ranks` where the rows are.
fn pack(data: &Tokenized, rows: &[u32], budget: usize, ranks: usize) -> Vec<Vec<u32>> {
    let length = |row: u32| data.length(row as usize);
    let total = |group: &[u32]| group.iter().map(|&row| length(row)).sum::<usize>();
    let (alone, rest): (Vec<u32>, Vec<u32>) = rows.iter().partition(|&&row| length(row) >= budget);
    let mut groups: Vec<Vec<u32>> = alone.into_iter().map(|row| vec![row]).collect();
    if !rest.is_empty() {
        // One row a bin always fits, so this ends.
        let fewest = total(&rest).div_ceil(budget.max(1)).max(1);
        let fits = |bins: &Vec<Vec<u32>>| bins.iter().all(|group| total(group) <= budget);
        let is_even = |bins: &usize| (groups.len() + bins).is_multiple_of(ranks) || *bins == rest.len();
        let counts = (fewest..=rest.len()).filter(is_even);
        let packed = counts.map(|bins| balance(data, &rest, bins)).find(fits);
        groups.extend(packed.unwrap_or_default());
    }
    groups
}

/// The micro-batches of `rank`: as many for each where they divide, and nearly equal tokens. The longest go round the ranks
/// and back again; ties keep their order.
fn spread(data: &Tokenized, groups: Vec<Vec<u32>>, rank: usize, ranks: usize) -> Vec<Vec<u32>> {
    let total = |group: &[u32]| group.iter().map(|&row| data.length(row as usize)).sum::<usize>();
    let mut places: Vec<usize> = (0..groups.len()).collect();
    places.sort_by_key(|&place| (Reverse(total(&groups[place])), place));
    let turn = |index: usize| if (index / ranks).is_multiple_of(2) { index % ranks } else { ranks - 1 - index % ranks };
    let mut mine: Vec<usize> =
        places.into_iter().enumerate().filter(|(index, _)| turn(*index) == rank).map(|(_, place)| place).collect();
    mine.sort_unstable();
    mine.into_iter().map(|place| groups[place].clone()).collect()
}

impl MicroBatch {
    /// Which document each label is of, `[L]`.
    pub fn label_documents(&self) -> Vec<i64> {
        let document = |position: &i64| self.cu_seqlens.partition_point(|end| end <= position) as i64 - 1;
        self.label_positions.iter().map(document).collect()
    }

    /// Lays out `elements` as documents, the last of each filled up with `pad` to `pad_to` tokens in all.
    fn new(data: &Tokenized, elements: &[u32], pad_to: usize, pad: i64) -> Self {
        let mut batch = Self { cu_seqlens: vec![0], ..Self::default() };
        for &element in elements {
            let begin = batch.tokens.len();
            let pieces = data.element(element as usize);
            for (index, piece) in pieces.iter().enumerate() {
                let sample = data.get(piece.sample as usize);
                let first = batch.tokens.len() as i64;
                let part = piece.start as usize..piece.end as usize;
                batch.tokens.extend(sample.tokens[part.clone()].iter().map(|&token| i64::from(token)));
                batch.num_real_tokens += part.len();
                // Nothing comes before the first token of a sample, so it is never a label.
                for (position, next) in (first..).zip(part.start + 1..(part.end + 1).min(sample.tokens.len())) {
                    if sample.trained[next] {
                        batch.label_positions.push(position);
                        batch.labels.push(i64::from(sample.tokens[next]));
                    }
                }
                let is_last = index + 1 == pieces.len();
                let end = if is_last { batch.tokens.len().max(begin + pad_to) } else { batch.tokens.len() };
                batch.tokens.resize(end, pad);
                let start = part.start as i64;
                batch.positions.extend(start..start + end as i64 - first);
                batch.cu_seqlens.push(end as i64);
                batch.sample_ids.push(piece.sample);
            }
        }
        batch.num_padded_tokens = batch.tokens.len();
        batch
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::data::{Order, Sample};

    fn padded(batch_size: usize) -> BatchLayout {
        BatchLayout { layout: Layout::Padded, batch_size, tokens_per_microbatch: 0, pad: 99 }
    }

    fn varlen(tokens_per_microbatch: usize) -> BatchLayout {
        BatchLayout { layout: Layout::Varlen, batch_size: 0, tokens_per_microbatch, pad: 99 }
    }

    /// Sample i has tokens `100 i`, `100 i + 1`, …; every third is masked.
    fn data(lengths: &[usize]) -> Tokenized {
        let sample = |(i, &length): (usize, &usize)| {
            let tokens: Vec<u32> = (0..length).map(|t| (i * 100 + t) as u32).collect();
            let labels = tokens.iter().enumerate().map(|(t, &token)| if t % 3 == 1 { -100 } else { token as i32 });
            Sample { id: i as u64, labels: labels.collect(), tokens }
        };
        Tokenized::from_samples(lengths.iter().enumerate().map(sample))
    }

    #[test]
    fn padded_is_torchtunes() {
        let data = data(&[2, 4, 3, 1]);
        assert_eq!(
            microbatches(&data, &[3, 2, 1, 0], &padded(2), 1, 2),
            [MicroBatch {
                tokens: vec![200, 201, 202, 0, 1, 99],
                positions: vec![0, 1, 2, 0, 1, 2],
                cu_seqlens: vec![0, 3, 6],
                label_positions: vec![1],
                labels: vec![202],
                sample_ids: vec![2, 0],
                num_real_tokens: 5,
                num_padded_tokens: 6,
            }]
        );
    }

    #[test]
    fn varlen_packs_without_padding() {
        let data = data(&[4, 9, 3, 4, 5]);
        let batches = microbatches(&data, &[0, 1, 2, 3, 4], &varlen(8), 0, 1);
        let ids: Vec<_> = batches.iter().map(|batch| batch.sample_ids.clone()).collect();
        assert_eq!(ids, [vec![1], vec![2, 4], vec![0, 3]]);
        assert_eq!(batches[2].cu_seqlens, [0, 4, 8]);
        assert_eq!(batches[2].positions, [0, 1, 2, 3, 0, 1, 2, 3]);
        assert_eq!((&batches[2].label_positions, &batches[2].labels), (&vec![1, 2, 5, 6], &vec![2, 3, 302, 303]));
        assert_eq!((batches[0].labels.len(), &batches[0].cu_seqlens), (5, &vec![0, 9]));
    }

    /// What torchtune counted in its recorded runs, step by step: label, real and padded tokens of rank 0.
    #[test]
    fn padded_counts_are_the_recorded_ones() {
        let data = super::super::tests::golden_data();
        let rows: Vec<u32> = (0..240).collect();
        for (name, world_size) in [("tiny-pre-lora-fp32", 1), ("tiny-pre-lora-fp32-dist2", 2)] {
            let golden = super::super::tests::fixture_json(&format!("golden/{name}.json"));
            let steps = golden["steps"].as_array().unwrap();
            assert_eq!(steps.len(), 30);
            for (rows, golden) in rows.chunks(8).zip(steps) {
                let batches = microbatches(&data, rows, &padded(2), 0, world_size);
                let sum = |count: fn(&MicroBatch) -> usize| Some(batches.iter().map(count).sum::<usize>() as u64);
                assert_eq!(sum(|batch| batch.labels.len()), golden["label_tokens"].as_u64(), "{name}");
                assert_eq!(sum(|batch| batch.num_real_tokens), golden["real_tokens"].as_u64(), "{name}");
                assert_eq!(sum(|batch| batch.num_padded_tokens), golden["padded_tokens"].as_u64(), "{name}");
            }
        }
    }

    /// (row, label) of every label over all ranks, sorted; the rows, sorted.
    fn labels_and_rows(
        data: &Tokenized,
        rows: &[u32],
        layout: &BatchLayout,
        world: usize,
    ) -> (Vec<(u32, i64)>, Vec<u32>) {
        let (mut labels, mut seen) = (vec![], vec![]);
        for batch in (0..world).flat_map(|rank| microbatches(data, rows, layout, rank, world)) {
            check_invariants(layout, data, &batch);
            seen.extend(&batch.sample_ids);
            for (&position, &label) in batch.label_positions.iter().zip(&batch.labels) {
                let doc = batch.cu_seqlens.partition_point(|&end| end <= position) - 1;
                labels.push((batch.sample_ids[doc], label));
            }
        }
        labels.sort_unstable();
        seen.sort_unstable();
        (labels, seen)
    }

    fn check_invariants(layout: &BatchLayout, data: &Tokenized, batch: &MicroBatch) {
        assert!(!batch.sample_ids.is_empty());
        assert_eq!(batch.tokens.len(), batch.positions.len());
        assert_eq!(batch.tokens.len(), batch.num_padded_tokens);
        for (doc, ends) in batch.cu_seqlens.windows(2).enumerate() {
            let range = ends[0] as usize..ends[1] as usize;
            let sample = data.get(batch.sample_ids[doc] as usize);
            let (tokens, padding) = batch.tokens[range.clone()].split_at(sample.tokens.len());
            assert!(sample.tokens.iter().map(|&token| i64::from(token)).eq(tokens.iter().copied()));
            assert!(padding.iter().all(|&token| token == layout.pad));
            assert!(batch.positions[range.clone()].iter().copied().eq(0..range.len() as i64));
        }
        for (&position, &label) in batch.label_positions.iter().zip(&batch.labels) {
            assert_eq!(batch.tokens[position as usize + 1], label);
            assert!(!batch.cu_seqlens.contains(&(position + 1)), "a label in another document");
        }
        match layout.layout {
            Layout::Padded => assert!(batch.sample_ids.len() <= layout.batch_size),
            Layout::Varlen => {
                assert_eq!(batch.num_real_tokens, batch.num_padded_tokens);
                assert!(batch.sample_ids.len() == 1 || batch.num_real_tokens <= layout.tokens_per_microbatch);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Layout and world size change neither which rows are seen, each once, nor which labels are learned.
        #[test]
        fn every_sample_once_and_the_same_labels_however_laid_out(
            lengths in prop::collection::vec(1usize..40, 1..40),
            budget in 1usize..100,
            batch_size in 1usize..5,
            seed: u64,
        ) {
            let data = data(&lengths);
            let rows = Order::new(data.len(), true, seed, false).unwrap().epoch(1);
            let (labels, seen) = labels_and_rows(&data, &rows, &padded(batch_size), 1);
            prop_assert_eq!(seen, (0..data.len() as u32).collect::<Vec<_>>());
            let count: usize = (0..data.len()).map(|i| data.get(i).trained[1..].iter().filter(|t| **t).count()).sum();
            prop_assert_eq!(labels.len(), count);
            for layout in [padded(batch_size), varlen(budget)] {
                for world_size in 1..5 {
                    let (other_labels, seen) = labels_and_rows(&data, &rows, &layout, world_size);
                    prop_assert_eq!(&labels, &other_labels);
                    prop_assert_eq!(seen.len(), data.len());
                    for rank in 0..world_size.min(data.len()) {
                        prop_assert!(!microbatches(&data, &rows, &layout, rank, world_size).is_empty());
                    }
                }
            }
        }

        /// No rank has more tokens than the lightest one and one sample more.
        #[test]
        fn ranks_are_balanced(lengths in prop::collection::vec(1usize..500, 8..64), bins in 1usize..8) {
            let data = data(&lengths);
            let rows: Vec<u32> = (0..lengths.len() as u32).collect();
            let loads: Vec<usize> = balance(&data, &rows, bins)
                .iter()
                .map(|bin| bin.iter().map(|&row| lengths[row as usize]).sum())
                .collect();
            let longest = lengths.iter().max().unwrap();
            prop_assert!(loads.iter().max().unwrap() <= &(loads.iter().min().unwrap() + longest), "{:?}", loads);
        }
    }
}

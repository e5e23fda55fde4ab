//! Tensor encodings of GGUF and their way to bf16.
//!
//! Values are computed in fp32 and rounded once, to nearest even, which is what PyTorch does with a dequantised tensor.
//! Block layouts: ggml's `ggml-common.h`.

use half::{bf16, f16};
use rayon::prelude::*;

/// An encoding this program reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TensorType {
    F32,
    F16,
    Bf16,
    Q4_0,
    Q4_1,
    Q8_0,
}

impl TensorType {
    pub const READ: &str = "F32, F16, BF16, Q8_0, Q4_1, Q4_0";

    /// The encoding with this number in a file; `Err` has the name of one that is known but not read.
    pub fn from_id(id: u32) -> Result<Self, String> {
        Ok(match id {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            8 => Self::Q8_0,
            30 => Self::Bf16,
            _ => return Err(KNOWN.iter().find(|(n, _)| *n == id).map_or(format!("type {id}"), |(_, s)| s.to_string())),
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q8_0 => "Q8_0",
        }
    }

    /// Returns (elements, bytes) of one block; a row is a whole number of blocks.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q8_0 => (32, 34),
        }
    }
}

/// Names of the other types of ggml, for messages.
const KNOWN: &[(u32, &str)] = &[
    (6, "Q5_0"),
    (7, "Q5_1"),
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (12, "Q4_K"),
    (13, "Q5_K"),
    (14, "Q6_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

/// Blocks one rayon task takes: enough to hide its cost.
const BLOCKS_PER_TASK: usize = 4096;

/// Decodes whole blocks of `raw` into `out`, little-endian bf16. `out` is resized to fit.
pub fn dequantise(tensor_type: TensorType, raw: &[u8], out: &mut Vec<u8>) {
    let (elements, bytes) = tensor_type.block();
    out.resize(raw.len() / bytes * elements * 2, 0);
    out.par_chunks_mut(elements * 2 * BLOCKS_PER_TASK).zip(raw.par_chunks(bytes * BLOCKS_PER_TASK)).for_each(
        |(out, raw)| {
            for (out, block) in out.chunks_exact_mut(elements * 2).zip(raw.chunks_exact(bytes)) {
                decode_block(tensor_type, block, out);
            }
        },
    );
}

fn decode_block(tensor_type: TensorType, block: &[u8], out: &mut [u8]) {
    let half_at = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let mut put = |index: usize, value: f32| {
        out[2 * index..2 * index + 2].copy_from_slice(&bf16::from_f32(value).to_le_bytes());
    };
    match tensor_type {
        TensorType::F32 => put(0, f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
        TensorType::F16 => put(0, half_at(0)),
        TensorType::Bf16 => out.copy_from_slice(block),
        TensorType::Q8_0 => {
            let scale = half_at(0);
            block[2..].iter().enumerate().for_each(|(i, &q)| put(i, scale * f32::from(q as i8)));
        }
        // Four-bit blocks hold elements 0..16 in the low nibbles and 16..32 in the high ones.
        TensorType::Q4_0 => {
            let scale = half_at(0);
            block[2..].iter().enumerate().for_each(|(i, &q)| {
                put(i, scale * (f32::from(q & 15) - 8.0));
                put(i + 16, scale * (f32::from(q >> 4) - 8.0));
            });
        }
        TensorType::Q4_1 => {
            let (scale, minimum) = (half_at(0), half_at(2));
            block[4..].iter().enumerate().for_each(|(i, &q)| {
                put(i, scale * f32::from(q & 15) + minimum);
                put(i + 16, scale * f32::from(q >> 4) + minimum);
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(tensor_type: TensorType, raw: &[u8]) -> Vec<f32> {
        let mut out = vec![];
        dequantise(tensor_type, raw, &mut out);
        out.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
    }

    #[test]
    fn four_bit_blocks_are_low_nibbles_first() {
        let mut block = [f16::from_f32(0.5).to_le_bytes(), f16::from_f32(-1.0).to_le_bytes()].concat();
        block.extend((0..16u8).map(|i| i | (15 - i) << 4));
        let expected: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| 0.5 * q as f32 - 1.0).collect();
        assert_eq!(decoded(TensorType::Q4_1, &block), expected);

        block.drain(2..4);
        let expected: Vec<f32> = (0..16).chain((0..16).rev()).map(|q| 0.5 * (q as f32 - 8.0)).collect();
        assert_eq!(decoded(TensorType::Q4_0, &block), expected);
    }

    #[test]
    fn eight_bit_blocks_are_signed() {
        let mut block = f16::from_f32(0.25).to_le_bytes().to_vec();
        block.extend((0..32i16).map(|i| (i * 8 - 128) as i8 as u8));
        let expected: Vec<f32> = (0..32).map(|i| 0.25 * (i as f32 * 8.0 - 128.0)).collect();
        assert_eq!(decoded(TensorType::Q8_0, &block), expected);
    }

    #[test]
    fn floats_round_to_nearest_even() {
        // 1 + 2^-8 lies halfway between two bf16 numbers, 1 + 3 * 2^-8 too; both go to the even one.
        let raw = [1.0f32 + 1.0 / 256.0, 1.0 + 3.0 / 256.0].map(f32::to_le_bytes).concat();
        assert_eq!(decoded(TensorType::F32, &raw), [1.0, 1.0 + 4.0 / 256.0]);
        assert_eq!(decoded(TensorType::F16, &f16::from_f32(-0.75).to_le_bytes()), [-0.75]);
        assert_eq!(decoded(TensorType::Bf16, &bf16::from_f32(3.0).to_le_bytes()), [3.0]);
    }

    #[test]
    fn pieces_larger_than_a_task_keep_their_order() {
        let raw: Vec<u8> = (0..BLOCKS_PER_TASK * 3 + 1).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let expected: Vec<f32> = (0..BLOCKS_PER_TASK * 3 + 1).map(|i| bf16::from_f32(i as f32).to_f32()).collect();
        assert_eq!(decoded(TensorType::F32, &raw), expected);
    }
}

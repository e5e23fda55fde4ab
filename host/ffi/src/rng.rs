//! Random numbers that depend on what they are for and not on when they are drawn.
//!
//! A dropout mask is a hash of (row key, column), so that packing, padding, micro-batches and rank counts keep it. The
//! caller absorbs seed, step, sample, position and layer into one 64-bit key per row ([`absorb`], [`absorb_tensor`]).
//! Integers only, with the same result on every device: the CPU has a fused loop, the others int64 operators.

use tch::{Device, Kind, Tensor};

use crate::{FfiError, Result, check, new_tensor, scalar_type, sys};

const GOLDEN: i64 = 0x9e37_79b9_7f4a_7c15_u64 as i64;
const MIX_1: i64 = 0xbf58_476d_1ce4_e5b9_u64 as i64;
const MIX_2: i64 = 0x94d0_49bb_1331_11eb_u64 as i64;
const LOW_32: i64 = 0xffff_ffff;

/// Returns a key that depends on `key` and `value`: the finaliser of SplitMix64 (Steele, Lea and Flood 2014) over
/// `key + (value + 1) · φ`.
pub fn absorb(key: i64, value: i64) -> i64 {
    let logical = |x: i64, by: u32| ((x as u64) >> by) as i64;
    let x = key.wrapping_add(value.wrapping_add(1).wrapping_mul(GOLDEN));
    let x = (x ^ logical(x, 30)).wrapping_mul(MIX_1);
    let x = (x ^ logical(x, 27)).wrapping_mul(MIX_2);
    x ^ logical(x, 31)
}

/// Returns [`absorb`] of each pair of elements; `keys` and `values` are int64 and broadcast against each other.
pub fn absorb_tensor(keys: &Tensor, values: &Tensor) -> Result<Tensor> {
    let x = keys.f_add(&values.f_add_scalar(1)?.f_mul_scalar(GOLDEN)?)?;
    let x = xor_shift(&x, 30)?.f_mul_scalar(MIX_1)?;
    let x = xor_shift(&x, 27)?.f_mul_scalar(MIX_2)?;
    xor_shift(&x, 31)
}

/// `x ^ (x >>> by)`; the operator's shift is arithmetic, so the copies of the sign are masked away.
fn xor_shift(x: &Tensor, by: i64) -> Result<Tensor> {
    let shifted = x.f_bitwise_right_shift_tensor_scalar(by)?.f_bitwise_and((1_i64 << (64 - by)) - 1)?;
    Ok(x.f_bitwise_xor_tensor(&shifted)?)
}

/// Rounds fp32 numbers to bf16 ones, up or down by a chance that makes the mean right.
///
/// `from` is Float `[n]`, `into` BFloat16 `[n]` on the same device. The lower of the two nearest is taken unless the cut-off
/// bits plus 16 random ones carry; the random bits of number `i` are those of `absorb(key, first + i)`, the same on every
/// device and however the numbers are split. Fails for other shapes and types.
pub fn round_stochastic(from: &Tensor, into: &Tensor, key: i64, first: i64) -> Result<()> {
    let fits = from.kind() == Kind::Float && into.kind() == Kind::BFloat16 && from.size() == into.size();
    if !fits || from.dim() != 1 || from.device() != into.device() {
        return Err(FfiError::new(format!(
            "cannot round {:?} {:?} to {:?} {:?}",
            from.kind(),
            from.size(),
            into.kind(),
            into.size()
        )));
    }
    if from.device() == Device::Cpu {
        // SAFETY: both tensors are live for the call, which writes to `into` alone.
        return check(unsafe { sys::host_round_stochastic_cpu(from.as_ptr(), into.as_ptr(), key, first) });
    }
    let places = Tensor::f_arange_start(first, first + from.size()[0], (Kind::Int64, from.device()))?;
    let noise = absorb_tensor(&Tensor::from(key).to_device(from.device()), &places)?.f_bitwise_and(0xffff_i64)?;
    let bits = from.f_contiguous()?.f_view_dtype(Kind::Int)?.f_to_kind(Kind::Int64)?.f_add(&noise)?;
    let cut = bits.f_bitwise_and(!0xffff_i64)?.f_to_kind(Kind::Int)?.f_view_dtype(Kind::Float)?;
    let finite = from.f_isfinite()?;
    into.shallow_clone().f_copy_(&cut.f_where_self(&finite, from)?)?;
    Ok(())
}

/// Returns a `[T, width]` mask of dtype `kind`, on the device of the keys: `1 / keep_prob` where kept, else 0.
///
/// `row_keys` is int64 `[T]`. An element is kept when a 32-bit hash of its row key and column (two rounds of
/// MurmurHash3's finaliser) is below `keep_prob · 2³²`; whoever asks, wherever, gets the same mask. Fails unless
/// `0 < keep_prob <= 1`, and for dtypes that are not floating point.
pub fn dropout_mask(row_keys: &Tensor, width: i64, keep_prob: f64, kind: Kind) -> Result<Tensor> {
    if !(keep_prob > 0.0 && keep_prob <= 1.0) {
        return Err(FfiError::new(format!("a keep probability must be above 0 and at most 1, got {keep_prob}")));
    }
    if row_keys.dim() != 1 || row_keys.kind() != Kind::Int64 || width < 0 {
        let (kind, shape) = (row_keys.kind(), row_keys.size());
        return Err(FfiError::new(format!(
            "a dropout mask needs Int64 row keys [T], got {kind:?} {shape:?} x {width}"
        )));
    }
    if !matches!(kind, Kind::Float | Kind::BFloat16 | Kind::Half | Kind::Double) {
        return Err(FfiError::new(format!("a dropout mask of dtype {kind:?} makes no sense")));
    }
    let threshold = (keep_prob * 4_294_967_296.0) as u64;
    if row_keys.device() == Device::Cpu && matches!(kind, Kind::Float | Kind::BFloat16) {
        let (keep_all, dtype) = ((threshold > u32::MAX.into()).into(), scalar_type(kind)?);
        let value = (1.0 / keep_prob) as f32;
        // SAFETY: `row_keys` is live for the call.
        return new_tensor(|out| unsafe {
            sys::host_dropout_mask_cpu(row_keys.as_ptr(), width, threshold as u32, keep_all, value, dtype, out)
        });
    }
    composite_mask(row_keys, width, threshold, keep_prob, kind)
}

/// The same mask in operators that every device has. Public so that tests can compare the two on one device.
#[doc(hidden)]
pub fn composite_mask(row_keys: &Tensor, width: i64, threshold: u64, keep_prob: f64, kind: Kind) -> Result<Tensor> {
    let low = row_keys.f_bitwise_and(LOW_32)?.f_unsqueeze(1)?;
    let high = row_keys.f_bitwise_right_shift_tensor_scalar(32)?.f_bitwise_and(LOW_32)?.f_unsqueeze(1)?;
    let columns = Tensor::f_arange(width, (Kind::Int64, row_keys.device()))?;
    let columns = columns.f_mul_scalar(0x9e37_79b9_i64)?.f_bitwise_and(LOW_32)?;
    let hash = finalise(&low.f_bitwise_xor_tensor(&columns)?)?.f_bitwise_xor_tensor(&high)?;
    let kept = finalise(&hash)?.f_lt(threshold as i64)?;
    Ok(kept.f_to_kind(Kind::Float)?.f_mul_scalar((1.0 / keep_prob) as f32 as f64)?.f_to_kind(kind)?)
}

/// MurmurHash3's 32-bit finaliser on int64 elements below 2³². Products wrap at 64 bits, which leaves the low 32 right.
fn finalise(h: &Tensor) -> Result<Tensor> {
    let fold = |h: &Tensor, by: i64| -> Result<Tensor> {
        Ok(h.f_bitwise_xor_tensor(&h.f_bitwise_right_shift_tensor_scalar(by)?)?)
    };
    let h = fold(h, 16)?.f_mul_scalar(0x85eb_ca6b_i64)?.f_bitwise_and(LOW_32)?;
    let h = fold(&h, 13)?.f_mul_scalar(0xc2b2_ae35_i64)?.f_bitwise_and(LOW_32)?;
    fold(&h, 16)
}

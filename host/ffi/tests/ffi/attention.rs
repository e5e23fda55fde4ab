use host_ffi::autograd::attention_varlen;
use tch::{Kind, Tensor};

use crate::reference::{BOTH, compare, normal};

/// Softmax over a full mask: token j is visible to i when both are in one document and j <= i.
fn plain(q: &Tensor, k: &Tensor, v: &Tensor, cu: &[i64], scale: f64) -> Tensor {
    let (t, n) = (q.size()[0], q.size()[1]);
    let group = n / k.size()[1];
    let mut document = vec![0i64; t as usize];
    for (i, bounds) in cu.windows(2).enumerate() {
        document[bounds[0] as usize..bounds[1] as usize].fill(i as i64);
    }
    let document = Tensor::from_slice(&document);
    let same = document.unsqueeze(0).eq_tensor(&document.unsqueeze(1));
    let hidden = same.tril(0).logical_not();
    let repeat = |x: &Tensor| x.repeat_interleave_self_int(group, 1, None).transpose(0, 1);
    let scores = q.transpose(0, 1).matmul(&repeat(k).transpose(1, 2)) * scale;
    let probs = scores.masked_fill(&hidden, f64::NEG_INFINITY).softmax(-1, None::<Kind>);
    probs.matmul(&repeat(v)).transpose(0, 1)
}

#[test]
fn attention_matches_operators() {
    let cases: [(&[i64], i64, i64, i64); 9] = [
        (&[0, 1], 1, 1, 8),
        (&[0, 1, 2, 3], 2, 1, 16),
        (&[0, 7], 3, 3, 4),
        (&[0, 5, 5, 6, 23], 4, 2, 32),
        (&[0, 50, 51, 200], 9, 3, 64),
        (&[0, 65, 300], 6, 1, 64),
        (&[0, 33, 90], 4, 4, 24),
        (&[0, 130], 2, 1, 128),
        (&[0, 513, 600], 3, 1, 80),
    ];
    for (cu, n, kv, h) in cases {
        let t = *cu.last().unwrap();
        let inputs = [normal(1, &[t, n, h]), normal(2, &[t, kv, h]), normal(3, &[t, kv, h])];
        let scale = 1.0 / (h as f64).sqrt();
        for (kind, tolerance) in BOTH {
            compare(
                &format!("attention {cu:?} {n}/{kv}x{h}"),
                &inputs,
                kind,
                // bf16: probabilities, the output and its use in the backward are rounded.
                if kind == Kind::Float { 2.0 * tolerance } else { 3.0 * tolerance },
                &|v| attention_varlen(&v[0], &v[1], &v[2], cu, scale).unwrap(),
                &|v| plain(&v[0], &v[1], &v[2], cu, scale),
            );
        }
    }
}

#[test]
fn attention_without_a_kernel_for_the_dtype_matches_too() {
    let cu = [0, 3, 4, 11];
    let inputs = [normal(1, &[11, 4, 8]), normal(2, &[11, 2, 8]), normal(3, &[11, 2, 8])];
    compare(
        "attention",
        &inputs,
        Kind::Double,
        1e-12,
        &|v| attention_varlen(&v[0], &v[1], &v[2], &cu, 0.3).unwrap(),
        &|v| plain(&v[0], &v[1], &v[2], &cu, 0.3),
    );
}

#[test]
fn large_scores_do_not_overflow() {
    let cu = [0, 70];
    let inputs = [normal(1, &[70, 2, 16]) * 40.0, normal(2, &[70, 1, 16]) * 40.0, normal(3, &[70, 1, 16])];
    compare(
        "attention",
        &inputs,
        Kind::Float,
        // Scores reach thousands, where neighbouring fp32 numbers are 1e-4 apart.
        1e-3,
        &|v| attention_varlen(&v[0], &v[1], &v[2], &cu, 0.25).unwrap(),
        &|v| plain(&v[0], &v[1], &v[2], &cu, 0.25),
    );
}

#[test]
fn a_document_does_not_see_another() {
    let (q, k, v) = (normal(1, &[20, 2, 8]), normal(2, &[20, 1, 8]), normal(3, &[20, 1, 8]));
    let first = attention_varlen(&q, &k, &v, &[0, 12, 20], 1.0).unwrap();
    let part = |t: &Tensor| t.narrow(0, 12, 8);
    let alone = attention_varlen(&part(&q), &part(&k), &part(&v), &[0, 8], 1.0).unwrap();
    assert!(part(&first).equal(&alone), "position in the batch must not change a bit");
}

#[test]
fn offsets_are_checked() {
    let (q, k) = (normal(1, &[4, 2, 8]), normal(2, &[4, 1, 8]));
    let message = |cu: &[i64]| attention_varlen(&q, &k, &k, cu, 1.0).unwrap_err().0;
    assert_eq!(message(&[]), "attention_varlen: cu_seqlens must run from 0 to the 4 tokens");
    assert_eq!(message(&[0, 5]), "attention_varlen: cu_seqlens must run from 0 to the 4 tokens");
    assert_eq!(message(&[0, 3, 2, 4]), "attention_varlen: cu_seqlens must not fall");
    let three = normal(3, &[4, 3, 8]);
    assert_eq!(
        attention_varlen(&three, &normal(2, &[4, 2, 8]), &normal(2, &[4, 2, 8]), &[0, 4], 1.0).unwrap_err().0,
        "attention_varlen: 3 query heads cannot share 2 key-value heads"
    );
}

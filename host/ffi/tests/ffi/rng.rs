use host_ffi::rng::{absorb, absorb_tensor, composite_mask, dropout_mask, round_stochastic};
use tch::{Device, Kind, Tensor};

fn keys(count: i64) -> Tensor {
    Tensor::from_slice(&(0..count).map(|i| absorb(1234, i)).collect::<Vec<_>>())
}

#[test]
fn keys_on_a_device_equal_keys_on_the_host() {
    let values: Vec<i64> = vec![0, 1, -1, 7, i64::MAX, i64::MIN, 123_456_789];
    let got: Vec<i64> =
        Vec::try_from(absorb_tensor(&Tensor::from(42i64), &Tensor::from_slice(&values)).unwrap()).unwrap();
    let want: Vec<i64> = values.iter().map(|&v| absorb(42, v)).collect();
    assert_eq!(got, want);
}

#[test]
fn the_fused_mask_equals_the_one_of_operators() {
    let rows = keys(70);
    for keep in [1.0, 0.95, 0.5, 0.1] {
        for kind in [Kind::Float, Kind::BFloat16] {
            let fused = dropout_mask(&rows, 129, keep, kind).unwrap();
            let plain = composite_mask(&rows, 129, (keep * 4_294_967_296.0) as u64, keep, kind).unwrap();
            assert!(fused.equal(&plain), "keep {keep} {kind:?}");
        }
    }
}

#[test]
fn a_row_keeps_its_mask_wherever_it_lies() {
    let rows = keys(64);
    let whole = dropout_mask(&rows, 100, 0.9, Kind::Float).unwrap();
    let part = dropout_mask(&rows.narrow(0, 17, 5), 100, 0.9, Kind::Float).unwrap();
    assert!(whole.narrow(0, 17, 5).equal(&part));
}

#[test]
fn masks_look_random() {
    let mask = dropout_mask(&keys(1000), 1000, 0.9, Kind::Float).unwrap();
    let kept = mask.gt(0.0).to_kind(Kind::Double);
    let share = |t: &Tensor| t.mean(Kind::Double).double_value(&[]);
    // A million draws: the standard deviation of the share is 0.0003, of one row or column 0.0095.
    assert!((share(&kept) - 0.9).abs() < 0.0015, "{}", share(&kept));
    assert!((share(&mask) - 1.0).abs() < 0.002);
    for dim in [0i64, 1] {
        let shares = kept.mean_dim(&[dim][..], false, None::<Kind>);
        let spread = shares.std(true).double_value(&[]);
        assert!((0.0085..0.0105).contains(&spread), "dim {dim}: {spread}");
    }
    // Neighbouring columns and rows are independent: P(both kept) = 0.81, deviation 0.0005.
    for dim in [0i64, 1] {
        let both = kept.narrow(dim, 0, 999) * kept.narrow(dim, 1, 999);
        assert!((share(&both) - 0.81).abs() < 0.003, "dim {dim}: {}", share(&both));
    }
}

#[test]
fn nonsense_is_refused() {
    let rows = keys(2);
    for keep in [0.0, -0.1, 1.1, f64::NAN] {
        assert!(dropout_mask(&rows, 4, keep, Kind::Float).is_err());
    }
    assert!(dropout_mask(&rows, 4, 0.5, Kind::Int).is_err());
    assert!(dropout_mask(&rows.unsqueeze(0), 4, 0.5, Kind::Float).is_err());
    assert!(dropout_mask(&rows.to_kind(Kind::Float), 4, 0.5, Kind::Float).is_err());
}

/// Between its two neighbours, nearer ones more often, so that the mean is the number; the same however the numbers are split.
#[test]
fn random_rounding_is_right_on_average() {
    const N: i64 = 100_000;
    let round = |x: f64, key: i64| {
        let into = Tensor::zeros([N], (Kind::BFloat16, Device::Cpu));
        round_stochastic(&Tensor::full([N], x, (Kind::Float, Device::Cpu)), &into, key, 0).unwrap();
        into.to_kind(Kind::Double)
    };
    // Neighbours in bf16 are 2^-8 apart here; the chance strays by 0.0016 of that, six times over.
    let (low, apart) = (1.0, 2f64.powi(-7));
    for part in [0.0, 0.1, 0.5, 0.93] {
        for x in [low + part * apart, -(low + part * apart)] {
            let rounded = round(x, 7);
            let mean = rounded.mean(Kind::Double).double_value(&[]);
            assert!((mean - x).abs() < 0.01 * apart, "{x}: {mean}");
            let is_near = (rounded.abs() - low).remainder(apart).abs().lt(1e-12);
            assert!(bool::try_from(is_near.all()).unwrap());
        }
    }
    assert!(!round(1.003, 7).equal(&round(1.003, 8)));

    let from = Tensor::arange(1000, (Kind::Float, Device::Cpu)).sin();
    let whole = Tensor::zeros([1000], (Kind::BFloat16, Device::Cpu));
    round_stochastic(&from, &whole, 3, 50).unwrap();
    let part = Tensor::zeros([400], (Kind::BFloat16, Device::Cpu));
    round_stochastic(&from.narrow(0, 300, 400), &part, 3, 350).unwrap();
    assert!(whole.narrow(0, 300, 400).equal(&part));
    for odd in [f64::INFINITY, f64::NEG_INFINITY, f64::NAN] {
        let rounded = round(odd, 1).double_value(&[0]);
        assert!(rounded == odd || rounded.is_nan() && odd.is_nan());
    }
    assert!(round_stochastic(&from, &part, 0, 0).is_err());
}

use host_ffi::mmap::{MappedFile, tensor_from_bytes};
use tch::{Kind, Tensor};

use crate::reference::normal;

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

#[test]
fn bytes_become_tensors_of_any_dtype() {
    let want = normal(1, &[300, 7]);
    let values: Vec<f32> = Vec::try_from(want.reshape([-1])).unwrap();
    let bytes = bytes_of(&values);
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double, Kind::Half] {
        let got = tensor_from_bytes(Kind::Float, &[300, 7], &bytes, kind).unwrap();
        assert_eq!(got.kind(), kind);
        assert!(got.equal(&want.to_kind(kind)));
    }
    // The start of a tensor in a file need not be aligned.
    let mut shifted = vec![0u8];
    shifted.extend(&bytes);
    for kind in [Kind::Float, Kind::BFloat16] {
        let got = tensor_from_bytes(Kind::Float, &[300, 7], &shifted[1..], kind).unwrap();
        assert!(got.equal(&want.to_kind(kind)));
    }
    let bf16 = [0x80u8, 0x3f, 0x00, 0xc0];
    let got = tensor_from_bytes(Kind::BFloat16, &[2], &bf16, Kind::Float).unwrap();
    assert_eq!(Vec::<f32>::try_from(got).unwrap(), [1.0, -2.0]);
}

#[test]
fn a_big_tensor_is_copied_whole() {
    let values: Vec<f32> = (0..3_000_000).map(|i| i as f32).collect();
    let got = tensor_from_bytes(Kind::Float, &[3_000_000], &bytes_of(&values), Kind::Float).unwrap();
    assert!(got.equal(&Tensor::from_slice(&values)));
}

#[test]
fn empty_and_scalar_shapes_work() {
    let none = tensor_from_bytes(Kind::Float, &[0, 5], &[], Kind::BFloat16).unwrap();
    assert_eq!(none.size(), [0, 5]);
    let one = tensor_from_bytes(Kind::Int64, &[], &7i64.to_le_bytes(), Kind::Int64).unwrap();
    assert_eq!(one.int64_value(&[]), 7);
}

#[test]
fn lengths_that_do_not_fit_are_refused() {
    let message =
        |shape: &[i64], bytes: &[u8]| tensor_from_bytes(Kind::Float, shape, bytes, Kind::Float).unwrap_err().0;
    assert_eq!(message(&[2, 2], &[0; 12]), "a Float tensor of shape [2, 2] needs 16 bytes, got 12 bytes");
    assert_eq!(message(&[-1], &[0; 4]), "a Float tensor of shape [-1] needs more than memory can hold, got 4 bytes");
    assert!(message(&[i64::MAX, i64::MAX], &[]).contains("more than memory can hold"));
    assert!(tensor_from_bytes(Kind::Bool, &[1], &[2], Kind::Bool).is_err());
    assert!(tensor_from_bytes(Kind::QInt8, &[1], &[2], Kind::Float).is_err());
}

#[test]
fn a_file_reads_as_a_slice() {
    let path = std::env::temp_dir().join(format!("host-ffi-map-{}", std::process::id()));
    std::fs::write(&path, b"some bytes").unwrap();
    let map = MappedFile::open(&path).unwrap();
    assert_eq!(&map[..], b"some bytes");
    std::fs::write(&path, b"").unwrap();
    assert!(MappedFile::open(&path).unwrap().is_empty());
    std::fs::remove_file(&path).unwrap();
    assert_eq!(MappedFile::open(&path).unwrap_err().kind(), std::io::ErrorKind::NotFound);
}

//! One vector of numbers and one of their gradients, of which parameters are views: whatever is done to all of them is one
//! call, or one for each piece where it needs memory of its own.

use host::Result;
use tch::{Device, Kind, Tensor};

use crate::torch::TorchContext;

/// Numbers of a piece: 64 MB in fp32.
pub const PIECE: i64 = 1 << 24;

pub struct Flat {
    /// All parameters end to end.
    pub numbers: Tensor,
    /// Their gradients, accumulated by backward.
    pub grad: Tensor,
    /// Numbers that are a parameter's already.
    taken: i64,
}

impl Flat {
    pub fn new(size: i64, kind: Kind, device: Device) -> Self {
        let zeros = || Tensor::zeros([size], (kind, device));
        Self { numbers: zeros(), grad: zeros(), taken: 0 }
    }

    /// The next parameter: a leaf over numbers that no other has.
    pub fn leaf(&mut self, shape: &[i64]) -> Result<Tensor> {
        let size: i64 = shape.iter().product();
        let view = |flat: &Tensor| flat.narrow(0, self.taken, size).view(shape);
        let (leaf, grad) = (view(&self.numbers).set_requires_grad(true), view(&self.grad));
        host_ffi::grad::set_grad(&leaf, &grad).torch("lay out the gradients")?;
        self.taken += size;
        Ok(leaf)
    }

    pub fn size(&self) -> i64 {
        self.numbers.numel() as i64
    }

    /// The gradients in pieces; one, unless there are many.
    pub fn grad_pieces(&self) -> Vec<Tensor> {
        self.grad.split(PIECE, 0)
    }

    /// In fp64: libtorch's fp32 norm of a million numbers is off by 1e-4 on a CPU.
    pub fn grad_norm(&self) -> f64 {
        let norms: Vec<Tensor> = self.grad_pieces().iter().map(|piece| piece.to_kind(Kind::Double).norm()).collect();
        Tensor::stack(&norms, 0).norm().double_value(&[])
    }

    /// Tells numbers apart, to the last bit.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        for piece in self.numbers.detach().split(PIECE, 0) {
            let piece = piece.to_device(Device::Cpu);
            let mut bytes = vec![0; piece.numel() * piece.kind().elt_size_in_bytes()];
            piece.copy_data_u8(&mut bytes, piece.numel());
            hasher.update(&bytes);
        }
        hasher.finalize().to_hex().to_string()
    }
}

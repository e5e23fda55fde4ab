//! One vector of numbers and one of their gradients, of which parameters are views: whatever is done to all of them is one
//! call, or one for each piece where it needs memory of its own.

use host::Result;
use tch::{Device, Kind, Tensor};

use crate::torch::TorchContext;

/// Numbers of a piece: 64 MB in fp32.
pub const PIECE: i64 = 1 << 24;

/// A copy in host memory that nothing done to `tensor` changes.
pub fn to_host(tensor: &Tensor) -> Tensor {
    let host = tensor.detach().to_device(Device::Cpu);
    if tensor.device() == Device::Cpu { host.copy() } else { host }
}

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
        let grad = self.grad.narrow(0, self.taken, shape.iter().product()).view(shape);
        let leaf = self.next(shape).set_requires_grad(true);
        host_ffi::grad::set_grad(&leaf, &grad).torch("lay out the gradients")?;
        Ok(leaf)
    }

    /// The next parameter's numbers.
    pub fn next(&mut self, shape: &[i64]) -> Tensor {
        let size: i64 = shape.iter().product();
        self.taken += size;
        self.numbers.narrow(0, self.taken - size, size).view(shape)
    }

    /// The numbers as they are now, in memory of their own; without gradients, and with no parameter laid out.
    pub fn snapshot(&self) -> Self {
        let numbers = to_host(&self.numbers);
        Self { grad: numbers.narrow(0, 0, 0), numbers, taken: 0 }
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

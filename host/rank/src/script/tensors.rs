//! Tensor operations for guests: shapes are checked first, torch's own complaints become errors of the guest.
//!
//! Results are capped in size because a broadcast of two small tensors can ask for terabytes, and the machine would only
//! notice while writing them.

use std::time::Instant;

use tch::{Kind, TchError, Tensor};
use wasmtime::component::Resource;

use super::api::{HostError, HostResult, HostState, tensors, types, unknown_handle};

/// The most elements a tensor made by a guest may have: 8 GiB of 32-bit floats.
const MAX_ELEMENTS: i64 = 1 << 31;

/// As in PyTorch, whose operations need not take more.
const MAX_DIMS: usize = 64;

/// A tensor, or what is left of it after its step.
pub enum TensorSlot {
    Live { tensor: Tensor, arena: Option<u64> },
    Gone { shape: Vec<i64> },
}

impl HostState {
    /// Makes a handle for `tensor`, which belongs to the step in progress.
    pub(super) fn keep(&mut self, tensor: Tensor) -> HostResult<Resource<TensorSlot>> {
        self.check_handles()?;
        let bytes = self.tensor_bytes.saturating_add(bytes(&tensor));
        if bytes > self.max_tensor_bytes {
            let message = format!(
                "a tensor of shape {:?} brings the guest's to {} MiB, and their limit is {} MiB",
                tensor.size(),
                bytes >> 20,
                self.max_tensor_bytes >> 20
            );
            return Err(HostError::guest(types::Code::Limit, message)
                .hint("call `step.backward` for each batch, which frees what led to its sum; `limits.tensors_mb` raises the limit"));
        }
        self.tensor_bytes = bytes;
        let arena = self.arena();
        Ok(self.tensors.insert(TensorSlot::Live { tensor, arena }))
    }

    /// Counts anew what the guest holds, once autograd needs nothing of what it made.
    pub(super) fn count_tensors(&mut self) {
        let live = self.tensors.iter_mut().map(|slot| match slot {
            TensorSlot::Live { tensor, .. } => bytes(tensor),
            TensorSlot::Gone { .. } => 0,
        });
        self.tensor_bytes = live.sum();
    }

    pub(super) fn tensor(&self, handle: &Resource<TensorSlot>) -> HostResult<&Tensor> {
        match self.tensors.get(handle).ok_or_else(unknown_handle)? {
            TensorSlot::Live { tensor, .. } => Ok(tensor),
            TensorSlot::Gone { shape } => Err(HostError::guest(
                types::Code::Invalid,
                format!("this tensor of shape {shape:?} went with its step, which is finished"),
            )
            .hint("read what is needed later as a number, with `item()`, before `step.finish()`")),
        }
    }

    /// Releases the storage of every tensor that was made in the step `turn`.
    pub(super) fn end_arena(&mut self, turn: u64) {
        for slot in self.tensors.iter_mut() {
            if let TensorSlot::Live { tensor, arena } = slot
                && *arena == Some(turn)
            {
                *slot = TensorSlot::Gone { shape: tensor.size() };
            }
        }
    }

    fn unary(
        &mut self,
        name: &str,
        x: Resource<TensorSlot>,
        op: impl FnOnce(&Tensor) -> Result<Tensor, TchError>,
    ) -> HostResult<Resource<TensorSlot>> {
        let entered = Instant::now();
        let x = self.tensor(&x)?;
        let result = op(x).map_err(|error| torch_error(name, &[x], error))?;
        self.clock.leave_host(entered);
        self.keep(result)
    }

    /// An operation along `dim`, which must be one of the tensor's.
    fn along(
        &mut self,
        name: &str,
        x: Resource<TensorSlot>,
        dim: i64,
        op: impl FnOnce(&Tensor) -> Result<Tensor, TchError>,
    ) -> HostResult<Resource<TensorSlot>> {
        check_dim(name, dim, &self.tensor(&x)?.size())?;
        self.unary(name, x, op)
    }

    fn binary(
        &mut self,
        name: &str,
        x: Resource<TensorSlot>,
        y: Resource<TensorSlot>,
        shape: impl FnOnce(&str, &[i64], &[i64]) -> HostResult<Vec<i64>>,
        op: impl FnOnce(&Tensor, &Tensor) -> Result<Tensor, TchError>,
    ) -> HostResult<Resource<TensorSlot>> {
        let entered = Instant::now();
        let (x, y) = (self.tensor(&x)?, self.tensor(&y)?);
        check_elements(name, &shape(name, &x.size(), &y.size())?)?;
        let result = op(x, y).map_err(|error| torch_error(name, &[x, y], error))?;
        self.clock.leave_host(entered);
        self.keep(result)
    }
}

impl tensors::HostTensor for HostState {
    fn shape(&mut self, x: Resource<TensorSlot>) -> wasmtime::Result<Vec<i64>> {
        match self.tensors.get(&x) {
            Some(TensorSlot::Live { tensor, .. }) => Ok(tensor.size()),
            Some(TensorSlot::Gone { shape }) => Ok(shape.clone()),
            None => Err(self.trap(unknown_handle())),
        }
    }

    fn add(&mut self, x: Resource<TensorSlot>, y: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.binary("add", x, y, broadcast, |x, y| x.f_add(y))
    }

    fn sub(&mut self, x: Resource<TensorSlot>, y: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.binary("sub", x, y, broadcast, |x, y| x.f_sub(y))
    }

    fn mul(&mut self, x: Resource<TensorSlot>, y: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.binary("mul", x, y, broadcast, |x, y| x.f_mul(y))
    }

    fn div(&mut self, x: Resource<TensorSlot>, y: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.binary("div", x, y, broadcast, |x, y| x.f_div(y))
    }

    fn add_scalar(&mut self, x: Resource<TensorSlot>, value: f64) -> HostResult<Resource<TensorSlot>> {
        self.unary("add_scalar", x, |x| x.f_add_scalar(value))
    }

    fn mul_scalar(&mut self, x: Resource<TensorSlot>, value: f64) -> HostResult<Resource<TensorSlot>> {
        self.unary("mul_scalar", x, |x| x.f_mul_scalar(value))
    }

    fn neg(&mut self, x: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.unary("neg", x, |x| x.f_neg())
    }

    fn exp(&mut self, x: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.unary("exp", x, |x| x.f_exp())
    }

    fn log(&mut self, x: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.unary("log", x, |x| x.f_log())
    }

    fn log_sigmoid(&mut self, x: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.unary("log_sigmoid", x, |x| x.f_log_sigmoid())
    }

    fn log_softmax(&mut self, x: Resource<TensorSlot>, dim: i64) -> HostResult<Resource<TensorSlot>> {
        self.along("log_softmax", x, dim, |x| x.f_log_softmax(dim, None::<Kind>))
    }

    fn logsumexp(&mut self, x: Resource<TensorSlot>, dim: i64) -> HostResult<Resource<TensorSlot>> {
        self.along("logsumexp", x, dim, |x| x.f_logsumexp(dim, false))
    }

    fn sum(&mut self, x: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.unary("sum", x, |x| x.f_sum(None::<Kind>))
    }

    fn mean(&mut self, x: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.unary("mean", x, |x| x.f_mean(None::<Kind>))
    }

    fn sum_dim(&mut self, x: Resource<TensorSlot>, dim: i64) -> HostResult<Resource<TensorSlot>> {
        self.along("sum_dim", x, dim, |x| x.f_sum_dim_intlist(dim, false, None::<Kind>))
    }

    fn gather(
        &mut self,
        x: Resource<TensorSlot>,
        dim: i64,
        index: Resource<TensorSlot>,
    ) -> HostResult<Resource<TensorSlot>> {
        let (source, indices) = (self.tensor(&x)?, self.tensor(&index)?);
        check_gather(source, dim, indices)?;
        self.binary("gather", x, index, |_, _, index| Ok(index.to_vec()), |x, index| x.f_gather(dim, index, false))
    }

    fn unsqueeze(&mut self, x: Resource<TensorSlot>, dim: i64) -> HostResult<Resource<TensorSlot>> {
        let mut shape = self.tensor(&x)?.size();
        shape.push(1);
        check_dim("unsqueeze", dim, &shape)?;
        if shape.len() > MAX_DIMS {
            let message =
                format!("`unsqueeze` would make {} dimensions, and a tensor has at most {MAX_DIMS}", shape.len());
            return Err(HostError::guest(types::Code::Limit, message));
        }
        self.unary("unsqueeze", x, |x| x.f_unsqueeze(dim))
    }

    fn squeeze(&mut self, x: Resource<TensorSlot>, dim: i64) -> HostResult<Resource<TensorSlot>> {
        let shape = self.tensor(&x)?.size();
        let index = check_dim("squeeze", dim, &shape)?;
        if shape[index] != 1 {
            let message = format!("`squeeze` drops a dimension of size 1, and dimension {dim} of {shape:?} is not");
            return Err(HostError::guest(types::Code::Shape, message));
        }
        self.unary("squeeze", x, |x| x.f_squeeze_dim(dim))
    }

    fn matmul(&mut self, x: Resource<TensorSlot>, y: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.binary("matmul", x, y, matmul_shape, |x, y| x.f_matmul(y))
    }

    fn to_float(&mut self, x: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.unary("to_float", x, |x| x.f_to_kind(Kind::Float))
    }

    fn detach(&mut self, x: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
        self.unary("detach", x, |x| x.f_detach())
    }

    fn item(&mut self, x: Resource<TensorSlot>) -> HostResult<f64> {
        let entered = Instant::now();
        let x = self.tensor(&x)?;
        if x.numel() != 1 {
            let message = format!("`item` reads a tensor of one element, not one of shape {:?}", x.size());
            return Err(HostError::guest(types::Code::Shape, message).hint("reduce it with `sum()` or `mean()` first"));
        }
        let value = x.f_double_value(&vec![0; x.dim()]).map_err(|error| torch_error("item", &[x], error))?;
        self.clock.leave_host(entered);
        Ok(value)
    }

    fn drop(&mut self, x: Resource<TensorSlot>) -> wasmtime::Result<()> {
        self.tensors.remove(&x);
        Ok(())
    }
}

fn bytes(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// The index `dim` means in `shape`; negative counts from the end.
fn check_dim(name: &str, dim: i64, shape: &[i64]) -> HostResult<usize> {
    let rank = shape.len() as i64;
    if (-rank..rank).contains(&dim) {
        return Ok(if dim < 0 { dim + rank } else { dim } as usize);
    }
    let message = match rank {
        0 => format!("`{name}` over dimension {dim} of a scalar, which has none"),
        _ => format!("`{name}` over dimension {dim}, but shape {shape:?} has dimensions {} to {}", -rank, rank - 1),
    };
    Err(HostError::guest(types::Code::Shape, message))
}

fn check_elements(name: &str, shape: &[i64]) -> HostResult<()> {
    let elements = shape.iter().try_fold(1i64, |product, &size| product.checked_mul(size));
    if elements.is_some_and(|elements| elements <= MAX_ELEMENTS) {
        return Ok(());
    }
    let message = format!(
        "`{name}` would make a tensor of shape {shape:?}, and a guest's may have at most {MAX_ELEMENTS} elements"
    );
    Err(HostError::guest(types::Code::Limit, message))
}

/// The shape two shapes broadcast to.
fn broadcast(name: &str, x: &[i64], y: &[i64]) -> HostResult<Vec<i64>> {
    let rank = x.len().max(y.len());
    let size = |shape: &[i64], index: usize| (index + shape.len()).checked_sub(rank).map_or(1, |index| shape[index]);
    (0..rank)
        .map(|index| match (size(x, index), size(y, index)) {
            (x, y) if x == y || y == 1 => Ok(x),
            (1, y) => Ok(y),
            _ => {
                Err(HostError::guest(types::Code::Shape, format!("`{name}`: shapes {x:?} and {y:?} do not broadcast"))
                    .hint("sizes must be equal or 1, compared from the last dimension; `unsqueeze` adds a dimension"))
            }
        })
        .collect()
}

fn matmul_shape(name: &str, x: &[i64], y: &[i64]) -> HostResult<Vec<i64>> {
    let mismatch = || {
        HostError::guest(types::Code::Shape, format!("`{name}`: shapes {x:?} and {y:?} cannot be multiplied"))
            .hint("the last dimension of the first must be as long as the second last of the second")
    };
    if x.is_empty() || y.is_empty() {
        return Err(mismatch());
    }
    let (rows, columns) = (x.len() > 1, y.len() > 1);
    let inner = if columns { y[y.len() - 2] } else { y[0] };
    if x[x.len() - 1] != inner {
        return Err(mismatch());
    }
    let mut shape = broadcast(name, &x[..x.len().saturating_sub(2)], &y[..y.len().saturating_sub(2)])?;
    if rows {
        shape.push(x[x.len() - 2]);
    }
    if columns {
        shape.push(y[y.len() - 1]);
    }
    Ok(shape)
}

fn check_gather(source: &Tensor, dim: i64, index: &Tensor) -> HostResult<()> {
    let (shape, index_shape) = (source.size(), index.size());
    let dim = check_dim("gather", dim, &shape)?;
    let fits = shape.len() == index_shape.len()
        && (0..shape.len()).all(|other| other == dim || index_shape[other] <= shape[other]);
    if !fits {
        let message =
            format!("`gather` along dimension {dim} of {shape:?} cannot take an index of shape {index_shape:?}");
        return Err(HostError::guest(types::Code::Shape, message)
            .hint("the index needs as many dimensions; `unsqueeze(-1)` makes a column of a list"));
    }
    let kind = index.f_kind().map_err(|error| torch_error("gather", &[index], error))?;
    if !matches!(kind, Kind::Int64 | Kind::Int) {
        let message = "`gather` needs an index of integers, such as `batch.labels()`";
        return Err(HostError::guest(types::Code::Invalid, message));
    }
    // A GPU answers an index out of range by ending the process's use of it, so there the range is checked first.
    if source.device().is_cuda() && index.numel() > 0 {
        let bound = |value: Result<Tensor, TchError>| value.and_then(|value| value.f_int64_value(&[]));
        let low = bound(index.f_min()).map_err(|error| torch_error("gather", &[index], error))?;
        let high = bound(index.f_max()).map_err(|error| torch_error("gather", &[index], error))?;
        if low < 0 || high >= shape[dim] {
            let message =
                format!("`gather`: index {} is outside of 0 to {}", if low < 0 { low } else { high }, shape[dim] - 1);
            return Err(HostError::guest(types::Code::Invalid, message));
        }
    }
    Ok(())
}

/// Torch's complaint about `name` on `tensors`, without its C++ stack.
fn torch_error(name: &str, tensors: &[&Tensor], error: TchError) -> HostError {
    let text = match error {
        TchError::Torch(text) => text,
        other => other.to_string(),
    };
    let line = text.lines().next().unwrap_or_default().trim();
    if line.contains("out of memory") || line.contains("not enough memory") {
        // Another rank may wait for this one in a collective: no guest can make up for that.
        return host::Error::run(format!("`{name}` ran out of memory")).cause(line).into();
    }
    let shapes: Vec<String> = tensors.iter().map(|tensor| format!("{:?}", tensor.size())).collect();
    HostError::guest(types::Code::Invalid, format!("`{name}` of {}: {line}", shapes.join(" and ")))
}

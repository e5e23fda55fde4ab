//! Tensor operations for guests: shapes are checked first, torch's own complaints become errors of the guest.
//!
//! Results are capped in size because a broadcast of two small tensors can ask for terabytes, and the machine would only
//! notice while writing them.

use std::time::Instant;

use tch::{Device, Kind, TchError, Tensor};
use wasmtime::component::Resource;

use host::panics;

use super::api::{HostError, HostResult, HostState, tensors, types, unknown_handle};
use super::limits::{PEAKS, Peaks};

/// The most elements a tensor made by a guest may have: 8 GiB of 32-bit floats.
const MAX_ELEMENTS: i64 = 1 << 31;

/// The most numbers that cross the boundary in one call.
const MAX_NUMBERS: usize = 65_536;

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
        self.check_bytes(&tensor.size(), bytes)?;
        self.tensor_bytes = bytes;
        Peaks::raise(&PEAKS.tensors, bytes as u64);
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

    /// A tensor of the host's, handed to a guest.
    pub(super) fn lend(&mut self, tensor: &Tensor) -> HostResult<Resource<TensorSlot>> {
        self.keep(tensor.shallow_clone())
    }

    /// Takes back what was lent, or given.
    pub(super) fn release(&mut self, handle: &Resource<TensorSlot>) {
        self.tensors.remove(handle);
    }

    /// Looks at the guest's limit before torch writes what exceeds it.
    fn check_room(&self, shape: &[i64], bytes_each: usize) -> HostResult<()> {
        let elements: i64 = shape.iter().product();
        self.check_bytes(shape, self.tensor_bytes.saturating_add((elements as usize).saturating_mul(bytes_each)))
    }

    fn check_bytes(&self, shape: &[i64], bytes: usize) -> HostResult<()> {
        if bytes <= self.max_tensor_bytes {
            return Ok(());
        }
        let message = format!(
            "a tensor of shape {shape:?} brings the guest's to {} MiB, and their limit is {} MiB",
            bytes >> 20,
            self.max_tensor_bytes >> 20
        );
        Err(HostError::guest(types::Code::Limit, message)
            .hint("call `step.backward` for each batch, which frees what led to its sum; `limits.tensors_mb` raises the limit"))
    }

    /// An operation of torch's. Where it refuses, tch's wrapper of a number panics, and what it says is torch's reason too.
    fn attempt(
        &self,
        name: &str,
        tensors: &[&Tensor],
        work: impl FnOnce() -> Result<Tensor, TchError>,
    ) -> HostResult<Tensor> {
        let work = || if self.grad { work() } else { tch::no_grad(work) };
        let outcome = panics::caught(work).unwrap_or_else(|panic| {
            let reason = panic.split_once("Torch(\"").map_or(panic.as_str(), |(_, reason)| reason);
            Err(TchError::Torch(reason.split("\\n").next().unwrap_or(reason).to_owned()))
        });
        outcome.map_err(|error| torch_error(name, tensors, error))
    }

    /// A tensor of no other, on the model's device.
    fn create(
        &mut self,
        name: &str,
        shape: &[i64],
        make: impl FnOnce(Device) -> Result<Tensor, TchError>,
    ) -> HostResult<Resource<TensorSlot>> {
        let entered = Instant::now();
        self.check_room(shape, 8)?;
        let Some(device) = self.device else {
            return Err(HostError::guest(types::Code::Invalid, format!("`{name}` came before there is a model"))
                .hint("a loss makes its tensors in `compute`; they die with the call"));
        };
        let made = self.attempt(name, &[], || make(device))?;
        self.clock.leave_host(entered);
        self.keep(made)
    }

    fn unary(
        &mut self,
        name: &str,
        x: Resource<TensorSlot>,
        op: impl FnOnce(&Tensor) -> Result<Tensor, TchError>,
    ) -> HostResult<Resource<TensorSlot>> {
        let entered = Instant::now();
        let x = self.tensor(&x)?;
        if let Some(bytes_each) = written(name, x.kind()) {
            self.check_room(&x.size(), bytes_each)?;
        }
        let result = self.attempt(name, &[x], || op(x))?;
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
        let shape = shape(name, &x.size(), &y.size())?;
        check_elements(name, &shape)?;
        self.check_room(&shape, x.kind().elt_size_in_bytes().max(y.kind().elt_size_in_bytes()))?;
        let result = self.attempt(name, &[x, y], || op(x, y))?;
        self.clock.leave_host(entered);
        self.keep(result)
    }
}

/// Bytes that an operation on one tensor writes for each of its elements; none where it makes a view or fewer elements, which
/// are counted when they are there.
fn written(name: &str, kind: Kind) -> Option<usize> {
    match name {
        "sum" | "mean" | "max" | "min" | "logsumexp" | "sum_dim" | "mean_dim" | "max_dim" | "min_dim" | "argmax" => {
            None
        }
        "flatten" | "detach" | "select" | "narrow" | "transpose" | "reshape" | "expand" | "squeeze" | "unsqueeze" => {
            None
        }
        "logical_not" | "to_bool" | "eq_scalar" | "lt_scalar" | "gt_scalar" => Some(1),
        "to_float" => Some(4),
        "to_int" => Some(8),
        "cumsum" if kind == Kind::Bool => Some(8),
        _ => Some(kind.elt_size_in_bytes().max(4)),
    }
}

/// Methods whose result has a shape that is no larger than their tensor's.
macro_rules! unary {
    ($($name:ident: $op:expr,)*) => {$(
        fn $name(&mut self, x: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
            self.unary(stringify!($name), x, $op)
        }
    )*};
}

macro_rules! with_scalar {
    ($($name:ident: $op:expr,)*) => {$(
        fn $name(&mut self, x: Resource<TensorSlot>, value: f64) -> HostResult<Resource<TensorSlot>> {
            let op: fn(&Tensor, f64) -> Result<Tensor, TchError> = $op;
            self.unary(stringify!($name), x, |x| op(x, value))
        }
    )*};
}

macro_rules! along {
    ($($name:ident: $op:expr,)*) => {$(
        fn $name(&mut self, x: Resource<TensorSlot>, dim: i64) -> HostResult<Resource<TensorSlot>> {
            let op: fn(&Tensor, i64) -> Result<Tensor, TchError> = $op;
            self.along(stringify!($name), x, dim, |x| op(x, dim))
        }
    )*};
}

macro_rules! broadcasting {
    ($($name:ident: $op:expr,)*) => {$(
        fn $name(&mut self, x: Resource<TensorSlot>, y: Resource<TensorSlot>) -> HostResult<Resource<TensorSlot>> {
            self.binary(stringify!($name), x, y, broadcast, $op)
        }
    )*};
}

impl tensors::HostTensor for HostState {
    fn shape(&mut self, x: Resource<TensorSlot>) -> wasmtime::Result<Vec<i64>> {
        match self.tensors.get(&x) {
            Some(TensorSlot::Live { tensor, .. }) => Ok(tensor.size()),
            Some(TensorSlot::Gone { shape }) => Ok(shape.clone()),
            None => Err(self.trap(unknown_handle())),
        }
    }

    unary! {
        neg: |x| x.f_neg(),
        abs: |x| x.f_abs(),
        sign: |x| x.f_sign(),
        sqrt: |x| x.f_sqrt(),
        reciprocal: |x| x.f_reciprocal(),
        exp: |x| x.f_exp(),
        expm1: |x| x.f_expm1(),
        log: |x| x.f_log(),
        log1p: |x| x.f_log1p(),
        relu: |x| x.f_relu(),
        sigmoid: |x| x.f_sigmoid(),
        log_sigmoid: |x| x.f_log_sigmoid(),
        softplus: |x| x.f_softplus(),
        tanh: |x| x.f_tanh(),
        sum: |x| x.f_sum(None::<Kind>),
        mean: |x| x.f_mean(None::<Kind>),
        max: |x| x.f_max(),
        min: |x| x.f_min(),
        flatten: |x| x.f_flatten(0, -1),
        logical_not: |x| x.f_logical_not(),
        to_float: |x| x.f_to_kind(Kind::Float),
        to_int: |x| x.f_to_kind(Kind::Int64),
        to_bool: |x| x.f_to_kind(Kind::Bool),
        detach: |x| x.f_detach(),
    }

    with_scalar! {
        add_scalar: |x, value| as_is(x, value, |x, i| x.f_add_scalar(i), |x, value| x.f_add_scalar(value)),
        sub_scalar: |x, value| as_is(x, value, |x, i| x.f_sub_scalar(i), |x, value| x.f_sub_scalar(value)),
        rsub_scalar: |x, value| {
            as_is(&x.f_neg()?, value, |x, i| x.f_add_scalar(i), |x, value| x.f_add_scalar(value))
        },
        mul_scalar: |x, value| as_is(x, value, |x, i| x.f_mul_scalar(i), |x, value| x.f_mul_scalar(value)),
        div_scalar: |x, value| x.f_div_scalar(value),
        pow_scalar: |x, value| x.f_pow_tensor_scalar(value),
        eq_scalar: |x, value| as_is(x, value, |x, i| x.f_eq(i), |x, value| x.f_eq(value)),
        lt_scalar: |x, value| as_is(x, value, |x, i| x.f_lt(i), |x, value| x.f_lt(value)),
        gt_scalar: |x, value| as_is(x, value, |x, i| x.f_gt(i), |x, value| x.f_gt(value)),
    }

    along! {
        softmax: |x, dim| x.f_softmax(dim, None::<Kind>),
        log_softmax: |x, dim| x.f_log_softmax(dim, None::<Kind>),
        logsumexp: |x, dim| x.f_logsumexp(dim, false),
        sum_dim: |x, dim| x.f_sum_dim_intlist(dim, false, None::<Kind>),
        mean_dim: |x, dim| x.f_mean_dim(dim, false, None::<Kind>),
        max_dim: |x, dim| x.f_amax(dim, false),
        min_dim: |x, dim| x.f_amin(dim, false),
        argmax: |x, dim| x.f_argmax(dim, false),
        cumsum: |x, dim| x.f_cumsum(dim, None::<Kind>),
    }

    broadcasting! {
        add: |x, y| x.f_add(y),
        sub: |x, y| x.f_sub(y),
        mul: |x, y| x.f_mul(y),
        div: |x, y| x.f_div(y),
        minimum: |x, y| x.f_minimum(y),
        maximum: |x, y| x.f_maximum(y),
        eq: |x, y| x.f_eq_tensor(y),
        ne: |x, y| x.f_ne_tensor(y),
        lt: |x, y| x.f_lt_tensor(y),
        le: |x, y| x.f_le_tensor(y),
        gt: |x, y| x.f_gt_tensor(y),
        ge: |x, y| x.f_ge_tensor(y),
        logical_and: |x, y| x.f_logical_and(y),
        logical_or: |x, y| x.f_logical_or(y),
    }

    fn clamp(&mut self, x: Resource<TensorSlot>, min: f64, max: f64) -> HostResult<Resource<TensorSlot>> {
        if min > max || min.is_nan() || max.is_nan() {
            let message =
                format!("`clamp` takes two numbers of which the first is not the larger, not {min} and {max}");
            return Err(HostError::guest(types::Code::Invalid, message));
        }
        self.unary("clamp", x, |x| x.f_clamp(min, max))
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

    fn index_select(
        &mut self,
        x: Resource<TensorSlot>,
        dim: i64,
        index: Resource<TensorSlot>,
    ) -> HostResult<Resource<TensorSlot>> {
        let (source, indices) = (self.tensor(&x)?, self.tensor(&index)?);
        let mut shape = source.size();
        let at = check_dim("index_select", dim, &shape)?;
        if indices.dim() != 1 {
            let message = format!("`index_select` takes a list of indices, not a tensor of shape {:?}", indices.size());
            return Err(HostError::guest(types::Code::Shape, message).hint("`flatten()` makes a list of it"));
        }
        check_index("index_select", indices, shape[at])?;
        shape[at] = indices.size()[0];
        self.binary("index_select", x, index, |_, _, _| Ok(shape), |x, index| x.f_index_select(dim, index))
    }

    fn select(&mut self, x: Resource<TensorSlot>, dim: i64, index: i64) -> HostResult<Resource<TensorSlot>> {
        let shape = self.tensor(&x)?.size();
        let size = shape[check_dim("select", dim, &shape)?];
        if !(-size..size).contains(&index) {
            let message = format!("`select`: index {index} is outside of dimension {dim} of {shape:?}");
            return Err(HostError::guest(types::Code::Shape, message));
        }
        self.unary("select", x, |x| x.f_select(dim, index))
    }

    fn narrow(
        &mut self,
        x: Resource<TensorSlot>,
        dim: i64,
        start: i64,
        length: i64,
    ) -> HostResult<Resource<TensorSlot>> {
        let shape = self.tensor(&x)?.size();
        let size = shape[check_dim("narrow", dim, &shape)?];
        let from = if start < 0 { start.saturating_add(size) } else { start };
        if from < 0 || length < 0 || from.saturating_add(length) > size {
            let message = format!("`narrow`: {length} from {start} on is more than dimension {dim} of {shape:?} has");
            return Err(HostError::guest(types::Code::Shape, message));
        }
        self.unary("narrow", x, |x| x.f_narrow(dim, from, length))
    }

    fn cat(&mut self, x: Resource<TensorSlot>, y: Resource<TensorSlot>, dim: i64) -> HostResult<Resource<TensorSlot>> {
        let shape = |name: &str, x: &[i64], y: &[i64]| {
            let at = check_dim(name, dim, x)?;
            let fits = x.len() == y.len() && (0..x.len()).all(|other| other == at || x[other] == y[other]);
            if !fits {
                let message = format!("`cat` along dimension {dim}: shapes {x:?} and {y:?} differ elsewhere");
                return Err(HostError::guest(types::Code::Shape, message));
            }
            let mut shape = x.to_vec();
            shape[at] += y[at];
            Ok(shape)
        };
        self.binary("cat", x, y, shape, |x, y| Tensor::f_cat(&[x, y], dim))
    }

    fn segment_sum(
        &mut self,
        x: Resource<TensorSlot>,
        segments: Resource<TensorSlot>,
        count: i64,
    ) -> HostResult<Resource<TensorSlot>> {
        let (tensor, index) = (self.tensor(&x)?, self.tensor(&segments)?);
        let (shape, of) = (tensor.size(), index.size());
        if shape.is_empty() || of.len() != 1 || of[0] != shape[0] {
            let message = format!("`segment_sum`: segments of shape {of:?} for a tensor of shape {shape:?}");
            return Err(HostError::guest(types::Code::Shape, message).hint("one segment for each slice of dimension 0"));
        }
        check_index("segment_sum", index, count)?;
        let mut sums = shape;
        sums[0] = count;
        check_sizes("segment_sum", &sums)?;
        self.binary(
            "segment_sum",
            x,
            segments,
            |_, _, _| Ok(sums.clone()),
            |x, index| Tensor::f_zeros(&sums, (x.kind(), x.device()))?.f_index_add(0, index, x),
        )
    }

    fn transpose(&mut self, x: Resource<TensorSlot>, first: i64, second: i64) -> HostResult<Resource<TensorSlot>> {
        let shape = self.tensor(&x)?.size();
        check_dim("transpose", first, &shape)?;
        check_dim("transpose", second, &shape)?;
        self.unary("transpose", x, |x| x.f_transpose(first, second))
    }

    fn reshape(&mut self, x: Resource<TensorSlot>, shape: Vec<i64>) -> HostResult<Resource<TensorSlot>> {
        check_rank("reshape", shape.len())?;
        let from = self.tensor(&x)?.size();
        let open = shape.iter().filter(|size| **size == -1).count();
        let known = shape
            .iter()
            .filter(|size| **size != -1)
            .try_fold(1i64, |product, &size| (size >= 0).then(|| product.checked_mul(size)).flatten());
        let elements: i64 = from.iter().product();
        let fits = match (known, open) {
            (Some(known), 0) => known == elements,
            (Some(known), 1) => known > 0 && elements % known == 0,
            _ => false,
        };
        if !fits {
            let message = format!("`reshape`: a tensor of shape {from:?} does not fit the shape {shape:?}");
            return Err(HostError::guest(types::Code::Shape, message).hint("one size may be -1, for what is left"));
        }
        self.unary("reshape", x, |x| x.f_reshape(&shape))
    }

    fn expand(&mut self, x: Resource<TensorSlot>, shape: Vec<i64>) -> HostResult<Resource<TensorSlot>> {
        check_rank("expand", shape.len())?;
        check_sizes("expand", &shape)?;
        let from = self.tensor(&x)?.size();
        let is_wider = |(size, wanted): (&i64, &i64)| size == wanted || *size == 1;
        if from.len() > shape.len() || !from.iter().rev().zip(shape.iter().rev()).all(is_wider) {
            let message = format!("`expand`: a tensor of shape {from:?} cannot be repeated to {shape:?}");
            return Err(HostError::guest(types::Code::Shape, message)
                .hint("only dimensions of size 1 are repeated, compared from the last"));
        }
        self.unary("expand", x, |x| x.f_expand(&shape, false))
    }

    fn choose(
        &mut self,
        mask: Resource<TensorSlot>,
        yes: Resource<TensorSlot>,
        no: Resource<TensorSlot>,
    ) -> HostResult<Resource<TensorSlot>> {
        let entered = Instant::now();
        let (mask, yes, no) = (self.tensor(&mask)?, self.tensor(&yes)?, self.tensor(&no)?);
        check_mask("choose", mask)?;
        let shape = broadcast("choose", &yes.size(), &no.size())?;
        check_elements("choose", &broadcast("choose", &mask.size(), &shape)?)?;
        let result = self.attempt("choose", &[mask, yes, no], || yes.f_where_self(mask, no))?;
        self.clock.leave_host(entered);
        self.keep(result)
    }

    fn masked_fill(
        &mut self,
        x: Resource<TensorSlot>,
        mask: Resource<TensorSlot>,
        value: f64,
    ) -> HostResult<Resource<TensorSlot>> {
        check_mask("masked_fill", self.tensor(&mask)?)?;
        self.binary("masked_fill", x, mask, broadcast, |x, mask| x.f_masked_fill(mask, value))
    }

    fn unsqueeze(&mut self, x: Resource<TensorSlot>, dim: i64) -> HostResult<Resource<TensorSlot>> {
        let mut shape = self.tensor(&x)?.size();
        shape.push(1);
        check_dim("unsqueeze", dim, &shape)?;
        check_rank("unsqueeze", shape.len())?;
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

    fn item(&mut self, x: Resource<TensorSlot>, over: tensors::Over) -> HostResult<f64> {
        let entered = Instant::now();
        let x = self.tensor(&x)?;
        if x.numel() != 1 {
            let message = format!("`item` reads a tensor of one element, not one of shape {:?}", x.size());
            return Err(HostError::guest(types::Code::Shape, message).hint("reduce it with `sum()` or `mean()` first"));
        }
        let value = x.f_double_value(&vec![0; x.dim()]).map_err(|error| torch_error("item", &[x], error))?;
        self.clock.leave_host(entered);
        Ok(self.over_ranks(vec![value], over)?[0])
    }

    fn numbers(&mut self, x: Resource<TensorSlot>, over: tensors::Over) -> HostResult<Vec<f64>> {
        let entered = Instant::now();
        let x = self.tensor(&x)?;
        if x.numel() > MAX_NUMBERS {
            let message =
                format!("`numbers` reads at most {MAX_NUMBERS} elements, not a tensor of shape {:?}", x.size());
            return Err(HostError::guest(types::Code::Limit, message).hint("reduce it first"));
        }
        let flat = x.f_detach().and_then(|x| x.f_flatten(0, -1)?.f_to_kind(Kind::Double));
        let numbers = flat.and_then(Vec::<f64>::try_from);
        let numbers = numbers.map_err(|error| torch_error("numbers", &[x], error))?;
        self.clock.leave_host(entered);
        self.over_ranks(numbers, over)
    }

    fn drop(&mut self, x: Resource<TensorSlot>) -> wasmtime::Result<()> {
        self.tensors.remove(&x);
        Ok(())
    }
}

impl tensors::Host for HostState {
    fn set_grad_enabled(&mut self, enabled: bool) -> wasmtime::Result<bool> {
        Ok(std::mem::replace(&mut self.grad, enabled))
    }

    fn full(&mut self, shape: Vec<i64>, value: f64) -> HostResult<Resource<TensorSlot>> {
        check_rank("full", shape.len())?;
        check_sizes("full", &shape)?;
        self.create("full", &shape, |device| Tensor::f_full(&shape, value, (Kind::Float, device)))
    }

    fn arange(&mut self, end: i64) -> HostResult<Resource<TensorSlot>> {
        check_sizes("arange", &[end])?;
        self.create("arange", &[end], |device| Tensor::f_arange(end, (Kind::Int64, device)))
    }

    fn from_numbers(&mut self, values: Vec<f64>) -> HostResult<Resource<TensorSlot>> {
        if values.len() > MAX_NUMBERS {
            let message = format!("`from_numbers` takes at most {MAX_NUMBERS} numbers, not {}", values.len());
            return Err(HostError::guest(types::Code::Limit, message));
        }
        let values: Vec<f32> = values.into_iter().map(|value| value as f32).collect();
        self.create("from_numbers", &[values.len() as i64], |device| Tensor::f_from_slice(&values)?.f_to_device(device))
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

fn check_rank(name: &str, rank: usize) -> HostResult<()> {
    if rank <= MAX_DIMS {
        return Ok(());
    }
    let message = format!("`{name}` would make {rank} dimensions, and a tensor has at most {MAX_DIMS}");
    Err(HostError::guest(types::Code::Limit, message))
}

/// Sizes that a guest names itself.
fn check_sizes(name: &str, shape: &[i64]) -> HostResult<()> {
    if shape.iter().any(|size| *size < 0) {
        let message = format!("`{name}`: sizes are 0 or more, and shape {shape:?} has a negative one");
        return Err(HostError::guest(types::Code::Shape, message));
    }
    check_elements(name, shape)
}

fn check_mask(name: &str, mask: &Tensor) -> HostResult<()> {
    if mask.kind() == Kind::Bool {
        return Ok(());
    }
    let message = format!("`{name}` needs a mask of booleans, not {}", described(mask));
    Err(HostError::guest(types::Code::Invalid, message).hint("a comparison gives one, or `to_bool()`"))
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

/// An operation of integers and a whole number, as PyTorch keeps it: integers.
fn as_is(
    x: &Tensor,
    value: f64,
    of_integers: impl FnOnce(&Tensor, i64) -> Result<Tensor, TchError>,
    of_floats: impl FnOnce(&Tensor, f64) -> Result<Tensor, TchError>,
) -> Result<Tensor, TchError> {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2^53
    let is_whole = value.fract() == 0.0 && value.abs() < EXACT;
    if is_whole && matches!(x.kind(), Kind::Int64 | Kind::Int) {
        of_integers(x, value as i64)
    } else {
        of_floats(x, value)
    }
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
    // Both are written out to these before they are multiplied.
    for (of, from) in [(x, rows), (y, columns)] {
        let own = &of[of.len() - if from { 2 } else { 1 }..];
        check_elements(name, &[&shape[..], own].concat())?;
    }
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
    check_index("gather", index, shape[dim])
}

/// Whether `index` is of integers below `size`.
fn check_index(name: &str, index: &Tensor, size: i64) -> HostResult<()> {
    if !matches!(index.kind(), Kind::Int64 | Kind::Int) {
        let message =
            format!("`{name}` needs an index of integers, such as `batch.labels()`, not {}", described(index));
        return Err(HostError::guest(types::Code::Invalid, message).hint("`to_int()` makes integers"));
    }
    // A GPU answers an index out of range by ending the process's use of it, so there the range is checked first.
    if index.device().is_cuda() && index.numel() > 0 {
        let bound = |value: Result<Tensor, TchError>| value.and_then(|value| value.f_int64_value(&[]));
        let low = bound(index.f_min()).map_err(|error| torch_error(name, &[index], error))?;
        let high = bound(index.f_max()).map_err(|error| torch_error(name, &[index], error))?;
        if low < 0 || high >= size {
            let message =
                format!("`{name}`: index {} is outside of 0 to {}", if low < 0 { low } else { high }, size - 1);
            return Err(HostError::guest(types::Code::Invalid, message));
        }
    }
    Ok(())
}

/// A tensor in messages: what it holds, and its shape.
fn described(tensor: &Tensor) -> String {
    let kind = match tensor.kind() {
        Kind::Bool => "booleans",
        Kind::Int64 | Kind::Int | Kind::Int16 | Kind::Int8 | Kind::Uint8 => "integers",
        Kind::BFloat16 | Kind::Half => "16-bit floats",
        Kind::Double => "64-bit floats",
        _ => "floats",
    };
    format!("{kind} {:?}", tensor.size())
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
    let shapes: Vec<String> = tensors.iter().map(|tensor| described(tensor)).collect();
    HostError::guest(types::Code::Invalid, format!("`{name}` of {}: {line}", shapes.join(" and ")))
}

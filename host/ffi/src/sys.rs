//! Declarations of the shim's C functions (`cpp/*.cpp`). A `*mut c_char` result is null or an error to free.

use std::ffi::{c_char, c_int, c_void};

use torch_sys::C_tensor;

/// `host::LinearLayer` of `cpp/linear.h`.
#[repr(C)]
pub struct LinearLayer {
    _private: [u8; 0],
}

/// `host::Store` of `cpp/dist.cpp`.
#[repr(C)]
pub struct Store {
    _private: [u8; 0],
}

/// `host::Group` of `cpp/dist.cpp`.
#[repr(C)]
pub struct Group {
    _private: [u8; 0],
}

/// `host::Work` of `cpp/dist.cpp`.
#[repr(C)]
pub struct Work {
    _private: [u8; 0],
}

/// `host::NcclHandle` of `cpp/nccl.cpp`.
#[repr(C)]
pub struct Nccl {
    _private: [u8; 0],
}

/// `host::NcclWork` of `cpp/nccl.cpp`.
#[repr(C)]
pub struct NcclWork {
    _private: [u8; 0],
}

pub type Message = *mut c_char;
/// `host::NodeCall` of `cpp/shard.cpp`.
pub type NodeCall = unsafe extern "C" fn(data: *mut c_void, grad: In, out: Out) -> Message;
/// `host::NodeDrop` of `cpp/shard.cpp`.
pub type NodeDrop = unsafe extern "C" fn(data: *mut c_void);
pub type In = *const C_tensor;
pub type Out = *mut *mut C_tensor;

unsafe extern "C" {
    pub fn host_free_string(text: *mut c_char);
    pub fn host_free_bytes(bytes: *mut u8);

    pub fn host_rms_norm(x: In, weight: In, eps: f64, out: Out) -> Message;
    pub fn host_rope(x: In, cos: In, sin: In, out: Out) -> Message;
    pub fn host_swiglu(gate: In, up: In, out: Out) -> Message;
    pub fn host_attention_varlen(
        q: In,
        k: In,
        v: In,
        offsets: *const i64,
        num_offsets: usize,
        scale: f64,
        out: Out,
    ) -> Message;

    pub fn host_linear_layer_new(weight: In, bias: In, prepack: c_int, out: *mut *mut LinearLayer) -> Message;
    pub fn host_linear_layer_free(layer: *mut LinearLayer);
    pub fn host_linear_layer_forward(layer: *const LinearLayer, x: In, out: Out) -> Message;
    pub fn host_lora_linear(
        x: In,
        layer: *const LinearLayer,
        a: In,
        b: In,
        scale: f64,
        dropped: In,
        out: Out,
    ) -> Message;
    pub fn host_linear_cross_entropy(
        hidden: In,
        head: *const LinearLayer,
        labels: In,
        chunk_rows: i64,
        sum: bool,
        out: Out,
    ) -> Message;

    pub fn host_set_grad(leaf: In, grad: In) -> Message;
    pub fn host_backward(loss: In) -> Message;
    pub fn host_backward_from(output: In, grad: In) -> Message;
    pub fn host_grad_enabled() -> c_int;
    pub fn host_fused_adamw(
        param: In,
        grad: In,
        exp_avg: In,
        exp_avg_sq: In,
        step: f64,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
    ) -> Message;
    pub fn host_dropout_mask_cpu(
        keys: In,
        width: i64,
        threshold: u32,
        keep_all: c_int,
        value: f32,
        dtype: c_int,
        out: Out,
    ) -> Message;
    pub fn host_round_stochastic_cpu(from: In, into: In, key: i64, first: i64) -> Message;
    pub fn host_tensor_from_bytes(
        bytes: *const c_void,
        source: c_int,
        shape: *const i64,
        num_dims: usize,
        target: c_int,
        out: Out,
    ) -> Message;

    pub fn host_libtorch_cpu_path(out: *mut *mut c_char) -> Message;
    pub fn host_load_library(path: *const c_char) -> Message;
    pub fn host_device_count() -> c_int;
    pub fn host_device_memory(index: c_int, free_bytes: *mut u64, total_bytes: *mut u64) -> Message;
    pub fn host_memory_stats(index: c_int, active: *mut i64, allocated: *mut i64, reserved: *mut i64) -> Message;
    pub fn host_reset_peak(index: c_int) -> Message;
    pub fn host_synchronize(index: c_int) -> Message;
    pub fn host_to_device(tensor: In, index: c_int, out: Out) -> Message;
    pub fn host_libtorch_version(out: *mut *mut c_char) -> Message;
    pub fn host_cpu_capability(out: *mut *mut c_char) -> Message;
    pub fn host_set_flush_denormal(on: c_int, supported: *mut c_int) -> Message;
    pub fn host_num_threads() -> c_int;
    pub fn host_set_num_threads(count: c_int) -> Message;

    pub fn host_store_new(
        address: *const c_char,
        port: u16,
        is_server: c_int,
        world_size: u64,
        timeout_ms: u64,
        out: *mut *mut Store,
    ) -> Message;
    pub fn host_store_free(store: *mut Store);
    pub fn host_store_port(store: *const Store) -> u16;
    pub fn host_store_set(store: *const Store, key: *const c_char, value: *const u8, length: usize) -> Message;
    pub fn host_store_get(
        store: *const Store,
        key: *const c_char,
        timeout_ms: u64,
        value: *mut *mut u8,
        length: *mut usize,
    ) -> Message;
    pub fn host_store_check(store: *const Store, key: *const c_char, found: *mut c_int) -> Message;
    pub fn host_store_add(store: *const Store, key: *const c_char, amount: i64, result: *mut i64) -> Message;

    pub fn host_group_new(
        store: *const Store,
        prefix: *const c_char,
        rank: c_int,
        size: c_int,
        interface: *const c_char,
        address: *const c_char,
        meeting_ms: u64,
        timeout_ms: u64,
        out: *mut *mut Group,
    ) -> Message;
    pub fn host_group_free(group: *mut Group);
    pub fn host_group_all_reduce_sum(group: *const Group, tensor: In) -> Message;
    pub fn host_group_broadcast(group: *const Group, tensor: In, root: c_int) -> Message;
    pub fn host_group_barrier(group: *const Group) -> Message;
    pub fn host_group_all_gather(group: *const Group, tensor: In, out: Out) -> Message;
    pub fn host_group_all_gather_into(group: *const Group, whole: In, shard: In, out: *mut *mut Work) -> Message;
    pub fn host_group_reduce_scatter_sum(group: *const Group, shard: In, whole: In, out: *mut *mut Work) -> Message;
    pub fn host_work_wait(work: *mut Work) -> Message;
    pub fn host_work_free(work: *mut Work);

    pub fn host_storage_free(tensor: In) -> Message;
    pub fn host_storage_take(tensor: In) -> Message;
    pub fn host_storage_swap(one: In, other: In) -> Message;
    pub fn host_node(x: In, output: In, call: NodeCall, drop: NodeDrop, data: *mut c_void, out: Out) -> Message;
    pub fn host_message(text: *const c_char, length: usize) -> Message;

    pub fn host_nccl_version(path: *const c_char, version: *mut c_int) -> Message;
    pub fn host_nccl_unique_id(path: *const c_char, bytes: *mut u8) -> Message;
    pub fn host_nccl_new(
        path: *const c_char,
        id: *const u8,
        rank: c_int,
        size: c_int,
        device: c_int,
        timeout_ms: u64,
        out: *mut *mut Nccl,
    ) -> Message;
    pub fn host_nccl_free(nccl: *mut Nccl);
    pub fn host_nccl_set_step(nccl: *mut Nccl, step: i64);
    pub fn host_nccl_check(nccl: *mut Nccl) -> Message;
    pub fn host_nccl_all_reduce_sum(nccl: *mut Nccl, tensor: In) -> Message;
    pub fn host_nccl_broadcast(nccl: *mut Nccl, tensor: In, root: c_int) -> Message;
    pub fn host_nccl_all_gather_into(nccl: *mut Nccl, whole: In, shard: In, out: *mut *mut NcclWork) -> Message;
    pub fn host_nccl_reduce_scatter_sum(nccl: *mut Nccl, shard: In, whole: In, out: *mut *mut NcclWork) -> Message;
    pub fn host_nccl_wait(work: *mut NcclWork) -> Message;
    pub fn host_nccl_work_free(work: *mut NcclWork);
}

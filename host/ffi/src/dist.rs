//! Ranks that talk: c10d's TCP store for meeting, Gloo for collectives on host memory, NCCL or RCCL on a device's.
//!
//! A group of one is the same type and does nothing, so that no caller asks how many ranks there are. Without
//! [`Group::attach`] tensors of a device are staged through host memory. Collectives must be called by all ranks in the
//! same order. After an error a group is unusable: the ranks no longer agree where they are.

use std::cell::Cell;
use std::ffi::{CString, c_char};
use std::net::{ToSocketAddrs, UdpSocket};
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use crate::nccl::{self, Nccl, NcclWork};
use crate::{FfiError, Result, check, new_tensor, sys};

/// The place where ranks meet and exchange small values: c10d's TCPStore.
#[derive(Debug)]
pub struct Store {
    raw: *mut sys::Store,
    host: String,
    port: u16,
    timeout: Duration,
}

// SAFETY: TCPStore locks around every request, and the wrapper holds nothing but the pointer.
unsafe impl Send for Store {}

impl Store {
    /// Starts the store on `host:port` and connects to it; rank 0 does this. Port 0 takes a free one, see [`Store::port`].
    ///
    /// Fails at once when the port is in use. `timeout` bounds every later request too.
    pub fn serve(host: &str, port: u16, world_size: usize, timeout: Duration) -> Result<Self> {
        Self::new(host, port, true, world_size, timeout)
    }

    /// Connects to the store that rank 0 serves on `host:port`, trying again until `timeout`.
    pub fn connect(host: &str, port: u16, world_size: usize, timeout: Duration) -> Result<Self> {
        Self::new(host, port, false, world_size, timeout)
    }

    fn new(host: &str, port: u16, is_server: bool, world_size: usize, timeout: Duration) -> Result<Self> {
        let address = c_string("address", host)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: `address` is NUL-terminated and live for the call; `raw` receives an object this value frees.
        let made = check(unsafe {
            sys::host_store_new(address.as_ptr(), port, is_server.into(), world_size as u64, millis(timeout), &mut raw)
        });
        made.map_err(|error| store_error(host, port, is_server, timeout, &error.0))?;
        // SAFETY: `raw` was just made and is live.
        let port = unsafe { sys::host_store_port(raw) };
        Ok(Self { raw, host: host.to_owned(), port, timeout })
    }

    /// The port the store listens on.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Sets `key` for all ranks.
    pub fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        let c_key = c_string("key", key)?;
        // SAFETY: the store, the key and `value.len()` bytes are live for the call.
        let set = check(unsafe { sys::host_store_set(self.raw, c_key.as_ptr(), value.as_ptr(), value.len()) });
        set.map_err(|e| self.request_error("set", key, &e.0))
    }

    /// Returns the value of `key`, waiting until a rank sets it, at most `timeout`.
    pub fn get(&self, key: &str, timeout: Duration) -> Result<Vec<u8>> {
        let c_key = c_string("key", key)?;
        let (mut bytes, mut length) = (std::ptr::null_mut(), 0);
        // SAFETY: the store, the key and both out-pointers are live for the call.
        let got =
            check(unsafe { sys::host_store_get(self.raw, c_key.as_ptr(), millis(timeout), &mut bytes, &mut length) });
        got.map_err(|e| self.request_error("get", key, &e.0))?;
        // SAFETY: on success `bytes` points to `length` bytes the shim gave away.
        let value = unsafe { std::slice::from_raw_parts(bytes, length) }.to_vec();
        // SAFETY: `bytes` is the shim's allocation and is not used again.
        unsafe { sys::host_free_bytes(bytes) };
        Ok(value)
    }

    /// Returns whether any rank has set `key`, without waiting.
    pub fn check(&self, key: &str) -> Result<bool> {
        let c_key = c_string("key", key)?;
        let mut found = 0;
        // SAFETY: the store, the key and the out-pointer are live for the call.
        let asked = check(unsafe { sys::host_store_check(self.raw, c_key.as_ptr(), &mut found) });
        asked.map_err(|e| self.request_error("check", key, &e.0))?;
        Ok(found != 0)
    }

    /// Adds to the counter `key`, which starts at 0, and returns its new value.
    pub fn add(&self, key: &str, amount: i64) -> Result<i64> {
        let c_key = c_string("key", key)?;
        let mut result = 0;
        // SAFETY: the store, the key and the out-pointer are live for the call.
        let added = check(unsafe { sys::host_store_add(self.raw, c_key.as_ptr(), amount, &mut result) });
        added.map_err(|e| self.request_error("add to", key, &e.0))?;
        Ok(result)
    }

    fn request_error(&self, verb: &str, key: &str, cause: &str) -> FfiError {
        FfiError(format!("cannot {verb} `{key}` in the store at {}:{}: {cause}", self.host, self.port))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: `raw` came from `host_store_new` and is freed once; groups hold references of their own.
        unsafe { sys::host_store_free(self.raw) }
    }
}

fn store_error(host: &str, port: u16, is_server: bool, timeout: Duration, cause: &str) -> FfiError {
    FfiError(if is_server && cause.contains("EADDRINUSE") {
        format!("cannot serve the store on {host}:{port}: the port is in use")
    } else if is_server {
        format!("cannot serve the store on {host}:{port}: {cause}")
    } else {
        format!("cannot reach the store at {host}:{port} within {timeout:?}: {cause}")
    })
}

/// Ranks that take part in collectives together.
#[derive(Debug)]
pub struct Group {
    /// Null for a group of one.
    raw: *mut sys::Group,
    /// What moves a device's memory.
    nccl: Option<Nccl>,
    received: Cell<u64>,
    rank: usize,
    world_size: usize,
    timeout: Duration,
}

// SAFETY: the process group may be used from any one thread at a time, which `&self` on a type that is not `Sync` gives.
unsafe impl Send for Group {}

impl Group {
    /// A group of one: every collective is the identity.
    pub fn alone() -> Self {
        Self {
            raw: std::ptr::null_mut(),
            nccl: None,
            received: Cell::new(0),
            rank: 0,
            world_size: 1,
            timeout: Duration::ZERO,
        }
    }

    /// Joins the group `name` as `rank` of `world_size`; returns when all ranks have joined.
    ///
    /// The store's timeout bounds the meeting, `timeout` every collective. Gloo listens on the interface `GLOO_SOCKET_IFNAME` names (the
    /// first, of several), else on the address this machine has towards the store, which is loopback when the store is
    /// here. A `world_size` of one gives [`Group::alone`].
    pub fn join(store: &Store, name: &str, rank: usize, world_size: usize, timeout: Duration) -> Result<Self> {
        if rank >= world_size {
            return Err(FfiError(format!("rank {rank} does not exist in a group of {world_size}")));
        }
        if world_size == 1 {
            return Ok(Self::alone());
        }
        let prefix = c_string("group name", name)?;
        let interface = match std::env::var("GLOO_SOCKET_IFNAME") {
            Ok(names) if !names.is_empty() => {
                Some(c_string("GLOO_SOCKET_IFNAME", names.split(',').next().unwrap_or_default())?)
            }
            _ => None,
        };
        let address = c_string("address", &local_address(&store.host, store.port)?)?;
        let interface_ptr: *const c_char = interface.as_ref().map_or(std::ptr::null(), |i| i.as_ptr());
        let (c_rank, c_size) = (c_int(rank)?, c_int(world_size)?);
        let mut raw = std::ptr::null_mut();
        // SAFETY: the store and all strings are live for the call (or null where the shim expects it); the group keeps a
        // reference to the store.
        let made = check(unsafe {
            sys::host_group_new(
                store.raw,
                prefix.as_ptr(),
                c_rank,
                c_size,
                interface_ptr,
                address.as_ptr(),
                millis(store.timeout),
                millis(timeout),
                &mut raw,
            )
        });
        made.map_err(|e| FfiError(format!("rank {rank} of {world_size} could not join the group `{name}`: {}", e.0)))?;
        let group = Self { raw, nccl: None, received: Cell::new(0), rank, world_size, timeout };
        group.barrier()?;
        Ok(group)
    }

    /// This process's number in the group, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// How many ranks the group has.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// From now on collectives on tensors of device `cuda:device` run there, through `library` ([`nccl::library_of`]).
    ///
    /// Every rank has to call it, each with a device of its own. `timeout` is how long a collective may take once
    /// it is the device's turn; one that takes longer is named by the next call, and what waits for it on the device ends. A group of one
    /// may attach too: its collectives then pass through the library and change nothing.
    pub fn attach(&mut self, library: &str, device: usize, timeout: Duration) -> Result<()> {
        // Rank 0 fails alone where the library cannot be loaded: the others hear of it by an empty name.
        let made = if self.rank == 0 { nccl::unique_id(library) } else { nccl::version(library).map(|_| vec![]) };
        let failed = self.all_gather(&Tensor::from_slice(&[i64::from(made.is_err())]))?;
        let mut id = made?;
        if failed.sum(Kind::Int64).int64_value(&[]) > 0 {
            return Err(FfiError(format!("rank {}: another rank cannot use `{library}`", self.rank)));
        }
        if self.world_size > 1 {
            id.resize(128, 0);
            let sent = Tensor::from_slice(&id);
            self.broadcast(&sent, 0)?;
            id = Vec::try_from(sent)?;
        }
        let place = (c_int(self.rank)?, c_int(self.world_size)?);
        self.timeout = timeout;
        self.nccl = Some(Nccl::join(library, &id, place, device, timeout)?);
        Ok(())
    }

    /// Which optimizer step messages are to name from now on.
    pub fn set_step(&self, step: usize) {
        if let Some(nccl) = &self.nccl {
            nccl.set_step(i64::try_from(step).unwrap_or(i64::MAX));
        }
    }

    /// Fails when a collective on a device has failed or timed out since it was queued. To be asked before a result that
    /// was read from the device is believed.
    pub fn check(&self) -> Result<()> {
        self.nccl.as_ref().map_or(Ok(()), Nccl::check).map_err(|e| self.collective_error("a collective", &e.0))
    }

    /// Bytes that collectives on tensors have brought to this rank since the last call, by the formula of the ring: with `n` ranks an
    /// all-reduce of `S` bytes brings `2 S (n - 1) / n`, an all-gather or a reduce-scatter `S (n - 1) / n` of the whole.
    pub fn take_bytes_received(&self) -> u64 {
        self.received.take()
    }

    /// What moves `tensor`, where that is not Gloo.
    fn of_device(&self, tensor: &Tensor) -> Option<&Nccl> {
        self.nccl.as_ref().filter(|_| tensor.device() != Device::Cpu)
    }

    /// Counts `passes` of a tensor over the ring.
    fn count(&self, whole: &Tensor, passes: u64) {
        let bytes = whole.numel() as u64 * whole.kind().elt_size_in_bytes() as u64;
        let ranks = self.world_size as u64;
        self.received.set(self.received.get() + passes * bytes * (ranks - 1) / ranks);
    }

    /// Replaces `tensor`, in place and on every rank, by the sum over all ranks. Same shape and dtype everywhere.
    pub fn all_reduce_sum(&self, tensor: &Tensor) -> Result<()> {
        self.count(tensor, 2);
        let done = match self.of_device(tensor) {
            Some(nccl) => nccl.all_reduce_sum(tensor),
            None if self.raw.is_null() => Ok(()),
            // SAFETY: group and tensor are live; the call returns when the collective is done.
            None => check(unsafe { sys::host_group_all_reduce_sum(self.raw, tensor.as_ptr()) }),
        };
        done.map_err(|e| self.collective_error("all-reduce", &e.0))
    }

    /// Replaces `tensor`, in place, by that of rank `root`.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<()> {
        if root >= self.world_size {
            return Err(FfiError(format!("broadcast from rank {root}, but the group has {}", self.world_size)));
        }
        self.count(tensor, 1);
        let root = c_int(root)?;
        let done = match self.of_device(tensor) {
            Some(nccl) => nccl.broadcast(tensor, root),
            None if self.raw.is_null() => Ok(()),
            // SAFETY: group and tensor are live; the call returns when the collective is done.
            None => check(unsafe { sys::host_group_broadcast(self.raw, tensor.as_ptr(), root) }),
        };
        done.map_err(|e| self.collective_error("broadcast", &e.0))
    }

    /// Waits until every rank has come here.
    pub fn barrier(&self) -> Result<()> {
        if self.raw.is_null() {
            return Ok(());
        }
        // SAFETY: the group is live.
        let done = check(unsafe { sys::host_group_barrier(self.raw) });
        done.map_err(|e| self.collective_error("barrier", &e.0))
    }

    /// Returns the tensors of all ranks, stacked by rank: `[world size, ...]`. Same shape and dtype everywhere. Through
    /// host memory, for small things.
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        if self.raw.is_null() {
            return Ok(tensor.detach().copy().unsqueeze(0));
        }
        // SAFETY: group and tensor are live; the call returns when the collective is done.
        let gathered = new_tensor(|out| unsafe { sys::host_group_all_gather(self.raw, tensor.as_ptr(), out) });
        gathered.map_err(|e| self.collective_error("all-gather", &e.0))
    }

    /// Starts to fill `whole` with the shards of all ranks, one after another. `whole` is contiguous and has as many
    /// numbers as all shards together, which are of one size and dtype. Neither may be touched before [`Work::wait`].
    pub fn all_gather_into(&self, whole: &Tensor, shard: &Tensor) -> Result<Work> {
        self.fits(whole, shard)?;
        self.count(whole, 1);
        let started = match self.of_device(whole) {
            Some(nccl) => nccl.all_gather_into(whole, shard).map(Way::Nccl),
            None if self.raw.is_null() => {
                // Not `detach`: weights that are gathered again are the weights that a graph saved.
                tch::no_grad(|| whole.data().copy_(&shard.view_as(whole)));
                Ok(Way::Alone)
            }
            None => self.staged(whole, shard, |whole, shard| {
                let mut work = std::ptr::null_mut();
                // SAFETY: all are live; the work keeps the tensors and the group's state.
                check(unsafe { sys::host_group_all_gather_into(self.raw, whole.as_ptr(), shard.as_ptr(), &mut work) })?;
                Ok(work)
            }),
        };
        self.work("all-gather", started)
    }

    /// Starts to fill `shard` with this rank's part of the sum of `whole` over all ranks, which is summed in the order of
    /// the ranks. Sizes as in [`Group::all_gather_into`].
    pub fn reduce_scatter_sum(&self, shard: &Tensor, whole: &Tensor) -> Result<Work> {
        self.fits(whole, shard)?;
        self.count(whole, 1);
        let started = match self.of_device(whole) {
            Some(nccl) => nccl.reduce_scatter_sum(shard, whole).map(Way::Nccl),
            None if self.raw.is_null() => {
                tch::no_grad(|| shard.data().copy_(&whole.view_as(shard)));
                Ok(Way::Alone)
            }
            None => self.staged(shard, whole, |shard, whole| {
                let mut work = std::ptr::null_mut();
                // SAFETY: all are live; the work keeps the tensors and the group's state.
                check(unsafe {
                    sys::host_group_reduce_scatter_sum(self.raw, shard.as_ptr(), whole.as_ptr(), &mut work)
                })?;
                Ok(work)
            }),
        };
        self.work("reduce-scatter", started)
    }

    fn fits(&self, whole: &Tensor, shard: &Tensor) -> Result<()> {
        let same = whole.kind() == shard.kind() && whole.device() == shard.device() && whole.is_contiguous();
        if same && whole.numel() == shard.numel() * self.world_size {
            return Ok(());
        }
        Err(FfiError(format!(
            "a shard of {:?} {:?} does not make {:?} {:?} with {} ranks",
            shard.kind(),
            shard.size(),
            whole.kind(),
            whole.size(),
            self.world_size
        )))
    }

    /// Starts a collective through host memory: `from` may be of a device, and so may `into`, which the result reaches in
    /// [`Work::wait`].
    fn staged(
        &self,
        into: &Tensor,
        from: &Tensor,
        start: impl FnOnce(&Tensor, &Tensor) -> Result<*mut sys::Work>,
    ) -> Result<Way> {
        if into.device() == Device::Cpu {
            return Ok(Way::Gloo(GlooWork(start(into, from)?), None));
        }
        let received = Tensor::zeros(into.size(), (into.kind(), Device::Cpu));
        let raw = start(&received, &from.detach().to_device(Device::Cpu))?;
        Ok(Way::Gloo(GlooWork(raw), Some((into.data(), received))))
    }

    fn collective_error(&self, what: &str, cause: &str) -> FfiError {
        collective_error(self.rank, self.timeout, what, cause)
    }

    fn work(&self, what: &'static str, started: Result<Way>) -> Result<Work> {
        let inner = started.map_err(|e| self.collective_error(what, &e.0))?;
        Ok(Work { inner, what, rank: self.rank, timeout: self.timeout })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: `raw` came from `host_group_new` and is freed once.
            unsafe { sys::host_group_free(self.raw) }
        }
    }
}

/// A collective under way.
#[derive(Debug)]
#[must_use = "nothing may be touched before it is waited for"]
pub struct Work {
    inner: Way,
    what: &'static str,
    rank: usize,
    timeout: Duration,
}

/// How it is done.
#[derive(Debug)]
enum Way {
    /// A group of one has nothing to wait for.
    Alone,
    /// Through host memory; what the result has yet to be copied to, and from.
    Gloo(GlooWork, Option<(Tensor, Tensor)>),
    Nccl(NcclWork),
}

impl Work {
    /// Returns when the result is there, or, on a device, makes the current stream wait for it.
    pub fn wait(self) -> Result<()> {
        let waited = match &self.inner {
            Way::Alone => Ok(()),
            Way::Gloo(work, copy) => work.wait().map(|()| {
                if let Some((into, from)) = copy {
                    tch::no_grad(|| into.shallow_clone().copy_(from));
                }
            }),
            Way::Nccl(work) => work.wait(),
        };
        waited.map_err(|e| collective_error(self.rank, self.timeout, self.what, &e.0))
    }
}

#[derive(Debug)]
struct GlooWork(*mut sys::Work);

// SAFETY: c10d's works lock, and this is used from one thread at a time.
unsafe impl Send for GlooWork {}

impl GlooWork {
    fn wait(&self) -> Result<()> {
        // SAFETY: the work is live.
        check(unsafe { sys::host_work_wait(self.0) })
    }
}

impl Drop for GlooWork {
    fn drop(&mut self) {
        // SAFETY: came from a collective and is freed once; c10d keeps what is still under way.
        unsafe { sys::host_work_free(self.0) }
    }
}

/// A failed collective as a person is told of it.
fn collective_error(rank: usize, timeout: Duration, what: &str, cause: &str) -> FfiError {
    let lower = cause.to_lowercase();
    let gone = ["closed by peer", "connection reset", "broken pipe", "connection refused"];
    FfiError(if gone.iter().any(|text| lower.contains(text)) {
        format!("rank {rank}: another rank went away during {what}: {cause}")
    } else if lower.contains("timed out") || lower.contains("timeout") {
        format!("rank {rank}: another rank did not take part in {what} within {timeout:?}: {cause}")
    } else {
        format!("rank {rank}: {what} failed: {cause}")
    })
}

/// The address this machine has on the way to `host`. A datagram socket asks the routing table and sends nothing.
fn local_address(host: &str, port: u16) -> Result<String> {
    let fail = |e: std::io::Error| FfiError(format!("cannot find a network address towards `{host}`: {e}"));
    let mut last = std::io::Error::from(std::io::ErrorKind::AddrNotAvailable);
    for address in (host, port).to_socket_addrs().map_err(fail)? {
        let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let local = UdpSocket::bind(any).and_then(|socket| socket.connect(address).and_then(|()| socket.local_addr()));
        match local {
            Ok(local) => return Ok(local.ip().to_string()),
            Err(error) => last = error,
        }
    }
    Err(fail(last))
}

pub(crate) fn c_string(what: &str, text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| FfiError(format!("{what} {text:?} holds a NUL byte")))
}

fn c_int(number: usize) -> Result<i32> {
    i32::try_from(number).map_err(|_| FfiError(format!("{number} ranks are too many")))
}

pub(crate) fn millis(duration: Duration) -> u64 {
    // c10d adds timeouts to clocks: keep far away from overflow.
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).clamp(1, 1_000_000_000)
}

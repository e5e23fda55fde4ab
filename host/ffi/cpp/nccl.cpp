// Collectives on a device by NCCL or RCCL, which share one C interface. The library is found at run time, so that nothing
// here needs a vendor's header or library to build; streams and events are libtorch's device-generic ones.
//
// A collective is queued on the current stream, so that it is ordered with the work around it. One that may overlap with
// work goes to a stream of its own and is waited for through an event. A thread watches what is queued: what does not
// end in time, or fails, takes the communicator down, which ends the kernels that wait for a peer.
#include "shim.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <dlfcn.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <optional>
#include <sstream>
#include <thread>
#include <utility>

namespace host {

namespace {

// The types and numbers of nccl.h, which have been the same since NCCL 2.10 and in every RCCL of ROCm 5 and later.
struct UniqueId {
  char bytes[128];
};
using Comm = void*;
using Result = int;
constexpr Result ok = 0, in_progress = 7;
constexpr int sum = 0;

int type_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kChar: return 0;
    case at::kByte: return 1;
    case at::kBool: return 1;
    case at::kInt: return 2;
    case at::kLong: return 4;
    case at::kHalf: return 6;
    case at::kFloat: return 7;
    case at::kDouble: return 8;
    case at::kBFloat16: return 9;
    default: TORCH_CHECK(false, "NCCL has no type for ", tensor.scalar_type());
  }
}

}  // namespace

struct NcclApi {
  Result (*get_version)(int*);
  Result (*get_unique_id)(UniqueId*);
  Result (*comm_init_rank)(Comm*, int, UniqueId, int);
  Result (*comm_get_async_error)(Comm, Result*);
  Result (*comm_abort)(Comm);
  Result (*comm_destroy)(Comm);
  const char* (*get_error_string)(Result);
  Result (*all_reduce)(const void*, void*, size_t, int, int, Comm, void*);
  Result (*broadcast)(const void*, void*, size_t, int, int, Comm, void*);
  Result (*all_gather)(const void*, void*, size_t, int, Comm, void*);
  Result (*reduce_scatter)(const void*, void*, size_t, int, int, Comm, void*);

  // A library that stays loaded. The one that libtorch's GPU half brought is taken where there is one.
  explicit NcclApi(const char* path) {
    void* library = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    if (!library) library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
      const char* reason = dlerror();
      TORCH_CHECK(false, "cannot load `", path, "`: ", reason ? reason : "no reason given");
    }
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      TORCH_CHECK(function, "`", path, "` has no function ", name);
    };
    find(get_version, "ncclGetVersion");
    find(get_unique_id, "ncclGetUniqueId");
    find(comm_init_rank, "ncclCommInitRank");
    find(comm_get_async_error, "ncclCommGetAsyncError");
    find(comm_abort, "ncclCommAbort");
    find(comm_destroy, "ncclCommDestroy");
    find(get_error_string, "ncclGetErrorString");
    find(all_reduce, "ncclAllReduce");
    find(broadcast, "ncclBroadcast");
    find(all_gather, "ncclAllGather");
    find(reduce_scatter, "ncclReduceScatter");
  }

  void check(Result result, const std::string& doing) const {
    TORCH_CHECK(result == ok || result == in_progress, doing, ": ", get_error_string(result));
  }
};

// For an orderly end after a failure: other ranks are heard, a checkpoint under way is written; one that takes longer is lost.
constexpr std::chrono::seconds kLastResort(30);

struct Nccl {
  using Clock = std::chrono::steady_clock;

  struct Pending {
    // Of the stream: what was queued before it is done.
    std::shared_ptr<c10::Event> turn, done;
    std::string what;
    // When that was noticed: what the device computes before it does not count.
    std::optional<Clock::time_point> began;
  };

  std::unique_ptr<NcclApi> api;
  Comm comm = nullptr;
  c10::Device device;
  c10::Stream side;
  std::chrono::milliseconds timeout;
  std::atomic<int64_t> step{0};
  int64_t count = 0;

  // Held while a collective is handed over, so that the communicator is not taken down under it.
  std::timed_mutex handing_over;
  std::mutex mutex;
  std::condition_variable wake;
  std::deque<Pending> pending;
  std::string failure;
  bool closing = false;
  std::thread watchdog;

  Nccl(const char* path, const UniqueId& id, int rank, int size, int index, std::chrono::milliseconds limit)
      : api(std::make_unique<NcclApi>(path)),
        device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)),
        side(c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStreamFromGlobalPool(device, true)),
        timeout(limit) {
    const c10::DeviceGuard on(device);
    api->check(api->comm_init_rank(&comm, size, id, rank), "ncclCommInitRank");
    watchdog = std::thread([this] { watch(); });
  }

  ~Nccl() {
    {
      const std::lock_guard lock(mutex);
      closing = true;
    }
    wake.notify_all();
    watchdog.join();
    if (!comm) return;
    // Destroying waits for what is queued, which after an error elsewhere never ends.
    forget_what_is_done();
    if (pending.empty()) {
      api->comm_destroy(comm);
    } else {
      give_up("the run ended during " + pending.front().what);
    }
  }

  void check() {
    const std::lock_guard lock(mutex);
    TORCH_CHECK(failure.empty(), failure);
  }

  // Queues a collective on `stream`, which `call` is given, and remembers it until it ends.
  template <typename F>
  std::shared_ptr<c10::Event> queue(const c10::Stream& stream, const char* name, const at::Tensor& tensor, F&& call) {
    const std::lock_guard handing(handing_over);
    check();
    const c10::DeviceGuard on(device);
    std::ostringstream what;
    what << name << " number " << ++count << " (" << tensor.nbytes() << " bytes, step " << step.load() << ")";
    auto turn = std::make_shared<c10::Event>(c10::DeviceType::CUDA), done = std::make_shared<c10::Event>(c10::DeviceType::CUDA);
    turn->record(stream);
    api->check(call(stream.native_handle()), what.str());
    done->record(stream);
    const std::lock_guard lock(mutex);
    pending.push_back({turn, done, what.str(), std::nullopt});
    return done;
  }

  c10::Stream current() const { return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA).getStream(device); }

  void watch() {
    const c10::DeviceGuard on(device);
    std::unique_lock lock(mutex);
    while (!closing) {
      wake.wait_for(lock, std::chrono::milliseconds(200));
      forget_what_is_done();
      auto* first = pending.empty() ? nullptr : &pending.front();
      if (first && !first->began && first->turn->query()) first->began = Clock::now();
      Result error = ok;
      api->comm_get_async_error(comm, &error);
      if (error != ok && error != in_progress) {
        fail(first ? first->what : "a collective", api->get_error_string(error));
      } else if (first && first->began && Clock::now() - *first->began > timeout) {
        std::ostringstream why;
        why << "it timed out after " << timeout.count() / 1000.0 << " s";
        fail(first->what, why.str());
      } else {
        continue;
      }
      const std::string why = failure;
      lock.unlock();
      const std::unique_lock handing(handing_over, std::chrono::seconds(2));
      give_up(why);
      return;
    }
  }

  void forget_what_is_done() {
    while (!pending.empty() && pending.front().done->query()) pending.pop_front();
  }

  // The kernels that wait end, and with them whatever waits for the device. That is not waited for: where the other ranks stand
  // still it may never return. Nor may the end of the process, so it is ended, or nobody would hear of it.
  void give_up(const std::string& why) {
    std::thread([abort = api->comm_abort, comm = std::exchange(comm, nullptr)] { abort(comm); }).detach();
    std::thread([why] {
      std::this_thread::sleep_for(kLastResort);
      std::fprintf(stderr, "error: %s\n", why.c_str());
      std::_Exit(1);
    }).detach();
  }

  void fail(const std::string& what, const std::string& why) { failure = what + ": " + why; }
};

// The communicator as the Rust side holds it.
struct NcclHandle {
  std::shared_ptr<Nccl> inner;
};

// What a queued collective is waited for by.
struct NcclWork {
  std::shared_ptr<Nccl> nccl;
  std::shared_ptr<c10::Event> done;
  // Alive until then: the other stream reads and writes them.
  std::vector<at::Tensor> keep;
};

namespace {

at::Tensor flat(const at::Tensor& tensor, const Nccl& nccl) {
  TORCH_CHECK(tensor.device() == nccl.device, "a tensor on ", tensor.device(), ", but the communicator is of ", nccl.device);
  return tensor.detach().contiguous();
}

// On a stream of its own, after what the current one has queued.
template <typename F>
NcclWork* overlapped(const std::shared_ptr<Nccl>& nccl, const char* name, const at::Tensor& from, const at::Tensor& into, F&& call) {
  TORCH_CHECK(into.is_contiguous(), name, ": the result must be contiguous");
  c10::Event ready(c10::DeviceType::CUDA);
  ready.record(nccl->current());
  ready.block(nccl->side);
  auto done = nccl->queue(nccl->side, name, from, call);
  return new NcclWork{nccl, std::move(done), {from, into}};
}

}  // namespace
}  // namespace host

extern "C" char* host_nccl_version(const char* path, int* version) {
  return host::guard([&] {
    const host::NcclApi api(path);
    api.check(api.get_version(version), "ncclGetVersion");
  });
}

extern "C" char* host_nccl_unique_id(const char* path, uint8_t* bytes) {
  return host::guard([&] {
    const host::NcclApi api(path);
    api.check(api.get_unique_id(reinterpret_cast<host::UniqueId*>(bytes)), "ncclGetUniqueId");
  });
}

// `id` holds the 128 bytes that rank 0 made; the call returns when all ranks have come.
extern "C" char* host_nccl_new(const char* path, const uint8_t* id, int rank, int size, int device, uint64_t timeout_ms,
                               host::NcclHandle** out) {
  return host::guard([&] {
    host::UniqueId unique{};
    std::memcpy(unique.bytes, id, sizeof unique.bytes);
    *out = new host::NcclHandle{
        std::make_shared<host::Nccl>(path, unique, rank, size, device, std::chrono::milliseconds(timeout_ms))};
  });
}

extern "C" void host_nccl_free(host::NcclHandle* handle) { delete handle; }

extern "C" void host_nccl_set_step(host::NcclHandle* handle, int64_t step) { handle->inner->step = step; }

extern "C" char* host_nccl_check(host::NcclHandle* handle) {
  return host::guard([&] { handle->inner->check(); });
}

extern "C" char* host_nccl_all_reduce_sum(host::NcclHandle* handle, const at::Tensor* tensor) {
  return host::guard([&] {
    const at::NoGradGuard no_grad;
    const auto& nccl = handle->inner;
    const at::Tensor data = host::flat(*tensor, *nccl);
    nccl->queue(nccl->current(), "all-reduce", data, [&](void* stream) {
      return nccl->api->all_reduce(data.data_ptr(), data.data_ptr(), data.numel(), host::type_of(data), host::sum,
                                   nccl->comm, stream);
    });
    if (data.data_ptr() != tensor->data_ptr()) tensor->detach().copy_(data);
  });
}

extern "C" char* host_nccl_broadcast(host::NcclHandle* handle, const at::Tensor* tensor, int root) {
  return host::guard([&] {
    const at::NoGradGuard no_grad;
    const auto& nccl = handle->inner;
    const at::Tensor data = host::flat(*tensor, *nccl);
    nccl->queue(nccl->current(), "broadcast", data, [&](void* stream) {
      return nccl->api->broadcast(data.data_ptr(), data.data_ptr(), data.numel(), host::type_of(data), root, nccl->comm,
                                  stream);
    });
    if (data.data_ptr() != tensor->data_ptr()) tensor->detach().copy_(data);
  });
}

extern "C" char* host_nccl_all_gather_into(host::NcclHandle* handle, const at::Tensor* whole, const at::Tensor* shard,
                                           host::NcclWork** out) {
  return host::guard([&] {
    const at::NoGradGuard no_grad;
    const auto& nccl = handle->inner;
    const at::Tensor from = host::flat(*shard, *nccl), into = whole->variable_data();
    *out = host::overlapped(nccl, "all-gather", from, into, [&](void* stream) {
      return nccl->api->all_gather(from.data_ptr(), into.data_ptr(), from.numel(), host::type_of(from), nccl->comm,
                                   stream);
    });
  });
}

extern "C" char* host_nccl_reduce_scatter_sum(host::NcclHandle* handle, const at::Tensor* shard, const at::Tensor* whole,
                                              host::NcclWork** out) {
  return host::guard([&] {
    const at::NoGradGuard no_grad;
    const auto& nccl = handle->inner;
    const at::Tensor from = host::flat(*whole, *nccl), into = shard->variable_data();
    *out = host::overlapped(nccl, "reduce-scatter", from, into, [&](void* stream) {
      return nccl->api->reduce_scatter(from.data_ptr(), into.data_ptr(), into.numel(), host::type_of(from), host::sum,
                                       nccl->comm, stream);
    });
  });
}

// What the current stream is given from here on comes after the collective.
extern "C" char* host_nccl_wait(host::NcclWork* work) {
  return host::guard([&] {
    work->nccl->check();
    work->done->block(work->nccl->current());
  });
}

extern "C" void host_nccl_work_free(host::NcclWork* work) { delete work; }

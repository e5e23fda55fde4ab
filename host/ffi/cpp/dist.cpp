// c10d's TCP store and Gloo process group. Gloo types pass through as opaque pointers only: the headers here may be
// older than the library inside libtorch, so nothing constructs, subclasses or calls one.
#include "shim.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/util/Logging.h>
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <chrono>
#include <functional>
#include <memory>

namespace host {

using Milliseconds = std::chrono::milliseconds;

struct Store {
  c10::intrusive_ptr<c10d::TCPStore> inner;
};

struct Group {
  c10::intrusive_ptr<c10d::ProcessGroupGloo> inner;
};

// A collective under way, what is done after it, and the tensors it reads and writes until then.
struct Work {
  std::vector<c10::intrusive_ptr<c10d::Work>> inner;
  std::function<void()> finish;
  std::vector<at::Tensor> keep;
};

namespace {

// c10d logs every failure with a C++ backtrace before it throws. The exception says it all; TORCH_CPP_LOG_LEVEL brings the
// log back.
void silence_log() {
  if (std::getenv("TORCH_CPP_LOG_LEVEL")) return;
  FLAGS_caffe2_log_level = 3;
  c10::UpdateLoggingLevelsFromFlags();
}

// Gloo moves host memory; a tensor of a device is staged through a copy.
template <typename F>
void staged(const at::Tensor& tensor, F&& collective) {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> list{tensor.detach()};
  const bool direct = tensor.device().is_cpu() && tensor.is_contiguous();
  if (!direct) list[0] = list[0].to(at::kCPU).contiguous();
  collective(list)->wait();
  if (!direct) tensor.detach().copy_(list[0]);
}

}  // namespace
}  // namespace host

extern "C" char* host_store_new(const char* address, uint16_t port, int is_server, uint64_t world_size,
                                uint64_t timeout_ms, host::Store** out) {
  return host::guard([&] {
    host::silence_log();
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = is_server != 0;
    options.numWorkers = world_size;
    // Waiting for the workers is left to the group's own rendezvous, so that rank 0 can report a missing one by name.
    options.waitWorkers = false;
    options.timeout = host::Milliseconds(timeout_ms);
    *out = new host::Store{c10::make_intrusive<c10d::TCPStore>(address, options)};
  });
}

extern "C" void host_store_free(host::Store* store) { delete store; }

extern "C" uint16_t host_store_port(const host::Store* store) { return store->inner->getPort(); }

extern "C" char* host_store_set(const host::Store* store, const char* key, const uint8_t* value, size_t length) {
  return host::guard([&] { store->inner->set(key, std::vector<uint8_t>(value, value + length)); });
}

// `*found` is 0 when no rank set the key within the time.
extern "C" char* host_store_get(const host::Store* store, const char* key, uint64_t timeout_ms, uint8_t** value,
                                size_t* length) {
  return host::guard([&] {
    store->inner->wait({key}, host::Milliseconds(timeout_ms));
    const auto bytes = store->inner->get(key);
    *value = static_cast<uint8_t*>(std::malloc(std::max<size_t>(1, bytes.size())));
    TORCH_CHECK(*value, "out of memory");
    std::memcpy(*value, bytes.data(), bytes.size());
    *length = bytes.size();
  });
}

extern "C" char* host_store_check(const host::Store* store, const char* key, int* found) {
  return host::guard([&] { *found = store->inner->check({key}); });
}

extern "C" char* host_store_add(const host::Store* store, const char* key, int64_t amount, int64_t* result) {
  return host::guard([&] { *result = store->inner->add(key, amount); });
}

extern "C" void host_free_bytes(uint8_t* bytes) { std::free(bytes); }

// Exactly one of `interface` and `address` is not null.
extern "C" char* host_group_new(const host::Store* store, const char* prefix, int rank, int size, const char* interface,
                                const char* address, uint64_t meeting_ms, uint64_t timeout_ms,
                                host::Group** out) {
  return host::guard([&] {
    auto options = c10d::ProcessGroupGloo::Options::create(host::Milliseconds(timeout_ms));
    options->threads = 2;
    options->devices.push_back(interface ? c10d::ProcessGroupGloo::createDeviceForInterface(interface)
                                         : c10d::ProcessGroupGloo::createDeviceForHostname(address));
    auto view = c10::make_intrusive<c10d::PrefixStore>(prefix, store->inner);
    view->setTimeout(host::Milliseconds(meeting_ms));
    *out = new host::Group{c10::make_intrusive<c10d::ProcessGroupGloo>(view, rank, size, options)};
  });
}

extern "C" void host_group_free(host::Group* group) { delete group; }

extern "C" char* host_group_all_reduce_sum(const host::Group* group, const at::Tensor* tensor) {
  return host::guard([&] {
    host::staged(*tensor, [&](std::vector<at::Tensor>& list) { return group->inner->allreduce(list); });
  });
}

extern "C" char* host_group_broadcast(const host::Group* group, const at::Tensor* tensor, int root) {
  return host::guard([&] {
    c10d::BroadcastOptions options;
    options.rootRank = root;
    host::staged(*tensor, [&](std::vector<at::Tensor>& list) { return group->inner->broadcast(list, options); });
  });
}

extern "C" char* host_group_barrier(const host::Group* group) {
  return host::guard([&] { group->inner->barrier()->wait(); });
}

extern "C" char* host_group_all_gather(const host::Group* group, const at::Tensor* tensor, at::Tensor** out) {
  return host::guard([&] {
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> inputs{tensor->detach().to(at::kCPU).contiguous()};
    std::vector<at::Tensor> parts;
    for (int i = 0; i < group->inner->getSize(); i++) parts.push_back(at::empty_like(inputs[0]));
    std::vector<std::vector<at::Tensor>> outputs{parts};
    group->inner->allgather(outputs, inputs)->wait();
    *out = host::give(at::stack(outputs[0]).to(tensor->device()));
  });
}

// `whole` receives the shards of all ranks, one after another. Tensors of host memory. A broadcast of each into its place:
// Gloo's own all-gather makes a copy of the whole on the way.
extern "C" char* host_group_all_gather_into(const host::Group* group, const at::Tensor* whole, const at::Tensor* shard,
                                            host::Work** out) {
  return host::guard([&] {
    const at::NoGradGuard no_grad;
    // Not `detach`: weights that are gathered again are the weights that a graph saved.
    const at::Tensor into = whole->variable_data().view({-1});
    const int64_t size = shard->numel();
    into.narrow(0, group->inner->getRank() * size, size).copy_(shard->detach().view({-1}));
    auto work = std::make_unique<host::Work>();
    work->finish = [] {};
    work->keep = {into};
    for (int root = 0; root < group->inner->getSize(); root++) {
      c10d::BroadcastOptions options;
      options.rootRank = root;
      std::vector<at::Tensor> piece{into.narrow(0, root * size, size)};
      work->inner.push_back(group->inner->broadcast(piece, options));
    }
    *out = work.release();
  });
}

// Every rank sends each other its part and adds up what it receives by rank: as many bytes as a ring moves, and the order
// of the sum does not depend on the network.
extern "C" char* host_group_reduce_scatter_sum(const host::Group* group, const at::Tensor* shard, const at::Tensor* whole,
                                               host::Work** out) {
  return host::guard([&] {
    const at::NoGradGuard no_grad;
    at::Tensor into = shard->variable_data(), from = whole->detach().contiguous();
    at::Tensor parts = at::empty({group->inner->getSize(), into.numel()}, from.options());
    std::vector<int64_t> even;
    at::Tensor received = parts.view({-1}), sent = from.view({-1});
    auto work = group->inner->alltoall_base(received, sent, even, even);
    *out = new host::Work{{std::move(work)}, [into, parts] { into.copy_(parts.sum(0).view_as(into)); }, {from}};
  });
}

extern "C" char* host_work_wait(host::Work* work) {
  return host::guard([&] {
    const at::NoGradGuard no_grad;
    for (const auto& part : work->inner) part->wait();
    work->finish();
  });
}

extern "C" void host_work_free(host::Work* work) { delete work; }

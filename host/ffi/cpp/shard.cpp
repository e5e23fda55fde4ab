// Memory that comes and goes under a tensor, and steps of a backward pass that are somebody else's.
#include "shim.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

namespace host {

// What the Rust side does with the gradient of a node's output; the result is that of its input, or undefined.
using NodeCall = char* (*)(void* data, const at::Tensor* grad, at::Tensor** out);
using NodeDrop = void (*)(void* data);

namespace {

struct ForeignNode : torch::autograd::Node {
  NodeCall call;
  NodeDrop drop;
  void* data;

  ForeignNode(NodeCall call_, NodeDrop drop_, void* data_) : call(call_), drop(drop_), data(data_) {}
  ~ForeignNode() override { drop(data); }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override {
    at::Tensor* made = nullptr;
    if (char* failure = call(data, &grads[0], &made)) {
      const std::string text(failure);
      std::free(failure);
      TORCH_CHECK(false, text);
    }
    const std::unique_ptr<at::Tensor> result(made);
    return {result ? *result : at::Tensor()};
  }
};

}  // namespace
}  // namespace host

// Gives the memory under a tensor back, or takes as much again with any content. Views of it follow.
extern "C" char* host_storage_free(const at::Tensor* tensor) {
  return host::guard([&] {
    const c10::Storage& storage = tensor->storage();
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(storage.allocator()->allocate(0));
    storage.unsafeGetStorageImpl()->set_nbytes(0);
  });
}

extern "C" char* host_storage_take(const at::Tensor* tensor) {
  return host::guard([&] {
    const c10::Storage& storage = tensor->storage();
    const size_t bytes = (tensor->storage_offset() + tensor->numel()) * tensor->element_size();
    if (storage.nbytes() == bytes) return;
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(storage.allocator()->allocate(bytes));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  });
}

// Exchanges the memory under two tensors, which have storages of their own; views follow.
extern "C" char* host_storage_swap(const at::Tensor* one, const at::Tensor* other) {
  return host::guard([&] {
    auto* a = one->storage().unsafeGetStorageImpl();
    auto* b = other->storage().unsafeGetStorageImpl();
    TORCH_CHECK(a != b && a->device() == b->device(), "swap_storage: two storages of one device are wanted");
    at::DataPtr kept = a->set_data_ptr(b->set_data_ptr(at::DataPtr(nullptr, b->device())));
    b->set_data_ptr_noswap(std::move(kept));
    const auto bytes = a->nbytes();
    a->set_nbytes(b->nbytes());
    b->set_nbytes(bytes);
  });
}

// `output` as a function of `x` whose backward is `call`. Takes `data` over whatever happens.
extern "C" char* host_node(const at::Tensor* x, const at::Tensor* output, host::NodeCall call, host::NodeDrop drop,
                           void* data, at::Tensor** out) {
  return host::guard([&] {
    std::shared_ptr<host::ForeignNode> node(new host::ForeignNode(call, drop, data), torch::autograd::deleteNode);
    node->set_next_edges(torch::autograd::collect_next_edges(*x));
    at::Tensor result = output->variable_data();
    torch::autograd::set_history(result, node);
    *out = host::give(result);
  });
}

// Of a message that the Rust side hands to a node.
extern "C" char* host_message(const char* text, size_t length) {
  return host::message(std::string(text, length));
}

// The CUDA implementation of the operators. It is a library of its own: one linked with CUDA loads only where CUDA is.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "arguments.h"
#include "launch.h"

namespace swin {
namespace {

template <bool kMerge>
void move(const Tensor& from, Tensor& to, const Geometry& g, int64_t bytes) {
  const auto device = from.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  launch_move(from.const_data_ptr(), to.mutable_data_ptr(), g, bytes, kMerge, stream);
}

Tensor window_partition(const Tensor& x, Numbers window, Numbers shift, int64_t parts, int64_t heads) {
  return windows_of(x, window, shift, parts, heads, move<false>);
}

Tensor window_merge(const Tensor& windows, Numbers resolution, Numbers window, Numbers shift) {
  return map_of(windows, resolution, window, shift, move<true>);
}

}  // namespace
}  // namespace swin

STABLE_TORCH_LIBRARY_IMPL(swin, CUDA, m) {
  m.impl("window_partition", TORCH_BOX(&swin::window_partition));
  m.impl("window_merge", TORCH_BOX(&swin::window_merge));
}

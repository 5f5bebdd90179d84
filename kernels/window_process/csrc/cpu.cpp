// The operators' schemas, and their CPU implementation.

#include <algorithm>
#include <cstring>

#include "arguments.h"

namespace swin {
namespace {

template <typename Index, bool kMerge>
void move_slices(const char* from, char* to, const Geometry& g, int64_t bytes) {
  const Layout<Index> layout(g);
  const int64_t grain = std::max<int64_t>(1, 65536 / bytes);  // a thread should have tens of kilobytes to move
  torch::stable::parallel_for(0, g.units(), grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t there = layout.map_unit(static_cast<Index>(i));
      std::memcpy(to + (kMerge ? there : i) * bytes, from + (kMerge ? i : there) * bytes, bytes);
    }
  });
}

template <bool kMerge>
void move(const Tensor& from, Tensor& to, const Geometry& g, int64_t bytes) {
  const auto* source = static_cast<const char*>(from.const_data_ptr());
  auto* target = static_cast<char*>(to.mutable_data_ptr());
  if (g.units() < kUnitsFor32Bits)
    move_slices<uint32_t, kMerge>(source, target, g, bytes);
  else
    move_slices<uint64_t, kMerge>(source, target, g, bytes);
}

Tensor window_partition(const Tensor& x, Numbers window, Numbers shift, int64_t parts, int64_t heads) {
  return windows_of(x, window, shift, parts, heads, move<false>);
}

Tensor window_merge(const Tensor& windows, Numbers resolution, Numbers window, Numbers shift) {
  return map_of(windows, resolution, window, shift, move<true>);
}

}  // namespace
}  // namespace swin

STABLE_TORCH_LIBRARY_FRAGMENT(swin, m) {
  m.def("window_partition(Tensor x, SymInt[] window_size, SymInt[] shift_size, SymInt parts, SymInt heads) -> Tensor");
  m.def("window_merge(Tensor windows, SymInt[] resolution, SymInt[] window_size, SymInt[] shift_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(swin, CPU, m) {
  m.impl("window_partition", TORCH_BOX(&swin::window_partition));
  m.impl("window_merge", TORCH_BOX(&swin::window_merge));
}

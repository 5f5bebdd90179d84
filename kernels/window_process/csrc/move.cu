// A copy between map and windows on a GPU: each thread moves one unit, as wide as channels and pointers allow.

#include <cuda_runtime.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "launch.h"

namespace swin {
namespace {

constexpr int kThreads = 256;

template <typename Unit, typename Index, bool kMerge>
__global__ void __launch_bounds__(kThreads)
    move_units(const Unit* __restrict__ from, Unit* __restrict__ to, Layout<Index> layout, Index units) {
  const Index step = static_cast<Index>(gridDim.x) * kThreads;
  for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < units; i += step) {
    const Index there = layout.map_unit(i);
    if (kMerge)
      to[there] = from[i];
    else
      to[i] = from[there];
  }
}

template <typename Unit, typename Index>
void launch(const void* from, void* to, const Geometry& g, bool merge, cudaStream_t stream) {
  const int64_t blocks = std::min<int64_t>((g.units() + kThreads - 1) / kThreads, INT32_MAX);
  const auto kernel = merge ? move_units<Unit, Index, true> : move_units<Unit, Index, false>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<const Unit*>(from), static_cast<Unit*>(to), Layout<Index>(g), static_cast<Index>(g.units()));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Unit>
void launch_units(const void* from, void* to, Geometry g, int64_t bytes, bool merge, cudaStream_t stream) {
  g.vectors = bytes / static_cast<int64_t>(sizeof(Unit));
  if (g.units() < kUnitsFor32Bits)
    launch<Unit, uint32_t>(from, to, g, merge, stream);
  else
    launch<Unit, uint64_t>(from, to, g, merge, stream);
}

}  // namespace

void launch_move(const void* from, void* to, Geometry g, int64_t bytes, bool merge, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (widest_unit(from, to, bytes)) {
    case 16: return launch_units<uint4>(from, to, g, bytes, merge, on);
    case 8: return launch_units<uint2>(from, to, g, bytes, merge, on);
    case 4: return launch_units<uint32_t>(from, to, g, bytes, merge, on);
    case 2: return launch_units<uint16_t>(from, to, g, bytes, merge, on);
    default: return launch_units<uint8_t>(from, to, g, bytes, merge, on);
  }
}

}  // namespace swin

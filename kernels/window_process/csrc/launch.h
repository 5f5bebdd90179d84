// The CUDA kernels behind plain pointers, so that nvcc sees no tensors and a C++ compiler no kernels.

#pragma once

#include "layout.h"

namespace swin {

// Moves slices of `bytes` bytes from a map to windows, or with `merge` from windows to a map, on a cudaStream_t of the
// current device. Throws std::runtime_error if the launch fails.
void launch_move(const void* from, void* to, Geometry geometry, int64_t bytes, bool merge, void* stream);

}  // namespace swin

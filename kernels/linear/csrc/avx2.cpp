// For x86-64 with AVX2 and FMA. Headers that others share come first: what they define is compiled for any processor.

#include "call.h"
#include "scratch.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define SET avx2
#define LANES 8
#define TILE 6
#define LAYOUT "floats.h"
#include "linear.h"
#include "backward.h"

namespace swin {

const Code kAvx2{LANES, avx2::kPanel, TILE, avx2::panel_size, avx2::pack, avx2::product, avx2::few_rows, avx2::mlp,
                 avx2::mlp_gradient, avx2::weight_gradient, avx2::add_parts};

}  // namespace swin
#else
const swin::Code swin::kAvx2{};
#endif

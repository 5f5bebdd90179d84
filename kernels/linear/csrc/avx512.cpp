// For x86-64 with AVX-512. Headers that others share come first: what they define is compiled for any processor.

#include "call.h"
#include "scratch.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SET avx512
#define LANES 16
#define TILE 14
#define LAYOUT "floats.h"
#include "linear.h"
#include "backward.h"

namespace swin {

const Code kAvx512{LANES, avx512::kPanel, TILE, avx512::panel_size, avx512::pack, avx512::product, avx512::few_rows, avx512::mlp,
                   avx512::mlp_gradient, avx512::weight_gradient, avx512::add_parts};

}  // namespace swin
#else
const swin::Code swin::kAvx512{};
#endif

// For x86-64 with AMX, beside AVX-512. Headers that others share come first, as in avx512.cpp.

#include "call.h"
#include "scratch.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SET amx
#define LANES 16
#define TILE 32
#define LAYOUT "split_floats.h"
#include "linear.h"
#include "backward.h"

namespace swin {

// Lanes are those of a tile register.
const Code kAmx{256,
                amx::kPanel,
                TILE,
                amx::panel_size,
                amx::pack,
                amx::with_registers<amx::product, Product, Units&>,
                amx::with_registers<amx::few_rows, FewRows, int64_t, int64_t>,
                amx::with_registers<amx::mlp, Mlp, Units&>,
                amx::with_registers<amx::mlp_gradient, MlpGradient, Units&>,
                amx::with_registers<amx::weight_gradient, WeightGradient, Units&>,
                amx::add_parts};

}  // namespace swin
#else
const swin::Code swin::kAmx{};
#endif

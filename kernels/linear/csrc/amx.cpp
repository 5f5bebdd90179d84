// For x86-64 with AMX, beside AVX-512. Headers that others share come first, as in avx512.cpp.

#include "call.h"
#include "scratch.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SET amx
#define LANES 16
#define TILE 32
#define LAYOUT "bfloats.h"
#include "linear.h"

namespace swin {
namespace {

template <auto RUN, typename Work, typename... Share>
void with_registers(const Work& work, Share... share) {
  amx::Registers registers;
  RUN(work, share...);
}

}  // namespace

// Lanes are those of a tile register.
const Code kAmx{256,
                amx::kPanel,
                TILE,
                amx::panel_size,
                amx::pack,
                with_registers<amx::product, Product, Units&>,
                with_registers<amx::few_rows, FewRows, int64_t, int64_t>,
                with_registers<amx::mlp, Mlp, Units&>,
                with_registers<amx::mlp_gradient, MlpGradient, Units&>,
                with_registers<amx::weight_gradient, WeightGradient, Units&>,
                amx::add_parts};

}  // namespace swin
#else
const swin::Code swin::kAmx{};
#endif

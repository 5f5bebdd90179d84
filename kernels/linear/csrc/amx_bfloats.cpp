// For x86-64 with AMX and AVX512-BF16: of bfloat16. Headers that others share come first, as in avx512.cpp.

#include "call.h"
#include "scratch.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SET amx_bfloats
#define LANES 16
#define TILE 32
#define LAYOUT "bfloats.h"
#include "linear.h"

namespace swin {

const Code kAmxBFloats{512,
                       amx_bfloats::kPanel,
                       TILE,
                       amx_bfloats::panel_size,
                       amx_bfloats::pack,
                       amx_bfloats::with_registers<amx_bfloats::product, Product, Units&>,
                       amx_bfloats::with_registers<amx_bfloats::few_rows, FewRows, int64_t, int64_t>,
                       amx_bfloats::with_registers<amx_bfloats::mlp, Mlp, Units&>,
                       nullptr,
                       nullptr,
                       nullptr};

}  // namespace swin
#else
const swin::Code swin::kAmxBFloats{};
#endif

// For x86-64 with AVX2 and FMA. Headers that others share come first: what they define is compiled for any processor.

#include "call.h"
#include "scratch.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")
#define SET avx2
#define LANES 8
#define ROWS 6
#include "windows.h"

namespace swin {

const Code kAvx2{LANES, avx2::forward<float>, avx2::backward<float>,
                  avx2::forward<avx2::BFloat16>, avx2::backward<avx2::BFloat16>};

}  // namespace swin
#else
const swin::Code swin::kAvx2{};
#endif

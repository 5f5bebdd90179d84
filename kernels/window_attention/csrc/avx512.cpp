// For x86-64 with AVX-512. Headers that others share come first: what they define is compiled for any processor.

#include "call.h"
#include "scratch.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define SET avx512
#define LANES 16
#define ROWS 7
#include "windows.h"

namespace swin {

const Code kAvx512{LANES, avx512::forward<float>, avx512::backward<float>,
                    avx512::forward<avx512::BFloat16>, avx512::backward<avx512::BFloat16>};

}  // namespace swin
#else
const swin::Code swin::kAvx512{};
#endif

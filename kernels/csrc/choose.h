// The code of an instruction set that this processor runs.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace swin {

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

// Whether the processor multiplies tiles of bfloat16, and Linux, which keeps the tiles' large registers from programs that
// do not ask for them, lets this one: not if a thread has too small a stack for signals.
inline bool may_use_tiles() {
#if defined(__x86_64__) && defined(__GNUC__) && defined(__linux__) && defined(SYS_arch_prctl)
  static const bool may = [] {
    constexpr unsigned kBfloat16 = 1u << 22, kTiles = 1u << 24;
    constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBfloat16) && (d & kTiles) &&
           syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
  }();
  return may;
#else
  return false;
#endif
}

#if defined(__x86_64__) && defined(__GNUC__)
inline bool runs_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

inline bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// Whether it also converts vectors to bfloat16, which all of those processors do, but not all machines that pretend to be one.
inline bool may_use_tiles_of_bfloats() {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool may = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool converts = __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5));  // AVX512-BF16
    return converts && runs_avx512() && may_use_tiles();
  }();
  return may;
#else
  return false;
#endif
}

// The widest code that the compiler made and this processor runs; or the one of so many lanes, if it is that.
template <typename Code>
const Code& choose_code(const Code& plain, const Code& avx2, const Code& avx512, int64_t lanes,
                        const Code* amx = nullptr) {
  std::vector<const Code*> usable{&plain};
#if defined(__x86_64__) && defined(__GNUC__)
  if (runs_avx2() && avx2.lanes) usable.push_back(&avx2);
  if (runs_avx512() && avx512.lanes) usable.push_back(&avx512);
  const bool wants_tiles = amx && amx->lanes && (lanes == 0 || lanes == amx->lanes);
  if (wants_tiles && runs_avx512() && may_use_tiles()) usable.push_back(amx);
#endif
  for (const Code* code : usable)
    if (code->lanes == lanes) return *code;
  require(lanes == 0, "no code of " + std::to_string(lanes) + " lanes runs on this processor");
  return *usable.back();
}

}  // namespace swin

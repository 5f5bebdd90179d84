// The code of an instruction set that this processor runs.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace swin {

inline void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

// The widest code that the compiler made and this processor runs; or the one of so many lanes, if it is that.
template <typename Code>
const Code& choose_code(const Code& plain, const Code& avx2, const Code& avx512, int64_t lanes) {
  std::vector<const Code*> usable{&plain};
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2 && avx2.lanes) usable.push_back(&avx2);
  if (has_avx2 && has_avx512 && avx512.lanes) usable.push_back(&avx512);
#endif
  for (const Code* code : usable)
    if (code->lanes == lanes) return *code;
  require(lanes == 0, "no code of " + std::to_string(lanes) + " lanes runs on this processor");
  return *usable.back();
}

}  // namespace swin

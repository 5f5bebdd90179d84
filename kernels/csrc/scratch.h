// Memory of a thread. For any processor, included before the code of an instruction set.

#pragma once

#include <cstdint>

namespace swin {

// Taken piece by piece; each begins at a cache line.
class Scratch {
 public:
  Scratch(int64_t floats, int64_t pieces)
      : memory_(new char[floats * sizeof(float) + 64 * (pieces + 1)]), next_(memory_) {}
  ~Scratch() { delete[] memory_; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // Nothing is known of what is in it.
  template <typename T = float>
  T* take(int64_t count) {
    char* piece = next_ + (64 - reinterpret_cast<uintptr_t>(next_) % 64) % 64;
    next_ = piece + count * sizeof(T);
    return reinterpret_cast<T*>(piece);
  }

  template <typename T = float>
  T* take_zeros(int64_t count) {
    T* piece = take<T>(count);
    __builtin_memset(piece, 0, count * sizeof(T));
    return piece;
  }

 private:
  char* memory_;
  char* next_;
};

}  // namespace swin

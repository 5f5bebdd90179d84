// Where a unit of windowed order lies on the map: arithmetic that the CPU and the CUDA kernels share.
//
// A map is (B, H, W, parts, heads, d). Windowed order is (parts, B, rows, columns, heads, h, w, d) for rows x columns
// windows of h x w tokens, the first of which begins at (top, left) of the map; windows wrap around its edges.
// A unit is a part of the d channels that is moved at once: `vectors` units make d channels.

#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SWIN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SWIN_HOST_DEVICE inline
#endif

namespace swin {

// Sizes as numbers, before an index type is chosen. 0 <= top < H and 0 <= left < W.
struct Geometry {
  int64_t parts, batch, rows, columns, heads, h, w, vectors;
  int64_t top, left;

  int64_t units() const { return parts * batch * rows * columns * heads * h * w * vectors; }
};

template <typename Index>
struct QuotientRemainder {
  Index quotient, remainder;
};

// Division by a number known beforehand.
template <typename Index>
struct Divisor {
  Index value;

  Divisor() = default;
  explicit Divisor(int64_t by) : value(static_cast<Index>(by)) {}

  SWIN_HOST_DEVICE QuotientRemainder<Index> divide(Index n) const {
    const Index quotient = n / value;
    return {quotient, n - quotient * value};
  }
};

// For n and divisors below 2^31 a product and a shift do it (Granlund and Montgomery 1994, section 4). A thread divides
// seven times to move 16 bytes: by the plain operator that would take longer than the memory.
template <>
struct Divisor<uint32_t> {
  uint32_t value, magic, shift;

  Divisor() = default;
  explicit Divisor(int64_t by) : value(static_cast<uint32_t>(by)), shift(0) {
    while ((uint64_t{1} << shift) < value) ++shift;
    magic = static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift) - value) / value + 1);
  }

  SWIN_HOST_DEVICE QuotientRemainder<uint32_t> divide(uint32_t n) const {
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * magic) >> 32);
    const uint32_t quotient = (high + n) >> shift;
    return {quotient, n - quotient * value};
  }
};

// uint32_t serves fewer than 2^31 units, uint64_t any number.
template <typename Index>
struct Layout {
  Divisor<Index> batch, rows, columns, heads, h, w, vectors;
  Index parts, top, left, height, width;

  explicit Layout(const Geometry& g)
      : batch(g.batch), rows(g.rows), columns(g.columns), heads(g.heads), h(g.h), w(g.w), vectors(g.vectors),
        parts(static_cast<Index>(g.parts)), top(static_cast<Index>(g.top)), left(static_cast<Index>(g.left)),
        height(static_cast<Index>(g.rows * g.h)), width(static_cast<Index>(g.columns * g.w)) {}

  // The unit of the map that is the i-th in windowed order.
  SWIN_HOST_DEVICE Index map_unit(Index i) const {
    const auto vector = vectors.divide(i);
    const auto across = w.divide(vector.quotient);
    const auto down = h.divide(across.quotient);
    const auto head = heads.divide(down.quotient);
    const auto column = columns.divide(head.quotient);
    const auto row = rows.divide(column.quotient);
    const auto image = batch.divide(row.quotient);
    Index y = row.remainder * h.value + down.remainder + top;
    Index x = column.remainder * w.value + across.remainder + left;
    if (y >= height) y -= height;
    if (x >= width) x -= width;
    const Index token = (image.remainder * height + y) * width + x;
    return ((token * parts + image.quotient) * heads.value + head.remainder) * vectors.value + vector.remainder;
  }
};

constexpr int64_t kUnitsFor32Bits = int64_t{1} << 31;

// Bytes of the widest unit, up to 16, that slices of `bytes` bytes at both addresses are a whole number of.
inline int64_t widest_unit(const void* from, const void* to, int64_t bytes) {
  const uint64_t alignment = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) | 16;
  const uint64_t together = alignment | static_cast<uint64_t>(bytes);
  return static_cast<int64_t>(together & (~together + 1));  // its lowest bit
}

}  // namespace swin

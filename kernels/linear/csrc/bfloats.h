// Packed matrices of bfloat16, for processors whose tile registers multiply them (AMX) and whose vectors convert to them
// (AVX512-BF16). Rows and results are bfloat16, weights and biases floats; sums, and what is between an MLP's products until
// GELU is computed, floats too. Weights are rounded as they are packed. No include guard, as of vector.h.
//
// A pair is two neighbouring terms, so a tile's row holds 32 terms in order.

constexpr int64_t kParts = 1;
constexpr int64_t kSteps = 2, kInstructions = 8;  // of a block's products
#include "bfloat16.h"
#include "registers.h"

typedef BFloat16 Number;  // what rows, and results, are of
typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));

constexpr int64_t kTerms = 32 * kTermsOfBlock;  // of a panel at once

// The first numbers of a vector, zeros after them.
inline Vector load_some(const BFloat16* from, int64_t count) {
  Halves halves{};
  if (count >= LANES)
    __builtin_memcpy(&halves, from, sizeof halves);
  else
    __builtin_memcpy(&halves, from, count * sizeof(BFloat16));
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  Vector x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// To the nearest, ties to even; NaN stays NaN, what is below 1.2e-38 becomes 0.
inline void store_some(BFloat16* to, Vector x, int64_t count) {
  Halves halves;
  asm("vcvtneps2bf16 %1, %0" : "=v"(halves) : "v"(x));
  if (count >= LANES)
    __builtin_memcpy(to, &halves, sizeof halves);
  else
    __builtin_memcpy(to, &halves, count * sizeof(BFloat16));
}

// The numbers of x, then those of y, as a row of pairs.
inline Vector pairs_of(Vector x, Vector y) {
  Vector pairs;
  asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(pairs) : "v"(x), "v"(y));
  return pairs;
}

inline void store_pairs(Vector x, Vector y, float* row) { store(row, pairs_of(x, y)); }

// A block of a panel, of some terms and columns that lie at column * b_column + term; ALL of them, or fewer.
template <bool ALL>
inline void pack_across(const float* b, int64_t b_column, int64_t terms, int64_t columns, float* block) {
  for (int64_t j = 0; j < kPanel; j += LANES, block += kRegister) {
    Vector rows[LANES];
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i) {
      const float* from = b + (j + i) * b_column;
      if (ALL)
        rows[i] = pairs_of(load(from), load(from + LANES));
      else
        rows[i] = j + i < columns ? pairs_of(load_up_to(from, terms), load_up_to(from + LANES, terms - LANES)) : Vector{};
    }
    transpose_block(rows);
#pragma GCC unroll 16
    for (int64_t i = 0; i < LANES; ++i) store(block + i * LANES, rows[i]);
  }
}

// A panel of b, whose term k and column j lie at k + j * b_column.
inline void pack_panel(const float* b, int64_t, int64_t b_column, int64_t terms, int64_t columns, float* panel) {
  for (int64_t k = 0; k < terms; k += kTermsOfBlock, b += kTermsOfBlock, panel += kBlock) {
    const int64_t some = terms - k < kTermsOfBlock ? terms - k : kTermsOfBlock;
    if (some == kTermsOfBlock && columns == kPanel)
      pack_across<true>(b, b_column, some, columns, panel);
    else
      pack_across<false>(b, b_column, some, columns, panel);
  }
}

// Products of a block, of H halves of the rows, whatever is exchanged.
template <int H, bool, typename Step>
inline void multiply_block(const float* a, const float* b, const Next& next, Step step) {
  load_register<4>(a, LANES);
  next.fetch<0>();
  load_register<6>(b, LANES);
  next.fetch<1>();
  multiply_registers<0, 4, 6>();
  next.fetch<2>();
  load_register<7>(b + kRegister, LANES);
  next.fetch<3>();
  multiply_registers<1, 4, 7>();
  next.fetch<4>();
  step();
  if constexpr (H == 2) load_register<5>(a + kRegister, LANES);
  next.fetch<5>();
  if constexpr (H == 2) multiply_registers<2, 5, 6>();
  next.fetch<6>();
  if constexpr (H == 2) multiply_registers<3, 5, 7>();
  next.fetch<7>();
  step();
}

#include "tiles.h"

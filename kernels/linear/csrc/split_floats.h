// Packed matrices of processors whose tile registers multiply bfloat16 (AMX). A float is the sum of three bfloat16, and a
// product of two floats that of six products of them: of all but those that lie below its last digit. So sums are as exact
// as those of floats, and the six take less time than one in vectors.
//
// A block, see registers.h, holds its numbers' first parts, then second, then third ones; of each two tile registers. A pair
// is terms i and i + 16 of the block: what vectors hold side by side. No include guard, as of vector.h.

constexpr int64_t kParts = 3;
constexpr int64_t kSteps = 6, kInstructions = 38;  // of a block's products
#include "registers.h"

typedef float Number;  // what rows, and results, are of

constexpr int64_t kTerms = 8 * kTermsOfBlock;  // of a panel at once
constexpr int64_t kNear = kTermsOfBlock;       // rows that are read together as terms

inline Bits bits_of(Vector x) {
  Bits bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline Vector vector_of(Bits bits) {
  Vector x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// The parts of x and y, in pairs, into a row of each part of a block. The first is cut off, the second rounded, so that what
// is left out of products has no direction; the third is the rest. Of what is infinite the others are NaN.
inline void store_pairs(Vector x, Vector y, float* row) {
  typedef uint32_t Unsigned __attribute__((vector_size(sizeof(Bits))));
  constexpr int32_t kHigh = -65536;  // where the bits of a bfloat16 are in a float
#pragma GCC unroll 3
  for (int part = 0; part < kParts; ++part, row += kPart) {
    const int32_t half = part == 1 ? 32768 : 0;
    const Bits of_x = (bits_of(x) + half) & kHigh, of_y = (bits_of(y) + half) & kHigh;
    store(row, vector_of(reinterpret_cast<Bits>(reinterpret_cast<Unsigned>(of_x) >> 16) | of_y));
    x -= vector_of(of_x);
    y -= vector_of(of_y);
  }
}

// A block's 16 numbers of 32 rows, those of the rows and of the numbers exchanged, into a register of each part.
inline void store_transposed(Vector (&rows)[2 * LANES], float* to) {
  transpose_block(rows);
  transpose_block(rows + LANES);
#pragma GCC unroll 16
  for (int64_t i = 0; i < LANES; ++i) store_pairs(rows[i], rows[i + LANES], to + i * LANES);
}

// f of a block's rows or fewer of some columns, as so many terms of a panel. Adds them to sums.
template <typename F>
inline void pack_terms(const float* from, int64_t row, int64_t terms, int64_t columns, float* panel, float* sums, F f) {
  for (int64_t j = 0; j < kPanel; j += LANES, panel += kRegister) {
    Vector of_x = {}, of_y = {};
    const auto pack = [&](auto numbers) __attribute__((always_inline)) {
      for (int64_t k = 0; k < LANES; ++k) {
        const Vector x = numbers(k), y = numbers(k + LANES);
        store_pairs(x, y, panel + k * LANES);
        of_x += x;
        of_y += y;
      }
    };
    if (terms == kTermsOfBlock && columns >= j + LANES)
      pack([&](int64_t k) { return f(load(from + k * row + j)); });
    else
      pack([&](int64_t k) { return k < terms ? f(load_up_to(from + k * row + j, columns - j)) : Vector{}; });
    store(sums + j, load(sums + j) + (of_x + of_y));
  }
}

constexpr int64_t kSums = TILE;                 // room for a sum of each row of a tile
constexpr int64_t kChunk = 16 * kTermsOfBlock;  // rows that are multiplied at once, for the gradient of a weight
constexpr int64_t kLeft = TILE;                 // columns of its left side, at once: Columns keeps those of one tile
constexpr int64_t kRowsOfStep = 4;              // of a register
constexpr int64_t kHalfSteps = 2 + LANES / kRowsOfStep, kColumnSteps = 2 * kHalfSteps;  // in which pack_columns is done

// What pack_columns keeps between its steps: 16 columns of a block as rows, half of the terms and then the others, and sums
// of the former.
struct Columns {
  Vector rows[2 * LANES], sum;
};

// A block's rows or fewer of some columns, as so many terms of a tile, whose rows the columns are. Adds them to sums.
inline void pack_columns(Columns& kept, int64_t step, const float* from, int64_t row, int64_t terms, int64_t columns,
                         float* tile, float* sums) {
  const int64_t n = step / kHalfSteps * LANES, stage = step % kHalfSteps;
  if (n >= columns) return;
  if (stage < 2) {
    Vector* rows = kept.rows + stage * LANES;
    const int64_t first = stage * LANES;
    if (terms >= first + LANES && columns >= n + LANES) {
#pragma GCC unroll 16
      for (int64_t k = 0; k < LANES; ++k) rows[k] = load(from + (first + k) * row + n);
    } else {
      for (int64_t k = 0; k < LANES; ++k)
        rows[k] = first + k < terms ? load_up_to(from + (first + k) * row + n, columns - n) : Vector{};
    }
    Vector sum = {};
#pragma GCC unroll 16
    for (int64_t k = 0; k < LANES; ++k) sum += rows[k];
    if (stage == 0)
      kept.sum = sum;
    else
      store(sums + n, load(sums + n) + (kept.sum + sum));  // in the order of pack_terms
    transpose_block(rows);
    return;
  }
  const int64_t first = (stage - 2) * kRowsOfStep;
#pragma GCC unroll 8
  for (int64_t k = 2 * first; k < 2 * (first + kRowsOfStep); ++k)
    __builtin_prefetch(from + (kTermsOfBlock + k) * row + n);  // for the next block
#pragma GCC unroll 4
  for (int64_t i = first; i < first + kRowsOfStep; ++i)
    store_pairs(kept.rows[i], kept.rows[i + LANES], tile + (n + i) * LANES);
}

// A block of a panel, of some terms and columns that lie at column * b_column + term; ALL of them, or fewer.
template <bool ALL>
inline void pack_across(const float* b, int64_t b_column, int64_t terms, int64_t columns, float* block) {
  for (int64_t j = 0; j < kPanel; j += LANES, block += kRegister) {
    Vector rows[2 * LANES];
#pragma GCC unroll 32
    for (int64_t i = 0; i < 2 * LANES; ++i) {
      const int64_t column = j + i % LANES, term = i / LANES * LANES;
      const float* from = b + column * b_column + term;
      rows[i] = ALL ? load(from) : column < columns ? load_up_to(from, terms - term) : Vector{};
    }
    store_transposed(rows, block);
  }
}

// A panel of b, whose term k and column j lie at k * b_term + j * b_column.
inline void pack_panel(const float* b, int64_t b_term, int64_t b_column, int64_t terms, int64_t columns, float* panel) {
  for (int64_t k = 0; k < terms; k += kTermsOfBlock, b += kTermsOfBlock * b_term, panel += kBlock) {
    const int64_t some = terms - k < kTermsOfBlock ? terms - k : kTermsOfBlock;
    float sums[kPanel] = {};
    if (b_column == 1)
      pack_terms(b, b_term, some, columns, panel, sums, [](Vector x) { return x; });
    else if (some == kTermsOfBlock && columns == kPanel)
      pack_across<true>(b, b_column, some, columns, panel);
    else
      pack_across<false>(b, b_column, some, columns, panel);
  }
}

// Registers 4 and 5 hold a part of the left side, 6 and 7 one of the right side; those before them sums, see tiles.h. Two
// halves of a part, or the first of H, as instructions from I on:
template <int REGISTER, int H, int I>
inline __attribute__((always_inline)) void load_halves(const float* part, const Next& next) {
  load_register<REGISTER>(part, LANES);
  next.fetch<I>();
  if constexpr (H == 2) load_register<REGISTER + 1>(part + kRegister, LANES);
  next.fetch<I + 1>();
}

// Another part of one side, and its products with what is there of the other, of H halves of the rows.
template <int H, int I>
inline __attribute__((always_inline)) void multiply_left(const float* part, const Next& next) {
  load_register<4>(part, LANES);
  next.fetch<I>();
  multiply_registers<0, 4, 6>();
  next.fetch<I + 1>();
  multiply_registers<1, 4, 7>();
  next.fetch<I + 2>();
  if constexpr (H == 2) load_register<5>(part + kRegister, LANES);
  next.fetch<I + 3>();
  if constexpr (H == 2) multiply_registers<2, 5, 6>();
  next.fetch<I + 4>();
  if constexpr (H == 2) multiply_registers<3, 5, 7>();
  next.fetch<I + 5>();
}

template <int H, int I>
inline __attribute__((always_inline)) void multiply_right(const float* part, const Next& next) {
  load_register<6>(part, LANES);
  next.fetch<I>();
  multiply_registers<0, 4, 6>();
  next.fetch<I + 1>();
  if constexpr (H == 2) multiply_registers<2, 5, 6>();
  next.fetch<I + 2>();
  load_register<7>(part + kRegister, LANES);
  next.fetch<I + 3>();
  multiply_registers<1, 4, 7>();
  next.fetch<I + 4>();
  if constexpr (H == 2) multiply_registers<3, 5, 7>();
  next.fetch<I + 5>();
}

// Products of a block, of H halves of the rows.
template <int H, bool EXCHANGED, typename Step>
inline void multiply_block(const float* a, const float* b, const Next& next, Step step) {
  if constexpr (EXCHANGED) {
    load_halves<6, 2, 0>(b, next);
    multiply_left<H, 2>(a + 2 * kPart, next), step();
    multiply_left<H, 8>(a, next), step();
    multiply_left<H, 14>(a + kPart, next), step();
    multiply_right<H, 20>(b + kPart, next), step();
    multiply_left<H, 26>(a, next), step();
    multiply_right<H, 32>(b + 2 * kPart, next), step();
  } else {
    load_halves<4, H, 0>(a, next);
    multiply_right<H, 2>(b + 2 * kPart, next), step();
    multiply_right<H, 8>(b, next), step();
    multiply_right<H, 14>(b + kPart, next), step();
    multiply_left<H, 20>(a + kPart, next), step();
    multiply_right<H, 26>(b, next), step();
    multiply_left<H, 32>(a + 2 * kPart, next), step();
  }
}

#include "tiles.h"

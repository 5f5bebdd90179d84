// Linear layers and MLPs of one instruction set: LANES floats a vector, TILE rows at once, packed as the file LAYOUT says,
// in namespace SET. No include guard, as of vector.h.

namespace swin {
namespace SET {

#include "vector.h"
#include "gelu.h"
#include "panels.h"

// Whether sums lie where the result does, for it is of floats.
constexpr bool kInPlace = sizeof(Number) == sizeof(float);

// to = f(from, to) over a strip of columns.
template <typename T, typename F>
inline void map_strip(int64_t rows, int64_t columns, const float* from, int64_t from_row, T* to, int64_t to_row, F f) {
  for (int64_t i = 0; i < rows; ++i, from += from_row, to += to_row)
    for (int64_t j = 0; j < columns; j += LANES)
      store_some(to + j, f(load_some(from + j, columns - j), load_some(to + j, columns - j)), columns - j);
}

// The first row of a block; the blocks differ by a tile at most.
inline int64_t first_row(int64_t M, int64_t blocks, int64_t block) {
  const int64_t row = block * ((M + TILE - 1) / TILE) / blocks * TILE;
  return row < M ? row : M;
}

inline int64_t most_rows(int64_t M, int64_t blocks) { return ((M + TILE - 1) / TILE + blocks - 1) / blocks * TILE; }

void pack(const Packing& work, int64_t begin, int64_t end) {
  for (int64_t n = begin * kPanel; n < end * kPanel && n < work.N; n += kPanel)
    pack_panel(work.b + n * work.b_column, work.b_term, work.b_column, work.K,
               work.N - n < kPanel ? work.N - n : kPanel, work.packed + n / kPanel * panel_size(work.K));
}

// Not functions: so each has code of its own where it is passed on.
constexpr auto kSame = [](Vector x, int64_t, int64_t, int64_t) { return x; };
constexpr auto kGelu = [](Vector x, int64_t, int64_t, int64_t) { return kInPlace ? gelu(x) : gelu_for_bfloats(x); };

// How the numbers of normalised rows come about: what is taken from a row's, and what they are multiplied by.
struct RowScale {
  float mean, factor;
};

inline void scale_rows(const Norm& norm, int64_t rows, int64_t columns, const Number* x, RowScale* scales) {
  for (int64_t i = 0; norm.weight && i < rows; ++i, x += columns) {
    Vector sums = {};
    for (int64_t j = 0; j < columns; j += LANES) sums += load_some(x + j, columns - j);
    const float mean = sum(sums) / columns;
    Vector squares = {};
    for (int64_t j = 0; j < columns; j += LANES) {
      const Vector away = load_some(x + j, columns - j) - mean;
      if (j + LANES <= columns)
        squares += away * away;
      else
        for (int64_t k = 0; k < columns - j; ++k) squares[k] += away[k] * away[k];
    }
    scales[i] = {mean, 1.0f / __builtin_sqrtf(sum(squares) / columns + norm.eps)};
  }
}

// pack_tiles of columns from `first` on, normalised. The bias is loaded first: so that the compiler fuses its addition
// everywhere or nowhere, and which path a row takes makes no difference.
inline void pack_normed(const Norm& norm, const RowScale* scales, int64_t rows, int64_t columns, int64_t first,
                        const Number* from, int64_t from_row, float* tiles) {
  if (!norm.weight) return pack_tiles(0, rows, columns, from, from_row, tiles, tile_size(columns), kSame);
  pack_tiles(0, rows, columns, from, from_row, tiles, tile_size(columns),
             [&](Vector x, int64_t i, int64_t k, int64_t count) {
               const Vector weight = load_some(norm.weight + first + k, count);
               const Vector bias = load_some(norm.bias + first + k, count);
               return (x - scales[i].mean) * (weight * scales[i].factor) + bias;
             });
}

// Columns from n on of a matrix of M rows in strips, from some row on.
template <typename T>
inline T* strip_of(T* matrix, int64_t M, int64_t n, int64_t row) {
  return matrix + n * M + row * kPanel;
}

// Room for two strips of a block's rows, by turns.
class Strips {
 public:
  explicit Strips(int64_t rows) : size_(rows * kPanel), scratch_(2 * size_, 1), data_(scratch_.take(2 * size_)) {}
  float* at(int64_t n) const { return data_ + n / kPanel % 2 * size_; }

 private:
  int64_t size_;
  Scratch scratch_;
  float* data_;
};

template <typename T>
inline float* place_of([[maybe_unused]] T* c) {
  if constexpr (kInPlace)
    return c;
  else
    return nullptr;
}

// c = sums, plus `added` if there is any; c and `added` are of some columns of N.
inline void finish_strip(int64_t rows, int64_t columns, const float* sums, int64_t row, const Number* added, Number* c,
                         int64_t N) {
  if (kInPlace && !added) return;
  for (int64_t i = 0; i < rows; ++i, sums += row, c += N) {
    if (!kInPlace) __builtin_prefetch(c + 16 * N, 1);
    for (int64_t j = 0; j < columns; j += LANES) {
      Vector x = load_some(sums + j, columns - j);
      if (added) x += load_some(added + i * N + j, columns - j);
      store_some(c + j, x, columns - j);
    }
  }
}

// c (rows x N) = a (rows x K) b + bias + added, a in tiles, b packed, null for what is not there.
inline void multiply_into(int64_t rows, int64_t N, int64_t K, const float* a, const float* packed, const float* bias,
                          const Number* added, Number* c, const Strips& strips) {
  const auto to = [&](int64_t n) { return kInPlace ? Strip{place_of(c) + n, N} : Strip{strips.at(n), kPanel}; };
  multiply_packed(rows, N, K, a, packed, bias, to, [&](int64_t n, int64_t columns, int64_t first, int64_t last) {
    const int64_t from = first * N + n;
    const Strip sums = to(n);
    finish_strip(last - first, columns, sums.data + first * sums.row, sums.row, added ? added + from : nullptr, c + from, N);
  });
}

void product(const Product& work, Units& units) {
  const int64_t most = most_rows(work.M, work.blocks);
  Strips strips(kInPlace ? 0 : most);
  Scratch scratch(tiles_size(most, work.K) + 2 * most, 2);
  float* tiles = scratch.take(tiles_size(most, work.K));
  RowScale* scales = scratch.take<RowScale>(most);
  const Number *a = static_cast<const Number*>(work.a), *added = static_cast<const Number*>(work.added);
  Number* c = static_cast<Number*>(work.c);
  for (int64_t block; units.take(block);) {
    const int64_t row = first_row(work.M, work.blocks, block);
    const int64_t rows = first_row(work.M, work.blocks, block + 1) - row;
    scale_rows(work.norm, rows, work.K, a + row * work.K, scales);
    pack_normed(work.norm, scales, rows, work.K, 0, a + row * work.K, work.K, tiles);
    multiply_into(rows, work.N, work.K, tiles, work.b, work.bias, added ? added + row * work.N : nullptr,
                  c + row * work.N, strips);
  }
}

void few_rows(const FewRows& work, int64_t begin, int64_t end) {
  const int64_t M = work.M, N = work.N, K = work.K, most = K < kTerms ? K : kTerms;
  const int64_t strips = kInPlace ? 0 : most < K ? end - begin : 1;  // of sums that wait for more terms
  Scratch scratch(tiles_size(M, most) + panel_size(most) + 2 * M + strips * M * kPanel, 4);
  float *tiles = scratch.take(tiles_size(M, most)), *packed = scratch.take(panel_size(most));
  float* sums = scratch.take(strips * M * kPanel);
  RowScale* scales = scratch.take<RowScale>(M);
  Nothing nothing;
  const Number *a = static_cast<const Number*>(work.a), *added = static_cast<const Number*>(work.added);
  Number *to = static_cast<Number*>(work.c), *gelu_of = static_cast<Number*>(work.gelu_of);
  const auto sums_of = [&](int64_t n) {
    if (work.c_in_strips) return Strip{strip_of(static_cast<float*>(work.c), M, n, 0), kPanel};
    if (kInPlace) return Strip{place_of(to) + n, N};
    return Strip{sums + (most < K ? n / kPanel - begin : 0) * M * kPanel, kPanel};
  };
  scale_rows(work.norm, M, K, a, scales);
  for (int64_t k = 0; k < K; k += kTerms) {
    const int64_t terms = K - k < kTerms ? K - k : kTerms;
    pack_normed(work.norm, scales, M, terms, k, a + k, K, tiles);
    for (int64_t n = begin * kPanel; n < end * kPanel && n < N; n += kPanel) {
      const int64_t columns = N - n < kPanel ? N - n : kPanel;
      const Strip c = sums_of(n);
      const float* panel = work.b + n / kPanel * panel_size(K) + panel_at(k);
      if (work.b_term) {
        pack_panel(work.b + k * work.b_term + n * work.b_column, work.b_term, work.b_column, terms, columns, packed);
        panel = packed;
      }
      multiply_tiles(M, columns, tiles, tile_size(terms), {panel, terms, nullptr, 0, false},
                     k ? c.data : work.bias ? work.bias + n : nullptr, k ? c.row : 0, c.data, c.row, nothing);
      if (k + terms < K) continue;
      if (gelu_of)
        map_strip(M, columns, c.data, c.row, gelu_of + n, N, [](Vector x, Vector) { return kGelu(x, 0, 0, 0); });
      else if (work.slope_of)
        map_strip(M, columns, strip_of(work.slope_of, M, n, 0), kPanel, c.data, c.row,
                  [](Vector x, Vector grad) { return grad * gelu_slope(x); });
      else
        finish_strip(M, columns, c.data, c.row, added ? added + n : nullptr, to + n, N);
    }
  }
}

void mlp(const Mlp& work, Units& units) {
  const int64_t most = most_rows(work.M, work.blocks);
  const int64_t of_x = tiles_size(most, work.C), of_a = tiles_size(most, work.H);
  Strips strips(most);
  Scratch scratch(of_x + of_a + 2 * most, 3);
  float *tiles = scratch.take(of_x), *a = scratch.take(of_a);
  RowScale* scales = scratch.take<RowScale>(most);
  for (int64_t block; units.take(block);) {
    const int64_t row = first_row(work.M, work.blocks, block);
    const int64_t rows = first_row(work.M, work.blocks, block + 1) - row;
    const Number* x = static_cast<const Number*>(work.x) + row * work.C;
    Number* y = static_cast<Number*>(work.y) + row * work.C_out;
    scale_rows(work.norm, rows, work.C, x, scales);
    pack_normed(work.norm, scales, rows, work.C, 0, x, work.C, tiles);
    const auto h = [&](int64_t n) { return Strip{work.h ? strip_of(work.h, work.M, n, row) : strips.at(n), kPanel}; };
    multiply_packed(rows, work.H, work.C, tiles, work.w1, work.b1, h,
                    [&](int64_t n, int64_t columns, int64_t first, int64_t last) {
                      pack_tiles(first, last, columns, h(n).data, kPanel, a + tile_at(n), tile_size(work.H), kGelu);
                    });
    multiply_into(rows, work.C_out, work.H, a, work.w2, work.b2, work.residual ? x : nullptr, y, strips);
  }
}

}  // namespace SET
}  // namespace swin

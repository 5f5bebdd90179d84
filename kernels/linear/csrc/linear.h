// Linear layers and MLPs of one instruction set: LANES floats a vector, TILE rows at once, in namespace SET. No include
// guard, as of vector.h.

namespace swin {
namespace SET {

#include "vector.h"
#include "gelu.h"
#include "panels.h"

// to = f(from, to) over a strip of columns.
template <typename F>
inline void map_strip(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* to, int64_t to_row,
                      F f) {
  for (int64_t i = 0; i < rows; ++i, from += from_row, to += to_row) {
    int64_t j = 0;
    for (; j + LANES <= columns; j += LANES) store(to + j, f(load(from + j), load(to + j)));
    if (j == columns) continue;
    store_some(to + j, f(load_some(from + j, columns - j), load_some(to + j, columns - j)), columns - j);
  }
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
               work.N - n < kPanel ? work.N - n : kPanel, work.packed + n * work.K);
}

// Not functions: so each has code of its own where it is passed on.
constexpr auto kSame = [](Vector x, int64_t, int64_t, int64_t) { return x; };
constexpr auto kGelu = [](Vector x, int64_t, int64_t, int64_t) { return gelu(x); };

void product(const Product& work, int64_t begin, int64_t end) {
  Scratch scratch(tiles_size(most_rows(work.M, work.blocks), work.K), 1);
  float* a = scratch.take(tiles_size(most_rows(work.M, work.blocks), work.K));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = first_row(work.M, work.blocks, block);
    const int64_t rows = first_row(work.M, work.blocks, block + 1) - row;
    pack_tiles(rows, work.K, work.a + row * work.K, work.K, a, tile_size(work.K), kSame);
    multiply_packed(rows, work.N, work.K, a, work.b, work.bias, work.c + row * work.N);
  }
}

// How the numbers of normalised rows come about: what is taken from a row's, and what they are multiplied by.
struct RowScale {
  float mean, factor;
};

inline void scale_rows(const Norm& norm, int64_t rows, int64_t columns, const float* x, RowScale* scales) {
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

// pack_tiles of columns from k on, normalised.
inline void pack_normed(const Norm& norm, const RowScale* scales, int64_t rows, int64_t columns, int64_t first,
                        const float* from, int64_t from_row, float* tiles) {
  if (!norm.weight) return pack_tiles(rows, columns, from, from_row, tiles, tile_size(columns), kSame);
  pack_tiles(rows, columns, from, from_row, tiles, tile_size(columns),
             [&](Vector x, int64_t i, int64_t k, int64_t count) {
               const Vector weight = load_some(norm.weight + first + k, count);
               return (x - scales[i].mean) * (weight * scales[i].factor) + load_some(norm.bias + first + k, count);
             });
}

inline void add_strip(int64_t rows, int64_t columns, const float* from, float* to, int64_t row) {
  map_strip(rows, columns, from, row, to, row, [](Vector x, Vector y) { return x + y; });
}

// Columns from n on of a matrix of M rows in strips, from some row on.
template <typename T>
inline T* strip_of(T* matrix, int64_t M, int64_t n, int64_t row) {
  return matrix + n * M + row * kPanel;
}

void few_rows(const FewRows& work, int64_t begin, int64_t end) {
  const int64_t M = work.M, N = work.N, K = work.K, most = K < kTerms ? K : kTerms;
  Scratch scratch(tiles_size(M, most) + most * kPanel + 2 * M, 3);
  float *tiles = scratch.take(tiles_size(M, most)), *packed = scratch.take(most * kPanel);
  RowScale* scales = scratch.take<RowScale>(M);
  scale_rows(work.norm, M, K, work.a, scales);
  for (int64_t k = 0; k < K; k += kTerms) {
    const int64_t terms = K - k < kTerms ? K - k : kTerms;
    pack_normed(work.norm, scales, M, terms, k, work.a + k, K, tiles);
    for (int64_t n = begin * kPanel; n < end * kPanel && n < N; n += kPanel) {
      const int64_t columns = N - n < kPanel ? N - n : kPanel;
      const Strip c = work.c_in_strips ? Strip{strip_of(work.c, M, n, 0), kPanel} : Strip{work.c + n, N};
      const float* panel = work.b + n * K + k * kPanel;
      if (work.b_term) {
        pack_panel(work.b + k * work.b_term + n * work.b_column, work.b_term, work.b_column, terms, columns, packed);
        panel = packed;
      }
      multiply_tiles(M, columns, tiles, tile_size(terms), panel, terms,
                     k ? c.data : work.bias ? work.bias + n : nullptr, k ? c.row : 0, c.data, c.row);
      if (k + terms < K) continue;
      if (work.added) add_strip(M, columns, work.added + n, c.data, N);
      if (work.gelu_of)
        map_strip(M, columns, c.data, c.row, work.gelu_of + n, N, [](Vector x, Vector) { return gelu(x); });
      if (work.slope_of)
        map_strip(M, columns, strip_of(work.slope_of, M, n, 0), kPanel, c.data, c.row,
                  [](Vector x, Vector grad) { return grad * gelu_slope(x); });
    }
  }
}

void mlp(const Mlp& work, int64_t begin, int64_t end) {
  const int64_t most = most_rows(work.M, work.blocks);
  const int64_t of_x = tiles_size(most, work.C), of_a = tiles_size(most, work.H), of_strip = most * kPanel;
  Scratch scratch(of_x + of_a + of_strip + 2 * most, 4);
  float *tiles = scratch.take(of_x), *a = scratch.take(of_a), *strip = scratch.take(of_strip);
  RowScale* scales = scratch.take<RowScale>(most);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = first_row(work.M, work.blocks, block);
    const int64_t rows = first_row(work.M, work.blocks, block + 1) - row;
    const float* x = work.x + row * work.C;
    float* y = work.y + row * work.C_out;
    scale_rows(work.norm, rows, work.C, x, scales);
    pack_normed(work.norm, scales, rows, work.C, 0, x, work.C, tiles);
    const auto h = [&](int64_t n) { return Strip{work.h ? strip_of(work.h, work.M, n, row) : strip, kPanel}; };
    multiply_packed(rows, work.H, work.C, tiles, work.w1, work.b1, h, [&](int64_t n, int64_t columns) {
      pack_tiles(rows, columns, h(n).data, kPanel, a + n * TILE, tile_size(work.H), kGelu);
    });
    multiply_packed(
        rows, work.C_out, work.H, a, work.w2, work.b2, [&](int64_t n) { return Strip{y + n, work.C_out}; },
        [&](int64_t n, int64_t columns) {
          if (work.residual) add_strip(rows, columns, x + n, y + n, work.C_out);
        });
  }
}

void mlp_gradient(const MlpGradient& work, int64_t begin, int64_t end) {
  const int64_t most = most_rows(work.M, work.blocks), M = work.M, H = work.H;
  const int64_t of_grad = tiles_size(most, work.C_out), of_h = tiles_size(most, H), of_strip = most * kPanel;
  Scratch scratch(of_grad + of_h + of_strip, 3);
  float *grad = scratch.take(of_grad), *tiles = scratch.take(of_h), *strip = scratch.take(of_strip);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = first_row(M, work.blocks, block), rows = first_row(M, work.blocks, block + 1) - row;
    pack_tiles(rows, work.C_out, work.grad + row * work.C_out, work.C_out, grad, tile_size(work.C_out), kSame);
    multiply_packed(
        rows, H, work.C_out, grad, work.w2, nullptr, [&](int64_t) { return Strip{strip, kPanel}; },
        [&](int64_t n, int64_t columns) {
          const float* h = strip_of(work.h, work.h_rows, n, row);
          float* grad_h = strip_of(work.grad_h, M, n, row);
          pack_tiles(rows, columns, strip, kPanel, tiles + n * TILE, tile_size(H),
                     [&](Vector x, int64_t i, int64_t k, int64_t count) {
                       const Vector y = x * gelu_slope(load_some(h + i * kPanel + k, count));
                       store_some(grad_h + i * kPanel + k, y, count);
                       return y;
                     });
        });
    if (work.grad_x) multiply_packed(rows, work.C, H, tiles, work.w1, nullptr, work.grad_x + row * work.C);
  }
}

constexpr int64_t kChunk = 512;  // rows that are multiplied at once, for the gradient of a weight
constexpr int64_t kLeft = 98 / TILE * TILE;  // columns of its left side, at once
constexpr int64_t kNear = 8;       // rows that are read together: the first cache holds them

// Columns of a matrix as the rows of tiles. Adds terms to sums, a vector for each tile.
inline void pack_columns(const float* from, int64_t row, int64_t terms, int64_t columns, float* tiles, float* sums) {
  for (int64_t begin = 0; begin < terms; begin += kNear) {
    const int64_t end = begin + kNear < terms ? begin + kNear : terms;
    for (int64_t n = 0, tile = 0; n < columns; n += TILE, ++tile) {
      Vector sum = load(sums + tile * LANES);
      for (int64_t k = begin; k < end; ++k) {
        const Vector x = load_some(from + k * row + n, columns - n);
        store(tiles + tile * tile_size(terms) + k * TILE, x);
        sum += x;
      }
      store(sums + tile * LANES, sum);
    }
  }
}

// Rows of some columns, as panels. Adds them to sums.
inline void pack_rows(const WeightGradient& work, int64_t m, int64_t terms, int64_t first, int64_t last, float* panels,
                      float* sums) {
  for (int64_t begin = 0; begin < terms; begin += kNear) {
    const int64_t end = begin + kNear < terms ? begin + kNear : terms;
    for (int64_t n = first; n < last; n += kPanel) {
      const int64_t columns = last - n < kPanel ? last - n : kPanel;
      const float* from = work.b_in_strips ? strip_of(work.b, work.b_rows, n, m) : work.b + m * work.K + n;
      const int64_t row = work.b_in_strips ? kPanel : work.K;
      for (int64_t j = 0; j < kPanel; j += LANES) {
        Vector sum = load(sums + n - first + j);
        for (int64_t k = begin; k < end; ++k) {
          Vector x = j < columns ? load_some(from + k * row + j, columns - j) : Vector{};
          if (work.gelu_b) x = gelu(x);
          store(panels + (n - first) * kChunk + k * kPanel + j, x);
          sum += x;
        }
        store(sums + n - first + j, sum);
      }
    }
  }
}

void weight_gradient(const WeightGradient& work, int64_t begin, int64_t end) {
  const int64_t N = work.N, K = work.K, panels = (K + kPanel - 1) / kPanel, tiles = (N + TILE - 1) / TILE;
  const int64_t most_panels = (panels + work.groups - 1) / work.groups;
  const int64_t of_tiles = kLeft / TILE * tile_size(kChunk), of_panels = most_panels * kChunk * kPanel;
  Scratch scratch(of_tiles + of_panels + tiles * LANES + most_panels * kPanel, 4);
  float *tiles_of_a = scratch.take(of_tiles), *panels_of_b = scratch.take(of_panels);
  float *a_sums = scratch.take(tiles * LANES), *b_sums = scratch.take(most_panels * kPanel);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit / work.groups, group = unit % work.groups;
    const int64_t first = group * panels / work.groups * kPanel, stop = (group + 1) * panels / work.groups * kPanel;
    const int64_t last = stop < K ? stop : K;
    const int64_t from = part * work.M / work.parts, count = (part + 1) * work.M / work.parts - from;
    const int64_t chunks = (count + kChunk - 1) / kChunk;  // as large as each other
    float* c = work.c + part * work.c_size;
    __builtin_memset(a_sums, 0, tiles * LANES * sizeof(float));
    __builtin_memset(b_sums, 0, most_panels * kPanel * sizeof(float));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t m = from + chunk * count / chunks, terms = from + (chunk + 1) * count / chunks - m;
      pack_rows(work, m, terms, first, last, panels_of_b, b_sums);
      for (int64_t n = 0; n < N; n += kLeft) {
        const int64_t rows = N - n < kLeft ? N - n : kLeft;
        pack_columns(work.a + m * N + n, N, terms, rows, tiles_of_a, a_sums + n / TILE * LANES);
        for (int64_t k = first; k < last; k += kPanel) {
          const int64_t columns = last - k < kPanel ? last - k : kPanel;
          const Strip to = work.c_in_strips ? Strip{strip_of(c, N, k, n), kPanel} : Strip{c + n * K + k, K};
          multiply_tiles(rows, columns, tiles_of_a, tile_size(terms), panels_of_b + (k - first) * kChunk, terms,
                         chunk ? to.data : nullptr, to.row, to.data, to.row);
        }
      }
    }
    if (group == 0)
      for (int64_t n = 0; n < N; ++n) work.a_sums[part * N + n] = a_sums[n / TILE * LANES + n % TILE];
    __builtin_memcpy(work.b_sums + part * K + first, b_sums, (last - first) * sizeof(float));
    for (int64_t k = first; chunks == 0 && k < last; k += kPanel)
      for (int64_t n = 0; n < N; ++n) {
        float* to = work.c_in_strips ? strip_of(c, N, k, n) : c + n * K + k;
        __builtin_memset(to, 0, (last - k < kPanel ? last - k : kPanel) * sizeof(float));
      }
  }
}

void add_parts(const Parts& work, int64_t begin, int64_t end) {
  constexpr int64_t kPiece = 4 * LANES;  // rows
  Scratch scratch(kPiece * kPanel, 1);
  float* sums = scratch.take(kPiece * kPanel);
  for (int64_t k = begin * kPanel; k < end * kPanel && k < work.K; k += kPanel) {
    const int64_t columns = work.K - k < kPanel ? work.K - k : kPanel;
    for (int64_t n = 0; n < work.N; n += kPiece) {
      const int64_t rows = work.N - n < kPiece ? work.N - n : kPiece;
      const float* from = strip_of(work.parts, work.N, k, n);
      for (int64_t i = 0; i < rows * kPanel; i += LANES) {
        Vector sum = load(from + i);
        for (int64_t part = 1; part < work.count; ++part) sum += load(from + part * work.size + i);
        store(sums + i, sum);
      }
      if (work.across)
        transpose(sums, kPanel, rows, columns, work.to + k * work.N + n, work.N);
      else
        for (int64_t i = 0; i < rows; ++i)
          __builtin_memcpy(work.to + (n + i) * work.K + k, sums + i * kPanel, columns * sizeof(float));
    }
  }
}

}  // namespace SET
}  // namespace swin

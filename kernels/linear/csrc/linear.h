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
    const Vector y = f(load_some(from + j, columns - j), load_some(to + j, columns - j));
    __builtin_memcpy(to + j, &y, (columns - j) * sizeof(float));
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

inline Vector same(Vector x) { return x; }

void product(const Product& work, int64_t begin, int64_t end) {
  Scratch scratch(tiles_size(most_rows(work.M, work.blocks), work.K), 1);
  float* a = scratch.take(tiles_size(most_rows(work.M, work.blocks), work.K));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = first_row(work.M, work.blocks, block);
    const int64_t rows = first_row(work.M, work.blocks, block + 1) - row;
    pack_tiles(rows, work.K, work.a + row * work.K, work.K, a, tile_size(work.K), same);
    multiply_packed(rows, work.N, work.K, a, work.b, work.bias, work.c + row * work.N, work.N);
  }
}

void few_rows(const FewRows& work, int64_t begin, int64_t end) {
  const int64_t M = work.M, N = work.N, K = work.K;
  const int64_t numbers = work.b_term ? (K < kTerms ? K : kTerms) * kPanel : 0;
  Scratch scratch(numbers, 1);
  float* packed = scratch.take(numbers);
  for (int64_t n = begin * kPanel; n < end * kPanel && n < N; n += kPanel) {
    const int64_t columns = N - n < kPanel ? N - n : kPanel;
    float* c = work.c + n;
    for (int64_t k = 0; k < K; k += kTerms) {
      const int64_t terms = K - k < kTerms ? K - k : kTerms;
      const float* panel = work.b + n * K + k * kPanel;
      if (work.b_term) {
        const float* from = work.b + k * work.b_term + n * work.b_column;
        pack_panel(from, work.b_term, work.b_column, terms, columns, packed);
        panel = packed;
      }
      multiply_rows<Left::kRows>(M, columns, work.a + k, K, panel, terms, k ? c : work.bias ? work.bias + n : nullptr,
                                 k ? N : 0, c, N);
    }
    if (work.gelu_of)
      map_strip(M, columns, c, N, work.gelu_of + n, N, [](Vector x, Vector) { return gelu(x); });
    if (work.slope_of)
      map_strip(M, columns, work.slope_of + n, N, c, N, [](Vector x, Vector grad) { return grad * gelu_slope(x); });
  }
}

void mlp(const Mlp& work, int64_t begin, int64_t end) {
  const int64_t most = most_rows(work.M, work.blocks);
  const int64_t of_x = tiles_size(most, work.C), of_a = tiles_size(most, work.H), of_strip = most * kPanel;
  Scratch scratch(of_x + of_a + of_strip, 3);
  float *x = scratch.take(of_x), *a = scratch.take(of_a), *strip = scratch.take(of_strip);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = first_row(work.M, work.blocks, block);
    const int64_t rows = first_row(work.M, work.blocks, block + 1) - row;
    pack_tiles(rows, work.C, work.x + row * work.C, work.C, x, tile_size(work.C), same);
    const int64_t h_row = work.h ? work.H : kPanel;
    multiply_strips(rows, work.H, work.C, x, work.w1, work.b1, work.h ? work.h + row * work.H : strip, h_row,
                    work.h ? kPanel : 0, [&](int64_t n, int64_t columns, const float* h) {
                      pack_tiles(rows, columns, h, h_row, a + n * TILE, tile_size(work.H), gelu);
                    });
    multiply_packed(rows, work.C_out, work.H, a, work.w2, work.b2, work.y + row * work.C_out, work.C_out);
  }
}

void mlp_gradient(const MlpGradient& work, int64_t begin, int64_t end) {
  const int64_t most = most_rows(work.M, work.blocks);
  const int64_t of_grad = tiles_size(most, work.C_out), of_h = work.grad_x ? tiles_size(most, work.H) : 0;
  Scratch scratch(of_grad + of_h, 2);
  float *grad = scratch.take(of_grad), *tiles = scratch.take(of_h);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t row = first_row(work.M, work.blocks, block);
    const int64_t rows = first_row(work.M, work.blocks, block + 1) - row;
    const float* h = work.h + row * work.H;
    pack_tiles(rows, work.C_out, work.grad + row * work.C_out, work.C_out, grad, tile_size(work.C_out), same);
    multiply_strips(rows, work.H, work.C_out, grad, work.w2, nullptr, work.grad_h + row * work.H, work.H, kPanel,
                    [&](int64_t n, int64_t columns, float* grad_h) {
                      map_strip(rows, columns, h + n, work.H, grad_h, work.H,
                                [](Vector x, Vector grad) { return grad * gelu_slope(x); });
                      if (work.grad_x)
                        pack_tiles(rows, columns, grad_h, work.H, tiles + n * TILE, tile_size(work.H), same);
                    });
    if (work.grad_x)
      multiply_packed(rows, work.C, work.H, tiles, work.w1, nullptr, work.grad_x + row * work.C, work.C);
  }
}

constexpr int64_t kRows = 256;  // whose columns are packed at once, for the gradient of a weight

// Columns of a matrix, or of its GELU, as the rows of tiles. Adds terms to sums, a vector for each tile.
inline void pack_columns(const float* from, int64_t row, int64_t terms, int64_t columns, bool of_gelu, float* tiles,
                         float* sums) {
  constexpr int64_t kNear = 8;  // rows that are read together: the first cache holds them
  for (int64_t begin = 0; begin < terms; begin += kNear) {
    const int64_t end = begin + kNear < terms ? begin + kNear : terms;
    for (int64_t n = 0, tile = 0; n < columns; n += TILE, ++tile) {
      Vector sum = load(sums + tile * LANES);
      for (int64_t k = begin; k < end; ++k) {
        Vector x = load_some(from + k * row + n, columns - n);
        if (of_gelu) x = gelu(x);
        store(tiles + tile * tile_size(terms) + k * TILE, x);
        sum += x;
      }
      store(sums + tile * LANES, sum);
    }
  }
}

void weight_gradient(const WeightGradient& work, int64_t begin, int64_t end) {
  const int64_t N = work.N, K = work.K, tiles = (N + TILE - 1) / TILE, most = (tiles + work.groups - 1) / work.groups;
  Scratch scratch(most * (tile_size(kRows) + LANES) + kRows * kPanel, 3);
  float *tiles_of_a = scratch.take(most * tile_size(kRows)), *panel = scratch.take(kRows * kPanel);
  float* sums = scratch.take(most * LANES);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit / work.groups, group = unit % work.groups;
    const int64_t first = group * tiles / work.groups * TILE, stop = (group + 1) * tiles / work.groups * TILE;
    const int64_t last = stop < N ? stop : N;
    const int64_t from = part * work.M / work.parts, count = (part + 1) * work.M / work.parts - from;
    const int64_t chunks = (count + kRows - 1) / kRows;  // as large as each other
    float* c = work.c + part * N * K;
    __builtin_memset(sums, 0, most * LANES * sizeof(float));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t m = from + chunk * count / chunks, terms = from + (chunk + 1) * count / chunks - m;
      pack_columns(work.a + m * N + first, N, terms, last - first, work.gelu_a, tiles_of_a, sums);
      for (int64_t k = 0; k < K; k += kPanel) {
        const int64_t columns = K - k < kPanel ? K - k : kPanel;
        pack_panel(work.b + m * K + k, K, 1, terms, columns, panel);
        if (work.gelu_b)
          for (int64_t j = 0; j < terms * kPanel; j += LANES) store(panel + j, gelu(load(panel + j)));
        float* to = c + first * K + k;
        multiply_rows<Left::kTiles>(last - first, columns, tiles_of_a, tile_size(terms), panel, terms,
                                    chunk ? to : nullptr, K, to, K);
      }
    }
    for (int64_t n = first; n < last; ++n)
      work.sums[part * N + n] = sums[(n - first) / TILE * LANES + (n - first) % TILE];
    if (chunks == 0) __builtin_memset(c + first * K, 0, (last - first) * K * sizeof(float));
  }
}

}  // namespace SET
}  // namespace swin

// The backward passes of linear layers and MLPs of one instruction set, after linear.h. No include guard, as of vector.h.

namespace swin {
namespace SET {

void mlp_gradient(const MlpGradient& work, Units& units) {
  const int64_t most = most_rows(work.M, work.blocks), M = work.M, H = work.H;
  const int64_t of_grad = tiles_size(most, work.C_out), of_h = tiles_size(most, H);
  Strips strips(most);
  Scratch scratch(of_grad + of_h, 2);
  float *grad = scratch.take(of_grad), *tiles = scratch.take(of_h);
  for (int64_t block; units.take(block);) {
    const int64_t row = first_row(M, work.blocks, block), rows = first_row(M, work.blocks, block + 1) - row;
    pack_tiles(0, rows, work.C_out, work.grad + row * work.C_out, work.C_out, grad, tile_size(work.C_out), kSame);
    multiply_packed(
        rows, H, work.C_out, grad, work.w2, nullptr, [&](int64_t n) { return Strip{strips.at(n), kPanel}; },
        [&](int64_t n, int64_t columns, int64_t first, int64_t last) {
          const float* h = strip_of(work.h, work.h_rows, n, row);
          float* grad_h = strip_of(work.grad_h, M, n, row);
          pack_tiles(first, last, columns, strips.at(n), kPanel, tiles + tile_at(n), tile_size(H),
                     [&](Vector x, int64_t i, int64_t k, int64_t count) {
                       const Vector y = x * gelu_slope(load_some(h + i * kPanel + k, count));
                       store_some(grad_h + i * kPanel + k, y, count);
                       return y;
                     });
        });
    if (work.grad_x) multiply_packed(rows, work.C, H, tiles, work.w1, nullptr, work.grad_x + row * work.C);
  }
}

constexpr int64_t kFetched = 128 * 1024;  // numbers that may wait in the second cache

// Some steps of packing columns of a matrix as the rows of tiles. Adds terms to sums.
inline void pack_left(Columns& kept, int64_t first, int64_t last, const float* from, int64_t row, int64_t terms,
                      int64_t columns, float* tiles, float* sums) {
  for (int64_t step = first; step < last; ++step) {
    const int64_t k = step / kColumnSteps * kNear;
    for (int64_t n = 0, tile = 0; n < columns; n += TILE, ++tile)
      pack_columns(kept, step % kColumnSteps, from + k * row + n, row, terms - k < kNear ? terms - k : kNear, columns - n,
                   tiles + tile * tile_size(terms) + tile_at(k), sums + tile * kSums);
  }
}

// Rows of some columns, as panels. Adds them to sums.
inline void pack_right(const WeightGradient& work, int64_t m, int64_t terms, int64_t first, int64_t last, float* panels,
                       float* sums) {
  for (int64_t k = 0; k < terms; k += kNear)
    for (int64_t n = first; n < last; n += kPanel) {
      const int64_t columns = last - n < kPanel ? last - n : kPanel, some = terms - k < kNear ? terms - k : kNear;
      const float* from = work.b_in_strips ? strip_of(work.b, work.b_rows, n, m) : work.b + m * work.K + n;
      const int64_t row = work.b_in_strips ? kPanel : work.K;
      float* panel = panels + (n - first) / kPanel * panel_size(kChunk) + panel_at(k);
      const auto pack_of = [&](auto f) { pack_terms(from + k * row, row, some, columns, panel, sums + n - first, f); };
      if (work.gelu_b)
        pack_of([](Vector x) { return gelu(x); });
      else
        pack_of([](Vector x) { return x; });
    }
}

void weight_gradient(const WeightGradient& work, Units& units) {
  const int64_t N = work.N, K = work.K, panels = (K + kPanel - 1) / kPanel, tiles = (N + TILE - 1) / TILE;
  const int64_t most_panels = (panels + work.groups - 1) / work.groups;
  const int64_t of_tiles = kLeft / TILE * tile_size(kChunk), of_panels = most_panels * panel_size(kChunk);
  Scratch scratch(2 * of_tiles + of_panels + tiles * kSums + most_panels * kPanel, 4);
  float *tiles_of_a = scratch.take(2 * of_tiles), *panels_of_b = scratch.take(of_panels);
  Columns kept{};
  float *a_sums = scratch.take(tiles * kSums), *b_sums = scratch.take(most_panels * kPanel);
  for (int64_t unit; units.take(unit);) {
    const int64_t part = unit / work.groups, group = unit % work.groups;
    const int64_t first = group * panels / work.groups * kPanel, stop = (group + 1) * panels / work.groups * kPanel;
    const int64_t last = stop < K ? stop : K, panels_of_unit = (last - first + kPanel - 1) / kPanel;
    const int64_t from = part * work.M / work.parts, count = (part + 1) * work.M / work.parts - from;
    const int64_t chunks = (count + kChunk - 1) / kChunk, blocks = (count + kTermsOfBlock - 1) / kTermsOfBlock;
    float* c = work.c + part * work.c_size;
    __builtin_memset(a_sums, 0, tiles * kSums * sizeof(float));
    __builtin_memset(b_sums, 0, most_panels * kPanel * sizeof(float));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t m = chunk * blocks / chunks * kTermsOfBlock, next = (chunk + 1) * blocks / chunks * kTermsOfBlock;
      const int64_t terms = (next < count ? next : count) - m;
      pack_right(work, from + m, terms, first, last, panels_of_b, b_sums);
      const int64_t steps = (terms + kNear - 1) / kNear * kColumnSteps;
      const auto tiles_at = [&](int64_t n) { return tiles_of_a + n / kLeft % 2 * of_tiles; };
      const auto rows_at = [&](int64_t n) { return N - n < kLeft ? N - n : kLeft; };
      const auto pack_at = [&](int64_t n, int64_t begin, int64_t end) {
        pack_left(kept, begin, end, work.a + (from + m) * N + n, N, terms, rows_at(n), tiles_at(n),
                  a_sums + n / TILE * kSums);
      };
      // Of the next chunk's left side, whose rows lie one after the other, each product fetches a share.
      const int64_t products = (N + kLeft - 1) / kLeft * panels_of_unit;
      const int64_t lines = chunk + 1 < chunks && terms * N <= kFetched ? terms * N / kLine / products : 0;
      const float* ahead = work.a + (from + m + terms) * N;
      for (int64_t n = 0; n < N; n += kLeft) {
        if (!kBeside || n == 0) pack_at(n, 0, steps);
        const auto pack_next = [&](int64_t begin, int64_t end) { pack_at(n + kLeft, begin, end); };
        Beside beside(pack_next, 0, kBeside && n + kLeft < N ? steps : 0, panels_of_unit * steps_of(terms));
        for (int64_t k = first; k < last; k += kPanel) {
          const int64_t columns = last - k < kPanel ? last - k : kPanel;
          const Strip to = work.c_in_strips ? Strip{strip_of(c, N, k, n), kPanel} : Strip{c + n * K + k, K};
          const float* panel = panels_of_b + (k - first) / kPanel * panel_size(kChunk);
          multiply_tiles(rows_at(n), columns, tiles_at(n), tile_size(terms), {panel, terms, ahead, lines, work.exchanged},
                         chunk ? to.data : nullptr, to.row, to.data, to.row, beside);
          ahead += lines * kLine;
        }
        beside.finish();
      }
    }
    if (group == 0)
      for (int64_t n = 0; n < N; ++n) work.a_sums[part * N + n] = a_sums[n / TILE * kSums + n % TILE];
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

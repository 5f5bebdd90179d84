// Products of matrices. The right one is in panels: kPanel columns each, of a panel all terms, of a term its columns, zeros
// beyond the last. The left one is in tiles: TILE rows each, whose sums the registers hold, of a tile all terms, of a term
// its rows, zeros below the last; so one address serves all rows, and what follows in memory is what comes next.
// No include guard, as of vector.h. Needs TILE.

constexpr int64_t kPanel = 2 * LANES;
constexpr int64_t kTerms = 1024;  // of a panel at once

// Numbers from a tile to the next: with room for a whole vector at its last term.
constexpr int64_t tile_size(int64_t terms) { return ((terms - 1) * TILE + 2 * LANES - 1) / LANES * LANES; }

constexpr int64_t tiles_size(int64_t rows, int64_t terms) { return (rows + TILE - 1) / TILE * tile_size(terms); }

// The first numbers of a vector, zeros after them.
inline Vector load_some(const float* from, int64_t count) {
  Vector x = {};
  if (count >= LANES)
    x = load(from);
  else
    __builtin_memcpy(&x, from, count * sizeof(float));
  return x;
}

// A panel of b, whose term k and column j lie at k * b_term + j * b_column.
inline void pack_panel(const float* b, int64_t b_term, int64_t b_column, int64_t terms, int64_t columns, float* panel) {
  if (b_column == 1 && columns == kPanel) {
    for (int64_t k = 0; k < terms; ++k, panel += kPanel) {
      store(panel, load(b + k * b_term));
      store(panel + LANES, load(b + k * b_term + LANES));
    }
    return;
  }
  if (b_term == 1)
    transpose(b, b_column, columns, terms, panel, kPanel);
  else
    for (int64_t k = 0; k < terms; ++k)
      for (int64_t j = 0; j < columns; ++j) panel[k * kPanel + j] = b[k * b_term + j * b_column];
  for (int64_t k = 0; columns < kPanel && k < terms; ++k)
    for (int64_t j = columns; j < kPanel; ++j) panel[k * kPanel + j] = 0;
}

// f of some columns of rows, as so many terms of their tiles, which are `size` apart.
template <typename F>
inline void pack_tiles(int64_t rows, int64_t columns, const float* from, int64_t from_row, float* tiles, int64_t size,
                       F f) {
  for (int64_t i = 0; i < rows; i += TILE, from += TILE * from_row, tiles += size) {
    const int64_t some = rows - i < TILE ? rows - i : TILE;
    for (int64_t k = 0; k < columns; k += LANES) {
      const int64_t terms = columns - k < LANES ? columns - k : LANES;
      Vector block[LANES] = {};
#pragma GCC unroll 16
      for (int64_t r = 0; r < TILE; ++r)
        if (r < some) block[r] = f(load_some(from + r * from_row + k, terms));
      transpose_block(block);
#pragma GCC unroll 16
      for (int64_t t = 0; t < LANES; ++t)  // what is beyond the tile's rows gives way to the next term
        if (t < terms) store(tiles + (k + t) * TILE, block[t]);
    }
  }
}

// Whether the left matrix lies in tiles, or row by row.
enum class Left { kTiles, kRows };

// c (R x kPanel) = start + a panel; start null for zeros, start_row 0 for a row that serves all. c may be start.
template <int R, Left LEFT>
inline void multiply_panel(const float* a, int64_t a_row, const float* panel, int64_t terms, const float* start,
                           int64_t start_row, float* c, int64_t c_row) {
  constexpr int64_t a_term = LEFT == Left::kTiles ? TILE : 1;
  if (LEFT == Left::kTiles) a_row = 1;
  Vector total[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) total[r][j] = start ? load(start + r * start_row + j * LANES) : Vector{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < terms; ++k, panel += kPanel) {  // unrolled: counting costs as much as several products
    const Vector left = load(panel), right = load(panel + LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector x = all(a[r * a_row + k * a_term]);
      total[r][0] += x * left;
      total[r][1] += x * right;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) store(c + r * c_row + j * LANES, total[r][j]);
}

// The same of at most R rows.
template <int R, Left LEFT>
inline void multiply_panel_of(int64_t rows, const float* a, int64_t a_row, const float* panel, int64_t terms,
                              const float* start, int64_t start_row, float* c, int64_t c_row) {
  if (rows == R)
    multiply_panel<R, LEFT>(a, a_row, panel, terms, start, start_row, c, c_row);
  else if constexpr (R > 1)
    multiply_panel_of<R - 1, LEFT>(rows, a, a_row, panel, terms, start, start_row, c, c_row);
}

// The same, of which only so many columns exist, in start and in c.
template <Left LEFT>
inline void multiply_some(int64_t rows, int64_t columns, const float* a, int64_t a_row, const float* panel,
                          int64_t terms, const float* start, int64_t start_row, float* c, int64_t c_row) {
  if (columns == kPanel) {
    multiply_panel_of<TILE, LEFT>(rows, a, a_row, panel, terms, start, start_row, c, c_row);
    return;
  }
  float whole[TILE * kPanel] = {};
  for (int64_t r = 0; start && r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j) whole[r * kPanel + j] = start[r * start_row + j];
  multiply_panel_of<TILE, LEFT>(rows, a, a_row, panel, terms, whole, kPanel, whole, kPanel);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j) c[r * c_row + j] = whole[r * kPanel + j];
}

// The same of any number of rows, tile by tile. a_step: numbers from a row to the next, or from a tile.
template <Left LEFT>
inline void multiply_rows(int64_t rows, int64_t columns, const float* a, int64_t a_step, const float* panel,
                          int64_t terms, const float* start, int64_t start_row, float* c, int64_t c_row) {
  for (int64_t i = 0; i < rows; i += TILE) {
    multiply_some<LEFT>(rows - i < TILE ? rows - i : TILE, columns, a, a_step, panel, terms,
                        start ? start + i * start_row : nullptr, start_row, c + i * c_row, c_row);
    a += LEFT == Left::kTiles ? a_step : TILE * a_step;
  }
}

// c (rows x N) = a (rows x K) b + bias, a in tiles, b packed.
inline void multiply_packed(int64_t rows, int64_t N, int64_t K, const float* a, const float* packed, const float* bias,
                            float* c, int64_t c_row) {
  for (int64_t k = 0; k < K; k += kTerms) {
    const int64_t terms = K - k < kTerms ? K - k : kTerms;
    for (int64_t n = 0; n < N; n += kPanel)
      multiply_rows<Left::kTiles>(rows, N - n < kPanel ? N - n : kPanel, a + k * TILE, tile_size(K),
                                  packed + n * K + k * kPanel, terms, k ? c + n : bias ? bias + n : nullptr,
                                  k ? c_row : 0, c + n, c_row);
  }
}

// The same, strip by strip of kPanel columns, each c_step after the last; finish(n, columns, strip) follows that of
// columns from n on.
template <typename Finish>
inline void multiply_strips(int64_t rows, int64_t N, int64_t K, const float* a, const float* packed, const float* bias,
                            float* c, int64_t c_row, int64_t c_step, Finish finish) {
  for (int64_t n = 0; n < N; n += kPanel, c += c_step) {
    const int64_t columns = N - n < kPanel ? N - n : kPanel;
    for (int64_t k = 0; k < K; k += kTerms)
      multiply_rows<Left::kTiles>(rows, columns, a + k * TILE, tile_size(K), packed + n * K + k * kPanel,
                                  K - k < kTerms ? K - k : kTerms, k ? c : bias ? bias + n : nullptr, k ? c_row : 0, c,
                                  c_row);
    finish(n, columns, c);
  }
}

// Products of matrices. The right one is packed in panels: kPanel columns each, of a panel all terms, of a term its
// columns, zeros beyond the last. The left one is in tiles: TILE rows each, whose sums the registers hold, of a tile all
// terms, of a term its rows, zeros below the last; so one address serves all rows, and what follows in memory is what
// comes next.
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

inline void store_some(float* to, Vector x, int64_t count) {
  if (count >= LANES)
    store(to, x);
  else
    __builtin_memcpy(to, &x, count * sizeof(float));
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

// f of some columns of rows, as so many terms of their tiles, which are `size` apart. f(x, row, column, count) gets up to
// a vector's numbers of a row, zeros after them.
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
        if (r < some) block[r] = f(load_some(from + r * from_row + k, terms), i + r, k, terms);
      transpose_block(block);
#pragma GCC unroll 16
      for (int64_t t = 0; t < LANES; ++t)  // what is beyond the tile's rows gives way to the next term
        if (t < terms) store(tiles + (k + t) * TILE, block[t]);
    }
  }
}

// c (R x kPanel) = start + a panel; start null for zeros, start_row 0 for a row that serves all. c may be start.
template <int R>
inline void multiply_panel(const float* tile, const float* panel, int64_t terms, const float* start, int64_t start_row,
                           float* c, int64_t c_row) {
  Vector total[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) total[r][j] = start ? load(start + r * start_row + j * LANES) : Vector{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < terms; ++k, panel += kPanel) {  // unrolled: counting costs as much as several products
    const Vector y[2] = {load(panel), load(panel + LANES)};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) add_products(r, total[r], tile + k * TILE + r, y);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) store(c + r * c_row + j * LANES, total[r][j]);
}

// The same of at most R rows.
template <int R = TILE>
inline void multiply_panel_of(int64_t rows, const float* tile, const float* panel, int64_t terms, const float* start,
                              int64_t start_row, float* c, int64_t c_row) {
  if (rows == R)
    multiply_panel<R>(tile, panel, terms, start, start_row, c, c_row);
  else if constexpr (R > 1)
    multiply_panel_of<R - 1>(rows, tile, panel, terms, start, start_row, c, c_row);
}

// The same, of which only so many columns exist, in start and in c.
inline void multiply_some(int64_t rows, int64_t columns, const float* tile, const float* panel, int64_t terms,
                          const float* start, int64_t start_row, float* c, int64_t c_row) {
  if (columns == kPanel) {
    multiply_panel_of(rows, tile, panel, terms, start, start_row, c, c_row);
    return;
  }
  float whole[TILE * kPanel] = {};
  for (int64_t r = 0; start && r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j) whole[r * kPanel + j] = start[r * start_row + j];
  multiply_panel_of(rows, tile, panel, terms, whole, kPanel, whole, kPanel);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < columns; ++j) c[r * c_row + j] = whole[r * kPanel + j];
}

// The same of any number of rows, in tiles that are `size` apart.
inline void multiply_tiles(int64_t rows, int64_t columns, const float* tiles, int64_t size, const float* panel,
                           int64_t terms, const float* start, int64_t start_row, float* c, int64_t c_row) {
  for (int64_t i = 0; i < rows; i += TILE, tiles += size)
    multiply_some(rows - i < TILE ? rows - i : TILE, columns, tiles, panel, terms,
                  start ? start + i * start_row : nullptr, start_row, c + i * c_row, c_row);
}

// Some columns of a matrix, and from one of their rows to the next.
struct Strip {
  float* data;
  int64_t row;
};

// c (rows x N) = a (rows x K) b + bias, a in tiles, b packed, strip by strip of kPanel columns. to(n) says where that of
// columns from n on goes, after(n, columns) follows it.
template <typename To, typename After>
inline void multiply_packed(int64_t rows, int64_t N, int64_t K, const float* a, const float* packed, const float* bias,
                            To to, After after) {
  for (int64_t n = 0; n < N; n += kPanel) {
    const int64_t columns = N - n < kPanel ? N - n : kPanel;
    const Strip c = to(n);
    for (int64_t k = 0; k < K; k += kTerms)
      multiply_tiles(rows, columns, a + k * TILE, tile_size(K), packed + n * K + k * kPanel,
                     K - k < kTerms ? K - k : kTerms, k ? c.data : bias ? bias + n : nullptr, k ? c.row : 0, c.data,
                     c.row);
    after(n, columns);
  }
}

// The same, into a matrix.
inline void multiply_packed(int64_t rows, int64_t N, int64_t K, const float* a, const float* packed, const float* bias,
                            float* c) {
  multiply_packed(rows, N, K, a, packed, bias, [&](int64_t n) { return Strip{c + n, N}; },
                  [](int64_t, int64_t) {});
}

// Packed matrices of floats: of a panel all terms, of a term its columns, zeros beyond the last; of a tile all terms, of a
// term its rows, zeros below the last, whose sums the registers hold; so one address serves all rows, and what follows in
// memory is what comes next. No include guard, as of vector.h.

typedef float Number;  // what rows, and results, are of

constexpr int64_t kPanel = 2 * LANES;
constexpr int64_t kTerms = 1024;  // of a panel at once
constexpr int64_t kTermsOfBlock = 1;
constexpr int64_t kNear = 8;  // rows that are read together as terms: the first cache holds them

// Nothing goes on beside a product, which leaves no instruction unused.
constexpr bool kBeside = false;
constexpr int64_t steps_of(int64_t) { return 1; }

// Numbers from a term of a panel, or of a tile, to a later one.
constexpr int64_t panel_at(int64_t terms) { return terms * kPanel; }
constexpr int64_t tile_at(int64_t terms) { return terms * TILE; }

constexpr int64_t panel_size(int64_t terms) { return panel_at(terms); }

// Numbers from a tile to the next: with room for a whole vector at its last term.
constexpr int64_t tile_size(int64_t terms) { return ((terms - 1) * TILE + 2 * LANES - 1) / LANES * LANES; }

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

// f of some columns of the rows from first on, which is a tile's first, as so many terms of their tiles, which are `size`
// apart. f(x, row, column, count) gets up to a vector's numbers of a row, zeros after them.
template <typename F>
inline void pack_tiles(int64_t first, int64_t last, int64_t columns, const float* from, int64_t from_row, float* tiles,
                       int64_t size, F f) {
  from += first * from_row;
  tiles += first / TILE * size;
  for (int64_t i = first; i < last; i += TILE, from += TILE * from_row, tiles += size) {
    const int64_t some = last - i < TILE ? last - i : TILE;
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
template <int R = TILE, typename Beside>
inline void multiply_panel_of(int64_t rows, const float* tile, const Panel& panel, const float* start, int64_t start_row,
                              float* c, int64_t c_row, Beside& beside) {
  if (rows == R)
    multiply_panel<R>(tile, panel.data, panel.terms, start, start_row, c, c_row);
  else if constexpr (R > 1)
    multiply_panel_of<R - 1>(rows, tile, panel, start, start_row, c, c_row, beside);
}

// f of kNear rows or fewer of some columns, as so many terms of a panel. Adds them to sums.
template <typename F>
inline void pack_terms(const float* from, int64_t row, int64_t terms, int64_t columns, float* panel, float* sums, F f) {
  for (int64_t j = 0; j < kPanel; j += LANES) {
    Vector sum = load(sums + j);
    for (int64_t k = 0; k < terms; ++k) {
      const Vector x = f(j < columns ? load_some(from + k * row + j, columns - j) : Vector{});
      store(panel + k * kPanel + j, x);
      sum += x;
    }
    store(sums + j, sum);
  }
}

constexpr int64_t kSums = LANES;  // room for a sum of each row of a tile
constexpr int64_t kChunk = 512;   // rows that are multiplied at once, for the gradient of a weight
constexpr int64_t kLeft = 98 / TILE * TILE;  // columns of its left side, at once
constexpr int64_t kColumnSteps = 1;          // in which pack_columns is done

// What pack_columns keeps between its steps.
struct Columns {};

// kNear rows or fewer of some columns, as so many terms of a tile, whose rows the columns are. Adds them to sums.
inline void pack_columns(Columns&, int64_t, const float* from, int64_t row, int64_t terms, int64_t columns, float* tile,
                         float* sums) {
  Vector sum = load(sums);
  for (int64_t k = 0; k < terms; ++k) {
    const Vector x = load_some(from + k * row, columns);
    store(tile + k * TILE, x);
    sum += x;
  }
  store(sums, sum);
}
